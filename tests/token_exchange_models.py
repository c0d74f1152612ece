"""Blocks that exchange their tokens between ranks by themselves, in the ways torchtitan does, and such with a defect.

Each rank holds its own experts. One method for each step, so that a variant is the step that it writes differently.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed._functional_collectives import all_to_all_single
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

EXPERTS, TOP_K, HIDDEN, INNER = 8, 2, 32, 16
BF16 = torch.bfloat16


def of_this_rank(*shape: int) -> nn.Parameter:
    """Random numbers, on every rank others."""
    generator = torch.Generator().manual_seed(17 * (1 + distributed.get_rank()) + sum(shape))
    return nn.Parameter(torch.randn(shape, generator=generator) / shape[-1] ** 0.5)


@torch.library.custom_op("torchtitan::deterministic_scatter_add", mutates_args=())
def scatter_add_in_order(out: Tensor, index: Tensor, src: Tensor) -> Tensor:
    """By the name of torchtitan's: known to detection by it, as nobody sees through an operator."""
    return out.scatter_add(0, index, src)


scatter_add_in_order.register_fake(lambda out, index, src: torch.empty_like(out))
scatter_add_in_order.register_autograd(
    lambda ctx, grad: (grad, None, grad.gather(0, *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


@dataclass
class Way:
    """What one call knows: its tokens, their routing, how many rows come from and go to each rank, of which experts."""

    x: Tensor
    weights: Tensor
    ids: Tensor
    order: Tensor
    came: Tensor
    leaving: list[int]
    arriving: list[int]


class Exchanging(nn.Module):
    """Segments repeated to rows, three products, int64 counts, sums in place of zeros."""

    def __init__(self, experts: int = EXPERTS, hidden: int = HIDDEN, inner: int = INNER) -> None:
        super().__init__()
        self.num_experts, self.hidden, self.inner = experts, hidden, inner
        self.group: Any = distributed.group.WORLD
        self.ranks = distributed.get_world_size()
        self.here = experts // self.ranks
        self.router = nn.Linear(hidden, experts, bias=False)
        self.make_experts()

    def make_experts(self) -> None:
        self.w1, self.w3 = (of_this_rank(self.here, self.inner, self.hidden) for _ in range(2))
        self.w2 = of_this_rank(self.here, self.hidden, self.inner)

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.route(x)
        order = torch.argsort(ids.view(-1), stable=True)
        token = order // TOP_K
        way = Way(x, weights, ids, order, *self.exchange_counts(self.count(ids, x)))
        arrived = self.send(self.rows_of(x[token], weights.view(-1)[order]), way)
        rows, back = self.in_order(arrived, way)
        y = self.fetch(back(self.experts(rows, way)), way)
        result = self.sum_up(x, token, self.weighted(y, weights.view(-1)[order], way))
        return self.returned(result, arrived, way)

    # ---- routing

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(x).sigmoid()
        ids = scores.topk(TOP_K, dim=-1).indices
        return scores.gather(1, ids), ids

    def count(self, ids: Tensor, x: Tensor) -> Tensor:
        return torch.histc(ids.view(-1).float(), bins=self.num_experts, min=0, max=self.num_experts).long()

    def rows_of(self, rows: Tensor, weights: Tensor) -> Tensor:
        return rows

    # ---- exchange

    def exchange_counts(self, counts: Tensor) -> tuple[Tensor, Any, Any]:
        with torch.no_grad():
            came = all_to_all_single(counts.view(self.ranks, -1), None, None, group=self.group)
            came = torch.ops._c10d_functional.wait_tensor(came).reshape(-1)
            leaving = counts.view(self.ranks, -1).sum(dim=1).to(torch.device("cpu"), non_blocking=True)
            arriving = came.view(self.ranks, -1).sum(dim=1).to(torch.device("cpu"), non_blocking=False)
            return came, leaving.tolist(), arriving.tolist()

    def send(self, rows: Tensor, way: Way) -> Tensor:
        return all_to_all_single(rows, way.arriving, way.leaving, self.group)

    def fetch(self, rows: Tensor, way: Way) -> Tensor:
        return all_to_all_single(rows, way.leaving, way.arriving, self.group)

    # ---- the order of rows

    def places(self, total: int, way: Way) -> Tensor:
        begins = (way.came.cumsum(0) - way.came).view(self.ranks, self.here).t().reshape(-1)
        sizes = way.came.view(self.ranks, self.here).t().reshape(-1)
        segment = torch.arange(sizes.shape[0]).repeat_interleave(sizes, output_size=total)
        before = sizes.cumsum(0) - sizes
        return begins[segment] + torch.arange(segment.shape[0]) - before[segment]

    def in_order(self, arrived: Tensor, way: Way) -> tuple[Tensor, Any]:
        places = self.places(arrived.shape[0], way)

        def back(y: Tensor) -> Tensor:
            out = y.new_empty(arrived.shape)
            out[places, :] = y
            return out

        return arrived[places, :], back

    # ---- experts

    def counts_here(self, way: Way) -> Tensor:
        return way.came.view(self.ranks, self.here).sum(0)

    def experts(self, rows: Tensor, way: Way) -> Tensor:
        ends = torch.cumsum(self.counts_here(way), dim=0, dtype=torch.int32)
        return self.products(rows.to(BF16), ends).type_as(rows)

    def products(self, rows: Tensor, ends: Tensor) -> Tensor:
        w1, w2, w3 = (weight.to(BF16).transpose(-2, -1) for weight in (self.w1, self.w2, self.w3))
        gate = F.silu(torch._grouped_mm(rows, w1, offs=ends))
        return torch._grouped_mm(gate * torch._grouped_mm(rows, w3, offs=ends), w2, offs=ends)

    # ---- the sum

    def weighted(self, y: Tensor, weights: Tensor, way: Way) -> Tensor:
        return (y.float() * weights.reshape(-1, 1)).to(y.dtype)

    def sum_up(self, x: Tensor, token: Tensor, y: Tensor) -> Any:
        return torch.zeros_like(x).scatter_add(0, token.reshape(-1, 1).expand(-1, x.shape[-1]), y)

    def returned(self, result: Tensor, arrived: Tensor, way: Way) -> Any:
        return result


class Searched(Exchanging):
    """Segments searched, flat int32 counts, sizes by item(), gate and up in one, weighted before, index_add."""

    def make_experts(self) -> None:
        self.w_in = nn.Parameter(of_this_rank(self.here, self.hidden, 2 * self.inner).detach().to(BF16))
        self.w_out = nn.Parameter(of_this_rank(self.here, self.inner, self.hidden).detach().to(BF16))

    def count(self, ids: Tensor, x: Tensor) -> Tensor:
        marks = torch.zeros(ids.shape[0], self.num_experts, dtype=torch.int32).scatter_(1, ids, 1)
        return marks.sum(dim=0).int()

    def rows_of(self, rows: Tensor, weights: Tensor) -> Tensor:
        return (rows.float() * weights.unsqueeze(-1)).to(BF16)

    def exchange_counts(self, counts: Tensor) -> tuple[Tensor, Any, Any]:
        parts = [self.here] * self.ranks
        name = self.group.group_name
        came = torch.ops._c10d_functional.all_to_all_single(counts, parts, parts, name)
        came = torch.ops._c10d_functional.wait_tensor(came)
        leaving = counts.reshape(self.ranks, self.here).sum(-1)
        arriving = came.reshape(self.ranks, self.here).sum([1])
        numbers = ([sizes[rank].item() for rank in range(self.ranks)] for sizes in (leaving, arriving))
        return came, *numbers

    def send(self, rows: Tensor, way: Way) -> Tensor:
        name = self.group.group_name
        found = torch.ops._c10d_functional_autograd.all_to_all_single(rows, way.arriving, way.leaving, name)
        return torch.ops._c10d_functional.wait_tensor(found)

    def places(self, total: int, way: Way) -> Tensor:
        begins = way.came.cumsum(0) - way.came
        sizes = way.came.view(self.ranks, self.here).t().reshape(-1)
        ends = sizes.cumsum(0)
        shift = begins.view(self.ranks, self.here).t().reshape(-1) - (ends - sizes)
        place = torch.arange(total)
        return place + shift[torch.searchsorted(ends, place, right=True)]

    def in_order(self, arrived: Tensor, way: Way) -> tuple[Tensor, Any]:
        places = self.places(arrived.shape[0], way)
        rows = torch.index_select(arrived, 0, places)
        return rows, lambda y: torch.empty_like(arrived).index_copy_(0, places, y)

    def products(self, rows: Tensor, ends: Tensor) -> Tensor:
        gate, up = torch._grouped_mm(rows, self.w_in, offs=ends).chunk(2, -1)
        return torch._grouped_mm(F.gelu(gate) * up, self.w_out, offs=ends)

    def weighted(self, y: Tensor, weights: Tensor, way: Way) -> Tensor:
        return y.float()

    def sum_up(self, x: Tensor, token: Tensor, y: Tensor) -> Any:
        return torch.zeros_like(x).index_add(0, token, y)


class SortedHere(Searched):
    """Rows that came are sorted by their experts' numbers, and gathered by the inverse."""

    def in_order(self, arrived: Tensor, way: Way) -> tuple[Tensor, Any]:
        expert = torch.arange(self.num_experts) % self.here
        order = expert.repeat_interleave(way.came, output_size=arrived.shape[0]).sort().indices
        inverse = order.argsort()
        return arrived[order], lambda y: y[inverse]


class WeightedThere(Exchanging):
    """Weights are exchanged as well, and applied by the ranks of the experts."""

    def in_order(self, arrived: Tensor, way: Way) -> tuple[Tensor, Any]:
        places = self.places(arrived.shape[0], way)
        weights = self.send(way.weights.view(-1)[way.order].unsqueeze(-1), way)[places]

        def back(y: Tensor) -> Tensor:
            out = y.new_empty(arrived.shape)
            out[places, :] = y * weights
            return out

        return arrived[places, :], back

    def weighted(self, y: Tensor, weights: Tensor, way: Way) -> Tensor:
        return y


class LoopedExperts(Exchanging):
    """Each expert by itself, on as many rows as the host has read that it has."""

    def experts(self, rows: Tensor, way: Way) -> Tensor:
        made = []
        for expert, part in enumerate(rows.split(self.counts_here(way).tolist())):
            gate = F.silu(part @ self.w1[expert].t())
            made.append((gate * (part @ self.w3[expert].t())) @ self.w2[expert].t())
        return torch.cat(made)


class OfDTensors(Exchanging):
    """Experts that are shards of DTensors, their sums added to a shared expert by torchtitan's operator; load."""

    load: Tensor

    def make_experts(self) -> None:
        super().make_experts()
        mesh = init_device_mesh("cpu", (self.ranks,))
        for name in ("w1", "w2", "w3"):
            local = getattr(self, name).detach()
            setattr(self, name, nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)])))
        self.shared = nn.Linear(self.hidden, self.hidden)
        self.register_buffer("load", torch.zeros(self.num_experts, dtype=torch.int64))

    def count(self, ids: Tensor, x: Tensor) -> Tensor:
        counts = super().count(ids, x)
        with torch.no_grad():
            self.load.add_(counts)
        return counts

    def products(self, rows: Tensor, ends: Tensor) -> Tensor:
        shards: Any = (self.w1, self.w2, self.w3)
        w1, w2, w3 = (weight.to_local().to(BF16).transpose(-2, -1) for weight in shards)
        gate = F.silu(torch._grouped_mm(rows, w1, offs=ends))
        return torch._grouped_mm(gate * torch._grouped_mm(rows, w3, offs=ends), w2, offs=ends)

    def sum_up(self, x: Tensor, token: Tensor, y: Tensor) -> Any:
        return scatter_add_in_order(self.shared(x), token.reshape(-1, 1).expand(-1, x.shape[-1]), y)


