"""What the operators of experts that are spread over ranks are given, and what their forward saves for the backward."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moecompile.runtime import exchange, fp8_contract, kernels, lines
from moecompile.runtime.contract import DIFFERENTIABLE, Arguments, expect_shape
from moecompile.runtime.hopper_exchange import Exchange
from moecompile.runtime.peer_memory import PeerMemory

Tokens = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]
"""x, expert_ids, weights, sent, home."""
Plan = tuple[Tensor, Tensor, Tensor]
"""offsets, slots, order."""
OF_EXPERTS = 6
"""w_in, w_out, w_up, b_in, b_up, b_out."""
OF_EXCHANGE = ("ranks", "group", "capacity", "slot", "sms", "patience")
OF_PLAN = ("weights", "came", "offsets", "slots", "order")
"""What is saved beside what the experts save."""
OF_ROWS, OF_ROWS_IN_FP8 = ("rows", "hidden"), fp8_contract.Saved._fields
"""What these save: the first half are the rows that came, the second GEMM1's."""


@dataclass(frozen=True)
class Experts:
    """This rank's experts, and how tokens come to them and go back.

    Attributes:
        matrices: w_in, w_out, w_up, b_in, b_up, b_out.
        num_experts: of all ranks.
        quantized: as of `experts_fp8`; empty for the model's precision.
        room: for so many rows of this rank's experts (`exchange.came_within`); None for all that there may be.
        travel: attributes of the exchange, of which that of the way back has the slot after `slot`.
        attributes: of the experts.
    """

    matrices: tuple[Tensor | None, ...]
    num_experts: int
    quantized: Sequence[Tensor]
    room: int | None
    travel: dict[str, Any]
    attributes: dict[str, Any]

    @classmethod
    def of(
        cls, matrices: Sequence[Tensor | None], *, num_experts: int, quantized: Sequence[Tensor] = (),
        room: int | None = None, **attributes: Any,
    ) -> Experts:  # fmt: skip
        """Those of an operator's arguments."""
        travel = {name: attributes.pop(name) for name in OF_EXCHANGE}
        absent = (None,) * (OF_EXPERTS - len(matrices))
        return cls((*matrices, *absent), num_experts, quantized, room, travel, attributes)

    @property
    def here(self) -> int:
        """Experts of this rank."""
        return exchange.experts_here(self.num_experts, self.travel["ranks"], "exchanged_experts")

    @property
    def back(self) -> dict[str, Any]:
        """Attributes of the exchange on the way back."""
        return {**self.travel, "slot": self.travel["slot"] + 1}

    @property
    def decides(self) -> dict[str, Any]:
        """What, beside the tensors, decides how a call is run."""
        return {**self.attributes, **self.travel, "num_experts": self.num_experts, "room": self.room}

    @property
    def of_rows(self) -> dict[str, Any]:
        """Attributes of the operators that compute them."""
        found = self.attributes | ({} if self.room is None else {"room": self.room})
        return found if self.quantized else without(found, ("scale_format",))

    @property
    def scale_format(self) -> dict[str, Any]:
        """The attribute of what quantises for them, if it is given."""
        return {name: value for name, value in self.attributes.items() if name == "scale_format"}

    @property
    def given(self) -> tuple[Tensor | None, ...]:
        """The tensors."""
        return (*self.matrices, *self.quantized)

    def arguments(self, x: Tensor, weights: Tensor | None, plan: Plan) -> Arguments:
        """The record of the experts on such rows."""
        return Arguments(x, weights, *plan, *self.matrices, **self.attributes, room=self.room)  # type: ignore[arg-type]

    def sized(self, x: Tensor, weights: Tensor | None, expert_ids: Tensor) -> Arguments:
        """The record of the experts on the tokens that are here: to check all but plans."""
        _, *plan = kernels.fake_plan(expert_ids, self.here)
        return Arguments(x, weights, *plan, *self.matrices, **self.attributes)

    def memory(self, x: Tensor, ids: Tensor | None, weights: Tensor | None, sent: Tensor) -> PeerMemory | None:
        """What kernels write to that exchange such tokens and what becomes of them; None if there are none."""
        if self.attributes.get("kernels") is not None:
            return None
        args = self.arguments(x, weights, (sent, sent, sent))  # there is no plan yet, and nothing asks for it
        bytes_back = args.out_features * args.dtypes.result.itemsize
        where = {name: self.travel[name] for name in ("ranks", "group", "capacity")}
        return exchange.memory_for(x, ids, weights, **where, back=bytes_back)

    def exchanges(self, memory: PeerMemory) -> tuple[Exchange, Exchange]:
        """There and back."""
        capacity, sms, patience = (self.travel[name] for name in ("capacity", "sms", "patience"))
        there, back = (Exchange(memory, self.travel["slot"] + way, capacity, sms, patience) for way in (0, 1))
        return there, back


