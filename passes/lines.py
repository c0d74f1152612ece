"""One node of a graph as one line of text. `moecompile.passes.printer` says what the lines look like and why."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from moecompile.passes.provenance import input_name, module_of, source_of, tensor_of
from moecompile.passes.spelling import is_moecompile, operation_name
from moecompile.runtime.block_scaled import BlockScaled

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.bool: "bool",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.complex64: "c64", torch.complex128: "c128", torch.float8_e4m3fn: "f8e4m3fn", torch.float8_e5m2: "f8e5m2",
}  # fmt: skip
_SILENT_KEYWORDS = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking", "generator"})
_TOLD_IF_UNUSUAL = frozenset({"scale_format"})
_END = 2**63 - 1  # what ATen writes for an open end of a slice


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a dtype, e.g. ``bf16``."""
    return _DTYPES.get(dtype) or str(dtype).removeprefix("torch.")


class Lines:
    """One printing of one graph: hands out numbers and symbols in order of appearance.

    Attributes:
        nodes: the graph's nodes, in order.
        names: what each node printed so far is called in later lines.
    """

    def __init__(self, graph: fx.Graph, inputs: Sequence[str], source: bool) -> None:
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.names: dict[fx.Node, str] = {}
        self._inputs = inputs
        self._source = source
        self._numbered = 0
        self._symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        targets = [str(node.target) for node in self.nodes if node.op == "placeholder"]
        self._backward = any(target.startswith("tangents_") for target in targets)

    def line(self, node: fx.Node) -> str:
        """The node's line; from here on the node is called by its number."""
        if node.op == "output":
            value = node.args[0]
            parts = value if isinstance(value, tuple | list) else [value]
            return f"return {', '.join(self._argument(part) for part in parts)}"
        call = self._call(node)
        self.names[node] = f"%{self._numbered}"
        self._numbered += 1
        kind = self._type(tensor_of(node))
        described = node.op.startswith("call") or call == "input saved"
        where = [module_of(node), source_of(node)] if self._source and described else []
        comment = "  ".join(part for part in where if part)
        return f"{self.names[node]} = {call}" + (f"  : {kind}" if kind else "") + (f"  # {comment}" if comment else "")

    def _call(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return f"input {self._input(node)}"
        if node.op == "get_attr":
            return f"attribute {node.target}"
        name = operation_name(node)
        if is_moecompile(node):
            return f"{name}({', '.join(self._operator_arguments(node))})"
        if name in ("getitem", "setitem"):
            element = f"{self._argument(node.args[0])}[{self._index(node.args[1])}]"
            return element if name == "getitem" else f"setitem({element}, {self._argument(node.args[2])})"
        if name == "to":  # how a cast says its dtype differs most of all; the result's type says it too
            return f"to({', '.join(self._argument(value) for value in node.args if isinstance(value, fx.Node))})"
        arguments = node.args[:1] if name == "assert_scalar" else node.args  # its message quotes torch's node names
        parts = [self._argument(value) for value in arguments if not isinstance(value, torch.device)]
        keywords = {key: value for key, value in node.kwargs.items() if key not in _SILENT_KEYWORDS}
        parts += [f"{key}={self._argument(value)}" for key, value in keywords.items()]
        return f"{name}({', '.join(parts)})"

    def _operator_arguments(self, node: fx.Node) -> list[str]:
        """Arguments of moecompile's operators by name: tensors, strings (most defaults too), what is not a default."""
        target: Any = node.target
        schema = getattr(target, "default", target)._schema  # Dynamo calls an operator without naming the overload
        given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
        parts = []
        for argument in schema.arguments:
            default = argument.default_value if argument.has_default_value() else None
            value = given.get(argument.name, default)
            told = isinstance(value, str | fx.Node) and argument.name not in _TOLD_IF_UNUSUAL
            if value is not None and (told or value != default):
                parts.append(f"{argument.name}={self._argument(value)}")
        return parts

    def _input(self, node: fx.Node) -> str:
        """The name of an input. AOTAutograd's: of Dynamo's input at that place, a gradient, or a saved value."""
        description: Any = node.meta.get("desc")
        part = ""
        if type(description).__name__ == "SubclassGetAttrAOTInput":  # a tensor that a subclass is made of
            description, part = description.base, f".{description.attr}"
        plain = type(description).__name__ == "PlainAOTInput"
        primal = None if part else re.fullmatch(r"primals_(\d+)", str(node.target))
        if plain or primal:
            place = description.idx if plain else int(primal[1]) - 1  # type: ignore[index]
            if 0 <= place < len(self._inputs):
                return self._inputs[place] + part
            return f"argument {place}" if place >= 0 else input_name(node)  # a body of its own counts from 0
        if tangent := re.fullmatch(r"tangents_(\d+)", str(node.target)):
            return f"gradient {int(tangent[1]) - 1}"
        return "saved" if self._backward else input_name(node)

    def _argument(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, str):
            return json.dumps(value)
        if isinstance(value, tuple | list):
            return f"[{', '.join(self._argument(part) for part in value)}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key}: {self._argument(part)}' for key, part in value.items())}}}"
        if isinstance(value, slice | type(...)):
            return self._index(value)
        if isinstance(value, torch.dtype):
            return dtype_name(value)
        if value is None or isinstance(value, bool | int | float | complex):
            return "end" if value == _END else repr(value)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self._type(value)
        if isinstance(value, torch.device | torch.layout | torch.memory_format):
            return str(value).removeprefix("torch.")
        return getattr(value, "__name__", None) or type(value).__name__  # never repr: it may hold an address

    def _index(self, value: Any) -> str:
        if isinstance(value, tuple | list):
            return ", ".join(self._index(part) for part in value)
        if isinstance(value, slice):
            bounds = (value.start, value.stop) if value.step is None else (value.start, value.stop, value.step)
            return ":".join("" if bound is None else self._argument(bound) for bound in bounds)
        return "..." if value is ... else self._argument(value)

    def _type(self, value: Any) -> str:
        """The type of a result: ``bf16[s0, 64]``, a size as its expression, several results in parentheses."""
        if isinstance(value, torch.Tensor):
            held = f" in {dtype_name(value.e4m3.dtype)}" if isinstance(value, BlockScaled) else ""
            return f"{dtype_name(value.dtype)}[{', '.join(self._size(size) for size in value.shape)}]{held}"
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self._size(value)
        if isinstance(value, tuple | list):
            return f"({', '.join(self._type(part) or 'None' for part in value)})"
        return "" if value is None or isinstance(value, torch.nn.Module) else type(value).__name__

    def _size(self, value: Any) -> str:
        """A size, its symbols renamed: torch's numbers (s77) differ between versions."""
        expression = value.node.expr if hasattr(value, "node") else value
        if not isinstance(expression, sympy.Basic):
            return str(expression)
        for symbol in sorted(expression.free_symbols, key=_symbol_order):
            if symbol not in self._symbols:
                letter = "u" if symbol.name.startswith("u") else "f" if symbol.name.startswith("z") else "s"
                number = sum(known.name[0] == letter for known in self._symbols.values())
                self._symbols[symbol] = sympy.Symbol(f"{letter}{number}", integer=letter != "f", positive=letter == "s")
        return str(expression.xreplace(self._symbols))


def _symbol_order(symbol: sympy.Symbol) -> tuple[int, str]:
    return len(symbol.name), symbol.name
