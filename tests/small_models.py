"""Small models around one block of the zoo, for what has nothing to do with the form of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import zoo_forms
from moecompile.backend import moecompile
from zoo_case import make

HIDDEN = 32


def block(name: str = "batched_control", seed: int = 0) -> nn.Module:
    """A mixture-of-experts block of the zoo; "batched_control" is float32 and quick."""
    return make(zoo_forms.case(name), seed)


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
