"""Read a MoE block off the meaning of a sum.

A combine's content is one term, whatever the model's code looked like:

    sum over k of  output( a @ W_out[ids[t,k]] + b_out, w[t,k] )
        with  a = activation( row @ W_in[ids[t,k]] + b_in, ... )  and  row = input( x[t], w[t,k] )

This room takes such a term apart from the outside in: the second GEMM, what happens to its result, the activation, the
first GEMM, what happens to the token before it. Every leaf must be one of x, routing weight, expert weight or bias, at
exactly the index that the fused operator assumes; anything else is a `Refused` that says what was found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import fx

from moecompile.codegen import expression
from moecompile.passes import radix, substitution, terms
from moecompile.passes.interpret import Refused, fake_of, walk
from moecompile.passes.site import Operand
from moecompile.passes.terms import (
    Affine,
    Apply,
    Atom,
    Constant,
    Content,
    Contract,
    Element,
    Fixed,
    Group,
    Looked,
    Part,
    Size,
    Stacked,
    Total,
)

Match: TypeAlias = "Callable[[Content], str | None]"


@dataclass
class Block:
    """The parts of one block, filled in while its term is read."""

    tokens: Group
    choices: Group
    key: Element | None = None  # the expert id of an assignment
    num_experts: Size = 0
    x: Element | None = None
    weight: Element | None = None
    out: Product | None = None
    inner: list[Product] = field(default_factory=list)  # gate then up, or hidden
    input: str = ""
    activation: str = ""
    output: str = ""
    gate_up: str = ""
    operands: dict[str, Operand] = field(default_factory=dict)

    @property
    def flat(self) -> tuple[Atom, ...]:
        """The assignment's digits, token first."""
        return radix.merge((*self.tokens, *self.choices))


@dataclass(frozen=True)
class Product:
    """rows @ weight[expert] (+ bias[expert]).

    `start`, `step`, `width` say which of the weight's `extent` output features these are.
    """

    content: Content
    rows: Content
    over: Atom
    weight: fx.Node | Stacked
    transposed: bool
    start: int
    step: int
    width: Size
    extent: Size
    features: tuple[Part, ...]  # the weight's index of its output features
    bias: fx.Node | Stacked | None = None
    cast: str | None = None  # the dtype that the weight is converted to before the product
    bias_cast: str | None = None


def read(total: Total, tokens: Group) -> Block:
    """Take the term of a combine apart. Raises Refused with the first thing that is not as it must be."""
    block = Block(tokens, total.over)
    _find_key(block, total.content)
    block.output = _text(total.content, block, lambda content: _out_leaf(content, block))
    if block.out is None:
        raise Refused("a sum over a token's choices that holds no expert GEMM")
    block.activation = _text(block.out.rows, block, lambda content: _inner_leaf(content, block))
    _name_gate_and_up(block)
    over = block.inner[0].over
    rows = {
        substitution.substitute(product.rows, product.over, over)
        for product in block.inner
        if product.over.size == over.size
    }
    if len(rows) != 1:
        raise Refused("gate and up are computed from different rows")
    block.input = _text(rows.pop(), block, lambda content: _x_leaf(content, block))
    if block.x is None:
        raise Refused("the first expert GEMM does not read a token's row")
    return block


def _find_key(block: Block, content: Content) -> None:
    """The one expert id by which all expert weights are looked up."""
    keys = {
        (part.content, part.extent)
        for inner in walk(content)
        if isinstance(inner, Element)
        for part in inner.index
        if isinstance(part, Looked) and _is_weight(inner)
    }
    if not keys:
        raise Refused("a sum over assignments that uses no expert weights")
    if len(keys) > 1:
        raise Refused("expert weights are looked up by different ids, or hold different numbers of experts")
    ((key, num_experts),) = keys
    if not isinstance(key, Element) or key.index != block.flat:
        raise Refused("expert ids that are not one for each assignment, in the assignments' own order")
    block.key, block.num_experts = key, num_experts


def _is_weight(content: Element) -> bool:
    return any(isinstance(part, Looked) for part in content.index) and any(
        isinstance(part, (Atom, Affine)) and _is_feature(part) for part in content.index
    )


def _is_feature(part: Part) -> bool:
    atom = part.atom if isinstance(part, Affine) else part
    return isinstance(atom, Atom) and atom.variable.kind in ("bound", "leaf", "slice", "free")


def _text(content: Content, block: Block, match: Match) -> str:
    return expression.to_text(_expression(content, block, match))


def _expression(content: Content, block: Block, match: Match) -> expression.Expression:
    name = match(content) or _weight_leaf(content, block)
    if name is not None:
        return expression.Leaf(name)
    if isinstance(content, Constant):
        return expression.Constant(content.value)
    if isinstance(content, Apply):
        if content.op not in expression.OPERATIONS:
            raise Refused(f"{content.op} is not an operation that activations are written in")
        return expression.Apply(
            content.op, tuple(_expression(argument, block, match) for argument in content.args), content.params
        )
    raise _not_understood(content)


