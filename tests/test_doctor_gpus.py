"""The doctor's lines on several GPUs, with a driver that says what the tests want."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import _symmetric_memory

from moecompile import doctor, doctor_gpus
from moecompile.runtime import launch

HOPPER, AMPERE = (9, 0), (8, 0)
Host = Callable[..., None]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """`host(capabilities, ...)`: GPUs of these, who reaches whom, NVLinks as NVML counts them, torch's back end."""

    def make(
        capabilities: Sequence[tuple[int, int]],
        apart: Sequence[tuple[int, int]] = (),
        links: Sequence[Sequence[int]] | None = None,
        back_end: str | None = "CUDA",
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: (one, other) not in apart)
        monkeypatch.setattr(_symmetric_memory, "get_backend", lambda device: back_end)
        monkeypatch.setattr(_symmetric_memory, "is_nvshmem_available", lambda: False)
        monkeypatch.setattr(doctor_gpus, "_nvlinks", lambda: links)
        monkeypatch.setattr(doctor_gpus, "_seconds_of_copy", lambda one, other: 1e-3 * (1 + one))

    return make


def lines() -> dict[str, str]:
    """What is said of each item."""
    return {each.item: f"{each.state}: {each.found}" for each in doctor_gpus.between_gpus()}


def summary() -> str:
    found = doctor_gpus.expert_parallelism(doctor_gpus.ITEM)
    return f"{found.state}: {found.found}"


def test_fewer_than_two_gpus_are_one_line(host: Host) -> None:
    host([])
    assert summary() == "missing: no GPU: experts over GPUs need two; over CPUs torch's collectives do it"
    assert lines() == {}
    host([HOPPER])
    assert summary() == "note: one GPU: experts over ranks need two" and lines() == {}


def test_two_hopper_gpus_on_nvlink(host: Host) -> None:
    host([HOPPER] * 2, links=[[0, 18], [18, 0]])
    assert summary() == "ok: 2 GPUs; tokens travel by moecompile's kernels"
    assert lines() == {
        "GPU links": "ok: NVLink, 18 links: both GPUs",
        "peer access": "ok: each GPU reaches the memory of all others",
        "symmetric memory": "ok: torch's, back end CUDA; no NVSHMEM, which is not needed",
        "peer copies": "ok: 0→1 256 GB/s, 1→0 128 GB/s (copies of 256 MB, median of 5, one way at a time)",
    }


def test_some_on_nvlink_and_some_apart(host: Host) -> None:
    links = [[0, 4, 0], [4, 0, 0], [0, 0, 0]]
    host([HOPPER, HOPPER, AMPERE], apart=[(0, 2), (2, 0), (2, 1)], links=links, back_end=None)
    assert summary() == (
        "note: 3 GPUs; tokens travel by torch's collectives: GPU 2 is no Hopper GPU; no access to each other's memory: "
        "0→2, 2→0, 2→1; torch has no symmetric memory for CUDA here"
    )
    found = lines()
    assert found["GPU links"] == "note: NVLink, 4 links: 0-1; PCIe: 0-2, 1-2"
    assert found["peer access"] == "note: only 0→1, 1→0, 1→2"
    assert found["symmetric memory"].startswith("note: torch ")
    assert found["peer copies"].startswith("ok: 85 (2→0) to 256 GB/s (0→1) ")


def test_nobody_reaches_another(host: Host) -> None:
    host([HOPPER] * 2, apart=[(0, 1), (1, 0)], links=[[0, 0], [0, 0]])
    assert lines()["peer access"] == "note: none reaches another's" and lines()["GPU links"] == "note: PCIe: both GPUs"


def test_without_nvml_the_driver_is_asked(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.driver")
    asked: list[tuple[Any, ...]] = []

    def attribute(*arguments: Any) -> tuple[int, int]:
        asked.append(arguments)
        return 0, 1

    driver = SimpleNamespace(cuDeviceGet=lambda index: (0, f"device {index}"), cuDeviceGetP2PAttribute=attribute)
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    host([HOPPER] * 2)
    words = "ok: NVLink: both GPUs (NVML does not say; told by the driver's atomics between them)"
    assert lines()["GPU links"] == words
    assert [each[1:] for each in asked] == [("device 0", "device 1"), ("device 1", "device 0")] * (len(asked) // 2)
    assert "NATIVE_ATOMIC" in asked[0][0].name


def test_nvml_that_is_not_there_is_no_answer() -> None:
    if not torch.cuda.is_available():
        assert doctor_gpus._nvlinks() is None


def test_a_check_that_breaks_is_a_line_and_no_error(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host([HOPPER] * 2, links=[[0, 18], [18, 0]])

    def full(one: int, other: int) -> float:
        raise torch.OutOfMemoryError("no 256 MB left")

    monkeypatch.setattr(doctor_gpus, "_seconds_of_copy", full)
    (copies,) = (each for each in doctor_gpus.between_gpus() if each.item == "peer copies")
    assert copies.state == "note" and "no 256 MB left" in copies.found and copies.cure
    assert doctor.works_on_cpu([copies])


def test_the_median_of_five_copies_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    took = iter([5.0, 1.0, 2.0, 4.0, 3.0])
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: next(took))
    held: list[tuple[int, torch.device]] = []

    def empty(size: int, dtype: torch.dtype, device: torch.device) -> Any:
        held.append((size, device))
        return SimpleNamespace(copy_=lambda source, non_blocking: None)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    assert doctor_gpus._seconds_of_copy(1, 0) == 3e-3
    assert held == [(256 * 10**6, torch.device("cuda", 1)), (256 * 10**6, torch.device("cuda", 0))]
