"""Order a graph so that what travels between ranks does so while others compute.

Contract
- On entry the graph is one of AOTAutograd's, forward, backward or both merged, with example values.
- Communication is in two halves: moecompile's exchanges, and PyTorch's functional collectives with `wait_tensor`.
- Nodes move and nothing else changes: each stays behind what it reads, and behind what it has to stay behind for what
  it does beside its results (passes/effects.py).
- The order is the given one unless another (`moecompile.passes.order_search`) is predicted to be faster by GAIN, and to
  hold no more than MEMORY times what the given one does.
- Communication may come in another order than before. All ranks have to run it in the same one: the caller sees to it,
  and may ask for one, which is then kept even if it is no faster.

    tasks = one for each node, with the parts that are taken from it
    order = the best that is found for the tasks, with what they cost on this hardware
    move nodes into that order, if it is better and all ranks have it
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from moecompile.passes.costs import STARTS, bytes_of, cost_of, held_by
from moecompile.passes.effects import EXCHANGES, WAITS, group_of, is_part, kept_in_order, whole
from moecompile.passes.hardware import Hardware
from moecompile.passes.joint_graph import argument, packet_of
from moecompile.passes.list_schedule import ScheduleError, Sending, Task, Timeline, simulate
from moecompile.passes.order_search import best, better

GAIN = 0.03
"""A prediction is no more exact than that: with less to gain, the order stays."""
MEMORY = 1.1
"""How many times what the given order holds at once, with the graph's inputs."""
Sizes = Mapping[sympy.Symbol, int]


@dataclass(frozen=True)
class Plan:
    """What is predicted of a graph.

    Attributes:
        before: in the order that it has.
        after: in the better one; the same object if there is none.
        tasks: one for each node, by its name, as they come now.
        anchors: of these the ones that begin or await communication, or compute for a while.
        communicating: numbers of the tasks that all ranks have to run in the same order.
        most: bytes that a better order may hold.
        unmeasured: the tasks as they are predicted, where what nodes take was measured; none where nothing was.
    """

    before: Timeline
    after: Timeline
    tasks: tuple[Task, ...]
    anchors: frozenset[str]
    communicating: tuple[int, ...] = ()
    most: float = math.inf
    unmeasured: tuple[Task, ...] = ()

    @property
    def predicted(self) -> Timeline | None:
        """Of the better order, what is predicted of it, where what nodes take was measured."""
        return simulate(self.unmeasured, self.after.order) if self.unmeasured else None

    @property
    def moves(self) -> bool:
        """Whether there is a better order."""
        return self.after is not self.before

    @property
    def order(self) -> tuple[str, ...]:
        """Names of nodes in the better order."""
        return tuple(self.tasks[number].name for number in self.after.order)

    @property
    def permutation(self) -> tuple[int, ...]:
        """Of what communicates, as it was given and numbered from 0 on: the better order."""
        places = {number: place for place, number in enumerate(self.communicating)}
        return tuple(places[number] for number in self.after.order if number in places)

    @property
    def fits(self) -> bool:
        """Whether it takes no longer than in the given order, and holds no more than it may."""
        longest, most = self.before.makespan, max(self.most, self.before.peak)
        return self.after.makespan <= longest and self.after.peak <= most


def plan(
    graph: fx.Graph, hardware: Hardware, sizes: Sizes, *, fuses: bool = False, memory: float = MEMORY,
    parts: int = 1, measured: Mapping[str, float] | None = None,
    permutation: Sequence[int] | None = None,
) -> Plan:  # fmt: skip
    """The better order, if there is one, and what is predicted of both.

    Args:
        graph: of AOTAutograd's.
        hardware: that it is to run on.
        sizes: numbers for its symbols.
        fuses: whether what is computed by element is fused with those that alone read it, and so costs nothing.
        memory: how many times what the given order holds at once, with the graph's inputs, the better one may.
        parts: of a batch that the given order runs one after the other. It holds what one of them needs, and a better
            one may hold what all do.
        measured: seconds that nodes took by themselves, by their names; what is missing is predicted.
        permutation: of what communicates, which the order is to have.

    Raises:
        ScheduleError: what communicates cannot come so.
    """
    nodes = _movable(graph)
    known = _tasks(graph, nodes, hardware, sizes, _fused(graph) if fuses else frozenset())
    tasks = known if measured is None else _as_measured(known, nodes, measured)
    communicating = tuple(number for number, node in enumerate(nodes) if group_of(node) is not None)
    before = simulate(tasks, range(len(tasks)))
    inputs = float(sum((held_by(node) for node in graph.find_nodes(op="placeholder")), sympy.Integer(0)).subs(sizes))
    most = memory * (inputs + parts * before.peak) - inputs
    after = _in_permutation(tasks, before, communicating, permutation, most)
    anchors = {task.name for task in tasks if task.sends or task.receives or task.duration > 2 * hardware.launch}
    anchors |= {nodes[number].name for number in communicating}
    found = before if after.order == before.order else after
    unmeasured = () if measured is None else tuple(known)
    return Plan(before, found, tuple(tasks), frozenset(anchors), communicating, most, unmeasured)


def communication(graph: fx.Graph) -> list[tuple[str, str, tuple[int, ...]]]:
    """What communicates, in its order: its operator, its group, and what of that before it comes first in any order.

    It is the same for whatever sizes, and on all ranks, but for the groups' names.
    """
    nodes = _movable(graph)
    behind = list[int]()  # of each node, a bit for each of what communicates that it comes after
    found = list[tuple[str, str, tuple[int, ...]]]()
    for node, after in zip(nodes, _after(graph, nodes), strict=True):
        bits = functools.reduce(int.__or__, (behind[each] for each in after), 0)
        group = group_of(node)
        if group is not None:
            found.append((str(node.target), group, tuple(place for place in range(len(found)) if bits >> place & 1)))
            bits |= 1 << len(found) - 1
        behind.append(bits)
    return found


