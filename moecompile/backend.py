"""The backend: one captured graph in, something callable out. This file is the story; the other rooms are its chapters.

    torch.compile(model, backend="moecompile")

Dynamo captures the model's graph and calls `moecompile` with it, once for each graph and each recompilation. Nothing
heavy is imported before that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from moecompile.options import Options, environment_disables_backend


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
    from moecompile import cache, lowering, pipeline, report

    # 1. What the user asked for.
    chosen = Options.parse(mode, options)
    record = report.GraphReport.of(gm)
    report.record(record)

    # 2. Detect, fuse: the passes, over this graph and the bodies of its higher-order operators.
    if environment_disables_backend():
        record.notes.append("MOECOMPILE_DISABLE is set: the graph went to the lowering untouched")
    else:
        pipeline.run_passes(gm, chosen, record)

    # 3. AOTAutograd, then Inductor or PyTorch itself; the forward and backward graphs are noted as they appear.
    def seen(kind: str, graph_module: fx.GraphModule) -> None:
        setattr(record, kind, pipeline.text_of(pipeline.pieces_of(graph_module), collapse=True))

    if chosen.lowering == "eager":
        return lowering.eager(gm, example_inputs, seen=seen)
    patches = cache.salted(dict(chosen.inductor), cache.salt(chosen))
    return lowering.inductor(gm, example_inputs, patches=patches, seen=seen, name=name)
