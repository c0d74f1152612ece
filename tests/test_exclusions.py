"""What users choose of FP8: patterns, first and last layers; what the report then says, of models of plain layers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moecompile
from moecompile.passes.exclusions import Exclusions, Wishes, layer_of
from plain_layers import Plain
from test_fp8_models import compiled, kept, model_of
from test_linears import VOCABULARY, H


def cast_in(**options: Any) -> set[str]:
    with torch.no_grad():
        compiled(Plain(), **options)(torch.randn(8, H).bfloat16())
    return {row.module for row in moecompile.last_report().casts if row.cast}


ALL = {f"layers.{number}.{name}" for number in range(3) for name in ("up", "down")}


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({}, set()),
        ({"fp8_exclude": ("layers.1",)}, {"layers.1.up", "layers.1.down"}),
        ({"fp8_exclude": ("*.down",)}, {f"layers.{number}.down" for number in range(3)}),
        ({"fp8_exclude": ("layers.[02].u?",)}, {"layers.0.up", "layers.2.up"}),
        ({"fp8_keep_first_layers": 1}, {"layers.0.up", "layers.0.down"}),
        ({"fp8_keep_last_layers": 2}, ALL - {"layers.0.up", "layers.0.down"}),
        ({"fp8_keep_first_layers": 2, "fp8_keep_last_layers": 2}, ALL),
        ({"fp8_keep_last_layers": 9, "fp8_include": ("layers.2.up",)}, ALL - {"layers.2.up"}),
        ({"fp8_exclude": ("layers",), "fp8_include": ("layers.2",)}, ALL),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_the_user_wants(options: dict[str, Any], left_out: set[str]) -> None:
    assert cast_in(**options) == ALL - left_out


def test_the_user_can_have_a_router_cast() -> None:
    assert cast_in(fp8_include=("router",)) == ALL | {"router"}


def test_reasons_name_what_keeps() -> None:
    cast_in(fp8_exclude=("layers.1.down",), fp8_keep_first_layers=1)
    assert kept(moecompile.last_report()) == {
        "layers.0.up": "it is in a layer of layers that fp8_keep_first_layers=1 keeps",
        "layers.0.down": "it is in a layer of layers that fp8_keep_first_layers=1 keeps",
        "layers.1.down": "fp8_exclude names it",
        "router": "it feeds topk",
    }


def test_patterns_that_name_nothing_are_noted() -> None:
    cast_in(fp8_exclude=("layer.*", "layers.0", "up", "1.dwon"), fp8_include=("routers", "nothing.like.it"))
    notes = moecompile.last_report().graphs[0].notes
    assert [note for note in notes if "pattern" in note] == [
        "the pattern 'layer.*' names no module of this graph; did you mean 'layers.*'?",
        "the pattern 'up' names no module of this graph; did you mean '*.up'?",
        "the pattern '1.dwon' names no module of this graph; did you mean '*.1.down'?",
        "the pattern 'routers' names no module of this graph; did you mean 'router'?",
        "the pattern 'nothing.like.it' names no module of this graph",
    ]


def test_wishes_that_change_nothing_are_noted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(H, dtype=torch.bfloat16)
            self.up = nn.Linear(H, H, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.up(self.norm(x))
            return result

    compiled(Model(), fp8_keep_first_layers=1, fp8_include=("norm", "up"), fp8_exclude=("up.weight",))(
        torch.randn(4, H).bfloat16()
    )
    (graph,) = moecompile.last_report().graphs
    assert [row.cast for row in graph.casts] == [True]
    assert [note for note in graph.notes if "fp8_" in note or "pattern" in note] == [
        "the pattern 'up.weight' names no module of this graph; did you mean 'up'?",
        "fp8_keep_first_layers and fp8_keep_last_layers keep nothing of this graph: its modules have no numbers, as "
        "those of a list have; name them in fp8_exclude",
        "the pattern 'norm' of fp8_include names no linear layer and no experts of this graph",
    ]


def test_experts_can_be_kept() -> None:
    model, ids = model_of("qwen3_moe")
    with torch.no_grad():
        compiled(model, fp8_exclude=("*.layers.0.mlp",), fp8_keep_last_layers=1)(input_ids=ids)
    report = moecompile.last_report()
    experts = [row for row in report.casts if row.kind == "experts"]
    assert [row.cast for row in experts] == [False, False]
    assert experts[0].reason == "fp8_exclude names it" and "fp8_keep_last_layers=1" in experts[1].reason
    assert not any("stay in their precision" in note for note in report.graphs[0].notes), "nobody is surprised"
    assert "moecompile.experts(" in report.graphs[0].after and "experts_fp8" not in report.graphs[0].after


class Checkpointed(Plain):
    """Every layer in a region of its own; a head that is the embedding, in one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, H, dtype=torch.bfloat16)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        head = checkpoint(lambda x: nn.functional.linear(x, self.embedding.weight), x, use_reentrant=False)
        return head, self.router(x).topk(2).indices


