"""Blocks of float32 weights under autocast: every product inside is converted unseen, and detection reads it so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import moecompile
from zoo_case import arguments, make
from zoo_forms import case

NAMES = (
    "repeated_rows",
    "token_index_einsum",
    "expanded_matmul",
    "fused_bias_top_one",
    "scattered_infinity",
    "scattered_gates",
    "masked_softmax",
    "stacked_experts",
    "gshard_top_two",
    "gshard_top_k",
    "switch_top_one",
    "switch_groups",
    "conditional_feed_forward",
    "flat_assignments",
    "sequence_einsum",
    "selected_by_index",
)


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def error(expected: Tensor, got: Tensor) -> float:
    """The relative error of a tensor."""
    difference = (got.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_rewritten_and_equal(name: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = make(case(name)).float()
    inputs = [
        value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in arguments(case(name), 8)
    ]
    compiled = copy.deepcopy(model)
    compiled.compile(backend="moecompile", options={"lowering": "eager"})
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = first(model(*inputs)), first(compiled(*inputs))
    assert len(moecompile.last_report().sites) == 1, moecompile.last_report().near_misses
    assert moecompile.last_report().sites[0].dtype == "bfloat16"
    assert got.dtype == expected.dtype
    assert error(expected, got) <= 3e-2
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    got.backward(cotangent)
    for wanted, parameter in zip(model.parameters(), compiled.parameters(), strict=True):
        assert (wanted.grad is None) == (parameter.grad is None)
        if wanted.grad is not None and parameter.grad is not None:
            assert parameter.grad.dtype == wanted.grad.dtype
            assert error(wanted.grad, parameter.grad) <= 6e-2


def test_a_sum_that_begins_with_another_dtype_keeps_it() -> None:
    """Zeros of float32 make the sum of bfloat16 terms float32, autocast or not."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(32, 4).bfloat16()
            self.up = nn.Parameter(torch.randn(4, 48, 32).bfloat16() / 6)
            self.down = nn.Parameter(torch.randn(4, 32, 48).bfloat16() / 6)

        def forward(self, x: Tensor) -> Tensor:
            probabilities, ids = self.router(x).softmax(-1).topk(2)
            gates = torch.zeros(x.shape[0], 4, dtype=x.dtype).scatter(1, ids, probabilities)
            out = torch.zeros(x.shape, dtype=torch.float32)
            for expert in range(4):
                hidden = torch.relu(x @ self.up[expert].T)
                out = out + gates[:, expert, None] * (hidden @ self.down[expert].T)
            return out

    model, x = Model(), torch.randn(12, 32).bfloat16()
    expected = model(x)
    compiled = torch.compile(model, backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    got = compiled(x)
    (site,) = moecompile.last_report().sites
    assert site.out_dtype == torch.float32
    assert got.dtype == expected.dtype == torch.float32
    assert error(expected, got) <= 1e-2
