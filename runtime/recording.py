"""What a call does, as a program for calls like it (`moecompile.runtime.remembered`).

    with Recorder(tensors) as recorder:
        made = ...                                         # tensors are made, kernels launched, operators called
    program = recorder.program(made)
    program.run(other_tensors)                             # the same with these

A tensor has a place: the call's tensors first, then those that are made, in their order. Views that only kernels are
told of are not made again, since where they begin in what they are a view of stays the same. A tensor is dropped when
nobody uses it any more, and a step whose results nobody uses is left out, unless it writes into something. Small
tensors that only kernels are told of are made together (`moecompile.runtime.workspace`).

What a call does must follow from the call's signature: what asks the host for values, or for how many there are, is
refused. Launches are noted by `Launch.run`, of the thread that records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from moecompile.runtime import launch
from moecompile.runtime.launch import Boxes, Launch, Mapped, described
from moecompile.runtime.workspace import Life, lay_out

Hole = tuple[int, int, int, Boxes | None]
"""An argument's position; in which place the tensor is whose address it is (or WORKSPACE), plus how many bytes; what is
told of the tensor there, if not the address."""
WORKSPACE = -1
"""Stands for the place of the memory that small tensors share."""
SHARED = 32 * 2**20
"""Bytes of that memory, at most. What is larger than this is better given back as soon as it may be."""
MAKING = {torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default}


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor among an operator's arguments."""

    number: int


@dataclass(frozen=True)
class _Made:
    """A tensor is made: contiguous, and with nothing in it."""

    place: int
    like: Tensor  # without elements: the fastest to say what device and dtype another has
    shape: tuple[int, ...]
    uses: tuple[int, ...] = ()

    @property
    def makes(self) -> tuple[int, ...]:
        """The places that it fills."""
        return (self.place,)


@dataclass(frozen=True)
class _Called:
    """PyTorch computes something, or makes a view."""

    places: tuple[int | None, ...]  # of its results; None for a place that was there before
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    uses: tuple[int, ...]
    needed: bool  # whatever becomes of the results
    several: bool  # results
    stream: torch.cuda.Stream | None  # on which it is called, if not the caller's

    @property
    def makes(self) -> tuple[int, ...]:
        """The places that it fills."""
        return tuple(place for place in self.places if place is not None)

    @functools.cached_property
    def flat(self) -> bool:
        """Whether all tensors are arguments by themselves: then there is a quick way to put them there."""
        inner = (tree_leaves(each) for each in (*self.args, self.kwargs) if not isinstance(each, _Place))
        return not any(isinstance(each, _Place) for leaves in inner for each in leaves)

    def run(self, tensors: list[Any]) -> None:
        """Calls it on the tensors in their places."""
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            self._run(tensors)

    def _run(self, tensors: list[Any]) -> None:
        if self.flat:
            args = [tensors[each.number] if type(each) is _Place else each for each in self.args]
            found = self.function(*args, **self.kwargs)
        else:
            args, kwargs = tree_map_only(_Place, lambda place: tensors[place.number], (self.args, self.kwargs))
            found = self.function(*args, **kwargs)
        for place, result in zip(self.places, found if self.several else (found,), strict=True):
            if place is not None:
                tensors[place] = result


@dataclass(frozen=True)
class _Launched:
    """A kernel is launched."""

    launch_on: Callable[[int, int, bytes, bool], None]
    stream: torch.cuda.Stream | None  # on which it is launched, if not the caller's
    early: bool
    blocks: int
    pack: Callable[..., bytes]
    constants: list[Any]
    holes: tuple[Hole, ...]
    uses: tuple[int, ...]
    anyway: bool
    makes: tuple[int, ...] = ()

    def run(self, tensors: list[Any], workspace: int, caller: int) -> None:
        """Launches it with the tensors in their places, and those in the workspace that begins at that address."""
        values = self.constants.copy()
        for i, place, offset, boxes in self.holes:
            address = offset + (workspace if place == WORKSPACE else tensors[place].data_ptr())
            values[i] = address if boxes is None else described(boxes, address)
        on = caller if self.stream is None else self.stream.cuda_stream
        self.launch_on(on, self.blocks, self.pack(*values), self.early)


