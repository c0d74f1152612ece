"""The option `precision="fp8"`: experts' matrices are cast in the graph; what cannot be stays, with the reason."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moecompile
from moecompile import remarks
from tiny_sizes import Sizes
from tiny_transformers import build_block, known_to_transformers

# An FP8 operand is off by 0.027 of its norm (facts of e4m3 with power-of-two scales: half a unit in the fourth bit,
# root mean square); a result has passed four of them, a gradient up to six, beside bfloat16's own rounding.
RESULT, GRADIENT = 0.09, 0.15
LLAMA4 = known_to_transformers("llama4")


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def run(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    result = module(*inputs)
    result = result[0] if isinstance(result, tuple) else result
    torch.manual_seed(7)
    result.backward(torch.randn_like(result))
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return result.detach(), gradients


def block_of(name: str, **overrides: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    block = build_block(name, torch.bfloat16, sizes=Sizes(hidden=64), tokens=48, **overrides)
    return block.module.requires_grad_(), block.inputs


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("name", known_to_transformers("qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"))
def test_a_training_step(name: str, lowering: str) -> None:
    module, inputs = block_of(name)
    expected, of_expected = run(copy.deepcopy(module), inputs)
    module.compile(backend="moecompile", options={"precision": "fp8", "lowering": lowering}, fullgraph=True)
    found, of_found = run(module, inputs)
    assert 1e-3 < relative(found, expected) < RESULT
    assert of_found.keys() == of_expected.keys()
    for each, gradient in of_expected.items():
        assert of_found[each].dtype == gradient.dtype and of_found[each].stride() == gradient.stride()
        assert relative(of_found[each], gradient) < GRADIENT, each
    (graph,) = moecompile.last_report().graphs
    changes = {record.name: record.changes for record in graph.passes}["precision"]
    assert changes["moecompile.quantize_weights"] == (0, 2)
    assert changes["moecompile.experts"] == (1, 0) and changes["moecompile.experts_fp8"] == (0, 1)


def test_emulation_is_noted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where kernels run nothing is said; on a GPU without them the log says it, too."""
    module, inputs = block_of("qwen3_moe")
    said = "FP8 is emulated on cpu: the numbers of a Hopper GPU, slowly"
    for kernels, expected in ((False, [said]), (True, [])):
        monkeypatch.setattr(remarks, "has_kernels", lambda device, kernels=kernels: kernels)
        report = moecompile.explain(module, *inputs, moecompile_options={"precision": "fp8"})
        assert [note for note in report.graphs[0].notes if "emulated" in note] == expected
    assert "emulated" not in caplog.text
    for dtype, kernels, words in (
        (torch.bfloat16, False, "FP8 is emulated on cuda: the numbers of a Hopper GPU, slowly"),
        (torch.float16, True, "FP8 of float16 models is emulated, slowly: cast the model to bfloat16"),
    ):
        found = [(torch.device("cuda", 0), dtype)]
        monkeypatch.setattr(remarks, "_multiplied", lambda graph, found=found: found)
        monkeypatch.setattr(remarks, "has_kernels", lambda device, kernels=kernels: kernels)
        moecompile.explain(module, *inputs, moecompile_options={"precision": "fp8"})
        assert words in caplog.text


def test_inference_saves_nothing() -> None:
    module, inputs = block_of("qwen3_moe")
    module.compile(backend="moecompile", options={"precision": "fp8", "lowering": "eager"}, fullgraph=True)
    with torch.no_grad():
        found = module(*inputs)
    text = moecompile.last_report().graphs[0].forward
    assert text is not None and "experts_fp8" in text and "experts_fp8_forward" not in text
    module.zero_grad()
    trained, _ = run(module, inputs)
    assert torch.equal(found, trained)


