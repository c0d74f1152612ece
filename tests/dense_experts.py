"""Experts computed the slow and obvious way, in float64 and token by token: what tests/test_operators*.py compare with.

Written apart from the package: activations are Python functions here and expressions there, the weights' layouts are
undone into plain matrices, and gradients are autograd's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moecompile.runtime.operators  # noqa: F401  registers torch.ops.moecompile

INPUTS = ("x", "weights", "w_in", "w_out", "w_up", "b_in", "b_up", "b_out")
GATED = ("halves", "interleaved", "separate")


@dataclass(frozen=True)
class Form:
    """Input, activation and output, each as the expression's text and as a function in float64."""

    activation: str
    activate: Callable[[Tensor, Tensor, Tensor], Tensor]
    input: str = "x"
    feed: Callable[[Tensor, Tensor], Tensor] = lambda x, weight: x
    output: str = "mul(out, weight)"
    finish: Callable[[Tensor, Tensor], Tensor] = lambda out, weight: out * weight
    weighted: bool = True


def _gpt_oss(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    gate = gate.clamp(max=1.5)
    return (up.clamp(-1.5, 1.5) + 1) * (gate * torch.sigmoid(gate * 1.702))


SWIGLU = Form("mul(silu(gate), up)", lambda gate, up, weight: F.silu(gate) * up)
GEGLU = Form("mul(gelu(gate, tanh), up)", lambda gate, up, weight: F.gelu(gate, approximate="tanh") * up)
GPT_OSS = Form(
    "mul(add(clamp(up, -1.5, 1.5), 1), mul(clamp(gate, None, 1.5), sigmoid(mul(clamp(gate, None, 1.5), 1.702))))",
    _gpt_oss,
)
UNWEIGHTED = replace(SWIGLU, output="out", finish=lambda out, weight: out, weighted=False)
WEIGHT_BEFORE = replace(
    SWIGLU, input="mul(x, weight)", feed=lambda x, weight: x * weight, output="out", finish=lambda out, weight: out
)
WEIGHT_WITHIN = replace(
    WEIGHT_BEFORE,
    activation="mul(mul(silu(gate), up), weight)",
    activate=lambda gate, up, weight: F.silu(gate) * up * weight,
    input="x",
    feed=lambda x, weight: x,
)
WEIGHT_EVERYWHERE = Form(
    "mul(silu(gate), add(up, weight))",
    lambda gate, up, weight: F.silu(gate) * (up + weight),
    "sub(x, mul(0.5, weight))",
    lambda x, weight: x - 0.5 * weight,
    "mul(tanh(out), weight)",
    lambda out, weight: out.tanh() * weight,
)
ONE_SIDED = Form("silu(gate)", lambda gate, up, weight: F.silu(gate))
FORMS = {
    "swiglu": SWIGLU,
    "geglu": GEGLU,
    "gpt_oss": GPT_OSS,
    "unweighted": UNWEIGHTED,
    "weight_before": WEIGHT_BEFORE,
    "weight_within": WEIGHT_WITHIN,
    "weight_everywhere": WEIGHT_EVERYWHERE,
    "one_sided": ONE_SIDED,
}
RELU_SQUARED = Form("square(relu(hidden))", lambda hidden, up, weight: hidden.relu() ** 2)


@dataclass
class Case:
    """Arguments of one call; the tensors are leaves that require grad."""

    form: Form
    ids: Tensor
    tensors: dict[str, Tensor | None]
    gate_up: str
    transposed: tuple[bool, bool] = (False, False)
    out_dtype: torch.dtype | None = None
    attributes: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.attributes = {
            "activation": self.form.activation,
            "gate_up": self.gate_up,
            "input": self.form.input,
            "output": self.form.output,
            "w_in_transposed": self.transposed[0],
            "w_out_transposed": self.transposed[1],
            "out_dtype": self.out_dtype,
        }

    @property
    def given(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if tensor is not None}

    def arguments(self) -> tuple[Tensor | None, ...]:
        """Positional arguments of `experts`, with a plan of the case's own."""
        w_in = self.tensors["w_in"]
        assert w_in is not None
        _, *layout = torch.ops.moecompile.plan(self.ids, w_in.shape[0])
        before, after = INPUTS[:2], INPUTS[2:]
        return (*(self.tensors[name] for name in before), *layout, *(self.tensors[name] for name in after))

    def run(self) -> Tensor:
        return torch.ops.moecompile.experts(*self.arguments(), **self.attributes)

    def dense(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The result in float64 and the float64 leaves it was computed from."""
        leaves = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in self.given.items()}
        return dense_experts(self, leaves), leaves

    def compare(self, result: float, gradient: float) -> None:
        """Checks the operator's result and all its gradients against the dense ones, relative to the largest value."""
        expected, leaves = self.dense()
        found = self.run()
        assert_near("result", found, expected, result)
        if found.grad_fn is None:
            return
        torch.manual_seed(1)
        cotangent = torch.randn(expected.shape).to(found.dtype)
        grads = torch.autograd.grad(found, list(self.given.values()), cotangent.to(found.device))
        wanted = torch.autograd.grad(
            expected, list(leaves.values()), cotangent.double(), allow_unused=True, materialize_grads=True
        )
        for (name, tensor), grad, dense in zip(self.given.items(), grads, wanted, strict=True):
            assert grad.dtype == tensor.dtype
            assert grad.is_contiguous() or not tensor.is_contiguous()
            assert_near(f"gradient of {name}", grad, dense, gradient)


def make_case(
    ids: Tensor,
    num_experts: int,
    form: Form = SWIGLU,
    gate_up: str = "halves",
    transposed: tuple[bool, bool] = (False, False),
    biases: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float64,
    weight_dtype: torch.dtype | None = None,
    sizes: tuple[int, int, int] = (6, 10, 7),
    out_dtype: torch.dtype | None = None,
) -> Case:
    """A case with random tensors on the device of the ids; sizes are features in, inner size, features out."""
    features, inner, out = sizes
    first = 2 * inner if gate_up in ("halves", "interleaved") else inner
    shapes = {
        "x": (ids.shape[0], features),
        "weights": tuple(ids.shape) if form.weighted else None,
        "w_in": (num_experts, features, first) if transposed[0] else (num_experts, first, features),
        "w_out": (num_experts, inner, out) if transposed[1] else (num_experts, out, inner),
        "w_up": None,
        "b_in": (num_experts, first) if "b_in" in biases else None,
        "b_up": (num_experts, inner) if "b_up" in biases and gate_up == "separate" else None,
        "b_out": (num_experts, out) if "b_out" in biases else None,
    }
    if gate_up == "separate":
        shapes["w_up"] = shapes["w_in"]
    tensors: dict[str, Tensor | None] = dict.fromkeys(INPUTS)
    for name, shape in shapes.items():
        if shape is not None:
            values = torch.rand(shape) if name == "weights" else torch.randn(shape)
            scale = {"w_in": features, "w_up": features, "w_out": inner}.get(name, 1) ** -0.5
            kind = weight_dtype or dtype if name == "weights" else dtype
            tensors[name] = (values * scale).to(ids.device, kind).requires_grad_()
    return Case(form, ids, tensors, gate_up, transposed, out_dtype)


def dense_experts(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    """The result of a case, token by token."""
    tokens, top_k = case.ids.shape
    w_in, w_out = leaves["w_in"], leaves["w_out"]
    w_in = w_in if case.transposed[0] else w_in.transpose(1, 2)
    w_out = w_out if case.transposed[1] else w_out.transpose(1, 2)
    rows = []
    for token in range(tokens):
        total = leaves["x"].new_zeros(w_out.shape[2]) + 0 * sum(leaf.sum() for leaf in leaves.values())
        for k in range(top_k):
            expert = int(case.ids[token, k])
            if expert >= 0:
                weight = leaves["weights"][token, k] if "weights" in leaves else torch.ones(())
                row = case.form.feed(leaves["x"][token], weight)
                gate, up = _gate_and_up(case, leaves, w_in, row, expert)
                out = case.form.activate(gate, up, weight) @ w_out[expert]
                if "b_out" in leaves:
                    out = out + leaves["b_out"][expert]
                total = total + case.form.finish(out, weight)
        rows.append(total)
    return torch.stack(rows) if rows else leaves["x"].new_zeros(0, w_out.shape[2]) + 0 * leaves["x"].sum()


def _gate_and_up(
    case: Case, leaves: dict[str, Tensor], w_in: Tensor, row: Tensor, expert: int
) -> tuple[Tensor, Tensor]:
    hidden = row @ w_in[expert]
    if "b_in" in leaves:
        hidden = hidden + leaves["b_in"][expert]
    if case.gate_up == "halves":
        gate, up = hidden.split(hidden.shape[0] // 2)
        return gate, up
    if case.gate_up == "interleaved":
        gate, up = hidden.view(-1, 2).unbind(1)
        return gate, up
    if case.gate_up == "single":
        return hidden, hidden
    w_up = leaves["w_up"] if case.transposed[0] else leaves["w_up"].transpose(1, 2)
    up = row @ w_up[expert]
    return hidden, up + leaves["b_up"][expert] if "b_up" in leaves else up


def assert_near(name: str, found: Tensor, expected: Tensor, bound: float) -> None:
    """Relative to the largest expected value, as the project's bounds are."""
    assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if found.numel() == 0:
        return
    scale = max(float(expected.detach().abs().max()), 1e-6)
    error = float((found.detach().cpu().double() - expected.detach().cpu()).abs().max()) / scale
    assert error <= bound, f"{name}: relative error {error:.2e}, bound {bound:.0e}"


def routing(kind: str, tokens: int, top_k: int, num_experts: int, seed: int = 0) -> Tensor:
    """Expert ids (tokens, top_k) of a named kind of routing."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, num_experts, generator=generator)
    ids = scores.argsort(1)[:, :top_k].contiguous()
    if kind == "one_expert":
        ids = torch.full_like(ids, num_experts - 1)
    elif kind == "some_empty":
        ids = torch.div(ids, 2, rounding_mode="floor") * 2
    elif kind == "dropped":
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -1)
    elif kind == "all_dropped":
        ids = torch.full_like(ids, -1)
    elif kind == "skewed":
        ids = (torch.rand(ids.shape, generator=generator) ** 4 * num_experts).long()
    else:
        assert kind == "random", kind
    return ids


ROUTINGS = ("random", "one_expert", "some_empty", "dropped", "all_dropped", "skewed")
