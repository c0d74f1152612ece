"""What the nodes of a graph of AOTAutograd's cost: operations, bytes, and bytes on a link, in the graph's own sizes.

    operations  products, as PyTorch counts them (torch.utils.flop_counter), and those of experts
    bytes       all that is read and written once: for what multiplies nothing, the time it takes
    sent        what a rank sends to the others, where experts are met evenly

Sizes may be symbols: costs are sympy expressions, and seconds follow from numbers for these and from `Hardware`.
Experts are taken to be met evenly, so that of R ranks each has one R-th of all assignments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from moecompile.passes.hardware import Hardware
from moecompile.passes.joint_graph import argument, operator_of, packet_of
from moecompile.runtime.contract import DIFFERENTIABLE
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.exchanged import hides
from moecompile.runtime.sharded import process_group
from moecompile.runtime.topology import is_on_one_node

ops, aten, c10d = torch.ops.moecompile, torch.ops.aten, torch.ops._c10d_functional
ZERO = sympy.Integer(0)
VIEWS = {
    *(operator.getitem, aten.view, aten._unsafe_view, aten.reshape, aten.t, aten.transpose, aten.permute, aten.expand),
    *(
        aten.slice,
        aten.select,
        aten.split,
        aten.split_with_sizes,
        aten.chunk,
        aten.unbind,
        aten.squeeze,
        aten.unsqueeze,
    ),
    *(aten.alias, aten.detach, aten.as_strided, aten.sym_size, aten.sym_stride, aten.sym_numel),
}
"""What moves nothing. (A reshape that copies is rare, and counted as if it did not.)"""
STARTS = {ops.dispatch_start: ops.dispatch_wait, ops.combine_start: ops.combine_wait}
"""Halves of an exchange: what begins it, and what ends it."""
COLLECTIVES: Mapping[Any, Callable[[int], tuple[int, int]]] = {
    c10d.all_to_all_single: lambda ranks: (ranks - 1, ranks),
    c10d.all_reduce: lambda ranks: (2 * (ranks - 1), ranks),
    c10d.reduce_scatter_tensor: lambda ranks: (ranks - 1, ranks),
    c10d.all_gather_into_tensor: lambda ranks: (ranks - 1, 1),
}
"""Of what it is given, what a rank sends, as a fraction: of a ring, and of rows that all ranks share evenly."""
WITHIN = "nvlink"
"""The link of exchanges that are one operator with their experts."""
QUANTIZED = ("scaled_mm", "linear_fp8", "experts_fp8", "experts_fp8_forward")
TILE = 128
"""Rows of a tile of a grouped GEMM: each expert's last one is half full, on average."""


@dataclass(frozen=True)
class Cost:
    """Of one node.

    Attributes:
        operations: floating-point, of its products.
        precision: what these multiply, one of `Hardware.flops`.
        bytes: read and written.
        sent: bytes that a rank sends to others.
        link: which carries them; None if nothing is sent.
        group: the ranks that exchange something.
        sms: multiprocessors that send it.
        within: bytes that a rank sends to others before the node is done.
        hides: whether they are sent while it computes.
    """

    operations: sympy.Expr = ZERO
    precision: str = "bfloat16"
    bytes: sympy.Expr = ZERO
    sent: sympy.Expr = ZERO
    link: str | None = None
    group: str | None = None
    sms: int = 0
    within: sympy.Expr = ZERO
    hides: bool = False

    def computing(self, hardware: Hardware, sizes: Mapping[sympy.Symbol, int]) -> float:
        """Seconds that the device is taken: products or memory, whichever takes longer, a launch, and its exchanges."""
        operations, moved, within = (float(each.subs(sizes)) for each in (self.operations, self.bytes, self.within))
        if not operations and not moved:
            return 0.0
        own = hardware.seconds(operations, self.precision, moved)
        if not within:
            return own
        link = hardware.links[WITHIN]
        sending = within / link.rate + 2 * link.latency
        return max(own, sending) if self.hides else own + sending

    def sending(self, hardware: Hardware, sizes: Mapping[sympy.Symbol, int]) -> float:
        """Seconds on the link, alone."""
        if self.link is None:
            return 0.0
        link = hardware.links[self.link]
        return float(self.sent.subs(sizes)) / link.rate + link.latency


