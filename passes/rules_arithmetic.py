"""Rules for elementwise arithmetic.

Operands meet at common indices; the content is the operation as the model wrote it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moecompile.passes import radix
from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Interpretation, Refused, Rule, Sparse, is_plain, walk
from moecompile.passes.rules_routing import distinct, filled_ids, lie_as_made, unclamped
from moecompile.passes.rules_views import constant, in_dtype
from moecompile.passes.terms import (
    Affine,
    Apply,
    Atom,
    Constant,
    Content,
    Contract,
    Element,
    Equals,
    Fixed,
    Group,
    Index,
    Special,
    Total,
    Value,
)
from moecompile.passes.unify import unify

# canonical name -> (names of tensor or number operands, names of parameters)
ELEMENTWISE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **{name: (("input", "other"), ()) for name in ("add", "sub", "mul", "div", "minimum", "maximum")},
    "pow": (("input", "exponent"), ()),
    **{
        name: (("input",), ())
        for name in (
            "neg exp log log1p sqrt rsqrt reciprocal abs sign square sigmoid logsigmoid silu tanh relu relu6 selu erf "
            "mish hardswish hardsigmoid".split()
        )
    },
    "leaky_relu": (("input",), ("negative_slope",)),
    "elu": (("input",), ("alpha",)),
    "celu": (("input",), ("alpha",)),
    "gelu": (("input",), ("approximate",)),
    "softplus": (("input",), ("beta", "threshold")),
    "clamp": (("input",), ("min", "max")),
}

# what makes leaves of leaves: see `interpret._is_quiet`
QUIET = frozenset({*ELEMENTWISE, "cast", "getitem", "linear"})

# outside value of a sparse leaf -> the operation's value there, where its derivative vanishes as well
_OUTSIDE: dict[tuple[str, float], float] = {
    ("sigmoid", float("-inf")): 0.0,
    ("exp", float("-inf")): 0.0,
    ("relu", 0.0): 0.0,
    ("softmax", float("-inf")): 0.0,
}


def elementwise(call: Call, state: Interpretation) -> Value | None:
    """The operation on its operands' contents; None (a new leaf) where nothing routed is involved."""
    if (
        call.name == "clamp"
        and isinstance(call["input"], fx.Node)
        and not fake_of(call["input"]).dtype.is_floating_point
    ):
        return unclamped(call, state)
    operands, parameters = ELEMENTWISE[call.name]
    if call.arguments.get("alpha", 1) != 1 and call.name in ("add", "sub"):
        raise Refused("an addition with alpha")
    values = [_operand(state, call[name]) for name in operands]
    params = tuple(call[name] for name in parameters)
    if any(isinstance(param, fx.Node) for param in params):
        raise Refused(f"{call.name} with a tensor or symbolic bound")
    if all(_is_local(value) or isinstance(value.content, Constant) for value in values):
        if not _spreads(call, state, values):
            _propagate_sparsity(call, state)
            return None
    if any(_is_mask(value) for value in values) and all(_is_simple(value) for value in values):
        return _masks(call, state, values)
    if any(_is_mask(value) for value in values):
        raise Refused("arithmetic of rows with indices or masks")
    _check_constants(call, state, operands)
    expected = _promoted(call, state, [call[name] for name in operands])
    if expected is not None and expected != state.dtype(call.node):
        raise Refused(
            f"{call.name} gives {state.dtype(call.node)} where its operands give {expected}: autocast changes it"
        )
    dims, contents = unify(values)
    if _is_routing_number(dims, values):
        return None
    return Value(dims, Apply(call.name, tuple(contents), params))


def _is_local(value: Value) -> bool:
    """Whether the value is a leaf or cut from one, at indices of its own: nothing that routing chose."""
    if is_plain(value):
        return True
    content = value.content
    if not isinstance(content, Element):
        return False
    atoms = [part.atom if isinstance(part, Affine) else part for part in content.index]
    return all(
        isinstance(a, Fixed) or (isinstance(a, Atom) and a.variable.kind in ("leaf", "slice", "free")) for a in atoms
    )


