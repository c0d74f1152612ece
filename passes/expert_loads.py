"""Count how many tokens each expert is assigned, block by block, into tensors that come from outside the graph.

Contract
- On entry blocks are `moecompile::experts` (passes/fuse.py), `moecompile::experts_fp8` (passes/cast_experts.py), either
  between dispatch and combine (passes/expert_parallel.py), or `moecompile::exchanged_experts` (passes/hide.py).
- What is counted are the ids that the block's experts are looked up by: of all ranks' experts, where the tokens are.
  -1 is no expert, and the one token that a rank without tokens computes is none (moecompile/sharding.py).
- A block is known by its first matrices: the parameters that these are made of, whole. Blocks of the same experts are
  counted together. Other blocks are left alone, and returned with the reason.
- Inside the bodies of checkpoints and nested regions nothing is added: their counts leave as one more result, and what
  a backward computes again adds nothing. Bodies of control flow are left alone.
- Inputs that there were keep their places; the new ones follow, one for each block's experts.

    counts, offsets, slots, order = plan(expert_ids, E)
        is followed by expert_load.add_(counts)
    sent, home = exchange_plan(expert_ids, num_experts=E, ...)
        by expert_load.add_(count_experts(expert_ids, E))
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator

from moecompile.passes.aliases import empty_fake, fake_of
from moecompile.passes.calls import bind, writes
from moecompile.passes.casts import Kept, call_for
from moecompile.passes.expert_parallel import parameter_of
from moecompile.passes.flatten import body_of, called_by
from moecompile.passes.provenance import module_of

ops = torch.ops.moecompile
EXCHANGED = ops.exchanged_experts.default
OPERATORS = (ops.experts.default, ops.experts_fp8.default, EXCHANGED)
W_IN = 5
"""The place of the first matrix among the arguments of each."""
IDS_BROUGHT = 5
"""The place of this rank's own ids among the arguments of `dispatch_wait`."""
ON_RANKS = (ops.gather_experts.default, ops.own_experts.default, ops.mean_gradient.default)
REARRANGED = "cast contiguous clone transpose t permute view view_as flatten unflatten unsqueeze squeeze".split()
"""What leaves all numbers of a tensor there."""

NO_PLAN = "nobody knows where its plan comes from"
NO_PARAMETER = "its matrices are no parameters, whole, that the graph is given"
CONTROL_FLOW = "it is in the body of {}"
NO_RESULTS = "it is in a nested region whose results are no tuple"
Matrices = tuple[fx.Node, ...]


@dataclass
class Added:
    """What was done.

    Attributes:
        loads: the new inputs, by the places of the parameters that the first matrices of their blocks are made of.
        blocks: how many blocks are counted.
        kept: blocks that are not, and why.
    """

    loads: dict[tuple[int, ...], fx.Node] = field(default_factory=dict)
    blocks: int = 0
    kept: list[Kept] = field(default_factory=list)


@dataclass(frozen=True)
class _Count:
    """The counts of a block, as one graph has them.

    Attributes:
        counts: (E,) int32.
        matrices: the graph's inputs that the block's first matrices are made of.
        block: the operator.
        exchanged: whether the block has all ranks' experts, this rank its part of them.
    """

    counts: fx.Node
    matrices: Matrices
    block: fx.Node
    exchanged: bool


def add_expert_loads(gm: fx.GraphModule) -> Added:
    """Rewrite the graph and its bodies in place, and recompile what has changed.

    Args:
        gm: a graph of Dynamo's, after all other passes; nobody else's.
    """
    done = Added()
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    places = {node: number for number, node in enumerate(inputs)}
    last = inputs[-1] if inputs else None
    for count in _Bodies(done.kept).counts_in(gm):
        if not all(isinstance(fake_of(each), nn.Parameter) for each in count.matrices):
            done.kept.append(Kept(module_of(count.block), NO_PARAMETER))
            continue
        assert last is not None  # parameters are inputs
        key = tuple(places[each] for each in count.matrices)
        if key not in done.loads:
            done.loads[key] = last = _input(gm.graph, count, last)
        done.blocks += 1
        with gm.graph.inserting_after(count.counts):
            added = call_for(count.counts, torch.ops.aten.add_.Tensor, (done.loads[key], count.counts), {})
        added.meta["example_value"] = fake_of(done.loads[key])
    gm.graph.lint()
    gm.recompile()
    return done


