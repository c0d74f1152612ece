"""A pipeline by PyTorch's ScheduleDualPipeV whose stages are compiled: forwards and backwards run as one graph.

    torchrun --nproc-per-node 2 examples/dualpipe.py                     # two ranks with two stages each
    torchrun --nproc-per-node 4 examples/dualpipe.py                     # the same twice, experts spread over two ranks
    torchrun --nproc-per-node 4 examples/dualpipe.py --trace trace.json  # what is predicted, for ui.perfetto.dev

Runs on CPUs (gloo), where nothing overlaps in truth and the prediction is for an H200. Gradients are compared with
those of the same stages, compiled, without a pipeline.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleDualPipeV
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.nn import functional as F

import moecompile

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, SEQUENCE, PER_MICROBATCH = 256, 128, 8, 2, 64, 2


class Layer(nn.Module):
    """Attention, and experts, whose tokens travel where they are spread over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INTERMEDIATE) / HIDDEN**0.5)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) / INTERMEDIATE**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences (B, S, HIDDEN) to the same."""
        q, k, v = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        tokens = x.flatten(0, 1)
        weights, ids = self.router(tokens).float().softmax(-1).topk(TOP_K)  # (T, TOP_K)
        order = ids.reshape(-1).argsort(stable=True)
        ends = torch.bincount(ids.reshape(-1), minlength=EXPERTS).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(tokens[order // TOP_K], self.w_in, offs=ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, self.w_out, offs=ends) * weights.reshape(-1)[order, None]
        routed = torch.zeros_like(tokens, dtype=torch.float32).index_add_(0, order // TOP_K, y.float())
        result: Tensor = x + routed.to(x.dtype).view_as(x)
        return result


def stage(number: int, experts: DeviceMesh) -> nn.Module:
    """The layer that is a stage, the same on all ranks that have it; its experts are spread over these."""
    torch.manual_seed(number)
    layer = Layer().bfloat16()
    if experts.size() > 1:
        moecompile.shard_experts(layer, experts, gradients="sum")
    return layer


def loss(found: Tensor, target: Tensor) -> Tensor:
    """The mean of squares."""
    return F.mse_loss(found.float(), target.float())


def main() -> None:
    """Takes a step; rank 0 prints what was run, and how far gradients are from those without a pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lowering", default="eager", choices=["eager", "inductor"], help="inductor: torch 2.13 or later"
    )
    parser.add_argument("--trace", metavar="PATH", help="also write what is predicted there, for Perfetto or Chrome")
    chosen = parser.parse_args()

    dist.init_process_group("gloo")
    sharing = 2 if dist.get_world_size() % 4 == 0 else 1
    mesh = init_device_mesh("cpu", (dist.get_world_size() // sharing, sharing), mesh_dim_names=("pp", "ep"))
    rank, ranks, count = mesh.get_local_rank("pp"), mesh["pp"].size(), 2 * mesh["pp"].size()
    numbers = [rank, count - 1 - rank]  # a V: down the ranks, and up again
    mine = [stage(number, mesh["ep"]) for number in numbers]
    right = [stage(number, mesh["ep"]) for number in range(count)]
    for each in (*mine, *right):
        each.compile(backend="moecompile", fullgraph=True, options={"lowering": chosen.lowering})
    stages: list[_PipelineStageBase] = [
        PipelineStage(each, number, count, torch.device("cpu"), group=mesh.get_group("pp"))
        for each, number in zip(mine, numbers, strict=True)
    ]
    microbatches = 2 * ranks
    schedule = ScheduleDualPipeV(stages, microbatches, loss_fn=loss)
    pipeline = moecompile.pipelining.attach(schedule)

    torch.manual_seed(100 + mesh.get_local_rank("ep"))
    x, target = (torch.randn(microbatches * PER_MICROBATCH, SEQUENCE, HIDDEN).bfloat16() for _ in range(2))
    if rank == 0:
        schedule.step(x, target=target)
    else:
        schedule.step()
    if dist.get_rank() == 0:
        print(pipeline)
        print(moecompile.last_report())

    for part, wanted in zip(x.chunk(microbatches), target.chunk(microbatches), strict=True):
        found = part
        for each in right:
            found = each(found)
        (loss(found, wanted) / microbatches).backward()
    of_both = zip(mine[0].named_parameters(), right[numbers[0]].parameters(), strict=True)
    if dist.get_rank() == 0:
        print("\nBeside the same stages without a pipeline, relative error of gradients")
    for (name, one), other in of_both:
        assert one.grad is not None and other.grad is not None
        error = (one.grad - other.grad).norm() / other.grad.norm()  # of sharded ones all ranks have to ask
        if dist.get_rank() == 0:
            print(f"  {name:<20} {float(error):.1e}")
    if chosen.trace and dist.get_rank() == 0:
        print(f"Written: {moecompile.last_report().trace(chosen.trace)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
