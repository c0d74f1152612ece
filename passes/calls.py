"""One call for every way to write an operation.

A Dynamo graph spells one operation many ways: `torch.mul`, `operator.mul`, `x.mul(...)`, `x *= ...`. This table maps
each spelling to one canonical name and binds its arguments to one signature, so that rules are written once.

    call = bind(node)    Call(name="mul", arguments={"input": n1, "other": n2}, inplace=False), or None if unknown

Nothing here decides what an operation means; that is the rules' work. (`passes/spelling.py` names operations for people
to read; here they are bound for rules to reason about.)
"""

from __future__ import annotations

import ast
import inspect
import operator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import fx

# canonical name -> (signature, spellings). A spelling is a function, "torch.x.y" looked up when used (it may not exist
# in every version), or ".method". A signature entry "name=default" has a default; "*name" takes the remaining
# positional arguments.
_F = "torch.nn.functional."
_NN = "torch._C._nn."
TABLE: dict[str, tuple[str, tuple[str, ...]]] = {
    # views and copies
    "view": ("input *shape", (".view", ".reshape", "torch.reshape", "torch.ops.aten._unsafe_view")),
    "view_as": ("input other", (".view_as", ".reshape_as")),
    "flatten": ("input start_dim=0 end_dim=-1", ("torch.flatten", ".flatten", ".ravel", "torch.ravel")),
    "unflatten": ("input dim sizes", ("torch.unflatten", ".unflatten")),
    "unsqueeze": ("input dim", ("torch.unsqueeze", ".unsqueeze")),
    "squeeze": ("input dim=None", ("torch.squeeze", ".squeeze")),
    "transpose": ("input dim0 dim1", ("torch.transpose", ".transpose", "torch.swapaxes", ".swapaxes", ".swapdims")),
    "t": ("input", ("torch.t", ".t")),
    "permute": ("input *dims", ("torch.permute", ".permute")),
    "expand": ("input *sizes", (".expand",)),
    "expand_as": ("input other", (".expand_as",)),
    "repeat": ("input *sizes", (".repeat",)),
    "repeat_interleave": ("input repeats dim=None output_size=None", ("torch.repeat_interleave", ".repeat_interleave")),
    "contiguous": ("input memory_format=None", (".contiguous",)),
    "clone": ("input memory_format=None", ("torch.clone", ".clone")),
    "chunk": ("input chunks dim=0", ("torch.chunk", ".chunk")),
    "split": ("tensor split_size_or_sections dim=0", ("torch.split", ".split", "torch.functional.split")),
    "tensor_split": ("input indices_or_sections dim=0", ("torch.tensor_split", ".tensor_split")),
    "unbind": ("input dim=0", ("torch.unbind", ".unbind")),
    "select": ("input dim index", ("torch.select", ".select")),
    "narrow": ("input dim start length", ("torch.narrow", ".narrow")),
    "getattr": ("input name", ("builtins.getattr",)),
    "getitem": ("input index", ("operator.getitem", ".__getitem__")),
    "pad": ("input pad mode='constant' value=None", (_NN + "pad", _F + "pad")),
    "cat": ("tensors dim=0", ("torch.cat", "torch.concat", "torch.concatenate")),
    "stack": ("tensors dim=0", ("torch.stack",)),
    # casts: one canonical operation, the target read off the result
    "cast": (
        "input *target",
        (
            ".to",
            ".float",
            ".half",
            ".bfloat16",
            ".double",
            ".int",
            ".long",
            ".bool",
            ".type",
            ".type_as",
            ".cpu",
            ".cuda",
        ),
    ),
    # making tensors
    "zeros": ("*size", ("torch.zeros", "torch.zeros_like", ".new_zeros")),
    "ones": ("*size", ("torch.ones", "torch.ones_like", ".new_ones")),
    "empty": ("*size", ("torch.empty", "torch.empty_like", ".new_empty")),
    "full": ("size fill_value dtype=None", ("torch.full",)),
    "full_like": ("input fill_value dtype=None", ("torch.full_like",)),
    "new_full": ("input size fill_value dtype=None", (".new_full",)),
    "arange": ("*bounds", ("torch.arange",)),
    # indexing
    "index_select": ("input dim index", ("torch.index_select", ".index_select")),
    "gather": ("input dim index sparse_grad=False", ("torch.gather", ".gather")),
    "take_along_dim": ("input indices dim=None", ("torch.take_along_dim", ".take_along_dim")),
    "embedding": (
        "input weight padding_idx=None max_norm=None norm_type=2.0 scale_grad_by_freq=False sparse=False",
        (_F + "embedding",),
    ),
    "setitem": ("input index value", ("operator.setitem", ".__setitem__")),
    "index_put": ("input indices values accumulate=False", ("torch.index_put", ".index_put")),
    "index_copy": ("input dim index source", ("torch.index_copy", ".index_copy")),
    "index_add": ("input dim index source alpha=1", ("torch.index_add", ".index_add")),
    "scatter": ("input dim index src reduce=None", ("torch.scatter", ".scatter")),
    "scatter_add": ("input dim index src", ("torch.scatter_add", ".scatter_add")),
    "deterministic_scatter_add": ("out index src", ("torch.ops.torchtitan.deterministic_scatter_add",)),
    "index_fill": ("input dim index value", ("torch.index_fill", ".index_fill")),
    "masked_fill": ("input mask value", ("torch.masked_fill", ".masked_fill")),
    "where": ("condition input=None other=None", ("torch.where",)),
    "where_method": ("input condition other", (".where",)),
    "nonzero": ("input as_tuple=False", ("torch.nonzero", ".nonzero")),
    "copy": ("input src non_blocking=False", (".copy",)),
    "zero": ("input", (".zero", "torch.zero")),
    "fill": ("input fill_value", (".fill", "torch.fill")),
    # routing
    "topk": ("input k dim=-1 largest=True sorted=True", ("torch.topk", ".topk")),
    "sort": ("input dim=-1 descending=False stable=False", ("torch.sort", ".sort")),
    "argsort": ("input dim=-1 descending=False stable=False", ("torch.argsort", ".argsort")),
    "max": ("input dim=None keepdim=False", ("torch.max", ".max")),
    "argmax": ("input dim=None keepdim=False", ("torch.argmax", ".argmax")),
    "histc": ("input bins=100 min=0 max=0", ("torch.histc", ".histc")),
    "bincount": ("input weights=None minlength=0", ("torch.bincount", ".bincount")),
    "searchsorted": (
        "sorted_sequence input out_int32=False right=False side=None sorter=None",
        ("torch.searchsorted",),
    ),
    "bucketize": ("input boundaries out_int32=False right=False", ("torch.bucketize",)),
    "one_hot": ("input num_classes=-1", (_F + "one_hot", _NN + "one_hot")),
    "cumsum": ("input dim dtype=None", ("torch.cumsum", ".cumsum")),
    "softmax": ("input dim=None _stacklevel=3 dtype=None", (_F + "softmax", "torch.softmax", ".softmax")),
    "floor_divide": ("input other", ("torch.floor_divide", ".floor_divide", "operator.floordiv", ".__floordiv__")),
    "remainder": ("input other", ("torch.remainder", ".remainder", "operator.mod", ".__mod__")),
    # matrix products
    "grouped_mm": (
        "input mat2 offs=None bias=None out_dtype=None",
        ("torch._grouped_mm", _F + "grouped_mm", "torch.ops.aten._grouped_mm"),
    ),
    "grouped_mm_fallback": ("input weight offs", ("torch.ops.transformers.grouped_mm_fallback",)),
    "linear": ("input weight bias=None", (_F + "linear", _NN + "linear")),
    "mm": ("input mat2", ("torch.mm", ".mm")),
    "bmm": ("input mat2", ("torch.bmm", ".bmm")),
    "matmul": ("input other", ("torch.matmul", ".matmul", "operator.matmul", ".__matmul__")),
    "addmm": ("input mat1 mat2 beta=1 alpha=1", ("torch.addmm", ".addmm")),
    "baddbmm": ("input batch1 batch2 beta=1 alpha=1", ("torch.baddbmm", ".baddbmm")),
    "einsum": ("equation *operands", ("torch.einsum", "torch.functional.einsum")),
    # reductions
    "sum": ("input dim=None keepdim=False dtype=None", ("torch.sum", ".sum")),
    "any": ("input dim=None keepdim=False", ("torch.any", ".any")),
    "item": ("input", (".item",)),
    "invert": ("input", ("operator.invert", "torch.logical_not", ".logical_not", "torch.bitwise_not", ".bitwise_not")),
    # exchanges between ranks
    "all_to_all_single": (
        "input output_split_sizes input_split_sizes group_name",
        (
            "torch.ops._c10d_functional.all_to_all_single",
            "torch.ops._c10d_functional_autograd.all_to_all_single",
        ),
    ),
    "wait_tensor": ("tensor", ("torch.ops._c10d_functional.wait_tensor",)),
    # bits, used on routing values
    **{
        name: ("input other", (f"torch.{name}", f".{name}", f"operator.{short}", f".__{short.strip('_')}__"))
        for name, short in (
            ("bitwise_and", "and_"),
            ("bitwise_or", "or_"),
            ("bitwise_xor", "xor"),
            ("bitwise_left_shift", "lshift"),
            ("bitwise_right_shift", "rshift"),
        )
    },
    "logical_and": ("input other", ("torch.logical_and", ".logical_and")),
    "ceil": ("input", ("torch.ceil", ".ceil")),
    # comparisons, used on routing values
    **{
        name: ("input other", (f"torch.{name}", f".{name}", f"operator.{name}", f".__{name}__"))
        for name in ("eq", "ne", "lt", "gt", "le", "ge")
    },
    # elementwise arithmetic
    "add": ("input other alpha=1", ("torch.add", ".add", "operator.add", ".__add__", ".__radd__")),
    "sub": ("input other alpha=1", ("torch.sub", "torch.subtract", ".sub", "operator.sub", ".__sub__")),
    "rsub": ("input other alpha=1", ("torch.rsub", ".rsub", ".__rsub__")),
    "mul": (
        "input other",
        ("torch.mul", "torch.multiply", ".mul", ".multiply", "operator.mul", ".__mul__", ".__rmul__"),
    ),
    "div": (
        "input other rounding_mode=None",
        ("torch.div", "torch.divide", "torch.true_divide", ".div", "operator.truediv", ".__truediv__"),
    ),
    "pow": ("input exponent", ("torch.pow", ".pow", "operator.pow", ".__pow__")),
    "neg": ("input", ("torch.neg", "torch.negative", ".neg", "operator.neg")),
    "clamp": ("input min=None max=None", ("torch.clamp", "torch.clip", ".clamp", ".clip")),
    "clamp_min": ("input min", ("torch.clamp_min", ".clamp_min")),
    "clamp_max": ("input max", ("torch.clamp_max", ".clamp_max")),
    "minimum": ("input other", ("torch.minimum", ".minimum")),
    "maximum": ("input other", ("torch.maximum", ".maximum")),
    "gelu": ("input approximate='none'", (_F + "gelu", _NN + "gelu")),
    "softplus": ("input beta=1.0 threshold=20.0", (_F + "softplus", _NN + "softplus")),
    "leaky_relu": ("input negative_slope=0.01 inplace=False", (_F + "leaky_relu", _NN + "leaky_relu")),
    "elu": ("input alpha=1.0 inplace=False", (_F + "elu", _NN + "elu")),
    "celu": ("input alpha=1.0 inplace=False", (_F + "celu", "torch.celu")),
    "logsigmoid": ("input", (_F + "logsigmoid", _NN + "log_sigmoid")),
    **{
        name: ("input", (f"torch.{name}", f".{name}", f"{_F}{name}"))
        for name in "sigmoid tanh exp log log1p sqrt rsqrt reciprocal abs sign square erf".split()
    },
    "dropout": ("input p=0.5 training=True inplace=False", (_F + "dropout", "torch.dropout")),
    "relu": ("input inplace=False", ("torch.relu", ".relu", _F + "relu")),
    **{
        name: ("input inplace=False", (f"{_F}{name}", f"{_NN}{name}"))
        for name in "silu relu6 selu mish hardswish hardsigmoid".split()
    },
}
# Python's augmented assignments write into their left operand
_AUGMENTED = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "ifloordiv": "floor_divide",
    "imod": "remainder",
    "ipow": "pow",
    "imatmul": "matmul",
    "iand": "bitwise_and",
    "ior": "bitwise_or",
    "ixor": "bitwise_xor",
    "ilshift": "bitwise_left_shift",
    "irshift": "bitwise_right_shift",
}
# calls that write into their first argument although the name does not end in "_"
_WRITES = frozenset({"setitem"})
# keyword arguments that place or lay out a result without changing its values
_HARMLESS = frozenset({"device", "pin_memory", "layout", "memory_format", "requires_grad", "non_blocking", "copy"})


