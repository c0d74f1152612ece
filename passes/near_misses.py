"""Name the blocks that were not rewritten: what they resemble, what differed first, and the cure if there is one.

Experts' products (grouped GEMMs, products with weights looked up by expert, products of rows that chose one expert)
that no Site covers are a near miss. The reason is the one that a refused sum gave; if a tensor inside it was not
understood, the operation that made it so; else the first operation after the product that no rule explains. Turns of
one loop belong together: they are known by the ids that their rows were chosen by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import fx

from moecompile.passes import terms
from moecompile.passes.aliases import fake_of
from moecompile.passes.bins import concerns_bins
from moecompile.passes.branches import branches
from moecompile.passes.forms import ANCHORS, Traces, resembled_form
from moecompile.passes.interpret import Combine, Interpretation, Refused, is_plain, is_routed, walk
from moecompile.passes.provenance import common_module, source_of
from moecompile.passes.rules_loop import Partial
from moecompile.passes.site import NearMiss, Site
from moecompile.passes.spelling import not_understood, operation_name
from moecompile.passes.terms import Content, Contract, Element, Equals, Special

# how far a reason is looked for, in nodes: a block has some dozens, a model has thousands
_REACH = 80

_ALL_TO_ALL = "all_to_all_single"
_NOT_SUMMED = "the experts' results are not summed into tokens the way a known form does"

# transformers' "all_reduce", and code that is like it
_MASKED = (
    "rows whose experts lie on other ranks are masked (all-reduce expert parallelism: all ranks compute all tokens)"
)
UNKNOWN_TOKENS = "a rank's number of tokens is symbolic, so nobody knows how much room the others need for it"
EXCHANGE = (
    'before loading: moecompile.register_transformers() and DistributedConfig(..., ep_implementation="moecompile"); or '
    "load without ep_size, and moecompile.shard_experts(model, mesh)"
)

# operations that are known to be something else than arithmetic of single elements, and what they are
_BETWEEN = {
    **dict.fromkeys(
        "rms_norm layer_norm group_norm batch_norm instance_norm normalize softmax log_softmax cumsum".split(),
        "is not elementwise",
    ),
    **dict.fromkeys(
        "dropout alpha_dropout feature_dropout feature_alpha_dropout bernoulli rand_like randn_like".split(),
        "is random",
    ),
}

# part of a reason -> what the user can do
_CURES: tuple[tuple[str, str], ...] = (
    (
        "no_grad, autocast or another mode",
        "let the whole block run in one mode: begin or end it before the experts or after their sum",
    ),
    ("autocast changes", "disable autocast around the experts, or cast their tokens and weights to one dtype"),
    ("mixed dtypes", "cast the tokens to the weights' dtype before the experts"),
    (
        "is also used by",
        "compute what is needed outside from the block's result, or from its tokens and routing values",
    ),
    ("writes into", "write a new tensor instead of changing this one in place"),
    (
        "adapter inside the experts",
        "merge the adapter into the experts' weights before the product, `w + a @ b`: that is found",
    ),
    (_MASKED, EXCHANGE),
    (
        UNKNOWN_TOKENS,
        "give all ranks the option `ep_capacity`, the most tokens of a rank, or compile with dynamic=False",
    ),
    ("ids may lie outside", "choose the experts with topk or argmax over as many scores as the loop has turns"),
)


def near_misses(
    state: Interpretation, sites: Sequence[Site], refused: Sequence[tuple[Combine, Refused]]
) -> list[NearMiss]:
    """One near miss for each group of connected expert products that no Site covers, in program order."""
    covered = {node for site in sites for node in site.region}
    loops = _loops(state)
    misses: list[NearMiss] = []
    for combine, reason in refused:
        if combine.node in covered or not _sums_experts(combine):
            continue
        block = set(_reachable([combine.node], lambda node: node.all_input_nodes))
        products = [node for node in block if _is_product(node, state) and node not in covered]
        if products:
            # a sum may be what makes the form, and the refusal may be of rows before it
            after = set(islice(_reachable(combine.node.users, lambda node: node.users), 8))
            node, text = _first_difference(combine.node, reason, state)
            if _resembles(block, state) == "padded_bins" and (cause := state.first_refused(combine.node)) is not None:
                node, text = cause, state.refusals[cause]
            elif (cause := _lost_by_exchange(combine.node, state)) is not None:
                node, text = cause, state.refusals[cause]
            misses.append(_near_miss(node, text, block | after, [*products, combine.node], state))
            covered |= block
            for ids in dict.fromkeys(_chosen_by(node, state) for node in products):
                covered.update(loops.pop(ids, ()) if ids is not None else ())
    for ids, turns in loops.items():
        if not covered.intersection(turns):
            misses.append(_near_miss(*_loop_difference(ids, turns, state), set(turns), turns, state))
        covered.update(turns)
    for node in state.calls:
        if node in covered or not _is_product(node, state):
            continue
        block = set(_reachable([node], lambda node: node.users))
        place = (
            node
            if node in state.refusals
            else next((after for after in state.graph.nodes if after in block and after in state.refusals), node)
        )
        place = _lost_by_exchange(place, state) or place
        text = _between(place, state.refusals[place], state) if place in state.refusals else _NOT_SUMMED
        misses.append(_near_miss(place, text, block | {node}, [node], state))
        covered |= block | {node}
    for found in branches(state, covered):
        first = found.nodes[0]
        module = common_module(found.nodes)
        misses.append(NearMiss(found.form, found.reason, operation_name(first), module, source_of(first), found.cure))
        covered.update(found.nodes)
    return list(dict.fromkeys(misses))


def cure_of(reason: str) -> str | None:
    """What the user can do about a reason, where that is known."""
    return next((cure for part, cure in _CURES if part in reason), None)


def _sums_experts(combine: Combine) -> bool:
    """Whether a product of a product, or a weight looked up by expert, is in the sum."""
    return any(
        (isinstance(inner, Element) and any(isinstance(part, terms.Looked) for part in inner.index))
        or (
            isinstance(inner, Contract)
            and any(isinstance(deeper, Contract) for side in (inner.left, inner.right) for deeper in walk(side))
        )
        for inner in walk(combine.value.content)
    )


def _is_product(node: fx.Node, state: Interpretation) -> bool:
    """Whether the node multiplies rows by experts' weights."""
    call = state.calls.get(node)
    if call is None:
        return False
    if call.name in ("grouped_mm", "grouped_mm_fallback"):
        return True
    if call.name in ANCHORS and _chosen_by(node, state) is not None:
        return True
    content = state.values[node].content if node in state.values else None
    return isinstance(content, Contract) and any(
        (isinstance(side, Element) and any(isinstance(part, (terms.Looked, terms.Fixed)) for part in side.index))
        or _is_stack(side)
        for side, _ in map(terms.uncast, (content.left, content.right))
    )


