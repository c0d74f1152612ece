"""The driver: runs the passes (`moecompile.pieces`), in order, over one captured graph, and writes down what each did.

Every pass sees every body of the captured graph (`moecompile.bodies`), one at a time; no rewrite crosses a border.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from moecompile.agreement import DisagreementError, Together
from moecompile.bodies import bodies_of, text_of
from moecompile.comparison import Uncast
from moecompile.options import Options
from moecompile.passes.exclusions import Exclusions
from moecompile.passes.expert_parallel import (
    Group,
    gathered_parameters,
    share_gathers,
)
from moecompile.passes.precision import modules_of, purposes_of
from moecompile.passes.printer import count_changes, op_counts
from moecompile.passes.shared_blocks import exchanging_groups
from moecompile.passes.site import Site
from moecompile.pieces import PASSES, Piece, exchanges_alone
from moecompile.regions import refuse_sharded_regions
from moecompile.remarks import remark, remark_on_ranks, remark_on_wishes
from moecompile.report import GraphReport, PassRecord
from moecompile.untouched import Untouched

log = logging.getLogger("moecompile")

TRANSFORMED = "part of the graph is inside a transform of torch.func (vmap, grad, ...): nothing in there is rewritten"


@dataclass(frozen=True)
class Passed:
    """What the passes leave behind, beside the rewritten graph.

    Attributes:
        sites: with their graph nodes, which the record's sites are without: it lives as long as the process.
        exchanges: by number of the site, what puts the exchange of its tokens into a graph that holds it alone.
        untouched: the graph before every pass, where rewritten blocks are to be compared.
        uncast: the bodies before their casts, where these are to be compared.
        together: the ranks that the graph exchanges something with.
    """

    sites: tuple[Site, ...]
    exchanges: Mapping[int, Callable[[fx.Graph], None]]
    untouched: Untouched | None
    uncast: tuple[Uncast, ...]
    together: Together


class PassFailed(RuntimeError):
    """A pass raised: a bug of ours, which must neither pass silently nor leave the user without a way on."""


def _exclusions(options: Options) -> Exclusions:
    return Exclusions(
        options.fp8_exclude, options.fp8_include, options.fp8_keep_first_layers, options.fp8_keep_last_layers
    )


def run_passes(gm: fx.GraphModule, options: Options, record: GraphReport, paired: bool = False) -> Passed:
    """Runs every enabled pass over `gm` in place and fills `record`: sites, near misses, passes, before, after.

    `paired` is a graph that runs beside another micro-batch's: what its exchanges hide behind.
    """
    modules = bodies_of(gm).values()
    pieces = [Piece(module, differentiable=differentiable(gm)) for module in modules]
    record.before = text_of(gm)
    sharded = any([share_gathers(module.graph) for module in modules])
    refuse_sharded_regions(gm)
    together = Together(_shared_by_ranks(modules), inference=not differentiable(gm))
    untouched = Untouched(gm, record.notes) if options.verify else None
    with _transforms_hidden(pieces, record), without_collections():
        casts = _look_at_all(pieces, options, record)
        for number, (name, run) in enumerate(PASSES.items(), start=1):
            if name == "precision" and options.precision == "model":
                continue
            if name == "exchange" and casts:
                _find_purposes(gm, pieces)  # of blocks that are still whole
            if name == "exchange" and not sharded and not any(site.spread for piece in pieces for site in piece.sites):
                continue
            if name == "hide" and not any(piece.exchanged for piece in pieces):
                continue
            if name == "hide" and (options.microbatches == 2 or paired):
                continue  # other tokens are computed meanwhile; what stays whole of a batch is hidden later
            if name == "hide" and options.fp8_compare:
                record.notes.append("with fp8_compare no exchange is hidden behind the experts")
                continue
            if name in options.disable:
                record.notes.append(f"pass {name} is disabled")
                if name == "precision":
                    log.warning("%s: precision='fp8' casts nothing: the pass precision is disabled", record.name)
            else:
                record.passes.append(_run_pass(number, name, run, pieces, options))
    for piece in pieces:
        if piece.changed:
            piece.module.recompile()
    sites = tuple(site for piece in pieces for site in piece.sites)
    record.sites = tuple(map(without_graph, sites))
    record.near_misses = tuple(miss for piece in pieces for miss in piece.near_misses)
    record.casts = tuple(row for piece in pieces for row in piece.casts)
    remark(record, options, modules)
    for piece in pieces:
        remark_on_ranks(record, piece.module, piece.exchanged, piece.gathered, piece.rewritten)
    record.after = text_of(gm)
    uncast = tuple(piece.uncast for piece in pieces if piece.uncast is not None)
    return Passed(sites, exchanges_alone(pieces, options), untouched, uncast, together)


def hide_exchanges(gm: fx.GraphModule, options: Options, record: GraphReport) -> None:
    """The pass `hide` by itself, over a graph that has been through all others and is not split into micro-batches."""
    if options.fp8_compare or "hide" in options.disable:
        return
    pieces = [Piece(module, differentiable=differentiable(gm)) for module in bodies_of(gm).values()]
    exchanges = sum(len(_begun(piece.module.graph)) for piece in pieces)
    record.passes.append(_run_pass(1 + [*PASSES].index("hide"), "hide", PASSES["hide"], pieces, options))
    for piece in pieces:
        piece.module.recompile()
    if hidden := sum(piece.rewritten.hidden for piece in pieces):
        record.notes.append(f"{hidden} of {exchanges} exchanges are hidden behind the experts")
    record.after = text_of(gm)


def _begun(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=torch.ops.moecompile.dispatch_start.default))


def differentiable(gm: fx.GraphModule) -> bool:
    """Whether somebody may call the graph's backward."""
    return torch.is_grad_enabled() or any(_sets_grad_mode(module.graph) for module in bodies_of(gm).values())


