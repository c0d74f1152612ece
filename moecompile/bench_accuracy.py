"""`python -m moecompile bench accuracy`: a model of bytes learns Python code in bfloat16, in FP8, in wrong FP8.

    for each recipe, for each seed:   the seed's weights, the same batches for all, so many steps; the loss of each
    last tenth of the steps:          FP8's mean loss against bfloat16's of the same seed; bfloat16's from seed to seed

The difference is to be less than 0.25 %. That is worth something only if the set-up can tell: recipes that are known to
be worse have to come out worse than seeds differ. What chance alone makes of a run is shown by bfloat16 once more, from
weights that differ in their last bits; what a run can tell at all, by numbers with a bit of mantissa less. Takes some
minutes for each recipe on a GPU. Runs that the file of `--json` has already are not run again, so that they may be
divided among several calls.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moecompile.bench import positive
from moecompile.bench_curves import draw
from moecompile.bench_losses import check_paths, keep, kept
from moecompile.bench_recipes import COARSE, FAST, HEAD, PER_TENSOR, ROUTER, SQUARE_GRADIENTS, UNSCALED, wrong
from moecompile.bench_training import TINY, Setup, library_text, runs
from moecompile.command_line import parser_of

WIDE, NUDGED, RIGHT = "bfloat16", "bfloat16, nudged", "FP8"
WRONG = (PER_TENSOR, FAST, SQUARE_GRADIENTS, ROUTER, HEAD, COARSE, UNSCALED)
BOUND = 0.0025
"""How far FP8's loss may be from bfloat16's, relative."""


def main(argv: Sequence[str]) -> int:
    """Runs it; returns the exit status: 0 if FP8 learns as well and wrong recipes are told, else 1.

    2 if there is no GPU, or what is asked for cannot be done.
    """
    chosen = _parser().parse_args(argv)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("bench accuracy trains on a GPU, and there is none (`python -m moecompile doctor` says more)")
        return 2
    given = {each.name: getattr(chosen, each.name) for each in fields(Setup)}
    usual = TINY if chosen.device == "cpu" else Setup()
    setup = replace(usual, **{name: value for name, value in given.items() if value is not None})
    try:
        setup.check()
        check_paths(chosen.json, chosen.svg)
        losses = kept(chosen.json, setup)
    except ValueError as error:
        print(f"bench accuracy: {error}")
        return 2
    recipes = [WIDE, NUDGED, RIGHT, *(chosen.recipes if chosen.recipes is not None else WRONG)]
    wanted = {name: [seed for seed in range(chosen.seeds) if seed not in losses.get(name, {})] for name in recipes}
    print(f"{len(library_text(setup.text)) / 2**20:.1f} MiB of Python; {setup}", flush=True)
    losses_of = partial(_losses, setup, chosen.device)
    for recipe, seed, found, seconds in _every({name: of for name, of in wanted.items() if of}, losses_of, chosen.jobs):
        losses.setdefault(recipe, {})[seed] = found
        print(f"{recipe:<34} seed {seed}  last tenth {end(found):.4f}   {seconds:.0f} s", flush=True)
        if chosen.json is not None:
            keep(chosen.json, setup, losses)
    runs = {name: [losses[name][seed] for seed in range(chosen.seeds)] for name in recipes}
    if chosen.svg is not None:
        chosen.svg.write_text(draw(runs, WIDE), encoding="utf-8")
    return judge(runs)


def _losses(setup: Setup, device: str, recipe: str, seeds: Sequence[int]) -> Iterator[tuple[int, list[float]]]:
    """Of each seed's run by one recipe, of each step."""
    data = library_text(setup.text).to(device)
    with wrong(recipe if recipe in WRONG else None) as more:
        options: dict[str, Any] | None = None if recipe in (WIDE, NUDGED) else {"precision": "fp8", **more}
        if device == "cpu":  # a look at the command, without minutes of compiling
            options = {**(options or {}), "lowering": "eager"}
        yield from runs(setup, options, seeds, data, recipe == NUDGED)


