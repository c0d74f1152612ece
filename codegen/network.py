"""Kernels that reach other nodes by NVSHMEM: its device functions are compiled once, and linked with each of them.

Needs no GPU and no driver, but NVSHMEM's headers and library, the CUDA headers that these include, and nvJitLink: the
extra `nodes`. Kernels hold for one version of NVSHMEM, that of the library which the process loads.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from moecompile.codegen import nvrtc
from moecompile.codegen.instances import headers

FUNCTIONS = "network_functions.cuh"
OLDEST = Version("3.4.5")
"""Which torch 2.11 to 2.13 for CUDA 13 bring along."""
CURE = "pip install 'moecompile[nodes]'"
_compiling = threading.Lock()


class NetworkMissing(RuntimeError):
    """What kernels between nodes need is not on this machine; the message says what, and what to do."""


@dataclass(frozen=True)
class Installed:
    """NVSHMEM, as it is found here.

    Attributes:
        version: of its headers and its library for devices.
        includes: folders of headers: its own, and CUDA's.
        library: `libnvshmem_device.a`.
    """

    version: Version
    includes: tuple[Path, ...]
    library: Path


@functools.cache
def installed() -> Installed:
    """What kernels between nodes are compiled with.

    Raises:
        NetworkMissing: something is missing, or too old.
    """
    own, *others = (_headers(name) for name in ("nvshmem", "cudart", "cccl"))
    library = own.parent / "lib" / "libnvshmem_device.a"
    if not library.is_file():
        raise NetworkMissing(f"moecompile: {library} is missing, beside NVSHMEM's headers: {CURE}")
    text = (own / "non_abi" / "nvshmem_version.h").read_text(encoding="utf-8")
    numbers = [re.search(rf"NVSHMEM_VENDOR_{part}_VERSION (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    version = Version(".".join(found[1] for found in numbers if found is not None))
    if version < OLDEST:
        raise NetworkMissing(f"moecompile: expected NVSHMEM {OLDEST} or newer, got {version} in {own}: {CURE}")
    return Installed(version, (own, *others), library)


def _headers(name: str) -> Path:
    """The folder of these headers."""
    from cuda.pathfinder import find_nvidia_header_directory

    found = find_nvidia_header_directory(name)
    if not found:
        raise NetworkMissing(f"moecompile: kernels between nodes need the headers of {name}: {CURE}")
    return Path(found)


def compile_source(source: str, texts: Mapping[str, str], what: str) -> nvrtc.Compiled:
    """As `nvrtc.compile_source`, of a kernel that calls what network_functions.cuh declares.

    Raises:
        NetworkMissing: as `installed`, or there is no nvJitLink.
        nvrtc.CompileError: the source, or NVSHMEM's headers, are refused.
    """
    kernel = nvrtc.compile_source(source, texts, what, ("--relocatable-device-code=true",))
    return nvrtc.Compiled(_linked(kernel.cubin, what), kernel.log)


def _functions() -> bytes:
    """NVSHMEM's functions as the kernels call them, to be linked."""
    with _compiling:  # several kernels are compiled at a time
        return _compiled_functions()


@functools.cache
def _compiled_functions() -> bytes:
    flags = ["--relocatable-device-code=true", "-default-device"]  # headers for nvcc leave that word out
    flags += [f"--include-path={folder}" for folder in installed().includes]
    what = f"NVSHMEM {installed().version}'s functions"
    return nvrtc.compile_source(f'#include "{FUNCTIONS}"\n', headers(), what, flags).cubin


def _linked(kernel: bytes, what: str) -> bytes:
    """A kernel's machine code with all that it calls."""
    parts = ("CUBIN", kernel), ("CUBIN", _functions()), ("LIBRARY", installed().library.read_bytes())
    try:
        from cuda.bindings import nvjitlink

        link: Any = nvjitlink.create(1, [f"-arch={nvrtc.ARCHITECTURE}"])
    except (ImportError, RuntimeError) as error:
        raise NetworkMissing(
            f"moecompile: kernels between nodes are linked by nvJitLink, CUDA 13, which was not found "
            f"({type(error).__name__}: {error}): {CURE}"
        ) from error
    try:
        for number, (kind, content) in enumerate(parts):
            nvjitlink.add_data(link, getattr(nvjitlink.InputType, kind), content, len(content), f"part {number}")
        nvjitlink.complete(link)
        found = bytearray(nvjitlink.get_linked_cubin_size(link))
        nvjitlink.get_linked_cubin(link, found)
        return bytes(found)
    except nvjitlink.nvJitLinkError as error:
        log = bytearray(nvjitlink.get_error_log_size(link))
        nvjitlink.get_error_log(link, log)
        said = log.rstrip(b"\0").decode()
        raise nvrtc.CompileError(f"nvJitLink could not link {what} with NVSHMEM: {error}\n{said}") from error
    finally:
        nvjitlink.destroy(link)
