"""`python -m moecompile simulate`: pipeline schedules in time, beside what is published of them.

1F1B, ZB1P, DualPipe and DualPipeV run in a simulation, each on as many ranks as it has for these stages: how long a
step takes, how long each rank waits (the bubble), how many activations it holds at most, each of one micro-batch on one
stage. Beside these numbers are those of the published formulas. A schedule that does not exist for such numbers of
stages and micro-batches says why.

All stages are alike, a rank runs one thing at a time, and what ranks send to each other takes no time unless --transfer
says how much. Times have any unit. Needs no GPU. The exit status is 2 for input that cannot be.

`simulate cluster MODEL` predicts these times for a model's layers on GPUs of several hosts; it has a --help of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from moecompile import pipeline_formulas
from moecompile.command_line import parser_of, whole_number
from moecompile.pipeline_figure import LEGEND, columns, figure, number_text
from moecompile.pipeline_formulas import Published
from moecompile.pipeline_schedules import SCHEDULES, Schedule, SizeError
from moecompile.pipeline_simulation import Durations, Timeline, simulate
from moecompile.text_table import table

HEADERS = ("schedule", "ranks", "stages each", "time", "bubble", "published", "activations", "published")
WIDEST_FIGURE = 100_000
LONGEST = 10**12
"""Times beyond this are mistakes, and whoever wrote them waits for nothing."""


def main(argv: Sequence[str]) -> int:
    """Simulates the schedules and prints what came of it.

    Args:
        argv: the command line after `python -m moecompile simulate`.

    Returns:
        the exit status, 0; a wrong command line exits with 2.
    """
    if argv and argv[0] == "cluster":
        from moecompile import cluster_command

        return cluster_command.main(argv[1:])
    parser = _parser()
    chosen = parser.parse_args(argv)
    durations = _durations(parser, chosen)
    if chosen.figure is not None:
        print(_drawn(parser, chosen, durations))
        return 0
    results = {name: _simulated(name, chosen, durations) for name in SCHEDULES}
    if chosen.json:
        rows = [_as_dict(name, chosen, result) for name, result in results.items()]
        print(json.dumps(rows, indent=2))
    else:
        print(_title(f"{chosen.stages} stages, {chosen.microbatches} micro-batches", durations))
        lines = table(HEADERS, [_as_row(name, result) for name, result in results.items()], terminal_width())
        print("\n".join(["", *(line.rstrip() for line in lines), ""]))
        print(f"  PP is {chosen.stages}, the number of stages. A bubble that is not the same on all ranks is a range.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("simulate", __doc__)
    for name, default, what in (
        ("stages", 8, "stages of the model"),
        ("microbatches", 20, "micro-batches of a training step"),
    ):
        parser.add_argument(
            f"--{name}", type=whole_number, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    for name, default, what in (
        ("forward", 1, "time of a forward, F"),
        ("backward", 2, "of a whole backward, B"),
        ("weight", 1, "of its weight part, W"),
        ("transfer", 0, "of sending what a stage gives to another rank"),
    ):
        parser.add_argument(
            f"--{name}", type=_time, default=Fraction(default), metavar="T", help=f"{what} (default: {default})"
        )
    parser.add_argument(
        "--overlapped", type=_time, metavar="T", help="of a forward and a backward that run as one, F&B (default: F+B)"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print the rows as JSON")
    shown.add_argument(
        "--figure",
        nargs="?",
        const="DualPipe",
        choices=list(SCHEDULES),
        metavar="NAME",
        help=f"draw one of {', '.join(SCHEDULES)} in place of the table (DualPipe if none is named)",
    )
    return parser


def _time(text: str) -> Fraction:
    """The decimal number as a fraction, so that sums are exact, and equal to what a formula gives."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= LONGEST:
        raise argparse.ArgumentTypeError(f"expected a time, a number from 0 to {LONGEST:.0e}, got {text!r}")
    return Fraction(repr(value))