# arguments that make a function write, and those that keep it from doing so where they are false
_TELLING = ("inplace", "max_norm", "running_mean", "running_var")
_ALLOWING = ("training", "use_input_stats")
# operations of the table that write into their input if a parameter says so
_WRITE_IF_TOLD = frozenset(
    name for name, (signature, _) in TABLE.items() if any(f"{word}=" in signature for word in _TELLING)
)
# parameters of functions that Python cannot be asked about
_PARAMETERS = {
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training"),
    torch.instance_norm: ("input", "weight", "bias", "running_mean", "running_var", "use_input_stats"),
}


@dataclass(slots=True)  # not frozen: one for each node of a graph, and a frozen one takes three times as long
class Call:
    """One node under its canonical name. `arguments` holds every parameter of the signature, defaults filled in."""

    name: str
    arguments: dict[str, Any]
    inplace: bool
    node: fx.Node

    def __getitem__(self, name: str) -> Any:
        """The argument of that name."""
        return self.arguments[name]


class _Signature(NamedTuple):
    names: tuple[str, ...]
    defaults: dict[str, Any]
    required: frozenset[str]
    rest: str | None  # the name that takes the positional arguments left over


@cache
def _signature(name: str) -> _Signature:
    """A signature of the table, taken apart."""
    words = [word.partition("=") for word in TABLE[name][0].split()]
    own = [(key, default) for key, _, default in words if not key.startswith("*")]
    return _Signature(
        names=tuple(key for key, _ in own),
        defaults={key: ast.literal_eval(default) for key, default in own if default},
        required=frozenset(key for key, default in own if not default),
        rest=next((key[1:] for key, _, _ in words if key.startswith("*")), None),
    )


