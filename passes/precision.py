"""Turn a model to FP8: its linear layers and its experts, but for those that are kept.

Contract
- On entry the experts are `moecompile::experts` (passes/fuse.py); everything else is as the model wrote it.
- First every layer gets its verdict (passes/linears.py), then the graph is changed (passes/cast_linears.py,
  passes/cast_experts.py): what a layer is for does not depend on what has been cast.
- What the user wants (passes/exclusions.py) decides, as far as a layer can be cast at all.
- The bodies of a captured graph are cast one by one, but with one view of all: what layers are for, wherever their
  results go (passes/flatten.py), which matrices are embeddings', and where the model's layers begin and end.

The recipe is DeepSeek-V3's (technical report, section 3.3): e4m3; activations and gradients with a scale for each
1x128, weights for each 128x128; sums in float32. Embeddings, head, routers, norms, attention itself stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from moecompile.passes.cast_experts import cast_experts
from moecompile.passes.cast_linears import cast_linears
from moecompile.passes.casts import Cast, Casting
from moecompile.passes.exclusions import Wishes
from moecompile.passes.flatten import flatten
from moecompile.passes.linears import verdicts
from moecompile.passes.provenance import module_of
from moecompile.passes.purposes import Purposes


@dataclass(frozen=True)
class Table:
    """What became of a graph.

    Attributes:
        rows: one for each linear layer and each block of experts.
        replaced: what is cast, with the node that computed it and the node in its place.
    """

    rows: tuple[Cast, ...]
    replaced: tuple[tuple[Cast, fx.Node, fx.Node], ...] = ()


def modules_of(graphs: Iterable[fx.Graph]) -> frozenset[str]:
    """Paths of all modules that compute something in these bodies."""
    return frozenset(module_of(node) for graph in graphs for node in graph.nodes if node.op.startswith("call"))


def purposes_of(gm: fx.GraphModule) -> Purposes:
    """What the layers of a captured graph are for, in whichever of its bodies they are."""
    flat = flatten(gm)
    return Purposes.of(flat.graph, flat.origins)


def cast(graph: fx.Graph, wishes: Wishes, purposes: Purposes, casting: Casting) -> Table:
    """Rewrite the graph in place. The caller recompiles the GraphModule.

    Args:
        graph: of Dynamo's, or a body of it.
        wishes: the user's.
        purposes: what layers are for, before any body has been cast.
        casting: how what is cast is cast.
    """
    found = verdicts(graph, wishes, purposes)
    layers = cast_linears(graph, found, casting)
    experts = cast_experts(graph, wishes.excluded, casting)
    rows = [Cast(each.module, each.kind, each.shape, each.cast, each.reason) for each in found]
    every = [*experts, *zip(rows, layers, strict=True)]
    return Table(tuple(row for row, _ in every), tuple((row, *nodes) for row, nodes in every if nodes is not None))
