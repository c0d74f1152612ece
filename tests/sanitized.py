"""Every kind of kernel on small blocks of experts, for compute-sanitizer, which is too slow for the tests themselves:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitized.py
    compute-sanitizer --tool racecheck python tests/sanitized.py bf16
    compute-sanitizer --tool racecheck python tests/sanitized.py fp8
    compute-sanitizer --tool racecheck python tests/sanitized.py linear
    compute-sanitizer --tool racecheck python tests/sanitized.py exchange
    compute-sanitizer --tool racecheck python tests/sanitized.py nodes

(PyTorch's allocator puts tensors side by side into large pieces of memory, of which memcheck sees the ends alone.)
"""

from __future__ import annotations

import itertools
import sys

import torch

import nodes_on_one_gpu
from gpu_blocks import GPT_OSS, Block, main_of, run
from moecompile import bench_proof
from moecompile.runtime import hopper_experts, hopper_fp8, hopper_linear, hopper_quantize, hopper_routing
from moecompile.runtime.node_memory import Rings
from moecompile.runtime.peer_memory import among_streams, room_for
from moecompile.runtime.quantize import E4M3, FLOAT32, SCALE_FORMATS
from moecompile.runtime.topology import Topology
from one_side import Side
from special_tiles import TILES, tile_of
from test_exchange_gpu import Ranks, brought, pitch_of

CAST = "mul(out, cast(weight, bfloat16))"
BLOCKS = (
    Block("halves", tokens=300, top_k=2, experts=3, weight_dtype=torch.float32, output=CAST),
    Block.of_counts("pairs", 270, 310, 370, 200, weight_dtype=torch.float32, output=CAST),
    Block.of_counts("float32 scales", 130, 90, biases=True, scale_format=FLOAT32),
    Block.of_counts(
        "pairs, gpt-oss", 280, 320, 170, gate_up="interleaved", activation=GPT_OSS, in_transposed=True,
        out_transposed=True, biases=True, hidden=208, inner=176,
    ),
    Block.of_counts("pairs, single", 260, gate_up="single", activation="square(relu(hidden))", biases=True),
    Block.of_counts("pairs, transposed", 258, 300, in_transposed=True),
    Block("separate, biases", tokens=70, top_k=2, experts=3, gate_up="separate", biases=True, dropped=True),
    Block("single", tokens=70, top_k=2, experts=3, gate_up="single", activation="square(relu(hidden))"),
    Block(
        "gpt-oss", tokens=70, top_k=2, experts=3, gate_up="interleaved", activation=GPT_OSS, in_transposed=True,
        out_transposed=True, biases=True, hidden=208, inner=176,
    ),
)  # fmt: skip


LAYERS = ((300, 272, 384), (1, 16, 128), (128, 128, 256), (258, 528, 1024))
"""Tokens, features out and in of linear layers: parts of tiles and of scale blocks, whole ones, an odd row tile."""


def layers() -> None:
    """Forward and backward of each linear layer, with a bias and without one, in kernels of ours alone."""
    hopper_linear.FULL = 0.0
    ops = torch.ops.moecompile
    for (tokens, n, k), biased, scales in itertools.product(LAYERS, (False, True), SCALE_FORMATS):
        torch.manual_seed(0)
        x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = (torch.randn(n, k, device="cuda") * k**-0.5).bfloat16().requires_grad_()
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16, requires_grad=True) if biased else None
        how = {"scale_format": scales}
        copies = list(ops.quantize_weights(weight, **how))
        result = ops.linear_fp8(x, weight, bias, *ops.quantize(x, **how), copies, **how)
        result.backward(torch.randn_like(result))
        assert x.grad is not None and weight.grad is not None
        assert all(each.isfinite().all() for each in (result, x.grad, weight.grad))


