"""FP8 by its definition, in float64: what tests/test_quantize.py and tests/test_experts_fp8.py compare with.

Written apart from the package: the numbers of e4m3 come from its format, the scale of a block from a search, and the
experts run one after another.
"""

from __future__ import annotations

import bisect
import itertools
import math

import torch
from torch import Tensor

from dense_experts import Case

E4M3 = [m * 2.0**-9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127]
"""The magnitudes of e4m3 by their codes: 4 bits of exponent with bias 7, 3 of mantissa, no infinity, 448 the last."""
Block = tuple[int, int]
ROW, COLUMN, SQUARE = (1, 128), (128, 1), (128, 128)
POWERS = "power_of_two"


def nearest(values: Tensor) -> Tensor:
    """The nearest numbers of e4m3, the even code of two; float64."""
    rounded = []
    for value in values.flatten().tolist():
        above = min(bisect.bisect_left(E4M3, abs(value)), 126)
        codes = (max(above - 1, 0), above)
        code = min(codes, key=lambda code: (abs(E4M3[code] - abs(value)), code % 2))
        rounded.append(math.copysign(E4M3[code], value))
    return torch.tensor(rounded, dtype=torch.float64).view(values.shape)


def smallest_scale(amax: float) -> float:
    """The smallest power of two, from 2^-126 on, with which amax does not exceed 448."""
    return next(2.0**k for k in range(-126, 121) if amax <= 448 * 2.0**k)


def float32(value: float) -> float:
    """The nearest number of float32: of a quotient or product of two such in float64, that of the exact one."""
    return float(torch.tensor(value, dtype=torch.float64).float())


def scale_and_inverse(amax: float, scale_format: str) -> tuple[float, float]:
    """By what a block's numbers are divided, and what they are multiplied by for it."""
    if scale_format == POWERS:
        scale = smallest_scale(amax)
        return scale, 1 / scale
    scale = max(float32(amax / 448), 2.0**-126)
    return scale, float32(1 / scale)


def quantized(values: Tensor, block: Block, scale_format: str = POWERS) -> tuple[Tensor, Tensor]:
    """Values (R, F) as e4m3 numbers in float64, and the scales of their blocks."""
    values = values.double()
    found = torch.empty_like(values)
    starts = [range(0, size, step) for size, step in zip(values.shape, block, strict=True)]
    scales = torch.empty([len(start) for start in starts], dtype=torch.float64)
    for (i, row), (j, column) in itertools.product(*map(enumerate, starts)):
        part = slice(row, row + block[0]), slice(column, column + block[1])
        scales[i, j], inverse = scale_and_inverse(float(values[part].abs().max()), scale_format)
        found[part] = nearest((values[part] * inverse).float().double())
    return found, scales


def rounded(values: Tensor, block: Block, scale_format: str = POWERS) -> Tensor:
    """Values (R, F) quantised and dequantised, float64 but for the rounding to float32 of each."""
    found, scales = quantized(values, block, scale_format)
    return (found * spread(scales, block, values)).float().double()


def spread(scales: Tensor, block: Block, like: Tensor) -> Tensor:
    """The scale of each value."""
    down, across = like.shape
    return scales.repeat_interleave(block[0], 0)[:down].repeat_interleave(block[1], 1)[:, :across]


def shifted(values: Tensor, scale_format: str = POWERS) -> Tensor:
    """Activations (R, F), quantised for 1x128, with a power of two, the largest scale or above it, of every 128x128."""
    found, scales = quantized(values, ROW, scale_format)
    largest = torch.stack([part.amax(0) for part in scales.split(128)]).log2().ceil().exp2()
    whole = spread(largest, SQUARE, values)
    return nearest((found * (spread(scales, ROW, values) / whole)).float().double()) * whole


def matrices(case: Case) -> list[Tensor]:
    """Gate and up projection (E, I, H), or the only one, of GEMM1."""
    given = {name: tensor.detach().double() for name, tensor in case.given.items()}
    found = [given[name].mT if case.transposed[0] else given[name] for name in ("w_in", "w_up") if name in given]
    return parts(case.gate_up, found)


def parts(gate_up: str, tensors: list[Tensor]) -> list[Tensor]:
    if gate_up == "halves":
        return list(tensors[0].tensor_split(2, 1))
    return [tensors[0][:, ::2], tensors[0][:, 1::2]] if gate_up == "interleaved" else tensors


