"""Ways to compile models with experts over ranks: the table, and what 2 ranks on gloo check (compile_mode_checks.py).

The longer checks: `pytest -m slow tests/test_compile_modes.py`; those that need a GPU: tests/test_compile_modes_gpu.py.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import compile_mode_checks
from compile_modes import NO, PARTLY, ROWS, YES, Row
from ranks_in_processes import checks_of, run_on_ranks
from together import together

LONG = (
    "check_all_modes",
    "check_data_parallel",
    "check_whole_graphs",
    "check_checkpoints_inside",
    "check_more_tokens_than_there_is_room_for",
    "check_autocast_and_compiled_autograd",
)
CHECKS = checks_of(compile_mode_checks, but=LONG)

results, test_together = together(compile_mode_checks.__name__, CHECKS)


@pytest.mark.slow
def test_long_ones(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = run_on_ranks(2, compile_mode_checks.__name__, LONG, tmp_path_factory.mktemp("ranks"))
    assert not any(found.values()), "\n".join(found.values())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.way)
def test_every_row_has_a_proof(row: Row) -> None:
    """Checks that are there, and that some test file runs."""
    assert row.proofs and row.works in (YES, PARTLY, NO)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for proof in row.proofs:
        module, name = proof.split(".")
        assert callable(getattr(importlib.import_module(module), name)), proof
        assert f"{module}.__name__" in tests, proof


def test_every_check_proves_a_row() -> None:
    named = {proof for row in ROWS for proof in row.proofs}
    assert all(f"compile_mode_checks.{name}" in named for name in (*CHECKS, *LONG))
