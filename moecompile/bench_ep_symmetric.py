"""torch's own exchange of tokens over symmetric memory, `torch.ops.symm_mem.all_to_all_vdev_2d`, for `bench ep`.

It needs the back end NVSHMEM, and torch does not change the back end once a process has used another, as moecompile's
exchange has. So each rank starts one process of its own for it, beside which nothing runs, and which measures
the baseline's exchange, too, by turns.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moecompile.bench_block import random_inputs
from moecompile.bench_cases import Shape
from moecompile.bench_ep_cases import COMBINE_ALONE, DISPATCH, EAGER, SYMMETRIC
from moecompile.bench_ep_peers import Baseline
from moecompile.bench_ep_ranks import Ranks, RanksTimer, joined
from moecompile.bench_ep_rows import numberless
from moecompile.bench_proof import WrongResultError
from moecompile.bench_timing import Call, Contender, Statistics, measure_single

MOST_EXPERTS = 16
"""Of a rank, that torch's kernel takes: a warp of its block sees to each (pytorch issue 167966)."""
PATIENCE = 120.0
"""Seconds that one of these processes waits for another."""
Found = dict[str, Statistics | str]


def obstacle(device: str) -> str:
    """Why it cannot be measured here; empty if it may be tried."""
    if device != "cuda":
        return "needs CUDA"
    if not hasattr(torch.ops.symm_mem, "all_to_all_vdev_2d"):
        return f"torch {torch.__version__} does not have it"
    from torch.distributed import _symmetric_memory as symmetric

    if not symmetric.is_nvshmem_available():
        return "torch finds no NVSHMEM (libnvshmem_host.so.3; pip install nvidia-nvshmem-cu13)"
    return ""


def measure_symmetric(ranks: Ranks, shape: Shape, rounds: int) -> Found:
    """Times of its dispatch and combine, or why there are none; by DISPATCH and COMBINE_ALONE. All ranks call it."""
    why = next((each for each in ranks.gathered(obstacle(ranks.device.type)) if each), "")
    if why:
        return dict.fromkeys((DISPATCH, COMBINE_ALONE), why)
    with tempfile.TemporaryDirectory(prefix="moecompile-bench-") as folder:
        store = ranks.gathered(f"file://{folder}/store")[0]
        context = multiprocessing.get_context("spawn")
        said: Any = context.Queue()
        patience = min(ranks.patience, PATIENCE)
        arguments = (ranks.rank, ranks.size, ranks.device, patience, store, shape, rounds, said)
        process = context.Process(target=_main, args=arguments, daemon=True)
        process.start()
        found = _said(said, process, 3 * patience)
        process.join(10)
        if process.is_alive():
            process.kill()
        every = ranks.gathered(found)
    failures = [f"rank {rank}: {each}" for rank, each in enumerate(every) if isinstance(each, str)]
    if failures:
        return dict.fromkeys((DISPATCH, COMBINE_ALONE), f"does not run: {'; '.join(failures)}")
    assert isinstance(every[0], dict)
    return every[0]


def _said(said: Any, process: Any, seconds: float) -> Found | str:
    """What a process says; why it says nothing, if it does not."""
    for _ in range(max(1, round(seconds))):
        try:
            found: Found | str = said.get(timeout=1)
            return found
        except queue.Empty:
            if not process.is_alive() and said.empty():
                return f"its process has died with exit status {process.exitcode}"
    return f"it has said nothing for {seconds:g} s"


