"""Those who compute grouped GEMMs, each with its operands: moecompile's kernels, PyTorch's, and cuBLAS's dense ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moecompile.bench_cases import CEILING, FP8, FP8_COPYING, OURS, TORCH, Product
from moecompile.bench_timing import Absent, Contender

if TYPE_CHECKING:
    from moecompile.runtime.hopper_quantize import QuantizedRows

SIDE = {"cuda": 8192, "cpu": 128}
"""Rows and columns of the dense products."""
BLOCK = 128
HOPPER = "needs a Hopper GPU"
PRODUCT, OUTER = ("grouped_gemm",), ("grouped_gemm_over_rows",)
"""Kernels of ours, as `moecompile.bench_proof` names them."""

Entrant = Contender | Absent


def entrants(product: Product, precision: str, device: str) -> list[Entrant]:
    """Those who compute a grouped GEMM, ours first; all multiply the same numbers."""
    torch.manual_seed(0)
    ends = torch.tensor(product.counts).cumsum(0).to(device, torch.int32)
    build = {
        ("bf16", False): bf16_products,
        ("bf16", True): bf16_outer,
        ("fp8", False): fp8_products,
        ("fp8", True): fp8_outer,
    }
    return build[precision, product.outer](product, ends, device)


def bf16_products(product: Product, ends: Tensor, device: str) -> list[Entrant]:
    """Rows times their group's matrix."""
    a = torch.randn(product.rows, product.k, dtype=torch.bfloat16, device=device)
    b = torch.randn(len(product.counts), product.n, product.k, dtype=torch.bfloat16, device=device)
    out = torch.empty(product.rows, product.n, dtype=torch.bfloat16, device=device)

    def mine() -> Tensor:
        from moecompile.runtime import hopper

        return hopper.grouped_gemm(a, b.mT, ends, out)

    theirs = partial(torch._grouped_mm, a, b.mT, offs=ends)
    return [_ours(OURS, mine, product, device, PRODUCT), _contender(TORCH, theirs, product)]


def bf16_outer(product: Product, ends: Tensor, device: str) -> list[Entrant]:
    """Each group's rows, transposed, times its rows."""
    a = torch.randn(product.rows, product.k, dtype=torch.bfloat16, device=device)
    b = torch.randn(product.rows, product.n, dtype=torch.bfloat16, device=device)
    out = torch.empty(len(product.counts), product.k, product.n, dtype=torch.bfloat16, device=device)

    def mine() -> Tensor:
        from moecompile.runtime import hopper

        return hopper.grouped_outer(a, b, ends, out)

    theirs = partial(torch._grouped_mm, a.t(), b, offs=ends)
    return [_ours(OURS, mine, product, device, OUTER), _contender(TORCH, theirs, product)]


