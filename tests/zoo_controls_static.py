"""Controls, continued: capacity, gather and einsum, loop, padded bins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import Case, flat, weight
from zoo_controls import BF16, EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, route

BLOCK = 8


class Capacity(nn.Module):
    """Form "capacity": top-2, every first choice before every second one."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w_in = weight(EXPERTS, HIDDEN, INTERMEDIATE, fan_in=HIDDEN)
        self.w_out = weight(EXPERTS, INTERMEDIATE, HIDDEN, fan_in=INTERMEDIATE)

    def capacity(self, tokens: int) -> int:
        return TOP_K * tokens // EXPERTS

    def positions(self, masks: list[Tensor]) -> list[Tensor]:
        first = masks[0].cumsum(0) - 1
        return [first, masks[1].cumsum(0) - 1 + masks[0].sum(0, keepdim=True)]

    def slots(self, mask: Tensor, position: Tensor, capacity: int) -> Tensor:
        """The tokens' places of one choice as (tokens, experts, capacity), zero where the expert is full."""
        kept = mask * (position < capacity)
        return kept.unsqueeze(-1) * F.one_hot((position * kept).sum(-1), capacity).unsqueeze(1)

    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = route(self.router, x)
        capacity = self.capacity(x.shape[0])
        masks = [F.one_hot(ids[:, k], EXPERTS) for k in range(TOP_K)]
        slots = [self.slots(m, p, capacity).to(x.dtype) for m, p in zip(masks, self.positions(masks), strict=True)]
        combine = slots[0] * weights[:, 0, None, None] + slots[1] * weights[:, 1, None, None]
        return slots[0] + slots[1], combine

    def experts(self, rows: Tensor) -> Tensor:
        hidden = F.relu(torch.einsum("ecm,emf->ecf", rows, self.w_in))
        return torch.einsum("ecf,efm->ecm", hidden, self.w_out)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        dispatch, combine = self.tensors(x)
        return torch.einsum("sec,ecm->sm", combine, self.experts(torch.einsum("sec,sm->ecm", dispatch, x)))


class GatherEinsum(nn.Module):
    """Form "gather_einsum"."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1 = weight(EXPERTS, INTERMEDIATE, HIDDEN, fan_in=HIDDEN)
        self.w2 = weight(EXPERTS, HIDDEN, INTERMEDIATE, fan_in=INTERMEDIATE)
        self.w3 = weight(EXPERTS, INTERMEDIATE, HIDDEN, fan_in=HIDDEN)

    def gathered(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.w1[ids], self.w3[ids], self.w2[ids]

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def project(self, a: Tensor, w2: Tensor) -> Tensor:
        return torch.einsum("tao,taio->tai", a, w2)

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("tai,ta->ti", y, weights)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        weights, ids = route(self.router, x)
        w1, w3, w2 = self.gathered(ids)
        a = self.activate(torch.einsum("ti,taoi->tao", x, w1), torch.einsum("ti,taoi->tao", x, w3))
        return self.combine(self.project(a, w2), weights)


class Loop(nn.Module):
    """Form "expert_loop"."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w_in = weight(EXPERTS, 2 * INTERMEDIATE, HIDDEN, fan_in=HIDDEN)
        self.w_out = weight(EXPERTS, HIDDEN, INTERMEDIATE, fan_in=INTERMEDIATE)

    def turns(self) -> list[int]:
        return list(range(EXPERTS))

    def hits(self, ids: Tensor, e: int) -> tuple[Tensor, Tensor]:
        token, place = torch.where(ids == e)
        return token, place

    def activate(self, h: Tensor, e: int) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    def expert(self, rows: Tensor, e: int) -> Tensor:
        return F.linear(self.activate(F.linear(rows, self.w_in[e]), e), self.w_out[e])

    def weigh(self, y: Tensor, weights: Tensor, token: Tensor, place: Tensor) -> Tensor:
        return y * weights[token, place, None]

    def add(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.index_add_(0, token, y)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        weights, ids = route(self.router, x)
        out = torch.zeros_like(x)
        for e in self.turns():
            token, place = self.hits(ids, e)
            out = self.add(out, token, self.weigh(self.expert(x[token], e), weights, token, place))
        return out


class Padded(nn.Module):
    """Form "padded_bins"."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False, dtype=BF16)
        self.w_in = weight(EXPERTS, HIDDEN, INTERMEDIATE, fan_in=HIDDEN, dtype=BF16)
        self.w_out = weight(EXPERTS, INTERMEDIATE, HIDDEN, fan_in=INTERMEDIATE, dtype=BF16)

    def round_up(self, counts: Tensor) -> Tensor:
        return (counts + BLOCK - 1) // BLOCK * BLOCK

    def places(self, sorted_ids: Tensor, counts: Tensor, padded: Tensor) -> Tensor:
        rank = torch.arange(sorted_ids.shape[0]) - (counts.cumsum(0) - counts)[sorted_ids]
        return (padded.cumsum(0) - padded)[sorted_ids] + rank

    def offsets(self, counts: Tensor, padded: Tensor) -> Tensor:
        return padded.cumsum(0).to(torch.int32)

    def activate(self, h: Tensor) -> Tensor:
        return F.gelu(h)

    def read(self, y: Tensor, place: Tensor) -> Tensor:
        return y[place]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        weights, ids = route(self.router, x)
        sorted_ids, perm = ids.flatten().sort(stable=True)
        counts = F.one_hot(sorted_ids, EXPERTS).sum(0)
        padded = self.round_up(counts)
        place, offs = self.places(sorted_ids, counts, padded), self.offsets(counts, padded)
        rows = x.new_zeros(perm.shape[0] + EXPERTS * BLOCK, HIDDEN)
        rows[place] = x[perm // TOP_K]
        y = torch._grouped_mm(self.activate(torch._grouped_mm(rows, self.w_in, offs=offs)), self.w_out, offs=offs)
        y = self.read(y, place) * weights.flatten()[perm].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, perm // TOP_K, y)


FLAT32, FLAT16 = flat(HIDDEN), flat(HIDDEN, BF16)
CASES = [
    Case("capacity_control", "capacity", Capacity, FLAT32, "GShard in steps, places of both choices summed"),
    Case("einsum_control", "gather_einsum", GatherEinsum, FLAT32, "gpt-fast in steps"),
    Case(
        "loop_control", "expert_loop", Loop, FLAT32, "loop in steps, stacked fused weights, index_add_", fullgraph=True
    ),
    Case("padded_control", "padded_bins", Padded, FLAT16, "padded bins in steps, gelu without a gate"),
]
