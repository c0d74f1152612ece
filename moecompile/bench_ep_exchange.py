"""The exchange of tokens by itself: layout, dispatch and combine, ours and the baseline's, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from moecompile.bench_bars import Bar
from moecompile.bench_block import Inputs, random_inputs
from moecompile.bench_cases import FP8, OURS, Shape
from moecompile.bench_ep_cases import (
    BASELINE,
    BASELINES,
    COMBINE,
    COMBINE_ALONE,
    DISPATCH,
    EAGER,
    LAYOUT,
    LIMITS,
    NVLINK,
    RANKS,
    SMS,
    SYMMETRIC,
    TIME,
)
from moecompile.bench_ep_peers import Baseline, Layout, baselines
from moecompile.bench_ep_ranks import Ranks, RanksFailedError
from moecompile.bench_proof import EMULATED, NotOursError, WrongResultError
from moecompile.bench_results import Floor, Setting, Speed
from moecompile.bench_timing import Call, Contender, Statistics, measure_single

BOUND = 0.02
"""How far a sum at home may be from another: the norm of the difference, relative. Rows and places have to be equal."""


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
        return {"ranks": self.ranks.size, "group": self.ranks.group.group_name, "capacity": self.shape.tokens}

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
        begun = ops.dispatch_start(
            self.inputs.x.detach(), self.inputs.ids, self.inputs.weights.detach(), *plan, **where
        )
        found: tuple[Tensor, Tensor, Tensor, Tensor] = ops.dispatch_wait(
            *begun, num_experts=self.shape.experts, **where
        )
        return found

    def combine(self, y: Tensor, came: Tensor, plan: tuple[Tensor, Tensor]) -> Tensor:
        """Sums at home (T, H) of the rows that are sent back."""
        ops, where = torch.ops.moecompile, {**self._among, "slot": self.slot + 1}
        found: Tensor = ops.combine_wait(*ops.combine_start(y, None, came, **where), *plan, **where)[0]
        return found

    def crossing(self) -> int:
        """Bytes of the rows that this rank sends to others, each once to each rank, in bfloat16."""
        _, home = self.planned
        others = [rank for rank in range(self.ranks.size) if rank != self.ranks.rank]
        return int((home[:, others] >= 0).sum()) * self.shape.hidden * 2


def measure_exchange(setting: Setting, ranks: Ranks, shape: Shape, symmetric: Mapping[str, Statistics | str]) -> None:
    """All rows of an exchange by itself.

    Args:
        setting: of this rank.
        ranks: all of them.
        shape: sizes.
        symmetric: of torch's symmetric memory, by what was measured (`moecompile.bench_ep_symmetric`): times, or why
            there are none.
    """
    with torch.no_grad():
        mine = ranks.attempt(partial(Exchange.of, ranks, shape))
        peers = baselines(ranks, shape.experts)
        layout = ranks.attempt(partial(peers[EAGER].layout, mine.inputs.ids))
        floor = _floor(ranks, mine)
        _measure_layout(setting, mine, peers[EAGER], layout)
        _measure_dispatch(setting, mine, peers[EAGER], layout, floor, symmetric)
        _measure_combine(setting, mine, peers, layout, floor, symmetric)


def _measure_layout(setting: Setting, mine: Exchange, baseline: Baseline, layout: Layout) -> None:
    def check() -> str:
        sent, home = mine.planned
        for rank, tokens in enumerate(sent.view(mine.ranks.size, -1)):
            first = sum(layout.outgoing[:rank])
            rows = layout.order[first : first + layout.outgoing[rank]]
            expected = rows.div(mine.shape.top_k, rounding_mode="floor").unique()
            if not torch.equal(tokens[tokens >= 0].long(), expected) or not torch.equal(
                (home[:, rank] >= 0).nonzero().flatten(), expected
            ):
                raise WrongResultError(f"the tokens for rank {rank} are not those of the baseline")
        return "the baseline's tokens, all"

    calls: dict[str, Call] = {OURS: mine.plan, EAGER: partial(baseline.layout, mine.inputs.ids)}
    _measure(setting, mine, LAYOUT, calls, {OURS: check, EAGER: lambda: ""}, None)


def _measure_dispatch(
    setting: Setting, mine: Exchange, baseline: Baseline, layout: Layout, floor: Floor,
    symmetric: Mapping[str, Statistics | str],
) -> None:  # fmt: skip
    x, top_k = mine.inputs.x.detach(), mine.shape.top_k

    def check() -> str:
        rows, ids, *_ = mine.dispatch(mine.planned)
        if not torch.equal(by_expert(rows, ids, mine.ranks.size), baseline.dispatch(x, top_k, layout)):
            raise WrongResultError("the rows that came are not those of the baseline")
        return "the baseline's rows, to the bit"

    calls: dict[str, Call] = {
        OURS: partial(mine.dispatch, mine.planned),
        EAGER: partial(baseline.dispatch, x, top_k, layout),
    }
    _measure(setting, mine, DISPATCH, calls, {OURS: check, EAGER: lambda: ""}, floor)
    _add_symmetric(setting, mine, DISPATCH, symmetric)
    setting.results.add(
        Speed("exchange", mine.shape.name, DISPATCH, FP8, note="not built: tokens travel in bfloat16"),
        *(
            Bar("exchange", mine.shape.name, DISPATCH, FP8, None, limit, "not built")
            for limit in LIMITS.get((mine.shape.name, DISPATCH, FP8), ())
        ),
    )


def _measure_combine(
    setting: Setting, mine: Exchange, peers: Mapping[str, Baseline], layout: Layout, floor: Floor,
    symmetric: Mapping[str, Statistics | str],
) -> None:  # fmt: skip
    """Experts that give back the token itself, so that every sum at home is that token."""
    x, weights = mine.inputs.x.detach(), mine.inputs.weights.detach()
    rows, ids, of_rows, came = mine.ranks.attempt(partial(mine.dispatch, mine.planned))
    _, _, slots, order = torch.ops.moecompile.plan(ids, mine.shape.experts // mine.ranks.size)
    outputs = rows[order.long().clamp(min=0).div(mine.shape.top_k, rounding_mode="floor")]
    y = local_sum(outputs, slots, of_rows)
    received = peers[EAGER].dispatch(x, mine.shape.top_k, layout)

    def ours() -> Tensor:
        return mine.combine(local_sum(outputs, slots, of_rows), came, mine.planned)

    def check(run: Callable[[], Tensor]) -> str:
        return f"{_error(run(), x):.1e} from the tokens"

    def check_rows() -> str:
        returned = peers[EAGER].returned(received, layout)
        if not torch.equal(returned, x[layout.order // mine.shape.top_k]):
            raise WrongResultError("the rows that came back are not those that were sent")
        return "the rows that were sent, to the bit"

    sums: dict[str, Callable[[], Tensor]] = {OURS: ours}
    sums |= {name: partial(peer.combine, received, weights, layout) for name, peer in peers.items()}
    _measure(setting, mine, COMBINE, sums, {name: partial(check, run) for name, run in sums.items()}, floor)
    alone = partial(mine.combine, y, came, mine.planned)
    calls: dict[str, Call] = {OURS: alone, EAGER: partial(peers[EAGER].returned, received, layout)}
    _measure(setting, mine, COMBINE_ALONE, calls, {OURS: partial(check, alone), EAGER: check_rows}, floor)
    _add_symmetric(setting, mine, COMBINE_ALONE, symmetric)


def by_expert(rows: Tensor, ids: Tensor, ranks: int) -> Tensor:
    """Rows (R * C, H) that came, once for each of their experts (R * C, K), as the baseline receives them.

    By the rank they came from, for each by expert, for each by token.
    """
    places, _ = (ids >= 0).nonzero(as_tuple=True)
    capacity, experts = rows.shape[0] // ranks, ids[ids >= 0].long()
    most = int(experts.max()) + 1 if experts.numel() else 1
    rank, token = places.div(capacity, rounding_mode="floor"), places % capacity
    return rows[places[((rank * most + experts) * capacity + token).argsort()]]


def local_sum(outputs: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum (rows, H) of each row's experts' outputs, which lie in expert order, as the experts end with it.

    Args:
        outputs: (rows * K, H) bfloat16.
        slots: (rows, K) int32: the outputs of each row; -1 for none.
        weights: (rows, K) float32.
    """
    if outputs.device.type == "cuda":
        from moecompile.runtime import hopper_routing

        out = outputs.new_empty(slots.shape[0], outputs.shape[1])
        return hopper_routing.combine(outputs, slots, weights, "mul(out, weight)", out)
    rows = outputs[slots.long().clamp(min=0)].float()
    return (rows * torch.where(slots < 0, 0, weights).unsqueeze(-1)).sum(1).to(outputs.dtype)


