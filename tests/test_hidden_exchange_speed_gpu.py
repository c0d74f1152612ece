"""One rank's side of a hidden exchange, timed on one GPU: the other rank has sent its rows before, and has no work.

`pytest -s -m "gpu and slow" tests/test_hidden_exchange_speed_gpu.py` prints milliseconds of CUDA graphs, in turns with
the local experts on as many rows. Rows go to this GPU's own memory, faster than NVLink would take them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moecompile.runtime import fp8_experts, hopper_exchange, hopper_exchanged, hopper_quantize, kernels
from moecompile.runtime.hopper_exchange import Exchange, Rows
from moecompile.runtime.hopper_exchanged import Brought
from moecompile.runtime.peer_memory import RANKS, SLOTS, SMS, among_streams, room_for

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

GATED = {"activation": "mul(silu(gate), up)", "gate_up": "halves", "out_dtype": torch.bfloat16}
SHAPES = {"large": (4096, 7168, 2048, 64, 8), "narrow": (8192, 2048, 768, 128, 8)}
"""Tokens, features, inner size, experts of both ranks, experts of a token."""
BOUNDS = {("large", False): 1.12, ("large", True): 1.2}
"""How many times the local experts' time, at most: what two GPUs are to reach."""
CACHE = 256 * 2**20
"""Bytes that are written between two calls: more than L2 holds."""
ROUNDS = 20


class Side:
    """Rank 0 of two, and what rank 1 does for it."""

    def __init__(self, tokens: int, features: int, inner: int, experts: int, top_k: int, fp8: bool) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def randn(*shape: int) -> Tensor:
            made = torch.randn(*shape, generator=generator, device="cuda") / shape[-1] ** 0.5
            return made.to(torch.bfloat16)

        def brought(of: int) -> tuple[Tensor, Tensor, Tensor]:
            weights, ids = torch.rand(tokens, of, generator=generator, device="cuda").topk(top_k, 1)
            return randn(tokens, features), ids, weights

        self.capacity, self.experts, self.here = tokens, experts, experts // 2
        self.mine, other, self.alone = brought(experts), brought(experts), brought(self.here)
        x, ids, weights = other
        pitch = hopper_exchange.pitch_of(features, x.dtype, ids.int(), weights)
        self.memories = among_streams(2, room_for(2, tokens, pitch), 0)
        self.matrices = [randn(self.here, 2 * inner, features), randn(self.here, features, inner)]
        quantize = torch.ops.moecompile.quantize_weights
        in_ = quantize(self.matrices[0], gate_up="halves", backward=False)
        self.quantized = [*in_, *quantize(self.matrices[1], backward=False)] if fp8 else []
        self.sent, self.home = hopper_exchange.plan(self.mine[1], experts, 2, tokens)
        self.other_sent, _ = hopper_exchange.plan(ids, experts, 2, tokens)
        self.other_lines = Rows.of(hopper_quantize.quantize_lines(x) if fp8 else x, ids, weights)
        self.back = Rows(randn(2 * tokens, features))
        self.came = (self.sent.view(2, tokens)[1] >= 0).sum(dtype=torch.int32).expand(2).contiguous()
        self.exchanges = 0

    def exchange(self, rank: int, slot: int) -> Exchange:
        """Of a rank, in that slot."""
        return Exchange(self.memories[rank], slot, self.capacity, SMS, 20.0)

    def prepare(self) -> None:
        """Rank 1 has read all that rank 0 sent, and sends what this exchange is to bring."""
        begin = 128 + 2 * SLOTS * 2 * 4  # of `taken` in PeerWords
        for slot in (0, 1):
            at = begin + (slot * RANKS + 1) * 8
            self.memories[0].own[at : at + 8].view(torch.int64).fill_(self.exchanges)
        hopper_exchange.send(self.exchange(1, 0), self.other_lines, self.other_sent, None)
        hopper_exchange.send(self.exchange(1, 1), self.back, None, self.came)
        self.exchanges += 1
        torch.cuda.synchronize()

    def hidden(self) -> Tensor:
        """This rank's experts with the exchange behind them."""
        tokens = Brought(*self.mine, self.sent, self.home, self.experts)
        there, back = self.exchange(0, 0), self.exchange(0, 1)
        return hopper_exchanged.forward(tokens, there, back, self.matrices, self.quantized, GATED)

    def local(self) -> Tensor:
        """As many rows of tokens that are all here."""
        x, ids, weights = self.alone
        _, *plan = kernels.plan(ids, self.here)
        if self.quantized:
            return fp8_experts.experts_fp8(x, weights, *plan, *self.matrices, quantized=self.quantized, **GATED)
        return kernels.experts(x, weights, *plan, *self.matrices, **GATED)


def captured(run: Callable[[], Tensor], prepare: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of the call, whose kernels have been loaded."""
    prepare()
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("name", SHAPES)
def test_one_side(name: str, fp8: bool) -> None:
    side, flush = Side(*SHAPES[name], fp8), torch.empty(CACHE, dtype=torch.uint8, device="cuda")
    graphs = {"hidden": captured(side.hidden, side.prepare), "local": captured(side.local, lambda: None)}
    times: dict[str, list[float]] = {each: [] for each in graphs}
    for turn in range(ROUNDS + 3):
        for each, graph in graphs.items():
            if each == "hidden":
                side.prepare()
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                times[each].append(begin.elapsed_time(end))
    assert not side.memories[0].failure()
    found = {each: statistics.median(of_each) for each, of_each in times.items()}
    ratio = found["hidden"] / found["local"]
    print(
        f"{name} {'fp8' if fp8 else 'bf16'}: hidden {found['hidden']:.3f} ms, local {found['local']:.3f}, {ratio:.3f}"
    )
    assert ratio <= BOUNDS.get((name, fp8), float("inf"))
