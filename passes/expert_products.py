"""Read an expert's matrix product off a term: rows @ weight[expert] + bias[expert], and its output features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import fx

from moecompile.passes import radix, terms
from moecompile.passes.interpret import Refused
from moecompile.passes.terms import Affine, Apply, Atom, Content, Contract, Element, Fixed, Looked, Part, Size, Stacked

if TYPE_CHECKING:
    from moecompile.passes.recognise import Block


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


def product_of(content: Content, block: Block) -> Product | None:
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
            found = product_of(product, block) if isinstance(product, Contract) else None
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


def unit_product_of(content: Content, block: Block) -> Product | None:
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
