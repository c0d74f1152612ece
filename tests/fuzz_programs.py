"""Random programs of a router's vocabulary, for the oracle of meanings.py: no block is meant, every rule is tried.

A program starts with tokens, router scores, their top k, ids of unknown range and stacked weights, all of sizes so
small that many of them agree, and goes on with random operations on random tensors. What eager PyTorch refuses is left
out. Graphs look as Dynamo makes them: fake example values, and symbols for sizes that data decides.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moecompile.passes.aliases import tensors_in

LARGEST = 3000  # elements of a tensor; larger ones are not made
IN_RANGE = 0.8  # how often raw ids name experts only

Step = Callable[["Program"], "tuple[Any, tuple[Any, ...], dict[str, Any]]"]


class Program:
    """A graph under construction, with the real tensors beside it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.graph = rng, fx.Graph()
        self.real: dict[fx.Node, Any] = {}
        self.inputs: list[Tensor] = []
        self.mode = FakeTensorMode(
            shape_env=ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True),
            allow_non_fake_inputs=True,
        )
        self.generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        self.tokens, self.experts = rng.choice((2, 3, 4, 6)), rng.choice((2, 3, 4, 6))
        self.top_k = rng.choice([k for k in (1, 2, 3) if k <= self.experts])
        self.hidden, self.inner = rng.choice((2, 3, 4)), rng.choice((2, 3, 4))
        self._start()

    # ---- nodes

    def _start(self) -> None:
        tokens, experts, top_k = self.tokens, self.experts, self.top_k
        self.placeholder("x", self.random(tokens, self.hidden))
        logits = self.placeholder("logits", self.random(tokens, experts))
        low, high = (0, experts) if self.rng.random() < IN_RANGE else (-1, experts + 1)
        raw = torch.randint(low, high, (tokens, top_k), generator=self.generator)
        self.placeholder("raw", raw)
        self.placeholder("w_in", self.random(experts, self.hidden, self.inner))
        self.placeholder("w_out", self.random(experts, self.inner, self.hidden))
        chosen = self.call(torch.topk, (logits, top_k, -1), {})
        assert chosen is not None
        self.call(operator.getitem, (chosen, 0), {})
        self.call(operator.getitem, (chosen, 1), {})

    def random(self, *shape: int) -> Tensor:
        """Random numbers of this program's own."""
        return torch.randn(*shape, generator=self.generator)

    def placeholder(self, name: str, value: Tensor) -> fx.Node:
        """A graph input."""
        node = self.graph.placeholder(name)
        node.meta["example_value"] = self.mode.from_tensor(value, static_shapes=True)
        self.real[node] = value.clone()
        self.inputs.append(value)
        return node

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
        """One more operation; None if PyTorch refuses it, or if its result is too large or not a tensor."""
        named = isinstance(target, str)
        backup = {node: value.clone() for node, value in self.real.items() if isinstance(value, Tensor)}
        try:
            result = _run(target, *fx.node.map_arg((args, kwargs), lambda node: self.real[node]))
            tensors = result if isinstance(result, (tuple, list)) else (result,)
            fits = all(isinstance(value, Tensor) and value.numel() <= LARGEST for value in tensors)
            if not fits and result is not None:
                raise ValueError("too large, or no tensor")
            fakes = fx.node.map_arg((args, kwargs), lambda node: node.meta["example_value"])
            with self.mode:
                fake = _run(target, *fakes)
            for value, held in zip(tensors_in(fake), tensors_in(result), strict=True):
                known = [size if type(size) is int else None for size in value.shape]
                if 0 in known or any(size not in (None, real) for size, real in zip(known, held.shape, strict=True)):
                    raise ValueError("nothing in it, or not as large as PyTorch says")
        except Exception:  # whatever PyTorch raises: not this operation
            for node, value in backup.items():
                if self.real[node].shape == value.shape and not torch.equal(self.real[node], value):
                    self.real[node].copy_(value)
            return None
        node = self.graph.call_method(target, args, kwargs) if named else self.graph.call_function(target, args, kwargs)
        node.meta["example_value"] = fake
        self.real[node] = result
        return node

    def made(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        """`call`; LookupError if there is no result."""
        node = self.call(target, args, kwargs or {})
        if node is None:
            raise LookupError(target)
        return node

    def named(self, name: str) -> fx.Node:
        """The node of that name."""
        return next(node for node in self.real if node.name == name)

    # ---- choices

    def tensors(self) -> list[fx.Node]:
        """All tensors there are."""
        return [node for node, value in self.real.items() if isinstance(value, Tensor)]

    def pick(self, *kinds: str) -> fx.Node:
        """A tensor of integers, floats or bools (any, if no kind is named); rather a late one."""
        fitting = [node for node in self.tensors() if not kinds or kind_of(self.real[node]) in kinds]
        if not fitting:
            raise LookupError(kinds)
        return fitting[max(0, len(fitting) - 1 - int(self.rng.expovariate(0.35)))]

    def dim(self, node: fx.Node) -> int:
        """A dimension, counted from either end."""
        rank = max(1, self.real[node].dim())
        return self.rng.randrange(-rank, rank)

    def number(self) -> int:
        """A number that means something here."""
        sizes = (self.tokens, self.top_k, self.experts, self.hidden, self.tokens * self.top_k)
        return self.rng.choice((*sizes, self.experts - 1, 0, 1, 2, 3))

    def shape(self, elements: int) -> list[int]:
        """A shape of so many elements."""
        sizes: list[int] = []
        while elements > 1 and len(sizes) < 3:
            divisors = [size for size in range(1, elements + 1) if elements % size == 0]
            sizes.append(self.rng.choice(divisors))
            elements //= sizes[-1]
        sizes.append(elements)
        if self.rng.random() < 0.4:
            sizes[self.rng.randrange(len(sizes))] = -1
        return sizes


def kind_of(value: Tensor) -> str:
    """int, float or bool."""
    return "bool" if value.dtype is torch.bool else "float" if value.is_floating_point() else "int"


def _run(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)


# ---- operations


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


# ---- what routers do in several operations: a beginning for others to go on from


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
    (7, _sorted_rows),
    (5, _bins),
    (5, _places),
    (4, _gates),
    (3, _loop_turn),
    (3, _expert_product),
)


