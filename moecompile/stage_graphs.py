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
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor

from moecompile import ordering
from moecompile.bodies import copy_tree
from moecompile.local_parameters import parameter_at, spread_like
from moecompile.measuring import is_measuring
from moecompile.passes import pairs
from moecompile.passes.aliases import Aliases
from moecompile.passes.backward_parts import Parts, divide
from moecompile.passes.effects import PARTS, writes
from moecompile.passes.joint_graph import FUNCTIONALIZED
from moecompile.passes.overlap import Plan
from moecompile.report import GraphReport
from moecompile.sized_graphs import SizedGraph, trace_again

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
        seconds: that nodes took, by kind of graph and by name, where that was measured (the option `profile`).
    """

    record: GraphReport
    lowering: str
    late: Late | None = None
    compiled: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, Mapping[str, float]] = field(default_factory=dict)
    _kept: dict[str, SizedGraph] = field(default_factory=dict)
    _run: dict[str, Call] = field(default_factory=dict)
    _divided: dict[tuple[fx.GraphModule, tuple[int, ...]], Divided | None] = field(default_factory=dict)
    _partners: list[StageGraph] = field(default_factory=list)
    _written: dict[str, list[int]] = field(default_factory=dict)

    def keep(self, kind: str, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        """Keeps a copy of AOTAutograd's graph, before it is compiled.

        What it gives keeps the strides that it was traced with: what is compiled of it later gives the same.
        """
        keep_strides(gm)
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            kept = copy_tree(gm)
        for node, value in zip(kept.graph.find_nodes(op="placeholder"), inputs, strict=True):
            if isinstance(value, Tensor):
                node.meta["val"] = value
        self._kept[kind] = SizedGraph(kept, self.record.name)

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
        return self._kept[kind].whole

    def sized(self, kind: str, args: Sequence[Any]) -> fx.GraphModule:
        """The same with numbers for its sizes, those of this call; one object for each of its sizes."""
        return self._kept[kind].of(args)

    def number_of(self, partner: StageGraph) -> int:
        """Of the graphs whose backward has been in a pair with this forward, from 1 on: the same on all ranks."""
        if partner not in self._partners:
            self._partners.append(partner)
        return self._partners.index(partner) + 1

    def written(self, kind: str) -> list[int]:
        """Places of the inputs that AOTAutograd's graph writes into."""
        if kind not in self._written:
            self._written[kind] = _written(self.kept(kind).graph)
        return self._written[kind]

    def measures(self, kind: str) -> bool:
        """Whether its nodes are still to be measured, by calls of it alone."""
        return is_measuring(self._run.get(kind))

    def first_part(self, args: list[Any]) -> tuple[list[Any], Later] | None:
        """Runs what of a backward is not put off; None, with nothing run, if nothing can be, or is yet.

        Autograd is at the node that calls the backward.

        Returns:
            gradients in the backward's order, None for those that are put off; and what is left to do.
        """
        if self.measures("backward"):
            return None
        later, graph = self._owners(), self.sized("backward", args)
        if (key := (graph, tuple(later))) not in self._divided:
            parts = divide(graph, later) if later else None
            self._divided[key] = None if parts is None else Divided(parts, self)
        divided = self._divided[key]
        return None if divided is None else divided.run(args, later)

    def made(self, kind: str, gm: fx.GraphModule, planned: Plan | None = None) -> Call:
        """Compiles what was made of the graphs."""
        assert self.late is not None
        self.compiled[kind] += 1
        keep_strides(gm)
        return self.late(gm, planned)

    def _owners(self) -> dict[int, nn.Parameter]:
        """By place among the backward's outputs: whose gradient it is, of parameters that may get it later.

        The backward gives one for each of the forward's inputs, and autograd's node has an edge for each that is a
        tensor. Parameters with hooks are left out: autograd would call these now, with what there is of a gradient. Of
        sharded parameters (DTensor) that the graph reads as such there are parts alone, which AOTAutograd puts
        together: they are not put off (`moecompile.local_parameters`).
        """
        node = torch._C._current_autograd_node()
        inputs = self.kept("forward").graph.find_nodes(op="placeholder")
        tensors = [place for place, each in enumerate(inputs) if isinstance(each.meta.get("val"), Tensor)]
        if node is None or len(node.next_functions) != len(tensors):
            return {}
        (output,) = self.kept("backward").graph.find_nodes(op="output")
        plain = {n for n, what in enumerate(output.meta.get("desc", ())) if hasattr(what, "grad_of")}
        plain = {n for n in plain if hasattr(output.meta["desc"][n].grad_of, "idx")}
        found = {place: parameter_at(edge) for place, (edge, _) in zip(tensors, node.next_functions, strict=True)}
        return {
            place: each for place, each in found.items() if each is not None and place in plain and not _hooks(each)
        }


