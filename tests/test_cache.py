"""The caches stay right: a warm start hits and has its report, a changed package or option misses."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import moecompile
from moecompile import cache
from moecompile.options import Options

ROOT = Path(moecompile.__file__).parents[1]
TESTS = Path(__file__).parent

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs tests/cached_process.py in a process of its own; the caches are this test file's."""
    home = tmp_path_factory.mktemp("caches")

    def run(
        *, options: str = "{}", artifacts: str = "", package: Path = ROOT, caches: str = "caches"
    ) -> dict[str, Any]:
        result = home / "result.json"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(package), str(TESTS)]),
            "TORCHINDUCTOR_CACHE_DIR": str(home / caches / "inductor"),
            "MOECOMPILE_CACHE_DIR": str(home / caches / "moecompile"),
        }
        command = [
            sys.executable,
            str(TESTS / "cached_process.py"),
            str(result),
            options,
            artifacts,
            str(home / "saved"),
        ]
        # from a folder of its own: a bare clone's root must not come before `package`
        subprocess.run(command, check=True, env=environment, cwd=home)
        return json.loads(result.read_text(encoding="utf-8"))

    return run


@pytest.fixture(scope="module")
def cold(run: Run) -> dict[str, Any]:
    """The first process: nothing is cached. It saves what it made with torch.compiler.save_cache_artifacts."""
    return run(artifacts="save")


def missed(facts: dict[str, Any]) -> bool:
    return (
        facts["cached"] == "miss"
        and facts["autograd"].get("autograd_cache_miss") == 1
        and facts["inductor"].get("fxgraph_cache_miss") == 2
        and "autograd_cache_hit" not in facts["autograd"]
        and "fxgraph_cache_hit" not in facts["inductor"]
    )


def hit(facts: dict[str, Any]) -> bool:
    return (
        facts["cached"] == "hit"
        and facts["autograd"].get("autograd_cache_hit") == 1
        and facts["inductor"].get("fxgraph_cache_hit") == 2
        and "autograd_cache_miss" not in facts["autograd"]
    )


def test_the_first_process_compiles(cold: dict[str, Any]):
    assert missed(cold), cold
    assert cold["autograd"].get("autograd_cache_saved") == 1
    assert cold["sites"] == 1
    assert "moecompile.experts_forward" in cold["forward"] and "moecompile.experts_backward" in cold["backward"]


def test_a_second_process_hits_both_caches_and_has_its_report(cold: dict[str, Any], run: Run):
    warm = run()
    assert hit(warm), warm
    assert warm["sites"] == 1
    assert (warm["forward"], warm["backward"]) == (cold["forward"], cold["backward"])


def test_another_option_misses(cold: dict[str, Any], run: Run):
    other = run(options=json.dumps({"kernels": "reference"}))
    assert missed(other), other


def test_another_source_misses(cold: dict[str, Any], run: Run, tmp_path: Path):
    shutil.copytree(ROOT / "moecompile", tmp_path / "moecompile", ignore=shutil.ignore_patterns("__pycache__"))
    same = run(package=tmp_path)
    assert hit(same), same
    with (tmp_path / "moecompile" / "runtime" / "reference.py").open("a", encoding="utf-8") as file:
        file.write("# a comment\n")
    changed = run(package=tmp_path)
    assert missed(changed), changed


def test_saved_artifacts_warm_an_empty_machine(cold: dict[str, Any], run: Run):
    elsewhere = run(artifacts="load", caches="elsewhere")
    assert hit(elsewhere), elsewhere
    assert elsewhere["sites"] == 1 and elsewhere["forward"] is None
    assert any("not stored here" in note for note in elsewhere["notes"])


# The salt.


