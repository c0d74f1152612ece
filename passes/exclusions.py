"""What the user wants cast to FP8, or kept: patterns of module paths, and the first and last layers.

A pattern (`fnmatch`: `*`, `?`, `[...]`) that matches a module's path matches all that is inside the module. A layer is
a module of a list: `model.layers.0.mlp.gate` is in layer 0 of `model.layers`; the outermost number decides. Who is
named by both `exclude` and `include` is kept; who is in a layer to be kept and named by `include` is cast.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Wishes:
    """Those that hold for one graph; without arguments, none.

    Attributes:
        exclude: patterns of modules that are kept.
        include: patterns of modules that are cast whatever they are for, if they can be.
        edges: module lists, and the numbers of those of their layers that are kept.
    """

    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    edges: dict[str, frozenset[int]] = field(default_factory=dict)

    def excluded(self, module: str) -> str | None:
        """Why the module is kept, if the user wants it kept."""
        if _matches(module, self.exclude):
            return "fp8_exclude names it"
        layers, number = layer_of(module)
        if number in self.edges.get(layers, ()) and not self.included(module):
            return f"layer {number} is one of the first or last of {layers or 'the model'}"
        return None

    def included(self, module: str) -> bool:
        """Whether the user wants the module cast, whatever it is for."""
        return _matches(module, self.include)

    def unused(self, modules: Iterable[str]) -> list[str]:
        """The patterns that match none of these modules."""
        paths = {path for module in modules for path in _outer(module)}
        return [each for each in (*self.exclude, *self.include) if not any(fnmatchcase(path, each) for path in paths)]


NO_WISHES = Wishes()


def wishes(modules: Iterable[str], exclude: tuple[str, ...], include: tuple[str, ...], first: int, last: int) -> Wishes:
    """What the user wants of a graph that these modules compute: `first` and `last` are numbers of layers to keep."""
    numbers: dict[str, set[int]] = {}
    for module in modules:
        layers, number = layer_of(module)
        if number is not None:
            numbers.setdefault(layers, set()).add(number)
    edges = {}
    for layers, found in numbers.items():
        ordered = sorted(found)
        edges[layers] = frozenset((*ordered[:first], *ordered[len(ordered) - min(last, len(ordered)) :]))
    return Wishes(exclude, include, edges)


def layer_of(module: str) -> tuple[str, int | None]:
    """The module list that a module is in, and its number there; None if it is in none."""
    parts = module.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ("", None) if place is None else (".".join(parts[:place]), int(parts[place]))


def _matches(module: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for path in _outer(module) for pattern in patterns)


def _outer(module: str) -> list[str]:
    """The module's path and those of the modules it is in."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
