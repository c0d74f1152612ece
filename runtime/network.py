"""NVSHMEM on the host: ranks of a group that write into each other's memory over a network.

    join(group)              all ranks, once
    heap(bytes)              memory that the others may write into and the network reads; by all ranks alike
    addresses(own, ...)      where each rank's is, for the kernels
    prepare(module)          a kernel that is linked with NVSHMEM, before it is launched

It is nvshmem4py that does it, of the extra `nodes`. The process may have one NVSHMEM, of one version, which kernels are
compiled for (`moecompile.codegen.network`), and one group.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, distributed

from moecompile.codegen import network
from moecompile.codegen.network import CURE, NetworkMissing
from moecompile.runtime.sharded import process_group
from moecompile.runtime.topology import Topology

_joined: list[str] = []
"""The group whose ranks are NVSHMEM's, once they are."""


def join(group: str) -> None:
    """Makes NVSHMEM's ranks of those of a group. All of them call it; a second time nothing happens.

    Raises:
        NetworkMissing: there is no nvshmem4py, or its NVSHMEM is not the one that kernels are compiled for.
        RuntimeError: NVSHMEM has other ranks already.
    """
    if _joined == [group]:
        return
    if _joined:
        raise RuntimeError(
            f"moecompile: ranks of group {_joined[0]} exchange tokens over a network, and those of group {group} "
            "cannot: NVSHMEM has one set of ranks in a process. Share the experts of all models among the same ranks"
        )
    check_version()
    from cuda.core import Device

    found, core = process_group(group), _core()
    store = distributed.distributed_c10d._get_default_store()
    topic = f"moecompile/network/{found.group_name}/{distributed.get_process_group_ranks(found)}"
    if found.rank() == 0:
        store.set(topic, pickle.dumps(core.get_unique_id()).hex())
    meeting = pickle.loads(bytes.fromhex(store.get(topic).decode()))
    device = Device(torch.cuda.current_device())
    device.set_current()
    core.init(device=device, uid=meeting, rank=found.rank(), nranks=found.size(), initializer_method="uid")
    _joined.append(group)


def check_version() -> None:
    """Raises NetworkMissing if the library that the process loads is not the one that kernels are compiled for.

    Kernels of one version wait for ever on what a library of another sets up.
    """
    compiled_for, loaded = network.installed().version, Version(_core().get_version().libnvshmem_version)
    if compiled_for != loaded:
        raise NetworkMissing(
            f"moecompile: this process loads NVSHMEM {loaded}, and its headers are of {compiled_for}: expected one "
            f"version. pip install nvidia-nvshmem-cu13=={loaded}, or let nobody load another (LD_LIBRARY_PATH, torch)"
        )


def heap(size: int) -> Tensor:
    """So many bytes, zeros, of this rank's part of memory that all ranks have alike. All of them call it."""
    from nvshmem.core.interop.torch import tensor

    found: Tensor = tensor((size,), dtype=torch.uint8)
    return found.zero_()


def addresses(own: Tensor, topology: Topology, rank: int) -> list[int]:
    """Of each rank's memory for this device where it is on this node, and its number in NVSHMEM where it is not.

    Raises:
        RuntimeError: a rank of this node cannot be reached.
    """
    from nvshmem.core.interop.torch import get_peer_tensor

    found = list(range(topology.ranks))
    for other in topology.neighbours(rank):
        peer = own if other == rank else get_peer_tensor(own, other)
        if peer is None or peer.data_ptr() == 0:
            raise RuntimeError(
                f"moecompile: rank {rank} cannot write into the memory of rank {other} of its node: expected GPUs that "
                "NVLink or PCIe connect (python -m moecompile doctor), and LOCAL_WORLD_SIZE to say how many ranks a "
                "node has"
            )
        found[other] = peer.data_ptr()
    return found


def prepare(module: int) -> None:
    """Tells a module on the device where NVSHMEM's state is; `join` comes before.

    Raises:
        RuntimeError: NVSHMEM refuses it.
    """
    from nvshmem.bindings import nvshmem

    if not _joined:
        raise RuntimeError("moecompile: a kernel between nodes is loaded before its ranks have joined NVSHMEM")
    status = nvshmem.cumodule_init(module)
    if status:
        raise RuntimeError(f"moecompile: NVSHMEM refuses a kernel that was linked with it: status {status}")


def _core() -> Any:
    """The package nvshmem.core."""
    try:
        from nvshmem import core
    except ImportError as error:
        raise NetworkMissing(f"moecompile: ranks on several nodes meet through nvshmem4py ({error}): {CURE}") from error
    return core
