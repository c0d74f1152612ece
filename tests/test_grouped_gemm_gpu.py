"""The grouped GEMM on a Hopper GPU, against the same products in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moecompile.codegen.gemms import GroupedGemm
from moecompile.runtime import hopper, hopper_tiles
from moecompile.runtime.hopper import Taking

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

SIZES = [  # rows of each expert, N, K
    ((300, 0, 4, 128, 64, 1000, 76, 256), 512, 640),
    ((1, 0, 33), 136, 72),
    ((5,) * 70, 384, 256),
    ((132, 252), 2880, 2880),
    ((0, 0), 256, 128),
    ((257, 544, 320, 321, 256, 300, 0, 384, 530, 32, 288), 2880, 640),
]
PLAIN = [
    GroupedGemm(dtype, columns, stages, cluster)
    for dtype in ("bfloat16", "float16")
    for columns, stages, cluster in ((256, 4, 2), (256, 4, 1), (256, 3, 2), (256, 3, 1), (128, 5, 1))
]
ALONG = [replace(each, overhang=hopper_tiles.OVERHANG[each.stages]) for each in PLAIN if each.cluster == 2]
# float32 sums, rounded once: half of a unit in the last place, and some for the sums
BOUNDS = {torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}


def experts_of(counts: tuple[int, ...]) -> tuple[Tensor, list[slice]]:
    """The experts' ends on the device, and their rows."""
    ends = torch.tensor(counts).cumsum(0)
    return ends.to("cuda", torch.int32), [slice(int(end) - n, int(end)) for n, end in zip(counts, ends, strict=True)]


