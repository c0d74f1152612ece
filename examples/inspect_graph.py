"""Inspect a rewritten graph: an own mixture-of-experts block in plain PyTorch, before and after.

    python examples/inspect_graph.py                    # prints the report and the rewritten graph
    python examples/inspect_graph.py --html report.html # and writes both as one page
    python -m moecompile explain examples/inspect_graph.py:make_model # the report alone, without compiling

No GPU is needed: `lowering="eager"` runs the rewritten graph with PyTorch's own kernels and skips Inductor.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moecompile


class MixtureOfExperts(nn.Module):
    """Softmax router, top-k experts, SwiGLU: tokens sorted by expert, two grouped matrix products."""

    def __init__(self, hidden: int, intermediate: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, hidden, 2 * intermediate) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(experts, intermediate, hidden) / intermediate**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (T, hidden) to tokens (T, hidden)."""
        experts = self.gate_up.shape[0]
        weights, ids = self.router(x).float().softmax(-1).topk(self.top_k)  # (tokens, top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        order = ids.flatten().argsort(stable=True)  # assignments, those of expert 0 first
        token = order // self.top_k
        ends = F.one_hot(ids, experts).sum((0, 1)).cumsum(0).to(torch.int32)  # where each expert's rows end
        gate, up = F.grouped_mm(x[token], self.gate_up, offs=ends).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, self.down, offs=ends)
        rows = rows * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, rows)


class Model(nn.Module):
    """Two residual layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(64) for _ in range(2))
        self.blocks = nn.ModuleList(MixtureOfExperts(64, 48, experts=8, top_k=2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (T, 64) to tokens (T, 64)."""
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return x


def make_model() -> tuple[nn.Module, tuple[Tensor]]:
    """The model and the arguments of one call of it, as `python -m moecompile explain` wants them."""
    torch.manual_seed(0)
    return Model().to(torch.bfloat16), (torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True),)


def main(arguments: list[str] | None = None) -> None:
    """Compiles the model, prints what became of it, and checks it against eager."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html", type=Path, metavar="PATH", help="also write the report to PATH")
    chosen = parser.parse_args(arguments)

    model, (x,) = make_model()
    expected = model(x)

    model.compile(backend="moecompile", fullgraph=True, options={"lowering": "eager"})
    result = model(x)
    result.sum().backward()

    report = moecompile.last_report()
    print(report)
    print(f"\nThe rewritten graph\n\n{report.graphs[0].after}")
    print(f"\nIts backward, reduced to moecompile's operators\n\n{report.graphs[0].backward}")
    # The median token: rounding in the first layer may change the second layer's choice between two equal scores.
    errors = (result - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    print(f"\nAgainst eager: relative error {errors.median().item():.1e} (median over tokens)")
    if chosen.html:
        print(f"Report written to {report.html(chosen.html)}")


if __name__ == "__main__":
    main()
