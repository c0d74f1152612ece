"""Refusals of "batched_mm" and "torchtitan"."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import Refused, flat
from zoo_controls import BF16, EXPERTS, FLAT16, FLAT32, HIDDEN, INTERMEDIATE, TOP_K, Batched, Titan, Values, route

refused = Refused("batched_control", FLAT32)


@refused("tokens are repeated as a whole, ids run token by token")
class RepeatedWhole(Batched):
    def gather(self, v: Values) -> Tensor:
        return v.x.repeat(TOP_K, 1)


@refused("rows are expanded choice by choice, ids run token by token")
class ExpandedChoiceMajor(Batched):
    def gather(self, v: Values) -> Tensor:
        return v.x.unsqueeze(0).expand(TOP_K, -1, -1).reshape(-1, HIDDEN)


@refused("the token index runs choice by choice")
class TokenIndexChoiceMajor(Batched):
    def gather(self, v: Values) -> Tensor:
        return v.x[torch.arange(v.x.shape[0]).repeat(TOP_K)]


@refused("ids are flattened choice by choice")
class IdsChoiceMajor(Batched):
    def route(self, v: Values) -> None:
        super().route(v)
        v.flat_ids = v.ids.t().reshape(-1)


@refused("rows, ids and weights run choice by choice, and so does the sum", allowed=True, same_numbers=True)
class AllChoiceMajor(Batched):
    def route(self, v: Values) -> None:
        super().route(v)
        v.flat_ids = v.ids.t().reshape(-1)

    def gather(self, v: Values) -> Tensor:
        return v.x.repeat(TOP_K, 1)

    def combine(self, v: Values) -> Tensor:
        return (v.y * v.weights.t().reshape(-1, 1)).view(TOP_K, -1, HIDDEN).sum(0)


class TwoRoutings(Batched):
    """A second router stands by."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(HIDDEN, EXPERTS, bias=False)

    def route(self, v: Values) -> None:
        super().route(v)
        v.other = route(self.other, v.x)[1].reshape(-1)


@refused("the down projections are of another routing")
class DownOfOtherRouting(TwoRoutings):
    def gemm_out(self, v: Values) -> Tensor:
        return super().gemm_out(v.but(flat_ids=v.other))


@refused("the up bias is of another routing")
class BiasOfOtherRouting(TwoRoutings):
    def gemm_in(self, v: Values) -> Tensor:
        return torch.bmm(self.w_in[v.flat_ids], v.rows.unsqueeze(-1)).squeeze(-1) + self.b_in[v.other]


@refused("the down projections are of the reversed ids")
class DownOfFlippedIds(Batched):
    def gemm_out(self, v: Values) -> Tensor:
        return super().gemm_out(v.but(flat_ids=v.flat_ids.flip(0)))


@refused("the down projections are of the next expert")
class DownOfNextExpert(Batched):
    def gemm_out(self, v: Values) -> Tensor:
        return super().gemm_out(v.but(flat_ids=(v.flat_ids + 1) % EXPERTS))


@refused("ids are clamped for the down projections only")
class DownOfClampedIds(Batched):
    def gemm_out(self, v: Values) -> Tensor:
        return super().gemm_out(v.but(flat_ids=v.flat_ids.clamp(max=EXPERTS - 2)))


@refused("ids are written between the two gathers", backward=False)
class IdsWrittenBetween(Batched):
    def gemm_out(self, v: Values) -> Tensor:
        v.flat_ids.sub_(1).clamp_(min=0)
        return super().gemm_out(v)


@refused("negative ids count from the last expert; to an operator -1 means no expert", allowed=True, same_numbers=True)
class NegativeIds(Batched):
    def route(self, v: Values) -> None:
        super().route(v)
        v.flat_ids = v.flat_ids - EXPERTS


@refused("gathered weights are scaled in place before the product")
class GatheredWeightsWritten(Batched):
    def gemm_in(self, v: Values) -> Tensor:
        selected = self.w_in[v.flat_ids]
        selected[0] *= 2.0
        return torch.bmm(selected, v.rows.unsqueeze(-1)).squeeze(-1) + self.b_in[v.flat_ids]


@refused("every assignment adds a delta of its own to the gathered weights")
class DeltaOfAssignment(Batched):
    def gemm_in(self, v: Values) -> Tensor:
        selected = self.w_in[v.flat_ids] + v.weights.reshape(-1, 1, 1) * 0.1
        return torch.bmm(selected, v.rows.unsqueeze(-1)).squeeze(-1) + self.b_in[v.flat_ids]


