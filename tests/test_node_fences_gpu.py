"""Kernels that lack a fence, or credit, are found out by a transport that holds back and reorders what travels."""

from __future__ import annotations

import pytest
import torch

from moecompile.runtime.node_memory import Rings
from moecompile.runtime.topology import Topology

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from changed_kernels import changed
from nodes_on_one_gpu import Ranks, brought, routed

pytestmark = pytest.mark.gpu

CHANNELS = 4
"""So few that readers find multiprocessors beside senders."""
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


@pytest.mark.parametrize(
    ("file", "before", "after"), [each[:3] for each in LACKING], ids=[each[-1] for each in LACKING]
)
def test_it_is_found_out(file: str, before: str, after: str) -> None:
    """What is read too early is what another exchange has left there."""
    with changed((file, before, after)):
        assert not is_right(), "nobody has noticed"


def is_right() -> bool:
    """Whether exchanges by these kernels come to what they should."""
    topology, experts, most = Topology(2, 2), 16, 120
    brings = [
        [
            brought(rank + 10 * turn, routed(rank, most, topology, experts, 8, "random"), 512, torch.bfloat16)
            for rank in range(topology.ranks)
        ]
        for turn in range(2)
    ]
    ranks = Ranks(topology, Rings(CHANNELS, 2, 4), experts, most, brings[0][0], "faulty")
    for turn in range(40):
        each = brings[turn % 2]
        try:
            ranks.check(each, ranks.exchange(each))
        except AssertionError:
            return False
        ranks.beside = True
    return True


def test_nothing_is_wrong_with_the_kernels() -> None:
    assert is_right()
