"""Linear layers in FP8: the operators against float64 and against plain arithmetic; what they refuse."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import fake_gpu
import moecompile.runtime.operators  # noqa: F401  registers torch.ops.moecompile
from moecompile.runtime import hopper_linear, linear_fp8
from moecompile.runtime.quantize import ALONG_FEATURES, SQUARE, dequantize

ops = torch.ops.moecompile

CHECKS = ("test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
"""Of opcheck; its check of schemas computes with copies of the arguments, which PyTorch cannot in e4m3."""

# of a product of two operands that are each off by 0.027 of their norm (facts of e4m3 with power-of-two scales)
BOUND = 0.045


def given(
    *outer: int, n: int = 48, k: int = 256, bias: bool = True, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    x, weight = torch.randn(*outer, k).to(dtype), (torch.randn(n, k) * k**-0.5).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(n).to(dtype).requires_grad_() if bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = ops.linear_fp8(x, weight, bias, *ops.quantize(x), list(ops.quantize_weights(weight)))
    return found


def gradients(result: Tensor, leaves: Sequence[Tensor | None]) -> list[Tensor]:
    torch.manual_seed(1)
    found = torch.autograd.grad(
        result, [leaf for leaf in leaves if leaf is not None], torch.randn(result.shape).to(result)
    )
    return [result.detach(), *found]


def worst_row(found: Tensor, expected: Tensor) -> float:
    errors = (found.double() - expected).flatten(0, -2).norm(dim=-1) / expected.flatten(0, -2).norm(dim=-1)
    return float(errors.max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("outer", [(7,), (2, 150), (300,)], ids=str)
def test_results_and_gradients(outer: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    leaves = given(*outer, bias=bias, dtype=dtype)
    exact = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves]
    assert exact[0] is not None and exact[1] is not None
    expected = gradients(torch.nn.functional.linear(exact[0], exact[1], exact[2]), exact)
    found = gradients(linear(*leaves), leaves)
    for ours, right in zip(found, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == right.shape
        relative = float((ours.double() - right).norm() / right.norm())
        assert relative < (BOUND if ours.dim() > 1 else 5e-3), (ours.shape, relative)


def test_products_are_those_of_the_operands() -> None:
    """Loud tokens and features keep their own scales: what is left beside the operands' rounding is the result's."""
    x, weight, _ = given(40, n=512)
    with torch.no_grad():
        x *= torch.logspace(-12, 12, 40, base=2).to(x.dtype)[:, None]
        values, scales = ops.quantize(x)
        w_values, w_scales, *_ = ops.quantize_weights(weight)
        matrix = dequantize(w_values, w_scales, SQUARE).double()
        expected = dequantize(values, scales, ALONG_FEATURES).double() @ matrix.mT
        assert worst_row(linear(x, weight, None), expected) < 2.5e-3
        assert worst_row(linear(x, weight, None), x.double() @ weight.double().mT) < BOUND


def test_small_gradients_survive() -> None:
    """1e-10 is far below what a floor under the largest magnitude of a block would leave."""
    leaves = given(130)
    found = linear(*leaves)
    grad = torch.randn(found.shape).to(found) * 1e-10
    of_x, of_weight = torch.autograd.grad(found, leaves[:2], grad)
    x, weight, _ = (None if leaf is None else leaf.detach().double() for leaf in leaves)
    assert x is not None and weight is not None
    assert float((of_x.double() - grad.double() @ weight).norm() / (grad.double() @ weight).norm()) < BOUND
    expected = grad.double().mT @ x
    assert float((of_weight.double() - expected).norm() / expected.norm()) < BOUND


def test_no_tokens() -> None:
    leaves = given(0)
    result, *found = gradients(linear(*leaves), leaves)
    assert result.shape == (0, 48) and found[0].shape == (0, 256)
    assert all(not each.any() for each in found[1:])


def test_what_is_not_finite_stays_visible() -> None:
    x, weight, _ = given(4, bias=False)
    with torch.no_grad():
        x[1, 3], x[2, 7] = float("nan"), float("inf")
        found = linear(x, weight, None)
    assert found[0].isfinite().all() and found[3].isfinite().all()
    assert found[1].isnan().all() and found[2].isnan().all()


def test_only_needed_gradients() -> None:
    x, weight, bias = given(20)
    (alone,) = torch.autograd.grad(linear(x, weight.detach(), bias).sum(), [x])
    together, *_ = torch.autograd.grad(linear(x, weight, bias).sum(), [x, weight])
    assert torch.equal(alone, together)


def test_compiled_it_is_the_same() -> None:
    leaves = given(2, 40)
    expected = gradients(linear(*leaves), leaves)
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        found = gradients(torch.compile(linear, backend=backend, fullgraph=True)(*leaves), leaves)
        assert all(torch.equal(ours, right) for ours, right in zip(found, expected, strict=True)), backend


def test_symbolic_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (9, 17, 300):
        leaves = given(tokens)
        expected = gradients(linear(*leaves), leaves)
        assert all(map(torch.equal, gradients(compiled(*leaves), leaves), expected))


def test_operators_are_well_formed() -> None:
    x, weight, bias = given(5)
    copies = list(ops.quantize_weights(weight))
    torch.library.opcheck(ops.quantize.default, (x.detach(),))
    torch.library.opcheck(ops.linear_fp8.default, (x, weight, bias, *ops.quantize(x), copies), test_utils=CHECKS)
    given_back = (torch.randn(5, 48).bfloat16(), weight.detach(), *ops.quantize(x.detach()), copies, [True] * 3)
    torch.library.opcheck(ops.linear_fp8_backward.default, given_back, test_utils=CHECKS)


def test_bad_arguments_are_refused() -> None:
    x, weight, bias = (None if leaf is None else leaf.detach() for leaf in given(5))
    assert x is not None and weight is not None and bias is not None
    values, scales = ops.quantize(x)
    copies = list(ops.quantize_weights(weight))
    call = ops.linear_fp8
    with pytest.raises(ValueError, match="x must have shape by weight and x"):
        call(x[:, :128], weight, bias, values, scales, copies)
    with pytest.raises(TypeError, match=r"x must be torch\.bfloat16, got torch\.float32"):
        call(x.float(), weight, bias, values, scales, copies)
    with pytest.raises(ValueError, match="scales must have shape"):
        call(x, weight, bias, values, scales[:, :1], copies)
    with pytest.raises(ValueError, match="N a multiple of 16 and K of 128"):
        call(x, weight[:40], bias[:40], values, scales, copies)
    with pytest.raises(ValueError, match="quantized must hold 4 tensors"):
        call(x, weight, bias, values, scales, copies[:2])
    with pytest.raises(ValueError, match="bias must have shape"):
        call(x, weight, bias[:16], values, scales, copies)
    with pytest.raises(TypeError, match=r"must be bfloat16 or float16, got torch\.float32"):
        call(x, weight.float(), bias, values, scales, copies)
    forward_only = list(ops.quantize_weights(weight, backward=False))
    assert torch.equal(
        call(x, weight, bias, values, scales, forward_only), call(x, weight, bias, values, scales, copies)
    )
    with pytest.raises(ValueError, match=r"values_t of quantized must have shape .*backward=True"):
        ops.linear_fp8_backward(x[:, :48], weight, values, scales, forward_only, [True, False, False])
    with pytest.raises(TypeError, match="quantize: x must be bfloat16, float16 or float32"):
        ops.quantize(torch.ones(2, 128, dtype=torch.int32))
    with pytest.raises(ValueError, match="got a scalar"):
        ops.quantize(torch.tensor(1.0))


def test_what_has_no_derivative_says_so() -> None:
    x, weight, bias = given(5)
    (of_x,) = torch.autograd.grad(linear(x, weight, bias).sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_fp8 has no second derivative"):
        of_x.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_fp8 has no second derivative"):
        torch.autograd.grad(of_x.square().sum(), x)
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms"):
        torch.func.grad(lambda x: linear(x, weight.detach(), None).sum())(x.detach())


def test_on_hopper_it_is_one_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched, by a driver that launches nothing."""
    x, weight, bias = given(2, 70)
    with fake_gpu.installed(monkeypatch) as gpu:
        monkeypatch.setattr(linear_fp8, "_hopper", lambda device: hopper_linear)
        result = linear(x, weight, bias)
        assert result.shape == (2, 70, 48)
        names = [each.instance.name.removeprefix("moecompile_") for each in gpu.taken()]
        assert names == ["quantize_weights", "grouped_gemm"]
        found = torch.autograd.grad(result, [each for each in (x, weight, bias) if each is not None], result)
        assert [each.shape for each in found] == [(2, 70, 256), (48, 256), (48,)]
        names = [each.instance.name.removeprefix("moecompile_") for each in gpu.taken()]
        assert names == [
            "quantize_rows",
            "grouped_gemm",
            "pad_offsets",
            *["transpose_rows"] * 2,
            "grouped_gemm_over_rows",
        ]
