"""What the FP8 operators accept beyond what `moecompile.runtime.contract` says, and the records they pass around."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moecompile.runtime.contract import GATE_UP, Arguments, expect_shape, weighting
from moecompile.runtime.lines import check_lines
from moecompile.runtime.quantize import BLOCK, DTYPES, E4M3, SCALE_FORMATS, blocks_in, pad, padded_width

GEMM_DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes of a model whose experts run in FP8."""
NOTHING = (0,)
"""Shape of what is not there."""
PITCH = 4
"""Rows of transposed scales begin at a multiple of so many float32, as bulk copies need it."""


class Quantized(NamedTuple):
    """The argument `quantized`: what `quantize_weights` gives for GEMM1's weights, then for GEMM2's.

    values (E, N', K') e4m3, scales (E, N' / 128, K' / 128) float32, and both transposed, without elements where no
    backward reads them.
    """

    w_in: Tensor
    w_in_scales: Tensor
    w_in_t: Tensor
    w_in_t_scales: Tensor
    w_out: Tensor
    w_out_scales: Tensor
    w_out_t: Tensor
    w_out_t_scales: Tensor


class Saved(NamedTuple):
    """What `experts_fp8_forward` keeps for backward.

    x_values (T, H) e4m3 and x_scales (T, H' / 128) float32; hidden_values (R, N') e4m3 in expert order, gate from
    column 0 and up from pad(I), and hidden_scales (N' / 128, pitch) float32, transposed, with R rounded up to PITCH.
    With recompute there are no hidden rows.
    """

    x_values: Tensor
    x_scales: Tensor
    hidden_values: Tensor
    hidden_scales: Tensor


Four = tuple[Tensor, Tensor, Tensor, Tensor]
"""What `quantize_weights` gives: values, scales, and both transposed."""
Specs = tuple[tuple[tuple[int, ...], torch.dtype], ...]
"""Shape and dtype of each tensor of a record."""


def weight_specs(
    outer: tuple[int, ...], width: int, features: int, backward: bool = True, forward: bool = True
) -> Specs:
    """Of what `quantize_weights` returns for N' = width and K' = features, multiples of 128, of (*outer, N, K).

    Of copies that only a `backward` or only a `forward` reads there may be none.
    """
    down, across = width // BLOCK, features // BLOCK
    return (
        ((*outer, width, features) if forward else NOTHING, E4M3),
        ((*outer, down, across) if forward else NOTHING, torch.float32),
        ((*outer, features, width) if backward else NOTHING, E4M3),
        ((*outer, across, down) if backward else NOTHING, torch.float32),
    )


def quantized_specs(args: Arguments, backward: bool = True, forward_in: bool = True, forward_out: bool = True) -> Specs:
    """Of `quantized`, for a call of the experts; whether there are copies for backward, and forward of each matrix."""
    width, inner = padded_width(args.intermediate, args.gate_up), pad(args.intermediate)
    first = weight_specs((args.num_experts,), width, pad(args.x.shape[1]), backward, forward_in)
    return first + weight_specs((args.num_experts,), pad(args.out_features), inner, backward, forward_out)


