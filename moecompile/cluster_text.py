"""What is predicted of a cluster as tables in text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from moecompile.passes.hardware import named
from moecompile.simulate import terminal_width
from moecompile.text_table import table

OUTCOME = ("ms", "computing", "communicating", "exposed", "of ms")
EXPLAINED = (
    "computing and communicating: how long either is busy; exposed: nothing is computed, as what is to come has not "
    "arrived."
)


def text(found: Mapping[str, Any]) -> str:
    """The tables below each other, assumptions last; of what `cluster_command.predicted` gives."""
    device = named(found["device"]).title
    title = (
        f"{found['model']}: {found['layers']} layers on {found['nodes']} x {found['gpus']} {device}, "
        f"{found['tokens']} tokens on each; predicted, in ms"
    )
    parts = [
        ((name, *(f"{part[kind]:.2f}" for kind in ("forward", "inputs", "weights"))), "")
        for name, part in found["parts"].items()
    ]
    ways = [
        ((name, f"{way['network'] / 1e6:.0f}", f"{way['nvlink'] / 1e6:.0f}", f"{way['ms']:.2f}"), "")
        for name, way in found["exchanges"].items()
    ]
    counts = [((str(row["sms"]), *_outcome(row)), "") for row in found["by_sms"]]
    sections = [
        [title],
        _table(("part of a layer", "forward", "backward, inputs", "weights"), parts),
        _table(("exchange of a layer", "network MB", "NVLink MB", "ms"), ways),
        [*_table(("", *OUTCOME), _programs(found)), *_wrapped(EXPLAINED)],
        [f"  the pair, with other numbers of multiprocessors for communication; it was {found['sms']}"],
        _table(("SMs", *OUTCOME), counts),
        *_step(found["step"]),
        ["  assumed", *(line for each in found["assumptions"] for line in _wrapped(each, "  - ", "    "))],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _programs(found: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """Rows of the forward, the backward, both, and what is published."""
    forward, backward = found["forward"], found["backward"]
    both = {name: forward[name] + backward[name] for name in ("total", "computing", "communicating", "exposed")}
    apart = {**both, "exposed_share": both["exposed"] / both["total"]}
    rows = [("forward", forward), ("backward", backward), ("one after the other", apart), ("pair", found["pair"])]
    if found["published"] is not None:
        rows.append(("published trace", found["published"]))
    return [((name, *_outcome(row)), "") for name, row in rows]


def _outcome(row: Mapping[str, Any]) -> tuple[str, ...]:
    times = (f"{row[name]:.1f}" for name in ("total", "computing", "communicating", "exposed"))
    return (*times, f"{row['exposed_share']:.1%}")


def _step(step: Mapping[str, Any] | None) -> list[list[str]]:
    """The sections of a training step, if it was asked for."""
    if step is None:
        return []
    rows: list[tuple[tuple[str, ...], str]] = []
    for name, row in step["schedules"].items():
        if "reason" in row:
            rows.append(((name, *["-"] * 4), row["reason"]))
        else:
            numbers = (str(row["gpus"]), f"{row['seconds']:.2f}", f"{row['bubble']:.1%}", f"{row['tokens']:.0f}")
            rows.append(((name, *numbers), ""))
    title = f"  a training step: {step['stages']} stages, {step['microbatches']} micro-batches"
    return [[title], _table(("schedule", "GPUs", "seconds", "bubble", "tokens a second and GPU"), rows)]


def _table(headers: Sequence[str], rows: Sequence[tuple[tuple[str, ...], str]]) -> list[str]:
    return [line.rstrip() for line in table(headers, rows, terminal_width())]


def _wrapped(words: str, first: str = "  ", rest: str = "  ") -> list[str]:
    return textwrap.wrap(words, terminal_width(), initial_indent=first, subsequent_indent=rest)
