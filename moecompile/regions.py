"""What `torch.compiler.nested_compile_region` cannot hold: experts that are spread over ranks."""

from __future__ import annotations

from torch import fx

from moecompile.bodies import bodies_of
from moecompile.passes.expert_parallel import gathered_parameters
from moecompile.passes.flatten import body_of


def refuse_sharded_regions(gm: fx.GraphModule) -> None:
    """Refuses a graph in which a region reads experts of several ranks, which torch would fail on less clearly.

    AOTAutograd hands a region the parts of a DTensor, and the region's code expects the DTensor. A region that is
    called once is none any more: Dynamo makes it part of the graph around it.

    Args:
        gm: a graph of Dynamo's.

    Raises:
        NotImplementedError: there is such a region.
    """
    for module in bodies_of(gm).values():
        for call in module.graph.nodes:
            if getattr(call.target, "__name__", "") != "invoke_subgraph":
                continue
            region = body_of(module, call.args[0])
            names = [name for found in gathered_parameters(region.graph).values() for name in found] if region else []
            if names:
                raise NotImplementedError(
                    f"moecompile: experts that are spread over ranks ({names[0]}) cannot be read in a region of "
                    "torch.compiler.nested_compile_region that is called more than once: torch hands it no DTensors. "
                    "Take the decorator off, or compile layer by layer instead: layer.compile(backend='moecompile')"
                )
