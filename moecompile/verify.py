"""`verify="first_call"`: every rewritten block against the model's own code, on the inputs of the call being compiled.

    keep the captured graph, rewrite it
    run the kept graph once, without gradients, and wherever a block is about to be computed:
        cut the block out of the kept graph, once as it is, once rewritten
        run both on the values at hand: compare the results and, in training, the gradients for one random cotangent
    every difference within its bound?   go on with the rewritten graph
    one is not, on any rank?             warn, name the block, go on with the kept graph, on all ranks

The run works on copies of what the graph writes into, and puts the random generators back.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moecompile import ranks
from moecompile.advice import WARNED
from moecompile.bodies import bodies_of, copy_graph
from moecompile.capture import gpus_in_use, safe_inputs
from moecompile.extract import Cut, cut, moved
from moecompile.passes.forms import FORMS
from moecompile.passes.provenance import tensor_of
from moecompile.passes.site import NearMiss, Site
from moecompile.report import GraphReport

log = logging.getLogger("moecompile")

_WHOLE_NUMBER = re.compile(r"\d+")
"""What ranks with other numbers of tokens have in the text of the same graph, as sizes."""

# Largest difference between two right ways to compute a block, relative to the largest value of the tensor: for the
# result, for a gradient. The coarsest dtype inside the block decides.
BOUNDS: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-9),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (5e-3, 1e-2),
    torch.bfloat16: (3e-2, 6e-2),
}
# float32 products where the user lets a GPU round to TensorFloat-32
TENSOR_FLOAT = (5e-3, 1e-2)
UNCHOSEN = frozenset(form.name for form in FORMS if form.unchosen)


@dataclass(frozen=True)
class Difference:
    """How far original and replacement of one block are apart, relative to the largest value; None: not compared."""

    output: float
    gradient: float | None
    bounds: tuple[float, float]
    error: str = ""

    @property
    def small(self) -> bool:
        """Whether all is within its bound."""
        close = self.output <= self.bounds[0] and (self.gradient is None or self.gradient <= self.bounds[1])
        return close and not self.error

    def __str__(self) -> str:
        if self.error:
            return self.error
        gradient = "" if self.gradient is None else f", gradients by {self.gradient:.1e} (bound {self.bounds[1]:.0e})"
        return f"results differ by {self.output:.1e} (bound {self.bounds[0]:.0e}){gradient}"


class Untouched:
    """A captured graph as it was before any pass: to compare with, and to go back to."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._kept = {module: copy_graph(module.graph) for module in bodies_of(gm).values()}

    def put_back(self) -> None:
        """Undoes every pass."""
        for module, (graph, _) in self._kept.items():
            module.graph = graph

    def cuts(self, sites: Sequence[Site]) -> list[Cut]:
        """The blocks, cut out of the kept graph."""
        places = {node: place for _, kept in self._kept.values() for node, place in kept.items()}
        return [cut(moved(site, places)) for site in sites]

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


def verify(untouched: Untouched, sites: Sequence[Site], example_inputs: Sequence[Any], record: GraphReport) -> None:
    """Compares every block of a rewritten graph with the original, and goes back to the original if one differs.

    How it went is in the record, and in a warning if a block differs.

    Args:
        untouched: the graph before it was rewritten.
        sites: what was rewritten in it.
        example_inputs: the inputs of the call being compiled.
        record: the graph's.
    """
    if not sites:
        return
    if any(isinstance(value, torch._subclasses.FakeTensor) for value in example_inputs):
        record.notes.append("not verified: torch compiles this graph on fake inputs (as DDP's graph splitting does)")
        log.warning("moecompile: %s was %s", record.name, record.notes[-1])
        return
    differences = _differences(untouched, sites, example_inputs)
    for number, difference in sorted(differences.items()):
        site = sites[number]
        where = f"block {number} ({site.form}, {site.module or '(no module)'}, {site.source})"
        record.verify.append(f"{where}: {difference}")
        if not difference.small:
            log.warning(
                "moecompile: %s is not what the model computes: %s. The model's own code runs.", where, difference
            )
            reason = f"verify: not what the model computes: {difference}"
            record.near_misses += (NearMiss(site.form, reason, site.node.name, site.module, site.source),)
    differs = not all(difference.small for difference in differences.values())
    if ranks.any_rank(differs, _WHOLE_NUMBER.sub("", record.after)):
        untouched.put_back()
        record.sites, record.after = (), record.before
        record.notes += [
            "a rewritten block differs from the original, on this rank or another: the original runs",
            WARNED,
        ]


