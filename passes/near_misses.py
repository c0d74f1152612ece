"""Name the blocks that were not rewritten: what they resemble, what differed first, and the cure if there is one.

An expert product (a grouped GEMM, or a product with weights looked up by expert) that no Site covers is a near miss.
The reason is the one that a refused sum gave; if a tensor inside it was not understood, the operation that made it so;
else the first operation after the product that no rule explains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import fx

from moecompile.passes import terms
from moecompile.passes.bins import concerns_bins
from moecompile.passes.interpret import (
    Combine,
    Interpretation,
    Refused,
    walk,
)
from moecompile.passes.provenance import module_of, source_of
from moecompile.passes.site import NearMiss, Site
from moecompile.passes.spelling import operation_name
from moecompile.passes.terms import (
    Contract,
    Element,
)

# how far a reason is looked for, in nodes: a block has some dozens, a model has thousands
_REACH = 80

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
    ("ids may lie outside", "choose the experts with topk or argmax over as many scores as the loop has turns"),
)


def near_misses(
    state: Interpretation, sites: Sequence[Site], refused: Sequence[tuple[Combine, Refused]]
) -> list[NearMiss]:
    """One near miss for each group of connected expert products that no Site covers, in program order."""
    covered = {node for site in sites for node in site.region}
    misses: list[NearMiss] = []
    for combine, reason in refused:
        if combine.node in covered or not _sums_experts(combine):
            continue
        block = set(_reachable([combine.node], lambda node: node.all_input_nodes))
        if any(_is_product(node, state) and node not in covered for node in block):
            node, text = _first_difference(combine.node, reason, state)
            cause = state.first_refused(combine.node) if _resembles(block, state) == "padded_bins" else None
            if cause is not None:
                node, text = cause, state.refusals[cause]
            misses.append(_near_miss(node, text, block, state))
            covered |= block
    for node in state.graph.nodes:
        if node in covered or not _is_product(node, state):
            continue
        block = set(_reachable([node], lambda node: node.users))
        place = (
            node
            if node in state.refusals
            else next((after for after in state.graph.nodes if after in block and after in state.refusals), node)
        )
        text = state.refusals.get(place, "the experts' results are not summed into tokens the way a known form does")
        misses.append(_near_miss(place, text, block | {node}, state))
        covered |= block | {node}
    return list(dict.fromkeys(misses))


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
    content = state.values[node].content if node in state.values else None
    return isinstance(content, Contract) and any(
        (isinstance(side, Element) and any(isinstance(part, (terms.Looked, terms.Fixed)) for part in side.index))
        or _is_stack(side)
        for side, _ in map(terms.uncast, (content.left, content.right))
    )


def _is_stack(content: terms.Content) -> bool:
    """Whether the weight has a dimension beside the product's two: one matrix for each of something."""
    return isinstance(content, Element) and len(content.index) >= 3


def _reachable(start: Iterable[fx.Node], step: object) -> Iterator[fx.Node]:
    """Nodes within reach, nearest first."""
    seen: dict[fx.Node, None] = {}
    waiting = list(start)
    while waiting and len(seen) < _REACH:
        node = waiting.pop(0)
        if node in seen or node.op in ("placeholder", "get_attr", "output"):
            continue
        seen[node] = None
        yield node
        waiting += list(step(node))  # type: ignore[operator]


def _first_difference(node: fx.Node, reason: Refused, state: Interpretation) -> tuple[fx.Node, str]:
    """The operation that a refusal comes down to: the one that made a tensor which is not understood."""
    if reason.node is None:
        return node, str(reason)
    for earlier in _reachable([reason.node], lambda node: node.all_input_nodes):
        if earlier in state.refusals:
            return earlier, state.refusals[earlier]
    return reason.node, str(reason)


def _near_miss(node: fx.Node, reason: str, block: set[fx.Node], state: Interpretation) -> NearMiss:
    cure = next((cure for part, cure in _CURES if part in reason), None)
    return NearMiss(_resembles(block, state), reason, operation_name(node), module_of(node), source_of(node), cure)


def _resembles(block: set[fx.Node], state: Interpretation) -> str:
    names = {state.calls[node].name for node in block if node in state.calls}
    looked = any(
        isinstance(part, terms.Looked)
        for node in block
        if node in state.values
        for part in _index_of(state.values[node].content)
    )
    if any(concerns_bins(state.values[node].content) for node in block if node in state.values):
        return "padded_bins"
    if names & {"grouped_mm", "grouped_mm_fallback"}:
        return "torchtitan" if names & {"scatter_add", "index_add"} else "grouped_mm"
    before = _reachable(block, lambda node: node.all_input_nodes)
    if any(node in state.calls and state.calls[node].name == "cumsum" for node in before):
        return "capacity"
    if "nonzero" in names or "where" in names:
        return "expert_loop"
    if looked:
        return "gather_einsum" if "einsum" in names else "batched_mm"
    return "dense"


def _index_of(content: terms.Content) -> tuple[terms.Part, ...]:
    return content.index if isinstance(content, Element) else ()
