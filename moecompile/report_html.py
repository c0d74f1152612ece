"""The report as one HTML page that needs nothing beside itself: style, script and graphs are inside.

What was found and what was refused is plain HTML; the graphs lie in the page as JSON and are drawn when they are
opened, so that a model of many layers stays quick to load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from itertools import groupby
from typing import Any

import torch

from moecompile.graph_diff import Row, diff_rows
from moecompile.report import GraphBreak, GraphReport, PassRecord, Report
from moecompile.report_text import (
    CAST_COLUMNS,
    CAST_LEGEND,
    COMPARED_COLUMNS,
    COMPARED_LEGEND,
    COMPARED_TITLE,
    LEGEND,
    SITE_COLUMNS,
    cast_cells,
    cast_summary,
    changed_operations,
    compared_cells,
    counted,
    graph_title,
    like_casts,
    like_misses,
    like_sites,
    merged_paths,
    rewritten,
    site_cells,
    site_details,
    worst_first,
)

_NUMBERS = frozenset("EKHI")
_CHIPS_SHOWN = 12


def render(report: Report) -> str:
    """The page as text; `Report.html` writes it to a file."""
    sections = [
        _tiles(report),
        _sites(report),
        _casts(report),
        _near_misses(report),
        _graph_breaks(report),
        _graphs(report),
    ]
    head, *rest = sections
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>moecompile report</title>
<style>
{_file("report.css")}</style>
</head>
<body>
<header><div>
<h1><b>moecompile</b> report</h1>
<p class="soft">torch {escape(str(torch.__version__))}, {counted(len(report.graphs), "captured graph")}</p>
{head}
</div></header>
<nav class="bar"><div>
<input type="search" placeholder="Filter by module, operation, file ...   ( / )" aria-label="Filter">
<output></output>
<button type="button">light / dark</button>
</div></nav>
<main>
{"".join(rest)}
<footer>Hover over a value to see where it is made and used, click it to go where it is made.</footer>
</main>
<script type="application/json" id="graphs">{_graph_data(report)}</script>
<script>
{_file("report.js")}</script>
</body>
</html>
"""


def _file(name: str) -> str:
    return resources.files("moecompile").joinpath(name).read_text(encoding="utf-8")


def _tiles(report: Report) -> str:
    inside = sum(graph_break.moe for graph_break in report.graph_breaks)
    breaks = _plural(len(report.graph_breaks), "graph break") + (f", {inside} in MoE code" if inside else "")
    blocks = _plural(len(report.blocks), "MoE block")
    milliseconds = sum(record.milliseconds for graph in report.graphs for record in graph.passes)
    tiles = [
        ("good" * bool(report.blocks), len(report.blocks), f"{blocks} {'rewritten' if rewritten(report) else 'found'}"),
        ("warn" * bool(report.refused), len(report.refused), _plural(len(report.refused), "near miss")),
        ("bad" if inside else "warn" * bool(report.graph_breaks), len(report.graph_breaks), breaks),
        ("", f"{milliseconds:.1f} ms", "in our passes"),
    ]
    boxes = "".join(
        f'<div class="tile {kind}"><b>{value}</b><span>{label}</span></div>' for kind, value, label in tiles
    )
    return f'<div class="tiles">{boxes}</div>'


def _plural(number: int, thing: str) -> str:
    """The thing alone, for a number that stands apart."""
    return counted(number, thing).partition(" ")[2]


def _sites(report: Report) -> str:
    rows = []
    for group in like_sites(report.blocks):
        cells = []
        for header, cell in zip(SITE_COLUMNS, site_cells(group), strict=True):
            kind = "number" if header in _NUMBERS else "code"
            cells.append(f'<td class="{kind}">{escape(cell)}{_more(header, group)}</td>')
        text = " ".join([*(site.module for site in group), *site_cells(group), site_details(group[0])])
        rows.append(f'<tr data-text="{escape(text.lower())}">{"".join(cells)}</tr>')
    if not rows:
        return ""
    headers = "".join(f'<th class="{"number" * (name in _NUMBERS)}">{name}</th>' for name in SITE_COLUMNS)
    title = "MoE blocks rewritten" if rewritten(report) else "MoE blocks found, not rewritten (pass fuse is disabled)"
    table = f"<table><thead><tr>{headers}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<h2>{title}<small>{LEGEND}</small></h2><div class="card wide">{table}</div>'


