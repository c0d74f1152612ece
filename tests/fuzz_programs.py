"""Random programs of a router's vocabulary, for the oracle of meanings: no block is meant, every rule is tried.

A program starts with tokens, router scores, their top k, ids of unknown range and stacked weights, all of sizes so
small that many of them agree, and goes on with random operations on random tensors. What eager PyTorch refuses is left
out. Graphs look as Dynamo makes them: fake example values, and symbols for sizes that data decides.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from program_graph import Program
from program_idioms import IDIOMS
from program_steps import STEPS


def program(rng: random.Random, length: int = 14) -> tuple[fx.GraphModule, list[Tensor]]:
    """A random program of about so many operations, and its inputs."""
    made = Program(rng)
    weights, steps = zip(*STEPS, *IDIOMS, strict=True)
    count = 0
    for _ in range(length * 12):
        if count == length:
            break
        try:
            target, args, kwargs = rng.choices(steps, weights)[0](made)
        except (LookupError, IndexError, ValueError):  # nothing of the kind is there yet
            continue
        count += made.call(target, args, kwargs) is not None
    for node in made.tensors():  # a size that data decides may have been taken for another since
        for size, real in zip(node.meta["example_value"].shape, made.real[node].shape, strict=True):
            known = size.node.expr if isinstance(size, torch.SymInt) else size
            if known != real and (isinstance(known, int) or known.is_number):
                return program(rng, length)
    made.graph.output(tuple(made.tensors()[-1:]))
    return fx.GraphModule(torch.nn.Module(), made.graph), made.inputs


def behind(gm: fx.GraphModule, name: str) -> Iterator[fx.Node]:
    """The nodes that one depends on, writes into them included: what to read of a program about which a lie is told."""
    needed: set[fx.Node] = {node for node in gm.graph.nodes if node.name == name}
    for node in reversed(list(gm.graph.nodes)):
        writes = str(node.target).endswith("_") or node.target is operator.setitem
        if node in needed or (writes and not needed.isdisjoint(node.all_input_nodes)):
            needed |= {node, *node.all_input_nodes}
    yield from (node for node in gm.graph.nodes if node in needed)
