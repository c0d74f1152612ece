"""Decide which linear layers of a graph multiply in FP8: a verdict for each, with the reason.

Contract
- Changes nothing. On entry the experts are `moecompile::experts` (passes/fuse.py).
- A linear layer is a product of rows with one matrix that the graph is given. Each gets a verdict, by the first of
  RULES that speaks of it; the last one casts. Other products with such a matrix are kept, and listed too.
- What a layer is for is read off the data. Names decide only what the user names by them.

    x = linear(h, W_q)                            cast
    s = linear(h, W_r); topk(softmax(s), 8)       kept: it feeds topk
    y = linear(h, E), tokens = embedding(ids, E)  kept: its matrix is an embedding's

Kept are, as in DeepSeek-V3 (technical report, section 3.3.1), embeddings, the output head, the experts' gating,
normalisation and the products of activations in attention, of which the last two are no linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from moecompile.passes.aliases import Aliases, fake_of
from moecompile.passes.calls import bind
from moecompile.passes.exclusions import NO_WISHES, Wishes
from moecompile.passes.main_gradients import OPERATORS
from moecompile.passes.provenance import module_of
from moecompile.runtime.fp8_contract import GEMM_DTYPES
from moecompile.runtime.linear_fp8 import LINE
from moecompile.runtime.quantize import BLOCK, DTYPES

WIDE = 4
"""How much wider than its input a result is that leaves the graph as scores of a vocabulary; no other layer does."""

CHOOSING = ("topk", "sort", "argsort", "argmax")
PRODUCTS = ("matmul", "mm", "addmm", "bmm", "baddbmm", "einsum")
PLAIN = (
    "cast",
    "view",
    "flatten",
    "getitem",
    "select",
    "narrow",
    "contiguous",
    "mul",
    "div",
    "tanh",
    "add",
    "transpose",
)
"""What scores may go through on their way out: views, casts, and soft caps."""


@dataclass(frozen=True)
class Linear:
    """A linear layer: rows (..., K) times a matrix (N, K), plus a bias (N,) or none."""

    node: fx.Node
    rows: fx.Node
    matrix: fx.Node
    bias: fx.Node | None


@dataclass(frozen=True)
class Verdict:
    """Whether a layer is cast.

    Attributes:
        module: path of the module that computes it; empty for the function itself.
        shape: (N, K).
        cast: whether it multiplies in FP8.
        reason: why, in words.
        linear: the layer in its graph; None of a kept one that is no linear layer.
    """

    module: str
    shape: tuple[Any, ...]
    cast: bool
    reason: str
    linear: Linear | None = field(default=None, repr=False, compare=False)

    @property
    def kind(self) -> Literal["linear", "other"]:
        """Whether it is one."""
        return "linear" if self.linear is not None else "other"


def verdicts(graph: fx.Graph, wishes: Wishes = NO_WISHES) -> list[Verdict]:
    """A verdict for each linear layer, in program order.

    Args:
        graph: of Dynamo's.
        wishes: the user's, for this graph.
    """
    facts = _Facts.of(graph, wishes)
    found = []
    for node in graph.nodes:
        call = bind(node) if node.op.startswith("call") else None
        if call is None:
            continue
        where = module_of(node)
        if call.name == "linear" and (matrix := _given(call["weight"])) is not None:
            linear = Linear(node, call["input"], call["weight"], call["bias"])
            reason = next((words for rule in RULES if (words := rule(linear, facts)) is not None), None)
            found.append(Verdict(where, _shape(matrix), reason is None, reason or "a linear layer", linear))
        elif call.name in PRODUCTS and (matrix := _given_factor(node)) is not None:
            found.append(Verdict(where, _shape(matrix), False, f"it is written as {call.name}"))
    return found


@dataclass(frozen=True)
class _Facts:
    """What the rules know of the whole graph.

    Attributes:
        routing: layer -> what it decides.
        embeddings: the matrices of embeddings.
        scores: layers whose results leave the graph.
    """

    wishes: Wishes
    routing: dict[fx.Node, str]
    embeddings: list[fx.Node]
    scores: set[fx.Node]
    aliases: Aliases

    @classmethod
    def of(cls, graph: fx.Graph, wishes: Wishes) -> _Facts:
        calls = {node: call for node in graph.nodes if node.op.startswith("call") and (call := bind(node)) is not None}
        embeddings = [call["weight"] for call in calls.values() if call.name == "embedding"]
        linears = {node for node, call in calls.items() if call.name == "linear"}
        return cls(wishes, _routing(graph, linears), embeddings, _scores(graph, linears), Aliases(graph))


# ---- the rules: why a layer is kept, or None if the rule does not speak of it


def _named(linear: Linear, facts: _Facts) -> str | None:
    return facts.wishes.excluded(module_of(linear.node))


def _known(linear: Linear, facts: _Facts) -> str | None:
    known = all(isinstance(fake_of(each), torch.Tensor) for each in (linear.node, linear.rows, linear.matrix))
    return None if known else "it is inside a transform of torch.func"


def _dtype(linear: Linear, facts: _Facts) -> str | None:
    dtypes = {fake_of(each).dtype for each in (linear.rows, linear.matrix, linear.node)}
    if fake_of(linear.node).dtype in GEMM_DTYPES and dtypes <= set(DTYPES):  # several: autocast converts the operands
        return None
    return f"{' and '.join(sorted(map(_short, dtypes)))}: only products in bfloat16 and float16 are cast"


def _made(linear: Linear, facts: _Facts) -> str | None:
    return None if _given(linear.matrix) is linear.matrix else "its matrix is made of a parameter before"


def _sizes(linear: Linear, facts: _Facts) -> str | None:
    n, k = _shape(linear.matrix)
    if not isinstance(n, int) or not isinstance(k, int):
        return "the sizes of its matrix are symbolic"
    if k % BLOCK:
        return f"{k} input features are no multiple of {BLOCK}"
    if n % LINE:
        return f"{n} output features are no multiple of {LINE}"
    return None


def _router(linear: Linear, facts: _Facts) -> str | None:
    return None if facts.wishes.included(module_of(linear.node)) else facts.routing.get(linear.node)


def _head(linear: Linear, facts: _Facts) -> str | None:
    if facts.wishes.included(module_of(linear.node)):
        return None
    n, k = _shape(linear.matrix)
    if any(facts.aliases.share(linear.matrix, each) for each in facts.embeddings):
        return "its matrix is an embedding's"
    if any(fake_of(each).shape[0] == n != fake_of(each).shape[1] for each in facts.embeddings):
        return f"it has as many output features as an embedding has rows, {n}"
    if linear.node in facts.scores and n >= WIDE * k:
        return f"its result, {n} features of {k}, leaves the graph as scores of a vocabulary would"
    return None


RULES: tuple[Callable[[Linear, _Facts], str | None], ...] = (_known, _named, _router, _head, _made, _dtype, _sizes)
"""In this order."""


# ---- what layers are for


def _routing(graph: fx.Graph, linears: set[fx.Node]) -> dict[fx.Node, str]:
    """The layers that choose experts, or anything else, and what."""
    found: dict[fx.Node, str] = {}
    for target in OPERATORS:
        for node in graph.find_nodes(op="call_function", target=target):
            x, weights, offsets = node.args[:3]
            plan = offsets.args[0] if isinstance(offsets, fx.Node) and offsets.args else None
            chosen = [each for each in (weights, plan) if isinstance(each, fx.Node)]
            for each in (_ancestors(chosen) - _ancestors([x])) & linears:
                found.setdefault(each, "it chooses experts")
    for node in graph.nodes:
        if (call := bind(node) if node.op.startswith("call") else None) is not None and call.name in CHOOSING:
            for each in _feeding(node, linears):
                found.setdefault(each, f"it feeds {call.name}")
    return found


def _feeding(node: fx.Node, linears: set[fx.Node]) -> set[fx.Node]:
    """The first layers on each way back from a node, and, further back, those whose results have no other use."""
    first, seen, waiting = set[fx.Node](), {node}, [*node.all_input_nodes]
    while waiting:
        each = waiting.pop()
        if each in seen:
            continue
        seen.add(each)
        if each in linears:
            first.add(each)
        else:
            waiting += each.all_input_nodes
    own, waiting = set(first), [each for linear in first for each in linear.all_input_nodes]
    while waiting:
        each = waiting.pop()
        if each not in own and each.op.startswith("call") and own.issuperset(each.users):
            own.add(each)
            waiting += each.all_input_nodes
    return own & linears


def _scores(graph: fx.Graph, linears: set[fx.Node]) -> set[fx.Node]:
    """The layers whose results leave the graph, or meet the labels, with nothing but PLAIN on the way."""
    found, waiting, seen = set[fx.Node](), [graph.output_node(), *_losses(graph)], set[fx.Node]()
    while waiting:
        for each in waiting.pop().all_input_nodes:
            if each in seen:
                continue
            seen.add(each)
            if each in linears:
                found.add(each)
            elif (call := bind(each) if each.op.startswith("call") else None) is not None and call.name in PLAIN:
                waiting.append(each)
    return found


def _losses(graph: fx.Graph) -> Iterable[fx.Node]:
    names = {torch.nn.functional.cross_entropy, torch.nn.functional.log_softmax, torch.log_softmax}
    return (node for node in graph.nodes if node.op == "call_function" and node.target in names)


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are computed from."""
    found, waiting = set[fx.Node](), list(nodes)
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += each.all_input_nodes
    return found


# ---- small questions


def _given(node: Any) -> fx.Node | None:
    """The parameter of two or more dimensions that it is, or is a view or a cast of."""
    while isinstance(node, fx.Node) and node.op.startswith("call") and (call := bind(node)) is not None:
        if call.name not in ("t", "transpose", "permute", "getattr", "getitem", "cast", "view", "contiguous", "chunk"):
            return None
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node) or node.op not in ("placeholder", "get_attr"):
        return None
    fake = fake_of(node)
    return node if isinstance(fake, nn.Parameter) and fake.dim() >= 2 else None


def _given_factor(node: fx.Node) -> fx.Node | None:
    """Such a parameter that the node multiplies by."""
    return next((given for each in node.all_input_nodes if (given := _given(each)) is not None), None)


def _shape(matrix: fx.Node) -> tuple[Any, ...]:
    return tuple(fake_of(matrix).shape)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
