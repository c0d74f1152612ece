"""Shared by test_attacks_*.py: blocks with something in them that is easy to get wrong, and the comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

import moecompile
from moecompile.passes.detect import detect
from moecompile.passes.site import Detection, Site

E, H, K, T = 6, 16, 2, 10
Ids = Callable[[Tensor], tuple[Tensor, Tensor]]


class Experts(nn.Module):
    """Gathered weights and batched products; `route` turns logits into weights and ids (T, choices)."""

    def __init__(self, route: Ids | None = None, logits: int = E) -> None:
        super().__init__()
        self.route = route
        self.router = nn.Linear(H, logits, bias=False)
        self.w_in = nn.Parameter(torch.randn(E, H, 24) / 4)
        self.w_out = nn.Parameter(torch.randn(E, 24, H) / 4)

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        if self.route is not None:
            return self.route(logits)
        weights, ids = logits.softmax(-1).topk(K)
        return weights, ids

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(x)
        flat, rows = ids.reshape(-1), x.repeat_interleave(ids.shape[1], 0)
        hidden = torch.relu(torch.bmm(rows.unsqueeze(1), self.w_in[flat]))
        out = torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
        return out.view(x.shape[0], ids.shape[1], H).sum(1)


class Dense(Experts):
    """Every expert on every token, weighted by gates that were scattered."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(x)
        gates = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        hidden = torch.relu(torch.einsum("th,ehi->eti", x, self.w_in))
        return torch.einsum("te,eth->th", gates, torch.einsum("eti,eih->eth", hidden, self.w_out))


class Loop(Experts):
    """A loop over all experts on the tokens that chose them, whichever choice it was."""

    def forward(self, x: Tensor) -> Tensor:
        _, ids = self.routed(x)
        out = torch.zeros_like(x)
        for expert in range(E):
            (tokens,) = (ids == expert).any(-1).nonzero(as_tuple=True)
            out.index_add_(0, tokens, torch.relu(x[tokens] @ self.w_in[expert]) @ self.w_out[expert])
        return out


def check(model: nn.Module, sites: int | None = None, tolerance: float = 1e-4) -> None:
    """The compiled model computes what the model does, for several routings; and has that many Sites."""
    compiled = copy.deepcopy(model)
    compiled.compile(backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(T, H)
        expected, got = model(x.clone()), compiled(x.clone())
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance / 10)
        cotangent = torch.randn_like(expected)
        expected.backward(cotangent)
        got.backward(cotangent)
        for wanted, parameter in zip(model.parameters(), compiled.parameters(), strict=True):
            assert (wanted.grad is None) == (parameter.grad is None)
            if wanted.grad is not None:
                torch.testing.assert_close(parameter.grad, wanted.grad, rtol=10 * tolerance, atol=tolerance)
    if sites is not None:
        assert len(moecompile.last_report().sites) == sites, moecompile.last_report().near_misses


def check_inference(model: nn.Module, x: Tensor) -> None:
    """The same without gradients, for inputs of one's own."""
    compiled = torch.compile(model, backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def sites_of(model: nn.Module) -> tuple[Site, ...]:
    """What is found in a model that must not run: eager itself reads or leaves memory that nothing was written to."""
    found: list[Detection] = []

    def backend(gm: fx.GraphModule, _: object) -> Callable[..., object]:
        found.append(detect(gm.graph))
        raise RuntimeError("enough seen")

    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="enough seen"):
        torch.compile(model, backend=backend, fullgraph=True)(torch.randn(T, H))
    assert found[0].sites or found[0].near_misses
    return found[0].sites
