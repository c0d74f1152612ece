"""Blocks of experts spread over ranks: moecompile's, compiled as users do it, and what they write themselves.

Each rank brings its own tokens with their experts and weights; the experts of all ranks are one module, sharded by
`moecompile.shard_experts`. In the same rounds: this rank's experts by themselves on the tokens that reach it, and the
exchange by itself. From these three follows how much of the exchange is hidden behind the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import moecompile
from moecompile import agreement
from moecompile.bench_block import ATTRIBUTES, Inputs
from moecompile.bench_cases import FORWARD, FP8, OURS, STEP, Shape
from moecompile.bench_ep_cases import (
    AGAINST_LOCAL,
    BASELINE,
    BASELINES,
    COMPILED,
    EAGER,
    EXCHANGE_ALONE,
    HIDDEN,
    LOCAL,
    LOCAL_BF16,
    LOCAL_FP8,
    NVLINK,
    SHARE,
    SPEED,
    TRAINED,
)
from moecompile.bench_ep_exchange import Exchange, bars, proven
from moecompile.bench_ep_peers import Baseline, activated, baselines, summed
from moecompile.bench_ep_ranks import Ranks, RanksFailedError
from moecompile.bench_proof import EMULATED, NotOursError, WrongResultError
from moecompile.bench_results import Floor, Setting, Speed
from moecompile.bench_timing import Contender, Statistics, measure_single

BOUNDS = {"bf16": 0.02, "fp8": 0.15}
"""How far results and gradients may be from the eager baseline's: the norm of the difference, relative."""
OPTIONS: Mapping[str, dict[str, Any]] = {OURS: {}, FP8: {"precision": "fp8"}}
LOCALS = {OURS: LOCAL_BF16, FP8: LOCAL_FP8}


