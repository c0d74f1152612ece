"""Experts spread over ranks, on gloo: what 2 and 4 ranks check together (tests/expert_parallel_checks.py)."""

from __future__ import annotations

import pytest

import expert_parallel_checks
from ranks_in_processes import run_on_ranks

CHECKS = [name for name in vars(expert_parallel_checks) if name.startswith("check_")]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each check came to: one group of processes runs them all."""
    directory = tmp_path_factory.mktemp("ranks")
    return run_on_ranks(request.param, expert_parallel_checks.__name__, CHECKS, directory)


@pytest.mark.parametrize("name", CHECKS)
def test_together(results: dict[str, str], name: str) -> None:
    assert not results[name], results[name]
