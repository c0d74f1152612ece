"""`python -m moecompile bench experts|model`: moecompile and what a user would otherwise have, in one process.

Everything that is compared is measured in turns, on random data and random routing: whole blocks of experts, forward
and forward+backward, against PyTorch's grouped GEMM, eager and under Inductor; a few tokens, as in decoding; the
grouped GEMMs by themselves, against PyTorch's and against the largest dense product of cuBLAS; and transformers' blocks
under torch.compile, against the same under Inductor. A row is printed as soon as it is there: the median and how far
the middle half of the timings is from it, floating-point operations a second, the share of the least time that the
device would need, the time of the host, ratios (more than 1 is faster), and whether the target is met.

Needs a Hopper GPU. The exit status is 0 if everything was measured, 1 if something failed, 2 if nothing can be.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import moecompile
from moecompile import bench_experts, bench_gemm, bench_layers, bench_model
from moecompile.bench_cases import (
    BLOCKS,
    DECODE,
    DECODE_TOKENS,
    LAYERS,
    MODELS,
    PRODUCTS,
    QUICK,
    QUICK_TOKENS,
    SEQUENCE,
    TINY,
    TINY_PRODUCTS,
    Product,
    Shape,
)
from moecompile.bench_results import Results, Setting
from moecompile.bench_timing import CudaTimer, HostTimer
from moecompile.command_line import parser_of, whole_number

SECTIONS = ("block", "decode", "gemm", "model")
ROUNDS, QUICK_ROUNDS = 11, 3


def main(argv: Sequence[str]) -> int:
    """Runs the bench.

    Args:
        argv: the command line after `python -m moecompile bench`.

    Returns:
        the exit status: 0 if everything was measured, 1 if something failed, 2 if nothing can be measured here.
    """
    if argv[:1] == ["accuracy"]:
        from moecompile import bench_accuracy

        return bench_accuracy.main(argv[1:])
    if argv[:1] == ["ep"]:
        from moecompile import bench_ep

        return bench_ep.main(argv[1:])
    if argv[:1] == ["overlap"]:
        from moecompile import bench_overlap

        return bench_overlap.main(argv[1:])
    parser = _parser()
    chosen = parser.parse_args(argv)
    names = _names(chosen.device)
    if unknown := [name for name in chosen.shapes if name not in names]:
        parser.error(f"--shapes: there is no {', '.join(unknown)}; there are {', '.join(names)}")
    if chosen.device == "cuda" and (lacking := missing()):
        print(f"python -m moecompile bench: {lacking}", file=sys.stderr)
        return 2
    check_writable(parser, chosen.json)
    return _run(chosen)


def check_writable(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """Ends the command where the file of `--json` cannot be written, before anything is measured."""
    try:
        if path is not None:
            path.touch()
    except OSError as error:
        parser.error(f"--json: {path} cannot be written: {error.strerror}")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("bench", __doc__)
    parser.add_argument(
        "what",
        choices=["experts", "model", "ep", "overlap", "accuracy"],
        help="the experts of one GPU, whole decoder layers in FP8, experts over several GPUs (bench ep --help), layers "
        "whose communication is hidden (bench overlap --help), or how well FP8 learns (bench accuracy --help)",
    )
    parser.add_argument(
        "--only",
        type=some_of(SECTIONS),
        default=SECTIONS,
        metavar="NAMES",
        help=f"experts: sections, of {','.join(SECTIONS)}",
    )
    parser.add_argument(
        "--layers", type=_positives, default=LAYERS, metavar="N,N", help=f"model: layers (default: {_joined(LAYERS)})"
    )
    parser.add_argument(
        "--sequence", type=positive, metavar="N", help=f"model: tokens of a sequence (default: {SEQUENCE})"
    )
    parser.add_argument(
        "--shapes", type=split, default=(), metavar="NAMES", help=f"sizes, of {','.join(_names('cuda'))}"
    )
    parser.add_argument("--rounds", type=positive, metavar="N", help=f"turns of each contender (default: {ROUNDS})")
    parser.add_argument("--quick", action="store_true", help=f"fewer sizes, {QUICK_ROUNDS} turns: a first look")
    parser.add_argument("--profile", action="store_true", help="also list the kernels of each block or step")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all rows to PATH, after each of them")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=argparse.SUPPRESS)
    return parser


def split(text: str) -> tuple[str, ...]:
    """An argument of the command line that is names with commas between."""
    return tuple(part for part in text.split(",") if part)


def some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """An argument of the command line that is one or more of these names."""

    def parsed(text: str) -> tuple[str, ...]:
        names = split(text)
        if not names or not set(names) <= set(known):
            raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {text!r}")
        return names

    return parsed


def _positives(text: str) -> tuple[int, ...]:
    return tuple(map(positive, split(text)))


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def positive(text: str) -> int:
    """An argument of the command line that is a whole number, 1 or more."""
    return whole_number(text, "a positive number")


def missing() -> str:
    """Why nothing can be measured here; empty if it can."""
    needed = "moecompile's kernels need a Hopper GPU (H100, H200)"
    advice = "`python -m moecompile doctor` says what this machine has"
    if not torch.cuda.is_available():
        return f"{needed}, and torch sees no GPU; {advice}"
    if torch.cuda.get_device_capability() != (9, 0) or torch.version.hip is not None:
        return f"{needed}, not {torch.cuda.get_device_name()}; {advice}"
    from moecompile.codegen import nvrtc

    try:
        nvrtc.version()
    except nvrtc.CompilerMissing as error:
        return str(error)
    return ""


def _run(chosen: argparse.Namespace) -> int:
    started = time.perf_counter()
    rounds = chosen.rounds or (QUICK_ROUNDS if chosen.quick else ROUNDS)
    results = Results(machine(chosen.device), chosen.json)
    results.head("  ".join(f"{name} {value}" for name, value in results.machine.items()))
    if chosen.device == "cpu":
        results.head("a look without a GPU: our operators are emulated in PyTorch, and no time is a kernel's")
    timer = CudaTimer() if chosen.device == "cuda" else HostTimer()
    ceilings = bench_gemm.measure_ceilings(timer, chosen.device, rounds, results)
    setting = Setting(chosen.device, timer, rounds, ceilings, results, chosen.profile)
    seconds: dict[str, float] = {"ceilings": time.perf_counter() - started}
    measurements = _of_layers(chosen, setting) if chosen.what == "model" else _measurements(chosen, setting)
    for name, measure in measurements:
        begun = time.perf_counter()
        try:
            measure()
        except Exception as error:  # what else is to be measured is measured all the same
            results.fail(name, error)
        gc.collect()
        if chosen.device == "cuda":
            torch.cuda.empty_cache()
        section = name.partition(" ")[0]
        seconds[section] = seconds.get(section, 0.0) + time.perf_counter() - begun
    met, targets = results.verdicts()
    failed = f", {len(results.failures)} measurements FAILED" if results.failures else ""
    where = ", ".join(f"{section} {taken:.0f}" for section, taken in seconds.items())
    results.head(f"{met} of {targets} targets met{failed}; {rounds} rounds, {sum(seconds.values()):.0f} s: {where}")
    return 1 if results.failures else 0


def _measurements(chosen: argparse.Namespace, setting: Setting) -> list[tuple[str, Callable[[], None]]]:
    """What was chosen, by name, in the order in which it is measured."""
    blocks, decode, products, models = _cases(chosen.device)
    wanted = set(chosen.shapes or (QUICK if chosen.quick and chosen.device == "cuda" else _names(chosen.device)))
    tokens = QUICK_TOKENS if chosen.quick or chosen.device == "cpu" else DECODE_TOKENS
    found: dict[str, list[tuple[str, Callable[[], None]]]] = {
        "gemm": [
            (f"gemm {each.name} {precision}", partial(bench_gemm.measure_product, setting, each, precision))
            for each in products
            for precision in bench_gemm.NAMES
            if each.name in wanted
        ],
        "block": [
            (f"block {each.name}", partial(bench_experts.measure_block, setting, each))
            for each in blocks
            if each.name in wanted
        ],
        "decode": [
            (f"decode {each.name}", partial(bench_experts.measure_decode, setting, each, tokens))
            for each in decode
            if each.name in wanted
        ],
        "model": [
            (f"model {each.name}", partial(bench_model.measure_model, setting, each))
            for each in models
            if each.name in wanted
        ],
    }
    return [each for section in chosen.only for each in found[section]]


def _of_layers(chosen: argparse.Namespace, setting: Setting) -> list[tuple[str, Callable[[], None]]]:
    """The same for whole layers."""
    *_, models = _cases(chosen.device)
    sequence = chosen.sequence or min(SEQUENCE, models[0].tokens)
    return [
        (f"model {shape.name} x{layers}", partial(bench_layers.measure_layers, setting, shape, layers, sequence))
        for layers in chosen.layers
        for shape in models
        if not chosen.shapes or shape.name in chosen.shapes
    ]


def _cases(device: str) -> tuple[Sequence[Shape], Sequence[Shape], Sequence[Product], Sequence[Shape]]:
    """Blocks, those of decoding, products, and blocks of models."""
    if device == "cpu":
        return (TINY,), (TINY,), TINY_PRODUCTS, (TINY,)
    shapes = {shape.name: shape for shape in BLOCKS}
    return BLOCKS, [shapes[name] for name in DECODE], PRODUCTS, [shapes[name] for name in MODELS]


def _names(device: str) -> tuple[str, ...]:
    """What `--shapes` may name."""
    blocks, _, products, _ = _cases(device)
    return (*(shape.name for shape in blocks), *(product.name for product in products))


def machine(device: str) -> dict[str, Any]:
    """What is measured with, by name."""
    facts = {"moecompile": moecompile.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return facts
