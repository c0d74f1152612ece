"""Prove that a graph computes every element of its batch by itself, or say what does not.

Contract
- On entry the graph is one of ATen's and moecompile's operators, with example values, functional, before autograd; some
  of its inputs have the batch, one symbol, as their first dimension.
- Every value gets a meaning by exact rules: `ROWS`, whose first dimension is the batch, or each element's share of it,
  one behind the other; `SHARED`, the same for all elements; `INSIDE`, what blocks of experts have inside, as
  moecompile's passes write them, which only the operators of such a block read. What no rule speaks of is refused, and
  so is whatever mixes elements: a sum or a sort over the batch, numbers of rows, random numbers, what is written.
- Then the graph of half of the batch computes the half of each result, but for the order of sums that nobody fixes.

    for node in graph:  meaning = RULES[operator](node), of the meanings of what it reads
    every output is ROWS
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from moecompile.passes.costs import expression
from moecompile.passes.joint_graph import argument

aten, ops = torch.ops.aten, torch.ops.moecompile


class Meaning(enum.Enum):
    """Of a value, as the contract has it."""

    ROWS = "rows of the batch"
    SHARED = "the same for all elements of the batch"
    INSIDE = "inside a block of experts"


ROWS, SHARED, INSIDE = Meaning.ROWS, Meaning.SHARED, Meaning.INSIDE


class NotProvenError(Exception):
    """What keeps a graph from being proven; the message is a reason for people."""


def prove(graph: fx.Graph, batch: sympy.Symbol) -> None:
    """Returns if each element of the batch is computed by itself.

    Args:
        graph: as the contract has it.
        batch: the symbol that is the first dimension of inputs.

    Raises:
        NotProvenError: that is not known.
    """
    proof = _Proof(batch)
    for node in graph.nodes:
        if node.op == "output":
            for result in tree_leaves(node.args):
                if isinstance(result, fx.Node) and proof.of.get(result) is not ROWS:
                    raise NotProvenError(f"the result {result.name} does not hold the batch: {proof.words(result)}")
        else:
            proof.add(node)


class _Proof:
    """Meanings so far."""

    def __init__(self, batch: sympy.Symbol) -> None:
        self.batch, self.of = batch, dict[fx.Node, Meaning]()

    def add(self, node: fx.Node) -> None:
        """The node's meaning."""
        if node.op == "placeholder":
            self.of[node] = self._given(node) if isinstance(_value(node), Tensor) else SHARED
        elif node.op == "get_attr":
            self.of[node] = SHARED
        elif node.target is operator.getitem:
            self.of[node] = self._part(node)
        else:
            self.of[node] = self._called(node)

    def words(self, node: fx.Node) -> str:
        """For people."""
        value = _value(node)
        shape = f" {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        return f"{node.target}{shape}, {self.of[node].value}"

    def _given(self, node: fx.Node) -> Meaning:
        """Of an input: of several rows for each element nobody knows in which order they are."""
        meaning = self.by_shape(node)
        if meaning is ROWS and expression(_value(node).shape[0]) != self.batch:
            raise NotProvenError(f"{node.name} comes with several rows for each element: {tuple(_value(node).shape)}")
        return meaning

    def by_shape(self, node: fx.Node) -> Meaning:
        """Of what is filled the same everywhere, or comes in: whether the batch is its first dimension, or nowhere."""
        sizes = [expression(size) for size in _value(node).shape]
        if any(self.batch in size.free_symbols for size in sizes[1:]):
            raise NotProvenError(f"{node.name} has the batch in another dimension than its first: {tuple(sizes)}")
        return ROWS if sizes and self.leads(sizes[0]) else SHARED

    def leads(self, size: sympy.Expr) -> bool:
        """Whether it is a multiple of the batch; raises for any other number that depends on it."""
        if self.batch not in size.free_symbols:
            return False
        each = sympy.simplify(size / self.batch)
        if self.batch in each.free_symbols or not each.is_integer:
            raise NotProvenError(f"{size} rows are no multiple of the batch {self.batch}")
        return True

    def _part(self, node: fx.Node) -> Meaning:
        whole: Any = node.args[0]
        if whole.target is ops.combine_wait.default:
            return ROWS if node.args[1] == 0 else INSIDE
        meaning = self.of[whole]
        if meaning is ROWS and self.by_shape(node) is not ROWS:
            raise NotProvenError(f"of {whole.target} nobody knows what result {node.args[1]} holds")
        return meaning

    def _called(self, node: fx.Node) -> Meaning:
        read = [self.of[each] for each in node.all_input_nodes if isinstance(_value(each), (Tensor, tuple, list))]
        tags = getattr(node.target, "tags", ())
        packet = getattr(node.target, "overloadpacket", node.target)
        if torch.Tag.nondeterministic_seeded in tags and packet not in RULES:  # the rule of attention says of dropout
            raise NotProvenError(f"{node.target} draws random numbers, and others for halves of the batch")
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise NotProvenError(f"{node.target} writes into something")
        if not isinstance(_value(node), (Tensor, tuple, list)):
            return self._number(node, read)
        if packet not in FILLED and all(each is SHARED for each in read) and not self._speaks_of_batch(node):
            return SHARED
        if packet in RULES:
            return RULES[packet](self, node)
        if torch.Tag.pointwise in tags:
            return self.aligned(node, node.all_input_nodes)
        raise NotProvenError(f"there is no rule for {node.target}, which is given rows of the batch")

    def _number(self, node: fx.Node, read: list[Meaning]) -> Meaning:
        """Sizes are numbers of both halves; what tensors hold is not."""
        packet = getattr(node.target, "overloadpacket", None)
        if packet not in (aten.sym_size, aten.sym_numel, aten.sym_stride, aten._assert_async) and {*read} - {SHARED}:
            raise NotProvenError(f"{node.target} reads a number from rows of the batch")
        return SHARED

    def _speaks_of_batch(self, node: fx.Node) -> bool:
        """Whether its results have a size that depends on the batch."""
        tensors = [each for each in tree_leaves(_value(node)) if isinstance(each, Tensor)]
        return any(self.batch in expression(size).free_symbols for each in tensors for size in each.shape)

    def rows(self, node: Any) -> bool:
        """Whether it is rows of the batch; raises for what is inside of a block."""
        if not isinstance(node, fx.Node) or not isinstance(_value(node), Tensor):
            return False
        if self.of[node] is INSIDE:
            raise NotProvenError(f"{node.name} is read outside of its block of experts")
        return self.of[node] is ROWS

    def aligned(self, node: fx.Node, given: Any) -> Meaning:
        """By element: rows meet rows of the same numbers, and what is the same for all in their first dimension."""
        out = _value(node)
        first = out if isinstance(out, Tensor) else out[0]
        for each in given:
            value = _value(each)
            if not isinstance(value, Tensor):
                continue
            lacking = first.dim() - value.dim()
            if self.rows(each):
                if lacking or expression(value.shape[0]) != expression(first.shape[0]):
                    raise NotProvenError(f"{node.target} puts rows of the batch beside others: {self.words(each)}")
            elif not lacking and value.dim() and expression(value.shape[0]) != 1:
                raise NotProvenError(f"{node.target} puts rows of the batch beside what is shared: {self.words(each)}")
        return ROWS


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


