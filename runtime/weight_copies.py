"""FP8 copies of parameters, made once until the parameters change.

    four = COPIES.of((w_in,), gate_up="halves", transposed=False)

A parameter has changed if an optimizer made a step since, if it lies elsewhere, or if PyTorch counts another version of
it. The last is not enough by itself: fused optimizers do not raise it. What nobody counts, writes through `.data` by
other code than an optimizer's, has to be told: `COPIES.forget(...)`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Four = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class _Entry:
    """Copies: what they were made of, when, and on a GPU by which stream."""

    others: tuple[weakref.ref[Tensor], ...]
    stamp: Hashable
    four: Four
    stream: int = 0
    made: torch.cuda.Event | None = None

    def handed_over(self) -> Four:
        """The copies, for the current stream to read."""
        if self.made is not None:
            stream = torch.cuda.current_stream(self.four[0].device)
            if stream.cuda_stream != self.stream:
                stream.wait_event(self.made)
                for copy in self.four:
                    copy.record_stream(stream)
        return self.four


class Copies:
    """The copies that there are. Any thread may ask."""

    def __init__(self) -> None:
        # gate projections, or the one matrix -> what else decides -> copies
        self._entries = WeakTensorKeyDictionary()
        self._steps = 0
        self._lock = threading.RLock()
        self._hook: object = None

    def of(self, matrices: tuple[Tensor, ...], gate_up: str, transposed: bool) -> Four:
        """What `moecompile::quantize_weights` gives for these, from before if they have not changed.

        While a CUDA graph is captured, the copies are made in it, so that each replay makes them anew.
        """
        if matrices[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return _made(matrices, gate_up, transposed)
        first, *others = matrices
        key, stamp = (gate_up, transposed, *map(id, others)), (self._steps, *map(_state, matrices))
        with self._lock:
            table: dict[Hashable, _Entry] = self._entries.setdefault(first, {})
            entry = table.get(key)
            if entry is None or entry.stamp != stamp or not _same(entry.others, others):
                entry = None
                table.pop(key, None)  # the new copies may have the memory of the old ones
                entry = table[key] = _entry(matrices, stamp, _made(matrices, gate_up, transposed))
            return entry.handed_over()

    def watch_optimizers(self) -> None:
        """From now on a step of any optimizer of PyTorch's makes all copies old."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        with self._lock:
            self._hook = self._hook or register_optimizer_step_post_hook(lambda *_: self._stepped())

    def forget(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Drops the copies of these parameters, or all."""
        with self._lock:
            if parameters is None:
                self._entries.clear()
                return
            gone = {id(parameter) for parameter in parameters}
            for first, table in list(self._entries.items()):
                for key, entry in list(table.items()):
                    if gone & {id(first), *(id(reference()) for reference in entry.others)}:
                        del table[key]

    def __len__(self) -> int:
        return sum(len(table) for table in self._entries.values())

    def _stepped(self) -> None:
        with self._lock:
            self._steps += 1


COPIES = Copies()
"""Of all parameters that compiled graphs want copies of."""


def _entry(matrices: tuple[Tensor, ...], stamp: Hashable, four: Four) -> _Entry:
    entry = _Entry(tuple(weakref.ref(each) for each in matrices[1:]), stamp, four)
    if matrices[0].is_cuda:
        stream = torch.cuda.current_stream(matrices[0].device)
        entry.stream, entry.made = stream.cuda_stream, torch.cuda.Event()
        entry.made.record(stream)
    return entry


def _same(references: Sequence[weakref.ref[Tensor]], tensors: Sequence[Tensor]) -> bool:
    return all(reference() is tensor for reference, tensor in zip(references, tensors, strict=True))


def _made(matrices: tuple[Tensor, ...], gate_up: str, transposed: bool) -> Four:
    with torch.no_grad():
        four: Four = torch.ops.moecompile.quantize_weights(*matrices, gate_up=gate_up, transposed=transposed)
    return four


def _state(matrix: Tensor) -> Hashable:
    """Where it lies, and its version, which tensors of inference mode do not have."""
    return matrix.data_ptr(), None if matrix.is_inference() else matrix._version
