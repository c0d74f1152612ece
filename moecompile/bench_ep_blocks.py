"""Blocks of experts spread over ranks: moecompile's, compiled as users do it, and what they write themselves.

Each rank brings its own tokens with their experts and weights; the experts of all ranks are one module, sharded by
`moecompile.shard_experts`. In the same rounds: this rank's experts by themselves on the tokens that reach it, and the
exchange by itself. From these three follows how much of the exchange is hidden behind the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import moecompile
from moecompile.bench_block import ATTRIBUTES
from moecompile.bench_cases import FORWARD, FP8, OURS, STEP, Shape
from moecompile.bench_ep_cases import (
    AGAINST_LOCAL,
    BASELINE,
    BASELINES,
    EAGER,
    EXCHANGE_ALONE,
    HIDDEN,
    LOCAL,
    LOCAL_BF16,
    LOCAL_FP8,
    SHARE,
    SPEED,
    TRAINED,
)
from moecompile.bench_ep_peers import Baseline, baselines
from moecompile.bench_ep_ranks import Ranks, RanksFailedError
from moecompile.bench_ep_rows import bars, numberless, proven
from moecompile.bench_ep_sharded import OPTIONS, Sharded
from moecompile.bench_proof import EMULATED, NotOursError, WrongResultError, compare, kernels_of, prove
from moecompile.bench_results import Floor, Setting, Speed
from moecompile.bench_timing import Contender, Statistics, measure_single

BOUNDS = {"bf16": 0.02, "fp8": 0.15}
"""How far results and gradients may be from the eager baseline's: the norm of the difference, relative."""
LOCALS = {OURS: LOCAL_BF16, FP8: LOCAL_FP8}
Calls = Mapping[str, Callable[[], Any]]
Outcomes = Mapping[str, Callable[[], dict[str, Tensor]]]
"""By contender: what a call comes to, by name of what is to be compared with the eager baseline's."""


def measure_block(setting: Setting, ranks: Ranks, shape: Shape, more: Mapping[str, Any]) -> None:
    """All rows of a block; `more` are options of the backend for all that it compiles."""
    block = ranks.attempt(partial(Sharded.of, ranks, shape, more))
    peers = baselines(ranks, shape.experts)
    _add_floors(setting, block)
    with torch.no_grad():
        blocks = _blocks(block, peers, FORWARD)
        parts, of_parts = _parts(block)
        outcomes = {name: partial(_result, call) for name, call in blocks.items()}
        _measure(setting, block, FORWARD, {**blocks, **parts}, {**outcomes, **of_parts})
    if shape.name in TRAINED or setting.device == "cpu":
        steps = {name: partial(_step, block, call) for name, call in _blocks(block, peers, STEP).items()}
        _measure(setting, block, STEP, steps, {name: partial(_of_step, block, call) for name, call in steps.items()})
    torch._dynamo.reset()


def _blocks(block: Sharded, peers: Mapping[str, Baseline], what: str) -> Calls:
    return {
        **{name: partial(block.ours, name, what) for name in OPTIONS},
        **{name: partial(block.theirs, peer) for name, peer in peers.items()},
    }


def _parts(block: Sharded) -> tuple[Calls, Outcomes]:
    """This rank's experts on the tokens that reach it, and the exchange, each by itself; and what they come to."""
    exchange = block.exchange
    rows, ids, weights, came = exchange.ranks.attempt(partial(exchange.dispatch, exchange.planned))
    here = block.w_in.shape[0]

    def planned() -> tuple[Tensor, ...]:
        _, *found = torch.ops.moecompile.plan(ids, here)
        return (rows, weights, *found, block.w_in, block.w_out)

    def local() -> Tensor:
        found: Tensor = torch.ops.moecompile.experts(*planned(), **ATTRIBUTES)
        return found

    quantise = partial(torch.ops.moecompile.quantize_weights, backward=False)
    quantised = [*quantise(block.w_in, None, gate_up=ATTRIBUTES["gate_up"]), *quantise(block.w_out, None)]

    def local_fp8() -> Tensor:
        found: Tensor = torch.ops.moecompile.experts_fp8(*planned(), **ATTRIBUTES, quantized=quantised)
        return found

    def alone() -> Tensor:
        plan = exchange.plan()
        exchange.dispatch(plan)
        return exchange.combine(rows, came, plan)

    def brought_home(experts: Callable[[], Tensor]) -> dict[str, Tensor]:
        return {"result": exchange.combine(experts(), came, exchange.planned)}

    def of_alone() -> dict[str, Tensor]:
        """Every token comes back from each rank that has one of its experts."""
        x, times = exchange.inputs.x.detach(), (exchange.planned[1] >= 0).sum(1, keepdim=True)
        if not torch.equal(alone(), (x.float() * times).to(x.dtype)):
            raise WrongResultError("the sums are not those of the tokens that were sent")
        return {}

    outcomes = {LOCAL_BF16: partial(brought_home, local), LOCAL_FP8: partial(brought_home, local_fp8)}
    return {LOCAL_BF16: local, LOCAL_FP8: local_fp8, EXCHANGE_ALONE: alone}, {**outcomes, EXCHANGE_ALONE: of_alone}


def _result(call: Callable[[], Tensor]) -> dict[str, Tensor]:
    return {"result": call()}


def _step(block: Sharded, call: Callable[[], Tensor]) -> None:
    block.forget_gradients()
    call().backward(block.inputs.cotangent)


def _of_step(block: Sharded, step: Callable[[], None]) -> dict[str, Tensor]:
    step()
    return block.gradients()


