"""The report as text for a terminal: what was rewritten, what was not and why, what each pass did."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from moecompile import overlap_text
from moecompile.graph_diff import unified
from moecompile.report import Compared, GraphBreak, GraphReport, PassRecord, Report, public_fields
from moecompile.text_table import table

if TYPE_CHECKING:
    from moecompile.passes.casts import Cast
    from moecompile.passes.site import NearMiss, Site

Entry = TypeVar("Entry")
SITE_COLUMNS = ("module", "form", "E", "K", "H", "I", "dtype", "activation", "source")
COMPARED_COLUMNS = ("module", "kind", "alone", "in the model", "same experts", "flushed", "saturated")
CAST_COLUMNS = ("module", "kind", "shape", "", "why")
LEGEND = "E experts, K of them for each token, H hidden size, I intermediate size"
CAST_LEGEND = "cast: multiplies in FP8; kept: in the model's precision"
COMPARED_TITLE = "FP8 against the model's own precision, one call"
COMPARED_LEGEND = (
    "signal to noise of a result: alone, on rows of the model's own precision (28.5 dB is what random numbers give, "
    "experts have less), and with all layers in FP8; same experts: how many choices are; flushed: numbers that became 0"
)
_CHANGES_SHOWN = 5
_LONG_ACTIVATION = 24
_GLUE = "\N{NO-BREAK SPACE}"  # keeps words on one line while text is wrapped
_SHORT_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}


def render(report: Report, *, graphs: Literal["diff", "full", False] = False, width: int | None = None) -> str:
    """The whole report; see `Report.text`."""
    columns = width or min(max(shutil.get_terminal_size((100, 24)).columns, 80), 120)
    forgotten = len(report.graphs) - len(report.current)
    before = f", {forgotten} of them before torch._dynamo.reset()" if forgotten else ""
    lines = [summary(report), f"torch {torch.__version__}, {counted(len(report.graphs), 'captured graph')}{before}"]
    lines += (
        _sites(report, columns)
        + _casts(report, columns)
        + _near_misses(report, columns)
        + _graph_breaks(report, columns)
    )
    for graph in report.graphs:
        lines += ["", *_graph(graph, columns)]
        if graphs:
            lines += _graph_texts(graph, full=graphs == "full")
    return "\n".join(line.rstrip().replace(_GLUE, " ") for line in lines)


def summary(report: Report) -> str:
    """One line: how many blocks were rewritten, how many nearly, how often capturing broke off."""
    if not report.graphs and not report.graph_breaks:
        return (
            'moecompile: nothing was compiled with backend="moecompile" since the last reset\n'
            "If a model was called, Dynamo captured nothing of it: moecompile.explain(model, ...) tells why."
        )
    inside = sum(graph_break.moe for graph_break in report.graph_breaks)
    what = "rewritten" if rewritten(report) else "found"
    parts = [f"{counted(len(report.blocks), 'MoE block')} {what}{_recompilations(report)}"]
    parts.append(counted(len(report.refused), "near miss"))
    parts.append(counted(len(report.graph_breaks), "graph break") + (f" ({inside} in MoE code)" if inside else ""))
    return f"moecompile: {', '.join(parts)}"


def _recompilations(report: Report) -> str:
    """Where graphs with blocks were recompiled, how often: the headline counts each block once."""
    graphs = [graph for graph in report.current if graph.sites]
    again = sum(graph.compile_id.partition("/")[2] not in ("", "0") for graph in graphs)
    if not again or len(report.blocks) == sum(len(graph.sites) for graph in graphs):
        return ""
    return f" ({counted(len(graphs), 'graph')}: {counted(again, 'recompilation')})"


def rewritten(report: Report) -> bool:
    """Whether the blocks found were replaced too: not so with the pass ``fuse`` disabled."""
    return not report.sites or any(record.name == "fuse" for graph in report.graphs for record in graph.passes)


def like_sites(sites: Iterable[Site]) -> list[list[Site]]:
    """Sites that differ in nothing but their module, together."""
    return _grouped(sites, lambda site: tuple(value for name, value in public_fields(site).items() if name != "module"))


def like_misses(near_misses: Iterable[NearMiss]) -> list[list[NearMiss]]:
    """Near misses of the same form, for the same reason, at the same line, together."""
    return _grouped(near_misses, lambda miss: (miss.form, miss.reason, miss.node, miss.source, miss.cure))


def like_casts(casts: Iterable[Cast]) -> list[list[Cast]]:
    """Rows that differ in nothing but the numbers in their modules' paths, together; what is cast first."""
    ordered = sorted(casts, key=lambda row: not row.cast)
    return _grouped(ordered, lambda row: (*_without_numbers(row.module), row.kind, row.shape, row.cast, row.reason))


