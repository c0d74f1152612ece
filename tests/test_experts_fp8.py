"""`moecompile::experts_fp8` against FP8 by its definition, and against float64: results and every gradient."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from copy import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fp8_by_hand as by_hand
from dense_experts import FORMS, GATED, GPT_OSS, INPUTS, RELU_SQUARED, SWIGLU, UNWEIGHTED, Case, make_case, routing
from moecompile.runtime import fp8_reference, grouped, reference
from moecompile.runtime.quantize import FLOAT32, POWER_OF_TWO, SCALE_FORMATS

ops = torch.ops.moecompile
BIASES = ("b_in", "b_up", "b_out")
LAYOUTS = (*GATED, "single")


@pytest.fixture(params=["cpu", "device"])
def walk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's walk over the experts, and that of other devices, run here on the CPU."""
    if request.param == "device":
        monkeypatch.setattr(
            reference, "rows_of", lambda offsets, order, top_k, *_: grouped.DeviceRows(offsets, order, top_k)
        )
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan() and torch.empty(1, dtype=torch.float8_e4m3fn).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def quantized(case: Case) -> list[Tensor]:
    given = case.tensors
    how = {"scale_format": case.attributes.get("scale_format", POWER_OF_TWO)}
    layout = {"gate_up": case.gate_up, "transposed": case.transposed[0]}
    first = ops.quantize_weights(given["w_in"], given["w_up"], **layout, **how)
    return [*first, *ops.quantize_weights(given["w_out"], transposed=case.transposed[1], **how)]


def run(case: Case) -> Tensor:
    return ops.experts_fp8(*case.arguments(), **case.attributes, quantized=quantized(case))


def gradients(case: Case, out: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    return dict(zip(case.given, torch.autograd.grad(out, list(case.given.values()), cotangent), strict=True))


def relative(found: Tensor, expected: Tensor) -> float:
    """The relative L2 error."""
    expected = expected.detach().double()
    return float((found.detach().double() - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_by_hand(case: Case, loudness: Tensor | float = 1.0, most: float = 2e-4) -> None:
    """Results and gradients are those of the definition, rounded once.

    Sums in float32 differ from those in float64 in the last bit. That moves a hidden value to the neighbouring number
    of 16 bits once in thousands, and its FP8 copy more rarely: one such value costs some 4e-5. Where it is the largest
    of its block and scales are no powers of two, all of the block is rounded anew. The result's gradient is random,
    times `loudness`.
    """
    out = run(case)
    torch.manual_seed(1)
    cotangent = (torch.randn(out.shape) * loudness).to(out.dtype)
    expected, wanted = by_hand.experts(case, cotangent)
    assert relative(out, expected.to(out.dtype)) <= most
    for name, grad in gradients(case, out, cotangent).items():
        like = case.given[name]
        assert grad.dtype == like.dtype and grad.shape == like.shape
        assert grad.is_contiguous() or not like.is_contiguous()
        error = relative(grad, wanted[name].to(like.dtype))
        assert error <= most, f"gradient of {name}: {error:.1e}"


@pytest.mark.parametrize("gate_up", LAYOUTS)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)], ids=str)
def test_layouts(gate_up: str, transposed: tuple[bool, bool], walk: str, poisoned: None):
    torch.manual_seed(0)
    form = RELU_SQUARED if gate_up == "single" else SWIGLU
    sizes = (72, 176, 40) if transposed[1] else (200, 96, 136)  # none a multiple of 128
    for biases in ((), BIASES):
        ids = routing("dropped", 40, 2, 3)
        case = make_case(ids, 3, form, gate_up, transposed, biases, torch.bfloat16, torch.float32, sizes)
        assert_by_hand(case)


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("gate_up", LAYOUTS)
def test_rows_that_are_computed_again_are_those_that_would_be_saved(
    gate_up: str, scale_format: str, walk: str, poisoned: None
):
    torch.manual_seed(0)
    form = RELU_SQUARED if gate_up == "single" else SWIGLU
    ids = routing("dropped", 40, 2, 3)
    case = make_case(ids, 3, form, gate_up, biases=BIASES, dtype=torch.bfloat16, sizes=(200, 96, 136))
    case.attributes = case.attributes | {"scale_format": scale_format}
    again = copy(case)
    again.attributes = case.attributes | {"recompute": True}
    with torch.no_grad():
        _, saved = ops.experts_fp8_forward(*again.arguments(), **again.attributes, quantized=quantized(again))
    assert [tensor.numel() > 0 for tensor in saved] == [True, True, False, False]
    outs = [run(each) for each in (case, again)]
    assert torch.equal(*outs)
    cotangent = torch.randn_like(outs[0])
    kept, computed = (gradients(case, out, cotangent) for out in outs)
    for name, grad in kept.items():
        assert torch.equal(grad, computed[name]), name


