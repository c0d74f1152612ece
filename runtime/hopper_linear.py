"""A linear layer in FP8 on a Hopper GPU: the grouped GEMMs of the experts, for one expert that has every token.

    y = x8 @ w8.T + bias                  g8 = quantise(grad), of_x = g8 @ w8
    of_weight = (g8 transposed, requantised along tokens) @ (x8 transposed, shifted to scales for 128 x 128).T

What these kernels do not take (`takes`) runs in PyTorch's operators (`moecompile.runtime.linear_fp8`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moecompile.runtime import hopper_fp8_gemm, hopper_quantize
from moecompile.runtime.hopper_quantize import Matrices, QuantizedRows


def takes(weight: Tensor, values: Tensor, quantized: Sequence[Tensor]) -> bool:
    """Whether the kernels compute it: bfloat16, a token at least, copies in whole lines of 16 bytes."""
    tensors = (values, *(each for each in quantized if each.numel()))
    whole = all(each.is_contiguous() and each.data_ptr() % 16 == 0 for each in tensors)
    return weight.dtype == torch.bfloat16 and values.numel() > 0 and whole


def forward(weight: Tensor, bias: Tensor | None, values: Tensor, scales: Tensor, quantized: Sequence[Tensor]) -> Tensor:
    """The result (T, N) for values (T, K) and scales (T, K / 128)."""
    out = weight.new_empty(values.shape[0], weight.shape[0])
    biases = None if bias is None else bias.unsqueeze(0).contiguous()
    return hopper_fp8_gemm.product(
        _rows(values, scales), _matrix(*quantized[:2]), _end(values), out, biases
    )  # fmt: skip


def backward(
    grad: Tensor, weight: Tensor, values: Tensor, scales: Tensor, quantized: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """The needed gradients of x (T, K), weight and bias, for the result's gradient (T, N), contiguous bfloat16."""
    of_x, of_weight, of_bias = needs
    tokens, found = torch.arange(grad.shape[0], dtype=torch.int32, device=grad.device), list[Tensor]()
    rows = QuantizedRows.empty(grad, *grad.shape)
    if of_x or of_weight:
        hopper_quantize.quantize_rows(grad, tokens.unsqueeze(1), rows, None)
    if of_x:
        out = grad.new_empty(values.shape)
        found.append(hopper_fp8_gemm.product(rows, _matrix(*quantized[2:]), _end(values), out))
    if of_weight:
        end = _end(values)
        ends = hopper_quantize.pad_offsets(end)
        along = hopper_quantize.transpose_rows(rows.values, rows.scales, tokens, end, ends, top_k=None, per_column=True)
        x = hopper_quantize.transpose_rows(values, scales.contiguous(), tokens, end, ends, top_k=1, per_column=False)
        found.append(hopper_fp8_gemm.outer(along, x, ends, weight.unsqueeze(0), transposed=False).squeeze(0))
    if of_bias:
        found.append(grad.sum(0, dtype=torch.float32).to(weight.dtype))
    return found


def _rows(values: Tensor, scales: Tensor) -> QuantizedRows:
    """Tokens as rows: their scales transposed."""
    rows = QuantizedRows(values, QuantizedRows.empty(values, *values.shape).scales)
    rows.scales[:, : values.shape[0]].copy_(scales.t())
    return rows


def _matrix(values: Tensor, scales: Tensor) -> Matrices:
    return Matrices(values.unsqueeze(0), scales.unsqueeze(0))


def _end(values: Tensor) -> Tensor:
    """The end of the one expert's rows."""
    return torch.full((1,), values.shape[0], dtype=torch.int32, device=values.device)