def cast_cells(group: Sequence[Cast]) -> tuple[str, ...]:
    """The cells of `CAST_COLUMNS` for rows that differ in their module's numbers only."""
    row = group[0]
    shape = " x ".join(map(str, row.shape))
    return merged_paths([each.module for each in group]), row.kind, shape, "cast" if row.cast else "kept", row.reason


def cast_summary(casts: Sequence[Cast]) -> str:
    """How many are cast and how many kept."""
    cast = sum(row.cast for row in casts)
    return f"{cast} cast, {len(casts) - cast} kept"


def site_cells(group: Sequence[Site]) -> tuple[str, ...]:
    """The cells of `SITE_COLUMNS` for sites that differ in their module only."""
    site = group[0]
    modules = merged_paths([each.module for each in group])
    sizes = (site.num_experts, site.top_k, site.hidden, site.intermediate)
    return (
        modules,
        site.form,
        *map(str, sizes),
        _SHORT_DTYPES.get(site.dtype, site.dtype),
        site.activation,
        site.source,
    )


def site_details(site: Site) -> str:
    """What differs from the plainest block, in words."""
    details = []
    if site.gate_up in ("interleaved", "separate"):
        details.append(f"gate and up {site.gate_up}")
    if site.gate_up == "single":
        details.append("no gate")
    if site.biases:
        details.append(f"biases {', '.join(site.biases)}")
    if site.input != "x":
        details.append(f"input {site.input}")
    if site.output != "mul(out, weight)":
        details.append(f"output {site.output}")
    if site.w_in_transposed or site.w_out_transposed:
        details.append("weights (experts, in, out)")
    return "; ".join(details)


def merged_paths(paths: Sequence[str]) -> str:
    """Module paths as one: ``layers.0.mlp`` and ``layers.1.mlp`` give ``layers.[0-1].mlp``; others are listed."""
    distinct = sorted({path or "(no module)" for path in paths}, key=_natural)
    split = [path.split(".") for path in distinct]
    if len(distinct) > 1 and len({len(parts) for parts in split}) == 1:
        differing = [place for place, column in enumerate(zip(*split, strict=True)) if len(set(column)) > 1]
        if len(differing) == 1 and all(parts[differing[0]].isdigit() for parts in split):
            numbers = [int(parts[differing[0]]) for parts in split]
            return ".".join([*split[0][: differing[0]], f"[{_ranges(numbers)}]", *split[0][differing[0] + 1 :]])
    return ", ".join(distinct)


def changed_operations(record: PassRecord) -> list[tuple[str, tuple[int, int]]]:
    """A pass's op-count changes: our own operators, then the largest change first."""
    changes = record.changes.items()
    return sorted(
        changes, key=lambda item: (not item[0].startswith("moecompile."), -abs(item[1][1] - item[1][0]), item)
    )


def counted(number: int, thing: str) -> str:
    """``1 graph``, ``2 graphs``, ``no graphs``."""
    plural = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number or 'no'} {thing if number == 1 else plural}"


def graph_title(graph: GraphReport) -> str:
    """A graph's name, its module and Dynamo's compile id."""
    frame, _, again = graph.compile_id.partition("/")
    identity = f"compile {graph.compile_id}" if frame else ""
    if again and again != "0":
        identity += f", recompilation {again}"
    parts = [graph.name, graph.module, identity]
    return ", ".join(part for part in parts if part)


def _sites(report: Report, width: int) -> list[str]:
    rows = []
    for group in like_sites(report.blocks):
        cells = [str(len(group)), *site_cells(group)]
        details = site_details(group[0])
        if len(group[0].activation) > _LONG_ACTIVATION:
            cells[1 + SITE_COLUMNS.index("activation")] = "(below)"
            details = "; ".join(part for part in (group[0].activation, details) if part)
        rows.append((tuple(cells), details))
    if not rows:
        return []
    title = "MoE blocks rewritten" if rewritten(report) else "MoE blocks found, not rewritten (pass fuse disabled)"
    return ["", title, *table(("#", *SITE_COLUMNS), rows, width), f"  {LEGEND}"]


def _casts(report: Report, width: int) -> list[str]:
    if not report.casts:
        return []
    rows = [((str(len(group)), *cast_cells(group)), "") for group in like_casts(report.casts)]
    return ["", f"FP8: {cast_summary(report.casts)}", *table(("#", *CAST_COLUMNS), rows, width), f"  {CAST_LEGEND}"]


