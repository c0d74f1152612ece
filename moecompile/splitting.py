"""The option `microbatches`: graphs run on two halves of the batch, if it is proven that they may, on all ranks.

for each graph that exchanges something with other ranks, after the passes:
    split it (passes/microbatches.py), or say why not
    predict what it takes, whole and in halves, each in its better order: unless halves gain, it stays whole
    all ranks that it exchanges something with hear of each other; unless all can, none does
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from moecompile import ordering, pipeline
from moecompile.agreement import hear
from moecompile.bodies import text_of
from moecompile.options import Options
from moecompile.passes import hide, microbatches
from moecompile.passes.batch_meanings import NotProvenError
from moecompile.passes.mirror import training_seconds
from moecompile.passes.overlap import GAIN, Plan
from moecompile.report import GraphReport

log = logging.getLogger("moecompile")
_agreed: dict[tuple[str, ...], bool] = {}
"""By graph and groups: whether all ranks have split it."""


def mark_batch(*inputs: Any) -> None:
    """Says, before the first call, that the first dimension of these tensors is the batch, of any size from 2 on.

    Args:
        inputs: tensors that a compiled model is called with, or lists, tuples and dicts of them.

    Raises:
        ValueError: no tensor came, or one without dimensions.
    """
    tensors = [each for each in tree_leaves(inputs) if isinstance(each, Tensor)]
    if not tensors or any(not each.dim() for each in tensors):
        shapes = [tuple(each.shape) for each in tensors]
        raise ValueError(f"moecompile.mark_batch: expected tensors whose first dimension is the batch, got {shapes}")
    for each in tensors:
        torch._dynamo.mark_dynamic(each, 0)


def split(gm: fx.GraphModule, options: Options, record: GraphReport) -> fx.GraphModule:
    """The graph that computes halves of the batch; or the graph itself, with a note and a warning why.

    Args:
        gm: of Dynamo's, after all passes but `hide`, which what stays whole goes through.
        options: for this model.
        record: of this graph.

    Raises:
        DisagreementError: ranks have split this graph, and this one alone cannot.
    """
    groups, why = _groups(gm.graph), ""
    if not groups:
        record.notes.append("microbatches: it exchanges nothing with other ranks, and stays whole")
        return gm
    try:
        halves = microbatches.split(gm)
        if not halves.exchanges:
            raise NotProvenError("; ".join(halves.whole) or "what exchanges tokens does not hold the batch")
        gain = _gain(gm, halves.operators, options)
    except NotProvenError as error:
        why = str(error)
    if not _agree(gm.graph, groups, why):
        why = why or "others of the ranks that it exchanges something with keep theirs whole"
    if why:
        record.notes.append(f"microbatches: it stays whole: {why}")
        log.warning("%s: not split into micro-batches: %s", record.name, why)
        pipeline.hide_exchanges(gm, options, record)
        return gm
    rest = f"; the rest stays whole: {'; '.join(halves.whole)}" if halves.whole else ""
    record.notes.append(f"microbatches: two halves of the batch, {halves.exchanges} exchanges of each, {gain}{rest}")
    record.after, record.parts = text_of(halves.graph), microbatches.HALVES
    return halves.graph


def forget() -> None:
    """Ranks agree anew; all of them have to forget."""
    _agreed.clear()


def _gain(gm: fx.GraphModule, halves: fx.Graph, options: Options) -> str:
    """What is predicted, of training with a backward that mirrors the forward, for people.

    Args:
        gm: whole.
        halves: operators of the graph that computes halves.
        options: for this model.

    Raises:
        NotProvenError: nothing is known, or halves are not faster, or by less than a prediction is worth.
    """
    whole_plan = _predicted(microbatches.operators_of(_as_it_would_be(gm, options)), options, 1)
    half_plan = _predicted(halves, options, microbatches.HALVES)
    if whole_plan is None or half_plan is None:
        raise NotProvenError("there are sizes that nobody knows yet")
    if pipeline.differentiable(gm):
        what = "forward and backward"
        whole, half = training_seconds(whole_plan), training_seconds(half_plan) + _sums_of_gradients(gm)
    else:
        what, whole, half = "forward", whole_plan.after.makespan, half_plan.after.makespan
    words = f"predicted of {ordering.device_title()}: {1e6 * half:.0f} us {what}, in place of {1e6 * whole:.0f}"
    if half > (1 - GAIN) * whole:
        raise NotProvenError(f"halves would gain too little, {words}")
    return words


def _sums_of_gradients(gm: fx.GraphModule) -> float:
    """Seconds: a matrix has a gradient of each half; the second is written, and both are read and their sum written."""
    given = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    tensors = [each for each in given if isinstance(each, Tensor) and each.requires_grad]
    matrices = [each for each in tensors if all(isinstance(size, int) for size in each.shape)]
    local = [each.to_local() if isinstance(each, DTensor) else each for each in matrices]
    return sum(ordering.seconds_to_move(4 * each.numel() * each.element_size()) for each in local)


def _as_it_would_be(gm: fx.GraphModule, options: Options) -> fx.GraphModule:
    """Whole: where nobody differentiates, exchanges are hidden in their blocks.

    Where somebody does, what is one operator with its exchanges waits for them: what is ordered is no slower.
    """
    if options.fp8_compare or "hide" in options.disable or pipeline.differentiable(gm):
        return gm
    graph = copy.deepcopy(gm.graph)
    hide.hide_exchanges(graph)
    return fx.GraphModule(gm, graph)


def _predicted(operators: fx.Graph, options: Options, parts: int) -> Plan | None:
    return ordering.predicted(operators, options.lowering == "inductor", parts)


def _agree(graph: fx.Graph, groups: list[str], why: str) -> bool:
    """Whether all ranks of these groups split this graph.

    They meet when they first compile it, and when one that has been split is compiled once more and cannot be.
    """
    words = [(node.name, getattr(node.target, "__name__", str(node.target))) for node in graph.nodes]
    subject = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    key = subject, *groups
    if key not in _agreed or (why and _agreed[key]):
        cure = (
            f"This rank {f'keeps it whole: {why}' if why else 'splits it into micro-batches'}. Each of them has to "
            "call the model, with the same options and, if one has, with an odd batch; or leave out `microbatches`"
        )
        heard = hear("whole" if why else "halves", f"microbatches {subject}", groups, cure)
        _agreed[key] = {*heard} == {"halves"}
    return _agreed[key]


def _groups(graph: fx.Graph) -> list[str]:
    """Of ranks that the graph exchanges tokens with."""
    begun = graph.find_nodes(op="call_function", target=torch.ops.moecompile.dispatch_start.default)
    return sorted({str(node.kwargs["group"]) for node in begun})
