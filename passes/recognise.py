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
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import fx

from moecompile.codegen import expression
from moecompile.passes import radix, substitution, terms
from moecompile.passes.aliases import fake_of
from moecompile.passes.expert_products import Product, feature_atoms, product_of, unit_product_of
from moecompile.passes.interpret import Refused, walk
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
        if not isinstance(content.value, int | float):
            raise Refused(f"the size {content.value}, which is not known, inside the expert computation")
        return expression.Constant(content.value)
    if isinstance(content, Apply):
        if content.op not in expression.OPERATIONS:
            raise Refused(f"{content.op} is not an operation that activations are written in")
        if all(isinstance(argument, Constant) for argument in content.args):
            raise Refused(f"{content.op} of numbers alone, which may round or wrap around in its dtype")
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


# ---- leaves at the three levels


def _out_leaf(content: Content, block: Block) -> str | None:
    product = product_of(content, block) or unit_product_of(content, block)
    if product is None:
        return None
    if block.out is not None and block.out != product:
        _check_adapters(block.out, product)
        raise Refused("the results of two different expert GEMMs are mixed")
    if (product.start, product.step) != (0, 1) or product.width != product.extent:
        raise Refused("only a part of the second GEMM's output is used")
    block.out = product
    return "out"


def _inner_leaf(content: Content, block: Block) -> str | None:
    product = product_of(content, block)
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
    _check_adapters(*block.inner)
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


def _check_adapters(*products: Product) -> None:
    """No product of a product may stand beside one of the same rows.

    What it adds could be added to the weight instead: (x @ a) @ b + x @ w is x @ (w + a @ b).
    """
    adapters = [product for product in products if isinstance(terms.uncast(product.rows)[0], Contract)]
    if adapters and len(adapters) < len(products):
        weight = adapters[0].weight
        node = weight.nodes[0] if isinstance(weight, Stacked) else weight
        raise Refused("an adapter inside the experts: a product of a product is added to a product", node)


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
