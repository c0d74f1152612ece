"""Models whose matrices are in FP8 alone, on a Hopper GPU: kernels read what is held, whatever its scales."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moecompile
from moecompile.runtime.block_scaled import BlockScaled
from test_conversion import MODELS, Called, in_fp8, infer, made
from test_fp8_models import compiled
from test_load_fp8 import blocks, checkpoint

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

ops = torch.ops.moecompile


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers(name: str, cached: bool) -> None:
    model, ids = made(name, layers=2)
    model, ids = model.cuda(), ids.cuda()
    expected = infer(compiled(copy.deepcopy(model), lowering="inductor"), ids)
    names = moecompile.convert_to_fp8(model, ids)
    assert names and {*names} == {*in_fp8(model)}
    found = infer(compiled(model, lowering="inductor", fp8_cache_weights=cached), ids)
    assert torch.equal(found, expected)


def test_memory_is_given_back() -> None:
    layer = nn.Linear(8192, 8192, bias=False, device="cuda", dtype=torch.bfloat16).eval()
    x = torch.randn(16, 8192, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)  # cuBLAS takes its workspace with the first product
    before = torch.cuda.memory_allocated()
    assert moecompile.convert_to_fp8(layer, x) == ("weight",)
    assert torch.cuda.memory_allocated() - before < -0.49 * 2 * 8192**2


def scaled(*shape: int) -> tuple[BlockScaled, Tensor]:
    """A matrix whose scales are no powers of two, and the float64 numbers it stands for."""
    values, scales, exact = blocks(torch.randn(shape) * torch.rand(shape[-1]))
    assert (scales.log2() % 1).any()
    return BlockScaled.from_blocks(values.cuda(), scales.cuda(), torch.bfloat16), exact.double().cuda()


@pytest.mark.parametrize(("rows", "n", "k"), [(5, 256, 512), (300, 4096, 384), (4096, 512, 2048)])
def test_any_scales_of_a_layer(rows: int, n: int, k: int) -> None:
    torch.manual_seed(0)
    kept, exact = scaled(n, k)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    quantized = ops.quantize_weights(kept)
    values, scales = ops.quantize(x)
    result = ops.linear_fp8(x, kept.dequantized(), None, values, scales, list(quantized))
    of_x = values.double() * scales.double().repeat_interleave(128, 1)[:, :k]
    assert relative(result, of_x @ exact.T) < 3e-3  # bfloat16's rounding
    (grad,) = torch.autograd.grad(result, x, torch.ones_like(result))
    g = torch.ones(rows, n, device="cuda", dtype=torch.float64)
    assert relative(grad, g @ exact) < 3e-3


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints(name: str) -> None:
    """On the GPU as far from exact products as on the CPU, where the same arithmetic is emulated."""
    model, _ = made(name, layers=2)
    stored, exact = checkpoint(model.model, single=True)
    wide: Any = Called(copy.deepcopy(model.model).float()).eval()
    wide.model.load_state_dict({name: each.float() for name, each in exact.items()})
    moecompile.load_fp8(model.model, stored)
    on_gpu: Any = Called(copy.deepcopy(model.model)).eval().cuda()
    assert {*in_fp8(on_gpu)} == {*in_fp8(model)}
    layer, other, whole = (each.model.model.layers[1].mlp for each in (model, on_gpu, wide))
    torch.manual_seed(1)
    x = torch.randn(1, 24, 256).bfloat16()
    results = infer(whole, x.float()), infer(compiled(layer), x), infer(compiled(other, lowering="inductor"), x.cuda())
    right, emulated, found = (each[0] if isinstance(each, tuple) else each for each in results)
    error = relative(emulated, right)
    assert 1e-3 < error < 5e-2
    assert relative(found.cpu(), right) < 1.02 * error
