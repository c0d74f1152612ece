"""Exchange tokens between the ranks that hold the experts, instead of gathering the experts for the tokens.

Contract
- On entry blocks are `moecompile::plan` and `moecompile::experts` (passes/fuse.py), which read parameters that
  `moecompile::gather_experts` gathers from all ranks of a group. The graph is right as it is, and slow.
- A block is rewritten if all its sharded parameters are gathered by one group, nothing writes them, and nothing but
  casts, transpositions and copies of single experts lies between. What every rank has whole (biases, say) is cut to
  this rank's part.
- The result is the same sum over a token's experts, divided by ranks: each rank's part is rounded once to the result's
  dtype, and the parts are summed in float32, in the order of ranks. Gradients likewise.
- All ranks rewrite the same blocks, whatever each of them has found: they agree on it.
- Others keep their gathered parameters, and are returned with the reason.

    w_in, w_out = gather_experts(w_in_here), gather_experts(w_out_here)
    result = experts(x, weights, *plan(expert_ids, E), w_in, w_out)
        becomes
    sent, home = exchange_plan(expert_ids, num_experts=E, ranks=R, capacity=C)
    tokens = x, expert_ids, weights, sent, home
    rows, ids, row_weights, came = dispatch_wait(*dispatch_start(*tokens), *tokens)
    y = experts(rows, row_weights, *plan(ids, E / R), w_in_here, w_out_here)        (and where there may be no room for
                                                                        all rows: came = came_within(came, counts))
    result, _ = combine_wait(*combine_start(y, came, sent, home), y, sent, home)

A start and its wait are nodes of their own, so that what does not need the tokens can run between them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moecompile.passes.aliases import empty_fake, fake_of
from moecompile.passes.calls import bind, writes
from moecompile.passes.casts import Kept, call_for, called, key_of, parts_of
from moecompile.passes.provenance import input_name, module_of, source_of
from moecompile.passes.spelling import operation_name
from moecompile.runtime.contract import DIFFERENTIABLE, TENSORS
from moecompile.runtime.peer_memory import ROWS, ROWS_AT_LEAST, SLOTS_USED

ops = torch.ops.moecompile
GATHER = ops.gather_experts.default
MATRICES = tuple(name for name in DIFFERENTIABLE if name not in ("x", "weights"))
STEPS = ("cast", "contiguous", "clone", "transpose")
"""What may lie between a gathered parameter and the block: it treats each expert by itself."""


@dataclass(frozen=True)
class Group:
    """Ranks that share experts, as `gather_experts` names them."""

    name: str
    ranks: int
    mean: bool


@dataclass(frozen=True)
class Exchanged:
    """A block whose tokens are exchanged.

    Attributes:
        module: of the block.
        group: that shares its experts.
        num_experts: of all ranks.
        capacity: tokens of a rank at most.
        number: of the block among all of the graph, in their order.
    """

    module: str
    group: Group
    num_experts: int
    capacity: int
    number: int


@dataclass(frozen=True)
class Travel:
    """How tokens travel, where moecompile's kernels carry them.

    Attributes:
        sms: multiprocessors that send, the same number on all ranks.
        patience: seconds that a rank waits for another.
        rows: that a rank's experts have room for, as a multiple of a rank's assignments.
    """

    sms: int
    patience: float
    rows: float = ROWS

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the operators that carry tokens."""
        return {"sms": self.sms, "patience": self.patience}

    def room(self, group: Group, capacity: int, top_k: int) -> int | None:
        """For how many rows of experts there is to be room; None for all that may be."""
        rows = max(ROWS_AT_LEAST, math.ceil(self.rows * capacity * top_k))
        return rows if rows < group.ranks * capacity * top_k else None


