"""Form "capacity": one-hot dispatch and combine tensors of shape (tokens, experts, capacity); overflow is dropped."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import Case, batched, flat, weight


class GShardTopTwo(nn.Module):
    """GShard's gating: two argmaxes, positions by cumsum, second choices after all first ones, five einsums."""

    def __init__(self, model: int = 32, ff: int = 48, experts: int = 4, factor: float = 1.0) -> None:
        super().__init__()
        self.experts, self.factor = experts, factor
        self.wg = nn.Linear(model, experts, bias=False)
        self.wi = weight(experts, model, ff, fan_in=model)
        self.wo = weight(experts, ff, model, fan_in=ff)

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = F.softmax(self.wg(x), dim=1)
        capacity = math.ceil(2 * x.shape[0] / self.experts * self.factor)
        mask1 = F.one_hot(torch.argmax(gates, dim=1), num_classes=self.experts)
        rest = gates.masked_fill(mask1.bool(), float("-inf"))
        mask2 = F.one_hot(torch.argmax(rest, dim=1), num_classes=self.experts)
        locations1 = torch.cumsum(mask1, dim=0) - 1
        locations2 = torch.cumsum(mask2, dim=0) - 1 + torch.sum(mask1, dim=0, keepdim=True)
        mask1 = mask1 * torch.lt(locations1, capacity)
        mask2 = mask2 * torch.lt(locations2, capacity)
        place1 = F.one_hot(torch.sum(locations1 * mask1, dim=1), num_classes=capacity).to(gates.dtype)
        place2 = F.one_hot(torch.sum(locations2 * mask2, dim=1), num_classes=capacity).to(gates.dtype)
        gate1 = torch.einsum("se,se->s", gates, mask1.to(gates.dtype))
        gate2 = torch.einsum("se,se->s", gates, mask2.to(gates.dtype))
        total = torch.clamp(gate1 + gate2, min=torch.finfo(gates.dtype).eps)
        gates1 = torch.einsum("s,se->se", gate1 / total, mask1.to(gates.dtype))
        gates2 = torch.einsum("s,se->se", gate2 / total, mask2.to(gates.dtype))
        combine = torch.einsum("se,sc->sec", gates1, place1) + torch.einsum("se,sc->sec", gates2, place2)
        return combine, combine.bool()

    def forward(self, x: Tensor) -> Tensor:
        combine, dispatch = self.gating(x)
        rows = torch.einsum("sec,sm->ecm", dispatch.to(x.dtype), x)
        hidden = F.relu(torch.einsum("ecm,emf->ecf", rows, self.wi))
        return torch.einsum("sec,ecm->sm", combine, torch.einsum("ecf,efm->ecm", hidden, self.wo))


