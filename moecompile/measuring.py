"""The option `profile`: what a graph's nodes take is measured in its first calls, and its order reckoned with that.

for each graph, forward and backward, that exchanges something with other ranks, when it is compiled:
unless all of these ranks have it measured, by an earlier process say:
its first CALLS calls run node by node, each alone on the device between two CUDA events
what each took, the median, is stored beside the graphs' texts (moecompile/cache.py)
order it (moecompile/ordering.py), with that in place of what is predicted, and compile it
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moecompile import ordering
from moecompile.bodies import text_of
from moecompile.cache import Sidecar, measured_key
from moecompile.passes.costs import COLLECTIVES
from moecompile.passes.joint_graph import packet_of
from moecompile.report import GraphReport

CALLS = 4
"""The first of which is not counted: kernels are loaded in it."""
AHEAD = 2_000_000
"""Cycles for which the device waits before each node, so that the host has sent all that the node runs."""
AFTER = "not measured, since ranks have agreed on an order before"
Seconds = Mapping[str, float]
"""By name of a node."""
Call = Callable[[list[Any]], Sequence[Any]]
Finish = Callable[[Seconds | None], Call]
"""Orders and compiles the graph, given what its nodes take."""


def measured(kind: str, gm: fx.GraphModule, record: GraphReport, salt: str, finish: Finish) -> Call:
    """The graph, compiled with what is known of its nodes; or, if nothing is, what measures it first.

    Args:
        kind: "forward" or "backward".
        gm: of AOTAutograd's, with example values.
        record: of the graph that it belongs to.
        salt: what measurements depend on beside the graph (`moecompile.cache.salt`).
        finish: called when all is known.
    """
    if not ordering.exchanges(gm.graph):
        return finish(None)
    stored = Sidecar(measured_key(salt, kind, text_of(gm), _device_name(gm)))
    known = _read(stored)
    missing = "" if known else "it is not measured yet"
    if ordering.is_known(kind, gm.graph) or not ordering.agreed_reason(f"profile {kind}", [gm.graph], missing):
        record.notes.append(f"profile: {kind}: {'measured by an earlier process' if known else AFTER}")
        return finish(known)
    record.notes.append(f"profile: {kind}: {CALLS} calls run node by node, and are measured")
    return _Measuring(gm, stored, finish)


class _Measuring:
    """A graph that is measured in its first calls, and compiled then."""

    def __init__(self, gm: fx.GraphModule, stored: Sidecar, finish: Finish) -> None:
        self._boxed_call = True  # whom AOTAutograd wraps it in copies what the object itself has
        self._gm, self._stored, self._finish = gm, stored, finish
        self._found: list[Seconds] = []
        self._compiled: Call | None = None

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if self._compiled is None and len(self._found) == CALLS:
            seconds = {name: statistics.median(each[name] for each in self._found[1:]) for name in self._found[0]}
            self._stored.write("seconds", json.dumps(seconds))
            self._compiled = self._finish(seconds)
        if self._compiled is not None:
            return self._compiled(args)
        clocked = _Clocked(self._gm)
        given = [*args]
        args.clear()
        with torch.no_grad():
            result: Sequence[Any] = clocked.boxed_run(given)
        self._found.append(clocked.seconds)
        return result

    @property
    def measures(self) -> bool:
        """Whether it will be ordered and compiled later."""
        return self._compiled is None


def is_measuring(call: Any) -> bool:
    """Whether a graph's nodes are still to be measured."""
    return isinstance(call, _Measuring) and call.measures


class _Clocked(fx.Interpreter):
    """Runs a graph's nodes one by one; `seconds` of each, by name."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.seconds: dict[str, float] = {}
        self._clock = _on_device if _device(gm).type == "cuda" else _on_host

    def run_node(self, n: fx.Node) -> Any:
        """With the time that it takes."""
        if n.op != "call_function":
            return super().run_node(n)

        def run() -> Any:
            result = super(_Clocked, self).run_node(n)
            if packet_of(n) in COLLECTIVES:  # it runs on a stream of its own
                for each in torch.utils._pytree.tree_leaves(result):
                    torch.ops._c10d_functional.wait_tensor(each)
            return result

        result, self.seconds[n.name] = self._clock(run)
        return result


def _on_device(run: Callable[[], Any]) -> tuple[Any, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(AHEAD)
    begin.record()
    result = run()
    end.record()
    end.synchronize()
    return result, begin.elapsed_time(end) / 1e3


def _on_host(run: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    result = run()
    return result, time.perf_counter() - begin


def _read(stored: Sidecar) -> Seconds | None:
    text = stored.read().get("seconds")
    return None if text is None else {str(name): float(each) for name, each in json.loads(text).items()}


def _device(gm: fx.GraphModule) -> torch.device:
    """Where it runs: on the GPU of any of its tensors."""
    values = [node.meta.get("val") for node in gm.graph.nodes]
    devices = {each.device.type: each.device for each in values if isinstance(each, Tensor)}
    return devices.get("cuda", torch.device("cpu"))


def _device_name(gm: fx.GraphModule) -> str:
    device = _device(gm)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
