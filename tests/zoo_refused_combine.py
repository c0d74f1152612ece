"""Refusals of "grouped_mm": how rows are weighted and summed, and which matrices they meet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo_case import Refused, flat, weight
from zoo_controls import BF16, EXPERTS, FLAT16, HIDDEN, INTERMEDIATE, TOP_K, Grouped, Values
from zoo_refused_grouped import TwoRoutings

refused = Refused("grouped_control", FLAT16)


@refused("sums over tokens instead of choices where both are two", inputs=lambda tokens: flat(HIDDEN, BF16)(TOP_K))
class SumOverTokens(Grouped):
    def combine(self, v: Values) -> Tensor:
        return v.y[self.inverse(v)].view(v.x.shape[0], TOP_K, HIDDEN).sum(dim=0)


@refused("views (choice, token) where assignments are (token, choice)")
class ViewChoiceMajor(Grouped):
    def combine(self, v: Values) -> Tensor:
        return v.y[self.inverse(v)].view(TOP_K, v.x.shape[0], HIDDEN).sum(dim=0)


@refused("views (choice, token) where both are two", inputs=lambda tokens: flat(HIDDEN, BF16)(TOP_K))
class ViewChoiceMajorSquare(Grouped):
    def combine(self, v: Values) -> Tensor:
        return v.y[self.inverse(v)].view(TOP_K, v.x.shape[0], HIDDEN).transpose(0, 1).sum(dim=1)


@refused("sums without returning to token order")
class NoReturn(Grouped):
    def combine(self, v: Values) -> Tensor:
        return v.y.view(v.x.shape[0], TOP_K, HIDDEN).sum(dim=1)


@refused("mean over the choices", allowed=True)
class MeanOfChoices(Grouped):
    def combine(self, v: Values) -> Tensor:
        return v.y[self.inverse(v)].view(v.x.shape[0], TOP_K, HIDDEN).mean(dim=1)


@refused("maximum over the choices")
class MaximumOfChoices(Grouped):
    def combine(self, v: Values) -> Tensor:
        return v.y[self.inverse(v)].view(v.x.shape[0], TOP_K, HIDDEN).amax(dim=1)


@refused("only the first choice returns")
class FirstChoiceOnly(Grouped):
    def combine(self, v: Values) -> Tensor:
        return v.y[self.inverse(v)].view(v.x.shape[0], TOP_K, HIDDEN)[:, 0]


@refused("index_copy keeps one of a token's rows instead of adding them")
class CopyInsteadOfAdd(Grouped):
    def combine(self, v: Values) -> Tensor:
        return v.y.new_zeros(v.x.shape[0], HIDDEN).index_copy(0, v.perm // TOP_K, v.y)


@refused("index_put without accumulate keeps one of a token's rows")
class PutWithoutAccumulate(Grouped):
    def combine(self, v: Values) -> Tensor:
        return v.y.new_zeros(v.x.shape[0], HIDDEN).index_put((v.perm // TOP_K,), v.y)


@refused("index_add by choice, not by token")
class AddByChoice(Grouped):
    def combine(self, v: Values) -> Tensor:
        return v.y.new_zeros(v.x.shape[0], HIDDEN).index_add(0, v.perm % TOP_K, v.y)


@refused("index_add with a factor", allowed=True)
class AddWithFactor(Grouped):
    def combine(self, v: Values) -> Tensor:
        return v.y.new_zeros(v.x.shape[0], HIDDEN).index_add(0, v.perm // TOP_K, v.y, alpha=0.5)


@refused(
    "rows are added along the features where there are as many tokens", inputs=lambda tokens: flat(HIDDEN, BF16)(HIDDEN)
)
class AddToFeatures(Grouped):
    def combine(self, v: Values) -> Tensor:
        rows = v.y.view(TOP_K, v.x.shape[0], HIDDEN).sum(0).repeat(1, TOP_K)
        return v.y.new_zeros(v.x.shape[0], HIDDEN).index_add(1, v.perm // TOP_K, rows)


@refused("routing weights stay in token order")
class WeightsNotSorted(Grouped):
    def weigh(self, v: Values) -> Tensor:
        return v.y * v.weights.reshape(-1, 1)


@refused("routing weights are permuted by the inverse")
class WeightsByInverse(Grouped):
    def weigh(self, v: Values) -> Tensor:
        return super().weigh(v.but(perm=v.perm.argsort()))


@refused("routing weights are flattened choice by choice")
class WeightsChoiceMajor(Grouped):
    def weigh(self, v: Values) -> Tensor:
        return super().weigh(v.but(weights=v.weights.t()))


@refused("routing weights go along the features where there are as many rows", inputs=lambda t: flat(32, BF16)(16))
class WeightsAlongFeatures(Grouped):
    def weigh(self, v: Values) -> Tensor:
        return v.y * v.weights.reshape(-1)[v.perm]


@refused("every choice takes its token's first weight", allowed=True)
class FirstWeightForAll(Grouped):
    def weigh(self, v: Values) -> Tensor:
        return v.y * v.weights[v.perm // TOP_K, 0].unsqueeze(-1)


@refused("the weight is applied twice", allowed=True)
class WeightTwice(Grouped):
    def weigh(self, v: Values) -> Tensor:
        return super().weigh(v.but(y=super().weigh(v)))


@refused("weights are swapped between a token's choices", allowed=True)
class WeightsFlipped(Grouped):
    def weigh(self, v: Values) -> Tensor:
        return super().weigh(v.but(weights=v.weights.flip(-1)))


@refused("the weights are another routing's, permuted rightly", allowed=True)
class WeightsOfOtherRouting(TwoRoutings):
    def weigh(self, v: Values) -> Tensor:
        return super().weigh(v.but(weights=v.other.view(-1, TOP_K).to(v.y.dtype)))


@refused("weights come from the experts' own output")
class WeightsFromOutput(Grouped):
    def weigh(self, v: Values) -> Tensor:
        own = v.y.sum(-1)[self.inverse(v)].view_as(v.weights).softmax(-1)
        return super().weigh(v.but(weights=own))


@refused("a square weight is not transposed", allowed=True)
class SquareNotTransposed(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        return torch._grouped_mm(v.a, self.w_out, offs=v.offs) + self.b_out[v.sorted_ids]


@refused("a square weight is reshaped, not transposed", allowed=True)
class ReshapedWeight(Grouped):
    def gemm_in(self, v: Values) -> Tensor:
        w_in = self.w_in.reshape(EXPERTS, HIDDEN, 2 * INTERMEDIATE)
        return torch._grouped_mm(v.rows, w_in, offs=v.offs) + self.b_in[v.sorted_ids]


@refused("the down projections stand in another order", allowed=True)
class ExpertsReversed(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        w_out = self.w_out.flip(0).transpose(1, 2)
        return torch._grouped_mm(v.a, w_out, offs=v.offs) + self.b_out[v.sorted_ids]


@refused("the down projection depends on the hidden rows")
class WeightOfInterior(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        w_out = self.w_out * v.a.mean()
        return torch._grouped_mm(v.a, w_out.transpose(1, 2), offs=v.offs) + self.b_out[v.sorted_ids]


@refused("a third GEMM stands between the two", allowed=True)
class ThirdGemm(Grouped):
    def __init__(self) -> None:
        super().__init__()
        self.w_mid = weight(EXPERTS, INTERMEDIATE, INTERMEDIATE, fan_in=INTERMEDIATE, dtype=BF16)

    def gemm_out(self, v: Values) -> Tensor:
        return super().gemm_out(v.but(a=torch._grouped_mm(v.a, self.w_mid, offs=v.offs)))


@refused("two down projections share the hidden rows")
class TwoDownProjections(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        return super().gemm_out(v) + torch._grouped_mm(v.a, self.w_out, offs=v.offs)


@refused("the rows are added back to the expert's output")
class ResidualInside(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        return super().gemm_out(v) + v.rows


@refused("negative ids wrap around in an index, but mean no expert to an operator", allowed=True)
class BiasByNegativeIds(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        return torch._grouped_mm(v.a, self.w_out.transpose(1, 2), offs=v.offs) + self.b_out[v.sorted_ids - 1]


@refused("the choices may be equal, which a scattered count does not see", undefined=True)
class EqualChoices(Grouped):
    def route(self, v: Values) -> None:
        logits = self.router(v.x)
        v.ids = torch.stack([logits.argmax(-1), (logits + v.x[:, :EXPERTS]).argmax(-1)], dim=-1)
        v.weights = logits.softmax(-1).gather(1, v.ids)

    def counts(self, v: Values) -> Tensor:
        return v.ids.new_zeros(v.ids.shape[0], EXPERTS).scatter_(1, v.ids, 1).sum(0)


@refused("the product of two gathers is one group's weight gradient, not a second GEMM")
class WeightGradientShape(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        own = torch._grouped_mm(F.normalize(v.a.float(), dim=0).to(v.a.dtype).t(), v.a, offs=v.offs)
        return torch._grouped_mm(v.a, own, offs=v.offs) + self.b_out[v.sorted_ids]


REFUSALS = refused.refusals