def without(attributes: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The attributes but for these."""
    return {name: value for name, value in attributes.items() if name not in names}


@dataclass(frozen=True)
class Saved:
    """What the forward saves.

    Attributes:
        weights: (ranks * capacity, K) of the rows that came; without elements where there are none.
        came: (ranks,) int32, how many rows go back to each.
        plan: of the rows.
        of_experts: rows (ranks * capacity, H), without elements if they are to come again, and GEMM1's rows; in FP8 the
            record of `experts_fp8_forward`, but for rows that travel in lines: these, bytes, and no scales.
    """

    weights: Tensor
    came: Tensor
    plan: Plan
    of_experts: tuple[Tensor, ...]

    @classmethod
    def of(cls, saved: Sequence[Tensor], experts: Experts, operator: str) -> Saved:
        """An operator's argument; ValueError if it is none."""
        names = OF_PLAN + (OF_ROWS_IN_FP8 if experts.quantized else OF_ROWS)
        if len(saved) != len(names):
            words = f"saved must hold {len(names)} tensors ({', '.join(names)}), got {len(saved)}"
            raise ValueError(f"moecompile::{operator}: {words}; pass what the forward returned for the same arguments")
        weights, came, offsets, slots, order, *of_experts = saved
        return cls(weights, came, (offsets, slots, order), tuple(of_experts))

    @property
    def row_weights(self) -> Tensor | None:
        """Where there are any."""
        return self.weights if self.weights.dim() == 2 else None

    @property
    def every(self) -> list[Tensor]:
        """All of them, as an operator returns them."""
        return [self.weights, self.came, *self.plan, *self.of_experts]

    @property
    def of_rows(self) -> tuple[Tensor, ...]:
        """The rows that came, in FP8 values and scales."""
        return self.of_experts[: len(self.of_experts) // 2]

    @property
    def hidden(self) -> tuple[Tensor, ...]:
        """GEMM1's rows, likewise."""
        return self.of_experts[len(self.of_experts) // 2 :]

    @property
    def in_lines(self) -> bool:
        """Whether, in FP8, the rows that came are lines: bytes (ranks * capacity, 2 W)."""
        return self.of_rows[0].dtype == torch.uint8

    def quantized_rows(self, features: int) -> tuple[Tensor, Tensor]:
        """In FP8 values (ranks * capacity, H) and scales of the rows that came, where they are.

        Raises:
            ValueError: lines of so many features are not that long.
        """
        rows, scales = self.of_rows
        if not self.in_lines:
            return rows, scales
        expected = self.plan[1].shape[0], 2 * lines.width(features)
        expect_shape("exchanged_experts", rows, "rows of saved", expected, "(places, bytes of a line)")
        whole = rows.contiguous()  # hooks of saved tensors may have laid them elsewhere
        return lines.parts(whole.clone() if whole.storage_offset() % 16 else whole, features)

    def with_rows(self, rows: Sequence[Tensor]) -> Saved:
        """With these in the place of the rows that came."""
        return replace(self, of_experts=(*rows, *self.hidden))

    def without_rows(self) -> Saved:
        """Where they are to come again."""
        return self.with_rows([each.new_empty(0) for each in self.of_rows])

    def arguments(self, experts: Experts) -> Arguments:
        """The record of the experts on the rows that came, which has none of their values."""
        return experts.arguments(self.like_rows(experts), self.row_weights, self.plan)

    def like_rows(self, experts: Experts) -> Tensor:
        """The rows that came, (ranks * capacity, H), but for their memory and values."""
        w_in, rows = experts.matrices[0], self.of_rows[0]
        assert w_in is not None
        features = w_in.shape[1 if experts.attributes.get("w_in_transposed") else 2]
        dtype = w_in.dtype if experts.quantized else rows.dtype
        return rows.new_empty((1, 1), dtype=dtype).expand(self.plan[1].shape[0], features)


@dataclass(frozen=True)
class Returning:
    """What a backward is given beside the experts.

    Attributes:
        grad: (T, H2) of the result.
        saved: by the forward.
        x: (T, H) if it is dispatched once more, else None.
        sent: of `exchange_plan`.
        home: likewise.
    """

    grad: Tensor
    saved: Saved
    x: Tensor | None
    sent: Tensor
    home: Tensor

    @classmethod
    def of(cls, operator: str, given: tuple[Any, ...], experts: Experts, again: bool) -> Returning:
        """Of an operator's first arguments; ValueError if x is there and not asked for, or the other way around."""
        grad, saved, x, sent, home = given
        if again != (x is not None):
            words = "x goes with again=True, and with that alone"
            raise ValueError(f"moecompile::{operator}: {words}; got {'None' if x is None else tuple(x.shape)}")
        return cls(grad, Saved.of(saved, experts, operator), x, sent, home)


@dataclass(frozen=True)
class Wanted:
    """Which gradients a backward gives.

    Attributes:
        needs: of which it returns them, in the order of DIFFERENTIABLE.
        main: what it adds others to.
        weighted: whether rows have weights, whose gradients then go back with those of rows, whoever asks for them:
            what travels is the same on all ranks.
    """

    needs: tuple[bool, ...]
    main: Mapping[str, Tensor]
    weighted: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Of those it returns."""
        return tuple(name for name, needed in zip(DIFFERENTIABLE, self.needs, strict=False) if needed)

    @property
    def goes_back(self) -> bool:
        """Whether there are gradients of tokens among them."""
        return bool({"x", "weights"} & {*self.names})

    @property
    def of_gemm1(self) -> bool:
        """Whether there are gradients of the first products' matrices among them, or are added."""
        return bool({"w_in", "w_up"} & {*self.names, *self.main})

    @property
    def names_of_rows(self) -> tuple[str, ...]:
        """Of those that the experts' backward returns, in the order of DIFFERENTIABLE."""
        back = {"x", "weights"} if self.weighted else {"x"}
        asked = {*self.names, *(back if self.goes_back else ())}
        return tuple(name for name in DIFFERENTIABLE if name in asked)

    @property
    def of_rows(self) -> list[bool]:
        """The same as `needs`."""
        return [name in self.names_of_rows for name in DIFFERENTIABLE]


def travels_in_lines(rows: Tensor, experts: Experts) -> bool:
    """Whether rows that the experts quantise travel quantised: each by itself, so with the same outcome."""
    w_in = experts.matrices[0]
    assert w_in is not None
    alike = rows.dtype == w_in.dtype and rows.dtype in lines.DTYPES
    return bool(experts.quantized) and alike and lines.takes(rows.shape[1])


def gradient_travels_in_lines(grad: Tensor, experts: Experts) -> bool:
    """Likewise, of the result's gradient, which biases of the second products are summed of before it is quantised."""
    return experts.matrices[-1] is None and travels_in_lines(grad, experts)
