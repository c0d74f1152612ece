"""Spellings of the capacity form beyond the zoo's: how published and home-made code writes its tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import weight

HIDDEN, INTERMEDIATE, EXPERTS = 16, 24, 4


class Spelling(nn.Module):
    """A router, a gating function that makes (dispatch, combine), experts between two einsums."""

    top_k = 2
    biased = False

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w_in = weight(EXPERTS, HIDDEN, INTERMEDIATE, fan_in=HIDDEN)
        self.w_out = weight(EXPERTS, INTERMEDIATE, HIDDEN, fan_in=INTERMEDIATE)
        self.b_in = nn.Parameter(torch.randn(EXPERTS, 1, INTERMEDIATE) / 2) if self.biased else None
        self.b_out = nn.Parameter(torch.randn(EXPERTS, 1, HIDDEN) / 2) if self.biased else None

    def capacity(self, x: Tensor) -> int:
        return max(1, math.ceil(self.top_k * x.shape[-2] / EXPERTS * self.factor))

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def experts(self, rows: Tensor) -> Tensor:
        hidden = torch.einsum("ecm,emf->ecf", rows, self.w_in)
        hidden = F.gelu(hidden if self.b_in is None else hidden + self.b_in)
        out = torch.einsum("ecf,efm->ecm", hidden, self.w_out)
        return out if self.b_out is None else out + self.b_out

    def forward(self, x: Tensor) -> Tensor:
        dispatch, combine = self.gating(x)
        y = self.experts(torch.einsum("tec,tm->ecm", dispatch.to(x.dtype), x))
        return torch.einsum("tec,ecm->tm", combine, y)


class InPlaceTopTwo(Spelling):
    """DeepSpeed's top-2 gating: masks and places changed in place, gates read off the masks."""

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = F.softmax(self.router(x), dim=1)
        capacity = self.capacity(x)
        mask1 = F.one_hot(torch.argmax(gates, dim=1), num_classes=EXPERTS)
        others = self.router(x).masked_fill(mask1.bool(), float("-inf"))
        mask2 = F.one_hot(torch.argmax(others, dim=1), num_classes=EXPERTS)
        locations1 = torch.cumsum(mask1, dim=0) - 1
        locations2 = torch.cumsum(mask2, dim=0) - 1
        locations2 += torch.sum(mask1, dim=0, keepdim=True)
        mask1 *= torch.lt(locations1, capacity)
        mask2 *= torch.lt(locations2, capacity)
        places1 = F.one_hot(torch.sum(locations1 * mask1, dim=1), capacity).float()
        places2 = F.one_hot(torch.sum(locations2 * mask2, dim=1), capacity).float()
        gates1 = torch.einsum("se,se->s", gates, mask1.float())
        gates2 = torch.einsum("se,se->s", gates, mask2.float())
        total = torch.clamp(gates1 + gates2, min=torch.finfo(gates.dtype).eps)
        combine1 = torch.einsum("se,sc->sec", torch.einsum("s,se->se", gates1 / total, mask1.float()), places1)
        combine2 = torch.einsum("se,sc->sec", torch.einsum("s,se->se", gates2 / total, mask2.float()), places2)
        combine = combine1 + combine2
        return combine.bool(), combine


class TableTopOne(Spelling):
    """DeepSpeed's top-1 gating: the weights are the whole table of gates under the mask."""

    top_k = 1

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = F.softmax(self.router(x), dim=1)
        capacity = self.capacity(x)
        mask = F.one_hot(torch.argmax(gates, dim=1), num_classes=EXPERTS)
        locations = torch.cumsum(mask, dim=0) - 1
        mask = mask * torch.lt(locations, capacity)
        places = F.one_hot(torch.sum(locations * mask, dim=1), capacity).float()
        combine = torch.einsum("se,sc->sec", gates * mask.float(), places)
        return combine.bool(), combine


class KeptCounts(Spelling):
    """Second choices begin after the first ones that were kept; float masks; a place for none by equality."""

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.router(x).softmax(-1)
        capacity = self.capacity(x)
        gate1, index1 = gates.max(-1)
        mask1 = F.one_hot(index1, EXPERTS).float()
        gate2, index2 = (gates * (1.0 - mask1)).max(-1)
        mask2 = F.one_hot(index2, EXPERTS).float()
        position1 = (mask1.cumsum(-2) - mask1) * mask1
        mask1 = mask1 * (position1 < capacity).float()
        count = mask1.sum(-2, keepdim=True)
        position2 = (mask2.cumsum(-2) - mask2 + count) * mask2
        mask2 = mask2 * (position2 < capacity).float()
        places = torch.arange(capacity)
        combine = torch.zeros(x.shape[0], EXPERTS, capacity)
        for gate, mask, position in ((gate1, mask1, position1), (gate2, mask2, position2)):
            place = (position.sum(-1).long().unsqueeze(-1) == places).float()
            combine = combine + (gate * mask.sum(-1))[:, None, None] * mask.unsqueeze(-1) * place.unsqueeze(1)
        return (combine > 0).to(x.dtype), combine


class MinusOne(Spelling):
    """Places of what is not marked are -1; validity is a range; the slice leaves out a bin for none."""

    top_k = 1

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        capacity = self.capacity(x)
        gate, index = self.router(x).sigmoid().max(dim=-1)
        mask = (index[:, None] == torch.arange(EXPERTS)).int()
        position = torch.cumsum(mask, 0) * mask - 1
        valid = (position >= 0) & (position < capacity)
        place = torch.where(valid, position, capacity).long()
        dispatch = F.one_hot(place, capacity + 1)[..., :capacity].to(x.dtype)
        return dispatch, dispatch * gate[:, None, None]