def test_checkpointed_regions_are_seen_as_one_model() -> None:
    options = {"fp8_keep_first_layers": 1, "fp8_exclude": ("layers.2.down", "nowhere")}
    compiled(Checkpointed(), **options)(torch.arange(8))
    report = moecompile.last_report()
    assert {row.module for row in report.casts if row.cast} == {"layers.1.up", "layers.1.down", "layers.2.up"}
    assert "its matrix is an embedding's" in {row.reason for row in report.casts}
    notes = [note for note in report.graphs[0].notes if "pattern" in note]
    assert notes == ["the pattern 'nowhere' names no module of this graph"]


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("layers.[0-11].up", set(range(12))),
        ("layers.[1,9-10]", {1, 9, 10}),
        ("layers.[01]", {0, 1}),
        ("layers.1?", {10, 11, 12}),
        ("*.[3-4].*", {3, 4}),
        ("*", set(range(13))),
    ],
)
def test_patterns_have_numbers_as_the_report_writes_them(pattern: str, numbers: set[int]) -> None:
    wishes = Exclusions(exclude=(pattern,)).within([])
    assert {number for number in range(13) if wishes.excluded(f"layers.{number}.up")} == numbers
    assert not Exclusions(exclude=(pattern,)).unused(["layers.3.up", "layers.9.up", "layers.10.up", "layers.1.up"])


def test_nobody_is_told_that_nothing_was_rewritten(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moecompile"):
        compiled(Plain())(torch.randn(8, H).bfloat16())
        assert not caplog.text
        compiled(Plain().float())(torch.randn(8, H))
    assert "nothing of it is cast to FP8: float32: only products in bfloat16 and float16 are cast" in caplog.text


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.3.mlp.experts.7.w1", ("model.layers", 3)),
        ("0.weight", ("", 0)),
        ("lm_head", ("", None)),
        ("visual.blocks.12", ("visual.blocks", 12)),
    ],
)
def test_layers_are_counted_by_the_outermost_number(module: str, layer: tuple[str, int | None]) -> None:
    assert layer_of(module) == layer


def test_lists_of_layers_have_ends_of_their_own() -> None:
    modules = [f"{tower}.{number}.proj" for tower, count in (("visual", 2), ("text", 4)) for number in range(count)]
    found = Exclusions(last_layers=1).within(modules)
    assert [module for module in modules if found.excluded(module)] == ["visual.1.proj", "text.3.proj"]
    assert Wishes().excluded("text.3.proj") is None
    assert Exclusions(first_layers=3, last_layers=3).within([]).edges == {}


def test_explain_shows_the_table() -> None:
    report = moecompile.explain(Plain(), torch.randn(8, H).bfloat16(), moecompile_options={"precision": "fp8"})
    assert {row.module for row in report.casts if row.cast} == ALL and "FP8: 6 cast, 1 kept" in str(report)
    assert not moecompile.explain(Plain(), torch.randn(8, H).bfloat16()).casts
    with pytest.raises(ValueError, match="unknown option 'precison'"):
        moecompile.explain(Plain(), torch.randn(8, H).bfloat16(), moecompile_options={"precison": "fp8"})
