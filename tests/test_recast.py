"""The option `fp8_recast_weights`: the same numbers, and transposed copies of matrices that nobody holds."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.utils import fresh_cache

import moecompile
from moecompile.lowering import eager
from moecompile.passes.recast import recast
from moecompile.pipeline import run_passes
from moecompile.report import GraphReport
from test_cached_weights import Checkpointed
from test_conversion import Called
from test_fp8_models import model_of
from test_precision import GRADIENT, block_of, relative, run
from tiny_transformers import known_to_transformers

EACH: dict[str, Any] = {"precision": "fp8", "lowering": "eager"}
RECAST: dict[str, Any] = {**EACH, "fp8_recast_weights": True}
QUANTIZE = "moecompile.quantize_weights("


def trained(module: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> tuple[list[Tensor], GraphReport]:
    """Its result and gradients, and what was compiled."""
    torch._dynamo.reset()
    moecompile.reset()
    made = copy.deepcopy(module)
    made.compile(backend="moecompile", options=options, fullgraph=True)
    result, gradients = run(made, inputs)
    (graph,) = moecompile.last_report().graphs
    return [result, *gradients.values()], graph


def same(found: list[Tensor], expected: list[Tensor], lowering: str = "eager") -> bool:
    """Bit for bit; under Inductor, which may fuse the rest otherwise, as near as other roundings allow."""
    pairs = list(zip(found, expected, strict=True))
    if lowering == "eager":
        return all(torch.equal(*pair) for pair in pairs)
    return all(relative(*pair) < GRADIENT for pair in pairs)


def casts_of(graph: GraphReport) -> tuple[int, int]:
    """How many there are in the forward, and in the backward."""
    assert graph.forward and graph.backward
    return graph.forward.count(QUANTIZE), graph.backward.count(QUANTIZE)


def held(graph: GraphReport) -> list[str]:
    """Of how many matrices copies are said to be held."""
    notes = [note for note in graph.notes if "transposed copies" in note]
    return [note.split(" are held")[0].rpartition("copies of ")[2] for note in notes]


CHOICES: list[dict[str, Any]] = [{}, {"recompute": True}, {"fp8_scale_format": "float32"}]
COMPILED = (("qwen3_moe", CHOICES[1]),)
"""Which of them go through Inductor always: that takes a minute each on two cores."""


@pytest.mark.parametrize(
    ("name", "lowering", "more"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case[1] == "inductor" and case[::2] not in COMPILED else ())
        for case in itertools.product(("qwen3_moe", "deepseek_v3"), ("eager", "inductor"), CHOICES)
    ],
    ids=str,
)
def test_the_same_numbers(name: str, lowering: str, more: dict[str, Any]) -> None:
    """Of a whole layer: experts, and linear layers."""
    model, ids = model_of(name, layers=1)
    module, how = Called(model), {**more, "lowering": lowering}
    expected, before = trained(module, (ids,), **{**EACH, **how})
    found, after = trained(module, (ids,), **{**RECAST, **how})
    assert same(found, expected, lowering)
    casts, again = casts_of(before)
    assert casts >= 6 and again == ("recompute" in more)
    assert casts_of(after) == (casts, casts + again) and after.forward
    assert all("backward=False" in line for line in after.forward.splitlines() if QUANTIZE in line)


@pytest.mark.parametrize("name", known_to_transformers("mixtral", "gpt_oss"))
def test_blocks_of_other_kinds(name: str) -> None:
    """Gate and up interleaved, or of sizes that share blocks: what cannot be cast twice stays."""
    module, inputs = block_of(name)
    expected, _ = trained(module, inputs, **EACH)
    found, graph = trained(module, inputs, **RECAST)
    assert same(found, expected)
    assert casts_of(graph)[1] == 1 and held(graph) == ["1 of 2 casts"], "of down projections alone"


def test_what_is_held() -> None:
    """Of what the forward gives the backward, transposed copies are gone, and nothing has come."""
    sizes = []
    for joint in (None, recast):
        module, inputs = block_of("qwen3_moe")
        kept: list[fx.GraphModule] = []

        def backend(gm: fx.GraphModule, given: list[Any], joint: Any = joint, kept: Any = kept) -> Any:
            run_passes(gm, moecompile.Options(precision="fp8"), GraphReport.of(gm))
            return eager(gm, given, joint=joint, seen=lambda kind, graph: kept.append(graph))

        torch._dynamo.reset()
        torch.compile(module, backend=backend, fullgraph=True)(*inputs)
        (output,) = kept[0].graph.find_nodes(op="output")
        values = [each.meta["val"] for each in output.all_input_nodes if each.op != "placeholder"]
        sizes.append(sum(each.nbytes for each in values if isinstance(each, Tensor)))
    down = module.get_parameter("experts.down_proj")  # gate and up share a block
    assert sizes[0] - sizes[1] == len(down) * (128 * 128 + 4)


class Twice(nn.Module):
    """A matrix that is read by two layers, and one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(128, 128, dtype=torch.bfloat16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z: Tensor = self.second(torch.relu(self.first(y)) + y)
        return z


def test_layers_that_share_a_matrix() -> None:
    module, x = Twice(), torch.randn(70, 128).bfloat16().requires_grad_()
    expected, _ = trained(module, (x,), **EACH)
    found, graph = trained(module, (x,), **RECAST)
    assert same(found, expected)
    assert casts_of(graph) == (2, 2)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_matrices_written_before_the_backward_are_an_error(lowering: str) -> None:
    """As of every layer whose matrix its backward reads; writes through `.data` are nobody's to notice."""
    module = Twice()
    module.compile(backend="moecompile", options={**RECAST, "lowering": lowering})
    result = module(torch.randn(70, 128).bfloat16().requires_grad_())
    with torch.no_grad():
        module.first.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_checkpointed_regions_stay() -> None:
    module, x = Checkpointed(Twice()), torch.randn(70, 128).bfloat16().requires_grad_()
    expected, before = trained(module, (x,), **EACH)
    found, after = trained(module, (x,), **RECAST)
    assert same(found, expected) and after.forward == before.forward and after.backward == before.backward
    assert before.backward and QUANTIZE in before.backward


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_under_autocast_the_conversion_is_made_again_too(lowering: str) -> None:
    """Of float32 parameters, which are held anyway; the partitioner would rather hold a byte than convert to two."""

    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Twice().float()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                found: Tensor = self.inner(x)
                return found

    module, x = Autocast(), torch.randn(70, 128).requires_grad_()
    expected, before = trained(module, (x,), **{**EACH, "lowering": lowering})
    found, after = trained(module, (x,), **{**RECAST, "lowering": lowering})
    assert same(found, expected, lowering) and casts_of(before) == (2, 0) and casts_of(after) == (2, 2)
    assert not held(after)


class Doubled(Twice):
    """One of its matrices is written before it is read."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.weight.mul_(2)
        return super().forward(x)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_computed_matrices_keep_their_copies(lowering: str) -> None:
    module, x = Doubled(), torch.randn(70, 128).bfloat16().requires_grad_()
    expected, before = trained(module, (x,), **{**EACH, "lowering": lowering})
    found, after = trained(module, (x,), **{**RECAST, "lowering": lowering})
    assert same(found, expected, lowering) and casts_of(before) == (2, 0) and casts_of(after) == (2, 1)
    assert held(after) == ["1 of 2 casts"] and not held(before)


def test_what_is_said_is_remembered_with_compiled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path))
    module, x = Doubled(), torch.randn(70, 128).bfloat16().requires_grad_()
    how = {**RECAST, "lowering": "inductor"}
    with fresh_cache():
        (_, first), (_, second) = (trained(module, (x,), **how) for _ in range(2))
    assert (first.cached, second.cached) == ("miss", "hit")
    assert held(first) == held(second) == ["1 of 2 casts"]


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("frozen", [False, True], ids=["no gradients", "frozen"])
def test_without_a_backward_all_is_as_it_was(frozen: bool, lowering: str) -> None:
    module, inputs = block_of("qwen3_moe")
    module.requires_grad_(not frozen)
    texts = []
    for options in (EACH, RECAST):
        torch._dynamo.reset()
        moecompile.reset()
        made = copy.deepcopy(module)
        made.compile(backend="moecompile", options={**options, "lowering": lowering}, fullgraph=True)
        with torch.set_grad_enabled(frozen):
            made(*(each.detach() for each in inputs))
        (graph,) = moecompile.last_report().graphs
        texts.append(graph.forward)
    assert texts[0] == texts[1] and texts[0] is not None and texts[0].count(QUANTIZE) == 2


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="keeps the copies that `fp8_recast_weights` is to save"):
        moecompile.Options(precision="fp8", fp8_cache_weights=True, fp8_recast_weights=True)
    with pytest.raises(ValueError, match="is about FP8"):
        moecompile.Options(fp8_recast_weights=True)
