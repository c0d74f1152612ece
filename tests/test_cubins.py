"""The cache of compiled kernels: whatever other processes and damaged files do, the right kernel or none."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import sass
from moecompile.codegen import cubins, nvrtc
from moecompile.codegen.gemms import GroupedGemm

sass.require_compiler()

SMALL = GroupedGemm("bfloat16", 128, 6)
OTHER = GroupedGemm("float16", 128, 6)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cubins, "_memory", {})
    return tmp_path / "kernels"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compiled, with machine code that takes no time."""
    done: list[str] = []

    def compile_source(source: str, headers: object, what: str) -> nvrtc.Compiled:
        done.append(what)
        return nvrtc.Compiled(what.encode() * 100, "")

    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    return done


def forget() -> None:
    cubins._memory.clear()


def test_a_kernel_is_compiled_once_for_all_processes(folder: Path) -> None:
    script = (
        "import hashlib\nfrom moecompile.codegen import cubins\n"
        "from moecompile.codegen.gemms import GroupedGemm, Plain\n"
        f"print(hashlib.sha256(cubins.cubin({SMALL!r})).hexdigest())"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(3)
    ]
    results = {process.communicate()[0] for process in running}
    assert len(results) == 1 and all(process.returncode == 0 for process in running)
    assert [file.name for file in folder.iterdir()] == [cubins.path(SMALL).name]
    assert cubins.cubin(SMALL).startswith(b"\x7fELF")


def test_disk_then_memory(builds: list[str]) -> None:
    first = cubins.cubin(SMALL)
    forget()
    assert cubins.cubin(SMALL) == first and cubins.cubin(SMALL) == first
    assert cubins.cubin(OTHER) != first
    assert builds == [repr(SMALL), repr(OTHER)]


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 5000])
def test_a_damaged_file_is_compiled_again(damage: bytes, builds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    first = cubins.cubin(SMALL)
    forget()
    cubins.path(SMALL).write_bytes(damage)
    with caplog.at_level(logging.WARNING, logger="moecompile"):
        assert cubins.cubin(SMALL) == first
    assert "damaged" in caplog.text and len(builds) == 2
    forget()
    assert cubins.cubin(SMALL) == first and len(builds) == 2


def test_another_source_or_compiler_misses(builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    files = {cubins.path(SMALL)}
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 9))
    files.add(cubins.path(SMALL))
    monkeypatch.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, "-lineinfo"))
    files.add(cubins.path(SMALL))
    monkeypatch.setattr(cubins, "_sources_digest", lambda: "other")
    files.add(cubins.path(SMALL))
    assert len(files) == 4


def test_the_folder_has_a_limit(folder: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [GroupedGemm("bfloat16", 128, stages) for stages in range(2, 7)]
    for age, kernel in enumerate(kernels):
        cubins.cubin(kernel)
        os.utime(cubins.path(kernel), (1000 + age, 1000 + age))
    forget()
    cubins.cubin(kernels[0])  # used again: the newest
    size = cubins.path(kernels[0]).stat().st_size
    monkeypatch.setattr(cubins, "LIMIT", 3 * size + size // 2)
    cubins.cubin(SMALL if SMALL not in kernels else OTHER)
    kept = {file.name for file in folder.iterdir()}
    assert cubins.path(kernels[0]).name in kept and cubins.path(kernels[1]).name not in kept
    assert cubins.usage()[0] == len(kept) == 3 and cubins.usage()[1] <= cubins.LIMIT
    assert cubins.clear() == 3 and cubins.usage() == (0, 0)


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "file"
    place.write_text("not a folder")
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(place))
    with caplog.at_level(logging.WARNING, logger="moecompile"):
        assert cubins.cubin(SMALL)
    assert "cannot be kept" in caplog.text


def test_progress_is_for_terminals_and_several_kernels(
    builds: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cubins.build([SMALL, OTHER])
    assert capsys.readouterr().err == ""
    forget()
    cubins.clear()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cubins.build([SMALL, OTHER])
    shown = capsys.readouterr().err
    assert "1/2" in shown and "2/2" in shown and shown.endswith("\n")
    cubins.build([SMALL, OTHER])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stream", ["none", "closed", "writes only", "another rank"])
def test_nobody_watches(stream: str, builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if stream == "none":
        monkeypatch.setattr(sys, "stderr", None)
    elif stream == "another rank":
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: pytest.fail("it does not matter"))
    else:
        closed = io.StringIO()
        closed.close()
        only = SimpleNamespace(write=len, flush=lambda: None)
        monkeypatch.setattr(sys, "stderr", closed if stream == "closed" else only)
    cubins.build([SMALL, OTHER])
    assert set(builds) == {repr(SMALL), repr(OTHER)}


def test_the_first_error_ends_a_build(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels, begun = [GroupedGemm("bfloat16", 128, stages) for stages in range(2, 7)], list[str]()

    def compile_source(source: str, headers: object, what: str) -> nvrtc.Compiled:
        begun.append(what)
        if what == repr(kernels[0]):
            raise nvrtc.CompileError(what)
        time.sleep(0.2)
        return nvrtc.Compiled(b"code", "")

    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    monkeypatch.setattr(cubins, "_workers", lambda: 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(nvrtc.CompileError):
        cubins.build(kernels)
    assert len(begun) <= 2, "what waits is given up"
    for thread in threading.enumerate():  # what had begun is kept, here and not in the next test's folder
        if thread.name.startswith("moecompile-kernels"):
            thread.join()
    assert capsys.readouterr().err.endswith("0/5\n")


def test_two_threads_compile_a_kernel_once(builds: list[str]) -> None:
    threads = [threading.Thread(target=cubins.build, args=([SMALL, OTHER],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(builds) == sorted([repr(SMALL), repr(OTHER)])


def test_the_last_thread_compiles_too(folder: Path) -> None:
    script = (
        "import threading, time\nfrom moecompile.codegen import cubins\n"
        "from moecompile.codegen.gemms import GroupedGemm, Plain\n"
        "def late():\n"
        "    threading.main_thread().join()\n    time.sleep(0.2)\n"
        f"    cubins.build([{SMALL!r}, {OTHER!r}])\n"
        "threading.Thread(target=late).start()\n"
    )
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120)
    assert not found.stderr
    assert {file.name for file in folder.iterdir()} == {cubins.path(each).name for each in (SMALL, OTHER)}


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOECOMPILE_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cubins.cache_directory() == tmp_path / ".cache" / "moecompile"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cubins.cache_directory() == tmp_path / "xdg" / "moecompile"
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", "~/own")
    assert cubins.cache_directory() == tmp_path / "own"
    assert not (tmp_path / "own").exists()


def test_without_a_home_every_process_compiles_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", "~nobody-of-that-name/cache")
    monkeypatch.setattr(cubins, "_memory", {})
    assert cubins.cubin(SMALL)
    assert [message for message in caplog.messages if "no home/kernels" in message and "compiles its own" in message]
    assert cubins.usage() == (0, 0) and cubins.clear() == 0


def test_what_was_left_half_written_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path))
    folder = cubins.folder()
    (folder / "a folder.cubin").mkdir(parents=True)
    (folder / ".writing-abc").write_bytes(b"half")
    assert cubins.usage() == (0, 0) and cubins.clear() == 0
    assert [file.name for file in folder.iterdir()] == ["a folder.cubin"]


def test_an_empty_file_is_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path))
    cubins.folder().mkdir(parents=True)
    cubins.path(SMALL).write_bytes(hashlib.sha256(b"").digest())
    assert not cubins._is_there(SMALL)
