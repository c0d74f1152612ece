"""A graph under construction, with real tensors beside it: what random programs are made in."""

from __future__ import annotations

import operator
import random
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moecompile.passes.aliases import tensors_in

LARGEST = 3000  # elements of a tensor; larger ones are not made
IN_RANGE = 0.8  # how often raw ids name experts only


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
