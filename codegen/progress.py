"""A bar on a terminal, for what makes somebody wait."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from types import TracebackType
from typing import TextIO

WIDTH = 24  # of the bar


class Progress:
    """One line that is written over and over, while a number of things are made.

    Nothing is written where nobody watches: where standard error is no terminal, and in all but the first process of a
    machine that torchrun started. What happens to the terminal meanwhile is nobody's error.
    """

    def __init__(self, what: str, count: int) -> None:
        self._what, self._count, self._done = what, count, 0
        self._stream = _terminal()

    def __enter__(self) -> Progress:
        self._show()
        return self

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        self._show()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write("\n")  # what comes next, a traceback perhaps, has a line of its own

    def _show(self) -> None:
        bar = "#" * (WIDTH * self._done // self._count)
        line = f"moecompile: {self._what} [{bar:<{WIDTH}}] {self._done}/{self._count}"
        self._write(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}")

    def _write(self, text: str) -> None:
        if self._stream is not None:
            with contextlib.suppress(ValueError, OSError):
                self._stream.write(text)
                self._stream.flush()


def _terminal() -> TextIO | None:
    """Standard error, if somebody watches it."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    try:
        return sys.stderr if sys.stderr.isatty() else None
    except (AttributeError, ValueError, OSError):  # None, closed, or an object that only writes
        return None