Rule = Callable[[_Proof, fx.Node], Meaning]


def _dims(node: fx.Node) -> list[int]:
    """The dimensions along which it goes, counted from the first; all of them if it names none."""
    names = {each.name for each in node.target._schema.arguments}  # type: ignore[union-attr]
    name = next((each for each in ("dim", "dims") if each in names), None)
    given = None if name is None else argument(node, name)
    own = _value(node.all_input_nodes[0]).dim()
    dims = [given] if isinstance(given, int) else list(given or range(own))
    return [each % max(own, 1) for each in dims]


def _along(proof: _Proof, node: fx.Node) -> Meaning:
    """Sums, sorts and the like: not along the batch."""
    if 0 in _dims(node):
        raise NotProvenError(f"{node.target} goes along the batch")
    return _first(proof, node)


def _sliced(proof: _Proof, node: fx.Node) -> Meaning:
    """Not along the batch, or all of it."""
    if expression(_value(node).shape[0]) != expression(_value(node.all_input_nodes[0]).shape[0]):
        raise NotProvenError(f"{node.target} takes a part of the batch")
    return _first(proof, node)


def _first(proof: _Proof, node: fx.Node) -> Meaning:
    """Each row of the first argument by itself, with what is shared."""
    first, *others = node.all_input_nodes
    if not proof.rows(first) or any(proof.rows(each) for each in others):
        raise NotProvenError(f"{node.target} is given rows of the batch where none were expected")
    return ROWS


