"""One name for each operation, however it was spelled.

``x * y``, ``x.mul(y)``, ``torch.mul(x, y)`` and ``aten.mul.Tensor(x, y)`` are all ``mul``; ``x *= y`` and ``x.mul_(y)``
are ``mul_``. Operators of another library keep their namespace (``moecompile.experts``,
``transformers.grouped_mm_fallback``), so that a printed graph and its counts read the same for Dynamo's and
AOTAutograd's graphs, on every torch version.
For reading only: two operations of one name may differ in details (``aten.div.Tensor_mode`` is ``div`` too).
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
from torch import fx

from moecompile.passes.provenance import tensor_of

# Methods that only convert.
_CASTS = frozenset({"to", "float", "half", "bfloat16", "double", "int", "long", "short", "bool", "type", "type_as"})

# Python's operators and torch's own aliases, by the name ATen uses.
_ALIASES = {
    "truediv": "div", "true_divide": "div", "divide": "div", "floordiv": "floor_divide", "mod": "remainder",
    "multiply": "mul", "subtract": "sub", "negative": "neg", "absolute": "abs", "pos": "positive",
    "and_": "bitwise_and", "or_": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not", "not_": "logical_not",
    "lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "concat": "cat", "concatenate": "cat", "swapaxes": "transpose", "swapdims": "transpose", "moveaxis": "movedim",
    "to_copy": "to", "convert_element_type": "to", "unsafe_view": "view",
    "sym_size": "size", "sym_stride": "stride", "sym_numel": "numel",
}  # fmt: skip
_IN_PLACE_OPERATORS = frozenset(
    "iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift iconcat".split()
)
_TORCH_NAMESPACES = frozenset({"aten", "prims", "torch", "higher_order", "_operator", "builtins", "math", ""})


def operation_name(node: fx.Node) -> str:
    """The one name of what a call node does, e.g. ``linear``, ``add_``, ``moecompile.experts``.

    A call_module node answers with the module's path. Nodes that call nothing answer with their opcode.
    """
    if node.op == "call_method":
        name = str(node.target)
        return "to" if name in _CASTS else _canonical("torch", name)
    if node.op == "call_function":
        return _canonical(*_namespace_and_name(node.target))
    return str(node.target) if node.op == "call_module" else node.op


def not_understood(node: fx.Node) -> str:
    """The reason why a call without a rule is refused."""
    return f"{operation_name(node)} is not an operation that detection understands"


def op_counts(graph: fx.Graph) -> Counter[str]:
    """How often each operation occurs in a graph; taking one result out of several (``topk(...)[0]``) is none."""
    calls = (node for node in graph.nodes if node.op in ("call_function", "call_method", "call_module"))
    return Counter(operation_name(node) for node in calls if not picks_result(node))


def count_changes(before: Counter[str], after: Counter[str]) -> dict[str, tuple[int, int]]:
    """Operation to (count before, count after) where the two differ, the largest change first."""
    changed = [name for name in before.keys() | after.keys() if before[name] != after[name]]
    changed.sort(key=lambda name: (-abs(after[name] - before[name]), name))
    return {name: (before[name], after[name]) for name in changed}


def picks_result(node: fx.Node) -> bool:
    """Whether a node only takes one result out of several: getitem on something that is not a tensor."""
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "getitem":
        return False
    owner = node.args[0]
    return isinstance(owner, fx.Node) and isinstance(tensor_of(owner), tuple | list) and isinstance(node.args[1], int)


def is_moecompile(node: fx.Node) -> bool:
    """Whether a node calls one of moecompile's own operators."""
    return node.op == "call_function" and operation_name(node).startswith("moecompile.")


def _namespace_and_name(target: Any) -> tuple[str, str]:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace, target._schema.name.split("::")[1]
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "higher_order", target.name()
    # an operator's packet (torch.ops.aten.mul) or torch.library.custom_op's object
    qualified = getattr(target, "_qualified_op_name", None) or getattr(target, "_qualname", None)
    if isinstance(qualified, str) and "::" in qualified:
        namespace, name = qualified.split("::")
        return namespace, name
    module = getattr(target, "__module__", None) or ""
    name = getattr(target, "__name__", None) or type(target).__name__
    return ("torch" if module.split(".")[0] == "torch" else module), name


@functools.cache
def _canonical(namespace: str, name: str) -> str:
    if namespace not in _TORCH_NAMESPACES:
        return f"{namespace}.{name}"
    if namespace == "_operator" and name in _IN_PLACE_OPERATORS:
        return _ALIASES.get(name[1:], name[1:]) + "_"
    if name in _ALIASES:  # Python's and_, or_, not_ end like in-place operations
        return _ALIASES[name]
    base = name.strip("_")
    in_place = name.endswith("_") and not name.endswith("__")
    return _ALIASES.get(base, base) + ("_" if in_place else "")