@pytest.mark.parametrize("gate_up", LAYOUTS)
def test_float32_scales(gate_up: str, walk: str, poisoned: None):
    """Forward and of the rows' gradients; what gradients of matrices read is shifted to powers of two."""
    torch.manual_seed(0)
    form = RELU_SQUARED if gate_up == "single" else SWIGLU
    ids = routing("dropped", 40, 2, 3)
    case = make_case(ids, 3, form, gate_up, biases=BIASES, dtype=torch.bfloat16, sizes=(200, 96, 136))
    plain = run(case)
    case.attributes = case.attributes | {"scale_format": FLOAT32}
    assert not torch.equal(run(case), plain)
    assert_by_hand(case, most=1e-3)


@pytest.mark.parametrize("form", ["geglu", "gpt_oss", "unweighted", "one_sided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_forms(form: str, dtype: torch.dtype, walk: str, poisoned: None):
    torch.manual_seed(0)
    ids = routing("random", 30, 2, 3)
    assert_by_hand(
        make_case(ids, 3, FORMS[form], "interleaved", biases=BIASES, dtype=dtype, weight_dtype=torch.float32)
    )


@pytest.mark.parametrize("kind", ["one_expert", "some_empty", "skewed", "dropped"])
def test_blocks_of_tokens_begin_at_each_expert(kind: str, walk: str, poisoned: None):
    """Experts of none, of few and of several hundred rows, whose last block of 128 tokens is partial."""
    torch.manual_seed(0)
    ids = routing(kind, 170, 2, 5)
    case = make_case(ids, 5, SWIGLU, "separate", dtype=torch.bfloat16, weight_dtype=torch.float32, sizes=(16, 8, 8))
    with torch.no_grad():  # neighbouring tokens share scales: louder ones show which those are
        case.given["x"] *= torch.exp2(torch.randint(-4, 4, (170, 1)))
    assert_by_hand(case)


def test_quiet_gradients_of_loud_tokens(walk: str, poisoned: None):
    """All tokens count alike in the weights' gradients; what one scale of 128 tokens loses of the quiet ones shows."""
    torch.manual_seed(0)
    form = replace(UNWEIGHTED, activation="relu(gate)", activate=lambda gate, up, weight: gate.relu())
    case = make_case(routing("random", 200, 1, 2), 2, form, dtype=torch.bfloat16, sizes=(16, 24, 8))
    loudness = torch.exp2(torch.randint(-10, 11, (200, 1)))
    with torch.no_grad():
        case.given["x"] *= loudness
    assert_by_hand(case, 1 / loudness)


def test_a_missing_bias_is_zero(walk: str, poisoned: None):
    for biases in (("b_in",), ("b_up",), ("b_out",)):
        torch.manual_seed(0)
        case = make_case(routing("random", 20, 2, 3), 3, SWIGLU, "separate", biases=BIASES, dtype=torch.bfloat16)
        zeros = {name: torch.zeros_like(case.given[name]) for name in BIASES if name not in biases}
        with torch.no_grad():
            found = run(replace(case, tensors={**case.tensors, **dict.fromkeys(zeros)}))
            assert torch.equal(found, run(replace(case, tensors={**case.tensors, **zeros})))


def test_activations_that_read_the_weight(walk: str, poisoned: None):
    """Which the definition by hand has no case for: against float64, with the bounds of `test_accuracy`."""
    torch.manual_seed(0)
    form = FORMS["weight_within"]
    case = make_case(
        routing("dropped", 60, 2, 3), 3, form, biases=("b_in",), dtype=torch.bfloat16, sizes=(256, 192, 128)
    )
    assert_accurate(case)


BOUNDS = {"result": 0.075, "x": 0.085, "weights": 0.095, "w_in": 0.085, "w_up": 0.085, "w_out": 0.09}
"""Relative L2 errors. An operand in e4m3 with power-of-two scales is off by 0.026, and squares of errors add:

result   x, w_in (0.037 for a product), as gate and as up (0.053), activation and w_out: 0.065
w_out    the activation of FP8 rows (0.053), which were rounded once more, itself and the gradient rounded: 0.077
x, w_in  the gradient, w_out (0.037), the derivative at such rows, the result rounded, and w_in or x: 0.075
weights  the activation of FP8 rows, gradient and w_out: 0.075, and sums over 256 values only, which scatter by 10 %

Each has some 12 % in hand. Biases' gradients are compared with FP8 by hand above.
"""


def assert_accurate(case: Case) -> None:
    out, (expected, leaves) = run(case), case.dense()
    torch.manual_seed(1)
    cotangent = torch.randn(out.shape).to(out.dtype)
    wanted = torch.autograd.grad(expected, list(leaves.values()), cotangent.double())
    errors = {"result": relative(out, expected)}
    sixteen = {"result": relative(case.run(), expected)}
    plain = gradients(case, case.run(), cotangent)
    for (name, grad), exact in zip(gradients(case, out, cotangent).items(), wanted, strict=True):
        errors[name], sixteen[name] = relative(grad, exact), relative(plain[name], exact)
    for name, bound in BOUNDS.items():
        if name in errors:
            assert errors[name] <= bound, f"{name}: {errors[name]:.3f}"
            assert errors[name] > 2 * sixteen[name], f"{name} was not rounded to FP8: {errors[name]:.3f}"


@pytest.mark.parametrize("gate_up", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accuracy(gate_up: str, dtype: torch.dtype, walk: str):
    torch.manual_seed(0)
    form = RELU_SQUARED if gate_up == "single" else SWIGLU
    assert_accurate(make_case(routing("random", 300, 2, 4), 4, form, gate_up, dtype=dtype, sizes=(320, 192, 256)))


def test_accuracy_of_quiet_tokens():
    """The worst token's error with norms from 2^-8 to 2^8 and one loud block of features: what one scale would lose."""
    torch.manual_seed(0)
    form = replace(UNWEIGHTED, activation="relu(gate)", activate=lambda gate, up, weight: gate.relu())
    case = make_case(routing("random", 64, 1, 2), 2, form, dtype=torch.bfloat16, sizes=(256, 128, 128))
    with torch.no_grad():
        x, w_in = case.given["x"], case.given["w_in"]
        x *= torch.exp2(torch.randint(-8, 9, (64, 1)))
        x[:, 128:] *= 2**10
        w_in[:, :, 128:] *= 2**-10
        out, (expected, _) = run(case), case.dense()
        errors = (out.double() - expected).norm(dim=1) / expected.norm(dim=1)
    # four operands of 0.026 give 0.053, the mean found; the worst of 64 tokens of 128 values is 0.075 in five seeds
    assert errors.max().item() <= 0.09


@pytest.mark.parametrize("kind", ["all_dropped", "dropped"])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens(kind: str, tokens: int, walk: str, poisoned: None):
    torch.manual_seed(0)
    case = make_case(routing(kind, tokens, 2, 3), 3, biases=BIASES, dtype=torch.bfloat16, weight_dtype=torch.float32)
    assert_by_hand(case)


def test_only_what_needs_a_gradient_is_computed(walk: str, poisoned: None):
    torch.manual_seed(0)
    case = make_case(routing("dropped", 8, 2, 3), 3, SWIGLU, "separate", biases=BIASES, dtype=torch.bfloat16)
    copies = quantized(case)
    out, saved = ops.experts_fp8_forward(*case.arguments(), **case.attributes, quantized=copies)
    cotangent = torch.randn_like(out)
    every = gradients(case, out, cotangent)
    for size in (1, 2, len(every) - 1):
        for names in itertools.combinations(every, size):
            needs = [name in names for name in INPUTS]
            with torch.no_grad():
                found = ops.experts_fp8_backward(
                    cotangent, saved, *case.arguments()[1:], **case.attributes, quantized=copies, needs=needs
                )
            assert len(found) == size
            for name, grad in zip((name for name in INPUTS if name in names), found, strict=True):
                assert torch.equal(grad, every[name])


def test_frozen_experts_cost_no_weight_gradients(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    case = make_case(routing("random", 8, 2, 3), 3, dtype=torch.bfloat16)
    for name in ("w_in", "w_out"):
        case.given[name].requires_grad_(False)
    monkeypatch.setattr(grouped.Rows, "weight_gradient", None)
    monkeypatch.setattr(fp8_reference, "blocks_of", None)
    run(case).sum().backward()
    assert case.given["x"].grad is not None and case.given["w_in"].grad is None


def test_only_the_quantised_weights_are_multiplied():
    torch.manual_seed(0)
    case = make_case(routing("random", 8, 2, 3), 3, dtype=torch.bfloat16)
    copies, cotangent = quantized(case), torch.randn(8, 7).bfloat16()
    expected = gradients(case, run(case), cotangent)
    with torch.no_grad():
        case.given["w_in"].fill_(torch.nan)
        case.given["w_out"].fill_(torch.nan)
    out = ops.experts_fp8(*case.arguments(), **case.attributes, quantized=copies)
    assert out.isfinite().all()
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(case, out, cotangent).items())


def test_saved_are_x_and_hidden_rows_in_fp8(walk: str, poisoned: None):
    torch.manual_seed(0)
    case = make_case(routing("dropped", 9, 2, 4), 4, SWIGLU, "interleaved", dtype=torch.bfloat16, sizes=(200, 130, 7))
    with torch.no_grad():
        copies = quantized(case)
        _, (x, x_scales, hidden, scales) = ops.experts_fp8_forward(
            *case.arguments(), **case.attributes, quantized=copies
        )
    assert x.shape == (9, 200) and x_scales.shape == (9, 2) and hidden.shape == (18, 512) and scales.shape == (4, 20)
    expected, expected_scales = by_hand.quantized(case.given["x"].detach(), by_hand.ROW)
    assert torch.equal(x.double(), expected) and torch.equal(x_scales.double(), expected_scales)
    x_d, rows = by_hand.rounded(case.given["x"].detach(), by_hand.ROW), iter(range(18))
    in_expert_order = sorted((int(e), t) for t, chosen in enumerate(case.ids) for e in chosen if e >= 0)
    for e, token in in_expert_order:
        row = next(rows)
        for p, w in enumerate(by_hand.matrices(case)):
            value = (by_hand.rounded(w[e], by_hand.SQUARE) @ x_d[token]).bfloat16().unsqueeze(0)
            expected, expected_scales = by_hand.quantized(value, by_hand.ROW)
            assert torch.equal(hidden[row, p * 256 : p * 256 + 130].double(), expected[0])
            assert torch.equal(scales[p * 2 : p * 2 + 2, row].double(), expected_scales[0])
            assert not hidden[row, p * 256 + 130 : p * 256 + 256].view(torch.uint8).any()


def test_x_itself_is_not_kept_for_backward():
    torch.manual_seed(0)
    case = make_case(routing("random", 8, 2, 3), 3, dtype=torch.bfloat16)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(case)
    assert case.given["w_in"].data_ptr() in kept and case.given["x"].data_ptr() not in kept


def test_an_overflow_stays_with_its_expert(walk: str):
    """Infinities of one expert's rows reach no other expert's gradient, and are not lost."""
    torch.manual_seed(0)
    case = make_case(torch.tensor([[0], [1], [1], [2]]), 4, biases=BIASES, dtype=torch.bfloat16)
    cotangent = torch.zeros(4, 7, dtype=torch.bfloat16)
    cotangent[0], cotangent[1:] = torch.inf, 1.0
    grads = gradients(case, run(case), cotangent)
    for name in ("w_in", "w_out", "b_in", "b_out"):
        assert not grads[name][0].isfinite().all() and grads[name][1:].isfinite().all(), name
    assert not grads["x"][0].isfinite().any()
    assert grads["x"][1:].isfinite().all() and grads["weights"][1:].isfinite().all()


def test_gradients_keep_the_parameters_layout(walk: str):
    torch.manual_seed(0)
    case = make_case(routing("random", 8, 2, 3), 3, transposed=(True, False), dtype=torch.bfloat16)
    expected = gradients(case, run(case), torch.ones(8, 7).bfloat16())
    case.tensors["w_in"] = view = case.given["w_in"].detach().mT.contiguous().mT.requires_grad_()
    (grad,) = torch.autograd.grad(run(case).sum(), view)
    assert grad.stride() == view.stride() and torch.equal(grad, expected["w_in"])


def test_repeated_runs_are_bitwise_equal(walk: str):
    torch.manual_seed(0)
    case = make_case(routing("skewed", 64, 4, 6), 6, biases=BIASES, dtype=torch.bfloat16)
    cotangent = torch.randn(64, 7).bfloat16()
    first, second = ((run(case), *gradients(case, run(case), cotangent).values()) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_results_in_float32_and_gpt_oss_in_16_bits(walk: str):
    """out_dtype and routing weights of 16 bits: by hand up to the rounding of what is summed, 2^-8 of bfloat16."""
    torch.manual_seed(0)
    for out_dtype in (None, torch.float32):
        case = make_case(
            routing("random", 24, 2, 3), 3, GPT_OSS, biases=BIASES, dtype=torch.bfloat16, out_dtype=out_dtype
        )
        out = run(case)
        expected, _ = by_hand.experts(case, torch.zeros(out.shape))
        assert out.dtype == (out_dtype or torch.bfloat16) and relative(out, expected) <= 2**-8
