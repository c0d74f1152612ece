"""`verify="first_call"`: every rewritten block against the model's own code, on the inputs of the call being compiled.

    keep the captured graph, rewrite it
    run the kept graph once, without gradients, and wherever a block is about to be computed:
        cut the block out of the kept graph, once as it is, once rewritten, its exchange of tokens included
        run both on the values at hand: compare the results and, in training, the gradients for one random cotangent
    every difference within its bound?   go on with the rewritten graph
    one is not, on any rank?             warn, name the block, go on with the kept graph, on all ranks

The run works on copies of what the graph writes into, and puts the random generators back. A graph that exchanges
something between ranks is run by all of them, when all first compile it, or by none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moecompile import ranks
from moecompile.advice import WARNED
from moecompile.extract import Cut
from moecompile.passes.forms import FORMS
from moecompile.passes.provenance import tensor_of
from moecompile.passes.site import NearMiss, Site
from moecompile.pipeline import Passed
from moecompile.report import GraphReport

log = logging.getLogger("moecompile")

VERIFY = "verify"
"""What ranks meet for."""
FAKE = "fake"
"""A rank's word if it has no inputs to verify with."""
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


def verify(passed: Passed, example_inputs: Sequence[Any], record: GraphReport) -> bool:
    """Compares every block of a rewritten graph with the original, and goes back to the original if one differs.

    How it went is in the record, and in a warning if a block differs. Ranks that share experts do so together, when
    they first compile the graph; whoever compiles it once more goes the way they went.

    Args:
        passed: what the passes have left; without an untouched graph nothing is compared.
        example_inputs: the inputs of the call being compiled.
        record: the graph's.

    Returns:
        whether the rewritten graph stays.

    Raises:
        DisagreementError: not all ranks that share experts verify.
    """
    if passed.untouched is None:
        return True
    fake = any(isinstance(value, torch._subclasses.FakeTensor) for value in example_inputs)
    words = passed.together.meet(VERIFY, FAKE if fake else str(len(passed.sites)))
    if words is None:
        return _as_before(passed, record)
    if not any(word != "0" for word in words):
        return True
    if FAKE in words:
        record.notes.append("not verified: torch compiles this graph on fake inputs (as DDP's graph splitting does)")
        log.warning("moecompile: %s was %s", record.name, record.notes[-1])
        return True
    differences = _differences(passed, example_inputs)
    _tell(passed.sites, differences, record)
    differs = not all(difference.small for difference in differences.values())
    if not _any_rank(passed, differs, record):
        return True
    _go_back(passed, record, "a rewritten block differs from the original, on this rank or another")
    return False


def _as_before(passed: Passed, record: GraphReport) -> bool:
    """Another compilation of what the ranks have verified together: this one may be the only one that compiles."""
    if passed.together.objected(VERIFY):
        _go_back(
            passed, record, "a rewritten block differed from the original when the ranks first compiled this graph"
        )
        return False
    record.notes.append(
        "not verified again: ranks that share experts verify a graph when all of them first compile it, and this one "
        "may be the only one that compiles"
    )
    return True


def _tell(sites: Sequence[Site], differences: Mapping[int, Difference], record: GraphReport) -> None:
    """How every block has compared."""
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


def _any_rank(passed: Passed, differs: bool, record: GraphReport) -> bool:
    """Whether a block differs on any rank."""
    if passed.together.alone:
        return ranks.any_rank(differs, _WHOLE_NUMBER.sub("", record.after))
    return passed.together.object(VERIFY, differs)


def _go_back(passed: Passed, record: GraphReport, why: str) -> None:
    assert passed.untouched is not None
    how = "" if passed.together.alone else ", and all ranks that share experts gather them"
    record.sites, record.casts, record.after = (), (), passed.untouched.put_back()
    record.notes = [*passed.untouched.notes, f"{why}: the original runs{how}", WARNED]


def _differences(passed: Passed, example_inputs: Sequence[Any]) -> dict[int, Difference]:
    differences: dict[int, Difference] = {}
    assert passed.untouched is not None
    cuts, training = passed.untouched.cuts(passed.sites, passed.exchanges), torch.is_grad_enabled()

    def observe(number: int, *values: Any) -> None:
        found = compare(cuts[number], values, training, passed.sites[number].form in UNCHOSEN)
        # a body that is called several times is judged by its first difference that is not small
        if number not in differences or differences[number].small:
            differences[number] = found

    passed.untouched.run(passed.sites, cuts, example_inputs, observe)
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
            groups = [group for group, wants in zip(block.whole_on, wanted, strict=True) if wants]
            gradient = _distance(
                _summed(_gradients(actual, actual_leaves, cotangent), groups),
                _summed(_gradients(expected, expected_leaves, cotangent), groups),
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


def _summed(gradients: Sequence[Tensor], groups: Sequence[str | None]) -> list[Tensor]:
    """The sums over the ranks of their groups, of those that have one."""
    ops = torch.ops._c10d_functional
    return [
        gradient if group is None else ops.wait_tensor(ops.all_reduce(gradient.float(), "sum", group))
        for gradient, group in zip(gradients, groups, strict=True)
    ]


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
