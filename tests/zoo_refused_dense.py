"""Refusals of "dense": gates that do not vanish, experts that do not map zero to zero, dimensions that only agree."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_case import Refused, bias, flat
from zoo_controls import EXPERTS, FLAT32, HIDDEN, INTERMEDIATE, TOP_K, Dense, DenseBefore, Values

SQUARE = flat(HIDDEN)
refused = Refused("dense_control", FLAT32)
before_refused = Refused("dense_before_control", FLAT32)


@refused("softmax over all experts never vanishes")
class FullSoftmax(Dense):
    def gates(self, v: Values) -> Tensor:
        return self.router(v.x).softmax(-1)


@refused("softmax over scattered zeros never vanishes")
class SoftmaxOfScatter(Dense):
    def gates(self, v: Values) -> Tensor:
        return super().gates(v).softmax(-1)


@refused("a constant is added to every gate")
class GatesShifted(Dense):
    def gates(self, v: Values) -> Tensor:
        return super().gates(v) + 0.05


@refused("a constant is added to every gate in place")
class GatesShiftedInPlace(Dense):
    def gates(self, v: Values) -> Tensor:
        gates = super().gates(v)
        gates.add_(0.05)
        return gates


@refused("gates have a lower bound")
class GatesBounded(Dense):
    def gates(self, v: Values) -> Tensor:
        return super().gates(v).clamp(min=0.02)


@refused("one expert is always on")
class GateAlwaysOn(Dense):
    def gates(self, v: Values) -> Tensor:
        gates = super().gates(v)
        gates[:, 0] = 1.0
        return gates


@refused("gates are scattered into small values, not zeros")
class ScatterIntoSmall(Dense):
    def gates(self, v: Values) -> Tensor:
        return torch.full((v.x.shape[0], EXPERTS), 1e-2).scatter(1, v.ids, v.weights)


@refused("gates are scattered into other values, not zeros")
class ScatterIntoLogits(Dense):
    def gates(self, v: Values) -> Tensor:
        return self.router(v.x).scatter(1, v.ids, v.weights)


@refused("choices may be equal: a scatter keeps one of them")
class EqualChoices(Dense):
    def gates(self, v: Values) -> Tensor:
        logits = self.router(v.x)
        ids = torch.stack([logits.argmax(-1), (logits + v.x[:, :EXPERTS]).argmax(-1)], dim=-1)
        return super().gates(v.but(ids=ids))


@refused("gates move to the next expert", allowed=True)
class GatesRolled(Dense):
    def gates(self, v: Values) -> Tensor:
        return super().gates(v).roll(1, dims=-1)


@refused("gates move to the next token")
class GatesRolledOverTokens(Dense):
    def gates(self, v: Values) -> Tensor:
        return super().gates(v).roll(1, dims=0)


@refused("gates are normalised again after the scatter", allowed=True)
class GatesRenormalised(Dense):
    def gates(self, v: Values) -> Tensor:
        gates = super().gates(v).square()
        return gates / gates.sum(-1, keepdim=True)


@refused("gates are dropped at random")
class GatesDropped(Dense):
    def gates(self, v: Values) -> Tensor:
        return torch.nn.functional.dropout(super().gates(v), 0.5, training=True)


@refused("tokens are chosen for each expert, not experts for each token")
class TokensChosen(Dense):
    def gates(self, v: Values) -> Tensor:
        probs = self.router(v.x).softmax(-1)
        value, token = probs.topk(TOP_K * v.x.shape[0] // EXPERTS, dim=0)
        return torch.zeros_like(probs).scatter(0, token, value)


@refused("gates are transposed where there are as many tokens as experts", inputs=lambda tokens: SQUARE(EXPERTS))
class GatesTransposed(Dense):
    def combine(self, v: Values) -> Tensor:
        return (v.y * v.gates.unsqueeze(-1)).sum(0)


@refused("tokens are summed where there are as many as experts", inputs=lambda tokens: SQUARE(EXPERTS))
class TokensSummed(Dense):
    def combine(self, v: Values) -> Tensor:
        return (v.y * v.gates.t().unsqueeze(-1)).sum(1)


@refused("tokens stand where experts should, as many as they are", inputs=lambda tokens: SQUARE(EXPERTS))
class RowsTransposed(Dense):
    def gather(self, v: Values) -> Tensor:
        return v.x.unsqueeze(1).expand(-1, EXPERTS, -1)


@refused("the largest expert wins")
class MaximumOfExperts(Dense):
    def combine(self, v: Values) -> Tensor:
        return (v.y * v.gates.t().unsqueeze(-1)).amax(0)


@refused("experts hand their hidden rows to the next")
class HiddenRolled(Dense):
    def activate(self, v: Values) -> Tensor:
        return super().activate(v).roll(1, 0)


@refused("experts are normalised against each other")
class SoftmaxOverExperts(Dense):
    def activate(self, v: Values) -> Tensor:
        return super().activate(v).softmax(0)


@refused("hidden rows are normalised")
class HiddenNormalised(Dense):
    def activate(self, v: Values) -> Tensor:
        return torch.nn.functional.layer_norm(super().activate(v), (INTERMEDIATE,))


@refused("every expert's bias is added, whatever its gate", allowed=True)
class BiasOutsideGates(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.b_out = bias(EXPERTS, HIDDEN)

    def combine(self, v: Values) -> Tensor:
        return super().combine(v) + self.b_out.sum(0)


@refused("every expert's bias is weighted with its gate", allowed=True)
class BiasInsideGates(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.b_out = bias(EXPERTS, 1, HIDDEN)

    def gemm_out(self, v: Values) -> Tensor:
        return torch.baddbmm(self.b_out, v.a, self.w_out)


@refused("every expert's output is returned")
class OutputsReturned(Dense):
    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out, v.y


@refused("the experts' outputs are written before the combine", backward=False)
class OutputsWritten(Dense):
    def gemm_out(self, v: Values) -> Tensor:
        y = super().gemm_out(v)
        y[1].zero_()
        return y


@before_refused("scattered into zeros: the sigmoid of an unchosen expert is one half")
class ScatteredIntoZeros(DenseBefore):
    def gates(self, v: Values) -> Tensor:
        value, ids = self.router(v.x).topk(TOP_K, dim=1)
        return torch.zeros(v.x.shape[0], EXPERTS).scatter_(1, ids, value).sigmoid()


@before_refused("scattered into minus two: the sigmoid is small, not zero")
class ScatteredIntoFinite(DenseBefore):
    def gates(self, v: Values) -> Tensor:
        value, ids = self.router(v.x).topk(TOP_K, dim=1)
        return torch.full((v.x.shape[0], EXPERTS), -2.0).scatter_(1, ids, value).sigmoid()


@before_refused("scattered into the lowest number: the sigmoid is exactly zero", allowed=True, same_numbers=True)
class ScatteredIntoLowest(DenseBefore):
    def gates(self, v: Values) -> Tensor:
        value, ids = self.router(v.x).topk(TOP_K, dim=1)
        lowest = torch.finfo(value.dtype).min
        return torch.full((v.x.shape[0], EXPERTS), lowest).scatter_(1, ids, value).sigmoid()


@before_refused("tanh of minus infinity is minus one")
class TanhOfInfinity(DenseBefore):
    def gates(self, v: Values) -> Tensor:
        value, ids = self.router(v.x).topk(TOP_K, dim=1)
        return torch.full((v.x.shape[0], EXPERTS), float("-inf")).scatter_(1, ids, value).tanh()


@before_refused("a bias of the first GEMM makes an expert's answer to zero unequal to zero")
class BiasedFirstGemm(DenseBefore):
    def __init__(self) -> None:
        super().__init__()
        self.b_in = bias(EXPERTS, 1, 2 * INTERMEDIATE)

    def gemm_in(self, v: Values) -> Tensor:
        return super().gemm_in(v) + self.b_in


@before_refused("a bias of the second GEMM is added for every expert")
class BiasedSecondGemm(DenseBefore):
    def __init__(self) -> None:
        super().__init__()
        self.b_out = bias(EXPERTS, 1, HIDDEN)

    def gemm_out(self, v: Values) -> Tensor:
        return super().gemm_out(v) + self.b_out


@before_refused("exp is one at zero")
class ExponentialAtZero(DenseBefore):
    def activate(self, v: Values) -> Tensor:
        gate, up = v.h.chunk(2, dim=-1)
        return torch.exp(gate.clamp(max=1.0)) + up


@before_refused("sigmoid is one half at zero, and nothing multiplies it")
class SigmoidAtZero(DenseBefore):
    def activate(self, v: Values) -> Tensor:
        gate, up = v.h.chunk(2, dim=-1)
        return torch.sigmoid(gate) - up


@before_refused("up plus one is one at zero, but gate is zero there", allowed=True)
class UpPlusOne(DenseBefore):
    def activate(self, v: Values) -> Tensor:
        gate, up = v.h.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * (up + 1)


@before_refused("scores run token by token, rows expert by expert")
class ScoresNotTransposed(DenseBefore):
    def gather(self, v: Values) -> Tensor:
        return (v.x.repeat(EXPERTS, 1) * v.gates.reshape(-1, 1)).view(EXPERTS, -1, HIDDEN)


@before_refused("rows run token by token, experts expect them expert by expert")
class RowsInterleaved(DenseBefore):
    def gather(self, v: Values) -> Tensor:
        rows = v.x.repeat_interleave(EXPERTS, dim=0) * v.gates.reshape(-1, 1)
        return rows.view(EXPERTS, -1, HIDDEN)


@before_refused("the sum runs over tokens, as many as there are experts", inputs=lambda tokens: SQUARE(EXPERTS))
class BeforeTokensSummed(DenseBefore):
    def combine(self, v: Values) -> Tensor:
        return v.y.sum(dim=1)


@before_refused("experts are averaged", allowed=True)
class MeanOfExperts(DenseBefore):
    def combine(self, v: Values) -> Tensor:
        return v.y.mean(dim=0)


@before_refused("the last expert is left out of the sum")
class ExpertLeftOut(DenseBefore):
    def combine(self, v: Values) -> Tensor:
        return v.y[:-1].sum(dim=0)


@before_refused("weighted before and after", allowed=True)
class WeightedTwice(DenseBefore):
    def combine(self, v: Values) -> Tensor:
        return (v.y * v.gates.t().unsqueeze(-1)).sum(dim=0)


REFUSALS = [*refused.refusals, *before_refused.refusals]
