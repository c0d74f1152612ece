"""Decide which linear layers of a graph multiply in FP8: a verdict for each, with the reason.

Contract
- Changes nothing. On entry the experts are `moecompile::experts` (passes/fuse.py).
- A linear layer is a product of rows with one matrix that the graph is given. Each gets a verdict, by the first of
  RULES that speaks of it; the last one casts. Other products with such a matrix are kept, and listed too.
- What a layer is for is read off the data (passes/purposes.py). Names decide only what the user names by them.

    x = linear(h, W_q)                            cast
    s = linear(h, W_r); topk(softmax(s), 8)       kept: it feeds topk
    y = linear(h, E), tokens = embedding(ids, E)  kept: its matrix is an embedding's

Kept are, as in DeepSeek-V3 (technical report, section 3.3.1), embeddings, the output head, the experts' gating,
normalisation and the products of activations in attention, of which the last two are no linear layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from moecompile.passes.aliases import Aliases, fake_of, is_foreign
from moecompile.passes.calls import bind
from moecompile.passes.exclusions import NO_WISHES, Wishes
from moecompile.passes.provenance import module_of
from moecompile.passes.purposes import PRODUCTS, Purposes, layer_call
from moecompile.passes.spelling import operation_name
from moecompile.runtime.fp8_contract import GEMM_DTYPES
from moecompile.runtime.linear_fp8 import LINE
from moecompile.runtime.quantize import BLOCK, DTYPES

WIDE = 3
"""How much wider than its input a result is that leaves the graph as scores of a vocabulary; few other layers' do."""
NARROW = 8
"""How much narrower a result is that leaves the graph as scores of experts: a graph break before the choice, say."""


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


def verdicts(graph: fx.Graph, wishes: Wishes = NO_WISHES, purposes: Purposes | None = None) -> list[Verdict]:
    """A verdict for each linear layer, in program order.

    Args:
        graph: of Dynamo's.
        wishes: the user's, for this graph.
        purposes: what layers are for in the captured graph that this is a body of; None: it is all of it.
    """
    facts, found = _Facts.of(graph, wishes, purposes or Purposes.of(graph)), list[Verdict]()
    for node in graph.nodes:
        if (call := layer_call(node)) is not None:
            linear = Linear(node, call["input"], call["weight"], call["bias"])
            reason = next((words for rule in RULES if (words := rule(linear, facts)) is not None), None)
            shape = _shape(_given(linear.matrix) or linear.matrix)
            found.append(Verdict(module_of(node), shape, reason is None, reason or "a linear layer", linear))
        elif node.op.startswith("call") and operation_name(node) in PRODUCTS:
            if (matrix := _given_factor(node)) is not None:
                words = f"it is written as {operation_name(node)}"
                found.append(Verdict(module_of(node), _shape(matrix), False, words))
    return found


@dataclass(frozen=True)
class _Facts:
    """What the rules know of the whole graph.

    Attributes:
        purposes: what layers are for.
        aliases: of this body.
        tables: embeddings' matrices in this body.
    """

    wishes: Wishes
    purposes: Purposes
    aliases: Aliases
    tables: list[fx.Node]

    @classmethod
    def of(cls, graph: fx.Graph, wishes: Wishes, purposes: Purposes) -> _Facts:
        tables = [node for node in graph.nodes if any(fake_of(node) is each for each in purposes.embeddings)]
        return cls(wishes, purposes, Aliases(graph), tables)


# ---- the rules: why a layer is kept, or None if the rule does not speak of it


def _known(linear: Linear, facts: _Facts) -> str | None:
    known = all(isinstance(fake_of(each), torch.Tensor) for each in (linear.node, linear.rows, linear.matrix))
    return None if known else "it is inside a transform of torch.func"


def _plain(linear: Linear, facts: _Facts) -> str | None:
    """Of subclasses the operators know one: DTensors, say, would need to be told how rows and blocks are sharded."""
    given = {"rows are": linear.rows, "matrix is": linear.matrix, "bias is": linear.bias}
    for name, node in given.items():
        value = None if node is None else fake_of(node)
        if is_foreign(value):
            return f"its {name} a {type(value).__name__}"
    return None


def _named(linear: Linear, facts: _Facts) -> str | None:
    return facts.wishes.excluded(module_of(linear.node))


def _purpose(linear: Linear, facts: _Facts) -> str | None:
    if facts.wishes.included(module_of(linear.node)):
        return None
    return facts.purposes.choosing.get(linear.node) or _head(linear, facts)


def _head(linear: Linear, facts: _Facts) -> str | None:
    """Why it is taken for an output head, if it is."""
    (n, k), matrix = _shape(linear.matrix), fake_of(linear.matrix)
    scores, tables = facts.purposes.scores, facts.purposes.embeddings
    shared = any(facts.aliases.share(linear.matrix, each) for each in facts.tables)
    if shared or any(_same_memory(matrix, each) for each in tables):
        return "its matrix is an embedding's"
    if linear.node not in scores.leaving | scores.labelled:
        return None
    if any(each.shape[0] == n and (n != each.shape[1] or linear.node in scores.alone) for each in tables):
        return f"it has as many output features as an embedding has rows, {n}"
    if linear.node in scores.labelled:
        return "its result meets labels"
    if linear.node in scores.alone and isinstance(n, int) and isinstance(k, int) and n >= WIDE * k:
        return f"its result, {n} features of {k}, leaves the graph as scores of a vocabulary would"
    return None


def _made(linear: Linear, facts: _Facts) -> str | None:
    return None if _given(linear.matrix) is linear.matrix else "its matrix is no parameter, or is computed from one"


def _bias(linear: Linear, facts: _Facts) -> str | None:
    bias = None if linear.bias is None else fake_of(linear.bias)
    if bias is None or (bias.shape == fake_of(linear.matrix).shape[:1] and bias.dtype in DTYPES):
        return None
    return f"its bias has the shape {tuple(bias.shape)} and is in {_short(bias.dtype)}"


def _dtype(linear: Linear, facts: _Facts) -> str | None:
    dtypes = {fake_of(each).dtype for each in (linear.rows, linear.matrix, linear.node)}
    if fake_of(linear.node).dtype in GEMM_DTYPES and dtypes <= set(DTYPES):  # several: autocast converts the operands
        return None
    return f"{' and '.join(sorted(map(_short, dtypes)))}: only products in bfloat16 and float16 are cast"


def _sizes(linear: Linear, facts: _Facts) -> str | None:
    n, k = _shape(linear.matrix)
    if not isinstance(n, int) or not isinstance(k, int):
        return "the sizes of its matrix are symbolic"
    if k % BLOCK:
        return f"{k} input features are no multiple of {BLOCK}"
    if n % LINE:
        return f"{n} output features are no multiple of {LINE}"
    return None


def _narrow(linear: Linear, facts: _Facts) -> str | None:
    (n, k), wished = _shape(linear.matrix), facts.wishes.included(module_of(linear.node))
    if wished or n * NARROW > k or linear.node not in facts.purposes.scores.alone:
        return None
    return f"its result, {n} features of {k}, leaves the graph as a router's would: nobody sees what it chooses"


RULES: tuple[Callable[[Linear, _Facts], str | None], ...] = (
    _known,
    _plain,
    _named,
    _purpose,
    _made,
    _bias,
    _dtype,
    _sizes,
    _narrow,
)
"""In this order."""


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
    fake = fake_of(matrix)
    return tuple(fake.shape) if isinstance(fake, torch.Tensor) else ()


def _same_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two fake tensors are of one tensor, or views of it."""
    return first is second or first.untyped_storage()._cdata == second.untyped_storage()._cdata


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
