"""`python -m moecompile bench overlap`: decoder layers on two halves of a batch, communication behind computation.

    Inductor, two halves        what users compile today, with PyTorch's all-to-all, one half behind the other
    ours, whole                 one batch; in inference, exchanges are hidden in their blocks
    ours, two halves in turn    split without overlap: the same exchange, one half behind the other
    ours, overlapped            microbatches=2

Forward, and forward+backward. All take turns in the same processes, one a GPU; the slowest rank counts. Beside the time
of ours: how long kernels that communicate run, and for how much of that no other does, by the profiler; and what was
predicted. Where halves are predicted to gain too little, the batch stays whole, and the row says so. The exit
status is 0 if everything was measured, 1 if something failed or a rank died, 2 if nothing can be
measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import moecompile
from moecompile import ordering
from moecompile.bench_cases import FORWARD, STEP, Shape
from moecompile.bench_ep_ranks import Ranks, RanksFailedError
from moecompile.bench_ep_rows import numberless
from moecompile.bench_overlap_exposed import Exposed, measure_exposed
from moecompile.bench_overlap_layers import APART, HALVES, INDUCTOR, OPTIONS, WHOLE, Case, Model
from moecompile.bench_proof import compare
from moecompile.bench_ranks import RanksBench, Steps
from moecompile.bench_results import Setting, Speed
from moecompile.bench_timing import Contender, Statistics, measure_single

CASES = (
    Case(Shape("large", 7168, 2048, 64, 8, 8192), 8),
    Case(Shape("middle", 2048, 768, 128, 8, 8192), 8),
    Case(Shape("small", 7168, 2048, 64, 8, 256), 4),
)
TINY = (Case(Shape("tiny", 64, 32, 8, 2, 48), 4),)
"""For a look at the command on a CPU."""
LAYERS = 2
BOUND = 0.03
"""How far results and gradients may be from the first contender's: the norm of the difference, relative."""


def _steps(chosen: argparse.Namespace, setting: Setting, ranks: Ranks) -> Steps:
    cases = TINY if chosen.device == "cpu" else CASES
    return [
        (f"{what}, {case.shape.name}", partial(measure_layers, setting, ranks, case, what))
        for case in cases
        if case.shape.name in chosen.shapes
        for what in (FORWARD, STEP)
        if what in chosen.only
    ]


def measure_layers(
    setting: Setting,
    ranks: Ranks,
    case: Case,
    what: str,
    more: Mapping[str, Any] | None = None,
    contenders: Sequence[str] = (INDUCTOR, *OPTIONS),
) -> None:
    """All rows of a case.

    Args:
        setting: of the run.
        ranks: this one's view of all.
        case: the sizes.
        what: FORWARD or STEP.
        more: options of the backend for all of ours.
        contenders: by name; the others' results are compared with the first one's.
    """
    setting.results.head(f"layers  {LAYERS} of {case.title}, {ranks.size} ranks  {what}")
    options = {**_lowering(setting.device), **(more or {})}
    model = ranks.attempt(partial(Model.of, ranks, case, LAYERS, options))
    with torch.set_grad_enabled(what == STEP):
        calls = {name: partial(model.step, name) if what == STEP else model.calls[name] for name in contenders}
        notes = _checked(setting, ranks, model, calls, f"{case.shape.name} {what}")
        flops = LAYERS * case.shape.flops * (3 if what == STEP else 1)
        present = [Contender(name, partial(numberless, call), flops) for name, call in calls.items() if name in notes]
        times = ranks.attempt(partial(measure_single, setting.timer, present, setting.rounds))
        for each in present:
            note = "; ".join(filter(None, (notes[each.name], _communication(setting, ranks, each))))
            row = ("layers", case.shape.name, what, each.name, times[each.name], flops, None)
            setting.results.add(Speed(*row, _ratios(each.name, times), note=note))
    torch._dynamo.reset()


def _lowering(device: str) -> dict[str, Any]:
    """On a CPU Inductor's minutes show nothing; older ones would order operators anew."""
    return {} if ordering.inductor_keeps_orders() and device == "cuda" else {"lowering": "eager"}


def _checked(setting: Setting, ranks: Ranks, model: Model, calls: Mapping[str, Any], case: str) -> dict[str, str]:
    """Of those that are right: what is said of them; the others are noted as failures."""
    first, *others = calls
    expected, notes = ranks.attempt(partial(_outcome, model, calls[first])), {first: ""}
    for name in others:
        try:
            found = ranks.attempt(partial(_outcome, model, calls[name]))
            error = ranks.largest([ranks.attempt(partial(compare, found, expected, BOUND, "the first one's"))])[0]
            notes[name] = f"{error:.1e} from the first one's{_said(name)}"
        except RanksFailedError as failure:  # the others are measured all the same
            setting.results.fail(f"{case}, {name}", failure)
    return notes


def _outcome(model: Model, call: Any) -> dict[str, Tensor]:
    found = call()
    return model.gradients() if found is None else {"result": found}


def _said(name: str) -> str:
    """What the report of the contender that was compiled last says of its halves, and what it predicts."""
    if name != HALVES:
        return ""
    graph = moecompile.last_report().graphs[-1]
    words = [note.removeprefix("microbatches: ") for note in graph.notes if note.startswith("microbatches: ")]
    for kind, plan in graph.planned.items():
        words.append(f"{kind} predicted {1e3 * plan.after.makespan:.3f} ms, exposed {1e3 * plan.after.exposed:.3f}")
    return "".join(f"; {each}" for each in words)


def _communication(setting: Setting, ranks: Ranks, contender: Contender) -> str:
    """What the profiler sees of it, on the rank that waits longest."""
    if setting.device == "cpu":
        return ""
    found = ranks.attempt(partial(measure_exposed, partial(contender.call, 0))) or Exposed(float("nan"), float("nan"))
    communicating, exposed = ranks.largest([found.communicating, found.exposed])
    return f"communicating {communicating:.3f} ms, exposed {exposed:.3f}"


def _ratios(name: str, times: Mapping[str, Statistics]) -> dict[str, float]:
    """How much faster than each other contender of the overlapped one; of ours, than Inductor."""
    others = (INDUCTOR, WHOLE, APART) if name == HALVES else (INDUCTOR,) if name != INDUCTOR else ()
    return {other: times[other].median / times[name].median for other in others if other in times}


BENCH = RanksBench(
    "bench overlap",
    __doc__,
    (FORWARD, STEP),
    [case.shape for case in CASES],
    [case.shape for case in TINY],
    (),
    _steps,
)
main = BENCH.main
