"""The exchange of tokens by itself: layout, dispatch and combine, ours and the baseline's, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from moecompile.bench_bars import Bar
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
    SMS,
    SYMMETRIC,
    TIME,
)
from moecompile.bench_ep_peers import Baseline, Layout, baselines
from moecompile.bench_ep_ranks import Ranks, RanksFailedError
from moecompile.bench_ep_rows import bars, numberless, proven
from moecompile.bench_ep_tokens import Exchange
from moecompile.bench_proof import EMULATED, WrongResultError
from moecompile.bench_results import Floor, Setting, Speed
from moecompile.bench_timing import Call, Contender, Statistics, measure_single

BOUND = 0.02
"""How far a sum at home may be from another: the norm of the difference, relative. Rows and places have to be equal."""


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
        floor = mine.floor()
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

    def check_quantised() -> str:
        from moecompile.runtime.hopper_quantize import quantize_lines

        rows, ids = mine.dispatch_quantised(mine.planned)
        if not torch.equal(by_expert(rows, ids, mine.ranks.size), quantize_lines(baseline.dispatch(x, top_k, layout))):
            raise WrongResultError("the rows that came are not those of the baseline, quantised")
        return "quantised here; the baseline's rows, quantised, to the bit"

    calls: dict[str, Call] = {
        OURS: partial(mine.dispatch, mine.planned),
        FP8: partial(mine.dispatch_quantised, mine.planned),
        EAGER: partial(baseline.dispatch, x, top_k, layout),
    }
    checks = {OURS: check, FP8: check_quantised, EAGER: lambda: ""}
    if setting.device == "cpu":
        checks.pop(FP8)
    _measure(setting, mine, DISPATCH, calls, checks, floor)
    _add_symmetric(setting, mine, DISPATCH, symmetric)
    if setting.device == "cpu":
        _add_without_kernels(setting, mine, DISPATCH, FP8)


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
    blocks: dict[str, dict[str, int]] = {}
    for name, check in checks.items():
        try:
            notes[name] = ranks.attempt(check)
            if name in (OURS, FP8):
                blocks[name] = ranks.attempt(partial(proven, calls[name], setting.device))
        except RanksFailedError as error:  # the others are measured all the same
            setting.results.fail(f"{what}, {name}", error)
    present = [Contender(name, partial(numberless, calls[name]), 0.0) for name in notes]
    times = ranks.attempt(partial(measure_single, setting.timer, present, setting.rounds))
    fastest = min((times[name].median for name in BASELINES if name in times), default=None)
    for name, checked in notes.items():
        against = {} if name in BASELINES or fastest is None else {BASELINE: fastest / times[name].median}
        words = [checked]
        words += [f"{kernel} on {count} SMs" for kernel, count in blocks.get(name, {}).items()]
        words += [EMULATED] if name == OURS and setting.device == "cpu" else []
        note = "; ".join(word for word in words if word)
        setting.results.add(Speed("exchange", case, what, name, times[name], floor=floor, ratios=against, note=note))
        values = {TIME: 1000 * times[name].median, SMS: max(blocks.get(name, {}).values(), default=None)}
        setting.results.add(*bars("exchange", case, what, name, values, ranks))


def _add_without_kernels(setting: Setting, mine: Exchange, what: str, name: str) -> None:
    """The row of what moecompile's kernels alone do."""
    limits = LIMITS.get((mine.shape.name, what, name), ())
    setting.results.add(
        Speed("exchange", mine.shape.name, what, name, note="needs a Hopper GPU"),
        *(Bar("exchange", mine.shape.name, what, name, None, limit, "no GPU") for limit in limits),
    )


def _add_symmetric(setting: Setting, mine: Exchange, what: str, symmetric: Mapping[str, Statistics | str]) -> None:
    found = symmetric.get(what, "not measured")
    row = ("exchange", mine.shape.name, what, SYMMETRIC)
    if isinstance(found, str):
        setting.results.add(Speed(*row, note=found))
        return
    note = "in processes of its own, where the baseline took turns with it"
    beside = symmetric.get(f"{what}, {EAGER}")
    against = {BASELINE: beside.median / found.median} if isinstance(beside, Statistics) else {}
    setting.results.add(Speed(*row, found, ratios=against, note=note))


def _error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative; WrongResultError if it is more than BOUND."""
    distance = torch.linalg.vector_norm(found - expected, dtype=torch.float32)
    error = float(distance / torch.linalg.vector_norm(expected, dtype=torch.float32))
    if not error <= BOUND:
        raise WrongResultError(f"{error:.3g} away from what it has to be, more than {BOUND:g}")
    return error


def _title(shape: Shape) -> str:
    return f"T{shape.tokens} a rank, H{shape.hidden}, top-{shape.top_k} of {shape.experts}"