@dataclass(frozen=True)
class _Leaving:
    """Counts that leave a body.

    Attributes:
        number: among the results.
        places: of its matrices, among the inputs.
        inside: as the body has them.
    """

    number: int
    places: tuple[int, ...]
    inside: _Count


class _Bodies:
    """The graph modules of a tree, each rewritten once, however often it is called."""

    def __init__(self, kept: list[Kept]) -> None:
        self._kept = kept
        self._leaving: dict[fx.GraphModule, list[_Leaving]] = {}

    def counts_in(self, gm: fx.GraphModule) -> list[_Count]:
        """Makes the counts of all blocks of a graph, those of the bodies that it calls among them."""
        bodies = {node: body for node in gm.graph.nodes if (body := body_of(gm, node)) is not None}
        found: list[_Count] = []
        for node in list(gm.graph.nodes):
            if node.target in OPERATORS:
                found += self._of_block(node)
            elif (called := called_by(node, bodies)) is not None:
                found += self._of_call(node, *called)
            elif isinstance(node.target, HigherOrderOperator):
                within = [bodies[each] for each in node.all_input_nodes if each in bodies]
                reason = CONTROL_FLOW.format(node.target.name())
                self._kept += [Kept(module_of(block), reason) for body in within for block in _blocks_in(body)]
        return found

    def _of_block(self, block: fx.Node) -> list[_Count]:
        exchanged = block.target is EXCHANGED or _dispatch(block.args[0]) is not None
        matrices = _matrices_of(block.args[W_IN], exchanged)
        if matrices is None:
            self._kept.append(Kept(module_of(block), NO_PARAMETER))
            return []
        with block.graph.inserting_before(block):
            counts = _counts(block)
        if counts is None:
            self._kept.append(Kept(module_of(block), NO_PLAN))
            return []
        return [_Count(counts, matrices, block, exchanged)]

    def _of_call(self, call: fx.Node, body: fx.GraphModule, operands: Sequence[Any]) -> list[_Count]:
        """The counts that leave a body, where it is called."""
        if body not in self._leaving:
            self._leaving[body] = self._let_leave(body)
        leaving, found = self._leaving[body], []
        if leaving:
            fakes = (fake_of(each.inside.counts) for each in leaving)
            call.meta["example_value"] = (*call.meta["example_value"], *fakes)
        for each in leaving:
            inside = each.inside
            matrices = _all_matrices([operands[place] for place in each.places], inside.exchanged)
            if matrices is None:
                self._kept.append(Kept(module_of(inside.block), NO_PARAMETER))
                continue
            with call.graph.inserting_after(call):
                counts = call_for(call, operator.getitem, (call, each.number), {})
            counts.meta["example_value"] = fake_of(inside.counts)
            found.append(replace(inside, counts=counts, matrices=matrices))
        return found

    def _let_leave(self, body: fx.GraphModule) -> list[_Leaving]:
        """Makes the counts in a body results of it."""
        output = body.graph.output_node()
        results: Any = output.args[0]
        if not isinstance(results, tuple | list):
            self._kept += [Kept(module_of(block), NO_RESULTS) for block in _blocks_in(body)]
            return []
        places = {node: number for number, node in enumerate(body.graph.find_nodes(op="placeholder"))}
        found = self.counts_in(body)
        if found:
            output.args = ((*results, *(each.counts for each in found)),)
            body.graph.lint()
            body.recompile()
        return [
            _Leaving(number, tuple(places[matrix] for matrix in each.matrices), each)
            for number, each in enumerate(found, start=len(results))
        ]


def _counts(block: fx.Node) -> fx.Node | None:
    """What counts a block's assignments, made at the graph's place of insertion; None if it is not known which."""
    if block.target is EXCHANGED:
        return _count(block, block.args[1], block.kwargs["num_experts"])
    plan = _maker(block.args[2])
    if plan is None or plan.target is not ops.plan.default:
        return None
    came, ids_came = (_dispatch(each) for each in (block.args[0], plan.args[0]))
    if came is not ids_came:
        return None
    if came is not None:
        return _count(block, came.args[IDS_BROUGHT], came.kwargs["num_experts"])
    if _is_cut_off(block):
        return _count(block, *plan.args)
    counts = call_for(block, operator.getitem, (plan, 0), {})
    counts.meta["example_value"] = fake_of(plan)[0]
    return counts


