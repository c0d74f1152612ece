"""Predicted orders as a trace: spans that do not overlap on a track, and arrows from what was sent to who waits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moecompile.passes.list_schedule import schedule, simulate
from moecompile.passes.overlap import Plan
from moecompile.report import GraphReport, Report
from moecompile.trace import trace_of
from test_list_schedule import block

TASKS = tuple([*block(0, "a"), *block(7, "b")])


def planned() -> GraphReport:
    before, after = simulate(TASKS, range(14)), schedule(TASKS)
    plans = {"forward": Plan(before, after, TASKS, frozenset()), "backward": Plan(before, before, TASKS, frozenset())}
    return GraphReport(index=3, name="forward in model.py", planned=plans)


def of(events: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [each for each in events if all(each.get(key) == value for key, value in wanted.items())]


def test_processes_and_tracks() -> None:
    events = trace_of([planned()])["traceEvents"]
    names = [each["args"]["name"] for each in of(events, name="process_name")]
    assert names == [
        "graph 3 forward in model.py, forward, predicted, now",
        "graph 3 forward in model.py, forward, predicted, as it came",
        "graph 3 forward in model.py, backward, predicted, now",
    ]
    tracks = [each["args"]["name"] for each in of(events, name="thread_name", pid=0)]
    assert tracks == ["computation", "waiting for other ranks", "nvlink"]


def test_times() -> None:
    """In microseconds: 7 s are computed in either order; 4 s are waited for as it came, 0.5 s ordered."""
    events = trace_of([planned()])["traceEvents"]
    for process, waited in ((0, 0.5), (1, 4.0)):
        spans = {track: of(events, ph="X", pid=process, tid=track) for track in range(3)}
        assert sum(each["dur"] for each in spans[0]) == 7e6
        assert sum(each["dur"] for each in spans[1]) == waited * 1e6
        assert [each["dur"] for each in spans[2]] == [1e6] * 4
        for track in spans.values():
            ends = [each["ts"] + each["dur"] for each in sorted(track, key=lambda each: each["ts"])]
            starts = sorted(each["ts"] for each in track)
            assert all(end <= begin for end, begin in zip(ends, starts[1:], strict=False))


def test_arrows_lead_from_what_was_sent() -> None:
    events = trace_of([planned()])["traceEvents"]
    begun, ended = of(events, ph="s", pid=0), of(events, ph="f", pid=0)
    assert [each["id"] for each in begun] == [each["id"] for each in ended] and len(begun) == 4
    assert all(one["ts"] <= other["ts"] for one, other in zip(begun, ended, strict=True))
    assert {each["name"] for each in begun} == {"a.dispatch", "a.combine", "b.dispatch", "b.combine"}


def test_it_is_written(tmp_path: Path) -> None:
    path = Report((planned(),)).trace(tmp_path / "trace.json")
    assert json.loads(path.read_text(encoding="utf-8")) == trace_of([planned()])
    with pytest.raises(ValueError, match="there is no trace: nothing that was compiled exchanges anything"):
        Report((GraphReport(),)).trace(tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_it_is_in_the_report() -> None:
    """A table, and orders in time, all of a graph to one scale."""
    text = Report((planned(),)).text(width=80)
    lines = [line.strip() for line in text[text.index("overlap, predicted") :].splitlines()]
    assert [each.split() for each in lines[1:4]] == [
        ["forward,", "now", "7500000", "7000000", "500000", "88%", "0.0"],
        ["forward,", "as", "it", "came", "11000000", "7000000", "4000000", "0%", "0.0"],
        ["backward,", "now", "11000000", "7000000", "4000000", "0%", "0.0"],
    ]
    bars = [line for line in lines if "#" in line or "=" in line]
    assert len(bars) == 6 and max(map(len, bars)) <= 80
    now, before = bars[0], bars[2]
    assert now.count(".") < before.count(".") and len(now) < len(before)
    for one, other, mark in ((now, before, "#"), (bars[1], bars[3], "=")):
        assert abs(one.count(mark) - other.count(mark)) <= 2 and one.count(mark) > 10, "but for rounding"
