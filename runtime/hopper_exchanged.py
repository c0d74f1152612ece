"""Experts between ranks on Hopper GPUs, with the exchange hidden behind their products.

Of this rank's own tokens, the rows of each expert that fill whole tiles (`own`) are multiplied without waiting for
anybody. The rest of them goes along with what the other ranks send (`others`). Two streams, the second of a higher
priority:

    this one                                        the other one
                                                    send tokens                     on few multiprocessors
    plan(own)
    GEMM1(own)                                      take ids and weights, plan(others), GEMM1(others), GEMM2(others)
                                                    sum others' tokens, send them back          likewise
    GEMM2(own), when these are being sent
    sum of own tokens, and of what came back

All products take tiles as multiprocessors become free (codegen/kernels/tickets.cuh): those that send, or wait for what
has not come, delay nothing. No product waits for another rank on the device: so no rank keeps multiprocessors from what
others wait for. Results are those of one step after the other, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moecompile.runtime import (
    exchange,
    hopper_exchange,
    hopper_experts,
    hopper_fp8,
    hopper_kernels,
    hopper_routing,
)
from moecompile.runtime.contract import Arguments, expression_leaves
from moecompile.runtime.hopper_exchange import Exchange, OwnParts, Rows
from moecompile.runtime.hopper_parts import Eight, Part, Sixteen
from moecompile.runtime.hopper_tiles import ROWS
from moecompile.runtime.launch import Value, wait_for

PAIRS_FROM = 4 * ROWS
"""Rows of an expert's own, on average, from which in FP8 it is whole pairs of tiles that do not wait, not whole tiles
(docs/perf.md)."""


@dataclass(frozen=True)
class Brought:
    """This rank's tokens, and where they go.

    Attributes:
        x: (T, H).
        ids: (T, K), of all ranks' experts.
        weights: (T, K) or None.
        sent: of `exchange_plan`.
        home: likewise.
        num_experts: of all ranks.
        room: for so many rows besides those of `own`; None for all that there may be.
    """

    x: Tensor
    ids: Tensor
    weights: Tensor | None
    sent: Tensor
    home: Tensor
    num_experts: int
    room: int | None = None


def takes(
    tokens: Brought, there: Exchange, matrices: Sequence[Tensor | None], quantized: Sequence[Tensor],
    attributes: dict[str, Any],
) -> bool:  # fmt: skip
    """Whether the kernels compute these: on all ranks of one model the same, however many tokens each has."""
    ranks = there.memory.ranks
    if ranks == 1:
        return False
    args = arguments_for(tokens, matrices, attributes, tokens.num_experts // ranks, there.capacity)
    _, most = _rows_of(tokens, there)
    if not hopper_routing.can_be_beside(most, args.features, 1 if quantized else tokens.x.element_size()):
        return False
    return are_taken(args, quantized, ranks)


def are_taken(args: Arguments, quantized: Sequence[Tensor], ranks: int) -> bool:
    """Whether there are kernels for the plan, the experts, and the rows that go back."""
    back = torch.empty(1, args.out_features, dtype=args.dtypes.result, device="meta")
    if not hopper_routing.takes_plan(args.num_experts) or not hopper_exchange.takes(back, None, None, ranks):
        return False
    return hopper_fp8.takes(args, quantized) if quantized else hopper_experts.takes(args)


def forward(
    tokens: Brought, there: Exchange, back: Exchange, matrices: Sequence[Tensor | None], quantized: Sequence[Tensor],
    attributes: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The result (T, H2)."""
    call = _Forward(tokens, there, back, matrices, quantized, attributes)
    try:
        return call.run()
    except BaseException:  # memory that the other stream is told of is given back
        wait_for(torch.cuda.current_stream(tokens.x.device), there.memory.side)
        raise


