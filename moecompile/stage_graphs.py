"""Graphs of pipeline stages, and what is made of them when a schedule asks for it.

    forward, backward        AOTAutograd's, compiled as those of any other graph
    first part, second part  of a backward whose gradients of parameters come later
    pair                     of a backward, and of a forward of another micro-batch: ordered, then compiled as one

Stages of one class have one graph between them: their parameters are its inputs. What is made of it is made once, when
it is first run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor

from moecompile import ordering
from moecompile.bodies import copy_tree
from moecompile.local_parameters import spread_like
from moecompile.passes import pairs
from moecompile.passes.aliases import fake_of
from moecompile.passes.backward_parts import Parts, divide
from moecompile.passes.overlap import Plan, writes
from moecompile.report import GraphReport

Call = Callable[[list[Any]], Sequence[Any]]
"""Takes its arguments in a list, which it empties, so that nothing outlives its last use."""
Late = Callable[[fx.GraphModule, Plan | None], Call]
"""Compiles a graph that was made of AOTAutograd's."""


class Running(Protocol):
    """What a schedule does now."""

    def enters(self, kind: str, graph: StageGraph, args: list[Any]) -> Sequence[Any]:
        """A stage comes to its forward or backward graph."""
        ...


running: Running | None = None
"""Of this process; None where graphs run by themselves."""


