"""Near-spellings of the capacity form: each gets one step wrong, and is refused for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from capacity_modules import EXPERTS, HIDDEN, GroupsOfTopTwo, Spelling


class Near(Spelling):
    """Two choices in steps; each subclass gets one step wrong."""

    def masks(self, ids: Tensor) -> list[Tensor]:
        return [F.one_hot(ids[:, k], EXPERTS) for k in range(2)]

    def places(self, masks: list[Tensor]) -> list[Tensor]:
        return [masks[0].cumsum(0) - 1, masks[1].cumsum(0) - 1 + masks[0].sum(0, keepdim=True)]

    def kept(self, mask: Tensor, place: Tensor, capacity: int) -> Tensor:
        return mask * (place < capacity)

    def marks(self, kept: Tensor, place: Tensor, capacity: int) -> Tensor:
        return kept.unsqueeze(-1) * F.one_hot((place * kept).sum(-1), capacity).unsqueeze(1)

    def tensors(self, marks: list[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        combine = marks[0] * weights[:, 0, None, None] + marks[1] * weights[:, 1, None, None]
        return (marks[0] + marks[1]).to(weights.dtype), combine

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        capacity = self.capacity(x)
        masks = self.masks(ids)
        places = self.places(masks)
        kept = [self.kept(mask, place, capacity) for mask, place in zip(masks, places, strict=True)]
        return self.tensors([self.marks(m, p, capacity) for m, p in zip(kept, places, strict=True)], weights)


class OtherCapacity(Near):
    """The combine tensor keeps one place fewer than the dispatch tensor."""

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        capacity, masks = self.capacity(x), self.masks(ids)
        tensors = []
        for bound in (capacity, capacity - 1):
            pairs = [
                (self.kept(mask, place, bound), place) for mask, place in zip(masks, self.places(masks), strict=True)
            ]
            tensors.append(self.tensors([self.marks(kept, place, capacity) for kept, place in pairs], weights))
        return tensors[0][0], tensors[1][1]


class OtherMask(Near):
    """The dispatch tensor puts first choices in for second choices' experts."""

    def tensors(self, marks: list[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        return (marks[0] + marks[0]).to(weights.dtype), super().tensors(marks, weights)[1]


class OnlyFirstPutIn(Near):
    """Second choices are read back and never put in."""

    def tensors(self, marks: list[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        return marks[0].to(weights.dtype), super().tensors(marks, weights)[1]


class PlacesExchanged(Near):
    """First choices stand at second choices' places."""

    def places(self, masks: list[Tensor]) -> list[Tensor]:
        return [super().places(masks)[1], masks[0].cumsum(0)]


class NotOffset(Near):
    """Second choices begin at place zero."""

    def places(self, masks: list[Tensor]) -> list[Tensor]:
        return [mask.cumsum(0) - 1 for mask in masks]


class OffsetByOwnCounts(Near):
    """Second choices begin after as many places as there are second choices."""

    def places(self, masks: list[Tensor]) -> list[Tensor]:
        return [masks[0].cumsum(0) - 1, masks[1].cumsum(0) - 1 + masks[1].sum(0, keepdim=True)]


class OffsetByFewer(Near):
    """Second choices begin after those first choices that stand at the first two places."""

    def places(self, masks: list[Tensor]) -> list[Tensor]:
        first = masks[0].cumsum(0) - 1
        return [first, masks[1].cumsum(0) - 1 + (masks[0] * (first < 2)).sum(0, keepdim=True)]


class AlongExperts(Near):
    """Places are counted along the experts."""

    def places(self, masks: list[Tensor]) -> list[Tensor]:
        return [masks[0].cumsum(1) - 1, masks[1].cumsum(1)]


class NotMasked(Near):
    """Places are summed over all experts, not read at an assignment's own."""

    def marks(self, kept: Tensor, place: Tensor, capacity: int) -> Tensor:
        return kept.unsqueeze(-1) * F.one_hot(place.clamp(0, capacity).sum(-1) % capacity, capacity).unsqueeze(1)


class Crowded(Near):
    """What is over capacity goes to the last place."""

    def kept(self, mask: Tensor, place: Tensor, capacity: int) -> Tensor:
        return mask

    def marks(self, kept: Tensor, place: Tensor, capacity: int) -> Tensor:
        return super().marks(kept, place.clamp(max=capacity - 1), capacity)


class Rounded(Near):
    """Places counted in bfloat16, which cannot tell 256 from 257."""

    def masks(self, ids: Tensor) -> list[Tensor]:
        return [mask.to(torch.bfloat16) for mask in super().masks(ids)]

    def marks(self, kept: Tensor, place: Tensor, capacity: int) -> Tensor:
        return super().marks(kept.long(), place.long(), capacity)


class NarrowSum(Near):
    """An assignment's place, summed over the experts in int8, wraps around after 127."""

    def marks(self, kept: Tensor, place: Tensor, capacity: int) -> Tensor:
        own = (place * kept).sum(-1, dtype=torch.int8).long()
        return kept.unsqueeze(-1) * F.one_hot(own, capacity).unsqueeze(1)


class TwoCounters(Near):
    """Each choice has its own counter, and both share the places."""

    def gating(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        chosen = F.one_hot(ids, EXPERTS)
        position = ((chosen.cumsum(0) - 1) * chosen).sum(-1)
        place = (position.unsqueeze(-1) == torch.arange(self.capacity(x))).to(x.dtype)
        marks = torch.einsum("tke,tkc->tkec", chosen.to(x.dtype), place)
        return marks.sum(1), torch.einsum("tkec,tk->tec", marks, weights)


class GroupsShare(GroupsOfTopTwo):
    """Sequences count their places apart and share them."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(2, -1, HIDDEN)
        dispatch, combine = self.gating(x)
        y = self.experts(torch.einsum("bsec,bsm->ecm", dispatch.to(x.dtype), x))
        return torch.einsum("bsec,ecm->bsm", combine, y).flatten(0, 1)


class EmptyIsInfinite(Near):
    """Experts whose value at an empty place is not finite."""

    def experts(self, rows: Tensor) -> Tensor:
        hidden = torch.einsum("ecm,emf->ecf", rows, self.w_in)
        return torch.einsum("ecf,efm->ecm", torch.log(hidden * hidden), self.w_out)


class RowsSeen(Near):
    """Someone else reads the experts' rows."""

    def forward(self, x: Tensor) -> Tensor:
        dispatch, combine = self.gating(x)
        y = self.experts(torch.einsum("tec,tm->ecm", dispatch, x))
        return torch.einsum("tec,ecm->tm", combine, y) + y.mean()


class ChangedBetween(Near):
    """The dispatch tensor is changed after tokens were put in, and read back with."""

    def forward(self, x: Tensor) -> Tensor:
        dispatch, _ = self.gating(x)
        y = self.experts(torch.einsum("tec,tm->ecm", dispatch, x))
        dispatch[0] = 1.0
        return torch.einsum("tec,ecm->tm", dispatch, y)


class ScaledMask(Near):
    """The mask is scaled by a number before it is cast: in another dtype that may wrap around."""

    def forward(self, x: Tensor) -> Tensor:
        dispatch, _ = self.gating(x)
        y = self.experts(torch.einsum("tec,tm->ecm", dispatch, x))
        return torch.einsum("tec,ecm->tm", (dispatch.long() * 2).to(x.dtype), y)


REASONS: dict[type[Spelling], str] = {
    ScaledMask: "of numbers alone",
    NarrowSum: "one place of one expert",
    OtherCapacity: "another capacity",
    OtherMask: "may stand at one place",
    OnlyFirstPutIn: "other expert ids",
    PlacesExchanged: "counted over other expert ids",
    NotOffset: "may stand at one place",
    OffsetByOwnCounts: "may stand at one place",
    OffsetByFewer: "may stand at one place",
    AlongExperts: "does not run over assignments",
    NotMasked: "one place of one expert",
    Crowded: "not masked",
    Rounded: "rounds",
    TwoCounters: "counted apart",
    GroupsShare: "share their experts' places",
    EmptyIsInfinite: "finite",
    RowsSeen: "also used by",
    ChangedBetween: "may not be 0",
}
"""Near-spellings, and a part of the reason that their user is told."""