def _is_stack(content: terms.Content) -> bool:
    """Whether the weight has a dimension beside the product's two: one matrix for each of something."""
    return isinstance(content, Element) and len(content.index) >= 3


def _reachable(
    start: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]], reach: int = _REACH
) -> Iterator[fx.Node]:
    """Nodes within reach, nearest first."""
    seen: dict[fx.Node, None] = {}
    waiting = list(start)
    while waiting and len(seen) < reach:
        node = waiting.pop(0)
        if node in seen or node.op in ("placeholder", "get_attr", "output"):
            continue
        seen[node] = None
        yield node
        waiting += step(node)


# ---- loops over experts


def _chosen_by(node: fx.Node, state: Interpretation) -> Content | None:
    """The ids by which the rows at a node were chosen, if they are the rows of one expert."""
    value = state.values.get(node)
    for group in value.dims if value is not None else ():
        for atom in group:
            if atom.variable.kind == "rows" and isinstance(atom.variable.by, Equals):
                return atom.variable.by.content
    return None


def _loops(state: Interpretation) -> dict[Content, list[fx.Node]]:
    """Ids -> the products of rows that were chosen by them, and the operations on such rows that were refused."""
    found: dict[Content, list[fx.Node]] = {}
    for node in state.graph.nodes:
        if node in state.refusals:
            keys = [_chosen_by(argument, state) for argument in node.all_input_nodes]
        else:
            keys = [_chosen_by(node, state)] if _is_product(node, state) else []
        for ids in dict.fromkeys(keys):
            if ids is not None:
                found.setdefault(ids, []).append(node)
    for turns in found.values():  # products of what a refused operation made are known by nothing else
        after = _reachable([node for node in turns if node in state.refusals], lambda node: node.users)
        turns += [node for node in after if _is_product(node, state) and _chosen_by(node, state) is None]
    return {ids: turns for ids, turns in found.items() if any(_leads_to_product(node, state) for node in turns)}


