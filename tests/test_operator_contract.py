"""`moecompile::plan`, and what the operators refuse: wrong ids, shapes, dtypes and transforms, named in the message."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from dense_experts import ROUTINGS, UNWEIGHTED, make_case, routing

ops = torch.ops.moecompile


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize(("tokens", "top_k", "num_experts"), [(0, 2, 3), (1, 1, 1), (7, 3, 4), (50, 8, 16)])
def test_plan_sorts_assignments_by_expert(kind: str, tokens: int, top_k: int, num_experts: int):
    ids = routing(kind, tokens, top_k, num_experts)
    counts, offsets, slots, order = ops.plan(ids, num_experts)
    flat = ids.flatten().tolist()
    expected = [a for expert in range(num_experts) for a in range(tokens * top_k) if flat[a] == expert]
    assert order.tolist() == expected + [-1] * (tokens * top_k - len(expected))
    assert counts.tolist() == [flat.count(expert) for expert in range(num_experts)]
    assert offsets.tolist() == [sum(flat.count(e) for e in range(expert + 1)) for expert in range(num_experts)]
    assert slots.flatten().tolist() == [expected.index(a) if flat[a] >= 0 else -1 for a in range(tokens * top_k)]
    assert slots.shape == ids.shape
    assert {tensor.dtype for tensor in (counts, offsets, slots, order)} == {torch.int32}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_plan_takes_any_integer(dtype: torch.dtype):
    ids = routing("random", 6, 2, 4)
    for found, expected in zip(ops.plan(ids.to(dtype), 4), ops.plan(ids, 4), strict=True):
        assert torch.equal(found, expected)
    strided = ids.t().contiguous().t()
    assert torch.equal(ops.plan(strided, 4)[3], ops.plan(ids, 4)[3])


@pytest.mark.parametrize("wrong", [-2, 4, 99, -(2**40)])
def test_plan_names_an_id_out_of_range(wrong: int):
    ids = routing("random", 6, 2, 4)
    ids[3, 1] = wrong
    with pytest.raises(IndexError, match=rf"expert id {wrong} is outside \[0, 4\), num_experts=4.*-1"):
        ops.plan(ids, 4)


@pytest.mark.parametrize(
    ("ids", "num_experts", "kind", "complaint"),
    [
        (torch.zeros(4, 2), 4, TypeError, "expert_ids must hold integers, got dtype torch.float32"),
        (torch.zeros(4, dtype=torch.int64), 4, ValueError, r"expert_ids must have shape .* got \(4,\)"),
        (torch.zeros(4, 2, dtype=torch.int64), 0, ValueError, "num_experts must be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("fake", [False, True])
def test_plan_refuses(ids: torch.Tensor, num_experts: int, kind: type[Exception], complaint: str, fake: bool):
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
        with pytest.raises(kind, match=f"moecompile::plan: {complaint}"):
            ops.plan(ids, num_experts)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "x shape": ({"x": torch.ones(8, 6, 1)}, r"x must have shape \(tokens, features\), got \(8, 6, 1\)"),
    "w_in shape": ({"w_in": torch.ones(3, 6, 20)}, r"w_in must have shape .*'halves' = \(3, 20, 6\), got \(3, 6, 20\)"),
    "w_in odd": ({"w_in": torch.ones(3, 10, 6)}, r"= \(3, 20, 6\), got \(3, 10, 6\)"),
    "w_out experts": ({"w_out": torch.ones(4, 7, 10)}, r"w_out must have shape .* = \(3, 7, 10\), got \(4, 7, 10\)"),
    "weights": ({"weights": torch.ones(8, 3)}, r"weights must have shape .* = \(8, 2\), got \(8, 3\)"),
    "slots": ({"slots": torch.ones(4, 4, dtype=torch.int32)}, r"slots must have shape .* = \(8, 4\), got \(4, 4\)"),
    "order": ({"order": torch.ones(15, dtype=torch.int32)}, r"order must have shape .* = \(16,\), got \(15,\)"),
    "offsets": ({"offsets": torch.ones(4, dtype=torch.int32)}, r"offsets must have shape .* = \(3,\), got \(4,\)"),
    "b_in": ({"b_in": torch.ones(3, 10)}, r"b_in must have shape .* = \(3, 20\), got \(3, 10\)"),
    "b_out": ({"b_out": torch.ones(7)}, r"b_out must have shape .* = \(3, 7\), got \(7,\)"),
    "b_up": ({"b_up": torch.ones(3, 10)}, r"b_up goes with w_up alone, got shape \(3, 10\); use b_in"),
    "w_up": ({"w_up": torch.ones(3, 10, 6)}, r"w_up goes with gate_up='separate' alone; got shape \(3, 10, 6\)"),
    "no w_up": ({"gate_up": "separate"}, "w_up goes with gate_up='separate' alone; got None"),
    "gate_up": ({"gate_up": "halved"}, "gate_up must be one of halves, interleaved, separate, single; got 'halved'"),
    "leaf": ({"activation": "silu(hidden)"}, "activation must read gate or up.*reads hidden"),
    "no leaf": ({"output": "weight"}, "output must read out.*reads weight"),
    "no weights": ({"weights": None}, "output 'mul\\(out, weight\\)' reads weight but weights is None.*output='out'"),
    "text": ({"activation": "swish(gate)"}, "unknown operation 'swish'"),
    "x dtype": ({"x": torch.ones(8, 6).bfloat16()}, "input 'x' of torch.bfloat16 by w_in of torch.float32; write the"),
    "w_out dtype": ({"w_out": torch.ones(3, 7, 10).half()}, "of torch.float32 by w_out of torch.float16; write the"),
    "integers": ({"weights": torch.ones(8, 2, dtype=torch.int64)}, "weights must have a floating-point dtype, got"),
    "offsets dtype": ({"offsets": torch.ones(3)}, "offsets must be int32 as `plan` gives it, got torch.float32"),
}
POSITIONS = ("x", "weights", "offsets", "slots", "order", "w_in", "w_out", "w_up", "b_in", "b_up", "b_out")


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("fake", [False, True])
def test_experts_names_what_is_wrong(name: str, fake: bool):
    changes, complaint = WRONG[name]
    case = make_case(routing("random", 8, 2, 3), 3, dtype=torch.float32)
    arguments = dict(zip(POSITIONS, case.arguments(), strict=True)) | case.attributes | changes
    kind = TypeError if "dtype" in complaint or "write the" in complaint or "int32" in complaint else ValueError
    positional = [arguments.pop(position) for position in POSITIONS]
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
        for operator in (ops.experts, ops.experts_forward):
            with pytest.raises(kind, match=complaint) as raised:
                operator(*positional, **arguments)
            assert name == "text" or "moecompile::experts: " in str(raised.value)


def test_backward_names_what_is_wrong():
    case = make_case(routing("random", 8, 2, 3), 3, UNWEIGHTED)
    with torch.no_grad():
        out, hidden = ops.experts_forward(*case.arguments(), **case.attributes)

    def backward(grad: torch.Tensor, hidden: torch.Tensor, needs: list[bool]) -> Any:
        with torch.no_grad():
            return ops.experts_backward(grad, hidden, *case.arguments(), **case.attributes, needs=needs)

    assert backward(out, hidden, [False] * 8) == []
    with pytest.raises(ValueError, match=r"one bool for each of \(x, weights, .*got 3"):
        backward(out, hidden, [True] * 3)
    with pytest.raises(ValueError, match="gradient of weights, which is None"):
        backward(out, hidden, [True] * 8)
    with pytest.raises(ValueError, match=r"grad must have shape .*\(8, 7\), got \(4, 7\)"):
        backward(out[:4], hidden, [True] + [False] * 7)
    with pytest.raises(ValueError, match=r"hidden must have shape .*\(16, 20\), got \(16, 10\)"):
        backward(out, hidden[:, :10], [True] + [False] * 7)
    with pytest.raises(TypeError, match=r"hidden must be .*, as experts_forward gave it, got torch\.float16"):
        backward(out, hidden.half(), [True] + [False] * 7)
    with pytest.raises(TypeError, match=r"grad must be floating-point, got torch\.int64; cast it first"):
        backward(out.long(), hidden, [True] + [False] * 7)


def test_second_derivatives_are_refused_when_they_are_taken():
    case = make_case(routing("random", 8, 2, 3), 3)
    (grad,) = torch.autograd.grad(case.run().sum(), case.given["x"], create_graph=True)
    plain = torch.autograd.grad(case.run().sum(), case.given["x"])[0]
    assert torch.equal(grad, plain)
    words = "moecompile::experts has no second derivative; run the model without"
    with pytest.raises(RuntimeError, match=words):
        grad.sum().backward(retain_graph=True)
    for leaf in (case.given["x"], case.given["w_in"]):  # also where only the way to a single leaf is gone
        with pytest.raises(RuntimeError, match=words):
            torch.autograd.grad(grad.square().sum(), leaf, retain_graph=True)
        with pytest.raises(RuntimeError, match=words):
            grad.sum().backward(inputs=[leaf], retain_graph=True)


def test_no_experts_are_refused():
    _, offsets, slots, order = torch.ops.moecompile.plan(torch.full((8, 2), -1), 3)
    given = (torch.randn(8, 4), torch.rand(8, 2), offsets[:0], slots, order, torch.empty(0, 4, 4), torch.empty(0, 4, 4))
    with pytest.raises(ValueError, match="w_in must hold the matrices of an expert at least"):
        torch.ops.moecompile.experts(*given, activation="relu(hidden)", gate_up="single")


def test_tensors_of_two_devices_are_refused():
    case = make_case(routing("random", 8, 2, 3), 3)
    case.tensors["w_out"] = case.given["w_out"].to("meta")
    with pytest.raises(ValueError, match="w_out must be on w_in's device, cpu, got meta; move it"):
        case.run()


def test_transforms_are_refused():
    case = make_case(routing("random", 8, 2, 3), 3)
    x = case.given["x"].detach()

    def run(x: torch.Tensor) -> torch.Tensor:
        case.tensors["x"] = x
        return case.run()

    transforms: dict[str, Any] = {
        "grad": lambda: torch.func.grad(lambda x: run(x).sum())(x),
        "jacrev": lambda: torch.func.jacrev(run)(x),
        "jvp": lambda: torch.func.jvp(run, (x,), (x,)),
        "vmap": lambda: torch.func.vmap(run)(torch.stack((x, x))),
    }
    for name, transform in transforms.items():
        with pytest.raises(NotImplementedError, match=r"do(es)? not work under torch.(func|vmap)"):
            transform()
            pytest.fail(name)
    for frozen in (False, True):
        if frozen:
            for tensor in case.given.values():
                tensor.requires_grad_(False)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            run(forward_ad.make_dual(x, x))


def test_importing_the_operators_imports_nothing_else():
    code = (
        "import sys, torch; before = set(sys.modules); import moecompile.runtime.operators;"
        "assert torch.ops.moecompile.experts.default; print(*(set(sys.modules) - before))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ran.stdout.split()) <= {"moecompile", "moecompile.runtime", "moecompile.runtime.operators"}