def _measure(setting: Setting, block: Sharded, what: str, calls: Calls, outcomes: Outcomes) -> None:
    """Rows of those that compute what the eager baseline does, in turns."""
    ranks, shape = block.exchange.ranks, block.exchange.shape
    setting.results.head(f"block  {shape.title} a rank, {ranks.size} ranks  {what}")
    contenders = [_contender(shape, what, name, call) for name, call in calls.items()]
    notes = _checked(setting, block, what, contenders, outcomes)
    present = [each for each in contenders if each.name in notes]
    times = ranks.attempt(partial(measure_single, setting.timer, present, setting.rounds))
    fastest = min((times[name].median for name in BASELINES if name in times), default=None)
    for each in present:
        values = _ratios(each.name, times, fastest)
        known = setting.ceilings.floor(each.flops, 0.0, each.precision)
        floor = block.exchange.floor(ways=2) if each.name == EXCHANGE_ALONE else known
        row = ("block", shape.name, what, each.name, times[each.name], each.flops, floor)
        faster = {BASELINE: values.get(SPEED), LOCAL: 1 / values[AGAINST_LOCAL] if AGAINST_LOCAL in values else None}
        against = {name: ratio for name, ratio in faster.items() if ratio is not None}
        setting.results.add(Speed(*row, against, note=notes[each.name]))
        setting.results.add(*bars("block", shape.name, what, each.name, values, ranks))
    if what == FORWARD:
        _add_hidden(setting, block, times)


def _contender(shape: Shape, what: str, name: str, call: Callable[[], Any]) -> Contender:
    """With the kernels of the experts that ours cannot do without; the exchange's are looked at apart."""
    flops = 0.0 if name == EXCHANGE_ALONE else (3 if what == STEP else 1) * shape.flops
    of_experts = {LOCAL_BF16: OURS, LOCAL_FP8: FP8}.get(name, name)
    kernels = ("exchange_send",) if name == EXCHANGE_ALONE else kernels_of(of_experts, what)
    return Contender(name, partial(numberless, call), flops, "fp8" if of_experts == FP8 else "bf16", kernels)


def _checked(
    setting: Setting, block: Sharded, what: str, contenders: list[Contender], outcomes: Outcomes
) -> dict[str, str]:
    """Of those that are right: how far they are from the eager baseline; the others are noted as failures."""
    ranks, notes = block.exchange.ranks, dict[str, str]()
    expected = ranks.attempt(outcomes[EAGER])
    for each in contenders:
        try:
            if each.name != EAGER:
                found = ranks.attempt(outcomes[each.name])
                right = {what: expected[what] for what in found}
                error = ranks.attempt(partial(compare, found, right, BOUNDS[each.precision], "the eager baseline's"))
                notes[each.name] = f"{ranks.largest([error])[0]:.1e} from the eager baseline" if found else "to the bit"
            if each.name in OPTIONS:
                ranks.attempt(_exchanging)
                ranks.attempt(partial(proven, partial(each.call, 0), setting.device))
            ranks.attempt(partial(prove, each, range(1), setting.device))
            emulated = [EMULATED] if setting.device == "cpu" and each.name not in BASELINES else []
            notes[each.name] = "; ".join([*filter(None, [notes.get(each.name)]), *emulated])
        except RanksFailedError as error:  # the others are measured all the same
            notes.pop(each.name, None)
            setting.results.fail(f"{block.exchange.shape.name} {what}, {each.name}", error)
    block.forget_gradients()
    return notes


def _exchanging() -> None:
    """Raises NotOursError if moecompile has left experts gathered instead of exchanging tokens."""
    report = moecompile.last_report()
    graphs = [graph.after for graph in report.current]
    exchanging = ("dispatch_start", "exchanged_experts")
    if any("gather_experts" in each for each in graphs) or not any(
        name in each for each in graphs for name in exchanging
    ):
        raise NotOursError(f"its tokens are not exchanged: {report}")


def _ratios(name: str, times: Mapping[str, Statistics], fastest: float | None) -> dict[str, float]:
    """Of a block of ours: how much faster than the baseline, and how much slower than its experts alone."""
    if name not in OPTIONS:
        return {}
    found = {SPEED: fastest / times[name].median} if fastest is not None else {}
    local = times.get(LOCALS[name])
    return found | ({AGAINST_LOCAL: times[name].median / local.median} if local is not None else {})


def _add_hidden(setting: Setting, block: Sharded, times: Mapping[str, Statistics]) -> None:
    """How much of the smaller of exchange and experts the block does not take, in percent."""
    for name, local in LOCALS.items():
        if any(each not in times for each in (name, local, EXCHANGE_ALONE)):
            continue
        parts = times[local].median, times[EXCHANGE_ALONE].median
        share = 100 * (sum(parts) - times[name].median) / min(parts)
        shape = block.exchange.shape
        setting.results.head(
            f"    {HIDDEN}, {name}: {share:.0f} % of the smaller of {parts[0]:.3f} and {parts[1]:.3f} ms"
        )
        setting.results.add(*bars("block", shape.name, HIDDEN, name, {SHARE: share}, block.exchange.ranks))


def _add_floors(setting: Setting, block: Sharded) -> None:
    """What the products and the bytes take at least, each by itself."""
    shape = block.exchange.shape
    setting.results.head(f"block  {shape.title} a rank, {block.exchange.ranks.size} ranks  floors")
    found: dict[str, Floor | None] = {
        f"products, {precision}": setting.ceilings.floor(shape.flops, 0.0, precision) for precision in BOUNDS
    }
    found["bytes, dispatch+combine"] = block.exchange.floor(ways=2)
    for name, floor in found.items():
        note = "the ceiling is not known" if floor is None else f"{floor.milliseconds:9.4f} ms ({floor.of})"
        setting.results.add(Speed("block", shape.name, "floors", name, floor=floor, note=note))
