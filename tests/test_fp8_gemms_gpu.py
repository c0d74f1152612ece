"""The grouped GEMMs on FP8 operands on a Hopper GPU, against the dequantised operands' products in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fences import fenced
from moecompile.runtime import hopper_fp8_gemm, hopper_quantize, quantize
from moecompile.runtime.hopper_quantize import Matrices, QuantizedRows
from moecompile.runtime.quantize import ALONG_FEATURES, BLOCK, SQUARE, pad

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

# rows of each expert, features out, features in: of an even and an odd number of tiles, narrow, of parts of blocks
SIZES = [
    ((300, 0, 4, 128, 64, 1001, 75, 256), 512, 640),
    ((1, 0, 33, 129), 208, 176),
    ((5,) * 70, 384, 256),
    ((132, 252), 2880, 2880),
    ((200, 40), 128, 1024),
    ((0, 0), 256, 128),
]
SUMS = 1.1e-3
"""Relative L2 error of promoted sums before they are rounded: of a product's 2e-3, rounding takes 1.7e-3."""
BIAS = 2e-3
"""Of the mean of sums of positive products. The tensor cores alone lose 3 % of such a sum."""


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, device="cuda") + 0.1


def rows_of(x: Tensor) -> tuple[QuantizedRows, Tensor]:
    """Rows (R, F) quantised, and what they stand for, float64."""
    values, scales = quantize.quantize(x.bfloat16(), ALONG_FEATURES)
    pitched = F.pad(scales.T, (0, -len(x) % 4), value=torch.nan).contiguous()
    return QuantizedRows(values, pitched), quantize.dequantize(values, scales, ALONG_FEATURES).double()


def matrices_of(w: Tensor) -> tuple[Matrices, Tensor]:
    """Matrices (E, N, K) quantised, and what they stand for, float64."""
    values, scales, _, _ = quantize.quantize_weights(w.bfloat16(), None, "single", False)
    return Matrices(values, scales), quantize.dequantize(values, scales, SQUARE)[:, : w.shape[1], : w.shape[2]].double()


