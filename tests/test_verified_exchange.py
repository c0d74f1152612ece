"""The option `verify` where experts are spread over ranks: what 2 ranks on gloo check (verified_exchange_checks.py).

All forms: `pytest -m slow tests/test_verified_exchange.py`.
"""

from __future__ import annotations

import pytest

import verified_exchange_checks
from ranks_in_processes import checks_of, run_on_ranks
from together import together

LONG = ("check_all_forms_pass",)
CHECKS = checks_of(verified_exchange_checks, but=LONG)

results, test_together = together(verified_exchange_checks.__name__, CHECKS)


@pytest.mark.slow
def test_long_ones(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = run_on_ranks(2, verified_exchange_checks.__name__, LONG, tmp_path_factory.mktemp("ranks"))
    assert not any(found.values()), "\n".join(found.values())
