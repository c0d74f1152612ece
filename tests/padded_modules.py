"""Modules with padded bins whose every step may be changed; a grouped GEMM with NaN where CUDA writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import weight

BF16 = torch.bfloat16
H, N, E, K, B = 32, 48, 4, 2, 8  # hidden, intermediate, experts, choices, block

Change = Callable[..., Any]


class Padded(nn.Module):
    """Rows put at padded slots, two grouped GEMMs, rows read back and added to their tokens."""

    def __init__(self, **changes: Change) -> None:
        super().__init__()
        self.changes = changes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a router whose choices are the same in float64
            self.router = nn.Linear(H, E, bias=False, dtype=BF16)
            self.w_in = weight(E, H, N, fan_in=H, dtype=BF16)
            self.w_out = weight(E, N, H, fan_in=N, dtype=BF16)

    def step(self, name: str, *args: Any) -> Any:
        return self.changes.get(name, STEPS[name])(*args)

    def products(self, rows: Tensor, offs: Tensor) -> Tensor:
        h = self.step("activation", self.step("product", rows, self.w_in, offs))
        return self.step("product", h, self.w_out, offs)

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(K)
        key, order = ids.view(-1).sort(stable=True)
        return weights, ids, key, order

    def forward(self, x: Tensor) -> Any:
        weights, ids, key, order = self.routed(x)
        counts = F.one_hot(key, E).sum(0)
        padded = self.step("rounded", counts)
        slot = self.step("slot", key, counts, padded, ids, order)
        rows = self.step("put", x, slot, x[order // K])
        y = self.products(rows, self.step("ends", padded, counts).to(torch.int32))
        y = self.step("read", y, slot)
        return self.step("result", self.step("combine", x, y, weights, order), rows)


class Table(Padded):
    """A table from slot to assignment, rows read by it, and a row that the empty slots are added to."""

    def forward(self, x: Tensor) -> Any:
        tokens, total = x.shape[0], x.shape[0] * K
        weights, ids, key, order = self.routed(x)
        counts = F.one_hot(key, E).sum(0)
        padded = self.step("rounded", counts)
        slot = self.step("slot", key, counts, padded, ids, order)
        table = self.step("table", total + E * B, total, slot, order)
        token = self.step("token", table, total, tokens)
        rows = self.step("rows", x, token, table, total)
        y = self.products(rows, padded.cumsum(0).int())
        y = self.step("masked", y, table, total)
        y = y * self.step("weights", weights.view(-1), table, total).unsqueeze(-1)
        return self.step("sum", x, token, y, tokens, table)


class Searched(Padded):
    """Every slot searches its expert, and its row in the sorted order."""

    def forward(self, x: Tensor) -> Any:
        total = x.shape[0] * K
        weights, _, key, order = self.routed(x)
        counts = torch.histc(key.float(), E, 0, E - 1).long()
        ends = rounded(counts).cumsum(0)
        slot = torch.arange(total + E * B)
        expert = self.step("expert", ends, slot)
        place = slot - (ends - rounded(counts))[expert]
        filled = self.step("filled", place, counts[expert], slot, ends)
        row = self.step("row", (counts.cumsum(0) - counts)[expert] + place, total, filled)
        assignment = order[row]
        rows = torch.where(filled[:, None], x[assignment // K], 0)
        y = self.products(rows, ends.int())
        y = torch.where(filled[:, None], y, 0) * weights.view(-1)[assignment].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, assignment // K, y)


def put(x: Tensor, slot: Tensor, source: Tensor) -> Tensor:
    rows = x.new_zeros(source.shape[0] + E * B, H)
    rows[slot] = source
    return rows


def rank(key: Tensor, counts: Tensor) -> Tensor:
    return torch.arange(key.shape[0]) - (counts.cumsum(0) - counts)[key]


def rounded(counts: Tensor) -> Tensor:
    return (counts + B - 1) // B * B


def slots(key: Tensor, counts: Tensor, padded: Tensor, ids: Tensor, order: Tensor) -> Tensor:
    return (padded.cumsum(0) - padded)[key] + rank(key, counts)


def combine(x: Tensor, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(0, order // K, y * weights.view(-1)[order].unsqueeze(-1))


def zero_row(x: Tensor, token: Tensor, table: Tensor, total: int) -> Tensor:
    return torch.cat([x, x.new_zeros(1, H)])[token]


def spare_sum(x: Tensor, token: Tensor, y: Tensor, tokens: int, table: Tensor) -> Tensor:
    return x.new_zeros(tokens + 1, H).index_add_(0, token, y)[:tokens]


def kept_sum(x: Tensor, token: Tensor, y: Tensor, tokens: int, table: Tensor) -> Tensor:
    """Empty slots are added to token 0: they must be zero."""
    return torch.zeros_like(x).index_add(0, torch.where(table < tokens * K, token, 0), y)


def put_back(x: Tensor, token: Tensor, y: Tensor, tokens: int, table: Tensor) -> Tensor:
    back = x.new_zeros(tokens * K + 1, H)
    back[table] = y
    return back[:-1].view(tokens, K, H).sum(1)


STEPS: dict[str, Change] = {
    "product": lambda rows, w, offs: torch._grouped_mm(rows, w, offs=offs),
    "rounded": rounded,
    "slot": slots,
    "put": put,
    "activation": F.gelu,
    "ends": lambda padded, counts: padded.cumsum(0),
    "read": lambda y, slot: y[slot],
    "combine": combine,
    "result": lambda out, rows: out,
    "table": lambda size, total, slot, order: torch.full((size,), total).scatter_(0, slot, order),
    "token": lambda table, total, tokens: table // K,
    "rows": zero_row,
    "masked": lambda y, table, total: y.masked_fill((table == total).unsqueeze(-1), 0.0),
    "weights": lambda weights, table, total: torch.cat([weights, weights.new_zeros(1)])[table],
    "sum": spare_sum,
    "expert": lambda ends, slot: torch.searchsorted(ends, slot, right=True).clamp(max=E - 1),
    "filled": lambda place, count, slot, ends: (place < count) & (slot < ends[-1]),
    "row": lambda row, total, filled: row.clamp(max=total - 1),
}


class Poisoned(torch.autograd.Function):
    """A grouped GEMM with NaN beyond the last offset, in its result and its gradient, where CUDA writes nothing."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        ctx.save_for_backward(rows, w, offs)
        return _poisoned(rows, w, offs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, w, offs = ctx.saved_tensors
        begin, grad_w = 0, torch.zeros_like(w)
        for expert, end in enumerate(offs.tolist()):
            grad_w[expert] = rows[begin:end].T @ grad[begin:end]
            begin = end
        return _poisoned(grad, w.transpose(1, 2), offs), grad_w, None


def _poisoned(rows: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    result = rows.new_full((rows.shape[0], w.shape[2]), float("nan"))
    begin = 0
    for expert, end in enumerate(offs.tolist()):
        result[begin:end] = rows[begin:end] @ w[expert]
        begin = end
    return result


def poison(module: Padded) -> Padded:
    """The same module, weights included, with poisoned products."""
    twin = type(module)(**module.changes | {"product": Poisoned.apply})
    twin.load_state_dict(module.state_dict())
    return twin
