"""The option `overlap`: graphs of AOTAutograd's are ordered so that what travels between ranks is hidden.

    for each graph, forward and backward, when it is compiled:
        plan an order (passes/overlap.py), with what it costs on this device
        all ranks that it exchanges something with agree on the order of what communicates, when they first compile a
            graph with this communication: the one that they have; or one of theirs, if that costs none of them
            anything; or the given one
        move nodes into the best order that has it, and have Inductor keep that

What is agreed on holds for all graphs with the same communication, of whatever sizes: who compiles one once more, for
other sizes, meets nobody.

Inductor orders operators anew, by what memory they need. What begins or awaits communication, and what computes for a
while, is chained to what comes before it, so that the order survives; the rest is free to be fused.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence

import sympy
import torch
from packaging.version import Version
from torch import fx

from moecompile.agreement import hear
from moecompile.passes import hardware
from moecompile.passes.costs import expression
from moecompile.passes.effects import group_of
from moecompile.passes.list_schedule import Timeline
from moecompile.passes.overlap import Plan, communication, move, plan, send_aside
from moecompile.report import GraphReport

log = logging.getLogger("moecompile")
KEEPS_FROM = "2.13"
"""The first torch whose Inductor takes control dependencies between operators that have gradients elsewhere."""
NOT_OURS = "what communicates comes in the order that all ranks have agreed on"
GUESS = 128
"""Of a size that nobody knows."""
CURE = "Each of them has to call the model, with the same options; or leave out `overlap`"
_agreed: dict[str, tuple[int, ...]] = {}
"""By what graphs communicate: the order that all ranks have it in."""
_reasons: dict[str, str] = {}
"""By what ranks were to do together: why they do not."""


def order(
    kind: str, gm: fx.GraphModule, record: GraphReport, fuses: bool = False, parts: int = 1,
    measured: Mapping[str, float] | None = None,
) -> Plan | None:  # fmt: skip
    """Orders a graph in place, and says so in its record; what was planned if there is anything to hide.

    Args:
        kind: "forward", "backward", or "pair" and its number.
        gm: of AOTAutograd's.
        record: of the graph that it belongs to.
        fuses: whether Inductor is to compile it.
        parts: of a batch, or micro-batches, that the graph runs one after the other.
        measured: seconds that nodes take, by their names, in place of what is predicted of them.

    Raises:
        DisagreementError: not all ranks compile such a graph.
    """
    if not exchanges(gm.graph):
        return None
    again = functools.partial(predicted, gm.graph, fuses, parts, measured)
    agreed, found = _agree(kind.partition(" ")[0], gm.graph, again)
    if found is None:
        record.notes.append(f"overlap: {kind}: nothing is ordered, for there are sizes that nobody knows yet")
        return None
    if found.moves:
        move(gm.graph, found.order)
    send_aside(gm.graph)
    gm.recompile()
    record.notes.append(f"overlap: {kind}: {_words(found)}{'' if agreed else f'; {NOT_OURS}'}")
    record.planned[kind] = found
    return found


def exchanges(graph: fx.Graph) -> bool:
    """Whether it exchanges anything with other ranks."""
    return any(group_of(node) is not None for node in graph.nodes)


def is_known(kind: str, graph: fx.Graph) -> bool:
    """Whether ranks have agreed on what communicates in such a graph, of whatever sizes."""
    return _key(kind, graph) in _agreed


def predicted(
    graph: fx.Graph, fuses: bool, parts: int, measured: Mapping[str, float] | None = None,
    permutation: Sequence[int] | None = None, guess: bool = False,
) -> Plan | None:  # fmt: skip
    """The better order of a graph, if there is one, on this device; None if there are sizes that nobody knows yet.

    Args:
        graph: with example values.
        fuses: whether Inductor is to compile it.
        parts: of the batch that it has.
        measured: seconds that nodes take, by their names.
        permutation: of what communicates, which the order is to have.
        guess: sizes that nobody knows.
    """
    sizes = _sizes(graph, guess)
    if sizes is None:
        return None
    return plan(graph, _device(), sizes, fuses=fuses, parts=parts, measured=measured, permutation=permutation)


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
    _reasons.clear()


def agreed_reason(what: str, graphs: Sequence[fx.Graph], reason: str) -> str:
    """Why one of the ranks cannot do this with the graphs, if one cannot: all that they exchange something with say.

    Ranks meet when they first are to do it with graphs of this communication, and remember.

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
    key = " ".join([what, *(_key("", graph) for graph in graphs)])
    if key not in _reasons:
        subject = " ".join([what, *(_content("", graph) for graph in graphs)])
        _reasons[key] = next(filter(None, hear(reason, subject, groups, CURE)), "")
    return _reasons[key]


