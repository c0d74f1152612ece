"""`python -m moecompile simulate cluster MODEL`: layers with experts over several hosts, in time.

Predicts for a stage of a pipeline, some layers of a published model on GPUs over which their experts are spread, how
long a forward, a backward, and a pair of both (of different micro-batches, as DualPipe runs them) take, how much of the
communication is exposed, and what more or fewer multiprocessors for communication do to it. With --stages and
--microbatches: how long training steps of pipelines of such stages take. Every assumption is printed.

What is not given is as in DeepSeek's published trace of DeepSeek-V3's training, but for the size of a micro-batch,
which that does not say. Measures nothing, needs no GPU. The exit status is 2 for input that cannot be.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from moecompile.cluster import Run
from moecompile.cluster_assumptions import assumptions, assumptions_of_steps, published
from moecompile.cluster_costs import Batch
from moecompile.cluster_exchange import ENOUGH, Cluster, ClusterError
from moecompile.cluster_shapes import MODELS
from moecompile.cluster_steps import steps
from moecompile.cluster_text import text
from moecompile.command_line import parser_of, whole_number
from moecompile.passes.hardware import Hardware, Link, known

SMS = (4, 8, 12, 16, 20, 24, 32)
"""Numbers of multiprocessors that are compared."""
LAYERS = 4
PRECISIONS = {"fp8": "float8", "bf16": "bfloat16"}


def main(argv: Sequence[str]) -> int:
    """Predicts, and prints what comes of it.

    Args:
        argv: the command line after `python -m moecompile simulate cluster`.

    Returns:
        the exit status, 0; a wrong command line exits with 2.
    """
    parser = _parser()
    chosen = parser.parse_args(argv)
    if (chosen.stages is None) != (chosen.microbatches is None):
        parser.error("expected --stages and --microbatches together, got one of them; give both for the time of a step")
    try:
        found = predicted(_run(chosen), chosen.stages, chosen.microbatches)
    except ClusterError as error:
        parser.error(str(error))
    print(json.dumps(found, indent=2) if chosen.json else text(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("simulate cluster", __doc__)
    parser.add_argument("model", choices=list(MODELS), metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--device", choices=list(known()), default="h800", help="of all GPUs (default: h800)")
    for name, default, what in (
        ("nodes", 8, "hosts over which the experts of a layer are spread"),
        ("gpus", 8, "GPUs of each host"),
        ("sms", ENOUGH, "multiprocessors for communication"),
        ("sequence", 4096, "tokens of a sequence"),
        ("sequences", 1, "sequences of a micro-batch"),
        ("layers", None, f"layers of a stage (default: {LAYERS}, or those of the model over --stages, rounded up)"),
        ("stages", None, "stages of a pipeline, for the time of a step"),
        ("microbatches", None, "micro-batches of a step"),
    ):
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", type=whole_number, default=default, metavar="N", help=f"{what}{shown}")
    for name in ("network", "nvlink"):
        parser.add_argument(
            f"--{name}", type=_positive, metavar="GB/s", help="each way of a GPU, in place of the device's"
        )
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp8", help="of products (default: fp8)")
    for name, what in (("compute", "kernels"), ("exchange", "exchanges")):
        parser.add_argument(
            f"--{name}-factor",
            type=_positive,
            default=1.0,
            metavar="X",
            help=f"{what} take X times what is predicted of them, as measured say (default: 1)",
        )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def _positive(written: str) -> float:
    try:
        value = float(written)
    except ValueError:
        value = math.nan
    if not 1e-6 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"expected a number from 1e-6 to 1e6, got {written!r}")
    return value


def _run(chosen: argparse.Namespace) -> Run:
    """What was asked for; raises ClusterError where that cannot be."""
    model = MODELS[chosen.model]
    for name in ("layers", "stages"):
        if (given := getattr(chosen, name)) is not None and given > model.layers:
            raise ClusterError(f"--{name}: expected at most {model.layers}, the layers of {model.name}, got {given}")
    layers = chosen.layers or (math.ceil(model.layers / chosen.stages) if chosen.stages else LAYERS)
    rates = {"network": chosen.network, "nvlink": chosen.nvlink}
    cluster = Cluster(chosen.nodes, chosen.gpus, _with_links(known()[chosen.device], rates), chosen.sms)
    batch = Batch(chosen.sequence, chosen.sequences, PRECISIONS[chosen.precision])
    return Run(model, cluster, batch, layers, chosen.compute_factor, chosen.exchange_factor)


def _with_links(hardware: Hardware, rates: Mapping[str, float | None]) -> Hardware:
    """With other rates, GB/s, for the links that have one."""
    links = {
        name: link if (rate := rates[name]) is None else Link(rate * 1e9, link.latency)
        for name, link in hardware.links.items()
    }
    return dataclasses.replace(hardware, links=links)


def predicted(run: Run, stages: int | None = None, microbatches: int | None = None) -> dict[str, Any]:
    """All that the command prints, as it is in JSON.

    Times are milliseconds, those of steps seconds; sizes are bytes, and shares those of 1.
    `step` is None without numbers of stages and micro-batches, and `published` where nothing is.
    """
    pair, forward, backward, trace = run.pair(), run.forward(), run.backward(), published(run)
    counts = sorted({*(sms for sms in SMS if sms < run.cluster.hardware.multiprocessors), run.cluster.sms})
    found = {
        "model": run.model.name,
        "device": run.cluster.hardware.name,
        "nodes": run.cluster.nodes,
        "gpus": run.cluster.gpus,
        "sms": run.cluster.sms,
        "tokens": run.batch.tokens,
        "layers": run.layers,
        "parts": {name: _times(part) for name, part in run.parts().items()},
        "exchanges": {
            name: {"network": way.network, "nvlink": way.nvlink, "ms": 1e3 * way.seconds}
            for name, way in (("dispatch", run.dispatch()), ("combine", run.combine()))
        },
        "forward": _times(forward),
        "backward": _times(backward),
        "pair": _times(pair),
        "published": None if trace is None else _times(trace),
        "by_sms": [{"sms": sms, **_times(run.with_sms(sms).pair())} for sms in counts],
        "step": None,
        "assumptions": assumptions(run),
    }
    if stages is not None and microbatches is not None:
        found["step"] = {
            "stages": stages,
            "microbatches": microbatches,
            "schedules": {
                name: {"reason": step} if isinstance(step, str) else dataclasses.asdict(step)
                for name, step in steps(run, stages, microbatches).items()
            },
        }
        found["assumptions"] = [*assumptions(run), *assumptions_of_steps(run, stages)]
    return found


def _times(record: Any) -> dict[str, Any]:
    """A dataclass of seconds in milliseconds, beside names; of an `Outcome` also what is exposed as a share."""
    values = dataclasses.asdict(record)
    times = {name: 1e3 * value if isinstance(value, float) else value for name, value in values.items()}
    return times if "exposed" not in values else {**times, "exposed_share": values["exposed"] / values["total"]}