def fp8_products(product: Product, ends: Tensor, device: str) -> list[Entrant]:
    """Rows times their group's matrix: our scales are of blocks of 1x128 and 128x128, PyTorch's of rows and columns."""
    groups, lines = len(product.counts), blocks_of(product.k)
    a, b = quantised(device, product.rows, product.k), quantised(device, groups, product.n, product.k)
    of_rows, of_groups = powers_of_two(device, product.rows), powers_of_two(device, groups)
    scales = of_rows.new_empty(lines, pitch(product.rows))
    scales[:, : product.rows] = of_rows
    b_scales = of_groups[:, None, None].expand(groups, blocks_of(product.n), lines).contiguous()
    by_column = of_groups[:, None].expand(groups, product.n).contiguous()
    out = torch.empty(product.rows, product.n, dtype=torch.bfloat16, device=device)

    def mine() -> Tensor:
        from moecompile.runtime import hopper_fp8_gemm
        from moecompile.runtime.hopper_quantize import Matrices, QuantizedRows

        return hopper_fp8_gemm.product(QuantizedRows(a, scales), Matrices(b, b_scales), ends, out)

    def theirs() -> Tensor:
        return torch._scaled_grouped_mm(
            a, b.mT, of_rows, by_column, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return [_ours(FP8, mine, product, device, PRODUCT), _scaled(theirs, product, device)]


def fp8_outer(product: Product, ends: Tensor, device: str) -> list[Entrant]:
    """The gradient of the weights, from transposed copies that are ready; ours also with making them.

    They are made of rows as the other kernels write them, e4m3 with a scale for 1x128.
    """
    groups = len(product.counts)
    left, right = quantised(device, product.rows, product.k), quantised(device, product.rows, product.n)
    transposed = left.t().contiguous(), right.t().contiguous()
    of_left, of_right = (torch.ones(groups * size, device=device) for size in (product.k, product.n))

    def theirs() -> Tensor:
        a, b = transposed
        return torch._scaled_grouped_mm(
            a, b.t(), of_left, of_right, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    if device == "cpu":
        return [*(Absent(name, HOPPER) for name in (FP8, FP8_COPYING)), _scaled(theirs, product, device)]
    return [*_our_fp8_outer(product, ends, left, right), _scaled(theirs, product, device)]


def _our_fp8_outer(product: Product, ends: Tensor, left: Tensor, right: Tensor) -> list[Entrant]:
    """The gradient (groups, K, N) of rows (rows, K) and (rows, N)."""
    from moecompile.runtime import hopper_fp8_gemm
    from moecompile.runtime.hopper_quantize import pad_offsets, transpose_rows

    order = torch.arange(product.rows, dtype=torch.int32, device=ends.device)
    matrices = torch.empty(len(product.counts), product.k, product.n, dtype=torch.bfloat16, device=ends.device)
    of_left, of_right = (
        torch.ones(blocks_of(rows.shape[1]), pitch(product.rows), device=ends.device) for rows in (left, right)
    )

    def copies() -> tuple[QuantizedRows, QuantizedRows, Tensor]:
        padded = pad_offsets(ends)
        a = transpose_rows(left, of_left, order, ends, padded, top_k=None, per_column=True)
        b = transpose_rows(right, of_right, order, ends, padded, top_k=None, per_column=False)
        return a, b, padded

    def outer(a: QuantizedRows, b: QuantizedRows, padded: Tensor) -> Tensor:
        return hopper_fp8_gemm.outer(a, b, padded, matrices, transposed=False)

    ready = copies()
    return [
        _ours(FP8, lambda: outer(*ready), product, "cuda", OUTER),
        _ours(FP8_COPYING, lambda: outer(*copies()), product, "cuda", ("transpose_rows", *OUTER)),
    ]


@cache
def dense(device: str, precision: str) -> Contender:
    """The ceiling: cuBLAS's product of two square matrices, in FP8 with one scale for each."""
    side = SIDE[device]
    flops = 2.0 * side**3
    if precision == "bf16":
        a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
        out = torch.empty_like(a)
        return Contender(CEILING, lambda _: torch.mm(a, b.t(), out=out), flops)
    left, right = quantised(device, side, side), quantised(device, side, side)
    one = torch.ones((), device=device)

    def scaled(_: int) -> Tensor:
        return torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return Contender(CEILING, scaled, flops, "fp8")


def quantised(device: str, *shape: int) -> Tensor:
    """Random numbers as they are in e4m3 after scaling: the largest of a block near 448. Made slice by slice."""
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    for part in out if len(shape) == 3 else out.split(4096):
        part.copy_(torch.randn(part.shape, device=device).mul_(80).clamp_(-448, 448))
    return out


def powers_of_two(device: str, count: int) -> Tensor:
    """Random scales."""
    return torch.exp2(torch.randint(-12, -6, (count,), device=device).to(torch.float32))


def blocks_of(size: int) -> int:
    """Scale blocks that hold so many elements."""
    return -(-size // BLOCK)


def pitch(rows: int) -> int:
    """Elements from one block's scales of rows to the next block's: a multiple of four."""
    return -(-rows // 4) * 4


def _ours(name: str, run: Callable[[], Tensor], product: Product, device: str, kernels: tuple[str, ...]) -> Entrant:
    if device == "cpu":
        return Absent(name, HOPPER)
    precision = "bf16" if name == OURS else "fp8"
    return Contender(name, partial(_ignoring_number, run), product.flops, precision, kernels)


def _scaled(run: Callable[[], Tensor], product: Product, device: str) -> Entrant:
    return Absent(TORCH, "not on the CPU") if device == "cpu" else _contender(TORCH, run, product, "fp8")


def _contender(name: str, run: Callable[[], Tensor], product: Product, precision: str = "bf16") -> Contender:
    return Contender(name, partial(_ignoring_number, run), product.flops, precision)


def _ignoring_number(run: Callable[[], Tensor], _: int) -> Tensor:
    return run()
