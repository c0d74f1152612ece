"""Blocks of the capacity form: empty places reach nothing; the operator's expert ids are made of the graph's places.

An empty place holds a row of zeros. Its expert computes something from it (biases), the combine tensor multiplies that
by 0, and its gradient is 0 times what the experts' operations have as derivative there. So nothing reaches a token or
a weight as long as all these numbers are finite: `check_vacant` proves that, for finite parameters.

Where the dispatch tensor is the combine tensor made a mask (`combine.bool()`), an assignment whose weight is exactly 0
is not put in: its expert sees zeros. The token gets 0 either way. The weight's gradient is <gradient, expert(0)>. If
expert(0) is 0, the assignment is dropped in the operator as well, which gives the same 0. If it is not (biases), the
operator's rows are multiplied by [weight != 0], as the model's are.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from moecompile.codegen import expression
from moecompile.passes import radix, substitution, terms
from moecompile.passes.aliases import fake_of
from moecompile.passes.capacity import Support
from moecompile.passes.dense import vanishes
from moecompile.passes.interpret import Interpretation, Refused, walk
from moecompile.passes.layout import Layout
from moecompile.passes.places import Number, Running
from moecompile.passes.radix import difference
from moecompile.passes.recognise import Block, read, weight_steps
from moecompile.passes.routing import ASSIGNMENT, Column, Routing
from moecompile.passes.site import Operand
from moecompile.passes.substitution import substitute
from moecompile.passes.terms import Apply, Atom, Content, Fixed, Group, Looked, Size, Special, Total, Value
from moecompile.runtime.elementwise import vjp

# finite, with finite derivatives, wherever their arguments are finite
_FINITE = frozenset(
    "add sub mul neg exp sigmoid logsigmoid silu tanh relu relu6 leaky_relu elu celu selu gelu erf softplus mish"
    " hardswish hardsigmoid clamp minimum maximum abs sign square cast".split()
)

Steps: TypeAlias = "tuple[tuple[str, tuple[object, ...]], ...]"


def has_places(block: Block) -> bool:
    """Whether a block is of this form: its rows stand at places of their experts."""
    return block.key is not None and isinstance(block.key.root, Routing)


def read_block(content: Total, tokens: Group) -> tuple[Block, str | None]:
    """A block, and the comparison with 0 by which assignments are dropped for their weight: "eq", "le", or None."""
    if any(isinstance(inner, Special) and inner.kind == "place" for inner in walk(content)):
        raise Refused("what experts compute differs by the place of a row among its expert's")
    supports = {inner for inner in walk(content) if isinstance(inner, Support)}
    if not supports:
        return read(content, tokens), None
    if len(supports) > 1:
        raise Refused("tokens are put in by two different masks of weights")
    (support,) = supports
    block = read(Total(_without(content.content), content.over, content.dtype), tokens)
    if block.weight == support.weight and vanishes(block, "x"):
        return block, "le" if support.positive else "eq"
    return read(Total(_spelled(content.content), content.over, content.dtype), tokens), None


def _without(content: Content) -> Content:
    """The content without the factors [weight != 0]."""
    if isinstance(content, Apply):
        rest = tuple(argument for argument in content.args if not isinstance(argument, Support))
        if content.op == "mul" and len(rest) == 1:
            return _without(rest[0])
        return Apply(content.op, tuple(_without(argument) for argument in content.args), content.params)
    if isinstance(content, terms.Contract):
        return terms.Contract(_without(content.left), _without(content.right), content.over, content.dtype)
    return content


def _spelled(content: Content) -> Content:
    """The content with [weight != 0] as arithmetic."""
    if isinstance(content, Support):
        sign = Apply("relu" if content.positive else "abs", (Apply("sign", (content.weight,)),))
        return sign if content.dtype is None else Apply("cast", (sign,), (content.dtype,))
    if isinstance(content, Apply):
        return Apply(content.op, tuple(_spelled(argument) for argument in content.args), content.params)
    if isinstance(content, terms.Contract):
        return terms.Contract(_spelled(content.left), _spelled(content.right), content.over, content.dtype)
    return content


# ---- empty places


def check_vacant(block: Block) -> None:
    """Raises Refused unless what an expert makes of a row of zeros, and its derivative there, is finite."""
    assert block.out is not None
    row = _at_zero(expression.parse(block.input), {"x": 0.0})
    biased = any(product.bias is not None for product in block.inner)
    hidden = 0.0 if row == 0 and not biased else None
    activation = _at_zero(expression.parse(block.activation), dict.fromkeys(("gate", "up", "hidden"), hidden))
    out = 0.0 if activation == 0 and block.out.bias is None else None
    _at_zero(expression.parse(block.output), {"out": out})


def _at_zero(tree: expression.Expression, known: dict[str, float | None]) -> float | None:
    """An expression's value; None for one that is not known but finite. A routing weight is finite and not known."""
    if isinstance(tree, expression.Leaf):
        return known.get(tree.name)
    if isinstance(tree, expression.Constant):
        return float(tree.value)
    values = [_at_zero(argument, known) for argument in tree.args]
    if tree.op == "mul" and 0.0 in values:
        return 0.0
    if any(value is None for value in values):
        if tree.op in _FINITE or (tree.op == "div" and (values[1] or _is_positive(tree.args[1]))):
            return None
        raise Refused(f"{tree.op} of what stands at an expert's empty places, which may not be finite")
    return _evaluated(tree, [value for value in values if value is not None])