def worst_row(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row; infinite for anything that is not a number."""
    if not expected.numel():
        return 0.0
    norms = expected.norm(dim=-1)
    errors = (found.double() - expected).norm(dim=-1) / torch.where(norms > 0, norms, 1)
    return float(errors.nan_to_num(nan=float("inf")).max())


@pytest.mark.parametrize("transposed", [False, True], ids=["n_k", "k_n"])
@pytest.mark.parametrize("instance", PLAIN + ALONG, ids=lambda instance: instance.template)
@pytest.mark.parametrize(("counts", "n", "k"), SIZES, ids=lambda value: str(value)[:16])
def test_rows_times_matrices(instance: GroupedGemm, counts: tuple[int, ...], n: int, k: int, transposed: bool) -> None:
    torch.manual_seed(0)
    dtype, (offsets, rows) = getattr(torch, instance.input), experts_of(counts)
    a = torch.randn(sum(counts) + 70, k, device="cuda", dtype=dtype)
    shape = (len(counts), k, n) if transposed else (len(counts), n, k)
    matrices = torch.randn(shape, device="cuda", dtype=dtype)
    b = matrices if transposed else matrices.mT
    chosen = replace(instance, transposed=transposed)
    results = []
    for _ in range(3):
        out = torch.full((a.shape[0], n), float("nan"), device="cuda", dtype=dtype)
        results.append(hopper.grouped_gemm(a, b, offsets, out, instance=chosen))
    for found, matrix in zip(rows, b, strict=True):
        assert worst_row(results[0][found], a[found].double() @ matrix.double()) < BOUNDS[dtype]
    used = results[0][: sum(counts)]
    assert all(torch.equal(used, other[: sum(counts)]) for other in results)
    assert results[0][sum(counts) :].isnan().all(), "rows of no expert were written"


@pytest.mark.parametrize("multiple", [0, 128, 256])
@pytest.mark.parametrize("instance", PLAIN[:5] + ALONG[:2], ids=lambda instance: instance.template)
@pytest.mark.parametrize(("counts", "n", "k"), SIZES, ids=lambda value: str(value)[:16])
def test_tiles_that_are_taken(instance: GroupedGemm, counts: tuple[int, ...], n: int, k: int, multiple: int) -> None:
    """The same numbers, of all rows or of each expert's first ones, however late some blocks begin."""
    torch.manual_seed(0)
    dtype, (offsets, rows) = getattr(torch, instance.input), experts_of(counts)
    a = torch.randn(sum(counts) + 70, k, device="cuda", dtype=dtype)
    b = torch.randn(len(counts), n, k, device="cuda", dtype=dtype).mT
    right = hopper.grouped_gemm(a, b, offsets, a.new_empty(a.shape[0], n), instance=instance)
    busy, ones = torch.cuda.Stream(), torch.ones(2048, 2048, device="cuda", dtype=dtype)
    for turn in range(3):
        out = torch.full((a.shape[0], n), float("nan"), device="cuda", dtype=dtype)
        taken = torch.zeros(1, device="cuda", dtype=torch.int32)
        torch.cuda.synchronize()
        if turn:  # something else has the multiprocessors at first
            with torch.cuda.stream(busy):
                torch.mm(ones, ones)
        hopper.grouped_gemm(a, b, offsets, out, instance=instance, taking=hopper.Taking(taken, multiple))
        torch.cuda.synchronize()
        for each in rows:
            count = each.stop - each.start
            end = each.start + (count - count % multiple if multiple else count)
            assert torch.equal(out[each.start : end], right[each.start : end])
            assert out[end : each.stop].isnan().all(), "rows of another launch were written"


@pytest.mark.parametrize("instance", PLAIN, ids=lambda instance: instance.template)
@pytest.mark.parametrize(("counts", "n", "m"), SIZES, ids=lambda value: str(value)[:16])
def test_rows_times_rows(instance: GroupedGemm, counts: tuple[int, ...], n: int, m: int) -> None:
    torch.manual_seed(0)
    dtype, (offsets, rows) = getattr(torch, instance.input), experts_of(counts)
    a = torch.randn(sum(counts) + 70, m, device="cuda", dtype=dtype)
    b = torch.randn(sum(counts) + 70, n, device="cuda", dtype=dtype)
    a[sum(counts) :], b[sum(counts) :] = float("nan"), float("inf")
    chosen = GroupedGemm(instance.input, instance.columns, instance.stages, instance.cluster, True, True)
    results = []
    for _ in range(3):
        out = torch.full((len(counts), m, n), float("nan"), device="cuda", dtype=dtype)
        results.append(hopper.grouped_outer(a, b, offsets, out, instance=chosen))
    out = torch.full_like(results[0], float("nan"))
    results.append(
        hopper.grouped_outer(a, b, offsets, out, instance=chosen, taking=Taking(torch.zeros_like(offsets[:1])))
    )
    for found, own in zip(results[0], rows, strict=True):
        assert worst_row(found, a[own].double().T @ b[own].double()) < BOUNDS[dtype]
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("instance", PLAIN, ids=lambda instance: instance.template)
@pytest.mark.parametrize(("counts", "n", "m"), SIZES, ids=lambda value: str(value)[:16])
def test_rows_times_rows_are_added(instance: GroupedGemm, counts: tuple[int, ...], n: int, m: int) -> None:
    """In float32, into lines that are further apart than they are long; nothing between them, nothing without rows."""
    torch.manual_seed(0)
    dtype, (offsets, rows) = getattr(torch, instance.input), experts_of(counts)
    a, b = (torch.randn(sum(counts) + 70, width, device="cuda", dtype=dtype) for width in (m, n))
    a[sum(counts) :], b[sum(counts) :] = float("nan"), float("inf")
    chosen = GroupedGemm(instance.input, instance.columns, instance.stages, instance.cluster, True, True)
    before = torch.randn(len(counts), m, n + 12, device="cuda")
    results: list[Tensor] = []
    for _ in range(3):
        whole = before.clone()
        taking = Taking(torch.zeros_like(offsets[:1])) if results else None
        hopper.grouped_outer(a, b, offsets, whole[:, :, 4:-8], instance=chosen, taking=taking)
        results.append(whole)
    for found, was, own in zip(results[0], before, rows, strict=True):
        expected = was[:, 4:-8].double() + a[own].double().T @ b[own].double()
        assert worst_row(found[:, 4:-8], expected) < 1e-5
        if own.start == own.stop:
            assert torch.equal(found, was)
    edges = [torch.cat((each[..., :4], each[..., -8:]), -1) for each in (results[0], before)]
    assert torch.equal(*edges), "written beside the lines"
    assert all(torch.equal(results[0], other) for other in results)


def test_what_one_expert_holds_does_not_reach_another() -> None:
    """A row that is infinite spoils its own expert's gradient and no other."""
    offsets, _ = experts_of((100, 30, 70))
    a, b = (torch.randn(200, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a[110] = float("inf")
    out = hopper.grouped_outer(a, b, offsets, torch.empty(3, 128, 128, device="cuda", dtype=torch.bfloat16))
    assert out[0].isfinite().all() and out[2].isfinite().all() and not out[1].isfinite().any()


@pytest.mark.parametrize("counts", [(300, 0, 4, 128, 64, 1001, 75, 256), (3,) * 70], ids=["uneven", "small"])
def test_scaled_products(counts: tuple[int, ...]) -> None:
    """Against the dequantised operands: what is left is the rounding of the result."""
    torch.manual_seed(0)
    n, k = 512, 640
    offsets, rows = experts_of(counts)
    x, a_scales = quantised(torch.randn(sum(counts), k, device="cuda").abs(), 1)
    w, b_scales = quantised(torch.randn(len(counts), n, k, device="cuda").abs(), 128)
    a_scales = a_scales.squeeze(-1)
    padded = torch.zeros(k // 128, (sum(counts) + 3) // 4 * 4, device="cuda")
    padded[:, : sum(counts)] = a_scales.T
    whole = w.double().view(len(counts), n // 128, 128, k // 128, 128) * b_scales.double()[:, :, None, :, None]
    for instance in (GroupedGemm("float8_e4m3fn", 256, 4), GroupedGemm("float8_e4m3fn", 128, 5)):
        out = torch.full((sum(counts), n), float("nan"), device="cuda", dtype=torch.bfloat16)
        scales = padded[:, : sum(counts)].T
        hopper.grouped_gemm(x, w.mT, offsets, out, a_scales=scales, b_scales=b_scales, instance=instance)
        for found, matrix in zip(rows, whole.view(len(counts), n, k), strict=True):
            left = (x[found].double().view(-1, k // 128, 128) * a_scales[found, :, None].double()).view(-1, k)
            expected = left @ matrix.T
            assert worst_row(out[found], expected) < 2.5e-3
            if expected.numel():  # operands are positive: without promotion the sums are 3 % too small
                assert abs(float((out[found].double() / expected).mean()) - 1) < 2e-3


def quantised(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """x (..., R, K) in e4m3, and a power-of-two scale for each block of `rows` by 128."""
    blocks = x.view(*x.shape[:-2], x.shape[-2] // rows, rows, x.shape[-1] // 128, 128)
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((-3, -1), keepdim=True) / 448)))
    return (blocks / scale).view(x.shape).to(torch.float8_e4m3fn), scale.squeeze(-1).squeeze(-2).contiguous()
