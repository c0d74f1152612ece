"""One rank's part of an exchange of tokens, by moecompile's operators, as `bench ep` calls it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moecompile.bench_block import Inputs, random_inputs
from moecompile.bench_cases import Shape
from moecompile.bench_ep_cases import NVLINK
from moecompile.bench_ep_ranks import Ranks
from moecompile.bench_results import Floor
from moecompile.runtime.peer_memory import SMS


@dataclass(frozen=True, eq=False)
class Exchange:
    """One rank's part of an exchange of tokens by moecompile's operators.

    Attributes:
        ranks: all of them.
        shape: sizes; tokens of a rank, experts of all.
        inputs: this rank's tokens.
        slot: of the dispatch; the combine has the next.
    """

    ranks: Ranks
    shape: Shape
    inputs: Inputs
    slot: int = 0

    @classmethod
    def of(cls, ranks: Ranks, shape: Shape, seed: int = 0) -> Exchange:
        """Random tokens, other ones on each rank."""
        torch.manual_seed(1000 * (1 + seed) + ranks.rank)
        return cls(ranks, shape, random_inputs(shape, ranks.device.type))

    @property
    def _among(self) -> dict[str, object]:
        group, capacity = self.ranks.group.group_name, self.shape.tokens
        among = {"ranks": self.ranks.size, "group": group, "capacity": capacity}
        return {**among, "sms": SMS, "patience": self.ranks.patience}

    def plan(self) -> tuple[Tensor, Tensor]:
        """`sent` and `home` of `moecompile.runtime.exchange`."""
        plan = torch.ops.moecompile.exchange_plan
        found: tuple[Tensor, Tensor] = plan(
            self.inputs.ids, num_experts=self.shape.experts, ranks=self.ranks.size, capacity=self.shape.tokens
        )
        return found

    @cached_property
    def planned(self) -> tuple[Tensor, Tensor]:
        """The plan of these tokens, made once."""
        return self.plan()

    def dispatch(self, plan: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows that came, their experts and weights, and how many are to be sent back to each rank."""
        ops, where = torch.ops.moecompile, {**self._among, "slot": self.slot}
        given = self.inputs.x.detach(), self.inputs.ids, self.inputs.weights.detach(), *plan
        begun = ops.dispatch_start(*given, **where)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = ops.dispatch_wait(
            *begun, *given, num_experts=self.shape.experts, **where
        )
        return found

    def dispatch_quantised(self, plan: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rows that came in FP8, as bytes with their scales behind them, and their experts: tokens are quantised here.

        By moecompile's kernels alone.
        """
        from moecompile.runtime import exchange, hopper_exchange, hopper_quantize

        (sent, _), inputs, ranks, capacity = plan, self.inputs, self.ranks.size, self.shape.tokens
        x, weights, group = inputs.x.detach(), inputs.weights.detach(), self.ranks.group.group_name
        memory = exchange.memory_for(x, inputs.ids, weights, ranks, group, capacity)
        assert memory is not None, "its kernels serve this device"
        rows = hopper_exchange.Rows.of(hopper_quantize.quantize_lines(x), inputs.ids, weights)
        into, came = rows.room(sent.shape[0]), sent.new_empty(ranks)
        there = hopper_exchange.Exchange(memory, self.slot, capacity, SMS, self.ranks.patience)
        hopper_exchange.send(there, rows, sent, None)
        hopper_exchange.receive(there, rows, sent, into, came, self.shape.experts // ranks)
        assert into.ids is not None
        return into.values, into.ids

    def combine(self, y: Tensor, came: Tensor, plan: tuple[Tensor, Tensor]) -> Tensor:
        """Sums at home (T, H) of the rows that are sent back."""
        ops, where = torch.ops.moecompile, {**self._among, "slot": self.slot + 1}
        begun = ops.combine_start(y, None, came, *plan, **where)
        found: Tensor = ops.combine_wait(*begun, y, None, *plan, **where)[0]
        return found

    def crossing(self) -> int:
        """Bytes of the rows that this rank sends to others, each once to each rank, in bfloat16."""
        _, home = self.planned
        others = [rank for rank in range(self.ranks.size) if rank != self.ranks.rank]
        return int((home[:, others] >= 0).sum()) * self.shape.hidden * 2

    def floor(self, ways: int = 1) -> Floor:
        """The least time of so many ways: the bytes of the rank that sends most, at what NVLink reaches."""
        (crossing,) = self.ranks.largest([ways * self.crossing()])
        return Floor(1000 * crossing / NVLINK, f"{crossing / 2**20:.1f} MiB at {NVLINK / 1e9:g} GB/s")
