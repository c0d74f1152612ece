"""Rules for matrix products.

Everything is an einsum over named dimensions; grouped GEMMs look their expert up by the rows' sorted ids. Operands that
autocast converts unseen are converted in the terms.
"""

from __future__ import annotations

import contextlib
from typing import TypeAlias

import torch
from torch import fx

from moecompile.passes import radix, rules_dispatch, substitution, terms
from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import Call
from moecompile.passes.interpret import (
    Combine,
    Interpretation,
    Passed,
    Refused,
    Rule,
    check_distinct,
    is_plain,
    is_routed,
)
from moecompile.passes.terms import (
    Apply,
    Atom,
    Constant,
    Content,
    Contract,
    Element,
    Group,
    Index,
    Looked,
    Offsets,
    Part,
    Total,
    Value,
    Variable,
)
from moecompile.passes.unify import _choose, _deduplicated, _renaming, per_expert, run_once_through, unify
from moecompile.runtime.elementwise import dtype_name

# of each operand, the dtype that autocast gives it, or None
Casts: TypeAlias = "tuple[str | None, ...]"
_LOWER = (torch.bfloat16, torch.float16)


def einsum(
    state: Interpretation,
    node: fx.Node,
    left: Value,
    right: Value,
    equation: str,
    casts: Casts = (None, None),
) -> Value | None:
    """A product of two tensors by a two-operand equation in single letters, e.g. "sf,fn->sn"."""
    inputs, output = equation.split("->")
    first, second = inputs.split(",")
    if len(first) != len(left.dims) or len(second) != len(right.dims):
        raise Refused(f"a product {equation} of tensors with other dimensions")
    with contextlib.suppress(Passed):
        return rules_dispatch.einsum(state, node, left, right, equation, casts)
    if (
        is_plain(left)
        and is_plain(right)
        and not _expert_like(state, left, right)
        and not _expert_like(state, right, left)
    ):
        return None
    if len(set(first)) != len(first) or len(set(second)) != len(second):
        raise Refused(f"a product {equation} along a diagonal")
    if any(isinstance(value.content, (Index, Constant, terms.Count, Offsets)) for value in (left, right)):
        raise Refused("a product of indices")
    groups: dict[str, Group] = {}
    for label in dict.fromkeys(first + second):
        held = [
            value.dims[labels.index(label)] for value, labels in ((left, first), (right, second)) if label in labels
        ]
        groups[label] = _choose(held)
    contracted = [label for label in groups if label not in output]
    if any(label not in first or label not in second for label in contracted):
        raise Refused(f"a product {equation} that sums one operand alone")
    bound: list[Atom] = []
    summed: list[Atom] = []
    for label in contracted:
        if any(atom.variable.rank >= 3 for atom in groups[label]):
            raise Refused("a product that sums over rows in an order of their own")
        if groups[label] and (
            all(atom.variable.kind == "ids" for atom in groups[label]) or _is_gate(state, left, right)
        ):
            summed += groups[label]
        else:
            size = radix.group_size(groups[label])
            groups[label] = (Atom(Variable("bound", (node, label, equation)), 1, size),) if size != 1 else ()
            bound += groups[label]
    check_distinct(Value(tuple(groups.values()), Constant(0)))
    contents = [
        _converted(_named(value, labels, groups), dtype)
        for value, labels, dtype in ((left, first, casts[0]), (right, second, casts[1]))
    ]
    content: Content = _summed(contents, bound, tuple(summed), state.dtype(node))
    result = Value(tuple(groups[label] for label in output), content)
    if isinstance(content, Total):
        state.combine(Combine(node, result))
        return state.leaf(node)
    return result


def _is_gate(state: Interpretation, left: Value, right: Value) -> bool:
    """Whether one operand is a sparse leaf of gates and the other the experts' outputs.

    Their product sums over experts.
    """
    gates = [state.sparse_leaf(value.content) is not None for value in (left, right)]
    return gates in ([True, False], [False, True]) and is_routed(right if gates[0] else left)


def _named(value: Value, labels: str, groups: dict[str, Group]) -> Content:
    pairs: list[tuple[Atom, Part]] = []
    for label, group in zip(labels, value.dims, strict=True):
        target = groups[label]
        if group and target and target[0].variable.kind == "bound":
            aligned = radix.align(group, target)
            if aligned is None or any(old.variable.rank >= 3 for old, _ in aligned):
                raise Refused("a product over dimensions of different extents")
            pairs += aligned
        elif group:
            pairs += _renaming(group, target)
    return substitution.rename(value, _deduplicated(pairs)).content


