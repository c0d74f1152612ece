"""What holds for a whole graph: the order of its nodes, shared memory, writers, and global modes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from moecompile.passes.aliases import Aliases, fake_of
from moecompile.passes.calls import bind, writes
from moecompile.passes.interpret import Interpretation

_BORDERS = ("torch._C", "torch.amp", "torch.autograd", "torch._functorch", "torch.cuda", "torch.utils")
_QUESTIONS = {
    f"torch.cuda.{name}"
    for name in (
        "can_device_access_peer", "current_device", "device_count", "get_arch_list", "get_device_capability",
        "get_device_name", "get_device_properties", "get_gencode_flags", "is_available", "is_bf16_supported",
        "is_initialized", "is_tf32_supported",
    )
}  # fmt: skip
"""Calls that tell something of the machine and change nothing; Dynamo leaves some in the graph, though it has used what
they told: transformers asks for the GPU's capability before each grouped GEMM."""


@dataclass
class Layout:
    """A graph's order, aliases, writers and mode borders, computed once for all its blocks."""

    graph: fx.Graph
    state: Interpretation | None = None  # what has been found out about the same graph, if it is known

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        """Each node's place in program order."""
        return {node: number for number, node in enumerate(self.graph.nodes)}

    @cached_property
    def aliases(self) -> Aliases:
        """Which nodes share memory."""
        return Aliases(self.graph) if self.state is None else self.state.aliases

    @cached_property
    def writers(self) -> dict[fx.Node, list[fx.Node]]:
        """Writing node -> the nodes it writes into."""
        if self.state is not None:
            return self.state.writers
        return {node: self.aliases.written(node) for node in self.graph.nodes if writes(node)}

    @cached_property
    def written(self) -> dict[fx.Node, list[fx.Node]]:
        """Node -> what writes into memory that it may share."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for writer, targets in self.writers.items():
            for target in targets:
                for alias in self.aliases.of(target):
                    found.setdefault(alias, []).append(writer)
        return found

    @cached_property
    def mode(self) -> dict[fx.Node, tuple[object, ...]]:
        """The global modes (no_grad, autocast, ...) that hold at each node."""
        found: dict[fx.Node, tuple[object, ...]] = {}
        known = {} if self.state is None else self.state.calls
        borders = dict.fromkeys(node for node in self.graph.nodes if node not in known and _is_border(node))
        if not borders:
            return dict.fromkeys(self.graph.nodes, (None, (), 0))
        grad: object = None
        entered: dict[fx.Node, object] = {}
        others = 0
        for node in self.graph.nodes:
            if node in borders:
                name = getattr(node.target, "__name__", "")
                if name == "_set_grad_enabled":
                    grad = node.args[0]
                elif name.startswith("_enter_"):
                    entered[node] = (name, *node.args)
                elif (
                    name.startswith("_exit_")
                    and node.args
                    and isinstance(node.args[0], fx.Node)
                    and node.args[0] in entered
                ):
                    del entered[node.args[0]]
                else:
                    others += 1
            found[node] = (grad, tuple(entered.values()), others)
        initial = next(
            (node.args[0] for node in borders if getattr(node.target, "__name__", "") == "_set_grad_enabled"), None
        )
        # before the first switch, gradients are as they are after it is undone
        return {
            node: (initial is False if mode[0] is None and initial is not None else mode[0], *mode[1:])
            for node, mode in found.items()
        }


def _is_border(node: fx.Node) -> bool:
    """A call that changes a global mode: from the modules that hold such switches, and with no tensor in or out."""
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return False
    module = getattr(node.target, "__module__", "") or ""
    if not module.startswith(_BORDERS) or bind(node) is not None:
        return False
    if f"{module}.{getattr(node.target, '__name__', '')}" in _QUESTIONS:
        return False
    tensors = isinstance(fake_of(node), torch.Tensor) or any(
        isinstance(fake_of(argument), torch.Tensor) for argument in node.all_input_nodes
    )
    return not tensors
