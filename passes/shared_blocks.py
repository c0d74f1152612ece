"""Blocks that exchange their tokens between ranks by themselves: which of them all ranks rewrite.

Contract
- On entry detection has proven blocks (`Site.spread`) whose experts lie on the ranks of a group. Nothing is rewritten
  yet: fuse would read the experts gathered from all ranks, and the pass `exchange` makes an exchange of ours of it.
- All ranks rewrite the same blocks, whatever each of them has found: a rank whose model exchanges would wait for ever
  for one that does so by other operators. They agree on it, by names that say what a block computes, and by which
  steps: what all ranks compute alike is one program, which is what detection takes for granted of the other ranks.
- A graph without an exchange of rows asks nobody.

Returned are the blocks to rewrite, and near misses for the others, whose own exchange stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import distributed, fx

from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import bind
from moecompile.passes.expert_parallel import Group
from moecompile.passes.near_misses import cure_of
from moecompile.passes.provenance import input_name
from moecompile.passes.site import NearMiss, Site
from moecompile.passes.spelling import operation_name
from moecompile.runtime.sharded import process_group

AgreeOnBlocks = Callable[[Group, Sequence[str], Mapping[str, Any]], Mapping[str, str]]
"""Given a group, what the ranks know this graph by, and the tokens of each block that this rank has found: why a block
is left alone, or the empty string, by name."""


def shared_by_all(
    graph: fx.Graph, sites: Sequence[Site], agree: AgreeOnBlocks
) -> tuple[tuple[Site, ...], tuple[NearMiss, ...]]:
    """The blocks that all ranks have found, and those that exchange nothing; near misses for the others.

    Args:
        graph: of Dynamo's.
        sites: that were found in it.
        agree: with the other ranks; called once for each group that exchanges rows in the graph.
    """
    names = dict(_named(sites))
    reasons: dict[str, str] = {}
    for group, words in exchanging_groups(graph).items():
        among = [site for site in sites if site.spread and site.spread.group == group.name]
        tokens = {names[site.node]: _tokens(site) for site in among}
        reasons |= agree(group, words, tokens)
    kept, misses = list[Site](), list[NearMiss]()
    for site in sites:
        if reason := reasons[names[site.node]] if site.spread else "":
            misses.append(_near_miss(site, reason))
        else:
            kept.append(site)
    return tuple(kept), tuple(misses)


def _named(sites: Sequence[Site]) -> Iterator[tuple[fx.Node, str]]:
    """What a block computes, in words that are the same on all ranks; and which of several it is."""
    for number, site in enumerate(site for site in sites if site.spread):
        parameters = " ".join(
            f"{name}={_input_of(operand.node)} {fake_of(operand.node).dtype} {operand.steps}"
            for name, operand in site.operands.items()
            if name not in ("x", "weights", "expert_ids")
        )
        sizes = f"{site.num_experts} experts, {site.top_k} a token, {site.hidden} to {site.intermediate}"
        words = f"{site.input}; {site.activation}; {site.output}; {site.gate_up}; {site.dtype}; {site.out_dtype}"
        weights = site.operands.get("weights")
        rows = f"{fake_of(site.operands['x'].node).dtype}, {weights and fake_of(weights.node).dtype}"
        program = hashlib.sha256("\n".join(_program(site)).encode()).hexdigest()[:16]
        yield site.node, f"block {number} ({sizes}; {rows}; {words}; {parameters}; program {program})"


def _program(site: Site) -> Iterator[str]:
    """How a block is computed, step by step: who does a step at home and who where the experts are would go unnoticed.

    Numbers of tokens differ between ranks: whole numbers but -1, 0 and 1 are left out. What they say of the block is
    said by its sizes and expressions.
    """
    places: dict[fx.Node, int] = {}

    def spelled(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return f"%{places[argument]}" if argument in places else "input"
        if isinstance(argument, (list, tuple)):
            return [spelled(each) for each in argument]
        if isinstance(argument, dict):
            return {name: spelled(each) for name, each in argument.items()}
        if isinstance(argument, slice):
            return ["slice", *map(spelled, (argument.start, argument.stop, argument.step))]
        return argument if type(argument) is not int or argument in (-1, 0, 1) else "number"

    for node in site.node.graph.nodes:
        if node in site.region and isinstance(fake_of(node), (torch.Tensor, list, tuple)):
            places[node] = len(places)
            yield f"{operation_name(node)} {spelled(node.args)} {spelled(node.kwargs)} {_dtype_of(node)}"


def _dtype_of(node: fx.Node) -> str:
    fake = fake_of(node)
    return str(fake.dtype) if isinstance(fake, torch.Tensor) else ""


def _input_of(node: fx.Node) -> str:
    """The input of the graph that a tensor is a copy or a part of, if there is one."""
    while node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return input_name(node)


def _tokens(site: Site) -> int | str:
    """How many, or the words for a number that is not known."""
    return int(site.tokens) if site.tokens.isdigit() else site.tokens


def exchanging_groups(graph: fx.Graph) -> dict[Group, list[str]]:
    """Groups whose ranks exchange rows in this graph, as many as data say; and what the ranks know the graph by."""
    if not distributed.is_available() or not distributed.is_initialized():
        return {}
    stacks = [input_name(node) for node in graph.find_nodes(op="placeholder") if _is_stack(node)]
    found: dict[Group, list[str]] = {}
    for node in graph.nodes:
        call = bind(node) if "all_to_all_single" in str(node.target) else None
        if call is None or not isinstance(call["group_name"], str):
            continue
        if not all(isinstance(call[name], (list, tuple)) for name in ("input_split_sizes", "output_split_sizes")):
            continue
        if any(isinstance(size, fx.Node) for size in (*call["input_split_sizes"], *call["output_split_sizes"])):
            ranks = distributed.get_world_size(process_group(call["group_name"]))
            fake = fake_of(node)
            words = found.setdefault(Group(call["group_name"], ranks, mean=False), [*stacks])
            words.append(f"exchange of {fake.dtype} {tuple(fake.shape[1:])}")
    return found


def _is_stack(node: fx.Node) -> bool:
    """Whether an input may be one matrix for each of several experts."""
    fake = fake_of(node)
    return isinstance(fake, torch.Tensor) and fake.dim() == 3 and fake.dtype.is_floating_point and fake.requires_grad


def _near_miss(site: Site, reason: str) -> NearMiss:
    return NearMiss(site.form, reason, operation_name(site.node), site.module, site.source, cure_of(reason))