def _near_misses(report: Report, width: int) -> list[str]:
    groups = like_misses(report.refused)
    lines = ["", "Near misses: left as they were"] if groups else []
    for misses in groups:
        miss = misses[0]
        modules = merged_paths([each.module for each in misses])
        times = f" ({len(misses)})" if len(misses) > 1 else ""
        lines.append(f"  {modules}{times}  resembles {miss.form}")
        lines += _labelled("why", miss.reason, width)
        lines += _labelled("first", "  ".join(part for part in (miss.node, miss.source) if part), width)
        lines += _labelled("cure", miss.cure, width)
    return lines


def _graph_breaks(report: Report, width: int) -> list[str]:
    lines = ["", "Graph breaks"] if report.graph_breaks else []
    for graph_break in report.graph_breaks:
        lines += _graph_break(graph_break, width)
    return lines


def _graph_break(graph_break: GraphBreak, width: int) -> list[str]:
    where = graph_break.source or "(no source line)"
    lines = [f"  {where}{'  inside MoE code: the block cannot be recognised' if graph_break.moe else ''}"]
    return [*lines, *_labelled("why", graph_break.reason, width), *_labelled("cure", graph_break.cure, width)]


def _graph(graph: GraphReport, width: int) -> list[str]:
    lines = [f"Graph {graph.index}: {graph_title(graph)}" if graph.index >= 0 else f"Graph: {graph_title(graph)}"]
    rows = [((each.name, f"{each.milliseconds:.1f}", _changes(each) or "no change"), "") for each in graph.passes]
    lines += table(("pass", "ms", "operations"), rows, width) if rows else []
    if graph.cached:
        lines += _labelled("cache", graph.cached, width)
    lines += _compared(graph, width)
    for label, texts in (("verify", graph.verify), ("note", graph.notes)):
        for text in texts:
            lines += _labelled(label, text, width)
    return lines + overlap_text.render(graph.planned, width)


def _compared(graph: GraphReport, width: int) -> list[str]:
    """FP8 against the model's own precision, worst layers first."""
    if not graph.compared:
        return []
    rows = [(compared_cells(each), "") for each in worst_first(graph.compared)]
    legend = [f"  {line}" for line in textwrap.wrap(COMPARED_LEGEND, width - 2)]
    return [f"  {COMPARED_TITLE}", *table(COMPARED_COLUMNS, rows, width), *legend]


def worst_first(compared: Iterable[Compared]) -> list[Compared]:
    """Choices of experts by how many are the same, then layers by their signal to noise."""

    def badness(each: Compared) -> tuple[bool, float]:
        found = each.agreement if each.alone is None else each.alone
        return each.alone is not None, -math.inf if found is None else found

    return sorted(compared, key=badness)


def compared_cells(each: Compared) -> tuple[str, ...]:
    """The cells of `COMPARED_COLUMNS`."""
    decibels = ("" if value is None else f"{value:.1f}{_GLUE}dB" for value in (each.alone, each.in_model))
    shares = ("" if value is None else f"{value:.2%}" for value in (each.agreement, each.flushed))
    same, flushed = shares
    return each.module or "(no module)", each.kind, *decibels, same, flushed, str(each.saturated or "")


def _changes(record: PassRecord) -> str:
    """``moecompile.experts 0 -> 2, linear 4 -> 0, 3 more``."""
    changes = changed_operations(record)
    parts = [f"{name} {before} -> {after}".replace(" ", _GLUE) for name, (before, after) in changes[:_CHANGES_SHOWN]]
    return ", ".join(parts + [f"{len(changes) - _CHANGES_SHOWN} more"] * (len(changes) > _CHANGES_SHOWN))


def _graph_texts(graph: GraphReport, full: bool) -> list[str]:
    lines: list[str] = []
    if full:
        lines += ["", "  before", *_indented(graph.before), "", "  after", *_indented(graph.after)]
    else:
        changed = graph.before != graph.after
        lines += ["", "  changes", *_indented("\n".join(unified(graph.before, graph.after)))] if changed else []
    for name, text in (("forward", graph.forward), ("backward", graph.backward)):
        lines += ["", f"  {name}", *_indented(text)] if text else []
    return lines


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]


def _labelled(label: str, text: str | None, width: int) -> list[str]:
    if not text:
        return []
    wrapped = textwrap.wrap(text, width - 13, break_long_words=False, break_on_hyphens=False)
    return [f"    {label if number == 0 else '':<8} {line}" for number, line in enumerate(wrapped)]


def _grouped(entries: Iterable[Entry], key: Callable[[Entry], Hashable]) -> list[list[Entry]]:
    """Entries of equal key together, in the order in which each key first appears."""
    groups: dict[Hashable, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return list(groups.values())


def _without_numbers(path: str) -> tuple[str, ...]:
    return tuple("" if part.isdigit() else part for part in path.split("."))


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3,5`` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in runs)
