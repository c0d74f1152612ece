"""What to tell a user whose model was not rewritten: the one warning, and the cures it names.

Names of modules, classes and files serve as hints here, as everywhere: they choose words, never a rewrite.
"""

from __future__ import annotations

import dataclasses
import functools
import linecache
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._subclasses import FakeTensor

from moecompile import callers
from moecompile.capture import Stop
from moecompile.options import unknown_variables
from moecompile.passes.near_misses import EXCHANGE
from moecompile.passes.provenance import source_of
from moecompile.passes.spelling import operation_name
from moecompile.pipeline import TRANSFORMED
from moecompile.report import GraphBreak, GraphReport, last_report

log = logging.getLogger("moecompile")

SWITCH_EXPERTS = 'before compiling: model.set_experts_implementation("grouped_mm")'
ONE_PRODUCT = "compute all experts in one grouped or batched matrix product instead of a loop"
# A choice of what to run by counts that depend on data is what Dynamo cannot capture, whatever it is told.
NO_BRANCH = (
    "run every expert, also on no rows (no counts in Python, no loop over those that were hit), with "
    f"torch.compile(..., fullgraph=True); or {ONE_PRODUCT}"
)
# Whether it helps depends on all that the model does with these sizes: only a trial tells, which `explain` makes.
MAY_CAPTURE = (
    "perhaps torch.compile(..., fullgraph=True), with which Dynamo captures such operators: moecompile.explain(model, "
    "...) tries whether it does here"
)
# DistributedDataParallel's graphs come in pieces, one for each bucket of gradients, and on fake inputs.
SPLIT = "torch cut the captured graph where a bucket of DistributedDataParallel's gradients is full, also inside blocks"
KEEP_WHOLE = "before compiling: torch._dynamo.config.optimize_ddp = False"
COMMAND = "python -m moecompile explain FILE.py:FUNCTION"
# The note a record carries when the warning went out with it: once, until the records are reset.
WARNED = "the user was warned that nothing was rewritten"
# A function that chooses experts or runs them says one of these somewhere.
_MOE_WORDS = re.compile(r"expert|router|routing|top_?k|one_hot|\bmoe\b|_moe|moe_|sparse_?mlp", re.IGNORECASE)
_SIZE_WORDS = re.compile(r"Dynamic shape operator|capture_dynamic_output_shape_ops|capture_scalar_outputs")
_BRANCH_WORDS = re.compile(r"data-dependent|Data dependent|Data-dependent|graph break in loop")
_HINT = re.compile(r"Hint: (.+?)(?=\n\s*Hint:|\n\s*\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Obstacle:
    """Why a graph holds no block: what was seen, where, and the change of one line that helps, if one is known."""

    reason: str
    source: str
    cure: str | None

    def __str__(self) -> str:
        where = f", at {self.source}" if self.source else ""
        return f"{self.reason}{where}." + (f" Cure: {self.cure}" if self.cure else "")


def obstacle_of(gm: fx.GraphModule, record: GraphReport, example_inputs: Sequence[Any] = ()) -> Obstacle | None:
    """The best reason why nothing in a captured graph was rewritten; None if it shows no trace of MoE.

    What is known of the graph break at its end, if there is one, goes into the record.
    """
    if any(isinstance(value, FakeTensor) for value in example_inputs):
        record.notes.append(f"{SPLIT}; {KEEP_WHOLE}")
        return Obstacle(SPLIT, "", KEEP_WHOLE)
    if record.ended_by is not None:
        end: Any = gm.compile_subgraph_reason
        routed = any(operation_name(node) in ("topk", "argmax", "one_hot") for node in gm.graph.nodes)
        record.ended_by = graph_break(end.reason, end.user_stack, routed)
    if record.near_misses:
        miss = record.near_misses[0]
        return Obstacle(f"Nearest is the form {miss.form}, refused: {miss.reason}", miss.source, miss.cure)
    if TRANSFORMED in record.notes:
        return Obstacle(TRANSFORMED, "", None)
    if record.ended_by and (source := experts_loop(gm)):
        reason = (
            "The experts run in a Python loop over those that were hit: Dynamo cannot capture it, no backend sees it"
        )
        switch = record.ended_by.cure == SWITCH_EXPERTS
        return Obstacle(reason, source, SWITCH_EXPERTS if switch else NO_BRANCH)
    for found in record.graph_breaks:
        if found.moe:
            reason = f"Dynamo stopped capturing inside MoE code: {found.reason}"
            return Obstacle(reason, found.source, found.cure)
    return None


def graph_break(reason: str, frames: Iterable[traceback.FrameSummary], routed: bool = False) -> GraphBreak:
    """Dynamo's graph break as a record: whether it lies in MoE code, and what can be done about it.

    Args:
        reason: Dynamo's, as long as it is.
        frames: the user's, outermost first.
        routed: whether the graph that ends there chooses experts, or something like it.
    """
    frames = list(frames)
    found = GraphBreak.of(reason, frames)
    innermost = frames[-1:]
    words = " ".join(f"{frame.name} {frame.filename} {_function_around(frame)}" for frame in innermost)
    moe = found.moe or bool(_MOE_WORDS.search(words)) or (routed and depends_on_data(reason))
    cure = _HINT.search(reason)
    if any(exchanges_tokens(frame.filename) for frame in innermost):
        return dataclasses.replace(found, moe=True, cure=EXCHANGE)
    if moe and any(has_switchable_experts(frame.filename) for frame in frames):
        return dataclasses.replace(found, moe=moe, cure=SWITCH_EXPERTS)
    if moe and _SIZE_WORDS.search(reason):
        return dataclasses.replace(found, moe=moe, cure=MAY_CAPTURE)
    if moe and _BRANCH_WORDS.search(reason):
        return dataclasses.replace(found, moe=moe, cure=NO_BRANCH)
    hint = f"PyTorch suggests: {' '.join(cure[1].split())}" if cure else None
    return dataclasses.replace(found, moe=moe, cure=hint)


def depends_on_data(reason: str) -> bool:
    """Whether Dynamo stopped at a size or a choice that only the data tells."""
    return bool(_SIZE_WORDS.search(reason) or _BRANCH_WORDS.search(reason))


def stop(given_up: Stop) -> GraphBreak:
    """A frame that Dynamo gave up as a graph break."""
    found = graph_break(given_up.reason, given_up.frames)
    left = "the frame around it was given up and runs in Python"
    after = "torch.compile would raise this too" if given_up.raised else left
    return dataclasses.replace(found, reason=f"{found.reason.rstrip('.')}; {after}")


def _function_around(frame: traceback.FrameSummary) -> str:
    """Source of the function that a frame stands in, without what follows it."""
    lines = linecache.getlines(frame.filename)[: frame.lineno]
    for start in range(len(lines) - 1, -1, -1):
        if lines[start].lstrip().startswith(("def ", "async def ")):
            return "".join(lines[start:])
    return ""


def experts_loop(gm: fx.GraphModule) -> str | None:
    """Source line of the loop over the experts that were hit, if a graph ends where such a loop begins.

    The sign is the data flow that such a loop starts with, whoever wrote it: the chosen experts as a one-hot mask,
    summed over tokens and choices, compared with zero, and handed out of the graph.
    """
    for node in gm.graph.nodes:
        if operation_name(node) == "gt" and any(user.op == "output" for user in node.users):
            ancestor = node
            while ancestor.all_input_nodes and operation_name(ancestor) in ("gt", "sum", "permute", "transpose"):
                ancestor = ancestor.all_input_nodes[0]
            if operation_name(ancestor) == "one_hot":
                return source_of(node)
    return None


@functools.cache
def has_switchable_experts(file: str) -> bool:
    """Whether a source file defines experts whose implementation transformers lets the user choose."""
    # the mark that transformers' decorator `use_experts_implementation` leaves on a class
    return any(isinstance(value, type) and hasattr(value, "_apply_gate") for value in _names_of(file).values())


@functools.cache
def exchanges_tokens(file: str) -> bool:
    """Whether a source file defines the ways among which transformers lets the user choose how tokens meet experts."""
    return "EPImplementationInterface" in _names_of(file)


def _names_of(file: str) -> dict[str, Any]:
    """What a source file defines, if it was imported."""
    modules = (module for module in list(sys.modules.values()) if getattr(module, "__file__", None) == file)
    return next(map(vars, modules), {})


@functools.cache
def warn_of_unknown_variables() -> None:
    """Warns, once in a process, of environment variables that begin like ours and are none."""
    for words in unknown_variables().values():
        log.warning("%s", words)


def note_caller(record: GraphReport) -> None:
    """Writes down whose graph is being compiled, and the frames around it that Dynamo gave up."""
    record.model = callers.caller().model
    record.around = tuple(map(stop, callers.given_up()))


def warn_if_nothing_matched(
    compiled: Callable[..., Any], record: GraphReport, obstacle: Obstacle | None
) -> Callable[..., Any]:
    """Warns, once for each model until `moecompile.reset()`, that its graphs compiled so far hold no block to rewrite.

    A model is what `callers.caller` can tell: the outermost module that was called, or the compiled function. The rule:

    - no warning for a model of which another graph was rewritten before, or for which a warning went out;
    - none for a graph of which layers were cast to FP8;
    - none with the pass `detect` disabled: nothing was looked for;
    - none for a graph that was ordered so that its communication overlaps;
    - none that repeats another in all but the model: the same function, the same obstacle;
    - a graph that shows an obstacle is warned about at once, and so is a whole model without any block. A part of a
      model (a layer compiled apart, a graph around which or at whose end capturing broke off) proves nothing yet: it is
      judged when it is called again, for by then the other parts have been compiled.

    Args:
        compiled: what came out of the lowering of the graph.
        record: the graph's.
        obstacle: see `obstacle_of`.

    Returns:
        `compiled`, or a callable that does the same.
    """
    if record.sites or record.planned or any(row.cast for row in record.casts):
        return compiled
    if not any(each.name == "detect" for each in record.passes):
        return compiled
    if obstacle or not (record.graph_breaks or callers.caller().nested):
        _warn(record, obstacle)
        return compiled

    calls = 0

    @functools.wraps(compiled)
    def judged(*inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            _warn(record, None)
        return compiled(*inputs)

    return judged


def _warn(record: GraphReport, obstacle: Obstacle | None) -> None:
    report = last_report()
    graphs = [graph for graph in report.graphs if graph.model == record.model]
    if any(graph.sites or WARNED in graph.notes for graph in graphs):
        return
    said = {WARNED, str(obstacle)} if obstacle else {WARNED}
    if any(graph.name == record.name and said.issubset(graph.notes) for graph in report.graphs):
        return
    record.notes += sorted(said)
    places = len({found.source for graph in graphs for found in graph.graph_breaks})
    plural = "s" * (places > 1)
    broken = f"Dynamo broke the graph at {places} place{plural}; `moecompile.explain(model, ...)` tells why."
    log.warning(
        "moecompile rewrote nothing: %s no mixture-of-experts block that it knows.\n%s`%s` shows more.",
        f"{record.name or 'the model'} holds" if len(graphs) == 1 else f"the {len(graphs)} graphs captured so far hold",
        f"{obstacle}\n" if obstacle else f"{broken}\n" if places else "",
        COMMAND,
    )