def move(graph: fx.Graph, order: Sequence[str]) -> None:
    """Moves the nodes of these names, all but inputs and output, into that order. The caller recompiles the module."""
    nodes = {node.name: node for node in _movable(graph)}
    if nodes.keys() != {*order}:
        raise ScheduleError(f"expected an order of all {len(nodes)} nodes of the graph, got {len({*order})} names")
    (output,) = graph.find_nodes(op="output")
    for name in order:
        for each in (nodes[name], *_parts(nodes[name])):
            output.prepend(each)
    graph.lint()


def send_aside(graph: fx.Graph) -> int:
    """Has exchanges sent on a stream of their own between whose halves something is multiplied; how many."""
    begun, meanwhile, found = dict[tuple[object, object], fx.Node](), set[fx.Node](), 0
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        packet = packet_of(node)
        if packet in EXCHANGES:
            slot = argument(node, "group"), argument(node, "slot")
            if packet in STARTS:
                begun[slot] = node
            elif (start := begun.pop(slot, None)) in meanwhile:
                start.update_kwarg("aside", True)
                found += 1
        elif cost_of(node).operations:
            meanwhile |= {*begun.values()}
    return found


def _movable(graph: fx.Graph) -> list[fx.Node]:
    """All nodes but inputs and output, and but the parts that go with what they are taken from."""
    return [node for node in graph.nodes if node.op not in ("placeholder", "output") and not is_part(node)]


def _parts(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if is_part(user):
            yield user
            yield from _parts(user)


def _fused(graph: fx.Graph) -> frozenset[fx.Node]:
    """What is computed by element and read by nothing else than such operators and sums: never in memory."""

    def takes(node: fx.Node) -> bool:
        tags = getattr(node.target, "tags", ())
        return torch.Tag.pointwise in tags or getattr(torch.Tag, "reduction", torch.Tag.pointwise) in tags

    nodes = [node for node in graph.nodes if node.op == "call_function"]
    return frozenset(
        node
        for node in nodes
        if torch.Tag.pointwise in getattr(node.target, "tags", ()) and node.users and all(map(takes, node.users))
    )


def _tasks(
    graph: fx.Graph, nodes: Sequence[fx.Node], hardware: Hardware, sizes: Sizes, fused: frozenset[fx.Node]
) -> list[Task]:  # fmt: skip
    found = list[Task]()
    for node, after in zip(nodes, _after(graph, nodes), strict=True):
        cost = cost_of(node)
        sends = None
        if cost.link is not None:
            share = min(cost.sms, hardware.multiprocessors - 1) / hardware.multiprocessors
            sends = Sending(cost.sending(hardware, sizes), f"{cost.link} {cost.group}", share)
        begun = [each for each in after if packet_of(node) in WAITS and found[each].sends is not None]
        held = sympy.Integer(0) if node in fused else bytes_of(node)
        duration = 0.0 if sends is not None or node in fused else cost.computing(hardware, sizes)
        found.append(Task(node.name, duration, tuple(after), sends, tuple(begun), float(held.subs(sizes))))
    return found


def _after(graph: fx.Graph, nodes: Sequence[fx.Node]) -> Iterator[list[int]]:
    """Of each of the nodes, by their numbers, those that it comes after."""
    numbers, kept = {node: number for number, node in enumerate(nodes)}, kept_in_order(graph)
    for node in nodes:
        read = {whole(given) for given in node.all_input_nodes} | kept.get(node, set())
        yield sorted({numbers[each] for each in read if each in numbers})


def _in_permutation(
    tasks: Sequence[Task], before: Timeline, communicating: Sequence[int], permutation: Sequence[int] | None,
    most: float,
) -> Timeline:  # fmt: skip
    """The better order; or the best that has what communicates in this one."""
    if permutation is None:
        return better(tasks, before, GAIN, most)
    chained = [*tasks]
    for one, other in itertools.pairwise(permutation):
        first, second = communicating[one], communicating[other]
        chained[second] = replace(chained[second], after=tuple(sorted({*chained[second].after, first})))
    if [*permutation] == sorted(permutation):
        return better(chained, before, GAIN, most)
    return simulate(tasks, best(chained, most).order)


def _as_measured(tasks: Sequence[Task], nodes: Sequence[fx.Node], measured: Mapping[str, float]) -> list[Task]:
    """With what nodes took, node by node.

    Of what is sent, all that a start and its wait took is on the link, but for what the wait is predicted to compute.
    What is predicted to take no time, a view or what is fused with others, takes none.
    """
    link = {number: measured.get(task.name, 0.0) for number, task in enumerate(tasks) if task.sends is not None}
    found = list[Task]()
    for task, node in zip(tasks, nodes, strict=True):
        duration = measured.get(task.name, task.duration) if task.duration else 0.0
        if packet_of(node) in WAITS and task.receives:
            duration = min(duration, task.duration)
            link[task.receives[0]] += measured.get(task.name, duration) - duration
        found.append(replace(task, duration=duration))
    for number, seconds in link.items():
        sends = tasks[number].sends
        if sends is not None and tasks[number].name in measured:
            found[number] = replace(found[number], sends=replace(sends, duration=seconds))
    return found