LossesOf = Callable[[str, Sequence[int]], Iterable[tuple[int, list[float]]]]
Run = tuple[str, int, list[float], float]
"""Recipe, seed, losses, and the seconds they took."""


def _every(wanted: Mapping[str, Sequence[int]], losses_of: LossesOf, jobs: int) -> Iterator[Run]:
    """The runs that are wanted, as they come; of so many recipes beside each other, each in a process of its own."""
    if jobs == 1:
        for recipe, seeds in wanted.items():
            yield from _timed(losses_of, recipe, seeds)
        return
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool:
        done: queue.Queue[Run] = manager.Queue()
        waiting = {pool.submit(_put, done, losses_of, *each) for each in wanted.items()}
        ended = set[Future[None]]()
        while waiting:
            more, waiting = wait(waiting, timeout=1)
            ended |= more
            while not done.empty():
                yield done.get()
        for each in ended:  # where one has failed, the others' runs are not lost
            each.result()


def _timed(losses_of: LossesOf, recipe: str, seeds: Sequence[int]) -> Iterator[Run]:
    begun = time.perf_counter()
    for seed, losses in losses_of(recipe, seeds):
        yield recipe, seed, losses, time.perf_counter() - begun
        begun = time.perf_counter()


def _put(done: queue.Queue[Run], losses_of: LossesOf, recipe: str, seeds: Sequence[int]) -> None:
    for run in _timed(losses_of, recipe, seeds):
        done.put(run)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("bench accuracy", __doc__)
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs of each recipe (default: 3)")
    for each in fields(Setup):
        convert = float if each.name == "rate" else int
        parser.add_argument(
            f"--{each.name}", type=convert, metavar="N", help=f"of the set-up (default: {each.default})"
        )
    parser.add_argument(
        "--recipes", nargs="*", choices=WRONG, metavar="NAME",
        help=f"wrong ones to run besides, of {', '.join(map(repr, WRONG))} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="recipes that run beside each other (default: 1)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write the losses to PATH, and go on from what it has"
    )
    parser.add_argument("--svg", type=Path, metavar="PATH", help="also draw them to PATH")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=argparse.SUPPRESS)
    return parser


def judge(losses: Mapping[str, Sequence[Sequence[float]]]) -> int:
    """Prints how far each recipe is from bfloat16, seed by seed, and whether that is as it should be.

    Args:
        losses: by recipe, of each seed, of each step.

    Returns:
        0 if FP8 is within BOUND, and two wrong recipes are further off than seeds are from each other; else 1. Where
        no wrong recipe was run, the former alone.
    """
    wide = [end(each) for each in losses[WIDE]]
    band = (max(wide) - min(wide)) / (sum(wide) / len(wide))
    print(f"{WIDE} differs by {band:.2%} from seed to seed; others from it, seed by seed:")
    apart = {}
    for recipe, found in losses.items():
        if recipe != WIDE:
            each = [end(loss) / right - 1 for loss, right in zip(found, wide, strict=True)]
            apart[recipe], error = mean(each)
            print(f"{recipe:<34} {apart[recipe]:+.3%} \u00b1 {error:.3%}  ({', '.join(f'{one:+.3%}' for one in each)})")
    close = abs(apart[RIGHT]) < BOUND
    told = [recipe for recipe in apart if recipe in WRONG and not apart[recipe] <= max(band, BOUND)]
    print(f"FP8 within {BOUND:.2%}: {'yes' if close else 'NO'}; told to be worse: {', '.join(told) or 'none'}")
    return 0 if close and (len(told) >= 2 or not {*apart} & {*WRONG}) else 1


def mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which one value does not tell: infinity."""
    middle, count = sum(values) / len(values), len(values)
    if count == 1:
        return middle, math.inf
    return middle, math.sqrt(sum((each - middle) ** 2 for each in values) / (count - 1) / count)


def end(losses: Sequence[float]) -> float:
    """The mean of the last tenth."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)
