"""Say which values of a graph hold the batch, each element computed by itself, or what mixes them.

Contract
- On entry the graph is one of ATen's and moecompile's operators, with example values, functional, before autograd;
  some of its inputs have the batch, a symbol, as one of their dimensions.
- Every value gets a meaning (`batch_meanings`) by exact rules (`batch_rules`). What no rule speaks of is `Mixed`, and
  so is whatever mixes elements: a sum or a sort over the batch, a number that depends on how many there are, random
  numbers, what is written; and all that reads such a value.
- Of half of the batch, the same operators compute the half of each value that holds it, and what is shared as it was;
  but for the order of sums that nobody fixes.

    for node in graph:  meaning = RULES[operator](node), of the meanings of what it reads
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from moecompile.passes.batch_meanings import (
    INSIDE,
    SHARED,
    Meaning,
    Meanings,
    Mixed,
    NotProvenError,
    Numbered,
    Rows,
    value_of,
)
from moecompile.passes.batch_rules import CUT, FILLED, KEEPS_NUMBERS, RULES, SIZED
from moecompile.passes.costs import expression

aten, ops = torch.ops.aten, torch.ops.moecompile


def meanings_of(graph: fx.Graph, batch: sympy.Symbol) -> dict[fx.Node, Meaning]:
    """Of each node but the output.

    Args:
        graph: as the contract has it.
        batch: the symbol that is a dimension of inputs.
    """
    meanings = Meanings(batch)
    for node in graph.nodes:
        if node.op == "output":
            continue
        try:
            meanings.of[node] = _read_mixed(meanings, node) or _meaning(meanings, node)
        except NotProvenError as error:
            meanings.of[node] = Mixed(str(error))
    return meanings.of


def _read_mixed(meanings: Meanings, node: fx.Node) -> Mixed | None:
    found = (meanings.of[each] for each in node.all_input_nodes)
    return next((each for each in found if isinstance(each, Mixed)), None)


def _meaning(meanings: Meanings, node: fx.Node) -> Meaning:
    if node.op == "placeholder":
        return _of_input(meanings, node)
    if node.op == "get_attr":
        return SHARED
    if node.target is operator.getitem:
        return _of_part(meanings, node)
    return _of_call(meanings, node)


def _of_input(meanings: Meanings, node: fx.Node) -> Meaning:
    """Of several rows for each element nobody knows in which order they are."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return SHARED
    meaning = meanings.by_shape(node)
    if isinstance(meaning, Rows) and expression(value.shape[meaning.dim]) != meanings.batch:
        raise NotProvenError(f"{node.name} comes with several rows for each element: {tuple(value.shape)}")
    return meaning


def _of_part(meanings: Meanings, node: fx.Node) -> Meaning:
    whole: Any = node.args[0]
    value, meaning = value_of(node), meanings.of[whole]
    if whole.target is ops.combine_wait.default:
        return Rows(0) if node.args[1] == 0 else INSIDE
    if not isinstance(meaning, Rows) or not isinstance(value, Tensor):
        return meaning
    if value.dim() <= meaning.dim or not meanings.leads(expression(value.shape[meaning.dim])):
        raise NotProvenError(f"of {whole.target} nobody knows what result {node.args[1]} holds")
    return meaning


def _of_call(meanings: Meanings, node: fx.Node) -> Meaning:
    packet = getattr(node.target, "overloadpacket", node.target)
    tags, schema = getattr(node.target, "tags", ()), getattr(node.target, "_schema", None)
    if torch.Tag.nondeterministic_seeded in tags and packet not in RULES:  # the rule of attention speaks of dropout
        raise NotProvenError(f"{node.target} draws random numbers, and others for halves of the batch")
    if schema is not None and schema.is_mutable:
        raise NotProvenError(f"{node.target} writes into something")
    of_tensors = [each for each in tree_leaves(value_of(node)) if isinstance(each, Tensor)]
    holds = any(meanings.of[each] is not SHARED for each in node.all_input_nodes)
    if not of_tensors:
        return _of_number(node, packet, holds)
    if packet is aten.arange and meanings.numbers(node):
        return Numbered(0)
    first = meanings.of[node.all_input_nodes[0]] if node.all_input_nodes else SHARED
    if packet in KEEPS_NUMBERS and isinstance(first, Numbered):
        rows = RULES[packet](meanings.with_rows(node.all_input_nodes[0], first.dim), node)
        return Numbered(rows.dim) if isinstance(rows, Rows) else rows
    if packet not in SIZED and any(meanings.depends(value_of(each)) for each in _numbers(node)):
        raise NotProvenError(f"{node.target} computes with a number that depends on the batch")
    if not holds and packet not in FILLED and not any(map(meanings.depends, of_tensors)):
        if packet in CUT and any(meanings.depends(value_of(each)) for each in _numbers(node)):
            raise NotProvenError(f"{node.target} takes what depends on the batch")
        return SHARED
    if packet in RULES:
        return RULES[packet](meanings, node)
    if torch.Tag.pointwise in tags:
        return meanings.aligned(node, node.all_input_nodes)
    raise NotProvenError(f"there is no rule for {node.target}, which is given rows of the batch")


def _of_number(node: fx.Node, packet: Any, holds: bool) -> Meaning:
    """Sizes are numbers of both halves, and checked where they are used; what rows hold is none."""
    if holds and packet not in (aten.sym_size, aten.sym_numel, aten.sym_stride):
        raise NotProvenError(f"{node.target} reads a number from rows of the batch")
    return SHARED


def _numbers(node: fx.Node) -> list[fx.Node]:
    return [each for each in node.all_input_nodes if not isinstance(value_of(each), (Tensor, tuple, list))]
