"""Decoder layers whose experts ranks share, by moecompile and as PyTorch users write them: what `bench overlap` times.

    x += attention(norm(x))             causal, over whole sequences
    rows = norm(x)
    x += experts(rows) + shared(rows)   routed by scores that are given: no rounding decides which experts a token has

A batch is B sequences; micro-batches are halves of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

import moecompile
from moecompile import agreement, ordering, splitting
from moecompile.bench_cases import Shape
from moecompile.bench_ep_peers import Baseline, activated
from moecompile.bench_ep_ranks import Ranks
from moecompile.bench_ep_sharded import Experts

INDUCTOR, WHOLE, APART, HALVES = "Inductor, two halves", "ours, whole", "ours, two halves in turn", "ours, overlapped"
"""Contenders: the second half behind the first, with PyTorch's exchange; one batch; the same halves as the first, by
moecompile's exchange; and `microbatches=2`."""
OPTIONS: Mapping[str, dict[str, Any]] = {WHOLE: {}, APART: {"disable": ("hide",)}, HALVES: {"microbatches": 2}}
HEAD = 128
"""Features of a head of the attention."""


@dataclass(frozen=True)
class Case:
    """What is measured: experts (tokens are those of a rank), and so many sequences of each rank."""

    shape: Shape
    sequences: int

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.shape.tokens // self.sequences

    @property
    def title(self) -> str:
        """In print."""
        return f"{self.shape.title} a rank, {self.sequences} sequences"


class Layer(nn.Module):
    """One of them, whose experts are called with rows (T, H), ids (T, K) and weights (T, K)."""

    def __init__(self, shape: Shape, experts: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._shape, self.experts = shape, experts

        def linear(into: int, out: int) -> nn.Linear:
            return nn.Linear(into, out, bias=False, device=device, dtype=torch.bfloat16)

        hidden, inner = shape.hidden, shape.inner
        self.norms = nn.ModuleList([nn.RMSNorm(hidden, device=device, dtype=torch.bfloat16) for _ in range(2)])
        self.qkv, self.out = linear(hidden, 3 * hidden), linear(hidden, hidden)
        self.gate_up, self.down = linear(hidden, 2 * inner), linear(inner, hidden)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum with the attention's result (B, S, H), and what experts read of it (B * S, H)."""
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, -1, min(HEAD, self._shape.hidden)))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x, self.norms[1](x).flatten(0, 1)

    def shared(self, rows: Tensor) -> Tensor:
        """The expert of all tokens."""
        found: Tensor = self.down(activated(self.gate_up(rows)))
        return found

    def routed(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and weights (T, K) of scores (B, S, E)."""
        chosen, ids = scores.flatten(0, 1).topk(self._shape.top_k, -1)
        return ids, chosen.softmax(-1)

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        """Of x (B, S, H) and scores (B, S, E): (B, S, H)."""
        x, rows = self.attend(x)
        found: Tensor = x + (self.experts(rows, *self.routed(scores)) + self.shared(rows)).view_as(x)
        return found


class Layers(nn.Module):
    """One behind the other."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        """As of each."""
        for layer in self.layers:
            x = layer(x, scores)
        return x


class Plain:
    """The same layers as users compile them: what lies between exchanges, by Inductor; exchanges by torch's own."""

    def __init__(self, model: Layers, ranks: Ranks, shape: Shape, backend: str) -> None:
        self._layers: list[Any] = [*model.layers]
        self._experts: Callable[..., Tensor] = Baseline(ranks, shape.experts, backend)
        compiled: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": True}
        self._steps = [
            tuple(torch.compile(step, **compiled) for step in (each.attend, each.routed, each.shared))
            for each in self._layers
        ]

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        """As of the layers."""
        for layer, (attend, routed, shared) in zip(self._layers, self._steps, strict=True):
            x, rows = attend(x)
            matrices = _own(layer.experts.w_in), _own(layer.experts.w_out)
            x = x + (self._experts(rows, *routed(scores), *matrices) + shared(rows)).view_as(x)
        return x


@dataclass(frozen=True, eq=False)
class Model:
    """One rank's layers and batch.

    Attributes:
        module: with this rank's experts alone.
        calls: of each contender, on the whole batch.
        x: (B, S, H), this rank's.
        scores: (B, S, E) float32.
        cotangent: of the result.
    """

    module: Layers
    calls: Mapping[str, Callable[[], Tensor]]
    x: Tensor
    scores: Tensor
    cotangent: Tensor

    @classmethod
    def of(cls, ranks: Ranks, case: Case, count: int, more: Mapping[str, Any]) -> Model:
        """Random layers, the same on all ranks, and sequences, others on each; `more` are options of all of ours."""
        torch._dynamo.reset()
        for module in (agreement, ordering, splitting):
            module.forget()
        torch.manual_seed(0)
        shape = case.shape
        layers = Layers([Layer(shape, Experts(shape, ranks.device), ranks.device) for _ in range(count)])
        mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
        moecompile.shard_experts(layers, mesh, gradients="sum", src_data_rank=None)
        torch.manual_seed(1 + ranks.rank)

        def made(features: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(case.sequences, case.length, features, device=ranks.device, dtype=dtype)

        x, scores, cotangent = made(shape.hidden), made(shape.experts, torch.float32), made(shape.hidden)
        moecompile.mark_batch(x, scores)
        options = {"ep_capacity": shape.tokens, **more}
        compiled = {
            name: torch.compile(layers, backend="moecompile", fullgraph=True, options={**options, **own})
            for name, own in OPTIONS.items()
        }
        plain = Plain(layers, ranks, shape, "inductor" if ranks.device.type == "cuda" else "eager")
        x.requires_grad_()
        calls = {
            INDUCTOR: lambda: _in_turn(plain, x, scores),
            WHOLE: lambda: compiled[WHOLE](x, scores),
            APART: lambda: _in_turn(compiled[APART], x, scores),
            HALVES: lambda: compiled[HALVES](x, scores),
        }
        return cls(layers, calls, x, scores, cotangent)

    def step(self, name: str) -> None:
        """Forward and backward; gradients are those of this step alone."""
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None
        self.calls[name]().backward(self.cotangent)

    def gradients(self) -> dict[str, Tensor]:
        """Of the batch, and of this rank's matrices."""
        found = {"x": self.x.grad, **{name: each.grad for name, each in self.module.named_parameters()}}
        return {name: _own(each).clone() for name, each in found.items() if each is not None}


def _in_turn(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, scores: Tensor) -> Tensor:
    halves = zip(x.chunk(2), scores.chunk(2), strict=True)
    return torch.cat([run(*each) for each in halves])


def _own(parameter: Any) -> Tensor:
    """This rank's part of what may be sharded; differentiable."""
    found: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return found