@dataclass
class Divided:
    """A backward in two parts, each compiled when it first runs."""

    parts: Parts
    of: StageGraph
    _run: dict[str, Call] = field(default_factory=dict)

    def run(self, args: list[Any], owners: Mapping[int, nn.Parameter]) -> tuple[list[Any], Later]:
        """The first part. `owners` are parameters, by the places of their gradients among the backward's."""
        kept = [args[place] for place in self.parts.kept]
        versions = _versions(kept)
        found = [*self._call("first part", self.parts.first, args)]
        count = len(self.parts.at_once)
        gradients: list[Any] = [None] * (count + len(self.parts.later))
        for place, gradient in zip(self.parts.at_once, found, strict=False):
            gradients[place] = gradient
        handed = found[count:]
        parameters = [owners[place] for place in self.parts.later]
        return gradients, Later(self, kept + handed, parameters, versions + _versions(handed))

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
    """What is left of one backward.

    Raises:
        RuntimeError: something that it needs was written into meanwhile. Autograd says the same of what it saves.
    """

    divided: Divided
    given: list[Any]
    parameters: list[nn.Parameter]
    versions: list[int]

    def __call__(self) -> None:
        """Computes the gradients and hands them to the parameters, whose hooks run then."""
        if _versions(self.given) != self.versions:
            raise RuntimeError(
                "moecompile: gradients of parameters that come later (BACKWARD_WEIGHT) need what has been written into "
                "since their BACKWARD_INPUT. Update parameters and buffers between steps of the schedule, or give "
                "copies of what the stage writes"
            )
        given: Iterable[Any] = zip(self.parameters, self.divided.second(self.given), strict=True)
        gradients = [spread_like(each, part) if isinstance(each, DTensor) else part for each, part in given]
        torch.autograd.backward(self.parameters, gradients)


class Pair:
    """A forward graph and a backward graph as one, compiled for the sizes of a call.

    Args:
        forward: the graph with that forward.
        backward: with that backward.
        sized: that backward and that forward, with numbers for their sizes.
    """

    def __init__(self, forward: StageGraph, backward: StageGraph, sized: tuple[fx.GraphModule, fx.GraphModule]) -> None:
        (output,) = sized[0].graph.find_nodes(op="output")
        self._gradients = len(output.args[0])
        merged = pairs.paired(*sized)
        trace_again(merged)
        kind = f"pair {forward.number_of(backward)}"
        forward.record.notes.append(f"{kind}: with the backward of graph {backward.record.index}")
        planned = ordering.order(
            kind, merged, forward.record, forward.lowering == "inductor", 2, _seconds(forward, backward)
        )
        self._run = forward.made("pair", merged, planned)

    def run(self, of_backward: list[Any], of_forward: list[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """What the backward gives, and what the forward gives."""
        args = [*of_backward, *of_forward]
        of_backward.clear()
        of_forward.clear()
        found = self._run(args)
        return found[: self._gradients], found[self._gradients :]


def write_into_each_other(
    forward: StageGraph, of_forward: Sequence[Any], backward: StageGraph, of_backward: Sequence[Any]
) -> bool:
    """Whether one of the graphs would write, given this, into memory that the other is given."""
    calls = (forward.written("forward"), of_forward), (backward.written("backward"), of_backward)
    for (places, given), (_, others) in (calls, calls[::-1]):
        extents = [_extent(each) for each in others] if places else []
        for start, end in (_extent(given[place]) for place in places):
            if any(start < other_end and other_start < end for other_start, other_end in extents):
                return True
    return False


def _written(graph: fx.Graph) -> list[int]:
    """Places of the inputs that a graph of AOTAutograd's writes into.

    What it has functionalized writes nothing by itself: what comes of it is copied into the input.
    """
    aliases, inputs = Aliases(graph), graph.find_nodes(op="placeholder")
    writing = [node for node in graph.nodes if writes(node) and node.target is not FUNCTIONALIZED]
    written = [each for node in writing for each in aliases.written(node)]
    return [place for place, node in enumerate(inputs) if any(aliases.share(node, each) for each in written)]


def _hooks(parameter: nn.Parameter) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _versions(values: Iterable[Any]) -> list[int]:
    """How often each has been written into."""
    return [value._version if isinstance(value, Tensor) and not value.is_inference() else 0 for value in values]


def _extent(value: Any) -> tuple[int, int]:
    """Where a tensor begins in memory, and where it ends; nowhere if it is none."""
    if not isinstance(value, Tensor) or not value.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()


def why_apart(forward: StageGraph, backward: StageGraph, sized: Sequence[fx.GraphModule]) -> str:
    """Why these graphs are not run as one, if they are not; this rank's reason alone. `sized` as of a `Pair`."""
    if forward.lowering != backward.lowering:
        return "they are lowered differently"
    if forward.lowering == "inductor" and not ordering.inductor_keeps_orders():
        return f"Inductor keeps no order in torch {torch.__version__}: {ordering.KEEPS_FROM} is needed"
    if forward.record.parts > 1 or backward.record.parts > 1:
        return "one of them has its batch in halves already (`microbatches`)"
    return pairs.obstacle(sized)


def _seconds(forward: StageGraph, backward: StageGraph) -> dict[str, float] | None:
    """What the nodes of a pair took, where both graphs were measured."""
    both = backward.seconds.get("backward"), forward.seconds.get("forward")
    if None in both:
        return None
    parts = zip(PARTS, filter(None, both), strict=True)
    return {pairs.name_in(part, name): each for part, seconds in parts for name, each in seconds.items()}


def keep_strides(gm: fx.GraphModule) -> None:
    """Has Inductor give results the strides that they were traced with."""
    (output,) = gm.graph.find_nodes(op="output")
    places = [place for place, each in enumerate(output.args[0]) if isinstance(each, fx.Node)]
    output.meta["user_visible_output_idxs"] = places
