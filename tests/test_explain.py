"""explain: what a model would become, what stood in the way, and no trace of having looked."""

from __future__ import annotations

import functools
import traceback
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import moecompile
import zoo_forms
from moecompile import advice
from moecompile.backend import moecompile as backend
from small_models import HIDDEN, Layer, Model, compiled, inputs
from zoo_case import make


class HitLoop(nn.Module):
    """Experts in a loop over those that were hit, as many models have it; Dynamo cannot capture that."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 4)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        weights, ids = self.gate(x).softmax(-1).topk(2)
        mask = F.one_hot(ids, 4).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            choice, token = torch.where(mask[expert].squeeze(0))
            out.index_add_(0, token, self.experts[int(expert)](x[token]) * weights[token, choice, None])
        return F.dropout(out, 0.1)


class Part(nn.Module):
    """A layer without experts."""

    def __init__(self, size: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


def test_sites_passes_and_graphs():
    report = moecompile.explain(Model(), inputs())
    (graph,) = report.graphs
    assert len(report.sites) == 2 and report.graph_breaks == ()
    assert [each.name for each in graph.passes] == ["detect", "fuse"]
    assert "moecompile.experts" in graph.after and "moecompile" not in graph.before
    assert graph.forward is None and moecompile.last_report().graphs == ()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_gradient_mode(mode: Any):
    with mode():
        assert (
            len(moecompile.explain(Model(around=functools.partial(checkpoint, use_reentrant=False)), inputs()).sites)
            == 2
        )


def test_functions_and_keyword_arguments():
    model = Model()
    assert len(moecompile.explain(lambda *, x: model(x), x=inputs()).sites) == 2


def test_an_argument_may_be_named_model():
    module = Model()
    assert len(moecompile.explain(lambda *, model: module(model), model=inputs()).sites) == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(Part, r"got the class Part\. Make an instance first: explain\(Part\("), (3, "got 3 of type int")],
)
def test_what_is_no_model_is_refused(wrong: Any, said: str):
    with pytest.raises(TypeError, match=said):
        moecompile.explain(wrong, inputs())
    part = Part(8)
    assert torch.equal(torch.compile(part, backend="eager")(inputs()), part(inputs())), "the class is as it was"


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "layer.compile", "compiled layer"])
def test_a_compiled_model_is_looked_at_as_one_whole(how: str):
    model: Any = Model()
    counter = CompileCounter()
    if how == "torch.compile":
        model = torch.compile(model, backend=counter)
    elif how == "model.compile":
        model.compile(backend=counter)
    elif how == "layer.compile":
        for layer in model.layers:
            layer.compile(backend=counter)
    else:
        model.layers[0] = torch.compile(model.layers[0], backend=counter)
    model(inputs())
    before = counter.frame_count
    report = moecompile.explain(model, inputs())
    assert len(report.graphs) == 1 and len(report.sites) == 2
    model(inputs())
    assert counter.frame_count == before == 1, "what was compiled stays compiled"


def test_nothing_is_left_behind():
    model = HitLoop()
    x = torch.randn(12, HIDDEN, requires_grad=True)
    calls, parameters = model.calls, [parameter.clone() for parameter in model.parameters()]
    torch.manual_seed(3)
    expected = model(x)
    model.calls.zero_()
    torch.manual_seed(3)
    moecompile.explain(model, x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert model.calls is calls and calls == 1
    assert x.grad is None and all(parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, model.parameters(), parameters))


def test_sizes_looked_at_make_no_later_graph_dynamic():
    model = nn.Linear(8, 8)
    shapes: list[type] = []

    def look(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        shapes.extend(type(value) for value in example_inputs)
        return gm

    moecompile.explain(model, inputs(5))
    torch.compile(model, backend=look)(inputs(9))
    assert torch.SymInt not in shapes


def test_an_argument_that_is_written_into_stays_as_it_was():
    def write(x: Tensor) -> Tensor:
        return x.add_(1)

    x = torch.zeros(3)
    moecompile.explain(write, x)
    assert x.sum() == 0


# Graph breaks.


def test_a_break_inside_moe_code_comes_first_with_a_cure():
    layer = Layer(moe=HitLoop())

    def function(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return layer(x)

    for _ in range(2):  # a frame that Dynamo gave up is tried again
        report = moecompile.explain(function, torch.randn(12, HIDDEN))
        inside, outside = report.graph_breaks[0], report.graph_breaks[-1]
        assert inside.moe and inside.source.startswith("test_explain.py:") and inside.cure == advice.NO_BRANCH
        assert not outside.moe and "graph_break" in outside.reason
    assert "compute all experts in one grouped" in str(report)


def test_counts_by_bincount_are_captured_if_dynamo_is_told_to():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(HIDDEN, 4)
            self.w_in = nn.Parameter(torch.randn(4, HIDDEN, 16))
            self.w_out = nn.Parameter(torch.randn(4, 16, HIDDEN))

        def forward(self, x: Tensor) -> Tensor:
            weights, experts = self.router(x).softmax(-1).topk(2)
            order = experts.view(-1).argsort(stable=True)
            offsets = torch.bincount(experts.view(-1), minlength=4).cumsum(0).to(torch.int32)
            hidden = torch._grouped_mm(x[order // 2].bfloat16(), self.w_in.bfloat16(), offs=offsets).relu()
            rows = torch._grouped_mm(hidden, self.w_out.bfloat16(), offs=offsets)
            rows = rows * weights.view(-1, 1)[order]
            return torch.zeros_like(rows[: x.shape[0]]).index_add(0, order // 2, rows)

    model, x = Counts(), torch.randn(12, HIDDEN)
    (found,) = moecompile.explain(model, x).graph_breaks
    assert "fullgraph=True" in (found.cure or "")
    reason = "Dynamic shape operator\n  Explanation: Operator `aten.bincount.default`'s output shape depends on data"
    frame = traceback.FrameSummary("moe.py", 3, "experts")
    assert advice.graph_break(reason, [frame]).cure == advice.MAY_CAPTURE
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert len(moecompile.explain(model, x).sites) == 1


class Expert(nn.Module):
    """One expert of a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(F.silu(self.w_in(x)))


