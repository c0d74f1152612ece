"""`moecompile.explain`: what moecompile would do with a model, without compiling it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._dynamo.config
from torch import fx

from moecompile import advice, pipeline
from moecompile.capture import capture
from moecompile.options import Options
from moecompile.passes.near_misses import EXCHANGE
from moecompile.report import GraphBreak, GraphReport, Report
from moecompile.report_text import counted

_SIZES = {"capture_dynamic_output_shape_ops": True}
_NUMBERS = {"capture_scalar_outputs": True}
# Changes with which Dynamo captures what it otherwise breaks at: words, settings of Dynamo, fullgraph. Each may fail,
# where the model goes on to branch on a size that depends on data, so that only a trial tells.
TRIALS: tuple[tuple[str, dict[str, bool], bool], ...] = (
    ("torch.compile(..., fullgraph=True)", {}, True),
    *(
        (f"before compiling: {'; '.join(f'torch._dynamo.config.{name} = True' for name in settings)}", settings, False)
        for settings in (_SIZES, _SIZES | _NUMBERS)
    ),
)


def explain(
    model: Callable[..., Any],
    /,
    *args: Any,
    moecompile_options: Mapping[str, Any] | Options | None = None,
    **kwargs: Any,
) -> Report:
    """Captures `model(*args, **kwargs)` with Dynamo, runs detection and rewriting, and reports.

    The model runs once, for real, as captured graphs run by PyTorch itself: Inductor is not needed, nor is a GPU. It
    runs with gradients or without as the caller's `torch.no_grad` says; no backward is run. Gradients, buffers, tensor
    arguments, random generators, compiled code and Dynamo's memory of sizes are as before afterwards; what a forward
    does to its parameters or to other Python objects (a cache it is given, a counter it keeps) stays done.

    Args:
        model: a module or a function. Compiled, whole or in parts, it is looked at as if it were compiled as one whole.
        *args: what it is called with.
        moecompile_options: what `torch.compile(options=...)` would be given: with `{"precision": "fp8"}` the report has
            the table of what would be cast.
        **kwargs: what else it is called with.

    Returns:
        the report of this call alone (`moecompile.last_report` is not touched): blocks, near misses, the graphs before
        and after, and graph breaks, those inside MoE code first, each with its cure where one is known.

    Raises:
        TypeError: `model` is a class, or cannot be called.
        ValueError: unknown options, or values that they do not take.
    """
    _check_model(model)
    records, chosen = list[GraphReport](), Options.parse(None, moecompile_options)
    try:
        stops = capture(model, args, kwargs, functools.partial(_examine, chosen, records))
    except TypeError as error:
        if len(args) == 1 and isinstance(args[0], tuple | list):
            error.add_note("moecompile.explain calls model(*args): explain(model, x, y), not explain(model, (x, y)).")
        raise
    ends = sorted((record.ended_by for record in records if record.ended_by), key=lambda found: found.moe)
    breaks = {found.source: found for found in ends}  # of several at one place, one that is known to be in MoE code
    for stop in stops:
        found = advice.stop(stop)
        breaks[found.source] = found
    if any(map(_uncured, breaks.values())):
        cure = _tried_cure(model, args, kwargs, chosen, sum(len(record.sites) for record in records))
        breaks = {source: _cured(found, cure) for source, found in breaks.items()}
        for record in records:
            record.ended_by = record.ended_by and breaks[record.ended_by.source]
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


def _examine(options: Options, records: list[GraphReport], gm: fx.GraphModule) -> None:
    """Adds a captured graph's record to `records`, with what the passes find in it."""
    record = GraphReport.of(gm)
    record.index = len(records)
    pipeline.run_passes(gm, options, record)
    obstacle = advice.obstacle_of(gm, record)
    if obstacle and not record.sites:
        tried = obstacle.cure == advice.MAY_CAPTURE  # by `explain`: what came of it stands beside the graph break
        record.notes.append(str(dataclasses.replace(obstacle, cure=None) if tried else obstacle))
    records.append(record)


def _uncured(found: GraphBreak) -> bool:
    return found.moe and found.cure not in (advice.SWITCH_EXPERTS, EXCHANGE)


def _cured(found: GraphBreak, cure: str | None) -> GraphBreak:
    """A graph break with the cure that was tried; without one, not with what was tried and is none."""
    if _uncured(found) and (cure or found.cure == advice.MAY_CAPTURE):
        return dataclasses.replace(found, cure=cure or advice.NO_BRANCH)
    if not cure and any(name in (found.cure or "") for name in _SIZES | _NUMBERS):
        return dataclasses.replace(found, cure=None)
    return found


def _tried_cure(model: Callable[..., Any], args: Any, kwargs: Any, options: Options, blocks: int) -> str | None:
    """The first of `TRIALS` with which more than `blocks` are found, and what came of it; None if there is none."""
    for change, settings, fullgraph in TRIALS:
        found: list[GraphReport] = []
        try:
            with torch._dynamo.config.patch(settings):
                examine = functools.partial(_examine, options, found)
                stops = capture(model, args, kwargs, examine, fullgraph=fullgraph)
        except Exception:
            continue  # whatever stands in the way: it is no cure then
        more = sum(len(record.sites) for record in found)
        if more > blocks and not any(stop.raised for stop in stops):
            return f"{change}: tried, {counted(more, 'block')} {'is' if more == 1 else 'are'} found then"
    return None


def _in_moe_first(found: GraphBreak) -> bool:
    return not found.moe
