"""`fp8_compare="first_call"`: what FP8 does to each layer and to the choice of experts, on the call being compiled.

    keep the graph as it is before its casts
    run it without gradients; for each layer that is cast, of sampled rows:
        alone       the layer in FP8 on these very rows, against its own result
    run the graph with its casts; for each of these layers:
        in model    its result against the first run's, errors of all layers before it included
    of every block of experts: how many choices of the sampled tokens are the same in both runs

Both run on copies of what the graph writes into, and put the random generators back. Signal to noise is in decibels,
10 log10(|y|^2 / |y' - y|^2): an error of 10 % is 20 dB.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from moecompile.agreement import Together
from moecompile.bodies import copy_graph
from moecompile.capture import gpus_in_use, safe_inputs
from moecompile.passes.casts import Cast
from moecompile.passes.provenance import module_of
from moecompile.report import Compared, GraphReport
from moecompile.runtime.quantize import ALONG_FEATURES, LARGEST, POWER_OF_TWO, SQUARE, dequantize

log = logging.getLogger("moecompile")

ROWS = 256
"""Sampled of a result, evenly."""
EXPERTS = 4
"""Of which numbers that are lost are counted."""
FAKE = "fake"
"""A rank's word if it has no inputs to compare with."""
BEYOND = LARGEST * (1 + 1 / 28)
"""What is larger is cut off: half way to the number that would come after e4m3's largest."""
Observe = Callable[..., None]


@dataclass(frozen=True)
class Layer:
    """A cast layer in both graphs: the node that the cast replaced, in the copy of before, and the one in its place."""

    row: Cast
    before: fx.Node
    after: fx.Node


@dataclass(frozen=True)
class Uncast:
    """One body of a captured graph as it was before its casts.

    Attributes:
        module: holds the graph with casts.
        graph: without.
        layers: what was cast.
        plans: the layouts of rows by expert, in both graphs.
    """

    module: fx.GraphModule
    graph: fx.Graph
    layers: tuple[Layer, ...]
    plans: tuple[tuple[fx.Node, fx.Node], ...]


@dataclass
class _Lost:
    """Of numbers that are not zero, how many there are, how many became zero, and how many were cut off."""

    count: int = 0
    flushed: int = 0
    saturated: int = 0

    def add(self, exact: Tensor, values: Tensor, scales: Tensor, block: tuple[int, int]) -> None:
        """Counts those of finite numbers (..., R, F) and their e4m3 values, of which a block shares a scale."""
        exact = exact.float()
        present = (exact != 0) & exact.isfinite()
        spread = dequantize(torch.ones_like(values), scales, block)
        self.count += int(present.sum())
        self.flushed += int((present & (values.float() == 0)).sum())
        self.saturated += int((present & (exact.abs() > BEYOND * spread)).sum())


@dataclass
class _Seen:
    """What both runs have shown, by number of the layer, or of the plan."""

    results: dict[int, Tensor] = field(default_factory=dict)
    alone: dict[int, float] = field(default_factory=dict)
    lost: dict[int, _Lost] = field(default_factory=dict)
    in_model: dict[int, float] = field(default_factory=dict)
    chosen: dict[int, Tensor] = field(default_factory=dict)
    agreement: dict[int, float] = field(default_factory=dict)