def _shared_by_ranks(modules: Iterable[fx.GraphModule]) -> dict[Group, list[str]]:
    """By group of ranks, what these know the graph by that they run together."""
    found: dict[Group, list[str]] = {}
    for module in modules:
        for groups in (gathered_parameters(module.graph), exchanging_groups(module.graph)):
            for group, words in groups.items():
                found.setdefault(group, []).extend(words)
    return found


def _find_purposes(gm: fx.GraphModule, pieces: list[Piece]) -> None:
    purposes = purposes_of(gm)
    for piece in pieces:
        piece.purposes = purposes


def _look_at_all(pieces: list[Piece], options: Options, record: GraphReport) -> bool:
    """Whether the pass `precision` runs, and what it has to know of all bodies; notes patterns that name nothing."""
    if options.precision == "model" or "precision" in options.disable:
        return False
    modules, exclusions = modules_of(piece.module.graph for piece in pieces), _exclusions(options)
    for piece in pieces:
        piece.wishes = exclusions.within(modules)
    remark_on_wishes(record, options, exclusions, modules)
    return True


def _sets_grad_mode(graph: fx.Graph) -> bool:
    """Whether gradients are recorded in some part of the graph and in others not."""
    return any("grad_enabled" in str(node.target) or "inference_mode" in str(node.target) for node in graph.nodes)


def _run_pass(
    number: int, name: str, run: Callable[[Piece, Options], None], pieces: list[Piece], options: Options
) -> PassRecord:
    before, started = _counts(pieces), time.perf_counter()
    try:
        for piece in pieces:
            run(piece, options)
            if piece.changed:
                piece.module.graph.lint()
    except DisagreementError:  # what users have to see to
        raise
    except Exception as error:
        raise PassFailed(
            f"the pass {name!r} failed with {type(error).__name__}: {error}. That is a bug in moecompile: please "
            f"report it with this model. MOECOMPILE_DISABLE_PASSES={name} goes on without the pass."
        ) from error
    milliseconds = 1e3 * (time.perf_counter() - started)
    changes = count_changes(before, _counts(pieces))
    log.info("%d %s: %.1f ms%s", number, name, milliseconds, _describe(changes))
    return PassRecord(name, milliseconds, changes)


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Within, Python's cycle collector rests.

    The passes make many small records, which would set off full collections; each of those walks all that Dynamo holds,
    some 0.5 s for a model of 24 layers, several times what the passes themselves take.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def out_of_reach_of_hooks() -> Iterator[None]:
    """Within, hooks of saved tensors around the model's call do not see what is run to compile it.

    A checkpoint around the compiled model counts what is saved, and expects as much when it runs the model again.
    """
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


@contextlib.contextmanager
def _transforms_hidden(pieces: Iterable[Piece], record: GraphReport) -> Iterator[None]:
    """Within, nodes inside a transform of torch.func (vmap, grad, ...) lack example values: nothing is proven of them.

    Such nodes come from a transform called inside the compiled function. Their example values are wrappers that have no
    memory to look at, and our operators have no rules for the transforms: their autograd is torch.autograd's.
    """
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    hidden = {
        node: value
        for piece in pieces
        for node in piece.module.graph.nodes
        for value in [node.meta.get("example_value")]
        if any(isinstance(leaf, torch.Tensor) and wrapped(leaf) for leaf in pytree.tree_leaves(value))
    }
    if hidden:
        record.notes.append(TRANSFORMED)
    for node in hidden:
        del node.meta["example_value"]
    try:
        yield
    finally:
        for node, value in hidden.items():
            node.meta["example_value"] = value


def without_graph(site: Site) -> Site:
    """What is known of a block, without the nodes that hold its graph and fake tensors alive."""
    private: dict[str, Any] = {
        entry.name: entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        for entry in dataclasses.fields(site)
        if not entry.repr
    }
    return dataclasses.replace(site, **private)


def _counts(pieces: Iterable[Piece]) -> Counter[str]:
    return sum((op_counts(piece.module.graph) for piece in pieces), Counter())


def _describe(changes: dict[str, tuple[int, int]]) -> str:
    return "".join(f", {op}: {was} -> {now} ({now - was:+d})" for op, (was, now) in changes.items())
