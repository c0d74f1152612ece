"""Values that options take, and the words for those that they do not."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name that is nearest, or nothing where none is near."""
    lowered = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    return f" Did you mean {lowered[near[0]]!r}?" if near else ""


def check(name: str, annotation: Any, value: Any) -> None:
    """Checks a value against its field's annotation: literals, None, plain types, tuples, and unions of these.

    Raises:
        ValueError: it is none of these.
    """
    if not _matches(annotation, value):
        choices = _spelled(annotation)
        hint = did_you_mean(value, _literals(annotation)) if isinstance(value, str) else ""
        raise ValueError(f"moecompile: option `{name}`: expected {choices}, got {value!r}.{hint}")


def _matches(annotation: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is Any:
        return True
    if origin is Literal:
        # `in` alone would take True for 1.
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return isinstance(value, tuple) and all(_matches(arguments[0], item) for item in value)
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_matches, arguments, value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if origin is not None:
        return any(_matches(choice, value) for choice in arguments)
    if annotation is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    return isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))


def _literals(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is Literal:
        return [choice for choice in typing.get_args(annotation) if isinstance(choice, str)]
    return [choice for part in typing.get_args(annotation) for choice in _literals(part)]


def _spelled(annotation: Any) -> str:
    if annotation is type(None):
        return "None"
    if typing.get_origin(annotation) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple and typing.get_args(annotation) == (str, ...):
        return "a tuple of strings"
    if typing.get_origin(annotation) is not None and typing.get_origin(annotation) is not tuple:
        return " or ".join(_spelled(part) for part in typing.get_args(annotation))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def names(option: str, value: Any) -> tuple[str, ...]:
    """An option's names, which may come in a list; raises ValueError for one that is no list."""
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        hint = f" Write ({value!r},)." if isinstance(value, str) else ""
        raise ValueError(f"moecompile: option `{option}`: expected a tuple of names, got {value!r}.{hint}")
    return tuple(value)


def pairs(option: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """An option's mapping as sorted pairs, of names with underscores; raises ValueError for what is no mapping."""
    items = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(items, tuple) or not all(isinstance(item, tuple) and len(item) == 2 for item in items):
        raise ValueError(
            f'moecompile: option `{option}`: expected a mapping such as {{"max_autotune": True}}, got {value!r}.'
        )
    return tuple(sorted(((str(name).replace("-", "_"), setting) for name, setting in items), key=lambda pair: pair[0]))
