"""The FP8 quantiser against its definition, bit for bit, and what its operands cost a product in accuracy."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fp8_by_hand as by_hand
import moecompile.runtime.operators  # noqa: F401  registers torch.ops.moecompile
from moecompile.runtime.quantize import (
    ALONG_FEATURES,
    ALONG_TOKENS,
    FLOAT32,
    POWER_OF_TWO,
    SCALE_FORMATS,
    SQUARE,
    dequantize,
    pack,
    pad,
    quantize,
    requantize_along_tokens,
    to_square_blocks,
    unpack,
)

ops = torch.ops.moecompile
BLOCKS = (ALONG_FEATURES, ALONG_TOKENS, SQUARE)
SMALLEST = 2.0**-126
QNAN = 0x7F


def assert_by_hand(values: Tensor, block: tuple[int, int]) -> None:
    """Codes and scales are those of the definition, in both formats of scales."""
    for scale_format in SCALE_FORMATS:
        found, scales = quantize(values, block, scale_format)
        expected, expected_scales = by_hand.quantized(values, block, scale_format)
        assert torch.equal(scales.double(), expected_scales)
        assert torch.equal(found.view(torch.uint8), expected.to(torch.float8_e4m3fn).view(torch.uint8))
        assert found.is_contiguous() and scales.is_contiguous()


def row(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """One block of 1x128 with these values and zeros."""
    return torch.tensor([[*values, *[0.0] * (128 - len(values))]], dtype=dtype)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (130, 257), (256, 96)], ids=str)
def test_blocks_of_any_shape_and_dtype(block: tuple[int, int], dtype: torch.dtype, shape: tuple[int, int]):
    torch.manual_seed(0)
    values = torch.randn(shape) * torch.exp2(torch.randint(-12, 12, (shape[0], 1)))
    assert_by_hand(values.to(dtype), block)


def test_every_tie_and_its_neighbours_with_both_signs():
    """Halfway between two numbers of e4m3 goes to the even one; one bit of float32 beside it does not."""
    ties = [(low + high) / 2 for low, high in itertools.pairwise(by_hand.E4M3)]
    exact = torch.tensor([*ties, 448.0])
    for values in (exact, exact.nextafter(torch.zeros(())), exact[:-1].nextafter(torch.full((), 999.0))):
        for sign, power in itertools.product((1, -1), (0, 3, -9)):
            assert_by_hand(row(448.0 * 2.0**power, *(sign * values[:120] * 2.0**power).tolist()), ALONG_FEATURES)


@pytest.mark.parametrize("power", [-126, -120, -9, -1, 0, 1, 15, 119])
def test_the_scale_turns_exactly_at_448(power: int):
    for amax in (448 * 2.0**power, 256 * 2.0**power, 1.0 * 2.0**power):
        edge = torch.tensor(amax)
        for value in (edge, edge.nextafter(torch.zeros(())), edge.nextafter(torch.full((), torch.inf))):
            assert_by_hand(row(float(value), 0.3 * amax), ALONG_FEATURES)
    assert quantize(row(448 * 2.0**power), ALONG_FEATURES)[1].item() == 2.0**power
    above = float(torch.tensor(448 * 2.0**power).nextafter(torch.full((), torch.inf)))
    assert quantize(row(above), ALONG_FEATURES)[1].item() == 2.0 ** (power + 1)


@pytest.mark.parametrize("amax", [1e-10, 2.0**-118, 2.0**-126, 2.0**-127, 2.0**-149, 3.3e38])
def test_tiny_subnormal_and_huge_values(amax: float):
    torch.manual_seed(0)
    assert_by_hand(row(amax, *(amax * torch.rand(100)).tolist()), ALONG_FEATURES)


def test_gradients_of_1e_10_lose_nothing_but_rounding():
    torch.manual_seed(0)
    values = torch.randn(16, 256)
    scale = 2.0**-33  # 1.2e-10: scales of powers of two make the rounding the same at any power
    found, expected = (dequantize(*quantize(v, ALONG_FEATURES), ALONG_FEATURES) for v in (values * scale, values))
    assert torch.equal(found, expected * scale)


def test_zeros_are_exact_and_their_scale_is_finite():
    for block in BLOCKS:
        found, scales = quantize(torch.zeros(130, 130), block)
        assert not found.view(torch.uint8).any() and torch.equal(scales, torch.full_like(scales, SMALLEST))
    signs = quantize(row(-0.0, -9e-4, 448.0), ALONG_FEATURES)[0].view(torch.uint8)[0, :3]
    assert signs.tolist() == [0x80, 0x80, 0x7E]  # as rounding to zero keeps the sign


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_nan_and_infinity_stay_visible(dtype: torch.dtype):
    found, scales = quantize(row(torch.nan, -torch.nan, 448.0, 1.0, dtype=dtype), ALONG_FEATURES)
    assert scales.item() == 1.0  # which the NaNs do not decide
    assert found.view(torch.uint8)[0, :4].tolist() == [QNAN, QNAN, 0x7E, 0x38]
    for infinity in (torch.inf, -torch.inf):
        values = torch.cat((row(1.0, infinity, -1.0, dtype=dtype), row(1.0, dtype=dtype)), 1)
        found, scales = quantize(values, ALONG_FEATURES)
        assert scales.tolist() == [[torch.inf, 2.0**-8]]
        assert found.view(torch.uint8)[0, :4].tolist() == [0, QNAN, 0x80, 0]
        assert dequantize(found, scales, ALONG_FEATURES).isnan().sum() == 128
    for scale_format in SCALE_FORMATS:
        all_nan, scales = quantize(torch.full((1, 128), torch.nan, dtype=dtype), ALONG_FEATURES, scale_format)
        assert scales.item() == SMALLEST and bool((all_nan.view(torch.uint8) == QNAN).all())
    found, scales = quantize(row(1.0, torch.inf, torch.nan, dtype=dtype), ALONG_FEATURES, FLOAT32)
    assert scales.item() == torch.inf and found.view(torch.uint8)[0, :4].tolist() == [0, QNAN, QNAN, 0]
    assert dequantize(found, scales, ALONG_FEATURES).isnan().all()


def test_dequantised_is_what_is_multiplied():
    torch.manual_seed(0)
    values = torch.randn(130, 200).bfloat16()
    for block in BLOCKS:
        found = dequantize(*quantize(values, block), block)
        assert torch.equal(found.double(), by_hand.rounded(values, block))
        assert torch.equal(dequantize(*quantize(found, block), block), found)  # quantising again changes nothing


def wide(rows: int, features: int) -> Tensor:
    """Rows whose norms differ by up to 2^16, so that shifted values fall below the smallest of e4m3."""
    torch.manual_seed(0)
    return torch.randn(rows, features) * torch.exp2(torch.randint(-8, 8, (rows, 1)))


def test_shifted_to_square_blocks():
    values = wide(150, 200)
    found, scales = to_square_blocks(*quantize(values, ALONG_FEATURES))
    assert torch.equal(dequantize(found, scales, SQUARE).double(), by_hand.shifted(values))
    assert torch.equal(scales, quantize(values, SQUARE)[1])  # the largest of the rows' scales is the block's own
    in_batch = to_square_blocks(*quantize(values.expand(2, 150, 200), ALONG_FEATURES))[0]
    assert torch.equal(in_batch[1].float(), found.float())
    found, scales = to_square_blocks(*quantize(values, ALONG_FEATURES, FLOAT32))
    assert torch.equal(dequantize(found, scales, SQUARE).double(), by_hand.shifted(values, FLOAT32))
    assert torch.equal(scales.log2(), scales.log2().round())
    values[3, 5] = torch.inf
    found, scales = to_square_blocks(*quantize(values, ALONG_FEATURES, FLOAT32))
    assert scales[0, 0] == torch.inf and scales[0, 1:].isfinite().all() and scales[1].isfinite().all()


def test_requantised_along_tokens():
    values = wide(150, 200)
    found, scales = requantize_along_tokens(*quantize(values, ALONG_FEATURES))
    expected = by_hand.rounded(by_hand.rounded(values, by_hand.ROW), by_hand.COLUMN)
    assert torch.equal(dequantize(found, scales, ALONG_TOKENS).double(), expected)
    found, scales = requantize_along_tokens(*quantize(values, ALONG_FEATURES, FLOAT32))
    expected = by_hand.rounded(by_hand.rounded(values, by_hand.ROW, FLOAT32), by_hand.COLUMN)
    assert torch.equal(dequantize(found, scales, ALONG_TOKENS).double(), expected)


def test_accuracy_of_one_product():
    """The relative L2 error of an FP8 product is 0.037 to 0.038 for any K, measured for K = 2048 and 7168."""
    torch.manual_seed(0)
    tokens, features, out = 512, 1024, 384
    x, w, grad = torch.randn(tokens, features), torch.randn(out, features), torch.randn(tokens, out)
    x_q, w_q, grad_q = quantize(x, ALONG_FEATURES), quantize(w, SQUARE), quantize(grad, ALONG_FEATURES)
    x_d, w_d = dequantize(*x_q, ALONG_FEATURES), dequantize(*w_q, SQUARE)
    grad_d = dequantize(*grad_q, ALONG_FEATURES)
    by_token = dequantize(*requantize_along_tokens(*grad_q), ALONG_TOKENS)
    products = {
        "forward": (x_d @ w_d.T, x @ w.T),
        "dgrad": (grad_d @ w_d, grad @ w),
        "wgrad": (by_token.T @ dequantize(*to_square_blocks(*x_q), SQUARE), grad.T @ x),
    }
    for name, (found, exact) in products.items():
        error = float((found - exact).norm() / exact.norm())
        # two operands with errors of 0.0256 each at the least: less would mean that something was not rounded
        assert 0.03 < error <= 0.045, f"{name}: {error:.4f}"


LAYOUTS = list(itertools.product(("halves", "interleaved", "separate", "single"), (False, True)))


@pytest.mark.parametrize(("gate_up", "transposed"), LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "scale_format"),
    [(torch.bfloat16, POWER_OF_TWO), (torch.float16, POWER_OF_TWO), (torch.float32, POWER_OF_TWO),
     (torch.bfloat16, FLOAT32)],
    ids=str,
)  # fmt: skip
def test_weights_of_every_layout(gate_up: str, transposed: bool, dtype: torch.dtype, scale_format: str):
    torch.manual_seed(0)
    experts, inner, features = 2, 176, 200
    parts = [torch.randn(experts, inner, features).to(dtype) for _ in range(1 if gate_up == "single" else 2)]
    parts[-1][1] *= 64  # scales of a neighbour would show
    w = by_hand.together(gate_up, parts) if gate_up in ("halves", "interleaved") else parts[0]
    laid_out = [m.mT.contiguous() if transposed else m for m in (w, *(parts[1:] if gate_up == "separate" else ()))]
    values, scales, values_t, scales_t = ops.quantize_weights(
        *laid_out, gate_up=gate_up, transposed=transposed, scale_format=scale_format
    )
    for e, (p, part) in itertools.product(range(experts), enumerate(parts)):
        expected, expected_scales = by_hand.quantized(part[e], SQUARE, scale_format)
        assert torch.equal(values[e, p * 256 : p * 256 + inner, :features].double(), expected)
        assert torch.equal(scales[e, p * 2 : p * 2 + 2].double(), expected_scales)
    count = len(parts)
    assert values.shape == (experts, 256 * count, 256) and scales.shape == (experts, 2 * count, 2)
    assert values.float().count_nonzero() == sum(int(part.count_nonzero()) for part in parts)  # padding is zero
    assert torch.equal(values_t.float(), values.float().mT) and torch.equal(scales_t, scales.mT)
    assert all(tensor.is_contiguous() for tensor in (values, scales, values_t, scales_t))


def test_weights_without_experts_or_features():
    for shape in ((0, 6, 5), (2, 0, 5), (2, 6, 0)):
        values, scales, values_t, scales_t = ops.quantize_weights(torch.zeros(shape))
        assert values.shape == (shape[0], pad(shape[1]), pad(shape[2])) == values_t.mT.shape
        assert scales.shape == (shape[0], pad(shape[1]) // 128, pad(shape[2]) // 128) == scales_t.mT.shape


def test_packed_parts_come_back():
    parts = [torch.randn(3, 130), torch.randn(3, 130)]
    packed = pack(parts)
    assert packed.shape == (3, 512) and not packed[:, 130:256].any() and not packed[:, 386:].any()
    assert all(torch.equal(one, other) for one, other in zip(unpack(packed, 130), parts, strict=True))


WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "rank": ((torch.ones(4),), {}, ValueError, r"w must have shape \(experts, out, in\) .* got \(4,\)"),
    "one": (
        (torch.ones(4, 4),),
        {"gate_up": "halves"},
        ValueError,
        r"w must have shape .* got \(4, 4\), gate_up='halves'",
    ),
    "layout": ((torch.ones(1, 4, 4),), {"gate_up": "halved"}, ValueError, "gate_up must be one of .*; got 'halved'"),
    "no up": ((torch.ones(1, 4, 4),), {"gate_up": "separate"}, ValueError, "w_up goes with .*'separate'.* got None"),
    "up": ((torch.ones(1, 4, 4),) * 2, {}, ValueError, r"w_up goes with .* got shape \(1, 4, 4\), gate_up='single'"),
    "odd": (
        (torch.ones(1, 5, 4),),
        {"gate_up": "halves"},
        ValueError,
        "w must have an even number of features .* got 5",
    ),
    "odd transposed": (
        (torch.ones(1, 4, 5),),
        {"gate_up": "interleaved", "transposed": True},
        ValueError,
        "w must have an even number of features .* got 5; is it transposed",
    ),
    "shapes": (
        (torch.ones(1, 4, 4), torch.ones(1, 4, 5)),
        {"gate_up": "separate"},
        ValueError,
        r"w_up must have shape that of w = \(1, 4, 4\), got \(1, 4, 5\)",
    ),
    "dtype": ((torch.ones(1, 4, 4, dtype=torch.float64),), {}, TypeError, "w must be .*, got torch.float64; cast it"),
    "dtypes": (
        (torch.ones(1, 4, 4), torch.ones(1, 4, 4).half()),
        {"gate_up": "separate"},
        TypeError,
        "w_up must have the dtype of w, torch.float32, got torch.float16",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("fake", [False, True])
def test_weights_that_are_refused(name: str, fake: bool):
    args, attributes, kind, complaint = WRONG[name]
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
        with pytest.raises(kind, match=f"moecompile::quantize_weights: {complaint}"):
            ops.quantize_weights(*args, **attributes)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_matrix_is_one_expert(transposed: bool, backward: bool):
    w = torch.randn(72, 200)
    attributes = {"transposed": transposed, "backward": backward}
    found, expected = ops.quantize_weights(w, **attributes), ops.quantize_weights(w[None], **attributes)
    for one, experts in zip(found, expected, strict=True):
        assert torch.equal(one.float(), (experts[0] if experts.dim() == 3 else experts).float())
        assert one.dim() == 2 or one.numel() == 0


def test_values_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"takes values of .*; got torch.float64, cast them first"):
        quantize(torch.ones(2, 2, dtype=torch.float64), ALONG_FEATURES)
