"""Compiled kernels: from memory, from disk, or from the compiler.

One file for each kernel in `<cache directory>/kernels`, named after the kernel and a digest of everything that makes
it: all sources, the instance, the compiler's version and flags. A file is written under another name and moved into
place, so that any number of processes may start at once; it begins with its own checksum, and one that does not match
is compiled again. The least recently used files go when the folder grows over its limit.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from moecompile.codegen import network, nvrtc
from moecompile.codegen.exchanges import reaches_network
from moecompile.codegen.instances import Instance, headers, source
from moecompile.codegen.progress import Progress

log = logging.getLogger("moecompile")

LIMIT = 512 * 2**20
"""Bytes that the folder may hold."""

NOWHERE = Path(os.devnull) / "moecompile, for there is no home"
_WRITING = ".writing-"
_CHECKSUM = hashlib.sha256().digest_size
_memory: dict[Instance, bytes] = {}
_building = threading.Lock()


def cache_directory() -> Path:
    """Where moecompile keeps what it may reuse; not created by this call.

    Where that is a home that cannot be found, as in some containers, it is a place where nothing can be kept: every
    process does without. (A folder among the temporary ones could be somebody else's.)
    """
    chosen = os.environ.get("MOECOMPILE_CACHE_DIR")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moecompile"
    except RuntimeError:  # a home that cannot be found
        return NOWHERE


def folder() -> Path:
    """Where the cubins lie."""
    return cache_directory() / "kernels"


def cubin(instance: Instance) -> bytes:
    """The kernel's machine code.

    Raises:
        moecompile.codegen.nvrtc.CompilerMissing: it has to be compiled and there is no NVRTC.
        moecompile.codegen.nvrtc.CompileError: with the compiler's log.
    """
    found = _memory.get(instance)
    if found is None:
        found = _memory[instance] = _from_disk(instance) or _build(instance)
    return found


def build(instances: Iterable[Instance]) -> None:
    """Makes sure that all of these are there: compiles several at a time, and says on a terminal how far it is.

    Raises:
        moecompile.codegen.nvrtc.CompilerMissing, CompileError: as `cubin`; what waits to be compiled is given up.
    """
    with _building:  # who comes meanwhile with the same kernels finds them
        missing = [instance for instance in dict.fromkeys(instances) if not _is_there(instance)]
        if len(missing) > 1:
            _build_together(missing)
        for instance in missing:
            cubin(instance)


def _is_there(instance: Instance) -> bool:
    if instance not in _memory and (found := _from_disk(instance)) is not None:
        _memory[instance] = found
    return instance in _memory


def _build_together(missing: Sequence[Instance]) -> None:
    pool = ThreadPoolExecutor(min(len(missing), _workers()), thread_name_prefix="moecompile-kernels")
    try:
        futures = [pool.submit(cubin, instance) for instance in missing]
    except RuntimeError:  # the main thread has ended, and no other is to begin: one after the other, then
        pool.shutdown()
        return
    try:
        with Progress("kernels", len(missing)) as progress:
            for future in as_completed(futures):
                future.result()
                progress.advance()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _workers() -> int:
    """How many kernels are compiled at a time: this process's share of the cores that it may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")  # of this machine, as torchrun says
    return max(1, cores // max(1, int(ranks))) if ranks.isdigit() else cores


def path(instance: Instance) -> Path:
    """The file of a kernel."""
    name = re.sub(r"\W+", "-", repr(instance)).strip("-")[:80]
    return folder() / f"{name}.{_key(instance)[:24]}.cubin"


def clear() -> int:
    """Deletes every compiled kernel on disk; returns how many there were."""
    _memory.clear()
    files = list(_files())
    for file, _ in files:
        file.unlink(missing_ok=True)
    for left in folder().glob(f"{_WRITING}*"):  # by a process that was killed, or that is about to try in vain
        left.unlink(missing_ok=True)
    return len(files)


def usage() -> tuple[int, int]:
    """How many kernels lie on disk, and their bytes."""
    sizes = [status.st_size for _, status in _files()]
    return len(sizes), sum(sizes)


@functools.cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for name, text in headers().items():
        digest.update(f"{name}\0{len(text)}\0{text}".encode())
    return digest.hexdigest()


def _key(instance: Instance) -> str:
    linked = [str(network.installed().version)] if reaches_network(instance) else []
    parts = (_sources_digest(), source(instance), str(nvrtc.version()), *nvrtc.FLAGS, *linked)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _from_disk(instance: Instance) -> bytes | None:
    file = path(instance)
    try:
        content = file.read_bytes()
    except OSError:
        return None
    checksum, machine_code = content[:_CHECKSUM], content[_CHECKSUM:]
    if not machine_code or hashlib.sha256(machine_code).digest() != checksum:
        log.warning("%s is damaged and is compiled again", file)
        return None
    with contextlib.suppress(OSError):
        os.utime(file)  # its last use
    return machine_code


def _build(instance: Instance) -> bytes:
    started = time.perf_counter()
    compiler = network if reaches_network(instance) else nvrtc
    compiled = compiler.compile_source(source(instance), headers(), repr(instance))
    log.info("compiled %s in %.1f s", instance, time.perf_counter() - started)
    try:
        _write(path(instance), compiled.cubin)
        _prune()
    except OSError as error:
        log.warning("compiled kernels cannot be kept in %s: %s. Every process compiles its own.", folder(), error)
    return compiled.cubin


def _write(file: Path, machine_code: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=_WRITING)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(hashlib.sha256(machine_code).digest() + machine_code)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _files() -> Iterator[tuple[Path, os.stat_result]]:
    for file in folder().glob("*.cubin"):
        with contextlib.suppress(FileNotFoundError):  # another process may be pruning
            if file.is_file():
                yield file, file.stat()


def _prune() -> None:
    """Deletes the least recently used files beyond the limit."""
    files = sorted(_files(), key=lambda found: found[1].st_mtime, reverse=True)
    held = 0
    for file, status in files:
        held += status.st_size
        if held > LIMIT:
            file.unlink(missing_ok=True)
