"""Form "torchtitan": three grouped GEMMs w1, w3, w2, weights in float32, scatter-add onto a shared expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import Case, batched, flat, weight

BF16 = torch.bfloat16


class ReorderAndScatter(nn.Module):
    """As torchtitan writes it: counts by scatter and sum that feed a load buffer, float32 weight after the experts."""

    tokens_per_expert: Tensor

    def __init__(self, dim: int = 64, hidden: int = 32, experts: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.num_experts, self.top_k = experts, top_k
        self.gate = nn.Linear(dim, experts, bias=False)
        self.w1 = weight(experts, hidden, dim, fan_in=dim)
        self.w2 = weight(experts, dim, hidden, fan_in=hidden)
        self.w3 = weight(experts, hidden, dim, fan_in=dim)
        self.shared_in = nn.Linear(dim, hidden, bias=False)
        self.shared_out = nn.Linear(hidden, dim, bias=False)
        self.register_buffer("tokens_per_expert", torch.zeros(experts), persistent=False)

    def experts(self, x: Tensor, counts: Tensor) -> Tensor:
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        h = F.silu(torch._grouped_mm(x.bfloat16(), self.w1.bfloat16().transpose(-2, -1), offs=offsets))
        h = h * torch._grouped_mm(x.bfloat16(), self.w3.bfloat16().transpose(-2, -1), offs=offsets)
        return torch._grouped_mm(h, self.w2.bfloat16().transpose(-2, -1), offs=offsets).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        bs, slen, dim = x.shape
        x = x.view(-1, dim)
        scores = torch.sigmoid(self.gate(x).to(torch.float32))
        top_scores, selected = torch.topk(scores, k=self.top_k, dim=1)
        top_scores = top_scores / (top_scores.sum(dim=-1, keepdim=True) + 1e-20)
        counts = torch.zeros_like(scores, dtype=torch.int32).scatter_(1, selected, 1).sum(dim=0)
        if self.training:
            with torch.no_grad():
                self.tokens_per_expert.add_(counts)
        order = torch.argsort(selected.view(-1), stable=True)
        scores_sorted = top_scores.view(-1)[order]
        token_indices = (order // self.top_k).reshape(-1, 1).expand(-1, dim)
        routed = torch.gather(x, dim=0, index=token_indices)
        routed = self.experts(routed, counts)
        routed = (routed.to(torch.float32) * scores_sorted.reshape(-1, 1)).to(x.dtype)
        out = self.shared_out(F.silu(self.shared_in(x)))
        out = out.scatter_add(dim=0, index=token_indices, src=routed)
        return out.reshape(bs, slen, dim)


class ScoreBeforeExperts(nn.Module):
    """Scores multiply the gathered rows in float32, weights kept in bfloat16, index_add_ into zeros, histc counts."""

    load: Tensor

    def __init__(self, dim: int = 32, ffn: int = 48, experts: int = 4, k: int = 2) -> None:
        super().__init__()
        self.n, self.k = experts, k
        self.router = nn.Linear(dim, experts, bias=False, dtype=BF16)
        self.w1 = weight(experts, dim, ffn, fan_in=dim, dtype=BF16)
        self.w2 = weight(experts, ffn, dim, fan_in=ffn, dtype=BF16)
        self.w3 = weight(experts, dim, ffn, fan_in=dim, dtype=BF16)
        self.register_buffer("load", torch.zeros(experts))

    def forward(self, x: Tensor) -> Tensor:
        scores = F.softmax(self.router(x).float(), dim=1)
        top, ids = torch.topk(scores, self.k, dim=1, sorted=False)
        counts = torch.histc(ids.view(-1).float(), bins=self.n, min=0, max=self.n - 1)
        if self.training:
            self.load += counts.detach()
        order = torch.argsort(ids.view(-1), stable=True)
        token = order // self.k
        rows = (x[token].float() * top.view(-1)[order].unsqueeze(-1)).to(x.dtype)
        offs = counts.cumsum(0).to(torch.int32)
        gate = torch._grouped_mm(rows, self.w1, offs=offs)
        up = torch._grouped_mm(rows, self.w3, offs=offs)
        down = torch._grouped_mm(F.silu(gate) * up, self.w2, offs=offs)
        out = torch.zeros_like(x)
        out.index_add_(0, token, down)
        return out


class SharedFirst(nn.Module):
    """Shared expert first and scatter_add_ in place into it, routing bias for the choice only, rows by torch.gather."""

    def __init__(self, width: int = 32, inner: int = 32, experts: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.e, self.top_k = experts, top_k
        self.router = nn.Linear(width, experts, bias=False, dtype=BF16)
        self.expert_bias = nn.Buffer(torch.randn(experts) * 0.1)
        self.gate_w = weight(experts, inner, width, fan_in=width, dtype=BF16)
        self.up_w = weight(experts, inner, width, fan_in=width, dtype=BF16)
        self.down_w = weight(experts, width, inner, fan_in=inner, dtype=BF16)
        self.shared = nn.Linear(width, width, bias=False, dtype=BF16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).float().sigmoid()
        _, ids = torch.topk(scores + self.expert_bias, self.top_k, dim=-1)
        chosen = scores.gather(1, ids) * 1.5
        out = self.shared(x)
        flat_ids = ids.reshape(-1)
        counts = torch.zeros(self.e, dtype=torch.int64).scatter_add_(0, flat_ids, torch.ones_like(flat_ids))
        ordered = torch.sort(flat_ids, stable=True)
        offs = counts.cumsum(0, dtype=torch.int32)
        index = (ordered.indices // self.top_k)[:, None].expand(-1, x.size(1))
        rows = torch.gather(x, 0, index)
        act = F.silu(F.grouped_mm(rows, self.gate_w.mT, offs=offs)) * F.grouped_mm(rows, self.up_w.mT, offs=offs)
        y = F.grouped_mm(act, self.down_w.mT, offs=offs)
        y = (y.float() * chosen.flatten()[ordered.indices].unsqueeze(1)).bfloat16()
        out.scatter_add_(0, index, y)
        return out, counts


FORM = "torchtitan"
CASES = [
    Case("reorder_and_scatter", FORM, ReorderAndScatter, batched(64), "counts by scatter_ and sum, load buffer"),
    Case("score_before_experts", FORM, ScoreBeforeExperts, flat(32, BF16), "weight before, histc, index_add_"),
    Case("shared_first", FORM, SharedFirst, flat(32, BF16), "in-place scatter_add_ onto the shared expert"),
]
