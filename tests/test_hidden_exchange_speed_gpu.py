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

from one_side import Side

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SHAPES = {
    "large": (4096, 7168, 2048, 64, 8),
    "narrow": (8192, 2048, 768, 128, 8),
    "small": (128, 7168, 2048, 64, 8),  # hides nothing
}
"""Tokens, features, inner size, experts of both ranks, experts of a token."""
BOUNDS = {("large", False): 1.12, ("large", True): 1.2}
"""How many times the local experts' time, at most: what two GPUs are to reach."""
CACHE = 256 * 2**20
"""Bytes that are written between two calls: more than L2 holds."""
ROUNDS = 20


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
    graphs = {"exchanged": captured(side.exchanged, side.prepare), "local": captured(side.local, lambda: None)}
    times: dict[str, list[float]] = {each: [] for each in graphs}
    for turn in range(ROUNDS + 3):
        for each, graph in graphs.items():
            if each == "exchanged":
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
    ratio = found["exchanged"] / found["local"]
    precision, mine, local = "fp8" if fp8 else "bf16", found["exchanged"], found["local"]
    print(f"{name} {precision}: exchanged {mine:.3f} ms, local {local:.3f}, {ratio:.3f}")
    assert ratio <= BOUNDS.get((name, fp8), float("inf"))