def _look_up(path: str) -> Any:
    """The object at a dotted path, or None where this version of PyTorch has none."""
    root, *rest = path.split(".")
    if root == "builtins":
        return getattr
    value: Any = {"torch": torch, "operator": operator}[root]
    for part in rest:
        value = getattr(value, part, None)
    return value


@cache
def _functions() -> dict[Any, tuple[str, bool]]:
    """Function -> (canonical name, writes into its first argument)."""
    table: dict[Any, tuple[str, bool]] = {}
    for name, (_, spellings) in TABLE.items():
        for spelling in spellings:
            if spelling.startswith((".", "torch.ops.")):
                continue
            for path, inplace in ((spelling, name in _WRITES), (spelling + "_", True)):
                function = _look_up(path) if path == spelling or path.startswith("torch.") else None
                if function is not None:
                    table.setdefault(function, (name, inplace))
    table.update({getattr(operator, augmented): (name, True) for augmented, name in _AUGMENTED.items()})
    return table


@cache
def _methods() -> dict[str, tuple[str, bool]]:
    """Method name -> (canonical name, writes into self)."""
    table: dict[str, tuple[str, bool]] = {f"__{augmented}__": (name, True) for augmented, name in _AUGMENTED.items()}
    for name, (_, spellings) in TABLE.items():
        for spelling in spellings:
            if spelling.startswith("."):
                table[spelling[1:]] = (name, name in _WRITES)
                table[spelling[1:] + "_"] = (name, True)
    return table


