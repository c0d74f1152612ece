"""The experts on a Hopper GPU: GEMM1 with the activation in its epilogue, GEMM2, combine; and back.

    rows    = dispatch(x)                               hidden, a = GEMM1(rows), activation(hidden)
    y       = GEMM2(a)                                  result    = combine(y, weights)

    of_y    = dispatch(grad), not yet scaled by the weight w of the row
    of_hidden, w a, of_w    = back through GEMM2 and the activation, in one GEMM with its epilogue
    of_w_out = of_y^T (w a)                             of_w_in   = of_hidden^T rows
    of_rows = of_hidden w_in                            of_x      = combine(of_rows)

What these kernels do not take (`takes`), `moecompile.runtime.reference` runs, on the same grouped GEMMs where it can.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from moecompile.codegen.instances import RESULTS
from moecompile.runtime import hopper, hopper_kernels, hopper_routing, hopper_rules
from moecompile.runtime.backward import means
from moecompile.runtime.contract import BIASES, Arguments, Weighting, expression_leaves, weighting
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.hopper import Taking
from moecompile.runtime.hopper_routing import Dispatching
from moecompile.runtime.hopper_rows import HopperRows
from moecompile.runtime.hopper_tiles import Projection

LARGE = 256 * 2**20
"""Bytes of rows above which they are not made as a whole for the gradients of matrices."""
COLUMNS = 256
"""Of a tile: whole ones are all that is made at once."""
NONE: Mapping[str, Tensor] = MappingProxyType({})
Ready = Callable[[Mapping[str, Tensor]], None]
"""Is told of the gradients of tokens and of routing weights when they are there. What it launches on another stream has
multiprocessors of its own, while the others compute the gradients of GEMM1's matrices."""


def takes(args: Arguments) -> bool:
    """Whether the kernels compute these: one 16-bit dtype between gather and combine, whole lines of 16 bytes."""
    return hopper_rules.takes(args, hopper_rules.SIXTEEN_BITS, "experts run PyTorch's operators")


def forward(args: Arguments, save: bool) -> tuple[Tensor, Tensor | None]:
    """The result (T, H2) and, if they are to be saved, GEMM1's rows (T*K, N), anything beyond offsets[-1]."""
    projection, w_out = _projection(args, biased=True), _out_matrices(args)
    named = functools.partial(hopper_kernels.of_experts, args, projection, w_out, save)
    hopper_kernels.compile_together(args, save, "16 bits", named)
    hidden = args.x.new_empty(args.rows, args.width) if save and not args.recompute else None
    a = _gemm1(args, projection, hidden)
    y = a.new_empty(args.rows, args.out_features)
    hopper.grouped_gemm(a, w_out, args.offsets, y, bias=args.b_out, early=True)
    del a
    result = y.new_empty(args.x.shape[0], args.out_features, dtype=args.dtypes.result)
    return hopper_routing.combine(y, args.slots.contiguous(), _weights(args), args.output, result), hidden


def hidden_rows(args: Arguments) -> Tensor:
    """GEMM1's rows (T*K, N) once more, as `forward` computes and saves them; anything beyond offsets[-1]."""
    hidden = args.x.new_empty(args.rows, args.width)
    _gemm1(args, _projection(args, biased=True), hidden)
    return hidden


def _gemm1(args: Arguments, projection: Projection, hidden: Tensor | None) -> Tensor:
    """The activations (T*K, I) of GEMM1's rows, which `hidden` gets.

    Tokens are dispatched, or counters cleared, before the GEMM: what it reads early was there before that.
    """
    if hopper_routing.is_beside(args.rows, args.features, args.x.element_size()):
        rows = args.x.new_empty(args.rows, args.features)
        dispatching = Dispatching.of(_lines(args.x), None, args.order, args.slots.shape[1])
    else:
        rows, dispatching = _dispatched(args, args.x), None
    read = "weight" in expression_leaves(args.activation)
    a = rows.new_empty(args.rows, args.intermediate)
    hopper.activated_gemm(
        rows, projection, args.activation, args.offsets, a, hidden=hidden, weights=_weights(args) if read else None,
        order=args.order if read else None, dispatching=dispatching, early=True,
    )  # fmt: skip
    return a


