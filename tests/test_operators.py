"""`moecompile::experts` against experts computed token by token in float64: results and every gradient."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from copy import copy
from dataclasses import replace

import pytest
import torch

from dense_experts import (
    FORMS,
    GATED,
    GEGLU,
    GPT_OSS,
    INPUTS,
    RELU_SQUARED,
    ROUTINGS,
    SWIGLU,
    Form,
    assert_near,
    make_case,
    routing,
)
from moecompile.runtime import grouped, reference

BIASES = ("b_in", "b_up", "b_out")


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
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate_up", GATED)
def test_gated_forms(form: str, gate_up: str, walk: str, poisoned: None):
    torch.manual_seed(0)
    ids = routing("dropped", 9, 3, 4)
    make_case(ids, 4, FORMS[form], gate_up, biases=BIASES).compare(1e-12, 1e-12)


@pytest.mark.parametrize("transposed", list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("gate_up", [*GATED, "single"])
def test_layouts(gate_up: str, transposed: tuple[bool, bool], walk: str, poisoned: None):
    torch.manual_seed(0)
    form = RELU_SQUARED if gate_up == "single" else SWIGLU
    for biases in ((), ("b_in",), ("b_out",), BIASES):
        make_case(routing("random", 5, 2, 3), 3, form, gate_up, transposed, biases).compare(1e-12, 1e-12)


@pytest.mark.parametrize("kind", ROUTINGS)
def test_routings(kind: str, walk: str, poisoned: None):
    torch.manual_seed(0)
    for tokens, (top_k, num_experts) in itertools.product((0, 1, 2, 17), ((1, 1), (1, 3), (2, 5), (4, 4))):
        ids = routing(kind, tokens, top_k, num_experts, seed=tokens)
        make_case(ids, num_experts, biases=("b_out",), sizes=(2, 3, 4)).compare(1e-12, 1e-12)


@pytest.mark.parametrize("gate_up", GATED)
@pytest.mark.parametrize("form", FORMS)
def test_rows_in_chunks(form: str, gate_up: str, monkeypatch: pytest.MonkeyPatch, poisoned: None):
    torch.manual_seed(0)
    case = make_case(routing("dropped", 9, 3, 4), 4, FORMS[form], gate_up, biases=BIASES)
    for limit in (0, 1000):
        monkeypatch.setattr(grouped, "CHUNK_BYTES", limit)
        case.compare(1e-12, 1e-12)


BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (3e-2, 6e-2), torch.float16: (5e-3, 1e-2)}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype | None, walk: str, poisoned: None):
    torch.manual_seed(0)
    for form, gate_up in itertools.product((SWIGLU, GEGLU, FORMS["weight_everywhere"]), ("halves", "separate")):
        for out_dtype in (None, dtype):
            case = make_case(
                routing("dropped", 24, 3, 5),
                5,
                _keeping(form, dtype),
                gate_up,
                biases=BIASES,
                dtype=dtype,
                weight_dtype=weight_dtype,
                sizes=(16, 24, 8),
                out_dtype=out_dtype,
            )
            case.compare(*BOUNDS[dtype])
            assert case.run().dtype == (out_dtype or torch.promote_types(dtype, weight_dtype or dtype))


@pytest.mark.parametrize("wide", [("b_in",), ("b_up",), ("b_out",), BIASES])
def test_biases_wider_than_the_gemms(wide: tuple[str, ...], walk: str, poisoned: None):
    torch.manual_seed(0)
    form = replace(SWIGLU, activation="cast(mul(silu(gate), up), bfloat16)")
    case = make_case(routing("dropped", 24, 3, 5), 5, form, "separate", biases=wide, dtype=torch.bfloat16)
    for name in wide:
        case.tensors[name] = torch.randn_like(case.given[name], dtype=torch.float32).requires_grad_()
    case.compare(*BOUNDS[torch.bfloat16])
    assert case.run().dtype == (torch.float32 if "b_out" in wide else torch.bfloat16)


@pytest.mark.parametrize("walk", ["device"], indirect=True)
def test_bfloat16_through_torchs_grouped_gemm(walk: str, poisoned: None, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    monkeypatch.setattr(grouped, "takes_grouped_mm", lambda left, right: True)
    for blocked in ("blocked_mm", "blocked_outer"):
        monkeypatch.setattr(grouped, blocked, None)
    for gate_up, *transposed in itertools.product(GATED, (False, True), (False, True)):
        ids = routing("dropped", 24, 3, 5)
        case = make_case(
            ids, 5, SWIGLU, gate_up, (transposed[0], transposed[1]), BIASES, torch.bfloat16, sizes=(16, 24, 8)
        )
        case.compare(*BOUNDS[torch.bfloat16])


def _keeping(form: Form, dtype: torch.dtype) -> Form:
    """The form with casts to the GEMMs' dtype, as a model with float32 weights writes it."""
    name = str(dtype).removeprefix("torch.")
    return replace(form, input=f"cast({form.input}, {name})", activation=f"cast({form.activation}, {name})")