class Remembering(Exchanging):
    """What routing counts is looked at from outside: how many rows came."""

    def returned(self, result: Tensor, arrived: Tensor, way: Way) -> Any:
        return result, way.came


class SentTwice(Exchanging):
    """What came home is exchanged there and back once more, and doubled there: the same sum, doubled."""

    def fetch(self, rows: Tensor, way: Way) -> Tensor:
        return super().fetch(self.send(super().fetch(rows, way), way) * 2, way)


class Checkpointed(nn.Module):
    """A block whose rows are exchanged once more in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Exchanging()

    def forward(self, x: Tensor) -> Tensor:
        made: Any = checkpoint(self.block, x, use_reentrant=False)
        return x + made


class Stacked(nn.Module):
    """Two blocks, residuals around them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Exchanging(), Searched()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


# ---- with one defect each: what is computed is another function of the tokens, or cannot be told from one


class CountsOfOthers(Exchanging):
    """Rows are exchanged by the counts of another choice."""

    def count(self, ids: Tensor, x: Tensor) -> Tensor:
        return super().count((-self.router(x)).topk(TOP_K, dim=-1).indices, x)


class OtherGroup(Exchanging):
    """The way back is another group's, though of the same ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.other: Any = distributed.new_group([*range(self.ranks)])

    def fetch(self, rows: Tensor, way: Way) -> Tensor:
        return all_to_all_single(rows, way.leaving, way.arriving, self.other)


class AsTheyCame(Exchanging):
    """The permutation leaves segments as they came: by rank, and not by expert."""

    def places(self, total: int, way: Way) -> Tensor:
        begins = way.came.cumsum(0) - way.came
        segment = torch.arange(way.came.shape[0]).repeat_interleave(way.came, output_size=total)
        return begins[segment] + torch.arange(total) - begins[segment]


class SortedByRank(SortedHere):
    """Rows that came are sorted by the rank that they come from."""

    def in_order(self, arrived: Tensor, way: Way) -> tuple[Tensor, Any]:
        rank = torch.arange(self.num_experts) // self.here
        order = rank.repeat_interleave(way.came, output_size=arrived.shape[0]).sort().indices
        inverse = order.argsort()
        return arrived[order], lambda y: y[inverse]


class ExpertsTurned(Exchanging):
    """Rows are sorted by expert from the last to the first, and multiplied as if from the first."""

    def places(self, total: int, way: Way) -> Tensor:
        begins = (way.came.cumsum(0) - way.came).view(self.ranks, self.here).flip(1).t().reshape(-1)
        sizes = way.came.view(self.ranks, self.here).flip(1).t().reshape(-1)
        segment = torch.arange(sizes.shape[0]).repeat_interleave(sizes, output_size=total)
        before = sizes.cumsum(0) - sizes
        return begins[segment] + torch.arange(total) - before[segment]


class Rotated(Exchanging):
    """The experts of a rank lie on the next one."""

    def exchange_counts(self, counts: Tensor) -> tuple[Tensor, Any, Any]:
        return super().exchange_counts(counts.view(self.ranks, -1).roll(1, 0).reshape(-1))

    def send(self, rows: Tensor, way: Way) -> Tensor:
        first, second = rows.split([way.leaving[1], way.leaving[0]])
        return super().send(torch.cat([second, first]), way)

    def fetch(self, rows: Tensor, way: Way) -> Tensor:
        first, second = super().fetch(rows, way).split(way.leaving)
        return torch.cat([second, first])


class BackwardsOrder(Exchanging):
    """Rows are sent from the last to the first."""

    def send(self, rows: Tensor, way: Way) -> Tensor:
        return super().send(rows.flip(0), way)


class AcrossRows(Exchanging):
    """Rows are centred by the mean of all that came."""

    def experts(self, rows: Tensor, way: Way) -> Tensor:
        y = super().experts(rows, way)
        return y - y.mean(0, keepdim=True)


class CountsReversed(Exchanging):
    """The products' offsets count the experts from the last."""

    def counts_here(self, way: Way) -> Tensor:
        return super().counts_here(way).flip(0)


