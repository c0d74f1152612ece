"""Training in FP8: a small model of bytes learns this project's README in bfloat16, and again in FP8.

    python examples/fp8_training.py                     # compiled by Inductor: a minute or two
    python examples/fp8_training.py --lowering eager    # quicker: the rewritten graph is run by PyTorch itself
    python examples/fp8_training.py --exclude mix       # one layer less in FP8: read the table in the report

Linear layers and experts multiply in FP8; embedding, router, norm and head stay as they are. Two micro-batches make a
step, so the FP8 copies of the matrices are kept between them (`fp8_cache_weights`), and made anew after each step of
the optimizer, which needs to know nothing of it. Without a Hopper GPU the same arithmetic is emulated, slowly.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moecompile

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, CONTEXT = 128, 128, 8, 2, 4
FP8 = {"precision": "fp8", "fp8_cache_weights": True}


class MixtureOfExperts(nn.Module):
    """Tokens sorted by expert, two grouped matrix products with a gated SiLU between, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (T, HIDDEN) to tokens (T, HIDDEN)."""
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        order = ids.flatten().argsort()
        offsets = torch.bincount(ids.flatten(), minlength=EXPERTS).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(x[order // TOP_K], self.gate_up.mT, offs=offsets).chunk(2, -1)
        rows = torch._grouped_mm(F.silu(gate) * up, self.down.mT, offs=offsets)
        rows = rows * weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x).index_add(0, order // TOP_K, rows)


class Model(nn.Module):
    """Guesses each byte from the CONTEXT bytes before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, HIDDEN // CONTEXT)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.norm, self.experts = nn.RMSNorm(HIDDEN), MixtureOfExperts()
        self.head = nn.Linear(HIDDEN, 256)

    def forward(self, text: Tensor) -> Tensor:
        """Bytes (T + CONTEXT,) to the loss of guessing the last T of them."""
        x = self.mix(self.embedding(text[:-1].unfold(0, CONTEXT, 1)).flatten(1))
        return F.cross_entropy(self.head(x + self.experts(self.norm(x))).float(), text[CONTEXT:])


def train(model: nn.Module, text: Tensor, steps: int, tokens: int) -> list[float]:
    """Two micro-batches of so many tokens a step; returns the mean loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        optimizer.zero_grad()
        each = []
        for start in torch.randint(len(text) - tokens - CONTEXT, (2,), generator=generator).tolist():
            loss = model(text[start : start + tokens + CONTEXT]) / 2
            loss.backward()
            each.append(loss.item())
        optimizer.step()
        losses.append(sum(each))
    return losses


def main(arguments: list[str] | None = None) -> None:
    """Trains both models, prints the report and the losses side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowering", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--exclude", nargs="*", default=[], help="patterns of modules that are not cast")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=256, help="of a micro-batch")
    chosen = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = torch.tensor(list((Path(__file__).parent.parent / "README.md").read_bytes()), device=device)
    torch.manual_seed(0)
    model = Model().to(device, torch.bfloat16)
    in_fp8 = copy.deepcopy(model)
    model.compile(backend="moecompile", fullgraph=True, options={"lowering": chosen.lowering})
    options = {"lowering": chosen.lowering, "fp8_exclude": tuple(chosen.exclude), **FP8}
    in_fp8.compile(backend="moecompile", fullgraph=True, options=options)

    losses = [train(each, text, chosen.steps, chosen.tokens) for each in (model, in_fp8)]
    print(moecompile.last_report())
    print("\nLosses\nstep  bfloat16      FP8")
    for step, pair in enumerate(zip(*losses, strict=True)):
        print("{:4}  {:8.4f}  {:7.4f}".format(step, *pair))


if __name__ == "__main__":
    main()
