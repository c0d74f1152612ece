"""A driver that launches nothing: the way to a launch on CPU tensors, without a GPU, a compiler or the driver."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import hashlib
import importlib
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from moecompile.codegen.instances import Instance
from moecompile.runtime import (
    fp8_experts,
    hopper,
    hopper_exchange,
    hopper_experts,
    hopper_fp8,
    hopper_kernels,
    hopper_quantize,
    hopper_routing,
    kernels,
    launch,
    recording,
    remembered,
)
from moecompile.runtime.launch import Kernel
from moecompile.runtime.operators import ROOMS
from moecompile.runtime.remembered import CALLS

STREAM = 77


class FakeKernel(Kernel):
    """A kernel whose struct of arguments is what it is first given."""

    def layout_of(self, values: Sequence[Any]) -> struct.Struct:
        if self.layout is None:
            self.argument_bytes = -(-launch._layout(values).size // 64) * 64
        return super().layout_of(values)


class Arena(TorchDispatchMode):
    """Memory that is given again after `reset`, as the caching allocator does call after call.

    While the mode is entered, all that operators of moecompile make lies there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory = bytearray(1 << 26)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.begin = -address % 512
        self.address = address + self.begin
        self.used = 0
        self.begins: list[int] = []
        self.inside = False

    def reset(self) -> None:
        self.used = 0
        self.begins.clear()

    def named(self, launches: Sequence[Launched]) -> list[Launched]:
        """The launches with addresses in this memory called by which tensor they are of, counted as they are met."""
        met: dict[int, int] = {}

        def name(word: int) -> int:
            offset = word - self.address
            if not 0 <= offset < self.used:
                return word
            begin = self.begins[bisect.bisect_right(self.begins, offset) - 1]
            return (met.setdefault(begin, len(met)) << 32) + offset - begin

        named = []
        for each in launches:
            words = struct.unpack(f"{len(each.arguments) // 8}Q", each.arguments)
            named.append(replace(each, arguments=struct.pack(f"{len(words)}Q", *map(name, words))))
        return named

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moecompile":
            name = func._schema.name.split("::")[1]
            (room,) = (room for room, names in ROOMS.items() if name in names)
            inside, self.inside = self.inside, True
            try:
                with self:  # the operator itself has been dispatched
                    return getattr(importlib.import_module(f"moecompile.runtime.{room}"), name)(*args, **(kwargs or {}))
            finally:
                self.inside = inside
        found = func(*args, **(kwargs or {}))
        if not self.inside:
            return found
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        empty = "empty" in func._schema.name
        return tree_map_only(Tensor, lambda made: self.moved(made, given, empty), found)

    def moved(self, made: Tensor, given: set[int], empty: bool) -> Tensor:
        """The tensor in this memory, unless it is one of those given or a view of them."""
        storage = made.untyped_storage()
        if made.is_meta or not storage.nbytes() or storage.data_ptr() in given:
            return made
        begin = -(-self.used // 512) * 512
        self.used = begin + storage.nbytes()
        self.begins.append(begin)
        place = torch.frombuffer(self.memory, dtype=torch.uint8, offset=self.begin + begin, count=storage.nbytes())
        moved = place.view(made.dtype).as_strided(made.size(), made.stride())
        return moved.zero_() if empty else moved.copy_(made)  # nobody fills it, and somebody may take it for indices


@dataclass(frozen=True)
class Launched:
    """What the driver was asked to launch."""

    instance: Instance
    blocks: int
    threads: int
    arguments: bytes
    stream: int = STREAM
    early: bool = True


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
        streams: that there are.
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
    streams: tuple[int, ...] = (STREAM,)
    arena: Arena = field(default_factory=Arena)

    class CUresult:
        CUDA_ERROR_INVALID_CONTEXT = 201

    class CUlaunchAttributeID:
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6

    CUlaunchConfig = CUlaunchAttribute = CUlaunchAttributeValue = SimpleNamespace

    def cuCtxSetCurrent(self, context: Any) -> tuple[int]:
        self.contexts.append(context)
        self.status = 0
        return (0,)

    def cuLaunchKernelEx(self, how: Any, kernel: Kernel, pointers: int, extra: int) -> tuple[int]:
        assert how.hStream in self.streams and how.sharedMemBytes == kernel.shared_bytes and extra == 0
        for attribute in how.attrs[: how.numAttrs]:
            assert attribute.id == self.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            assert attribute.value.programmaticStreamSerializationAllowed
        self.devices.append(self.current)
        if self.pause:
            time.sleep(self.pause)
        address = ctypes.c_void_p.from_address(pointers).value
        assert address is not None
        arguments = ctypes.string_at(address, kernel.argument_bytes)
        shape = how.gridDimX, how.blockDimX
        self.launched.append(Launched(kernel.instance, *shape, arguments, how.hStream, bool(how.numAttrs)))
        return (self.status,)

    @staticmethod
    def cuFuncGetName(kernel: Kernel) -> tuple[int, bytes]:
        return 0, kernel.instance.name.encode()

    def tensor_map(self, address: int, *contents: Any) -> bytes:
        """128 bytes that tell tensor maps apart, and begin with the address."""
        self.encoded += 1
        return struct.pack("Q", address) + (hashlib.sha512(repr(contents).encode()).digest() * 2)[8:]

    @staticmethod
    def load(instance: Any, device: int | None) -> Kernel:
        """The kernel, with room for any arguments."""
        return _load(instance, device)

    def taken(self) -> list[Launched]:
        """What has been launched since the last time, addresses named; the arena begins again."""
        launched, self.launched = self.arena.named(self.launched), []
        self.arena.reset()
        return launched


@functools.cache
def _load(instance: Instance, device: int | None) -> Kernel:
    made = FakeKernel(instance, None, 1000, 0, 384, 1, 132, device)  # type: ignore[arg-type]
    made.function = made
    return made


@contextlib.contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, shared: int = 0) -> Iterator[FakeGpu]:
    """Within, the fused kernels serve CPU tensors, launched by the driver that is given.

    Replayed calls share a workspace of that many bytes at most: of none, so that launches are those of first calls.
    """
    gpu = FakeGpu()
    _forget()
    with monkeypatch.context() as patched:
        patched.setattr(launch, "_driver", lambda: gpu)
        patched.setattr(launch, "tensor_map", gpu.tensor_map)
        for module in (hopper, hopper_exchange, hopper_quantize, hopper_routing):
            patched.setattr(module, "load", _load)
        patched.setattr(hopper_kernels.cubins, "build", gpu.announced.update)
        patched.setattr(hopper_kernels, "THERE", set())
        patched.setattr(hopper, "serves", lambda device: True)
        patched.setattr(kernels, "_fused_module", lambda device: hopper_experts)
        patched.setattr(fp8_experts, "_hopper", lambda device: hopper_fp8)
        patched.setattr(torch._C, "_cuda_getDevice", lambda: gpu.current, raising=False)
        patched.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
        patched.setattr(remembered, "SEEN", 0)
        patched.setattr(recording, "SHARED", shared)
        with gpu.arena:
            yield gpu
    _forget()


def _forget() -> None:
    CALLS.clear()
    launch.described.cache_clear()
    _load.cache_clear()
