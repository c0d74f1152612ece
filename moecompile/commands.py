"""The command line, `python -m moecompile explain|doctor|demo|bench|simulate|cache`.

Each verb loads what it needs, no more.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

EXPLAIN_HELP = """\
Captures a model in one run of it and says what moecompile rewrites, what it does not, and why. Needs no GPU.

TARGET is MODULE:CALLABLE (my_package.my_module:make_model) or FILE:CALLABLE (examples/inspect_graph.py:make_model).
The callable takes nothing and returns (model, args) or (model, args, kwargs): the model, and the tuple of positional
and the dict of keyword arguments that it is called with.
"""

# Verbs that read their own arguments, --help included: the function `main` of the module of that name.
READ_THEIR_OWN = ("demo", "bench", "simulate")


class UsageError(Exception):
    """A command cannot use what it was given; the message says what was expected, what came and what to do."""


def main(arguments: Sequence[str]) -> int:
    """Runs one verb.

    Args:
        arguments: the command line after `python -m moecompile`.

    Returns:
        the exit status: 0 when it worked, 1 when `doctor` found the machine wanting, 2 for a wrong command line.
    """
    try:
        if arguments and arguments[0] in READ_THEIR_OWN:
            status = int(importlib.import_module(f"moecompile.{arguments[0]}").main(list(arguments[1:])) or 0)
        else:
            chosen = _parser().parse_args(arguments)
            status = int(chosen.run(chosen))
        sys.stdout.flush()
        return status
    except UsageError as error:
        print(f"python -m moecompile {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moecompile", description="The moecompile backend of torch.compile."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="explain|doctor|demo|bench|simulate|cache")
    explain = verbs.add_parser(
        "explain",
        help="what moecompile does with a model",
        description=EXPLAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("target", metavar="TARGET", help="MODULE:CALLABLE or FILE:CALLABLE")
    explain.add_argument(
        "--html", metavar="PATH", type=Path, help="also write the report to PATH as one self-contained page"
    )
    explain.add_argument("--fp8", action="store_true", help='also the table of what precision="fp8" would cast')
    explain.add_argument(
        "--option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an option of the backend, such as fp8_exclude=\"('*.q_proj',)\"; may be given several times",
    )
    explain.add_argument("--json", action="store_true", help="print the report as JSON")
    explain.set_defaults(run=_explain)
    doctor = verbs.add_parser("doctor", help="what this machine can run, what is missing, and how to get it")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor)
    verbs.add_parser("demo", help="compiles real architectures, checks them against eager, trains a few steps")
    verbs.add_parser("bench", help="measures the kernels, and what a user would otherwise have, on a Hopper GPU")
    verbs.add_parser("simulate", help="pipeline schedules in time; layers with experts on a cluster")
    cache = verbs.add_parser("cache", help="the compiled kernels on disk: how many, where, and how to be rid of them")
    cache.add_argument("--clear", action="store_true", help="delete them; they are compiled again when they are needed")
    cache.set_defaults(run=_cache)
    return parser


def _cache(chosen: argparse.Namespace) -> int:
    from moecompile.codegen import cubins

    count, held = cubins.usage()
    print(f"{cubins.folder()}: {count} kernels, {held / 2**20:.1f} MiB of at most {cubins.LIMIT / 2**20:.0f} MiB")
    if chosen.clear:
        print(f"deleted {cubins.clear()} kernels")
    return 0


def _explain(chosen: argparse.Namespace) -> int:
    options = _options(["precision=fp8"] * chosen.fp8 + chosen.option)
    model, args, kwargs = _model_and_inputs(chosen.target)
    import moecompile

    report = moecompile.explain(model, *args, moecompile_options=options or None, **kwargs)
    if chosen.html is not None:
        try:
            report.html(chosen.html)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise UsageError(f"--html: {chosen.html} cannot be written: {reason}. Name another file.") from error
    print(report.json() if chosen.json else report)
    return 0


def _options(given: Sequence[str]) -> dict[str, Any]:
    """Options of the backend from NAME=VALUE, the value as Python writes it or a word; raises UsageError."""
    import moecompile

    options: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise UsageError(f"--option: expected NAME=VALUE, got {each!r}.")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError):
            options[name] = value
    try:
        moecompile.Options.parse(None, options)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--option: {error}") from error
    return options


def _doctor(chosen: argparse.Namespace) -> int:
    from moecompile import doctor

    findings = doctor.examine()
    works = doctor.works_on_cpu(findings)
    if chosen.json:
        print(json.dumps({"works_on_cpu": works, "findings": [finding.as_dict() for finding in findings]}, indent=2))
    else:
        print(doctor.table(findings))
    return 0 if works else 1


def _model_and_inputs(target: str) -> tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any]]:
    make = _callable(target)
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise UsageError(f"{target} takes arguments ({error}). Name a function that takes none.") from error
    except ValueError:  # a builtin that does not say what it takes
        pass
    made: Any = make()
    shape = f"{target}: expected it to return (model, args) or (model, args, kwargs), got "
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise UsageError(
            f"{shape}{_described(made)}. Return the model together with the tuple of arguments for one call."
        )
    model, args, kwargs = made if len(made) == 3 else (*made, {})
    if not callable(model):
        raise UsageError(f"{shape}a model that cannot be called: {_described(model)}.")
    if not isinstance(args, tuple | list):
        raise UsageError(f"{shape}args of type {type(args).__name__}. Write (model, (inputs,)) for a single argument.")
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise UsageError(f"{shape}kwargs that are no dict with names as keys: {_described(kwargs)}.")
    return model, args, kwargs


def _callable(target: str) -> Callable[[], Any]:
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        shape = "FILE:CALLABLE" if target.endswith(".py") else "MODULE:CALLABLE"
        example = f"{target}:make_model" if target.endswith(".py") else "my_package.my_module:make_model"
        raise UsageError(f"expected {shape}, such as {example}, got {target!r}.")
    module = _module(place)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise UsageError(f"{place} has no {name!r}. It has: {', '.join(_own_functions(module)) or 'no functions'}.")
        value = getattr(value, part)
    if not callable(value):
        raise UsageError(f"{target} cannot be called: it is {_described(value)}. Name a function that makes the model.")
    return value


def _module(place: str) -> ModuleType:
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise UsageError(f"there is no file {place!r}; paths are taken from {Path.cwd()}.")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None  # a file that ends in .py always has both
        module = importlib.util.module_from_spec(spec)
        # Registered as an import would, for dataclasses and pickling; its folder is on the path as for a script.
        sys.modules[path.stem] = module
        sys.path.insert(0, str(path.parent.resolve()))
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        # A module that is there but lacks one of its own imports is another matter, and keeps its traceback.
        if error.name is None or not (place == error.name or place.startswith(f"{error.name}.")):
            raise
        raise UsageError(
            f"there is no module {place!r}. Run from the folder that holds it, or name its file: path/to/file.py:name."
        ) from error


def _own_functions(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and inspect.isfunction(value) and value.__module__ == module.__name__
    ]


def _described(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} of type {type(value).__name__}"
