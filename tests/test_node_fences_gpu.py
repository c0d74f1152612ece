"""Kernels that lack a fence, or credit, are found out by a transport that holds back and reorders what travels."""

from __future__ import annotations

import functools

import pytest
import torch

from moecompile.codegen import cubins, instances, nvrtc
from moecompile.codegen.instances import Instance, source
from moecompile.runtime import virtual_nodes
from moecompile.runtime.launch import load
from moecompile.runtime.node_memory import Rings
from moecompile.runtime.topology import Topology

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from nodes_on_one_gpu import Ranks, brought, channels_for, routed

pytestmark = pytest.mark.gpu

DISPATCH, COMBINE = "node_dispatch.cuh", "node_combine.cuh"
LACKING = [
    (DISPATCH, "            far.template fence<0>();\n", "", "a chunk is there before its records are"),
    (DISPATCH, "            near.template fence<0>();\n            for (i32 i", "            for (i32 i", "passed on"),
    (DISPATCH, "            near.template fence<0>();\n            near.signal", "            near.signal", "handed"),
    (
        COMBINE,
        "            near.template fence<0>();\n            near.signal",
        "            near.signal",
        "handed back",
    ),
    (COMBINE, "            far.template fence<0>();\n            far.signal", "            far.signal", "sent home"),
    (DISPATCH, "ready = sequence < ring ||", "ready = true ||", "sent without credit"),
]


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Kernels of changed sources, for one test."""
    file, before, after, _ = request.param
    headers = dict(instances.headers())
    assert headers[file].count(before) == 1, "what is to be left out is not there, or more than once"
    headers[file] = headers[file].replace(before, after)

    def compiled(instance: Instance) -> bytes:
        return nvrtc.compile_source(source(instance), headers, repr(instance)).cubin

    monkeypatch.setattr(cubins, "cubin", compiled)  # of no cache
    monkeypatch.setattr(virtual_nodes, "load", functools.cache(load.__wrapped__))


@pytest.mark.parametrize("patched", LACKING, indirect=True, ids=[each[-1] for each in LACKING])
def test_it_is_found_out(patched: None) -> None:
    topology, experts, most = Topology(2, 2), 16, 120
    brings = [
        brought(rank, routed(rank, most, topology, experts, 8, "random"), 512, torch.bfloat16)
        for rank in range(topology.ranks)
    ]
    ranks = Ranks(topology, Rings(channels_for(topology), 2, 4), experts, most, brings[0], "faulty")
    for _ in range(20):
        try:
            ranks.check(brings, ranks.exchange(brings))
        except AssertionError:
            return
        ranks.beside = True
    raise AssertionError("nobody has noticed")