@dataclass(frozen=True)
class _Waited:
    """A stream waits for another; None is the caller's."""

    waiting: torch.cuda.Stream | None
    other: torch.cuda.Stream | None
    uses: tuple[int, ...] = ()
    makes: tuple[int, ...] = ()

    def run(self, caller: torch.cuda.Stream | None) -> None:
        """Has it wait."""
        waiting, other = self.waiting or caller, self.other or caller
        assert waiting is not None and other is not None
        waiting.wait_stream(other)


Step = _Made | _Called | _Launched | _Waited
Dropping = tuple[Step, tuple[int, ...]]
"""A step, and the places that nobody uses after it."""


class Recorder(TorchDispatchMode):
    """While it is entered, notes what this thread has PyTorch and kernels do."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.count = len(tensors)
        self.steps: list[Step] = []
        self.devices = set[int]()
        self.refused: str | None = None  # why this is no program
        self.caller: torch.cuda.Stream | None = None  # set when the first of two streams waits
        # of each tensor its place, the place whose memory it is, and where in that it begins
        self.known = WeakTensorKeyDictionary()
        for place, tensor in enumerate(tensors):
            if tensor is not None:
                self.known[tensor] = (place, place, 0)

    def __enter__(self) -> Recorder:
        launch.observers.noting.append(self.launched)
        launch.observers.waits.append(self.waited)
        super().__enter__()
        return self

    def __exit__(self, *about: Any) -> None:
        super().__exit__(*about)
        launch.observers.noting.remove(self.launched)
        launch.observers.waits.remove(self.waited)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = list[Tensor]()
        noted: tuple[tuple[Any, ...], Mapping[str, Any]] = tree_map_only(
            Tensor, lambda each: self._note(each, given), (args, kwargs)
        )
        several = isinstance(found, (list, tuple))
        results = found if several else (found,)
        if not all(isinstance(result, Tensor) for result in results):
            if given:  # else it is about dtypes, say
                self.refuse(f"{func} tells the host something about tensors")
            return found
        if _depends_on_values(func, given, results):
            self.refuse(f"what {func} makes depends on what tensors hold")
        places = tuple(self._placed(result, given) for result in results)
        if func in MAKING and places[0] is not None and _is_plain(found):
            self.steps.append(_Made(places[0], found.new_empty(0), tuple(found.shape)))
        else:
            uses = tuple(self._known(each)[0] for each in given)
            mutates = func._schema.is_mutable
            self.steps.append(_Called(places, func, *noted, uses, mutates, several, self._stream()))
        return found

    def _note(self, tensor: Tensor, given: list[Tensor]) -> _Place:
        given.append(tensor)
        return _Place(self._known(tensor)[0])

    def _known(self, tensor: Tensor) -> tuple[int, int, int]:
        found: tuple[int, int, int] | None = self.known.get(tensor)
        if found is None:
            self.refuse("a tensor is none of the call's, nor made by it")
        return found or (0, 0, 0)

    def refuse(self, why: str) -> None:
        """What is recorded cannot be repeated."""
        self.refused = self.refused or why

    def _placed(self, result: Tensor, given: Sequence[Tensor]) -> int | None:
        """Gives a result a place; None if it has one."""
        if result in self.known:
            return None
        place, self.count = self.count, self.count + 1
        self.known[result] = (place, place, 0)
        for each in given:  # a view of
            if result.numel() and each.numel() and _storage(each) == _storage(result):
                _, base, offset = self._known(each)
                self.known[result] = (place, base, offset + result.data_ptr() - each.data_ptr())
                break
        return place

    def launched(self, launched: Launch) -> None:
        """Notes a launch."""
        constants, holes = list[Any](), list[Hole]()
        for i, value in enumerate(launched.values):
            if isinstance(value, (Mapped, Tensor)):
                tensor, boxes = (value.tensor, value.boxes) if isinstance(value, Mapped) else (value, None)
                holes.append((i, *self._known(tensor)[1:], boxes))
            elif isinstance(value, bytes) and any(value[:128]):
                self.refuse(f"argument {i} of {launched.kernel.instance} holds an address, and is not given as Mapped")
            constants.append(0 if value is None or isinstance(value, (Mapped, Tensor)) else value)
        layout = launched.kernel.layout
        assert layout is not None, "it has been launched"
        self.devices.add(launched.kernel.device)
        uses = tuple(place for _, place, _, _ in holes)
        about = self._stream(), launched.early, launched.blocks, layout.pack, constants, tuple(holes), uses
        self.steps.append(_Launched(launched.kernel.launch_on, *about, launched.anyway))

    def waited(self, waiting: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
        """Notes that one stream waits for another. The first is another's wait for the caller's."""
        self.caller = self.caller or other
        one, two = (None if each == self.caller else each for each in (waiting, other))
        self.steps.append(_Waited(one, two))

    def _stream(self) -> torch.cuda.Stream | None:
        """The current one, if it is not the caller's."""
        if self.caller is None:
            return None
        current = torch.cuda.current_stream(self.caller.device)
        return None if current == self.caller else current

    def program(self, made: Sequence[Tensor]) -> Program | None:
        """What was noted, where the call's results are those; None if it cannot be repeated, and `refused` says why."""
        results = tuple(self._known(each)[0] for each in made)
        if len(self.devices) > 1:
            self.refuse(f"its kernels ran on the devices {sorted(self.devices)}")
        if _is_left(self.steps):
            self.refuse("nobody waits for another stream in the end")
        if self.refused:
            return None
        return Program(_dropping(_needed(self.steps, results), results), results, self.count, [*self.devices])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_plain(tensor: Tensor) -> bool:
    """Whether it lies as `new_empty` lays tensors of its shape, dimensions of size 1 included."""
    return tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


