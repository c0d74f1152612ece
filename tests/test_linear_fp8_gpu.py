"""Linear layers in FP8 on a Hopper GPU, against the emulation on the same operands and against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moecompile.runtime.operators  # noqa: F401  registers torch.ops.moecompile
from moecompile.runtime import hopper_linear, linear_fp8

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

ops = torch.ops.moecompile
SIZES = [((1,), 128, 128), ((3, 50), 48, 256), ((300,), 4096, 384), ((2, 129), 272, 1024), ((4096,), 512, 2048)]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("outer", "n", "k"), SIZES, ids=str)
def test_it_is_what_is_emulated(
    outer: tuple[int, ...], n: int, k: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(*outer, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(n, k, device="cuda") * k**-0.5).bfloat16().requires_grad_()
    b = torch.randn(n, device="cuda", dtype=torch.bfloat16, requires_grad=True) if bias else None
    leaves = [leaf for leaf in (x, weight, b) if leaf is not None]
    grad = torch.randn(*outer, n, device="cuda").bfloat16()

    def run() -> list[Tensor]:
        copies = list(ops.quantize_weights(weight))
        values, scales = ops.quantize(x)
        assert hopper_linear.takes_rows(x) and hopper_linear.takes(values.view(-1, k), copies[0])
        result = ops.linear_fp8(x, weight, b, values, scales, copies)
        return [result.detach(), *torch.autograd.grad(result, leaves, grad)]

    found, again = run(), run()
    with monkeypatch.context() as emulated:
        emulated.setattr(linear_fp8, "_hopper", lambda device: None)
        expected = run()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    result = torch.nn.functional.linear(*exact)
    right = [result.detach(), *torch.autograd.grad(result, exact, grad.double())]
    for ours, repeated, theirs, true in zip(found, again, expected, right, strict=True):
        assert torch.equal(ours, repeated), "differs from run to run"
        assert ours.shape == theirs.shape and ours.stride() == theirs.stride()
        assert relative(ours, theirs) < 4e-3
        assert relative(ours, true) < (0.045 if ours.dim() > 1 else 5e-3)