NOT_FOUND = "not all ranks found it"
TURNS = SLOTS_USED // 2
"""Blocks whose exchanges may be in flight at once."""
Agree = Callable[[Group, Sequence[str], Mapping[str, Any]], Mapping[str, int]]
"""Given a group, the names of its parameters that this graph gathers, and the tokens of each block that this rank could
exchange: the capacity of those that all ranks exchange."""


def share_gathers(graph: fx.Graph) -> bool:
    """Makes one of several nodes that gather the same parameter: models read parameters more than once.

    Contract: nothing between them writes the parameter; where something does, they stay apart. Who writes what was
    gathered writes it for all that read it later in the same forward, as eagerly.

    Returns:
        whether there are any.
    """
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=GATHER):
        local: Any = node.args[0]
        parameter = _source(local)
        earlier = first.setdefault((parameter, *node.kwargs.items()), node)
        if earlier is not node and not _is_written(parameter):
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)
            if local is not parameter and not local.users:
                graph.erase_node(local)
    return bool(first)


def exchange_tokens(graph: fx.Graph, agree: Agree, travel: Travel) -> tuple[list[Exchanged], list[Kept]]:
    """Rewrite the graph in place; returns the blocks that were rewritten, and the others. The caller recompiles.

    Args:
        graph: of Dynamo's.
        agree: with the other ranks, since all have to exchange the same blocks.
        travel: how.
    """
    gathered = gathered_parameters(graph)
    done, kept = list[Exchanged](), list[Kept]()
    blocks: dict[Group, dict[str, _Block]] = {group: {} for group in gathered}
    for number, node in enumerate(graph.find_nodes(op="call_function", target=ops.experts.default)):
        block = _Block(graph, node, number)
        if reason := block.obstacle():
            kept.append(Kept(module_of(node), reason))
        elif block.groups:
            (group,) = block.groups
            blocks[group][f"{block.name}, block {len(blocks[group])}"] = block
    for group, names in gathered.items():
        capacities = agree(group, sorted(names), {name: block.tokens for name, block in blocks[group].items()})
        for name, block in blocks[group].items():
            if name in capacities:
                done.append(block.exchange(capacities[name], len(done) % TURNS, travel))
            else:
                kept.append(Kept(block.module, NOT_FOUND))
    for node in reversed(graph.find_nodes(op="call_function", target=GATHER)):
        if not node.users:
            graph.erase_node(node)
    return done, kept


def gathered_parameters(graph: fx.Graph) -> dict[Group, list[str]]:
    """By group of ranks, the names of the parameters that the graph gathers from them."""
    found: dict[Group, list[str]] = {}
    for gather in graph.find_nodes(op="call_function", target=GATHER):
        found.setdefault(_group_of(gather), []).append(_name_of(gather))
    return found


def gathers_left(graph: fx.Graph) -> dict[str, str]:
    """Parameters that are still gathered, and who reads them: an operation and the user's line."""
    return {
        _name_of(gather): ", ".join(f"{operation_name(user)} ({source_of(user)})" for user in gather.users)
        for gather in graph.find_nodes(op="call_function", target=GATHER)
    }