def backward(
    args: Arguments, grad: Tensor | Callable[[], Tensor], hidden: Tensor, needs: Collection[str],
    main: Mapping[str, Tensor] = NONE, ready: Ready | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of the arguments named in `needs`, for the result's gradient (T, H2) and GEMM1's rows.

    Those of the matrices named in `main` are added to its tensors, float32. `grad` may be a function that gives the
    gradient's rows (T*K, H2) in the activation's dtype. `ready` is called if "x" is needed.
    """
    if main:
        hopper_kernels.compile_together(args, True, "adding", functools.partial(hopper_kernels.of_adding, args))
    if ready is not None:
        taken = functools.partial(hopper_kernels.of_taken, args, main)
        hopper_kernels.compile_together(args, True, ("taken", bool(main)), taken)
    form = weighting(args.output)
    assert form is not None
    projection, found = _projection(args), dict[str, Tensor]()
    of_y = _dispatched(args, grad.to(args.dtypes.activation)) if isinstance(grad, Tensor) else grad()
    scales, summed = _scales(args, form), Summed(args.offsets, args.mean_over)
    of_hidden, scaled, parts = hopper.activation_backward(
        of_y,
        _out_matrices(args),
        projection,
        args.activation,
        args.offsets,
        hidden.contiguous(),
        args.order,
        weights=_weights(args) if "weight" in expression_leaves(args.activation) else None,
        scales=scales,
        in_place=args.recompute,  # the rows are nobody else's
    )
    plain = HopperRows(args.offsets, args.order, args.slots.shape[1]) if _has_biases(args) else None
    if "weights" in needs:
        found["weights"] = _of_weights(args, parts, plain, of_y if scales is not None else None)
    if "w_out" in main:
        _add(main["w_out"], of_y, scaled, args.w_out_transposed, summed)
    elif "w_out" in needs:
        found["w_out"] = _of_matrix(args.w_out, of_y, scaled, args.w_out_transposed, summed)
    if "b_out" in needs:
        assert plain is not None and args.b_out is not None
        weighted = of_y if scales is None else of_y * scales.view(-1)[plain.assignments, None]
        found["b_out"] = plain.bias_gradient(args.b_out, weighted)
    gradients = projection.parts(of_hidden)
    names = ("w_in", "w_up")[: len(gradients)] if args.w_up is not None else ("w_in",)
    of_products = gradients if args.w_up is not None else (of_hidden,)
    for bias, of_product in zip(("b_in", "b_up"), of_products, strict=False):
        if bias in needs:
            assert plain is not None
            found[bias] = plain.bias_gradient(getattr(args, bias), of_product)
    del of_y, scaled, parts  # the gradients to come want their memory
    if "x" in needs:
        found["x"] = _of_x(args, of_products)
        if ready is not None:
            ready(found)
            summed = replace(summed, taken=True)
    wanted = {
        name: of_product for name, of_product in zip(names, of_products, strict=True) if name in needs or name in main
    }
    if wanted:
        made = _of_gemm1(args, wanted, main, summed)
        found.update({name: each for name, each in made.items() if name not in main})
    return means(args, found, BIASES)  # the kernels have seen to the matrices


def _of_gemm1(
    args: Arguments, of_products: Mapping[str, Tensor], main: Mapping[str, Tensor], summed: Summed
) -> dict[str, Tensor]:
    """The gradients of GEMM1's matrices, by name, for those of their products (R, out), or what they were added to.

    Rows that are large are there by some of their columns after the other: a step's memory is at its highest here.
    """
    columns, pieces = args.x.shape[1], 1
    while columns % (2 * pieces * COLUMNS) == 0 and args.rows * columns * args.x.element_size() > pieces * LARGE:
        pieces *= 2
    matrices = {name: main.get(name, getattr(args, name)) for name in of_products}
    whole = args.w_in_transposed or not all(each.is_contiguous() for each in matrices.values())
    sums = summed.each(pieces * len(of_products))
    if whole or pieces == 1:
        rows, transposed = _dispatched(args, args.x), args.w_in_transposed
        return {
            name: (_add if name in main else _of_matrix)(matrices[name], of_product, rows, transposed, next(sums))
            for name, of_product in of_products.items()
        }
    found = {name: each if name in main else torch.empty_like(each) for name, each in matrices.items()}
    for start in range(0, columns, columns // pieces):
        piece = slice(start, start + columns // pieces)
        rows = _dispatched(args, args.x, piece)
        for name, of_product in of_products.items():
            next(sums).into(of_product, rows, found[name][:, :, piece])
        del rows
    return found


def _of_x(args: Arguments, of_products: tuple[Tensor, ...]) -> Tensor:
    """The gradient of the tokens (T, H)."""
    of_rows: Tensor | None = None
    for of_product, matrices in zip(of_products, (args.w_in, args.w_up), strict=False):
        assert matrices is not None
        b = matrices.mT if args.w_in_transposed else matrices
        product = of_product.new_empty(args.rows, args.x.shape[1])
        hopper.grouped_gemm(of_product, b, args.offsets, product, early=True)
        of_rows = product if of_rows is None else of_rows.add_(product)
    assert of_rows is not None
    return hopper_routing.combine(of_rows, args.slots.contiguous(), None, "out", args.x.new_empty(args.x.shape))


def _of_weights(args: Arguments, parts: Tensor | None, plain: HopperRows | None, of_y: Tensor | None) -> Tensor:
    """The gradient of the routing weights (T, K): the sum of its parts, and what GEMM2's bias adds to it."""
    assert args.weights is not None
    if parts is None:
        return args.weights.new_zeros(args.weights.shape)
    more: Tensor | None = None
    if args.b_out is not None and of_y is not None:
        assert plain is not None
        more = plain.bias_dot(args.b_out, of_y).squeeze(1)
    dtype = args.weights.dtype
    narrow = dtype if dtype_name(dtype) in RESULTS else torch.float32
    return hopper_routing.collect(parts, more, args.slots.contiguous(), narrow).to(dtype)


@dataclass(frozen=True)
class Summed:
    """How products are summed over an expert's rows.

    Attributes:
        offsets: (E,), the end of each expert's rows.
        mean_over: what sums are divided by.
        taken: whether blocks take tiles when they are free: some multiprocessors may be another kernel's at first.
        taking: how they do, of one product.
    """

    offsets: Tensor
    mean_over: int
    taken: bool = False
    taking: Taking | None = None

    def each(self, count: int) -> Iterator[Summed]:
        """The same for each of so many products."""
        if not self.taken:
            return itertools.repeat(self, count)
        zeros = self.offsets.new_zeros(count).split(1)
        return (replace(self, taking=Taking(zero)) for zero in zeros)

    def into(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        """out[e] = left[rows of e].T @ right[rows of e], or what is added to it in float32."""
        return hopper.grouped_outer(left, right, self.offsets, out, mean_over=self.mean_over, taking=self.taking)


def _of_matrix(like: Tensor, of_product: Tensor, rows: Tensor, transposed: bool, summed: Summed) -> Tensor:
    """The gradient of an expert's matrix for its products' gradient (R, out) and the rows (R, in), laid out alike."""
    left, right = (rows, of_product) if transposed else (of_product, rows)
    if like.mT.is_contiguous() and not like.is_contiguous():
        return summed.into(right, left, like.new_empty(like.mT.shape)).mT
    out = summed.into(left, right, like.new_empty(like.shape))
    expected = torch.empty_like(like, device="meta").stride()
    return out if out.stride() == expected else torch.empty_like(like).copy_(out)


def _add(to: Tensor, of_product: Tensor, rows: Tensor, transposed: bool, summed: Summed) -> Tensor:
    """The same, added to a main gradient, which may have a layout of its own."""
    left, right = (rows, of_product) if transposed else (of_product, rows)
    if to.stride(2) == 1:
        return summed.into(left, right, to)
    summed.into(right, left, to.mT)
    return to


def _projection(args: Arguments, biased: bool = False) -> Projection:
    """GEMM1: one matrix, or two for a gate and an up projection that are two halves or two tensors.

    With its biases, if they are to be read.
    """
    b_in = args.b_in if biased else None
    w_in = args.w_in if args.w_in_transposed else args.w_in.mT
    if args.gate_up == "halves":
        gate, up = w_in.chunk(2, 2)
        return Projection((gate, up), None if b_in is None else _halved(b_in), "halves")
    if args.w_up is not None:
        w_up = args.w_up if args.w_in_transposed else args.w_up.mT
        return Projection((w_in, w_up), None if b_in is None or args.b_up is None else (b_in, args.b_up), "separate")
    return Projection((w_in,), None if b_in is None else (b_in,), args.gate_up)


def _halved(biases: Tensor) -> tuple[Tensor, Tensor]:
    """Biases (E, 2I) of gate and then up projection as (E, I) each."""
    gate, up = biases.unflatten(1, (2, -1)).transpose(0, 1).contiguous()
    return gate, up


def _float32(weights: Tensor) -> Tensor:
    return weights.to(torch.float32).contiguous()


def _out_matrices(args: Arguments) -> Tensor:
    """GEMM2's matrices, (E, I, H2)."""
    return args.w_out if args.w_out_transposed else args.w_out.mT


def _dispatched(args: Arguments, per_token: Tensor, columns: slice | None = None) -> Tensor:
    """The rows' entries of a tensor (T, F), or of its columns, (T*K, columns); anything for a row without an expert."""
    tokens = _lines(per_token)
    if columns is not None:
        tokens = tokens[:, columns]
    rows = per_token.new_empty(args.rows, tokens.shape[1])
    return hopper_routing.dispatch(tokens, args.slots.contiguous(), rows)


def _lines(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and in whole lines of 16 bytes."""
    whole = tensor.contiguous()
    return whole.clone() if whole.data_ptr() % 16 else whole


def _weights(args: Arguments) -> Tensor | None:
    """The routing weights, as kernels read them."""
    return None if args.weights is None else _float32(args.weights)


def _scales(args: Arguments, form: Weighting) -> Tensor | None:
    """What the output multiplies by: the routing weights with their casts; None if it does not."""
    if args.weights is None or form.of_weight is None:
        return None
    return functools.reduce(Tensor.to, form.of_weight, args.weights).to(torch.float32).contiguous()


def _has_biases(args: Arguments) -> bool:
    return any(bias is not None for bias in (args.b_in, args.b_up, args.b_out))
