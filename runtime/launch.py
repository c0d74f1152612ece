"""Compiled kernels on a device: loaded once, launched on torch's current stream.

    kernel = load(GroupedGemm("bfloat16", 256, 4, 2), device)
    Launch(kernel, blocks, (Mapped(a, boxes), offsets, 4096)).run()

A kernel has one struct of arguments. Nothing here waits for the device, so that launches can be captured in CUDA
graphs; only loading cannot, and happens at the first use.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moecompile.codegen import cubins
from moecompile.codegen.exchanges import reaches_network
from moecompile.codegen.instances import Instance
from moecompile.runtime import network

FACTS = ("shared_bytes", "argument_bytes", "threads", "blocks_of_a_cluster")  # `KernelFacts` of kernels/kernel.cuh

BEGINS_EARLY = "PROGRAMMATIC_STREAM_SERIALIZATION", "programmaticStreamSerializationAllowed"
"""A launch that may begin while the one before it still runs."""
RUNS_TOGETHER = "COOPERATIVE", "cooperative"
"""A launch all of whose blocks run at once."""


class DriverError(RuntimeError):
    """The CUDA driver refused a call; the message names the call, the kernel and its arguments."""


def driver_call(function: str, *arguments: Any, about: str = "") -> Any:
    """Calls the driver's function of that name and returns its values; raises DriverError with `about`."""
    status, *values = getattr(_driver(), function)(*arguments)
    if int(status):
        raise DriverError(f"{function} failed with {getattr(status, 'name', status)}{': ' if about else ''}{about}")
    return values[0] if len(values) == 1 else tuple(values)