def tiles() -> None:
    """Rows and gradients whose tiles are turned in fp16, and such that take float32."""
    made = [tile_of(kind) for kind in TILES]
    values = torch.cat([values for values, _ in made])
    scales = torch.cat([scales for _, scales in made])[:, None]
    gradient = (values * scales).nan_to_num().bfloat16().cuda()
    torch.ops.moecompile.quantize_gradient(gradient)
    rows = values.to(E4M3).cuda(), scales.cuda()
    torch.ops.moecompile.along_tokens(*rows, scale_block="1x128")
    order = torch.arange(len(values), dtype=torch.int32, device="cuda")
    hopper_quantize.transpose_rows(*rows, order, top_k=1, per_column=True)


def exchanges() -> None:
    """Between ranks that are streams, each of which launches what no other waits for, or where there is but one."""
    for precision in ("bf16", "fp8"):
        for tokens in (300, 40):  # hidden, and one step after the other
            side = Side(tokens, 256, 128, 8, 4, precision == "fp8")
            for _ in range(2):
                side.prepare()
                assert bool(side.exchanged().isfinite().all())
            assert not side.memories[0].failure()
        training(Side(300, 256, 128, 8, 4, precision == "fp8", backward=True))
    for ranks, counts in ((2, [64, 40]), (4, [0, 1, 70, 64])):
        row = pitch_of(256, torch.bfloat16, 2)
        group = Ranks(among_streams(ranks, room_for(ranks, max(counts), row), 0), 8, max(counts))
        group.check([brought(rank, count, 256, 8, 2, torch.bfloat16, "random") for rank, count in enumerate(counts)])


def nodes() -> None:
    """Between nodes: rows of a row of pieces and of many, more parts than pieces fit beside, rings of one chunk."""
    for topology, columns, dtype, rings in (
        (Topology(2, 2), 512, torch.bfloat16, Rings(2, 1, 1)),
        (Topology(2, 4), 7168, torch.bfloat16, Rings(1, 2, 4)),
        (Topology(2, 2), 6144, torch.float32, Rings(1, 2, 4)),
    ):
        experts, most = 4 * topology.ranks, 40
        brings = [
            nodes_on_one_gpu.brought(
                rank, nodes_on_one_gpu.routed(rank, most, topology, experts, 6, "random"), columns, dtype
            )
            for rank in range(topology.ranks)
        ]
        ranks = nodes_on_one_gpu.Ranks(topology, rings, experts, most, brings[0])
        for _ in range(2):
            ranks.check(brings, ranks.exchange(brings))


def training(side: Side) -> None:
    """A forward that saves and its backward."""
    for _ in range(2):
        side.prepare()
        y, saved = side.forward()
        side.prepare_back()
        found = side.backward(saved)
        assert all(bool(each.isfinite().all()) for each in (y, *found.values()))
    assert not side.memories[0].failure()


def main(precisions: list[str]) -> None:
    """Forward and backward of each block in each precision: rows saved or not, dispatched or not; main ones."""
    with bench_proof.launched() as names:
        for precision in precisions:
            if precision == "linear":
                layers()
                tiles()
                continue
            if precision == "exchange":
                exchanges()
                continue
            if precision == "nodes":
                nodes()
                continue
            for block in BLOCKS:
                tensors = block.tensors()
                record, fp8 = block.record(tensors), precision == "fp8"
                taken = hopper_fp8.takes(record, block.quantized(tensors)) if fp8 else hopper_experts.takes(record)
                assert taken, f"{block.name}: the kernels were to compute this"
                for recompute, hopper_routing.BESIDE in itertools.product((False, True), (0, 1 << 60)):
                    found = run(block, tensors, fp8=fp8, recompute=recompute)
                    assert all(value.isfinite().all() for value in found.all().values()), block.name
                for turned in (False, True):
                    main = main_of(tensors, turned)
                    run(block, tensors, fp8=fp8, main=main)
                    assert all(value.isfinite().all() for value in main.values()), block.name
    torch.cuda.synchronize()
    print(f"{len(names)} launches of {len(set(names))} kernels: {', '.join(sorted(set(names)))}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["bf16", "fp8", "linear", "exchange", "nodes"])