def compare(
    gm: fx.GraphModule,
    uncast: Sequence[Uncast],
    together: Together,
    example_inputs: Sequence[Any],
    record: GraphReport,
) -> None:
    """Fills `record.compared`, or notes why nothing was compared.

    Args:
        gm: a graph of Dynamo's after all passes.
        uncast: its bodies before their casts.
        together: the ranks that the graph exchanges something with: they run it when all first compile it, or not.
        example_inputs: the inputs of the call being compiled.
        record: the graph's.
    """
    layers = [layer for each in uncast for layer in each.layers]
    plans = [plan for each in uncast for plan in each.plans]
    if not uncast:
        return
    fake = any(isinstance(value, torch._subclasses.FakeTensor) for value in example_inputs)
    words = together.meet("fp8_compare", FAKE if fake else str(len(layers)))
    if words is None:
        record.notes.append(
            "not compared with its own precision again: ranks that share experts do so when all of them first compile "
            "a graph"
        )
        return
    if not any(word != "0" for word in words):
        return
    if FAKE in words:
        record.notes.append("not compared with its own precision: torch compiles this graph on fake inputs")
        return
    seen, before, after = _Seen(), dict[fx.Node, tuple[Any, ...]](), dict[fx.Node, tuple[Any, ...]]()
    for number, layer in enumerate(layers):
        scale_format = str(layer.after.kwargs.get("scale_format", POWER_OF_TWO))
        alone = functools.partial(
            _linear_alone if layer.row.kind == "linear" else _experts_alone, scale_format=scale_format
        )
        before[layer.before] = (_first(seen, number, alone), layer.before.args, dict(layer.before.kwargs))
        after[layer.after] = (_second(seen, number),)
    for number, (first, second) in enumerate(plans):
        before[first] = (_chosen(seen, number), first.args[0])
        after[second] = (_agreeing(seen, number), second.args[0])
    graphs = {each.module: each.module.graph for each in uncast}
    try:
        _run(gm, {each.module: each.graph for each in uncast}, before, example_inputs)
        _run(gm, graphs, after, example_inputs)
    except Exception as error:  # what is compiled does not depend on it
        record.notes.append(f"not compared with its own precision: {type(error).__name__}: {error}")
        log.warning("moecompile: %s was %s", record.name, record.notes[-1])
        return
    finally:
        for module, graph in graphs.items():
            module.graph = graph
    of_layers = [
        Compared(
            layer.row.module,
            layer.row.kind,
            alone=seen.alone[number],
            in_model=seen.in_model.get(number),
            flushed=seen.lost[number].flushed / max(1, seen.lost[number].count),
            saturated=seen.lost[number].saturated,
        )
        for number, layer in enumerate(layers)
        if number in seen.alone
    ]
    of_plans = [
        Compared(module_of(plans[number][1]), "choice of experts", agreement=share)
        for number, share in seen.agreement.items()
    ]
    record.compared = (*of_layers, *of_plans)


def _run(
    gm: fx.GraphModule,
    graphs: dict[fx.GraphModule, fx.Graph],
    watched: dict[fx.Node, tuple[Any, ...]],
    inputs: Sequence[Any],
) -> None:
    """Runs the captured graph with these graphs in its modules; who watches a node is called with its result first."""
    main = graphs[gm]
    for module, graph in graphs.items():
        shown, places = copy_graph(graph)
        for node, (observe, *arguments) in watched.items():
            if node in places:
                with shown.inserting_after(places[node]):
                    given = fx.node.map_arg(tuple(arguments), places.__getitem__)
                    shown.call_function(observe, (places[node], *given))
        module.graph = shown
    with torch.no_grad(), torch.random.fork_rng(gpus_in_use()):
        gm(*safe_inputs(main, inputs))