def _not_understood(content: Content) -> Refused:
    if isinstance(content, Element) and isinstance(content.root, fx.Node):
        return Refused(
            f"{content.root} takes part in the expert computation, and is neither a token's row, a routing weight "
            "nor an expert's weight there",
            content.root,
        )
    if isinstance(content, Contract):
        return Refused("a further matrix product inside the expert computation")
    return Refused(f"{type(content).__name__.lower()} inside the expert computation")


def _weight_leaf(content: Content, block: Block) -> str | None:
    """The routing weight: one number for each assignment."""
    if (
        not isinstance(content, Element)
        or any(isinstance(part, (Affine, Fixed)) for part in content.index)
        or weight_steps(content, block) is None
    ):
        return None
    roots = content.root.nodes if isinstance(content.root, Stacked) else (content.root,)
    if isinstance(content.root, Stacked) and any(isinstance(part, Looked) for part in content.index):
        return None
    for root in roots:
        if not fake_of(root).dtype.is_floating_point:
            raise Refused(f"the routing weight {root} is not a floating-point number", root)
    if block.weight is not None and block.weight != content:
        raise Refused(f"two routing weights, {block.weight.root} and {content.root}, in one block")
    block.weight = content
    return "weight"


def weight_steps(content: Element, block: Block) -> tuple[tuple[str, tuple[object, ...]], ...] | None:
    """The operations that bring a routing weight to (tokens, choices), or None if its index is not an assignment's."""
    top_k = radix.group_size(block.choices)
    token_major, choice_major = block.flat, radix.merge((*block.choices, *block.tokens))
    index = content.index
    if index == token_major:
        return (("reshape", (-1, top_k)),)
    if index == choice_major:
        return (("reshape", (top_k, -1)), ("transpose", (0, 1)))
    if index == block.tokens:
        return (("reshape", (-1, 1)), ("expand", (-1, top_k)))
    if block.key is not None and index == (*block.tokens, Looked(block.key, block.num_experts)):
        return (("reshape", (-1, block.num_experts)), ("gather", ("expert_ids",)))
    if block.key is not None and index == (Looked(block.key, block.num_experts), *block.tokens):
        return (("reshape", (block.num_experts, -1)), ("transpose", (0, 1)), ("gather", ("expert_ids",)))
    return None


# ---- GEMMs


def _product(content: Content, block: Block) -> Product | None:
    """content as rows @ weight[expert], with a bias if one is added; None if it is something else."""
    if isinstance(content, Contract):
        for side, rows in ((content.right, content.left), (content.left, content.right)):
            weight, dtype = terms.uncast(side)
            if isinstance(weight, Element) and _by_expert(weight, block):
                return _weight_product(content, rows, weight, dtype, block)
        return None
    if isinstance(content, Apply) and content.op == "add" and len(content.args) == 2:
        for product, side in (content.args, content.args[::-1]):
            bias, dtype = terms.uncast(side)
            found = _product(product, block) if isinstance(product, Contract) else None
            if found is not None and isinstance(bias, Element) and _by_expert(bias, block):
                return _with_bias(content, found, bias, dtype, block)
    return None


def _by_expert(content: Element, block: Block) -> bool:
    """Whether this is a tensor with the experts first and no tokens in it."""
    looked = Looked(block.key, block.num_experts) if block.key is not None else None
    variables = {atom.variable for atom in block.flat}
    return (
        bool(content.index)
        and content.index[0] == looked
        and not any(isinstance(part, Atom) and part.variable in variables for part in content.index)
    )


def _weight_product(content: Contract, rows: Content, weight: Element, dtype: str | None, block: Block) -> Product:
    assert block.key is not None
    expert, *rest = weight.index
    if expert != Looked(block.key, block.num_experts):
        raise Refused(f"the experts are not the first dimension of {weight.root}")
    if content.over not in rest:
        raise Refused(f"a product that does not sum over a whole dimension of {weight.root}")
    place = rest.index(content.over)
    features = rest[:place] + rest[place + 1 :]
    if place not in (0, len(rest) - 1) or weight.written is not None:
        raise Refused(f"the weight {weight.root} does not hold one matrix for each expert")
    start, step, width, extent = _affine(features, weight.root)
    return Product(
        content,
        rows,
        content.over,
        weight.root,
        place == 0 and bool(features),
        start,
        step,
        width,
        extent,
        tuple(features),
        cast=dtype,
    )


def _unit_product(content: Content, block: Block) -> Product | None:
    """An expert of one unit: its output is a number times a row of the second weight, a product without a sum."""
    if not isinstance(content, Apply) or content.op != "mul":
        return None
    for rows, weight in (content.args, content.args[::-1]):
        if (
            isinstance(weight, Element)
            and _by_expert(weight, block)
            and len(weight.index) > 1
            and weight.written is None
        ):
            unit = Atom(terms.Variable("bound", "unit"), 1, 1)
            features = tuple(weight.index[1:])
            return Product(content, rows, unit, weight.root, False, *_affine(list(features), weight.root), features)
    return None


