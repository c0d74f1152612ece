"""Form "gather_einsum": weights gathered by (tokens, top_k) ids and contracted with an einsum that keeps both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import Case, batched, flat, weight

BF16 = torch.bfloat16


class ConditionalFeedForward(nn.Module):
    """As gpt-fast writes it: w1 and w3 gathered apart, the token broadcast by the einsum."""

    def __init__(self, dim: int = 32, inner: int = 48, experts: int = 8, active: int = 2) -> None:
        super().__init__()
        self.active = active
        self.gate = nn.Linear(dim, experts, bias=False)
        self.w1 = weight(experts, inner, dim, fan_in=dim)
        self.w2 = weight(experts, dim, inner, fan_in=inner)
        self.w3 = weight(experts, inner, dim, fan_in=dim)

    def experts(self, x: Tensor, indices: Tensor) -> Tensor:
        w1, w3, w2 = self.w1[indices], self.w3[indices], self.w2[indices]
        x1 = F.silu(torch.einsum("ti,taoi->tao", x, w1))
        x3 = torch.einsum("ti,taoi->tao", x, w3)
        return torch.einsum("tao,taio->tai", x1 * x3, w2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, x.shape[-1])
        weights = F.softmax(self.gate(x), dim=-1)
        weights, indices = torch.topk(weights, self.active, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        return torch.einsum("tai,ta->ti", self.experts(x, indices), weights)


class FlatAssignments(nn.Module):
    """Both routing dims fused in the gather and opened again, gate and up stacked in one weight, bfloat16."""

    def __init__(self, hidden: int = 64, inter: int = 32, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden, experts, dtype=BF16)
        self.w_in = weight(experts, hidden, 2 * inter, fan_in=hidden, dtype=BF16)
        self.w_out = weight(experts, inter, hidden, fan_in=inter, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        probs, ids = self.router(x).softmax(-1, dtype=torch.float32).topk(self.top_k)
        n = x.size(0)
        w_in = self.w_in[ids.view(-1)].view(n, self.top_k, *self.w_in.shape[1:])
        w_out = self.w_out[ids.view(-1)].view(n, self.top_k, *self.w_out.shape[1:])
        gate, up = torch.einsum("nh,nkhf->nkf", x, w_in).chunk(2, -1)
        y = torch.einsum("nkf,nkfh->nkh", F.gelu(gate, approximate="tanh") * up, w_out)
        return torch.einsum("nk,nkh->nh", probs.type_as(y), y)


class SequenceEinsum(nn.Module):
    """Batch and sequence kept apart through gather and einsum, one contraction weights and sums the experts."""

    def __init__(self, width: int = 32, mlp: int = 32, experts: int = 4, k: int = 2) -> None:
        super().__init__()
        self.k = k
        self.router = weight(width, experts, fan_in=width)
        self.wi = weight(experts, width, mlp, fan_in=width)
        self.wo = weight(experts, mlp, width, fan_in=mlp)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.einsum("bsd,de->bse", x, self.router)
        scores, ids = logits.softmax(dim=-1).topk(self.k, dim=-1)
        h = torch.einsum("bsd,bskdf->bskf", x, self.wi[ids])
        h = F.relu(h) ** 2
        return torch.einsum("bskf,bskfd,bsk->bsd", h, self.wo[ids], scores), logits


class SelectedByIndex(nn.Module):
    """index_select by flat ids for three weights of (E, in, out), top-1 kept as a dimension, clamped SwiGLU."""

    def __init__(self, hidden: int = 32, inter: int = 48, experts: int = 4, top_k: int = 1) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_proj = weight(experts, hidden, inter, fan_in=hidden)
        self.up_proj = weight(experts, hidden, inter, fan_in=hidden)
        self.down_proj = weight(experts, inter, hidden, fan_in=inter)

    def select(self, stacked: Tensor, ids: Tensor) -> Tensor:
        return torch.index_select(stacked, 0, ids.flatten()).unflatten(0, ids.shape)

    def forward(self, x: Tensor) -> Tensor:
        score, ids = torch.topk(torch.sigmoid(self.router(x)), self.top_k)
        gate = torch.einsum("td,tkdf->tkf", x, self.select(self.gate_proj, ids)).clamp(max=2.0)
        up = torch.einsum("td,tkdf->tkf", x, self.select(self.up_proj, ids)).clamp(-2.0, 2.0)
        y = torch.einsum("tkf,tkfd->tkd", F.silu(gate) * up, self.select(self.down_proj, ids))
        return (y * score[:, :, None]).sum(1)


FORM = "gather_einsum"
CASES = [
    Case("conditional_feed_forward", FORM, ConditionalFeedForward, flat(32), "gpt-fast: ti,taoi->tao, w1 w3 w2"),
    Case("flat_assignments", FORM, FlatAssignments, flat(64, BF16), "gather by flat ids, view, fused gate and up"),
    Case("sequence_einsum", FORM, SequenceEinsum, batched(32), "bskf,bskfd,bsk->bsd: GEMM, weight and sum in one"),
    Case("selected_by_index", FORM, SelectedByIndex, flat(32), "index_select and unflatten, clamped SwiGLU, top-1"),
]
