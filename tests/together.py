"""Tests of checks that ranks run together (tests/ranks_in_processes.py): one group of processes for all of a file's.

results, test_together = together(hidden_exchange_checks.__name__)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ranks_in_processes import checks_of, judge, run_on_ranks


def together(module: str, names: Sequence[str] | None = None) -> tuple[Any, Callable[..., None]]:
    """A fixture, and a test of each check that two ranks run. Who imports from here gives both a name.

    Args:
        module: that has the checks, by name.
        names: of those to run; all of them if None.
    """
    chosen = checks_of(importlib.import_module(module)) if names is None else names

    @pytest.fixture(scope="module", name="results")
    def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        """What each check came to."""
        return run_on_ranks(2, module, chosen, tmp_path_factory.mktemp("ranks"))

    @pytest.mark.parametrize("name", chosen)
    def test_together(results: dict[str, str], name: str) -> None:
        judge(results[name])

    return results, test_together
