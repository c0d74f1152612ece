"""Calls bound to one signature: every spelling's arguments, given by place or by name."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from moecompile.passes.calls import TABLE, Call, bind


def bound(target: Any, *args: Any, **kwargs: Any) -> Call | None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    if isinstance(target, str):
        return bind(graph.call_method(target, (x, *args), kwargs))
    return bind(graph.call_function(target, (x, *args), kwargs))


@pytest.mark.parametrize("name", list(TABLE))
def test_required_arguments_come_first(name: str) -> None:
    signature, _ = TABLE[name]
    words = [word for word in signature.split() if not word.startswith("*")]
    assert words == sorted(words, key=lambda word: "=" in word)


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        (bound("softmax", -1), {"dim": -1, "dtype": None}),
        (bound(torch.softmax, dim=-1), {"dim": -1, "dtype": None}),
        (bound("topk", 2), {"k": 2, "dim": -1, "largest": True}),
        (bound(torch.topk, 2, -1, largest=False), {"k": 2, "dim": -1, "largest": False}),
        (bound("view", 2, 3), {"shape": (2, 3)}),
        (bound("transpose", 0, 1), {"dim0": 0, "dim1": 1}),
    ],
)
def test_arguments(given: Call | None, arguments: dict[str, Any]) -> None:
    assert given is not None
    assert {name: given[name] for name in arguments} == arguments


@pytest.mark.parametrize(
    "call",
    [
        bound("transpose", 0),  # too few
        bound("t", 1),  # too many
        bound("transpose", 0, 1, 2),
        bound("topk", largest=False),
        bound("softmax", -1, unheard_of=1),
        bound(operator.index),
    ],
)
def test_what_does_not_fit_is_not_bound(call: Call | None) -> None:
    assert call is None


def test_in_place() -> None:
    written = [bound("mul_", 2), bound(operator.imul, 2), bound(torch.nn.functional.silu, True)]
    assert [call.inplace for call in written if call is not None] == [True] * 3
    plain = [bound("mul", 2), bound(torch.nn.functional.silu), bound(torch.nn.functional.silu, inplace=False)]
    assert [call.inplace for call in plain if call is not None] == [False] * 3
