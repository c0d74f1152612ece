"""The rules that choose tiles, on both sides of each of their borders."""

from __future__ import annotations

import pytest
import torch

from moecompile.codegen.gemms import GroupedGemm
from moecompile.runtime import hopper_tiles
from moecompile.runtime.hopper_tiles import Projection

EXPERTS = 128

# name -> (rows of an expert, columns, K, whether matrices are read across), (columns, stages, cluster, overhang)
ROWS_TIMES_MATRICES = {
    "few": ((31, 4096, 2048, False), (256, 4, 1, 0)),
    "pairs": ((32, 4096, 2048, False), (256, 4, 2, 32)),
    "pairs, the last that take rows along": ((512, 4096, 2048, False), (256, 4, 2, 32)),
    "pairs, the first that do not": ((513, 4096, 2048, False), (256, 4, 2, 0)),
    "few, across": ((31, 4096, 2048, True), (256, 3, 1, 0)),
    "pairs, across, less than a tile": ((127, 4096, 2048, True), (256, 3, 2, 64)),
    "pairs, across, a tile": ((128, 4096, 2048, True), (256, 4, 2, 32)),
    "few columns": ((300, 128, 2048, False), (128, 5, 1, 0)),
    "more columns": ((300, 136, 2048, False), (256, 4, 2, 32)),
}


def tile(gemm: GroupedGemm) -> tuple[int, int, int, int]:
    return gemm.columns, gemm.stages, gemm.cluster, gemm.overhang


@pytest.mark.parametrize("name", ROWS_TIMES_MATRICES)
def test_rows_times_matrices(name: str) -> None:
    (each, n, k, across), expected = ROWS_TIMES_MATRICES[name]
    assert tile(hopper_tiles.choose(torch.bfloat16, each * EXPERTS, EXPERTS, n, k, across)) == expected


@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (8, 128), (1024, 256)])
def test_few_rows_of_narrow_matrices(rows: int, columns: int) -> None:
    """Of 1536 columns: eight rows of 128 experts use 48 of 132 multiprocessors at 256 columns, 96 at 128."""
    assert hopper_tiles.choose(torch.bfloat16, 8 * rows, EXPERTS, 1536, 2048).columns == columns


@pytest.mark.parametrize(
    ("each", "m", "expected"),
    [
        (1023, 2048, (256, 4, 2, 0)),
        (1024, 2048, (256, 3, 2, 0)),
        (500, 255, (256, 3, 1, 0)),
        (4096, 255, (256, 4, 1, 0)),
    ],
)
def test_rows_times_rows(each: int, m: int, expected: tuple[int, int, int, int]) -> None:
    chosen = hopper_tiles.choose(torch.bfloat16, m, EXPERTS, 4096, each * EXPERTS, True, over_rows=True)
    assert tile(chosen) == expected


def projection(k: int, n: int, across: bool, gate_up: str) -> Projection:
    matrices = torch.empty((EXPERTS, k, n) if across else (EXPERTS, n, k), dtype=torch.bfloat16, device="meta")
    seen = matrices if across else matrices.mT
    return Projection((seen, seen) if gate_up == "halves" else (seen,), None, gate_up)


@pytest.mark.parametrize(
    ("gate_up", "across", "save", "expected"),
    [
        ("halves", False, False, (256, 4, 2, 32)),
        ("halves", False, True, (256, 3, 2, 64)),
        ("halves", True, False, (256, 4, 2, 0)),
        ("halves", True, True, (256, 3, 2, 0)),
        ("interleaved", True, False, (256, 4, 2, 32)),
        ("interleaved", True, True, (256, 3, 2, 64)),
    ],
)
def test_gemm1(gate_up: str, across: bool, save: bool, expected: tuple[int, int, int, int]) -> None:
    """What is saved needs room; a pair's matrices that are read across have no stride for rows that go along."""
    given = projection(2880, 2880, across, gate_up)
    chosen = hopper_tiles.activated_instance(torch.bfloat16, 256 * EXPERTS, given, "silu(x)", save)
    assert tile(chosen) == expected


@pytest.mark.parametrize(("each", "cluster"), [(127, 1), (128, 2)])
def test_back_through_the_activation(each: int, cluster: int) -> None:
    w_out = torch.empty(EXPERTS, 512, 1024, dtype=torch.bfloat16, device="meta")
    chosen = hopper_tiles.backward_instance(torch.bfloat16, each * EXPERTS, w_out, "halves", "silu(x)", True)
    assert tile(chosen) == (256, 3, cluster, 0)


@pytest.mark.parametrize(("n", "expected"), [(128, (128, 5, 1, 0)), (136, (256, 4, 2, 0))])
def test_fp8(n: int, expected: tuple[int, int, int, int]) -> None:
    assert tile(hopper_tiles.choose(torch.float8_e4m3fn, 8, EXPERTS, n, 2048)) == expected


def test_a_ring_that_does_not_fit_says_so() -> None:
    with pytest.raises(ValueError, match="5 stages of 384 lines leave no room for results in 232448 bytes"):
        _ = GroupedGemm("bfloat16", 256, 5).template
