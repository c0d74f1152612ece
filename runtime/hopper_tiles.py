"""Which kernel computes a product: tiles by rows of an expert, columns, and how matrices lie.

Rules, and no search: `pytest -s -m slow tests/test_tiles_gpu.py` times every tile for sizes of real models, and holds
these to what is fastest (docs/decisions.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moecompile.codegen.gemms import Activated, ActivationBackward, GroupedGemm, Plain
from moecompile.runtime.elementwise import dtype_name

ROWS = 128  # of a tile
BOX_ROWS = 64  # of them, that one warpgroup multiplies
MULTIPROCESSORS = 132
"""Of an H100 or H200 with NVLink; on others tiles are chosen as for these."""
OVERHANG = {3: 64, 4: 32}
"""How many rows beyond a pair of tiles may go along with it: so many as a ring of so many stages leaves room for."""
PAIRS_FROM = 32
"""Rows of an expert, on average, from which blocks go in pairs: up to 40 % faster where experts have more rows than one
tile, which uneven routing gives some of them long before the average has; where none has, it costs 2 % at most."""
FEW_PAIRS = 4 * ROWS
"""Rows of an expert, on average, up to which it pays that few rows beyond pairs go along (docs/perf.md)."""
NARROW = 0.56
"""What a tile of 128 columns and few rows costs, where one of 256 costs 1 (docs/perf.md)."""


@dataclass(frozen=True)
class Projection:
    """GEMM1 as the kernels take it.

    Attributes:
        matrices: (E, K, N) each, the second only where gate and up projection are two halves or two tensors; of the
            last two dimensions one is contiguous, the same in both.
        biases: (E, N) for each, contiguous; None if there are none.
        gate_up: as in `moecompile.runtime.operators`.
    """

    matrices: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] | None
    gate_up: str

    def parts(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """The rows of each matrix in hidden rows (R, N), gate first."""
        return hidden.tensor_split(len(self.matrices), 1)


def choose(
    dtype: torch.dtype, rows: int, experts: int, n: int, k: int, transposed: bool = False, over_rows: bool = False
) -> GroupedGemm:
    """The kernel for a product of (rows, k), an expert's share of them each, with (k, n).

    With `over_rows`, for each expert's product of (m, its share of k) with (its share of k, n), where m is `rows`.
    """
    name = dtype_name(dtype)
    if dtype == torch.float8_e4m3fn:  # a pair of blocks is faster with few rows, too
        wide = GroupedGemm(name, 256, 4, 2, over_rows=over_rows)
        return wide if n > 128 else replace(wide, columns=128, stages=5, cluster=1)
    if n <= 128 or (not over_rows and _is_sooner_narrow(rows, experts, n)):
        return GroupedGemm(name, 128, 5, 1, transposed, over_rows)
    if over_rows:
        # where sums are long, pairs that load less ahead stay closer together, and find in L2 what others have loaded
        length = k // experts
        if rows < 2 * ROWS:
            return GroupedGemm(name, 256, 4 if length >= 4096 else 3, 1, transposed, over_rows)
        return GroupedGemm(name, 256, 3 if length >= 1024 else 4, 2, transposed, over_rows)
    each = rows // experts
    # few rows times matrices that are read across are 2 to 7 % faster with three stages (gpt-oss' tokens' gradient)
    stages, cluster = 3 if transposed and each < ROWS else 4, 2 if each >= PAIRS_FROM else 1
    along = cluster == 2 and each <= FEW_PAIRS
    return GroupedGemm(name, 256, stages, cluster, transposed, overhang=OVERHANG[stages] if along else 0)


def _is_sooner_narrow(rows: int, experts: int, n: int) -> bool:
    """Whether products of few rows are done sooner in tiles of 128 columns: those of 256 may leave the GPU half idle.

    Of experts chosen at random, E (1 - (1 - 1 / E)^R) have any of R rows.
    """
    if not 0 < rows < BOX_ROWS * experts:
        return False
    used = experts * (1 - (1 - 1 / experts) ** rows)
    narrow, wide = (math.ceil(used * math.ceil(n / columns) / MULTIPROCESSORS) for columns in (128, 256))
    return NARROW * narrow < wide


def activated_instance(
    dtype: torch.dtype, rows: int, projection: Projection, activation: str, save: bool
) -> GroupedGemm:
    """The kernel of `activated_gemm`."""
    experts, k, n = projection.matrices[0].shape
    columns = 256 if save else max(256, n * len(projection.matrices))  # a step's rows are many
    chosen = choose(dtype, rows, experts, columns, k, is_transposed(projection.matrices[0]))
    if save:  # what is saved needs room beside the ring
        chosen = replace(chosen, columns=256, stages=3, overhang=OVERHANG[3] if chosen.overhang else 0)
    if chosen.transposed and len(projection.matrices) == 2:
        chosen = replace(chosen, overhang=0)  # half of the columns of a line across K have no stride
    return replace(chosen, epilogue=Activated(activation, projection.gate_up, save, projection.biases is not None))


def backward_instance(
    dtype: torch.dtype, rows: int, w_out: Tensor, gate_up: str, activation: str, scaled: bool
) -> GroupedGemm:
    """The kernel of `activation_backward`: in pairs from a tile's rows on, 10 to 36 % faster where experts are many."""
    cluster = 2 if rows // w_out.shape[0] >= ROWS else 1
    epilogue = ActivationBackward(activation, gate_up, scaled)
    return GroupedGemm(dtype_name(dtype), 256, 3, cluster, is_transposed(w_out.mT), epilogue=epilogue)


def with_bias(plain: GroupedGemm, bias: bool) -> GroupedGemm:
    """The kernel that adds a bias, if there is one, to the products."""
    return replace(plain, epilogue=Plain(bias=True)) if bias else plain


def is_transposed(b: Tensor) -> bool:
    """Whether of matrices (E, K, N) it is N that runs along memory."""
    return b.stride(2) == 1 and b.stride(1) != 1
