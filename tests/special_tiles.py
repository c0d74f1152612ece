"""Tiles of quantised rows, some that codegen/kernels/requantize.cuh turns in fp16, and others."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.runtime.quantize import BLOCK, E4M3, SMALLEST_SCALE


def scaled(low: int, high: int) -> Tensor:
    """Powers of two between these, both among them."""
    exponents = torch.randint(low, high + 1, (BLOCK,))
    exponents[:2] = torch.tensor([low, high])
    return torch.exp2(exponents[torch.randperm(BLOCK)].double()).float()


def tile_of(kind: str) -> tuple[Tensor, Tensor]:
    """128 x 128 numbers, e4m3 in float32, and the scales of their rows."""
    values = torch.randint(0, 256, (BLOCK, BLOCK), dtype=torch.uint8).view(E4M3).float().nan_to_num(1.0)
    values[values.abs() < 2.0**-8], scales = 0.0, scaled(-10, 11)
    row = int(scales.argmin())
    if kind == "far":
        scales = scaled(-10, 12)
    elif kind in ("zero rows", "a row that is nearly zero"):
        values[row], scales[row] = 0, SMALLEST_SCALE
        values[row, 7] = 2.0**-9 if kind != "zero rows" else -0.0
    elif kind == "small columns":
        scales = scaled(0, 16)
        values[:, 9], values[scales.argmin(), 9] = 0, 2.0**-9
    elif kind == "columns as small as fp16 does":
        scales[:] = 1.0
        values[:, 9], values[row, 9], values[:, 10] = 0, 2.0**-9, 0
    elif kind == "smallest":
        scales[:] = SMALLEST_SCALE
    elif kind == "all zero":
        values, scales = values * 0, torch.full((BLOCK,), SMALLEST_SCALE)
    elif kind == "infinite":
        values[row], scales[row] = 0, torch.inf
        values[row, 3] = torch.nan
    elif kind == "NaN":
        values[row, 3], values[:, 4] = torch.nan, torch.nan
    elif kind == "loud":
        scales = scaled(105, 119)
    elif kind == "so loud that sums are infinite":
        scales = scaled(104, 120)
        values[scales.argmax(), ::2] = 256.0
    elif kind == "as loud as scales are":
        scales = scaled(110, 127)
    elif kind == "no powers of two":
        scales = scales * 1.5
    return values, scales


TILES = (
    *("ordinary", "far", "zero rows", "a row that is nearly zero", "small columns"),
    *("columns as small as fp16 does", "smallest", "all zero", "infinite", "NaN", "loud"),
    *("so loud that sums are infinite", "as loud as scales are", "no powers of two"),
)
IN_FLOAT32 = (
    *("far", "a row that is nearly zero", "small columns", "infinite"),
    *("so loud that sums are infinite", "as loud as scales are", "no powers of two"),
)
"""Those of them that fp16 cannot do."""
