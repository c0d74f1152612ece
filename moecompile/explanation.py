"""`moecompile.explain`: what moecompile would do with a model, without compiling it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import fx

from moecompile import advice, pipeline
from moecompile.capture import capture
from moecompile.options import Options
from moecompile.report import GraphBreak, GraphReport, Report


def explain(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Report:
    """Captures `model(*args, **kwargs)` with Dynamo, runs detection and rewriting, and reports.

    The model runs once, for real, as captured graphs run by PyTorch itself: Inductor is not needed, nor is a GPU. It
    runs with gradients or without as the caller's `torch.no_grad` says; no backward is run. Gradients, buffers, tensor
    arguments, random generators, compiled code and Dynamo's memory of sizes are as before afterwards; what a forward
    does to its parameters or to other Python objects (a cache it is given, a counter it keeps) stays done.

    Args:
        model: a module or a function. Compiled, whole or in parts, it is looked at as if it were compiled as one whole.
        *args: what it is called with.
        **kwargs: the same.

    Returns:
        the report of this call alone (`moecompile.last_report` is not touched): blocks, near misses, the graphs before
        and after, and graph breaks, those inside MoE code first, each with its cure where one is known.

    Raises:
        TypeError: `model` is a class, or cannot be called.
    """
    _check_model(model)
    records: list[GraphReport] = []

    def look(gm: fx.GraphModule) -> None:
        records.append(_examine(gm, len(records)))

    stops = capture(model, args, kwargs, look)
    breaks = {record.ended_by.source: record.ended_by for record in records if record.ended_by}
    for stop in stops:
        found = advice.graph_break(stop.reason, stop.frames)
        reason = f"{found.reason}; the frame around it was given up and runs in Python"
        breaks[found.source] = dataclasses.replace(found, reason=reason)
    if uncured := [found for found in breaks.values() if found.moe and found.cure != advice.SWITCH_EXPERTS]:
        blocks = sum(len(record.sites) for record in records)
        if cure := _fullgraph_cure(model, args, kwargs, blocks):
            breaks.update({found.source: dataclasses.replace(found, cure=cure) for found in uncured})
    return Report(tuple(records), tuple(sorted(breaks.values(), key=_in_moe_first)))


def _check_model(model: object) -> None:
    """Refuses what Dynamo would fail at in words of its own, a class even after marking it for good."""
    expected = "moecompile.explain: expected a module or a function as the first argument, got"
    if isinstance(model, type):
        name = model.__name__
        raise TypeError(f"{expected} the class {name}. Make an instance first: explain({name}(...), inputs).")
    if not callable(model):
        raise TypeError(
            f"{expected} {model!r} of type {type(model).__name__}, which cannot be called. Write explain(model, x)."
        )


def _examine(gm: fx.GraphModule, index: int) -> GraphReport:
    record = GraphReport.of(gm)
    record.index = index
    pipeline.run_passes(gm, Options.parse(None, None), record)
    obstacle = advice.obstacle_of(gm, record)
    if obstacle and not record.sites:
        record.notes.append(str(obstacle))
    return record


def _fullgraph_cure(model: Callable[..., Any], args: Any, kwargs: Any, blocks: int) -> str | None:
    """The cure `fullgraph=True`, if it is one: it lets Dynamo capture some of what it otherwise breaks at."""
    found: list[GraphReport] = []
    try:
        capture(model, args, kwargs, lambda gm: found.append(_examine(gm, len(found))), fullgraph=True)
    except Exception:
        return None  # whatever stands in the way: it is no cure then
    more = sum(len(record.sites) for record in found)
    return f"torch.compile(..., fullgraph=True): tried, {more} blocks are found then" if more > blocks else None


def _in_moe_first(found: GraphBreak) -> bool:
    return not found.moe
