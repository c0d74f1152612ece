"""Expert parallelism as PyTorch users write it today, without kernels of their own: what `bench ep` compares with.

    layout      assignments sorted by expert, stably; ranks tell each other how many come: the host waits for these
    dispatch    a row for each assignment, in that order, by all_to_all_single
    local       received rows sorted by expert; GEMM1, silu(gate) * up, GEMM2; back in the order in which they came
    combine     rows back by all_to_all_single; gathered, weighted and summed at home

Its derivative goes the same ways back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from moecompile.bench_ep_cases import COMPILED, EAGER
from moecompile.bench_ep_ranks import Ranks


@dataclass(frozen=True)
class Layout:
    """Who sends how much to whom.

    Attributes:
        order: (T * K,) int64: the assignment of each row that is sent.
        counts: (R, E / R) int64: rows that came from each rank for each expert.
        outgoing: rows to each rank.
        incoming: rows from each rank.
    """

    order: Tensor
    counts: Tensor
    outgoing: Sequence[int]
    incoming: Sequence[int]


class Baseline:
    """Of one rank; with `backend` that of torch.compile compiles the activation and the sum at home.

    The gathers are faster eager. Sizes differ from step to step, so the graphs have dynamic ones.
    """

    def __init__(self, ranks: Ranks, num_experts: int, backend: str | None = None) -> None:
        self._ranks, self._num_experts = ranks, num_experts
        self._activated: Callable[[Tensor], Tensor] = _compiled(activated, backend)
        self._home: Callable[..., Tensor] = _compiled(summed, backend)

    def __call__(self, x: Tensor, expert_ids: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            x: (T, H) bfloat16, this rank's tokens.
            expert_ids: (T, K) int64, each in [0, E).
            weights: (T, K) float32.
            w_in: (E / R, 2I, H), this rank's, gate first.
            w_out: (E / R, H, I).

        Returns:
            (T, H) of x's dtype.
        """
        layout = self.layout(expert_ids)
        received = self.dispatch(x, expert_ids.shape[1], layout)
        return self.combine(self.local(received, layout, w_in, w_out), weights, layout)

    @torch.no_grad()
    def layout(self, expert_ids: Tensor) -> Layout:
        """Of tokens with these experts (T, K); waits for the device."""
        flat, size = expert_ids.reshape(-1), self._ranks.size
        order, sent = flat.argsort(stable=True), torch.bincount(flat, minlength=self._num_experts)
        counts = torch.empty_like(sent)
        distributed.all_to_all_single(counts, sent, group=self._ranks.group)
        counts = counts.view(size, -1)
        outgoing, incoming = torch.stack([sent.view(size, -1).sum(1), counts.sum(1)]).tolist()
        return Layout(order, counts, outgoing, incoming)

    def dispatch(self, x: Tensor, top_k: int, layout: Layout) -> Tensor:
        """Rows that came (rows, H), by rank, for each by expert, for each by token."""
        return self.exchanged(x[layout.order // top_k], layout.incoming, layout.outgoing)

    def local(self, received: Tensor, layout: Layout, w_in: Tensor, w_out: Tensor) -> Tensor:
        """What this rank's experts make of them (rows, H), in the same order."""
        size, here = layout.counts.shape
        each = torch.arange(here, device=received.device).repeat(size)
        order = each.repeat_interleave(layout.counts.reshape(-1), output_size=received.shape[0]).argsort(stable=True)
        ends = layout.counts.sum(0).cumsum(0).to(torch.int32)
        hidden = torch._grouped_mm(received[order], w_in.mT, offs=ends)
        y = torch._grouped_mm(self._activated(hidden), w_out.mT, offs=ends)
        return y[inverse(order)]

    def combine(self, y: Tensor, weights: Tensor, layout: Layout) -> Tensor:
        """Sums at home (T, H) of these rows."""
        return self._home(self.returned(y, layout), layout.order, weights)

    def returned(self, y: Tensor, layout: Layout) -> Tensor:
        """The rows themselves, where they came from (T * K, H)."""
        return self.exchanged(y, layout.outgoing, layout.incoming)

    def exchanged(self, rows: Tensor, incoming: Sequence[int], outgoing: Sequence[int]) -> Tensor:
        """Rows of all ranks for this one."""
        found: Tensor = _AllToAll.apply(rows, incoming, outgoing, self._ranks.group)
        return found


class _AllToAll(torch.autograd.Function):
    """all_to_all_single, of which the derivative is another."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, incoming: Sequence[int], outgoing: Sequence[int], group: Any) -> Tensor:
        ctx.others = outgoing, incoming, group
        return _all_to_all(rows, incoming, outgoing, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _all_to_all(grads[0], *ctx.others), None, None, None


def _all_to_all(rows: Tensor, incoming: Sequence[int], outgoing: Sequence[int], group: Any) -> Tensor:
    found = rows.new_empty(sum(incoming), rows.shape[1])
    distributed.all_to_all_single(found, rows.contiguous(), list(incoming), list(outgoing), group=group)
    return found


def activated(hidden: Tensor) -> Tensor:
    """SwiGLU of rows (rows, 2I), gate first."""
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


def summed(returned: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Rows (T * K, H) of the assignments `order`, back in place, weighted by (T, K) and summed: (T, H)."""
    rows = returned[inverse(order)].unflatten(0, weights.shape)
    return (rows * weights.unsqueeze(-1).to(returned.dtype)).sum(1)


def inverse(order: Tensor) -> Tensor:
    """Of a permutation."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def _compiled(function: Callable[..., Tensor], backend: str | None) -> Callable[..., Tensor]:
    return torch.compile(function, backend=backend, dynamic=True, fullgraph=True) if backend else function


def baselines(ranks: Ranks, num_experts: int) -> dict[str, Baseline]:
    """Both forms; on the CPU, where it would only take its time, Inductor is left out of the compiled one."""
    backend = "inductor" if ranks.device.type == "cuda" else "eager"
    return {EAGER: Baseline(ranks, num_experts), COMPILED: Baseline(ranks, num_experts, backend)}