def test_low_precision_rounds_where_the_model_does():
    """In bfloat16 the operator rounds where the model's own lines do; only the order of sums differs."""
    torch.manual_seed(0)
    case = make_case(routing("random", 32, 2, 4), 4, GPT_OSS, "interleaved", biases=BIASES, dtype=torch.bfloat16)
    x, weights, w_in, w_out, b_in, b_out = (tensor for tensor in case.given.values())
    rows = []
    for token, experts in enumerate(case.ids.tolist()):
        parts = []
        for k, expert in enumerate(experts):
            hidden = torch.mm(x[token : token + 1], w_in[expert].t()) + b_in[expert]
            gate, up = hidden[:, ::2].clamp(max=1.5), hidden[:, 1::2].clamp(-1.5, 1.5)
            out = torch.mm((up + 1) * (gate * torch.sigmoid(gate * 1.702)), w_out[expert].t()) + b_out[expert]
            parts.append(out * weights[token, k])
        rows.append(torch.cat(parts).sum(0))
    expected = torch.stack(rows)
    assert_near("result", case.run(), expected, 2**-8)
    cotangent = torch.randn_like(expected)
    found = torch.autograd.grad(case.run(), list(case.given.values()), cotangent)
    wanted = torch.autograd.grad(expected, list(case.given.values()), cotangent)
    for name, grad, dense in zip(case.given, found, wanted, strict=True):
        assert_near(name, grad, dense, 2**-5)  # the model's own sums over tokens run in bfloat16


@pytest.mark.parametrize("form", ["swiglu", "weight_before", "weight_within", "weight_everywhere"])
@pytest.mark.parametrize("gate_up", ["halves", "separate"])
def test_only_what_needs_a_gradient_is_computed(form: str, gate_up: str, walk: str, poisoned: None):
    torch.manual_seed(0)
    case = make_case(routing("dropped", 8, 2, 3), 3, FORMS[form], gate_up, biases=BIASES)
    out = case.run()
    cotangent = torch.randn_like(out)
    every = dict(zip(case.given, torch.autograd.grad(out, list(case.given.values()), cotangent), strict=True))
    _, hidden = torch.ops.moecompile.experts_forward(*case.arguments(), **case.attributes)
    for size in (1, 2, len(every) - 1):
        for names in itertools.combinations(every, size):
            needs = [name in names for name in INPUTS]
            with torch.no_grad():
                found = torch.ops.moecompile.experts_backward(
                    cotangent, hidden, *case.arguments(), **case.attributes, needs=needs
                )
            assert len(found) == size
            for name, grad in zip((name for name in INPUTS if name in names), found, strict=True):
                torch.testing.assert_close(grad, every[name], rtol=1e-12, atol=1e-12)


def test_an_overflow_stays_with_its_expert(walk: str):
    """Infinities of one expert's rows reach no other expert's gradient, as in a loop over the experts."""
    torch.manual_seed(0)
    case = make_case(torch.tensor([[0], [1], [1], [2]]), 4, FORMS["one_sided"], biases=BIASES)
    cotangent = torch.zeros(4, 7, dtype=torch.float64)
    cotangent[0], cotangent[1:] = torch.inf, 1.0
    grads = dict(zip(case.given, torch.autograd.grad(case.run(), list(case.given.values()), cotangent), strict=True))
    for name in ("w_in", "w_out", "b_in", "b_out"):
        assert not grads[name][0].isfinite().all() and grads[name][1:].isfinite().all(), name
    assert grads["x"][1:].isfinite().all() and grads["weights"][1:].isfinite().all()


def test_weights_that_no_expression_reads_have_a_gradient_of_zero(walk: str, poisoned: None):
    torch.manual_seed(0)
    case = make_case(routing("dropped", 6, 2, 3), 3, replace(FORMS["unweighted"], weighted=True))
    (grad,) = torch.autograd.grad(case.run().sum(), case.given["weights"])
    assert torch.equal(grad, torch.zeros(6, 2, dtype=torch.float64))


