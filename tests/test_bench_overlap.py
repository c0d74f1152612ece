"""The bench of layers on halves of a batch: what it measures over gloo, and what of communication it calls exposed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moecompile.bench_cases import FORWARD
from moecompile.bench_overlap_exposed import Exposed, exposed, joined
from moecompile.bench_overlap_layers import APART, HALVES, INDUCTOR, WHOLE
from moecompile.bench_proof import WrongResultError, compare
from moecompile.commands import main


def test_two_ranks_measure_all_contenders(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    given = ["--device", "cpu", "--rounds", "1", "--only", FORWARD, "--json", str(path)]
    assert main(["bench", "overlap", *given]) == 0, capfd.readouterr()
    found = json.loads(path.read_text())
    assert found["failures"] == []
    rows = {row["contender"]: row for row in found["rows"] if row["kind"] == "speed" and row["section"] == "layers"}
    assert [*rows] == [INDUCTOR, WHOLE, APART, HALVES] and all(row["times"] for row in rows.values())
    assert set(rows[HALVES]["ratios"]) == {INDUCTOR, WHOLE, APART} and set(rows[WHOLE]["ratios"]) == {INDUCTOR}
    assert "it stays whole: halves would gain too little" in rows[HALVES]["note"]
    assert all("from the first one's" in rows[name]["note"] for name in (WHOLE, APART, HALVES))


def test_sizes_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "overlap", "--device", "cpu", "--shapes", "huge"]) == 2
    assert "there is no huge; there are tiny" in capsys.readouterr().err


def test_what_is_exposed() -> None:
    """Microseconds in, milliseconds of a call out."""
    sending, others = [(0.0, 1000.0), (500.0, 2000.0), (5000.0, 6000.0)], [(1500.0, 5500.0), (1600.0, 1700.0)]
    assert joined(sending) == [(0.0, 2000.0), (5000.0, 6000.0)]
    assert exposed(sending, others) == Exposed(3.0, 2.0)
    assert exposed(sending, others, calls=2) == Exposed(1.5, 1.0)
    assert exposed([], others) == Exposed(0.0, 0.0)


def test_wrong_results() -> None:
    right = {"result": torch.ones(4)}
    assert compare({"result": torch.ones(4)}, right, 0.02) == 0
    for wrong in (torch.ones(4) * 1.1, torch.full((4,), torch.nan)):
        with pytest.raises(WrongResultError, match="result is"):
            compare({"result": wrong}, right, 0.02)