class CountedLoop(nn.Module):
    """A loop over all experts; `skip`: by counts in Python, without those that have no rows."""

    def __init__(self, skip: bool, printing: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 4)
        self.experts = nn.ModuleList(Expert() for _ in range(4))
        self.skip, self.printing = skip, printing

    def forward(self, x: Tensor) -> Tensor:
        if self.printing:
            torch._dynamo.graph_break()
        weights, ids = self.router(x).softmax(-1).topk(2)
        counts = torch.bincount(ids.flatten(), minlength=4).tolist() if self.skip else []
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if not self.skip or counts[number] > 0:
                token, choice = torch.where(ids == number)
                out[token] += expert(x[token]) * weights[token, choice, None]
        return out


def test_a_cure_that_was_tried_and_is_none_is_not_proposed():
    report = moecompile.explain(CountedLoop(skip=True), torch.randn(12, HIDDEN))
    assert report.graph_breaks[0].moe and report.graph_breaks[0].cure == advice.NO_BRANCH
    assert "capture_dynamic_output_shape_ops" not in str(report) and report.sites == ()


def test_cures_that_were_tried_say_what_they_do():
    x = torch.randn(12, HIDDEN)
    (found, *_) = moecompile.explain(CountedLoop(skip=False), x).graph_breaks
    assert found.cure == "torch.compile(..., fullgraph=True): tried, 1 block is found then"
    report = moecompile.explain(CountedLoop(skip=False, printing=True), x)  # which fullgraph=True refuses
    (found,) = (each for each in report.graph_breaks if each.moe and each.cure)
    assert "capture_dynamic_output_shape_ops = True" in (found.cure or "") and "tried, 1 block" in (found.cure or "")


def test_a_capture_that_raises_is_a_stop():
    model, x = CountedLoop(skip=True), torch.randn(12, HIDDEN)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        with pytest.raises(Exception, match="data-dependent"):
            torch.compile(model, backend="eager")(x)
        torch._dynamo.reset()
        (found,) = moecompile.explain(model, x).graph_breaks
    assert "data-dependent" in found.reason and "torch.compile would raise this too" in found.reason
    assert found.cure == advice.NO_BRANCH


def test_what_the_model_itself_raises_is_raised():
    def fails(x: Tensor) -> Tensor:
        raise KeyError("no such thing")

    for model, x, error in ((nn.Linear(8, 8), torch.ones(2, 3), RuntimeError), (fails, torch.ones(2), KeyError)):
        with pytest.raises(error):
            moecompile.explain(model, x)


def test_a_loop_over_all_experts_is_cured_by_fullgraph():
    case = zoo_forms.case("where_index_add")
    report = moecompile.explain(make(case), *case.inputs(24))
    assert report.sites == ()
    assert any(each.moe and "fullgraph=True" in (each.cure or "") for each in report.graph_breaks), report.graph_breaks


def test_the_cure_for_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    ids = torch.randint(0, 64, (1, 8))
    model.set_experts_implementation("eager")
    report = moecompile.explain(model, ids)
    assert report.sites == () and report.graph_breaks[0].moe
    assert report.graph_breaks[0].cure == advice.SWITCH_EXPERTS and advice.SWITCH_EXPERTS in str(report)
    model.set_experts_implementation("grouped_mm")
    assert not moecompile.explain(model, ids).graph_breaks


# The one warning.


def warnings_of(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "moecompile"]


