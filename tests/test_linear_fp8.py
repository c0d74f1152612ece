"""Linear layers in FP8: the operators against float64 and against plain arithmetic; what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import ScalingType

import fake_gpu
import fp8_by_hand as by_hand
import moecompile.runtime.operators  # noqa: F401  registers torch.ops.moecompile
from moecompile.runtime import hopper_linear, linear_fp8
from moecompile.runtime.once import warn_once
from moecompile.runtime.quantize import ALONG_FEATURES, E4M3, FLOAT32, SQUARE, dequantize, quantize

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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, **how: str) -> Tensor:
    rows = ops.quantize(x, **how)
    found: Tensor = ops.linear_fp8(x, weight, bias, *rows, list(ops.quantize_weights(weight, **how)), **how)
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


def test_float32_scales() -> None:
    """Forward and of the rows' gradient; what the gradient of the matrix reads is shifted to powers of two."""
    leaves = given(300, n=144)
    x, weight, bias = (leaf.detach() for leaf in leaves if leaf is not None)
    out = linear(*leaves, scale_format=FLOAT32)
    grad = torch.randn(out.shape).bfloat16()
    of_x, of_weight, of_bias = torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad)
    assert not torch.equal(out, linear(*leaves))
    row, square = by_hand.ROW, by_hand.SQUARE
    w, g = by_hand.rounded(weight, square, FLOAT32), by_hand.rounded(grad, row, FLOAT32)
    assert worst_row(out, by_hand.rounded(x, row, FLOAT32) @ w.T + bias.double()) < 2.5e-3
    assert worst_row(of_x, g @ w) < 2.5e-3
    assert worst_row(of_weight, by_hand.along(g).T @ by_hand.shifted(x, FLOAT32)) < 2.5e-3
    assert torch.equal(of_bias, grad.sum(0, dtype=torch.float32).bfloat16())


def test_formats_that_there_are_not() -> None:
    x, weight, _ = given(4)
    values, scales = ops.quantize(x)
    copies = list(ops.quantize_weights(weight))
    for call in (
        lambda: ops.quantize(x, scale_format="ue8m0"),
        lambda: ops.quantize_gradient(x, scale_format="ue8m0"),
        lambda: ops.quantize_weights(weight, scale_format="ue8m0"),
        lambda: ops.along_tokens(values, scales, scale_block="128x128", scale_format="ue8m0"),
        lambda: ops.linear_fp8(x, weight, None, values, scales, copies, scale_format="ue8m0"),
    ):
        with pytest.raises(ValueError, match="scale_format must be one of power_of_two, float32; got 'ue8m0'"):
            call()


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
    values, scales = ops.quantize(x.detach())
    product = (values, scales, *copies[:2], bias.detach() if bias is not None else None)
    torch.library.opcheck(
        ops.scaled_mm.default, product, {"out_features": 48, "dtype": torch.bfloat16}, test_utils=CHECKS
    )
    for scale_block in linear_fp8.SCALE_BLOCKS:
        torch.library.opcheck(
            ops.along_tokens.default, (values, scales), {"scale_block": scale_block}, test_utils=CHECKS
        )


