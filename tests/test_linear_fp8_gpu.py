"""Linear layers in FP8 on a Hopper GPU, against the emulation on the same operands and against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

import moecompile.runtime.operators  # noqa: F401  registers torch.ops.moecompile
from fences import fenced
from moecompile.lowering import inductor
from moecompile.runtime import hopper_linear, linear_fp8
from moecompile.runtime.quantize import FLOAT32, SCALE_FORMATS

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

ops = torch.ops.moecompile
SIZES = [((1,), 128, 128), ((3, 50), 48, 256), ((300,), 4096, 384), ((2, 129), 272, 1024), ((4096,), 512, 2048)]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("outer", "n", "k"), SIZES, ids=str)
def test_it_is_what_is_emulated(
    outer: tuple[int, ...], n: int, k: int, bias: bool, scale_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(*outer, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(n, k, device="cuda") * k**-0.5).bfloat16().requires_grad_()
    b = torch.randn(n, device="cuda", dtype=torch.bfloat16, requires_grad=True) if bias else None
    leaves = [leaf for leaf in (x, weight, b) if leaf is not None]
    grad = torch.randn(*outer, n, device="cuda").bfloat16()

    def run() -> list[Tensor]:
        how = {"scale_format": scale_format}
        copies = list(ops.quantize_weights(weight, **how))
        values, scales = ops.quantize(x, **how)
        assert hopper_linear.takes_rows(x) and hopper_linear.takes(values.view(-1, k), copies[0])
        result = ops.linear_fp8(x, weight, b, values, scales, copies, **how)
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
        # rows and gradients are rounded twice where they are shifted from float32 scales: 0.026 four times
        most = 0.057 if scale_format == FLOAT32 and ours.shape == weight.shape else 0.045
        assert relative(ours, true) < (most if ours.dim() > 1 else 5e-3)


@pytest.mark.parametrize(("outer", "features"), [((1,), 16), ((3, 50), 272), ((128,), 128), ((5000,), 1040)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_casts_have_the_bits_of_the_emulation(
    scale_format: str, outer: tuple[int, ...], features: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    spread = torch.logspace(-12, 12, features, base=2, device="cuda")
    x = (torch.randn(*outer, features, device="cuda") * spread).to(dtype)
    rows = x.view(-1, features)
    rows[0, 0] = float("nan")
    rows[-1, 1] = float("inf")
    rows[len(rows) // 2, :] = 0

    def run() -> list[Tensor]:
        how = {"scale_format": scale_format}
        values, scales = ops.quantize(x, **how)
        copies = [ops.along_tokens(values, scales, scale_block=block, **how) for block in linear_fp8.SCALE_BLOCKS]
        return [values, scales, *ops.quantize_gradient(x, **how), *(each for pair in copies for each in pair)]

    with fenced(least=2):
        found = run()
    with monkeypatch.context() as emulated:
        emulated.setattr(linear_fp8, "_hopper", lambda device: None)
        expected = run()
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride()), number
        bits = [each.clone(memory_format=torch.contiguous_format).view(torch.uint8) for each in (ours, theirs)]
        assert torch.equal(*bits), number


@pytest.mark.parametrize("how", ["turned", "one row for all", "four bytes on"])
def test_what_lies_otherwise_gives_the_same_bits(how: str) -> None:
    """As computed, as recorded, and as replayed."""

    def lie(x: Tensor) -> Tensor:
        if how == "turned":
            return x.t().contiguous().t()
        return (
            x[:1].expand_as(x) if how == "one row for all" else torch.cat([x.new_zeros(2), x.flatten()])[2:].view_as(x)
        )

    torch.manual_seed(0)
    weight = torch.randn(272, 512, device="cuda").bfloat16().requires_grad_()
    copies = list(ops.quantize_weights(weight))
    for _ in range(4):
        x, grad = (lie(torch.randn(300, features, device="cuda").bfloat16()) for features in (512, 272))
        found = []
        for rows, of_result in ((x, grad), (x.contiguous(), grad.contiguous())):
            leaf = rows.detach().requires_grad_()
            result = ops.linear_fp8(leaf, weight, None, *ops.quantize(leaf), copies)
            found.append([result.detach(), *torch.autograd.grad(result, [leaf, weight], of_result)])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_fused_cast_has_the_same_bits() -> None:
    """In Inductor's kernel, behind what made the rows; an even factor, so that nothing is rounded on the way."""

    def cast(x: Tensor) -> Any:
        return ops.quantize(x * 2)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return inductor(gm, inputs, patches={"force_disable_caches": True}, seen=lambda kind, graph: None)

    torch.manual_seed(0)
    x = torch.randn(300, 512, device="cuda").bfloat16()
    x[0, 0], x[1, 3], x[2, 5] = float("nan"), float("inf"), -float("inf")
    x[3], x[4], x[5] = 0, 1e-38, 3e38
    torch._dynamo.reset()
    found, expected = torch.compile(cast, backend=backend, fullgraph=True)(x), cast(x)
    assert [each.stride() for each in found] == [each.stride() for each in expected]
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(found[1], expected[1])
