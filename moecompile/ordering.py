"""The option `overlap`: graphs of AOTAutograd's are ordered so that what travels between ranks is hidden.

    for each graph, forward and backward, when it is compiled:
        plan an order (passes/overlap.py), with what it costs on this device
        all ranks that it exchanges something with hear each other's; unless all have the same, the graph stays as it is
        move nodes into that order, and have Inductor keep it

Inductor orders operators anew, by what memory they need. What begins or awaits communication, and what computes for a
while, is chained to what comes before it, so that the order survives; the rest is free to be fused.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence

import sympy
import torch
from packaging.version import Version
from torch import distributed, fx

from moecompile import ranks
from moecompile.agreement import DisagreementError
from moecompile.passes import hardware
from moecompile.passes.costs import cost_of, expression
from moecompile.passes.list_schedule import Timeline
from moecompile.passes.overlap import Plan, move, plan, send_aside
from moecompile.report import GraphReport
from moecompile.runtime.sharded import process_group

log = logging.getLogger("moecompile")
KEEPS_FROM = "2.13"
"""The first torch whose Inductor takes control dependencies between operators that have gradients elsewhere."""
_agreed: dict[str, dict[str, tuple[int, ...] | None]] = {}
"""By what graphs communicate, and by graph: the order that all ranks have, of its tasks by number; None where they have
several, and the graph stays as it is."""


def order(
    kind: str, gm: fx.GraphModule, record: GraphReport, fuses: bool = False, parts: int = 1,
    measured: Mapping[str, float] | None = None,
) -> Plan | None:  # fmt: skip
    """Orders a graph in place, and says so in its record; what was planned if there is anything to hide.

    Args:
        kind: "forward", "backward" or which pair.
        gm: of AOTAutograd's.
        record: of the graph that it belongs to.
        fuses: whether Inductor is to compile it.
        parts: of a batch, or micro-batches, that the graph runs one after the other.
        measured: seconds that nodes take, by their names, in place of what is predicted of them.

    Raises:
        DisagreementError: not all ranks compile such a graph.
    """
    groups = _groups(gm.graph)
    if not groups:
        return None
    found = predicted(gm.graph, fuses, parts, measured)
    if found is None:
        record.notes.append(f"overlap: {kind}: nothing is ordered, for there are sizes that nobody knows yet")
        return None
    agreed = _agree(kind, gm.graph, groups, found)
    if agreed is None:
        record.notes.append(f"overlap: {kind}: nothing is ordered, for ranks would have different orders")
        return None
    if agreed.moves:
        move(gm.graph, agreed.order)
    send_aside(gm.graph)
    gm.recompile()
    record.notes.append(f"overlap: {kind}: {_words(agreed)}")
    record.planned[kind] = agreed
    return agreed


def exchanges(graph: fx.Graph) -> bool:
    """Whether it exchanges anything with other ranks."""
    return bool(_groups(graph))


def is_known(kind: str, graph: fx.Graph) -> bool:
    """Whether ranks have an order of such a graph, of whatever sizes: who compiles it once more meets nobody."""
    return _subject(graph) in _agreed.get(_meeting(kind, graph), {})


def predicted(graph: fx.Graph, fuses: bool, parts: int, measured: Mapping[str, float] | None = None) -> Plan | None:
    """The better order of a graph, if there is one, on this device; None if there are sizes that nobody knows yet.

    Args:
        graph: with example values.
        fuses: whether Inductor is to compile it.
        parts: of the batch that it has.
        measured: seconds that nodes take, by their names.
    """
    sizes = _sizes(graph)
    return None if sizes is None else plan(graph, _device(), sizes, fuses=fuses, parts=parts, measured=measured)


def device_title() -> str:
    """For people: what costs are reckoned for."""
    return _device().title


def seconds_to_move(count: int) -> float:
    """Of bytes that are read or written, on this device."""
    return _device().seconds(0.0, "float32", count)


def inductor_keeps_orders() -> bool:
    """Whether this torch's can be told to."""
    return Version(torch.__version__) >= Version(KEEPS_FROM)


def refuse_what_inductor_would_undo() -> None:
    """Raises ValueError where Inductor cannot be told to keep an order."""
    if not inductor_keeps_orders():
        raise ValueError(
            f"moecompile: the option `overlap` needs torch {KEEPS_FROM} or later with Inductor, which orders operators "
            f"anew in torch {torch.__version__}. Leave it out, or add lowering='eager'."
        )


def keep(gm: fx.GraphModule, found: Plan) -> None:
    """Has Inductor keep the order that the graph has, of what it was planned for."""
    from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
    from torch.utils._ordered_set import OrderedSet

    chain, last = dict[fx.Node, OrderedSet[fx.Node]](), None
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.name not in found.anchors:
            continue
        if last is not None and last not in node.all_input_nodes:
            chain[node] = OrderedSet([last])
        last = node
    preserve_node_ordering(gm.graph, chain)
    gm.graph.lint()
    gm.recompile()


