"""The file of losses that `python -m moecompile bench accuracy` writes after each run, and goes on from."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moecompile.bench_training import Setup

Losses = dict[str, dict[int, list[float]]]
"""By recipe, by seed, of each step."""


def check_paths(losses: Path | None, picture: Path | None) -> None:
    """Raises ValueError where a file could not be written in the end, or would be written over the other."""
    for name, path in (("--json", losses), ("--svg", picture)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"{name}: expected a file in a directory that there is, got {path}")
    if losses is not None and picture is not None and losses.absolute() == picture.absolute():
        raise ValueError(f"--json and --svg: expected two files, got {losses} for both")


def keep(path: Path, setup: Setup, losses: Losses) -> None:
    """Writes the losses, at once, beside those that another call has written since."""
    every = kept(path, setup)
    for recipe, runs in losses.items():
        every[recipe] = every.get(recipe, {}) | runs
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps({"setup": asdict(setup), "losses": every}), encoding="utf-8")
    new.replace(path)


def kept(path: Path | None, setup: Setup) -> Losses:
    """Those of an earlier call with the same set-up.

    Raises:
        ValueError: the file is of another set-up, or not of this command.
    """
    if path is None or not path.exists() or not path.stat().st_size:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        of, losses = dict(found["setup"]), dict(found["losses"])
        every = {str(name): {int(seed): _read(run) for seed, run in runs.items()} for name, runs in losses.items()}
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        words = "expected losses that this command wrote"
        raise ValueError(f"--json: {path}: {words}, got {error!r}; name another file") from error
    if other := [name for name, value in asdict(setup).items() if of.get(name) != value]:
        differ = ", ".join(f"{name} {of.get(name)} there, {getattr(setup, name)} here" for name in other)
        words = f"has runs of another set-up ({differ}): name another file, or give the same sizes"
        raise ValueError(f"--json: {path} {words}")
    for name, runs in every.items():
        if any(len(run) != setup.steps for run in runs.values()):
            words = f"expected {setup.steps} losses of each run of {name!r}; name another file"
            raise ValueError(f"--json: {path}: {words}")
    return every


def _read(run: Any) -> list[float]:
    if not isinstance(run, list):
        raise TypeError(f"{type(run).__name__} in the place of a run's losses")
    return [float(each) for each in run]
