"""Replace each Site by moecompile's operators.

Contract
- The graph computes the same, gradients included; only the Sites' own nodes are taken out, and only those that nobody
  else uses.
- The router stays: its ids and weights become operands. Routing values with users outside the Site stay alive.
- A float32 sum that is rounded to 16 bits, and is nobody else's, is rounded by the operator: the same numbers and
  gradients, without a float32 tensor. Not where GEMM2 has biases: gradients would not be the same.

    plan   = moecompile.plan(expert_ids, num_experts)
    result = moecompile.experts(x, weights, *plan, w_in, w_out, ..., activation=...)
    result = base + result                       # where the model adds into something, in place if it did
    to(experts(...), bfloat16)                   # becomes experts(..., out_dtype=bfloat16)
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves

from moecompile.passes.aliases import empty_fake, fake_of, lies_in_order
from moecompile.passes.calls import bind, writes
from moecompile.passes.layout import Layout
from moecompile.passes.region import only_reads_dtype, removable
from moecompile.passes.site import GATHER, Operand, Site
from moecompile.runtime import kernels

_TENSORS = ("w_up", "b_in", "b_up", "b_out")
_HALVES = (torch.bfloat16, torch.float16)


def fuse(graph: fx.Graph, sites: Sequence[Site], layout: Layout | None = None) -> int:
    """Rewrite the graph in place; returns how many Sites were replaced. The caller recompiles the GraphModule.

    `layout` is the graph's, as detection returns it with the Sites; without it, it is made here.
    """
    replaced: dict[fx.Node, fx.Node] = {}
    layout = layout or Layout(graph)
    modes = layout.mode  # of the graph as it is: nodes are about to go
    for site in sites:
        _free_from_metadata(graph, site)
    for found in sites:
        site = _renamed(found, replaced)
        inplace = [addition for addition in site.partials if addition is not site.node and writes(addition)]
        gone = removable(site.node, site.region, layout, inplace)
        for addition in inplace:  # whoever used an addition's result used the sum's own tensor by another name
            addition.replace_all_uses_with(layout.aliases.written(addition)[0])
        with graph.inserting_before(site.node):
            result = emit(graph, site)
            replaced |= _replace(graph, site, result, layout)
        final = replaced[site.node]
        if not any(user in other.region for other in sites for user in final.users):
            replaced |= _round_at_once(site, result, final, modes)
        for node in gone:
            if not node.users:  # a base that the sum is added into stays
                graph.erase_node(node)
    return len(sites)


def _renamed(site: Site, replaced: dict[fx.Node, fx.Node]) -> Site:
    """The Site with the results of earlier ones, which its operands may be, by the nodes that hold them now."""

    def node_of(node: fx.Node) -> fx.Node:
        while node in replaced:
            node = replaced[node]
        return node

    def operand_of(operand: Operand) -> Operand:
        steps = tuple(
            (step, tuple(operand_of(given) if isinstance(given, Operand) else given for given in arguments))
            for step, arguments in operand.steps
        )
        return Operand(node_of(operand.node), steps, tuple(map(node_of, operand.parts)))

    if not replaced:
        return site
    operands = {name: operand_of(operand) for name, operand in site.operands.items()}
    return replace(site, operands=operands, base=None if site.base is None else node_of(site.base))


def _free_from_metadata(graph: fx.Graph, site: Site) -> None:
    """Casts outside that read only the dtype of a row get it as a dtype."""
    for node in site.region:
        for user in [user for user in node.users if user not in site.region and only_reads_dtype(user, node)]:
            user.target, user.args, user.kwargs = "to", (user.args[0], fake_of(user).dtype), {}


def emit(graph: fx.Graph, site: Site) -> fx.Node:
    """Insert the operators that compute the Site's sum (without its base) at the graph's insertion point."""
    made = _Emitter(graph, site)
    ids = made.operand("expert_ids")
    plan = made.plan(ids)
    offsets, slots, order = (made.part(plan, number) for number in (1, 2, 3))
    weights = made.operand("weights", ids) if "weights" in site.operands else None
    keywords: dict[str, Any] = {name: made.operand(name) for name in _TENSORS if name in site.operands}
    keywords |= {"activation": site.activation, "gate_up": site.gate_up}
    for name, default in (
        ("input", "x"),
        ("output", "mul(out, weight)"),
        ("w_in_transposed", False),
        ("w_out_transposed", False),
        ("out_dtype", None),
        ("kernels", None),
        ("recompute", False),
    ):
        if getattr(site, name) != default:
            keywords[name] = getattr(site, name)
    arguments = (made.operand("x"), weights, offsets, slots, order, made.operand("w_in"), made.operand("w_out"))
    return made.experts(arguments, keywords)


class _Emitter:
    """Inserts nodes with example values and the Site's provenance."""

    def __init__(self, graph: fx.Graph, site: Site) -> None:
        self._graph, self._site = graph, site
        self._done: dict[Any, fx.Node] = {}
        self._key = "example_value" if "example_value" in site.node.meta else "val"
        self._meta: dict[str, Any] = {
            name: site.node.meta[name]
            for name in ("stack_trace", "nn_module_stack", "source_fn_stack")
            if name in site.node.meta
        }

    def call(self, target: Any, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None) -> fx.Node:
        """A function call with its example value computed."""
        node = self._graph.call_function(target, arguments, keywords or {})
        return self._with_meta(node, lambda args, kwargs: target(*args, **kwargs))

    def plan(self, ids: fx.Node) -> fx.Node:
        """The layout of the rows by expert: counts, offsets, slots, order."""
        arguments = (ids, self._site.num_experts)
        node = self._graph.call_function(torch.ops.moecompile.plan.default, arguments)
        fake = fake_of(ids)
        shapes = kernels.plan_shapes(fake, self._site.num_experts)
        return self.known(node, tuple(empty_fake(fake, shape, torch.int32) for shape in shapes))

    def experts(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> fx.Node:
        """The experts' results, summed into tokens."""
        node = self._graph.call_function(torch.ops.moecompile.experts.default, arguments, keywords)
        args: Any = fx.node.map_arg(node.args, fake_of)
        kwargs: Any = fx.node.map_arg(node.kwargs, fake_of)
        result = empty_fake(args[0], *kernels.experts_shape(*args, **kwargs))
        given = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.Tensor)]
        return self.known(node, result.requires_grad_(any(tensor.requires_grad for tensor in given)))

    def part(self, node: fx.Node, number: int) -> fx.Node:
        """One of several results."""
        part = self._graph.call_function(operator.getitem, (node, number))
        return self.known(part, node.meta[self._key][number])

    def method(self, name: str, arguments: tuple[Any, ...]) -> fx.Node:
        """A method call with its example value computed."""
        node = self._graph.call_method(name, arguments)
        if name == "reshape" and (view := _view(fake_of(arguments[0]), arguments[1:])) is not None:
            return self.known(node, view)
        return self._with_meta(node, lambda args, kwargs: getattr(args[0], name)(*args[1:], **kwargs))

    def add_(self, base: fx.Node, result: fx.Node) -> fx.Node:
        """An addition in place. Its example value is the base's: to run it would write into what may be a leaf."""
        return self.known(self._graph.call_method("add_", (base, result)), fake_of(base))

    def _with_meta(self, node: fx.Node, run: Any) -> fx.Node:
        arguments = fx.node.map_arg((node.args, node.kwargs), fake_of)
        fakes = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, FakeTensor)]
        with fakes[0].fake_mode if fakes else contextlib.nullcontext():
            return self.known(node, run(*arguments))

    def known(self, node: fx.Node, value: Any) -> fx.Node:
        """The node with its example value, and where it comes from."""
        node.meta.update(self._meta)
        node.meta[self._key] = value
        return node

    def operand(self, name: str, ids: fx.Node | None = None) -> fx.Node:
        """The operand's node, brought to the shape the operator takes."""
        operand: Operand = self._site.operands[name]
        return self._made_of(operand, len(operand.steps), ids)

    def _made_of(self, operand: Operand, steps: int, ids: fx.Node | None) -> fx.Node:
        """The operand's node after some of its steps; equal ones are made once."""
        if steps == 0:
            return operand.node
        made = (operand.node, operand.parts, operand.steps[:steps])
        if made not in self._done:
            self._done[made] = self._step(operand, steps, ids)
        return self._done[made]

    def _step(self, operand: Operand, steps: int, ids: fx.Node | None) -> fx.Node:
        node = self._made_of(operand, steps - 1, ids)
        step, given = operand.steps[steps - 1]
        arguments = tuple(
            self._made_of(inner, len(inner.steps), ids) if isinstance(inner, Operand) else inner for inner in given
        )
        if step == GATHER:
            ranks, group = arguments
            attributes = {"ranks": ranks, "group": group, "mean": False}
            return self.call(torch.ops.moecompile.gather_experts.default, (node,), attributes)
        if step == "stack":
            return self.call(torch.stack, (list(operand.parts),))
        if step == "cat":
            return self.call(torch.cat, ([node, *arguments], 1))
        if step == "from_end":
            # -1 is the last expert here; what lies before the first is out of range, and not "no expert"
            (num_experts,) = arguments
            negative = self.call(operator.lt, (node, 0))
            found = self.call(torch.where, (negative, self.call(operator.add, (node, num_experts)), node))
            return self.call(torch.where, (self.call(operator.lt, (found, 0)), num_experts, found))
        if step == "from_zero":  # the same for what lies before the first
            return self.call(torch.where, (self.call(operator.lt, (node, 0)), arguments[0], node))
        if step == "gather" and arguments == ("expert_ids",):
            assert ids is not None
            return self.call(torch.gather, (node, 1, ids))
        if step == "reshape" and _has_shape(node, arguments):
            return node
        return self.method(step, (node, *arguments))


