"""What moecompile did with a model: records, filled in while it compiles, and the report made of them.

    print(moecompile.last_report())          # since the last moecompile.reset()
    moecompile.last_report().html("report.html")

A backend call records one `GraphReport` as soon as it starts, so that a compilation that fails has one too, and fills
it in from then on; the backward graph may come much later. `last_report` takes a snapshot.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from moecompile import recompilations

if TYPE_CHECKING:
    from torch import fx

    from moecompile.passes.casts import Cast
    from moecompile.passes.overlap import Plan
    from moecompile.passes.site import NearMiss, Site

JSON_VERSION = 1
_EXPERTS = re.compile(r"expert|router|routing|\bmoe\b|_moe|moe_|sparse_?mlp", re.IGNORECASE)
_RESUMED = re.compile(r"torch_dynamo_resume_in_(?P<name>.+)_at_(?P<line>\d+)")


@dataclass(frozen=True)
class PassRecord:
    """One run of one pass over one captured graph.

    Attributes:
        name: the pass, as in ``Options.disable``.
        milliseconds: wall time.
        changes: operation to (count before, count after), only where the two differ.
    """

    name: str
    milliseconds: float
    changes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphBreak:
    """A place where Dynamo stopped capturing.

    Attributes:
        reason: Dynamo's, its first line.
        source: the user's file and line, e.g. ``modeling_mixtral.py:80``.
        moe: whether it looks as if it lay inside MoE code (a guess from names: what lies behind the break is captured
            apart or not at all, so that the block cannot be recognised).
        cure: what to change, in one line; None if that is not known.
        stack: the user's frames, outermost first.
    """

    reason: str
    source: str = ""
    moe: bool = False
    cure: str | None = None
    stack: tuple[str, ...] = ()

    @classmethod
    def of(cls, reason: str, frames: Any) -> GraphBreak:
        """From Dynamo's reason and frames (``traceback.FrameSummary``), as in ``gm.compile_subgraph_reason``."""
        frames = list(frames)
        places = [f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in frames]
        moe = any(_EXPERTS.search(f"{frame.name} {frame.line or ''}") for frame in frames[-2:])
        cure = None
        if moe and any(f"{os.sep}transformers{os.sep}models{os.sep}" in frame.filename for frame in frames):
            cure = 'before compiling: model.set_experts_implementation("grouped_mm")'
        first_line = next((line.strip() for line in reason.splitlines() if line.strip()), "no reason given")
        return cls(first_line, places[-1] if places else "", moe, cure, tuple(places))


@dataclass(frozen=True)
class Compared:
    """What FP8 does to a layer, or to a choice of experts, of one call (``fp8_compare``).

    Attributes:
        module: path of the module.
        kind: "linear", "experts" or "choice of experts".
        alone: signal to noise in decibels of the layer's result, from the rows of the model's own precision.
        in_model: the same with all layers in FP8.
        agreement: the share of experts that tokens choose in both.
        flushed: the share of the numbers that are multiplied, rows and matrices, that became zero.
        saturated: how many of them were cut off at the largest number of e4m3, which scales are there to prevent.
    """

    module: str
    kind: str
    alone: float | None = None
    in_model: float | None = None
    agreement: float | None = None
    flushed: float | None = None
    saturated: int | None = None