@dataclass(frozen=True, eq=False)
class Boxes:
    """How a kernel copies a tensor in bulk: all that a tensor map says, but for the address.

    One object for each content, made by `boxes_of`, so that it is its own key.

    Attributes:
        dtype: of the elements.
        shape: of the tensor.
        strides: in elements.
        box: elements that one copy moves along each dimension.
        target: whether what the kernel takes is a `Target` of kernels/box.cuh, which begins with the map.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    target: bool


@functools.lru_cache(maxsize=8192)
def boxes_of(
    dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], target: bool = False
) -> Boxes:
    """The only `Boxes` of this content."""
    return Boxes(dtype, shape, strides, box, target)


@functools.lru_cache(maxsize=65536)
def described(boxes: Boxes, address: int) -> bytes:
    """What a kernel is told of the tensor at that address: a tensor map, 128 bytes, or a `Target`, 192."""
    encoded = tensor_map(address, boxes.dtype, boxes.shape, boxes.strides, boxes.box)
    if not boxes.target:
        return encoded
    return (encoded + struct.pack("<Qii", address, boxes.shape[1], boxes.strides[0])).ljust(192, b"\0")


@dataclass(frozen=True, eq=False)
class Mapped:
    """An argument that is read or written by bulk copies: memory of `tensor`, seen as `boxes` say."""

    tensor: Tensor
    boxes: Boxes

    def described(self) -> bytes:
        """A tensor map or a `Target`."""
        return described(self.boxes, self.tensor.data_ptr())


Value = bytes | Mapped | Tensor | int | float | None
"""An argument of a kernel."""


@dataclass
class Kernel:
    """One kernel in a device's memory.

    Attributes:
        instance: what it was made from.
        function: the driver's handle.
        shared_bytes: of dynamic shared memory for each block.
        argument_bytes: size of its struct of arguments.
        threads: of a block.
        blocks_of_a_cluster: the grid is a multiple of it.
        multiprocessors: of the device; a persistent kernel's grid.
        device: its index.
        context: the driver's handle of torch's context on it.
        layout: of its arguments, once they have been packed.
        idle: memory for arguments that no launch is using.
        idle_late: likewise, of launches that do not begin early.
    """

    instance: Instance
    function: Any
    shared_bytes: int
    argument_bytes: int
    threads: int
    blocks_of_a_cluster: int
    multiprocessors: int
    device: int
    context: Any = None
    layout: struct.Struct | None = None
    idle: list[_Storage] = field(default_factory=list, repr=False, compare=False)
    idle_late: list[_Storage] = field(default_factory=list, repr=False, compare=False)

    def pack(self, *values: Value) -> bytes:
        """The struct of arguments: tensors as pointers (None: null), numbers in 32 bits.

        Bytes, which are tensor maps or begin with one, begin at a multiple of 64.
        """
        packed = [value.described() if isinstance(value, Mapped) else value for value in values]
        numbers = [value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in packed]
        return self.layout_of(packed).pack(*numbers)

    def layout_of(self, values: Sequence[bytes | Tensor | int | float | None]) -> struct.Struct:
        """How its arguments, of which `values` are some, lie in its struct, padding included."""
        if self.layout is None:
            layout = _layout(values)
            padding = self.argument_bytes - layout.size
            if not 0 <= padding < 64:  # tensor maps align the struct to 64 bytes
                raise ValueError(f"{self.instance} takes {self.argument_bytes} bytes of arguments, got {layout.size}")
            self.layout = struct.Struct(f"{layout.format}{padding}x")
        return self.layout

    def launch(self, blocks: int, arguments: bytes, early: bool = True) -> None:
        """Launches that many blocks on the current stream of the kernel's device."""
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self.launch(blocks, arguments, early)
        return self.launch_on(torch._C._cuda_getCurrentRawStream(self.device), blocks, arguments, early)

    def launch_together(self, blocks: int, arguments: bytes) -> None:
        """Launches blocks that wait for each other on the current stream: all of them run at once.

        Raises:
            DriverError: the device has no room for all.
        """
        storage = _Storage(self, early=False)
        storage.bytes[:] = arguments
        storage.how.gridDimX, storage.how.hStream = blocks, torch._C._cuda_getCurrentRawStream(self.device)
        storage.how.attrs, storage.how.numAttrs = [_attribute(*RUNS_TOGETHER)], 1
        about = f"{self.instance}, {blocks} blocks of {self.threads} threads at once"
        driver_call("cuLaunchKernelEx", storage.how, self.function, storage.address, 0, about=about)

    def launch_on(self, stream: int, blocks: int, arguments: bytes, early: bool = True) -> None:
        """Launches on that stream of the kernel's device, which is the current one."""
        idle = self.idle if early else self.idle_late
        try:  # taking from the list and giving back are atomic: no two threads have the same memory
            storage = idle.pop()
        except IndexError:
            storage = _Storage(self, early)
        storage.bytes[:] = arguments
        driver, how = _driver(), storage.how
        how.gridDimX, how.hStream = blocks, stream
        (status,) = driver.cuLaunchKernelEx(how, self.function, storage.address, 0)
        if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # autograd's thread may not have met the device yet
            driver_call("cuCtxSetCurrent", self.context, about=f"{self.instance} on device {self.device}")
            (status,) = driver.cuLaunchKernelEx(how, self.function, storage.address, 0)
        idle.append(storage)  # the driver has copied the arguments
        if int(status):
            raise DriverError(
                f"cuLaunchKernelEx failed with {getattr(status, 'name', status)}: {self.instance}, {blocks} blocks of "
                f"{self.threads} threads, {self.shared_bytes} bytes of shared memory, arguments {arguments.hex()}"
            )


class _Storage:
    """Memory for the arguments of one launch, and for what the driver is given.

    Attributes:
        bytes: the arguments.
        address: of an array of one pointer to them.
        how: all else that a launch says, but for the blocks and the stream. The grid may begin before others end: every
            kernel waits for it on its own (`wait_for_earlier_grids` of kernels/ptx.cuh).
    """

    def __init__(self, kernel: Kernel, early: bool) -> None:
        self.memory = (ctypes.c_char * kernel.argument_bytes)()
        self.bytes = memoryview(self.memory).cast("B")
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.memory))
        self.address = ctypes.addressof(self.pointers)
        driver = _driver()
        self.how = driver.CUlaunchConfig()
        self.how.gridDimY = self.how.gridDimZ = self.how.blockDimY = self.how.blockDimZ = 1
        self.how.blockDimX, self.how.sharedMemBytes = kernel.threads, kernel.shared_bytes
        self.how.attrs, self.how.numAttrs = [_attribute(*BEGINS_EARLY)], int(early)


def _attribute(name: str, member: str) -> Any:
    """An attribute of a launch that is on, and the member of its value that says so."""
    driver = _driver()
    attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
    attribute.id = getattr(driver.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}")
    setattr(value, member, 1)
    attribute.value = value
    return attribute


class _Observers(threading.local):
    """Who is told of what a thread launches, and of its streams that wait for each other.

    Attributes:
        noting: functions of the launch.
        waits: functions of the stream that waits, and of the one that it waits for.
    """

    def __init__(self) -> None:
        self.noting: list[Callable[[Launch], None]] = []
        self.waits: list[Callable[[torch.cuda.Stream, torch.cuda.Stream], None]] = []


