"""What codegen/kernels/requantize.cuh does in fp16 has the bits of float32: its arithmetic once more, by PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moecompile.runtime.quantize import BLOCK, E4M3, quantize, requantize_along_tokens
from special_tiles import IN_FLOAT32, TILES, tile_of

FARTHEST, UNIT, BIAS, MANTISSA_BITS = 21, 7, 15, 23


def in_fp16(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes (128, F) and scales (F,) of values (128, F), e4m3 in float32, with scales (128,); None if not in fp16."""
    bits = scales.view(torch.int32).long()
    largest = bits.max()
    if (bits & ((1 << MANTISSA_BITS) - 1)).any() or scales.isinf().any():
        return None
    distance = (largest - bits) >> MANTISSA_BITS
    far = (distance > FARTHEST) | (bits == 0)
    if (values[far] != 0).any():
        return None
    factor = torch.where(far, 0.0, torch.exp2((UNIT - distance).double())).half()
    products = values.half() * factor[:, None]
    assert not products.isinf().any()
    amax = products.abs().nan_to_num(0.0).amax(0).float()
    _, (found,) = quantize((amax * (scales.max() * 2.0**-UNIT))[None], (1, 1))
    exponent = ((largest - found.view(torch.int32)) >> MANTISSA_BITS) - UNIT
    if (found.isinf() | ((exponent > BIAS) & (amax > 0))).any():
        return None
    results = (products * torch.exp2(exponent.clamp(max=BIAS).double()).half()).float()
    return results.masked_fill(results.isnan(), torch.nan).to(E4M3), found


def assert_same_bits(values: Tensor, scales: Tensor) -> bool:
    """Returns whether fp16 did it."""
    found = in_fp16(values, scales)
    if found is None:
        return False
    expected, (expected_scales,) = requantize_along_tokens(values.to(E4M3), scales[:, None])
    assert torch.equal(found[0].view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(found[1], expected_scales)
    return True


@pytest.mark.parametrize("kind", TILES)
def test_special_tiles(kind: str) -> None:
    torch.manual_seed(0)
    assert assert_same_bits(*tile_of(kind)) != (kind in IN_FLOAT32)


def test_scales_of_every_size() -> None:
    """Columns of every loudness, rows as far below the loudest as there are."""
    torch.manual_seed(0)
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    done = 0
    for largest in range(-126, 128):
        farthest, quietest = int(torch.randint(0, FARTHEST + 1, ())), int(torch.randint(-10, 8, ()))
        distance = torch.randint(0, farthest + 1, (BLOCK,)).clamp(max=largest + 126)
        distance[0] = 0
        values = every[torch.randint(0, 256, (BLOCK, BLOCK))]
        values = values * (values.abs() <= torch.exp2(torch.randint(quietest, 10, (BLOCK,)).float()))
        values[:, ::2] *= torch.rand(BLOCK, BLOCK // 2) < 0.02
        scales = torch.exp2((largest - distance).double()).float()
        done += assert_same_bits(values, scales)
    assert 100 < done < 254
