"""README.md and docs/ are true: their tables are the code's, their examples run, their links and tests exist."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from compile_modes import table as compile_modes
from moecompile.bench_cases import BLOCKS, MEMORY_TARGETS, PRODUCTS, SPEED_TARGETS, STEP
from moecompile.bench_ep_cases import BLOCKS as RANKED_BLOCKS
from moecompile.bench_ep_cases import EXCHANGE, LIMITS
from moecompile.bench_results import Target
from moecompile.options import Options
from moecompile.passes.forms import FORMS
from zoo_forms import CASES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]


def section(path: Path, name: str) -> str:
    """What stands between the marks of a section."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found is not None, f"{path.name} has no section {name}"
    return found[1]


def forms_table() -> str:
    """README's: name and title."""
    rows = "".join(f"| `{form.name}` | {form.title} |\n" for form in FORMS)
    return f"| form | what it is |\n|---|---|\n{rows}"


def forms_in_full() -> str:
    """docs/forms.md's: the example, a statement a line, and the spellings in tests."""
    sections = []
    for form in FORMS:
        head, colon, body = form.example.partition(": ") if form.example.startswith("for ") else ("", "", form.example)
        lines = body.split("; ")
        example = "\n".join([f"{head}:", *(f"    {line}" for line in lines)] if colon else lines)
        spellings = "\n".join(
            f"- `{case.name}`: {case.spelling}{' (*fullgraph*)' if case.fullgraph else ''}"
            for case in CASES
            if case.form == form.name and not case.name.endswith("_control")
        )
        sections.append(f"## `{form.name}`: {form.title}\n\n```python\n{example}\n```\n\n{spellings}\n")
    return "\n" + "\n".join(sections) + "\n"


def bench_targets() -> str:
    """docs/bench.md's: sizes, and what each contender is to reach in which of them."""
    sizes = [f"- `{shape.title.replace(' ', '`: ', 1)}" for shape in BLOCKS]
    for product in PRODUCTS:
        groups = ", ".join(map(str, product.counts)) if len({*product.counts}) > 1 else f"{product.counts[0]} each"
        words = "outer products of the rows" if product.outer else "rows times matrices"
        sizes.append(
            f"- `{product.name}`: {words}, {len(product.counts)} groups of {groups}, N{product.n} K{product.k}"
        )
    whats: dict[tuple[str, str, Target], list[str]] = {}
    for (case, what, who), target in SPEED_TARGETS.items():
        whats.setdefault((case, who, target), []).append(what)
    for (case, who), target in MEMORY_TARGETS.items():
        whats[case, who, target] = [f"{STEP}, memory beyond gradients"]
    lines = "".join(
        f"| {case} | {'; '.join(found)} | {who} | {target.ratio:g} times {target.against} |\n"
        for (case, who, target), found in whats.items()
    )
    return "\n".join(sizes) + f"\n\n| sizes | what | who | at least |\n|---|---|---|---|\n{lines}"


def ep_targets() -> str:
    """docs/bench.md's, of experts over ranks: sizes, and the bars."""
    alone = EXCHANGE
    sizes = [f"- `{alone.name}`: H{alone.hidden} E{alone.experts} top-{alone.top_k} T{alone.tokens} a rank"]
    sizes += [f"- `{shape.title.replace(' ', '`: ', 1)} a rank" for shape in RANKED_BLOCKS]
    rows = ""
    for (case, what, who), limits in LIMITS.items():
        bars = "; ".join(f"{limit.of} {limit.words}" for limit in limits)
        today = "; ".join(limit.today for limit in limits if limit.today)
        rows += f"| {case} | {what} | {who} | {bars} | {today} |\n"
    return "\n".join(sizes) + f"\n\n| sizes | what | who | target | today |\n|---|---|---|---|---|\n{rows}"


@pytest.mark.parametrize(
    ("path", "name", "produce"),
    [
        (README, "forms", forms_table),
        (ROOT / "docs" / "forms.md", "forms", forms_in_full),
        (ROOT / "docs" / "bench.md", "targets", bench_targets),
        (ROOT / "docs" / "bench.md", "ep targets", ep_targets),
        (ROOT / "docs" / "expert_parallel.md", "compile modes", compile_modes),
    ],
    ids=["README", "forms", "bench", "bench ep", "compile modes"],
)
def test_the_tables_are_those_of_the_code(
    path: Path, name: str, produce: Callable[[], str], request: pytest.FixtureRequest
) -> None:
    before, produced = section(path, name), produce()
    if request.config.getoption("--accept"):
        text = path.read_text(encoding="utf-8")
        marked = f"<!-- {name} -->\n{{}}<!-- /{name} -->"
        path.write_text(text.replace(marked.format(before), marked.format(produced)), encoding="utf-8")
    else:
        assert before == produced, f"run `pytest --accept tests/{Path(__file__).name}`"


def test_every_option_is_named() -> None:
    paragraph = README.read_text(encoding="utf-8").partition("## Options and environment")[2].partition("\n\n")[2]
    assert all(f"`{name}`" in paragraph.partition(";")[0] for name in Options().as_dict())


def test_every_limit_names_tests_that_exist() -> None:
    there = {
        name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    rows = section(README, "limits").splitlines()[2:]
    for row in rows:
        *_, proof = row.strip("| ").split(" | ")
        named = re.findall(r"`(test_\w+)`", proof)
        assert named and there.issuperset(named), f"{row}\nnot there: {set(named) - there}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_readme_links_every_document() -> None:
    assert all(f"](docs/{path.name})" in README.read_text(encoding="utf-8") for path in DOCUMENTS[1:])


def blocks(text: str) -> list[tuple[str, str]]:
    """Fenced blocks: language and content."""
    return re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)


def printed_by(source: str, tmp_path: Path) -> str:
    """What an example prints, compiled without Inductor and run as a file, so that reports can name its lines."""
    path = tmp_path / "readme.py"
    path.write_text(source.replace('backend="moecompile"', 'backend="moecompile", options={"lowering": "eager"}'))
    shown = io.StringIO()
    with redirect_stdout(shown):
        exec(compile(path.read_text(), str(path), "exec"), {"__name__": "__main__"})
    return shown.getvalue()


def without_versions(report: str) -> str:
    """Without torch's version, and the lines of transformers' files."""
    return re.sub(r"(?m)^torch \S+,|(?<=\.py):\d+", "", report)


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the reports in README.md."""
    monkeypatch.setenv("COLUMNS", "100")


def test_the_first_example_prints_what_it_says(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    first, shown = blocks(README.read_text(encoding="utf-8").partition("## In thirty seconds")[2])[:2]
    assert first[0] == "python"
    assert without_versions(printed_by(first[1], tmp_path)).startswith(without_versions(shown[1]))


def test_the_near_miss_is_the_one_shown(tmp_path: Path) -> None:
    example, shown = blocks(section(README, "near miss"))
    assert shown[1] in printed_by(example[1], tmp_path)
