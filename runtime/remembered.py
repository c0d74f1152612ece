"""Calls like one before: what shapes, strides, dtypes, devices and attributes decide is decided once.

    key = signature(tensors, attributes)
    known = memory.get(key)
    if known is None:
        ...                                                # checks, chooses kernels, makes tensors, launches
        memory.put(key, Remembered(tensors, conforming, conformed, views, made, launches))
    else:
        made = known.run(tensors)                          # makes the same tensors, launches the same kernels

All that may differ between two calls of one signature is what the tensors hold and where they lie, and only up to
multiples of 16 bytes. So a remembered call makes its tensors, puts addresses into arguments that are settled but for
them, and launches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from moecompile.runtime.launch import Boxes, Launch, Mapped, described

ENTRIES = 1024
"""Signatures that a memory holds: shapes of a decode loop are few, those of prompts come and go."""

LINE = 512
"""Bytes whose multiples tensors begin at, as the caching allocator has it."""

Signature = tuple[Hashable, ...]
Entry = TypeVar("Entry")


def signature(tensors: Iterable[Tensor | None], *others: Hashable) -> Signature:
    """What decides how a call with these tensors and other arguments is checked and run."""
    return (
        *others,
        *[
            None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15)
            for t in tensors
        ],
    )  # fmt: skip


class Memory(Generic[Entry]):
    """Entries by signature, at most ENTRIES: the oldest gives way. Any thread may read and write."""

    def __init__(self) -> None:
        self._entries: dict[Signature, Entry] = {}
        self._writing = threading.Lock()
        self.get = self._entries.get

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: Signature, entry: Entry) -> None:
        """Remembers the entry."""
        with self._writing:
            while len(self._entries) >= ENTRIES:
                del self._entries[next(iter(self._entries))]
            self._entries[key] = entry

    def clear(self) -> None:
        """Forgets everything."""
        with self._writing:
            self._entries.clear()


class Remembered:
    """The launches of one call, for others of its signature.

    Args:
        tensors: of the call; the first is not None.
        conforming: for some positions among them, what makes a tensor as the kernels read it. It returns what it is
            given where that will do, which the signature must decide.
        conformed: the call's tensors, those of `conforming` made so.
        views: other tensors that the launches read, and of which of `conformed` each is a view.
        scratch: tensors that the launches write and read, and nobody afterwards; contiguous.
        made: tensors that the launches write, the call's results; contiguous.
        launches: of the call. Each tensor in their arguments is one of `conformed`, `views`, `scratch` and `made`, that
            very object: two tensors that happened to share memory need not do so in the next call.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        conforming: Mapping[int, Callable[[Tensor], Tensor]],
        conformed: Sequence[Tensor | None],
        views: Sequence[tuple[Tensor, int]],
        scratch: Sequence[Tensor],
        made: Sequence[Tensor],
        launches: Sequence[Launch],
    ) -> None:
        changed = {i for i, (one, other) in enumerate(zip(tensors, conformed, strict=True)) if one is not other}
        self.conforming = [(i, conform) for i, conform in conforming.items() if i in changed]
        (self.device,) = {launch.kernel.device for launch in launches}
        everything = [*conformed, None, *made]
        places = {id(each): (i, 0) for i, each in enumerate(everything) if each is not None}
        for view, i in views:
            base = everything[i]
            assert base is not None
            places.setdefault(id(view), (i, view.data_ptr() - base.data_ptr()))
        self.room = 0
        for each in scratch:
            places[id(each)] = (len(conformed), self.room)
            self.room += -(-each.nbytes // LINE) * LINE
        self.launches = [_settled(launch, places) for launch in launches]
        # a tensor without elements is the fastest to say what device and dtype another has
        self.bytes = made[0].new_empty(0, dtype=torch.uint8)
        self.made = [(each.new_empty(0), tuple(each.shape)) for each in made]

    def run(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Launches the same on these tensors; returns those that were made."""
        if self.conforming:
            given = list(tensors)
            for i, conform in self.conforming:
                tensor = given[i]
                assert tensor is not None
                given[i] = conform(tensor)
            tensors = given
        scratch = self.bytes.new_empty(self.room) if self.room else None
        made = [like.new_empty(*shape) for like, shape in self.made]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*tensors, scratch, *made)]
        if torch._C._cuda_getDevice() == self.device:
            self._launch(addresses)
        else:
            with torch.cuda.device(self.device):
                self._launch(addresses)
        return made

    def _launch(self, addresses: list[int]) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        for launch_on, blocks, pack, constants, holes in self.launches:
            values = constants.copy()
            for i, place, offset, boxes in holes:
                address = addresses[place] + offset
                values[i] = address if boxes is None else described(boxes, address)
            launch_on(stream, blocks, pack(*values))


@dataclass(frozen=True)
class Steps:
    """A call that makes a result, ready to be launched; `Remembered` says what all but `saved` is.

    Attributes:
        conforming: what makes tensors, by their position in the call, as the kernels read them.
        conformed: the call's tensors, made so; None for those that it may have and has not.
        views: of which of these each other tensor that the launches read is a view.
        scratch: what the launches write and read.
        result: what they write last.
        saved: what they write for a backward; not to be remembered.
        launches: in their order.
    """

    conforming: Mapping[int, Callable[[Tensor], Tensor]]
    conformed: Sequence[Tensor | None]
    views: Sequence[tuple[Tensor, int]]
    scratch: Sequence[Tensor]
    result: Tensor
    saved: Sequence[Tensor]
    launches: Sequence[Launch]

    def run(self) -> Tensor:
        """Launches them; returns the result."""
        for launch in self.launches:
            launch.run()
        return self.result

    def remembered(self, tensors: Sequence[Tensor | None]) -> Remembered:
        """These for other calls like that of `tensors`, which may leave out the last of them."""
        conformed = self.conformed[: len(tensors)]
        made = (self.result,)
        return Remembered(tensors, self.conforming, conformed, self.views, self.scratch, made, self.launches)


def conform(tensors: Sequence[Tensor | None], conforming: Mapping[int, Callable[[Tensor], Tensor]]) -> list[Any]:
    """The tensors as kernels read them."""
    return [conforming[i](each) if i in conforming and each is not None else each for i, each in enumerate(tensors)]


def tells_apart(tensors: Sequence[Tensor | None], attributes: Mapping[str, Any]) -> bool:
    """Whether each tensor is an object of its own and given by position, so that a call can be remembered."""
    given = [id(tensor) for tensor in tensors if tensor is not None]
    return len(set(given)) == len(given) and not any(isinstance(value, Tensor) for value in attributes.values())


Hole = tuple[int, int, int, Boxes | None]
"""An argument's position; whose address it is, plus how many bytes; what is told of the tensor there, if not that."""
Settled = tuple[Callable[[int, int, bytes], None], int, Callable[..., bytes], list[Any], list[Hole]]
"""How to launch, how many blocks, how to pack the arguments, those that stay, and those to be filled in."""


def _settled(launch: Launch, places: Mapping[int, tuple[int, int]]) -> Settled:
    """The launch but for the addresses of tensors, by id in `places`: whose address each has, plus how many bytes."""
    constants: list[Any] = []
    holes: list[Hole] = []
    for i, value in enumerate(launch.values):
        if isinstance(value, Mapped):
            place, offset = places[id(value.tensor)]
            holes.append((i, place, offset + value.offset, value.boxes))
        elif isinstance(value, Tensor):
            holes.append((i, *places[id(value)], None))
        elif isinstance(value, bytes) and any(value[:128]):
            raise ValueError(f"argument {i} of {launch.kernel.instance} holds an address already: give it as Mapped")
        constants.append(0 if value is None or isinstance(value, (Mapped, Tensor)) else value)
    layout = launch.kernel.layout
    assert layout is not None, "the call that is remembered has been launched"
    return launch.kernel.launch_on, launch.blocks, layout.pack, constants, holes
