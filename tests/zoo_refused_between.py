"""Refusals of "grouped_mm": what stands between the GEMMs is no function of one row's gate, up and weight."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import Refused, flat, weight
from zoo_controls import BF16, EXPERTS, FLAT16, HIDDEN, INTERMEDIATE, TOP_K, Grouped, Values

refused = Refused("grouped_control", FLAT16)


@refused("rows are normalised between the GEMMs")
class NormBetween(Grouped):
    def activate(self, v: Values) -> Tensor:
        return F.layer_norm(super().activate(v), (INTERMEDIATE,))


@refused("root mean square of the row, written out")
class ManualNormBetween(Grouped):
    def activate(self, v: Values) -> Tensor:
        a = super().activate(v)
        return a * torch.rsqrt(a.square().mean(-1, keepdim=True) + 1e-6)


@refused("softmax over the features")
class SoftmaxOverFeatures(Grouped):
    def activate(self, v: Values) -> Tensor:
        return v.h[:, :INTERMEDIATE].softmax(-1) * v.h[:, INTERMEDIATE:] * INTERMEDIATE


@refused("the expert's output is normalised before it is weighted")
class NormAfterExpert(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        return F.normalize(super().gemm_out(v), dim=-1)


@refused("the row's maximum is subtracted")
class MaximumSubtracted(Grouped):
    def activate(self, v: Values) -> Tensor:
        a = super().activate(v)
        return a - a.amax(dim=1, keepdim=True)


@refused("dropout between the GEMMs")
class DropoutBetween(Grouped):
    def activate(self, v: Values) -> Tensor:
        return F.dropout(super().activate(v), p=0.5, training=True)


@refused("noise between the GEMMs")
class NoiseBetween(Grouped):
    def activate(self, v: Values) -> Tensor:
        a = super().activate(v)
        return a + torch.randn_like(a)


@refused("a leaky slope drawn at random")
class RandomSlope(Grouped):
    def activate(self, v: Values) -> Tensor:
        return F.rrelu(v.h[:, :INTERMEDIATE], 0.1, 0.9, training=True) * v.h[:, INTERMEDIATE:]


@refused("a mask over the rows")
class RowMask(Grouped):
    def activate(self, v: Values) -> Tensor:
        keep = torch.arange(v.h.shape[0]) % 3 > 0
        return super().activate(v).masked_fill(~keep.unsqueeze(-1), 0.0)


@refused("rows of one expert are masked")
class ExpertMask(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        return super().gemm_out(v) * (v.sorted_ids != 1).unsqueeze(-1)


@refused("every expert has its own scale")
class ScaleOfExpert(Grouped):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, EXPERTS).to(BF16))

    def activate(self, v: Values) -> Tensor:
        return super().activate(v) * self.scale[v.sorted_ids, None]


@refused("every feature has its own scale")
class ScaleOfFeature(Grouped):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, INTERMEDIATE).to(BF16))

    def activate(self, v: Values) -> Tensor:
        return super().activate(v) * self.scale


@refused("a learned scalar inside the activation")
class LearnedScalar(Grouped):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(1.5, dtype=BF16))

    def activate(self, v: Values) -> Tensor:
        return torch.tanh(self.beta * v.h[:, :INTERMEDIATE]) * v.h[:, INTERMEDIATE:]


@refused("a scalar taken from the tokens")
class ScalarOfTokens(Grouped):
    def activate(self, v: Values) -> Tensor:
        return super().activate(v) * v.x.abs().mean()


@refused("a scalar taken from the rows themselves")
class ScalarOfRows(Grouped):
    def activate(self, v: Values) -> Tensor:
        a = super().activate(v)
        return a / a.abs().max()


@refused("the features' numbers enter the activation")
class FeatureNumbers(Grouped):
    def activate(self, v: Values) -> Tensor:
        return super().activate(v) * torch.arange(INTERMEDIATE).cos().to(BF16)


@refused("a running sum over the rows")
class CumulativeRows(Grouped):
    def activate(self, v: Values) -> Tensor:
        return super().activate(v).cumsum(0)


@refused("rows are shifted by one")
class RolledRows(Grouped):
    def activate(self, v: Values) -> Tensor:
        return super().activate(v).roll(1, 0)


@refused("rows are centred over all rows")
class CentredRows(Grouped):
    def activate(self, v: Values) -> Tensor:
        a = super().activate(v)
        return a - a.mean(0)


@refused("neighbouring rows exchange halves through a view")
class MixedByView(Grouped):
    def activate(self, v: Values) -> Tensor:
        a = super().activate(v)
        return a.view(2, -1, INTERMEDIATE).transpose(0, 1).reshape(-1, INTERMEDIATE)


@refused("features are shifted by one")
class RolledFeatures(Grouped):
    def activate(self, v: Values) -> Tensor:
        return super().activate(v).roll(1, -1)


@refused("features are reversed before gate and up are told apart")
class FlippedFeatures(Grouped):
    def activate(self, v: Values) -> Tensor:
        gate, up = v.h.flip(-1).chunk(2, dim=-1)
        return torch.tanh(gate) * up


@refused("a dense matrix between the GEMMs")
class MixedFeatures(Grouped):
    def __init__(self) -> None:
        super().__init__()
        self.mix = weight(INTERMEDIATE, INTERMEDIATE, fan_in=INTERMEDIATE, dtype=BF16)

    def activate(self, v: Values) -> Tensor:
        return super().activate(v) @ self.mix


@refused("rows and features are exchanged where there are as many", inputs=lambda tokens: flat(HIDDEN, BF16)(16))
class TransposedRows(Grouped):
    def activate(self, v: Values) -> Tensor:
        return super().activate(v).t()


@refused("the halves overlap by one feature")
class OverlappingHalves(Grouped):
    def activate(self, v: Values) -> Tensor:
        return torch.tanh(v.h[:, :INTERMEDIATE]) * v.h[:, INTERMEDIATE - 1 : -1]


@refused("gate is strided, up is a half")
class StrideAgainstHalf(Grouped):
    def activate(self, v: Values) -> Tensor:
        return torch.tanh(v.h[:, ::2]) * v.h[:, INTERMEDIATE:]


@refused("gate and up are other thirds than the two halves")
class TwoOfThreeParts(Grouped):
    def __init__(self) -> None:
        super().__init__()
        self.w_in = weight(EXPERTS, 3 * INTERMEDIATE, HIDDEN, fan_in=HIDDEN, dtype=BF16)

    def gemm_in(self, v: Values) -> Tensor:
        return torch._grouped_mm(v.rows, self.w_in.transpose(1, 2), offs=v.offs)

    def activate(self, v: Values) -> Tensor:
        gate, _, up = v.h.chunk(3, dim=-1)
        return torch.tanh(gate) * up


@refused("uneven parts, the first broadcast over the second")
class UnevenParts(Grouped):
    def activate(self, v: Values) -> Tensor:
        first, second, third = v.h.split([1, INTERMEDIATE, INTERMEDIATE - 1], dim=-1)
        return torch.tanh(first) * second + third.sum(-1, keepdim=True) * 0.1


@refused("gate and up exchanged", allowed=True)
class SwappedHalves(Grouped):
    def activate(self, v: Values) -> Tensor:
        up, gate = v.h.chunk(2, dim=-1)
        return torch.tanh(gate) * up


@refused("gate serves as up too", allowed=True)
class GateTwice(Grouped):
    def activate(self, v: Values) -> Tensor:
        gate, _ = v.h.chunk(2, dim=-1)
        return torch.tanh(gate) * gate


@refused("gate and up interleaved through a view", allowed=True)
class InterleavedView(Grouped):
    def activate(self, v: Values) -> Tensor:
        gate, up = v.h.view(-1, INTERMEDIATE, 2).unbind(-1)
        return torch.tanh(gate) * up


@refused("halves told apart by a view that puts the halves first", allowed=True, same_numbers=True)
class StackedView(Grouped):
    def activate(self, v: Values) -> Tensor:
        both = v.h.view(-1, 2, INTERMEDIATE)
        return torch.tanh(both[:, 0]) * both[:, 1]


@refused("the choice between gate and up depends on the sign", allowed=True)
class WhereBetween(Grouped):
    def activate(self, v: Values) -> Tensor:
        gate, up = v.h.chunk(2, dim=-1)
        return torch.where(gate > 0, gate * up, up)


@refused("a cast to float16 and back", allowed=True)
class CastToHalf(Grouped):
    def activate(self, v: Values) -> Tensor:
        return super().activate(v.but(h=v.h * 100).but()).half().bfloat16() / 100


@refused("a cast to eight bits and back", allowed=True)
class CastToFloat8(Grouped):
    def activate(self, v: Values) -> Tensor:
        return super().activate(v).to(torch.float8_e4m3fn).to(BF16)


@refused("a cast to integers and back", allowed=True)
class CastToInteger(Grouped):
    def activate(self, v: Values) -> Tensor:
        return (super().activate(v) * 4).to(torch.int32).to(BF16)


@refused("rows are cast to eight bits before the first GEMM", allowed=True)
class RowsInFloat8(Grouped):
    def gather(self, v: Values) -> Tensor:
        return super().gather(v).to(torch.float8_e4m3fn).to(BF16)


@refused("the sum is in float64", allowed=True)
class SumInDouble(Grouped):
    def combine(self, v: Values) -> Tensor:
        return v.y[self.inverse(v)].view(-1, TOP_K, HIDDEN).sum(dim=1, dtype=torch.float64)


@refused("gate and up come from the rows of two different tensors")
class TwoSources(Grouped):
    def activate(self, v: Values) -> Tensor:
        own = self.gemm_in(v.but(rows=v.x.roll(1, 0)[v.perm // TOP_K]))
        return torch.tanh(v.h[:, :INTERMEDIATE]) * own[:, INTERMEDIATE:]


@refused("rows are renumbered before the gather", allowed=True)
class ShiftedTokens(Grouped):
    def gather(self, v: Values) -> Tensor:
        return v.x.roll(1, 0)[v.perm // TOP_K]


@refused("rows are scaled by a second set of weights")
class SecondWeights(Grouped):
    def activate(self, v: Values) -> Tensor:
        second = v.weights.square().flip(0)
        return super().activate(v) * second.reshape(-1)[v.perm].unsqueeze(-1)


class StraightThrough(torch.autograd.Function):
    """Rounds forward, lets the gradient pass backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


@refused("an autograd function of the model's own between the GEMMs")
class OwnBackward(Grouped):
    def activate(self, v: Values) -> Tensor:
        return StraightThrough.apply(super().activate(v))


@refused("a power whose exponent is a tensor")
class TensorExponent(Grouped):
    def activate(self, v: Values) -> Tensor:
        exponent = v.weights.sum().to(BF16) / v.weights.shape[0] + 1.0
        return torch.tanh(v.h[:, :INTERMEDIATE]).abs().pow(exponent) * v.h[:, INTERMEDIATE:]


@refused("a constant tensor of ones in the activation", allowed=True)
class ConstantTensor(Grouped):
    def activate(self, v: Values) -> Tensor:
        gate, up = v.h.chunk(2, dim=-1)
        return torch.tanh(gate) * (up + torch.ones_like(up) * math.e)


REFUSALS = refused.refusals
