"""From the rewritten graph to something callable: AOTAutograd, then Inductor or plain PyTorch.

Both lowerings show every graph that AOTAutograd makes to `seen(kind, graph_module)`, kind being "forward" or
"backward", at the moment it is compiled. A backward graph may be compiled long after its forward graph, when it first
runs; a graph that comes out of AOTAutograd's cache is not shown at all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from packaging.version import Version
from torch import fx

from moecompile import cache, ordering
from moecompile.bodies import text_of
from moecompile.exchange_order import keep_exchanges
from moecompile.measuring import Finish, Seconds, is_measuring, measured
from moecompile.options import Options
from moecompile.passes.backward_only import keep_in_backward
from moecompile.passes.decompose import decompose
from moecompile.passes.dispatch_again import dispatch_again
from moecompile.passes.overlap import Plan
from moecompile.passes.printer import input_names
from moecompile.passes.quantized_travel import let_rows_travel_quantized
from moecompile.passes.recast import Counts, recast
from moecompile.report import GraphReport, discard
from moecompile.stage_graphs import StageGraph, keep_strides

Compiled = Callable[..., Any]
Seen = Callable[[str, fx.GraphModule], None]
Ordered = Callable[[str, fx.GraphModule, Seconds | None], Plan | None]
Measured = Callable[[str, fx.GraphModule, Finish], Compiled]

# the region's name reaches compile_fx since this release
_NAMED_REGIONS = Version(torch.__version__) >= Version("2.13")


def lower(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, record: GraphReport, name: str | None = None,
    stage: StageGraph | None = None,
) -> Compiled:  # fmt: skip
    """Compiles a rewritten graph of Dynamo's as `options` say, and notes AOTAutograd's graphs in `record` as text.

    The record never holds a graph itself: a graph holds fake tensors, and the record lives as long as the process.
    A pipeline's stage keeps its graphs (`stage`), for as long as they are compiled.
    """
    from torch._dynamo.exc import RestartAnalysis

    try:
        return _lower(gm, example_inputs, options, record, name, stage)
    except RestartAnalysis:
        # tracing taught AOTAutograd what Dynamo should have known: Dynamo captures the frame again and calls us again
        discard(record)
        raise


def _lower(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, record: GraphReport, name: str | None,
    stage: StageGraph | None,
) -> Compiled:  # fmt: skip
    inputs = input_names(gm.graph)

    def note(kind: str, graph_module: fx.GraphModule) -> None:
        setattr(record, kind, text_of(graph_module, collapse=True, inputs=inputs))
        record.log_artifacts()

    kept: list[str] = []  # what is said of what forward and backward hold

    def change(graph: fx.Graph) -> None:
        if options.precision == "fp8":
            let_rows_travel_quantized(graph)
            keep_in_backward(graph)
        if options.fp8_recast_weights:
            kept.extend(_of_copies(recast(graph)))
        if options.ep_dispatch_again:
            kept.extend(_of_dispatches(dispatch_again(graph)))

    def ordered(kind: str, graph_module: fx.GraphModule, seconds: Seconds | None) -> Plan | None:
        fuses = options.lowering == "inductor"
        return ordering.order(kind, graph_module, record, fuses, record.parts, seconds) if options.overlap else None

    salt = cache.salt(options, cache.topologies_of(gm))

    def measure(kind: str, graph_module: fx.GraphModule, finish: Finish) -> Compiled:
        if not options.profile:
            return finish(None)
        return measured(kind, graph_module, record, salt, finish)

    changes = options.precision == "fp8" or options.fp8_recast_weights or options.ep_dispatch_again
    joint = change if changes else None
    if options.lowering == "eager":
        compiled = eager(gm, example_inputs, seen=note, joint=joint, ordered=ordered, measured=measure, stage=stage)
        record.notes += kept
        return compiled

    patches = dict(options.inductor)
    _refuse_ahead_of_time(patches)
    if options.overlap:
        ordering.refuse_what_inductor_would_undo()
    sidecar = cache.Sidecar(cache.graph_key(salt, record.after or text_of(gm), example_inputs, patches))

    def note_and_store(kind: str, graph_module: fx.GraphModule) -> None:
        note(kind, graph_module)
        sidecar.write(kind, getattr(record, kind))

    patches = cache.salted(patches, salt, joint)
    if options.overlap:  # a rank that finds what it has compiled before would not meet the others
        patches["force_disable_caches"] = True
    compiled = inductor(
        gm, example_inputs, patches=patches, seen=note_and_store, name=name, ordered=ordered, measured=measure,
        stage=stage,
    )  # fmt: skip
    record.cached = "miss" if record.forward else "hit"
    if kept:
        sidecar.write("kept", "; ".join(kept))
    if record.cached == "hit":
        remembered = sidecar.read()
        kept = [remembered["kept"]] if "kept" in remembered else []
        record.forward, record.backward = remembered.get("forward"), remembered.get("backward")
        if not remembered:
            record.notes.append(
                "compiled code came from torch's caches; its forward and backward graphs are not stored here"
            )
        record.log_artifacts()
    record.notes += kept
    return compiled


def _of_copies(found: Counts) -> list[str]:
    """What is said of matrices whose transposed copies are held all the same."""
    if not found.kept:
        return []
    which = f"{found.kept} of {found.divided + found.kept} casts"
    return [
        f"fp8_recast_weights: the transposed copies of {which} are held for the backward; docs/options.md says of which"
    ]


def _of_dispatches(blocks: int) -> list[str]:
    """What is said of tokens that are dispatched twice."""
    return [f"ep_dispatch_again: the backward has tokens dispatched again, {blocks} times"] if blocks else []


def _refuse_ahead_of_time(patches: Mapping[str, Any]) -> None:
    for option in patches:
        if option.startswith("aot_inductor."):
            raise ValueError(
                f"moecompile: {option!r} is for ahead-of-time compilation, which this backend does not do. Export the "
                "uncompiled model (torch.export.export) and pass that to torch._inductor.aoti_compile_and_package."
            )


def inductor(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    patches: Mapping[str, Any],
    seen: Seen,
    name: str | None = None,
    ordered: Ordered | None = None,
    measured: Measured | None = None,
    stage: StageGraph | None = None,
) -> Compiled:
    """Compiles with Inductor.

    Args:
        gm: a graph of Dynamo's, after all our passes.
        example_inputs: the inputs of the call being compiled.
        patches: changes to Inductor's config for this graph. They go in as an argument, not as a context around the
            call, because the backward graph is compiled later and Inductor applies them again then.
        seen: called with each graph after Inductor's joint passes, before its post-grad passes.
        name: name of the compiled region, as in `torch.compile(name=...)`; used where torch supports it.
        ordered: orders each graph before that; the order is kept if it says what was planned.
        measured: has each measured before it is ordered and compiled.
        stage: keeps them, and enters them when they are called.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    def inner(graph_module: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        kind = "backward" if settings.get("is_backward") else "forward"
        kept = None if settings.get("is_inference") else stage
        late = functools.partial(_late, patches, {**settings, "is_backward": False}, in_order)
        if kept is not None:
            kept.keep(kind, graph_module, inputs)
            kept.late = late
        begun = True

        def finish(seconds: Seconds | None) -> Any:
            planned = None if ordered is None else ordered(kind, graph_module, seconds)
            seen(kind, graph_module)
            return in_order(graph_module, inputs, planned, settings) if begun else late(graph_module, planned)

        compiled = _measured(kind, graph_module, finish, seen, measured, kept)
        begun = False
        return compiled if kept is None else kept.called(kind, compiled)

    def in_order(
        graph_module: fx.GraphModule, inputs: Sequence[Any], planned: Plan | None, settings: Mapping[str, Any]
    ) -> Any:
        if decompose(graph_module.graph, select_decomp_table()):
            graph_module.recompile()
        if planned is not None:
            ordering.keep(graph_module, planned)
        return compile_fx_inner(graph_module, inputs, **settings)

    keep_exchanges()
    region: dict[str, Any] = {"compile_region_name": name} if name is not None and _NAMED_REGIONS else {}
    # AOTAutograd's cache would give compiled graphs alone, and a stage needs the graphs themselves
    graphs = contextlib.nullcontext() if stage is None else torch._functorch.config.patch(enable_autograd_cache=False)
    with graphs:
        compiled: Any = compile_fx(gm, example_inputs, inner_compile=inner, config_patches=dict(patches), **region)
    return compiled


def _measured(
    kind: str, gm: fx.GraphModule, finish: Finish, seen: Seen, measured: Measured | None, stage: StageGraph | None
) -> Any:
    """The compiled graph, or what measures it before that."""

    def finish_stage(seconds: Seconds | None) -> Any:
        if stage is not None and seconds is not None:
            stage.seconds[kind] = seconds
        return finish(seconds)

    if measured is None:
        return finish(None)
    compiled = measured(kind, gm, finish_stage)
    if is_measuring(compiled):
        keep_strides(gm)  # what it gives in its first calls has those of the trace
        seen(kind, gm)
    return compiled


def _late(
    patches: Mapping[str, Any],
    settings: Mapping[str, Any],
    in_order: Callable[..., Any],
    graph_module: fx.GraphModule,
    planned: Plan | None,
) -> Any:
    """Compiles what was made of AOTAutograd's graphs, out of its reach."""
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor import config

    inputs = [node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode(inputs)
    changed = {**settings, "static_input_idxs": (), "cudagraphs": type(settings["cudagraphs"])(False)}
    with config.patch(dict(patches)), tracing(TracingContext(mode)), torch.no_grad(), torch._C._DisableAutocast():
        return in_order(graph_module, inputs, planned, changed)


def eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    seen: Seen,
    joint: Callable[[fx.Graph], object] | None = None,
    ordered: Ordered | None = None,
    measured: Measured | None = None,
    stage: StageGraph | None = None,
) -> Compiled:
    """Runs AOTAutograd's forward and backward graphs operator by operator with PyTorch: no decomposition, no Inductor.

    It tells our work from Inductor's when numbers differ, and keeps tests quick. `joint` is a pass over both graphs
    before they are divided, `ordered` orders each of them afterwards, and `measured` has them measured before that;
    `stage` keeps them, and enters them when called.
    """
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    def compiler(kind: str, kept: StageGraph | None) -> Callable[[fx.GraphModule, Sequence[Any]], Compiled]:
        def compile_graph(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
            if kept is not None:
                kept.keep(kind, graph_module, inputs)
                kept.late = lambda made, _: boxed_nop(made, [])

            def finish(seconds: Seconds | None) -> Any:
                if ordered is not None:
                    ordered(kind, graph_module, seconds)
                seen(kind, graph_module)
                return boxed_nop(graph_module, list(inputs))

            compiled = _measured(kind, graph_module, finish, seen, measured, kept)
            return compiled if kept is None else kept.called(kind, compiled)

        return compile_graph

    def partition(graph_module: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        if joint is not None:
            joint(graph_module.graph)
            graph_module.recompile()
        return min_cut_rematerialization_partition(graph_module, inputs, **settings)

    backend = aot_autograd(
        fw_compiler=compiler("forward", stage),
        bw_compiler=compiler("backward", stage),
        inference_compiler=compiler("forward", None),
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    return backend(gm, example_inputs)
