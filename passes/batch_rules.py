"""What operators do with the batch: a rule for each that may be given rows of it, in one table.

A rule is asked only of operators of which nothing read is `Mixed` and which were given no number that depends on the
batch, those of sizes (`SIZED`) aside. What is by element needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from moecompile.passes.batch_meanings import (
    INSIDE,
    Meaning,
    Meanings,
    NotProvenError,
    Numbered,
    Rows,
    first_of,
    value_of,
)
from moecompile.passes.costs import expression
from moecompile.passes.joint_graph import argument

aten, ops = torch.ops.aten, torch.ops.moecompile
Rule = Callable[[Meanings, fx.Node], Meaning]


def _given(node: fx.Node) -> Tensor:
    value: Tensor = value_of(node.all_input_nodes[0])
    return value


def _dims(node: fx.Node) -> list[int]:
    """The dimensions along which it goes, counted from the first; all of them if it names none."""
    names = {each.name for each in node.target._schema.arguments}  # type: ignore[union-attr]
    name = next((each for each in ("dim", "dims") if each in names), None)
    given = None if name is None else argument(node, name)
    own = _given(node).dim()
    dims = [given] if isinstance(given, int) else list(given or range(own))
    return [each % max(own, 1) for each in dims]


def _along(meanings: Meanings, node: fx.Node) -> Meaning:
    """Sums, sorts and the like: not along the batch. Dimensions may go."""
    place, dims = meanings.of_first(node), _dims(node)
    if place in dims:
        raise NotProvenError(f"{node.target} goes along the batch")
    gone = first_of(value_of(node)).dim() < _given(node).dim()
    return Rows(place - sum(each < place for each in dims) if gone else place)


def _squeezed(meanings: Meanings, node: fx.Node) -> Meaning:
    """A half is of two elements or more, and stays."""
    place, sizes = meanings.of_first(node), _given(node).shape
    return Rows(place - sum(each < place and expression(sizes[each]) == 1 for each in {*_dims(node)}))


def _sliced(meanings: Meanings, node: fx.Node) -> Meaning:
    """Not along the batch, or all of it."""
    place = meanings.of_first(node)
    _check_part(meanings, node, place, value_of(node), 2)
    return Rows(place)


def _put_slice(meanings: Meanings, node: fx.Node) -> Meaning:
    """The way back of `_sliced`."""
    part, place = argument(node, "src"), meanings.at(argument(node, "self"))
    if place is None or meanings.at(part) != place:
        raise NotProvenError(f"{node.target} meets what is shared")
    _check_part(meanings, node, place, value_of(part), 3)
    return Rows(place)


def _check_part(meanings: Meanings, node: fx.Node, place: int, part: Tensor, bounds_from: int) -> None:
    """It is of the whole batch, by numbers that do not depend on it."""
    dim, bounds = argument(node, "dim") % _given(node).dim(), node.args[bounds_from:]
    if expression(part.shape[place]) != expression(_given(node).shape[place]):
        raise NotProvenError(f"{node.target} takes a part of the batch")
    numbers = (value_of(each) if isinstance(each, fx.Node) else each for each in bounds)
    if argument(node, "step") != 1 if dim == place else any(map(meanings.depends, numbers)):
        raise NotProvenError(f"{node.target} takes what depends on the batch")


def _padded(meanings: Meanings, node: fx.Node) -> Meaning:
    """Pairs of numbers from the last dimension on."""
    place, pad = meanings.of_first(node), argument(node, "pad")
    if place >= _given(node).dim() - len(pad) // 2:
        raise NotProvenError(f"{node.target} goes along the batch")
    return Rows(place)


def _triangle(meanings: Meanings, node: fx.Node) -> Meaning:
    """Of the last two dimensions."""
    place = meanings.of_first(node)
    if place >= _given(node).dim() - 2:
        raise NotProvenError(f"{node.target} goes along the batch")
    return Rows(place)


def _first(meanings: Meanings, node: fx.Node) -> Meaning:
    """Each row of the first tensor by itself, with what is shared."""
    return Rows(meanings.of_first(node))


def _viewed(meanings: Meanings, node: fx.Node) -> Meaning:
    """Elements keep their order: the batch stays where as much is before it, and it comes first in its dimension."""
    place = meanings.of_first(node)
    before = sympy.Mul(*map(expression, _given(node).shape[:place]))
    ahead = sympy.Integer(1)
    sizes = [*map(expression, value_of(node).shape)]
    for dim, size in enumerate(sizes):
        if meanings.batch in size.free_symbols and ahead == before and meanings.leads(size):
            if any(meanings.batch in each.free_symbols for each in sizes[dim + 1 :]):
                raise NotProvenError(f"{node.target} makes several dimensions of the batch: {tuple(sizes)}")
            return Rows(dim)
        ahead *= size
    raise NotProvenError(f"{node.target} leaves no dimension that begins with the batch: {tuple(value_of(node).shape)}")


def _permuted(meanings: Meanings, node: fx.Node) -> Meaning:
    own, place = _given(node).dim(), meanings.of_first(node)
    order = [*range(own)]
    if node.target is aten.permute.default:
        order = [each % own for each in argument(node, "dims")]
    elif node.target is aten.t.default:
        order.reverse()
    else:
        one, other = (argument(node, name) % own for name in ("dim0", "dim1"))
        order[one], order[other] = order[other], order[one]
    return Rows(order.index(place))


def _unsqueezed(meanings: Meanings, node: fx.Node) -> Meaning:
    place, dim = meanings.of_first(node), argument(node, "dim") % (_given(node).dim() + 1)
    return Rows(place + (dim <= place))


def _stacked(meanings: Meanings, node: fx.Node) -> Meaning:
    places = {meanings.at(each) for each in node.all_input_nodes}
    if len(places) != 1 or None in places:
        raise NotProvenError(
            f"{node.target} puts rows of the batch beside others: {meanings.words(node.all_input_nodes)}"
        )
    (place,) = places
    assert place is not None
    dim = argument(node, "dim") % (_given(node).dim() + 1)
    return Rows(place + (dim <= place))


def _expanded(meanings: Meanings, node: fx.Node) -> Meaning:
    """What is shared may be repeated for each element, rows in dimensions of their own."""
    given, out = node.all_input_nodes[0], value_of(node)
    if meanings.at(given) is None:
        return meanings.by_shape(node)
    rows = meanings.aligned(node, [given])
    if any(meanings.depends(size) for dim, size in enumerate(out.shape) if dim != rows.dim):
        raise NotProvenError(f"{node.target} repeats rows of the batch as often as there are elements")
    return rows


def _filled(meanings: Meanings, node: fx.Node) -> Meaning:
    """As many rows as you like of one number, which does not depend on the batch."""
    names = {each.name for each in node.target._schema.arguments}  # type: ignore[union-attr]
    filled = argument(node, "fill_value") if "fill_value" in names else None
    if isinstance(filled, fx.Node) and meanings.depends(value_of(filled)):
        raise NotProvenError(f"{node.target} is of a number that depends on the batch")
    return meanings.by_shape(node)


def _joined(meanings: Meanings, node: fx.Node) -> Meaning:
    dim = argument(node, "dim") % value_of(node).dim()
    if dim in map(meanings.at, node.all_input_nodes):
        raise NotProvenError(f"{node.target} joins along the batch")
    return meanings.aligned(node, node.all_input_nodes)


def _product(meanings: Meanings, node: fx.Node) -> Meaning:
    """Rows times what is shared, or the other way round; what is added is aligned."""
    given: Any = node.args
    *bias, a, b = given
    left, right, last = meanings.at(a), meanings.at(b), value_of(a).dim() - 1
    batched = last == 2 and left == right == 0 and value_of(a).shape[0] == value_of(b).shape[0]
    if not batched and not (right is None and left != last) and not (left is None and right == value_of(b).dim() - 1):
        raise NotProvenError(f"{node.target} sums over the batch, or multiplies rows of it with each other")
    place = left if left is not None else right
    if place is None or not value_of(node).dim():
        raise NotProvenError(f"{node.target} is given rows of the batch where none were expected")
    for each in bias:
        own = meanings.at(each)
        behind = value_of(node).dim() - place
        sizes = value_of(each).shape
        fits = len(sizes) < behind or expression(sizes[len(sizes) - behind]) == 1
        if (own is None and not fits) or (own is not None and len(sizes) - own != behind):
            raise NotProvenError(f"{node.target} adds others to rows of the batch: {meanings.words([each])}")
    return Rows(place)


def _attention(meanings: Meanings, node: fx.Node) -> Meaning:
    """Of each sequence with itself; masks by element, too."""
    for each in node.all_input_nodes[:3]:
        if meanings.at(each) != 0 or value_of(each).dim() != 4:
            raise NotProvenError(f"{node.target} is given queries, keys or values that are not of the batch")
    if dropout := argument(node, "dropout_p"):
        raise NotProvenError(f"{node.target} drops out with {dropout}, others for halves of the batch")
    return meanings.aligned(node, node.all_input_nodes)


def _looked_up(meanings: Meanings, node: fx.Node) -> Meaning:
    """Rows of a table by numbers that are rows."""
    table, ids = argument(node, "weight"), argument(node, "indices")
    place = meanings.at(ids)
    if meanings.at(table) is not None or place is None:
        raise NotProvenError(f"{node.target} looks up rows of the batch")
    if argument(node, "scale_grad_by_freq"):
        raise NotProvenError(f"{node.target} has a gradient that counts the batch")
    return Rows(place)


def _indexed(meanings: Meanings, node: fx.Node) -> Meaning:
    """Of a shared table by numbers that are rows; or of each element, where the first numbers are those of elements."""
    table, given = argument(node, "self"), argument(node, "indices")
    indices = [each for each in given if each is not None]
    if any(each is None for each in given[: len(indices)]):
        raise NotProvenError(f"{node.target} takes numbers of other dimensions than the first")
    if any(value_of(each).dtype in (torch.bool, torch.uint8) for each in indices):
        raise NotProvenError(f"{node.target} takes as many rows as there are marked")
    first, place = meanings.of[indices[0]], meanings.at(table)
    if place is not None:
        if place != 0 or not isinstance(first, Numbered) or expression(value_of(table).shape[0]) != meanings.batch:
            raise NotProvenError(f"{node.target} takes rows of the batch by numbers")
        if indices[0] in indices[1:]:
            raise NotProvenError(f"{node.target} takes other dimensions by the numbers of the elements")
        meanings = meanings.with_rows(indices[0], first.dim)
    return meanings.aligned(node, indices, max(value_of(each).dim() for each in indices))


def _gathered(meanings: Meanings, node: fx.Node) -> Meaning:
    """All tensors are rows, as many of each, and it goes along another dimension."""
    tensors = [each for each in node.all_input_nodes if isinstance(value_of(each), Tensor)]
    found = {meanings.at(each) for each in tensors}
    place = next(iter(found))
    if len(found) > 1 or place is None or argument(node, "dim") % _given(node).dim() == place:
        raise NotProvenError(f"{node.target} goes along the batch, or meets what is shared")
    if len({expression(value_of(each).shape[place]) for each in (*tensors, node)}) > 1:
        raise NotProvenError(f"{node.target} takes a part of the batch")
    return Rows(place)


def _put(meanings: Meanings, node: fx.Node) -> Meaning:
    """One place of another dimension, of all rows."""
    whole, part = argument(node, "self"), argument(node, "src")
    place, dim = meanings.at(whole), argument(node, "dim") % value_of(whole).dim()
    if place is None or dim == place or meanings.at(part) != place - (dim < place):
        raise NotProvenError(f"{node.target} goes along the batch, or meets what is shared")
    return Rows(place)


def _normed(meanings: Meanings, node: fx.Node) -> Meaning:
    place = meanings.of_first(node)
    if place >= _given(node).dim() - len(argument(node, "normalized_shape")):
        raise NotProvenError(f"{node.target} goes along the batch")
    return Rows(place)


def _pointwise(meanings: Meanings, node: fx.Node) -> Meaning:
    return meanings.aligned(node, node.all_input_nodes)


def _cast(meanings: Meanings, node: fx.Node) -> Meaning:
    """To FP8, by blocks along the last dimension."""
    place = meanings.of_first(node)
    if place or _given(node).dim() < 2:
        raise NotProvenError(f"{node.target} has blocks that go along the batch")
    return Rows(0)


def _linear(meanings: Meanings, node: fx.Node) -> Meaning:
    """Rows and their casts, with matrices that are shared."""
    given: Any = node.args
    x, weight, bias, values, scales, quantized = given
    of_rows = all(meanings.at(each) == 0 for each in (x, values, scales))
    if not of_rows or any(meanings.at(each) is not None for each in (weight, bias, *quantized)):
        raise NotProvenError(f"{node.target} multiplies rows of the batch with each other")
    return Rows(0)


def _scaled_product(meanings: Meanings, node: fx.Node) -> Meaning:
    """Casts of rows, with those of matrices that are shared."""
    (a, a_scales), matrices = node.args[:2], node.args[2:]
    if any(meanings.at(each) != 0 for each in (a, a_scales)) or any(meanings.at(each) is not None for each in matrices):
        raise NotProvenError(f"{node.target} multiplies rows of the batch with each other")
    return Rows(0)


def _inside(meanings: Meanings, node: fx.Node) -> Meaning:
    """Of a block of experts: what only its operators read, of tokens and their experts, or of what has travelled."""
    for each in node.all_input_nodes:
        if isinstance(value_of(each), Tensor) and meanings.of[each] not in (Rows(0), INSIDE):
            raise NotProvenError(f"{node.target} is given {each.name}, which is not of tokens")
    return INSIDE


def _inside_with_matrices(meanings: Meanings, node: fx.Node) -> Meaning:
    if any(isinstance(meanings.of[each], Rows) for each in node.all_input_nodes):
        raise NotProvenError(f"{node.target} is given matrices that are rows of the batch")
    return INSIDE


def _experts(meanings: Meanings, node: fx.Node) -> Meaning:
    """Rows go through their experts' matrices; of tokens that have travelled, they travel back."""
    x, weights = argument(node, "x"), argument(node, "weights")
    if meanings.of[x] is INSIDE:
        return _inside_with_matrices(meanings, node)
    plan = [argument(node, name) for name in ("offsets", "slots", "order")]
    others = [each for each in node.all_input_nodes if each not in (x, weights, *plan)]
    of_rows = meanings.at(x) == 0 and (weights is None or meanings.at(weights) == 0)
    of_rows = of_rows and all(meanings.at(each) is None for each in others)
    slots = expression(value_of(plan[1]).shape[0])
    if (
        not of_rows
        or any(meanings.of[each] is not INSIDE for each in plan)
        or slots != expression(value_of(x).shape[0])
    ):
        raise NotProvenError(f"{node.target} is given routing weights, a plan or matrices of other tokens")
    return Rows(0)