def _differences(untouched: Untouched, sites: Sequence[Site], example_inputs: Sequence[Any]) -> dict[int, Difference]:
    differences: dict[int, Difference] = {}
    cuts, training = untouched.cuts(sites), torch.is_grad_enabled()

    def observe(number: int, *values: Any) -> None:
        # a body that is called several times is judged by its first difference that is not small
        if number not in differences or differences[number].small:
            differences[number] = compare(cuts[number], values, training, sites[number].form in UNCHOSEN)

    untouched.run(sites, cuts, example_inputs, observe)
    return differences


def compare(block: Cut, values: Sequence[Any], training: bool, unchosen: bool) -> Difference:
    """Runs both versions of a block on the same values, which stay as they are.

    Args:
        block: both versions.
        values: what they are given.
        training: compares gradients too.
        unchosen: as in `Form`: where the original is not finite, it may be because an expert that was not chosen
            overflowed, and any finite result is as good.
    """
    placeholders = block.original.graph.find_nodes(op="placeholder")
    wanted = [isinstance(tensor_of(node), Tensor) and tensor_of(node).requires_grad for node in placeholders]
    bounds = _bounds(block.original.graph)
    gradient = None
    try:
        with torch.set_grad_enabled(training and any(wanted)):
            expected, expected_leaves = _run(block.original, values, wanted)
            actual, actual_leaves = _run(block.replacement, values, wanted)
        if expected.requires_grad:
            cotangent = torch.randn_like(expected)
            gradient = _distance(
                _gradients(actual, actual_leaves, cotangent),
                _gradients(expected, expected_leaves, cotangent),
                unchosen,
            )
    except Exception as error:  # a block that fails must not be used, whatever the reason
        return Difference(0.0, None, bounds, f"it cannot be run: {type(error).__name__}: {error}")
    return Difference(_distance([actual.detach()], [expected.detach()], unchosen), gradient, bounds)


def _run(function: fx.GraphModule, values: Sequence[Any], wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:
    """The result, and the tensors that gradients are wanted for."""
    leaves = [
        value.detach().requires_grad_(wants and torch.is_grad_enabled()) if isinstance(value, Tensor) else value
        for value, wants in zip(values, wanted, strict=True)
    ]
    # what the block gets is a copy: it may write into it, and autograd lets it
    result = function(*pytree.tree_map_only(Tensor, torch.clone, leaves))
    return result, [leaf for leaf, wants in zip(leaves, wanted, strict=True) if wants]


def _gradients(result: Tensor, leaves: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result, leaves, cotangent, allow_unused=True, materialize_grads=True))


def _distance(actual: Sequence[Tensor], expected: Sequence[Tensor], unchosen: bool) -> float:
    """Largest difference, each tensor relative to its largest finite value, or to a thousandth of that of all tensors.

    (A gradient that cancels out is rounding noise, and small next to the others.)
    """
    scales = [torch.where(tensor.isfinite(), tensor, 0).abs().max().double() for tensor in expected if tensor.numel()]
    floor = max([1e-3 * float(scale) for scale in scales], default=0.0) or torch.finfo(torch.float32).tiny
    return max((_tensor_distance(a, b, floor, unchosen) for a, b in zip(actual, expected, strict=True)), default=0.0)


def _tensor_distance(actual: Tensor, expected: Tensor, floor: float, unchosen: bool) -> float:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    actual, expected = actual.double(), expected.double()
    equal = torch.eq(actual, expected) | (actual.isnan() & expected.isnan())
    if unchosen:
        equal |= ~expected.isfinite() & actual.isfinite()
    apart = torch.where(equal, 0.0, (actual - expected).abs()).max()
    scale = torch.where(expected.isfinite(), expected.abs(), 0.0).max().clamp(min=floor)
    return float(torch.nan_to_num(apart / scale, nan=float("inf")))


def _bounds(graph: fx.Graph) -> tuple[float, float]:
    tensors = [value for node in graph.nodes if isinstance(value := tensor_of(node), Tensor)]
    bounds = [BOUNDS[tensor.dtype] for tensor in tensors if tensor.dtype in BOUNDS]
    on_gpu = any(tensor.device.type == "cuda" for tensor in tensors)
    if on_gpu and torch.get_float32_matmul_precision() != "highest":
        bounds.append(TENSOR_FLOAT)
    return max(bounds)
