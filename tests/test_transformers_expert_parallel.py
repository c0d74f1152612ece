"""transformers' models with experts spread over ranks, on gloo (tests/transformers_expert_parallel_checks.py)."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers.distributed.expert_parallel")

import transformers_expert_parallel_checks
from ranks_in_processes import run_on_ranks

CHECKS = [name for name in vars(transformers_expert_parallel_checks) if name.startswith("check_")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each check came to: one group of processes runs them all."""
    directory = tmp_path_factory.mktemp("ranks")
    return run_on_ranks(2, transformers_expert_parallel_checks.__name__, CHECKS, directory)


@pytest.mark.parametrize("name", CHECKS)
def test_together(results: dict[str, str], name: str) -> None:
    assert not results[name], results[name]