def _measure(
    setting: Setting, mine: Exchange, what: str, calls: Mapping[str, Call], checks: Mapping[str, Callable[[], str]],
    floor: Floor | None,
) -> None:  # fmt: skip
    """Rows of those whose check does not fail, in turns; the note is what the check says."""
    ranks, case = mine.ranks, mine.shape.name
    setting.results.head(f"{case}  {_title(mine.shape)}  {what}")
    notes: dict[str, str] = {}
    blocks: dict[str, int] = {}
    for name, check in checks.items():
        try:
            notes[name] = ranks.attempt(check)
            if name == OURS:
                blocks = ranks.attempt(partial(proven, calls[name], setting.device))
        except RanksFailedError as error:  # the others are measured all the same
            setting.results.fail(f"{what}, {name}", error)
    present = [Contender(name, partial(_numberless, calls[name]), 0.0) for name in notes]
    times = ranks.attempt(partial(measure_single, setting.timer, present, setting.rounds))
    fastest = min((times[name].median for name in BASELINES if name in times), default=None)
    for name, checked in notes.items():
        against = {} if name in BASELINES or fastest is None else {BASELINE: fastest / times[name].median}
        words = [checked]
        words += [f"{kernel} on {count} SMs" for kernel, count in blocks.items()] if name == OURS else []
        words += [EMULATED] if name == OURS and setting.device == "cpu" else []
        note = "; ".join(word for word in words if word)
        setting.results.add(Speed("exchange", case, what, name, times[name], floor=floor, ratios=against, note=note))
        values = {TIME: 1000 * times[name].median, SMS: max(blocks.values(), default=None) if name == OURS else None}
        setting.results.add(*bars("exchange", case, what, name, values, ranks))


