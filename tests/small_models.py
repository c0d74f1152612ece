"""Small models with mixture-of-experts blocks, for what has nothing to do with the form of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moecompile.backend import moecompile

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 32, 48, 4, 2


class Experts(nn.Module):
    """A mixture of experts in the form "batched_mm", float32, shapes (tokens, HIDDEN)."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K, dim=-1)
        expert = ids.reshape(-1)
        rows = x.repeat_interleave(TOP_K, dim=0).unsqueeze(-1)
        gate, up = torch.bmm(self.w_in[expert], rows).squeeze(-1).chunk(2, dim=-1)
        hidden = (F.silu(gate) * up).unsqueeze(-1)
        rows = torch.bmm(self.w_out[expert], hidden).squeeze(-1) * weights.reshape(-1, 1)
        return rows.view(-1, TOP_K, HIDDEN).sum(dim=1)


def block(seed: int = 0) -> nn.Module:
    """A block with weights that depend on `seed` only."""
    torch.manual_seed(seed)
    return Experts()


class Layer(nn.Module):
    """x + moe(norm(x)), shapes (tokens, HIDDEN)."""

    def __init__(self, seed: int = 0, moe: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.moe = block(seed=seed) if moe is None else moe

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Model(nn.Module):
    """Layers between two linears; `around` runs each layer, as activation checkpointing does."""

    def __init__(self, layers: int = 2, around: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, HIDDEN)
        self.layers = nn.ModuleList(Layer(seed=number) for number in range(layers))
        self.head = nn.Linear(HIDDEN, 8)
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x) if self.around is None else self.around(layer, x)
        return self.head(x)


def inputs(tokens: int = 12, seed: int = 1) -> Tensor:
    """Inputs of a `Model`, shape (tokens, 8)."""
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))


def compiled(model: Callable[..., Any], *, fullgraph: bool = True, dynamic: bool | None = None, **options: Any) -> Any:
    """The model compiled by moecompile, run by PyTorch unless `options` say otherwise."""
    options = {"lowering": "eager"} | options
    return torch.compile(model, backend=moecompile, fullgraph=fullgraph, dynamic=dynamic, options=options)


def assert_same(model: nn.Module, fast: Callable[..., Tensor], x: Tensor) -> None:
    """Outputs and all gradients of the two callables, `model` owning the parameters, agree."""
    results = []
    for function in (model, fast):
        model.zero_grad()
        function(x).square().sum().backward()
        results.append([function(x).detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 1
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
