"""Refusals of "grouped_mm": writes, aliases, borders of autograd and autocast, and readers outside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo_case import Refused
from zoo_controls import BF16, EXPERTS, FLAT16, HIDDEN, INTERMEDIATE, TOP_K, Grouped, Values

refused = Refused("grouped_control", FLAT16)


@refused("the bias is added in place after the gate half was read")
class BiasAfterReader(Grouped):
    def gemm_in(self, v: Values) -> Tensor:
        return torch._grouped_mm(v.rows, self.w_in.transpose(1, 2), offs=v.offs)

    def activate(self, v: Values) -> Tensor:
        gate = torch.tanh(v.h[:, :INTERMEDIATE])
        v.h.add_(self.b_in[v.sorted_ids])
        return gate * v.h[:, INTERMEDIATE:]


@refused("the bias is added in place to the GEMM's result, and the sum leaves the graph too")
class BiasedResultOutside(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        y = torch._grouped_mm(v.a, self.w_out.transpose(1, 2), offs=v.offs)
        v.biased = y.add_(self.b_out[v.sorted_ids])
        return y

    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out, v.biased


@refused("the bias is added in place to a copy that is not read", allowed=True)
class BiasOnStaleCopy(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        y = torch._grouped_mm(v.a, self.w_out.transpose(1, 2), offs=v.offs)
        y.clone().add_(self.b_out[v.sorted_ids])
        return y


@refused("the copy read was made before the bias was added in place", allowed=True)
class CopyBeforeBias(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        y = torch._grouped_mm(v.a, self.w_out.transpose(1, 2), offs=v.offs)
        early = y.clone()
        y.add_(self.b_out[v.sorted_ids])
        return early


@refused("the result is written after the combine has read it", same_numbers=True, allowed=True, backward=False)
class WrittenAfterCombine(Grouped):
    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        v.y.mul_(3.0)
        return out


@refused("the gate half is written through a view", same_numbers=True)
class GateHalfWritten(Grouped):
    def activate(self, v: Values) -> Tensor:
        v.h[:, :INTERMEDIATE].tanh_()
        return v.h[:, :INTERMEDIATE] * v.h[:, INTERMEDIATE:]


@refused("the gate half is halved through a view before the activation reads it")
class GateHalfScaled(Grouped):
    def activate(self, v: Values) -> Tensor:
        gate = v.h.narrow(1, 0, INTERMEDIATE)
        gate.mul_(0.5)
        return super().activate(v)


@refused("one feature is written through a flat view")
class FlatViewWritten(Grouped):
    def activate(self, v: Values) -> Tensor:
        v.h.view(-1)[::INTERMEDIATE] = 1.0
        return super().activate(v)


@refused("one row of the activation is assigned")
class RowAssigned(Grouped):
    def activate(self, v: Values) -> Tensor:
        a = super().activate(v)
        a[0] = 0.0
        return a


@refused("the activation is clamped in place", allowed=True)
class ClampedInPlace(Grouped):
    def activate(self, v: Values) -> Tensor:
        return super().activate(v).clamp_(-0.5, 0.5)


@refused("the rows are scaled in place after the gather", allowed=True)
class RowsScaledInPlace(Grouped):
    def gather(self, v: Values) -> Tensor:
        rows = super().gather(v)
        rows.mul_(2.0)
        return rows


@refused("the first row is zeroed through an alias after the gather")
class RowsZeroedThroughAlias(Grouped):
    def gather(self, v: Values) -> Tensor:
        rows = super().gather(v)
        rows.view(-1, HIDDEN)[0].zero_()
        return rows


class CopiedTokens(Grouped):
    """Gathers from a copy of the tokens, which a refusal writes later."""

    def gather(self, v: Values) -> Tensor:
        v.copied = v.x * 1.0
        return v.copied[v.perm // TOP_K]


@refused("the tokens are written between the gather and the combine", backward=False)
class TokensWritten(CopiedTokens):
    def gemm_out(self, v: Values) -> Tensor:
        v.copied.mul_(2.0)
        return super().gemm_out(v)

    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out + v.copied


@refused("an alias of the tokens is written between the gather and the combine")
class TokensWrittenThroughAlias(CopiedTokens):
    def activate(self, v: Values) -> Tensor:
        v.copied.view(-1)[:HIDDEN].fill_(3.0)
        return super().activate(v)

    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out + v.copied


@refused("the graph's input is written between the gather and the combine", backward=False)
class InputWritten(Grouped):
    def activate(self, v: Values) -> Tensor:
        v.x.add_(1.0)
        return super().activate(v)


@refused("the down projections are written between the GEMMs", backward=False)
class ParameterWritten(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        y = super().gemm_out(v)
        self.w_out.detach().mul_(2.0)
        return y


@refused("the up projections are written after the first GEMM", backward=False)
class ReadParameterWritten(Grouped):
    def activate(self, v: Values) -> Tensor:
        self.w_in.data.zero_()
        return super().activate(v)


@refused("the bias is written between the GEMMs")
class BiasWritten(Grouped):
    def activate(self, v: Values) -> Tensor:
        self.b_in.detach().zero_()
        return super().activate(v)


@refused("routing weights are written after they were gathered", backward=False)
class WeightsWritten(Grouped):
    def combine(self, v: Values) -> Tensor:
        v.weights.mul_(0.5)
        return super().combine(v)

    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out, v.weights


@refused("ids are written between the sort and the count")
class IdsWritten(Grouped):
    def counts(self, v: Values) -> Tensor:
        v.sorted_ids.clamp_(max=EXPERTS - 2)
        return super().counts(v)


@refused("the ids that were sorted are written before the bias is gathered by them", backward=False)
class IdsWrittenBeforeBias(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        v.sorted_ids.zero_()
        return super().gemm_out(v)


@refused("the permutation is written between the gather and the return", backward=False)
class PermutationWritten(Grouped):
    def combine(self, v: Values) -> Tensor:
        v.perm.copy_(v.perm.flip(0))
        return super().combine(v)


@refused("the inverse is written after it was built")
class InverseWritten(Grouped):
    def inverse(self, v: Values) -> Tensor:
        inverse = super().inverse(v)
        inverse[0] = inverse[1]
        return inverse


@refused("offsets are written between the GEMMs", backward=False)
class OffsetsWritten(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        v.offs[1:3].sub_(1)
        return super().gemm_out(v)


@refused("counts are written before their sum")
class CountsWritten(Grouped):
    def offsets(self, v: Values) -> Tensor:
        v.counts[1] += 1
        v.counts[2] -= 1
        return super().offsets(v)


@refused("the weighted rows are written into the expert's output", allowed=True, same_numbers=True, backward=False)
class WeightedInto(Grouped):
    def weigh(self, v: Values) -> Tensor:
        return torch.mul(v.y, v.weights.reshape(-1)[v.perm].unsqueeze(-1), out=v.y)


@refused("the activation is returned")
class ActivationReturned(Grouped):
    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out, v.a


@refused("a loss reads the hidden rows")
class HiddenInLoss(Grouped):
    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out, v.h.float().square().mean()


@refused("a view of the hidden rows leaves the graph")
class HiddenViewReturned(Grouped):
    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out, v.h[:, 0]


@refused("the experts' unweighted output is returned")
class OutputsReturned(Grouped):
    def weigh(self, v: Values) -> Tensor:
        v.unweighted = v.y
        return super().weigh(v)

    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out, v.unweighted


@refused("the gathered rows are returned")
class RowsReturned(Grouped):
    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out, v.rows


@refused("the module keeps the activation")
class ActivationKept(Grouped):
    kept: Tensor | None = None

    def activate(self, v: Values) -> Tensor:
        a = super().activate(v)
        self.kept = a.detach()
        return a

    def finish(self, v: Values, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return out, v.a.detach().sum()


@refused("the second GEMM runs without gradients")
class SecondGemmWithoutGrad(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        with torch.no_grad():
            y = super().gemm_out(v)
        return y


@refused("the activation runs without gradients")
class ActivationWithoutGrad(Grouped):
    def activate(self, v: Values) -> Tensor:
        with torch.no_grad():
            gate = torch.tanh(v.h[:, :INTERMEDIATE])
        return gate * v.h[:, INTERMEDIATE:]


@refused("gradients are on for the first GEMM and off from there to the end")
class GradOffAfterFirstGemm(Grouped):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        try:
            return super().forward(x)
        finally:
            torch.set_grad_enabled(True)

    def activate(self, v: Values) -> Tensor:
        torch.set_grad_enabled(False)
        return super().activate(v)


@refused("autocast changes the dtype of one product inside")
class AutocastInside(Grouped):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(INTERMEDIATE))

    def activate(self, v: Values) -> Tensor:
        with torch.autocast("cpu", BF16):
            return (super().activate(v).float() @ self.mix).to(BF16) * 1.5


@refused("autocast begins inside, though nothing there heeds it", same_numbers=True)
class AutocastAroundActivation(Grouped):
    def activate(self, v: Values) -> Tensor:
        with torch.autocast("cpu", BF16):
            return super().activate(v)


@refused("the whole block runs without gradients", allowed=True)
class BlockWithoutGrad(Grouped):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HIDDEN, dtype=BF16))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad():
            out = super().forward(x)
        assert isinstance(out, Tensor)
        return out * self.scale


@refused("the gate is detached")
class GateDetached(Grouped):
    def activate(self, v: Values) -> Tensor:
        gate, up = v.h.chunk(2, dim=-1)
        return torch.tanh(gate.detach()) * up


@refused("the hidden rows are detached")
class HiddenDetached(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        return super().gemm_out(v.but(a=v.a.detach()))


@refused("the gathered rows are detached")
class RowsDetached(Grouped):
    def gather(self, v: Values) -> Tensor:
        return super().gather(v).detach()


@refused("the second GEMM's weights are detached", allowed=True)
class WeightDetached(Grouped):
    def gemm_out(self, v: Values) -> Tensor:
        y = torch._grouped_mm(v.a, self.w_out.detach().transpose(1, 2), offs=v.offs)
        return y + self.b_out[v.sorted_ids]


REFUSALS = refused.refusals
