"""The architectures of transformers: their MoE blocks alone, and whole models.

A few architectures run always; all of them with `pytest -m slow tests/test_transformers.py`.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import moecompile

pytest.importorskip("transformers")

from moecompile.report import Report
from tiny_transformers import OWN_CODE, architectures, build_block, build_model, experts_of, known_to_transformers

QUICK = ("deepseek_v3", "deepseek_v4", "gpt_oss", "inkling2", "nemotron_h", "phimoe", "qwen3_moe", "zaya")
QUICK_MODELS = ("qwen3_moe", "deepseek_v3", "gpt_oss")
COLUMNS = (
    ("grouped_mm", torch.bfloat16),
    ("grouped_mm", torch.float32),
    ("batched_mm", torch.float32),
)
# worst tensor, relative: (outputs, gradients)
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (3e-2, 6e-2)}
REFUSED = {"muse_spark": "rms"}  # a norm of each row between the second GEMM and the weights: row statistics


def marked(names: tuple[str, ...], quick: tuple[str, ...]) -> list[Any]:
    """Names as test parameters, those that are not quick marked slow; quick ones that are not there are skipped."""
    return [
        pytest.param(*known.values, marks=known.marks if known.values[0] in quick else (*known.marks, pytest.mark.slow))
        for known in known_to_transformers(*sorted({*names, *quick}))
    ]


def floats(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def worst(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest relative error of a tensor."""
    assert len(expected) == len(got)
    errors = [0.0]
    for wanted, tensor in zip(expected, got, strict=True):
        scale = wanted.detach().double().norm()
        difference = (tensor.detach().double() - wanted.detach().double()).norm()
        errors.append(float(difference / scale) if scale > 0 else float(difference))
    assert not any(math.isnan(error) for error in errors)
    return max(errors)


def run(module: nn.Module, call: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of all parameters for a random cotangent."""
    outputs = floats(call(module))
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(output.shape, generator=generator) for output in outputs]
    terms = [(out.float() * c).sum() for out, c in zip(outputs, cotangents, strict=True) if out.requires_grad]
    torch.stack(terms).sum().backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
    return [output.detach() for output in outputs], gradients


def check(module: nn.Module, call: Any, dtype: torch.dtype) -> Report:
    """Compile a copy, compare with eager, return the report."""
    compiled = copy.deepcopy(module)
    compiled.compile(backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    outputs, gradients = run(module, call)
    got_outputs, got_gradients = run(compiled, call)
    output_bound, gradient_bound = BOUNDS[dtype]
    assert worst(outputs, got_outputs) <= output_bound
    assert worst(gradients, got_gradients) <= gradient_bound
    return moecompile.last_report()


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: f"{column[0]}-{str(column[1])[6:]}")
@pytest.mark.parametrize("name", marked(architectures(), QUICK))
def test_block(name: str, column: tuple[str, torch.dtype]) -> None:
    implementation, dtype = column
    block = build_block(name, dtype, implementation)
    report = check(block.module, lambda module: module(*block.inputs), dtype)
    if name in REFUSED:
        assert not report.sites
        assert report.near_misses and all(miss.reason for miss in report.near_misses)
    else:
        assert len(report.sites) == block.experts, report.near_misses


@pytest.mark.parametrize("name", [name for name in OWN_CODE if name != "jetmoe"])
def test_own_code_block(name: str) -> None:
    block = build_block(name)
    report = check(block.module, lambda module: module(*block.inputs), torch.float32)
    assert len(report.sites) == 1, report.near_misses


# whole models that Dynamo or eager autograd cannot run, with what they say
NOT_COMPILED = {
    "glm4v_moe": "needs image positions",
    "qwen3_next": "eager autograd of its linear attention fails under AOTAutograd",
    "qwen3_5_moe": "eager autograd of its linear attention fails under AOTAutograd",
    "qwen4_exp": "eager autograd of its linear attention fails under AOTAutograd",
}


@pytest.mark.parametrize("name", marked(tuple(n for n in architectures() if n not in NOT_COMPILED), QUICK_MODELS))
def test_whole_model(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_model(name)
    tokens = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(1))
    ran: set[nn.Module] = set()  # experts for images do not run on text
    hooks = [experts.register_forward_pre_hook(lambda module, _: ran.add(module)) for _, experts in experts_of(model)]
    model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    report = check(model, lambda module: module(input_ids=tokens, use_cache=False), torch.float32)
    assert ran
    assert len(report.sites) == (0 if name in REFUSED else len(ran)), report.near_misses


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(tuple(n for n in architectures() if n not in NOT_COMPILED), ()))
def test_whole_model_is_as_exact_as_inductors(name: str) -> None:
    """Through Inductor, no further from eager than twice what plain Inductor is, or than rounding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_model(name)
    tokens = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(1))
    outputs, gradients = run(copy.deepcopy(model), lambda module: module(input_ids=tokens, use_cache=False))
    errors = []
    for backend in ("inductor", "moecompile"):
        torch._dynamo.reset()
        compiled = copy.deepcopy(model)
        compiled.compile(backend=backend)
        got = run(compiled, lambda module: module(input_ids=tokens, use_cache=False))
        errors.append((worst(outputs, got[0]), worst(gradients, got[1])))
    plain, ours = errors
    for bound, expected, found in zip(BOUNDS[torch.float32], plain, ours, strict=True):
        assert found <= max(bound, 2 * expected), f"{found:.1e}, plain Inductor {expected:.1e}"


def test_twenty_routings_compile_once() -> None:
    torch._dynamo.utils.counters.clear()
    block = build_block("qwen3_moe")
    block.module.compile(backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    for seed in range(20):
        torch.manual_seed(seed)
        block.module(torch.randn_like(block.inputs[0]) * (1 + seed))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_twenty_token_counts_compile_at_most_twice() -> None:
    torch._dynamo.utils.counters.clear()
    model = build_model("qwen3_moe")
    reference = copy.deepcopy(model)
    model.compile(backend="moecompile", options={"lowering": "eager"}, fullgraph=True, dynamic=True)
    for tokens in range(3, 23):
        ids = torch.randint(3, 250, (2, tokens))
        got = model(input_ids=ids, use_cache=False).logits
        wanted = reference(input_ids=ids, use_cache=False).logits
        assert worst([wanted], [got]) <= BOUNDS[torch.float32][0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert len(moecompile.last_report().sites) >= 2