@refused("weights are written after they were gathered", backward=False)
class WeightsWrittenAfterGather(Batched):
    def activate(self, v: Values) -> Tensor:
        self.w_in.data.mul_(0.0)
        return super().activate(v)


@refused("the product runs over the weights' other dimension where both are equal", allowed=True)
class SquareOtherSide(Batched):
    def gemm_out(self, v: Values) -> Tensor:
        return torch.bmm(v.a.unsqueeze(1), self.w_out[v.flat_ids]).squeeze(1) + self.b_out[v.flat_ids]


@refused("the first dimension of the weights is not the expert's after a transpose", inputs=FLAT32, allowed=True)
class RolledExperts(Batched):
    def gemm_out(self, v: Values) -> Tensor:
        w_out = self.w_out.roll(1, 0)
        return torch.bmm(w_out[v.flat_ids], v.a.unsqueeze(-1)).squeeze(-1) + self.b_out[v.flat_ids]


@refused("sums over tokens where there are as many as choices", inputs=lambda tokens: flat(HIDDEN)(TOP_K))
class SumOverTokens(Batched):
    def combine(self, v: Values) -> Tensor:
        return (v.y * v.weights.reshape(-1, 1)).view(-1, TOP_K, HIDDEN).sum(dim=0)


@refused("weights are transposed where tokens equal choices", allowed=True, inputs=lambda tokens: flat(HIDDEN)(TOP_K))
class WeightsTransposed(Batched):
    def combine(self, v: Values) -> Tensor:
        return (v.y.view(-1, TOP_K, HIDDEN) * v.weights.t().unsqueeze(-1)).sum(dim=1)


@refused("experts are summed first, weights afterwards", allowed=True)
class WeightsSummedApart(Batched):
    def combine(self, v: Values) -> Tensor:
        return v.y.view(-1, TOP_K, HIDDEN).sum(dim=1) * v.weights.sum(-1, keepdim=True)


@refused("running sum over the choices, the last but one read")
class PartialSum(Batched):
    def combine(self, v: Values) -> Tensor:
        return (v.y * v.weights.reshape(-1, 1)).view(-1, TOP_K, HIDDEN).cumsum(1)[:, -2]


@refused("choices are normalised against each other before the sum")
class SoftmaxOverChoices(Batched):
    def activate(self, v: Values) -> Tensor:
        a = super().activate(v)
        return (a.view(-1, TOP_K, INTERMEDIATE).softmax(1) * TOP_K).view(-1, INTERMEDIATE)


@refused("halves are split along the rows")
class GluOverRows(Batched):
    def activate(self, v: Values) -> Tensor:
        first, second = v.h.chunk(2, dim=0)
        return (F.silu(first) * second).view(-1, INTERMEDIATE)


@refused("the sigmoid gate of F.glu", allowed=True)
class GluOfTorch(Batched):
    def activate(self, v: Values) -> Tensor:
        return F.glu(v.h, dim=-1)


@refused("the hidden rows are returned")
class HiddenReturned(Batched):
    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out, v.h


@refused("the second gather stops gradients to the hidden rows")
class HiddenDetached(Batched):
    def gemm_out(self, v: Values) -> Tensor:
        return super().gemm_out(v.but(a=v.a.detach()))


@refused("experts choose tokens: every expert takes its best, however many a token gets")
class ExpertChoice(Batched):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        scores, token = self.router(x).softmax(-1).t().topk(TOP_K * x.shape[0] // EXPERTS, dim=-1)
        h = torch.bmm(x[token], self.w_in.transpose(1, 2))
        y = torch.bmm(self.activate(Values(h=h)), self.w_out.transpose(1, 2)) * scores.unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token.reshape(-1), y.reshape(-1, HIDDEN))


titan_refused = Refused("titan_control", FLAT16)


class SecondTokens(Titan):
    """Gathers from other tokens too."""

    def other_rows(self, v: Values) -> Tensor:
        return torch.gather(v.x.flip(0), 0, v.index)


@titan_refused("up reads other tokens than gate")
class UpOfOtherTokens(SecondTokens):
    def up(self, v: Values) -> Tensor:
        return super().up(v.but(rows=self.other_rows(v)))