def _durations(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> Durations:
    """Those that were chosen; times that cannot be end the command."""
    forward, backward, weight = chosen.forward, chosen.backward, chosen.weight
    overlapped = forward + backward if chosen.overlapped is None else chosen.overlapped
    for name, value in (("forward", forward), ("backward", backward)):
        if not value:
            parser.error(f"--{name}: expected more than 0")
    if weight > backward:
        parser.error(
            f"--weight: expected at most {number_text(backward)}, the whole backward, got {number_text(weight)}; "
            "--backward is the input part and the weight part together"
        )
    longer = max(forward, backward)
    if overlapped < longer:
        parser.error(
            f"--overlapped: expected at least {number_text(longer)}, the longer of forward and backward, "
            f"got {number_text(overlapped)}; it is the time of both together"
        )
    return Durations(forward, backward, weight, overlapped, chosen.transfer)


def _simulated(name: str, chosen: argparse.Namespace, durations: Durations) -> Timeline | str:
    """The schedule in time, or why there is none."""
    try:
        schedule = SCHEDULES[name](chosen.stages, chosen.microbatches)
    except SizeError as error:
        return str(error)
    return simulate(schedule, durations)


def _as_dict(name: str, chosen: argparse.Namespace, result: Timeline | str) -> dict[str, Any]:
    row: dict[str, Any] = {"schedule": name, "stages": chosen.stages, "microbatches": chosen.microbatches}
    if isinstance(result, str):
        return {**row, "bubble": None, "peak_activations": None, "reason": result}
    bubble = max(result.bubbles)
    whole = bubble.denominator == 1
    return {
        **row,
        "bubble": int(bubble) if whole else float(bubble),
        "peak_activations": max(result.peak_activations),
    }


def _as_row(name: str, result: Timeline | str) -> tuple[tuple[str, ...], str]:
    """A row of the table, and what stands below it."""
    if isinstance(result, str):
        return (name, *["-"] * (len(HEADERS) - 1)), result
    schedule = result.schedule
    bubble = pipeline_formulas.bubble(name, schedule.stages, schedule.microbatches, result.durations)
    peak = pipeline_formulas.peak_activations(name, schedule.stages, schedule.microbatches)
    least, most = min(result.bubbles), max(result.bubbles)
    cells = (
        name,
        str(len(schedule.ranks)),
        str(_stages_of_a_rank(schedule)),
        number_text(result.makespan),
        number_text(most) if least == most else f"{number_text(least)} to {number_text(most)}",
        _published(bubble),
        str(max(result.peak_activations)),
        _published(peak),
    )
    return cells, "" if bubble.relation else f"the formula is a bound only where {bubble.condition}"


def _published(number: Published) -> str:
    return f"{number.relation or '?'} {number_text(number.value)}, {number.formula}"


def _stages_of_a_rank(schedule: Schedule) -> int:
    return len({action.stage for step in schedule.ranks[0] for action in step.parts})


def _drawn(parser: argparse.ArgumentParser, chosen: argparse.Namespace, durations: Durations) -> str:
    """The figure with what is to be known to read it; a schedule that does not exist ends the command."""
    result = _simulated(chosen.figure, chosen, durations)
    if isinstance(result, str):
        parser.error(f"--figure: {chosen.figure} cannot be drawn: {result}")
    if columns(result) > WIDEST_FIGURE:
        parser.error(
            f"--figure: it would be {columns(result)} characters wide, expected at most {WIDEST_FIGURE}; "
            "take fewer micro-batches, or a longer --forward, which sets the scale"
        )
    title = f"{chosen.figure}: {chosen.stages} stages on {len(result.ranks)} ranks, {chosen.microbatches} micro-batches"
    return "\n".join(
        [_title(title, durations), *textwrap.wrap(LEGEND, terminal_width()), "", figure(result, terminal_width())]
    )


def _title(sizes: str, durations: Durations) -> str:
    times = {
        "F": durations.forward,
        "B": durations.backward,
        "W": durations.weight,
        "F&B": durations.overlapped,
        "a transfer": durations.transfer,
    }
    return f"{sizes}; " + ", ".join(f"{name} {number_text(time)}" for name, time in times.items())


def terminal_width() -> int:
    """Of the terminal, or `COLUMNS`; no less than 60."""
    return max(shutil.get_terminal_size((100, 24)).columns, 60)