class PaddedRows(Exchanging):
    """Each expert's rows in a bin, rounded up to 8 of them: not wrong, and not known."""

    def experts(self, rows: Tensor, way: Way) -> Tensor:
        counts = self.counts_here(way)
        sizes = (counts + 7) // 8 * 8
        expert = torch.arange(self.here).repeat_interleave(counts, output_size=rows.shape[0])
        shift = sizes.cumsum(0) - sizes - (counts.cumsum(0) - counts)
        slot = torch.arange(rows.shape[0]) + shift[expert]
        bins = rows.new_zeros(rows.shape[0] + 8 * self.here, rows.shape[1]).index_copy(0, slot, rows)
        return self.products(bins.to(BF16), sizes.cumsum(0, dtype=torch.int32)).type_as(rows)[slot]


class ScaledByRank(Exchanging):
    """What an expert makes is scaled by a vector of its rank."""

    def make_experts(self) -> None:
        super().make_experts()
        self.scale = of_this_rank(self.hidden)

    def experts(self, rows: Tensor, way: Way) -> Tensor:
        return super().experts(rows, way) * self.scale


class MixedWithTokensHere(Exchanging):
    """Rows that came get the mean of the tokens of this rank added."""

    def experts(self, rows: Tensor, way: Way) -> Tensor:
        return super().experts(rows + way.x.mean(0), way)