def _with_bias(content: Content, product: Product, bias: Element, dtype: str | None, block: Block) -> Product:
    assert block.key is not None
    expert, *features = bias.index
    if expert != Looked(block.key, block.num_experts) or bias.written is not None:
        raise Refused(f"the experts are not the first dimension of {bias.root}")
    if tuple(features) != product.features:
        raise Refused(f"the bias {bias.root} is added to other features than its own")
    return replace(product, content=content, bias=bias.root, bias_cast=dtype)


def _affine(parts: list[Part], root: fx.Node | Stacked) -> tuple[int, int, Size, Size]:
    """Output features start + step * i of `extent`, i < width."""
    start, step, width, extent = 0, 1, 1, 1  # type: tuple[int, int, Size, Size]
    for part in reversed(parts):  # least significant first
        size = radix.extent_of(part)
        if isinstance(part, Fixed):
            start += part.index * _number(extent)
        elif width == 1 and isinstance(part, Atom):
            step, width = _number(extent), part.size
        elif width == 1 and isinstance(part, Affine):
            start, step, width = start + part.start * _number(extent), part.step * _number(extent), part.atom.size
        else:
            raise Refused(f"output features of {root} in an order that is neither halves nor interleaved")
        extent = extent * size
    return start, step, width, extent


def _number(size: Size) -> int:
    if not isinstance(size, int):
        raise Refused("expert features of symbolic number")
    return size


def feature_atoms(product: Product) -> list[Atom]:
    """The atoms that run over the product's output features, without the fixed digits."""
    return [
        part.atom if isinstance(part, Affine) else part for part in product.features if isinstance(part, (Atom, Affine))
    ]


# ---- leaves at the three levels


def _out_leaf(content: Content, block: Block) -> str | None:
    product = _product(content, block) or _unit_product(content, block)
    if product is None:
        return None
    if block.out is not None and block.out != product:
        raise Refused("the results of two different expert GEMMs are mixed")
    if (product.start, product.step) != (0, 1) or product.width != product.extent:
        raise Refused("only a part of the second GEMM's output is used")
    block.out = product
    return "out"


def _inner_leaf(content: Content, block: Block) -> str | None:
    product = _product(content, block)
    if product is None:
        return None
    assert block.out is not None
    atoms = feature_atoms(product)
    if radix.merge(atoms) != radix.merge((block.out.over,)):
        raise Refused("the activation's features are not those that the second GEMM sums over")
    if product not in block.inner:
        block.inner.append(product)
    return f"leaf{block.inner.index(product)}"


def _x_leaf(content: Content, block: Block) -> str | None:
    over = block.inner[0].over
    if not isinstance(content, Element) or content.index != radix.merge((*block.tokens, over)):
        return None
    if block.x is not None and block.x != content:
        raise Refused("two different tokens' tensors in one block")
    block.x = content
    return "x"


def _name_gate_and_up(block: Block) -> None:
    """Decide from the features they cover which product is the gate's; write the activation in these names."""
    if not block.inner:
        raise Refused("the rows of the second expert GEMM do not come from a first one")
    if len({product.over.size for product in block.inner}) > 1:
        raise Refused("gate and up sum over different dimensions")
    layouts = [(product.weight, product.start, product.step, product.width, product.extent) for product in block.inner]
    if len(layouts) == 1 and layouts[0][1:3] == (0, 1) and layouts[0][3] == layouts[0][4]:
        block.gate_up = "single"
    elif (
        len(layouts) == 2
        and layouts[0][0] is layouts[1][0]
        and (block.inner[0].bias, *_dtypes(block.inner[0]))
        == (
            block.inner[1].bias,
            *_dtypes(block.inner[1]),
        )
    ):
        width, extent = layouts[0][3], layouts[0][4]
        spans = {layouts[0][1:3], layouts[1][1:3]}
        if extent != width * 2 or spans not in ({(0, 1), (width, 1)}, {(0, 2), (1, 2)}):
            raise Refused("gate and up are neither the halves nor the even and odd features of the first GEMM")
        block.gate_up = "interleaved" if (0, 2) in spans else "halves"
    elif len(layouts) == 2 and all(layout[1:3] == (0, 1) and layout[3] == layout[4] for layout in layouts):
        block.gate_up = "separate"
    else:
        raise Refused(f"{len(layouts)} parts of first GEMMs, or only some of their features, enter the activation")
    _rename_leaves(block)


def _dtypes(product: Product) -> tuple[str | None, str | None]:
    return product.cast, product.bias_cast


def _rename_leaves(block: Block) -> None:
    names = {"leaf0": "hidden"}
    if block.gate_up != "single":
        swapped = block.gate_up != "separate" and block.inner[0].start != 0
        names = {"leaf0": "up", "leaf1": "gate"} if swapped else {"leaf0": "gate", "leaf1": "up"}
        if swapped:
            block.inner.reverse()
    parsed = expression.parse(block.activation)
    block.activation = expression.to_text(_renamed(parsed, names))


def _renamed(parsed: expression.Expression, names: dict[str, str]) -> expression.Expression:
    if isinstance(parsed, expression.Leaf):
        return expression.Leaf(names.get(parsed.name, parsed.name))
    if isinstance(parsed, expression.Apply):
        return expression.Apply(parsed.op, tuple(_renamed(argument, names) for argument in parsed.args), parsed.params)
    return parsed