def _viewed(proof: _Proof, node: fx.Node) -> Meaning:
    """Elements keep their order, so those of each element of the batch stay together."""
    proof.rows(node.all_input_nodes[0])
    return proof.by_shape(node)


def _permuted(proof: _Proof, node: fx.Node) -> Meaning:
    own = _value(node.all_input_nodes[0]).dim()
    if node.target is aten.permute.default:
        stays = argument(node, "dims")[0] % own == 0
    elif node.target is aten.t.default:
        stays = own < 2
    else:
        stays = 0 not in {argument(node, name) % own for name in ("dim0", "dim1")}
    if not stays:
        raise NotProvenError(f"{node.target} moves the batch from the first dimension")
    return _first(proof, node)


def _unsqueezed(proof: _Proof, node: fx.Node) -> Meaning:
    own = _value(node.all_input_nodes[0]).dim()
    if argument(node, "dim") % (own + 1) == 0:
        raise NotProvenError(f"{node.target} moves the batch from the first dimension")
    return _first(proof, node)


def _expanded(proof: _Proof, node: fx.Node) -> Meaning:
    """What is shared may be repeated for each element."""
    given, out = node.all_input_nodes[0], _value(node)
    own = _value(given)
    if proof.rows(given) and (out.dim() != own.dim() or expression(out.shape[0]) != expression(own.shape[0])):
        raise NotProvenError(f"{node.target} repeats rows of the batch")
    return proof.by_shape(node)


def _cast(proof: _Proof, node: fx.Node) -> Meaning:
    """To FP8, by blocks along the last dimension."""
    if _value(node.all_input_nodes[0]).dim() < 2:
        raise NotProvenError(f"{node.target} has blocks that go along the batch")
    return _first(proof, node)


def _linear(proof: _Proof, node: fx.Node) -> Meaning:
    """Rows and their casts, with matrices that are shared."""
    given: Any = node.args
    x, weight, bias, values, scales, quantized = given
    if not all(map(proof.rows, (x, values, scales))) or any(map(proof.rows, (weight, bias, *quantized))):
        raise NotProvenError(f"{node.target} multiplies rows of the batch with each other")
    return ROWS


def _all(proof: _Proof, node: fx.Node) -> Meaning:
    """Of the whole batch it may be checked, as what holds of all holds of both halves, and the other way round."""
    if node.target is aten.all.default and all(user.target is aten._assert_async.msg for user in node.users):
        proof.rows(node.all_input_nodes[0])
        return INSIDE
    return _along(proof, node)


def _filled(proof: _Proof, node: fx.Node) -> Meaning:
    return proof.by_shape(node)


def _joined(proof: _Proof, node: fx.Node) -> Meaning:
    if argument(node, "dim") % _value(node.all_input_nodes[0]).dim() == 0:
        raise NotProvenError(f"{node.target} joins along the batch")
    return proof.aligned(node, [each for each in node.all_input_nodes if isinstance(_value(each), Tensor)])


def _product(proof: _Proof, node: fx.Node) -> Meaning:
    """Rows times what is shared; a bias has one row."""
    given: Any = node.args
    *bias, a, b = given
    if proof.rows(b) or not proof.rows(a):
        raise NotProvenError(f"{node.target} sums over the batch, or multiplies rows of it with each other")
    if bias:
        proof.aligned(node, bias)
    return ROWS


def _batched(proof: _Proof, node: fx.Node) -> Meaning:
    """Matrices of each element with those of the same."""
    return proof.aligned(node, node.all_input_nodes)


def _attention(proof: _Proof, node: fx.Node) -> Meaning:
    """Of each sequence with itself; masks by element, too."""
    for each in node.all_input_nodes[:3]:
        if not proof.rows(each) or _value(each).dim() != 4:
            raise NotProvenError(f"{node.target} is given queries, keys or values that are shared")
    if dropout := argument(node, "dropout_p"):
        raise NotProvenError(f"{node.target} drops out with {dropout}, others for halves of the batch")
    return proof.aligned(node, node.all_input_nodes)


