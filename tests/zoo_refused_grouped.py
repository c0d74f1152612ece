"""Refusals of "grouped_mm": which rows are gathered, by which permutation, counted by which offsets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo_case import Refused, flat
from zoo_controls import BF16, EXPERTS, FLAT16, HIDDEN, TOP_K, Grouped, Values, route

refused = Refused("grouped_control", FLAT16)


class TwoRoutings(Grouped):
    """A second router stands by, whose ids or permutation a refusal mixes in."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(HIDDEN, EXPERTS, bias=False, dtype=BF16)

    def route(self, v: Values) -> None:
        v.other = route(self.other, v.x)[1].reshape(-1)
        super().route(v)


@refused("rows are gathered by the permutation of another routing")
class GatherOfOtherSort(TwoRoutings):
    def gather(self, v: Values) -> Tensor:
        return v.x[torch.sort(v.other)[1] // TOP_K]


@refused("rows return by the permutation of another routing")
class ReturnOfOtherSort(TwoRoutings):
    def combine(self, v: Values) -> Tensor:
        return super().combine(v.but(perm=torch.sort(v.other)[1]))


@refused("routing weights are permuted by another routing")
class WeightsOfOtherSort(TwoRoutings):
    def weigh(self, v: Values) -> Tensor:
        return super().weigh(v.but(perm=torch.sort(v.other)[1]))


@refused("offsets count another routing")
class OffsetsOfOtherRouting(TwoRoutings):
    def counts(self, v: Values) -> Tensor:
        return super().counts(v.but(sorted_ids=v.other))


@refused("the second GEMM's offsets count another routing")
class SecondOffsetsOfOtherRouting(TwoRoutings):
    def gemm_out(self, v: Values) -> Tensor:
        return super().gemm_out(v.but(offs=self.offsets(v.but(counts=self.counts(v.but(sorted_ids=v.other))))))


@refused("the bias is that of another routing's expert")
class BiasOfOtherRouting(TwoRoutings):
    def gemm_in(self, v: Values) -> Tensor:
        return super().gemm_in(v.but(sorted_ids=v.other))


@refused("the bias is gathered by unsorted ids")
class BiasByUnsortedIds(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        return super().gemm_out(v.but(sorted_ids=v.ids.reshape(-1)))


@refused("rows return by the permutation itself, not its inverse")
class ReturnByPermutation(Grouped):
    def inverse(self, v: Values) -> Tensor:
        return v.perm


@refused("the inverse is taken twice")
class ReturnByDoubleInverse(Grouped):
    def inverse(self, v: Values) -> Tensor:
        return v.perm.argsort().argsort()


@refused("the scatter back uses the inverse where the permutation belongs")
class ScatterByInverse(Grouped):
    def combine(self, v: Values) -> Tensor:
        out = torch.empty_like(v.y)
        out[v.perm.argsort()] = v.y
        return out.view(v.x.shape[0], TOP_K, HIDDEN).sum(1)


@refused("the inverse counts backwards")
class InverseReversed(Grouped):
    def inverse(self, v: Values) -> Tensor:
        inverse = torch.empty_like(v.perm)
        inverse[v.perm] = torch.arange(v.perm.shape[0]).flip(0)
        return inverse


@refused("the inverse's last entry is left at zero")
class InversePartlyWritten(Grouped):
    def inverse(self, v: Values) -> Tensor:
        inverse = torch.zeros_like(v.perm)
        inverse[v.perm[:-1]] = torch.arange(v.perm.shape[0] - 1)
        return inverse


@refused("ids are sorted downwards, offsets ascend")
class DescendingSort(Grouped):
    def order(self, v: Values) -> None:
        v.sorted_ids, v.perm = torch.sort(v.ids.reshape(-1), descending=True)


@refused("the permutation sorts routing weights, not ids")
class SortOfWeights(Grouped):
    def order(self, v: Values) -> None:
        v.sorted_ids, v.perm = v.ids.reshape(-1).sort()[0], v.weights.reshape(-1).sort()[1]


@refused("the permutation is reversed after the sort")
class FlippedPermutation(Grouped):
    def order(self, v: Values) -> None:
        super().order(v)
        v.perm = v.perm.flip(0)


@refused("ids are sorted choice by choice, rows gathered token by token")
class ChoiceMajorSort(Grouped):
    def order(self, v: Values) -> None:
        v.sorted_ids, v.perm = v.ids.t().reshape(-1).sort()


@refused("the remainder names the choice, not the token")
class GatherByRemainder(Grouped):
    def gather(self, v: Values) -> Tensor:
        return v.x[v.perm % TOP_K]


@refused("the divisor is off by one")
class GatherByWrongDivisor(Grouped):
    def gather(self, v: Values) -> Tensor:
        return v.x[v.perm // (TOP_K + 1)]


@refused("the assignment is shifted before the division")
class GatherShifted(Grouped):
    def gather(self, v: Values) -> Tensor:
        return v.x[(v.perm + 1) // TOP_K - 1]


@refused("the sorted ids themselves index the tokens")
class GatherByIds(Grouped):
    def gather(self, v: Values) -> Tensor:
        return v.x[v.sorted_ids]


# One token, whose two experts are hardly the first and the last.
@refused("a histogram without a range takes it from the data", inputs=lambda tokens: flat(HIDDEN, BF16)(1))
class HistogramOfDataRange(Grouped):
    def counts(self, v: Values) -> Tensor:
        return torch.histc(v.sorted_ids.float(), bins=EXPERTS)


@refused("the histogram starts at expert one", undefined=True)
class HistogramFromOne(Grouped):
    def counts(self, v: Values) -> Tensor:
        return torch.histc(v.sorted_ids.float(), bins=EXPERTS, min=1, max=EXPERTS)


@refused("the histogram's range is twice the experts")
class HistogramTooWide(Grouped):
    def counts(self, v: Values) -> Tensor:
        return torch.histc(v.sorted_ids.float(), bins=EXPERTS, min=0, max=2 * EXPERTS - 1)


@refused("counts say whether an expert is chosen, not how often")
class CountsByScatter(Grouped):
    def counts(self, v: Values) -> Tensor:
        return torch.zeros(EXPERTS).scatter_(0, v.sorted_ids, 1.0) * (v.sorted_ids.shape[0] // EXPERTS)


@refused("counts are of clamped ids")
class CountsOfClampedIds(Grouped):
    def counts(self, v: Values) -> Tensor:
        return super().counts(v.but(sorted_ids=v.sorted_ids.clamp(max=EXPERTS - 2)))


@refused("counts are of the first choices only, doubled")
class CountsOfFirstChoice(Grouped):
    def counts(self, v: Values) -> Tensor:
        return super().counts(v.but(sorted_ids=v.ids[:, 0])) * TOP_K


@refused("counts are capped: what is over the cap runs through the next experts", undefined=True)
class CountsCapped(Grouped):
    def counts(self, v: Values) -> Tensor:
        return super().counts(v).clamp(max=10)


@refused("offsets are starts, not ends", undefined=True)
class ExclusiveOffsets(Grouped):
    def offsets(self, v: Values) -> Tensor:
        return (v.counts.cumsum(0) - v.counts).to(torch.int32)


@refused("searchsorted from the left finds starts", undefined=True)
class SearchFromLeft(Grouped):
    def counts(self, v: Values) -> Tensor:
        return torch.searchsorted(v.sorted_ids, torch.arange(EXPERTS))

    def offsets(self, v: Values) -> Tensor:
        return v.counts.to(torch.int32)


@refused("offsets are turned by one expert")
class RolledCounts(Grouped):
    def offsets(self, v: Values) -> Tensor:
        return super().offsets(v.but(counts=v.counts.roll(1)))


REFUSALS = refused.refusals
