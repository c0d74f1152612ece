"""`python -m moecompile bench ep`: experts over the GPUs of a host, against what users write themselves today.

    exchange    the layout, dispatch and combine of 4096 tokens a rank, each by itself
    block       whole blocks, compiled after `moecompile.shard_experts`, forward and, of one, forward+backward

The baseline is PyTorch's: tokens sorted by expert, all_to_all_single of NCCL, grouped GEMMs. Ours and theirs take turns
in the same processes, one a GPU; all begin each timed region together, and the slowest rank counts. Under torchrun its
ranks are used; otherwise one process for each GPU is started. Bars are for two ranks. Needs Hopper GPUs; one will do
for a look. The exit status is 0 if everything was measured, 1 if something failed or a rank died, 2 if nothing can be
measured.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from moecompile import bench, bench_gemm
from moecompile.bench_ep_blocks import measure_block
from moecompile.bench_ep_cases import BLOCKS, EXCHANGE, SECTIONS, TINY, TINY_EXCHANGE
from moecompile.bench_ep_exchange import measure_exchange
from moecompile.bench_ep_ranks import (
    PATIENCE,
    Ranks,
    RanksFailedError,
    RanksTimer,
    run_here,
    run_spawned,
    under_torchrun,
)
from moecompile.bench_ep_symmetric import measure_symmetric
from moecompile.bench_results import Results, Setting
from moecompile.command_line import parser_of

CPU_RANKS = 2


def main(argv: Sequence[str]) -> int:
    """Runs it.

    Args:
        argv: the command line after `python -m moecompile bench ep`.

    Returns:
        the exit status, the same on all ranks.
    """
    parser = _parser()
    chosen = parser.parse_args(argv)
    if missing := _missing(chosen):
        print(f"python -m moecompile bench ep: {missing}", file=sys.stderr)
        return 2
    try:
        if chosen.json is not None:
            chosen.json.touch()
    except OSError as error:
        parser.error(f"--json: {chosen.json} cannot be written: {error.strerror}")
    work = partial(measure, chosen)
    if under_torchrun():
        return run_here(work, chosen.device, chosen.patience)
    size = chosen.ranks or (CPU_RANKS if chosen.device == "cpu" else torch.cuda.device_count())
    return run_spawned(work, size, chosen.device, chosen.patience)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("bench ep", __doc__)
    names = ",".join(shape.name for shape in BLOCKS)
    parser.add_argument("--ranks", type=bench.positive, metavar="N", help="processes to start (default: one a GPU)")
    parser.add_argument(
        "--only",
        type=bench.some_of(SECTIONS),
        default=SECTIONS,
        metavar="NAMES",
        help=f"sections, of {','.join(SECTIONS)}",
    )
    parser.add_argument("--shapes", type=bench.split, default=(), metavar="NAMES", help=f"blocks, of {names}")
    parser.add_argument(
        "--rounds", type=bench.positive, metavar="N", help=f"turns of each contender (default: {bench.ROUNDS})"
    )
    parser.add_argument("--quick", action="store_true", help=f"the first block, {bench.QUICK_ROUNDS} turns")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all rows to PATH, after each of them")
    parser.add_argument(
        "--patience",
        type=bench.positive,
        default=int(PATIENCE),
        metavar="SECONDS",
        help=f"that a rank waits for another, which may be compiling (default: {PATIENCE:g})",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=argparse.SUPPRESS)
    return parser


def _missing(chosen: argparse.Namespace) -> str:
    """Why nothing can be measured here; empty if it can."""
    blocks = TINY if chosen.device == "cpu" else BLOCKS
    names = [shape.name for shape in blocks]
    if unknown := [name for name in chosen.shapes if name not in names]:
        return f"--shapes: there is no {', '.join(unknown)}; there are {', '.join(names)}"
    if not distributed.is_available():
        return "torch is built without torch.distributed"
    size = int(os.environ["WORLD_SIZE"]) if under_torchrun() else chosen.ranks
    if under_torchrun() and chosen.ranks not in (None, size):
        return f"--ranks: torchrun has started {size}, not {chosen.ranks}; leave it out"
    if chosen.device == "cuda":
        if missing := bench.missing():
            return missing
        here = int(os.environ.get("LOCAL_WORLD_SIZE", size)) if under_torchrun() else size
        if here is not None and here > torch.cuda.device_count():
            return f"{here} ranks need a GPU each, and torch sees {torch.cuda.device_count()}"
    if size is not None and (odd := [shape.title for shape in (*blocks, EXCHANGE) if shape.experts % size]):
        return f"{size} ranks cannot share the experts of {odd[0]} evenly"
    return ""


def measure(chosen: argparse.Namespace, ranks: Ranks) -> int:
    """What one rank does; rank 0 prints and writes.

    Returns:
        the exit status: 0 if everything was measured, else 1.
    """
    started = time.perf_counter()
    rounds = chosen.rounds or (bench.QUICK_ROUNDS if chosen.quick else bench.ROUNDS)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        first = ranks.rank == 0
        results = Results(_machine(chosen, ranks), chosen.json if first else None, None if first else nowhere)
        results.head("  ".join(f"{name} {value}" for name, value in results.machine.items()))
        if chosen.device == "cpu":
            results.head(
                "a look without a GPU: over gloo, our operators emulated in PyTorch, and no time is a kernel's"
            )
        timer = RanksTimer(ranks)
        ceilings = bench_gemm.measure_ceilings(timer, chosen.device, rounds, results)
        setting = Setting(chosen.device, timer, rounds, ceilings, results)
        for name, work in _measurements(chosen, setting, ranks):
            try:
                work()
            except RanksFailedError as error:  # all ranks raise it; what else is to be measured is measured
                results.fail(name, error)
            gc.collect()
            if chosen.device == "cuda":
                torch.cuda.empty_cache()
        met, targets = results.verdicts()
        failed = f", {len(results.failures)} measurements FAILED" if results.failures else ""
        taken = time.perf_counter() - started
        results.head(f"{met} of {targets} targets met{failed}; {rounds} rounds, {taken:.0f} s")
    return 1 if results.failures else 0


def _measurements(chosen: argparse.Namespace, setting: Setting, ranks: Ranks) -> list[tuple[str, Callable[[], None]]]:
    """What was chosen, by name, in the order in which it is measured."""
    on_cpu = chosen.device == "cpu"
    shape, blocks = (TINY_EXCHANGE, TINY) if on_cpu else (EXCHANGE, BLOCKS)
    options = {"lowering": "eager"} if on_cpu else {}  # there Inductor's minutes show nothing
    wanted = chosen.shapes or [each.name for each in (blocks[:1] if chosen.quick else blocks)]

    def exchange() -> None:
        measure_exchange(setting, ranks, shape, measure_symmetric(ranks, shape, setting.rounds))

    found: dict[str, list[tuple[str, Callable[[], None]]]] = {
        "exchange": [("exchange", exchange)],
        "block": [
            (f"block {each.name}", partial(measure_block, setting, ranks, each, options))
            for each in blocks
            if each.name in wanted
        ],
    }
    return [each for section in chosen.only for each in found[section]]


def _machine(chosen: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    return bench.machine(chosen.device) | {"ranks": ranks.size}