def _summed(contents: list[Content], bound: list[Atom], summed: Group, dtype: torch.dtype) -> Content:
    left, right = contents
    content: Content
    if len(bound) == 1:
        content = Contract(left, right, bound[0], dtype)
    elif not bound:
        content = Apply("mul", (left, right))
    else:
        raise Refused("a product over several feature dimensions at once")
    return Total(content, summed, dtype) if summed else content


def _expert_like(state: Interpretation, value: Value, other: Value) -> bool:
    """Whether a plain value may be stacked expert weights.

    An input of three dimensions, a parameter rather than not, casts and views aside. A product of two parameters is
    another weight: an adapter's, to be added to the experts' own.
    """
    source = _input_of(state, value)
    if source is None or len(value.dims) != 3:
        return False
    return not _is_parameter(_input_of(state, other))


def _input_of(state: Interpretation, value: Value) -> fx.Node | None:
    content = value.content
    if not is_plain(value) or not isinstance(content, Element):
        return None
    root = content.root
    if not isinstance(root, fx.Node):
        return None
    while (call := state.calls.get(root)) is not None and call.name in ("cast", "contiguous", "clone"):
        root = call["input"]
    return root if root.op in ("placeholder", "get_attr") else None


def _is_parameter(node: fx.Node | None) -> bool:
    return node is not None and (
        node.op == "get_attr" or isinstance(fake_of(node), torch.nn.Parameter) or node.type is torch.nn.Parameter
    )


def casts_of(state: Interpretation, node: fx.Node, *operands: fx.Node) -> Casts:
    """What autocast makes of a product's operands: it gives them the lower precision that the result has.

    Raises Refused for any other mixture of dtypes.
    """
    dtypes, result = [state.dtype(operand) for operand in operands], state.dtype(node)
    lowered = result in _LOWER and all(dtype in (torch.float32, *_LOWER) for dtype in dtypes)
    if not lowered and set(dtypes) != {result}:
        names = sorted({dtype_name(dtype) for dtype in (*dtypes, result)})
        raise Refused(f"a product of mixed dtypes {names}")
    return tuple(None if dtype == result else dtype_name(result) for dtype in dtypes)


def _converted(content: Content, dtype: str | None) -> Content:
    return content if dtype is None else Apply("cast", (content,), (dtype,))


def _grouped_mm(call: Call, state: Interpretation) -> Value | None:
    if call.arguments.get("bias") is not None or call["offs"] is None:
        raise Refused("a grouped GEMM with a bias or without offsets")
    weight: fx.Node = call.arguments.get("mat2") or call["weight"]
    rows, weights, offsets = state.value(call["input"]), state.value(weight), state.value(call["offs"])
    if len(rows.dims) != 2 or len(weights.dims) != 3:
        raise Refused("a grouped GEMM that is not rows by stacked weights")
    if isinstance(offsets.content, Offsets) and not per_expert(offsets):
        raise Refused("a grouped GEMM whose offsets are not in the experts' order")
    return grouped(state, call.node, rows, weights, offsets.content, casts_of(state, call.node, call["input"], weight))


def grouped(state: Interpretation, node: fx.Node, rows: Value, weights: Value, ends: Content, casts: Casts) -> Value:
    """Rows sorted by expert times their expert's matrix: row s of assignment j meets weights[ids[j]]."""
    order = rows.dims[0][0] if len(rows.dims[0]) == 1 else None
    if order is None or order.variable.kind != "order" or order.size != radix.group_size(order.variable.group):
        raise Refused("a grouped GEMM whose rows are not in a sorted order of all assignments")
    if not isinstance(ends, Offsets):
        raise Refused("a grouped GEMM whose offsets are not the running sum of the experts' counts")
    if order.variable.by != ends.key:
        raise Refused("a grouped GEMM whose rows are sorted by other ids than its offsets count")
    if not run_once_through([order.variable.group], ends.key):
        raise Refused("a grouped GEMM whose rows are sorted by ids that repeat, where its offsets count each once")
    if radix.group_size(weights.dims[0]) != ends.num_experts or len(weights.dims[0]) > 1:
        raise Refused(
            f"a grouped GEMM of {radix.group_size(weights.dims[0])} experts with offsets of {ends.num_experts}"
        )
    content = weights.content
    if weights.dims[0]:
        content = substitution.substitute(content, weights.dims[0][0], Looked(ends.key, ends.num_experts))
    result = einsum(state, node, rows, Value(weights.dims[1:], content), "sf,fn->sn", casts)
    assert result is not None
    return result


def _fallback(call: Call, state: Interpretation) -> Value | None:
    arguments = {"input": call["input"], "mat2": call["weight"], "offs": call["offs"], "bias": None}
    return _grouped_mm(Call("grouped_mm", arguments, False, call.node), state)