class _Forward:
    """One call. Large memory is made on the caller's stream, and freed when that has waited for the other."""

    def __init__(
        self, tokens: Brought, there: Exchange, back: Exchange, matrices: Sequence[Tensor | None],
        quantized: Sequence[Tensor], attributes: dict[str, Any],
    ) -> None:  # fmt: skip
        memory = there.memory
        self.tokens, self.there, self.back, self.rank = tokens, there, back, memory.rank
        self.here = tokens.num_experts // memory.ranks
        self.args = args = arguments_for(tokens, matrices, attributes, self.here, tokens.x.shape[0])
        self.counts = counts = _rows_of(tokens, there)
        self.products = Eight(args, counts, quantized) if quantized else Sixteen(args, counts)
        hopper_kernels.compile_together(args, False, ("exchanged", bool(quantized), *counts), self.products.instances)
        words = [hopper_routing.words_of_progress(count) for count in counts]
        zeros = args.x.new_zeros(sum(words) + 5, dtype=torch.int32).split([*words, 1, 1, 1, 1, 1])
        self.progress, self.taken, self.started = zeros[:2], (zeros[2:4], zeros[4:6]), zeros[6]
        self.reads_weights = "weight" in expression_leaves(args.activation)

    def run(self) -> Tensor:
        """As the module's documentation has it."""
        args, tokens, there, back, products = self.args, self.tokens, self.there, self.back, self.products
        main, side = torch.cuda.current_stream(args.x.device), there.memory.side
        lines = Rows.of(products.lines(), tokens.ids, tokens.weights)
        came, slots, sums, result = self._room()
        wait_for(side, main)
        with torch.cuda.stream(side):
            hopper_exchange.send(there, lines, tokens.sent, None, early=False)
        own = self._own(lines)
        wait_for(side, main)
        if own.count:  # or this rank has no tokens
            self._multiply_in(own)
        with torch.cuda.stream(side):
            others = self._others(lines, own, came, slots)
            self._multiply_in(others)
            products.multiply_out(others)
            self._sum_others(others, sums)
            if tokens.room is not None:
                came = exchange.within(came, others.counts, tokens.room)
        wait_for(main, side)
        with torch.cuda.stream(side):
            hopper_exchange.send(back, Rows(sums), None, came, read=there.slot, started=self.started)
        hopper_exchange.await_start(back, self.started)
        if own.count:
            products.multiply_out(own)
        wait_for(main, side)
        parts = OwnParts(tokens.ids, own.slots, own.offsets, others.slots, others.first, own.multiple)
        hopper_exchange.home_of_experts(back, tokens.home, parts, products.y, own.weights, args.output, result)
        return result

    def _room(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For how many rows came, where the others' rows are, sums of other ranks' tokens, and the result.

        What both streams touch is the caller's: the other's memory may be another caller's next.
        """
        args, sent = self.args, self.tokens.sent
        sums, result = (
            args.x.new_empty(count, args.out_features, dtype=args.dtypes.result)
            for count in (sent.shape[0], args.x.shape[0])
        )
        slots = sent.new_empty(sent.shape[0], self.tokens.ids.shape[1])
        return sent.new_empty(self.there.memory.ranks), slots, sums, result

    def _own(self, lines: Rows) -> Part:
        """Of each expert of this rank, the rows of this rank's tokens that fill tiles."""
        tokens = self.tokens
        planned = hopper_routing.plan(
            tokens.ids, self.here, first=self.rank * self.here, among=tokens.num_experts
        )  # fmt: skip
        source = (lines.values, None, None, 0, 0, lines.line_bytes // 16, 0, self._scales_at, 0)
        pairs = isinstance(self.products, Eight) and tokens.ids.numel() >= PAIRS_FROM * tokens.num_experts
        multiple = 2 * ROWS if pairs else ROWS
        return self._part(0, planned, hopper_experts._weights(self.args), source, multiple)

    def _others(self, lines: Rows, own: Part, came: Tensor, slots: Tensor) -> Part:
        """The rest of them, and those of other ranks' tokens. How many these are, and `slots`, are written."""
        tokens, there, (places, top_k) = self.tokens, self.there, (self.tokens.sent.shape[0], lines.top_k)
        ids = tokens.sent.new_empty(places, top_k)
        weights = None if lines.weights is None else lines.weights.new_empty(places, top_k)
        planned_own = own.offsets, own.slots
        hopper_exchange.take(there, lines, tokens.sent, (ids, weights), came, planned_own, own.multiple)
        first, pitch = self.rank * there.capacity, lines.pitch
        source = (
            lines.values, there.records(pitch), tokens.sent, first, first + there.capacity, lines.line_bytes // 16,
            pitch // 16, self._scales_at, 0,
        )  # fmt: skip
        weights = None if weights is None else hopper_experts._float32(weights)
        planned = hopper_routing.plan(ids, self.here, tokens.room, slots=slots)
        return self._part(1, planned, weights, source, 0)

    def _part(
        self, number: int, planned: tuple[Tensor, ...], weights: Tensor | None, source: tuple[Value, ...], multiple: int
    ) -> Part:
        counts, offsets, slots, order = planned
        first, count = number * self.counts[0], self.counts[number]
        left = self.progress[number], self.taken[number]
        return Part(number, first, count, counts, offsets, slots, order, weights, source, *left, multiple)

    @property
    def _scales_at(self) -> int:
        """Where a line's scales begin, in pieces of 16 bytes: behind its values, where it has some."""
        return self.args.features // 16

    def _multiply_in(self, part: Part) -> None:
        self.products.multiply_in(part, part.weights if self.reads_weights else None)

    def _sum_others(self, others: Part, sums: Tensor) -> None:
        """What becomes of other ranks' tokens here: those before this rank, and those after it."""
        first, capacity = self.rank * self.there.capacity, self.there.capacity
        for places in (slice(0, first), slice(first + capacity, sums.shape[0])):
            if places.start == places.stop:
                continue
            weights = None if others.weights is None else others.weights[places]
            y, slots = self.products.y[others.rows], others.slots[places]
            hopper_routing.combine(y, slots, weights, self.args.output, sums[places])


def arguments_for(
    tokens: Brought, matrices: Sequence[Tensor | None], attributes: dict[str, Any], here: int, count: int
) -> Arguments:
    """As those of the experts, for so many tokens. Of the plan, which is yet to be made, there are sizes."""

    def planned(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device="meta")

    top_k = tokens.ids.shape[1]
    plan = planned(here), planned(count, top_k), planned(count * top_k)
    w_in, w_out, *others = matrices
    assert w_in is not None and w_out is not None
    return Arguments(tokens.x, tokens.weights, *plan, w_in, w_out, *others, **attributes)


def _rows_of(tokens: Brought, there: Exchange) -> tuple[int, int]:
    """Rows of both parts, at most."""
    most = there.memory.ranks * there.capacity * tokens.ids.shape[1]
    return tokens.ids.numel(), most if tokens.room is None else min(most, tokens.room)