def _main(
    rank: int, size: int, device: torch.device, patience: float, store: str, shape: Shape, rounds: int, said: Any
) -> None:
    os.environ.setdefault("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "lo")  # of one host, which may have no other network
    try:
        with joined(rank, size, device, patience, store) as ranks, torch.no_grad():
            said.put(_measure(ranks, shape, rounds))
            ranks.meet()
    except Exception as error:  # the row says it
        said.put(" ".join(f"{type(error).__name__}: {error}".split())[:300])


def _measure(ranks: Ranks, shape: Shape, rounds: int) -> Found:
    torch.manual_seed(ranks.rank)
    inputs = random_inputs(shape, "cuda")
    x = inputs.x.detach()
    baseline = Baseline(ranks, shape.experts)
    layout = baseline.layout(inputs.ids)
    tokens = layout.order // shape.top_k
    received = baseline.dispatch(x, shape.top_k, layout)
    exchange = ranks.attempt(partial(Symmetric.of, ranks, shape, x, inputs.ids, tokens))
    ranks.attempt(partial(exchange.check, received))
    timer, found = RanksTimer(ranks), Found()
    calls: dict[str, tuple[Call, Call]] = {
        DISPATCH: (exchange.dispatch, partial(baseline.dispatch, x, shape.top_k, layout)),
        COMBINE_ALONE: (exchange.combine, partial(baseline.returned, received, layout)),
    }
    for what, (own, other) in calls.items():
        pair = [
            Contender(SYMMETRIC, partial(numberless, own), 0.0),
            Contender(EAGER, partial(numberless, other), 0.0),
        ]
        times = ranks.attempt(partial(measure_single, timer, pair, rounds))
        found |= {what: times[SYMMETRIC], f"{what}, {EAGER}": times[EAGER]}
    return found


@dataclass(frozen=True, eq=False)
class Symmetric:
    """Its tensors, all in symmetric memory of the same size on all ranks.

    Attributes:
        group: its name.
        x: (T, H), in memory of this rank's own; so are `tokens`.
        tokens: (T * K,) int64: of each row that is sent.
        rows: (T * K, H), what is sent, in the order of experts.
        out: (R * T * K, H), what came, by expert and then by rank.
        returned: (T * K, H), what came back.
        splits: (bins,) int64: rows of each bin of experts.
        placed: (2, bins) int64: rows that came, and where they begin.
        back: (2, bins) int64: the same of what came back.
    """

    group: str
    x: Tensor
    tokens: Tensor
    rows: Tensor
    out: Tensor
    returned: Tensor
    splits: Tensor
    placed: Tensor
    back: Tensor

    @classmethod
    def of(cls, ranks: Ranks, shape: Shape, x: Tensor, ids: Tensor, tokens: Tensor) -> Symmetric:
        """For tokens with these experts; beyond MOST_EXPERTS of a rank they share bins, as many in each."""
        from torch.distributed import _symmetric_memory as symmetric

        symmetric.set_backend("NVSHMEM")
        here = shape.experts // ranks.size
        bins = next(count for count in range(min(here, MOST_EXPERTS), 0, -1) if here % count == 0)
        counts = torch.bincount(ids.reshape(-1), minlength=shape.experts).view(ranks.size * bins, -1).sum(1)

        def empty(*size: int, dtype: torch.dtype) -> Tensor:
            return symmetric.empty(*size, dtype=dtype, device=ranks.device)

        def integers(*size: int) -> Tensor:
            return empty(*size, dtype=torch.int64).fill_(-1)

        most, total = tokens.shape[0], counts.numel()
        made = cls(
            ranks.group.group_name,
            x,
            tokens,
            empty(most, shape.hidden, dtype=x.dtype),
            empty(ranks.size * most, shape.hidden, dtype=x.dtype),
            empty(most, shape.hidden, dtype=x.dtype),
            integers(total),
            integers(2, total),
            integers(2, total),
        )
        made.splits.copy_(counts)
        torch.cuda.synchronize()
        ranks.meet()
        return made

    def dispatch(self) -> None:
        """Gathers `rows`, as the baseline does, and sends them."""
        torch.index_select(self.x, 0, self.tokens, out=self.rows)
        torch.ops.symm_mem.all_to_all_vdev_2d(self.rows, self.out, self.splits, self.placed, self.group)

    def combine(self) -> None:
        """Sends what came back, as it came."""
        torch.ops.symm_mem.all_to_all_vdev_2d_offset(self.out, self.returned, self.placed, self.back, self.group)

    def check(self, received: Tensor) -> None:
        """Raises WrongResultError if other rows come than by NCCL, or others come back than were sent."""
        self.dispatch()
        self.combine()
        torch.cuda.synchronize()
        came = self.out[: received.shape[0]]
        if not torch.equal(_prints(came), _prints(received)):  # by bin and rank, the others by rank and expert
            raise WrongResultError("other rows came than by NCCL")
        if not torch.equal(self.returned, self.x[self.tokens]):
            raise WrongResultError("other rows came back than were sent")


def _prints(rows: Tensor) -> Tensor:
    """Of rows in any order: the sum of each, read as integers, sorted."""
    return rows.view(torch.int16).sum(1, dtype=torch.int64).sort().values
