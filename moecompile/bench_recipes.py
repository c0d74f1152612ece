"""Recipes of FP8 that are known to be worse, to see whether a training run can tell: one for each `with wrong(name)`.

They replace how rows, gradients and matrices of linear layers are cast; the products are the same, and experts, whose
rows are cast inside of their kernels, keep the right recipe but for their matrices. Caches of compiled code do not know
of it, and are off inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from moecompile.passes import decompose
from moecompile.runtime import fp8_experts, linear_fp8
from moecompile.runtime.quantize import (
    BLOCK,
    E4M3,
    SMALLEST_SCALE,
    SQUARE,
    blocks_in,
    dequantize,
    pad,
    quantize,
)
from moecompile.runtime.remembered import Memory

Four = tuple[Tensor, Tensor, Tensor, Tensor]
PER_TENSOR, SQUARE_GRADIENTS, ROUTER, HEAD = "one scale a tensor", "gradients 128x128", "router in FP8", "head in FP8"
FAST = "one scale a tensor, sums not promoted"
UNSCALED = "gradients without scales"
COARSE = "two bits of mantissa"
"""As e5m2 has; of rows, gradients and matrices. Twice the rounding error, which shows how much a run can tell."""
INCLUDED: Mapping[str, tuple[str, ...]] = {ROUTER: ("*.gate",), HEAD: ("lm_head",)}
"""Modules that are cast besides."""


def per_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and the one scale, the smallest power of two that brings the largest number to 448 or less."""
    largest = x.abs().max().float().clamp(min=SMALLEST_SCALE)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 448)))
    return (x.float() / scale).clamp(-448, 448).to(E4M3), scale


