"""Compiled kernels on a device: loaded once, launched on torch's current stream.

    kernel = load(GroupedGemm("bfloat16", 256, 4, 2), device)
    kernel.launch(blocks, kernel.pack(map_a, map_b, offsets, 4096))

A kernel has one struct of arguments. Nothing here waits for the device, so that launches can be captured in CUDA
graphs; only loading cannot, and happens at the first use.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moecompile.codegen import cubins
from moecompile.codegen.instances import Instance

FACTS = ("shared_bytes", "argument_bytes", "threads", "blocks_of_a_cluster")  # `KernelFacts` of kernels/kernel.cuh


class DriverError(RuntimeError):
    """The CUDA driver refused a call; the message names the call, the kernel and its arguments."""


def driver_call(function: str, *arguments: Any, about: str = "") -> Any:
    """Calls the driver's function of that name and returns its values; raises DriverError with `about`."""
    status, *values = getattr(_driver(), function)(*arguments)
    if int(status):
        raise DriverError(f"{function} failed with {getattr(status, 'name', status)}{': ' if about else ''}{about}")
    return values[0] if len(values) == 1 else tuple(values)


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
        layout: of its arguments, once they have been packed.
    """

    instance: Instance
    function: Any
    shared_bytes: int
    argument_bytes: int
    threads: int
    blocks_of_a_cluster: int
    multiprocessors: int
    device: int
    layout: struct.Struct | None = None

    def pack(self, *values: bytes | Tensor | int | float | None) -> bytes:
        """The struct of arguments: tensors as pointers (None: null), numbers in 32 bits.

        Bytes, which are tensor maps or begin with one, begin at a multiple of 64.
        """
        if self.layout is None:
            self.layout = _layout(values)
            if not 0 <= self.argument_bytes - self.layout.size < 64:  # tensor maps align the struct to 64 bytes
                raise ValueError(
                    f"{self.instance} takes {self.argument_bytes} bytes of arguments, got {self.layout.size}"
                )
        numbers = [value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in values]
        return self.layout.pack(*numbers).ljust(self.argument_bytes, b"\0")

    def launch(self, blocks: int, arguments: bytes) -> None:
        """Launches that many blocks on the current stream of the kernel's device."""
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self.launch(blocks, arguments)
        storage = ctypes.c_char_p(arguments)  # the driver copies them before it returns
        pointers = (ctypes.c_void_p * 1)(ctypes.cast(storage, ctypes.c_void_p))
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        (status,) = _driver().cuLaunchKernel(
            self.function, blocks, 1, 1, self.threads, 1, 1, self.shared_bytes, stream, ctypes.addressof(pointers), 0
        )
        if int(status):
            raise DriverError(
                f"cuLaunchKernel failed with {getattr(status, 'name', status)}: {self.instance}, {blocks} blocks of "
                f"{self.threads} threads, {self.shared_bytes} bytes of shared memory, arguments {arguments.hex()}"
            )
        return None


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
        torch.cuda.current_stream()  # makes torch's context of the device the driver's
        about = f"{instance} on device {device}"
        module = driver_call("cuModuleLoadData", machine_code, about=about)
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
    return Kernel(instance, function, shared_bytes, argument_bytes, threads, cluster, multiprocessors, device)


@functools.lru_cache(maxsize=65536)
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
