"""The backend: one captured graph in, something callable out. This file is the story; the other rooms are its chapters.

    torch.compile(model, backend="moecompile")

Dynamo captures the model's graph and calls `moecompile` with it: once for each graph, and again for each recompilation.
Nothing heavy is imported before that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from moecompile.options import Options, environment_disables_backend

if TYPE_CHECKING:
    from moecompile.passes.cached_weights import Lifted


def moecompile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | Options | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Compiles one graph of Dynamo's: mixture-of-experts blocks by moecompile, everything else by Inductor.

    Args:
        gm: the captured graph, before autograd; rewritten in place.
        example_inputs: the tensors and sizes of the call that is being compiled.
        mode: as in `torch.compile(mode=...)`.
        options: as in `torch.compile(options=...)`, see `moecompile.Options`.
        name: as in `torch.compile(name=...)`.

    Returns:
        a callable that takes the graph's inputs and returns its outputs as a tuple; it has a backward.

    Raises:
        ValueError: unknown options or modes, or values that they do not take.
    """
    from moecompile import (
        advice,
        cached,
        comparison,
        loads,
        local_parameters,
        lowering,
        main_gradients,
        pipeline,
        pipelining,
        report,
        splitting,
        verify,
    )

    # 1. What the user asked for.
    chosen = Options.parse(mode, options)
    record = report.GraphReport.of(gm)
    report.record(record)
    advice.note_caller(record)
    advice.warn_of_unknown_variables()

    # 2. On request, nothing: to tell whether moecompile is to blame.
    if environment_disables_backend():
        record.notes.append("MOECOMPILE_DISABLE is set: the graph was handed on untouched")
        return lowering.lower(gm, example_inputs, chosen, record, name)

    # 3. The passes, over the graph and the bodies of its higher-order operators: detect, then fuse. On request, the
    #    rewritten blocks are compared with the original ones, and the original graph is used where they differ; and
    #    layers in FP8 with what they were, to see what that costs. A stage of a pipeline hides exchanges in pairs.
    stage = pipelining.graph_for(example_inputs, record, chosen)
    with pipeline.out_of_reach_of_hooks():
        passed = pipeline.run_passes(gm, chosen, record, paired=stage is not None)
        if verify.verify(passed, example_inputs, record):
            comparison.compare(gm, passed.uncast, passed.together, example_inputs, record)
    obstacle = advice.obstacle_of(gm, record, example_inputs)

    # 4. On request, more comes in from outside: what the weights' gradients are added to, the weights' FP8 copies, kept
    #    there until the weights change, and what tokens are counted in.
    lifted: list[Lifted] = []
    added = None
    counted: Sequence[loads.Lifted] = ()
    if chosen.main_grad:
        gm, example_inputs, added = main_gradients.lift(gm, example_inputs, record)
        if added is not None and stage is not None:
            pipelining.refuse_scaling(example_inputs)
    if chosen.fp8_cache_weights:
        gm, example_inputs, lifted = cached.lift(gm, example_inputs, record)
    if chosen.expert_load:
        gm, example_inputs, counted = loads.lift(gm, example_inputs, record)

    # 5. On request, the graph runs on two halves of its batch.
    if chosen.microbatches == 2:
        gm = splitting.split(gm, chosen, record)

    # 6. AOTAutograd, then Inductor. Our operators carry their own autograd: one rewrite serves forward and backward.
    #    Graphs of a pipeline's stage are kept, to be divided and paired as its schedule asks for.
    parts: Sequence[int] = ()
    if stage is not None:
        gm, example_inputs, parts = local_parameters.lift(gm, example_inputs)
    compiled = lowering.lower(gm, example_inputs, chosen, record, name, stage)
    compiled = loads.with_loads(local_parameters.with_parts(compiled, parts), counted)
    compiled = cached.with_copies(compiled, lifted)
    compiled = main_gradients.with_main_gradients(compiled, added)
    compiled = pipelining.noting(compiled, stage)

    # 7. A model that was not rewritten at all is worth one warning, with the reason and the cure.
    return advice.warn_if_nothing_matched(compiled, record, obstacle)
