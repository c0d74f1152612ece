"""The tiny models of transformers: every architecture builds, runs and routes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tiny_sizes import Sizes

pytest.importorskip("transformers")

from tiny_transformers import (
    IMPLEMENTATIONS,
    OWN_CODE,
    architectures,
    build_block,
    build_model,
    experts_of,
    known_to_transformers,
)

ALL = (*architectures(), *OWN_CODE)


def tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def test_the_architectures_are_found() -> None:
    assert len(architectures()) >= 40, f"only {architectures()}"
    assert {"mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"} <= set(architectures())


@pytest.mark.parametrize("name", ALL)
def test_block_runs_and_its_experts_get_gradients(name: str) -> None:
    block = build_block(name)
    assert block.experts == 1, f"{block.path} holds {block.experts} experts modules"
    outputs = tensors(block.module(*block.inputs))
    assert outputs[0].isfinite().all()
    assert 0.3 < outputs[0].std() < 12.0, "outputs should be of order one"
    outputs[0].square().sum().backward()
    path, experts = experts_of(block.module)[0]
    for parameter_name, parameter in experts.named_parameters():
        assert parameter.grad is not None, f"{path}.{parameter_name} has no gradient"
        if parameter.dim() == 3:
            hit = parameter.grad.flatten(1).abs().amax(1) > 0
            assert hit.sum() * 2 > len(hit), f"tokens reach only {int(hit.sum())} of {len(hit)} experts of {path}"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", known_to_transformers("inkling2", "gpt_oss", "zaya", "gemma4"))
def test_block_runs_in_bfloat16(name: str, implementation: str) -> None:
    block = build_block(name, torch.bfloat16, implementation)
    output = tensors(block.module(*block.inputs))[0]
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


@pytest.mark.parametrize("name", known_to_transformers("mixtral", "muse_spark", "ernie4_5_vl_moe", "deepseek_v4"))
def test_sizes_reach_the_experts(name: str) -> None:
    block = build_block(name, sizes=Sizes(hidden=256, intermediate=128, experts=16, top_k=4), tokens=8)
    stacked = [p for _, p in experts_of(block.module)[0][1].named_parameters() if p.dim() == 3]
    assert {size for parameter in stacked for size in parameter.shape} == {16, 256, 128}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_whole_model_runs(name: str) -> None:
    model = build_model(name)
    output = tensors(list(model(input_ids=torch.randint(3, 256, (2, 12)), use_cache=False).values()))[0]
    assert output.isfinite().all()
    assert len(experts_of(model)) >= 2
