"""Training with experts spread over ranks, its operators ordered so that rows travel while a shared expert computes.

    torchrun --nproc-per-node 2 examples/overlap.py                     # the report, and timelines that are predicted
    torchrun --nproc-per-node 2 examples/overlap.py --trace trace.json  # the same for ui.perfetto.dev

Runs on CPUs (gloo), where nothing overlaps in truth and the prediction is for an H200, and, where there are as many
GPUs as ranks, on these (NCCL).
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import moecompile

HIDDEN, INTERMEDIATE, SHARED, EXPERTS, TOP_K, TOKENS = 512, 256, 2048, 8, 2, 1024


class MixtureOfExperts(nn.Module):
    """Routed experts, whose tokens travel, and one of all tokens, which needs nothing of what travels."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INTERMEDIATE) / HIDDEN**0.5)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) / INTERMEDIATE**0.5)
        self.up, self.down = nn.Linear(HIDDEN, SHARED, bias=False), nn.Linear(SHARED, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (T, HIDDEN) to tokens (T, HIDDEN)."""
        weights, ids = self.router(x).float().softmax(-1).topk(TOP_K)  # (T, TOP_K)
        order = ids.reshape(-1).argsort(stable=True)
        ends = torch.bincount(ids.reshape(-1), minlength=EXPERTS).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(x[order // TOP_K], self.w_in, offs=ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, self.w_out, offs=ends) * weights.reshape(-1)[order, None]
        routed = torch.zeros_like(x, dtype=torch.float32).index_add_(0, order // TOP_K, y.float()).to(x.dtype)
        result: Tensor = x + routed + self.down(F.silu(self.up(x)))
        return result


def step(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """Forward and backward: the result, and the gradient of the router."""
    model.zero_grad()
    result = model(tokens)
    result.float().square().mean().backward()
    (router,) = (each.grad for name, each in model.named_parameters() if "router" in name)
    assert router is not None
    return [result.detach(), router.clone()]


def main() -> None:
    """Takes a step in both orders; rank 0 prints the report of the better one, and how far results are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lowering", default="eager", choices=["eager", "inductor"], help="inductor: torch 2.13 or later"
    )
    parser.add_argument("--trace", metavar="PATH", help="also write what is predicted there, for Perfetto or Chrome")
    chosen = parser.parse_args()

    on_gpus = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, device = dist.get_rank(), torch.device("cuda", dist.get_rank()) if on_gpus else torch.device("cpu")
    torch.manual_seed(0)
    model = MixtureOfExperts().to(device, torch.bfloat16)
    moecompile.shard_experts(model, init_device_mesh(device.type, (dist.get_world_size(),)), gradients="sum")
    torch.manual_seed(1 + rank)
    tokens = torch.randn(TOKENS, HIDDEN, device=device, dtype=torch.bfloat16)

    # "hide" is what would make one operator of experts and exchange: here they stay apart, and are ordered
    options = {"lowering": chosen.lowering, "disable": ("hide",)}
    found = []
    for overlap in (False, True):
        torch.compiler.reset()
        run: Any = torch.compile(model, backend="moecompile", fullgraph=True, options=options | {"overlap": overlap})
        found.append(step(run, tokens))
    if rank == 0:
        report = moecompile.last_report()
        print(report)
        print("\nBeside the order in which it is written, relative error")
        for name, one, other in zip(("result", "router's gradient"), *found, strict=True):
            print(f"  {name:<20} {(one - other).norm() / other.norm():.1e}")
        if chosen.trace:
            print(f"Written: {report.trace(chosen.trace)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
