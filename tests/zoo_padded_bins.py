"""Form "padded_bins": sorted tokens put into bins rounded up to a block, grouped GEMM over the padded offsets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import Case, batched, flat, weight

BF16 = torch.bfloat16


class PaddedGather(nn.Module):
    """As MegaBlocks: bin ids and histogram, padded bins, rows copied to their padded place and read back from there."""

    def __init__(self, hidden: int = 32, ffn: int = 32, experts: int = 4, top_k: int = 2, block: int = 8) -> None:
        super().__init__()
        self.experts, self.top_k, self.block = experts, top_k, block
        self.router = nn.Linear(hidden, experts, bias=False, dtype=BF16)
        self.w1 = weight(experts, hidden, ffn, fan_in=hidden, dtype=BF16)
        self.v1 = weight(experts, hidden, ffn, fan_in=hidden, dtype=BF16)
        self.w2 = weight(experts, ffn, hidden, fan_in=ffn, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        scores, top = torch.topk(self.router(x).softmax(dim=-1), self.top_k, dim=-1)
        bin_ids, indices = torch.sort(top.flatten())
        histogram = torch.histc(bin_ids.float(), self.experts, 0, self.experts - 1).long()
        bins = histogram.cumsum(0)
        padded = (histogram + self.block - 1) // self.block * self.block
        padded_bins = padded.cumsum(0)
        bound = indices.numel() + self.experts * self.block

        rank = torch.arange(indices.numel()) - (bins - histogram)[bin_ids]
        place = (padded_bins - padded)[bin_ids] + rank
        rows = x.new_zeros(bound, x.shape[1])
        rows[place] = x[indices // self.top_k]
        offs = padded_bins.to(torch.int32)
        h = F.silu(torch._grouped_mm(rows, self.w1, offs=offs)) * torch._grouped_mm(rows, self.v1, offs=offs)
        y = torch._grouped_mm(h, self.w2, offs=offs)
        y = y[place] * scores.flatten()[indices].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, indices // self.top_k, y)


class SlotTable(nn.Module):
    """A table from padded slot to assignment with a row of zeros for the empty ones, weights padded likewise."""

    def __init__(self, dim: int = 32, inner: int = 48, experts: int = 4, k: int = 2, block: int = 16) -> None:
        super().__init__()
        self.n, self.k, self.block = experts, k, block
        self.gate = nn.Linear(dim, experts, bias=False, dtype=BF16)
        self.w_in = weight(experts, 2 * inner, dim, fan_in=dim, dtype=BF16)
        self.w_out = weight(experts, dim, inner, fan_in=inner, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        tokens, total = x.shape[0], x.shape[0] * self.k
        weights, ids = self.gate(x).float().softmax(-1).topk(self.k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        ids_sorted, order = ids.view(-1).sort(stable=True)
        counts = F.one_hot(ids_sorted, self.n).sum(0)
        rounded = torch.div(counts + (self.block - 1), self.block, rounding_mode="floor") * self.block
        ends = rounded.cumsum(0)
        shift = (ends - rounded) - (counts.cumsum(0) - counts)
        slot = torch.arange(total, device=x.device) + shift[ids_sorted]
        capacity = total + self.n * self.block
        table = torch.full((capacity,), total, dtype=torch.int64, device=x.device).scatter_(0, slot, order)
        token = torch.where(table < total, table // self.k, tokens)
        rows = torch.cat([x, x.new_zeros(1, shape[-1])])[token]
        offs = ends.int()
        gate, up = F.grouped_mm(rows, self.w_in.transpose(1, 2), offs=offs).chunk(2, dim=-1)
        y = F.grouped_mm(F.gelu(gate) * up, self.w_out.transpose(1, 2), offs=offs)
        y = y.masked_fill((table == total).unsqueeze(-1), 0.0)
        y = y * torch.cat([weights.view(-1), weights.new_zeros(1)])[table].unsqueeze(-1)
        out = x.new_zeros(tokens + 1, shape[-1]).index_add_(0, token, y)
        return out[:tokens].view(shape)


class SearchedSlots(nn.Module):
    """Every padded slot looks up its expert and its row by searchsorted; empty slots are masked, squared ReLU."""

    def __init__(self, dim: int = 64, inner: int = 32, experts: int = 4, k: int = 1, block: int = 4) -> None:
        super().__init__()
        self.n, self.k, self.block = experts, k, block
        self.gate = nn.Linear(dim, experts, dtype=BF16)
        self.up = weight(experts, inner, dim, fan_in=dim, dtype=BF16)
        self.down = weight(experts, dim, inner, fan_in=inner, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).sigmoid().topk(self.k, dim=-1)
        total = ids.numel()
        order = ids.flatten().argsort(stable=True)
        counts = (ids.flatten()[:, None] == torch.arange(self.n)).sum(0)
        ends = (torch.ceil(counts / self.block) * self.block).long().cumsum(0)
        slot = torch.arange(total + self.n * self.block)
        expert = torch.searchsorted(ends, slot, right=True).clamp(max=self.n - 1)
        rank = slot - torch.cat([ends.new_zeros(1), ends[:-1]])[expert]
        filled = (rank < counts[expert]) & (slot < ends[-1])
        row = order[((counts.cumsum(0) - counts)[expert] + rank).clamp(max=total - 1)]
        token = row // self.k
        h = torch._grouped_mm(torch.where(filled[:, None], x[token], 0), self.up.mT, offs=ends.int())
        y = torch._grouped_mm(F.relu(h).square(), self.down.mT, offs=ends.int())
        y = torch.where(filled[:, None], y, 0) * weights.flatten()[row, None]
        return torch.zeros_like(x).index_add_(0, token, y)


FORM = "padded_bins"
CASES = [
    Case("padded_gather", FORM, PaddedGather, flat(32, BF16), "MegaBlocks: rows set at their padded place, w1 v1 w2"),
    Case("slot_table", FORM, SlotTable, batched(32, BF16), "slot to token table, a zero row for padding, masked rows"),
    Case("searched_slots", FORM, SearchedSlots, flat(64, BF16), "each slot searches its expert and row, top-1, relu^2"),
]
