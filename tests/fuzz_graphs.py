"""Fuzzes rewriting: random edits of captured graphs, each run as edited and as rewritten, on the same numbers.

`edit` changes a graph and keeps it runnable; `check` judges one rewrite; `campaign` does many and counts.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fuzz_edits import EDITS, mutates
from zoo_capture import Captured, captured, copied

__all__ = ["Campaign", "Verdict", "campaign", "captured", "check", "edit", "propagate"]

Rewrite = Callable[[fx.GraphModule], int]
ATTEMPTS = 20
# Of the largest entry.
TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-4}


class Undefined(Exception):
    """The edited graph itself reads memory that nothing wrote, or asks a kernel for what it does not define."""


@contextmanager
def quiet() -> Iterator[None]:
    """Restores what nodes of a graph may switch: gradients, autocast, the random state."""
    with torch.random.fork_rng(devices=()), torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu")):
        before = torch.is_grad_enabled()
        try:
            yield
        finally:
            torch.set_grad_enabled(before)


def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], gm: fx.GraphModule) -> Any:
    """What `torch.fx.Interpreter` would compute for one node."""
    if node.op == "call_function":
        assert callable(node.target)
        return node.target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "get_attr":
        value: Any = gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    raise NotImplementedError(f"expected a call or an attribute, got {node.op} ({node.format_node()})")


def propagate(gm: fx.GraphModule, old: set[str] | frozenset[str] = frozenset()) -> None:
    """Computes `meta["example_value"]` again for every node that is not in `old` (by name) and for all that follow.

    Raises whatever an operation raises on fake tensors.
    """
    placeholders = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
    mode = next(v.fake_mode for v in placeholders if isinstance(v, torch._subclasses.FakeTensor))
    autocast = any("autocast" in str(node.target) for node in gm.graph.nodes)
    changed: set[fx.Node] = set()
    shapes = mode.shape_env
    with quiet(), mode, shapes.ignore_fresh_unbacked_symbols() if shapes else quiet():
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if not autocast and node.name in old and changed.isdisjoint(node.all_input_nodes):
                continue
            values = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["example_value"])
            node.meta["example_value"] = call(node, *values, gm)
            changed.add(node)


def edit(gm: fx.GraphModule, rng: random.Random) -> str | None:
    """One random edit, in place; what it did, or None, the graph unchanged, if the edited graph would not run.

    Names of untouched nodes stay. Nodes that lost their last reader go, unless they write something.
    """
    trial = copied(gm)
    before = {node.name: (node.target, node.args, node.kwargs, bool(node.users)) for node in trial.graph.nodes}
    weights, edits = zip(*EDITS, strict=True)
    function = rng.choices(edits, weights)[0]
    try:
        description = function(trial.graph, rng)
        if description is None:
            return None
        for node in reversed(list(trial.graph.nodes)):
            idle = not node.users and node.op in ("call_function", "call_method") and not mutates(node)
            if idle and before.get(node.name, (0, 0, 0, True))[3]:
                trial.graph.erase_node(node)
        trial.graph.lint()
        same = {
            node.name
            for node in trial.graph.nodes
            if node.name in before and before[node.name][:3] == (node.target, node.args, node.kwargs)
        }
        propagate(trial, same)
    except Exception:  # whatever a broken graph raises, it means: not this edit
        return None
    gm.graph = trial.graph
    gm.recompile()
    return f"{function.__name__}: {description}"


@dataclass(frozen=True)
class Run:
    """What one call of a graph showed."""

    outputs: list[Any]
    written: list[Any]
    gradients: list[Any] | None


class Reference(fx.Interpreter):
    """Runs a graph with NaN where a grouped GEMM leaves memory unwritten."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
        if "grouped_mm" not in str(target) or not isinstance(offsets, Tensor) or result.dim() != 2:
            return result
        ends = [0, *offsets.tolist()]
        if ends != sorted(ends) or ends[-1] > result.shape[0]:
            raise Undefined(f"offsets {ends} of {result.shape[0]} rows")
        beyond = torch.arange(result.shape[0]).unsqueeze(-1) >= ends[-1]
        return result.masked_fill(beyond, float("nan")) if bool(beyond.any()) else result