@pytest.mark.parametrize("outer", [(), (1,), (3, 43), (128,), (300,)], ids=str)
def test_scales_lie_as_the_fakes_say(outer: tuple[int, ...]) -> None:
    x = torch.randn(*outer, 272).bfloat16()
    real, fake = [*ops.quantize(x)], [*linear_fp8.fake_quantize(x)]
    for scale_block in linear_fp8.SCALE_BLOCKS if outer else ():
        real += ops.along_tokens(real[0], real[1], scale_block=scale_block)
        fake += linear_fp8.fake_along_tokens(fake[0], fake[1], scale_block=scale_block)
    for ours, theirs in zip(real, fake, strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
    assert real[1].movedim(-1, 0).is_contiguous()


def test_token_major_copies() -> None:
    """What they stand for is what the rows stand for, but for the new scales' rounding; what fills up is zero."""
    x = torch.randn(300, 256).bfloat16() * torch.logspace(-8, 8, 300, base=2)[:, None].bfloat16()
    values, scales = ops.quantize(x)
    rows = dequantize(values, scales, ALONG_FEATURES)
    copy, copy_scales = ops.along_tokens(values, scales, scale_block="1x128")
    assert not copy[:, 300:].float().any()
    assert torch.equal(dequantize(copy, copy_scales, ALONG_FEATURES)[:, :300].t(), _again(rows))
    copy, copy_scales = ops.along_tokens(values, scales, scale_block="128x128")
    assert not copy[:, 300:].float().any()
    found = dequantize(copy, copy_scales, SQUARE)[:, :300].t()
    # exact, but where a token is so much quieter than its neighbours that it falls below e4m3's smallest number
    assert float((found - rows).abs().max() / rows.abs().max()) < 2**-9
    loud = rows.abs() > rows.abs().amax() * 2**-6
    assert torch.equal(found[loud], rows[loud])


def _again(rows: Tensor) -> Tensor:
    """Rows quantised with a scale for a column of 128 rows."""
    values, scales = quantize(rows.t().contiguous(), ALONG_FEATURES)
    return dequantize(values, scales, ALONG_FEATURES).t()


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
    with pytest.raises(ValueError, match=r"a gradient needs transposed copies .*backward=True"):
        call(x.clone().requires_grad_(), weight, bias, values, scales, forward_only)
    with pytest.raises(ValueError, match="scale_block must be one of 1x128, 128x128; got '128x1'"):
        ops.along_tokens(values, scales, scale_block="128x1")
    with pytest.raises(TypeError, match=r"values must be torch\.float8_e4m3fn, got torch\.bfloat16; quantize makes it"):
        ops.along_tokens(x, scales, scale_block="1x128")
    sizes = {"out_features": 48, "dtype": torch.bfloat16}
    with pytest.raises(ValueError, match="b must have shape by out_features and a, in whole blocks"):
        ops.scaled_mm(values, scales, copies[0][:48], copies[1], **sizes)
    with pytest.raises(ValueError, match="a_scales must have shape by a"):
        ops.scaled_mm(values, scales.t(), *copies[:2], **sizes)
    with pytest.raises(TypeError, match=r"bias must be torch\.bfloat16, got torch\.float32"):
        ops.scaled_mm(values, scales, *copies[:2], bias.float(), **sizes)
    with pytest.raises(TypeError, match=r"dtype must be bfloat16 or float16, got torch\.float32"):
        ops.scaled_mm(values, scales, *copies[:2], out_features=48, dtype=torch.float32)
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


def test_on_hopper_it_is_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched, by a driver that launches nothing."""
    x, weight, bias = given(2, 70)
    with fake_gpu.installed(monkeypatch) as gpu:
        monkeypatch.setattr(linear_fp8, "_hopper", lambda device: hopper_linear)
        monkeypatch.setattr(hopper_linear, "fills", lambda rows, columns: True)
        result = linear(x, weight, bias)
        assert result.shape == (2, 70, 48)
        names = [each.instance.name.removeprefix("moecompile_") for each in gpu.taken()]
        assert names == ["quantize_rows", "quantize_weights", "gemm"]
        found = torch.autograd.grad(result, [each for each in (x, weight, bias) if each is not None], result)
        assert [each.shape for each in found] == [(2, 70, 256), (48, 256), (48,)]
        names = [each.instance.name.removeprefix("moecompile_") for each in gpu.taken()]
        assert names == [
            *("quantize_gradient", "gemm"),
            *("transpose_rows", "gemm"),
        ]


def test_the_gradient_of_the_weight_alone_reads_no_transposed_copies() -> None:
    x, weight, bias = given(70)
    rows = ops.quantize(x.detach())
    found = []
    for backward in (True, False):
        copies = list(ops.quantize_weights(weight, backward=backward))
        found.append(gradients(ops.linear_fp8(x.detach(), weight, bias, *rows, copies), (weight, bias)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("wanted", range(3), ids=["rows", "weight", "bias"])
def test_what_no_gradient_reads_is_not_held(wanted: int) -> None:
    leaves = [each for each in given(70) if each is not None]
    whole = gradients(linear(*leaves), leaves)
    alone = [each.detach().requires_grad_(number == wanted) for number, each in enumerate(leaves)]
    sizes = set()

    def pack(tensor: Tensor) -> Tensor:
        sizes.add((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = linear(*alone)
    found = gradients(result, alone[wanted : wanted + 1])
    assert torch.equal(found[1], whole[1 + wanted])
    in_fp8 = {shape for shape, dtype in sizes if dtype == E4M3}
    assert in_fp8 == ({(256, 128)}, {(70, 256)}, set[Any]())[wanted]


@pytest.mark.parametrize("how", ["turned", "one row for all", "every other", "four bytes on"])
def test_what_lies_otherwise_is_copied_for_the_kernels(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of sums and of transposed results lie so: emulation would be a hundred times slower."""
    lie = {
        "turned": lambda x: x.t().contiguous().t(),
        "one row for all": lambda x: x[:1].expand_as(x),
        "every other": lambda x: torch.stack([x, x], 1)[:, 0],
        "four bytes on": lambda x: torch.cat([x.new_zeros(2), x.flatten()])[2:].view(x.shape),
    }[how]
    x, weight, _ = given(70)
    x, grad = lie(x.detach()).requires_grad_(), lie(torch.ones(70, 48, dtype=torch.bfloat16))
    assert not x.is_contiguous() or x.data_ptr() % 16
    with fake_gpu.installed(monkeypatch) as gpu:
        monkeypatch.setattr(linear_fp8, "_hopper", lambda device: hopper_linear)
        monkeypatch.setattr(hopper_linear, "fills", lambda rows, columns: True)
        for _ in range(2):  # the second time as it was recorded
            result = linear(x, weight, None)
            torch.autograd.grad(result, [x, weight], grad)
            names = [each.instance.name.removeprefix("moecompile_") for each in gpu.taken()]
            assert names == [
                *("quantize_rows", "quantize_weights", "gemm"),
                *("quantize_gradient", "gemm", "transpose_rows", "gemm"),
            ]


def test_reference_kernels_multiply_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = given(70)
    leaves = [each for each in (x, weight, bias) if each is not None]
    copies = list(ops.quantize_weights(weight))
    expected = gradients(ops.linear_fp8(x, weight, bias, *ops.quantize(x), copies), leaves)
    found = gradients(ops.linear_fp8(x, weight, bias, *ops.quantize(x), copies, kernels="reference"), leaves)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="linear_fp8: kernels must be one of None, 'reference'; got 'mine'"):
        ops.linear_fp8(x, weight, bias, *ops.quantize(x), copies, kernels="mine")
    with fake_gpu.installed(monkeypatch) as gpu:
        monkeypatch.setattr(linear_fp8, "_hopper", lambda device: hopper_linear)
        monkeypatch.setattr(hopper_linear, "fills", lambda rows, columns: True)
        for _ in range(2):
            result = ops.linear_fp8(x, weight, bias, *ops.quantize(x), copies, kernels="reference")
            torch.autograd.grad(result, [x, weight], result)
            names = [each.instance.name.removeprefix("moecompile_") for each in gpu.taken()]
            assert names == ["quantize_rows", "quantize_gradient", "transpose_rows"]


