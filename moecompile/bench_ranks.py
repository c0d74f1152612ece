"""Benches of several ranks, `python -m moecompile bench ep|overlap`: their command line, and what one rank does.

Under torchrun its ranks are used; otherwise one process for each GPU is started. The exit status is 0 if everything was
measured, 1 if something failed or a rank died, 2 if nothing can be measured.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import distributed

from moecompile import bench, bench_gemm
from moecompile.bench_cases import Shape
from moecompile.bench_ep_ranks import (
    PATIENCE,
    Ranks,
    RanksFailedError,
    RanksTimer,
    run_here,
    run_spawned,
    under_torchrun,
)
from moecompile.bench_results import Results, Setting
from moecompile.command_line import parser_of

CPU_RANKS = 2
Steps = list[tuple[str, Callable[[], None]]]
"""What is measured, by name, in its order; each adds its rows to the results."""


@dataclass(frozen=True)
class RanksBench:
    """One of them. It is sent to other processes: all of it is found by name.

    Attributes:
        verb: what comes after `python -m moecompile`.
        documentation: of its module, whose end is its help.
        sections: of which some may be chosen.
        shapes: of which some may be chosen, whose experts the ranks share; the first is that of `--quick`.
        tiny: in their place on a CPU.
        others: whose experts the ranks share, too.
        steps: what is measured of the chosen sections and shapes.
    """

    verb: str
    documentation: str
    sections: Sequence[str]
    shapes: Sequence[Shape]
    tiny: Sequence[Shape]
    others: Sequence[Shape]
    steps: Callable[[argparse.Namespace, Setting, Ranks], Steps]

    def main(self, argv: Sequence[str]) -> int:
        """Runs it with the command line after its verb; the exit status is the same on all ranks."""
        parser = self._parser()
        chosen = parser.parse_args(argv)
        if missing := self._missing(chosen):
            print(f"python -m moecompile {self.verb}: {missing}", file=sys.stderr)
            return 2
        bench.check_writable(parser, chosen.json)
        if not chosen.shapes:
            own = self._shapes(chosen)
            chosen.shapes = tuple(each.name for each in (own[:1] if chosen.quick else own))
        work = partial(self.measure, chosen)
        if under_torchrun():
            return run_here(work, chosen.device, chosen.patience)
        size = chosen.ranks or (CPU_RANKS if chosen.device == "cpu" else torch.cuda.device_count())
        return run_spawned(work, size, chosen.device, chosen.patience)

    def measure(self, chosen: argparse.Namespace, ranks: Ranks) -> int:
        """What one rank does; rank 0 prints and writes.

        Returns:
            the exit status: 0 if everything was measured, else 1.
        """
        started = time.perf_counter()
        rounds = chosen.rounds or (bench.QUICK_ROUNDS if chosen.quick else bench.ROUNDS)
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            first = ranks.rank == 0
            machine = bench.machine(chosen.device) | {"ranks": ranks.size}
            results = Results(machine, chosen.json if first else None, None if first else nowhere)
            results.head("  ".join(f"{name} {value}" for name, value in results.machine.items()))
            if chosen.device == "cpu":
                results.head(
                    "a look without a GPU: over gloo, our operators emulated in PyTorch, and no time is a kernel's"
                )
            timer = RanksTimer(ranks)
            ceilings = bench_gemm.measure_ceilings(timer, chosen.device, rounds, results)
            setting = Setting(chosen.device, timer, rounds, ceilings, results)
            for name, work in self.steps(chosen, setting, ranks):
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

    def _shapes(self, chosen: argparse.Namespace) -> Sequence[Shape]:
        return self.tiny if chosen.device == "cpu" else self.shapes

    def _parser(self) -> argparse.ArgumentParser:
        parser = parser_of(self.verb, self.documentation)
        names = ",".join(shape.name for shape in self.shapes)
        first = self.shapes[0].name
        parser.add_argument("--ranks", type=bench.positive, metavar="N", help="processes to start (default: one a GPU)")
        parser.add_argument(
            "--only",
            type=bench.some_of(self.sections),
            default=self.sections,
            metavar="NAMES",
            help=f"sections, of {','.join(self.sections)}",
        )
        parser.add_argument("--shapes", type=bench.split, default=(), metavar="NAMES", help=f"sizes, of {names}")
        parser.add_argument(
            "--rounds", type=bench.positive, metavar="N", help=f"turns of each contender (default: {bench.ROUNDS})"
        )
        parser.add_argument("--quick", action="store_true", help=f"{first} alone, {bench.QUICK_ROUNDS} turns")
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

    def _missing(self, chosen: argparse.Namespace) -> str:
        """Why nothing can be measured here; empty if it can."""
        own = self._shapes(chosen)
        names = [shape.name for shape in own]
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
        if size is not None and (odd := [each.title for each in (*own, *self.others) if each.experts % size]):
            return f"{size} ranks cannot share the experts of {odd[0]} evenly"
        return ""
