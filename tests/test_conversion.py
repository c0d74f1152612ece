"""`convert_to_fp8`: what is converted, what it then computes, and what is refused before anything is."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moecompile
from moecompile.checkpoints import SCALES
from moecompile.runtime.block_scaled import BlockScaled
from plain_layers import Plain
from test_fp8_models import compiled
from tiny_sizes import Sizes
from tiny_transformers import build_model, known_to_transformers
from zoo_expert_loop import WhereIndexAdd

SIZES = Sizes(hidden=256, intermediate=128, vocabulary=512)
MODELS = known_to_transformers("qwen3_moe", "deepseek_v3")


class Called(nn.Module):
    """A model of transformers as a function of ids to logits."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def made(name: Any = "qwen3_moe", layers: int = 1) -> tuple[Called, Tensor]:
    torch.manual_seed(0)
    sizes = dataclasses.replace(SIZES, layers=layers)
    return Called(build_model(name, torch.bfloat16, sizes=sizes)).eval(), torch.randint(0, 64, (2, 24))


def infer(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(*inputs)
    return result


def in_fp8(model: nn.Module) -> dict[str, Any]:
    return {name: each for name, each in model.named_parameters() if isinstance(each, BlockScaled)}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers(name: str) -> None:
    assert_same_numbers(name, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", known_to_transformers("qwen3_moe", "deepseek_v3"))
def test_the_same_numbers_compiled(name: str) -> None:
    assert_same_numbers(name, "inductor")


def assert_same_numbers(name: str, lowering: str) -> None:
    model, ids = made(name, layers=2)
    expected = infer(compiled(copy.deepcopy(model), lowering=lowering), ids)
    table = moecompile.last_report().casts
    names = moecompile.convert_to_fp8(model, ids)
    assert {*names} == {*in_fp8(model)}
    linear = {f"{row.module}.weight" for row in table if row.cast and row.kind == "linear"}
    modules = {row.module for row in table if row.kind == "experts"}
    experts = {f"{each}.{part}" for each in modules for part in ("gate_up_proj", "down_proj")}
    assert {*names} == linear | experts and experts and linear
    found = infer(compiled(model, lowering=lowering), ids)
    assert torch.equal(found, expected)
    report = moecompile.last_report()
    assert report.casts == table and len(report.sites) == len(modules)
    assert torch.equal(infer(compiled(model, lowering=lowering, fp8_cache_weights=True), ids), expected)


def test_nothing_is_quantised_any_more() -> None:
    model, ids = made()
    moecompile.convert_to_fp8(model, ids)
    infer(compiled(model), ids)
    (graph,) = moecompile.last_report().graphs
    assert graph.forward is not None and "moecompile.scaled_mm" in graph.forward
    assert "quantize_weights" not in graph.forward
    path = "model.model.layers.0.mlp.experts.gate_up_proj"
    assert f"= input {path}  : bf16[8, 256, 256] in f8e4m3fn\n" in graph.after
    assert f"= input {path}.e4m3  : f8e4m3fn[8, 256, 256]\n" in graph.forward
    assert f"= input {path}.scales  : f32[8, 2, 2]\n" in graph.forward
    infer(compiled(model, fp8_cache_weights=True), ids)
    (cached,) = moecompile.last_report().graphs
    assert not any("cast in every forward" in note or "copies of" in note for note in cached.notes)


@pytest.mark.parametrize("way", ["torch.compile", "in place"])
def test_models_that_are_compiled_already(way: str) -> None:
    model, ids = made()
    options: dict[str, Any] = {"precision": "fp8", "lowering": "eager"}
    given: Any = torch.compile(model, backend="moecompile", options=options) if way == "torch.compile" else model
    if way == "in place":
        model.compile(backend="moecompile", options=options)
    expected = infer(given, ids)
    names = moecompile.convert_to_fp8(given, ids)
    assert "model.lm_head.weight" not in names and {*names} == {*in_fp8(model)}
    moecompile.reset()
    assert torch.equal(infer(given, ids), expected)
    (graph,) = moecompile.last_report().graphs  # compiled anew: the parameters are others
    assert graph.forward is not None and ".e4m3" in graph.forward


@pytest.mark.parametrize("name", ["verify", "fp8_compare", "recompute", "kernels"])
def test_with_other_options(name: str) -> None:
    values: dict[str, Any] = {"recompute": True, "kernels": "reference"}
    options = {name: values.get(name, "first_call")}
    model, ids = made()
    expected = infer(compiled(model, **options), ids)
    before = moecompile.last_report()
    moecompile.convert_to_fp8(model, ids)
    assert torch.equal(infer(compiled(model, **options), ids), expected)
    after = moecompile.last_report()
    assert [site.module for site in after.sites] == [site.module for site in before.sites] and after.sites
    (graph,), (other,) = after.graphs, before.graphs
    assert [row.module for row in graph.compared] == [row.module for row in other.compared]
    assert bool(graph.compared) == ("fp8_compare" in options)


def test_few_graphs_for_many_lengths() -> None:
    model, ids = made()
    expected = [infer(compiled(model), ids[:, :length]) for length in (24, 17, 9, 5)]
    moecompile.convert_to_fp8(model, ids)
    compiled(model)
    assert all(torch.equal(infer(model, ids[:, : each.shape[1]]), each) for each in expected)
    assert len(moecompile.last_report().graphs) <= 2


class Broken(nn.Module):
    """A graph break between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(256, 256), nn.Linear(256, 256)
        self.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return torch.tanh(self.second(x) + self.first(x))


def test_graphs_are_looked_at_together() -> None:
    torch.manual_seed(0)
    model, x = Broken().eval(), torch.randn(4, 256).bfloat16()
    assert moecompile.convert_to_fp8(model, x) == ("first.weight", "second.weight")


class Sharded(Tensor):
    """Stands for a DTensor: a parameter with rules of its own."""


def test_what_is_sharded_stays() -> None:
    torch.manual_seed(0)
    model, x = Broken().eval(), torch.randn(4, 256).bfloat16()
    model.first.weight = nn.Parameter(model.first.weight.detach().as_subclass(Sharded))
    assert moecompile.convert_to_fp8(model, x) == ("second.weight",)


def test_originals_are_freed() -> None:
    model, ids = made()
    storages = {name: weakref.ref(each.untyped_storage()) for name, each in model.named_parameters()}
    before = sum(each.numel() * each.element_size() for each in model.parameters())
    names = moecompile.convert_to_fp8(model, ids)
    gc.collect()
    assert names and all(storages[name]() is None for name in names)
    kept = [each for name, each in model.named_parameters() if name not in names]
    held = sum(each.numel() * each.element_size() for each in kept)
    quantized = sum(each.e4m3.numel() + 4 * each.scales.numel() for each in in_fp8(model).values())
    assert quantized < 0.51 * (before - held)


def test_uncompiled_it_reads_dequantised_matrices() -> None:
    model, ids = made()
    other = copy.deepcopy(model)
    names = moecompile.convert_to_fp8(model, ids)
    with torch.no_grad():
        for name, each in other.named_parameters():
            if name in names:
                each.copy_(model.get_parameter(name) * 1.0)
    assert torch.equal(infer(model, ids), infer(other, ids))


def test_converted_twice_is_converted_once() -> None:
    model, ids = made()
    names = moecompile.convert_to_fp8(model, ids)
    before = in_fp8(model)
    assert moecompile.convert_to_fp8(model, ids) == () and names
    assert all(before[name] is each for name, each in in_fp8(model).items())


def test_options_are_heeded() -> None:
    model, ids = made(layers=2)
    options = {"fp8_exclude": ("*.mlp.experts",), "fp8_keep_last_layers": 1}
    names = moecompile.convert_to_fp8(model, ids, moecompile_options=options)
    assert names and not any("experts" in name for name in names)
    layers = sorted({name.split("layers.")[1][0] for name in names})
    assert layers == ["0"]
    found = infer(compiled(model, **options), ids)
    assert found.isfinite().all()


def test_gradients_flow_past_it() -> None:
    """As past frozen matrices: adapters can be trained on top."""
    model, ids = made()
    other = copy.deepcopy(model)
    names = moecompile.convert_to_fp8(model, ids)
    for name in names:
        other.get_parameter(name).requires_grad_(False)
    for each in (model, other):
        compiled(each)(ids).float().square().sum().backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    expected = {name: each.grad for name, each in other.named_parameters() if each.grad is not None}
    assert found.keys() == expected.keys() and "model.model.embed_tokens.weight" in found
    assert all(torch.equal(found[name], each) for name, each in expected.items())


class Loop(nn.Module):
    """Mixtral of transformers 4: a loop over experts that are modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.moe = nn.RMSNorm(256), WhereIndexAdd(hidden=256, inner=128)
        self.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))[0]