class Experts(nn.Module):
    """All experts, stacked, as a model has them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        self._experts = shape.experts

        def matrices(out: int, into: int) -> nn.Parameter:
            made = torch.randn(shape.experts, out, into, dtype=torch.bfloat16, device=device)
            return nn.Parameter(made.mul_(into**-0.5))

        self.w_in, self.w_out = matrices(2 * shape.inner, shape.hidden), matrices(shape.hidden, shape.inner)

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum (T, H) of the experts (T, K) of tokens (T, H)."""
        assigned = expert_ids.reshape(-1)
        order = assigned.argsort(stable=True)
        ends = torch.bincount(assigned, minlength=self._experts).cumsum(0).to(torch.int32)
        hidden = torch._grouped_mm(x[order // expert_ids.shape[1]], self.w_in.mT, offs=ends)
        y = torch._grouped_mm(activated(hidden), self.w_out.mT, offs=ends)
        return summed(y, order, weights)


@dataclass(frozen=True, eq=False)
class Sharded:
    """One rank's part of a block.

    Attributes:
        module: with this rank's experts alone.
        compiled: by moecompile, by contender.
        exchange: of the tokens, by itself.
        w_in: (E / R, 2I, H), this rank's, that of the module.
        w_out: (E / R, H, I).
    """

    module: nn.Module
    compiled: Mapping[str, Callable[..., Tensor]]
    exchange: Exchange
    w_in: Tensor
    w_out: Tensor

    @classmethod
    def of(cls, ranks: Ranks, shape: Shape, more: Mapping[str, Any]) -> Sharded:
        """Random experts, the same on all ranks before they are shared out, and random tokens, other ones on each.

        `more` are options of the backend for all.
        """
        torch._dynamo.reset()
        agreement.forget()
        torch.manual_seed(0)
        module = Experts(shape, ranks.device)
        mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
        moecompile.shard_experts(module, mesh, gradients="sum")
        compiled = {
            name: torch.compile(module, backend="moecompile", fullgraph=True, options={**more, **options})
            for name, options in OPTIONS.items()
        }
        w_in, w_out = (_own(parameter) for parameter in (module.w_in, module.w_out))
        return cls(module, compiled, Exchange.of(ranks, shape, seed=1), w_in, w_out)

    @property
    def inputs(self) -> Inputs:
        """This rank's tokens."""
        return self.exchange.inputs

    def ours(self, name: str) -> Tensor:
        """The block by moecompile."""
        return self.compiled[name](self.inputs.x, self.inputs.ids, self.inputs.weights)

    def theirs(self, baseline: Baseline) -> Tensor:
        """The block as users write it."""
        return baseline(self.inputs.x, self.inputs.ids, self.inputs.weights, self.w_in, self.w_out)

    def leaves(self) -> dict[str, Tensor]:
        """What the baseline's gradients are taken of."""
        return {"x": self.inputs.x, "weights": self.inputs.weights, "w_in": self.w_in, "w_out": self.w_out}

    def forget_gradients(self) -> None:
        """All gradients are None."""
        self.module.zero_grad(set_to_none=True)
        for leaf in self.leaves().values():
            leaf.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Those of tokens, weights and this rank's matrices; they are no longer the block's."""
        found = {name: leaf.grad for name, leaf in self.leaves().items()}
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.to_local()  # type: ignore[attr-defined]
        self.forget_gradients()
        missing = [name for name, gradient in found.items() if gradient is None]
        if missing:
            raise WrongResultError(f"no gradient of {', '.join(missing)}")
        return {name: gradient for name, gradient in found.items() if gradient is not None}


def _own(parameter: Any) -> Tensor:
    """This rank's part of a sharded parameter, for those who know nothing of shards."""
    found: Tensor = parameter.to_local().detach()
    return found.requires_grad_()


def measure_block(setting: Setting, ranks: Ranks, shape: Shape, more: Mapping[str, Any]) -> None:
    """All rows of a block; `more` are options of the backend for all that it compiles."""
    block = ranks.attempt(partial(Sharded.of, ranks, shape, more))
    peers = baselines(ranks, shape.experts)
    _add_floors(setting, block)
    with torch.no_grad():
        found = _forwards(block, peers)
        _measure(setting, block, FORWARD, found, {name: partial(_result, call) for name, call in found.items()})
    if shape.name in TRAINED or setting.device == "cpu":
        steps = {name: partial(_step, block, call) for name, call in _blocks(block, peers).items()}
        _measure(setting, block, STEP, steps, {name: partial(_of_step, block, call) for name, call in steps.items()})
    torch._dynamo.reset()


Calls = Mapping[str, Callable[[], Any]]


def _blocks(block: Sharded, peers: Mapping[str, Baseline]) -> Calls:
    return {
        **{name: partial(block.ours, name) for name in OPTIONS},
        **{name: partial(block.theirs, peer) for name, peer in peers.items()},
    }


def _forwards(block: Sharded, peers: Mapping[str, Baseline]) -> Calls:
    """The blocks, this rank's experts on the tokens that reach it, and the exchange."""
    exchange = block.exchange
    rows, ids, weights, came = exchange.ranks.attempt(partial(exchange.dispatch, exchange.planned))
    here = block.w_in.shape[0]

    def planned() -> tuple[Tensor, ...]:
        _, *found = torch.ops.moecompile.plan(ids, here)
        return (rows, weights, *found, block.w_in, block.w_out)

    def local() -> Tensor:
        found: Tensor = torch.ops.moecompile.experts(*planned(), **ATTRIBUTES)
        return found

    def local_fp8() -> Tensor:
        quantise = partial(torch.ops.moecompile.quantize_weights, backward=False)
        quantised = [*quantise(block.w_in, None, gate_up=ATTRIBUTES["gate_up"]), *quantise(block.w_out, None)]
        found: Tensor = torch.ops.moecompile.experts_fp8(*planned(), **ATTRIBUTES, quantized=quantised)
        return found

    def alone() -> Tensor:
        plan = exchange.plan()
        exchange.dispatch(plan)
        return exchange.combine(rows, came, plan)

    return {**_blocks(block, peers), LOCAL_BF16: local, LOCAL_FP8: local_fp8, EXCHANGE_ALONE: alone}


def _result(call: Callable[[], Tensor]) -> dict[str, Tensor]:
    return {"result": call()}


def _step(block: Sharded, call: Callable[[], Tensor]) -> None:
    block.forget_gradients()
    call().backward(block.inputs.cotangent)


def _of_step(block: Sharded, step: Callable[[], None]) -> dict[str, Tensor]:
    step()
    return block.gradients()


def _measure(
    setting: Setting, block: Sharded, what: str, calls: Calls, outcomes: Mapping[str, Callable[[], dict[str, Tensor]]]
) -> None:
    """Rows of those that compute what the eager baseline does, in turns."""
    ranks, shape = block.exchange.ranks, block.exchange.shape
    setting.results.head(f"block  {shape.title} a rank, {ranks.size} ranks  {what}")
    notes = _checked(setting, block, what, calls, outcomes)
    times3 = 3 if what == STEP else 1
    present = [
        Contender(
            name,
            partial(_numberless, calls[name]),
            0.0 if name == EXCHANGE_ALONE else times3 * shape.flops,
            _precision(name),
        )
        for name in calls
        if name in notes
    ]
    times = ranks.attempt(partial(measure_single, setting.timer, present, setting.rounds))
    fastest = min((times[name].median for name in BASELINES if name in times), default=None)
    for each in present:
        values = _ratios(each.name, times, fastest)
        floor = setting.ceilings.floor(each.flops, 0.0, each.precision) if each.flops else _bytes_floor(block, 2)
        row = ("block", shape.name, what, each.name, times[each.name], each.flops, floor)
        words = {SPEED: BASELINE, AGAINST_LOCAL: LOCAL}
        against = {words[of]: value if of == SPEED else 1 / value for of, value in values.items()}
        setting.results.add(Speed(*row, against, note=notes[each.name]))
        setting.results.add(*bars("block", shape.name, what, each.name, values, ranks))
    if what == FORWARD:
        _add_hidden(setting, block, times)


def _checked(
    setting: Setting, block: Sharded, what: str, calls: Calls, outcomes: Mapping[str, Callable[[], dict[str, Tensor]]]
) -> dict[str, str]:
    """Of those that are right: how far they are from the eager baseline; the others are noted as failures."""
    ranks = block.exchange.ranks
    expected = ranks.attempt(outcomes[EAGER])
    notes = {EAGER: ""}
    for name, outcome in outcomes.items():
        try:
            found = expected if name == EAGER else ranks.attempt(outcome)
            if name in (*OPTIONS, COMPILED):
                error = ranks.attempt(partial(_distance, found, expected, BOUNDS[_precision(name)]))
                notes[name] = f"{ranks.largest([error])[0]:.1e} from the eager baseline"
            elif name != EAGER:
                notes[name] = ""
            if name in OPTIONS:
                ranks.attempt(_exchanging)
                if what == FORWARD:
                    ranks.attempt(partial(proven, calls[name], setting.device))
            if setting.device == "cpu" and name not in BASELINES:
                notes[name] = "; ".join(word for word in (notes[name], EMULATED) if word)
        except RanksFailedError as error:  # the others are measured all the same
            notes.pop(name, None)
            setting.results.fail(f"{block.exchange.shape.name} {what}, {name}", error)
    return {name: notes[name] for name in calls if name in notes}


def _exchanging() -> None:
    """Raises NotOursError if moecompile has left experts gathered instead of exchanging tokens."""
    report = moecompile.last_report()
    graphs = [graph.after for graph in report.current]
    if any("gather_experts" in each for each in graphs) or not any("dispatch_start" in each for each in graphs):
        raise NotOursError(f"its tokens are not exchanged: {report}")


def _distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> float:
    """The largest relative norm of a difference; WrongResultError if it is more than `bound`."""
    most = 0.0
    for what, right in expected.items():
        norm = float(torch.linalg.vector_norm(right, dtype=torch.float32))
        error = float(torch.linalg.vector_norm(found[what] - right, dtype=torch.float32)) / max(norm, 1e-30)
        if not error <= bound:
            raise WrongResultError(f"{what} is {error:.3g} away from the eager baseline's, more than {bound:g}")
        most = max(most, error)
    return most


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
    found["bytes, dispatch+combine"] = _bytes_floor(block, 2)
    for name, floor in found.items():
        note = "the ceiling is not known" if floor is None else f"{floor.milliseconds:9.4f} ms ({floor.of})"
        setting.results.add(Speed("block", shape.name, "floors", name, floor=floor, note=note))


def _bytes_floor(block: Sharded, ways: int) -> Floor:
    (crossing,) = block.exchange.ranks.largest([ways * block.exchange.crossing()])
    return Floor(1000 * crossing / NVLINK, f"{crossing / 2**20:.1f} MiB at {NVLINK / 1e9:g} GB/s")


def _precision(name: str) -> str:
    return "fp8" if name in (FP8, LOCAL_FP8) else "bf16"


def _numberless(call: Callable[[], Any], _: int) -> object:
    return call()