def _rows_per_tensor(x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    values, scale = per_tensor(x)
    return values, _filled(x, scale)


def _gradient_per_tensor(grad: Tensor, **_: Any) -> Four:
    values, scale = per_tensor(grad)
    rows = values.reshape(-1, values.shape[-1])
    turned = _token_major(rows)
    return (
        values,
        _filled(grad, scale),
        turned,
        scale.expand(turned.shape[1] // BLOCK, turned.shape[0]).contiguous().t(),
    )


def _gradient_unscaled(grad: Tensor, **_: Any) -> Four:
    """As they are: most gradients of a mean over a batch lie below e4m3's smallest number, 2^-9, and become zero."""
    values = grad.clamp(-448, 448).to(E4M3)
    turned = _token_major(values.reshape(-1, values.shape[-1]))
    one = torch.ones((), device=grad.device)
    of_features = one.expand(turned.shape[1] // BLOCK, turned.shape[0]).contiguous().t()
    return values, _filled(grad, one), turned, of_features


def _gradient_in_squares(grad: Tensor, **_: Any) -> Four:
    rows = grad.reshape(-1, grad.shape[-1])
    values, scales = quantize(rows, SQUARE)
    of_rows = scales.repeat_interleave(BLOCK, 0)[: rows.shape[0]].t().contiguous()
    of_features = scales.repeat_interleave(BLOCK, 1)[:, : rows.shape[1]].contiguous()
    spread = of_rows.view(of_rows.shape[0], *grad.shape[:-1]).movedim(0, -1)
    return values.view(grad.shape), spread, _token_major(values), of_features.t()


def _not_promoted(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, bias: Tensor | None = None, *, out_features: int,
    dtype: torch.dtype, **_: Any,
) -> Tensor:  # fmt: skip
    """The product of tensors that have one scale each, in cuBLASLt's fastest way: the tensor cores keep all of the sum.

    On Hopper they keep some 14 bits of it (DeepSeek-V3, section 3.3.2).
    """
    rows = a.reshape(-1, a.shape[-1])
    product: Tensor = torch._scaled_mm(
        rows, b[:out_features, : rows.shape[1]].t(), a_scales.flatten()[0], b_scales.flatten()[0], out_dtype=dtype,
        use_fast_accum=a.is_cuda,
    )  # fmt: skip
    return (product if bias is None else product + bias).view(*a.shape[:-1], out_features)


def coarse(values: Tensor) -> Tensor:
    """e4m3 numbers rounded once more, to even, to two bits of mantissa behind the leading one."""
    codes = values.view(torch.uint8)
    return torch.where(codes & 0x7F == 0x7F, codes, (codes + (codes >> 1 & 1)) & 0xFE).view(E4M3)  # NaN stays


def _coarsely(right: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The right cast, whose e4m3 values are made coarse."""

    def cast(*args: Any, **attributes: Any) -> tuple[Tensor, ...]:
        return tuple(coarse(each) if each.dtype == E4M3 else each for each in right(*args, **attributes))

    return cast


def _filled(x: Tensor, scale: Tensor) -> Tensor:
    """The scale for each 1x128 of x, laid out as `moecompile::quantize` does it."""
    return scale.expand(blocks_in(x.shape[-1], BLOCK), *x.shape[:-1]).contiguous().movedim(0, -1)


def _token_major(values: Tensor) -> Tensor:
    """Rows (T, F) as (F, P), filled up with zeros."""
    filled = torch.nn.functional.pad(values.view(torch.uint8), (0, 0, 0, pad(values.shape[0]) - values.shape[0]))
    return filled.t().contiguous().view(E4M3)


def _matrices_per_tensor(right: Callable[..., Four]) -> Callable[..., Four]:
    """Copies as the right ones lie, with one scale for all blocks of them."""

    def cast(*args: Any, **attributes: Any) -> Four:
        found = right(*args, **attributes)
        made: list[Tensor] = []
        for values, scales in (found[:2], found[2:]):
            if not values.numel():
                made += [values, scales]
                continue
            again, scale = per_tensor(dequantize(values, scales, SQUARE))
            made += [again, scale.expand_as(scales).contiguous()]
        values, scales, values_t, scales_t = made
        return values, scales, values_t, scales_t

    return cast


@contextlib.contextmanager
def wrong(name: str | None) -> Iterator[Mapping[str, Any]]:
    """Within, layers are cast by that recipe; the options that the backend needs besides. None: by the right one."""
    with contextlib.ExitStack() as stack:

        def replace(module: Any, attribute: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(module, attribute, value))

        stack.enter_context(inductor_config.patch(force_disable_caches=True))
        if name in (PER_TENSOR, FAST, SQUARE_GRADIENTS, UNSCALED, COARSE):
            replace(linear_fp8, "CALLS", _Forgetful())
            stack.enter_context(decompose.casts_apart())
        if name == FAST:
            replace(linear_fp8, "scaled_mm", _not_promoted)
        if name in (PER_TENSOR, FAST):
            replace(linear_fp8, "quantize", _rows_per_tensor)
            replace(linear_fp8, "quantize_gradient", _gradient_per_tensor)
            replace(fp8_experts, "quantize_weights", _matrices_per_tensor(fp8_experts.quantize_weights))
        if name == SQUARE_GRADIENTS:
            replace(linear_fp8, "quantize_gradient", _gradient_in_squares)
        if name == UNSCALED:
            replace(linear_fp8, "quantize_gradient", _gradient_unscaled)
        if name == COARSE:
            for module, attribute in (
                *((linear_fp8, each) for each in ("quantize", "quantize_gradient")),
                (fp8_experts, "quantize_weights"),
            ):
                replace(module, attribute, _coarsely(getattr(module, attribute)))
        yield {"fp8_include": INCLUDED[name]} if name is not None and name in INCLUDED else {}


class _Forgetful(Memory):
    """Nothing of the right recipe is made again within, nor anything of this one afterwards."""

    def again(self, *_: Any) -> None:
        return None

    def first(self, operator: str, tensors: Any, attributes: Any, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        return run()
