"""Training with experts spread over ranks, each of which has its own tokens, beside the same model on every rank whole.

    torchrun --nproc-per-node 2 examples/expert_parallel.py                     # compiled by Inductor: a minute
    torchrun --nproc-per-node 2 examples/expert_parallel.py --lowering eager    # quicker

Runs on CPUs (gloo) and, where there are as many GPUs as ranks, on these (NCCL).
"""

from __future__ import annotations

import argparse
import copy
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import moecompile

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 48, 8, 2


class MixtureOfExperts(nn.Module):
    """Each token gathers the weights of its experts; products by einsum; SwiGLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (T, HIDDEN) to tokens (T, HIDDEN)."""
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)  # (T, TOP_K)
        gate, up = torch.einsum("th,tkih->tki", x, self.w_in[ids]).chunk(2, -1)
        return x + torch.einsum("tki,tkhi,tk->th", F.silu(gate) * up, self.w_out[ids], weights)


def train(model: nn.Module, tokens: Tensor, steps: int) -> list[float]:
    """Learns to give each token back turned around; returns the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(tokens) - tokens.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Trains both models; rank 0 prints the report and its losses side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowering", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--steps", type=int, default=5)
    chosen = parser.parse_args()

    on_gpus = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, device = dist.get_rank(), torch.device("cuda", dist.get_rank()) if on_gpus else torch.device("cpu")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("ep",))

    torch.manual_seed(0)
    model = MixtureOfExperts().to(device)
    whole = copy.deepcopy(model)
    tokens = torch.randn(40 + 8 * rank, HIDDEN).to(device)  # every rank has its own, and another number of them

    moecompile.shard_experts(model, mesh)
    held = sum(each.to_local().numel() for each in model.parameters() if isinstance(each, DTensor))
    parallel = DistributedDataParallel(model)
    model.compile(backend="moecompile", fullgraph=True, options={"lowering": chosen.lowering})

    losses = train(parallel, tokens, chosen.steps)
    expected = train(DistributedDataParallel(whole), tokens, chosen.steps)
    if rank == 0:
        print(moecompile.last_report())
        print(f"\nRank 0 holds {held} of {whole.w_in.numel() + whole.w_out.numel()} numbers of the experts")
        print("\nLosses\nstep  parallel     whole")
        for step, pair in enumerate(zip(losses, expected, strict=True)):
            print("{:4}  {:8.5f}  {:8.5f}".format(step, *pair))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
