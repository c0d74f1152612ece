"""Random operations on the tensors of a program: (target, arguments, keyword arguments), to be tried."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from program_graph import Program

Step = Callable[[Program], "tuple[Any, tuple[Any, ...], dict[str, Any]]"]


def _view(p: Program) -> tuple[Any, ...]:
    node = p.pick()
    return p.rng.choice(("view", "reshape")), (node, *p.shape(p.real[node].numel())), {}


def _turn(p: Program) -> tuple[Any, ...]:
    node = p.pick()
    rank = p.real[node].dim()
    if p.rng.random() < 0.3:
        return "permute", (node, *p.rng.sample(range(rank), rank)), {}
    return p.rng.choice(("transpose", torch.transpose)), (node, p.dim(node), p.dim(node)), {}


def _spread(p: Program) -> tuple[Any, ...]:
    node = p.pick()
    shape = list(p.real[node].shape)
    kind = p.rng.choice(("unsqueeze", "squeeze", "expand", "repeat", "repeat_interleave", "expand_as"))
    if kind == "unsqueeze":
        return kind, (node, p.rng.randrange(-len(shape) - 1, len(shape) + 1)), {}
    if kind == "squeeze":
        return kind, (node, *((p.dim(node),) if p.rng.random() < 0.5 else ())), {}
    if kind == "expand_as":
        return kind, (node, p.pick()), {}
    if kind == "repeat_interleave":
        return kind, (node, p.number(), *((p.dim(node),) if p.rng.random() < 0.7 else ())), {}
    sizes = [p.rng.choice((-1 if kind == "expand" else 1, size, p.number())) for size in shape]
    return kind, (node, *[p.number()] * p.rng.choice((0, 0, 1)), *sizes), {}


def _cut(p: Program) -> tuple[Any, ...]:
    node = p.pick()
    size = p.real[node].shape[p.dim(node)] if p.real[node].dim() else 1
    kind = p.rng.choice(("select", "narrow", "chunk", "split", "unbind", "getitem", "getitem", "getitem"))
    if kind == "select":
        return kind, (node, p.dim(node), p.rng.randrange(-size, size)), {}
    if kind == "narrow":
        return kind, (node, p.dim(node), p.rng.randrange(size), p.rng.randrange(1, size + 1)), {}
    if kind in ("chunk", "split"):
        return kind, (node, p.rng.randrange(1, 4), p.dim(node)), {}
    if kind == "unbind":
        return kind, (node, p.dim(node)), {}
    items: list[Any] = []
    for _ in range(p.rng.randrange(1, 4)):
        start, stop = (p.rng.choice((None, None, p.rng.randrange(-size, size + 1))) for _ in range(2))
        part = slice(start, stop, p.rng.choice((None, None, None, 1, 2)))
        items.append(p.rng.choice((None, Ellipsis, part, slice(None), p.rng.randrange(-size, size))))
    return operator.getitem, (node, tuple(items) if len(items) > 1 else items[0]), {}


def _piece(p: Program) -> tuple[Any, ...]:
    groups = [node for node, value in p.real.items() if isinstance(value, (tuple, list))]
    node = p.rng.choice(groups[-4:])
    return operator.getitem, (node, p.rng.randrange(len(p.real[node]))), {}


def _digits(p: Program) -> tuple[Any, ...]:
    node = p.pick("int")
    target = p.rng.choice((operator.floordiv, operator.mod, torch.div, "remainder", "floor_divide"))
    extra = {"rounding_mode": p.rng.choice(("floor", "trunc"))} if target is torch.div else {}
    return target, (node, p.number()), extra


def _order(p: Program) -> tuple[Any, ...]:
    node = p.pick("int", "int", "float")
    kind = p.rng.choice(("argsort", torch.argsort, torch.sort, "sort"))
    options: dict[str, Any] = {}
    if p.rng.random() < 0.3:
        options["dim"] = p.dim(node)
    if p.rng.random() < 0.15:
        options["descending"] = True
    if p.rng.random() < 0.3:
        options["stable"] = True
    return kind, (node,), options


def _topk(p: Program) -> tuple[Any, ...]:
    node = p.pick("float", "int")
    return torch.topk, (node, p.rng.randrange(1, 4)), {"dim": p.dim(node), "largest": p.rng.random() < 0.9}


def _count(p: Program) -> tuple[Any, ...]:
    node = p.pick("int")
    kind = p.rng.choice(("one_hot", "one_hot", "bincount", "histc", "searchsorted", "eq"))
    if kind == "one_hot":
        return F.one_hot, (node, p.rng.choice((p.experts, p.experts, p.number(), -1))), {}
    if kind == "bincount":
        return torch.bincount, (node,), {"minlength": p.rng.choice((p.experts, p.number()))}
    if kind == "histc":
        bins = p.rng.choice((p.experts, p.experts, p.number()))
        source = p.call("float", (node,), {})
        return (
            torch.histc,
            (source,),
            {"bins": bins, "min": p.rng.choice((0, 0, 0, 1)), "max": bins - p.rng.choice((0, 1))},
        )
    if kind == "searchsorted":
        return torch.searchsorted, (node, p.pick("int")), {"right": p.rng.random() < 0.7}
    other = p.call(torch.arange, (p.rng.choice((p.experts, p.number())),), {})
    return "eq", (node, other), {}


def _compare(p: Program) -> tuple[Any, ...]:
    target = p.rng.choice((operator.eq, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge))
    node = p.pick("int")
    return target, (node, p.rng.choice((p.number(), p.number(), p.pick("int")))), {}


def _reduce(p: Program) -> tuple[Any, ...]:
    node = p.pick()
    kind = p.rng.choice(("sum", "sum", "sum", "cumsum", "any", "max", "argmax", "mean"))
    options: dict[str, Any] = {}
    if kind == "cumsum" or p.rng.random() < 0.8:
        options["dim"] = p.dim(node)
        if kind == "sum" and p.rng.random() < 0.15 and p.real[node].dim() > 1:
            options["dim"] = tuple(p.rng.sample(range(p.real[node].dim()), 2))
        if kind != "cumsum" and p.rng.random() < 0.3:
            options["keepdim"] = True
    return kind, (node,), options


def _look_up(p: Program) -> tuple[Any, ...]:
    node, index = p.pick(), p.pick("int", "int", "bool")
    kind = p.rng.choice(("getitem", "getitem", "getitem", "index_select", "gather", "embedding", "take_along_dim"))
    if kind == "getitem":
        lead = p.rng.choice(((), (), (slice(None),), (Ellipsis,), (p.pick("int"),), (0,)))
        return operator.getitem, (node, (*lead, index) if lead else index), {}
    if kind == "embedding":
        return F.embedding, (index, node), {}
    if kind == "gather" and p.rng.random() < 0.5 and p.real[node].dim() == 2:
        width = p.rng.choice((p.real[node].shape[1], p.number()))
        column = p.call("unsqueeze", (index, -1), {})
        index = p.call("expand", (column, -1, width), {}) or index
    return kind, (node, p.dim(node), index) if kind != "take_along_dim" else (node, index, p.dim(node)), {}


def _made(p: Program) -> tuple[Any, ...]:
    node = p.pick()
    kind = p.rng.choice(("zeros_like", "ones_like", "new_zeros", "new_full", "arange", "arange", "full", "zeros"))
    shape = list(p.real[node].shape)
    if kind in ("zeros_like", "ones_like"):
        return getattr(torch, kind), (node,), {}
    if kind == "arange":
        return torch.arange, (p.rng.choice((p.number(), p.real[node].shape[0] if shape else 1)),), {}
    sizes = [p.rng.choice((size, p.number())) for size in shape]
    if kind == "zeros":
        return torch.zeros, (sizes,), {"dtype": p.rng.choice((torch.float32, torch.int64, torch.bool))}
    if kind == "full":
        return torch.full, (sizes, p.rng.choice((0, 1, 0.0, float("-inf"), -1))), {}
    return kind, (node, sizes, *((p.number(),) if kind == "new_full" else ())), {}


def _write(p: Program) -> tuple[Any, ...]:
    target, index, source = p.pick(), p.pick("int"), p.rng.choice((p.pick(), p.pick(), p.number()))
    kind = p.rng.choice(("setitem", "index_add", "index_copy", "scatter", "scatter_add", "index_put", "masked_fill"))
    place = "_" if p.rng.random() < 0.5 else ""
    if kind == "setitem":
        return (
            operator.setitem,
            (target, p.rng.choice((index, p.pick("bool", "int"), slice(0, p.number()))), source),
            {},
        )
    if kind == "index_put":
        return kind + place, (target, (index,), source), {"accumulate": p.rng.random() < 0.5}
    if kind == "masked_fill":
        return kind + place, (target, p.pick("bool"), p.number()), {}
    dim = p.rng.choice((0, 0, p.dim(target)))
    return kind + place, (target, dim, index, source), {}


def _in_place(p: Program) -> tuple[Any, ...]:
    node = p.pick()
    kind = p.rng.choice(("add_", "mul_", "sub_", "clamp_", "zero_", "copy_", "neg_", "fill_"))
    if kind == "clamp_":
        return kind, (node,), {p.rng.choice(("min", "max")): p.number()}
    if kind in ("zero_", "neg_"):
        return kind, (node,), {}
    return kind, (node, p.rng.choice((p.number(), p.pick())) if kind != "fill_" else p.number()), {}


def _arithmetic(p: Program) -> tuple[Any, ...]:
    node = p.pick()
    other = p.rng.choice((p.pick(), p.pick(), p.number()))
    target = p.rng.choice(
        (operator.mul, operator.mul, operator.add, operator.sub, torch.sub, torch.add, "rsub", torch.maximum)
    )
    extra = {"alpha": p.rng.choice((1, 2))} if target in (torch.sub, torch.add, "rsub") and p.rng.random() < 0.3 else {}
    return target, ((other, node) if p.rng.random() < 0.3 and target != "rsub" else (node, other)), extra


def _unary(p: Program) -> tuple[Any, ...]:
    kind = p.rng.choice(
        ("clamp", "clamp", "long", "float", "to", "bool", "contiguous", "clone", "relu", "invert", "neg")
    )
    node = p.pick()
    if kind == "clamp":
        bounds = p.rng.choice(
            ({"min": 0}, {"max": p.experts - 1}, {"min": 0, "max": p.experts - 1}, {"max": p.number()})
        )
        return kind, (p.pick("int"),), bounds
    if kind == "to":
        return kind, (node, p.rng.choice((torch.int32, torch.int64, torch.float32, torch.bool, torch.float64))), {}
    if kind == "invert":
        return operator.invert, (p.pick("bool", "int"),), {}
    return kind, (node,), {}


def _choose(p: Program) -> tuple[Any, ...]:
    mask = p.pick("bool")
    kind = p.rng.choice(("where", "rows", "rows", "nonzero", "and", "masked_fill"))
    if kind == "rows":
        return torch.where, (mask,), {}
    if kind == "nonzero":
        return torch.nonzero, (mask,), {"as_tuple": p.rng.random() < 0.5}
    if kind == "and":
        return p.rng.choice((operator.and_, operator.or_, operator.mul)), (mask, p.pick("bool")), {}
    if kind == "masked_fill":
        return kind, (p.pick(), mask, p.number()), {}
    return torch.where, (mask, p.rng.choice((p.pick(), p.number())), p.rng.choice((p.pick(), p.number()))), {}


def _product(p: Program) -> tuple[Any, ...]:
    first, second = p.pick("float"), p.pick("float")
    kind = p.rng.choice((torch.matmul, torch.bmm, torch.mm, F.linear, "einsum", "einsum", "grouped"))
    if kind == "grouped":
        offsets = p.call("to", (p.pick("int"), torch.int32), {})
        return torch._grouped_mm, (first, second), {"offs": offsets}
    if kind != "einsum":
        return kind, (first, second), {}
    names = "".join(p.rng.sample("abcd", 4))
    left = "".join(p.rng.choice((names, "abcd"))[: p.real[first].dim()])
    right = "".join(p.rng.sample("abcd", 4))[: p.real[second].dim()]
    known = list(dict.fromkeys(left + right))
    output = "".join(p.rng.sample(known, p.rng.randrange(1, len(known) + 1)))
    return torch.einsum, (f"{left},{right}->{output}", first, second), {}


def _joined(p: Program) -> tuple[Any, ...]:
    node = p.pick()
    parts = [node, p.pick(), *([p.pick()] if p.rng.random() < 0.3 else [])]
    return p.rng.choice((torch.cat, torch.stack)), (parts, p.dim(node)), {}


STEPS: tuple[tuple[int, Step], ...] = (
    (8, _view),
    (5, _turn),
    (7, _spread),
    (6, _cut),
    (4, _piece),
    (6, _digits),
    (8, _order),
    (2, _topk),
    (8, _count),
    (4, _compare),
    (7, _reduce),
    (12, _look_up),
    (4, _made),
    (8, _write),
    (2, _in_place),
    (6, _arithmetic),
    (5, _unary),
    (4, _choose),
    (5, _product),
    (2, _joined),
)