@cache
def _operators() -> dict[str, str]:
    """Qualified name of an operator -> canonical name.

    Compared by name because an operator may be registered later than this table is made.
    """
    return {
        spelling.removeprefix("torch.ops.").replace(".", "::"): name
        for name, (_, spellings) in TABLE.items()
        for spelling in spellings
        if spelling.startswith("torch.ops.")
    }


def _canonical(node: fx.Node) -> tuple[str, bool] | None:
    if node.op == "call_method":
        return _methods().get(str(node.target))
    if node.op != "call_function":
        return None
    try:
        return _of_function(node.target)
    except TypeError:  # an unhashable callable cannot be in the table
        return None


@lru_cache(maxsize=1024)
def _of_function(target: Any) -> tuple[str, bool] | None:
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
        name = _operators().get(packet._qualified_op_name)
        return None if name is None else (name, False)
    return _functions().get(target)


def bind(node: fx.Node) -> Call | None:
    """The node's canonical name and bound arguments; None if the table lacks it or its arguments do not fit."""
    found = _canonical(node)
    if found is None:
        return None
    name, inplace = found
    names, defaults, required, rest = _signature(name)
    positional, keywords = node.args, node.kwargs
    if not keywords and rest is None:  # most calls; what is required comes first
        if not len(required) <= len(positional) <= len(names):
            return None
        arguments = defaults | dict(zip(names, positional, strict=False))
        return Call(name, arguments, inplace or arguments.get("inplace") is True, node)
    arguments = defaults | dict(zip(names, positional, strict=False))
    for key, value in keywords.items():
        if key in names or (value is not None and (rest is not None or key in _HARMLESS)):
            arguments[key] = value
        elif value is not None:
            return None
    if not required <= arguments.keys():
        return None
    if rest is not None:
        left = tuple(positional[len(names) :])
        arguments[rest] = (keywords[rest],) if not left and rest in keywords else left
    elif len(positional) > len(names):
        return None
    return Call(name, arguments, inplace or arguments.get("inplace") is True, node)