@dataclass(eq=False)
class StageGraph:
    """What one captured graph became.

    Attributes:
        record: of the captured graph.
        lowering: "inductor" or "eager".
        late: compiles what is made of the graphs.
        compiled: how many times that was done, and AOTAutograd's graphs themselves, by kind.
        parameters: by stage, what of the captured graph's inputs are parameters that need gradients; None elsewhere.
    """

    record: GraphReport
    lowering: str
    late: Late | None = None
    compiled: Counter[str] = field(default_factory=Counter)
    parameters: dict[int, list[torch.nn.Parameter | None]] = field(default_factory=dict)
    _kept: dict[str, fx.GraphModule] = field(default_factory=dict)
    _run: dict[str, Call] = field(default_factory=dict)
    _divided: dict[tuple[int, ...], Divided | None] = field(default_factory=dict)

    def keep(self, kind: str, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        """Keeps a copy of AOTAutograd's graph, before it is compiled.

        What it gives keeps the strides that it was traced with: what is compiled of it later gives the same.
        """
        _keep_strides(gm)
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            self._kept[kind] = copy_tree(gm)
        for node, value in zip(self._kept[kind].graph.find_nodes(op="placeholder"), inputs, strict=True):
            if isinstance(value, Tensor):
                node.meta["val"] = value

    def called(self, kind: str, call: Call) -> Call:
        """What runs in the place of a compiled graph."""
        self._run[kind] = call
        self.compiled[kind] += 1

        def enter(args: list[Any]) -> Sequence[Any]:
            if running is None:
                return self._run[kind](args)
            return running.enters(kind, self, args)

        enter._boxed_call = True  # type: ignore[attr-defined]
        return enter

    def run(self, kind: str, args: list[Any]) -> Sequence[Any]:
        """By itself."""
        return self._run[kind](args)

    def kept(self, kind: str) -> fx.GraphModule:
        """AOTAutograd's graph."""
        return self._kept[kind]

    def first_part(self, stage: int, args: list[Any]) -> tuple[list[Any], Later] | None:
        """Runs what of a stage's backward is not put off; None, with nothing run, if nothing can be.

        Returns:
            gradients in the backward's order, None for those that are put off; and what is left to do.
        """
        later = self._gradients_of(stage)
        if (places := tuple(later)) not in self._divided:
            parts = divide(self.kept("backward"), later) if later else None
            self._divided[places] = None if parts is None else Divided(parts, self)
        divided = self._divided[places]
        return None if divided is None else divided.run(args, later)

    def made(self, kind: str, gm: fx.GraphModule, planned: Plan | None = None) -> Call:
        """Compiles what was made of the graphs."""
        assert self.late is not None
        self.compiled[kind] += 1
        _keep_strides(gm)
        return self.late(gm, planned)

    def _gradients_of(self, stage: int) -> dict[int, torch.nn.Parameter]:
        """By place among the backward's outputs: of which of a stage's parameters it is the gradient.

        Of sharded parameters (DTensor) that the graph reads as such there are parts alone, which AOTAutograd puts
        together: they are not put off (`moecompile.local_parameters`).
        """
        given = self.parameters.get(stage, [])
        (output,) = self.kept("backward").graph.find_nodes(op="output")
        found = {}
        for place, what in enumerate(output.meta.get("desc", ())):
            number = getattr(getattr(what, "grad_of", None), "idx", None)
            if number is not None and (parameter := given[number]) is not None:
                found[place] = parameter
        return found


@dataclass
class Divided:
    """A backward in two parts, each compiled when it first runs."""

    parts: Parts
    of: StageGraph
    _run: dict[str, Call] = field(default_factory=dict)

    def run(self, args: list[Any], owners: Mapping[int, torch.nn.Parameter]) -> tuple[list[Any], Later]:
        """The first part. `owners` are parameters, by the places of their gradients among the backward's."""
        kept = [args[place] for place in self.parts.kept]
        found = [*self._call("first part", self.parts.first, args)]
        count = len(self.parts.at_once)
        gradients: list[Any] = [None] * (count + len(self.parts.later))
        for place, gradient in zip(self.parts.at_once, found, strict=False):
            gradients[place] = gradient
        return gradients, Later(self, kept + found[count:], [owners[place] for place in self.parts.later])

    def second(self, args: list[Any]) -> Sequence[Any]:
        """The gradients that were put off."""
        with torch.no_grad():
            return self._call("second part", self.parts.second, args)

    def _call(self, kind: str, gm: fx.GraphModule, args: list[Any]) -> Sequence[Any]:
        if kind not in self._run:
            self._run[kind] = self.of.made(kind, gm)
        return self._run[kind](args)


@dataclass
class Later:
    """What is left of one backward."""

    divided: Divided
    given: list[Any]
    parameters: list[torch.nn.Parameter]

    def __call__(self) -> None:
        """Computes the gradients and hands them to the parameters, whose hooks run then."""
        given: Iterable[Any] = zip(self.parameters, self.divided.second(self.given), strict=True)
        gradients = [spread_like(each, part) if isinstance(each, DTensor) else part for each, part in given]
        torch.autograd.backward(self.parameters, gradients)


class Pair:
    """A forward graph and a backward graph as one, compiled.

    Args:
        forward: the graph with that forward.
        backward: with that backward.
    """

    def __init__(self, forward: StageGraph, backward: StageGraph) -> None:
        (output,) = backward.kept("backward").graph.find_nodes(op="output")
        self._gradients = len(output.args[0])
        merged = pairs.paired(backward.kept("backward"), forward.kept("forward"))
        trace_again(merged)
        kind = f"pair {forward.compiled['pair'] + 1}"  # the same on all ranks
        forward.record.notes.append(f"{kind}: with the backward of graph {backward.record.index}")
        planned = ordering.order(kind, merged, forward.record, forward.lowering == "inductor", parts=2)
        self._run = forward.made("pair", merged, planned)

    def run(self, of_backward: list[Any], of_forward: list[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """What the backward gives, and what the forward gives."""
        args = [*of_backward, *of_forward]
        of_backward.clear()
        of_forward.clear()
        found = self._run(args)
        return found[: self._gradients], found[self._gradients :]


def why_apart(forward: StageGraph, backward: StageGraph) -> str:
    """Why these graphs are not run as one, if they are not; this rank's reason alone."""
    if forward.lowering != backward.lowering:
        return "they are lowered differently"
    if forward.lowering == "inductor" and not ordering.inductor_keeps_orders():
        return f"Inductor keeps no order in torch {torch.__version__}: {ordering.KEEPS_FROM} is needed"
    if forward.record.parts > 1 or backward.record.parts > 1:
        return "one of them has its batch in halves already (`microbatches`)"
    found = pairs.obstacle([forward.kept("forward"), backward.kept("backward")])
    if found:
        return found
    if any(_writes_inputs(graph) for graph in (forward.kept("forward"), backward.kept("backward"))):
        return "one of them writes into what it is given"
    return ""


def trace_again(gm: fx.GraphModule) -> None:
    """Gives all nodes example values of one trace. Sizes have to be numbers."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        inputs = [_like(fake_of(node)) for node in gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*inputs)


def _like(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _writes_inputs(gm: fx.GraphModule) -> bool:
    given = {*gm.graph.find_nodes(op="placeholder")}
    return any(writes(node) and not given.isdisjoint(node.all_input_nodes) for node in gm.graph.nodes)


def _keep_strides(gm: fx.GraphModule) -> None:
    """Has Inductor give results the strides that they were traced with."""
    (output,) = gm.graph.find_nodes(op="output")
    places = [place for place, each in enumerate(output.args[0]) if isinstance(each, fx.Node)]
    output.meta["user_visible_output_idxs"] = places