def together(gate_up: str, tensors: list[Tensor]) -> Tensor:
    """The inverse of `parts`, for one tensor."""
    return torch.cat(tensors, 1) if gate_up == "halves" else torch.stack(tensors, 2).flatten(1, 2)


def experts(case: Case, cotangent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The result of a case in FP8 and the gradients of all its tensors, float64."""
    given = {name: tensor.detach().double() for name, tensor in case.given.items()}
    dtype, weighted, kind = case.given["x"].dtype, "weights" in given, case.attributes.get("scale_format", POWERS)
    w_in, w_out = matrices(case), given["w_out"].mT if case.transposed[1] else given["w_out"]
    names = [name for name in ("b_in", "b_up") if name in given]  # of two projections both or none
    biases = parts(case.gate_up, [given[name] for name in names]) if names else []
    grads = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    of_w_in, of_biases = [torch.zeros_like(w) for w in w_in], [torch.zeros_like(b) for b in biases]
    of_w_out = torch.zeros_like(w_out)
    cotangent = cotangent.to(dtype).double()  # rounded as the model's other values, then quantised
    x, g = rounded(given["x"], ROW, kind), rounded(cotangent, ROW, kind)
    result = torch.zeros(cotangent.shape, dtype=torch.float64)
    for e in range(w_out.shape[0]):
        tokens, slots = (case.ids == e).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        weight = given["weights"][tokens, slots].unsqueeze(1) if weighted else torch.ones(1, dtype=torch.float64)
        first, second = [rounded(w[e], SQUARE, kind) for w in w_in], rounded(w_out[e], SQUARE, kind)
        added = [bias[e] for bias in biases] or [torch.zeros(1)] * len(first)
        hidden = [(x[tokens] @ w.T + bias).to(dtype).double() for w, bias in zip(first, added, strict=True)]
        a = case.form.activate(hidden[0], hidden[-1], weight).to(dtype)
        y = rounded(a, ROW, kind) @ second.T + (given["b_out"][e] if "b_out" in given else 0)
        result.index_add_(0, tokens, case.form.finish(y.to(dtype).double(), weight))

        leaves = [rounded(part, ROW).requires_grad_() for part in hidden]
        of_a, a = g[tokens] @ second, case.form.activate(leaves[0], leaves[-1], weight)
        found = torch.autograd.grad(a, leaves, of_a * weight, allow_unused=True, materialize_grads=True)
        of_hidden = [grad.to(dtype).double() for grad in found]
        a = a.detach()
        of_row = sum(rounded(grad, ROW, kind) @ w for grad, w in zip(of_hidden, first, strict=True))
        assert isinstance(of_row, Tensor)
        grads["x"].index_add_(0, tokens, of_row.to(dtype).double())
        if weighted:
            grads["weights"][tokens, slots] = (of_a * a).sum(1)
        if "b_out" in given:
            grads["b_out"][e] = (cotangent.double()[tokens] * weight).sum(0)
            if weighted:
                grads["weights"][tokens, slots] += cotangent.double()[tokens] @ given["b_out"][e]
        of_w_out[e] = along(g[tokens]).T @ shifted((a * weight).to(dtype))
        rows = shifted(given["x"][tokens], kind)
        for grad, of_w in zip(of_hidden, of_w_in, strict=True):
            of_w[e] = along(rounded(grad, ROW, kind)).T @ rows
        for grad, of_bias in zip(of_hidden, of_biases, strict=False):
            of_bias[e] = grad.sum(0)
    grads["w_out"] = of_w_out.mT if case.transposed[1] else of_w_out
    laid_out = of_w_in if case.gate_up in ("separate", "single") else [together(case.gate_up, of_w_in)]
    for name, of_w in zip(("w_in", "w_up"), laid_out, strict=False):
        grads[name] = of_w.mT if case.transposed[0] else of_w
    if names:
        laid_out = of_biases if case.gate_up in ("separate", "single") else [together(case.gate_up, of_biases)]
        grads |= dict(zip(names, laid_out, strict=True))
    return result, grads


def along(values: Tensor) -> Tensor:
    """Gradients (R, F) quantised once more, every 128 tokens of a feature."""
    return rounded(values, COLUMN)
