"""Where a node comes from: the module that ran it, the user's line, the name of an input.

For messages, reports and printed graphs only. Nothing here is evidence for a rewrite: functional code has no module
path, and torch may attach the line of a helper.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_FOREIGN = (_TORCH, _PACKAGE, "<")
_FRAME = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+)(?:, in (?P<function>\S+))?')
_WRAPPERS = frozenset({"wrapper", "wrapped", "inner", "decorator", "decorated", "_fn", None})

# Pieces of a Dynamo source that say how a value is stored, not what it is.
_CONTAINERS = {
    "_modules", "_parameters", "_buffers", "_orig_mod", "_checkpoint_wrapped_module", "__dict__", "__closure__",
    "cell_contents", "kwargs", "self",
}  # fmt: skip
_PIECE = re.compile(r"""\[\s*(?:'([^']*)'|"([^"]*)"|(-?\d+))\s*\]|\.?([A-Za-z_0-9]+)""")
_GETATTR = re.compile(r"""getattr\(([^()]*),\s*['"]([^'"]*)['"]\)""")


# The name of a module that is the captured frame's own (``L['self']``, or whatever its first argument is called), where
# it owns something. A function's module argument is one as well, if the function calls its parts one by one.
_ROOT = re.compile(r"""^L\[['"]\w+['"]\](?=\.)""")


def module_of(node: fx.Node) -> str:
    """Path of the innermost module whose forward made the node, e.g. ``model.layers.0.mlp``.

    A node of a backward graph answers with the module of its forward node. The empty string: the root module,
    or functional code.
    """
    return (_modules_of(node) or ("",))[-1]


def common_module(nodes: Iterable[fx.Node]) -> str:
    """Path of the innermost module whose forward made all the nodes, its parts' forwards included."""
    stacks = [_modules_of(node) for node in nodes if node.op in ("call_function", "call_method", "call_module")]
    common = ""
    for column in zip(*stacks, strict=False):
        if len(set(column)) > 1:
            break
        common = column[0]
    return common


def _modules_of(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules whose forwards made the node, the outermost first."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    sources = tuple(entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values())
    # the frame's own module is not in the stack: what all paths then begin with is its name
    own = bool(sources) and _ROOT.match(sources[0]) is not None
    return tuple(readable_path(_ROOT.sub("", source) if own else source) for source in sources)


def source_of(node: fx.Node) -> str:
    """File and line of the user's code that made the node, e.g. ``modeling_mixtral.py:80``, or the empty string.

    It is the innermost frame of the node's stack trace that is neither in torch nor in moecompile.
    """
    trace = node.stack_trace or ""
    end = len(trace)
    # backwards from the end: a trace has some thirty frames, and the last one or two decide
    while (start := trace.rfind('File "', 0, end)) >= 0:
        match = _FRAME.match(trace, start)
        if match and not match["path"].startswith(_FOREIGN):
            return f"{os.path.basename(match['path'])}:{match['line']}"
        end = start
    return ""


def frame_of(node: fx.Node) -> tuple[str, str]:
    """Function and file of the frame that was captured: the node's outermost frame of the user's.

    A decorator's wrapper is passed over for the function it wraps. Two empty strings if the node has no stack trace.
    """
    frames = [frame for frame in _FRAME.finditer(node.stack_trace or "") if not frame["path"].startswith(_FOREIGN)]
    chosen = next((frame for frame in frames if frame["function"] not in _WRAPPERS), frames[0] if frames else None)
    return (chosen["function"], os.path.basename(chosen["path"])) if chosen else ("", "")


def input_name(node: fx.Node) -> str:
    """What a graph input or a stored attribute is called in the model, e.g. ``layers.0.mlp.experts.gate_up_proj``.

    An argument answers with its own name (``hidden_states``), a size Dynamo passes beside it with ``size(x, 0)``.
    AOTAutograd's inputs have no such name; they answer with the name torch made.
    """
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is not None:
        # a method until torch 2.12, a property since
        name = source.name() if callable(source.name) else source.name
        size = re.fullmatch(r"(.*)\.(size|stride)\(\)\[(\d+)\]", name)
        return f"{size[2]}({readable_path(size[1])}, {size[3]})" if size else readable_path(name) or str(node.target)
    return _demangle(str(node.target))


@functools.lru_cache(maxsize=4096)
def readable_path(source: str) -> str:
    """The dotted path in a Dynamo source: ``L['self']._modules['layers']._modules['0'].mlp`` gives ``layers.0.mlp``."""
    before = ""
    while before != source:
        before, source = source, _GETATTR.sub(r"\1['\2']", source)
    pieces: list[str] = []
    previous = ""
    for match in _PIECE.finditer(re.sub(r"@\d+", "", source)):
        piece = next(group for group in match.groups() if group is not None)
        # First comes the frame's scope (L locals, G globals), then perhaps a name Dynamo made for the root: `fn` where
        # torch wraps a module, `___stack0` in a frame resumed after a graph break. A closure's cell number is no name.
        scope = (not previous and piece in ("L", "G")) or (previous == "L" and re.fullmatch(r"fn|___stack\d+", piece))
        if not scope and piece not in _CONTAINERS and previous != "__closure__":
            pieces.extend(part for part in piece.split(".") if part)
        previous = piece
    return ".".join(pieces)


def _demangle(name: str) -> str:
    """The dotted path in a name Dynamo mangled: ``L_self_modules_0_parameters_weight_`` gives ``0.weight``."""
    if not re.match(r"[lLgG]_", name):
        return name
    path = re.sub(r"_(?:modules|parameters|buffers)_", ".", name[1:].replace("_kwargs_", "_", 1).rstrip("_"))
    path = re.sub(r"^_(?:self\.)?", "", path)
    return path.strip("._") or name


def tensor_of(node: fx.Node) -> Any:
    """The example value of a node: from Dynamo (``example_value``) or AOTAutograd (``val``); None if it has none."""
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value