FILLED = {
    aten.full,
    aten.zeros,
    aten.ones,
    aten.empty,
    aten.new_empty,
    aten.new_full,
    aten.new_zeros,
    aten.new_ones,
} | {
    *(aten.full_like, aten.zeros_like, aten.ones_like, aten.empty_like),
}
"""Constants: rows may be as many as they like."""
KEEPS_NUMBERS = {aten.unsqueeze, aten.slice, aten.expand, aten.view, aten.alias, aten.detach, aten.clone}
"""What may be done with the numbers of elements."""
CUT = {aten.slice, aten.slice_scatter}
SIZED = {aten.view, aten._unsafe_view, aten.reshape, aten.expand} | CUT | FILLED
"""What may be given numbers that depend on the batch; rules look at them."""
RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(FILLED, _filled),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape), _viewed),
    **dict.fromkeys((aten.permute, aten.transpose, aten.t), _permuted),
    aten.unsqueeze: _unsqueezed,
    aten.squeeze: _squeezed,
    aten.expand: _expanded,
    aten.cat: _joined,
    aten.stack: _stacked,
    **dict.fromkeys((aten.mm, aten.addmm, aten.bmm, aten.baddbmm), _product),
    **dict.fromkeys(
        (
            *(aten.sum, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.var, aten.std, aten.prod),
            *(aten.any, aten.all, aten.argmax, aten.argmin, aten.logsumexp, aten.linalg_vector_norm),
            *(aten._softmax, aten._log_softmax, aten.softmax, aten.topk, aten.sort, aten.cumsum, aten.flip, aten.roll),
            *(aten.select, aten.split, aten.split_with_sizes, aten.unbind),
        ),
        _along,
    ),
    aten.slice: _sliced,
    aten.slice_scatter: _put_slice,
    aten.constant_pad_nd: _padded,
    **dict.fromkeys((aten.tril, aten.triu), _triangle),
    **dict.fromkeys((aten.gather, aten.scatter, aten.scatter_add), _gathered),
    aten.select_scatter: _put,
    **dict.fromkeys((aten.clone, aten.detach, aten.alias, aten._to_copy), _first),
    **dict.fromkeys((aten.copy, aten.fill), _pointwise),
    aten.embedding: _looked_up,
    aten.index: _indexed,
    **dict.fromkeys((aten.native_layer_norm, aten._fused_rms_norm), _normed),
    **dict.fromkeys(
        (
            aten._scaled_dot_product_flash_attention,
            aten._scaled_dot_product_efficient_attention,
            aten._scaled_dot_product_cudnn_attention,
            aten._scaled_dot_product_flash_attention_for_cpu,
        ),
        _attention,
    ),
    **dict.fromkeys((ops.plan, ops.exchange_plan, ops.dispatch_start, ops.dispatch_wait), _inside),
    **dict.fromkeys((ops.combine_start, ops.combine_wait, ops.came_within), _inside),
    **dict.fromkeys((ops.experts, ops.experts_fp8), _experts),
    ops.quantize: _cast,
    ops.linear_fp8: _linear,
    ops.scaled_mm: _scaled_product,
}
"""By operator."""