def _is_positive(tree: expression.Expression) -> bool:
    """Whether an expression is a number above 0 plus one that is not below it: 1 + exp(-x)."""
    if not isinstance(tree, expression.Apply) or tree.op != "add":
        return False
    constants = [argument for argument in tree.args if isinstance(argument, expression.Constant)]
    others = [argument for argument in tree.args if isinstance(argument, expression.Apply)]
    return (
        len(constants) == len(others) == 1
        and constants[0].value > 0
        and others[0].op in ("exp", "sigmoid", "square", "abs", "relu", "softplus")
    )


def _evaluated(tree: expression.Apply, values: list[float]) -> float:
    names = [f"a{number}" for number in range(len(values))]
    leaves: list[expression.Expression] = [
        argument if isinstance(argument, expression.Constant) else expression.Leaf(name)
        for name, argument in zip(names, tree.args, strict=True)
    ]
    with unset_fake_temporarily(), torch.no_grad():
        at = {
            name: torch.tensor(value, dtype=torch.float32)
            for name, value, leaf in zip(names, values, leaves, strict=True)
            if isinstance(leaf, expression.Leaf)
        }
        result, pullback = vjp(expression.Apply(tree.op, tuple(leaves), tree.params), at, tuple(at))
        found = [result, *pullback(torch.ones_like(result)).values()]
        if not all(bool(number.isfinite()) for number in found):
            raise Refused(f"{tree.op} has no finite value or derivative at an expert's empty places")
        return float(result)


# ---- the operator's expert ids and weights


def routing_operands(
    block: Block, comparison: str | None, state: Interpretation, layout: Layout, end: fx.Node
) -> dict[str, Operand]:
    """The expert ids (T, K), -1 where an assignment was dropped, and the weights (T, K); made of nodes before `end`."""
    check_vacant(block)
    assert block.key is not None
    routing: Any = block.key.root
    raw, kept = [], []
    for column in routing.columns:
        ids = _ids(column, routing)
        raw.append(ids)
        kept.append(_masked(ids, _full(column, routing, ids, state, layout, end)))
    operands = {"expert_ids": _side_by_side(kept)}
    if block.weight is not None:
        weights = operands["weights"] = _weights(block, _side_by_side(raw), state)
        if comparison is not None:
            dropped = Operand(weights.node, (*weights.steps, (comparison, (0,))), weights.parts)
            operands["expert_ids"] = _masked(operands["expert_ids"], dropped)
    return operands


def _weights(block: Block, ids: Operand, state: Interpretation) -> Operand:
    """The weights (T, K): a tensor, one tensor a choice, or looked up by the ids as they are before any is dropped."""
    assert block.weight is not None
    steps = weight_steps(block.weight, block)
    assert steps is not None
    steps = tuple(("gather", (1, ids)) if step == "gather" else (step, arguments) for step, arguments in steps)
    root = block.weight.root
    if isinstance(root, fx.Node):
        return Operand(root, steps)
    first, *others = root.nodes
    if any((state.shape(other), state.dtype(other)) != (state.shape(first), state.dtype(first)) for other in others):
        raise Refused("choices whose weights differ in shape or dtype")
    return Operand(first, (("stack", ()), *steps), root.nodes)


def _masked(ids: Operand, dropped: Operand) -> Operand:
    return Operand(ids.node, (*ids.steps, ("masked_fill", (dropped, -1))), ids.parts)


def _side_by_side(columns: list[Operand]) -> Operand:
    first, *others = columns
    return Operand(first.node, (*first.steps, ("cat", tuple(others))), first.parts) if others else first


def _shared(routing: Routing) -> bool:
    return len(routing.columns) == 1 and routing.top_k != 1


def _layouts(routing: Routing) -> dict[str, Group]:
    """The digits of a column's assignments, in the orders in which a tensor may hold them."""
    tokens = routing.token_digits
    if not _shared(routing):
        return {"tokens": tokens}
    choice = Atom(ASSIGNMENT, 1, routing.top_k)
    return {"tokens": (*tokens, choice), "choices": (choice, *tokens)}


