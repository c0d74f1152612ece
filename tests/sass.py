"""Machine code as text: what the compiler made of a kernel, without a GPU.

Making it takes two seconds, so it is kept between runs beside the compiled kernels, keyed as these are, by the sources,
the instance and the compiler, and by how it is read here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from moecompile.codegen import cubins, instances, nvrtc
from moecompile.codegen.instances import Instance

LIMIT = 4000
"""Files that are kept, of some 20 KB; beyond, the oldest go."""

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

    @property
    def counts(self) -> Counter[str]:
        """How often each instruction occurs, without its suffixes."""
        return _counted(name for name, _ in self.operations)

    def names(self, *prefixes: str) -> list[str]:
        """The instructions that begin so, in order."""
        return [name for name, _ in self.operations if name.startswith(prefixes)]

    def between_products(self) -> Counter[str]:
        """What runs from one matrix product to the next: what lies between them, and loops that write no results."""
        products = self._places("QGMMA", "HGMMA")
        stores = self._places("UTMASTG", "STG")
        parts = [range(products[0], products[-1] + 1)] if products else []
        for place, (name, operands) in enumerate(self.operations):
            target = _TARGET.search(operands) if name.startswith("BRA") else None
            loop = range(self.labels[target[1]] if target else place, place)
            if any(other in loop for other in products) and not any(other in loop for other in stores):
                parts.append(loop)
        return _counted(self.operations[place][0] for place in {place for part in parts for place in part})

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

    @property
    def serialised(self) -> str:
        """What the compiler says if matrix products wait for one another; else empty."""
        return "\n".join(line for line in self.log.splitlines() if "C75" in line)


def _counted(names: Iterable[str]) -> Counter[str]:
    return Counter(name.partition(".")[0] for name in names)


def machine(instance: Instance) -> Machine:
    """What a kernel becomes, from an earlier run if nothing that makes it has changed."""
    file = cubins.path(instance).with_suffix(f".{_reader()}.sass")
    with contextlib.suppress(OSError, ValueError, TypeError, zlib.error):
        kept = json.loads(zlib.decompress(file.read_bytes()))
        return Machine(tuple((name, operands) for name, operands in kept["operations"]), kept["labels"], kept["log"])
    made = _taken_apart(instance)
    with contextlib.suppress(OSError):  # a folder that cannot be written costs time only
        _keep(file, zlib.compress(json.dumps(asdict(made)).encode()))
    return made


def _taken_apart(instance: Instance) -> Machine:
    """Compiles a kernel and reads what came of it."""
    compiled = nvrtc.compile_source(instances.source(instance), instances.headers(), repr(instance))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        text = subprocess.run([disassembler(), "-c", file.name], capture_output=True, text=True, check=True).stdout
    operations: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := _OPERATION.match(line):
            operations.append((match[1], match[2]))
        elif match := _LABEL.match(line):
            labels[match[1]] = len(operations)
    return Machine(tuple(operations), labels, compiled.log)


@functools.cache
def _reader() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def _keep(file: Path, content: bytes) -> None:
    """Written under another name and moved into place: others may be reading."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
    os.replace(temporary, file)
    _prune(file.parent)


@functools.cache
def _prune(folder: Path) -> None:
    """Deletes the oldest files beyond the limit, once in a process."""
    with contextlib.suppress(FileNotFoundError):  # another process may be pruning
        for file in sorted(folder.glob("*.sass"), key=lambda file: file.stat().st_mtime)[:-LIMIT]:
            file.unlink(missing_ok=True)


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
