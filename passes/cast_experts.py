"""Turn the experts to FP8: casts of their matrices as nodes of the graph, and the operator that multiplies these.

Contract
- On entry the experts are `moecompile::experts` (passes/fuse.py).
- Weights stay what they are, and get their gradients; only what is multiplied is cast.
- Experts that the FP8 operator does not take stay in their precision, and are returned with the reason.

    in_  = moecompile.quantize_weights(w_in, w_up, gate_up=..., transposed=...)    # values, scales, and both transposed
    out  = moecompile.quantize_weights(w_out, transposed=...)
    result = moecompile.experts_fp8(<as before>, quantized=[*in_, *out])

Tokens, activations and gradients are cast inside the operator, with a scale for each 128 features; matrices have one
for each 128 x 128 (DeepSeek-V3, section 3.3). In inference the transposed copies, which only the backward reads, are
not made (backward=False).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from moecompile.passes.aliases import empty_fake, fake_of
from moecompile.passes.casts import Cast, Casting, Replaced, call_for, cast_for, key_of
from moecompile.passes.provenance import module_of
from moecompile.runtime.contract import Arguments
from moecompile.runtime.fp8_contract import Specs, check_fp8, check_weights


def cast_experts(
    graph: fx.Graph, excluded: Callable[[str], str | None], casting: Casting
) -> list[tuple[Cast, Replaced | None]]:
    """Rewrite the graph in place. The caller recompiles the GraphModule.

    Args:
        graph: of Dynamo's.
        excluded: why the experts of that module are kept, if the user wants them kept.
        casting: how they are cast.

    Returns:
        for each block of experts its row, and the node that computed it and the one in its place; None if it is kept.
    """
    rows: list[tuple[Cast, Replaced | None]] = []
    for node in graph.find_nodes(op="call_function", target=torch.ops.moecompile.experts.default):
        experts, module = _Experts(graph, node, casting), module_of(node)
        reason, refused, specs = excluded(module), False, None
        if reason is None:
            try:
                specs = experts.check()
            except (TypeError, ValueError) as error:
                reason, refused = str(error), True
        replaced = None if specs is None else experts.quantize(*specs)
        shape = tuple(experts.taken.w_in.shape)
        rows.append((Cast(module, "experts", shape, reason is None, reason or "experts", refused), replaced))
    return rows


class _Experts:
    """One call of the experts. `taken` are its arguments' example values; nothing changes before they are checked."""

    def __init__(self, graph: fx.Graph, node: fx.Node, casting: Casting) -> None:
        self._graph, self._node, self._casting = graph, node, casting
        args: Any = fx.node.map_arg(node.args, fake_of)
        kwargs: Any = fx.node.map_arg(node.kwargs, fake_of)
        self.taken = Arguments(*args, **kwargs)

    def check(self) -> tuple[Specs, Specs]:
        """What casting each of the matrices gives; raises ValueError or TypeError if the operators do not take them."""
        taken, backward = self.taken, self._casting.backward
        of_in = check_weights(taken.w_in, taken.w_up, taken.gate_up, taken.w_in_transposed, backward)
        of_out = check_weights(taken.w_out, None, "single", taken.w_out_transposed, backward)
        check_fp8(taken, [empty_fake(taken.w_in, *spec) for spec in (*of_in, *of_out)])
        return of_in, of_out

    def quantize(self, of_in: Specs, of_out: Specs) -> Replaced:
        """Replaces the call; takes what `check` gave."""
        node, taken = self._node, self.taken
        with self._graph.inserting_before(node):
            given = (node.args[5], node.kwargs.get("w_up"))
            cast_in = self._cast(given, {"gate_up": taken.gate_up, "transposed": taken.w_in_transposed}, of_in)
            cast_out = self._cast((node.args[6],), {"transposed": taken.w_out_transposed}, of_out)
            keywords = {**node.kwargs, **self._casting.of_rows, "quantized": [*cast_in, *cast_out]}
            result = call_for(node, torch.ops.moecompile.experts_fp8.default, node.args, keywords)
        result.meta[key_of(node)] = node.meta[key_of(node)]
        node.replace_all_uses_with(result)
        self._graph.erase_node(node)
        return node, result

    def _cast(self, given: tuple[Any, ...], attributes: dict[str, Any], specs: Sequence[Any]) -> list[fx.Node]:
        """The four results of quantising one of the matrices."""
        attributes |= self._casting.of_matrices
        return cast_for(self._node, torch.ops.moecompile.quantize_weights.default, given, attributes, specs)
