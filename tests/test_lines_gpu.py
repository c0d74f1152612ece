"""Rows that travel in FP8 on a Hopper GPU: lines are the bits of `quantize`, and experts compute the same of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_blocks import Block
from moecompile.runtime import lines as in_torch
from moecompile.runtime.quantize import POWER_OF_TWO, SCALE_FORMATS
from test_lines import same

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

ops = torch.ops.moecompile
BLOCKS = (
    Block("halves"),
    Block("separate", gate_up="separate", dropped=True),
    Block("large", tokens=2000, top_k=4, experts=6, hidden=1024, inner=1408),
    Block("single", gate_up="single", activation="square(relu(hidden))", hidden=208, inner=176),
    Block("one expert", one_expert=True),
)


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize(("rows", "features"), [(300, 7168), (1, 16), (70, 208)])
def test_lines_hold_values_and_scales(rows: int, features: int, scale_format: str) -> None:
    x = torch.randn(rows, features, device="cuda").bfloat16()
    lines = ops.to_lines(x, scale_format=scale_format)
    found = ops.from_lines(lines, features=features)
    right = ops.from_lines(in_torch.to_lines(x.cpu(), scale_format=scale_format), features=features)
    assert same([*found], [each.cuda() for each in right])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_experts_given_lines_compute_the_same(block: Block, scale_format: str, recompute: bool) -> None:
    """Result, what is saved, and gradients, to the bit, when they are recorded and replayed as well."""
    tensors = block.tensors()
    x, *rest = block.arguments(tensors)
    assert x is not None
    given: Any = {**block.attributes(), "scale_format": scale_format, "recompute": recompute}
    given["quantized"] = block.quantized(tensors)
    how = {} if scale_format == POWER_OF_TWO else {"scale_format": scale_format}
    grad = torch.randn(block.tokens, block.hidden, device="cuda").bfloat16()
    needs = [True, True, True, True, block.gate_up == "separate", False, False, False]
    with torch.no_grad():
        out, saved = ops.experts_fp8_forward(x, *rest, **given)
        right = ops.experts_fp8_backward(grad, saved, *rest, **given, needs=needs)
        for _ in range(3):
            again, kept = ops.experts_fp8_forward(ops.to_lines(x, **how), *rest, **given, lines=True)
            assert torch.equal(out, again) and same(kept[:2], saved[:2])
            found = ops.experts_fp8_backward(ops.to_lines(grad, **how), kept, *rest, **given, needs=needs, lines=True)
            assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))
