"""The golden fixture itself, in small suites of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SUITE = """
def test_graph(golden):
    golden("graphs/one", "first\\nsecond")

def test_every_golden_is_used(unused_goldens):
    assert not unused_goldens, f"delete {unused_goldens}"
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """A suite of one golden, with this suite's conftest, and what that imports."""
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(test_small=SUITE, sparing=(Path(__file__).parent / "sparing.py").read_text())
    return pytester


def write(suite: pytest.Pytester, name: str, text: str) -> Path:
    path = suite.path / "goldens" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_missing_golden_fails_and_says_how_to_accept(suite):
    result = suite.runpytest()
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines(["*no golden file goldens/graphs/one.txt*pytest --accept test_small.py::test_graph*"])


def test_accept_writes_and_the_next_run_passes(suite):
    suite.runpytest("--accept").assert_outcomes(passed=2)
    assert (suite.path / "goldens/graphs/one.txt").read_text() == "first\nsecond\n"
    suite.runpytest().assert_outcomes(passed=2)


def test_mismatch_shows_a_unified_diff(suite):
    write(suite, "graphs/one", "first\nthird\n")
    result = suite.runpytest()
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines(["*goldens/graphs/one.txt differs*", "-third", "+second"])


def test_unused_golden_fails_the_whole_run(suite):
    write(suite, "graphs/one", "first\nsecond\n")
    write(suite, "graphs/two", "no test reads this\n")
    result = suite.runpytest()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*delete *graphs/two*"])


def test_unused_goldens_are_not_judged_on_a_part_of_the_suite(suite):
    write(suite, "graphs/one", "first\nsecond\n")
    suite.makepyfile(test_other="def test_nothing(): pass")
    suite.runpytest("test_small.py").assert_outcomes(passed=1, skipped=1)
    suite.runpytest("-k", "every_golden").assert_outcomes(skipped=1, deselected=2)


def test_unused_goldens_are_not_judged_where_single_tests_were_asked_for(suite):
    write(suite, "graphs/one", "first\nsecond\n")
    suite.runpytest("test_small.py::test_every_golden_is_used").assert_outcomes(skipped=1)


def test_unused_goldens_are_found_where_several_processes_run_the_tests(suite):
    write(suite, "graphs/one", "first\nsecond\n")
    unused = write(suite, "graphs/two", "no test reads this\n")
    result = suite.runpytest_subprocess("-n", "2")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*delete them: [[]'graphs/two'[]]*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    unused.unlink()
    assert suite.runpytest_subprocess("-n", "2").ret == pytest.ExitCode.OK


def test_one_golden_has_one_text(suite):
    suite.makepyfile(test_small="def test_twice(golden):\n    golden('a', 'x')\n    golden('a', 'x')")
    write(suite, "a", "x\n")
    result = suite.runpytest()
    result.stdout.fnmatch_lines(["*'a' is compared twice*"])


def test_every_golden_is_used(unused_goldens):
    assert not unused_goldens, f"no test compares these any more, delete them: {unused_goldens}"
