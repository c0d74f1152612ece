"""Memory that ranks write into each other's: who makes it, as far as that needs no GPU."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch

from moecompile.runtime import peer_memory


def test_another_thread_makes_it_once_on_the_same_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this thread makes while Inductor warms up for CUDA graphs would lie in their pool."""
    made: list[tuple[str, int, bool]] = []
    devices: list[int] = []

    @contextlib.contextmanager
    def device(number: int) -> Any:
        devices.append(number)
        yield

    def among_devices(group: str, room: int) -> peer_memory.PeerMemory:
        assert devices and threading.current_thread() is not threading.main_thread()
        made.append((group, room, torch.is_inference_mode_enabled()))
        empty = torch.zeros(1)
        return peer_memory.PeerMemory(empty, empty, 0, room, empty)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(peer_memory, "among_devices", among_devices)
    monkeypatch.setattr(peer_memory, "_memories", {})
    monkeypatch.setattr(peer_memory, "_outgrown", [])
    monkeypatch.setattr(peer_memory, "_watch_optimizers", lambda: None)
    with torch.inference_mode():
        first = peer_memory.memory_of("group", 256)
        assert peer_memory.memory_of("group", 128) is first
        assert peer_memory.memory_of("group", 512) is not first
    assert made == [("group", 256, False), ("group", 512, False)] and devices == [3, 3]
    assert peer_memory._outgrown == [first], "captured graphs may refer to it"


def test_what_fails_there_fails_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def among_devices(group: str, room: int) -> peer_memory.PeerMemory:
        raise RuntimeError(f"no memory for {group}")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(peer_memory, "among_devices", among_devices)
    monkeypatch.setattr(peer_memory, "_memories", {})
    with pytest.raises(RuntimeError, match="no memory for group"):
        peer_memory.memory_of("group", 256)
    assert not peer_memory._memories
