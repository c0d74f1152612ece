"""Checks that several ranks run together: one set of processes on gloo for all of a file's checks.

    results = run_on_ranks(2, "expert_parallel_checks", ["check_a", "check_b"], directory)
    results["check_a"]      what each rank that failed says

A check that cannot run here raises `unittest.SkipTest`. A check is a function of (rank, ranks). Each has a process
group of its own, and begins when all ranks are done with the one before: what fails on a rank, and leaves the others
waiting until `PATIENCE` is over, does not spoil the next.
"""

from __future__ import annotations

import faulthandler
import fcntl
import hashlib
import importlib
import json
import multiprocessing
import os
import time
import traceback
import unittest
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import distributed

from moecompile import ranks as moecompile_ranks
from sparing import spare

PATIENCE = timedelta(seconds=60)
SKIPPED = "skipped: "
IMPORTED = (
    "pytest",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "moecompile.lowering",
    "moecompile.pipeline",
)
"""What all ranks need."""


def checks_of(module: ModuleType, but: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the checks of a module, in its order, without those that run apart (`but`)."""
    return tuple(name for name in vars(module) if name.startswith("check_") and name not in but)


def judge(said: str) -> None:
    """Of what ranks say of a check: fails or skips the test."""
    if said and all(line.startswith(SKIPPED) for line in said.splitlines()):
        pytest.skip(said.splitlines()[0].removeprefix(SKIPPED))
    assert not said, said


def run_on_ranks(
    ranks: int, module: str, names: Sequence[str], directory: Path, patience: timedelta = PATIENCE
) -> dict[str, str]:
    """What each check came to. Where pytest-xdist has the same asked by several processes, the first runs them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return _run(ranks, module, names, directory, patience)
    words = json.dumps([ranks, module, *names]).encode()
    known = directory.parents[1] / f"{module}-{hashlib.sha256(words).hexdigest()[:16]}.json"
    with known.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed: others wait for what this one finds
        if not known.exists():
            known.write_text(json.dumps(_run(ranks, module, names, directory, patience)))
        found: dict[str, str] = json.loads(known.read_text())
    return found


def _run(ranks: int, module: str, names: Sequence[str], directory: Path, patience: timedelta) -> dict[str, str]:
    start_ranks(ranks, _rank_main, (ranks, module, list(names), str(directory), patience))
    return {name: "".join(_note(directory, name, rank).read_text() for rank in range(ranks)) for name in names}


def start_ranks(ranks: int, main: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Runs `main(rank, *args)` in processes, until all are done.

    They are copies of one that has imported what takes seconds, and has done nothing else. Where there are GPUs, each
    is a new one: CUDA does not live on in a copy.

    Raises:
        torch.multiprocessing.ProcessException: one has failed.
    """
    multiprocessing.set_forkserver_preload([*IMPORTED])
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    torch.multiprocessing.start_processes(main, args, nprocs=ranks, start_method=method)


def _rank_main(rank: int, ranks: int, module: str, names: Sequence[str], directory: str, patience: timedelta) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    spare()
    checks, place = importlib.import_module(module), Path(directory)
    moecompile_ranks.PATIENCE = patience
    for name in names:
        begun = time.monotonic()
        said, store = "", f"file://{directory}/{name}"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=patience)
        try:
            torch._dynamo.reset()
            torch.manual_seed(0)
            getattr(checks, name)(rank, ranks)
            distributed.barrier()
        except unittest.SkipTest as reason:
            said = f"{SKIPPED}{reason}\n"
        except Exception:
            said = f"rank {rank}: {traceback.format_exc()}\n"
        distributed.destroy_process_group()
        _note(place, name, rank).write_text(said)
        while not all(_note(place, name, other).exists() for other in range(ranks)):
            time.sleep(0.01)
        if rank == 0:  # pytest -s shows it
            print(f"{module}.{name}: {time.monotonic() - begun:.1f} s", flush=True)


def _note(directory: Path, name: str, rank: int) -> Path:
    return directory / f"{name}.{rank}"
