"""Small models whose graphs are printed. Goldens name the lines of this file: append, do not insert."""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import moecompile  # noqa: F401 - registers the operators

ATTRIBUTES = {"activation": "mul(silu(gate), up)", "gate_up": "halves"}


class Router(nn.Module):
    def __init__(self, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, hidden))
        self.top_k = top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, self.weight).float().softmax(-1)
        weights, ids = torch.topk(scores, self.top_k, dim=-1)
        weights /= weights.sum(-1, keepdim=True)
        return weights, ids


class Fused(nn.Module):
    """An MoE block as it looks after the rewrite."""

    def __init__(self, hidden: int = 16, intermediate: int = 8, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.router = Router(hidden, experts, top_k)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, intermediate))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        _, offsets, slots, order = torch.ops.moecompile.plan(ids, self.gate_up_proj.shape[0])
        return torch.ops.moecompile.experts(
            x, weights, offsets, slots, order, self.gate_up_proj, self.down_proj, **ATTRIBUTES
        )


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.mlp = Fused()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.mlp(self.norm(hidden_states))


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(16, 3, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.head(hidden_states)


def spellings(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """Python's operators, methods, functions, in-place and indexed writes."""
    a = x * y + torch.mul(x, 2.0) - x.mul(y) // 2
    a /= y.abs() + 1
    a.add_(1).clamp_(min=0.0)
    b = torch.empty_like(a)
    b[index] = a[..., None, 1:][:, 0, ::2].to(torch.float32).bfloat16().type_as(a).repeat(1, 2)
    mask = ~(b > 0) & (x <= y) | index.bool()[:, None]
    return torch.where(mask, b, -float("inf")).relu().T @ y


class Sliced(nn.Module):
    """Dynamo inlines what is called through a slice of a ModuleList, a Sequential, a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.named = nn.ModuleDict({"left": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[1:]:
            x = block(x)
        return self.named["left"](x)


def data_dependent(x: Tensor) -> Tensor:
    """Sizes that depend on data."""
    rows = torch.nonzero(x[:, 0] > 0).squeeze(-1)
    return torch.cat([x[rows], x[rows] * 2])


class Checkpointed(nn.Module):
    """A body of its own for the checkpoint, and the marks of autocast and no_grad beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Fused()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.utils.checkpoint.checkpoint(self.mlp, x, use_reentrant=False)
        with torch.no_grad():
            z = y * 2
        return y + z
