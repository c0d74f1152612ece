"""The zoo itself: every module runs, is one graph, and every refusal differs from its control."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zoo_capture import Captured, captured_case
from zoo_case import Case, Refusal, arguments, make
from zoo_forms import CASES, case
from zoo_refusals import REFUSALS

FORMS = (
    "grouped_mm",
    "batched_mm",
    "dense",
    "torchtitan",
    "capacity",
    "gather_einsum",
    "expert_loop",
    "padded_bins",
)

Observation = dict[str, Tensor | None]


def observe(module: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> Observation:
    """What a caller can see of one call: outputs, gradients, and everything the call may have written."""
    inputs = tuple(value.clone().requires_grad_(backward) for value in inputs)
    torch.manual_seed(2)
    with torch.set_grad_enabled(backward):
        outputs: list[Any] = [leaf for leaf in pytree.tree_leaves(module(*inputs)) if isinstance(leaf, Tensor)]
    torch.manual_seed(3)
    differentiable = [value for value in outputs if value.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, [torch.randn(v.shape).to(v.dtype) for v in differentiable])
    seen: Observation = {f"output {n}": value.detach() for n, value in enumerate(outputs)}
    for name, value in [*((f"input {n}", v) for n, v in enumerate(inputs)), *module.named_parameters()]:
        seen[name] = value.detach()
        seen[f"gradient of {name}"] = value.grad
    seen.update(module.named_buffers())
    return seen


def distance(first: Observation, second: Observation) -> float:
    """The largest difference of any tensor, relative to that tensor's largest entry; infinite where the sets differ."""
    if first.keys() != second.keys():
        return float("inf")
    worst = 0.0
    for name, a in first.items():
        b = second[name]
        if a is None or b is None:
            if a is not b:
                return float("inf")
        elif a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        elif a.numel():
            gap = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-9)
            worst = max(worst, gap.item())
    return worst


def assert_same_outputs(graph: Captured, seen: Observation) -> None:
    for number, value in enumerate(graph.outputs):
        eager = seen[f"output {number}"]
        assert eager is not None and torch.equal(value, eager), f"graph and eager differ in output {number}"


DEFINED = [refusal for refusal in REFUSALS if not refusal.undefined]


def by_name(item: Any) -> str:
    return str(item.name)


def test_names_are_unique() -> None:
    counts = Counter([item.name for item in CASES] + [item.name for item in REFUSALS])
    repeated = [name for name, count in counts.items() if count > 1]
    assert not repeated, f"names used twice: {repeated}"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_two_spellings_and_a_control(form: str) -> None:
    names = [item.name for item in CASES if item.form == form]
    assert len([name for name in names if not name.endswith("_control")]) >= 2, f"{form} is spelled only as {names}"
    assert any(name.endswith("_control") for name in names), f"{form} has no control for its refusals"
    assert any(case(refusal.control).form == form for refusal in REFUSALS), f"{form} has no refusal"


@pytest.mark.parametrize("item", CASES, ids=by_name)
def test_case_runs_and_is_one_graph(item: Case) -> None:
    assert item.form in FORMS
    seen = observe(make(item), arguments(item), backward=True)
    for name, value in seen.items():
        assert value is not None, f"no {name}"
        assert value.isfinite().all(), f"{name} is not finite"
    graph = captured_case(item)
    assert 0.05 < graph.outputs[0].float().std() < 20.0, "outputs should be of order one"
    assert_same_outputs(graph, seen)
    missing = [node for node in graph.gm.graph.nodes if node.op == "placeholder" and "example_value" not in node.meta]
    assert not missing, f"no example values on {missing}"


@pytest.mark.parametrize("item", DEFINED, ids=by_name)
def test_refusal_runs_and_differs_from_its_control(item: Refusal) -> None:
    seen = observe(make(item), arguments(item), item.backward)
    control = observe(make(case(item.control)), arguments(item), item.backward)
    gap = distance(seen, control)
    assert (gap < 1e-3) == item.same_numbers, f"differs from {item.control} by {gap:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("item", REFUSALS, ids=by_name)
def test_refusal_is_one_graph(item: Refusal) -> None:
    graph = captured_case(item)
    if not item.undefined:
        assert_same_outputs(graph, observe(make(item), arguments(item), item.backward))