def _looked_up(proof: _Proof, node: fx.Node) -> Meaning:
    table, ids = argument(node, "weight"), argument(node, "indices")
    if proof.rows(table) or not proof.rows(ids):
        raise NotProvenError(f"{node.target} looks up rows of the batch")
    return ROWS


def _gathered(proof: _Proof, node: fx.Node) -> Meaning:
    if argument(node, "dim") % _value(node.all_input_nodes[0]).dim() == 0:
        raise NotProvenError(f"{node.target} goes along the batch")
    return proof.aligned(node, node.all_input_nodes)


def _normed(proof: _Proof, node: fx.Node) -> Meaning:
    if len(argument(node, "normalized_shape")) >= _value(node.all_input_nodes[0]).dim():
        raise NotProvenError(f"{node.target} goes along the batch")
    return _first(proof, node)


def _inside(proof: _Proof, node: fx.Node) -> Meaning:
    """Of a block of experts: what only its operators read, of tokens and their experts, or of what has travelled."""
    for name in ("expert_ids", "x", "weights", "given", "y"):
        if name not in {each.name for each in node.target._schema.arguments}:  # type: ignore[union-attr]
            continue
        each = argument(node, name)
        if each is not None and proof.of[each] is SHARED:
            raise NotProvenError(f"{node.target} is given {name} that are the same for all")
    return INSIDE


def _experts(proof: _Proof, node: fx.Node) -> Meaning:
    """Rows go through their experts' matrices; of tokens that have travelled, they travel back."""
    x, weights = argument(node, "x"), argument(node, "weights")
    if proof.of[x] is INSIDE:
        return INSIDE
    plan = [argument(node, name) for name in ("offsets", "slots", "order")]
    others = [each for each in node.all_input_nodes if each not in (x, weights, *plan)]
    of_rows = proof.rows(x) and (weights is None or proof.rows(weights)) and not any(map(proof.rows, others))
    slots = expression(_value(plan[1]).shape[0])
    if not of_rows or any(proof.of[each] is not INSIDE for each in plan) or slots != expression(_value(x).shape[0]):
        raise NotProvenError(f"{node.target} is given routing weights, a plan or matrices of other tokens")
    return ROWS


FILLED = {aten.full, aten.zeros, aten.ones, aten.new_full, aten.new_zeros, aten.new_ones} | {
    *(aten.full_like, aten.zeros_like, aten.ones_like),
}
"""Constants: rows may be as many as they like."""
RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(FILLED, _filled),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape), _viewed),
    **dict.fromkeys((aten.permute, aten.transpose, aten.t), _permuted),
    aten.unsqueeze: _unsqueezed,
    aten.expand: _expanded,
    aten.cat: _joined,
    aten.all: _all,
    **dict.fromkeys((aten.mm, aten.addmm), _product),
    **dict.fromkeys((aten.bmm, aten.baddbmm), _batched),
    **dict.fromkeys(
        (aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.prod, aten.any, aten.argmax, aten.argmin),
        _along,
    ),
    **dict.fromkeys((aten._softmax, aten._log_softmax, aten.softmax, aten.topk, aten.sort, aten.cumsum), _along),
    **dict.fromkeys((aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.squeeze), _along),
    aten.slice: _sliced,
    **dict.fromkeys((aten.gather, aten.scatter), _gathered),
    **dict.fromkeys((aten.clone, aten.detach, aten.alias, aten._to_copy, aten.lift_fresh_copy), _first),
    aten.embedding: _looked_up,
    **dict.fromkeys((aten.native_layer_norm, aten._fused_rms_norm), _normed),
    **dict.fromkeys(
        (
            aten._scaled_dot_product_flash_attention,
            aten._scaled_dot_product_efficient_attention,
            aten._scaled_dot_product_flash_attention_for_cpu,
        ),
        _attention,
    ),
    **dict.fromkeys((ops.plan, ops.exchange_plan, ops.dispatch_start, ops.dispatch_wait), _inside),
    **dict.fromkeys((ops.combine_start, ops.combine_wait, ops.came_within), _inside),
    **dict.fromkeys((ops.experts, ops.experts_fp8), _experts),
    ops.quantize: _cast,
    ops.linear_fp8: _linear,
}
"""By operator. What is by element needs none."""
