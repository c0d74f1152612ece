"""Readable torch emulation of the experts in FP8, forward and backward, for the CPU and any GPU.

It computes what the Hopper kernels compute: operands are rounded to e4m3 with the scales of
`moecompile.runtime.quantize`, dequantised, and multiplied in float32. q() is 1x128 along a row's features:

    x_q = q(x) of each token                            hidden = x_q[token] @ w_in_q.T + b_in, rounded
    a   = activation(hidden), rounded                   y = q(a) @ w_out_q.T + b_out, rounded; result = combine(y)

Kept for backward are x_q and q(hidden), each of gate and up with blocks of its own, no 16-bit value of either:

    g   = q(grad), rounded before, not weighted yet     of_a = g @ w_out_q                   a = activation(q(hidden))
    of_hidden = activation'(of_a * weight), rounded     of_weight = <of_a, a> + <grad, b_out>
    of_row = q(of_hidden) @ w_in_q, rounded             of_x = sum over a token's rows

Weights' gradients contract over an expert's own rows, cut into blocks of 128 from its first one, the last padded with
zeros. There gradients (g, q(of_hidden)) are quantised once more, along tokens, and activations (x_q, q(a * weight))
are shifted to one scale for 128x128. Biases' gradients are sums of the rounded gradients, not of quantised ones; the
Hopper kernels keep no others than quantised ones of GEMM1's rows, and sum those.

Scales of what products forward and of the rows' gradients read may be float32 (`scale_format`); those of GEMM1's saved
rows, and of the operands of matrices' gradients, are powers of two.

The activation is evaluated in float32 and rounded once, where the 16-bit reference rounds each step of it. No operand
is chunked, and the dequantised weights are float32: this is a path to read and to compare with, not a fast one. On a
device it asks the host for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from functools import cached_property

import torch
from torch import Tensor

from moecompile.runtime.backward import means
from moecompile.runtime.blocked import blocks_of
from moecompile.runtime.combine import token_sum, weighted_sum
from moecompile.runtime.contract import PARAMETERS, Arguments, expression_leaves, weighting
from moecompile.runtime.elementwise import evaluate, vjp
from moecompile.runtime.fp8_contract import PITCH, Quantized, Saved
from moecompile.runtime.grouped import CpuRows, DeviceRows, row_dot
from moecompile.runtime.quantize import (
    ALONG_FEATURES,
    ALONG_TOKENS,
    BLOCK,
    SMALLEST_SCALE,
    SQUARE,
    dequantize,
    pack,
    quantize,
    requantize_along_tokens,
    split_features,
    to_square_blocks,
    unpack,
)
from moecompile.runtime.reference import joined, rows_for


def forward(
    args: Arguments, quantized: Quantized, save: bool, tokens: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Saved | None]:
    """The result (T, H2) and, to save, x and GEMM1's rows in FP8; `tokens` are x, where that is quantised already."""
    rows, dtype = rows_for(args), args.dtypes.hidden
    x_q = tokens or quantize(args.x, ALONG_FEATURES, args.scale_format)
    hidden = _gemm1(args, quantized, rows, x_q)
    weight = None if args.weights is None else rows.weight(args.weights)
    a = evaluate(args.activation, _leaves(args, hidden.to(torch.float32), weight)).to(dtype)
    of_a = dequantize(*quantize(a, ALONG_FEATURES, args.scale_format), ALONG_FEATURES)
    y = rows.linear(of_a, _w_out(args, quantized), False, args.b_out).to(args.dtypes.out)
    result = weighted_sum(args, y, rows.complete)
    if not save:
        return result, None
    kept = hidden[:0] if args.recompute else rows.every(hidden, args.rows)
    return result, Saved(*x_q, *_quantized_rows(kept))


def _gemm1(args: Arguments, quantized: Quantized, rows: CpuRows | DeviceRows, x_q: tuple[Tensor, Tensor]) -> Tensor:
    """GEMM1's rows, rounded, of those that have an expert, for the tokens in FP8."""
    x = dequantize(*x_q, ALONG_FEATURES)
    return rows.linear(rows.gather(x), _w_in(args, quantized), False, _packed_bias(args)).to(args.dtypes.hidden)


