"""What linear layers are for, read off the data: which of them choose, and which give the scores of a vocabulary.

    s = linear(h, W_r); topk(softmax(s) + bias, 8)                  s chooses
    y = linear(h, W_o) / 2; return y        loss = cross_entropy(y.view(-1, V), labels)        y are scores

A layer chooses if its result reaches a choice without passing another layer; so do the layers before it that are there
for it alone, back to a norm or a residual, x + f(x) where f multiplies by a matrix (noise that is made of x does not).
A choice is what makes whole numbers or truth of others, what rounds them, and what picks features by number. What looks
at numbers one by one does not choose among those of a residual. Scores leave the graph, or meet labels, without passing
another layer.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import Call, bind
from moecompile.passes.main_gradients import OPERATORS
from moecompile.passes.provenance import tensor_of
from moecompile.passes.spelling import operation_name

SELECTIONS = frozenset(
    "topk sort argsort msort kthvalue argmax argmin max min aminmax mode median nanmedian multinomial gumbel_softmax "
    "quantile nanquantile".split()
)
"""Those choices that are made among features. The others look at numbers one by one."""
CHOICES = frozenset(
    "topk sort argsort msort kthvalue multinomial bernoulli gumbel_softmax quantile nanquantile round sign sgn "
    "heaviside gt lt ge le eq ne greater less greater_equal less_equal not_equal "
    "logical_and logical_or logical_xor logical_not".split()
)
"""By name, also where the result is no whole number; in place, too."""
NORMS = frozenset("rms_norm layer_norm group_norm batch_norm instance_norm normalize".split())
ROOTS = frozenset("rsqrt sqrt norm vector_norm std var".split())
"""What norms that are written out multiply or divide by, maybe after a small number has been added."""
QUESTIONS = frozenset("isnan isinf isfinite isposinf isneginf signbit allclose equal".split())
"""What asks about numbers without choosing among them."""
LOSSES = frozenset(
    "cross_entropy cross_entropy_loss nll_loss nll_loss_nd log_softmax binary_cross_entropy_with_logits kl_div".split()
)
PRODUCTS = frozenset(
    "matmul mm mv addmm bmm baddbmm einsum tensordot inner bilinear chain_matmul multi_dot conv1d conv2d "
    "multi_head_attention_forward _native_multi_head_attention _transformer_encoder_layer_fwd".split()
)
"""Other operations that multiply by a matrix, by name."""
GROUPED = frozenset(("grouped_mm", "_grouped_mm"))
LOOKUPS = frozenset("embedding embedding_bag index_select getitem index".split())


@dataclass(frozen=True)
class Purposes:
    """What the layers of a captured graph are for.

    Attributes:
        choosing: layer -> what it decides.
        scores: where layers' results go.
        embeddings: the matrices of embeddings, as fake tensors.
    """

    choosing: Mapping[fx.Node, str]
    scores: Scores
    embeddings: tuple[Tensor, ...]

    @classmethod
    def of(cls, graph: fx.Graph, origins: Mapping[fx.Node, fx.Node] | None = None) -> Purposes:
        """Of a graph; or of what it is a flat copy of (passes/flatten.py), whose nodes `origins` has."""
        layers = [node for node in graph.nodes if layer_call(node) is not None]
        choosing, scores = choosers(graph, layers), Scores.of(graph, layers)
        if origins is not None:
            choosing = {origins[node]: reason for node, reason in choosing.items()}
            scores = Scores(
                *({origins[node] for node in own} for own in (scores.leaving, scores.alone, scores.labelled))
            )
        return cls(choosing, scores, tuple(embeddings(graph)))


def layer_call(node: fx.Node) -> Call | None:
    """The arguments of a layer, which multiplies rows by a matrix that the graph is given or makes; None of others."""
    call = bind(node) if node.op.startswith("call") else None
    return call if call is not None and call.name == "linear" and isinstance(call["weight"], fx.Node) else None


def choosers(graph: fx.Graph, layers: Collection[fx.Node]) -> dict[fx.Node, str]:
    """The layers that choose experts, or anything else: each with the reason to keep it."""
    found: dict[fx.Node, str] = {}
    for target in OPERATORS:
        for node in graph.find_nodes(op="call_function", target=target):
            x, weights, offsets = node.args[:3]
            plan = offsets.args[0] if isinstance(offsets, fx.Node) and offsets.args else None
            chosen = [each for each in (weights, plan) if isinstance(each, fx.Node)]
            for each in ancestors(chosen) - ancestors([x]):
                if each in layers:
                    found.setdefault(each, "it chooses experts")
    for each, reason in _before_choices(graph, layers).items():
        found.setdefault(each, reason)
    return found


@dataclass(frozen=True)
class Scores:
    """Layers by where their results go without passing another layer.

    Attributes:
        leaving: out of the graph, whatever else goes into it on the way.
        alone: out of the graph, by steps that nothing else from a layer goes into: casts, views, a soft cap, a softmax.
        labelled: to a loss.
    """

    leaving: set[fx.Node]
    alone: set[fx.Node]
    labelled: set[fx.Node]

    @classmethod
    def of(cls, graph: fx.Graph, layers: Collection[fx.Node]) -> Scores:
        """Of these layers."""
        computed: set[fx.Node] = set()  # what comes from a layer
        for node in graph.nodes:
            if node in layers or any(each in computed for each in node.all_input_nodes):
                computed.add(node)

        def behind(ends: Iterable[fx.Node], alone: bool = False) -> set[fx.Node]:
            found, waiting, seen = set[fx.Node](), [each for each in ends if each in computed], set[fx.Node]()
            while waiting:
                node = waiting.pop()
                if node in layers:
                    found.add(node)
                elif node not in seen:
                    seen.add(node)
                    inputs = [each for each in node.all_input_nodes if each in computed]
                    waiting += inputs if len(inputs) == 1 or not alone else []
            return found

        ends = graph.output_node().all_input_nodes
        losses = [node for node in graph.nodes if node.op.startswith("call") and operation_name(node) in LOSSES]
        return cls(behind(ends), behind(ends, alone=True), behind(losses))


def embeddings(graph: fx.Graph) -> list[Tensor]:
    """The matrices of which rows are looked up by number, or by a product with ones in places that numbers tell."""
    found: list[Tensor] = []
    for node in graph.nodes:
        name = operation_name(node) if node.op.startswith("call") else ""
        given = node.all_input_nodes
        if name in LOOKUPS:
            by_number = any(isinstance(tensor_of(each), Tensor) and not _is_float(each) for each in given)
        else:
            by_number = name in PRODUCTS | {"linear"} and any(map(_is_one_hot, given))
        tables = [value for each in given if isinstance(value := tensor_of(each), nn.Parameter) and value.dim() == 2]
        if tables and by_number:
            found.append(tables[0])
    return found


def _is_one_hot(node: fx.Node) -> bool:
    """Whether it is ones in places that numbers tell, cast or not."""
    while node.op == "call_method" and operation_name(node) in ("to", "float", "bfloat16", "half", "type", "type_as"):
        node = node.all_input_nodes[0]
    return node.op.startswith("call") and operation_name(node) == "one_hot"


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are computed from."""
    found, waiting = set[fx.Node](), list(nodes)
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += each.all_input_nodes
    return found


