"""Experts spread over ranks, on gloo: what 2 and 4 ranks check together (tests/expert_parallel_checks.py).

Of 4 ranks some checks always run; all of them with `pytest -m slow tests/test_expert_parallel.py`.
"""

from __future__ import annotations

import pytest

import expert_parallel_checks
from ranks_in_processes import checks_of, run_on_ranks

CHECKS = checks_of(expert_parallel_checks)
OF_FOUR = (
    "check_compiled_exchanges_tokens",
    "check_all_to_one",
    "check_sums_at_home_are_exact",
    "check_distributed_checkpoint",
    "check_fsdp",
)


@pytest.fixture(scope="module", params=[(2, CHECKS), (4, OF_FOUR)], ids=["2 ranks", "4 ranks"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each check came to: one group of processes runs them all."""
    ranks, names = request.param
    return run_on_ranks(ranks, expert_parallel_checks.__name__, names, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_together(results: dict[str, str], name: str) -> None:
    if name not in results:
        pytest.skip("4 ranks: with -m slow")
    assert not results[name], results[name]


@pytest.mark.slow
def test_four_ranks_check_the_rest(tmp_path_factory: pytest.TempPathFactory) -> None:
    names = [name for name in CHECKS if name not in OF_FOUR]
    found = run_on_ranks(4, expert_parallel_checks.__name__, names, tmp_path_factory.mktemp("ranks"))
    assert not any(found.values()), "\n".join(found.values())
