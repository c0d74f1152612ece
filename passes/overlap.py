"""Order a graph so that what travels between ranks does so while others compute.

Contract
- On entry the graph is one of AOTAutograd's, forward, backward or both merged, with example values.
- Communication is in two halves: moecompile's exchanges, and PyTorch's functional collectives with `wait_tensor`.
- Nodes move and nothing else changes: each stays behind what it reads. What writes into something stays between those
  that read it before and after; what writes, draws random numbers, has an effect or is not known to be pure stays in
  its order, and so do exchanges that have the same slot of the kernels' memory, with their waits. The two graphs of a
  pair (passes/pairs.py) write nothing in common: of each, writes and random numbers stay in their order.
- The order is the given one unless another is predicted to be faster by GAIN (`moecompile.passes.list_schedule`), and
  to hold no more than MEMORY times what the given one does.
- Communication may come in another order than before. All ranks have to run it in the same one: the caller sees to it.

    tasks = one for each node, with the parts that are taken from it
    order = list schedule of the tasks, with what they cost on this hardware
    move nodes into that order, if it is better and all ranks have it
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from moecompile.passes.aliases import Aliases
from moecompile.passes.costs import COLLECTIVES, STARTS, bytes_of, cost_of, held_by
from moecompile.passes.hardware import Hardware
from moecompile.passes.joint_graph import argument, operator_of, packet_of
from moecompile.passes.list_schedule import ScheduleError, Sending, Task, Timeline, better, simulate

ops, c10d = torch.ops.moecompile, torch.ops._c10d_functional
GAIN = 0.03
"""A prediction is no more exact than that: with less to gain, the order stays."""
MEMORY = 1.1
"""How many times what the given order holds at once, with the graph's inputs."""
WAITS = (*STARTS.values(), c10d.wait_tensor)
EXCHANGES = (*STARTS.keys(), *STARTS.values())
WHOLE = (
    *(ops.exchanged_experts, ops.exchanged_experts_forward),
    *(ops.exchanged_experts_backward, ops.exchanged_experts_backward_adding),
)
"""What has two exchanges in it, there and back, of which the second has the slot after the first's."""
GATHERS = (ops.gather_experts, ops.scatter_gradient)
"""What all ranks of a group run together, and awaits them at once."""
PARTS = ("backward", "forward")
"""Of a pair of two graphs: which of them a node is of, where it is of one."""
PART = "moecompile_part"
"""Under which nodes tell that."""
DRAWS = tuple(
    getattr(torch.ops.higher_order, name)
    for name in ("run_and_save_rng_state", "run_with_rng_state", "graphsafe_run_with_rng_state")
)
"""What draws random numbers of a state, in a region that is computed again."""
Sizes = Mapping[sympy.Symbol, int]


@dataclass(frozen=True)
class Plan:
    """What is predicted of a graph.

    Attributes:
        before: in the order that it has.
        after: in the better one; the same object if there is none.
        tasks: one for each node, by its name, as they come now.
        anchors: of these the ones that begin or await communication, or compute for a while.
        most: bytes that a better order may hold.
        unmeasured: the tasks as they are predicted, where what nodes take was measured; none where nothing was.
    """

    before: Timeline
    after: Timeline
    tasks: tuple[Task, ...]
    anchors: frozenset[str]
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
    def fits(self) -> bool:
        """Whether it takes no longer than in the given order, and holds no more than it may."""
        longest, most = self.before.makespan, max(self.most, self.before.peak)
        return self.after.makespan <= longest and self.after.peak <= most

    def in_order(self, order: Sequence[int]) -> Plan:
        """The same of another rank's order."""
        known = {self.after.order: self.after, self.before.order: self.before}
        return replace(self, after=known.get(tuple(order)) or simulate(self.tasks, order))