def _leads_to_product(node: fx.Node, state: Interpretation) -> bool:
    """Whether the node is a matrix product, or one is made of it."""
    return any(
        after in state.calls and state.calls[after].name in ANCHORS
        for after in _reachable([node], lambda node: node.users)
    )


def _loop_difference(ids: Content, turns: Sequence[fx.Node], state: Interpretation) -> tuple[fx.Node, str]:
    """Why the turns of a loop make no sum: an operation that was refused, or experts that add nothing to it."""
    refused = next((node for node in turns if node in state.refusals), None)
    if refused is not None:
        return refused, _between(refused, state.refusals[refused], state)
    partials = [
        value.content.about[0]
        for value in state.values.values()
        if isinstance(value.content, Special) and value.content.kind == "partial" and value.content.about[1] == ids
    ]
    partial: Partial | None = max(partials, key=lambda partial: len(partial.terms), default=None)
    if partial is None or not isinstance(partial.num_experts, int):
        return turns[0], _NOT_SUMMED
    missing = sorted(set(range(partial.num_experts)) - {expert for expert, _ in partial.terms})
    names = ", ".join(map(str, missing[:4])) + (", ..." if len(missing) > 4 else "")
    return (
        partial.nodes[-1],
        f"of {partial.num_experts} experts that the ids may name, these add nothing to the sum: {names}",
    )


# ---- the first difference


def _first_difference(node: fx.Node, reason: Refused, state: Interpretation) -> tuple[fx.Node, str]:
    """The operation that a refusal comes down to: the one that made a tensor which is not understood."""
    if reason.node is None:
        lost = _first_lost(node, state)
        return (node, str(reason)) if lost is None else (lost, _between(lost, state.refusals.get(lost), state))
    for earlier in _reachable([reason.node], lambda node: node.all_input_nodes):
        if earlier in state.refusals:
            return earlier, _between(earlier, state.refusals[earlier], state)
    if reason.node.op not in ("placeholder", "get_attr"):
        return reason.node, str(reason)
    # an input of the graph: where it meets the experts' rows
    meets = set(_reachable(reason.node.users, lambda node: node.users))
    routed = (each for each in state.graph.nodes if each in meets and is_routed(state.values.get(each)))
    return next(routed, node), str(reason)


def _first_lost(end: fx.Node, state: Interpretation) -> fx.Node | None:
    """The first operation on the way to a sum that took experts' results and made something of unknown meaning."""
    sums = {combine.node for combine in state.combines}
    way = set(_reachable(end.all_input_nodes, lambda node: () if node in sums else node.all_input_nodes))
    return next((node for node in state.graph.nodes if node in way - sums and _loses(node, state)), None)


def _lost_by_exchange(end: fx.Node, state: Interpretation) -> fx.Node | None:
    """Where tokens are exchanged between ranks on the way to a node: the first that is refused from there on."""
    way = set(_reachable([end], lambda node: node.all_input_nodes, 4 * _REACH))
    ordered = [node for node in state.graph.nodes if node in way]
    called = [state.calls[node].name if node in state.calls else "" for node in ordered]
    first = called.index(_ALL_TO_ALL) if _ALL_TO_ALL in called else len(called)
    return next((node for node in ordered[first:] if node in state.refusals), None)


