"""FP8 copies of parameters, made once until the parameters change.

    four = COPIES.of((w_in,), gate_up="halves", transposed=False)

A parameter has changed if an optimizer of PyTorch's has begun a step since, if it lies elsewhere or otherwise, or if
PyTorch counts another version of it. The last is not enough by itself: fused optimizers do not raise it. Versions of
inference tensors nobody counts: no copies of those are kept. Neither does anybody count writes through `.data`, by
collectives, by NumPy, or by other libraries' kernels: they have to be told (`COPIES.forget`).
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from moecompile.runtime.fp8_contract import Four
from moecompile.runtime.quantize import POWER_OF_TWO

Key = tuple[Hashable, ...]


@dataclass
class _Entry:
    """Copies: what they were made of, and on a GPU when and by which stream."""

    stamp: Hashable
    storages: tuple[StorageWeakRef, ...]  # not of tensors: whatever has weak references cannot be swapped
    four: Four
    trained: bool  # whether there are those that the backward reads
    stream: int = 0
    made: torch.cuda.Event | None = None

    @property
    def orphaned(self) -> bool:
        """Whether some of the matrices are gone."""
        return any(storage.expired() for storage in self.storages)

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
        self._entries: dict[Key, _Entry] = {}
        self._steps = 0
        self._stepping = False
        self._lock = threading.RLock()
        self._hooks: list[object] = []

    def of(
        self, matrices: tuple[Tensor, ...], gate_up: str, transposed: bool, backward: bool = True,
        scale_format: str = POWER_OF_TWO,
    ) -> Four:  # fmt: skip
        """What `moecompile::quantize_weights` gives for these, from before if they have not changed.

        Of DTensors for what this rank has of them: writes to them are counted there, and not of that.

        Copies for inference alone (`backward` False) are half of them, until somebody trains these matrices: then all
        are made, whoever asks.

        While an optimizer makes a step, and while a CUDA graph is captured, so that each replay makes them anew, copies
        are made and not kept.
        """
        given, matrices = matrices, tuple(map(local_of, matrices))
        capturing = matrices[0].is_cuda and torch.cuda.is_current_stream_capturing()
        with self._lock:
            if capturing or self._stepping or any(matrix.is_inference() for matrix in matrices):
                return _made(matrices, gate_up, transposed, backward, scale_format)
            how = (gate_up, transposed, scale_format)
            key, stamp = (
                (how, *map(_place, matrices)),
                (self._steps, *map(_state, matrices), *(each._version for each in given)),
            )
            entry = self._entries.get(key)
            trained = backward or (entry is not None and entry.trained)
            if entry is None or entry.stamp != stamp or entry.orphaned or (backward and not entry.trained):
                entry = None
                self._entries.pop(key, None)  # the new copies may have the memory of the old ones
                self._forget_orphans()
                four = _made(matrices, gate_up, transposed, trained, scale_format)
                entry = self._entries[key] = _entry(matrices, stamp, four, trained)
            values, scales, *others = entry.handed_over()
            values_t, scales_t = others if backward else (each.new_empty(0) for each in others)
            return values, scales, values_t, scales_t

    def watch_optimizers(self) -> None:
        """From now on a step of any optimizer of PyTorch's makes all copies old."""
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        with self._lock:
            if not self._hooks:
                self._hooks = [
                    register_optimizer_step_pre_hook(lambda *_: self._stepped(stepping=True)),
                    register_optimizer_step_post_hook(lambda *_: self._stepped(stepping=False)),
                ]

    def forget(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Drops the copies of these parameters, or all."""
        with self._lock:
            if parameters is None:
                self._entries.clear()
                return
            gone = set(map(_place, map(local_of, parameters)))
            self._entries = {key: entry for key, entry in self._entries.items() if not gone & {*key[1:]}}

    def __len__(self) -> int:
        with self._lock:
            self._forget_orphans()
            return len(self._entries)

    def _forget_orphans(self) -> None:
        self._entries = {key: entry for key, entry in self._entries.items() if not entry.orphaned}

    def _stepped(self, stepping: bool) -> None:
        """A step begins or ends. One that fails has begun, and until the next one ends nothing is kept."""
        with self._lock:
            self._steps, self._stepping = self._steps + 1, stepping


COPIES = Copies()
"""Of all parameters that compiled graphs want copies of."""


def local_of(matrix: Tensor) -> Tensor:
    """What this rank has of a DTensor; of others themselves."""
    found: Tensor = getattr(matrix, "_local_tensor", matrix)
    return found


def _entry(matrices: tuple[Tensor, ...], stamp: Hashable, four: Four, trained: bool) -> _Entry:
    entry = _Entry(stamp, tuple(StorageWeakRef(matrix.untyped_storage()) for matrix in matrices), four, trained)
    if four[0].is_cuda:
        stream = torch.cuda.current_stream(four[0].device)
        entry.stream, entry.made = stream.cuda_stream, torch.cuda.Event()
        entry.made.record(stream)
    return entry


def _place(matrix: Tensor) -> Hashable:
    """Where it lies, as long as its storage lives."""
    return matrix.untyped_storage()._cdata, matrix.storage_offset()


def _made(matrices: tuple[Tensor, ...], gate_up: str, transposed: bool, backward: bool, scale_format: str) -> Four:
    attributes = {"gate_up": gate_up, "transposed": transposed, "backward": backward, "scale_format": scale_format}
    # inference mode first: to leave it turns gradients on. Whoever trains later could not save what is made in it
    with torch.inference_mode(False), torch.no_grad():
        four: Four = torch.ops.moecompile.quantize_weights(*matrices, **attributes)
    return four


def _state(matrix: Tensor) -> Hashable:
    """Which tensor it is, how it lies, and its version."""
    layout = matrix.data_ptr(), matrix.shape, matrix.stride(), matrix.dtype
    return id(matrix), *layout, matrix._version
