"""examples/inspect_graph.py does what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

import moecompile

EXAMPLE = Path(__file__).parent.parent / "examples" / "inspect_graph.py"


def test_inspect_graph(tmp_path, capsys):
    page = tmp_path / "report.html"
    runpy.run_path(str(EXAMPLE))["main"](["--html", str(page)])
    printed = capsys.readouterr().out
    assert "2 MoE blocks rewritten" in printed
    rewritten, _, backward = printed.partition("The rewritten graph")[2].partition("Its backward")
    assert rewritten.count("= moecompile.experts(") == rewritten.count("= moecompile.plan(") == 2
    assert "grouped_mm" not in rewritten
    assert backward.count("= moecompile.experts_backward(") == 2
    assert len(moecompile.last_report().sites) == 2
    error = float(printed.rpartition("relative error ")[2].split()[0])
    assert error < 1e-2  # bfloat16
    assert "moecompile.experts" in page.read_text()
