"""Form "grouped_mm": tokens sorted by expert, two grouped GEMMs between the same offsets, unsorted and summed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import Case, batched, bias, flat, weight

BF16 = torch.bfloat16


class SortHistogram(nn.Module):
    """As transformers writes it: sort, histogram, inverse permutation by assignment, view and sum."""

    def __init__(self, hidden: int = 64, intermediate: int = 32, experts: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.num_experts, self.top_k = experts, top_k
        self.gate = nn.Linear(hidden, experts, bias=False, dtype=BF16)
        self.gate_up_proj = weight(experts, 2 * intermediate, hidden, fan_in=hidden, dtype=BF16)
        self.down_proj = weight(experts, hidden, intermediate, fan_in=intermediate, dtype=BF16)

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens, hidden = hidden_states.shape
        probs = F.softmax(self.gate(hidden_states), dim=-1, dtype=torch.float)
        top_weights, top_index = torch.topk(probs, self.top_k, dim=-1)
        top_weights /= top_weights.sum(dim=-1, keepdim=True)

        sample_weights, expert_ids = top_weights.reshape(-1), top_index.reshape(-1)
        sorted_ids, perm = torch.sort(expert_ids)
        rows = hidden_states[perm // self.top_k]
        counts = torch.histc(sorted_ids.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)

        both = F.grouped_mm(rows, self.gate_up_proj.transpose(-2, -1), offs=offsets)
        gate, up = both.chunk(2, dim=-1)
        down = F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(-2, -1), offs=offsets)
        down = down * sample_weights[perm].unsqueeze(-1)

        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.size(0), device=perm.device)
        return down[inverse].view(tokens, self.top_k, hidden).sum(dim=1).to(hidden_states.dtype)


class ArgsortInverse(nn.Module):
    """Two argsorts, boolean comparison counts, (E, in, out) weights, weighting after the tokens are back."""

    def __init__(self, dim: int = 32, ffn: int = 48, n_experts: int = 4, k: int = 2) -> None:
        super().__init__()
        self.n_experts, self.k = n_experts, k
        self.router = nn.Parameter(torch.randn(dim, n_experts, dtype=BF16) * 0.2)
        self.w_in = weight(n_experts, dim, 2 * ffn, fan_in=dim, dtype=BF16)
        self.w_out = weight(n_experts, ffn, dim, fan_in=ffn, dtype=BF16)
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        val, idx = (x @ self.router).topk(self.k)
        val = val.softmax(-1)
        order = idx.flatten().argsort(stable=True)
        counts = (idx.flatten().unsqueeze(1) == torch.arange(self.n_experts)).sum(0)
        offs = counts.cumsum(0).to(torch.int32)
        h = torch._grouped_mm(x.index_select(0, order.div(self.k, rounding_mode="floor")), self.w_in, offs=offs)
        h = F.gelu(h[:, : self.ffn], approximate="tanh") * h[:, self.ffn :]
        y = torch._grouped_mm(h, self.w_out, offs=offs)
        y = y.index_select(0, order.argsort())
        y = y.view(-1, self.k, shape[-1]) * val.unsqueeze(-1)
        return y.sum(1).view(shape)


class IndexAddOneHot(nn.Module):
    """one_hot counts, float32 silu, index_add_ into zeros, a shared expert beside, router logits returned."""

    def __init__(self, d_model: int = 32, d_ff: int = 32, num_experts: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.router = nn.Linear(d_model, num_experts, dtype=BF16)
        self.experts_up = weight(num_experts, d_model, 2 * d_ff, fan_in=d_model, dtype=BF16)
        self.experts_down = weight(num_experts, d_ff, d_model, fan_in=d_ff, dtype=BF16)
        self.shared_up = nn.Linear(d_model, d_ff, bias=False, dtype=BF16)
        self.shared_down = nn.Linear(d_ff, d_model, bias=False, dtype=BF16)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, d_model = inputs.shape
        x = inputs.view(batch * length, d_model)
        logits = self.router(x)
        scores, chosen = torch.sigmoid(logits.float()).topk(self.top_k, dim=1)
        assignments = chosen.view(-1)
        permutation = torch.argsort(assignments, dim=0)
        token = torch.div(permutation, self.top_k, rounding_mode="trunc")
        ends = F.one_hot(assignments, self.num_experts).sum(dim=0).cumsum(dim=0).int()
        value, gate = torch._grouped_mm(x[token], self.experts_up, offs=ends).tensor_split(2, dim=-1)
        act = (value.float() * torch.sigmoid(value.float())).to(value.dtype) * gate
        expert_out = torch._grouped_mm(act, self.experts_down, offs=ends)
        expert_out = expert_out * scores.flatten()[permutation, None].to(expert_out.dtype)
        mixed = torch.zeros_like(x)
        mixed.index_add_(0, token, expert_out)
        mixed = mixed + self.shared_down(F.silu(self.shared_up(x)))
        return mixed.view_as(inputs), logits


class InterleavedBiased(nn.Module):
    """gpt-oss: interleaved gate and up, clamped, biases added in place to the GEMM's result."""

    def __init__(self, hidden: int = 64, inter: int = 64, experts: int = 4, active: int = 2) -> None:
        super().__init__()
        self.experts, self.active = experts, active
        self.alpha, self.limit = 1.702, 1.5
        self.router = nn.Linear(hidden, experts, dtype=BF16)
        self.w1 = weight(experts, hidden, 2 * inter, fan_in=hidden, dtype=BF16)
        self.b1 = bias(experts, 2 * inter, dtype=BF16)
        self.w2 = weight(experts, inter, hidden, fan_in=inter, dtype=BF16)
        self.b2 = bias(experts, hidden, dtype=BF16)

    def activate(self, h: Tensor) -> Tensor:
        gate, up = h[..., ::2], h[..., 1::2]
        gate = gate.clamp(min=None, max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens, hidden = x.shape
        logits, ids = torch.topk(self.router(x), self.active, dim=-1)
        scores = F.softmax(logits, dim=1, dtype=logits.dtype)
        ids_sorted, perm = ids.reshape(-1).sort(stable=True)
        offs = torch.searchsorted(ids_sorted, torch.arange(self.experts), right=True).to(torch.int32)
        h = torch._grouped_mm(x[perm // self.active], self.w1, offs=offs)
        h.add_(self.b1[ids_sorted])
        y = torch._grouped_mm(self.activate(h), self.w2, offs=offs)
        y += self.b2[ids_sorted]
        y *= scores.view(-1)[perm].view(-1, 1)
        out = torch.empty_like(y)
        out[perm] = y
        return out.view(tokens, self.active, hidden).sum(1), scores


class TopOneSquared(nn.Module):
    """Top-1 without renormalisation, squared ReLU without a gate, no division of the permutation, scatter back."""

    def __init__(self, width: int = 32, inner: int = 64, experts: int = 4) -> None:
        super().__init__()
        self.n = experts
        self.router = nn.Linear(width, experts, bias=False, dtype=BF16)
        self.up = weight(experts, inner, width, fan_in=width, dtype=BF16)
        self.down = weight(experts, width, inner, fan_in=inner, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        probs = self.router(x).softmax(dim=-1)
        p, which = probs.max(dim=-1)
        which, perm = torch.sort(which)
        counts = torch.zeros(self.n, dtype=torch.int32).index_add_(0, which, torch.ones_like(which, dtype=torch.int32))
        offs = counts.cumsum(0, dtype=torch.int32)
        h = F.grouped_mm(x[perm], self.up.mT, offs=offs)
        y = F.grouped_mm(F.relu(h).pow(2), self.down.mT, offs=offs)
        return torch.zeros_like(y).index_copy(0, perm, y) * p.unsqueeze(1)


class BatchedCombine(nn.Module):
    """Weights stored as nn.Linear would store them, weighted sum as a batched product, tanh GLU, scaled scores."""

    def __init__(self, hidden: int = 48, inter: int = 32, experts: int = 6, top_k: int = 3) -> None:
        super().__init__()
        self.top_k, self.num_experts = top_k, experts
        self.router = nn.Linear(hidden, experts, bias=False)
        self.w1 = weight(experts, 2 * inter, hidden, fan_in=hidden)
        self.w2 = weight(experts, hidden, inter, fan_in=inter)

    def forward(self, x: Tensor) -> Tensor:
        scores, ids = torch.softmax(self.router(x.float()), -1).topk(self.top_k, -1)
        scores = 2.5 * scores / scores.sum(-1, True)
        flat_ids = ids.flatten()
        perm = flat_ids.argsort()
        back = perm.argsort()
        offs = torch.bincount(flat_ids, minlength=self.num_experts).cumsum(0).to(torch.int32)
        rows = x.repeat_interleave(self.top_k, dim=0)[perm]
        h = torch._grouped_mm(rows.bfloat16(), self.w1.bfloat16().transpose(1, 2), offs=offs)
        a, b = torch.split(h, h.shape[-1] // 2, dim=1)
        y = torch._grouped_mm(torch.tanh(a) * b, self.w2.bfloat16().transpose(1, 2), offs=offs)
        y = y[back].unflatten(0, (-1, self.top_k))
        return torch.bmm(scores.to(y.dtype).unsqueeze(1), y).squeeze(1)


FORM = "grouped_mm"
CASES = [
    Case("sort_histogram", FORM, SortHistogram, flat(64, BF16), "transformers: sort, histc, inverse by setitem"),
    Case("argsort_inverse", FORM, ArgsortInverse, batched(32, BF16), "argsort twice, (E,in,out), slices, geglu"),
    Case("index_add_one_hot", FORM, IndexAddOneHot, batched(32, BF16), "one_hot counts, index_add_, float32 silu"),
    Case("interleaved_biased", FORM, InterleavedBiased, flat(64, BF16), "gpt-oss: interleaved, in-place biases"),
    Case("top_one_squared", FORM, TopOneSquared, flat(32, BF16), "max instead of topk, relu^2, index_copy"),
    Case(
        "batched_combine",
        FORM,
        BatchedCombine,
        flat(48, BF16),
        "bincount, repeat_interleave then permute, bmm with the scores",
        fullgraph=True,
        notes="bincount has an unbacked size in the graph",
    ),
]
