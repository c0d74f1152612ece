"""CUDA C++ to a cubin, by NVRTC. Needs no GPU and no driver."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ARCHITECTURE = "sm_90a"
"""Exactly this one: wgmma and setmaxnreg exist nowhere else, and PTX would bind us to the driver's compiler."""

FLAGS = (
    f"--gpu-architecture={ARCHITECTURE}",
    "--std=c++17",
    "--ptxas-options=-v",
    "--ptxas-options=-warn-spills",
)


class CompilerMissing(RuntimeError):
    """NVRTC's library is not on this machine."""


class CompileError(RuntimeError):
    """NVRTC refused the source: a bug of ours, or a compiler that is too old."""


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code.

    Attributes:
        cubin: an ELF file for `ARCHITECTURE`.
        log: what the compiler said; ptxas writes registers, stack and spills into it.
    """

    cubin: bytes
    log: str


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's version, major and minor; CompilerMissing if there is none."""
    try:
        from cuda.bindings import nvrtc

        major, minor = _checked(nvrtc.nvrtcVersion(), "nvrtcVersion")
    except (ImportError, RuntimeError) as error:
        raise CompilerMissing(
            "moecompile's kernels are compiled by NVRTC, CUDA 13, which was not found "
            f"({type(error).__name__}: {error}). A torch built for CUDA 13 brings it; without one: "
            "pip install cuda-python nvidia-cuda-nvrtc"
        ) from error
    return int(major), int(minor)


def compile_source(source: str, headers: Mapping[str, str], what: str, flags: Sequence[str] = ()) -> Compiled:
    """Compiles one translation unit.

    Args:
        source: CUDA C++.
        headers: text of the files it may include, by name.
        what: names it in errors.
        flags: beside FLAGS.

    Raises:
        CompileError: with the compiler's log, `what` and the source.
        CompilerMissing: there is no NVRTC.
    """
    version()
    from cuda.bindings import nvrtc

    names, texts = list(headers), list(headers.values())
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            source.encode(), b"kernel.cu", len(names), [text.encode() for text in texts], [n.encode() for n in names]
        ),
        "nvrtcCreateProgram",
    )
    try:
        given = [flag.encode() for flag in (*FLAGS, *flags)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if int(status):
            raise CompileError(f"NVRTC {'.'.join(map(str, version()))} could not compile {what}:\n{log}\n{source}")
        return Compiled(_text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _text(size_of: Any, get: Any, program: Any) -> bytes:
    """What NVRTC writes into a buffer of the size that it names."""
    buffer = bytearray(_checked(size_of(program), size_of.__name__))
    filled = bytes(buffer)
    _checked(get(program, filled), get.__name__)
    return filled


def _checked(result: tuple[Any, ...], function: str) -> Any:
    """The values that NVRTC returned; raises if its status is an error."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"{function} failed: {getattr(status, 'name', status)}")
    return values[0] if len(values) == 1 else tuple(values)
