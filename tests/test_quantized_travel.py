"""Rows travel between ranks in FP8 if they are multiplied so: what 2 ranks check (tests/quantized_travel_checks.py)."""

from __future__ import annotations

import pytest

import quantized_travel_checks
from ranks_in_processes import checks_of, run_on_ranks

CHECKS = checks_of(quantized_travel_checks)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each check came to."""
    return run_on_ranks(2, quantized_travel_checks.__name__, CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_together(found: dict[str, str], name: str) -> None:
    assert not found[name], found[name]