def _first(seen: _Seen, number: int, alone: Callable[..., Tensor]) -> Observe:
    """Notes a layer's result in its own precision, and how far FP8 is from it on the same rows."""

    def observe(result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.results[number], seen.lost[number] = sampled(result).clone(), _Lost()
        seen.alone[number] = decibels(alone(seen.lost[number], *args, **kwargs), seen.results[number])

    return observe


def _second(seen: _Seen, number: int) -> Observe:
    """Notes how far the same layer's result in the graph with casts is from that."""

    def observe(result: Tensor) -> None:
        seen.in_model[number] = decibels(sampled(result), seen.results.pop(number))

    return observe


def _chosen(seen: _Seen, number: int) -> Observe:
    def observe(_: Any, ids: Tensor) -> None:
        seen.chosen[number] = sampled(ids).clone()

    return observe


def _agreeing(seen: _Seen, number: int) -> Observe:
    """Notes how many of a token's experts it had in the first run, too, on average."""

    def observe(_: Any, ids: Tensor) -> None:
        first, second = seen.chosen.pop(number), sampled(ids)
        if first.numel():
            same = (second.unsqueeze(-1) == first.unsqueeze(-2)).any(-1)
            seen.agreement[number] = float(same.double().mean())

    return observe


def _linear_alone(
    lost: _Lost, input: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale_format: str
) -> Tensor:
    """A linear layer's result in FP8, of sampled rows; in its result's dtype, which autocast may have chosen."""
    ops, dtype = torch.ops.moecompile, _product_dtype(input, weight)
    rows, weight, bias = sampled(input).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    values, scales = ops.quantize(rows, scale_format=scale_format)
    copies = list(ops.quantize_weights(weight, backward=False, scale_format=scale_format))
    lost.add(rows, values, scales, ALONG_FEATURES)
    lost.add(weight, copies[0][: weight.shape[0]], copies[1], SQUARE)
    result: Tensor = ops.linear_fp8(rows, weight, bias, values, scales, copies, scale_format=scale_format)
    return result


def _product_dtype(input: Tensor, weight: Tensor) -> torch.dtype:
    """What the two are multiplied in."""
    if torch.is_autocast_enabled(input.device.type):
        return torch.get_autocast_dtype(input.device.type)
    return torch.promote_types(input.dtype, weight.dtype)


def _experts_alone(
    lost: _Lost,
    x: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    slots: Tensor,
    order: Tensor,
    *matrices: Tensor,
    scale_format: str,
    **attributes: Any,
) -> Tensor:
    """The experts' result in FP8, of sampled tokens with the experts that they have."""
    ops, keywords, how = torch.ops.moecompile, dict(attributes), {"backward": False, "scale_format": scale_format}
    w_in, w_out, *_ = matrices
    experts = torch.searchsorted(offsets, sampled(slots).contiguous(), right=True)
    _, *plan = ops.plan(torch.where(sampled(slots) < 0, -1, experts), offsets.shape[0])
    layouts = (keywords.get("w_in_transposed", False), keywords.get("w_out_transposed", False))
    of_in = ops.quantize_weights(w_in, keywords.get("w_up"), gate_up=keywords["gate_up"], transposed=layouts[0], **how)
    of_out = ops.quantize_weights(w_out, transposed=layouts[1], **how)
    values, scales = ops.quantize(sampled(x), scale_format=scale_format)
    lost.add(sampled(x), values, scales, ALONG_FEATURES)
    for matrix, transposed in zip((w_in, keywords.get("w_up"), w_out), (layouts[0], *layouts), strict=True):
        if matrix is not None:
            lying = (matrix.mT if transposed else matrix)[:EXPERTS]
            values, scales, *_others = ops.quantize_weights(lying, **how)
            lost.add(lying, values[:, : lying.shape[1], : lying.shape[2]], scales, SQUARE)
    chosen = None if weights is None else sampled(weights)
    keywords |= {"quantized": [*of_in, *of_out], "scale_format": scale_format}
    result: Tensor = ops.experts_fp8(sampled(x), chosen, *plan, *matrices, **keywords)
    return result


def sampled(rows: Tensor) -> Tensor:
    """Of (..., F) at most ROWS rows (R, F), evenly."""
    rows = rows.reshape(-1, rows.shape[-1])
    return rows[:: max(1, -(-rows.shape[0] // ROWS))]


def decibels(found: Tensor, expected: Tensor) -> float:
    """Signal to noise; infinite where nothing differs, NaN where something is not finite or there is no signal."""
    signal = float(expected.double().square().sum())
    noise = float((found.double() - expected.double()).square().sum())
    if not math.isfinite(noise) or not math.isfinite(signal) or signal == 0:
        return math.nan
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)