class GShardTopK(nn.Module):
    """Top-k through topk, one cumsum over choices in priority order, dispatch as bool, SwiGLU, matmul for the rows."""

    def __init__(self, dim: int = 32, hidden: int = 32, num_experts: int = 4, k: int = 2, slack: float = 1.0) -> None:
        super().__init__()
        self.n, self.k, self.slack = num_experts, k, slack
        self.router = nn.Linear(dim, num_experts)
        self.w_gate = weight(num_experts, dim, hidden, fan_in=dim)
        self.w_up = weight(num_experts, dim, hidden, fan_in=dim)
        self.w_down = weight(num_experts, hidden, dim, fan_in=hidden)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        tokens = x.reshape(b * s, d)
        capacity = int(self.slack * self.k * b * s / self.n)
        weights, ids = self.router(tokens).softmax(-1).topk(self.k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        chosen = F.one_hot(ids, self.n)
        ranked = chosen.transpose(0, 1).reshape(-1, self.n)
        position = ((ranked.cumsum(0) - 1) * ranked).sum(-1).view(self.k, -1).t()
        kept = position < capacity
        place = F.one_hot(position.clamp(max=capacity - 1), capacity) * kept.unsqueeze(-1)
        dispatch = torch.einsum("tke,tkc->tec", chosen.to(x.dtype), place.to(x.dtype))
        combine = torch.einsum("tk,tke,tkc->tec", weights, chosen.to(x.dtype), place.to(x.dtype))
        rows = (dispatch.flatten(1).t() @ tokens).view(self.n, capacity, d)
        act = F.silu(torch.bmm(rows, self.w_gate)) * torch.bmm(rows, self.w_up)
        y = torch.bmm(act, self.w_down)
        return (combine.flatten(1) @ y.flatten(0, 1)).view(b, s, d)


class SwitchTopOne(nn.Module):
    """Switch: argmax, position by cumsum of the one-hot, overflow masked, probability of the choice as the weight."""

    def __init__(self, d_model: int = 32, d_ff: int = 64, experts: int = 4, capacity_factor: float = 1.25) -> None:
        super().__init__()
        self.experts, self.capacity_factor = experts, capacity_factor
        self.router = nn.Linear(d_model, experts, bias=False)
        self.wi = weight(experts, d_ff, d_model, fan_in=d_model)
        self.wo = weight(experts, d_model, d_ff, fan_in=d_ff)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        capacity = int(self.capacity_factor * x.shape[0] / self.experts)
        logits = self.router(x)
        probs = torch.softmax(logits.float(), dim=-1)
        gate, expert = torch.max(probs, dim=-1)
        mask = F.one_hot(expert, self.experts)
        position = torch.cumsum(mask, dim=0) * mask
        mask = mask * (position <= capacity)
        slots = torch.sum(position * mask, dim=-1)
        dispatch = mask.unsqueeze(-1) * F.one_hot(slots, capacity + 1)[:, None, 1:]
        dispatch = dispatch.to(x.dtype)
        combine = dispatch * gate[:, None, None].to(x.dtype)
        rows = torch.einsum("tec,td->ecd", dispatch, x)
        hidden = F.relu(torch.einsum("ecd,efd->ecf", rows, self.wi))
        out = torch.einsum("ecf,edf->ecd", hidden, self.wo)
        return torch.einsum("tec,ecd->td", combine, out), logits


class SwitchGroups(nn.Module):
    """Switch over groups (the batch), equality against positions instead of one_hot, dropped tokens pass through."""

    def __init__(self, dim: int = 32, inner: int = 32, experts: int = 4, factor: float = 1.0) -> None:
        super().__init__()
        self.experts, self.factor = experts, factor
        self.gate = nn.Linear(dim, experts, bias=False)
        self.up = weight(experts, dim, inner, fan_in=dim)
        self.down = weight(experts, inner, dim, fan_in=inner)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        capacity = max(1, int(self.factor * length) // self.experts)
        probs = self.gate(x).softmax(-1)
        weight_of, choice = probs.max(-1)
        onehot = (choice.unsqueeze(-1) == torch.arange(self.experts)).to(torch.int64)
        before = onehot.cumsum(1) - onehot
        place = (before * onehot).sum(-1)
        inside = place < capacity
        slot = (place.unsqueeze(-1) == torch.arange(capacity)) & inside.unsqueeze(-1)
        dispatch = torch.einsum("gse,gsc->gsec", onehot.to(x.dtype), slot.to(x.dtype))
        rows = torch.einsum("gsec,gsd->egcd", dispatch, x)
        y = torch.einsum("egcd,edf->egcf", rows, self.up)
        y = torch.einsum("egcf,efd->egcd", F.gelu(y, approximate="tanh"), self.down)
        y = torch.einsum("gsec,egcd->gsd", dispatch, y) * weight_of.unsqueeze(-1)
        return torch.where(inside.unsqueeze(-1), y, x)


FORM = "capacity"
CASES = [
    Case("gshard_top_two", FORM, GShardTopTwo, flat(32), "GShard: two argmaxes, combine and its bool, relu"),
    Case("gshard_top_k", FORM, GShardTopK, batched(32), "topk, one cumsum in priority order, matmul rows, swiglu"),
    Case("switch_top_one", FORM, SwitchTopOne, flat(32), "Switch: max, one-based positions, a bin for none"),
    Case(
        "switch_groups",
        FORM,
        SwitchGroups,
        batched(32),
        "a capacity for each group, equality instead of one_hot, weight after the combine",
        notes="torch.where outside the form passes dropped tokens through",
    ),
]
