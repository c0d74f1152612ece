"""Inductor compiles every exchange between ranks, and in the graph's order, on all ranks alike.

What Inductor makes of a graph depends on sizes, and ranks have different numbers of tokens. A result without elements
is a constant to it, and what has computed it is left out; of operators that do not depend on each other it runs those
first after which less memory is held. A rank that leaves an exchange out, or has two in another order, waits for the
others, and they for it. So operators that exchange something have an effect here, and each comes after the one before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

ops = torch.ops.moecompile
EXCHANGING = (
    ops.dispatch_start.default,
    ops.dispatch_wait.default,
    ops.combine_start.default,
    ops.combine_wait.default,
    ops.exchanged_experts.default,
    ops.exchanged_experts_forward.default,
    ops.exchanged_experts_backward.default,
    ops.exchanged_experts_backward_adding.default,
    ops.gather_experts.default,
    ops.scatter_gradient.default,
)
LAST = "moecompile_last_exchange"
"""The name under which Inductor's graph knows the buffer of the exchange that was lowered last."""


@functools.cache
def keep_exchanges() -> None:
    """Tells Inductor, once in a process."""
    from torch._inductor import lowering
    from torch._library.utils import get_layout_constraint_tag

    for operator in EXCHANGING:
        # as it would by itself, when it first meets one
        layout = lowering.tag_to_layout_constraint(get_layout_constraint_tag(operator, with_default=True))
        lowering.make_fallback(operator, layout_constraint=layout)
        lowering.lowerings[operator] = _in_order(lowering.lowerings[operator])


def _in_order(lower: Callable[..., Any]) -> Callable[..., Any]:
    """The lowering, of what is never left out, and comes after the exchange that was lowered before."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    @functools.wraps(lower)
    def call(*args: Any, **kwargs: Any) -> Any:
        graph: Any = V.graph
        begun = len(graph.operations)
        found = lower(*args, **kwargs)
        for operation in graph.operations[begun:]:
            if isinstance(operation, ir.FallbackKernel):
                operation.has_side_effects = lambda: True  # type: ignore[method-assign]
                last = vars(graph).get(LAST)
                if last is not None:
                    graph.additional_buffer_deps[operation.get_operation_name()].add(last)
                vars(graph)[LAST] = operation.get_name()
        return found

    return call