observers = _Observers()


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with its arguments, not yet launched."""

    kernel: Kernel
    blocks: int
    values: tuple[Value, ...]
    early: bool = True
    """Whether the grid may begin before the one before it in its stream has ended."""
    anyway: bool = False
    """Whether it ends what another stream has begun, and has to be launched even if something fails before it."""

    def run(self) -> None:
        """Launches it on the current stream of the kernel's device."""
        self.kernel.launch(self.blocks, self.kernel.pack(*self.values), self.early)
        for note in observers.noting:
            note(self)


def wait_for(waiting: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
    """What is launched on the first stream from now on begins when all that is on the other is done."""
    waiting.wait_stream(other)
    for note in observers.waits:
        note(waiting, other)


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _layout(values: Sequence[bytes | Tensor | int | float | None]) -> struct.Struct:
    """How such values lie in a struct of arguments."""
    words = "<"
    for value in values:
        if isinstance(value, bytes):
            word, align = f"{len(value)}s", 64
        else:
            word, align = {int: ("i", 4), float: ("f", 4)}.get(type(value), ("Q", 8))
        words += f"{-struct.calcsize(words) % align}x{word}"
    return struct.Struct(words)


@functools.cache
def load(instance: Instance, device: int) -> Kernel:
    """The kernel on the device of that index, compiled if need be.

    Raises:
        DriverError: the device does not take it.
        moecompile.codegen.nvrtc.CompileError, CompilerMissing: it could not be compiled.
    """
    machine_code = cubins.cubin(instance)
    with torch.cuda.device(device):
        about = f"{instance} on device {device}"
        context = driver_call("cuDevicePrimaryCtxRetain", driver_call("cuDeviceGet", device), about=about)  # torch's
        driver_call("cuCtxSetCurrent", context, about=about)  # this thread may not have met the device yet
        module = driver_call("cuModuleLoadData", machine_code, about=about)
        if reaches_network(instance):
            network.prepare(int(module))
        function = driver_call("cuModuleGetFunction", module, instance.name.encode(), about=about)
        pointer, size = driver_call("cuModuleGetGlobal", module, b"facts", about=about)
        facts = (ctypes.c_int32 * len(FACTS))()
        if size != ctypes.sizeof(facts):
            raise DriverError(f"{about}: the kernel states {size} bytes of facts, expected {ctypes.sizeof(facts)}")
        driver_call("cuMemcpyDtoH", ctypes.addressof(facts), pointer, size, about=about)
        shared_bytes, argument_bytes, threads, cluster = facts
        limit = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        driver_call("cuFuncSetAttribute", function, limit, shared_bytes, about=about)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return Kernel(instance, function, shared_bytes, argument_bytes, threads, cluster, multiprocessors, device, context)


def tensor_map(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> bytes:
    """A descriptor for bulk copies of boxes of a tensor, innermost dimension last, as torch writes it.

    Boxes whose innermost dimension is 128 bytes are swizzled; elements beyond the tensor are read as zeros.

    Args:
        address: of the first element, a multiple of 16.
        dtype: of the elements.
        shape: of the tensor, at most five dimensions.
        strides: in elements; the last is 1, the others are multiples of 16 bytes.
        box: elements that one copy moves along each dimension, at most 256.
    """
    driver = _driver()
    kinds = driver.CUtensorMapDataType
    kind = {
        torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        torch.float32: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        torch.float8_e4m3fn: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    }[dtype]
    swizzle = driver.CUtensorMapSwizzle
    swizzled = box[-1] * dtype.itemsize == 128
    encoded = driver_call(
        "cuTensorMapEncodeTiled",
        kind,
        len(shape),
        address,
        [driver.cuuint64_t(size) for size in reversed(shape)],
        [driver.cuuint64_t(stride * dtype.itemsize) for stride in reversed(strides[:-1])],
        [driver.cuuint32_t(size) for size in reversed(box)],
        [driver.cuuint32_t(1)] * len(shape),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle.CU_TENSOR_MAP_SWIZZLE_128B if swizzled else swizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        about=f"{dtype} {shape} with strides {strides} in boxes of {box} at {address:#x}",
    )
    return ctypes.string_at(encoded.getPtr(), 128)