def bars(section: str, case: str, what: str, name: str, values: Mapping[str, float | None], ranks: Ranks) -> list[Bar]:
    """Of one row: its bars with what was measured of each, by `Limit.of`."""
    inapplicable = ""
    if ranks.device.type != "cuda":
        inapplicable = "no GPU"
    elif ranks.size != RANKS:
        inapplicable = f"the bar is for {RANKS} ranks, and these are {ranks.size}"
    return [
        Bar(section, case, what, name, values.get(limit.of), limit, inapplicable)
        for limit in LIMITS.get((case, what, name), ())
    ]


def proven(call: Call, device: str) -> dict[str, int]:
    """As `multiprocessors`; on the CPU there are no kernels, and nothing is proven.

    Raises:
        NotOursError: no kernel of the exchange ran: torch's collectives did it.
    """
    found = multiprocessors(call)
    if device == "cuda" and not any("exchange" in name for name in found):
        raise NotOursError("torch's collectives carried the tokens: no kernel of moecompile's exchange ran")
    return found


def multiprocessors(call: Call) -> dict[str, int]:
    """How many multiprocessors the kernels of moecompile's that a call launches have at most, by name."""
    from moecompile.runtime.launch import Launch, observers

    found: dict[str, int] = {}

    def note(launch: Launch) -> None:
        name = launch.kernel.instance.name
        found[name] = max(found.get(name, 0), min(launch.blocks, launch.kernel.multiprocessors))

    observers.noting.append(note)
    try:
        call()
    finally:
        observers.noting.remove(note)
    return found


def _add_symmetric(setting: Setting, mine: Exchange, what: str, symmetric: Mapping[str, Statistics | str]) -> None:
    found = symmetric.get(what, "not measured")
    row = ("exchange", mine.shape.name, what, SYMMETRIC)
    if isinstance(found, str):
        setting.results.add(Speed(*row, note=found))
        return
    note = "in processes of its own: torch does not change the back end of symmetric memory in use"
    setting.results.add(Speed(*row, found, note=note))


def _floor(ranks: Ranks, mine: Exchange) -> Floor:
    (crossing,) = ranks.largest([mine.crossing()])
    return Floor(1000 * crossing / NVLINK, f"{crossing / 2**20:.1f} MiB at {NVLINK / 1e9:g} GB/s")


def _error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative; WrongResultError if it is more than BOUND."""
    distance = torch.linalg.vector_norm(found - expected, dtype=torch.float32)
    error = float(distance / torch.linalg.vector_norm(expected, dtype=torch.float32))
    if not error <= BOUND:
        raise WrongResultError(f"{error:.3g} away from what it has to be, more than {BOUND:g}")
    return error


def _numberless(call: Call, _: int) -> object:
    return call()


def _title(shape: Shape) -> str:
    return f"T{shape.tokens} a rank, H{shape.hidden}, top-{shape.top_k} of {shape.experts}"
