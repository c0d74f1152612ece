"""What the GPUs of this host offer to expert parallelism: the doctor's lines on several of them.

    links                who is linked to whom, by NVLink or PCIe, as NVML says through torch, or else the driver
    peer access          who reaches whose memory
    symmetric memory     torch's, in which tokens land, and its back end
    peer copies          how many bytes a second copies between them move, measured

With fewer than two GPUs there is one line, which says so.
"""

from __future__ import annotations

import importlib
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moecompile.finding import Finding

ITEM = "expert parallelism"
COPIED = 256 * 10**6
"""Bytes of a copy that is timed."""
COPIES = 5
HOPPER = (9, 0)
Pair = tuple[int, int]
"""Two GPUs, by torch's index: from one to the other."""


def expert_parallelism(item: str) -> Finding:
    """What carries the tokens of experts that are spread over this host's GPUs."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return Finding(item, "missing", "no GPU: experts over GPUs need two; over CPUs torch's collectives do it")
    if count == 1:
        return Finding(item, "note", "one GPU: experts over ranks need two")
    obstacles = [*_obstacles(range(count))]
    if obstacles:
        return Finding(item, "note", f"{count} GPUs; tokens travel by torch's collectives: {'; '.join(obstacles)}")
    return Finding(item, "ok", f"{count} GPUs; tokens travel by moecompile's kernels")


def between_gpus() -> list[Finding]:
    """The lines that only several GPUs have; a check that fails is a line, too, and says nothing against the CPU."""
    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        return []
    devices, findings = range(torch.cuda.device_count()), list[Finding]()
    for item, check in CHECKS.items():
        try:
            findings.append(check(item, devices))
        except Exception as error:  # the table must come out whatever is broken, and show it
            words = f"could not be looked at: {type(error).__name__}: {error}"
            findings.append(Finding(item, "note", words, "report this with the whole table"))
    return findings


def _obstacles(devices: Sequence[int]) -> list[str]:
    """Why moecompile's kernels cannot carry tokens between these GPUs."""
    found = []
    if others := [device for device in devices if torch.cuda.get_device_capability(device) != HOPPER]:
        found.append(f"GPU {_listed(others)} is no Hopper GPU")
    if apart := [pair for pair in _pairs(devices) if not torch.cuda.can_device_access_peer(*pair)]:
        found.append(f"no access to each other's memory: {_listed(_arrows(apart))}")
    if not _symmetric_back_end():
        found.append("torch has no symmetric memory for CUDA here")
    return found


def _links(item: str, devices: Sequence[int]) -> Finding:
    kinds: dict[str, list[Pair]] = {}
    nvlinks = _nvlinks()
    for pair in _pairs(devices):
        if nvlinks is None:
            kind = "NVLink" if _has_native_atomics(*pair) else "PCIe"
        else:
            links = nvlinks[pair[0]][pair[1]]
            kind = f"NVLink, {links} link{'s' if links > 1 else ''}" if links else "PCIe"
        kinds.setdefault(kind, []).append(pair)
    by = "" if nvlinks is not None else " (NVML does not say; told by the driver's atomics between them)"
    words = "; ".join(f"{kind}: {_which(pairs, devices)}" for kind, pairs in kinds.items())
    return Finding(item, "ok" if "PCIe" not in kinds else "note", words + by)


def _access(item: str, devices: Sequence[int]) -> Finding:
    reached = [pair for pair in _pairs(devices) if torch.cuda.can_device_access_peer(*pair)]
    if len(reached) == len(_pairs(devices)):
        return Finding(item, "ok", "each GPU reaches the memory of all others")
    cure = "nvidia-smi topo -p2p r says why; virtual machines and IOMMUs may forbid it"
    return Finding(item, "note", f"only {_listed(_arrows(reached))}" if reached else "none reaches another's", cure)


