"""What routers do in several operations: a beginning for a random program to go on from."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from program_graph import Program
from program_steps import Step


def _ids(p: Program) -> fx.Node:
    """Expert ids, (T, K) or flat, rather those that were chosen."""
    named = {node.name: node for node in p.tensors()}
    node = p.rng.choice((named["getitem_1"], named["getitem_1"], named["raw"]))
    return p.made("reshape", (node, -1)) if p.rng.random() < 0.6 else node


def _sorted_rows(p: Program) -> tuple[Any, ...]:
    """x[order // K], or the inverse of the order."""
    flat = p.made("reshape", (_ids(p), -1))
    order = p.made("argsort", (flat,), {"stable": True})
    kind = p.rng.choice(("rows", "rows", "ids", "inverse", "written"))
    if kind == "inverse":
        return "argsort", (order,), {}
    if kind == "ids":
        return operator.getitem, (flat, order), {}
    if kind == "written":
        inverse = p.made(torch.empty_like, (order,))
        return operator.setitem, (inverse, order, p.made(torch.arange, (p.real[order].numel(),))), {}
    return operator.getitem, (p.named("x"), p.made(operator.floordiv, (order, p.top_k))), {}


def _bins(p: Program) -> tuple[Any, ...]:
    """The experts' counts, where their rows end, and bins rounded up to a block."""
    ids, kind = _ids(p), p.rng.choice(("one_hot", "bincount", "scatter", "histc"))
    flat = p.made("reshape", (ids, -1))
    if kind == "one_hot":
        mask = p.made(F.one_hot, (ids, p.experts))
        counts = p.made("sum", (mask,), {"dim": tuple(range(p.real[mask].dim() - 1))})
    elif kind == "bincount":
        counts = p.made(torch.bincount, (flat,), {"minlength": p.experts})
    elif kind == "histc":
        counts = p.made(torch.histc, (p.made("float", (flat,)),), {"bins": p.experts, "min": 0, "max": p.experts - 1})
    else:
        zeros = p.made(torch.zeros, (p.experts,), {"dtype": torch.int64})
        counts = p.made("scatter_add", (zeros, 0, flat, p.made(torch.ones_like, (flat,))))
    if p.rng.random() < 0.5:
        block = p.rng.choice((2, 4))
        up = p.made(operator.floordiv, (p.made(operator.add, (counts, block - 1)), block))
        counts = p.made(operator.mul, (up, block))
    return "cumsum", (counts, 0), {}


def _places(p: Program) -> tuple[Any, ...]:
    """one_hot(ids).cumsum(0): an assignment's place among its expert's, masked, less one, one-hot."""
    mask = p.made(F.one_hot, (_ids(p), p.experts))
    place = p.made("cumsum", (mask,), {"dim": p.rng.choice((0, 0, p.dim(mask)))})
    kind = p.rng.choice(("masked", "less", "kept", "one_hot", "own"))
    if kind == "less":
        return operator.sub, (place, 1), {}
    place = p.made(operator.mul, (place, mask))
    if kind == "masked":
        return operator.sub, (place, mask), {}
    own = p.made(operator.sub, (p.made("sum", (place,), {"dim": -1}), 1))
    if kind == "kept":
        return operator.lt, (own, p.number()), {}
    return (
        (F.one_hot, (own, p.rng.choice((p.tokens * p.top_k, 3))), {})
        if kind == "one_hot"
        else ("clamp", (own,), {"max": 2})
    )


def _gates(p: Program) -> tuple[Any, ...]:
    """(T, E): scattered weights or marks, softmax of scores elsewhere -inf, a one-hot mask times weights summed."""
    ids, weights, kind = p.named("getitem_1"), p.named("getitem"), p.rng.choice(("weights", "marks", "scores", "sum"))
    shape = (p.tokens, p.experts)
    if kind == "sum":
        mask = p.made(F.one_hot, (ids, p.experts))
        return (
            "sum",
            (p.made(operator.mul, (mask, p.made("unsqueeze", (weights, -1)))),),
            {"dim": p.rng.choice((1, 1, 0, 2))},
        )
    base = p.made(torch.full, (shape, float("-inf") if kind == "scores" else 0.0))
    return "scatter", (base, 1, ids, 1.0 if kind == "marks" else weights), {}


def _loop_turn(p: Program) -> tuple[Any, ...]:
    """One expert's tokens, through its matrix."""
    ids, expert = p.named("getitem_1"), p.rng.randrange(p.experts)
    hits = p.made(operator.eq, (ids, expert))
    rows = p.call(torch.where, (hits,), {})
    if rows is None:
        raise LookupError("no rows")
    token = p.made(operator.getitem, (rows, 0))
    if p.rng.random() < 0.3:
        return operator.getitem, (p.named("getitem"), (token, p.made(operator.getitem, (rows, 1)))), {}
    found = p.made(operator.getitem, (p.named("x"), token))
    return operator.matmul, (found, p.made(operator.getitem, (p.named("w_in"), expert))), {}


def _expert_product(p: Program) -> tuple[Any, ...]:
    """Each assignment's row by its expert's matrix."""
    flat = p.made("reshape", (_ids(p), -1))
    rows = p.made("repeat_interleave", (p.named("x"), p.top_k, 0))
    return torch.bmm, (p.made("unsqueeze", (rows, 1)), p.made(operator.getitem, (p.named("w_in"), flat))), {}


IDIOMS: tuple[tuple[int, Step], ...] = (
    (7, _sorted_rows),
    (5, _bins),
    (5, _places),
    (4, _gates),
    (3, _loop_turn),
    (3, _expert_product),
)
