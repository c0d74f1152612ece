"""What linear layers are for, read off the data: which of them choose, and which give the scores of a vocabulary.

    s = linear(h, W_r); topk(softmax(s) + bias, 8)                  s chooses
    y = linear(h, W_o) / 2; return y        loss = cross_entropy(y.view(-1, V), labels)        y are scores

A layer chooses if its result reaches a choice (CHOICES) without passing another layer or a residual, x + f(x) where f
multiplies by a matrix (noise that is made of x does not); so does the layer before it that is there for it alone.
A choice is what makes whole numbers or truth of others, and what rounds them. Scores leave the graph, or meet labels,
without passing another layer.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from moecompile.passes.aliases import fake_of
from moecompile.passes.main_gradients import OPERATORS
from moecompile.passes.provenance import tensor_of
from moecompile.passes.spelling import operation_name

CHOICES = frozenset(
    "topk sort argsort msort kthvalue multinomial bernoulli gumbel_softmax quantile nanquantile round sign sgn "
    "heaviside gt lt ge le eq ne greater less greater_equal less_equal not_equal "
    "logical_and logical_or logical_xor logical_not".split()
)
"""By name, also where the result is no whole number; in place, too."""
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
    for node in graph.nodes:
        if _is_choice(node):
            for each in _before_choice(node, layers):
                found.setdefault(each, f"it feeds {operation_name(node)}")
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
    """The matrices of which rows are looked up by number."""
    found: list[Tensor] = []
    for node in graph.nodes:
        if not node.op.startswith("call") or operation_name(node) not in LOOKUPS:
            continue
        given = [(each, tensor_of(each)) for each in node.all_input_nodes]
        numbers = [value for _, value in given if isinstance(value, Tensor) and not value.is_floating_point()]
        tables = [value for _, value in given if isinstance(value, nn.Parameter) and value.dim() == 2]
        if tables and numbers:
            found.append(tables[0])
    return found


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


def _before_choice(node: fx.Node, layers: Collection[fx.Node]) -> set[fx.Node]:
    """The first layers on each way back, and the ones before these that are there for them alone."""
    first, waiting, seen = set[fx.Node](), [*node.all_input_nodes], set[fx.Node]()
    while waiting:
        each = waiting.pop()
        if each in layers:
            first.add(each)
        elif each not in seen and not _is_residual(each, layers):
            waiting += each.all_input_nodes
        seen.add(each)
    return first | {before for layer in first if (before := _layer_of_its_own(layer, layers)) is not None}


def _layer_of_its_own(layer: fx.Node, layers: Collection[fx.Node]) -> fx.Node | None:
    """The layer before, if its result goes through elementwise steps to this one and to nobody else."""
    user = layer
    while True:
        computed = [each for each in user.all_input_nodes if each.op.startswith("call")]
        if len(computed) != 1 or set(computed[0].users) != {user}:
            return None
        (user,) = computed
        if user in layers:
            return user


def _is_residual(node: fx.Node, layers: Collection[fx.Node]) -> bool:
    """Whether a node adds to something what a product makes of it."""
    if operation_name(node) not in ("add", "add_") or len(node.all_input_nodes) != 2:
        return False
    first, second = node.all_input_nodes
    if not (first.op.startswith("call") or first.op == "placeholder") or not _is_float(first) or not _is_float(second):
        return False
    return any(_multiplies(*pair, layers) for pair in ((first, second), (second, first)))


def _multiplies(start: fx.Node, end: fx.Node, layers: Collection[fx.Node]) -> bool:
    """Whether there is a way from one to the other, and a product on it."""
    before, waiting, seen = ancestors([end]), [start], set[fx.Node]()
    while waiting:
        each = waiting.pop()
        if each in seen or each not in before:
            continue
        seen.add(each)
        if each is not start and (each in layers or _is_product(each)):
            return True
        waiting += each.users
    return False


def _is_product(node: fx.Node) -> bool:
    named = node.op.startswith("call") and operation_name(node) in PRODUCTS | GROUPED
    return named or node.target in OPERATORS


def _is_float(node: fx.Node) -> bool:
    fake = fake_of(node)
    return isinstance(fake, torch.Tensor) and fake.is_floating_point()