def _is_routing_number(dims: tuple[Group, ...], values: list[Value]) -> bool:
    """Whether the result is one number an assignment, in the ids' own order, that no expert computed: a routing weight.

    Routing weights may be made of several (a scale of the expert's among them); the result is one of its own.
    """
    in_order = all(atom.variable.kind == "ids" for group in dims for atom in group)
    return in_order and not any(
        isinstance(inner, (Contract, Total)) for value in values for inner in walk(value.content)
    )


def _is_mask(value: Value) -> bool:
    content = value.content
    return isinstance(content, (Index, Equals)) or (isinstance(content, Special) and content.kind != "partial")


def _is_simple(value: Value) -> bool:
    return is_plain(value) or isinstance(value.content, (Index, Equals, Special, Constant))


def _operand(state: Interpretation, argument: Any) -> Value:
    if isinstance(argument, fx.Node) and not isinstance(fake_of(argument), torch.Tensor):
        raise Refused("arithmetic with a symbolic number")
    return state.value(argument)


def _spreads(call: Call, state: Interpretation, values: list[Value]) -> bool:
    """Whether a sparse leaf is spread over a further dimension: gates on tokens, the beginning of a dense mixture."""
    sparse = [value for value in values if state.sparse_leaf(value.content) is not None]
    extent = radix.product(state.shape(call.node))
    return any(radix.product(radix.group_size(group) for group in value.dims) != extent for value in sparse)


def _propagate_sparsity(call: Call, state: Interpretation) -> None:
    """A function of a sparse leaf is sparse, with its outside value at the function.

    A product with one that is 0 outside is 0 outside.
    """
    first = call.arguments.get("input")
    sources = [argument for argument in call.arguments.values() if isinstance(argument, fx.Node)]
    roots = [state.sparse_leaf(state.value(source).content) for source in sources]
    known = [sparse for sparse in roots if sparse is not None]
    if (
        not known
        or len(state.shape(call.node)) != 2
        or not all(_stays(state, state.value(source)) for source in sources)
    ):
        return
    if call.name in ("mul", "div") and (roots[0] is not None or call.name == "mul") and known[0].outside == 0:
        state.sparse[call.node] = Sparse(known[0].ids, 0)
    elif (
        isinstance(first, fx.Node)
        and roots[0] is not None
        and (outside := _OUTSIDE.get((call.name, float(roots[0].outside)))) is not None
    ):
        state.sparse[call.node] = Sparse(roots[0].ids, outside)


def _stays(state: Interpretation, value: Value) -> bool:
    return not isinstance(value.content, Element) or state.is_unmoved(value)


def _masks(call: Call, state: Interpretation, values: list[Value]) -> Value | None:
    """A number for each assignment spread over a one-hot mask of its expert: gates, once summed over the choices."""
    equals = [value for value in values if isinstance(value.content, Equals)]
    others = [value for value in values if not isinstance(value.content, Equals)]
    if call.name != "mul" or len(equals) != 1 or len(others) != 1 or not is_plain(others[0]):
        return None
    dims, contents = unify(values)
    mask = next(content for content in contents if isinstance(content, Equals))
    number = next(content for content in contents if not isinstance(content, Equals))
    return Value(dims, Special("spread", (mask, number)))


def _invert(call: Call, state: Interpretation) -> Value | None:
    """~mask of the chosen experts."""
    value = state.value(call["input"])
    opposite = {"chosen": "not chosen", "not chosen": "chosen"}
    if (
        isinstance(value.content, Special)
        and value.content.kind in opposite
        and fake_of(call["input"]).dtype is torch.bool
    ):
        return Value(value.dims, Special(opposite[value.content.kind], value.content.about))
    return None


def _masked_fill(call: Call, state: Interpretation) -> Value | None:
    """Masked ids; or logits.masked_fill(~chosen, number), which holds the number away from each token's experts."""
    value, mask = state.value(call["input"]), call["mask"]
    content = state.value(mask).content
    if content == Constant(False):
        return value
    if (ids := filled_ids(call, state)) is not None:
        return ids
    if (
        not is_plain(value)
        or not isinstance(content, Special)
        or content.kind != "not chosen"
        or not isinstance(call["value"], (int, float))
    ):
        return None
    if state.shape(call["input"]) != state.shape(mask) or not lie_as_made(state.value(mask)):
        return None
    if not distinct(content.about[0], state):
        return None
    state.sparse[call.node] = Sparse(content.about[0], call["value"])
    return None