def _ids(column: Column, routing: Routing) -> Operand:
    """The expert ids of a column, (T, its choices)."""
    root, index = column.key.root, column.key.index
    assert isinstance(root, fx.Node)
    fixed = [(place, part) for place, part in enumerate(index) if isinstance(part, Fixed)]
    rest = tuple(part for part in index if isinstance(part, Atom))
    for order, digits in _layouts(routing).items():
        if rest != radix.merge(digits) or len(rest) + len(fixed) != len(index):
            continue
        if not fixed:
            return Operand(root, _rows(routing, order))
        if len(fixed) == 1 and not _shared(routing) and isinstance(fixed[0][1].extent, int):
            ((place, part),) = fixed
            if place == len(index) - 1:
                return Operand(root, (("reshape", (-1, part.extent)), ("narrow", (1, part.index, 1))))
            if place == 0:
                steps = (("reshape", (part.extent, -1)), ("narrow", (0, part.index, 1)), ("reshape", (-1, 1)))
                return Operand(root, steps)
    raise Refused("expert ids that do not lie one row a token")


def _rows_of_own(routing: Routing, order: str, ids: Operand) -> Steps:
    """The steps from a tensor of (assignments in this order, experts) to each one's own expert, (T, choices)."""
    experts = routing.num_experts
    assert isinstance(experts, int)
    if not _shared(routing):
        return (("reshape", (-1, experts)), ("gather", (1, ids)))
    own = Operand(ids.node, (*ids.steps, ("unsqueeze", (-1,))), ids.parts)
    return (*_rows(routing, order, (experts,)), ("gather", (2, own)), ("squeeze", (-1,)))


def _rows(routing: Routing, order: str, last: tuple[int, ...] = ()) -> Steps:
    """The steps from a tensor in this order to (T, choices), or (T, choices, last)."""
    width = routing.top_k if _shared(routing) else 1
    if not isinstance(width, int):
        raise Refused("a symbolic number of choices")
    if order == "tokens":
        return (("reshape", (-1, width, *last)),)
    return (("reshape", (width, -1, *last)), ("transpose", (0, 1)))


def _full(
    column: Column, routing: Routing, ids: Operand, state: Interpretation, layout: Layout, end: fx.Node
) -> Operand:
    """Whether an assignment's place is not below the bound, (T, its choices); read off a tensor of places."""
    found: dict[bool, tuple[fx.Node, str, int]] = {}
    for node, value in state.values.items():
        if not isinstance(value.content, Number) or not node < end or _is_written_later(node, layout):
            continue
        expert = _expert_of(value)
        for order, digits in _layouts(routing).items():
            more = _difference(value, expert, column, routing, digits)
            if more is not None:
                found[expert is None] = (node, order, more)
    if not found:
        raise Refused("the places of assignments are not kept, so that dropped ones cannot be told")
    node, order, more = found[True in found]
    steps = _rows(routing, order) if True in found else _rows_of_own(routing, order, ids)
    return Operand(node, (*steps, *_at_or_above(column.bound + more, state, end)))


def _at_or_above(bound: Size, state: Interpretation, end: fx.Node) -> Steps:
    """The comparison with a bound; a symbolic one is made of a number of the graph that differs by a constant."""
    if isinstance(bound, int):
        return (("ge", (bound,)),)
    for node in state.graph.nodes:
        if node is end:
            break
        if isinstance(fake_of(node), torch.SymInt):
            less = difference(radix.size_of(fake_of(node)), bound)
            if less is not None:
                return (*((("add", (less,)),) if less else ()), ("ge", (Operand(node),)))
    raise Refused("a capacity of symbolic size that the graph does not hold")


def _is_written_later(node: fx.Node, layout: Layout) -> bool:
    """Whether the numbers at the end of the graph are not those that the node made."""
    return any(
        layout.position[writer] > layout.position[node]
        and any(layout.aliases.share(target, node) for target in targets)
        for writer, targets in layout.writers.items()
    )


def _expert_of(value: Value) -> Atom | None:
    """The last dimension of a tensor of places, if it runs over experts."""
    content = value.content
    assert isinstance(content, Number)
    experts = {item.expert for item, _ in content.items if isinstance(item, Running) and isinstance(item.expert, Atom)}
    atoms = [atom for group in value.dims for atom in group]
    return next((expert for expert in experts if isinstance(expert, Atom) and atoms[-1:] == [expert]), None)


def _difference(value: Value, expert: Atom | None, column: Column, routing: Routing, digits: Group) -> int | None:
    """By how much a tensor of these digits exceeds the column's places; None if it holds something else."""
    if expert is not None and expert != Atom(expert.variable, 1, routing.num_experts):
        return None
    atoms = tuple(atom for group in value.dims for atom in group if atom != expert)
    pairs = radix.align(atoms, digits)
    if pairs is None or any(old.variable.rank >= 3 for old, _ in pairs):
        return None
    content = substitution.rename(Value((), value.content), pairs).content
    if expert is not None:
        content = substitute(content, expert, Looked(column.key, routing.num_experts))
    assert isinstance(content, Number)
    if content.where or content.most is not None or content.items != column.place.items:
        return None
    return content.constant - column.place.constant
