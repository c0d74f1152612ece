"""Form "batched_mm": the chosen expert's weights are gathered for every assignment, then a batched product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import Case, batched, bias, flat, weight

BF16 = torch.bfloat16


class RepeatedRows(nn.Module):
    """As transformers writes it: repeat_interleave, flat ids, bmm with a trailing one, view and sum."""

    def __init__(self, hidden: int = 32, intermediate: int = 48, experts: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.gate_up_proj = weight(experts, 2 * intermediate, hidden, fan_in=hidden)
        self.down_proj = weight(experts, hidden, intermediate, fan_in=intermediate)

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens, hidden = hidden_states.shape
        probs = F.softmax(self.gate(hidden_states), dim=-1, dtype=torch.float)
        top_weights, top_index = torch.topk(probs, self.top_k, dim=-1)
        top_weights = top_weights / top_weights.sum(dim=-1, keepdim=True)
        rows = hidden_states.repeat_interleave(self.top_k, dim=0)
        ids = top_index.reshape(-1)
        out = torch.bmm(self.gate_up_proj[ids], rows.unsqueeze(-1)).squeeze(-1)
        gate, up = out.chunk(2, dim=-1)
        out = torch.bmm(self.down_proj[ids], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        out = out * top_weights.reshape(-1).unsqueeze(-1)
        return out.view(tokens, self.top_k, hidden).sum(dim=1).to(hidden_states.dtype)


class TokenIndexEinsum(nn.Module):
    """Rows by a token index, two-operand einsums over (E, in, out), gathered biases, index_add combine."""

    def __init__(self, d: int = 32, f: int = 64, num_experts: int = 4, k: int = 2) -> None:
        super().__init__()
        self.k = k
        self.router = nn.Linear(d, num_experts)
        self.w1, self.b1 = weight(num_experts, d, f, fan_in=d), bias(num_experts, f)
        self.w2, self.b2 = weight(num_experts, f, d, fan_in=f), bias(num_experts, d)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        top, expert = logits.topk(self.k, dim=-1)
        gates = torch.softmax(top, dim=-1).flatten()
        expert = expert.flatten()
        token = torch.arange(x.shape[0], device=x.device).repeat_interleave(self.k)
        h = torch.einsum("sd,sdf->sf", x[token], self.w1[expert]) + self.b1[expert]
        h = F.gelu(h)
        y = torch.einsum("sf,sfd->sd", h, self.w2[expert]) + self.b2[expert]
        return torch.zeros_like(x).index_add(0, token, gates[:, None] * y), logits


class ExpandedMatmul(nn.Module):
    """Four-dimensional matmul on (tokens, top_k) ids, a view expanded over top_k, tanh gate, bfloat16."""

    def __init__(self, hidden: int = 32, inter: int = 32, experts: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.top_k, self.inter = top_k, inter
        self.gate = nn.Linear(hidden, experts, bias=False, dtype=BF16)
        self.w13 = weight(experts, 2 * inter, hidden, fan_in=hidden, dtype=BF16)
        self.w2 = weight(experts, hidden, inter, fan_in=inter, dtype=BF16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        flat_x = x.reshape(-1, hidden)
        weights, ids = self.gate(flat_x).float().sigmoid().topk(self.top_k, dim=-1, sorted=False)
        rows = flat_x.unsqueeze(1).expand(-1, self.top_k, -1)
        h = torch.matmul(self.w13[ids], rows.unsqueeze(-1)).squeeze(-1)
        h = torch.tanh(h[..., : self.inter]) * h[..., self.inter :]
        y = (self.w2[ids] @ h[..., None])[..., 0]
        return (y * weights.to(y.dtype)[..., None]).sum(dim=-2).reshape(batch, length, hidden)


class FusedBiasTopOne(nn.Module):
    """Top-1 with index_select and baddbmm, squared ReLU, the weight of the single expert unnormalised."""

    def __init__(self, size: int = 32, inner: int = 32, n: int = 4) -> None:
        super().__init__()
        self.route = nn.Linear(size, n, bias=False)
        self.up, self.up_bias = weight(n, size, inner, fan_in=size), bias(n, 1, inner)
        self.down, self.down_bias = weight(n, inner, size, fan_in=inner), bias(n, 1, size)

    def forward(self, x: Tensor) -> Tensor:
        prob, pick = self.route(x).softmax(-1).max(-1, keepdim=True)
        pick = pick.squeeze(-1)
        up, down = self.up.index_select(0, pick), self.down.index_select(0, pick)
        h = torch.baddbmm(self.up_bias[pick], x.unsqueeze(1), up)
        h = torch.square(torch.relu(h))
        return torch.baddbmm(self.down_bias[pick], h, down).squeeze(1).mul(prob)


FORM = "batched_mm"
CASES = [
    Case("repeated_rows", FORM, RepeatedRows, flat(32), "transformers: repeat_interleave, bmm, view and sum"),
    Case("token_index_einsum", FORM, TokenIndexEinsum, flat(32), "einsum, (E,in,out), biases, gelu, index_add"),
    Case("expanded_matmul", FORM, ExpandedMatmul, batched(32, BF16), "4-D matmul, expand, tanh gate"),
    Case("fused_bias_top_one", FORM, FusedBiasTopOne, flat(32), "top-1, baddbmm with gathered biases, relu^2"),
]