def test_one_warning_for_a_model_without_a_block(caplog: Any):
    fast = compiled(nn.Linear(8, 8))
    fast(inputs())
    compiled(nn.Linear(8, 4))(inputs())
    (warning,) = warnings_of(caplog)
    assert "rewrote nothing" in warning and "python -m moecompile explain" in warning
    moecompile.reset()
    compiled(nn.Linear(8, 3))(inputs())
    assert len(warnings_of(caplog)) == 2


def test_a_layer_without_a_block_is_judged_after_the_others(caplog: Any):
    model = Model()
    model.layers.insert(0, Part(HIDDEN))
    for layer in model.layers:
        layer.compile(backend=backend, options={"lowering": "eager"})
    for _ in range(3):
        model(inputs())
    assert not warnings_of(caplog)


def test_parts_without_any_block_are_warned_about_when_they_run_again(caplog: Any):
    model = nn.Sequential(Part(8), Part(8, bias=False))
    for part in model:
        part.compile(backend=backend, options={"lowering": "eager"})
    model(inputs())
    assert not warnings_of(caplog)
    for _ in range(3):
        model(inputs())
    (warning,) = warnings_of(caplog)
    assert "2 graphs" in warning


def test_the_warning_names_the_loop_and_its_cure(caplog: Any):
    compiled(HitLoop(), fullgraph=False)(torch.randn(12, HIDDEN))
    (warning,) = warnings_of(caplog)
    assert "Python loop" in warning and "test_explain.py:" in warning and advice.ONE_PRODUCT in warning


def test_the_warning_and_the_report_name_what_may_cure_a_loop_over_all_experts(caplog: Any):
    compiled(CountedLoop(skip=False), fullgraph=False)(torch.randn(12, HIDDEN))
    (warning,) = warnings_of(caplog)
    report = moecompile.last_report()
    assert "test_explain.py:" in warning and advice.MAY_CAPTURE in warning
    assert any(found.moe and found.cure == advice.MAY_CAPTURE for found in report.graph_breaks)
    assert any(advice.MAY_CAPTURE in note for graph in report.graphs for note in graph.notes)
    assert "no graph breaks" not in str(report)


def test_a_loop_is_known_by_the_choice_before_it_not_by_its_names():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r = nn.Linear(HIDDEN, 4, bias=False)
            self.m = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
            self.n = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            w, i = self.r(x).softmax(-1).topk(2)
            out = torch.zeros_like(x)
            for j in range(4):
                t, k = torch.where(i == j)
                out.index_add_(0, t, self.n[j](self.m[j](x[t]).relu()) * w[t, k, None])
            return out

    report = moecompile.explain(Plain(), torch.randn(12, HIDDEN))
    assert report.graph_breaks and report.graph_breaks[0].moe
    assert report.graph_breaks[0].cure == "torch.compile(..., fullgraph=True): tried, 1 block is found then"


def test_one_tuple_for_several_arguments_is_noted():
    with pytest.raises(TypeError) as caught:
        moecompile.explain(nn.Linear(HIDDEN, HIDDEN), (inputs(),))
    assert any("explain(model, x, y)" in note for note in caught.value.__notes__)


def test_the_warning_counts_breaks_elsewhere(caplog: Any):
    def function(x: Tensor) -> Tensor:
        x = x.relu()
        torch._dynamo.graph_break()
        return x + 1

    fast = compiled(function, fullgraph=False)
    for _ in range(2):
        fast(inputs())
    (warning,) = warnings_of(caplog)
    assert "Dynamo broke the graph at 1 place; `moecompile.explain(model, ...)` tells why" in warning


def test_another_model_that_was_rewritten_hides_no_warning(caplog: Any):
    compiled(Model())(inputs())
    compiled(HitLoop(), fullgraph=False)(torch.randn(12, HIDDEN))
    (warning,) = warnings_of(caplog)
    assert "Python loop" in warning
    compiled(nn.Linear(8, 8))(inputs())
    assert len(warnings_of(caplog)) == 2
    compiled(HitLoop(), fullgraph=False)(torch.randn(12, HIDDEN))
    assert len(warnings_of(caplog)) == 2, "the same warning says nothing new"


def test_a_break_beside_a_rewritten_block_is_no_warning(caplog: Any):
    model = Model()

    def function(x: Tensor) -> Tensor:
        x = model(x)
        torch._dynamo.graph_break()
        return x.relu()

    fast = compiled(function, fullgraph=False)
    for _ in range(3):
        fast(inputs())
    assert len(moecompile.last_report().sites) == 2 and not warnings_of(caplog)


def test_no_warning_where_nothing_was_looked_for(caplog: Any, monkeypatch: pytest.MonkeyPatch):
    compiled(nn.Linear(8, 8), disable=("detect",))(inputs())
    monkeypatch.setenv("MOECOMPILE_DISABLE_PASSES", "detect")
    compiled(nn.Linear(8, 4))(inputs())
    assert len(moecompile.last_report().graphs) == 2 and not warnings_of(caplog)