class SeenOutside(Exchanging):
    """What came is also looked at from outside."""

    def returned(self, result: Tensor, arrived: Tensor, way: Way) -> Any:
        return result, arrived.square().mean()


class WeightedInAnotherOrder(Exchanging):
    """Rows are weighted in the order of another sort of the same ids."""

    def weighted(self, y: Tensor, weights: Tensor, way: Way) -> Tensor:
        return super().weighted(y, way.weights.view(-1)[way.ids.view(-1).argsort()], way)


class WeightedApart(WeightedThere):
    """Weights are exchanged in the order of another sort of the same ids."""

    def in_order(self, arrived: Tensor, way: Way) -> tuple[Tensor, Any]:
        return super().in_order(arrived, replace(way, order=way.ids.view(-1).argsort(stable=True)))


class Detached(Exchanging):
    """No gradient flows back through the exchange."""

    def send(self, rows: Tensor, way: Way) -> Tensor:
        with torch.no_grad():
            return super().send(rows, way)


class ActivationOfItsRank(Exchanging):
    """Each rank's experts have another activation."""

    def products(self, rows: Tensor, ends: Tensor) -> Tensor:
        w1, w2, w3 = (weight.to(BF16).transpose(-2, -1) for weight in (self.w1, self.w2, self.w3))
        gate = torch._grouped_mm(rows, w1, offs=ends)
        gate = F.silu(gate) if distributed.get_rank() else F.gelu(gate)
        return torch._grouped_mm(gate * torch._grouped_mm(rows, w3, offs=ends), w2, offs=ends)


