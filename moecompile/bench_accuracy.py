"""`python -m moecompile bench accuracy`: a model of bytes learns Python's library in bfloat16, in FP8, in wrong FP8.

    for each recipe, for each seed:   the seed's weights, the same batches for all, so many steps; the loss of each
    last tenth of the steps:          FP8's mean loss against bfloat16's of the same seed; bfloat16's from seed to seed

The difference is to be less than 0.25 %. That is worth something only if the set-up can tell: recipes that are known to
be worse have to come out worse than seeds differ. What chance alone makes of a run is shown by bfloat16 once more, from
weights that differ in their last bits; what a run can tell at all, by numbers with a bit of mantissa less. Takes some
minutes for each recipe on a GPU, most of them for compiling.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moecompile.bench_curves import draw
from moecompile.bench_recipes import COARSE, FAST, PER_TENSOR, ROUTER, SQUARE_GRADIENTS, wrong
from moecompile.bench_training import TINY, Setup, library_text, runs

WIDE, NUDGED, RIGHT = "bfloat16", "bfloat16, nudged", "FP8"
WRONG = (PER_TENSOR, FAST, SQUARE_GRADIENTS, ROUTER)
OTHERS = (*WRONG, COARSE)
BOUND = 0.0025
"""How far FP8's loss may be from bfloat16's, relative."""


def main(argv: Sequence[str]) -> int:
    """Runs it; returns the exit status: 0 if FP8 learns as well and wrong recipes are told, else 1; 2 without a GPU."""
    chosen = _parser().parse_args(argv)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("bench accuracy trains on a GPU, and there is none (`python -m moecompile doctor` says more)")
        return 2
    given = {each.name: getattr(chosen, each.name) for each in fields(Setup)}
    usual = TINY if chosen.device == "cpu" else Setup()
    setup = replace(usual, **{name: value for name, value in given.items() if value is not None})
    if chosen.jobs < 1:
        print(f"bench accuracy: --jobs: expected 1 or more, got {chosen.jobs}")
        return 2
    recipes = [WIDE, NUDGED, RIGHT, *(chosen.recipes if chosen.recipes is not None else OTHERS)]
    losses: dict[str, list[list[float]]] = {}
    print(f"{len(library_text(setup.text)) / 2**20:.1f} MiB of Python; {setup}", flush=True)
    for recipe, found, seconds in _every(recipes, partial(_losses, setup, chosen.seeds, chosen.device), chosen.jobs):
        losses[recipe] = found
        ends = ", ".join(f"{end(each):.4f}" for each in found)
        print(f"{recipe:<20} last tenth {ends}   {seconds:.0f} s", flush=True)
        if chosen.json is not None:
            chosen.json.write_text(json.dumps({"setup": asdict(setup), "losses": losses}), encoding="utf-8")
    losses = {recipe: losses[recipe] for recipe in recipes}
    if chosen.svg is not None:
        chosen.svg.write_text(draw(losses), encoding="utf-8")
    return judge(losses)


def _losses(setup: Setup, seeds: int, device: str, recipe: str) -> list[list[float]]:
    """Of each seed's run by one recipe, of each step."""
    data = library_text(setup.text).to(device)
    with wrong(recipe if recipe in OTHERS else None) as more:
        options: dict[str, Any] | None = None if recipe in (WIDE, NUDGED) else {"precision": "fp8", **more}
        if device == "cpu":  # a look at the command, without minutes of compiling
            options = {**(options or {}), "lowering": "eager"}
        return [*runs(setup, options, seeds, data, recipe == NUDGED)]


def _every(
    recipes: Sequence[str], losses_of: Callable[[str], list[list[float]]], jobs: int
) -> Iterator[tuple[str, list[list[float]], float]]:
    """Each recipe with its losses and the seconds they took, as they come; in so many processes beside each other."""
    timed = partial(_timed, losses_of)
    if jobs == 1:
        yield from map(timed, recipes)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(timed, recipe) for recipe in recipes]):
            yield done.result()


def _timed(losses_of: Callable[[str], list[list[float]]], recipe: str) -> tuple[str, list[list[float]], float]:
    begun = time.perf_counter()
    return recipe, losses_of(recipe), time.perf_counter() - begun


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moecompile bench accuracy",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe (default: 3)")
    for each in fields(Setup):
        convert = float if each.name == "rate" else int
        parser.add_argument(f"--{each.name}", type=convert, help=f"of the set-up (default: {each.default})")
    parser.add_argument("--recipes", nargs="*", choices=OTHERS, help="wrong ones to run besides (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="recipes that run beside each other on the GPU (default: 1)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the losses to PATH")
    parser.add_argument("--svg", type=Path, metavar="PATH", help="also draw them to PATH")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=argparse.SUPPRESS)
    return parser


def judge(losses: dict[str, list[list[float]]]) -> int:
    """Prints how far each recipe is from bfloat16, seed by seed, and whether that is as it should be."""
    wide = [end(each) for each in losses[WIDE]]
    band = (max(wide) - min(wide)) / (sum(wide) / len(wide))
    print(f"{WIDE} differs by {band:.2%} from seed to seed")
    apart = {}
    for recipe, found in losses.items():
        if recipe != WIDE:
            each = [end(loss) / right - 1 for loss, right in zip(found, wide, strict=True)]
            apart[recipe] = sum(each) / len(each)
            print(f"{recipe:<20} {apart[recipe]:+.3%}  ({', '.join(f'{one:+.3%}' for one in each)})")
    close = abs(apart[RIGHT]) < BOUND
    told = [recipe for recipe in apart if recipe in WRONG and not apart[recipe] <= max(band, BOUND)]
    print(f"FP8 within {BOUND:.2%}: {'yes' if close else 'NO'}; told to be worse: {', '.join(told) or 'none'}")
    return 0 if close and (len(told) >= 2 or not {*apart} & {*WRONG}) else 1


def end(losses: Sequence[float]) -> float:
    """The mean of the last tenth."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)
