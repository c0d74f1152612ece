"""What linear layers are for, read off the data: which of them choose, and which give the scores of a vocabulary.

    s = linear(h, W_r); topk(softmax(s) + bias, 8)                  s chooses
    y = linear(h, W_o) / 2; return y        loss = cross_entropy(y.view(-1, V), labels)        y are scores

A layer chooses if its result reaches a choice (CHOICES) without passing another layer or a residual, x + f(x) where f
multiplies by a matrix (noise that is made of x does not); so does the layer before it that is there for it alone.
Scores leave the graph, or meet labels, by operations of which each has one input that comes from a layer at all: a
cast, a view, a soft cap, a softmax; not a gate, not a residual.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, fx, nn

from moecompile.passes.aliases import fake_of
from moecompile.passes.main_gradients import OPERATORS
from moecompile.passes.provenance import tensor_of
from moecompile.passes.spelling import operation_name

CHOICES = frozenset(
    "topk sort argsort msort argmax argmin kthvalue multinomial bernoulli gt lt ge le searchsorted bucketize".split()
)
CHOICES_ALONG = frozenset(("max", "min"))
"""These choose where they are told a dimension, give indices, too, and somebody reads these."""
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


def scores(graph: fx.Graph, layers: Collection[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The layers whose results leave the graph as scores would, and those whose results meet labels."""
    computed: set[fx.Node] = set()  # what comes from a layer
    for node in graph.nodes:
        if node in layers or any(each in computed for each in node.all_input_nodes):
            computed.add(node)

    def behind(ends: Iterable[fx.Node]) -> set[fx.Node]:
        found, waiting, seen = set[fx.Node](), [each for each in ends if each in computed], set[fx.Node]()
        while waiting:
            node = waiting.pop()
            if node in layers:
                found.add(node)
            elif node not in seen:
                seen.add(node)
                inputs = [each for each in node.all_input_nodes if each in computed]
                waiting += inputs if len(inputs) == 1 else []
        return found

    losses = [node for node in graph.nodes if node.op.startswith("call") and operation_name(node) in LOSSES]
    return behind(graph.output_node().all_input_nodes), behind(losses)


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
    name = operation_name(node)
    if name in CHOICES_ALONG and isinstance(tensor_of(node), tuple):
        return not all(_takes_values(user) for user in node.users)
    return name in CHOICES


def _takes_values(node: fx.Node) -> bool:
    """Whether it takes the first of several results: of a maximum itself, not where it is."""
    return node.target in (operator.getitem, getattr) and node.args[1] in (0, "values")


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
