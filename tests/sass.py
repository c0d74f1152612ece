"""Machine code as text: what the compiler made of a kernel, without a GPU."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from moecompile.codegen import instances, nvrtc
from moecompile.codegen.instances import Instance

_OPERATION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*?);")
_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Machine:
    """One compiled kernel.

    Attributes:
        operations: every instruction in order, as (name with its suffixes, operands).
        log: the compiler's.
    """

    operations: tuple[tuple[str, str], ...]
    log: str

    def count(self, prefix: str) -> int:
        return sum(name.startswith(prefix) for name, _ in self.operations)

    @property
    def registers(self) -> int:
        (found,) = _USED.findall(self.log)
        return int(found)

    @property
    def spilled(self) -> int:
        (found,) = _SPILLED.findall(self.log)
        return sum(map(int, found))


def machine(instance: Instance, folder: Path) -> Machine:
    """Compiles a kernel and takes it apart."""
    compiled = nvrtc.compile_source(instances.source(instance), instances.headers(), repr(instance))
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.cubin)
    text = subprocess.run([disassembler(), "-c", file], capture_output=True, text=True, check=True).stdout
    found = (_OPERATION.match(line) for line in text.splitlines())
    return Machine(tuple((match[1], match[2]) for match in found if match), compiled.log)


def disassembler() -> str:
    from cuda.pathfinder import find_nvidia_binary_utility

    found = find_nvidia_binary_utility("nvdisasm")
    assert found, "nvdisasm is missing: pip install nvidia-cuda-nvdisasm"
    return found


def require_compiler() -> None:
    """Skips the tests of a file on machines that NVIDIA ships no compiler for."""
    try:
        nvrtc.version()
    except nvrtc.CompilerMissing as error:
        pytest.skip(str(error), allow_module_level=True)