def _count(block: fx.Node, ids: Any, num_experts: Any) -> fx.Node | None:
    """The counts of a rank's own tokens, which are not those of the rows that its experts compute."""
    if not isinstance(ids, fx.Node):
        return None
    fake = fake_of(ids)
    if _is_cut_off(block):
        ids = call_for(block, torch.narrow, (ids, 0, 0, 0), {})
        ids.meta["example_value"] = empty_fake(fake, (0, fake.shape[1]), fake.dtype)
    counts = call_for(block, ops.count_experts.default, (ids, num_experts), {})
    counts.meta["example_value"] = empty_fake(fake, (num_experts,), torch.int32)
    return counts


def _is_cut_off(block: fx.Node) -> bool:
    """Whether nobody sees what becomes of the block's tokens: a rank that has none computes one, which is no load."""
    seen, waiting, cut = {block}, [block], False
    while waiting:
        node = waiting.pop()
        if not node.users and node.target is not operator.getitem:
            return False
        for user in node.users:
            if user.op == "output" or writes(user):
                return False
            if _is_empty(fake_of(user)):
                cut = True
            elif user not in seen:
                seen.add(user)
                waiting.append(user)
    return cut


def _is_empty(fake: Any) -> bool:
    return isinstance(fake, Tensor) and any(type(size) is int and size == 0 for size in fake.shape)


def _maker(part: Any) -> fx.Node | None:
    """The operator that has it among its results."""
    if not isinstance(part, fx.Node) or part.target is not operator.getitem:
        return None
    made: Any = part.args[0]
    return made if isinstance(made, fx.Node) else None


def _dispatch(part: Any) -> fx.Node | None:
    """The dispatch that has brought it from all ranks, if one has."""
    made = _maker(part)
    return made if made is not None and made.target is ops.dispatch_wait.default else None


def _matrices_of(matrix: Any, parted: bool) -> Matrices | None:
    """The graph's inputs whose numbers, all of them, a block's first matrices are; None if there are others.

    If `parted`, they may be this rank's. Else a block of these has ids of its own, with which nobody knows what other
    ranks' experts are counted as.
    """
    if not isinstance(matrix, fx.Node):
        return None
    node = parameter_of(matrix)
    if node.op == "placeholder":
        return (node,) if parted or node is matrix or not _is_shared_out(fake_of(node)) else None
    if node.target in ON_RANKS:
        return _matrices_of(node.args[0], parted=True)
    call = bind(node)
    if call is None or call.inplace:
        return None
    if call.name in ("stack", "cat"):
        return _all_matrices(call.arguments["tensors"], parted)
    if call.name in ("add", "mul"):  # an adapter, or a scale: of the same experts
        shape = fake_of(node).shape
        terms = [call.arguments[name] for name in ("input", "other")]
        whole = [each for each in terms if isinstance(each, fx.Node) and fake_of(each).shape == shape]
        return next((found for each in whole if (found := _matrices_of(each, parted)) is not None), None)
    return _matrices_of(node.all_input_nodes[0], parted) if call.name in REARRANGED else None


def _is_shared_out(parameter: Any) -> bool:
    """Whether ranks have experts of it each."""
    return any(each.is_shard(0) for each in getattr(parameter, "placements", ()))


def _all_matrices(parts: Sequence[Any], parted: bool) -> Matrices | None:
    found = [_matrices_of(each, parted) for each in parts]
    known = [each for each in found if each is not None]
    return tuple(node for each in known for node in each) if len(known) == len(found) else None


def _blocks_in(body: fx.GraphModule) -> Iterator[fx.Node]:
    """The blocks of a body and of those below it."""
    for node in body.graph.nodes:
        if node.target in OPERATORS:
            yield node
        elif (below := body_of(body, node)) is not None:
            yield from _blocks_in(below)


def _input(graph: fx.Graph, count: _Count, last: fx.Node) -> fx.Node:
    """A new input behind the `last` one, for a block's load."""
    taken = {node.target for node in graph.find_nodes(op="placeholder")}
    name = f"{count.matrices[0].name.rstrip('_')}_expert_load"
    while name in taken:
        name = f"{name}_"
    counts: Tensor = fake_of(count.counts)
    with graph.inserting_after(last):
        made = graph.placeholder(name)
    made._dynamo_source = None  # AOTAutograd asks where inputs come from: not from the user's code
    made.meta["example_value"] = empty_fake(counts, tuple(counts.shape), torch.int64)
    # as parameters have it: where it lies does not change, so that CUDA graphs write it there
    made.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    return made
