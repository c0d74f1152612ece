"""The forms of mixture-of-experts code that detection knows.

One row each, shared by detection, near misses, docs and tests. A form is not a template to match: what a block computes
is read off its meaning (passes/recognise.py), whatever its spelling. A row says which operations run the experts'
matrix products in this form (its anchors: where a block of this form must show, so that one which was refused can be
named), how a block that was read is told from other forms, and how one that could not be read is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """What tells forms apart, of one block."""

    operations: frozenset[str]  # canonical names of the operations in the block
    gate_up: str
    combine: str  # canonical name of the operation that sums


@dataclass(frozen=True)
class Traces:
    """What is seen of a block that could not be read, for the name of the form that it resembles."""

    operations: frozenset[str]  # canonical names of the operations about its experts' products
    counts: bool  # whether a running sum comes before them
    padded: bool  # whether bins that are rounded up are among its meanings
    turns: bool  # whether rows are chosen by a mask: a turn of a loop
    looked_up: bool  # whether each assignment's weights are looked up


@dataclass(frozen=True)
class Form:
    """One way of writing a MoE block."""

    name: str
    title: str
    anchors: frozenset[str]  # operations that run experts' products in this form
    is_like: Callable[[Traits], bool]
    resembles: Callable[[Traces], bool]
    example: str  # the core of such code, for docs
    unchosen: bool = False  # whether experts compute on tokens that did not choose them, and the result is cancelled


_GROUPED = frozenset({"grouped_mm", "grouped_mm_fallback"})
_BATCHED = frozenset({"bmm", "matmul", "baddbmm"})
_ADDS = frozenset({"index_add", "scatter_add", "deterministic_scatter_add", "index_put"})


def _has(block: Traits | Traces, operations: frozenset[str]) -> bool:
    return bool(block.operations & operations)


# in order: the first row that fits names the block; the last one fits what no other does of what was not read
FORMS: tuple[Form, ...] = (
    Form(
        "padded_bins",
        "sort, bins padded to a block, grouped GEMM (MegaBlocks)",
        _GROUPED,
        lambda traits: _has(traits, _GROUPED) and "padded" in traits.operations,
        lambda traces: traces.padded,
        "bins = round_up(histogram(ids), 128).cumsum(0); "
        "y = grouped_mm(padded_gather(x, ids.argsort(), bins), w, offs=bins)",
    ),
    Form(
        "torchtitan",
        "three grouped GEMMs, outputs added back by token (torchtitan)",
        _GROUPED,
        lambda traits: _has(traits, _GROUPED) and traits.gate_up == "separate" and traits.combine in _ADDS,
        lambda traces: _has(traces, _GROUPED) and _has(traces, _ADDS - {"index_put"}),
        "h = silu(grouped_mm(x[order // k], w1, offs=offs)) * grouped_mm(x[order // k], w3, offs=offs); "
        "out.scatter_add_(0, token, grouped_mm(h, w2, offs=offs) * w)",
    ),
    Form(
        "grouped_mm",
        "sort, grouped GEMM, un-permute, sum (transformers grouped_mm)",
        _GROUPED,
        lambda traits: _has(traits, _GROUPED),
        lambda traces: _has(traces, _GROUPED),
        "y = grouped_mm(act(grouped_mm(x[order // k], w_in, offs=offs)), w_out, offs=offs); "
        "(y * w[order])[inverse].view(t, k, h).sum(1)",
    ),
    Form(
        "expert_loop",
        "a loop over all experts, each on the rows that chose it (Mixtral 4.x); needs fullgraph=True",
        frozenset({"linear", "mm", "matmul"}),
        lambda traits: "rows" in traits.operations or {"split", "cat"} <= traits.operations,
        lambda traces: traces.turns,
        "for e in range(E): k, t = torch.where(mask[e]); out.index_add_(0, t, expert[e](x[t]) * w[t, k, None])",
    ),
    Form(
        "capacity",
        "one-hot einsum with capacity (GShard, Switch)",
        frozenset({"einsum", "bmm", "matmul"}),
        lambda traits: "capacity" in traits.operations,
        lambda traces: traces.counts,
        'einsum("tec,ech->th", combine, experts(einsum("tec,th->ech", dispatch, x)))',
        unchosen=True,
    ),
    Form(
        "dense",
        "every expert on every token, weighted by gates that vanish away from the top k (llama4)",
        _BATCHED | {"einsum", "linear"},
        lambda traits: "dense" in traits.operations,
        lambda traces: not traces.looked_up,
        "gates = sigmoid(full(-inf).scatter(1, ids, logits)); "
        "(bmm(act(bmm(x.expand(E, T, H), w_in)), w_out) * gates.T.unsqueeze(-1)).sum(0)",
        unchosen=True,
    ),
    Form(
        "gather_einsum",
        "each token's expert weights gathered, products by einsum (gpt-fast)",
        frozenset({"einsum"}),
        lambda traits: "einsum" in traits.operations,
        lambda traces: "einsum" in traces.operations,
        'einsum("tai,taoi->tao", act(einsum("ti,taoi->tao", x, w1[ids])), w2[ids])',
    ),
    Form(
        "batched_mm",
        "each assignment's expert weights gathered, batched products (transformers batched_mm)",
        _BATCHED,
        lambda traits: _has(traits, _BATCHED),
        lambda traces: True,
        "y = bmm(w_out[ids], act(bmm(w_in[ids], x.repeat_interleave(k, 0).unsqueeze(-1)))); "
        "(y.squeeze(-1) * w).view(t, k, h).sum(1)",
    ),
)


# all operations that run experts' products
ANCHORS = frozenset(name for form in FORMS for name in form.anchors)


def resembled_form(traces: Traces) -> str:
    """The name of the form that a block which could not be read resembles."""
    return next(form.name for form in FORMS if form.resembles(traces))


def form_of(traits: Traits) -> str:
    """The name of the first form that fits."""
    return next((form.name for form in FORMS if form.is_like(traits)), "other")