def saved_specs(args: Arguments) -> Specs:
    """Of `saved`, for a call of the experts."""
    (tokens, features), width = args.x.shape, padded_width(args.intermediate, args.gate_up)
    return (
        ((tokens, features), E4M3),
        ((tokens, blocks_in(features, BLOCK)), torch.float32),
        ((args.saved_rows, width), E4M3),
        ((width // BLOCK, blocks_in(args.saved_rows, PITCH) * PITCH), torch.float32),
    )


def check_scale_format(operator: str, scale_format: str) -> None:
    """Raises ValueError for a format that there is not."""
    if scale_format not in SCALE_FORMATS:
        words = f"scale_format must be one of {', '.join(SCALE_FORMATS)}; got {scale_format!r}"
        raise _error(operator, ValueError, words)


def check_weights(w: Tensor, w_up: Tensor | None, gate_up: str, transposed: bool, backward: bool = True) -> Specs:
    """Shapes and dtypes of what `quantize_weights` returns; raises ValueError or TypeError for what it refuses."""
    error = functools.partial(_error, "quantize_weights")
    if gate_up not in GATE_UP:
        raise error(ValueError, f"gate_up must be one of {', '.join(GATE_UP)}; got {gate_up!r}")
    if w.dim() not in (2, 3) or (w.dim() == 2 and gate_up != "single"):
        words = "(experts, out, in) or, transposed, (experts, in, out), or, of one matrix, these without experts"
        raise error(ValueError, f"w must have shape {words}, got {tuple(w.shape)}, gate_up={gate_up!r}")
    if (w_up is not None) != (gate_up == "separate"):
        came = "None" if w_up is None else f"shape {tuple(w_up.shape)}"
        raise error(ValueError, f"w_up goes with gate_up='separate' alone; got {came}, gate_up={gate_up!r}")
    for name, matrix in (("w", w), ("w_up", w_up)):
        if matrix is not None and matrix.dtype not in DTYPES:
            raise error(TypeError, f"{name} must be bfloat16, float16 or float32, got {matrix.dtype}; cast it first")
    if w_up is not None:
        expect_shape("quantize_weights", w_up, "w_up", tuple(w.shape), "that of w")
        if w_up.dtype != w.dtype:
            raise error(TypeError, f"w_up must have the dtype of w, {w.dtype}, got {w_up.dtype}")
    *outer, width, features = (w.mT if transposed else w).shape
    if gate_up in ("halves", "interleaved"):
        if width % 2:
            words = f"w must have an even number of features for gate_up={gate_up!r}"
            raise error(ValueError, f"{words}, got {width}; is it transposed?")
        width = width // 2
    return weight_specs(tuple(outer), padded_width(width, gate_up), pad(features), backward)


def check_fp8(args: Arguments, quantized: Sequence[Tensor], backward: bool = False, kept: bool = False) -> Quantized:
    """The record of `quantized`; raises ValueError or TypeError unless the experts run in FP8 with these arguments.

    With `backward`, what only that reads has to be there. With `kept` it is what a backward gets (`kept_copies`).
    """
    args.check()
    check_scale_format("experts_fp8", args.scale_format)
    error, dtype = functools.partial(_error, "experts_fp8"), args.dtypes.row
    if dtype not in GEMM_DTYPES:
        raise error(TypeError, f"x and the weights must be bfloat16 or float16, got {dtype}")
    for name in ("x", "b_in", "b_up", "b_out"):
        tensor = getattr(args, name)
        if tensor is not None and tensor.dtype != dtype:
            raise error(TypeError, f"{name} must have the weights' dtype, {dtype}, got {tensor.dtype}; cast it")
    if args.input != "x":
        words = f"input must be 'x', which is quantised once for all its experts, got {args.input!r}"
        raise error(ValueError, f"{words}; weight the activation or the output, or call moecompile::experts")
    if weighting(args.output) is None:
        words = f"output must be 'out' or 'mul(out, weight)', with casts at most, got {args.output!r}"
        raise error(ValueError, f"{words}; call moecompile::experts for others")
    if args.dtypes.result not in DTYPES:
        words = f"the result must be bfloat16, float16 or float32, got {args.dtypes.result}"
        raise error(TypeError, f"{words}; pass out_dtype or cast the routing weights")
    there = backward or any(tensor.shape != NOTHING for tensor in [*quantized][2::4])
    first, second = (not kept or any(each.shape != NOTHING for each in [*quantized][place::8]) for place in (0, 4))
    specs = quantized_specs(args, there, first or args.recompute, second)
    hint = _QUANTIZED + "; a backward needs copies of backward=True" * backward
    return Quantized(*checked("experts_fp8", "quantized", Quantized._fields, quantized, specs, hint))


def kept_copies(quantized: Sequence[Tensor], first: bool) -> list[Tensor]:
    """Of `quantized`, what the backward reads: the others without elements, so that nobody holds them until then.

    With `first`, GEMM1's matrices as they lie are among it.
    """
    in_, in_scales, *turned_in = quantized[:4]
    of_in = [in_, in_scales] if first else [each.new_empty(0) for each in (in_, in_scales)]
    return [*of_in, *turned_in, *(each.new_empty(0) for each in quantized[4:6]), *quantized[6:]]


def check_fp8_backward(args: Arguments, grad: Tensor, saved: Sequence[Tensor], lines: bool = False) -> Saved:
    """The record of `saved`; raises ValueError or TypeError unless it and the result's gradient fit the arguments.

    That is quantised if it is `lines`.
    """
    if lines:
        check_lines("experts_fp8_backward", "grad", grad, args.out_features)
        if args.b_out is not None:
            words = "lines hold the gradient in FP8 alone, and that of b_out is a sum of what it was before"
            raise _error("experts_fp8_backward", ValueError, f"{words}; pass the gradient itself")
    shape = (args.x.shape[0], grad.shape[1] if lines else args.out_features)
    expect_shape("experts_fp8_backward", grad, "grad", shape, "(tokens, features)")
    if grad.dtype not in DTYPES:
        words = f"grad must be bfloat16, float16 or float32, got {grad.dtype}; cast it first"
        raise _error("experts_fp8_backward", TypeError, words)
    return Saved(*checked("experts_fp8", "saved", Saved._fields, saved, saved_specs(args), _SAVED))


_QUANTIZED = "pass [*quantize_weights(w_in, w_up, ...), *quantize_weights(w_out, ...)] with the layouts of this call"
_SAVED = "pass what experts_fp8_forward returned for the same arguments"


def checked(
    operator: str, record: str, names: tuple[str, ...], tensors: Sequence[Tensor], specs: Specs, hint: str
) -> Sequence[Tensor]:
    """The tensors of a record; raises ValueError or TypeError unless they have these shapes and dtypes."""
    if len(tensors) != len(names):
        words = f"{record} must hold {len(names)} tensors ({', '.join(names)}), got {len(tensors)}; {hint}"
        raise _error(operator, ValueError, words)
    for name, tensor, (shape, dtype) in zip(names, tensors, specs, strict=True):
        expect_shape(operator, tensor, f"{name} of {record}", shape, "by the other arguments", hint)
        if tensor.dtype != dtype:
            raise _error(operator, TypeError, f"{name} of {record} must be {dtype}, got {tensor.dtype}; {hint}")
    return tensors


def _error(operator: str, kind: type[Exception], message: str) -> Exception:
    return kind(f"moecompile::{operator}: {message}")
