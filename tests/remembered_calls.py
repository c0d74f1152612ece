"""Calls of the experts on the CPU, of every form that has launches of its own, and whether they were checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.runtime.contract import Arguments

TOKENS, TOP_K, EXPERTS = 3, 2, 4
FORMS: dict[str, dict[str, Any]] = {
    "halves": {},
    "biased": {"biases": True},
    "separate": {"gate_up": "separate", "biases": True},
    "interleaved": {"gate_up": "interleaved", "biases": True},
    "single": {"gate_up": "single", "activation": "relu(hidden)", "biases": True},
    "transposed": {"w_in_transposed": True, "w_out_transposed": True},
    "separate, transposed": {"gate_up": "separate", "w_in_transposed": True},
    "converted weights": {"weight_dtype": torch.bfloat16},
    "weight inside": {"activation": "mul(mul(silu(gate), up), cast(weight, bfloat16))", "output": "out"},
    "no weights": {"weighted": False, "output": "out"},
    "float32 result": {"out_dtype": torch.float32},
}


def call_of(form: str, hidden: int, inner: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Arguments of `experts` by name, for tokens (tokens, hidden) and experts of that inner size."""
    given: dict[str, Any] = {"gate_up": "halves", "activation": "mul(silu(gate), up)"} | FORMS[form]
    biases, weighted = given.pop("biases", False), given.pop("weighted", True)
    weight_dtype = given.pop("weight_dtype", torch.float32)
    separate = given["gate_up"] == "separate"
    width = inner if given["gate_up"] in ("single", "separate") else 2 * inner

    def made(*shape: int, transposed: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16).mT.contiguous() if transposed else torch.zeros(shape).bfloat16()

    first = given.get("w_in_transposed", False)
    tensors = {
        "x": made(tokens, hidden),
        "weights": torch.zeros(tokens, TOP_K, dtype=weight_dtype) if weighted else None,
        "offsets": torch.zeros(EXPERTS, dtype=torch.int32),
        "slots": torch.zeros(tokens, TOP_K, dtype=torch.int32),
        "order": torch.zeros(tokens * TOP_K, dtype=torch.int32),
        "w_in": made(EXPERTS, width, hidden, transposed=first),
        "w_out": made(EXPERTS, hidden, inner, transposed=given.get("w_out_transposed", False)),
        "w_up": made(EXPERTS, inner, hidden, transposed=first) if separate else None,
        "b_in": made(EXPERTS, width) if biases else None,
        "b_up": made(EXPERTS, inner) if biases and separate else None,
        "b_out": made(EXPERTS, hidden) if biases else None,
    }
    return {"output": "mul(out, cast(weight, bfloat16))"} | given | tensors


def noting_checks(monkeypatch: pytest.MonkeyPatch) -> list[Arguments]:
    """The arguments that have been checked since, of calls that were not remembered."""
    checked: list[Arguments] = []
    check = Arguments.check

    def checking(self: Arguments) -> Arguments:
        checked.append(self)
        return check(self)

    monkeypatch.setattr(Arguments, "check", checking)
    return checked
