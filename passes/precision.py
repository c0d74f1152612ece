"""Turn a model to FP8: its linear layers and its experts, but for those that are kept.

Contract
- On entry the experts are `moecompile::experts` (passes/fuse.py); everything else is as the model wrote it.
- First every layer gets its verdict (passes/linears.py), then the graph is changed (passes/cast_experts.py,
  passes/cast_linears.py): what a layer is for does not depend on what has been cast.
- What the user wants (passes/exclusions.py) decides, as far as a layer can be cast at all.

The recipe is DeepSeek-V3's (technical report, section 3.3): e4m3; activations and gradients with a scale for each
1x128, weights for each 128x128; sums in float32. Embeddings, head, routers, norms, attention itself stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from moecompile.passes.cast_experts import cast_experts
from moecompile.passes.cast_linears import cast_linears
from moecompile.passes.casts import Cast
from moecompile.passes.exclusions import wishes
from moecompile.passes.linears import verdicts
from moecompile.passes.provenance import module_of


@dataclass(frozen=True)
class Exclusions:
    """What the user asked for, whatever the graph.

    Attributes:
        exclude: patterns of module paths that are kept.
        include: patterns of module paths that are cast whatever they are for, if they can be.
        first_layers: how many layers are kept from the first on.
        last_layers: how many are kept up to the last.
    """

    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    first_layers: int = 0
    last_layers: int = 0


@dataclass(frozen=True)
class Table:
    """What became of a graph.

    Attributes:
        rows: one for each linear layer and each block of experts.
        unused: the user's patterns that name no module of this graph.
        replaced: what is cast, with the node that computed it and the node in its place.
    """

    rows: tuple[Cast, ...]
    unused: tuple[str, ...]
    replaced: tuple[tuple[Cast, fx.Node, fx.Node], ...] = ()


def cast(graph: fx.Graph, exclusions: Exclusions, backward: bool = True) -> Table:
    """Rewrite the graph in place. The caller recompiles the GraphModule.

    Args:
        graph: of Dynamo's.
        exclusions: the user's.
        backward: whether the graph may be differentiated; if not, copies that only a backward reads are not made.
    """
    modules = {module_of(node) for node in graph.nodes if node.op.startswith("call")} - {""}
    chosen = wishes(modules, exclusions.exclude, exclusions.include, exclusions.first_layers, exclusions.last_layers)
    found = verdicts(graph, chosen)
    experts = cast_experts(graph, chosen.excluded, backward)
    layers = cast_linears(graph, found, backward)
    rows = [Cast(each.module, each.kind, each.shape, each.cast, each.reason) for each in found]
    every = [*experts, *zip(rows, layers, strict=True)]
    replaced = [(row, *nodes) for row, nodes in every if nodes is not None]
    return Table(tuple(row for row, _ in every), tuple(chosen.unused(modules)), tuple(replaced))