def forget() -> None:
    """Ranks agree anew; all of them have to forget."""
    _agreed.clear()


def _agree(kind: str, graph: fx.Graph, groups: Sequence[str], found: Plan) -> Plan | None:
    """What is predicted in the order that all ranks of these groups have; None if each keeps the one that it was given.

    They meet when they first compile such a graph. Who compiles it once more, for other sizes, may be the only one.
    What communicates is the same on all of them; the rest may differ, as AOTAutograd divides forward and backward by
    the sizes that a rank has: then nobody's order is another's.
    """
    known = _agreed.setdefault(_meeting(kind, graph), {})
    subject = _subject(graph)
    if subject not in known:
        members = _members(groups)
        meeting = f"order {_meeting(kind, graph)} {len(known)}"
        heard = [json.loads(each) for each in _heard(json.dumps([subject, found.after.order]), meeting, members)]
        order = next((order for _, order in heard if order != sorted(order)), heard[0][1])
        alike = len({subject for subject, _ in heard}) == 1
        if any(each != order for _, each in heard):  # of other sizes: it has to be no worse for anybody
            fits = alike and found.in_order(order).fits
            alike = {*_heard("yes" if fits else "no", f"{meeting}, of another rank", members)} == {"yes"}
        known[subject] = tuple(order) if alike else None
    agreed = known[subject]
    return None if agreed is None else found.in_order(agreed)


def first_reason(what: str, graphs: Sequence[fx.Graph], reason: str) -> str:
    """Why one of the ranks cannot do this with the graphs, if one cannot: all that they exchange something with say.

    Args:
        what: they are to do.
        graphs: of AOTAutograd's.
        reason: this rank's, if it has one.

    Raises:
        DisagreementError: not all ranks are about to do it.
    """
    groups = sorted({group for graph in graphs for group in _groups(graph)})
    if not groups:
        return reason
    subject = f"{what} {_digest([groups, [*map(_sending, graphs)]])}"
    return next(filter(None, _heard(reason, subject, _members(groups))), "")


def _meeting(kind: str, graph: fx.Graph) -> str:
    """Of which ranks have an order."""
    return _digest([kind, *_groups(graph), *_sending(graph)])


def _subject(graph: fx.Graph) -> str:
    """The graph, of any sizes."""
    return _digest([(node.name, str(node.target)) for node in graph.nodes])


def _sending(graph: fx.Graph) -> list[str]:
    """What communicates, in its order: the same on all ranks."""
    return [str(node.target) for node in graph.nodes if cost_of(node).group is not None]


def _members(groups: Sequence[str]) -> list[int]:
    """Ranks of the job that are in any of these."""
    return sorted({rank for name in groups for rank in distributed.get_process_group_ranks(process_group(name))})


def _heard(word: str, meeting: str, members: Sequence[int]) -> list[str]:
    """What all ranks say; raises DisagreementError if one does not come."""
    heard = ranks.words_of_all(word, meeting, members)
    if heard is None:
        raise DisagreementError(
            f"moecompile: not all of the ranks {members}, which exchange something in this graph, compiled it within "
            f"{ranks.PATIENCE}. Each of them has to call the model, with the same options; or leave out `overlap`"
        )
    return heard


def _digest(words: object) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _groups(graph: fx.Graph) -> list[str]:
    """Of ranks that the graph exchanges something with."""
    found = {cost.group for node in graph.nodes if (cost := cost_of(node)).group is not None}
    return sorted(filter(None, found))


def _sizes(graph: fx.Graph) -> dict[sympy.Symbol, int] | None:
    """Numbers for the graph's symbols, of the call that is being compiled; None if one has none."""
    found, met = dict[sympy.Symbol, int](), set[sympy.Symbol]()
    for node in graph.nodes:
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            sizes = value.shape if isinstance(value, torch.Tensor) else [value]
            for size in sizes:
                if not isinstance(size, torch.SymInt):
                    continue
                written = expression(size)
                met |= written.free_symbols
                if isinstance(written, sympy.Symbol) and size.node.hint is not None:
                    found[written] = int(size.node.hint)
    return found if met <= found.keys() else None


def _device() -> hardware.Hardware:
    """What costs are reckoned for: this GPU; or, where it is not known or there is none, another."""
    known = hardware.like(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return known or hardware.named(hardware.DEFAULT)


def _words(found: Plan) -> str:
    """What is predicted, or was measured."""
    reckoned = "measured" if found.unmeasured else f"predicted of {device_title()}"
    if not found.moves:
        return f"its order stays, {reckoned}: {_times(found.before)}"
    return f"ordered, {reckoned}: {_times(found.after)}; as it was {_times(found.before)}"


def _times(timeline: Timeline) -> str:
    return f"{1e6 * timeline.makespan:.0f} us, of which {1e6 * timeline.exposed:.0f} wait for other ranks"