def test_other_token_counts_compile_at_most_twice() -> None:
    torch._dynamo.utils.counters.clear()
    module, (x,) = block_of("qwen3_moe")
    reference = copy.deepcopy(module)
    module.compile(
        backend="moecompile", options={"precision": "fp8", "lowering": "eager"}, fullgraph=True, dynamic=True
    )
    for tokens in (8, 12, 17, 24):
        with torch.no_grad():
            given = x[:, :tokens].contiguous()
            assert relative(module(given), reference(given)) < RESULT
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_the_router_and_the_weights_stay() -> None:
    module, inputs = block_of("deepseek_v3")
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    module.compile(backend="moecompile", options={"precision": "fp8", "lowering": "eager"}, fullgraph=True)
    run(module, inputs)
    for name, parameter in module.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name])
    after = moecompile.last_report().graphs[0].after
    assert after.count("quantize_weights") == 2, "something else than the experts' matrices is cast"


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("qwen3_moe", torch.float32, "x and the weights must be bfloat16 or float16, got torch.float32"),
        # each assignment's row is another: there is no token to quantise once
        *(pytest.param(*each.values, torch.bfloat16, "input must be 'x'", marks=each.marks) for each in LLAMA4),
    ],
)
def test_what_stays_is_said(name: str, dtype: torch.dtype, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    block = build_block(name, dtype)
    expected = block.module(*block.inputs)
    block.module.compile(backend="moecompile", options={"precision": "fp8", "lowering": "eager"}, fullgraph=True)
    with caplog.at_level(logging.WARNING, "moecompile"):
        found = block.module(*block.inputs)
    both = (value[0] if isinstance(value, tuple) else value for value in (found, expected))
    assert relative(*both) < (1e-5 if dtype == torch.float32 else 1e-2)
    (graph,) = moecompile.last_report().graphs
    assert any("stay in their precision" in note and reason in note for note in graph.notes)
    assert reason in caplog.text and "experts_fp8(" not in graph.after


def test_the_pass_can_be_left_out() -> None:
    module, inputs = block_of("qwen3_moe")
    options = {"precision": "fp8", "lowering": "eager", "disable": ("precision",)}
    module.compile(backend="moecompile", options=options, fullgraph=True)
    module(*inputs)
    (graph,) = moecompile.last_report().graphs
    assert "pass precision is disabled" in graph.notes and "experts_fp8" not in graph.after


def test_without_the_option_nothing_is_cast() -> None:
    module, inputs = block_of("qwen3_moe")
    module.compile(backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    module(*inputs)
    (graph,) = moecompile.last_report().graphs
    assert [record.name for record in graph.passes] == ["detect", "fuse"] and "quantize" not in graph.after


def test_golden(golden) -> None:
    """The graph of a block as captured, rewritten and cast."""
    module, inputs = block_of("qwen3_moe")
    module.compile(backend="moecompile", options={"precision": "fp8", "lowering": "eager"}, fullgraph=True)
    module(*inputs)
    (graph,) = moecompile.last_report().graphs
    golden("precision_qwen3_moe", re.sub(r"  # .*", "", graph.after))  # lines of another package's sources move


def test_inference_casts_for_itself_alone() -> None:
    """The transposed copies are the backward's; a graph that records gradients in a part has them."""
    module, inputs = block_of("qwen3_moe")
    with torch.no_grad():
        plain = copy.deepcopy(module)(*inputs)
    expected = plain[0] if isinstance(plain, tuple) else plain

    def recording(*given: Tensor) -> Tensor:
        with torch.enable_grad():
            result = module(*given)
        return result[0] if isinstance(result, tuple) else result

    for function, backward in ((module, False), (recording, True)):
        moecompile.reset()
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="moecompile", options={"precision": "fp8", "lowering": "eager"})
        with torch.no_grad():
            found = compiled(*inputs)
        assert relative(found[0] if isinstance(found, tuple) else found, expected) < RESULT
        (graph,) = moecompile.last_report().graphs
        assert graph.after is not None and graph.after.count("backward=False") == (0 if backward else 2)


def test_copies_for_inference_alone_cannot_be_trained_with() -> None:
    ops = torch.ops.moecompile
    module, (x, *_) = block_of("qwen3_moe")
    w_in, w_out = (each for each in module.parameters() if each.dim() == 3)
    x = x.reshape(-1, x.shape[-1]).detach().requires_grad_()
    _, *plan = ops.plan(torch.arange(len(x)).view(-1, 1) % len(w_in), len(w_in))
    cast = (
        *ops.quantize_weights(w_in, gate_up="halves", backward=False),
        *ops.quantize_weights(w_out, backward=False),
    )
    attributes = {"activation": "mul(silu(gate), up)", "gate_up": "halves", "output": "out", "quantized": [*cast]}
    with torch.no_grad():
        ops.experts_fp8(x, None, *plan, w_in, w_out, **attributes)
    with pytest.raises(ValueError, match=r"w_in_t of quantized .* a backward needs copies of backward=True"):
        ops.experts_fp8(x, None, *plan, w_in, w_out, **attributes)
