"""Refusals of "capacity", "gather_einsum" and "padded_bins"."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import Refused, flat
from zoo_controls import EXPERTS, FLAT16, FLAT32, HIDDEN, INTERMEDIATE, TOP_K, route
from zoo_controls_static import BLOCK, Capacity, GatherEinsum, Padded

refused = Refused("capacity_control", FLAT32)
einsum_refused = Refused("einsum_control", FLAT32)
padded_refused = Refused("padded_control", FLAT16)


@refused("second choices start at place zero, where first choices already stand")
class SecondChoiceCollides(Capacity):
    def positions(self, masks: list[Tensor]) -> list[Tensor]:
        return [masks[0].cumsum(0) - 1, masks[1].cumsum(0) - 1]


@refused("places are counted along the experts, so tokens share one")
class PlacesAlongExperts(Capacity):
    def positions(self, masks: list[Tensor]) -> list[Tensor]:
        first = masks[0].cumsum(1) - 1
        return [first, masks[1].cumsum(1)]


@refused("places of second choices are counted over first choices")
class PlacesOfOtherChoice(Capacity):
    def positions(self, masks: list[Tensor]) -> list[Tensor]:
        first = masks[0].cumsum(0) - 1
        return [first, first + masks[0].sum(0, keepdim=True)]


@refused("places are shared by two tokens each")
class PlacesHalved(Capacity):
    def positions(self, masks: list[Tensor]) -> list[Tensor]:
        return [position // 2 for position in super().positions(masks)]


@refused("tokens over capacity crowd into the last place")
class OverflowClamped(Capacity):
    def slots(self, mask: Tensor, position: Tensor, capacity: int) -> Tensor:
        place = (position * mask).sum(-1).clamp(max=capacity - 1)
        return mask.unsqueeze(-1) * F.one_hot(place, capacity).unsqueeze(1)


@refused("tokens over capacity wrap around")
class OverflowWrapped(Capacity):
    def slots(self, mask: Tensor, position: Tensor, capacity: int) -> Tensor:
        return mask.unsqueeze(-1) * F.one_hot((position * mask).sum(-1) % capacity, capacity).unsqueeze(1)


@refused("tokens over capacity are not put in, but read back from place zero")
class OverflowReadBack(Capacity):
    def capacity(self, tokens: int) -> int:
        return tokens // EXPERTS

    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dispatch, combine = super().tensors(x)
        lost = (dispatch.sum((1, 2)) < TOP_K).to(x.dtype)
        return dispatch, combine + lost[:, None, None] * F.one_hot(torch.tensor(0), combine.shape[2])


@refused("the combine's places are not the dispatch's")
class CombineRolled(Capacity):
    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dispatch, combine = super().tensors(x)
        return dispatch, combine.roll(1, -1)


@refused("the combine's experts are not the dispatch's")
class CombineOfNextExpert(Capacity):
    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dispatch, combine = super().tensors(x)
        return dispatch, combine.roll(1, 1)


@refused("the combine is of other tokens than the dispatch")
class CombineOfNextToken(Capacity):
    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dispatch, combine = super().tensors(x)
        return dispatch, combine.roll(1, 0)


@refused("every place mixes all tokens: soft mixture of experts")
class SoftSlots(Capacity):
    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.einsum("sm,ecm->sec", x, self.w_in.transpose(1, 2)[:, : self.capacity(x.shape[0])])
        return logits.softmax(0), logits.flatten(1).softmax(-1).view_as(logits)


@refused("experts choose tokens, one-hot")
class ExpertChoice(Capacity):
    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, token = self.router(x).softmax(-1).t().topk(self.capacity(x.shape[0]), dim=-1)
        dispatch = F.one_hot(token, x.shape[0]).permute(2, 0, 1).to(x.dtype)
        return dispatch, dispatch * scores


@refused("second choices get the first's place")
class SecondDispatchedAsFirst(Capacity):
    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = route(self.router, x)
        mask = F.one_hot(ids[:, 0], EXPERTS)
        slots = self.slots(mask, mask.cumsum(0) - 1, self.capacity(x.shape[0])).to(x.dtype)
        return slots + slots, slots * weights.sum(-1)[:, None, None]


@refused("rows of an expert are normalised over its places")
class NormOverPlaces(Capacity):
    def experts(self, rows: Tensor) -> Tensor:
        return super().experts(rows - rows.mean(1, keepdim=True))


@refused("places and experts are exchanged where there are as many", inputs=lambda tokens: flat(HIDDEN)(8))
class ExpertsAndPlacesExchanged(Capacity):
    def experts(self, rows: Tensor) -> Tensor:
        return super().experts(rows.transpose(0, 1)).transpose(0, 1)


@refused("one place less: the true mask must be used, not a capacity read off a shape", allowed=True)
class OnePlaceUnused(Capacity):
    def slots(self, mask: Tensor, position: Tensor, capacity: int) -> Tensor:
        kept = mask * (position < capacity - 4)
        return kept.unsqueeze(-1) * F.one_hot((position * kept).sum(-1), capacity).unsqueeze(1)


@refused("later tokens first: another order of dropping", allowed=True)
class LaterTokensFirst(Capacity):
    def capacity(self, tokens: int) -> int:
        return tokens // EXPERTS

    def positions(self, masks: list[Tensor]) -> list[Tensor]:
        first = masks[0].flip(0).cumsum(0).flip(0) - 1
        return [first, masks[1].cumsum(0) - 1 + masks[0].sum(0, keepdim=True)]


@refused("dispatched with the weight: weighted before and after", allowed=True)
class WeightedDispatch(Capacity):
    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, combine = super().tensors(x)
        return combine, combine


@einsum_refused("up's weights are of the exchanged choices")
class UpOfFlippedChoices(GatherEinsum):
    def gathered(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.w1[ids], self.w3[ids.flip(-1)], self.w2[ids]


@einsum_refused("down's weights are of the next expert")
class DownOfNextExpert(GatherEinsum):
    def gathered(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.w1[ids], self.w3[ids], self.w2[(ids + 1) % EXPERTS]


@einsum_refused("down's weights are gathered by transposed ids", inputs=lambda tokens: flat(HIDDEN)(TOP_K))
class DownOfTransposedIds(GatherEinsum):
    def gathered(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.w1[ids], self.w3[ids], self.w2[ids.t()]


@einsum_refused("every choice's hidden rows meet every choice's weights")
class AllPairs(GatherEinsum):
    def project(self, a: Tensor, w2: Tensor) -> Tensor:
        return torch.einsum("tao,tbio->tai", a, w2)


@einsum_refused("hidden rows are summed over the choices before the down projection")
class SummedBeforeDown(GatherEinsum):
    def project(self, a: Tensor, w2: Tensor) -> Tensor:
        return torch.einsum("to,tbio->tbi", a.sum(1), w2)


@einsum_refused("the contraction runs over the output where the weight is square", allowed=True)
class OtherSideOfSquare(GatherEinsum):
    def project(self, a: Tensor, w2: Tensor) -> Tensor:
        return torch.einsum("tao,taoi->tai", a, w2)


@einsum_refused("weights are read (choice, token)", allowed=True, inputs=lambda tokens: flat(HIDDEN)(TOP_K))
class WeightsTransposed(GatherEinsum):
    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("tai,at->ti", y, weights)


@einsum_refused("weights and rows are summed apart", allowed=True)
class SummedApart(GatherEinsum):
    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("tai,tb->ti", y, weights)


@einsum_refused("the same letter twice takes the diagonal over tokens and features", inputs=lambda tokens: flat(32)(32))
class DiagonalCombine(GatherEinsum):
    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("tat,ta->t", y, weights).unsqueeze(-1).expand(-1, HIDDEN)


@einsum_refused("softmax over the choices between the products")
class SoftmaxOverChoices(GatherEinsum):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate.softmax(dim=1) * up * TOP_K


@einsum_refused("up is of the neighbouring token")
class UpOfNeighbour(GatherEinsum):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up.roll(1, 0)


@einsum_refused("one choice's hidden rows are written")
class HiddenWritten(GatherEinsum):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        a = super().activate(gate, up)
        a[:, 1] = 0.0
        return a


@einsum_refused("ids of another router choose the up projections")
class UpOfOtherRouter(GatherEinsum):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.randperm(EXPERTS * 64).view(-1, TOP_K) % EXPERTS, requires_grad=False)

    def gathered(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.w1[ids], self.w3[self.other[: ids.shape[0]]], self.w2[ids]


@padded_refused("the GEMM's offsets are of the bins without padding", undefined=True)
class UnpaddedOffsets(Padded):
    def offsets(self, counts: Tensor, padded: Tensor) -> Tensor:
        return counts.cumsum(0).to(torch.int32)


@padded_refused("the second bin's rounding is another than the places'")
class OtherRounding(Padded):
    def offsets(self, counts: Tensor, padded: Tensor) -> Tensor:
        return ((counts + 2 * BLOCK - 1) // (2 * BLOCK) * (2 * BLOCK)).cumsum(0).clamp(max=80).to(torch.int32)


@padded_refused("rows are rounded down", undefined=True)
class RoundedDown(Padded):
    def round_up(self, counts: Tensor) -> Tensor:
        return (counts // BLOCK * BLOCK).clamp(min=BLOCK)


@padded_refused("rows are put at unpadded places under padded offsets", allowed=True)
class UnpaddedPlaces(Padded):
    def places(self, sorted_ids: Tensor, counts: Tensor, padded: Tensor) -> Tensor:
        return torch.arange(sorted_ids.shape[0])


@padded_refused("rows are read one place later than they were put")
class ReadOneLater(Padded):
    def read(self, y: Tensor, place: Tensor) -> Tensor:
        return y[(place + 1) % (4 * BLOCK)]


@padded_refused("rows are read back as if there were no padding")
class ReadUnpadded(Padded):
    def read(self, y: Tensor, place: Tensor) -> Tensor:
        return y[: place.shape[0]]


@padded_refused("the places of two bins overlap")
class PlacesOverlap(Padded):
    def places(self, sorted_ids: Tensor, counts: Tensor, padded: Tensor) -> Tensor:
        rank = torch.arange(sorted_ids.shape[0]) - (counts.cumsum(0) - counts)[sorted_ids]
        return sorted_ids * BLOCK + rank


@padded_refused("padded rows enter a sum", undefined=True)
class PaddingSummed(Padded):
    def activate(self, h: Tensor) -> Tensor:
        a = super().activate(h)
        return a + a[: 2 * BLOCK].mean(0)


@padded_refused("blocks exchange rows")
class BlocksMixed(Padded):
    def activate(self, h: Tensor) -> Tensor:
        return super().activate(h).view(-1, BLOCK, INTERMEDIATE).roll(1, 1).view(-1, INTERMEDIATE)


REFUSALS = [*refused.refusals, *einsum_refused.refusals, *padded_refused.refusals]
