"""The option `verify` where experts are spread over ranks: what 2 ranks on gloo check (verified_exchange_checks.py).

All forms: `pytest -m slow tests/test_verified_exchange.py`.
"""

from __future__ import annotations

import pytest

import verified_exchange_checks
from ranks_in_processes import checks_of, run_on_ranks

LONG = ("check_all_forms_pass",)
CHECKS = checks_of(verified_exchange_checks, but=LONG)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each check came to: one group of processes runs them all."""
    return run_on_ranks(2, verified_exchange_checks.__name__, CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_together(results: dict[str, str], name: str) -> None:
    assert not results[name], results[name]


@pytest.mark.slow
def test_long_ones(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = run_on_ranks(2, verified_exchange_checks.__name__, LONG, tmp_path_factory.mktemp("ranks"))
    assert not any(found.values()), "\n".join(found.values())