def _is_choice(node: fx.Node) -> bool:
    if not node.op.startswith("call"):
        return False
    name, result = operation_name(node).rstrip("_"), tensor_of(node)
    if name in CHOICES:
        return True
    if name in QUESTIONS or not any(_is_float(each) for each in node.all_input_nodes):
        return False
    if isinstance(result, Tensor):
        return not (result.is_floating_point() or result.is_complex())
    if not isinstance(result, tuple | list):
        return False
    whole = {place for place, each in enumerate(result) if isinstance(each, Tensor) and not each.is_floating_point()}
    return bool(whole) and any(_taken(user) in (None, *whole) for user in node.users)


def _taken(node: fx.Node) -> int | None:
    """Which of several results it takes: of a maximum itself (0), or where it is (1); None of what takes all."""
    if node.target not in (operator.getitem, getattr):
        return None
    place = node.args[1]
    return place if isinstance(place, int) else {"values": 0, "indices": 1}.get(str(place))


def _picked(node: fx.Node) -> list[fx.Node]:
    """What a node picks features of by number; nothing if it picks whole rows, or picks nothing."""
    if not node.op.startswith("call"):
        return []
    name, source = operation_name(node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not _is_float(source):
        return []
    last = fake_of(source).dim() - 1
    if name == "gather":
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return [source] if dim in (-1, last) else []
    if name == "take_along_dim":
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        return [source] if dim in (None, -1, last) else []
    if name == "getitem" and isinstance(node.args[1], tuple | fx.Node):
        places = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        whole = len(places) > last or Ellipsis in places
        return [source] if whole and places and _is_whole_number(places[-1]) else []
    return []


def _is_whole_number(place: Any) -> bool:
    fake = fake_of(place) if isinstance(place, fx.Node) else None
    return isinstance(fake, Tensor) and not fake.is_floating_point() and fake.dtype != torch.bool


@dataclass(frozen=True)
class _Way:
    """How a node is reached from a choice, backwards.

    Attributes:
        reason: to keep a layer there.
        selects: whether the choice is among features.
        passed: whether a layer has been passed; then only what is there for the choice alone is of interest.
        picks: whether features are picked by number, whose layer is the next product, or none: attention picks
            positions from what it has multiplied.
    """

    reason: str
    selects: bool
    passed: bool = False
    picks: bool = False


def _before_choices(graph: fx.Graph, layers: Collection[fx.Node]) -> dict[fx.Node, str]:
    """The layers that choices are made by. Backwards, so that all users of a node have been seen before it."""
    onward = dict[fx.Node, _Way]()  # of nodes: how what they are computed from is reached through them
    picking = dict[fx.Node, list[_Way]]()
    found = dict[fx.Node, str]()
    for node in reversed(graph.nodes):
        reason = f"it feeds {operation_name(node)}" if node.op.startswith("call") else ""
        for source in _picked(node):
            picking.setdefault(source, []).append(_Way(reason, selects=True, picks=True))
        ways = picking.pop(node, []) + [onward[user] for user in node.users if user in onward]
        way = min((each for each in ways if not each.passed), key=lambda each: each.picks, default=None)
        if way is None and ways and all(user in onward for user in node.users):
            way = ways[0]
        if _is_choice(node):
            selects = operation_name(node).rstrip("_") in SELECTIONS
            onward[node] = _Way(reason, selects)
        elif way is None:
            continue
        elif node in layers:
            found[node] = way.reason
            onward[node] = replace(way, passed=True, picks=False)
        elif not _ends(node, way, layers):
            onward[node] = way
    return found


def _ends(node: fx.Node, way: _Way, layers: Collection[fx.Node]) -> bool:
    """Whether what a node is computed from is of no interest to the choice."""
    if way.passed and (_is_norm(node) or node.target in OPERATORS):
        return True
    if way.picks and _is_product(node):
        return True
    return (way.passed or not way.selects) and _is_residual(node, layers)


def _is_norm(node: fx.Node) -> bool:
    """Whether it norms features, by name or written out: divides by a root, or multiplies by its inverse."""
    if not node.op.startswith("call"):
        return False
    if operation_name(node) in NORMS:
        return True
    if operation_name(node).rstrip("_") not in ("mul", "div", "truediv"):
        return False
    return any(_is_root(each) or any(map(_is_root, each.all_input_nodes)) for each in node.all_input_nodes)


def _is_root(node: fx.Node) -> bool:
    return node.op.startswith("call") and operation_name(node) in ROOTS


def _is_residual(node: fx.Node, layers: Collection[fx.Node]) -> bool:
    """Whether a node adds to something what a product makes of it."""
    if operation_name(node) not in ("add", "add_") or len(node.all_input_nodes) != 2:
        return False
    first, second = node.all_input_nodes
    if not (first.op.startswith("call") or first.op == "placeholder") or not _is_float(first) or not _is_float(second):
        return False
    return any(_multiplies(*pair, layers) for pair in ((first, second), (second, first)))


def _multiplies(start: fx.Node, end: fx.Node, layers: Collection[fx.Node]) -> bool:
    """Whether there is a way from one to the other, with a product on it, that is no choice's."""
    before, waiting, seen = ancestors([end]), [start], set[fx.Node]()
    while waiting:
        each = waiting.pop()
        if each in seen or each not in before:
            continue
        seen.add(each)
        if each is not start and (each in layers or _is_product(each)):
            return True
        waiting += [user for user in each.users if not _is_choice(user)]
    return False


def _is_product(node: fx.Node) -> bool:
    named = node.op.startswith("call") and operation_name(node) in PRODUCTS | GROUPED
    return named or node.target in OPERATORS


def _is_float(node: fx.Node) -> bool:
    fake = fake_of(node)
    return isinstance(fake, torch.Tensor) and fake.is_floating_point()
