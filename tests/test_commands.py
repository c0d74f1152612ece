"""The command line: what each verb runs, what it prints, and what it says to a wrong command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import moecompile
from moecompile.commands import EXPLAIN_HELP, main

ROOT = Path(__file__).parent.parent

MODELS = """
import torch

class Doubled(torch.nn.Module):
    def forward(self, x, *, scale=1.0):
        return 2 * x * scale

def pair():
    return Doubled(), (torch.ones(3),)

def triple():
    return Doubled(), [torch.ones(3)], {"scale": 3.0}

def no_pair():
    return Doubled()

def no_model():
    return 3, ()

def bare_argument():
    return Doubled(), torch.ones(3)

def keywords_in_a_list():
    return Doubled(), (), ["scale"]

class Holder:
    make = staticmethod(pair)

number = 3
"""


class Report:
    """Stands for the report where only the command line is at stake."""

    def __init__(self, model, args, kwargs):
        self.result = model(*args, **kwargs).tolist()

    def __str__(self):
        return f"result {self.result}"

    def html(self, path):
        Path(path).write_text(f"<p>{self.result}</p>")

    def json(self):
        return f'{{"result": {self.result}}}'


@pytest.fixture
def models(monkeypatch, tmp_path):
    """A module `some_models` that can be imported, and a stand-in for `moecompile.explain`."""
    (tmp_path / "some_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def explain(model, *args, moecompile_options, **kwargs):
        return Report(model, args, kwargs)

    monkeypatch.setattr(moecompile, "explain", explain, raising=False)
    yield tmp_path
    # Only what was imported from here is forgotten: with a copy in the place of `sys.modules`, imports of others would
    # register in one and be looked up in the other.
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def test_explain_a_module(models, capsys):
    assert main(["explain", "some_models:pair"]) == 0
    assert capsys.readouterr().out == "result [2.0, 2.0, 2.0]\n"


def test_explain_takes_keyword_arguments_files_and_attributes(models, capsys):
    assert main(["explain", f"{models}/some_models.py:triple"]) == 0
    assert main(["explain", "some_models:Holder.make"]) == 0
    assert capsys.readouterr().out == "result [6.0, 6.0, 6.0]\nresult [2.0, 2.0, 2.0]\n"


def test_explain_writes_a_page_and_json(models, capsys):
    page = models / "report.html"
    assert main(["explain", "some_models:pair", "--html", str(page), "--json"]) == 0
    assert capsys.readouterr().out == '{"result": [2.0, 2.0, 2.0]}\n'
    assert page.read_text() == "<p>[2.0, 2.0, 2.0]</p>"


def test_explain_with_the_real_report(monkeypatch, tmp_path, capsys):
    (tmp_path / "toy_model.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Linear(3, 4), (torch.ones(2, 3),)\n"
    )
    page = tmp_path / "report.html"
    assert main(["explain", f"{tmp_path}/toy_model.py:make", "--html", str(page)]) == 0
    assert "no MoE blocks rewritten" in capsys.readouterr().out
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    assert main(["explain", f"{tmp_path}/toy_model.py:make", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["graphs"]) == 1
    assert main(["explain", f"{tmp_path}/toy_model.py:make", "--fp8"]) == 0
    assert "FP8: 0 cast, 1 kept" in capsys.readouterr().out


def test_explain_takes_options(models, capsys, monkeypatch):
    found = []

    def explain(*args, moecompile_options, **kwargs):
        found.append(moecompile_options)
        return "a report"

    monkeypatch.setattr(moecompile, "explain", explain)
    assert main(["explain", "some_models:pair", "--fp8", "--option", "fp8_exclude=('*.q', 'a')"]) == 0
    assert main(["explain", "some_models:pair", "--option", "kernels=reference", "--option", "recompute=True"]) == 0
    assert main(["explain", "some_models:pair"]) == 0
    assert found == [
        {"precision": "fp8", "fp8_exclude": ("*.q", "a")},
        {"kernels": "reference", "recompute": True},
        None,
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("fp8_exclude", "--option: expected NAME=VALUE, got 'fp8_exclude'."),
        ("kernel=reference", "kernels"),
        ("kernels=mine", "--option: "),
    ],
)
def test_explain_refuses_options_before_it_loads_a_model(capsys, option: str, message: str):
    assert main(["explain", "no_such_module:pair", "--option", option]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("some_models", "expected MODULE:CALLABLE, such as my_package.my_module:make_model, got 'some_models'"),
        (":pair", "expected MODULE:CALLABLE"),
        ("no_such_module:pair", "there is no module 'no_such_module'"),
        ("some_models.deeper:pair", "there is no module 'some_models.deeper'"),
        ("no_such_file.py:pair", "there is no file 'no_such_file.py'"),
        (
            "some_models:pear",
            "some_models has no 'pear'. It has: pair, triple, no_pair, no_model, bare_argument, keywords_",
        ),
        ("some_models:number", "some_models:number cannot be called: it is 3 of type int"),
        (
            "some_models:no_pair",
            "expected it to return (model, args) or (model, args, kwargs), got Doubled() of type Doubled",
        ),
        ("some_models:no_model", "got a model that cannot be called: 3 of type int"),
        ("some_models:bare_argument", "got args of type Tensor. Write (model, (inputs,)) for a single argument"),
        ("some_models:keywords_in_a_list", "got kwargs that are no dict with names as keys: ['scale'] of type list"),
    ],
)
def test_explain_says_what_is_wrong_with_its_target(models, capsys, target: str, message: str):
    assert main(["explain", target]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("python -m moecompile explain: ")
    assert message in printed.err


def test_a_module_that_lacks_an_import_of_its_own_keeps_its_traceback(models):
    (models / "half_installed.py").write_text("import something_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="something_that_is_not_there"):
        main(["explain", "half_installed:pair"])


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_demo_reads_its_own_arguments(monkeypatch, returned: int | None, status: int):
    seen: list[list[str]] = []
    demo = ModuleType("moecompile.demo")

    def demo_main(arguments: list[str]) -> int | None:
        seen.append(arguments)
        return returned

    demo.main = demo_main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moecompile.demo", demo)
    assert main(["demo", "--layers", "2", "--help"]) == status
    assert seen == [["--layers", "2", "--help"]]


@pytest.mark.parametrize("arguments", [[], ["explian", "a:b"], ["doctor", "--jsno"]])
def test_a_wrong_command_line_shows_the_usage(capsys, arguments: list[str]):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m moecompile" in capsys.readouterr().err


def test_python_dash_m():
    command = [sys.executable, "-m", "moecompile", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(verb in shown for verb in ("explain", "doctor", "demo", "bench", "cache"))


def test_a_page_that_cannot_be_written_is_one_line(models, capsys):
    page = models / "no_such_folder" / "report.html"
    assert main(["explain", "some_models:pair", "--html", str(page)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m moecompile explain: --html: {page} cannot be written: No such file")


def test_the_help_names_an_example_that_works(monkeypatch, capsys):
    (target,) = re.findall(r"FILE:CALLABLE \((\S+)\)", EXPLAIN_HELP)
    monkeypatch.chdir(ROOT)
    assert main(["explain", target]) == 0
    assert "2 MoE blocks rewritten" in capsys.readouterr().out


def test_a_function_that_takes_arguments_is_one_line(models, capsys):
    (models / "more_models.py").write_text("def needs(size):\n    return size\n")
    assert main(["explain", "more_models:needs"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "more_models:needs takes arguments (missing a required argument: 'size')" in line


def test_a_file_without_a_function_is_told_the_form_for_files(models, capsys):
    assert main(["explain", "some_models.py"]) == 2
    assert "expected FILE:CALLABLE, such as some_models.py:make_model, got 'some_models.py'" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_traceback():
    command = f"{sys.executable} -m moecompile doctor | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