def _agree(kind: str, graph: fx.Graph, again: Callable[..., Plan | None]) -> tuple[bool, Plan | None]:
    """The best order in which what communicates comes as all ranks have it; and whether that is also the best of all.

    Args:
        kind: of graph.
        graph: which communicates.
        again: plans an order, maybe in a `permutation` of what communicates.
    """
    found, key = again(), _key(kind, graph)
    if key not in _agreed:
        _agreed[key] = _meet(_content(kind, graph), graph, found, again)
    agreed = _agreed[key]
    if found is not None and found.permutation == agreed:
        return True, found
    given = [*agreed] == sorted(agreed)
    if found is None and given:
        return True, None
    return False, again(permutation=agreed, guess=True)


def _meet(subject: str, graph: fx.Graph, found: Plan | None, again: Callable[..., Plan | None]) -> tuple[int, ...]:
    """The order of what communicates that all ranks have, or that costs none of them anything; else the given one."""
    groups, given = _groups(graph), tuple(range(len(communication(graph))))
    mine = None if found is None else found.permutation
    heard = [json.loads(each) for each in hear(json.dumps(mine), f"order {subject}", groups, CURE)]
    known = [tuple(each) for each in heard if each is not None]
    wanted = next((each for each in known if each != given), given)
    if len(known) == len(heard) and {*known} == {wanted}:
        return wanted
    planned = again(permutation=wanted) if found is not None and wanted != given else None
    fits = planned is not None and planned.fits
    heard_again = hear("yes" if fits else "no", f"order {subject}, of another rank", groups, CURE)
    return wanted if {*heard_again} == {"yes"} else given


def _key(kind: str, graph: fx.Graph) -> str:
    """What graphs of this rank's communicate alike."""
    return _digest([kind, *communication(graph)])


def _content(kind: str, graph: fx.Graph) -> str:
    """The same, as all ranks know it: groups have other names on other ranks."""
    numbers: dict[str, int] = {}
    found = [(target, numbers.setdefault(group, len(numbers)), after) for target, group, after in communication(graph)]
    return _digest([kind, *found])


def _digest(words: object) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _groups(graph: fx.Graph) -> list[str]:
    """Of ranks that the graph exchanges something with."""
    return sorted({group for node in graph.nodes if (group := group_of(node)) is not None})


def _sizes(graph: fx.Graph, guess: bool = False) -> dict[sympy.Symbol, int] | None:
    """Numbers for the graph's symbols, of the call that is being compiled; None if one has none, and is not guessed."""
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
    if guess:
        found = dict.fromkeys(met, GUESS) | found
    return found if met <= found.keys() else None


def _device() -> hardware.Hardware:
    """What costs are reckoned for: this GPU; or, where it is not known or there is none, another."""
    known = hardware.like(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return known or hardware.named(hardware.DEFAULT)


def _words(found: Plan) -> str:
    """What is predicted, or was measured."""
    reckoned = "measured" if found.unmeasured else f"predicted of {device_title()}"
    also = "" if found.predicted is None else f"; predicted of {device_title()}: {_times(found.predicted)}"
    if not found.moves:
        return f"its order stays, {reckoned}: {_times(found.before)}{also}"
    return f"ordered, {reckoned}: {_times(found.after)}; as it came {_times(found.before)}{also}"


def _times(timeline: Timeline) -> str:
    return f"{1e6 * timeline.makespan:.0f} us, of which {1e6 * timeline.exposed:.0f} wait for other ranks"
