"""Let the backward cast matrices for itself, so that nothing of their transposed copies is held until then.

Contract
- On entry the graph is AOTAutograd's of forward and backward together, not divided yet; `moecompile::quantize_weights`
  makes, of a matrix that is differentiated, what the forward reads and the transposed copies that the backward reads.
  A graph without a backward stays as it is.
- A cast of an input, or of an input in another dtype, becomes two. The second needs nothing but that input, which a
  parameter is held anyway: so the partitioner puts it into the backward.
- Others keep their copies, and are counted: of matrices that are computed, of gate and up projection that are
  interleaved, apart, or in blocks that the whole matrix has not, and casts that activation checkpointing has laid down
  where they run.

    v, s, v_t, s_t = moecompile.quantize_weights(W)
        becomes v, s, _, _ = moecompile.quantize_weights(W, backward=False)
        and v_t, s_t, _, _ = moecompile.quantize_weights(W, transposed=True, backward=False)

It costs reading each matrix twice in a step, and saves a byte for each of its numbers.
"""

from __future__ import annotations

import operator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from moecompile.passes.aliases import fake_of
from moecompile.passes.casts import MatrixCast, call_for, cast_for
from moecompile.passes.joint_graph import INPUTS
from moecompile.runtime.block_scaled import Lie, is_whole
from moecompile.runtime.fp8_contract import check_weights

ops, aten, prims = torch.ops.moecompile, torch.ops.aten, torch.ops.prims
FORWARDS = (ops.experts_fp8_forward.default, ops.exchanged_experts_forward.default)
CONVERSIONS = (aten._to_copy.default, prims.convert_element_type.default)
VIEWS = (aten.view.default, aten.alias.default)
TANGENTS = "tangents"
"""What AOTAutograd's names for the gradients that a backward gets begin with."""


class Counts(NamedTuple):
    """Of casts whose transposed copies a backward reads: how many became two, and how many keep theirs."""

    divided: int
    kept: int


def recast(graph: fx.Graph) -> Counts:
    """Rewrite the graph in place. The caller recompiles the GraphModule."""
    if not any(str(node.target).startswith(TANGENTS) for node in graph.find_nodes(op="placeholder")):
        return Counts(0, 0)
    casts = graph.find_nodes(op="call_function", target=ops.quantize_weights.default)
    turned = [node for node in casts if _is_turned(node)]
    divided = [node for node in turned if _is_divisible(node)]
    counts = Counts(_different(divided), _different(turned) - _different(divided))
    absent: dict[fx.Node, list[fx.Node]] = {}
    for node in divided:
        _divide(node, absent)
    for user, (values, scales) in absent.items():
        _hand_on_nothing(user, values, scales)
    return counts


def _different(casts: list[fx.Node]) -> int:
    """How many there are: the partitioner takes equal ones for one."""
    return len({(node.args, *node.kwargs.items()) for node in casts})


def _is_turned(node: fx.Node) -> bool:
    """Whether somebody reads transposed copies."""
    return any(user.target is operator.getitem and user.args[1] in (2, 3) and user.users for user in node.users)


def _is_divisible(node: fx.Node) -> bool:
    """Whether transposed copies are what casting the transposed matrix gives, and that can be done later."""
    given: tuple[Any, ...] = node.args
    matrix, *more = given
    if more or "w_up" in node.kwargs or "recompute" in node.meta:
        return False
    if any(user.target is not operator.getitem for user in node.users) or _input_of(matrix) is None:
        return False
    how = MatrixCast.of(node)
    return is_whole(fake_of(matrix).shape, Lie(how.gate_up, how.transposed))


def _input_of(matrix: fx.Node) -> fx.Node | None:
    """The graph's input that a matrix is, or that it is a copy of in another dtype."""
    matrix = _seen(matrix)
    if matrix.op == "placeholder":
        return matrix
    if matrix.target not in CONVERSIONS:
        return None
    given: Any = matrix.args[0]
    given = _seen(given)
    others = {name for name, value in matrix.kwargs.items() if value is not None} - {"dtype"}
    return None if others or given.op != "placeholder" else given


def _seen(matrix: fx.Node) -> fx.Node:
    """What a matrix is a view of, as a whole and as it is: `moecompile::mean_gradient` gives one."""
    while matrix.target in VIEWS:
        given: Any = matrix.args[0]
        if fake_of(given).shape != fake_of(matrix).shape:
            break
        matrix = given
    return matrix


def _divide(node: fx.Node, absent: dict[fx.Node, list[fx.Node]]) -> None:
    """Puts two casts in the place of one; notes forwards of experts, which only hand transposed copies on."""
    given: Any = node.args[0]
    how = replace(MatrixCast.of(node), backward=False)
    turned = asdict(replace(how, gate_up="single", transposed=not how.transposed))
    with node.graph.inserting_before(node):
        # The partitioner takes calls with equal arguments for one. What recomputes GEMM1's rows casts the same matrix,
        # too, and stays apart by attributes that are written out here; a dtype's conversion, by how that is given.
        forward, backward = _cast(node, given, asdict(how)), _cast(node, _again(node, given), turned)
    for part in list(node.users):
        number: Any = part.args[1]
        for user in list(part.users):
            if user.target in FORWARDS:
                absent[user] = forward[2:]
            user.replace_input_with(part, backward[number - 2] if number > 1 else forward[number])
        node.graph.erase_node(part)
    node.graph.erase_node(node)


def _again(node: fx.Node, matrix: fx.Node) -> fx.Node:
    """The matrix for the backward: converted there once more, if it is a converted input."""
    given, fake = _input_of(matrix), fake_of(matrix)
    assert given is not None
    if fake_of(given).dtype == fake.dtype:
        return given
    made = call_for(node, prims.convert_element_type.default, (given,), {"dtype": fake.dtype})
    made.meta["val"] = fake
    return made


def _cast(node: fx.Node, matrix: fx.Node, attributes: dict[str, Any]) -> list[fx.Node]:
    """The four results of a cast in the place of another."""
    fake = fake_of(matrix)
    specs = check_weights(fake, None, attributes["gate_up"], attributes["transposed"], backward=False)
    parts = cast_for(node, ops.quantize_weights.default, (matrix,), attributes, specs)
    if INPUTS in node.meta:
        made: Any = parts[0].args[0]
        made.meta[INPUTS] = (fake,), attributes
    return parts


def _hand_on_nothing(user: fx.Node, values: fx.Node, scales: fx.Node) -> None:
    """Gives a forward of experts tensors without elements for all transposed copies: it takes all of them or none."""
    copies: Any = user.kwargs["quantized"]
    nothing = (None, None, values, scales) * 2
    kept = [none or each for none, each in zip(nothing, copies, strict=True)]
    user.update_kwarg("quantized", kept)
    if INPUTS in user.meta:
        args, kwargs = user.meta[INPUTS]
        user.meta[INPUTS] = args, {**kwargs, "quantized": [fake_of(each) for each in kept]}
