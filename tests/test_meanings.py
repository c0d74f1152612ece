"""Every meaning that detection gives a tensor is true: of all spellings, of near-spellings, of random programs."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import meanings_of_forms  # noqa: F401  (what the forms' own meanings are)
import moecompile  # noqa: F401  (registers the operators)
from fuzz_graphs import edit, quiet, rounding
from fuzz_programs import behind, program
from meanings_checked import Checked, check_meanings
from moecompile.passes import rules, terms
from moecompile.passes.terms import Value
from zoo_capture import Captured, captured, captured_case, copied
from zoo_case import Case, Refusal
from zoo_forms import CASES, case
from zoo_refusals import REFUSALS


def told(known: Captured) -> Checked:
    return check_meanings(known.gm, known.inputs, max(rounding(known.gm), 1e-4))


def report(gm: fx.GraphModule, found: Checked) -> str:
    lie = found.lies[0]
    return "\n".join([str(lie), *(node.format_node() or "" for node in behind(gm, lie.node))])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_of_every_spelling(case: Case) -> None:
    known = captured_case(case)
    found = told(known)
    assert not found.lies, report(known.gm, found)
    assert found.compared > 10


@pytest.mark.slow
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_of_every_refusal(refusal: Refusal) -> None:
    if refusal.undefined:
        pytest.skip("reads memory that nothing wrote")
    known = captured_case(refusal)
    found = told(known)
    assert not found.lies, report(known.gm, found)


def programs(seed: str, count: int) -> int:
    compared = 0
    for number in range(count):
        rng = random.Random(f"{seed}.{number}")
        gm, inputs = program(rng, rng.choice((8, 14, 20)))
        found = check_meanings(gm, inputs)
        assert not found.lies, f"program {seed}.{number}: {report(gm, found)}"
        compared += found.compared
    return compared


def test_of_random_programs() -> None:
    assert programs("quick", 150) > 3000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_of_many_random_programs(seed: int) -> None:
    assert programs(f"many {seed}", 1000) > 20000


@contextlib.contextmanager
def memory_filled() -> Iterator[None]:
    """Within, memory that nobody wrote holds numbers that are no index, and not what happened to lie there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [2, 4, 24])
def test_of_edited_graphs(tokens: int) -> None:
    """The edits of fuzz_graphs.py; graphs that do not run on these numbers are left out."""
    compared = 0
    for number in range(300):
        rng = random.Random(f"{tokens}.{number}")
        graphs: list[Case | Refusal] = [*CASES, *REFUSALS]
        chosen = rng.choice(graphs)
        try:
            known = captured_case(chosen, tokens=4 if chosen in CASES and tokens == 2 else tokens)
            gm = copied(known.gm)
            edits = [done for done in (edit(gm, rng) for _ in range(6)) if done]
            with quiet(), memory_filled():
                fx.Interpreter(gm).run(*[v.detach().clone() if isinstance(v, Tensor) else v for v in known.inputs])
        except Exception:  # whatever eager raises, some at so few tokens: there is nothing to compare
            continue
        with quiet(), memory_filled():
            found = check_meanings(gm, known.inputs, max(rounding(gm), 1e-3))
        assert not found.lies, f"{chosen.name}, {edits}: {report(gm, found)}"
        compared += found.compared
    assert compared > 2000


def divided_by_a_negative(x: Tensor) -> Tensor:
    return x.topk(2).indices.flatten().argsort(stable=True) // -2


def one_count_of_ids_that_were_written(x: Tensor) -> Tensor:
    ids = x.topk(1).indices
    ids.add_(1)
    return ids.flatten().bincount(minlength=1)


@pytest.mark.parametrize("function", [divided_by_a_negative, one_count_of_ids_that_were_written])
def test_of_what_random_programs_once_found(function: Callable[[Tensor], Tensor]) -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    assert not told(captured(Module(), (torch.randn(5, 4),), fullgraph=True)).lies


# ---- the oracle itself


def _shifted(value: Value) -> Value:
    """The meaning of the tensor's negative."""
    return replace(value, content=terms.Apply("neg", (value.content,)))


def _turned(value: Value) -> Value:
    """The meaning of the tensor turned around."""
    return replace(value, dims=value.dims[::-1])


LIES = [
    *((_shifted, operation) for operation in ("mul", "getitem", "bmm", "grouped_mm", "view", "transpose")),
    *((_turned, operation) for operation in ("getitem", "grouped_mm")),
]


@pytest.mark.parametrize(("lie", "operation"), LIES)
def test_a_lie_is_noticed(lie: Callable[[Value], Value], operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rule that gives another meaning than it should."""
    rule, told_lies = rules.RULES[operation], 0

    def wrong(call: Any, state: Any) -> Any:
        nonlocal told_lies
        value = rule(call, state)
        if not isinstance(value, Value) or isinstance(value.content, (terms.Index, terms.Count)):
            return value
        if lie is _turned and (len(value.dims) < 2 or len(set(state.shape(call.node))) > 1):
            return value
        told_lies += 1
        return lie(value)

    monkeypatch.setitem(rules.RULES, operation, wrong)
    seen = 0
    for name in ("batched_control", "grouped_control", "titan_control"):
        seen += len(told(captured_case(case(name), tokens=32)).lies)
    assert told_lies > 0 and seen > 0
