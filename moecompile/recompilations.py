"""Which captured graphs are the same frame compiled again, and which were captured after `torch._dynamo.reset`.

All of it is read from Dynamo's compile ids, ``frame/recompilation``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from moecompile.passes.casts import Cast
    from moecompile.passes.site import NearMiss, Site
    from moecompile.report import GraphReport

Entry = TypeVar("Entry", bound="Site | NearMiss | Cast")


def starts_over(graph: GraphReport, graphs: Sequence[GraphReport]) -> bool:
    """Whether `torch._dynamo.reset` was called since the newest graph: Dynamo counts its frames from 0 again then."""
    earlier = [each for each in graphs if each.stage == graphs[-1].stage]
    frame, _, again = graph.compile_id.partition("/")
    if not frame.isdigit() or again != "0":
        return False
    newest = max(earlier, key=lambda each: _frame_number(each.compile_id))
    if newest.compile_id == graph.compile_id:  # one compilation may hand out several graphs
        same = newest.context and graph.context and newest.context() is graph.context()
        return not same
    return int(frame) <= _frame_number(newest.compile_id)


def _frame_number(compile_id: str) -> int:
    frame = compile_id.partition("/")[0]
    return int(frame) if frame.isdigit() else -1


def once(graphs: Iterable[GraphReport], entries_of: Callable[[GraphReport], Iterable[Entry]]) -> list[Entry]:
    """The blocks, near misses or casts of graphs, those of recompilations of a frame not again: same code, module."""
    once: dict[Hashable, Entry] = {}
    for graph in graphs:
        frame = graph.compile_id.partition("/")[0] or graph.index
        numbers: Counter[Hashable] = Counter()
        for entry in entries_of(graph):
            place = (frame, entry.module, *_kind_of(entry))
            once[(*place, numbers[place])] = entry
            numbers[place] += 1
    return list(once.values())


def _kind_of(entry: Any) -> tuple[str, ...]:
    """What tells entries of one module apart."""
    return tuple(str(getattr(entry, name, "")) for name in ("source", "form", "kind", "shape"))
