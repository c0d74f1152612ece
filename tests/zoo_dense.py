"""Form "dense": every expert sees every token, and gates that are zero outside the chosen experts weight the sum."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import Case, batched, flat, weight

BF16 = torch.bfloat16


class ScatteredInfinity(nn.Module):
    """As llama4 writes it: -inf scatter and sigmoid, weight before the experts, added in place to the shared expert."""

    def __init__(self, hidden: int = 32, intermediate: int = 48, experts: int = 4, top_k: int = 1) -> None:
        super().__init__()
        self.hidden, self.experts, self.top_k = hidden, experts, top_k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up_proj = weight(experts, hidden, 2 * intermediate, fan_in=hidden)
        self.down_proj = weight(experts, intermediate, hidden, fan_in=intermediate)
        self.shared = nn.Sequential(nn.Linear(hidden, 64), nn.SiLU(), nn.Linear(64, hidden))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states = hidden_states.reshape(-1, self.hidden)
        logits = self.router(hidden_states)
        value, index = torch.topk(logits, self.top_k, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, index, value)
        scores = torch.sigmoid(scores.float()).to(scores.dtype)
        routed = hidden_states.repeat(scores.shape[1], 1)
        routed = routed * scores.transpose(0, 1).reshape(-1, 1)
        routed = routed.view(self.experts, -1, self.hidden)
        gate, up = torch.bmm(routed, self.gate_up_proj).chunk(2, dim=-1)
        routed = torch.bmm(up * F.silu(gate), self.down_proj).view(-1, self.hidden)
        out = self.shared(hidden_states)
        out.add_(routed.reshape(scores.shape[1], -1, routed.shape[-1]).sum(dim=0))
        return out, logits


class ScatteredGates(nn.Module):
    """zeros.scatter gates after the experts, every product an einsum, geglu in bfloat16."""

    def __init__(self, h: int = 32, i: int = 32, e: int = 8, k: int = 2) -> None:
        super().__init__()
        self.k = k
        self.gate = nn.Linear(h, e, bias=False, dtype=BF16)
        self.wg = weight(e, h, i, fan_in=h, dtype=BF16)
        self.wu = weight(e, h, i, fan_in=h, dtype=BF16)
        self.wd = weight(e, i, h, fan_in=i, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        probs = self.gate(x).float().softmax(-1)
        top, ids = probs.topk(self.k, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        gates = torch.zeros_like(probs).scatter(1, ids, top).to(x.dtype)
        act = F.gelu(torch.einsum("th,ehi->eti", x, self.wg)) * torch.einsum("th,ehi->eti", x, self.wu)
        out = torch.einsum("eti,eih->eth", act, self.wd)
        return torch.einsum("te,eth->th", gates, out)


class MaskedSoftmax(nn.Module):
    """A boolean mask from the top-k, softmax over what it leaves, experts unrolled over a stacked weight."""

    def __init__(self, hidden: int = 32, inter: int = 32, num_experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.top_k, self.num_experts = top_k, num_experts
        self.router = nn.Linear(hidden, num_experts)
        self.w1 = weight(num_experts, inter, hidden, fan_in=hidden)
        self.w3 = weight(num_experts, inter, hidden, fan_in=hidden)
        self.w2 = weight(num_experts, hidden, inter, fan_in=inter)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        chosen = logits.topk(self.top_k, dim=-1).indices
        keep = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)
        gates = logits.masked_fill(~keep, float("-inf")).softmax(dim=-1)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            h = F.silu(F.linear(x, self.w1[e])) * F.linear(x, self.w3[e])
            out = out + gates[:, e : e + 1] * F.linear(h, self.w2[e])
        return out


class StackedExperts(nn.Module):
    """one_hot gates, broadcast matmul with a leading expert dimension, weight and sum at the end, 3-D inputs."""

    def __init__(self, dim: int = 32, hidden: int = 64, experts: int = 4, k: int = 2) -> None:
        super().__init__()
        self.k, self.n = k, experts
        self.router = nn.Linear(dim, experts, bias=False)
        self.w_in = weight(experts, dim, 2 * hidden, fan_in=dim)
        self.w_out = weight(experts, hidden, dim, fan_in=hidden)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        p, ids = F.softmax(self.router(tokens), -1).topk(self.k)
        gates = (F.one_hot(ids, self.n).to(p.dtype) * p.unsqueeze(-1)).sum(dim=1)
        h = torch.matmul(tokens, self.w_in)
        a, b = h.split(h.size(-1) // 2, dim=-1)
        y = torch.matmul(F.silu(a) * b, self.w_out)
        return (y.transpose(0, 1) * gates.unsqueeze(-1)).sum(1).view_as(x)


class EmbeddedUnits(nn.Module):
    """As doge writes it: product keys choose experts of one unit each, held in two embeddings."""

    def __init__(self, hidden: int = 32, experts: int = 16, top_k: int = 4) -> None:
        super().__init__()
        self.keys, self.top_k = math.isqrt(experts), top_k
        self.router_gate = nn.Linear(hidden, 2 * self.keys, bias=False)
        self.down_embed = nn.Embedding(experts, hidden)
        self.up_embed = nn.Embedding(experts, hidden)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[0] * x.shape[1]
        logits = self.router_gate(x).view(2, tokens, -1)
        (score_x, score_y), (index_x, index_y) = logits.topk(self.keys, dim=-1)
        scores = (score_x.unsqueeze(-1) + score_y.unsqueeze(-2)).view(tokens, -1)
        indices = (index_x.unsqueeze(-1) * self.keys + index_y.unsqueeze(-2)).view(tokens, -1)
        scores, place = scores.topk(self.top_k, dim=-1)
        indices = indices.gather(-1, place)
        down, up = self.down_embed(indices), self.up_embed(indices)
        units = torch.matmul(down, x.view(tokens, -1, 1)).view(tokens, -1)
        units = F.silu(units) * F.softmax(scores, dim=-1)
        return torch.matmul(units.view(tokens, 1, -1), up).view(x.shape)


FORM = "dense"
CASES = [
    Case("scattered_infinity", FORM, ScatteredInfinity, flat(32), "llama4: -inf scatter, sigmoid, weight before, bmm"),
    Case("scattered_gates", FORM, ScatteredGates, flat(32, BF16), "zeros.scatter gates, einsum throughout, geglu"),
    Case("masked_softmax", FORM, MaskedSoftmax, flat(32), "softmax over masked logits, F.linear unrolled over experts"),
    Case("stacked_experts", FORM, StackedExperts, batched(32), "one_hot gates, broadcast matmul, (T,E,H) sum"),
    Case(
        "embedded_units",
        FORM,
        EmbeddedUnits,
        batched(32),
        "doge: experts of one unit in embeddings",
        notes="the gathers are of the chosen experts only, so it is a gather form by its data flow",
    ),
]
