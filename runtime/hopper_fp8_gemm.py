"""The grouped GEMMs of `codegen/kernels` on FP8 operands (`moecompile.runtime.hopper_quantize` makes them)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moecompile.codegen.gemms import Activated, ActivationBackward, Added, GroupedGemm, Plain, Turned
from moecompile.runtime.hopper import (
    OUT_BOX,
    ROWS,
    Taking,
    _columns,
    _launch,
    _mapped,
    _pair,
    _written,
    added,
    choose,
)
from moecompile.runtime.hopper_quantize import Matrices, QuantizedRows
from moecompile.runtime.hopper_routing import Dispatching
from moecompile.runtime.launch import Mapped
from moecompile.runtime.quantize import E4M3, POWER_OF_TWO

WIDE = GroupedGemm("float8_e4m3fn", 256, 4, 2)
TURNED_BOX = (1, 64, 16)  # of a transposed result, written at once


def product(
    a: QuantizedRows, b: Matrices, offsets: Tensor | None, out: Tensor, bias: Tensor | None = None, early: bool = False,
    taking: Taking | None = None,
) -> Tensor:  # fmt: skip
    """out[r, :] = a[r, :] @ b[e(r)].T + bias[e(r)].

    Args:
        a: (R, K).
        b: (E, N, K) of whole blocks; N may be more than the columns of `out`.
        offsets: (E,) int32: expert e has the rows from offsets[e - 1] to offsets[e]. None if one expert has all rows.
        out: (R, columns) bfloat16, contiguous; rows beyond offsets[-1] are left as they are.
        bias: (E, columns) bfloat16, contiguous, or None.
        early: as of `moecompile.runtime.hopper.grouped_gemm`.
        taking: likewise.

    Returns:
        out.
    """
    n = out.shape[1]
    instance = product_instance(n, bias is not None, whole=offsets is None)
    sizes = (b.values.shape[0], a.values.shape[1], n)
    written, matrices = (_written(out), bias), (b.values.mT,)
    _launch(instance, a.values, matrices, offsets, sizes, written, _scales(a), b.scales, early=early, taking=taking)
    return out


def activated(
    a: QuantizedRows,
    b: Matrices,
    activation: str,
    offsets: Tensor,
    features: int,
    out: QuantizedRows,
    hidden: QuantizedRows | None,
    *,
    biases: tuple[Tensor, ...] = (),
    weights: Tensor | None = None,
    order: Tensor | None = None,
    dispatching: Dispatching | None = None,
    early: bool = False,
    scale_format: str = POWER_OF_TWO,
    taking: Taking | None = None,
) -> None:
    """out = activation(a @ b.T + bias), quantised, and the rows themselves into `hidden`.

    Args:
        a: (R, K).
        b: (E, N, K): the gate and then the up projection, each of `out`'s columns; or one matrix without a gate.
        activation: an expression of `gate` and `up`, or of `hidden`, and of `weight`.
        offsets: (E,) int32.
        features: of the activation; the other columns become zero.
        out: (R, whole blocks).
        hidden: (R, N), or None.
        biases: (E, features) of gate and up, or of the one matrix; contiguous, bfloat16.
        weights: (assignments,) float32, where the activation reads `weight`.
        order: (R,) int32, the assignment of a row; goes with `weights`.
        dispatching: the tokens whose rows `a` is to be filled with; None if they are there.
        early: as of `moecompile.runtime.hopper.grouped_gemm`.
        scale_format: of `out`; that of `hidden` is powers of two.
        taking: as of `moecompile.runtime.hopper.grouped_gemm`.
    """
    columns = out.values.shape[1]
    halves = b.values.split(columns, 1)
    gate_up = "halves" if len(halves) == 2 else "single"
    instance = activated_instance(activation, gate_up, hidden is not None, bool(biases), scale_format=scale_format)
    sizes = (b.values.shape[0], a.values.shape[1], features)
    _launch(
        instance, a.values, tuple(half.mT for half in halves), offsets, sizes,
        (
            _narrow(out), _narrow(hidden) if hidden else _columns(b.values.shape[1] // 2),
            out.scales, hidden.scales if hidden else None, *_pair(biases), weights, order,
            out.scales.shape[1], features, columns,
        ),
        _scales(a), b.scales, columns // 128, dispatching, early, taking,
    )  # fmt: skip


def activation_backward(
    of_out: QuantizedRows,
    b: Matrices,
    activation: str,
    offsets: Tensor,
    features: int,
    hidden: QuantizedRows,
    order: Tensor,
    *,
    weights: Tensor | None,
    scales: Tensor | None,
    dispatching: Dispatching | None = None,
    in_place: bool = False,
    scale_format: str = POWER_OF_TWO,
) -> tuple[QuantizedRows, QuantizedRows, Tensor | None]:
    """Back through GEMM2 and the activation, as `moecompile.runtime.hopper.activation_backward`.

    Args:
        of_out: (R, H2), the gradient of GEMM2's rows before the output's weight scales it.
        b: (E, whole blocks of features, whole blocks of H2), GEMM2's matrices transposed.
        activation: as of `activated`.
        offsets: (E,) int32.
        features: of the activation.
        hidden: (R, N), GEMM1's rows.
        order: (R,) int32, the assignment of a row.
        weights: (assignments,) float32, what the activation reads; None if it does not.
        scales: (assignments,) float32, what the output multiplies by; None for 1.
        dispatching: the tokens' gradients whose rows `of_out` is to be filled with; None if they are there.
        in_place: whether the gradient of `hidden` is written over it.
        scale_format: of the gradient of `hidden`; that of the scaled activation is powers of two.

    Returns:
        the gradient of `hidden`; the activation times the scale (R, whole blocks); the gradient of the routing weight
        in parts (parts, R) float32, None where there is neither weight nor scale.
    """
    rows, columns = of_out.values.shape[0], b.values.shape[1]
    gate_up = "halves" if hidden.values.shape[1] == 2 * columns else "single"
    instance = backward_instance(activation, gate_up, scales is not None, scale_format=scale_format)
    of_hidden = hidden
    if not in_place:
        of_hidden = QuantizedRows(torch.empty_like(hidden.values), torch.empty_like(hidden.scales))
    scaled = QuantizedRows.empty(of_out.values, rows, columns)
    of_weight = None
    if weights is not None or scales is not None:
        of_weight = of_out.scales.new_empty(-(-features // instance.columns), rows)
    _launch(
        instance, of_out.values, (b.values.mT,), offsets, (b.values.shape[0], of_out.values.shape[1], features),
        (
            _mapped(_pairs(hidden.values), OUT_BOX), _narrow(of_hidden), _narrow(scaled),
            hidden.scales, of_hidden.scales, scaled.scales, of_weight, weights, scales, order,
            rows, hidden.scales.shape[1], features, columns,
        ),
        _scales(of_out), b.scales, dispatching=dispatching,
    )  # fmt: skip
    return of_hidden, scaled, of_weight


def outer(
    a: QuantizedRows, b: QuantizedRows, ends: Tensor, like: Tensor, transposed: bool, mean_over: int = 1
) -> Tensor:
    """The gradient of matrices: for each expert, a[:, rows of e] @ b[:, rows of e].T / mean_over.

    Args:
        a: (M, P) of `transpose_rows`, with scales (P / 128, M) for each row and 128 columns; M is a multiple of 16.
        b: (N, P), with scales (ceil(N / 128), P / 128) for each 128 x 128.
        ends: (E,) int32 of `pad_offsets`.
        like: the matrices (E, M, N), or (E, N, M) if `transposed`, in bfloat16.
        transposed: the layout of `like`.
        mean_over: as of `moecompile.runtime.hopper.grouped_outer`.

    Returns:
        a tensor laid out as `like`; zeros where an expert has no rows.
    """
    experts, m, n = like.shape[0], a.values.shape[0], b.values.shape[0]
    expected = torch.empty_like(like, device="meta")
    turned = is_turned(like, transposed)
    instance = outer_instance(n, turned)
    out = like.new_empty((experts, n, m) if turned else (experts, m, n))
    written = (_mapped(out, TURNED_BOX), n) if turned else (_written(out.view(experts * m, n)), None)
    matrices, sizes = (b.values.unsqueeze(0).mT,), (experts, m, n)
    _launch(instance, a.values, matrices, ends, sizes, written, _scales(a), b.scales.unsqueeze(0), mean_over=mean_over)
    found = out if turned == transposed else out.mT
    return found if found.stride() == expected.stride() else torch.empty_like(like).copy_(found)


def add_outer(
    a: QuantizedRows, b: QuantizedRows, ends: Tensor, out: Tensor, transposed: bool, mean_over: int = 1
) -> None:
    """Adds the gradient of matrices (`outer`) to what `out` holds.

    Args:
        a: as of `outer`.
        b: likewise.
        ends: likewise.
        out: (E, M, N), or (E, N, M) if `transposed`, float32; of its last two dimensions one is contiguous.
        transposed: the layout of `out`.
        mean_over: as of `outer`.
    """
    experts, m, n = ends.shape[0], a.values.shape[0], b.values.shape[0]
    found = out.mT if transposed else out
    turned = found.stride(2) != 1
    written = added(found.mT if turned else found, turned)
    matrices, sizes = (b.values.unsqueeze(0).mT,), (experts, m, n)
    instance, scales = add_instance(n, turned), (_scales(a), b.scales.unsqueeze(0))
    _launch(instance, a.values, matrices, ends, sizes, written, *scales, mean_over=mean_over)


def add_instance(n: int, turned: bool) -> GroupedGemm:
    """The kernel of `add_outer`, for so many features in; turned: whether memory runs along features out."""
    return replace(choose(E4M3, 0, 1, n, 0, over_rows=True), epilogue=Added(turned))


def product_instance(n: int, bias: bool, whole: bool = False) -> GroupedGemm:
    """The kernel of `product`, for so many columns; whole: whether one expert has all rows."""
    return replace(choose(E4M3, 0, 1, n, 0), epilogue=Plain(bias), whole=whole)


def activated_instance(
    activation: str, gate_up: str, save: bool, bias: bool, dispatches: bool = False, scale_format: str = POWER_OF_TWO
) -> GroupedGemm:
    """The kernel of `activated`; gate_up: "halves" or "single"."""
    return replace(WIDE, dispatches=dispatches, epilogue=Activated(activation, gate_up, save, bias, scale_format))


def backward_instance(
    activation: str, gate_up: str, scaled: bool, dispatches: bool = False, scale_format: str = POWER_OF_TWO
) -> GroupedGemm:
    """The kernel of `activation_backward`; scaled: whether the output multiplies by the routing weight."""
    epilogue = ActivationBackward(activation, gate_up, scaled, scale_format)
    return replace(WIDE, stages=3, dispatches=dispatches, epilogue=epilogue)


def outer_instance(n: int, turned: bool) -> GroupedGemm:
    """The kernel of `outer`, for so many features in."""
    chosen = choose(E4M3, 0, 1, n, 0, over_rows=True)
    return replace(chosen, epilogue=Turned()) if turned else chosen


def is_turned(like: Tensor, transposed: bool) -> bool:
    """Whether memory of such a gradient, (E, out, in) or, transposed, (E, in, out), runs along features out."""
    expected = torch.empty_like(like, device="meta")
    return transposed != (expected.mT.is_contiguous() and not expected.is_contiguous())


def _scales(a: QuantizedRows) -> Mapped:
    """Bulk copies of the scales of a tile's rows."""
    return _mapped(a.scales[:, : a.values.shape[0]], (1, ROWS + 4))


def _pairs(values: Tensor) -> Tensor:
    """e4m3 numbers two by two: boxes of 16 x 128 of them travel as boxes of 16 x 64."""
    return values.view(torch.bfloat16)


def _narrow(rows: QuantizedRows) -> Mapped:
    return _written(_pairs(rows.values))