def test_emulation_where_there_are_kernels_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(linear_fp8, "_hopper", lambda device: hopper_linear)
    warn_once.cache_clear()
    x, weight, _ = given(5, dtype=torch.float16)
    rows, copies = quantize(x.detach(), ALONG_FEATURES), list(ops.quantize_weights(weight))
    for _ in range(2):
        ops.linear_fp8(x.detach(), weight.detach(), None, *rows, copies)
    linear_fp8.scaled_mm(*rows, *copies[:2], out_features=36, dtype=torch.bfloat16)
    monkeypatch.setattr(linear_fp8, "_hopper", lambda device: None)
    linear_fp8.scaled_mm(*rows, *copies[:2], out_features=36, dtype=torch.bfloat16)
    slow = "linear layers in FP8 are emulated with PyTorch's operators, which is slow: "
    assert caplog.messages == [
        f"{slow}the model is in torch.float16; there are kernels for bfloat16",
        f"{slow}256 and 36 features are not both multiples of 16",
    ], "on a CPU everybody knows"


def test_products_of_few_tiles_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLASLt has smaller tiles: sizes of layers of DeepSeek-V3 and Qwen3, 8192 tokens, as measured (docs/perf.md)."""
    full = [(8192, 1536), (8192, 2048), (8192, 4096), (8192, 7168), (7168, 18432), (4096, 2048), (2048, 4096)]
    few = [(8192, 576), (576, 7168), (512, 2048), (2048, 7168), (7168, 2048), (1, 7168)]
    assert all(hopper_linear.fills(*each) for each in full)
    assert not any(hopper_linear.fills(*each) for each in few)
    asked = []

    def product(a: Tensor, b: Tensor, *scales: Tensor | ScalingType, output_dtype: torch.dtype) -> Tensor:
        asked.append((tuple(a.shape), tuple(b.shape), [x.stride() for x in scales if isinstance(x, Tensor)]))
        return a.new_empty(a.shape[0], b.shape[1], dtype=output_dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", product)
    x, weight, bias = given(144)
    with fake_gpu.installed(monkeypatch) as gpu:
        monkeypatch.setattr(linear_fp8, "_hopper", lambda device: hopper_linear)
        result = linear(x, weight, None)
        torch.autograd.grad(result, [x, weight], result)
        # scales of tokens transposed, those of blocks in lines of four
        assert asked == [
            ((144, 256), (256, 48), [(1, 144), (1, 4)]),
            ((48, 256), (256, 256), [(1, 48), (1, 4)]),
        ]
        names = [each.instance.name.removeprefix("moecompile_") for each in gpu.taken()]
        assert names.count("gemm") == 1, "48 features of the result are no whole block for the rows' gradient"
        asked.clear()
        linear(x, weight, bias)
        linear(x[:, :].detach()[:9], weight, None)
        assert not asked, "a bias, or scales of nine tokens, which are no whole lines"
