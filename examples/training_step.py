"""Training with activation checkpointing: a compiled model and the same model in eager, step by step.

    python examples/training_step.py                   # compiled by Inductor: a minute
    python examples/training_step.py --lowering eager  # quicker: the rewritten graph is run by PyTorch itself

Trainer of transformers takes a compiled model as well: call `model.compile(backend="moecompile")` on it first, and
leave Trainer's own `torch_compile` arguments out, which know only the backends of PyTorch.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import moecompile

VOCABULARY, HIDDEN = 128, 64


class MixtureOfExperts(nn.Module):
    """Each token gathers the weights of its experts; products by einsum; a gated GELU between them."""

    def __init__(self, intermediate: int = 48, experts: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(HIDDEN, experts, bias=False)
        self.gate = nn.Parameter(torch.randn(experts, HIDDEN, intermediate) / HIDDEN**0.5)
        self.up = nn.Parameter(torch.randn(experts, HIDDEN, intermediate) / HIDDEN**0.5)
        self.down = nn.Parameter(torch.randn(experts, intermediate, HIDDEN) / intermediate**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (T, HIDDEN) to tokens (T, HIDDEN)."""
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)  # (T, top_k)
        gate = torch.einsum("th,tkhi->tki", x, self.gate[ids])
        up = torch.einsum("th,tkhi->tki", x, self.up[ids])
        return torch.einsum("tki,tkih,tk->th", F.gelu(gate) * up, self.down[ids], weights)


class Model(nn.Module):
    """Guesses each token's successor from the token alone; both layers are computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.blocks = nn.ModuleList(MixtureOfExperts() for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def layer(self, number: int, x: Tensor) -> Tensor:
        """One residual layer."""
        return x + self.blocks[number](self.norms[number](x))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (T + 1,) to the loss of guessing the last T of them."""
        x = self.embedding(tokens[:-1])
        for number in range(2):
            x = checkpoint(self.layer, number, x, use_reentrant=False)
        return F.cross_entropy(self.head(x), tokens[1:])


def train(model: nn.Module, tokens: Tensor, steps: int) -> list[float]:
    """Trains on one text; returns the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: list[str] | None = None) -> None:
    """Trains both models, prints the report and the losses side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowering", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--steps", type=int, default=6)
    chosen = parser.parse_args(arguments)

    torch.manual_seed(0)
    model, tokens = Model(), torch.randint(VOCABULARY, (65,))
    compiled = copy.deepcopy(model)
    compiled.compile(backend="moecompile", fullgraph=True, options={"lowering": chosen.lowering})

    losses = train(compiled, tokens, chosen.steps)
    expected = train(model, tokens, chosen.steps)

    report = moecompile.last_report()
    print(report)
    print(f"\nThe backward graph, reduced to moecompile's operators\n\n{report.graphs[0].backward}")
    print("\nLosses\nstep  compiled     eager")
    for step, pair in enumerate(zip(losses, expected, strict=True)):
        print("{:4}  {:8.4f}  {:8.4f}".format(step, *pair))


if __name__ == "__main__":
    main()