def writes(node: fx.Node, call: Call | None = None) -> bool:
    """Whether the node may write into one of its arguments; `call` is what it is bound to, if that is known.

    By spelling, by schema, or by a name that ends in an underscore.
    """
    if call is not None:
        return call.inplace or node.kwargs.get("out") is not None or call.arguments.get("max_norm") is not None
    if node.op not in ("call_function", "call_method"):
        return False
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return True
    found = _canonical(node)
    if found is not None:
        name, inplace = found
        if inplace or name not in _WRITE_IF_TOLD:
            return inplace
        return (call := bind(node)) is None or writes(node, call)
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if isinstance(target, torch._ops.HigherOrderOperator):
        return any(map(_body_writes, node.all_input_nodes))
    return is_named_writing(node) or _is_told_to_write(node)


def is_named_writing(node: fx.Node) -> bool:
    """Whether a function's or a method's name says that it writes into its first argument."""
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def _body_writes(node: fx.Node) -> bool:
    """Whether an argument of a higher-order operator is a body that writes into anything, or one that is not known."""
    if node.op != "get_attr":
        return False
    body: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        body = getattr(body, part, None)
    if body is None:
        return not isinstance(node.meta.get("example_value", node.meta.get("val")), torch.Tensor)
    return isinstance(body, fx.GraphModule) and any(writes(inner) for inner in body.graph.nodes)


def _is_told_to_write(node: fx.Node) -> bool:
    """Whether a function of Python's gets an argument that makes it write."""
    names = _parameters(node.target) if callable(node.target) else ()
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    told = any(given.get(name) is not None and given[name] is not False for name in _TELLING)
    return told and all(given.get(name) is not False for name in _ALLOWING)


@cache
def _parameters(function: Any) -> tuple[str, ...]:
    """The names of a function's parameters, as far as they are known."""
    if function in _PARAMETERS:
        return _PARAMETERS[function]
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()