def _quantized_rows(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """GEMM1's rows (R, N') as they are kept: values, and scales transposed."""
    values, scales = quantize(hidden, ALONG_FEATURES)
    return values, torch.nn.functional.pad(scales.t(), (0, -hidden.shape[0] % PITCH)).contiguous()


def backward(
    args: Arguments, quantized: Quantized, grad: Tensor, saved: Saved, needs: Collection[str],
    of_tokens: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of the arguments named in `needs`, for the result's gradient (T, H2); x has no values in args.

    `of_tokens` are that gradient, where it is quantised already: then nobody reads `grad`.
    """
    return means(args, _Backward(args, quantized, grad, saved, needs, of_tokens).run(), PARAMETERS)


class _Backward:
    """One backward. What several gradients share is computed when the first of them asks for it."""

    def __init__(
        self, args: Arguments, quantized: Quantized, grad: Tensor, saved: Saved, needs: Collection[str],
        of_tokens: tuple[Tensor, Tensor] | None,
    ) -> None:  # fmt: skip
        self.args, self.quantized, self.saved, self.needs = args, quantized, saved, needs
        self.grad, self.of_tokens = grad.to(args.dtypes.activation), of_tokens
        self.rows = rows_for(args)
        self.count = self.rows.assignments.shape[0]
        if args.recompute:
            x_q = saved.x_values, saved.x_scales
            hidden = self.rows.every(_gemm1(args, quantized, self.rows, x_q), args.rows)
            self.saved = Saved(*x_q, *_quantized_rows(hidden))
        self.weight = None if args.weights is None else self.rows.weight(args.weights)

    def run(self) -> dict[str, Tensor]:
        """The needed gradients by name."""
        compute: dict[str, Callable[[], Tensor]] = {
            "x": self._of_x,
            "weights": self._of_weights,
            "w_in": lambda: self._of_matrix(self.args.w_in, "in"),
            "w_up": lambda: self._of_matrix(self.args.w_up, "up"),
            "w_out": self._of_w_out,
            "b_in": lambda: self._of_bias(self.args.b_in, "in"),
            "b_up": lambda: self._of_bias(self.args.b_up, "up"),
            "b_out": self._of_b_out,
        }
        return {name: compute[name]() for name in self.needs}

    def _of_x(self) -> Tensor:
        of_product = dequantize(*self.of_hidden_q, ALONG_FEATURES)
        turned = dequantize(self.quantized.w_in_t, self.quantized.w_in_t_scales, SQUARE)  # (E, H', N')
        of_rows = self.rows.linear(of_product, turned[:, : self.args.x.shape[1]], False)
        dtype = self.args.dtypes.row
        # as float32 again, because the CPU's embedding_bag rounds sums of bfloat16 half away from zero
        rounded = of_rows.to(dtype).to(torch.float32)
        return token_sum(rounded, self.args.slots, dtype, self.rows.complete)

    def _of_weights(self) -> Tensor:
        args = self.args
        assert args.weights is not None
        of_rows = self.of_a.new_zeros(self.count, 1)
        if self.scale is not None:
            value, _ = self.activation
            of_rows = of_rows + row_dot(self.of_a, value.to(torch.float32))
            if args.b_out is not None:
                of_y = self.rows.gather(self.grad).to(torch.float32)  # products are not to be rounded
                of_rows = of_rows + self.rows.bias_dot(args.b_out, of_y)
        if "weight" in self.pulled:
            of_rows = of_rows + self.pulled["weight"]
        each = args.slots.reshape(-1, 1)
        return token_sum(of_rows, each, args.weights.dtype, self.rows.complete).view(args.slots.shape)

    def _of_w_out(self) -> Tensor:
        args = self.args
        value, _ = self.activation
        weighted = value if self.scale is None else value * self.scale
        a = self.blocks.activations(*quantize(weighted.to(args.dtypes.activation), ALONG_FEATURES))
        of_y = self.blocks.gradients(*self.of_result_q)
        return self.rows.weight_gradient(args.w_out, a, of_y, args.w_out_transposed).to(args.w_out.dtype)

    def _of_matrix(self, matrices: Tensor | None, name: str) -> Tensor:
        assert matrices is not None
        values, scales = self.saved.x_values.to(torch.float32), self.saved.x_scales
        x = self.blocks.activations(self.rows.gather(values), self.rows.gather(scales))
        parts = unpack(self.blocks.gradients(*self.of_hidden_q), self.args.intermediate)
        of_product = joined(self.args.gate_up, parts)[name]
        return self.rows.weight_gradient(matrices, x, of_product, self.args.w_in_transposed).to(matrices.dtype)

    def _of_bias(self, bias: Tensor | None, name: str) -> Tensor:
        assert bias is not None
        return self.rows.bias_gradient(bias, joined(self.args.gate_up, self.of_hidden)[name])

    def _of_b_out(self) -> Tensor:
        assert self.args.b_out is not None
        of_y = self.rows.gather(self.grad).to(torch.float32)
        return self.rows.bias_gradient(self.args.b_out, of_y if self.scale is None else of_y * self.scale)

    @cached_property
    def scale(self) -> Tensor | None:
        """What the output multiplies a row by (R, 1), float32: the routing weight with its casts."""
        form = weighting(self.args.output)
        assert form is not None
        if form.of_weight is None or self.weight is None:
            return None
        return functools.reduce(Tensor.to, form.of_weight, self.weight).to(torch.float32)

    @cached_property
    def blocks(self) -> _TokenBlocks:
        """Blocks of 128 tokens of an expert."""
        return _TokenBlocks(self.args.offsets, self.count)

    @cached_property
    def of_result_q(self) -> tuple[Tensor, Tensor]:
        """The rows of the result's gradient (R, H2), quantised for each token: values in float32, scales."""
        values, scales = self.of_tokens or quantize(self.grad, ALONG_FEATURES, self.args.scale_format)
        return self.rows.gather(values.to(torch.float32)), self.rows.gather(scales)

    @cached_property
    def of_a(self) -> Tensor:
        """Gradient of the activation (R, I) before the routing weight scales it, float32."""
        of_y = dequantize(*self.of_result_q, ALONG_FEATURES)
        turned = dequantize(self.quantized.w_out_t, self.quantized.w_out_t_scales, SQUARE)  # (E, I', H2')
        return self.rows.linear(of_y, turned[:, : self.args.intermediate, : self.args.out_features], False)

    @cached_property
    def activation(self) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
        """The activation of the saved hidden rows (R, I) and its pullback to gate, up and weight."""
        scales = self.saved.hidden_scales.t()[: self.count]
        hidden = dequantize(self.saved.hidden_values[: self.count], scales, ALONG_FEATURES)
        leaves = _leaves(self.args, hidden, self.weight)
        wanted = leaves.keys() - (set() if "weights" in self.needs else {"weight"})
        return vjp(self.args.activation, leaves, wanted)

    @cached_property
    def pulled(self) -> dict[str, Tensor]:
        """Gradients of the activation's leaves, float32; one that it does not read has none."""
        value, pullback = self.activation
        upstream = self.of_a if self.scale is None else self.of_a * self.scale
        return pullback(upstream.to(value.dtype))

    @cached_property
    def of_hidden(self) -> list[Tensor]:
        """Gradients of gate and up (R, I), rounded to the model's dtype."""
        names = ("hidden",) if self.args.gate_up == "single" else ("gate", "up")
        found = [self.pulled.get(name) for name in names]
        nothing = self.of_a.new_zeros(())
        return [(nothing.expand_as(self.of_a) if part is None else part).to(self.args.dtypes.hidden) for part in found]

    @cached_property
    def of_hidden_q(self) -> tuple[Tensor, Tensor]:
        """The same, packed (R, N') and quantised: values and scales."""
        return quantize(pack(self.of_hidden), ALONG_FEATURES, self.args.scale_format)


class _TokenBlocks:
    """The operands of weights' gradients (R, F), their rows cut into blocks of 128 tokens of an expert."""

    def __init__(self, offsets: Tensor, count: int) -> None:
        self.count, self.rows = count, blocks_of(offsets, count, BLOCK).rows

    def gradients(self, values: Tensor, scales: Tensor) -> Tensor:
        """Gradients quantised for 1x128, quantised once more along tokens, and dequantised (R, F)."""
        again = requantize_along_tokens(self._cut(values, 0), self._cut(scales, SMALLEST_SCALE))
        return self._rows_of(dequantize(*again, ALONG_TOKENS))

    def activations(self, values: Tensor, scales: Tensor) -> Tensor:
        """Activations quantised for 1x128, shifted to scales for 128x128, and dequantised (R, F)."""
        shifted = to_square_blocks(self._cut(values, 0), self._cut(scales, SMALLEST_SCALE))
        return self._rows_of(dequantize(*shifted, SQUARE))

    def _cut(self, rows: Tensor, padding: float) -> Tensor:
        """Rows (R, F) in blocks (B, 128, F), float32 because few kernels take e4m3."""
        rows = rows.to(torch.float32)
        return torch.cat((rows, rows.new_full((1, rows.shape[1]), padding)))[self.rows]

    def _rows_of(self, blocks: Tensor) -> Tensor:
        """Blocks (B, 128, F) as rows (R, F); zeros for rows without an expert."""
        rows = blocks.new_zeros(self.count + 1, blocks.shape[2])
        rows[self.rows] = blocks
        return rows[: self.count]


def _w_in(args: Arguments, quantized: Quantized) -> Tensor:
    """GEMM1's matrices (E, N', H), dequantised: gate and up padded."""
    return dequantize(quantized.w_in, quantized.w_in_scales, SQUARE)[:, :, : args.x.shape[1]]


def _w_out(args: Arguments, quantized: Quantized) -> Tensor:
    """GEMM2's matrices (E, H2, I), dequantised."""
    return dequantize(quantized.w_out, quantized.w_out_scales, SQUARE)[:, : args.out_features, : args.intermediate]


def _packed_bias(args: Arguments) -> Tensor | None:
    """GEMM1's biases (E, N'), None if there are none; one that is missing is zero."""
    given = [bias for bias in (args.b_in, args.b_up) if bias is not None]
    if not given:
        return None
    if args.gate_up == "separate":
        given = [torch.zeros_like(given[0]) if bias is None else bias for bias in (args.b_in, args.b_up)]
    return pack(split_features(given, args.gate_up))


def _leaves(args: Arguments, hidden: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
    """The activation's leaves in packed hidden rows (R, N'), float32: gate and up, or hidden, and weight if read."""
    names = ("hidden",) if args.gate_up == "single" else ("gate", "up")
    leaves = dict(zip(names, unpack(hidden, args.intermediate), strict=True))
    if weight is not None and "weight" in expression_leaves(args.activation):
        leaves["weight"] = weight.to(torch.float32)
    return leaves
