"""Calls like one before: what shapes, strides, dtypes, devices and attributes decide is decided once.

    made = CALLS.again("experts", tensors, attributes)
    if made is None:
        ...                                                # checks, chooses kernels
        made = CALLS.first("experts", tensors, attributes, lambda: [...])    # makes tensors, launches

All that may differ between two calls of one signature is what the tensors hold and where they lie, and only up to
multiples of 16 bytes. So the second such call is recorded: the tensors it makes, its launches, and what else it has
PyTorch compute. The next ones make such tensors, put addresses into arguments that are settled but for them, launch.
(Recording takes several times as long as the call alone, which would be lost on prompts of a length of their own.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moecompile.runtime.autocast import exact
from moecompile.runtime.once import warn_once
from moecompile.runtime.recording import Program, Recorder

ENTRIES = 1024
"""Signatures that a memory holds: shapes of a decode loop are few, those of prompts come and go."""

SEEN = 1
"""How many calls of a signature are made before one is recorded."""

Signature = tuple[Hashable, ...]


def signature(operator: str, tensors: Iterable[Tensor | None], attributes: Mapping[str, Any]) -> Signature:
    """What decides how an operator's call with these tensors and attributes is checked and run."""
    return (
        operator,
        *attributes.items(),
        *[
            None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15)
            for t in tensors
        ],
    )  # fmt: skip


class Memory:
    """Programs by signature, at most ENTRIES: the oldest gives way. Any thread may read and write."""

    def __init__(self) -> None:
        self._entries: dict[Signature, Program] = {}
        self._seen: dict[Signature, int] = {}
        self._writing = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def again(
        self, operator: str, tensors: Sequence[Tensor | None], attributes: Mapping[str, Any]
    ) -> list[Tensor] | None:
        """What a call like one before makes, which needs no checks; None if none was like it."""
        known = self._entries.get(signature(operator, tensors, attributes))
        if known is None:
            return None
        if not known.calls:
            return known.run(tensors)
        given = next(tensor for tensor in tensors if tensor is not None)
        with exact(given):
            return known.run(tensors)

    def first(
        self,
        operator: str,
        tensors: Sequence[Tensor | None],
        attributes: Mapping[str, Any],
        run: Callable[[], list[Tensor]],
    ) -> list[Tensor]:
        """What `run` makes, which reads no tensors but these; the second time it is remembered for calls like this.

        What it does may depend on what the signature says, and on nothing that a later call may find changed.
        """
        if not _tells_apart(tensors, attributes):
            return run()
        key = signature(operator, tensors, attributes)
        if not self._is_due(key):
            return run()
        with Recorder(tensors) as recorder:
            made = run()
        program = recorder.program(made)
        if program is None:
            warn_once(f"calls of moecompile::{operator} are slower to launch than they could be: {recorder.refused}")
        with self._writing:
            if program is None:
                self._seen[key] = -1  # never again
            else:
                self._seen.pop(key, None)
                _add(self._entries, key, program)
        return made

    def _is_due(self, key: Signature) -> bool:
        """Whether a call is to be recorded; counts it."""
        with self._writing:
            count = self._seen.get(key, 0)
            if 0 <= count < SEEN:
                _add(self._seen, key, count + 1)
            return count >= SEEN

    def clear(self) -> None:
        """Forgets everything."""
        with self._writing:
            self._entries.clear()
            self._seen.clear()


CALLS = Memory()
"""Of all operators."""


def _add(table: dict[Signature, Any], key: Signature, value: Any) -> None:
    """Puts it at the end of the table, whose first entries give way where there is no room."""
    table.pop(key, None)
    while len(table) >= ENTRIES:
        del table[next(iter(table))]
    table[key] = value


def _tells_apart(tensors: Sequence[Tensor | None], attributes: Mapping[str, Any]) -> bool:
    """Whether each tensor is an object of its own and given by position, so that a call can be remembered.

    One without elements may stand for several: nobody reads where it is.
    """
    given = [id(tensor) for tensor in tensors if tensor is not None and tensor.numel()]
    return len(set(given)) == len(given) and not any(isinstance(value, torch.Tensor) for value in attributes.values())
