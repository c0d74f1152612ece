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
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Machine:
    """One compiled kernel.

    Attributes:
        operations: every instruction in order, as (name with its suffixes, operands).
        labels: before which of them a branch's target stands.
        log: the compiler's.
    """

    operations: tuple[tuple[str, str], ...]
    labels: dict[str, int]
    log: str

    def count(self, prefix: str) -> int:
        return sum(name.startswith(prefix) for name, _ in self.operations)

    def names(self, *prefixes: str) -> list[str]:
        """The instructions that begin so, in order."""
        return [name for name, _ in self.operations if name.startswith(prefixes)]

    def between_products(self) -> list[str]:
        """What runs from one matrix product to the next: what lies between them, and loops that write no results."""
        products = self._places("QGMMA", "HGMMA")
        stores = self._places("UTMASTG", "STG")
        parts = [range(products[0], products[-1] + 1)] if products else []
        for place, (name, operands) in enumerate(self.operations):
            target = _TARGET.search(operands) if name.startswith("BRA") else None
            loop = range(self.labels[target[1]] if target else place, place)
            if any(other in loop for other in products) and not any(other in loop for other in stores):
                parts.append(loop)
        return [self.operations[place][0] for place in sorted({place for part in parts for place in part})]

    def _places(self, *prefixes: str) -> list[int]:
        return [place for place, (name, _) in enumerate(self.operations) if name.startswith(prefixes)]

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
    operations: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := _OPERATION.match(line):
            operations.append((match[1], match[2]))
        elif match := _LABEL.match(line):
            labels[match[1]] = len(operations)
    return Machine(tuple(operations), labels, compiled.log)


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