def _more(header: str, group: Sequence[Any]) -> str:
    """What stands behind or below a cell: how many blocks are like this one, and its details."""
    if header == "module" and len(group) > 1:
        return f' <span class="chip good">{len(group)} blocks</span>'
    if header == "activation" and (details := site_details(group[0])):
        return f'<br><span class="soft">{escape(details)}</span>'
    return ""


def _casts(report: Report) -> str:
    rows = []
    for group in like_casts(report.casts):
        modules, kind, shape, precision, reason = cast_cells(group)
        many = f' <span class="chip">{len(group)}</span>' if len(group) > 1 else ""
        chip = f'<span class="chip {"good" if group[0].cast else ""}">{precision}</span>'
        cells = (f'<td class="code">{escape(modules)}{many}</td>', f"<td>{kind}</td>", f'<td class="code">{shape}</td>')
        text = " ".join([*(row.module for row in group), kind, shape, precision, reason])
        line = f"{''.join(cells)}<td>{chip}</td><td>{escape(reason)}</td>"
        rows.append(f'<tr data-text="{escape(text.lower())}">{line}</tr>')
    if not rows:
        return ""
    headers = "".join(f"<th>{name}</th>" for name in CAST_COLUMNS)
    table = f"<table><thead><tr>{headers}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    about = f"{cast_summary(report.casts)}; {CAST_LEGEND}"
    return f'<h2>FP8<small>{escape(about)}</small></h2><div class="card wide">{table}</div>'


def _near_misses(report: Report) -> str:
    entries = []
    for misses in like_misses(report.refused):
        miss = misses[0]
        modules = merged_paths([each.module for each in misses])
        title = f'<b class="code">{escape(modules)}</b> <span class="chip warn">resembles {escape(miss.form)}</span>'
        if len(misses) > 1:
            title += f'<span class="chip">{len(misses)} blocks</span>'
        first = " ".join(part for part in (miss.node, miss.source) if part)
        entries.append(_entry("warn", title, (("why", miss.reason), ("first", first), ("cure", miss.cure))))
    return _section("Near misses", "left as they were", entries)


def _graph_breaks(report: Report) -> str:
    return _section("Graph breaks", "", [_graph_break(graph_break) for graph_break in report.graph_breaks])


def _graph_break(graph_break: GraphBreak) -> str:
    title = f'<b class="code">{escape(graph_break.source or "(no source line)")}</b>'
    if graph_break.moe:
        title += ' <span class="chip bad">inside MoE code: the block cannot be recognised</span>'
    details = (("why", graph_break.reason), ("cure", graph_break.cure))
    return _entry("bad" if graph_break.moe else "", title, details)


def _section(title: str, remark: str, entries: Sequence[str]) -> str:
    return f'<h2>{title}<small>{remark}</small></h2><div class="card">{"".join(entries)}</div>' if entries else ""


def _entry(kind: str, title: str, details: Iterable[tuple[str, str | None]]) -> str:
    shown = [(label, text) for label, text in details if text]
    lines = "".join(
        f'<dt>{label}</dt><dd class="{"cure" * (label == "cure")}">{escape(text)}</dd>' for label, text in shown
    )
    text = escape(" ".join([re.sub("<[^>]*>", " ", title), *(text for _, text in shown)]).lower())
    return f'<div class="entry {kind}" data-text="{text}">{title}<dl>{lines}</dl></div>'


def _graphs(report: Report) -> str:
    cards = [_graph(graph, place, is_open=place == 0) for place, graph in enumerate(report.graphs)]
    return f"<h2>Graphs</h2>{''.join(cards)}" if cards else ""


