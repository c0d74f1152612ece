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


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each check came to: one group of processes runs them all."""
    return run_on_ranks(2, expert_parallel_checks.__name__, CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same of four ranks."""
    return run_on_ranks(4, expert_parallel_checks.__name__, OF_FOUR, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_together(of_two: dict[str, str], name: str) -> None:
    assert not of_two[name], of_two[name]


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_together(of_four: dict[str, str], name: str) -> None:
    assert not of_four[name], of_four[name]


@pytest.mark.slow
def test_four_ranks_check_the_rest(tmp_path_factory: pytest.TempPathFactory) -> None:
    names = [name for name in CHECKS if name not in OF_FOUR]
    found = run_on_ranks(4, expert_parallel_checks.__name__, names, tmp_path_factory.mktemp("ranks"))
    assert not any(found.values()), "\n".join(found.values())
