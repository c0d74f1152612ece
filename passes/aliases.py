"""Which tensors of a graph share memory, read off the example values that Dynamo left."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moecompile.passes import radix
from moecompile.passes.calls import bind, is_named_writing
from moecompile.runtime.block_scaled import BlockScaled


def is_foreign(value: object) -> bool:
    """Whether it is a tensor subclass with operators of its own that is not ours: a DTensor, say."""
    return is_traceable_wrapper_subclass(value) and not isinstance(value, BlockScaled)


def fake_of(node: fx.Node) -> Any:
    """The example value Dynamo or AOTAutograd left on the node."""
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta.get("val")


class Aliases:
    """Which tensors of a graph may share memory, and which names stand for exactly the same elements.

    Views share the storage of their FakeTensor, which Dynamo's own tracing kept true; operations that may or may
    not copy (reshape, to, contiguous) are told apart by it as well. Only of dropout it keeps a copy where PyTorch gives
    its input back, in inference. What has no FakeTensor is taken to alias nothing.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._by_storage: dict[int, list[fx.Node]] = {}
        self._storage: dict[fx.Node, tuple[int, ...]] = {}
        same: dict[int, int] = {}  # storages that are another one when the graph runs
        for node in graph.nodes:
            fake = fake_of(node)
            keys: tuple[int, ...]
            if isinstance(fake, torch.Tensor):
                own = fake.untyped_storage()._cdata
                if "dropout" in getattr(node.target, "__name__", "") and node.all_input_nodes:
                    (same[own],) = self._storage.get(node.all_input_nodes[0], (own,))
                keys = (same.get(own, own),)
            elif isinstance(fake, (tuple, list)):
                keys = tuple(sorted({same.get(key, key) for key in _storages(fake)}))
            else:
                continue
            self._storage[node] = keys
            for key in keys:
                self._by_storage.setdefault(key, []).append(node)

    def of(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that may share memory with the node, itself included."""
        found = {alias: None for key in self._storage.get(node, ()) for alias in self._by_storage[key]}
        return list(found) or [node]

    def share(self, first: fx.Node, second: fx.Node) -> bool:
        """Whether two nodes may share memory."""
        return first is second or bool(set(self._storage.get(first, ())) & set(self._storage.get(second, ())))

    def same_elements(self, first: fx.Node, second: fx.Node) -> bool:
        """Whether two nodes name exactly the same elements in the same shape."""
        a, b = fake_of(first), fake_of(second)
        if first is second:
            return True
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or not self.share(first, second):
            return False
        return _layout(a) == _layout(b)

    def written(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that a mutating node writes; all it is given where it may be any of them."""
        out = node.kwargs.get("out")
        if out is not None:
            return _nodes(out)
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            found: list[fx.Node] = []
            for position, argument in enumerate(target._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                    found += _nodes(value)
            return found
        if isinstance(target, (torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)):
            return list(node.all_input_nodes)
        call = bind(node)
        first = node.args[0] if node.args else node.kwargs.get("input")
        alone = call.inplace if call is not None else is_named_writing(node)
        return (_nodes(first) if alone else []) or list(node.all_input_nodes)


def _nodes(argument: Any) -> list[fx.Node]:
    """The nodes in an argument: itself, or those of a list."""
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def _storages(fake: Any) -> list[int]:
    return [tensor.untyped_storage()._cdata for tensor in tensors_in(fake)]


def tensors_in(fake: Any) -> list[torch.Tensor]:
    """The tensors in an example value, which may be a tuple."""
    if isinstance(fake, torch.Tensor):
        return [fake]
    if isinstance(fake, (tuple, list)):
        return [tensor for part in fake for tensor in tensors_in(part)]
    return []


def lies_in_order(tensor: torch.Tensor) -> bool:
    """Whether a tensor is contiguous for certain; asked without a guard."""
    reach: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if type(size) is int and size == 1:
            continue
        if radix.difference(radix.size_of(stride), reach) != 0:
            return False
        reach = reach * radix.size_of(size)
    return True


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    sizes = tuple(radix.size_of(size) for size in tensor.shape)
    strides = tuple(radix.size_of(stride) for stride in tensor.stride())
    return sizes, strides, radix.size_of(tensor.storage_offset()), tensor.dtype


def empty_fake(like: torch.Tensor, shape: tuple[Any, ...], dtype: torch.dtype) -> torch.Tensor:
    """A new tensor of these properties on the device of the other.

    Made without PyTorch's dispatcher where it can be: a layer makes six of them, which would take ten times as long.
    """
    if isinstance(like, FakeTensor) and all(type(size) is int for size in shape):
        return FakeTensor(like.fake_mode, torch.empty(shape, dtype=dtype, device="meta"), like.device)
    with like.fake_mode if isinstance(like, FakeTensor) else contextlib.nullcontext():
        return like.detach().new_empty(shape, dtype=dtype)
