"""Loads of experts that ranks share, on gloo (tests/expert_load_checks.py)."""

from __future__ import annotations

import pytest

import expert_load_checks
from ranks_in_processes import checks_of, run_on_ranks

CHECKS = checks_of(expert_load_checks)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each check came to."""
    return run_on_ranks(2, expert_load_checks.__name__, CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_together(results: dict[str, str], name: str) -> None:
    assert not results[name], results[name]
