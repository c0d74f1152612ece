"""Exchanges under Inductor: all of them, in one order on all ranks (tests/exchange_order_checks.py)."""

from __future__ import annotations

import pytest

import exchange_order_checks
from ranks_in_processes import checks_of, run_on_ranks

CHECKS = checks_of(exchange_order_checks)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each check came to."""
    return run_on_ranks(2, exchange_order_checks.__name__, CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_together(found: dict[str, str], name: str) -> None:
    assert not found[name], found[name]
