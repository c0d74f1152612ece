"""Ranks that are processes on one GPU, each with a part of its multiprocessors, by CUDA's multi-process service.

They map each other's memory as ranks with a GPU each do, so that everything above it is what runs there: only NCCL and
torch's symmetric memory, which want a device for each rank, are replaced, by gloo and by CUDA's handles of memory.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing.reductions import reduce_tensor

from moecompile.runtime import peer_memory, sharded
from moecompile.runtime.peer_memory import SLOTS_USED, WORDS, PeerMemory
from moecompile.runtime.sharded import process_group

CONTROL = "nvidia-cuda-mps-control"


@contextmanager
def shared_gpu(ranks: int, directory: Path) -> Iterator[None]:
    """What processes started here share a GPU, `ranks` of them."""
    if shutil.which(CONTROL) is None:
        pytest.skip("needs CUDA's multi-process service")
    (directory / "mps").mkdir()
    names = {
        "CUDA_MPS_PIPE_DIRECTORY": str(directory / "mps"),
        "CUDA_MPS_LOG_DIRECTORY": str(directory / "mps"),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(100 // ranks),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        subprocess.run([CONTROL, "-d"], check=True, timeout=60)
        try:
            yield
        finally:
            subprocess.run([CONTROL], input=b"quit\n", check=False, timeout=60)


def meet() -> None:
    """By each rank before its first exchange: all are on this GPU."""
    assert "CUDA_MPS_PIPE_DIRECTORY" in os.environ
    peer_memory._reaching.clear()
    peer_memory._memories.clear()
    peer_memory._is_one_host = lambda group: True

    def among_processes(group: str, room: int) -> PeerMemory:
        found, rank = process_group(group), distributed.get_rank(process_group(group))
        own = torch.zeros(WORDS + SLOTS_USED * room, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        every: list[Any] = [None] * found.size()
        distributed.all_gather_object(every, pickle.dumps(reduce_tensor(own)), found)
        held = [own if other == rank else _rebuilt(note) for other, note in enumerate(every)]
        bases = torch.tensor([each.data_ptr() for each in held], dtype=torch.int64, device="cuda")
        return PeerMemory(own, bases, rank, room, peer_memory.word_of_host(), held=held)

    peer_memory.among_devices = among_processes
    sharded.gather_experts = _gathered_by_the_host


def _gathered_by_the_host(local: torch.Tensor, *, ranks: int, group: str, mean: bool) -> torch.Tensor:
    """As NCCL would: gloo gathers nothing of a GPU's."""
    mine = local.cpu()
    parts = [torch.empty_like(mine) for _ in range(ranks)]
    distributed.all_gather(parts, mine, process_group(group))
    return torch.cat(parts).to(local.device)


def _rebuilt(note: bytes) -> torch.Tensor:
    function, arguments = pickle.loads(note)
    found: torch.Tensor = function(*arguments)
    return found