def _symmetric(item: str, devices: Sequence[int]) -> Finding:
    back_end = _symmetric_back_end()
    if not back_end:
        return Finding(item, "note", f"torch {torch.__version__} has none for CUDA", "use a torch built for CUDA")
    from torch.distributed import _symmetric_memory

    others = "NVSHMEM is there, too" if _symmetric_memory.is_nvshmem_available() else "no NVSHMEM, which is not needed"
    return Finding(item, "ok", f"torch's, back end {back_end}; {others}")


def _copies(item: str, devices: Sequence[int]) -> Finding:
    rates = {pair: COPIED / _seconds_of_copy(*pair) / 1e9 for pair in _pairs(devices)}
    size = f"copies of {COPIED // 10**6} MB, median of {COPIES}"
    if len(rates) == 2:
        words = ", ".join(
            f"{arrow} {rate:.0f} GB/s" for arrow, rate in zip(_arrows(rates), rates.values(), strict=True)
        )
        return Finding(item, "ok", f"{words} ({size}, one way at a time)")
    slowest, fastest = min(rates, key=lambda pair: rates[pair]), max(rates, key=lambda pair: rates[pair])
    (low,), (high,) = _arrows([slowest]), _arrows([fastest])
    words = f"{rates[slowest]:.0f} ({low}) to {rates[fastest]:.0f} GB/s ({high})"
    return Finding(item, "ok", f"{words} ({size}, one way at a time)")


def _nvlinks() -> Sequence[Sequence[int]] | None:
    """How many NVLinks each GPU has to each other, as NVML says it through torch; None if it does not."""
    try:
        from torch._C._autograd import DeviceType

        c10d: Any = importlib.import_module("torch._C._distributed_c10d")
        matrix: Sequence[Sequence[int]] = c10d._detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix
    except (ImportError, AttributeError, RuntimeError):
        return None
    return matrix


def _has_native_atomics(one: int, other: int) -> bool:
    """Whether the driver says that one GPU's atomics work on the other's memory, as they do over NVLink."""
    from cuda.bindings import driver

    from moecompile.runtime.launch import driver_call

    attribute = driver.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
    pair = (driver_call("cuDeviceGet", index) for index in (one, other))
    return bool(driver_call("cuDeviceGetP2PAttribute", attribute, *pair))


def _symmetric_back_end() -> str:
    """Of torch's symmetric memory for CUDA; empty if there is none."""
    if not torch.distributed.is_available():
        return ""
    from torch.distributed import _symmetric_memory

    return _symmetric_memory.get_backend(torch.device("cuda")) or ""


def _seconds_of_copy(one: int, other: int) -> float:
    """From one GPU's memory to the other's, the median of a few, after one that is not counted."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=torch.device("cuda", one))
    target = torch.empty(COPIED, dtype=torch.uint8, device=torch.device("cuda", other))
    seconds = []
    with torch.cuda.device(one):
        for number in range(1 + COPIES):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(other)
            start.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            if number:
                seconds.append(start.elapsed_time(end) / 1000)
    return statistics.median(seconds)


def _pairs(devices: Sequence[int]) -> list[Pair]:
    return [*itertools.permutations(devices, 2)]


def _arrows(pairs: Sequence[Pair] | Mapping[Pair, object]) -> list[str]:
    return [f"{one}→{other}" for one, other in pairs]


def _which(pairs: Sequence[Pair], devices: Sequence[int]) -> str:
    """These pairs in words, both directions as one where both are there."""
    if len(pairs) == len(_pairs(devices)):
        return f"all {len(devices)} GPUs" if len(devices) > 2 else "both GPUs"
    words = [f"{one}-{other}" for one, other in pairs if one < other and (other, one) in pairs]
    return _listed([*words, *_arrows([(one, other) for one, other in pairs if (other, one) not in pairs])])


def _listed(things: Sequence[object]) -> str:
    return ", ".join(map(str, things))


CHECKS: dict[str, Callable[[str, Sequence[int]], Finding]] = {
    "GPU links": _links,
    "peer access": _access,
    "symmetric memory": _symmetric,
    "peer copies": _copies,
}
