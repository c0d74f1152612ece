"""Predicted orders as a trace: spans that do not overlap on a track, and arrows from what was sent to who waits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moecompile.passes.list_schedule import schedule, simulate
from moecompile.passes.overlap import Plan
from moecompile.report import GraphReport, Report
from moecompile.trace import trace_of
from test_list_schedule import block

TASKS = tuple([*block(0, "a"), *block(7, "b")])


def planned(measured: bool = False) -> GraphReport:
    before, after = simulate(TASKS, range(14)), schedule(TASKS)
    slower = tuple(replace(task, duration=2 * task.duration) for task in TASKS) if measured else ()
    forward = Plan(before, after, TASKS, frozenset(), unmeasured=slower)
    plans = {"forward": forward, "backward": Plan(before, before, TASKS, frozenset())}
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


def test_what_was_measured_is_beside_what_is_predicted() -> None:
    report = Report((planned(measured=True),))
    events = trace_of(report.graphs)["traceEvents"]
    names = [each["args"]["name"].partition(", ")[2] for each in of(events, name="process_name")]
    assert names == [
        "forward, measured, now",
        "forward, predicted, now",
        "forward, measured, as it came",
        "backward, predicted, now",
    ]
    computed = [sum(each["dur"] for each in of(events, ph="X", pid=process, tid=0)) for process in (0, 1)]
    assert computed[1] == 2 * computed[0]
    text = report.text()
    assert "forward, measured, as it came" in text and "forward, predicted, now" in text


def test_the_picture(tmp_path: Path) -> None:
    """All spans of all orders, on tracks that lie below each other."""
    report = Report((planned(measured=True),))
    picture = ElementTree.fromstring(report.timeline(tmp_path / "timeline.svg").read_text(encoding="utf-8"))
    svg = "{http://www.w3.org/2000/svg}"
    titles = [title.text or "" for title in picture.iter(f"{svg}title")]
    for process, what in ((0, "computes"), (1, "waits"), (2, "carries")):
        spans = of(trace_of(report.graphs)["traceEvents"], ph="X", tid=process)
        drawn = [title for title in titles if title.startswith(what)]
        assert sorted(drawn) == sorted(f"{what} {e['name']}: {e['dur']:.1f} us from {e['ts']:.1f}" for e in spans)
    bars = [each for each in picture.iter(f"{svg}rect") if len(each)]
    assert len(bars) == len(titles) and all(
        float(each.attrib["x"]) + float(each.attrib["width"]) <= float(picture.attrib["width"]) for each in bars
    )
    assert len({each.attrib["y"] for each in bars}) == 2 * 4
    with pytest.raises(ValueError, match="there is no timeline"):
        Report((GraphReport(),)).timeline(tmp_path / "none.svg")


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
