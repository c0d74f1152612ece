"""Order a graph so that what travels between ranks does so while others compute.

Contract
- On entry the graph is one of AOTAutograd's, forward, backward or both merged, with example values.
- Communication is in two halves: moecompile's exchanges, and PyTorch's functional collectives with `wait_tensor`.
- Nodes move and nothing else changes: each stays behind what it reads. What writes into something stays between those
  that read it before and after; what draws random numbers, has an effect or is not known to be pure stays in its order,
  and so do exchanges that have the same slot of the kernels' memory, with their waits.
- The order is the given one unless another is predicted to be faster by GAIN (`moecompile.passes.list_schedule`), and
  to hold no more than the given one does, or than there is budget for.
- Communication may come in another order than before. All ranks have to run it in the same one: the caller sees to it.

    tasks = one for each node, with the parts that are taken from it
    order = list schedule of the tasks, with what they cost on this hardware
    move nodes into that order, if it is better
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from moecompile.passes.aliases import Aliases
from moecompile.passes.costs import COLLECTIVES, STARTS, bytes_of, cost_of
from moecompile.passes.hardware import Hardware
from moecompile.passes.joint_graph import argument, operator_of
from moecompile.passes.list_schedule import Sending, Task, Timeline, better, simulate

ops, c10d = torch.ops.moecompile, torch.ops._c10d_functional
GAIN = 0.03
"""A prediction is no more exact than that: with less to gain, the order stays."""
WAITS = (*STARTS.values(), c10d.wait_tensor)
EXCHANGES = (*STARTS.keys(), *STARTS.values())
Sizes = Mapping[sympy.Symbol, int]


@dataclass(frozen=True)
class Overlap:
    """What is predicted of a graph.

    Attributes:
        before: in the order that it had.
        after: in the one that it has now; the same object if that is the old one.
        names: of the tasks.
    """

    before: Timeline
    after: Timeline
    names: tuple[str, ...]

    @property
    def moved(self) -> bool:
        """Whether nodes have moved."""
        return self.after is not self.before


def overlap(
    graph: fx.Graph, hardware: Hardware, sizes: Sizes, *, share: float = 0.0, budget: float | None = None
) -> Overlap:
    """Moves nodes in place; returns what is predicted. The caller recompiles the GraphModule.

    Args:
        graph: of AOTAutograd's.
        hardware: that it is to run on.
        sizes: numbers for its symbols.
        share: of the multiprocessors that communication takes.
        budget: bytes of results that are held at once, if that can be.
    """
    nodes = _movable(graph)
    tasks = _tasks(graph, nodes, hardware, sizes, share)
    before = simulate(tasks, range(len(tasks)))
    after = better(tasks, range(len(tasks)), GAIN, budget)
    if after.order == before.order:
        after = before
    else:
        _move(graph, [nodes[number] for number in after.order])
    return Overlap(before, after, tuple(node.name for node in nodes))


def predicted(graph: fx.Graph, hardware: Hardware, sizes: Sizes, *, share: float = 0.0) -> Timeline:
    """What is predicted of a graph as it is."""
    nodes = _movable(graph)
    return simulate(_tasks(graph, nodes, hardware, sizes, share), range(len(nodes)))


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


def _move(graph: fx.Graph, order: Sequence[fx.Node]) -> None:
    (output,) = graph.find_nodes(op="output")
    for node in order:
        for each in (node, *_parts(node)):
            output.prepend(each)


def _parts(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if _is_part(user):
            yield user
            yield from _parts(user)


def _tasks(graph: fx.Graph, nodes: Sequence[fx.Node], hardware: Hardware, sizes: Sizes, share: float) -> list[Task]:
    numbers, kept = {node: number for number, node in enumerate(nodes)}, _kept_in_order(graph)
    found = list[Task]()
    for node in nodes:
        read = {_whole(given) for given in node.all_input_nodes} | kept.get(node, set())
        after = sorted({numbers[each] for each in read if each in numbers})
        cost = cost_of(node)
        sends = None
        if cost.link is not None:
            sends = Sending(cost.sending(hardware, sizes), f"{cost.link} {cost.group}", share)
        begun = [each for each in after if _packet(node) in WAITS and found[each].sends is not None]
        held = sum((bytes_of(each) for each in (node, *_parts(node))), sympy.Integer(0))
        duration = 0.0 if sends is not None else cost.computing(hardware, sizes)
        found.append(Task(node.name, duration, tuple(after), sends, tuple(begun), float(held.subs(sizes))))
    return found


def _packet(node: fx.Node) -> object:
    target = operator_of(node)
    return getattr(target, "overloadpacket", target)


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
        for kind in _kinds(node):
            if kind in last:
                behind.add(last[kind])
            last[kind] = node
        memory = {aliases.of(given)[0] for given in node.all_input_nodes}
        behind |= {wrote[each] for each in memory & wrote.keys()}
        if _writes(node):
            behind |= {_whole(user) for each in memory for user in users.get(each, ())}
            wrote |= dict.fromkeys(memory, node)
        for each in memory:
            users.setdefault(each, []).append(node)
        behind.discard(node)
    return found


def _kinds(node: fx.Node) -> list[str]:
    """Why a node stays in its order, if it does: for a slot, or for what it does beside its results."""
    packet = _packet(node)
    if packet in EXCHANGES:
        return [f"slot {argument(node, 'slot')} of {argument(node, 'group')}"]
    if packet in COLLECTIVES or packet is c10d.wait_tensor:
        return []
    tags = getattr(operator_of(node), "tags", ())
    if torch.Tag.nondeterministic_seeded in tags or _writes(node) or node.is_impure():
        return ["effects"]
    return [] if isinstance(operator_of(node), torch._ops.OpOverload) or node.op == "get_attr" else ["effects"]


def _writes(node: fx.Node) -> bool:
    schema = getattr(operator_of(node), "_schema", None)
    return schema is not None and schema.is_mutable
