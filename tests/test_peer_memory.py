"""The memory that ranks write into each other's, as far as it needs no GPU: who makes it, what is known of failures."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moecompile.runtime import peer_memory
from moecompile.runtime.peer_memory import GivenUpError, PeerMemory, memory_of, room_for

GROUP = "of these tests"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[PeerMemory]:
    """Of a group of four, without a device."""
    made = PeerMemory(torch.zeros(1), torch.zeros(4, dtype=torch.int64), 0, 1024, torch.zeros(1, dtype=torch.int64))
    monkeypatch.setitem(peer_memory._memories, GROUP, made)
    peer_memory._watch_optimizers()
    yield made


def failure_of(rank: int, other: int, step: int, slot: int) -> int:
    """As codegen/kernels/peer.cuh packs it."""
    return rank + 1 | other + 1 << 16 | step << 32 | slot << 40


def step() -> None:
    """Of an optimizer."""
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0).step()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (failure_of(2, 1, 0, 4), r"rank 2 of 4 has waited too long for rank 1 \(dispatch 2, until that rank has read"),
        (failure_of(0, 3, 1, 0), r"rank 0 of 4 has waited too long for rank 3 \(dispatch 0, until that rank's tokens"),
        (failure_of(1, 0, 2, 3), r"rank 1 of 4 has waited too long for rank 0 \(combine 1, until that rank's results"),
        (failure_of(3, 3, 3, 100), r"12800 assignments met experts of rank 3: raise the option `ep_rows`"),
        (failure_of(3, 3, 3, (1 << 24) - 1), r"2147483520 assignments met experts of rank 3"),
    ],
)
def test_nobody_goes_on(memory: PeerMemory, word: int, said: str) -> None:
    assert memory_of(GROUP, 1024) is memory and memory.failure() == ""
    step()
    memory.told[0] = word if word < 1 << 63 else word - (1 << 64)
    for call in (lambda: memory_of(GROUP, 1024), step):
        with pytest.raises(GivenUpError, match=said):
            call()


def test_what_no_kernel_carried_was_given_up_too(memory: PeerMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_memory, "_given_up", [])
    peer_memory.give_up(peer_memory.too_many(1, 900, 800))
    with pytest.raises(GivenUpError, match="900 assignments met experts of rank 1, which have room for 800"):
        step()


@pytest.mark.parametrize("sizes", [(0, 1, 16), (17, 1, 16), (2, 0, 16), (2, 1, 8), (16, 1 << 20, 1 << 12)])
def test_rooms_that_cannot_be(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected at most 16 ranks, a multiple of 16 bytes, and less than 32 GiB"):
        room_for(*sizes)


def test_another_thread_makes_it_once_on_the_same_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this thread makes while Inductor warms up for CUDA graphs would lie in their pool."""
    made: list[tuple[str, int, bool]] = []
    devices: list[int] = []

    @contextlib.contextmanager
    def device(number: int) -> Any:
        devices.append(number)
        yield

    def among_devices(group: str, room: int) -> PeerMemory:
        assert devices and threading.current_thread() is not threading.main_thread()
        made.append((group, room, torch.is_inference_mode_enabled()))
        empty = torch.zeros(1)
        return PeerMemory(empty, empty, 0, room, empty)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(peer_memory, "among_devices", among_devices)
    monkeypatch.setattr(peer_memory, "_memories", {})
    monkeypatch.setattr(peer_memory, "_outgrown", [])
    monkeypatch.setattr(peer_memory, "_watch_optimizers", lambda: None)
    with torch.inference_mode():
        first = memory_of("group", 256)
        assert memory_of("group", 128) is first
        assert memory_of("group", 512) is not first
    assert made == [("group", 256, False), ("group", 512, False)] and devices == [3, 3]
    assert peer_memory._outgrown == [first], "captured graphs may refer to it"


def test_what_fails_there_fails_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def among_devices(group: str, room: int) -> PeerMemory:
        raise RuntimeError(f"no memory for {group}")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(peer_memory, "among_devices", among_devices)
    monkeypatch.setattr(peer_memory, "_memories", {})
    with pytest.raises(RuntimeError, match="no memory for group"):
        memory_of("group", 256)
    assert not peer_memory._memories