class TokenMajor(Spelling):
    """Places in token order; choices summed by a broadcast product; out of range by equality alone."""

    top_k = 3

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        chosen = F.one_hot(ids, EXPERTS)
        position = (chosen.flatten(0, 1).cumsum(0) - 1).view_as(chosen)
        position = (position * chosen).sum(-1)
        place = position[..., None] == torch.arange(self.capacity(x))
        marks = chosen[..., None].to(x.dtype) * place[:, :, None, :].to(x.dtype)
        return marks.sum(1), (marks * weights[:, :, None, None]).sum(1)


class LoopOfChoices(Spelling):
    """A loop over three choices that carries the experts' counts along."""

    top_k = 3

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        capacity = self.capacity(x)
        weights, ids = torch.topk(scores, self.top_k)
        counts = torch.zeros(1, EXPERTS, dtype=torch.int64)
        dispatch = combine = torch.zeros(())
        for k in range(self.top_k):
            mask = F.one_hot(ids[:, k], EXPERTS)
            position = mask.cumsum(0) - 1 + counts
            counts = counts + mask.sum(0, keepdim=True)
            kept = mask * (position < capacity)
            place = F.one_hot((position * kept).sum(-1), capacity)
            term = (kept[:, :, None] * place[:, None, :]).to(x.dtype)
            dispatch = dispatch + term
            combine = combine + term * weights[:, k, None, None]
        return dispatch, combine


class Biased(InPlaceTopTwo):
    """Biased experts, whose rows of zeros are not mapped to zero."""

    biased = True


class WeightedBefore(TokenMajor):
    """The weight on the rows put in, none on those read back."""

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dispatch, combine = super().gating(x)
        return combine, dispatch


class HalfPrecision(TokenMajor):
    """A bfloat16 model: places counted in integers, masks cast."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(factor)
        self.to(torch.bfloat16)


class Flattened(TokenMajor):
    """Both products as matrix products over places of all experts."""

    def forward(self, x: Tensor) -> Tensor:
        dispatch, combine = self.gating(x)
        rows = torch.mm(dispatch.reshape(x.shape[0], -1).T, x).reshape(EXPERTS, -1, HIDDEN)
        return combine.reshape(x.shape[0], -1) @ self.experts(rows).reshape(-1, HIDDEN)


class GroupsOfTopTwo(Spelling):
    """A capacity for each sequence of a batch, two choices each; the groups are the first of the rows' dimensions."""

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.router(x).softmax(-1)
        capacity = self.capacity(x)
        index1 = gates.argmax(-1)
        mask1 = F.one_hot(index1, EXPERTS)
        index2 = gates.masked_fill(mask1.bool(), -1.0).argmax(-1)
        mask2 = F.one_hot(index2, EXPERTS)
        place1 = mask1.cumsum(1) - 1
        place2 = mask2.cumsum(1) - 1 + mask1.sum(1, keepdim=True)
        combine = torch.zeros(*x.shape[:2], EXPERTS, capacity)
        for mask, place in ((mask1, place1), (mask2, place2)):
            kept = mask * (place < capacity)
            spot = F.one_hot((place * kept).sum(-1), capacity).to(gates.dtype)
            combine = combine + torch.einsum("bse,bsc->bsec", gates * kept, spot)
        return combine.bool(), combine

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(2, -1, HIDDEN)
        dispatch, combine = self.gating(x)
        rows = torch.einsum("bsec,bsm->becm", dispatch.to(x.dtype), x)
        hidden = F.silu(torch.matmul(rows, self.w_in))
        y = torch.matmul(hidden, self.w_out)
        return torch.einsum("bsec,becm->bsm", combine, y).flatten(0, 1)


SPELLINGS: list[type[Spelling]] = [
    InPlaceTopTwo,
    TableTopOne,
    KeptCounts,
    MinusOne,
    TokenMajor,
    LoopOfChoices,
    Biased,
    WeightedBefore,
    HalfPrecision,
    Flattened,
    GroupsOfTopTwo,
]


# ---- weights that are exactly 0, whose gradient is not


class ZeroWeights(LoopOfChoices):
    """Every other token's weights are 0 and have a gradient; the dispatch tensor is the combine tensor made a mask."""

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        capacity = self.capacity(x)
        values, ids = logits.topk(2)
        weights = torch.tanh(values) * (torch.arange(x.shape[0]) % 2)[:, None]
        weights = weights + (values - values.detach())
        chosen = F.one_hot(ids, EXPERTS)
        ranked = chosen.transpose(0, 1).flatten(0, 1)
        position = ((ranked.cumsum(0) - 1) * ranked).sum(-1).unflatten(0, (2, -1)).t()
        place = F.one_hot(position.clamp(max=capacity - 1), capacity) * (position < capacity).unsqueeze(-1)
        combine = torch.einsum("tk,tke,tkc->tec", weights, chosen.to(x.dtype), place.to(x.dtype))
        return self.mask(combine).to(x.dtype), combine

    def mask(self, combine: Tensor) -> Tensor:
        return combine != 0


class ZeroWeightsBiased(ZeroWeights):
    """The same with experts that map zero to something else."""

    biased = True


class PositiveWeights(ZeroWeights):
    """Only assignments of positive weight are put in."""

    def mask(self, combine: Tensor) -> Tensor:
        return combine > 0


class PositiveWeightsBiased(PositiveWeights):
    """The same with experts that map zero to something else."""

    biased = True


ZERO_WEIGHTS: list[type[Spelling]] = [ZeroWeights, ZeroWeightsBiased, PositiveWeights, PositiveWeightsBiased]
