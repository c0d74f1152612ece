"""Graphs as stable text: the same for the same program, whatever the torch version called its nodes.

One node a line, numbered in order, with its one name (`moecompile.passes.spelling`), the type of its result, and
where it comes from:

    %0 = input layers.0.mlp.experts.gate_up_proj  : bf16[8, 64, 64]
    %1 = input hidden_states  : bf16[s0, 64]
    %2 = linear(%1, %0)  : bf16[s0, 8]  # layers.0.mlp.gate  modeling_mixtral.py:105
    return %2

Left out because they differ between machines and versions or say nothing: devices, memory layouts, strides, torch's
node names. Symbolic sizes are called s0, s1, ... (u0, u1, ... where they depend on data) in order of appearance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from moecompile.passes.collapse import collapsed
from moecompile.passes.lines import Lines
from moecompile.passes.provenance import input_name, tensor_of
from moecompile.passes.spelling import count_changes, op_counts

__all__ = ["count_changes", "graph_text", "input_names", "op_counts"]


def graph_text(
    graph: fx.Graph,
    *,
    collapse: bool = False,
    inputs: Sequence[str] = (),
    source: bool = True,
    counts: bool = False,
) -> str:
    """The graph as text, one node a line, without a newline at the end.

    Args:
        graph: a graph of Dynamo's (``meta["example_value"]``), AOTAutograd's or Inductor's (``meta["val"]``), or any
            other.
        collapse: keep only moecompile's operators, the inputs they use directly and the edges between them. A run of
            other nodes is one line ``...``; a value that other nodes computed is written ``...``, or ``...(%3, %5)``
            with the last moecompile operators that it depends on.
        inputs: names of the inputs of Dynamo's graph (`input_names`), for the graphs AOTAutograd made of it: these know
            their inputs by position only.
        source: write the module path and the user's line behind each node.
        counts: with ``collapse``, say how many operations of which kind a run stands for. That depends on torch's
            version and decompositions, so it is for people and not for golden files.
    """
    lines = Lines(graph, inputs, source)
    if collapse:
        return "\n".join(collapsed(lines, counts))
    return "\n".join(lines.line(node) for node in lines.nodes if not _idle(node))


def input_names(graph: fx.Graph) -> tuple[str, ...]:
    """The name of every input of Dynamo's graph, in order: parameter paths, argument names, sizes."""
    return tuple(input_name(node) for node in graph.nodes if node.op == "placeholder")


def _idle(node: fx.Node) -> bool:
    # sizes and scalars that Dynamo passes in and nobody reads come and go with its version
    return node.op == "placeholder" and not node.users and not isinstance(tensor_of(node), torch.Tensor)