def observe(function: Callable[..., Any], inputs: Sequence[Any], backward: bool) -> Run:
    """Calls a graph on copies of the inputs; gradients are of random cotangents, None without `backward`."""
    leaves = [separate_leaf(value, backward) for value in inputs]
    torch.manual_seed(11)
    with quiet(), torch.set_grad_enabled(backward):
        outputs = [value for value in pytree.tree_leaves(function(*leaves)) if isinstance(value, (Tensor, int, float))]
    written = [value.detach() if isinstance(value, Tensor) else value for value in leaves]
    if not backward:
        return Run(outputs, written, None)
    ends = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
    generator = torch.Generator().manual_seed(12)
    cotangents = [torch.randn(v.shape, generator=generator).to(v.dtype) for v in ends]
    starts = [value for value in leaves if isinstance(value, Tensor) and value.requires_grad]
    if not ends or not starts:
        return Run([detached(v) for v in outputs], written, [None] * len(starts))
    gradients = list(torch.autograd.grad(ends, starts, cotangents, allow_unused=True))
    return Run([detached(v) for v in outputs], written, gradients)


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def separate_leaf(value: Any, backward: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(backward and value.requires_grad)


def rounding(gm: fx.GraphModule) -> float:
    """What rounding explains, relative to a tensor's largest entry: that of the coarsest dtype in the graph."""
    values = [node.meta.get("example_value") for node in gm.graph.nodes]
    return max(TOLERANCE.get(value.dtype, 0.0) for value in values if isinstance(value, Tensor))


def difference(expected: Sequence[Any], got: Sequence[Any], what: str, tolerance: float) -> str | None:
    """What differs by more than the tolerance; numbers that are not finite raise Undefined if they are expected.

    A tensor much smaller than the largest of its kind may be all rounding, a gradient that cancels for example.
    """
    largest = max((size for size in map(magnitude, expected) if math.isfinite(size)), default=0.0)
    if len(expected) != len(got):
        return f"{len(got)} {what}s instead of {len(expected)}"
    for number, (a, b) in enumerate(zip(expected, got, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            a_zero = isinstance(a, Tensor) and b is None and not a.any()
            b_zero = isinstance(b, Tensor) and a is None and not b.any()
            if not (a_zero or b_zero or (type(a) is type(b) and a == b)):
                return f"{what} {number}: {describe(b)} instead of {describe(a)}"
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{what} {number}: {describe(b)} instead of {describe(a)}"
        if a.dtype not in TOLERANCE:
            if not torch.equal(a, b):
                return f"{what} {number}: other integers"
            continue
        if not a.isfinite().all():
            raise Undefined(f"{what} {number} is not finite")
        gap, scale = magnitude(a.double() - b.double()), magnitude(a)
        if not gap <= tolerance * (scale + largest / 50) + 1e-7:
            return f"{what} {number}: off by {gap:.2e} where the largest is {scale:.2e}"
    return None


def magnitude(value: Any) -> float:
    """The largest entry of a floating-point tensor without its sign, infinite for NaN; zero for anything else."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return 0.0
    return value.detach().double().abs().nan_to_num(float("inf")).max().item()


def describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


@dataclass(frozen=True)
class Verdict:
    """One fuzzed graph.

    Attributes:
        outcome: "equal"; "wrong" (the rewrite changed what the graph computes, or raised); "undefined" (nothing to
            compare); "broken" (the edited graph does not run on real numbers).
        sites: number of rewritten sites; 0 means refused.
        edits: what was done to the graph.
        detail: what differed, or why there was nothing to compare.
        name: the case that was edited.
    """

    outcome: str
    sites: int
    edits: tuple[str, ...]
    detail: str = ""
    name: str = ""


def check(case: Captured, rewrite: Rewrite, rng: random.Random, edits: int = 1, name: str = "") -> Verdict:
    """Edits the case's graph `edits` times and compares it, as edited, with what `rewrite` makes of it.

    `rewrite` gets a GraphModule of its own to change in place and returns the number of sites it rewrote.
    """
    gm, done = copied(case.gm), list[str]()
    for _ in range(ATTEMPTS * edits):
        if len(done) < edits and (description := edit(gm, rng)) is not None:
            done.append(description)
    if not done:
        return Verdict("broken", 0, (), "no edit ran", name)
    return compare(gm, case.inputs, rewrite, tuple(done), name)


def compare(gm: fx.GraphModule, inputs: Sequence[Any], rewrite: Rewrite, edits: tuple[str, ...], name: str) -> Verdict:
    """Runs a graph as it is and as rewritten."""
    reference = Reference(copied(gm))
    expected = None
    for backward in (True, False):  # an edit may make a graph that only runs without gradients
        try:
            expected = observe(reference.run, inputs, backward)
            break
        except Undefined as reason:
            return Verdict("undefined", 0, edits, str(reason), name)
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
    if expected is None:
        return Verdict("broken", 0, edits, detail, name)
    rewritten, sites, tolerance = copied(gm), 0, rounding(gm)
    try:
        sites = rewrite(rewritten)
        if not sites:
            return Verdict("equal", 0, edits, "refused", name)
        rewritten.graph.lint()
        rewritten.recompile()
        got = observe(rewritten, inputs, expected.gradients is not None)
        detail = (
            difference(expected.outputs, got.outputs, "output", tolerance)
            or difference(expected.written, got.written, "input after the call", tolerance)
            or difference(expected.gradients or (), got.gradients or (), "gradient", tolerance)
            or ""
        )
    except Undefined as reason:
        return Verdict("undefined", sites, edits, str(reason), name)
    except Exception as error:
        if "modified by an inplace operation" in str(error):
            # Eager autograd refuses, loudly, that what our operator saved for backward is written afterwards. In a
            # compiled graph AOTAutograd makes such a write a new tensor, and what was saved stays.
            return Verdict("undefined", sites, edits, str(error), name)
        return Verdict("wrong", sites, edits, f"{type(error).__name__}: {error}", name)
    return Verdict("wrong" if detail else "equal", sites, edits, detail, name)


@dataclass(frozen=True)
class Campaign:
    """Many verdicts, with a line that says how much they prove."""

    verdicts: tuple[Verdict, ...]

    @property
    def wrong(self) -> list[Verdict]:
        """The false rewrites."""
        return [verdict for verdict in self.verdicts if verdict.outcome == "wrong"]

    @property
    def rewritten(self) -> int:
        """Edited graphs that were rewritten and compared."""
        return sum(verdict.sites > 0 and verdict.outcome in ("equal", "wrong") for verdict in self.verdicts)

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {outcome}" for outcome, n in Counter(v.outcome for v in self.verdicts).most_common())
        worst = "".join(f"\n  {v.name}: {'; '.join(v.edits)}\n    {v.detail}" for v in self.wrong)
        return f"{len(self.verdicts)} graphs: {counts}; {self.rewritten} of them rewritten{worst}"


def campaign(cases: dict[str, Captured], rewrite: Rewrite, count: int, seed: int = 0) -> Campaign:
    """`count` graphs, round the cases, with one to three edits each; the same seed gives the same graphs."""
    verdicts = []
    names = sorted(cases)
    for number in range(count):
        name = names[number % len(names)]
        rng = random.Random(f"{seed}.{number}.{name}")
        verdicts.append(check(cases[name], rewrite, rng, rng.choice((1, 1, 2, 3)), name))
    return Campaign(tuple(verdicts))