class ScaledThereOrHome(Exchanging):
    """One rank doubles what its experts make, the other what came home: each is proven by itself."""

    def experts(self, rows: Tensor, way: Way) -> Tensor:
        y = super().experts(rows, way)
        return y if distributed.get_rank() else y * 2.0

    def fetch(self, rows: Tensor, way: Way) -> Tensor:
        y = super().fetch(rows, way)
        return y * 2.0 if distributed.get_rank() else y


class ActivatedHereOrThere(Exchanging):
    """One rank activates rows before it sends them, the other those that have arrived."""

    def rows_of(self, rows: Tensor, weights: Tensor) -> Tensor:
        return rows if distributed.get_rank() else F.silu(rows)

    def experts(self, rows: Tensor, way: Way) -> Tensor:
        return super().experts(F.silu(rows) if distributed.get_rank() else rows, way)


# ---- with places of rows that are none: nobody runs these


class SignTurned(Searched):
    """The shift of a segment is subtracted."""

    def places(self, total: int, way: Way) -> Tensor:
        place = torch.arange(total)
        return place + place - super().places(total, way)


class EndsForBegins(Exchanging):
    """Segments are read from where they end."""

    def places(self, total: int, way: Way) -> Tensor:
        ends = way.came.cumsum(0).view(self.ranks, self.here).t().reshape(-1)
        sizes = way.came.view(self.ranks, self.here).t().reshape(-1)
        segment = torch.arange(sizes.shape[0]).repeat_interleave(sizes, output_size=total)
        return ends[segment] + torch.arange(total) - (sizes.cumsum(0) - sizes)[segment]