def plan(
    graph: fx.Graph, hardware: Hardware, sizes: Sizes, *, fuses: bool = False, share: float = 0.0,
    memory: float = MEMORY, parts: int = 1, measured: Mapping[str, float] | None = None,
) -> Plan:  # fmt: skip
    """The better order, if there is one, and what is predicted of both.

    Args:
        graph: of AOTAutograd's.
        hardware: that it is to run on.
        sizes: numbers for its symbols.
        fuses: whether what is computed by element is fused with those that alone read it, and so costs nothing.
        share: of the multiprocessors that communication takes.
        memory: how many times what the given order holds at once, with the graph's inputs, the better one may.
        parts: of a batch that the given order runs one after the other. It holds what one of them needs, and a better
            one may hold what all do.
        measured: seconds that nodes took by themselves, by their names; what is missing is predicted.
    """
    nodes = _movable(graph)
    known = _tasks(graph, nodes, hardware, sizes, share, _fused(graph) if fuses else frozenset())
    tasks = known if measured is None else _as_measured(known, nodes, measured)
    before = simulate(tasks, range(len(tasks)))
    inputs = float(sum((held_by(node) for node in graph.find_nodes(op="placeholder")), sympy.Integer(0)).subs(sizes))
    most = memory * (inputs + parts * before.peak) - inputs
    after = better(tasks, before, GAIN, most)
    anchors = {task.name for task in tasks if task.sends or task.receives or task.duration > 2 * hardware.launch}
    found = before if after.order == before.order else after
    return Plan(before, found, tuple(tasks), frozenset(anchors), most, () if measured is None else tuple(known))


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


def kinds_of(node: fx.Node) -> list[str]:
    """Why a node stays in its order, if it does: for a slot, or for what it does beside its results."""
    packet = packet_of(node)
    if packet in EXCHANGES or packet in WHOLE:
        slots = range(argument(node, "slot"), argument(node, "slot") + (2 if packet in WHOLE else 1))
        return [f"slot {slot} of {argument(node, 'group')}" for slot in slots]
    if packet in GATHERS:
        return [f"gathers of {argument(node, 'group')}"]
    if packet in COLLECTIVES or packet in (c10d.wait_tensor, operator.getitem) or node.op == "get_attr":
        return []
    tags = getattr(operator_of(node), "tags", ())
    if torch.Tag.nondeterministic_seeded in tags or writes(node) or packet in DRAWS:
        return [f"effects {node.meta.get(PART, '')}"]
    if node.is_impure() or not isinstance(operator_of(node), torch._ops.OpOverload):
        return [f"effects {part}" for part in ("", *PARTS)]
    return []


def _movable(graph: fx.Graph) -> list[fx.Node]:
    """All nodes but inputs and output, and but the parts that go with what they are taken from."""
    return [node for node in graph.nodes if node.op not in ("placeholder", "output") and not _is_part(node)]


def _is_part(node: fx.Node) -> bool:
    return node.target is operator.getitem and _whole(node).op != "placeholder"


def _whole(node: fx.Node) -> fx.Node:
    """What a part is taken from."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _parts(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if _is_part(user):
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
    graph: fx.Graph, nodes: Sequence[fx.Node], hardware: Hardware, sizes: Sizes, share: float,
    fused: frozenset[fx.Node],
) -> list[Task]:  # fmt: skip
    numbers, kept = {node: number for number, node in enumerate(nodes)}, _kept_in_order(graph)
    found = list[Task]()
    for node in nodes:
        read = {_whole(given) for given in node.all_input_nodes} | kept.get(node, set())
        after = sorted({numbers[each] for each in read if each in numbers})
        cost = cost_of(node)
        sends = None
        if cost.link is not None:
            sends = Sending(cost.sending(hardware, sizes), f"{cost.link} {cost.group}", share)
        begun = [each for each in after if packet_of(node) in WAITS and found[each].sends is not None]
        held = sympy.Integer(0) if node in fused else bytes_of(node)
        duration = 0.0 if sends is not None or node in fused else cost.computing(hardware, sizes)
        found.append(Task(node.name, duration, tuple(after), sends, tuple(begun), float(held.subs(sizes))))
    return found


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


def _kept_in_order(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Of nodes, those that they stay behind although they do not read them."""
    found, aliases = dict[fx.Node, set[fx.Node]](), Aliases(graph)
    last = dict[str, fx.Node]()  # of what stays in its order, by kind
    users: dict[fx.Node, list[fx.Node]] = {}  # of memory, by the first node that has it
    wrote: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or _is_part(node):
            continue
        behind = found.setdefault(node, set())
        for kind in kinds_of(node):
            if kind in last:
                behind.add(last[kind])
            last[kind] = node
        memory = {aliases.of(given)[0] for given in node.all_input_nodes}
        behind |= {wrote[each] for each in memory & wrote.keys()}
        if writes(node):
            behind |= {_whole(user) for each in memory for user in users.get(each, ())}
            wrote |= dict.fromkeys(memory, node)
        for each in memory:
            users.setdefault(each, []).append(node)
        behind.discard(node)
    return found


def writes(node: fx.Node) -> bool:
    """Whether it writes into something that it is given."""
    schema = getattr(operator_of(node), "_schema", None)
    return schema is not None and schema.is_mutable