def _view(fake: torch.Tensor, shape: tuple[Any, ...]) -> torch.Tensor | None:
    """What a reshape makes of an example value that lies in order: the same memory; None if a size is symbolic.

    Without PyTorch's dispatcher, as above.
    """
    sizes = [size for size in shape if size != -1]
    known = isinstance(fake, FakeTensor) and all(type(size) is int for size in (*fake.shape, *sizes))
    if not known or not fake.is_contiguous() or not all((*fake.shape, *sizes)):
        return None
    assert isinstance(fake, FakeTensor)
    full = [fake.numel() // math.prod(sizes) if size == -1 else size for size in shape]
    plain, memory = torch.empty(full, dtype=fake.dtype, device="meta"), fake.untyped_storage()
    plain.set_(memory, int(fake.storage_offset()), plain.shape, plain.stride())
    return FakeTensor(fake.fake_mode, plain, fake.device).requires_grad_(fake.requires_grad)


def _has_shape(node: fx.Node, shape: tuple[Any, ...]) -> bool:
    """Whether a reshape, with one size left open, would change nothing."""
    fake = fake_of(node)
    return fake.dim() == len(shape) and all(
        size == -1 or (isinstance(own, int) and own == size) for own, size in zip(fake.shape, shape, strict=True)
    )


def _replace(graph: fx.Graph, site: Site, result: fx.Node, layout: Layout) -> dict[fx.Node, fx.Node]:
    """Give the Site's users the new result, added into the base the way the model did.

    Returns the nodes that other Sites may name, with those that hold the same from here on.
    """
    node, base = site.node, site.base
    made = _Emitter(graph, site)
    shape = fake_of(node if base is None or fake_of(node) is not None else base).shape
    if len(shape) != 2:
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        result = made.call(torch.ops.aten._unsafe_view.default, (result, sizes))  # no view: the model's sum is none
    final, replaced = result, {}
    if base is not None and writes(node):
        position = layout.position
        earlier = [
            alias
            for alias in layout.aliases.of(base)
            if alias is not base
            and position[alias] < position[node]
            and (alias not in site.region or any(position.get(user, -1) > position[node] for user in alias.users))
        ]
        if site.fresh and not earlier:
            base.replace_all_uses_with(result, delete_user_cb=lambda user: position.get(user, -1) > position[node])
            replaced[base] = result
        else:
            final = made.add_(base, result)
    elif base is not None and not site.fresh:
        final = made.call(torch.add, (base, result))
        if lies_in_order(fake_of(node)) and not lies_in_order(fake_of(final)):
            final = made.method("contiguous", (final,))
    node.replace_all_uses_with(final)
    graph.erase_node(node)
    return replaced | {node: final}


def _round_at_once(
    site: Site, result: fx.Node, final: fx.Node, modes: Mapping[fx.Node, object]
) -> dict[fx.Node, fx.Node]:
    """Has the operator round its sum, where the model does nothing else with it.

    Args:
        site: that was replaced.
        result: the operator's node.
        final: what the Site's users got: `result`, in the model's shape, or with what it is added into.
        modes: that hold at each node of the graph as it was.

    Returns:
        the cast that is gone, with the node that holds the same.
    """
    shaped = final is result or (final.target is torch.ops.aten._unsafe_view.default and final.args[0] is result)
    users = [*final.users]
    if not shaped or len(users) != 1 or site.out_dtype is not None or fake_of(result).dtype != torch.float32:
        return {}
    if "b_out" in site.operands:  # routing weights' gradients multiply it by the result's, in the wider of both dtypes
        return {}
    (cast,), call = users, bind(users[0])
    narrow = call is not None and call.name == "cast" and not call.inplace and cast.all_input_nodes == [final]
    fake = fake_of(cast) if narrow else None
    if not isinstance(fake, torch.Tensor) or fake.dtype not in _HALVES or fake.device != fake_of(final).device:
        return {}
    if fake.shape != fake_of(final).shape or not lies_in_order(fake) or modes[cast] != modes[site.node]:
        return {}
    result.kwargs = {**result.kwargs, "out_dtype": fake.dtype}
    made, summed = _Emitter(cast.graph, site), fake_of(result)
    made.known(result, empty_fake(fake, tuple(summed.shape), fake.dtype).requires_grad_(summed.requires_grad))
    if final is not result:
        made.known(final, fake)
    cast.replace_all_uses_with(final)
    cast.graph.erase_node(cast)
    return {cast: final}