def ends_of(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to("cuda", torch.int32)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.isfinite().all() and found.shape == expected.shape
    if expected.any():
        error, rounding = (
            float((value.double() - expected).norm() / expected.norm()) for value in (found, expected.bfloat16())
        )
        bias = float(found.double().sum() / expected.sum()) - 1
        assert error <= math.hypot(rounding, SUMS), f"off by {error:.2e}, of which {rounding:.2e} are rounding"
        assert abs(bias) <= BIAS, f"{bias:.2%} off on average"


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(("counts", "n", "k"), SIZES, ids=lambda value: str(value)[:16])
def test_products(counts: tuple[int, ...], n: int, k: int, biased: bool) -> None:
    """Of rows with matrices, forward and back; rows of no expert are left as they are."""
    torch.manual_seed(0)
    used, experts = sum(counts), len(counts)
    (a, rows), (b, matrices) = rows_of(positive(used + 70, k)), matrices_of(positive(experts, n, k))
    bias = positive(experts, n).bfloat16() if biased else None
    results = []
    for _ in range(2):
        with fenced():
            out = rows.new_empty(used + 70, n, dtype=torch.bfloat16)
            results.append(hopper_fp8_gemm.product(a, b, ends_of(counts), out, bias))
    expected = [part @ matrix.T for part, matrix in zip(rows[:used].split(counts), matrices, strict=True)]
    if bias is not None:
        expected = [part + of_expert.double() for part, of_expert in zip(expected, bias, strict=True)]
    assert_near(results[0][:used], torch.cat(expected))
    assert torch.equal(results[0][:used], results[1][:used])
    assert results[0][used:].isnan().all(), "rows of no expert were written"


@pytest.mark.parametrize("turned", [False, True], ids=["in order", "turned"])
@pytest.mark.parametrize("transposed", [False, True], ids=["m_n", "n_m"])
@pytest.mark.parametrize(("counts", "n", "m"), SIZES, ids=lambda value: str(value)[:16])
def test_gradients_of_matrices(counts: tuple[int, ...], n: int, m: int, transposed: bool, turned: bool) -> None:
    """Sums over an expert's rows, in every layout of the matrices; what lies behind the rows is not read."""
    torch.manual_seed(0)
    used, experts, offsets = sum(counts), len(counts), ends_of(counts)
    order = torch.arange(used + 70, device="cuda", dtype=torch.int32)
    like = torch.empty((experts, n, m) if transposed else (experts, m, n), device="cuda", dtype=torch.bfloat16)
    like = like.mT.contiguous().mT if turned else like
    left, right = rows_of(positive(used + 70, m))[0], rows_of(positive(used + 70, n))[0]
    with fenced(least=5):
        ends = hopper_quantize.pad_offsets(offsets)
        a, b = (
            hopper_quantize.transpose_rows(
                each.values, each.scales, order, offsets, ends, top_k=None, per_column=per_column
            )
            for each, per_column in ((left, True), (right, False))
        )
        found = [hopper_fp8_gemm.outer(a, b, ends, like, transposed) for _ in range(2)]
    before = torch.randn(like.shape, device="cuda")
    main = [torch.empty_like(like, dtype=torch.float32).copy_(before) for _ in range(2)]
    for each in main:
        hopper_fp8_gemm.add_outer(a, b, ends, each, transposed)
    rows = a.values.double().view(m, -1, BLOCK) * a.scales.double().T.unsqueeze(2)
    others = quantize.dequantize(b.values, b.scales, SQUARE).double()
    begins = [0, *ends.tolist()]
    parts = [slice(begin, end) for begin, end in itertools.pairwise(begins)]
    expected = torch.stack([rows.view(m, -1)[:, part] @ others[:, part].T for part in parts])
    assert found[0].stride() == like.stride() and torch.equal(found[0], found[1])
    assert_near(found[0].mT if transposed else found[0], expected)
    assert torch.equal(main[0], main[1])
    added = main[0].double() - before
    assert float((added - (expected.mT if transposed else expected)).norm()) <= SUMS * float(expected.norm())
    empty = [expert for expert, count in enumerate(counts) if not count]
    assert torch.equal(main[0][empty], before[empty])


@pytest.mark.parametrize(("counts", "n", "k"), SIZES[:3], ids=lambda value: str(value)[:16])
def test_quantised_results(counts: tuple[int, ...], n: int, k: int) -> None:
    """Rows that are activated, here by nothing, and kept are those of the product, rounded, quantised.

    Sums that differ by 1.1e-3 round another way once in a hundred; with steps of 0.08 that is an error of 0.01.
    """
    torch.manual_seed(0)
    used, whole = sum(counts), pad(n)
    (a, rows), (b, matrices) = (
        rows_of(torch.randn(used, k, device="cuda")),
        matrices_of(torch.randn(len(counts), n, k, device="cuda")),
    )
    with fenced(least=4):
        out, hidden = (QuantizedRows.empty(a.values, used, whole) for _ in range(2))
        hopper_fp8_gemm.activated(a, b, "hidden", ends_of(counts), n, out, hidden)
    expected = torch.cat([part @ matrix.T for part, matrix in zip(rows.split(counts), matrices, strict=True)])
    values, scales = quantize.quantize(F.pad(expected.bfloat16(), (0, whole - n)), ALONG_FEATURES)
    wanted = quantize.dequantize(values, scales, ALONG_FEATURES)
    for found in (out, hidden):
        numbers = quantize.dequantize(found.values, found.scales[:, :used].T, ALONG_FEATURES)
        assert float((numbers - wanted).norm() / wanted.norm()) <= 0.012
        assert not numbers[:, n:].any(), "columns that fill up the last block are not zero"
        changed = float((numbers != wanted).double().mean())
        assert changed <= 0.03, f"{changed:.1%} of the numbers are others"
    assert torch.equal(out.values.view(torch.uint8), hidden.values.view(torch.uint8))


@pytest.mark.parametrize("inner", [384, 336, 256], ids=["odd", "odd and padded", "even"])
def test_halves_that_are_saved(inner: int) -> None:
    """Each block of gates and up projections is written by one tile alone, many times the same.

    Of an odd number of blocks, the second of two tiles that share an odd row tile has none left: what it holds must not
    be taken for the up projection's first block, which lies where the gates end.
    """
    torch.manual_seed(0)
    counts, k = (110, 300, 70, 0, 130) * 8, 512
    used, whole = sum(counts), pad(inner)
    a, rows = rows_of(torch.randn(used, k, device="cuda"))
    w = torch.randn(len(counts), 2 * inner, k, device="cuda").bfloat16()
    values, scales, _, _ = quantize.quantize_weights(w, None, "halves", False)
    exact = quantize.dequantize(values, scales, SQUARE)[:, :, :k].double()
    expected = torch.cat([part @ matrix.T for part, matrix in zip(rows.split(counts), exact, strict=True)])
    first = None
    for _ in range(20):
        with fenced(least=4):
            out = QuantizedRows.empty(a.values, used, whole)
            hidden = QuantizedRows.empty(a.values, used, 2 * whole)
            b = Matrices(values, scales)
            hopper_fp8_gemm.activated(a, b, "mul(gate, up)", ends_of(counts), inner, out, hidden)
        found = hidden.values.view(torch.uint8), hidden.scales[:, :used].clone()
        first = first or found
        assert all(map(torch.equal, first, found)), "what is saved differs from run to run"
    numbers = quantize.dequantize(hidden.values, hidden.scales[:, :used].T, ALONG_FEATURES)
    for start in range(0, 2 * whole, BLOCK):  # an FP8 number is off by 0.027 of its norm, in every block
        of_block = slice(start, start + BLOCK)
        norm = expected[:, of_block].norm()
        assert float((numbers[:, of_block].double() - expected[:, of_block]).norm()) <= 0.04 * float(norm)