def test_experts_that_are_modules() -> None:
    torch.manual_seed(0)
    model, x = Loop().eval(), torch.randn(40, 256).bfloat16()
    expected = infer(compiled(model), x)
    loaded = copy.deepcopy(model)
    names = moecompile.convert_to_fp8(model, x)
    assert {*names} == {f"moe.experts.{expert}.{part}.weight" for expert in range(4) for part in ("w1", "w2", "w3")}
    stored = model.state_dict()
    for name in names:
        stored |= {name: stored[name].e4m3, name + SCALES: stored[name].scales}
    assert {*moecompile.load_fp8(loaded, stored)} == {*names}
    for each in (model, loaded):
        assert torch.equal(infer(compiled(each), x), expected)
        (graph,) = moecompile.last_report().graphs
        assert len(graph.sites) == 1 and graph.forward is not None and "quantize_weights" not in graph.forward
        assert "experts_fp8" in graph.forward


class Twice(nn.Module):
    """A matrix that a layer multiplies by, and that somebody else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.once = nn.Linear(256, 256, bias=False)
        self.twice = nn.Linear(256, 256, bias=False)
        self.tied = nn.Linear(256, 256, bias=False)
        self.again = nn.Linear(256, 256, bias=False)
        self.again.weight = self.tied.weight
        self.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.again(torch.tanh(self.tied(self.once(x)))))
        return torch.tanh(self.twice(x)) + self.twice.weight[0]


def test_what_somebody_else_reads_stays() -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(4, 256).bfloat16()
    assert moecompile.convert_to_fp8(model, x) == ("once.weight", "tied.weight")
    assert model.again.weight is model.tied.weight and type(model.twice.weight) is nn.Parameter


def test_what_is_no_model_for_inference() -> None:
    model, ids = made()
    with pytest.raises(ValueError, match=r"training mode; call model\.eval\(\)"):
        moecompile.convert_to_fp8(model.train(), ids)
    with pytest.raises(TypeError, match="expected a module"):
        moecompile.convert_to_fp8(lambda x: x, ids)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fp8_exlude"):
        moecompile.convert_to_fp8(model.eval(), ids, moecompile_options={"fp8_exlude": ()})
    assert not in_fp8(model)


def test_calls_that_mean_something_else() -> None:
    model, ids = made()
    with pytest.raises(ValueError, match="are `moecompile_options`"):
        moecompile.convert_to_fp8(model, ids, options={"precision": "fp8"})
    with pytest.raises(ValueError, match="on the meta device; load the model first"):
        moecompile.convert_to_fp8(copy.deepcopy(model).to("meta"), ids)
    assert not in_fp8(model)


def test_beside_many_graphs_of_the_same_code() -> None:
    model, ids = made()
    expected = moecompile.convert_to_fp8(copy.deepcopy(model), ids)
    with torch._dynamo.config.patch(recompile_limit=1):
        infer(compiled(copy.deepcopy(model).float()), ids)
        assert expected and moecompile.convert_to_fp8(model, ids) == expected


@pytest.mark.parametrize("options", [{}, {"precision": "fp8", "fp8_exclude": ("*.q_proj",)}], ids=["model", "excluded"])
def test_what_is_dequantised_in_every_call_is_told(options: dict[str, Any]) -> None:
    model, ids = made()
    moecompile.convert_to_fp8(model, ids)
    infer(compiled(copy.deepcopy(model)), ids)
    assert not any("dequantised" in note for note in moecompile.last_report().graphs[-1].notes)
    torch._dynamo.reset()
    moecompile.reset()
    with torch.no_grad():
        torch.compile(model, backend="moecompile", options={"lowering": "eager", **options})(ids)
    (graph,) = moecompile.last_report().graphs
    (note,) = (each for each in graph.notes if "dequantised in every call" in each)
    assert "(model.model.layers.0.self_attn.q_proj.weight, for one)" in note


def test_between_graphs_nobody_sees_who_reads() -> None:
    """A tied embedding that is looked up outside of all graphs."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.mix, self.head = (
                nn.Embedding(512, 256),
                nn.Linear(256, 256),
                nn.Linear(256, 512, False),
            )
            self.head.weight = self.embedding.weight
            self.to(torch.bfloat16)

        @torch.compiler.disable
        def look(self, ids: Tensor) -> Tensor:
            found: Tensor = self.embedding(ids)
            return found

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            rows = self.look(ids)
            return rows + self.mix(rows), self.head(self.mix(rows)).tanh()

    model = Model().eval()
    ids = torch.arange(24)
    assert moecompile.convert_to_fp8(model, ids) == ("mix.weight",)
    assert type(model.head.weight) is nn.Parameter and model.head.weight is model.embedding.weight


def test_converted_in_inference_mode_it_can_be_trained_around() -> None:
    model, x = Plain().eval(), torch.randn(8, 256).bfloat16()
    with torch.inference_mode():
        names = moecompile.convert_to_fp8(model, x, moecompile_options={"fp8_exclude": ("layers.[0,2]",)})
    assert names == ("layers.1.up.weight", "layers.1.down.weight")
    compiled(model)(x.requires_grad_())[0].sum().backward()
    assert x.grad is not None and x.grad.any()


def test_options_that_convert_nothing() -> None:
    layer = nn.Linear(128, 128).bfloat16().eval()
    with pytest.raises(ValueError, match="precision='model' converts nothing"):
        moecompile.convert_to_fp8(layer, torch.randn(8, 128), moecompile_options={"precision": "model"})
