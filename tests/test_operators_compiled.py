"""The operators under torch.library.opcheck, torch.compile, checkpointing, inference mode and autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.utils.checkpoint import checkpoint

from dense_experts import FORMS, GPT_OSS, RELU_SQUARED, SWIGLU, UNWEIGHTED, Case, make_case, routing

BIASES = ("b_in", "b_up", "b_out")
SAMPLES: dict[str, Callable[[], Case]] = {
    "halves": lambda: make_case(routing("random", 6, 2, 3), 3, dtype=torch.float32),
    "interleaved": lambda: make_case(
        routing("dropped", 6, 2, 3), 3, GPT_OSS, "interleaved", (True, True), BIASES, torch.float32
    ),
    "separate": lambda: make_case(
        routing("skewed", 6, 2, 3), 3, SWIGLU, "separate", biases=BIASES, dtype=torch.bfloat16
    ),
    "single": lambda: make_case(routing("random", 6, 1, 3), 3, RELU_SQUARED, "single", (False, True), ("b_out",)),
    "unweighted": lambda: make_case(routing("random", 6, 2, 3), 3, UNWEIGHTED, dtype=torch.float32),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample: str):
    torch.manual_seed(0)
    case, ops = SAMPLES[sample](), torch.ops.moecompile
    arguments = case.arguments()
    torch.library.opcheck(ops.experts, arguments, case.attributes)
    torch.library.opcheck(ops.experts_forward, arguments, case.attributes)
    with torch.no_grad():
        out, hidden = ops.experts_forward(*arguments, **case.attributes)
    needs = [case.tensors[name] is not None for name in case.tensors]
    backward = (torch.randn_like(out), hidden, *arguments)
    attributes = {**case.attributes, "needs": needs}
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.experts_backward, backward, attributes, test_utils=checks)
    plain = tuple(each if each is None else each.detach() for each in backward)  # no derivative to compare
    torch.library.opcheck(ops.experts_backward, plain, attributes)


def test_opcheck_of_plan_and_inference():
    torch.manual_seed(0)
    case = SAMPLES["halves"]()
    torch.library.opcheck(torch.ops.moecompile.plan, (case.ids, 3))
    for tensor in case.given.values():
        tensor.requires_grad_(False)
    torch.library.opcheck(torch.ops.moecompile.experts, case.arguments(), case.attributes)


def rerouted(case: Case, tokens: int, seed: int) -> Case:
    """The same weights, other tokens."""
    fresh = make_case(routing("dropped", tokens, 2, 3, seed), 3, case.form, case.gate_up, dtype=torch.float32)
    tensors = case.tensors | {"x": fresh.tensors["x"], "weights": fresh.tensors["weights"]}
    return Case(case.form, fresh.ids, tensors, case.gate_up, case.transposed)


def block(case: Case) -> torch.Tensor:
    """Something on either side of the operator, as in a model."""
    inner = Case(case.form, case.ids, case.tensors | {"x": case.given["x"] * 2}, case.gate_up, case.transposed)
    return inner.run().tanh()


def gradients(run: Callable[[Case], torch.Tensor], case: Case) -> list[torch.Tensor]:
    out = run(case)
    return [out, *torch.autograd.grad(out.square().sum(), list(case.given.values()))]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_for_any_number_of_tokens(backend: str):
    torch.manual_seed(0)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, backend=counter, dynamic=True, fullgraph=True)
    case = make_case(routing("random", 5, 2, 3), 3, dtype=torch.float32)
    for seed, tokens in enumerate((5, 9, 16)):
        fresh = rerouted(case, tokens, seed)
        assert_same(gradients(compiled, fresh), gradients(block, fresh))
    assert counter.frame_count == 1
    with torch.no_grad():
        fresh = rerouted(case, 7, 7)
        assert_same([compiled(fresh)], [block(fresh)])
    with torch.inference_mode():
        assert_same([compiled(fresh)], [block(fresh)])


def test_routing_does_not_change_the_graph():
    torch.manual_seed(0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    case = make_case(routing("random", 8, 2, 3), 3, dtype=torch.float32)
    for kind in ("random", "one_expert", "dropped", "all_dropped", "skewed"):
        case.ids = routing(kind, 8, 2, 3)
        assert_same(gradients(compiled, case), gradients(block, case))
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [True, False])
def test_graphs_hold_one_operator_forward_and_one_backward(training: bool):
    recorded: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        recorded.append(module)
        return module

    backend = aot_autograd(fw_compiler=lambda module, inputs: make_boxed_func(keep(module, inputs)))
    case = make_case(routing("random", 8, 2, 3), 3, dtype=torch.float32)
    for tensor in case.given.values():
        tensor.requires_grad_(training)
    out = torch.compile(block, backend=backend, fullgraph=True)(case)
    if training:
        out.sum().backward()
    names = [
        [str(node.target) for node in module.graph.nodes if "moecompile" in str(node.target)] for module in recorded
    ]
    forward = ["moecompile.plan.default", "moecompile.experts_forward.default"]
    backward = ["moecompile.experts_backward.default"]
    assert names == ([forward, backward] if training else [["moecompile.plan.default", "moecompile.experts.default"]])


@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(compile_it: bool, reentrant: bool):
    torch.manual_seed(0)
    case = make_case(routing("random", 8, 2, 3), 3, dtype=torch.float32)

    def run(x: torch.Tensor) -> torch.Tensor:
        return block(Case(case.form, case.ids, case.tensors | {"x": x}, case.gate_up, case.transposed))

    def checkpointed(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(run, x, use_reentrant=reentrant)

    step = torch.compile(checkpointed, backend="aot_eager") if compile_it else checkpointed
    x, leaves = case.given["x"], list(case.given.values())
    step(x).square().sum().backward()
    found = [leaf.grad for leaf in leaves]
    assert_same([grad for grad in found if grad is not None], gradients(block, case)[1:])


@pytest.mark.parametrize("compile_it", [False, True])
def test_autocast_changes_nothing_inside(compile_it: bool):
    torch.manual_seed(0)
    case = make_case(routing("random", 8, 2, 3), 3, FORMS["weight_everywhere"], biases=BIASES, dtype=torch.float32)
    expected = gradients(Case.run, case)
    run = torch.compile(Case.run, backend="aot_eager") if compile_it else Case.run
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(run, case)
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_sizes_that_only_running_tells():
    """T from a data-dependent selection: three unbacked sizes that the fake kernels tie together."""
    torch.manual_seed(0)
    case = make_case(routing("random", 12, 2, 3), 3, dtype=torch.float32)

    def selected(mask: torch.Tensor) -> torch.Tensor:
        chosen: dict[str, torch.Tensor | None] = {name: case.given[name][mask] for name in ("x", "weights")}
        return Case(case.form, case.ids[mask], case.tensors | chosen, case.gate_up).run().sum(0)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(selected, backend="aot_eager", fullgraph=True)
        for seed in range(2):
            mask = torch.rand(12, generator=torch.Generator().manual_seed(seed)) < 0.5
            torch.testing.assert_close(compiled(mask), selected(mask))


def test_inference_mode_and_no_grad_save_nothing():
    torch.manual_seed(0)
    case = make_case(routing("random", 8, 2, 3), 3)
    expected = case.run()
    assert expected.grad_fn is not None
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = case.run()
        assert found.grad_fn is None and torch.equal(found, expected)


def test_plan_stays_out_of_autograd_and_dynamo_keeps_it_whole():
    recorder = EagerAndRecordGraphs()
    ids = routing("random", 8, 2, 3)
    outputs = torch.compile(torch.ops.moecompile.plan, backend=recorder, fullgraph=True)(ids, 3)
    assert not any(output.requires_grad for output in outputs)
    (graph,) = recorder.graphs
    assert [node.target for node in graph.graph.nodes].count(torch.ops.moecompile.plan) == 1