def _check_constants(call: Call, state: Interpretation, operands: tuple[str, ...]) -> None:
    """A tensor of one number counts as a number: it must not decide the dtype of the result.

    Zeros that a sum of experts' outputs begins with may: the whole sum has their dtype.
    """
    arguments = [call[name] for name in operands if isinstance(call[name], fx.Node)]
    others = [node for node in arguments if not isinstance(state.value(node).content, Constant)]
    if call.name == "add" and len(arguments) == 2 and len(others) == 1 and _is_output(state.value(others[0]).content):
        constants = [node for node in arguments if node not in others]
        if state.value(constants[0]).content == Constant(0):
            return
    if len(others) < len(arguments) and others and _promoted(call, state, others) not in (None, state.dtype(call.node)):
        raise Refused(f"{call.name} with a constant tensor of another dtype than the rows'")


def _is_output(content: Content) -> bool:
    """Whether a product of a product is in the content: what an expert puts out."""
    return any(
        isinstance(inner, Contract) and any(isinstance(deeper, Contract) for deeper in walk(inner.left))
        for inner in walk(content)
    )


def _promoted(call: Call, state: Interpretation, arguments: list[Any]) -> torch.dtype | None:
    """What PyTorch's promotion gives for these operands without autocast; None if it cannot be told simply."""
    tensors = [fake_of(argument) for argument in arguments if isinstance(argument, fx.Node)]
    if not all(tensor.dtype.is_floating_point for tensor in tensors):
        return None
    dimensioned = [tensor.dtype for tensor in tensors if tensor.dim() > 0] or [tensor.dtype for tensor in tensors]
    result = dimensioned[0]
    for dtype in dimensioned[1:]:
        result = torch.promote_types(result, dtype)
    return result


def _rsub(call: Call, state: Interpretation) -> Value | None:
    """rsub(input, other) is other - input."""
    turned = Call(
        "sub", {"input": call["other"], "other": call["input"], "alpha": call["alpha"]}, call.inplace, call.node
    )
    return elementwise(turned, state)


def _clamp_one(call: Call, state: Interpretation) -> Value | None:
    bounds = {"min": call.arguments.get("min"), "max": call.arguments.get("max")}
    return elementwise(Call("clamp", {"input": call["input"], **bounds}, call.inplace, call.node), state)


def _made(call: Call, state: Interpretation) -> Value | None:
    """zeros, ones, full: a tensor of one number."""
    number: Any = {"zeros": 0, "ones": 1}.get(call.name)
    if number is None:
        number = call["fill_value"]
    if not isinstance(number, (int, float)):
        return None
    if isinstance(number, float) and not state.dtype(call.node).is_floating_point:
        return None
    return constant(Constant(in_dtype(number, state.dtype(call.node))), state.shape(call.node), call.node)


def _unwritten(call: Call, state: Interpretation) -> None:
    """empty: memory that means nothing yet."""


def _softmax(call: Call, state: Interpretation) -> Value | None:
    """softmax along experts keeps a leaf sparse: -inf outside becomes 0."""
    source = call["input"]
    value = state.value(source)
    if is_plain(value) and len(value.dims) == 2 and call["dim"] in (-1, 1):
        _propagate_sparsity(Call("softmax", {"input": source}, False, call.node), state)
    return None


RULES: dict[str, Rule] = {
    **{name: elementwise for name in ELEMENTWISE if name != "div"},
    "rsub": _rsub,
    "clamp_min": _clamp_one,
    "clamp_max": _clamp_one,
    "empty": _unwritten,
    "zeros": _made,
    "ones": _made,
    "full": _made,
    "full_like": _made,
    "new_full": _made,
    "softmax": _softmax,
    "invert": _invert,
    "masked_fill": _masked_fill,
}

__all__ = ["ELEMENTWISE", "RULES", "Content", "elementwise"]