def _depends_on_values(func: Any, given: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
    """Whether shapes of results follow from values, or the host may look at results of a device."""
    if any(each.is_cuda for each in given) and any(each.device.type == "cpu" for each in results):
        return True
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    by_place = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten._unsafe_index)
    return not by_place or any(each.dtype in (torch.bool, torch.uint8) for each in given[1:])


def _needed(steps: Sequence[Step], results: Sequence[int]) -> list[Step]:
    """The steps that results and launches need."""
    used, kept = set(results), list[Step]()
    for step in reversed(steps):
        kept_anyway = isinstance(step, (_Launched, _Waited)) or (isinstance(step, _Called) and step.needed)
        if kept_anyway or used & {*step.makes}:
            kept.append(step)
            used |= {*step.uses, *step.makes}
    return kept[::-1]


def _dropping(steps: Sequence[Step], results: Sequence[int]) -> list[Dropping]:
    """The steps, each with the places that nobody uses after it.

    What another stream is told of is in use until the caller's waits for that one.
    """
    last, joins = dict[int, int](), dict[torch.cuda.Stream, int]()
    end = 0 if _in_order(steps) else len(steps)
    for number, step in reversed([*enumerate(steps)]):
        if isinstance(step, _Waited) and step.waiting is None and step.other is not None:
            joins[step.other] = number
        stream = _stream_of(step)
        until = max(end, number if stream is None else joins.get(stream, len(steps)))
        for place in {*step.uses, *step.makes}:
            last[place] = max(until, last.get(place, 0))
    dropped: list[list[int]] = [[] for _ in range(len(steps) + 1)]
    for place in last.keys() - {*results}:
        dropped[last[place]].append(place)
    return [(step, tuple(places)) for step, places in zip(steps, dropped, strict=False)]


def _in_order(steps: Sequence[Step]) -> bool:
    """Whether memory that is given back on the way is nobody's on another stream.

    There the order of steps is not that of the device: what it is told of has to be there when it waits for the caller.
    """
    there, made = dict[torch.cuda.Stream, set[int]](), set[int]()
    for step in steps:
        stream = _stream_of(step)
        if isinstance(step, _Waited) and step.waiting is not None and step.other is None:
            there[step.waiting] = made.copy()
        elif stream is not None and (step.makes or not made & {*step.uses} <= there.get(stream, set())):
            return False
        made |= {*step.makes}
    return True


def _is_left(steps: Sequence[Step]) -> bool:
    """Whether something runs on another stream which the caller's does not wait for afterwards."""
    left = set[torch.cuda.Stream]()
    for step in steps:
        stream = _stream_of(step)
        if stream is not None:
            left.add(stream)
        elif isinstance(step, _Waited) and step.waiting is None and step.other is not None:
            left.discard(step.other)
    return bool(left)


def _stream_of(step: Step) -> torch.cuda.Stream | None:
    return step.stream if isinstance(step, (_Called, _Launched)) else None