@dataclass
class GraphReport:
    """One captured graph: what was found in it, what was done to it. Filled in while it is compiled.

    Attributes:
        index: its number since the last reset; given by `record`.
        name: the frame it was captured from, e.g. ``forward in modeling_mixtral.py``.
        module: the module it belongs to, where the graph tells.
        compile_id: Dynamo's, ``frame/recompilation``.
        sites: what was rewritten (or, with the pass ``fuse`` disabled, only found).
        near_misses: what looked like an MoE block and was left alone.
        casts: what multiplies in FP8 and what was kept, with ``precision="fp8"``.
        passes: in the order in which they ran.
        before: the graph as text (`moecompile.passes.printer`) as it came.
        after: the graph as text after all passes.
        forward: AOTAutograd's forward graph as text, once it is there.
        backward: AOTAutograd's backward graph as text, once it is there.
        cached: "hit" or "miss" of the compilation caches; None if not known.
        verify: results of ``verify="first_call"``, one line each.
        compared: results of ``fp8_compare="first_call"``.
        notes: anything else the user should know, one line each.
        planned: what is predicted of "forward" and "backward", where they were to be ordered (``overlap``).
        parts: how many micro-batches its batch became (``microbatches``).
        ended_by: the graph break at which the captured graph ends, if any.
        around: frames around the captured graph that Dynamo gave up.
        model: stands for the model that the graph is of, see `moecompile.callers`.
        stage: how often `torch._dynamo.reset()` was called before, as far as compile ids tell; given by `record`.
        context: Dynamo's, of this compilation.
    """

    index: int = -1
    name: str = ""
    module: str = ""
    compile_id: str = ""
    sites: tuple[Site, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    casts: tuple[Cast, ...] = ()
    passes: list[PassRecord] = field(default_factory=list)
    before: str = ""
    after: str = ""
    forward: str | None = None
    backward: str | None = None
    cached: str | None = None
    verify: list[str] = field(default_factory=list)
    compared: tuple[Compared, ...] = ()
    notes: list[str] = field(default_factory=list)
    planned: dict[str, Plan] = field(default_factory=dict, repr=False)
    parts: int = field(default=1, repr=False)
    ended_by: GraphBreak | None = None
    around: tuple[GraphBreak, ...] = field(default=(), repr=False)
    model: Hashable = field(default=None, repr=False, compare=False)
    stage: int = field(default=0, repr=False)
    context: weakref.ref[Any] | None = field(default=None, repr=False, compare=False)
    _logged: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def graph_breaks(self) -> tuple[GraphBreak, ...]:
        """The places where Dynamo stopped capturing, as far as this graph tells: around it, and at its end."""
        return (*self.around, self.ended_by) if self.ended_by else self.around

    @classmethod
    def of(cls, gm: fx.GraphModule) -> GraphReport:
        """A record for a graph Dynamo just captured; the name and the graph break come from the graph module."""
        from moecompile.passes.provenance import frame_of, module_of

        calls = [node for node in gm.graph.nodes if node.op.startswith("call") and node.stack_trace]
        reason: Any = getattr(gm, "compile_subgraph_reason", None)
        broken = reason is not None and reason.graph_break
        context = torch._guards.CompileContext.try_get()
        return cls(
            context=weakref.ref(context) if context else None,
            name=_frame_name(*frame_of(calls[0])) if calls else "",
            module=_common_path({module_of(node) for node in calls} - {""}),
            compile_id=str(torch._guards.CompileContext.current_compile_id() or ""),
            ended_by=GraphBreak.of(reason.reason, reason.user_stack) if broken else None,
        )

    def log_artifacts(self) -> None:
        """Writes the graphs and the report to torch's structured trace, where ``tlparse`` shows them.

        Each artifact is written once: call again when the forward or backward graph has come. Does nothing unless
        tracing is on (``TORCH_TRACE``).
        """
        for name in ("before", "after", "forward", "backward"):
            if text := getattr(self, name):
                self._log(name, "string", functools.partial(str, text))
        if self.before:
            report = Report((self,), self.graph_breaks)
            self._log("report", "string", lambda: report.text(width=100))
            self._log("report_json", "json", report.json)

    def _log(self, name: str, encoding: str, payload: Callable[[], str]) -> None:
        if name not in self._logged:
            self._logged.add(name)
            metadata = {"name": f"moecompile_{name}", "encoding": encoding}
            torch._logging.trace_structured("artifact", metadata_fn=lambda: metadata, payload_fn=payload)


@dataclass(frozen=True)
class Report:
    """A snapshot of everything compiled since the last `reset`: ``print(report)``, ``.html(path)``, ``.json()``.

    Attributes:
        graphs: one for each captured graph and each recompilation, in order.
        graph_breaks: each place once, those inside MoE code first.
    """

    graphs: tuple[GraphReport, ...] = ()
    graph_breaks: tuple[GraphBreak, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every MoE block rewritten, over all graphs (a recompiled graph counts again)."""
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def blocks(self) -> tuple[Site, ...]:
        """The MoE blocks rewritten, each once, as the newest graph has it; none that `torch._dynamo.reset` forgot."""
        return tuple(recompilations.once(self.current, lambda graph: graph.sites))

    @property
    def refused(self) -> tuple[NearMiss, ...]:
        """The near misses, each once, as `blocks` does it."""
        return tuple(recompilations.once(self.current, lambda graph: graph.near_misses))

    @property
    def casts(self) -> tuple[Cast, ...]:
        """What multiplies in FP8 and what was kept, each once, as `blocks` does it."""
        return tuple(recompilations.once(self.current, lambda graph: graph.casts))

    @property
    def current(self) -> tuple[GraphReport, ...]:
        """The graphs compiled since the last `torch._dynamo.reset`."""
        return tuple(graph for graph in self.graphs if graph.stage == self.graphs[-1].stage)

    @property
    def near_misses(self) -> tuple[NearMiss, ...]:
        """Every block that looked like MoE and was left alone, over all graphs."""
        return tuple(miss for graph in self.graphs for miss in graph.near_misses)

    def __str__(self) -> str:
        return self.text()

    def text(self, *, graphs: bool | Literal["diff", "full"] = False, width: int | None = None) -> str:
        """The report for a terminal.

        Args:
            graphs: True or "diff" adds what changed in each graph, "full" the whole graphs, before and after.
            width: columns; None is the terminal's width, between 80 and 120, or 100 where there is none.
        """
        from moecompile import report_text

        return report_text.render(self, graphs="diff" if graphs is True else graphs, width=width)

    def html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report as one page that needs nothing beside itself; returns its path."""
        from moecompile import report_html

        target = Path(path)
        target.write_text(report_html.render(self), encoding="utf-8")
        return target

    def json(self) -> str:
        """The report as JSON text; ``version`` rises when a field changes its meaning or goes away."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False)

    def trace(self, path: str | os.PathLike[str]) -> Path:
        """Writes what is predicted of ordered graphs (``overlap``) as a trace for Perfetto or Chrome; returns its path.

        With what was measured beside it, where their operators were (``profile``).

        Raises:
            ValueError: no graph was to be ordered.
        """
        from moecompile import trace

        self._refuse_without_orders("trace")
        target = Path(path)
        target.write_text(json.dumps(trace.trace_of(self.graphs)), encoding="utf-8")
        return target

    def timeline(self, path: str | os.PathLike[str]) -> Path:
        """Writes the same as a picture, SVG; returns its path.

        Raises:
            ValueError: no graph was to be ordered.
        """
        from moecompile import overlap_picture

        self._refuse_without_orders("timeline")
        target = Path(path)
        target.write_text(overlap_picture.render(self.graphs), encoding="utf-8")
        return target

    def _refuse_without_orders(self, what: str) -> None:
        if not any(graph.planned for graph in self.graphs):
            words = "nothing that was compiled exchanges anything with other ranks, or `overlap` was not given"
            raise ValueError(f"moecompile: there is no {what}: {words}: options={{'overlap': True}}.")

    def as_dict(self) -> dict[str, Any]:
        """What `json` writes: plain dicts, lists, strings and numbers."""
        return {
            "version": JSON_VERSION,
            "torch": str(torch.__version__),
            "graphs": [_plain(graph) for graph in self.graphs],
            "graph_breaks": [_plain(graph_break) for graph_break in self.graph_breaks],
        }


_lock = threading.Lock()
_graphs: list[GraphReport] = []


def record(graph_report: GraphReport) -> None:
    """Adds a graph's record and gives it its number; it may be filled in afterwards."""
    with _lock:
        graph_report.index = len(_graphs)
        if _graphs:
            graph_report.stage = _graphs[-1].stage
            if recompilations.starts_over(graph_report, _graphs):
                graph_report.stage += 1
        _graphs.append(graph_report)


def discard(graph_report: GraphReport) -> None:
    """Takes the newest record back: Dynamo starts over with the frame and will hand out its graph again."""
    with _lock:
        _graphs[:] = [graph for graph in _graphs if graph is not graph_report]


def last_report() -> Report:
    """Everything compiled since the last `reset`, as it stands now: all graphs, recompilations, parts and stages.

    After `torch._dynamo.reset` the graph breaks from before it are left out, because all is captured anew.
    """
    with _lock:
        graphs = tuple(
            dataclasses.replace(
                graph, passes=[*graph.passes], verify=[*graph.verify], notes=[*graph.notes], planned={**graph.planned}
            )
            for graph in _graphs
        )
    breaks = (found for graph in Report(graphs).current for found in graph.graph_breaks)
    unique = {(each.source, each.reason): each for each in breaks}
    return Report(graphs, tuple(sorted(unique.values(), key=lambda each: not each.moe)))


def reset() -> None:
    """Forgets everything recorded so far; graphs compiled already stay compiled."""
    with _lock:
        _graphs.clear()


def public_fields(entry: Any) -> dict[str, Any]:
    """The fields of a record that are for the user: those of its repr, without a leading underscore."""
    return {
        item.name: getattr(entry, item.name)
        for item in dataclasses.fields(entry)
        if item.repr and not item.name.startswith("_")
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _plain(part) for name, part in public_fields(value).items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _common_path(paths: set[str]) -> str:
    """The dotted path that all paths start with."""
    shared = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _frame_name(function: str, file: str) -> str:
    resumed = _RESUMED.fullmatch(function)
    return f"{resumed['name']} in {file}, resumed at line {resumed['line']}" if resumed else f"{function} in {file}"
