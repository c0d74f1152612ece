"""A model of linear layers alone, and a router: what FP8 casts of it is what the user leaves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from test_linears import H


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, H, False), nn.Linear(H, H, False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(nn.functional.silu(self.up(x)))
        return result


class Plain(nn.Module):
    """Three layers of two projections, and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FeedForward() for _ in range(3))
        self.router = nn.Linear(H, 16, False)
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = x + layer(x)
        return x, self.router(x).topk(2).indices