class _Block:
    """One call of the experts, whose arguments are known by name. Nothing changes before `exchange`."""

    def __init__(self, graph: fx.Graph, node: fx.Node, number: int) -> None:
        self._graph, self._node, self._number = graph, node, number
        self._sharded = {name: gather_of(each) for name in MATRICES if (each := self._given.get(name)) is not None}
        gathers = [gather for gather in self._sharded.values() if gather is not None]
        self.groups = {_group_of(gather) for gather in gathers}
        self.name, self.module = " ".join(map(_name_of, gathers)), module_of(node)
        self.tokens = fake_of(self._given["x"]).shape[0]

    @property
    def _given(self) -> dict[str, Any]:
        """Its arguments, by name: what another block gives changes when that is rewritten."""
        return {**dict(zip(TENSORS, self._node.args, strict=False)), **self._node.kwargs}

    def obstacle(self) -> str:
        """Why tokens cannot be exchanged, if they cannot."""
        if len(self.groups) > 1:
            return f"its parameters are spread over different groups of ranks: {sorted(map(str, self.groups))}"
        offsets = self._given["offsets"]
        for gather in self._sharded.values():
            if gather is not None and _is_written(gather):
                return f"{_name_of(gather)}, gathered from all ranks, is written in the graph"
        if self.groups and (offsets.target is not operator.getitem or offsets.args[0].target is not ops.plan.default):
            return "nobody knows where its plan comes from"
        return ""

    def exchange(self, capacity: int, turn: int, travel: Travel) -> Exchanged:
        """Puts dispatch, the experts of this rank, and combine in the block's place.

        `turn` chooses the slots: blocks whose exchanges may be in flight at once have different ones.
        """
        (group,), node, given = self.groups, self._node, self._given
        plan: Any = given["offsets"].args[0]
        ids, num_experts = plan.args
        x, weights = given["x"], given.get("weights")
        among = {"ranks": group.ranks, "group": group.name, "capacity": capacity, **travel.attributes}
        room = travel.room(group, capacity, fake_of(ids).shape[1])
        here = {"num_experts": num_experts, "ranks": group.ranks}
        with self._graph.inserting_before(node):
            sent, home = self._several(ops.exchange_plan.default, (ids,), {**here, "capacity": capacity})
            there, back = ({**among, "slot": 2 * turn + way} for way in (0, 1))
            tokens = (x, ids, weights, sent, home)
            parts = self._several(ops.dispatch_start.default, tokens, there)
            rows, row_ids, row_weights, came = self._several(
                ops.dispatch_wait.default, (*parts, *tokens), {"num_experts": num_experts, **there}
            )
            limit = {} if room is None else {"room": room}
            planned = self._several(ops.plan.default, (row_ids, num_experts // group.ranks), limit)
            if limit:
                came = self._one(ops.came_within.default, (came, planned[0]), limit)
            y = self._experts(group, rows, None if weights is None else row_weights, planned, limit)
            parts = self._several(ops.combine_start.default, (y, None, came, sent, home), back)
            result, _ = self._several(ops.combine_wait.default, (*parts, y, None, sent, home), back)
        result.meta[key_of(node)] = node.meta[key_of(node)]
        node.replace_all_uses_with(result)
        self._graph.erase_node(node)
        for part in [*plan.users]:
            if not part.users:
                self._graph.erase_node(part)
        if not plan.users:
            self._graph.erase_node(plan)
        return Exchanged(self.module, group, num_experts, capacity, self._number)

    def _experts(
        self, group: Group, rows: fx.Node, weights: fx.Node | None, planned: list[fx.Node], limit: dict[str, int]
    ) -> fx.Node:
        """The block on the rows that came, with this rank's experts."""
        _, offsets, slots, order = planned
        # where all parameters are sharded, who computes their gradients takes the mean, too
        within = group.mean and all(gather is not None for gather in self._sharded.values())
        local = {name: self._local(name, group, group.mean and not within) for name in self._sharded}
        positional = (rows, weights, offsets, slots, order, local.pop("w_in"), local.pop("w_out"))
        attributes = {name: value for name, value in self._node.kwargs.items() if name not in MATRICES}
        attributes |= {"mean_over": group.ranks} if within else {}
        node = call_for(self._node, ops.experts.default, positional, {**local, **attributes, **limit})
        before = fake_of(self._node)
        shape = (fake_of(rows).shape[0], before.shape[1])
        node.meta[key_of(node)] = empty_fake(before, shape, before.dtype).requires_grad_(before.requires_grad)
        return node

    def _local(self, name: str, group: Group, mean: bool) -> fx.Node:
        """This rank's part of a parameter of the block; mean: whether its gradient is divided on its own."""
        whole, gather = self._given[name], self._sharded[name]
        if gather is None:
            attributes = {"ranks": group.ranks, "group": group.name}
            return self._one(ops.own_experts.default, (whole,), attributes)
        local: Any = gather.args[0]
        if mean:
            local = self._one(ops.mean_gradient.default, (local,), {"ranks": group.ranks})
        return self._repeated(whole, gather, local)

    def _repeated(self, node: fx.Node, gather: fx.Node, local: fx.Node) -> fx.Node:
        """What becomes of the gathered parameter on its way to the block, done to this rank's part alone."""
        if node is gather:
            return local
        given = self._repeated(node.all_input_nodes[0], gather, local)
        copy = self._graph.node_copy(node, lambda _: given)
        fake, before = fake_of(node), fake_of(given)
        copy.meta[key_of(node)] = empty_fake(fake, (before.shape[0], *fake.shape[1:]), fake.dtype).requires_grad_(
            fake.requires_grad
        )
        return copy

    def _one(self, target: Any, arguments: tuple[Any, ...], attributes: dict[str, Any]) -> fx.Node:
        return called(self._node, target, arguments, attributes)

    def _several(self, target: Any, arguments: tuple[Any, ...], attributes: dict[str, Any]) -> list[fx.Node]:
        """The results of an operator that has several."""
        return parts_of(self._one(target, arguments, attributes))


def gather_of(node: fx.Node) -> fx.Node | None:
    """The gather behind a parameter of a block, with nothing but STEPS of each expert between."""
    while node.target is not GATHER:
        call = bind(node)
        if call is None or call.name not in STEPS or call.inplace or len(node.all_input_nodes) != 1:
            return None
        if call.name == "transpose" and not _keeps_experts(node):
            return None
        (node,) = node.all_input_nodes
    return node


def _keeps_experts(node: fx.Node) -> bool:
    """Whether a transposition leaves the first dimension where it is."""
    call, rank = bind(node), fake_of(node).dim()
    assert call is not None
    return all(call.arguments[name] % rank for name in ("dim0", "dim1"))


def _group_of(gather: fx.Node) -> Group:
    attributes: Any = gather.kwargs
    return Group(attributes["group"], attributes["ranks"], attributes["mean"])


def parameter_of(matrix: Any) -> fx.Node:
    """The input of the graph that a block's matrix is this rank's part of; the matrix itself, if it is of none."""
    node: fx.Node = matrix.args[0] if matrix.target is ops.mean_gradient.default else matrix
    source = _source(node)
    return source if source.op == "placeholder" else matrix


def _name_of(gather: fx.Node) -> str:
    """Of the parameter that it gathers, as the graph's input is called."""
    node: Any = gather.args[0]
    while _source(node) is node and node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return input_name(_source(node))


def _source(node: fx.Node) -> fx.Node:
    """The parameter, a DTensor, that the node is this rank's part of; the node itself, if it is of none."""
    given: Any = node.args[0] if is_local_part(node) else node
    found: fx.Node = given
    return found


def is_local_part(node: fx.Node) -> bool:
    """Whether the node is a DTensor's `to_local`: a method, or in torch 2.11 a function that Dynamo makes for it."""
    if node.op == "call_method":
        return node.target == "to_local"
    return getattr(node.target, "__name__", "") == "prim_to_local"


def _is_written(node: fx.Node) -> bool:
    """Whether the graph writes a tensor, or what is made of it before experts or a gather read it: it may be a view."""
    made = {node}
    waiting = [*node.users]
    while waiting:
        user = waiting.pop()
        if user in made or user.target in (GATHER, ops.experts.default):
            continue
        if writes(user) and _target_of(user) in (*made, None):
            return True
        made.add(user)
        waiting += user.users
    return False


def _target_of(node: fx.Node) -> fx.Node | None:
    """What an operation in place writes, its first argument; None if that is not all, or not known."""
    call = bind(node)
    first = node.args[0] if node.args else None
    return first if call is not None and call.inplace and isinstance(first, fx.Node) else None
