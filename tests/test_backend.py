"""The backend's story: how it is called, what it returns, and every way torch.compile is used with it."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import moecompile
from moecompile import advice, options, pieces, pipeline
from moecompile.backend import moecompile as backend
from moecompile.report import GraphReport
from small_models import HIDDEN, Layer, Model, assert_same, compiled, inputs


def graphs() -> tuple[GraphReport, ...]:
    return moecompile.last_report().graphs


def sites() -> int:
    return len(moecompile.last_report().sites)


def test_importing_the_backend_loads_no_compiler():
    script = (
        "import sys, moecompile.backend\n"
        "heavy = {'torch._inductor.compile_fx', 'torch._dynamo.convert_frame', 'sympy', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# How a model is compiled.


def test_whole_model_forward_and_backward():
    model = Model()
    fast = compiled(model)
    assert_same(model, fast, inputs())
    (graph,) = graphs()
    assert len(graph.sites) == 2
    assert graph.forward is not None and graph.forward.count("moecompile.experts_forward") == 2
    assert graph.backward is not None and graph.backward.count("moecompile.experts_backward") == 2


def test_module_compile_keeps_the_state_dict():
    model = Model()
    keys = list(model.state_dict())
    model.compile(backend=backend, options={"lowering": "eager"})
    model(inputs())
    assert sites() == 2 and list(model.state_dict()) == keys


def test_regional_compilation_is_one_graph_for_all_layers():
    model = Model()
    expected = model(inputs())
    for layer in model.layers:
        layer.compile(backend=backend, options={"lowering": "eager"})
    torch.testing.assert_close(model(inputs()), expected)
    assert len(graphs()) == 1 and sites() == 1


def test_a_function_with_a_graph_break():
    model = Model()

    def function(x: Tensor) -> Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        return model(y)

    torch.testing.assert_close(compiled(function, fullgraph=False)(inputs()), model(model(inputs())))
    assert [len(graph.sites) for graph in graphs()] == [2, 2]
    assert graphs()[0].ended_by is not None and graphs()[1].ended_by is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_has_no_backward(mode: Any):
    model = Model().eval()
    with mode():
        torch.testing.assert_close(compiled(model)(inputs()), model(inputs()))
    (graph,) = graphs()
    assert len(graph.sites) == 2 and graph.backward is None
    assert graph.forward is not None and "moecompile.experts(" in graph.forward


def test_token_counts_share_one_dynamic_graph():
    model = Model()
    fast = compiled(model, dynamic=True)
    for tokens in (12, 5, 16, 9):
        torch.testing.assert_close(fast(inputs(tokens)), model(inputs(tokens)))
    assert len(graphs()) == 1 and sites() == 2


def test_activation_checkpointing_is_rewritten_inside_its_body():
    model = Model(around=functools.partial(checkpoint, use_reentrant=False))
    assert_same(model, compiled(model), inputs())
    (graph,) = graphs()
    assert len(graph.sites) == 2
    # the backward graph computes the forward of both blocks again
    assert graph.backward is not None and graph.backward.count("moecompile.experts_forward") == 2


def test_selective_checkpointing_may_keep_our_operators():
    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = operator is torch.ops.moecompile.experts_forward.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    model = Model(around=functools.partial(checkpoint, use_reentrant=False, context_fn=contexts))
    fast = compiled(model)
    fast(inputs()).sum().backward()
    (graph,) = graphs()
    assert len(graph.sites) == 2
    assert graph.backward is not None and "experts_forward" not in graph.backward
    assert graph.backward.count("moecompile.experts_backward") == 2


def test_nested_compile_region_is_rewritten_inside_its_body():
    class Region(Layer):
        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            return x + self.moe(self.norm(x))

    layers = nn.Sequential(Region(seed=0), Region(seed=1))
    x = torch.randn(12, HIDDEN)
    # newer torch puts a body that is used once back into the main graph
    inlining = {"inline_single_use_invoke_subgraph": False}
    has_inlining = hasattr(torch._dynamo.config, "inline_single_use_invoke_subgraph")
    with torch._dynamo.config.patch(inlining if has_inlining else {}):
        torch.testing.assert_close(compiled(layers)(x), layers(x))
    # torch decides whether the two layers share one body
    main, *bodies = graphs()[0].after.split("\n\n")
    assert sites() == len(bodies) >= 1
    assert "moecompile" not in main and all(body.count("moecompile.experts(") == 1 for body in bodies)


def test_a_region_called_twice_in_training():
    """Its body is compiled once, and counts its inputs from 0, where AOTAutograd counts those of a graph from 1."""

    @torch.compiler.nested_compile_region
    def block(x: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        weights, ids = (x @ router).softmax(-1).topk(2)
        hidden = torch.relu(torch.einsum("th,tkhi->tki", x, w_in[ids]))
        return torch.einsum("tki,tkih,tk->th", hidden, w_out[ids], weights)

    def twice(x: Tensor, *weights: Tensor) -> Tensor:
        return block(block(x, *weights), *weights)

    torch.manual_seed(0)
    shapes = ((10, 16), (16, 6), (6, 16, 24), (6, 24, 16))
    first, second = ([torch.randn(shape).div(4).requires_grad_() for shape in shapes] for _ in range(2))
    for own, other in zip(first, second, strict=True):
        own.data.copy_(other)
    expected = twice(*first)
    actual = torch.compile(twice, backend="moecompile", options={"lowering": "eager"}, fullgraph=True)(*second)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    expected.sum().backward()
    actual.sum().backward()
    for own, other in zip(first, second, strict=True):
        torch.testing.assert_close(other.grad, own.grad, rtol=1e-4, atol=1e-5)
    assert sites() >= 1


@pytest.mark.parametrize("place", ["around the call", "inside the model"])
def test_autocast(place: str):
    model, autocast = Model(), torch.autocast("cpu", torch.bfloat16)
    function = autocast(model) if place == "inside the model" else model
    with autocast if place == "around the call" else contextlib.nullcontext():
        expected, actual = function(inputs()), compiled(function)(inputs())
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)


def test_autocast_blocks_are_rewritten():
    with torch.autocast("cpu", torch.bfloat16):
        compiled(Model())(inputs())
    assert sites() == 2


def test_frozen_experts_get_no_gradient_computed():
    model = Model(layers=1)
    frozen = model.layers.get_submodule("0.moe")
    frozen.requires_grad_(False)
    assert_same(model, compiled(model), inputs())
    assert sites() == 1
    assert all(parameter.grad is None for parameter in frozen.parameters())


class LowRank(nn.Module):
    """The frozen weights (E, out, in) plus a product of two thin matrices for each expert, as LoRA adds it."""

    def __init__(self, weight: Tensor, rank: int = 2) -> None:
        super().__init__()
        experts, rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(experts, rank, columns) / 8)
        self.up = nn.Parameter(torch.randn(experts, rows, rank) / 8)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.bmm(self.up, self.down)


@pytest.mark.parametrize("where", ["beside", "on the weights"])
def test_adapters_on_frozen_experts(where: str):
    model = Model(layers=1)
    layer = model.layers.get_submodule("0")
    moe = layer.get_submodule("moe")
    model.requires_grad_(False)
    if where == "beside":
        layer.add_module("norm", nn.Sequential(layer.get_submodule("norm"), nn.Linear(32, 2), nn.Linear(2, 32)))
    else:
        for name in ("w_in", "w_out"):
            nn.utils.parametrize.register_parametrization(moe, name, LowRank(getattr(moe, name)))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert_same(model, compiled(model), inputs())
    assert sites() == 1
    assert trained == [name for name, parameter in model.named_parameters() if parameter.grad is not None]


def test_data_parallel_is_rewritten_where_torch_does_not_cut_the_graph(tmp_path: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        # the first bucket holds 1 MiB, about 14 layers
        model = Model(layers=16)
        fast = compiled(nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1), fullgraph=False)
        torch.testing.assert_close(fast(inputs()), model(inputs()))
        assert len(graphs()) > 1
        assert all(advice.KEEP_WHOLE in graph.notes[0] for graph in graphs())
        torch._dynamo.reset()
        moecompile.reset()
        with torch._dynamo.config.patch(optimize_ddp=False):
            assert_same(model, compiled(nn.parallel.DistributedDataParallel(model), fullgraph=False), inputs())
        assert sites() == 16
    finally:
        torch.distributed.destroy_process_group()


# What the user may set.


def test_mode_and_options_reach_inductor():
    model = Model(layers=1).eval()
    with torch.no_grad():
        expected = model(inputs())
        fast = torch.compile(model, backend=backend, mode="reduce-overhead")
        torch.testing.assert_close(fast(inputs()), expected, rtol=1e-4, atol=1e-4)
        assert sites() == 1
        seen: list[int] = []
        fast = compiled(
            model, lowering="inductor", inductor={"post_grad_custom_pre_pass": lambda graph: seen.append(1)}
        )
        torch.testing.assert_close(fast(inputs()), expected, rtol=1e-4, atol=1e-4)
    assert seen


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "fastest"}, "unknown mode 'fastest'"),
        ({"options": {"lowring": "eager"}}, "Did you mean 'lowering'"),
        ({"options": {"disable": ("fusee",)}}, "Did you mean 'fuse'"),
        ({"options": {"max_autotune": True}}, "is an option of Inductor"),
    ],
)
def test_a_wrong_option_is_named_at_the_first_call(given: dict[str, Any], message: str):
    with pytest.raises(BackendCompilerFailed, match=message):
        torch.compile(Model(), backend=backend, **given)(inputs())


def test_a_name_is_taken():
    gm = torch.fx.symbolic_trace(lambda x: (x.relu(),))
    assert backend(gm, [torch.randn(2)], options={"lowering": "eager"}, name="part")(torch.ones(2))[0].equal(
        torch.ones(2)
    )


def test_moecompile_disable_hands_the_graph_on_untouched(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    monkeypatch.setenv("MOECOMPILE_DISABLE", "1")
    model = Model()
    torch.testing.assert_close(compiled(model)(inputs()), model(inputs()))
    (graph,) = graphs()
    assert not graph.sites and not graph.passes and "MOECOMPILE_DISABLE" in graph.notes[0]
    assert not [record for record in caplog.records if record.name == "moecompile"]


def test_a_pass_is_disabled_by_name(monkeypatch: pytest.MonkeyPatch):
    compiled(Model(), disable=("fuse",))(inputs())
    assert [each.name for each in graphs()[0].passes] == ["detect"]
    assert sites() == 2 and graphs()[0].before == graphs()[0].after
    moecompile.reset()
    torch._dynamo.reset()
    monkeypatch.setenv("MOECOMPILE_DISABLE_PASSES", "detect")
    compiled(Model())(inputs())
    assert [each.name for each in graphs()[0].passes] == ["fuse"] and sites() == 0


# The driver.


def test_the_pass_table_is_the_documented_one():
    assert list(pipeline.PASSES) == list(options.PASSES)


def test_the_driver_runs_a_pass_over_every_body_and_records_it(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    def relu_to_sigmoid(piece: pipeline.Piece, _: options.Options) -> None:
        for node in piece.module.graph.find_nodes(op="call_method", target="relu"):
            node.target = "sigmoid"
            piece.changed = True

    monkeypatch.setattr(pipeline, "PASSES", {"detect": lambda piece, _: None, "fuse": relu_to_sigmoid})

    def function(x: Tensor) -> Tensor:
        return checkpoint(lambda y: y.relu() * 2, x, use_reentrant=False) + x.relu()

    x = torch.randn(4)
    with caplog.at_level(logging.INFO, "moecompile"):
        torch.testing.assert_close(compiled(function)(x), 3 * x.sigmoid())
    (graph,) = graphs()
    detect, fuse = graph.passes
    assert detect.changes == {} and fuse.changes == {"relu": (2, 0), "sigmoid": (0, 2)}
    assert graph.before.count("relu(") == 2 and graph.after.count("sigmoid(") == 2 and "wrap_body_0:" in graph.after
    assert any("2 fuse: " in line and "relu: 2 -> 0 (-2)" in line for line in caplog.messages)


def test_a_pass_that_fails_is_named_with_a_way_on(monkeypatch: pytest.MonkeyPatch):
    def broken(piece: pipeline.Piece, _: options.Options) -> None:
        raise IndexError("no such node")

    monkeypatch.setattr(pipeline, "PASSES", {"detect": broken, "fuse": pieces.fuse_sites})
    message = "pass 'detect' failed with IndexError: no such node.*MOECOMPILE_DISABLE_PASSES=detect"
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled(Model())(inputs())
    monkeypatch.setenv("MOECOMPILE_DISABLE_PASSES", "detect")
    compiled(Model())(inputs())


def test_records_keep_no_graph_alive(monkeypatch: pytest.MonkeyPatch):
    seen: list[weakref.ref[Any]] = []
    run_passes = pipeline.run_passes

    def watched(gm: torch.fx.GraphModule, *rest: Any, **options: Any) -> Any:
        passed = run_passes(gm, *rest, **options)
        seen.extend(weakref.ref(site.node) for site in passed.sites)
        return passed

    monkeypatch.setattr(pipeline, "run_passes", watched)
    model = Model()
    compiled(model)(inputs()).sum().backward()
    torch._dynamo.reset()
    gc.collect()
    assert len(seen) == 2 and sites() == 2
    assert [reference() for reference in seen] == [None, None]


# Derivatives of derivatives, and transforms.


def test_tokens_changed_before_backward_are_an_error():
    model = Model()
    result = compiled(model)(inputs())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_double_backward_is_a_clear_error():
    fast = compiled(Model())
    x = inputs().requires_grad_()
    (gradient,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


def test_a_transform_of_a_compiled_function_runs_the_original_code():
    model = Model()

    def loss(x: Tensor) -> Tensor:
        return model(x).square().sum()

    fast = compiled(loss, fullgraph=False)
    fast(inputs())
    assert sites() == 2
    torch.testing.assert_close(torch.func.grad(fast)(inputs()), torch.func.grad(loss)(inputs()))
    torch._dynamo.reset()
    with pytest.raises(Unsupported, match=r"torch.func.grad\(compiled_fn\)"):
        torch.func.grad(compiled(loss))(inputs())


def test_a_transform_inside_a_compiled_function_is_left_alone(caplog: Any):
    layer = Layer()

    def loss(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    def batched(x: Tensor) -> Tensor:
        return layer(x)

    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return layer(x), torch.func.grad(loss)(x), torch.vmap(batched)(torch.stack([x, 2 * x]))

    x = torch.randn(12, HIDDEN)
    for actual, expected in zip(compiled(function)(x), function(x), strict=True):
        torch.testing.assert_close(actual, expected)
    assert sites() == 1  # the one outside
    assert pipeline.TRANSFORMED in graphs()[0].notes


def test_models_are_let_go_while_their_caller_runs() -> None:
    """Whose frame was looked at when they were compiled."""
    model = nn.Linear(4, 4)
    model.compile(backend="moecompile", options={"lowering": "eager"})
    model(torch.randn(2, 4))
    reference = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert reference() is None
