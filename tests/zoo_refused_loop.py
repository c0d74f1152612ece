"""Refusals of "expert_loop"."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_case import Refused
from zoo_controls import EXPERTS, FLAT32, HIDDEN, INTERMEDIATE, TOP_K, route
from zoo_controls_static import Loop

refused = Refused("loop_control", FLAT32, fullgraph=True)


@refused("the loop misses the last expert")
class MissesLast(Loop):
    def turns(self) -> list[int]:
        return list(range(EXPERTS - 1))


@refused("one expert runs twice")
class RunsTwice(Loop):
    def turns(self) -> list[int]:
        return [0, 1, 1, 2, 3]


@refused("one expert runs twice in another's place")
class RunsInPlaceOfAnother(Loop):
    def turns(self) -> list[int]:
        return [0, 1, 1, 3]


@refused("the turns run backwards", allowed=True, same_numbers=True)
class RunsBackwards(Loop):
    def turns(self) -> list[int]:
        return [3, 2, 1, 0]


@refused("expert numbers start at one, so the first is never hit")
class NumbersFromOne(Loop):
    def hits(self, ids: Tensor, e: int) -> tuple[Tensor, Tensor]:
        token, place = torch.where(ids == e + 1)
        return token, place


@refused("a turn takes everything up to its expert")
class HitsByInequality(Loop):
    def hits(self, ids: Tensor, e: int) -> tuple[Tensor, Tensor]:
        token, place = torch.where(ids <= e)
        return token, place


@refused("only first choices are hit")
class HitsFirstChoice(Loop):
    def hits(self, ids: Tensor, e: int) -> tuple[Tensor, Tensor]:
        token, place = torch.where(ids[:, :1] == e)
        return token, place


@refused("one turn follows another routing")
class OneTurnOfOtherRouting(Loop):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(HIDDEN, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        (weights, ids), (_, other) = route(self.router, x), route(self.other, x)
        out = torch.zeros_like(x)
        for e in self.turns():
            token, place = self.hits(other if e == 2 else ids, e)
            out = self.add(out, token, self.weigh(self.expert(x[token], e), weights, token, place))
        return out


@refused("a turn uses the next expert's matrices", allowed=True)
class MatricesOfNextExpert(Loop):
    def expert(self, rows: Tensor, e: int) -> Tensor:
        return super().expert(rows, (e + 1) % EXPERTS)


@refused("a turn's down projection is the next expert's", allowed=True)
class DownOfNextExpert(Loop):
    def expert(self, rows: Tensor, e: int) -> Tensor:
        return F.linear(self.activate(F.linear(rows, self.w_in[e]), e), self.w_out[(e + 1) % EXPERTS])


@refused("the last expert's activation is another")
class OtherActivation(Loop):
    def activate(self, h: Tensor, e: int) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return F.gelu(gate) * up if e == EXPERTS - 1 else F.silu(gate) * up


@refused("every turn scales by its number")
class ScaledByTurn(Loop):
    def activate(self, h: Tensor, e: int) -> Tensor:
        return super().activate(h, e) * (e + 1)


@refused("rows of one expert are centred")
class RowsCentred(Loop):
    def activate(self, h: Tensor, e: int) -> Tensor:
        a = super().activate(h, e)
        return a - a.sum(0, keepdim=True) / 8


@refused("one expert has a bias")
class OneBiased(Loop):
    def expert(self, rows: Tensor, e: int) -> Tensor:
        y = super().expert(rows, e)
        return y + 0.5 if e == 1 else y


@refused("every choice takes the token's first weight", allowed=True)
class FirstWeight(Loop):
    def weigh(self, y: Tensor, weights: Tensor, token: Tensor, place: Tensor) -> Tensor:
        return y * weights[token, torch.zeros_like(place), None]


@refused("weights are read by choice, then token modulo the choices")
class WeightsExchanged(Loop):
    def weigh(self, y: Tensor, weights: Tensor, token: Tensor, place: Tensor) -> Tensor:
        return y * weights[place, token % TOP_K, None]


@refused("rows go to the next token")
class AddedToNextToken(Loop):
    def add(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.index_add_(0, (token + 1) % out.shape[0], y)


@refused("a later expert overwrites an earlier one")
class Overwritten(Loop):
    def add(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        out[token] = y
        return out


@refused("the largest contribution wins")
class MaximumWins(Loop):
    def add(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.scatter_reduce(0, token[:, None].expand_as(y), y, "amax")


class Sequential(Loop):
    """A turn may change what the next one reads."""

    def between(self, x: Tensor, out: Tensor, e: int) -> tuple[Tensor, Tensor]:
        return x, out

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        weights, ids = route(self.router, x)
        out = torch.zeros_like(x)
        for e in self.turns():
            token, place = self.hits(ids, e)
            out = self.add(out, token, self.weigh(self.expert(x[token], e), weights, token, place))
            x, out = self.between(x, out, e)
        return out


@refused("each expert reads what the ones before it added")
class ReadsSum(Sequential):
    def between(self, x: Tensor, out: Tensor, e: int) -> tuple[Tensor, Tensor]:
        return x + out, out


@refused("the sum is halved after every turn")
class SumDecays(Sequential):
    def between(self, x: Tensor, out: Tensor, e: int) -> tuple[Tensor, Tensor]:
        return x, out * 0.5


@refused("the sum is clamped in place after the second turn")
class SumClamped(Sequential):
    def between(self, x: Tensor, out: Tensor, e: int) -> tuple[Tensor, Tensor]:
        return x, out.clamp_(-0.5, 0.5) if e == 1 else out


@refused("the tokens are written after the second turn", backward=False)
class TokensWritten(Sequential):
    def between(self, x: Tensor, out: Tensor, e: int) -> tuple[Tensor, Tensor]:
        return x.mul_(0.5) if e == 1 else x, out


@refused("the last expert runs without gradients")
class LastWithoutGrad(Loop):
    def expert(self, rows: Tensor, e: int) -> Tensor:
        if e < EXPERTS - 1:
            return super().expert(rows, e)
        with torch.no_grad():
            return super().expert(rows, e)


@refused("one expert's hidden rows are added up for a loss")
class HiddenOutside(Loop):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        weights, ids = route(self.router, x)
        out, loss = torch.zeros_like(x), x.new_zeros(())
        for e in self.turns():
            token, place = self.hits(ids, e)
            a = self.activate(F.linear(x[token], self.w_in[e]), e)
            loss = loss + a.square().sum()
            out = self.add(out, token, self.weigh(F.linear(a, self.w_out[e]), weights, token, place))
        return out, loss


@refused("halves differ in width from expert to expert")
class UnevenExperts(Loop):
    def activate(self, h: Tensor, e: int) -> Tensor:
        if e > 0:
            return super().activate(h, e)
        keep = INTERMEDIATE // 2
        return F.pad(F.silu(h[:, :keep]) * h[:, INTERMEDIATE : INTERMEDIATE + keep], (0, INTERMEDIATE - keep))


REFUSALS = refused.refusals
