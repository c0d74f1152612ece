"""An own mixture of experts in plain PyTorch, written to be read: a loop over the experts. It is found all the same.

    python examples/own_moe.py                   # compiled by Inductor
    python examples/own_moe.py --lowering eager  # quicker: the rewritten graph is run by PyTorch itself

Router, activation and biases are its own too: nothing here follows a template.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moecompile


class MixtureOfExperts(nn.Module):
    """Sigmoid router, the best two of six experts, each two linears with a squared ReLU; and a shared linear."""

    def __init__(self, hidden: int = 64, intermediate: int = 96, experts: int = 6, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up = nn.ModuleList(nn.Linear(hidden, intermediate) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(intermediate, hidden) for _ in range(experts))
        self.shared = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (T, hidden) to tokens (T, hidden)."""
        weights, ids = self.router(x).sigmoid().topk(self.top_k)  # (T, top_k)
        result = torch.zeros_like(x)
        for expert in range(len(self.up)):
            token, choice = torch.where(ids == expert)  # who chose this expert, and as which of its choices
            rows = F.relu(self.up[expert](x[token])).square()
            result.index_add_(0, token, self.down[expert](rows) * weights[token, choice, None])
        return result + self.shared(x)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def main(arguments: list[str] | None = None) -> None:
    """Compiles the block, prints what became of it, and checks result and gradients against eager."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowering", default="inductor", choices=["inductor", "eager"])
    chosen = parser.parse_args(arguments)

    torch.manual_seed(0)
    x, block = torch.randn(40, 64), MixtureOfExperts()
    expected = block(x)
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(block.parameters()))

    # How many rows an expert gets depends on the data: only with fullgraph=True does Dynamo capture such a loop.
    block.compile(backend="moecompile", fullgraph=True, options={"lowering": chosen.lowering})
    result = block(x)
    gradients = torch.autograd.grad(result.square().sum(), list(block.parameters()))

    print(moecompile.last_report())
    worst = max(map(relative, gradients, expected_gradients))
    print(f"\nRelative error against eager: result {relative(result, expected):.1e}, worst gradient {worst:.1e}")


if __name__ == "__main__":
    main()
