"""Hide the exchange of tokens behind the experts, and most of the host's work.

Contract
- On entry a block whose tokens are exchanged is what passes/expert_parallel.py has made of it: dispatch, the experts of
  this rank (in FP8 or not), combine.
- The block becomes one operator, if kernels exchange its tokens; where something is differentiated AOTAutograd makes
  two of it, there and back. Where nothing is, and tokens may be so many that there is something to hide
  (`exchanged.hides`), it does. All of it follows from what the ranks have agreed on.
- A block of which something else reads a part stays, as does what is not exactly such a block.

    rows, ids, row_weights, came = dispatch_wait(*dispatch_start(*tokens), *tokens)
    y = experts(rows, row_weights, *plan(ids, E / R), w_in, w_out)
    result, _ = combine_wait(*combine_start(y, came, sent, home), y, sent, home)
        becomes result = exchanged_experts(*tokens, w_in, w_out, ...)
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import fx

from moecompile.passes.aliases import fake_of
from moecompile.passes.casts import call_for, key_of
from moecompile.runtime.contract import TENSORS
from moecompile.runtime.exchange import by_kernels
from moecompile.runtime.exchanged import OF_BACKWARD, hides
from moecompile.runtime.exchanged_contract import OF_EXCHANGE

ops = torch.ops.moecompile
EXPERTS = (ops.experts.default, ops.experts_fp8.default)


class Rewritten(NamedTuple):
    """Blocks that were."""

    blocks: int
    hidden: int
    """Of these, whose exchange is hidden; the others go one step after the other."""


NOTHING_REWRITTEN = Rewritten(0, 0)


def hide_exchanges(graph: fx.Graph, differentiable: bool = False) -> Rewritten:
    """Rewrite the graph in place; returns what was rewritten. The caller recompiles the GraphModule.

    Args:
        graph: of Dynamo's.
        differentiable: whether somebody may call its backward.
    """
    found = [
        block
        for node in graph.find_nodes(op="call_function", target=ops.combine_wait.default)
        if (block := _block(node))
    ]
    hidden = [block for block in found if not differentiable and block.hides()]
    for block in found:
        block.replace(() if differentiable else OF_BACKWARD)
    return Rewritten(len(found), len(hidden))


class _Block:
    """The nodes of a block, from the last to the first."""

    def __init__(self, wait: fx.Node) -> None:
        self.combined = wait
        self.sent_back = _maker(wait.args[0], ops.combine_start.default)
        self.within = _call(self.sent_back.args[2], ops.came_within.default)
        self.experts = _maker(self.sent_back.args[0], *EXPERTS)
        self.came = _maker(self.experts.args[0], ops.dispatch_wait.default)
        self.planned = _maker(_part_of(self.experts.args[2]), ops.plan.default)
        self.sent = _maker(self.came.args[0], ops.dispatch_start.default)

    @property
    def nodes(self) -> list[fx.Node]:
        """All of them, users first."""
        within = [] if self.within is None else [self.within]
        return [self.combined, self.sent_back, *within, self.experts, self.planned, self.came, self.sent]

    @property
    def _tokens(self) -> Any:
        """Example values of x, ids and weights of the tokens that are sent."""
        given: Any = self.sent.args[:3]
        return [None if each is None else fake_of(each) for each in given]

    @property
    def _room(self) -> Any:
        """For how many rows of experts there is room, if not for all."""
        return None if self.within is None else self.within.kwargs["room"]

    def is_whole(self) -> bool:
        """Whether these are all of it, each reads what it should, and nobody else reads anything."""
        x, ids, weights, sent, home = self.sent.args
        rows, row_ids, row_weights, came = _parts(self.came, 4)
        there, back = _travel(self.sent), _travel(self.sent_back)
        kwargs: Any = self.came.kwargs
        counts, *plan = _parts(self.planned, 4)
        within = [] if self.within is None else [(self.within, [came, counts])]
        reads: list[tuple[fx.Node, list[Any]]] = [
            *within,
            (self.came, [*_parts(self.sent, 4), x, ids, weights, sent, home]),
            (self.planned, [row_ids, kwargs["num_experts"] // there["ranks"]]),
            (self.experts, [rows, None if weights is None else row_weights, *plan]),
            (self.sent_back, [self.experts, None, self.within or came, sent, home]),
            (self.combined, [*_parts(self.sent_back, 3), self.experts, None, sent, home]),
        ]
        alike = all(list(node.args)[: len(wanted)] == wanted for node, wanted in reads)
        inside = {*self.nodes}
        users = {
            user
            for node in inside - {self.combined}
            for part in (node, *(each for each in node.users if each.target is operator.getitem))
            for user in part.users
            if user.target is not operator.getitem or user.args[0] is not node
        }
        result, rest = _parts(self.combined, 2)
        return (
            alike
            and {self.planned.kwargs.get("room"), self.experts.kwargs.get("room")} == {self._room}
            and users <= inside
            and ids is not None
            and result is not None
            and (rest is None or not rest.users)
            and back == {**there, "slot": there["slot"] + 1}
        )

    def is_by_kernels(self) -> bool:
        """Whether kernels exchange its tokens."""
        kwargs: Any = self.came.kwargs
        x, ids, weights = self._tokens
        return by_kernels(x, ids, weights, kwargs["ranks"], kwargs["group"])

    def hides(self) -> bool:
        """Whether there is anything to hide, by what all ranks know."""
        kwargs: Any = self.came.kwargs
        _, ids, _ = self._tokens
        top_k = ids.shape[1]
        return isinstance(top_k, int) and hides(kwargs["ranks"], kwargs["capacity"], top_k, kwargs["num_experts"])

    def replace(self, unsaid: Collection[str]) -> None:
        """Puts the operator in the block's place, with the experts' attributes but for these."""
        experts, result = self.experts, _parts(self.combined, 2)[0]
        given: dict[str, Any] = {**dict(zip(TENSORS, experts.args, strict=False)), **experts.kwargs}
        matrices = ("w_in", "w_out", "w_up", "b_in", "b_up", "b_out")
        keywords = {name: value for name, value in experts.kwargs.items() if name not in {*TENSORS, *unsaid}}
        keywords |= {"num_experts": self.came.kwargs["num_experts"], **_travel(self.sent)}
        keywords.setdefault("quantized", [])
        with experts.graph.inserting_before(self.combined):
            args = (*self.sent.args, *(given.get(name) for name in matrices))
            made = call_for(experts, ops.exchanged_experts.default, args, keywords)
        made.meta[key_of(result)] = result.meta[key_of(result)]
        result.replace_all_uses_with(made)
        for node in self.nodes:
            for part in [*node.users]:
                experts.graph.erase_node(part)
            experts.graph.erase_node(node)


def _block(wait: fx.Node) -> _Block | None:
    """That ends there, if it is one and is to be rewritten."""
    try:
        block = _Block(wait)
    except _OtherError:
        return None
    return block if block.is_whole() and block.is_by_kernels() else None


class _OtherError(Exception):
    """A node is not what it is in a block."""


def _maker(value: Any, *targets: Any) -> fx.Node:
    """The call of one of these that gives the value, or has it among its results."""
    node = _part_of(value)
    if not isinstance(node, fx.Node) or node.target not in targets:
        raise _OtherError
    return node


def _call(value: Any, target: Any) -> fx.Node | None:
    """The value, if it is a call of that."""
    return value if isinstance(value, fx.Node) and value.target is target else None


def _part_of(value: Any) -> Any:
    return value.args[0] if isinstance(value, fx.Node) and value.target is operator.getitem else value


def _travel(node: fx.Node) -> dict[str, Any]:
    """How its tokens travel."""
    given: Any = node.kwargs
    return {name: given[name] for name in OF_EXCHANGE}


def _parts(node: fx.Node, count: int) -> list[Any]:
    """The nodes of a call's results, None where nobody reads one."""
    found: dict[Any, fx.Node] = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    return [found.get(number) for number in range(count)]
