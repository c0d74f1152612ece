"""What the compiler made of a kernel, in short, kept between runs beside the compiled kernels.

Taking a kernel apart takes a second. A verdict is keyed as its cubin is, by the sources, the instance and the compiler,
and by how machine code is read here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import sass
from moecompile.codegen import cubins
from moecompile.codegen.instances import Instance

LIMIT = 4000
"""Files that are kept; beyond, the oldest go."""


@dataclass(frozen=True)
class Verdict:
    """What tests ask of one kernel's machine code.

    Attributes:
        operations: how often each instruction occurs, without its suffixes.
        between_products: the same, of what runs between two matrix products.
        registers: of a thread.
        spilled: bytes.
        serialised: what the compiler says if matrix products wait for one another; else empty.
    """

    operations: dict[str, int]
    between_products: dict[str, int]
    registers: int
    spilled: int
    serialised: str


def judged(instance: Instance) -> Verdict:
    """The verdict on a kernel, from an earlier run if nothing that makes it has changed."""
    file = _file(instance)
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Verdict(**json.loads(file.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        made = sass.machine(instance, Path(folder))
    serialised = "\n".join(line for line in made.log.splitlines() if "C75" in line)
    every, between = _counted([name for name, _ in made.operations]), _counted(made.between_products())
    found = Verdict(every, between, made.registers, made.spilled, serialised)
    with contextlib.suppress(OSError):  # a folder that cannot be written costs time only
        _keep(file, json.dumps(asdict(found)))
    return found


def _counted(names: list[str]) -> dict[str, int]:
    return dict(Counter(name.partition(".")[0] for name in names))


def _file(instance: Instance) -> Path:
    return cubins.path(instance).with_suffix(f".{_reader()}.verdict")


@functools.cache
def _reader() -> str:
    return hashlib.sha256(Path(sass.__file__).read_bytes() + Path(__file__).read_bytes()).hexdigest()[:8]


def _keep(file: Path, text: str) -> None:
    """Written under another name and moved into place: others may be reading."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(temporary, file)
    _prune(file.parent)


@functools.cache
def _prune(folder: Path) -> None:
    """Deletes the oldest verdicts beyond the limit, once in a process."""
    with contextlib.suppress(FileNotFoundError):  # another process may be pruning
        for file in sorted(folder.glob("*.verdict"), key=lambda file: file.stat().st_mtime)[:-LIMIT]:
            file.unlink(missing_ok=True)