def test_frozen_experts_cost_no_weight_gradients(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    case = make_case(routing("random", 8, 2, 3), 3)
    for name in ("w_in", "w_out"):
        case.given[name].requires_grad_(False)
    monkeypatch.setattr(grouped.Rows, "weight_gradient", None)
    case.run().sum().backward()
    assert case.given["x"].grad is not None and case.given["w_in"].grad is None


def test_gradients_keep_the_parameters_layout():
    torch.manual_seed(0)
    case = make_case(routing("random", 8, 2, 3), 3, transposed=(True, False))
    storage = case.given["w_in"].detach().transpose(1, 2).contiguous()
    case.tensors["w_in"] = view = storage.transpose(1, 2).requires_grad_()
    case.compare(1e-12, 1e-12)
    (grad,) = torch.autograd.grad(case.run().sum(), view)
    assert grad.stride() == view.stride()


def test_expanded_gradients_and_strided_inputs():
    torch.manual_seed(0)
    case = make_case(routing("random", 8, 2, 3), 3)
    case.tensors["x"] = torch.randn(6, 16, dtype=torch.float64)[:, ::2].t().requires_grad_()
    case.tensors["weights"] = torch.rand(2, 8, dtype=torch.float64).t().requires_grad_()
    case.compare(1e-12, 1e-12)
    (grad,) = torch.autograd.grad(case.run().sum(), case.given["x"])  # sum's gradient is expanded from one element
    ones = torch.ones(8, 7, dtype=torch.float64)
    assert torch.equal(grad, torch.autograd.grad(case.run(), case.given["x"], ones)[0])


def test_repeated_runs_are_bitwise_equal(walk: str):
    torch.manual_seed(0)
    case = make_case(routing("skewed", 64, 4, 6), 6, biases=BIASES, dtype=torch.float32)
    runs = [(case.run(), *torch.autograd.grad(case.run().sum(), list(case.given.values()))) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_saved_rows_are_the_preactivations_in_expert_order():
    torch.manual_seed(0)
    case = make_case(routing("dropped", 9, 2, 4), 4, gate_up="separate", biases=("b_in",))
    with torch.no_grad():
        _, hidden = torch.ops.moecompile.experts_forward(*case.arguments(), **case.attributes)
        x, w_in, w_up, b_in = (case.given[name] for name in ("x", "w_in", "w_up", "b_in"))
        experts = case.ids.flatten()
        expected = []
        for assignment in sorted((a for a in range(18) if experts[a] >= 0), key=lambda a: int(experts[a])):
            row, expert = x[assignment // 2], experts[assignment]
            expected.append(torch.cat((w_in[expert] @ row + b_in[expert], w_up[expert] @ row)))
    torch.testing.assert_close(hidden[: len(expected)], torch.stack(expected))
    assert not hidden[len(expected) :].any() and len(expected) < 18


@pytest.mark.parametrize("gate_up", [*GATED, "single"])
def test_rows_that_are_computed_again_are_those_that_would_be_saved(gate_up: str, walk: str, poisoned: None) -> None:
    torch.manual_seed(0)
    form = RELU_SQUARED if gate_up == "single" else FORMS["weight_everywhere"]
    case = make_case(routing("dropped", 24, 3, 5), 5, form, gate_up, biases=BIASES, sizes=(16, 24, 8))
    again = copy(case)
    again.attributes = case.attributes | {"recompute": True}
    with torch.no_grad():
        _, hidden = torch.ops.moecompile.experts_forward(*again.arguments(), **again.attributes)
    assert hidden.shape[0] == 0 and hidden.shape[1] > 0
    results = [each.run() for each in (case, again)]
    assert torch.equal(*results)
    cotangent, given = torch.randn_like(results[0]), list(case.given.values())
    for saved, computed in zip(*(torch.autograd.grad(result, given, cotangent) for result in results), strict=True):
        assert torch.equal(saved, computed)


def test_rows_are_saved_or_computed_again() -> None:
    case = make_case(routing("random", 9, 2, 4), 4, SWIGLU)
    given, operators = case.attributes | {"recompute": True, "needs": [True] * 4 + [False] * 4}, torch.ops.moecompile
    with torch.no_grad():
        result, hidden = operators.experts_forward(*case.arguments(), **case.attributes)
        with pytest.raises(ValueError, match=r"hidden must have shape \(no rows, features\) with recompute = \(0, "):
            operators.experts_backward(result, hidden, *case.arguments(), **given)
        with pytest.raises(ValueError, match=r"hidden must have shape \(tokens \* experts per token, .*\) = \(18, "):
            operators.experts_backward(result, hidden[:0], *case.arguments(), **given | {"recompute": False})


def test_kernels_are_named_right() -> None:
    made = make_case(routing("random", 9, 2, 4), 4, SWIGLU)
    given = made.attributes | {"kernels": "auto"}
    with pytest.raises(ValueError, match="kernels must be one of None, 'reference'; got 'auto'"):
        torch.ops.moecompile.experts(*made.arguments(), **given)