def _loses(node: fx.Node, state: Interpretation) -> bool:
    value = state.values.get(node)
    own = Element(node, value.content.index) if value is not None and isinstance(value.content, Element) else None
    known = value is not None and not (is_plain(value) and value.content == own)
    if known or node in state.results or node in state.writers or not isinstance(fake_of(node), torch.Tensor):
        return False
    return _takes_products(node, state)


def _takes_products(node: fx.Node, state: Interpretation) -> bool:
    """Whether an operation's inputs hold matrix products."""
    inputs = [state.values[argument] for argument in node.all_input_nodes if argument in state.values]
    return any(isinstance(inner, Contract) for each in inputs for inner in walk(each.content))


def _between(node: fx.Node, text: str | None, state: Interpretation) -> str:
    """What is said of an operation that was not understood, if a product of its result follows."""
    general = not_understood(node)
    if text not in (None, general) and operation_name(node) not in _BETWEEN:
        return text or general
    if not _takes_products(node, state) or not any(_leads_to_product(user, state) for user in node.users):
        return text or general
    name = operation_name(node)
    return f"{name} stands between the experts' products and {_BETWEEN.get(name, 'is not understood')}"


def _near_miss(
    node: fx.Node, reason: str, block: set[fx.Node], parts: Iterable[fx.Node], state: Interpretation
) -> NearMiss:
    """The near miss of a block, for a reason that is found at a node; its parts' common module is the block's."""
    reason = _MASKED if _masks_others(block, state) else reason
    cure = cure_of(reason)
    module = common_module({node, *parts})
    return NearMiss(_resembles(block, state), reason, operation_name(node), module, source_of(node), cure)


def _masks_others(block: set[fx.Node], state: Interpretation) -> bool:
    """Whether rows are masked by `ids >= E`: ids beyond a rank's last expert stand for those of other ranks."""
    calls = [state.calls[node] for node in block if node in state.calls]
    weights = {"grouped_mm": "mat2", "grouped_mm_fallback": "weight"}
    experts = {fake_of(call[weights[call.name]]).shape[0] for call in calls if call.name in weights}
    bounds = {_bound(call["mask"], state) for call in calls if call.name == "masked_fill"}
    return not experts.isdisjoint(bounds)


def _bound(mask: object, state: Interpretation) -> object:
    """E, where a mask is `ids >= E`."""
    call = state.calls.get(mask) if isinstance(mask, fx.Node) else None
    if call is not None and call.name in ("unsqueeze", "view", "reshape"):
        return _bound(call["input"], state)
    return call["other"] if call is not None and call.name == "ge" else None


def _resembles(block: set[fx.Node], state: Interpretation) -> str:
    before = set(_reachable(block, lambda node: node.all_input_nodes))
    names, names_before = (
        frozenset(state.calls[node].name for node in nodes if node in state.calls) for nodes in (block, before)
    )
    contents = [state.values[node].content for node in block if node in state.values]
    rows = {each for node in block for each in (node, *node.all_input_nodes)}
    return resembled_form(
        Traces(
            names,
            counts="cumsum" in names_before,
            padded=any(map(concerns_bins, contents)),
            turns=any(_chosen_by(node, state) is not None or _selects(node, state) for node in rows | before),
            looked_up=any(
                isinstance(part, terms.Looked)
                for content in contents
                for inner in walk(content)
                for part in _index_of(inner)
            ),
        )
    )


def _selects(node: fx.Node, state: Interpretation) -> bool:
    """Whether the node gives the places where a mask is true."""
    call = state.calls.get(node)
    return call is not None and (call.name == "nonzero" or (call.name == "where" and call["input"] is None))


def _index_of(content: Content) -> tuple[terms.Part, ...]:
    return content.index if isinstance(content, Element) else ()
