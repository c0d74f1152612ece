"""The demo, run without Inductor: what it shows, what it checks, and that it fails when something is wrong."""

from __future__ import annotations

import re

import pytest

from moecompile import demo, doctor
from moecompile.commands import main

TEXT = """\
%0 = input experts.weight  : f32[4, 8]
%1 = input x  : f32[2, 8]
%2 = relu(%1)  : f32[2, 8]  # norm  a.py:1
%3 = linear(%2, %0)  : f32[2, 4]  # layers.1.experts  a.py:2
%4 = silu(%3)  : f32[2, 4]  # layers.1.experts.act  a.py:3
%5 = silu(%3)  : f32[2, 4]  # layers.1.experts_too  a.py:4
%6 = moecompile.plan(%4)  : i32[4]  # layers.10.experts  a.py:5
return %5"""


def test_the_demo(capsys) -> None:
    pytest.importorskip("transformers")
    assert main(["demo", "--lowering", "eager"]) == 0
    printed = capsys.readouterr().out
    qwen, deepseek = printed.partition("\nDeepSeek-V3")[::2]
    assert "2 MoE blocks rewritten, no near misses, no graph breaks" in qwen
    assert "1 MoE block rewritten, no near misses, no graph breaks" in deepseek
    for shown in (qwen, deepseek):
        _, before, after, backward, check, training = re.split(
            r"\S+ before: .*|\S+ after: .*|\S+ in the backward.*|Against eager.*|Training on.*", shown
        )
        assert "grouped_mm" in before and "moecompile" not in before
        assert after.count("= moecompile.experts(") == 1 and "grouped_mm" not in after
        assert backward.count("= moecompile.experts_backward(") == 1
        assert len(re.findall(r"(?m)^(logits|loss|\d\d gradients).* ok$", check)) == 3
        losses = [float(loss) for loss in re.findall(r"(?m)^ +\d +(\d\.\d+).* ok$", training)]
        assert len(losses) == demo.STEPS and losses == sorted(losses, reverse=True)
    assert "Every check passed" in printed and "FAILED" not in printed


def test_a_number_beyond_its_bound_fails(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(demo, "GRADIENT_BOUND", 0.0)
    assert demo.main(["--lowering", "eager", "--models", "mixtral", "--graphs"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"FAILED: Mixtral: 21 gradients; worst: \S+: error \S+ is above 0e\+00\n", printed)
    assert "Not every check passed" in printed
    # --graphs: from the first operation to the last
    assert printed.count("= embedding(") == 2 and printed.count("= cross_entropy(") == 2
    assert printed.count("= moecompile.experts_backward(") == 2


@pytest.mark.slow
def test_the_demo_with_inductor_and_every_architecture(capsys) -> None:
    pytest.importorskip("transformers")
    assert demo.main(["--models", "all"]) == 0
    assert capsys.readouterr().out.count("2 MoE blocks rewritten") == len(demo.ARCHITECTURES) - 1


@pytest.mark.parametrize(("item", "hint"), [("transformers", False), ("C++ compiler", True)])
def test_what_is_missing_is_named_with_its_cure(item: str, hint: bool, capsys, monkeypatch) -> None:
    def lacking(name: str) -> doctor.Finding:
        return doctor.Finding(name, "missing", "not installed", "pip install it")

    monkeypatch.setitem(doctor.CHECKS, item, lacking)
    assert demo.main([]) == 2
    complaint = capsys.readouterr().err
    assert f"The demo needs {item}: not installed. Cure: pip install it." in complaint
    assert ("--lowering eager" in complaint) == hint


def test_an_unknown_architecture_shows_the_known_ones(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--models", "qwen3"])
    assert stopped.value.code == 2
    assert "'qwen3_moe', 'deepseek_v3', 'gpt_oss', 'mixtral', 'all'" in capsys.readouterr().err


def test_one_module_of_a_graph() -> None:
    assert demo.block_of(TEXT, "layers.1.experts") == [
        "%0 = input experts.weight  : f32[4, 8]",
        "%2 = relu(%1)  : f32[2, 8]  # norm  a.py:1",
        "%3 = linear(%2, %0)  : f32[2, 4]  # a.py:2",
        "%4 = silu(%3)  : f32[2, 4]  # layers.1.experts.act  a.py:3",
    ]
    assert demo.block_of(TEXT, "") == TEXT.splitlines()


def test_long_lines_are_continued_below_their_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    line = f'%3 = moecompile.experts({", ".join(f"x=%{n}" for n in range(9))}, activation="mul(a, b)")  : f32[2, 4]'
    first, second = demo.wrapped(line).splitlines()
    assert first.endswith("x=%8,") and second == '       activation="mul(a, b)")  : f32[2, 4]'
