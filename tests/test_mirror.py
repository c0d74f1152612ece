"""The backward that a forward's plan stands for, before it is there."""

from __future__ import annotations

import pytest

from moecompile.passes.list_schedule import Sending, Task, simulate
from moecompile.passes.mirror import mirrored, training_seconds
from moecompile.passes.overlap import Plan

LINK = "nvlink"
FORWARD = (
    Task("start", 0.0, (), Sending(3.0, LINK)),
    Task("shared", 2.0),
    Task("wait", 1.0, (0,), receives=(0,)),
    Task("experts", 4.0, (2,)),
    Task("sum", 0.5, (1, 3)),
)


def test_a_mirrored_forward() -> None:
    found = mirrored(FORWARD)
    assert [each.name for each in found] == ["sum", "experts", "wait", "shared", "start"]
    assert [each.duration for each in found] == [1.0, 8.0, 0.0, 4.0, 1.0]
    assert [each.after for each in found] == [(), (0,), (1,), (0,), (2,)]
    assert found[2].sends == Sending(3.0, LINK) and found[4].receives == (2,)
    assert simulate(found, range(5)).makespan == 1 + 8 + 4 + 1, "the shared expert is computed while rows travel"


def test_what_training_takes() -> None:
    before = simulate(FORWARD, range(5))
    plan = Plan(before, before, FORWARD, frozenset())
    assert before.makespan == pytest.approx(3 + 1 + 4 + 0.5)
    assert training_seconds(plan) == pytest.approx(before.makespan + 14.0)