def program(rng: random.Random, length: int = 14) -> tuple[fx.GraphModule, list[Tensor]]:
    """A random program of about so many operations, and its inputs."""
    made = Program(rng)
    weights, steps = zip(*STEPS, strict=True)
    count = 0
    for _ in range(length * 12):
        if count == length:
            break
        try:
            target, args, kwargs = rng.choices(steps, weights)[0](made)
        except (LookupError, IndexError, ValueError):  # nothing of the kind is there yet
            continue
        count += made.call(target, args, kwargs) is not None
    for node in made.tensors():  # a size that data decides may have been taken for another since
        for size, real in zip(node.meta["example_value"].shape, made.real[node].shape, strict=True):
            known = size.node.expr if isinstance(size, torch.SymInt) else size
            if known != real and (isinstance(known, int) or known.is_number):
                return program(rng, length)
    made.graph.output(tuple(made.tensors()[-1:]))
    return fx.GraphModule(torch.nn.Module(), made.graph), made.inputs


def behind(gm: fx.GraphModule, name: str) -> Iterator[fx.Node]:
    """The nodes that one depends on, writes into them included: what to read of a program about which a lie is told."""
    needed: set[fx.Node] = {node for node in gm.graph.nodes if node.name == name}
    for node in reversed(list(gm.graph.nodes)):
        writes = str(node.target).endswith("_") or node.target is operator.setitem
        if node in needed or (writes and not needed.isdisjoint(node.all_input_nodes)):
            needed |= {node, *node.all_input_nodes}
    yield from (node for node in gm.graph.nodes if node in needed)