class Named(CustomGraphPass):
    """A pass of the user's that says who it is."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def __call__(self, graph: fx.Graph) -> None:
        self.seen.append(self.name)

    def uuid(self) -> str:
        return self.name


def test_the_salt_keeps_the_users_passes():
    seen: list[str] = []
    first, second = Named("first", seen), Named("second", seen)
    alone = cache.salted({}, "salt")[cache.HOOK]
    with_one = cache.salted({cache.HOOK: first}, "salt")[cache.HOOK]
    with_two = cache.salted({cache.HOOK: [first, second], "max_autotune": True}, "salt")
    with_two[cache.HOOK](fx.Graph())
    assert seen == ["first", "second"] and with_two["max_autotune"] is True
    assert len({alone.uuid(), with_one.uuid(), with_two[cache.HOOK].uuid()}) == 3
    with config.patch({cache.HOOK: second}):
        assert cache.salted({}, "salt")[cache.HOOK].uuid() == ("moecompile", "salt", "second")
    assert alone.uuid() != cache.salted({}, "other")[cache.HOOK].uuid()


def test_a_pass_without_uuid_turns_caching_off():
    assert cache.salted({cache.HOOK: lambda graph: None}, "salt")[cache.HOOK].uuid() is None


def test_the_salt_follows_options_but_not_those_inductor_keys_itself():
    plain = cache.salt(Options())
    assert plain == cache.salt(Options(inductor={"max_autotune": True}))
    assert len({plain, cache.salt(Options(kernels="reference")), cache.salt(Options(disable=("fuse",)))}) == 3


def test_the_digest_reads_every_file_and_the_linked_rooms(tmp_path: Path):
    (tmp_path / "room").mkdir()
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "linked").symlink_to(tmp_path / "room")

    def digest() -> str:
        return cache.source_digest.__wrapped__(str(tmp_path / "top"))

    digests = {digest()}
    for path in (tmp_path / "top" / "a.py", tmp_path / "room" / "b.cuh"):
        path.write_text("1")
        digests.add(digest())
    (tmp_path / "room" / "b.cuh").write_text("2")
    digests.add(digest())
    assert len(digests) == 4
    (tmp_path / "top" / "__pycache__").mkdir()
    (tmp_path / "top" / "__pycache__" / "a.pyc").write_text("x")
    assert digest() in digests


# The sidecar.


def key(graph: str = "g", x: Any = None, **patches: Any) -> str:
    return cache.graph_key("salt", graph, [torch.ones(2) if x is None else x], patches)


def test_the_key_of_a_graph():
    same = key()
    assert same == key()
    others = [key("h"), key(x=torch.ones(2, requires_grad=True)), key(x=torch.ones(2).double()), key(max_autotune=True)]
    with torch.no_grad():
        others.append(key())
    with torch.autocast("cpu", torch.bfloat16):
        others.append(key())
    with config.patch(max_autotune=True):
        others.append(key())
    assert len({same, *others}) == len(others) + 1
    with config.patch({"cuda.cutlass_dir": "/another/environment"}):
        assert key() == same, "torch finds its compiled code from there, too"


def test_the_sidecar_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path))
    sidecar = cache.Sidecar("abcd")
    assert sidecar.read() == {}
    sidecar.write("forward", "f")
    sidecar.write("backward", "b")
    assert cache.Sidecar("abcd").read() == {"forward": "f", "backward": "b"}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["abcd.json"]


@pytest.mark.parametrize("content", ["{", "[1]", '{"forward": 1}'])
def test_a_broken_sidecar_is_no_error(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path))
    sidecar = cache.Sidecar("abcd")
    sidecar.write("forward", "f")
    sidecar.path.write_text(content)
    assert sidecar.read() == {}
    sidecar.write("forward", "f")
    assert sidecar.read() == {"forward": "f"}


def test_an_unusable_cache_directory_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "moecompile"):
        cache.Sidecar("abcd").write("forward", "f")
        assert cache.Sidecar("abcd").read() == {}
    assert any("set MOECOMPILE_CACHE_DIR" in message for message in caplog.messages)


@pytest.mark.parametrize("target", ["dispatch_start", "gather_experts"])
def test_who_carries_tokens_is_told_apart(target: str) -> None:
    """Kernels and collectives give operators other shapes, of the same graph. Who gathers alone asks nobody."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(3, 4)
    exchanges = target == "dispatch_start"
    among: dict[str, Any] = {"ranks": 2, "group": "0", **({"capacity": 3} if exchanges else {})}
    graph.output(graph.call_function(getattr(torch.ops.moecompile, target).default, (x,), among))
    gm, found = fx.GraphModule({}, graph), list[list[str]]()
    for reached in (False, True):
        with mock.patch.object(cache, "serves", lambda _: True):
            with mock.patch.object(cache, "reaches_peers", lambda group, _, reached=reached: reached):
                found.append(cache.topologies_of(gm))
    assert (found[0] != found[1]) is exchanges
