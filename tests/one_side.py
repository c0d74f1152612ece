"""Rank 0 of two that exchange tokens on one GPU, where rank 1 has sent its rows before, and has no work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecompile.runtime import (
    fp8_experts,
    hopper_exchange,
    hopper_exchanged,
    hopper_in_turn,
    hopper_quantize,
    kernels,
)
from moecompile.runtime.exchanged import hides
from moecompile.runtime.exchanged_contract import Experts, Returning, Saved, Wanted
from moecompile.runtime.hopper_exchange import Exchange, Rows
from moecompile.runtime.hopper_exchanged import Brought
from moecompile.runtime.peer_memory import RANKS, SLOTS, SMS, TAKEN_AT, among_streams, room_for

GATED: dict[str, Any] = {"activation": "mul(silu(gate), up)", "gate_up": "halves", "out_dtype": torch.bfloat16}

TRAINED: dict[str, Any] = GATED | {"output": "mul(out, cast(weight, bfloat16))"}


class Side:
    """Rank 0 of two, and what rank 1 does for it."""

    def __init__(
        self, tokens: int, features: int, inner: int, experts: int, top_k: int, fp8: bool, backward: bool = False
    ) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def randn(*shape: int) -> Tensor:
            made = torch.randn(*shape, generator=generator, device="cuda") / shape[-1] ** 0.5
            return made.to(torch.bfloat16)

        def brought(of: int) -> tuple[Tensor, Tensor, Tensor]:
            weights, ids = torch.rand(tokens, of, generator=generator, device="cuda").topk(top_k, 1)
            return randn(tokens, features), ids, weights

        self.capacity, self.experts, self.here = tokens, experts, experts // 2
        self.mine, other, self.alone = brought(experts), brought(experts), brought(self.here)
        x, ids, weights = other
        pitch = hopper_exchange.pitch_of(features, x.dtype, ids.int(), weights)
        self.memories = among_streams(2, room_for(2, tokens, pitch), 0)
        self.matrices = [randn(self.here, 2 * inner, features), randn(self.here, features, inner)]
        quantize = torch.ops.moecompile.quantize_weights
        in_ = quantize(self.matrices[0], gate_up="halves", backward=backward)
        self.quantized = [*in_, *quantize(self.matrices[1], backward=backward)] if fp8 else []
        self.sent, self.home = hopper_exchange.plan(self.mine[1], experts, 2, tokens)
        self.other_sent, _ = hopper_exchange.plan(ids, experts, 2, tokens)
        many = hides(2, tokens, top_k, experts)
        self.how = hopper_exchanged if many else hopper_in_turn
        in_lines = fp8 and (many or backward)  # of few tokens, in inference, the experts quantise
        self.other_lines = Rows.of(hopper_quantize.quantize_lines(x) if in_lines else x, ids, weights)
        self.back = Rows(randn(2 * tokens, features))
        self.grad, others_grad = randn(tokens, features), randn(tokens, features)
        self.other_grad = Rows.of(hopper_quantize.quantize_lines(others_grad) if fp8 else others_grad, None, None)
        of_weights = torch.rand(2 * tokens, top_k, generator=generator, device="cuda")
        self.of_x = Rows(randn(2 * tokens, features), None, of_weights)
        self.came = (self.sent.view(2, tokens)[1] >= 0).sum(dtype=torch.int32).expand(2).contiguous()
        self.exchanges = 0

    def exchange(self, rank: int, slot: int) -> Exchange:
        """Of a rank, in that slot."""
        return Exchange(self.memories[rank], slot, self.capacity, SMS, 20.0)

    def prepare(self) -> None:
        """Rank 1 has read all that was sent before, and sends what this exchange is to bring."""
        self._read_all()
        hopper_exchange.send(self.exchange(1, 0), self.other_lines, self.other_sent, None)
        hopper_exchange.send(self.exchange(1, 1), self.back, None, self.came)
        torch.cuda.synchronize()

    def prepare_back(self) -> None:
        """The same for a backward."""
        self._read_all()
        hopper_exchange.send(self.exchange(1, 1), self.other_grad, self.other_sent, None)
        hopper_exchange.send(self.exchange(1, 0), self.of_x, None, self.came)
        torch.cuda.synchronize()

    def _read_all(self) -> None:
        for slot in (0, 1):
            at = TAKEN_AT + (slot * RANKS + 1) * 8
            self.memories[0].own[at : at + 8].view(torch.int64).fill_(self.exchanges)
            read = TAKEN_AT + (slot - SLOTS) * 8
            self.memories[1].own[read : read + 4].view(torch.int32).fill_(self.exchanges)
        self.exchanges += 1

    def exchanged(self) -> Tensor:
        """This rank's experts with the exchange, behind them if there are tokens enough."""
        tokens = Brought(*self.mine, self.sent, self.home, self.experts)
        there, back = self.exchange(0, 0), self.exchange(0, 1)
        return self.how.forward(tokens, there, back, self.matrices, self.quantized, GATED)

    @property
    def spread(self) -> Experts:
        """The experts as operators of training are given them."""
        return Experts.of(
            self.matrices, num_experts=self.experts, quantized=self.quantized, ranks=2, group="", slot=0,
            capacity=self.capacity, sms=SMS, patience=20.0, **TRAINED,
        )  # fmt: skip

    def forward(self) -> tuple[Tensor, Saved]:
        """Of training, one step after the other."""
        tokens = Brought(*self.mine, self.sent, self.home, self.experts)
        return hopper_in_turn.forward_saving(tokens, self.exchange(0, 0), self.exchange(0, 1), self.spread)

    def backward(self, saved: Saved) -> dict[str, Tensor]:
        """The gradients of all that there is."""
        of = Returning(self.grad, saved, None, self.sent, self.home)
        wanted = Wanted((True,) * 4 + (False,) * 4, {}, True)
        there, back = self.exchange(0, 0), self.exchange(0, 1)
        return hopper_in_turn.backward(of, there, back, self.spread, saved.arguments(self.spread), wanted)

    def local_forward(self) -> tuple[Tensor, list[Tensor]]:
        """Of training, of as many rows of tokens that are all here; the plan and what is saved behind."""
        x, ids, weights = self.alone
        _, *plan = kernels.plan(ids, self.here)
        if self.quantized:
            y, saved = fp8_experts.experts_fp8_forward(
                x, weights, *plan, *self.matrices, quantized=self.quantized, **TRAINED
            )  # fmt: skip
            return y, [*plan, *saved]
        y, hidden = kernels.experts_forward(x, weights, *plan, *self.matrices, **TRAINED)
        return y, [*plan, hidden]

    def local_backward(self, saved: list[Tensor]) -> list[Tensor]:
        """Its gradients."""
        (x, _, weights), plan, kept, needs = self.alone, saved[:3], saved[3:], [True] * 4 + [False] * 4
        if self.quantized:
            return fp8_experts.experts_fp8_backward(
                self.grad, kept, weights, *plan, *self.matrices, quantized=self.quantized, needs=needs, **TRAINED
            )  # fmt: skip
        return kernels.experts_backward(self.grad, *kept, x, weights, *plan, *self.matrices, needs=needs, **TRAINED)

    def local(self) -> Tensor:
        """As many rows of tokens that are all here."""
        x, ids, weights = self.alone
        _, *plan = kernels.plan(ids, self.here)
        if self.quantized:
            return fp8_experts.experts_fp8(x, weights, *plan, *self.matrices, quantized=self.quantized, **GATED)
        return kernels.experts(x, weights, *plan, *self.matrices, **GATED)
