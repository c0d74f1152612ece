"""Fixtures every test file shares: golden files, and a clean compiler around each test."""

from __future__ import annotations

import difflib
import gc
import logging
import os
import re
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moecompile.codegen.cubins import NOWHERE, cache_directory
from sparing import spare

GOLDENS = Path(__file__).parent / "goldens"
Golden = Callable[[str, str], None]

_USED = pytest.StashKey[set[str]]()
_OUTCOMES = pytest.StashKey[dict[str, bool]]()
_PARTIAL = pytest.StashKey[str]()
# of each of pytest-xdist's processes: goldens used, tests with goldens that failed, why only a part was run
_REPORTS = pytest.StashKey[list[tuple[list[str], list[str], str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write what the tests produced to tests/goldens")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    spare()
    os.environ["COLUMNS"] = "100"  # what is printed does not depend on where the tests run
    if cache_directory() != NOWHERE:  # beside the texts of its graphs: of what others here have compiled there are none
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory() / "torchinductor"))
    logging.getLogger("torch.__trace").propagate = False  # thousands of empty lines under every failure otherwise
    config.stash[_USED] = set()
    config.stash[_OUTCOMES] = {}


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden("name", text)` compares text with tests/goldens/name.txt; `pytest --accept` writes the file."""
    used = request.config.stash[_USED]

    def check(name: str, text: str) -> None:
        if not re.fullmatch(r"[a-z0-9_]+(/[a-z0-9_]+)*", name):
            raise ValueError(f"a golden is named by lower-case letters, digits, _ and /, not {name!r}")
        if name in used:
            raise ValueError(f"golden {name!r} is compared twice in one run: give each text its own name")
        used.add(name)
        path = GOLDENS / f"{name}.txt"
        produced = text.rstrip("\n") + "\n"
        if request.config.getoption("--accept"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(produced, encoding="utf-8")
            return
        again = f"pytest --accept {request.node.nodeid.partition('[')[0]}"
        if not path.exists():
            pytest.fail(
                f"no golden file {path.relative_to(GOLDENS.parent)}; read this, then run `{again}`:\n{produced}"
            )
        expected = path.read_text(encoding="utf-8")
        if produced != expected:
            lines = difflib.unified_diff(
                expected.splitlines(), produced.splitlines(), "golden", "produced", lineterm=""
            )
            diff = "\n".join(lines)
            pytest.fail(
                f"{path.relative_to(GOLDENS.parent)} differs; if it should, run `{again}`\n{diff}", pytrace=False
            )

    return check


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what all files have imported stays, and need not be looked through again and again


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a file makes at its import is the same in every run and in every process."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def clean_compiler() -> Iterator[None]:
    """No test sees what another compiled or drew: Dynamo and moecompile's reports start empty, random numbers at 0."""
    torch.manual_seed(0)
    _forget()
    yield
    _forget()


def _forget() -> None:
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        eval_frame: Any = torch._C._dynamo.eval_frame
        if hasattr(eval_frame, "set_eval_frame_override"):
            # torch 2.11 leaves it at SKIP where what fullgraph=True compiled was exported, and compiles nothing behind
            # a graph break in this process any more; torch 2.13 has no such switch.
            eval_frame.set_eval_frame_override(eval_frame._EvalFrameOverride.NONE)
    if "moecompile.report" in sys.modules:
        sys.modules["moecompile.report"].reset()


# Unused goldens are found by the last test of a whole run: only then is it known which were compared. Where
# pytest-xdist runs the tests in several processes, by the one that collects what they report.


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name == "test_every_golden_is_used")
    collected = {item.path.name for item in items}
    files = Path(__file__).parent.glob("test_*.py")
    # those for GPUs skip themselves as a whole where there is none, and compare no goldens
    missing = {path.name for path in files if not path.stem.endswith("_gpu")} - collected
    if missing:
        config.stash[_PARTIAL] = f"{len(missing)} test files were not collected"
    elif any("::" in argument for argument in config.args):
        config.stash[_PARTIAL] = "only some tests were asked for"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):
        failed = [nodeid for nodeid, passed in config.stash[_OUTCOMES].items() if not passed]
        used = config.stash[_USED]
        partial = config.stash.get(_PARTIAL, "" if session.testscollected else "nothing was collected")
        config.workeroutput["goldens"] = (sorted(used), failed, partial)
    elif (reports := config.stash.get(_REPORTS, [])) and not any(failed or partial for _, failed, partial in reports):
        if unused := _unused({name for used, _, _ in reports for name in used}):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            print(f"\nno test compares these goldens any more, delete them: {unused}")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """One of pytest-xdist's processes is done."""
    known = node.config.stash.setdefault(_REPORTS, [])
    known.append(node.workeroutput["goldens"] if hasattr(node, "workeroutput") else ([], [], "a process died"))


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items and any("golden" in getattr(item, "fixturenames", ()) for item in items):
        items[0].config.stash[_PARTIAL] = "some tests with goldens were deselected"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if "golden" in getattr(item, "fixturenames", ()):
        outcomes = item.config.stash[_OUTCOMES]
        outcomes[item.nodeid] = outcomes.get(item.nodeid, True) and report.passed
    return report


@pytest.fixture
def unused_goldens(request: pytest.FixtureRequest) -> list[str]:
    """Files in tests/goldens that no test of this run compared; skips unless every test with goldens ran."""
    reason = request.config.stash.get(_PARTIAL, "")
    if hasattr(request.config, "workerinput"):  # pytest-xdist, which this process knows by nothing else
        reason = reason or "other processes run a part of it, and all are judged at the end"
    if reason:
        pytest.skip(f"needs the whole suite: {reason}")
    if failed := [nodeid for nodeid, passed in request.config.stash[_OUTCOMES].items() if not passed]:
        pytest.skip(f"needs every test with a golden to pass; {len(failed)} did not, {failed[0]} first")
    return _unused(request.config.stash[_USED])


def _unused(used: set[str]) -> list[str]:
    there = {str(path.relative_to(GOLDENS).with_suffix("")) for path in GOLDENS.rglob("*.txt")}
    return sorted(there - used)
