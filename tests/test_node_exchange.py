"""The exchange between nodes: ranks that are told to be on several, and what is known of them."""

from __future__ import annotations

import os
import re
from unittest import mock

import pytest
import torch

import node_exchange_checks
from moecompile.codegen import instances
from moecompile.runtime import node_memory
from moecompile.runtime.hopper_nodes import NodeExchange
from moecompile.runtime.node_memory import NodeMemory, Rings, room_for
from moecompile.runtime.topology import Topology, nodes_of, topology_among
from ranks_in_processes import checks_of, judge, run_on_ranks

CHECKS = checks_of(node_exchange_checks)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_on_ranks(4, node_exchange_checks.__name__, CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_together(results: dict[str, str], name: str) -> None:
    judge(results[name])


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([0, 0, 1, 1], Topology(2, 2)),
        ([3, 3, 3, 7, 7, 7], Topology(2, 3)),
        ([0, 1, 2], Topology(3, 1)),
        ([0, 0], Topology(1, 2)),
        ([0, 1, 0, 1], Topology(1, 4)),  # not in order: rows would go to another rank's places
        ([0, 0, 1], Topology(1, 3)),  # not as many on each
        ([0, 0, 1, 1, 0, 0], Topology(1, 6)),
        ([0, 0, 0, 1, 1, 1, 1, 1, 1], Topology(1, 9)),
    ],
)
def test_topologies(nodes: list[int], expected: Topology) -> None:
    assert topology_among(nodes) == expected


def test_nodes_of_ranks() -> None:
    with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "4"}):
        assert nodes_of([0, 3, 4, 11]) == [0, 0, 1, 2]
    with mock.patch.dict(os.environ):
        os.environ.pop("LOCAL_WORLD_SIZE", None)
        assert nodes_of([0, 3, 4, 11]) == [0, 0, 0, 0]


def test_rails_and_neighbours() -> None:
    topology = Topology(3, 4)
    assert topology.rail(6) == [2, 6, 10] and topology.neighbours(6) == [4, 5, 6, 7]
    assert topology.is_hierarchical and not Topology(3, 1).is_hierarchical and not Topology(1, 3).is_hierarchical


def test_the_memory_is_laid_out_as_the_kernels_read_it() -> None:
    """What both sides count from: sizes of arrays, and what they add up to."""
    text = instances.headers()["nodes.cuh"]
    sizes = {name: int(size) for name, size in re.findall(r"([A-Z]+) = (\d+)", text)}
    for name in ("RANKS", "NODES", "LOCALS", "SLOTS", "CHANNELS", "RING", "ROLES"):
        assert getattr(node_memory, name) == sizes[name], name
    words = text.split("struct Words {")[1].split("};")[0]
    total = 0
    for kind, dimensions in re.findall(r"^\s*u(32|64) \w+((?:\[[^]]+\])*);", words, re.MULTILINE):
        count = int(kind) // 8
        for dimension in re.findall(r"\[([^]]+)\]", dimensions):
            count *= eval(dimension, {}, sizes)
        total += count
    assert total == node_memory.WORDS
    steps = re.search(r"enum class Step \{([^}]*)\}", text)
    assert steps is not None and len(steps[1].split(",")) == len(node_memory.STEPS) + 2


def test_an_exchange_is_what_the_kernels_take() -> None:
    topology, rings = Topology(2, 4), Rings(channels=7, ring=3, chunk=9)
    own, told = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    memory = NodeMemory(own, own, 6, topology, rings, 200, room_for(topology, rings, 200, 64), told)
    values = NodeExchange(memory, 2, 100, patience=1.5, chunk=5).values(48)
    struct = instances.headers()["nodes.cuh"].partition("struct Exchange ")[2].partition("__device__")[0]
    names = re.findall(r"\w+", " ".join(re.findall(r"^ +(?:const u64\*|u64\*|i32) ([^;]*);", struct, re.M)))
    found = {name: value for name, value in zip(names, values, strict=True) if isinstance(value, int)}
    assert found == {
        "rank": 6, "ranks": 8, "nodes": 2, "locals": 4, "node": 1, "rail": 2, "slot": 2, "room": memory.room // 16,
        "capacity": 100, "pitch": 48, "channels": 7, "ring": 3, "chunk": 5, "flags": 200, "patience": 1500,
        "networked": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("topology", "rings", "words"),
    [
        (Topology(17, 1), Rings(), "at most 16 nodes"),
        (Topology(2, 9), Rings(), "8 ranks of each"),
        (Topology(16, 8), Rings(), "64 in all"),
        (Topology(2, 2), Rings(), "multiple of 16"),
    ],
)
def test_what_the_kernels_have_no_room_for(topology: Topology, rings: Rings, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        room_for(topology, rings, 100, 1000)


@pytest.mark.parametrize("how", [{"channels": 0}, {"ring": 9}, {"chunk": 33}])
def test_rings_that_are_refused(how: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(how))):
        Rings(**how)
