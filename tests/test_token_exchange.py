"""Models that exchange tokens themselves, on gloo: what 2 ranks check together (tests/token_exchange_checks.py)."""

from __future__ import annotations

import pytest

import token_exchange_checks
from ranks_in_processes import checks_of, run_on_ranks
from together import together

SLOW = ("check_under_inductor", "check_fp8")
CHECKS = checks_of(token_exchange_checks, but=SLOW)

results, test_together = together(token_exchange_checks.__name__, CHECKS)


@pytest.mark.slow
def test_the_longer_ones(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = run_on_ranks(2, token_exchange_checks.__name__, SLOW, tmp_path_factory.mktemp("ranks"))
    assert not any(found.values()), "\n".join(found.values())


@pytest.mark.slow
def test_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> None:
    names = [name for name in CHECKS if name != "check_refused"]  # one of these is written for two ranks
    found = run_on_ranks(4, token_exchange_checks.__name__, names, tmp_path_factory.mktemp("ranks"))
    assert not any(found.values()), "\n".join(found.values())