@titan_refused("up has the offsets of another routing")
class UpOfOtherOffsets(Titan):
    def up(self, v: Values) -> Tensor:
        return super().up(v.but(offs=v.counts.roll(1).cumsum(0, dtype=torch.int32)))


@titan_refused("down has the offsets of another routing")
class DownOfOtherOffsets(Titan):
    def down(self, v: Values) -> Tensor:
        return super().down(v.but(offs=v.counts.flip(0).cumsum(0, dtype=torch.int32)))


@titan_refused("up's weights are read untransposed where they are square", allowed=True)
class UpNotTransposed(Titan):
    def up(self, v: Values) -> Tensor:
        return torch._grouped_mm(v.rows, self.w3, offs=v.offs)


@titan_refused("rows are added to the tokens of the reversed permutation")
class ScatterOfOtherOrder(Titan):
    def combine(self, v: Values) -> Tensor:
        return super().combine(v.but(index=v.index.flip(0)))


@titan_refused("rows are written, not added")
class ScatterWithoutAdd(Titan):
    def combine(self, v: Values) -> Tensor:
        return self.shared(v.x).scatter(0, v.index, v.y)


@titan_refused("the largest row wins")
class ScatterMaximum(Titan):
    def combine(self, v: Values) -> Tensor:
        return self.shared(v.x).scatter_reduce(0, v.index, v.y, "amax")


@titan_refused("rows are averaged into the shared output")
class ScatterMean(Titan):
    def combine(self, v: Values) -> Tensor:
        return self.shared(v.x).scatter_reduce(0, v.index, v.y, "mean")


@titan_refused("features of a row go to different tokens")
class ScatterSkewed(Titan):
    def combine(self, v: Values) -> Tensor:
        skew = torch.arange(HIDDEN) % 2
        return self.shared(v.x).scatter_add(0, (v.index + skew) % v.x.shape[0], v.y)


@titan_refused("weights are not permuted")
class WeightsNotPermuted(Titan):
    def weigh(self, v: Values) -> Tensor:
        return (v.y.float() * v.weights.view(-1, 1)).to(BF16)


@titan_refused("the order is descending, the counts ascend")
class DescendingOrder(Titan):
    def order(self, v: Values) -> Tensor:
        return torch.argsort(v.ids.view(-1), descending=True, stable=True)


@titan_refused("tokens are the remainder of the order")
class IndexByRemainder(Titan):
    def index(self, v: Values) -> Tensor:
        return (v.perm % TOP_K).reshape(-1, 1).expand(-1, HIDDEN)


@titan_refused("the counts are of the first choices, doubled")
class CountsOfFirstChoice(Titan):
    def counts(self, v: Values) -> Tensor:
        return v.ids.new_zeros(v.ids.shape[0], EXPERTS).scatter_(1, v.ids[:, :1], TOP_K).sum(dim=0)


@titan_refused("counts are scattered into ones, one too many for each token and expert", undefined=True)
class CountsFromOnes(Titan):
    def counts(self, v: Values) -> Tensor:
        return v.ids.new_ones(v.ids.shape[0], EXPERTS).scatter_(1, v.ids, 0).sum(dim=0)


@titan_refused("the load is exchanged between experts before the offsets are taken")
class CountsWritten(Titan):
    def counts(self, v: Values) -> Tensor:
        counts = super().counts(v)
        counts.copy_(counts.flip(0))
        return counts


@titan_refused("the base is written after rows were added to it", allowed=True)
class BaseWrittenAfter(Titan):
    def combine(self, v: Values) -> Tensor:
        base = self.shared(v.x)
        out = base.scatter_add_(0, v.index, v.y)
        base.mul_(2.0)
        return out


@titan_refused("the base the rows are added to is computed from the rows")
class BaseOfRows(Titan):
    def combine(self, v: Values) -> Tensor:
        base = self.shared(v.x) * v.y.float().abs().mean().to(BF16)
        return base.scatter_add(0, v.index, v.y)


@titan_refused("the routed rows are returned")
class RowsReturned(Titan):
    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out, v.y


@titan_refused("routing weights are detached before they weight", allowed=True)
class WeightsDetached(Titan):
    def weigh(self, v: Values) -> Tensor:
        return super().weigh(v.but(weights=v.weights.detach()))


REFUSALS = [*refused.refusals, *titan_refused.refusals]