def _linear(call: Call, state: Interpretation) -> Value | None:
    value, weight = state.value(call["input"]), state.value(call["weight"])
    if is_plain(value) and is_plain(weight):
        return None
    casts = casts_of(state, call.node, call["input"], call["weight"])
    batch = "abcdefgh"[: len(value.dims) - 1]
    result = einsum(state, call.node, value, weight, f"{batch}y,zy->{batch}z", casts)
    if result is None or call["bias"] is None:
        return result
    return _with_bias(result, state, call.node, call["bias"])


def _matmul(call: Call, state: Interpretation) -> Value | None:
    second = "mat2" if "mat2" in call.arguments else "other"
    left, right = state.value(call["input"]), state.value(call[second])
    if len(left.dims) < 1 or len(right.dims) < 1 or (is_plain(left) and is_plain(right) and len(right.dims) != 3):
        return None
    return _matrix_product(state, call, left, right, casts_of(state, call.node, call["input"], call[second]))


def _matrix_product(state: Interpretation, call: Call, left: Value, right: Value, casts: Casts) -> Value | None:
    if len(right.dims) == 1 or len(left.dims) == 1:
        raise Refused("a product with a vector")
    batch = max(len(left.dims), len(right.dims)) - 2
    letters = "abcdefgh"[:batch]
    # a batch dimension of size one on one side is broadcast: leave it out there
    spans = [letters[batch - (len(value.dims) - 2) :] for value in (left, right)]
    kept = [
        [label for label, group in zip(span, value.dims, strict=False) if group or len(span) == 1]
        for span, value in zip(spans, (left, right), strict=True)
    ]
    trimmed = [
        Value(
            tuple(group for label, group in zip(span, value.dims, strict=False) if label in keep) + value.dims[-2:],
            value.content,
        )
        for span, keep, value in zip(spans, kept, (left, right), strict=True)
    ]
    present = [label for label in letters if label in kept[0] or label in kept[1]]
    equation = f"{''.join(kept[0])}xy,{''.join(kept[1])}yz->{''.join(present)}xz"
    result = einsum(state, call.node, trimmed[0], trimmed[1], equation, casts)
    if result is None:
        return None
    dims = list(result.dims)
    for number, label in enumerate(letters):
        if label not in present:
            dims.insert(number, ())
    return Value(tuple(dims), result.content)


def _add_product(call: Call, state: Interpretation) -> Value | None:
    """addmm, baddbmm: input + first @ second."""
    first, second = ("mat1", "mat2") if call.name == "addmm" else ("batch1", "batch2")
    left, right = state.value(call[first]), state.value(call[second])
    if is_plain(left) and is_plain(right):
        return None
    if call["beta"] != 1 or call["alpha"] != 1:
        raise Refused(f"{call.name} with a scale")
    product = _matrix_product(state, call, left, right, casts_of(state, call.node, call[first], call[second]))
    return None if product is None else _with_bias(product, state, call.node, call["input"])


def _with_bias(product: Value, state: Interpretation, node: fx.Node, bias: fx.Node) -> Value:
    """product + bias."""
    (dtype,) = casts_of(state, node, bias)
    dims, contents = unify([product, state.value(bias)])
    return Value(dims, Apply("add", (contents[0], _converted(contents[1], dtype))))


def _einsum(call: Call, state: Interpretation) -> Value | None:
    operands = call["operands"]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = operands[0]
    equation = str(call["equation"]).replace(" ", "")
    values = [state.value(operand) for operand in operands]
    if len(values) < 2 or "..." in equation or "->" not in equation:
        raise Refused(f"einsum {equation!r}")
    casts: list[str | None] = list(casts_of(state, call.node, *operands))
    inputs, output = equation.split("->")
    labels = inputs.split(",")
    while len(values) > 2:  # pairwise from the left, as the sum is the same in any order
        kept = "".join(
            label
            for label in dict.fromkeys(labels[0] + labels[1])
            if label in output or any(label in rest for rest in labels[2:])
        )
        equation = f"{labels[0]},{labels[1]}->{kept}"
        partial = einsum(state, call.node, values[0], values[1], equation, (casts[0], casts[1]))
        if partial is None:
            return None
        values[:2], labels[:2], casts[:2] = [partial], [kept], [None]
    return einsum(state, call.node, values[0], values[1], f"{labels[0]},{labels[1]}->{output}", (casts[0], casts[1]))


RULES: dict[str, Rule] = {
    "grouped_mm": _grouped_mm,
    "grouped_mm_fallback": _fallback,
    "linear": _linear,
    "mm": _matmul,
    "bmm": _matmul,
    "matmul": _matmul,
    "addmm": _add_product,
    "baddbmm": _add_product,
    "einsum": _einsum,
}
