"""The compiler on a GPU: every form, whole models, and CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import moecompile
from moecompile.passes.forms import FORMS
from zoo_case import Case, arguments, make
from zoo_forms import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
TOKENS = 64


def error(expected: Tensor, got: Tensor) -> float:
    """The relative error of a tensor."""
    difference = (got.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp_min(1e-30))


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def runs_on_the_gpu(case: Case) -> bool:
    """Whether the spelling makes its own tensors where its inputs are; some of the zoo make them on the CPU."""
    try:
        make(case).cuda()(*on_the_gpu(arguments(case, TOKENS)))
    except RuntimeError:
        return False
    return True


def on_the_gpu(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.cuda() for value in inputs)


@pytest.mark.parametrize("form", [form.name for form in FORMS])
def test_every_form(form: str) -> None:
    """Outputs and gradients of all spellings that run on a GPU, against eager there."""
    cases = [case for case in CASES if case.form == form and runs_on_the_gpu(case)]
    assert cases, f"no spelling of {form} runs on a GPU"
    for case in cases:
        check_case(case)


def check_case(case: Case) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    moecompile.reset()
    model: nn.Module = make(case).cuda()
    inputs = on_the_gpu(arguments(case, TOKENS))
    compiled = copy.deepcopy(model)
    fast = torch.compile(compiled, backend="moecompile", options={"lowering": "eager"}, fullgraph=case.fullgraph)
    expected, got = first(model(*inputs)), first(fast(*inputs))
    assert len(moecompile.last_report().sites) == 1, (case.name, moecompile.last_report().near_misses)
    expected.float().square().sum().backward()
    got.float().square().sum().backward()
    exact = expected.dtype == torch.float32 and "bfloat16" not in moecompile.last_report().sites[0].dtype
    output_bound, gradient_bound = (1e-5, 1e-4) if exact else (3e-2, 6e-2)
    assert error(expected, got) <= output_bound, case.name
    for (name, wanted), parameter in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert (wanted.grad is None) == (parameter.grad is None), (case.name, name)
        if wanted.grad is not None and parameter.grad is not None:
            assert error(wanted.grad, parameter.grad) <= gradient_bound, (case.name, name)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss"])
def test_models_of_transformers_in_bfloat16(architecture: str) -> None:
    """Whose graphs are others on a GPU than on a CPU: what is sorted and counted, and which products there are."""
    pytest.importorskip("transformers")
    from tiny_transformers import build_model

    model = build_model(architecture, torch.bfloat16).cuda()
    blocks = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    tokens = torch.randint(3, 250, (2, 32), device="cuda")
    compiled = torch.compile(copy.deepcopy(model), backend="moecompile", options={"lowering": "eager"})
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits.double()
        found = compiled(input_ids=tokens, use_cache=False).logits.double()
    assert [len(graph.sites) for graph in moecompile.last_report().graphs] == [len(blocks)] and blocks
    # of most tokens: where two experts are almost as good, rounding decides
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) <= 0.05


def test_copies_of_weights_that_are_kept() -> None:
    """Three steps of twice the same tokens, with a fused optimizer: as with copies made in every forward."""
    pytest.importorskip("transformers")
    from tiny_transformers import build_model

    losses = []
    for kept in (True, False):
        torch._dynamo.reset()
        model = build_model("qwen3_moe", torch.bfloat16).cuda()
        model.compile(backend="moecompile", options={"precision": "fp8", "fp8_cache_weights": kept})
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
        torch.manual_seed(0)
        tokens = torch.randint(3, 250, (2, 32), device="cuda")
        for step in range(6):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            losses.append(float(loss))
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert losses[:6] == pytest.approx(losses[6:], rel=1e-4)
    assert abs(losses[0] - losses[5]) > 1e-2 * losses[0], "nothing was learnt"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_whole_model(mode: str) -> None:
    """Qwen3-MoE, another routing in every step; in CUDA graphs if the mode asks for them."""
    pytest.importorskip("transformers")
    from tiny_transformers import build_model

    model = build_model("qwen3_moe").cuda()
    compiled = copy.deepcopy(model)
    counters.clear()
    fast = torch.compile(compiled, backend="moecompile", mode=mode)
    for step in range(4):
        torch.manual_seed(step)
        tokens = torch.randint(3, 250, (2, 32), device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            expected = model(input_ids=tokens, use_cache=False).logits
            assert error(expected, fast(input_ids=tokens, use_cache=False).logits) <= 1e-4
    for step in range(4):
        torch.manual_seed(step)
        tokens = torch.randint(3, 250, (2, 32), device="cuda")
        for each in (model, compiled):
            each.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        fast(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        for (name, wanted), parameter in zip(model.named_parameters(), compiled.parameters(), strict=True):
            assert wanted.grad is not None and parameter.grad is not None, name
            assert error(wanted.grad, parameter.grad) <= 1e-3, name
    assert {len(graph.sites) for graph in moecompile.last_report().graphs} == {2}
    if mode == "reduce-overhead":
        from torch._inductor import cudagraph_trees

        assert counters["inductor"]["cudagraph_skips"] == 0
        manager = cudagraph_trees.get_container(torch.cuda.current_device()).tree_manager
        assert manager is not None and manager.new_graph_id().id > 0, "nothing was captured"