def _sharing(steps: Sequence[Dropping], results: Set[int]) -> tuple[list[Dropping], int, Tensor]:
    """The steps where what only kernels are told of lies in one workspace; unchanged if that is large.

    Returns:
        the steps, the workspace's size in bytes, and a tensor of bytes on its device, without elements.
    """
    lives, outside, likes = dict[int, Life](), {*results}, dict[int, Tensor]()
    in_order = _in_order([step for step, _ in steps])
    for number, (step, dropped) in enumerate(steps):
        if isinstance(step, _Made):
            size = step.like.element_size() * math.prod(step.shape)
            lives[step.place] = Life(size, number if in_order else 0, len(steps))
            likes[step.place] = step.like
        elif isinstance(step, _Called):
            outside |= {*step.uses, *step.makes}
        for place in {*dropped} & lives.keys():
            lives[place] = dataclasses.replace(lives[place], end=number)
    inside = [place for place in lives if place not in outside]
    like = likes[inside[0]].new_empty(0, dtype=torch.uint8) if inside else torch.empty(0, dtype=torch.uint8)
    inside = [place for place in inside if likes[place].device == like.device]
    offsets, size = lay_out([lives[place] for place in inside])
    if size > SHARED or len(inside) < 2:
        return list(steps), 0, like
    at, kept = dict(zip(inside, offsets, strict=True)), list[Dropping]()
    for step, dropped in steps:
        if not (isinstance(step, _Made) and step.place in at):
            kept.append((_moved(step, at), tuple(place for place in dropped if place not in at)))
    return kept, size, like


def _moved(step: Step, at: Mapping[int, int]) -> Step:
    """The step, told of the workspace in place of tensors that lie in it."""
    if not isinstance(step, _Launched):
        return step
    holes = (
        (i, WORKSPACE, at[place] + offset, boxes) if place in at else (i, place, offset, boxes)
        for i, place, offset, boxes in step.holes
    )
    return dataclasses.replace(step, holes=tuple(holes))


class Program:
    """The steps of a call, for others of its signature.

    Args:
        steps: each with the places that nobody uses after it.
        results: places of what the call makes.
        count: how many places there are.
        devices: of the launches: one, or none if there are none.
    """

    def __init__(
        self,
        steps: Sequence[Dropping],
        results: tuple[int, ...],
        count: int,
        devices: Sequence[int],
    ) -> None:
        self.results, self.count, self.devices = results, count, devices
        self.calls = any(isinstance(step, _Called) for step, _ in steps)
        self.waits = any(isinstance(step, _Waited) for step, _ in steps)
        self.steps, self.workspace, self.like = _sharing(steps, {*results})

    def run(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Does the same with these tensors; returns the results."""
        stream = 0
        for device in self.devices:
            if torch._C._cuda_getDevice() != device:
                with torch.cuda.device(device):
                    return self.run(tensors)
            stream = torch._C._cuda_getCurrentRawStream(device)
        caller = torch.cuda.current_stream() if self.waits else None
        places: list[Any] = [*tensors, *[None] * (self.count - len(tensors))]
        base, workspace = 0, None
        if self.workspace:
            workspace = self.like.new_empty(self.workspace)
            base = workspace.data_ptr()
        done = 0
        try:
            for step, dropped in self.steps:
                if isinstance(step, _Launched):
                    step.run(places, base, stream)
                elif isinstance(step, _Waited):
                    step.run(caller)
                elif isinstance(step, _Made):
                    places[step.place] = step.like.new_empty(step.shape)
                else:
                    step.run(places)
                for place in dropped:
                    places[place] = None
                done += 1
        except BaseException:  # no memory, say
            self._end_what_has_begun(done, places, base, stream)
            raise
        return [places[place] for place in self.results]

    def _end_what_has_begun(self, done: int, places: list[Any], base: int, stream: int) -> None:
        """After so many steps: other streams are told of memory that is given back, and ranks wait for their ends."""
        if not any(_stream_of(step) is not None for step, _ in self.steps[:done]):
            return
        for step, _ in self.steps[done + 1 :]:
            if isinstance(step, _Waited):
                step.run(torch.cuda.current_stream())
            elif isinstance(step, _Launched) and step.anyway:
                step.run(places, base, stream)