class BeginsByRank(Exchanging):
    """Where segments begin is not brought into the order of the segments."""

    def places(self, total: int, way: Way) -> Tensor:
        begins = way.came.cumsum(0) - way.came
        sizes = way.came.view(self.ranks, self.here).t().reshape(-1)
        segment = torch.arange(sizes.shape[0]).repeat_interleave(sizes, output_size=total)
        return begins[segment] + torch.arange(total) - (sizes.cumsum(0) - sizes)[segment]


class FromTheLeft(Searched):
    """A row where a segment begins is found in the one before."""

    def places(self, total: int, way: Way) -> Tensor:
        begins = way.came.cumsum(0) - way.came
        sizes = way.came.view(self.ranks, self.here).t().reshape(-1)
        ends = sizes.cumsum(0)
        shift = begins.view(self.ranks, self.here).t().reshape(-1) - (ends - sizes)
        place = torch.arange(total)
        return place + shift[torch.searchsorted(ends, place)]


class BackByOthers(Exchanging):
    """The way back has the numbers of the way there."""

    def fetch(self, rows: Tensor, way: Way) -> Tensor:
        return super().send(rows, way)


class RanksTurned(Exchanging):
    """Each rank's number of rows is another's."""

    def send(self, rows: Tensor, way: Way) -> Tensor:
        return all_to_all_single(rows, way.arriving, way.leaving[::-1], self.group)


NEVER_RUN = (SignTurned, EndsForBegins, BeginsByRank, FromTheLeft, BackByOthers, RanksTurned)
REFUSED: dict[type[Exchanging], str] = {
    CountsOfOthers: "sorted by other ids",
    OtherGroup: "another group",
    AsTheyCame: "sizes of segments, sorted by expert",
    SortedByRank: "sizes of segments, sorted by expert",
    ExpertsTurned: "flip",
    Rotated: "pieces of symbolic length",
    BackwardsOrder: "flip",
    AcrossRows: "mean",
    CountsReversed: "not the running sum of the experts' counts",
    PaddedRows: "not in a sorted order",
    ScaledByRank: "of this rank alone",
    MixedWithTokensHere: "of this rank alone",
    SeenOutside: "is also used by",
    WeightedInAnotherOrder: "different orders",
    WeightedApart: "sorted apart",
    Detached: "no gradient flows",
    ActivationOfItsRank: "not all ranks found it",
    ScaledThereOrHome: "not all ranks found it",
    ActivatedHereOrThere: "not all ranks found it",
}
"""Models that are left as they are, and words of the reason."""