def cost_of(node: fx.Node) -> Cost:
    """What a node costs that calls something; nothing of any other.

    Args:
        node: of AOTAutograd's graph, with example values.
    """
    if node.op != "call_function":
        return Cost()
    packet = packet_of(node)
    if packet in STARTS:
        group = str(argument(node, "group"))
        return Cost(sent=_exchanged(node), link=link_between(group), group=group, sms=int(argument(node, "sms")))
    if packet in COLLECTIVES:
        return _collective(node, packet)
    if packet in VIEWS or packet is c10d.wait_tensor:
        return Cost()
    name = packet.__name__ if getattr(operator_of(node), "namespace", None) == "moecompile" else ""
    operations = _of_experts(node, name) if "experts" in name else _of_products(node, packet, name)
    cost = Cost(operations, _precision(node, name), _moved(node))
    if name.startswith("exchanged_experts"):
        return replace(cost, within=_there_and_back(node, name), hides=_hides(node, name))
    return cost


def _of_products(node: fx.Node, packet: Any, name: str) -> sympy.Expr:
    """Those of a product of PyTorch's, or of a linear layer in FP8."""
    if name == "scaled_mm":
        a = _value(argument(node, "a"))
        return 2 * _numel(a) * expression(argument(node, "out_features"))
    if name == "linear_fp8":
        x, weight = (_value(argument(node, each)) for each in ("x", "weight"))
        return 2 * _numel(x) * expression(weight.shape[0])
    count = flop_registry.get(packet)
    if count is None:
        return ZERO
    args: Any = fx.node.map_arg(node.args, _value)
    kwargs: Any = fx.node.map_arg(node.kwargs, _value)
    return expression(count(*args, **kwargs, out_val=_value(node)))


def _of_experts(node: fx.Node, name: str) -> sympy.Expr:
    """Two products for each row forward; and backward as many for each gradient that is needed."""
    matrices = [_value(argument(node, each)) for each in ("w_in", "w_out", "w_up") if argument(node, each) is not None]
    experts = expression(matrices[0].shape[0])
    in_, out = _numel(matrices[0]) / experts, _numel(matrices[1]) / experts
    up = _numel(matrices[2]) / experts if len(matrices) > 2 else ZERO
    rows = _assignments(node)
    tiled = rows + experts * TILE / 2
    if "backward" not in name:
        return 2 * tiled * (in_ + out + up)
    needs = dict(zip(DIFFERENTIABLE, argument(node, "needs"), strict=True))
    through = out + (in_ + up if needs["x"] else 0)  # of rows: through GEMM2 always
    of_matrices = (in_ if needs["w_in"] else 0) + (out if needs["w_out"] else 0) + (up if needs["w_up"] else 0)
    again = in_ + up if argument(node, "recompute") else 0
    return 2 * (tiled * (through + again) + rows * of_matrices)


def _assignments(node: fx.Node) -> sympy.Expr:
    """Rows of experts of this rank: of tokens that came from R ranks, one R-th of the places' assignments."""
    if "exchanged" in str(operator_of(node)):
        tokens = _value(argument(node, "home")).shape[0]
        return expression(tokens) * _top_k(node)
    return _numel(_value(argument(node, "slots"))) / _ranks_behind(node)


def _ranks_behind(node: fx.Node) -> int:
    """How many ranks' tokens an operator computes, as far as its graph shows what it is given."""
    found = [_carried(given) for given in node.all_input_nodes]
    waits = [given for given in found if given.target is ops.dispatch_wait.default]
    return int(argument(waits[0], "ranks")) if waits else 1


def _carried(node: fx.Node) -> fx.Node:
    """What a node hands on."""
    while node.target in (operator.getitem, ops.from_lines.default):
        node = node.all_input_nodes[0]
    return node


def _top_k(node: fx.Node) -> sympy.Expr:
    """Experts of a token: of what the node is given, or else of any block of its graph; 1 if nobody says so."""
    for each in (node, *node.graph.nodes):
        if each.op != "call_function" or getattr(operator_of(each), "namespace", None) != "moecompile":
            continue
        names = {argument.name for argument in operator_of(each)._schema.arguments}
        for name in ("expert_ids", "slots"):
            if name in names and argument(each, name) is not None:
                return expression(_value(argument(each, name)).shape[1])
    return sympy.Integer(1)


