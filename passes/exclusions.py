"""What the user wants cast to FP8, or kept: patterns of module paths, and the first and last layers.

A pattern that matches a module's path matches all that is inside the module: `*`, `?` and `[...]` as in `fnmatch`, and
numbers as the report writes them, `layers.[0-11].mlp`, `layers.[0,5-7]`. A layer is a module of a list:
`model.layers.0.mlp.gate` is in layer 0 of `model.layers`; the outermost number decides. Who is named by both `exclude`
and `include` is kept; who is in a layer to be kept and named by `include` is cast.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_BEFORE, _BEHIND = fnmatch.translate("x").split("x")
"""What this Python writes around a pattern."""
_NUMBERS = re.compile(r"\[(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\]")


@dataclass(frozen=True)
class Exclusions:
    """What the user asked for, whatever the graph.

    Attributes:
        exclude: patterns of module paths that are kept.
        include: patterns of module paths that are cast whatever they are for, if they can be.
        first_layers: how many layers are kept from the first on.
        last_layers: how many are kept up to the last.
    """

    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    first_layers: int = 0
    last_layers: int = 0

    def within(self, modules: Iterable[str]) -> Wishes:
        """What holds for a captured graph that these modules compute."""
        edges: dict[tuple[str, int], str] = {}
        for layers, ordered in self.numbered(modules).items():
            last = ordered[len(ordered) - min(self.last_layers, len(ordered)) :]
            edges |= {(layers, number): f"fp8_keep_last_layers={self.last_layers}" for number in last}
            first = ordered[: self.first_layers]
            edges |= {(layers, number): f"fp8_keep_first_layers={self.first_layers}" for number in first}
        return Wishes(self.exclude, self.include, edges)

    @staticmethod
    def numbered(modules: Iterable[str]) -> dict[str, list[int]]:
        """The module lists that these modules are in, and the numbers there, in order."""
        found: dict[str, set[int]] = {}
        for module in modules:
            layers, number = layer_of(module)
            if number is not None:
                found.setdefault(layers, set()).add(number)
        return {layers: sorted(numbers) for layers, numbers in found.items()}

    def unused(self, modules: Iterable[str]) -> list[str]:
        """The patterns that match none of these modules."""
        paths = {path for module in modules for path in _outer(module)}
        return [each for each in (*self.exclude, *self.include) if not any(map(_pattern(each).fullmatch, paths))]


def near(pattern: str, modules: Iterable[str]) -> str | None:
    """What the user may have meant by a pattern that matches nothing: the end of a path, or names like its own."""
    paths = {path for module in modules for path in _outer(module)}
    if (module := pattern.removesuffix(".weight").removesuffix(".bias")) != pattern and any(
        map(_pattern(module).fullmatch, paths)
    ):
        return module
    names = sorted({name for path in paths for name in path.split(".")})
    alike = (difflib.get_close_matches(part, names, n=1) or [part] for part in pattern.split("."))
    spelt = ".".join(found[0] for found in alike)
    meant = (f"*.{pattern}", spelt, f"*.{spelt}")
    return next((each for each in meant if any(map(_pattern(each).fullmatch, paths))), None)


@dataclass(frozen=True)
class Wishes:
    """What the user wants of one captured graph; without arguments, nothing.

    Attributes:
        exclude: as of `Exclusions`.
        include: likewise.
        edges: module list and number of each layer that is kept for its number, and the option that says so.
    """

    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    edges: dict[tuple[str, int], str] = field(default_factory=dict)

    def excluded(self, module: str) -> str | None:
        """Why the module is kept, if the user wants it kept."""
        if _matches(module, self.exclude):
            return "fp8_exclude names it"
        layers, number = layer_of(module)
        option = None if number is None or self.included(module) else self.edges.get((layers, number))
        return option and f"it is in a layer of {layers or 'the model'} that {option} keeps"

    def included(self, module: str) -> bool:
        """Whether the user wants the module cast, whatever it is for."""
        return _matches(module, self.include)


NO_WISHES = Wishes()


def check_pattern(words: str) -> None:
    """Raises ValueError, which says why, for a pattern that can name nothing."""
    _pattern(words)


def layer_of(module: str) -> tuple[str, int | None]:
    """The module list that a module is in, and its number there; None if it is in none."""
    parts = module.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ("", None) if place is None else (".".join(parts[:place]), int(parts[place]))


def _matches(module: str, patterns: tuple[str, ...]) -> bool:
    return any(_pattern(each).fullmatch(path) for path in _outer(module) for each in patterns)


@functools.lru_cache(maxsize=1024)
def _pattern(words: str) -> re.Pattern[str]:
    """A pattern as a regular expression."""
    if not words:
        raise ValueError("an empty pattern names nothing, and '*' all modules")
    if words.count("[") != words.count("]"):
        raise ValueError(f"{words!r} has a bracket too many or too few")
    made, begin = "", 0
    for found in _NUMBERS.finditer(words):
        if not {"-", ","} & set(found[1]):  # [01] is a 0 or a 1, as ever
            continue
        made += _translated(words[begin : found.start()]) + f"(?:{'|'.join(map(str, _numbers(found[1])))})"
        begin = found.end()
    return re.compile(made + _translated(words[begin:]), re.DOTALL)


def _translated(words: str) -> str:
    return fnmatch.translate(words).removeprefix(_BEFORE).removesuffix(_BEHIND) if words else ""


def _numbers(ranges: str) -> list[int]:
    found: list[int] = []
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        if int(high or low) < int(low):
            raise ValueError(f"[{ranges}] names nothing: expected a range from low to high")
        found += range(int(low), int(high or low) + 1)
    return found


def _outer(module: str) -> list[str]:
    """The module's path and those of the modules it is in, the whole model, whose path is empty, included."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
