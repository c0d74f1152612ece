"""What the nodes of a graph of AOTAutograd's do beside their results, and so which of them may change places.

    what reads something        comes after what made it
    what writes into something  between those that read it before and after
    what draws random numbers,  in their order; of a pair (moecompile/passes/pairs.py) each of the two graphs in its
    or writes                   own, since these write nothing in common
    what has other effects,     in their order, whatever it is of
    or communicates for as long
    as nobody knows
    halves of exchanges         in their order, of those that have the same slot of the kernels' memory
    gathers of experts          in their order, as all ranks of a group run them together

What communicates may change places with what else does: then all ranks have to have it in the same order.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._ops import OpOverload

from moecompile.passes.aliases import Aliases
from moecompile.passes.costs import COLLECTIVES, STARTS
from moecompile.passes.joint_graph import argument, operator_of, packet_of

ops, c10d = torch.ops.moecompile, torch.ops._c10d_functional
WAITS = (*STARTS.values(), c10d.wait_tensor)
EXCHANGES = (*STARTS.keys(), *STARTS.values())
WHOLE = (
    *(ops.exchanged_experts, ops.exchanged_experts_forward),
    *(ops.exchanged_experts_backward, ops.exchanged_experts_backward_adding),
)
"""What has two exchanges in it, there and back, of which the second has the slot after the first's."""
GATHERS = (ops.gather_experts, ops.scatter_gradient)
"""What all ranks of a group run together, and awaits them at once."""
LOCAL = (ops.own_experts, ops.among_others)
"""What is told of a group, and communicates with nobody."""
PARTS = ("backward", "forward")
"""Of a pair of two graphs: which of them a node is of, where it is of one."""
PART = "moecompile_part"
"""Under which nodes tell that."""
DRAWS = tuple(
    getattr(torch.ops.higher_order, name)
    for name in ("run_and_save_rng_state", "run_with_rng_state", "graphsafe_run_with_rng_state")
)
"""What draws random numbers of a state, in a region that is computed again."""


def group_of(node: fx.Node) -> str | None:
    """Of the ranks that it begins to exchange something with, or does as a whole; None if it does neither.

    Whatever has an argument for a group is taken to communicate, but for what awaits another, and what is known not to.
    """
    packet, operator_ = packet_of(node), operator_of(node)
    if node.op != "call_function" or packet in WAITS or packet in LOCAL or not isinstance(operator_, OpOverload):
        return None
    for each in operator_._schema.arguments:
        if each.name in ("group", "group_name"):
            found = argument(node, each.name)
            return found if isinstance(found, str) else str(found.group_name)
    return None


def kinds_of(node: fx.Node) -> list[str]:
    """Why a node stays in its order, if it does: for a slot, or for what it does beside its results."""
    packet = packet_of(node)
    if packet in EXCHANGES or packet in WHOLE:
        slots = range(argument(node, "slot"), argument(node, "slot") + (2 if packet in WHOLE else 1))
        return [f"slot {slot} of {argument(node, 'group')}" for slot in slots]
    if packet in GATHERS:
        return [f"gathers of {argument(node, 'group')}"]
    if packet in (c10d.wait_tensor, operator.getitem) or node.op == "get_attr":
        return []
    tags = getattr(operator_of(node), "tags", ())
    if torch.Tag.nondeterministic_seeded in tags or writes(node) or packet in DRAWS:
        return [f"effects {node.meta.get(PART, '')}"]
    communicates = group_of(node) is not None and packet not in COLLECTIVES
    if communicates or node.is_impure() or not isinstance(operator_of(node), OpOverload):
        return [f"effects {part}" for part in ("", *PARTS)]
    return []


def is_part(node: fx.Node) -> bool:
    """Whether it takes a part of what another node gives: it goes where that goes."""
    return node.target is operator.getitem and whole(node).op != "placeholder"


def whole(node: fx.Node) -> fx.Node:
    """What a part is taken from."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def kept_in_order(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Of nodes, those that they stay behind although they do not read them."""
    found, aliases = dict[fx.Node, set[fx.Node]](), Aliases(graph)
    last = dict[str, fx.Node]()  # of what stays in its order, by kind
    users: dict[fx.Node, list[fx.Node]] = {}  # of memory, by the first node that has it
    wrote: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or is_part(node):
            continue
        behind = found.setdefault(node, set())
        for kind in kinds_of(node):
            if kind in last:
                behind.add(last[kind])
            last[kind] = node
        memory = {aliases.of(given)[0] for given in node.all_input_nodes}
        behind |= {wrote[each] for each in memory & wrote.keys()}
        if writes(node):
            behind |= {whole(user) for each in memory for user in users.get(each, ())}
            wrote |= dict.fromkeys(memory, node)
        for each in memory:
            users.setdefault(each, []).append(node)
        behind.discard(node)
    return found


def writes(node: fx.Node) -> bool:
    """Whether it writes into something that it is given."""
    schema = getattr(operator_of(node), "_schema", None)
    return schema is not None and schema.is_mutable
