"""The option `microbatches` between ranks (tests/splitting_checks.py, tests/splitting_transformers_checks.py).

Under Inductor, and a second model of transformers': `pytest -m slow tests/test_splitting.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moecompile
import splitting_checks
import splitting_transformers_checks
from ranks_in_processes import checks_of, judge, run_on_ranks
from together import together

LONG = ("check_halves_by_inductor",)
results, test_together = together(splitting_checks.__name__, checks_of(splitting_checks, but=LONG))


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_long(tmp_path: Path, name: str) -> None:
    said = run_on_ranks(2, splitting_checks.__name__, [name], tmp_path)[name]
    judge(said)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if "deepseek" in name else [])
        for name in checks_of(splitting_transformers_checks)
    ],
)
def test_transformers(tmp_path: Path, name: str) -> None:
    pytest.importorskip("transformers")
    said = run_on_ranks(2, splitting_transformers_checks.__name__, [name], tmp_path)[name]
    judge(said)


def test_what_is_marked() -> None:
    x, labels = torch.zeros(4, 3), torch.zeros(4)
    moecompile.mark_batch({"x": [x]}, labels)
    assert all(each._dynamo_dynamic_indices == {0} for each in (x, labels))  # type: ignore[attr-defined]


@pytest.mark.parametrize("given", [(), (1, "x"), (torch.zeros(()),)])
def test_what_cannot_be_marked(given: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="expected tensors whose first dimension is the batch"):
        moecompile.mark_batch(*given)


def test_it_implies_overlap() -> None:
    from moecompile.options import Options

    assert Options.parse(None, {"microbatches": 2}).overlap
    with pytest.raises(ValueError, match="microbatches"):
        Options.parse(None, {"microbatches": 3})
