"""A captured graph as it was before any pass, for the option `verify`: to run, to compare with, and to go back to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moecompile.bodies import bodies_of, copy_graph, text_of
from moecompile.capture import gpus_in_use, safe_inputs
from moecompile.extract import Cut, cut, moved
from moecompile.passes.site import Site


class Untouched:
    """A captured graph as it was before any pass: to compare with, and to go back to.

    Attributes:
        notes: that were made by then.
    """

    def __init__(self, gm: fx.GraphModule, notes: Sequence[str]) -> None:
        self._gm, self.notes = gm, tuple(notes)
        self._kept = {module: copy_graph(module.graph) for module in bodies_of(gm).values()}

    def put_back(self) -> str:
        """Undoes every pass; returns the graph as text."""
        for module, (graph, _) in self._kept.items():
            module.graph = graph
        return text_of(self._gm)

    def cuts(self, sites: Sequence[Site], exchanges: Mapping[int, Callable[[fx.Graph], None]]) -> list[Cut]:
        """The blocks, cut out of the kept graph; rewritten with the exchange of their tokens, where they have one."""
        places = {node: place for _, kept in self._kept.values() for node, place in kept.items()}
        return [cut(moved(site, places), exchanges.get(number)) for number, site in enumerate(sites)]

    def run(
        self, sites: Sequence[Site], cuts: Sequence[Cut], inputs: Sequence[Any], observe: Callable[..., None]
    ) -> None:
        """Runs the kept graph once and calls `observe(number of the block, *its inputs)` before each block's result."""
        rewritten = {module: module.graph for module in self._kept}
        try:
            for module, (graph, kept) in self._kept.items():
                watched, places = copy_graph(graph)
                for number, site in enumerate(sites):
                    if site.node in kept:
                        with watched.inserting_before(places[kept[site.node]]):
                            reads = tuple(places[node] for node in cuts[number].inputs)
                            watched.call_function(observe, (number, *reads))
                module.graph = watched
            with torch.no_grad(), torch.random.fork_rng(gpus_in_use()):
                self._gm(*safe_inputs(self._kept[self._gm][0], inputs))
        finally:
            for module, graph in rewritten.items():
                module.graph = graph
