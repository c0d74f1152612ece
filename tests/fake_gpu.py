"""A driver that launches nothing: the way to a launch on CPU tensors, without a GPU, a compiler or the driver."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.codegen.instances import Instance
from moecompile.runtime import (
    fp8_experts,
    hopper,
    hopper_experts,
    hopper_fp8,
    hopper_kernels,
    hopper_quantize,
    hopper_routing,
    kernels,
    launch,
)
from moecompile.runtime.launch import Kernel
from moecompile.runtime.remembered import Memory

STREAM = 77
MAKING = {hopper_experts: ("_float32", "_halved", "_lines"), hopper_fp8: ("_float32", "_lines")}
"""What makes tensors as the kernels read them, perhaps."""


class FakeKernel(Kernel):
    """A kernel whose struct of arguments is what it is first given."""

    def layout_of(self, values: Sequence[Any]) -> struct.Struct:
        if self.layout is None:
            self.argument_bytes = -(-launch._layout(values).size // 64) * 64
        return super().layout_of(values)


class Arena:
    """Memory that is given again in the same order after `reset`, as the caching allocator does call after call."""

    def __init__(self) -> None:
        self.memory = torch.zeros(1 << 26, dtype=torch.uint8)
        self.used = 0

    def reset(self) -> None:
        self.used = 0

    def new_empty(self, like: Tensor, *size: Any, dtype: torch.dtype | None = None) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        kind = dtype or like.dtype
        begin, count = -(-self.used // 512) * 512, math.prod(shape) * kind.itemsize
        self.used = begin + count
        return self.memory[begin : self.used].view(kind).view(shape)

    def method(self) -> Callable[..., Tensor]:
        """`new_empty` as a method of tensors."""

        ordinary = Tensor.new_empty

        def method(like: Tensor, *size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
            if device is not None:  # of shapes only
                return ordinary(like, *size, dtype=dtype, device=device)
            return self.new_empty(like, *size, dtype=dtype)

        return method

    def keeping(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function with what it makes in this memory."""

        def kept(tensor: Tensor, *others: Any) -> Tensor:
            made = function(tensor, *others)
            return tensor if made is tensor else self.new_empty(made, made.shape).copy_(made)

        return kept


@dataclass(frozen=True)
class Launched:
    """What the driver was asked to launch."""

    instance: Instance
    blocks: int
    threads: int
    arguments: bytes


@dataclass
class FakeGpu:
    """The driver's part of a launch.

    Attributes:
        launched: what it was asked to launch.
        devices: which device was current at each launch.
        encoded: how many tensor maps it was asked for.
        contexts: those that were made current.
        announced: kernels that were said to be launched, to be compiled together.
        status: its answer to a launch.
        current: the current device.
        pause: seconds until it has read a launch's arguments.
        arena: where what the fused kernels write lies.
    """

    launched: list[Launched] = field(default_factory=list)
    devices: list[int | None] = field(default_factory=list)
    encoded: int = 0
    contexts: list[Any] = field(default_factory=list)
    announced: set[Instance] = field(default_factory=set)
    status: int = 0
    current: int | None = None
    pause: float = 0.0
    arena: Arena = field(default_factory=Arena)

    class CUresult:
        CUDA_ERROR_INVALID_CONTEXT = 201

    def cuCtxSetCurrent(self, context: Any) -> tuple[int]:
        self.contexts.append(context)
        self.status = 0
        return (0,)

    def cuLaunchKernel(self, kernel: Kernel, blocks: int, *others: int) -> tuple[int]:
        _, _, threads, _, _, _, stream, pointers, _ = others
        assert stream == STREAM
        self.devices.append(self.current)
        if self.pause:
            time.sleep(self.pause)
        address = ctypes.c_void_p.from_address(pointers).value
        assert address is not None
        arguments = ctypes.string_at(address, kernel.argument_bytes)
        self.launched.append(Launched(kernel.instance, blocks, threads, arguments))
        return (self.status,)

    @staticmethod
    def cuFuncGetName(kernel: Kernel) -> tuple[int, bytes]:
        return 0, kernel.instance.name.encode()

    def tensor_map(self, *contents: Any) -> bytes:
        """128 bytes that tell tensor maps apart."""
        self.encoded += 1
        return hashlib.sha512(repr(contents).encode()).digest() * 2

    @staticmethod
    def load(instance: Any, device: int | None) -> Kernel:
        """The kernel, with room for any arguments."""
        return _load(instance, device)

    def taken(self) -> list[Launched]:
        """What has been launched since the last time; the arena begins again."""
        launched, self.launched = self.launched, []
        self.arena.reset()
        return launched


@functools.cache
def _load(instance: Instance, device: int | None) -> Kernel:
    made = FakeKernel(instance, None, 1000, 0, 384, 1, 132, device)  # type: ignore[arg-type]
    made.function = made
    return made


@contextlib.contextmanager
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Within, the fused kernels serve CPU tensors, launched by the driver that is given."""
    gpu = FakeGpu()
    _forget()
    with monkeypatch.context() as patched:
        patched.setattr(launch, "_driver", lambda: gpu)
        patched.setattr(launch, "tensor_map", gpu.tensor_map)
        for module in (hopper, hopper_quantize, hopper_routing):
            patched.setattr(module, "load", _load)
        patched.setattr(hopper_kernels.cubins, "build", gpu.announced.update)
        patched.setattr(hopper_kernels, "THERE", Memory())
        patched.setattr(hopper, "serves", lambda device: True)
        patched.setattr(kernels, "_fused_module", lambda device: hopper_experts)
        patched.setattr(fp8_experts, "_hopper", lambda device: hopper_fp8)
        patched.setattr(torch._C, "_cuda_getDevice", lambda: gpu.current, raising=False)
        patched.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
        patched.setattr(torch.Tensor, "new_empty", gpu.arena.method())
        for module, names in MAKING.items():
            for name in names:
                patched.setattr(module, name, gpu.arena.keeping(getattr(module, name)))
        patched.setattr(hopper_routing, "_conformed", gpu.arena.keeping(hopper_routing._conformed))
        patched.setattr(torch.Tensor, "contiguous", gpu.arena.keeping(torch.Tensor.contiguous))
        yield gpu
    _forget()


def _forget() -> None:
    hopper_experts.EXPERTS.clear()
    hopper_fp8.EXPERTS.clear()
    hopper_routing.PLANS.clear()
    launch.described.cache_clear()
    _load.cache_clear()
