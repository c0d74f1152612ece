"""Detection and rewriting of one graph, as the backend does them."""

from __future__ import annotations

from torch import fx

from moecompile.passes.detect import detect
from moecompile.passes.fuse import fuse


def rewrite(gm: fx.GraphModule) -> int:
    """Replaces every Site of the graph; returns how many there were."""
    found = detect(gm.graph)
    count = fuse(gm.graph, found.sites, found.layout)
    gm.graph.lint()
    gm.recompile()
    return count
