"""Turn linear layers to FP8: casts of rows and matrices as nodes of the graph, and the operator that multiplies these.

Contract
- `verdicts` of this very graph say which layers (passes/linears.py); the others are left alone.
- Weights stay what they are, and get their gradients; only what is multiplied is cast.
- Layers that read the same rows share one cast of them, unless somebody writes into these; matrices likewise. None is
  shared across a border of no_grad, inference mode or autocast: what is made inside has another history.
- Under autocast, what a layer would have been given in its result's dtype is converted first, as autocast does it.

    values, scales = moecompile.quantize(h)                               # for each of 128 features
    w_q = moecompile.quantize_weights(W)                                  # values, scales, and both transposed
    linear(h, W, b)  ->  moecompile.linear_fp8(h, W, b, values, scales, [*w_q])

In inference the transposed copies, which only the backward reads, are not made (backward=False).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from moecompile.passes.aliases import fake_of
from moecompile.passes.casts import Casting, Replaced, call_for, cast_for, key_of
from moecompile.passes.layout import Layout
from moecompile.passes.linears import Linear, Verdict
from moecompile.runtime.fp8_contract import Specs, check_weights
from moecompile.runtime.quantize import BLOCK, E4M3, blocks_in


def cast_linears(graph: fx.Graph, verdicts: Iterable[Verdict], casting: Casting) -> list[Replaced | None]:
    """Rewrite the graph in place. The caller recompiles the GraphModule.

    Args:
        graph: of Dynamo's.
        verdicts: of this graph as it is.
        casting: how they are cast.

    Returns:
        for each verdict the node that computed the layer and the one in its place; None of a layer that is kept.
    """
    casts = _Casts(graph, casting)
    return [casts.replace(each.linear) if each.cast and each.linear is not None else None for each in verdicts]


class _Casts:
    """The casts that there are already, by what is cast; nothing that is written is in it.

    Layers are known as they were before any was cast: what an operand is now, and whether it is written, is looked up.
    """

    def __init__(self, graph: fx.Graph, casting: Casting) -> None:
        self._graph, self._casting = graph, casting
        layout = Layout(graph)
        self._written, self._mode = layout.written, layout.mode
        self._made: dict[tuple[fx.Node, Any, Any], list[fx.Node]] = {}
        self._converted: dict[tuple[fx.Node, torch.dtype, Any], fx.Node] = {}
        self._now: dict[fx.Node, fx.Node] = {}

    def replace(self, linear: Linear) -> Replaced:
        """Puts the operator in the layer's place."""
        node, casting, ops = linear.node, self._casting, torch.ops.moecompile
        with self._graph.inserting_before(node):
            rows, matrix = self._in_dtype(node, linear.rows), self._in_dtype(node, linear.matrix)
            bias = None if linear.bias is None else self._in_dtype(node, linear.bias)
            of_rows = self._cast(node, linear.rows, rows, ops.quantize.default, casting.of_rows, _rows(rows))
            quantize, attributes = ops.quantize_weights.default, casting.of_matrices
            specs = check_weights(fake_of(matrix), None, "single", False, casting.backward)
            of_matrix = self._cast(node, linear.matrix, matrix, quantize, attributes, specs)
            given = (rows, matrix, bias, *of_rows, of_matrix)
            result = call_for(node, ops.linear_fp8.default, given, casting.of_layers)
        result.meta[key_of(node)] = node.meta[key_of(node)]
        node.replace_all_uses_with(result)
        self._graph.erase_node(node)
        self._now[node] = result
        return node, result

    def _in_dtype(self, node: fx.Node, given: fx.Node) -> fx.Node:
        """An operand as it is now, in the dtype of the layer's result, which only autocast lets be another one."""
        operand = self._now.get(given, given)
        fake, dtype = fake_of(operand), fake_of(node).dtype
        if fake.dtype == dtype:
            return operand
        key = (given, dtype, self._mode[node])
        if key in self._converted:
            return self._converted[key]
        made = call_for(node, torch.Tensor.to, (operand, dtype), {})
        made.meta[key_of(node)] = fake.to(dtype)
        if given not in self._written:
            self._converted[key] = made
        return made

    def _cast(
        self, node: fx.Node, given: fx.Node, operand: fx.Node, target: Any, attributes: dict[str, Any], specs: Specs
    ) -> list[fx.Node]:
        """The results of a cast of what `given` is now, made in front of the node unless it is there."""
        key = (operand, target, self._mode[node])
        if key in self._made:
            return self._made[key]
        parts = cast_for(node, target, (operand,), attributes, specs)
        if given not in self._written:
            self._made[key] = parts
        return parts


def _rows(node: fx.Node) -> Specs:
    """Of what `quantize` returns for it."""
    shape = tuple(fake_of(node).shape)
    return (shape, E4M3), ((*shape[:-1], blocks_in(shape[-1], BLOCK)), torch.float32)
