"""What the passes that cast have in common: casts as nodes of the graph, and rows of the table of what is cast."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import fx

from moecompile.passes.aliases import empty_fake, fake_of
from moecompile.runtime.quantize import POWER_OF_TWO

_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack")


@dataclass(frozen=True)
class Cast:
    """A row of the table: a linear layer or a block of experts, and whether it multiplies in FP8.

    Attributes:
        module: path of the module that computes it; empty for the function itself.
        kind: "linear", "experts", or "other", a product with a parameter that is neither.
        shape: of the matrix: (N, K), or (E, N, K) of the experts' first.
        cast: whether it multiplies in FP8.
        reason: why, in words.
        refused: whether it was to be cast and could not be.
    """

    module: str
    kind: Literal["linear", "experts", "other"]
    shape: tuple[Any, ...]
    cast: bool
    reason: str
    refused: bool = False


@dataclass(frozen=True)
class MatrixCast:
    """The attributes of a call of `moecompile::quantize_weights`, with its defaults."""

    gate_up: str = "single"
    transposed: bool = False
    backward: bool = True
    scale_format: str = POWER_OF_TWO

    @classmethod
    def of(cls, node: fx.Node) -> MatrixCast:
        """Of a node that is one."""
        given: dict[str, Any] = dict(node.kwargs)
        return cls(**{each.name: given[each.name] for each in fields(cls) if each.name in given})


@dataclass(frozen=True)
class Casting:
    """How what is cast is cast.

    Attributes:
        backward: whether the graph may be differentiated; if not, copies that only a backward reads are not made.
        scale_format: one of SCALE_FORMATS of `moecompile.runtime.quantize`.
        kernels: "reference" if products of linear layers are to be PyTorch's; experts have their own attribute.
    """

    backward: bool = True
    scale_format: str = POWER_OF_TWO
    kernels: str | None = None

    @property
    def of_rows(self) -> dict[str, Any]:
        """Attributes of operators that quantise rows, or read what is quantised; what is usual is left out."""
        return {} if self.scale_format == POWER_OF_TWO else {"scale_format": self.scale_format}

    @property
    def of_layers(self) -> dict[str, Any]:
        """Attributes of `linear_fp8`; what is usual is left out."""
        return self.of_rows | ({} if self.kernels is None else {"kernels": self.kernels})

    @property
    def of_matrices(self) -> dict[str, Any]:
        """The same of `quantize_weights`."""
        return self.of_rows | ({} if self.backward else {"backward": False})


Replaced = tuple[fx.Node, fx.Node]
"""A node that is no longer in the graph, and the one in its place."""


@dataclass(frozen=True)
class Kept:
    """What a pass left as it was: the module it is in, and why."""

    module: str
    reason: str


def cast_for(
    node: fx.Node, target: Any, given: tuple[Any, ...], attributes: dict[str, Any], specs: Sequence[Any]
) -> list[fx.Node]:
    """The results, of these shapes and dtypes, of a cast that a node's replacement reads."""
    key, like = key_of(node), fake_of(given[0])
    cast = call_for(node, target, given, attributes)
    cast.meta[key] = tuple(empty_fake(like, *spec) for spec in specs)
    return parts_of(cast)


def called(node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """The same as `call_for`, with an example value."""
    made = call_for(node, target, args, kwargs)
    made.meta[key_of(made)] = computed(made)
    return made


def computed(node: fx.Node) -> Any:
    """The example value of an operator's result."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), fake_of)
    first: Any = next(each for each in args if isinstance(each, torch.Tensor))
    with first.fake_mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


def parts_of(call: fx.Node) -> list[fx.Node]:
    """The results of an operator that has several, and example values."""
    key, values = key_of(call), fake_of(call)
    parts = [call_for(call, operator.getitem, (call, number), {}) for number in range(len(values))]
    for part, value in zip(parts, values, strict=True):
        part.meta[key] = value
    return parts


def call_for(node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """A call at the graph's place of insertion, which says that it comes from where the node does."""
    made = node.graph.call_function(target, args, kwargs)
    made.meta.update({name: node.meta[name] for name in _PROVENANCE if name in node.meta})
    return made


def key_of(node: fx.Node) -> str:
    """Where the node has its example value."""
    return "example_value" if "example_value" in node.meta else "val"
