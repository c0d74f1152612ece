"""The report's HTML page, in a real browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from moecompile.report import Report
from report_samples import full_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
browser = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(browser is None, reason=f"needs one of {', '.join(BROWSERS)} in PATH")

# Runs in the page after the page's own script, in place of a reader.
PROBE = """
<script>
const answer = {};
const pane = () => document.querySelector("details.graph .pane");
const rows = () => [...pane().querySelectorAll("tr")];
const lines = () => rows().filter((row) => !row.matches(".gone") && row.querySelector("td"));
const kinds = () => lines().map((row) => row.className);
const tab = (view) => document.querySelector(`[data-view=${view}]`).click();
const type = (text) => {
  const input = document.querySelector(".bar input");
  input.value = text;
  input.dispatchEvent(new Event("input"));
};
answer.opened = kinds();
answer.paired = [...pane().querySelectorAll(".removed.added td")].map((cell) => cell.textContent);
pane().querySelectorAll("td:last-child .v")[0].dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
answer.hot = pane().querySelectorAll(".hot").length;
tab("after");
answer.after = lines().map((row) => row.textContent);
type("RELU");
answer.found = lines().length;
answer.sites = document.querySelectorAll(".wide tbody tr:not(.gone)").length;
type("layers.2.mlp");
answer.layer = document.querySelectorAll(".wide tbody tr:not(.gone)").length;
type("");
document.querySelectorAll("details.graph")[1].open = true;
const style = (name) => getComputedStyle(document.body)[name];
const light = style("backgroundColor");
document.querySelector(".bar button").click();
answer.toggled = light !== style("backgroundColor");
answer.errors = window.failures;
setTimeout(() => {
  answer.second = document.querySelectorAll("details.graph")[1].querySelectorAll(".pane tr").length;
  document.body.innerHTML = `<pre id="answer"></pre>`;
  document.getElementById("answer").textContent = JSON.stringify(answer);
}, 100);
</script>
"""
CATCH = "<script>window.failures = []; window.onerror = (message) => window.failures.push(String(message));</script>"


def run_browser(*arguments: str, profile: Path) -> str:
    assert browser is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", f"--user-data-dir={profile}"]
    done = subprocess.run([browser, *flags, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_page_needs_nothing_beside_itself(tmp_path):
    path = full_report().html(tmp_path / "report.html")
    page = path.read_text()
    assert path == tmp_path / "report.html"
    assert not re.search(r"https?://|\bsrc=|@import|url\(|<link|\bfetch\(", page)
    assert page.count("</script>") == 2  # the note that holds one does not end the data
    assert "&lt;used&gt;" in page


def test_page_of_an_empty_report(tmp_path):
    page = Report().html(tmp_path / "report.html").read_text()
    assert "<b>0</b><span>MoE blocks rewritten" in page
    assert "<h2>" not in page


def test_page_holds_every_fact(tmp_path):
    page = unescape(full_report().html(tmp_path / "report.html").read_text())
    for fact in (
        "model.layers.[0-2,4].mlp.experts", "4 blocks", "batched_mm", "gate and up interleaved", "moe.py:440",
        "resembles dense", "sum first", "inside MoE code", "use grouped_mm", "train.py:12", "recompilation 1",
        "verified: model.layers.0.mlp.experts", "cache miss", "3.2 ms",
    ):  # fmt: skip
        assert fact in page


@needs_browser
def test_page_works_in_a_browser(tmp_path):
    path = full_report().html(tmp_path / "report.html")
    page = path.read_text()
    path.write_text(page.replace("<head>", f"<head>{CATCH}").replace("</body>", f"{PROBE}</body>"))
    dom = run_browser("--dump-dom", path.as_uri(), profile=tmp_path / "profile")
    found = re.search(r'<pre id="answer">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    answer = json.loads(unescape(found[1]))
    assert answer["errors"] == []
    assert answer["opened"] == ["same", "same", "same", "removed added", "removed added", "rewired", "same", "same"]
    assert answer["paired"][0].startswith("%3 = sort(%2)")
    assert answer["paired"][1].startswith("%3 = moecompile.experts(")
    assert answer["paired"][3] == ""  # two lines went, one came
    assert answer["hot"] == 3  # %0 of the right side: made once, used twice; the left side stays dark
    assert len(answer["after"]) == 7
    assert answer["found"] == 2
    assert answer["sites"] == 0
    assert answer["layer"] == 1  # like blocks share a row, each is found by its own path
    assert answer["second"] == 8
    assert answer["toggled"]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_draws(tmp_path, scheme):
    path = full_report().html(tmp_path / "report.html")
    path.write_text(path.read_text().replace('<html lang="en">', f'<html lang="en" data-theme="{scheme}">'))
    picture = tmp_path / f"{scheme}.png"
    run_browser("--window-size=1300,1500", f"--screenshot={picture}", path.as_uri(), profile=tmp_path / "profile")
    assert picture.stat().st_size > 50_000  # an empty page has a few thousand bytes