def _graph(graph: GraphReport, place: int, is_open: bool) -> str:
    chips = f'<span class="chip good">{counted(len(graph.sites), "MoE block")}</span>' if graph.sites else ""
    if graph.near_misses:
        chips += f'<span class="chip warn">{counted(len(graph.near_misses), "near miss")}</span>'
    if graph.cached:
        chips += f'<span class="chip">cache {escape(graph.cached)}</span>'
    slowest = max((record.milliseconds for record in graph.passes), default=0.0) or 1.0
    passes = "".join(_pass(record, slowest) for record in graph.passes)
    if passes:
        passes = f'<table class="passes"><tr><th>pass</th><th>time</th><th>operations</th></tr>{passes}</table>'
    compared = _compared(graph)
    remarks = [*(f"verified: {line}" for line in graph.verify), *graph.notes]
    notes = f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in remarks)}</ul>' if remarks else ""
    tabs = "".join(f'<button type="button" data-view="{view}">{label}</button>' for view, label in _views(graph))
    return (
        f'<details class="card graph" data-graph="{place}"{" open" * is_open}>'
        f"<summary><b>Graph {place}</b> <span>{escape(graph_title(graph))}</span> {chips}</summary>"
        f'{passes}{compared}{notes}<div class="tabs">{tabs}</div><div class="pane"></div></details>'
    )


def _compared(graph: GraphReport) -> str:
    if not graph.compared:
        return ""
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in compared_cells(each))}</tr>"
        for each in worst_first(graph.compared)
    )
    headers = "".join(f"<th>{name}</th>" for name in COMPARED_COLUMNS)
    table = f'<table class="passes"><tr>{headers}</tr>{rows}</table>'
    return f"<h3>{COMPARED_TITLE}<small>{escape(COMPARED_LEGEND)}</small></h3>{table}"


def _views(graph: GraphReport) -> list[tuple[str, str]]:
    views = [("changes", "changes")] if graph.before and graph.after and graph.before != graph.after else []
    views += [(name, name) for name in ("before", "after") if getattr(graph, name)]
    labels = {"forward": "forward, after autograd", "backward": "backward, after autograd"}
    return views + [(name, label) for name, label in labels.items() if getattr(graph, name)]


def _pass(record: PassRecord, slowest: float) -> str:
    changes = changed_operations(record)
    chips = "".join(
        f'<span class="chip {"good" if name.startswith("moecompile.") else ""}">'
        f"<code>{escape(name)}</code> {before} &rarr; {after}</span>"
        for name, (before, after) in changes[:_CHIPS_SHOWN]
    )
    more = f'<span class="soft">and {len(changes) - _CHIPS_SHOWN} more</span>' if len(changes) > _CHIPS_SHOWN else ""
    width = round(90 * record.milliseconds / slowest)
    time = f'{record.milliseconds:.1f} ms<span class="time" style="width:{width}px"></span>'
    none = '<span class="soft">no change</span>'
    return f'<tr><td>{escape(record.name)}</td><td class="line">{time}</td><td>{chips or none}{more}</td></tr>'


def _graph_data(report: Report) -> str:
    graphs = []
    for graph in report.graphs:
        texts = {name: (getattr(graph, name) or "").splitlines() for name in ("before", "after", "forward", "backward")}
        graphs.append({**texts, "rows": _runs(diff_rows(texts["before"], texts["after"]))})
    # nothing in a text may end the script element
    return json.dumps(graphs, separators=(",", ":")).replace("<", "\\u003c")


def _runs(rows: Sequence[Row]) -> list[list[Any]]:
    """Rows of one kind as one entry: kind, first line before, first line after, how many."""
    runs = []
    for kind, group in groupby(rows, key=lambda row: row.kind):
        first, *others = group
        runs.append([kind, first.before, first.after, 1 + len(others)])
    return runs
