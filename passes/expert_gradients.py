"""Have gradients of experts' matrices computed by a call of their own, where these may come later than others.

Contract
- On entry the graph is AOTAutograd's backward, with example values; it is changed in place.
- A backward of experts becomes two, of the same arguments: one gives the gradients of tokens and routing weights, the
  other those of matrices and biases. Kernels give the same bits as before; PyTorch's operators (moecompile/runtime/
  backward.py) multiply by routing weights elsewhere if nobody asks for these weights' gradient, and round there.
- It stays one if what comes early reads a gradient of a matrix, or nothing of a token; if it adds to main gradients,
  which keeps its place; and if it computes hidden rows again, which both would.

    of_x, of_w_in, of_w_out = experts_backward(grad, hidden, x, ..., needs=(x, w_in, w_out))
        becomes of_x = experts_backward(grad, hidden, x, ..., needs=(x,))
                of_w_in, of_w_out = experts_backward(grad, hidden, x, ..., needs=(w_in, w_out))

Both go back through GEMM2 and the activation, a sixth of all products more: who has the second fill a pipeline's
bubbles has time for it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx

from moecompile.passes.joint_graph import BACKWARDS, BACKWARDS_FP8, argument, give, operator_of
from moecompile.runtime.contract import DIFFERENTIABLE

DIVIDED = (BACKWARDS[0], BACKWARDS_FP8[0])
"""Those that add to nothing."""
OF_TOKENS = ("x", "weights")


def divide_expert_backwards(graph: fx.Graph, early: Collection[fx.Node]) -> int:
    """Divides backwards of experts; how many.

    Args:
        graph: of AOTAutograd's.
        early: what does not wait for gradients of matrices, with all that it is computed from.
    """
    done = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or operator_of(node) not in DIVIDED or argument(node, "recompute"):
            continue
        names = [name for name, needed in zip(DIFFERENTIABLE, argument(node, "needs"), strict=True) if needed]
        read_early = {_name(user, names) in OF_TOKENS for user in node.users if user in early}
        if read_early == {True} and not {*names} <= {*OF_TOKENS}:
            _divide(graph, node, names)
            done += 1
    graph.lint()
    return done


def _divide(graph: fx.Graph, node: fx.Node, names: list[str]) -> None:
    users = list(node.users)
    for of_tokens in (True, False):
        wanted = [name for name in names if (name in OF_TOKENS) == of_tokens]
        with graph.inserting_before(node):
            made = graph.node_copy(node)
        give(made, "needs", [name in wanted for name in DIFFERENTIABLE])
        made.meta["val"] = [node.meta["val"][names.index(name)] for name in wanted]
        for user in users:
            if (name := _name(user, names)) in wanted:
                user.args = (made, wanted.index(name))
    graph.erase_node(node)


def _name(part: fx.Node, names: list[str]) -> str:
    """Of which argument a part of a backward's result is the gradient."""
    place: Any = part.args[1]
    return names[place]