def _exchanged(node: fx.Node) -> sympy.Expr:
    """Bytes that a rank sends: of its tokens those that meet an expert of another rank, once for each such rank."""
    ranks = int(argument(node, "ranks"))
    rows = argument(node, "x") if operator_of(node) is ops.dispatch_start.default else argument(node, "y")
    home, value = _value(argument(node, "home")), _value(rows)
    pitch = expression(value.shape[1]) * value.element_size()
    met = 1 - (1 - sympy.Rational(1, ranks)) ** _top_k(node)
    return expression(home.shape[0]) * (ranks - 1) * met * pitch


def _there_and_back(node: fx.Node, name: str) -> sympy.Expr:
    """Bytes of a whole block's two exchanges: rows of what the tokens hold, to their experts and home."""
    ranks, given = int(argument(node, "ranks")), _value(argument(node, "grad" if "backward" in name else "x"))
    met = 1 - (1 - sympy.Rational(1, ranks)) ** _top_k(node)
    wide = 1 + (1 if "backward" in name or not argument(node, "quantized") else sympy.Rational(1, 2))
    return expression(given.shape[0]) * (ranks - 1) * met * expression(given.shape[1]) * given.element_size() * wide


def _hides(node: fx.Node, name: str) -> bool:
    """Whether a block that nobody differentiates has so many tokens that its exchanges are hidden."""
    told = (argument(node, each) for each in ("ranks", "capacity", "num_experts"))
    ranks, capacity, num_experts = map(int, told)
    return name == "exchanged_experts" and hides(ranks, capacity, int(_top_k(node)), num_experts)


def _collective(node: fx.Node, packet: Any) -> Cost:
    group = str(argument(node, "group_name"))
    sent, of = COLLECTIVES[packet](process_group(group).size())
    given = _value(node.all_input_nodes[0])
    return Cost(sent=_bytes(given) * sent / of, link=link_between(group), group=group)


def link_between(group: str) -> str:
    """What carries most of what ranks of a group send: the network if some are on other nodes."""
    return "nvlink" if is_on_one_node(group) else "network"


def _precision(node: fx.Node, name: str) -> str:
    """What its products multiply."""
    if name in QUANTIZED or "fp8" in name or (name.startswith("exchanged") and argument(node, "quantized")):
        return "float8"
    values = [_value(each) for each in node.all_input_nodes]
    floating = [each.dtype for each in values if isinstance(each, Tensor) and each.dtype.is_floating_point]
    kind = dtype_name(floating[0]) if floating else "float32"
    return kind if kind in ("bfloat16", "float16") else "float8" if kind.startswith("float8") else "float32"


def _moved(node: fx.Node) -> sympy.Expr:
    """All that it is given and gives, once."""
    tensors = [_value(each) for each in dict.fromkeys(node.all_input_nodes)]
    tensors += tree_leaves(_value(node))
    return sum((_bytes(each) for each in tree_leaves(tensors) if isinstance(each, Tensor)), ZERO)


def bytes_of(node: fx.Node) -> sympy.Expr:
    """Bytes of a node's results, as far as they are memory of their own."""
    if node.op != "call_function" or (packet := packet_of(node)) in VIEWS or packet is c10d.wait_tensor:
        return ZERO
    return held_by(node)


def held_by(node: fx.Node) -> sympy.Expr:
    """Bytes of the tensors that a node stands for."""
    return sum((_bytes(each) for each in tree_leaves(_value(node)) if isinstance(each, Tensor)), ZERO)


def expression(size: Any) -> sympy.Expr:
    """A size, which may be symbolic."""
    found: sympy.Expr = sympy.sympify(size.node.expr if isinstance(size, torch.SymInt) else size)
    return found


def sizes_of(value: Any) -> list[Any]:
    """Sizes and strides of the tensors in an example value, and what else is in it: sizes that are handed on, say."""
    found: list[Any] = []
    for each in tree_leaves(value):
        found += (*each.shape, *each.stride()) if isinstance(each, Tensor) else (each,)
    return found


def has_symbols(value: Any) -> bool:
    """Whether a size in an example value is no number."""
    return any(isinstance(size, torch.SymInt) for size in sizes_of(value))


def _numel(tensor: Tensor) -> sympy.Expr:
    return sympy.Mul(*map(expression, tensor.shape))


def _bytes(tensor: Tensor) -> sympy.Expr:
    return _numel(tensor) * tensor.element_size()


def _value(given: Any) -> Any:
    """The example value of a node; anything else as it is."""
    return given.meta.get("val") if isinstance(given, fx.Node) else given
