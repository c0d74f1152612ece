"""Let the backward cast matrices for itself, so that nothing of their transposed copies is held until then.

Contract
- On entry the graph is AOTAutograd's of forward and backward together, not divided yet; `moecompile::quantize_weights`
  makes, of a matrix that is differentiated, what the forward reads and the transposed copies that the backward reads.
- A cast becomes two, one for each; the second needs nothing but the matrix, and so ends up in the backward.
- Of a matrix whose gate and up projection have blocks that the whole matrix has not, the transposed copy is no cast of
  the transposed matrix: it stays as it is. So do casts that activation checkpointing has laid down where they run.

    v, s, v_t, s_t = moecompile.quantize_weights(W)
        becomes v, s, _, _ = moecompile.quantize_weights(W, backward=False)
        and v_t, s_t, _, _ = moecompile.quantize_weights(W, transposed=True, backward=False)

It costs reading each matrix twice in a step, and saves a byte for each of its numbers.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moecompile.passes.aliases import fake_of
from moecompile.passes.casts import cast_for
from moecompile.runtime.fp8_contract import check_weights
from moecompile.runtime.quantize import BLOCK, POWER_OF_TWO

ops = torch.ops.moecompile
INPUTS = "eager_input_vals"
"""What an operator was traced with: Inductor lays its inputs out so."""
USUAL: dict[str, Any] = {"gate_up": "single", "transposed": False, "scale_format": POWER_OF_TWO}


def recast(graph: fx.Graph) -> int:
    """Rewrite the graph in place; returns how many casts became two. The caller recompiles the GraphModule."""
    casts = graph.find_nodes(op="call_function", target=ops.quantize_weights.default)
    absent: dict[fx.Node, list[fx.Node]] = {}
    divided = list(filter(_is_divisible, casts))
    for node in divided:
        _divide(node, absent)
    for user, (values, scales) in absent.items():
        copies: Any = user.kwargs["quantized"]
        nothing = (None, None, values, scales) * 2
        kept = [none or each for none, each in zip(nothing, copies, strict=True)]
        user.update_kwarg("quantized", kept)
        if INPUTS in user.meta:
            args, kwargs = user.meta[INPUTS]
            user.meta[INPUTS] = args, {**kwargs, "quantized": [fake_of(each) for each in kept]}
    return len(divided)


def _is_divisible(node: fx.Node) -> bool:
    """Whether somebody reads transposed copies, and these are what casting the transposed matrix gives."""
    matrix, *more = node.args
    if more or "w_up" in node.kwargs or "recompute" in node.meta or not node.kwargs.get("backward", True):
        return False
    parts = [user for user in node.users if user.target is operator.getitem]
    if len(parts) < len(node.users) or not any(part.args[1] in (2, 3) and part.users for part in parts):
        return False
    assert isinstance(matrix, fx.Node)
    layout = node.kwargs.get("gate_up", "single")
    rows = fake_of(matrix).shape[-1 if node.kwargs.get("transposed", False) else -2]
    return layout == "single" or bool(layout == "halves" and rows % (2 * BLOCK) == 0)


def _divide(node: fx.Node, absent: dict[fx.Node, list[fx.Node]]) -> None:
    """Puts two casts in the place of one; notes forwards of experts, which only hand transposed copies on."""
    given: Any = node.args[0]
    attributes = {**USUAL, **node.kwargs, "backward": False}
    turned = {**attributes, "gate_up": "single", "transposed": not attributes["transposed"]}
    matrix = fake_of(given)
    with node.graph.inserting_before(node):
        # all attributes are written out: what recomputes GEMM1's rows casts the same matrix in the backward, and is not
        # to be taken for a second look at what the forward has made
        forward, backward = (
            cast_for(node, ops.quantize_weights.default, (given,), how, _specs(matrix, how))
            for how in (attributes, turned)
        )
    for part in list(node.users):
        number: Any = part.args[1]
        for user in list(part.users):
            if user.target is ops.experts_fp8_forward.default:
                absent[user] = forward[2:]
            user.replace_input_with(part, backward[number - 2] if number > 1 else forward[number])
        node.graph.erase_node(part)
    node.graph.erase_node(node)


def _specs(matrix: torch.Tensor, attributes: dict[str, Any]) -> Any:
    return check_weights(matrix, None, attributes["gate_up"], attributes["transposed"], backward=False)
