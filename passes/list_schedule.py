"""List scheduling of a program's tasks on two resources: a device that computes, and links that carry.

    while there are tasks left:
        begin what sends as soon as it is ready, and what takes no time
        else compute what is ready, in one of two orders
        else wait for what arrives first

The device computes one task after the other, in their order. What a task sends is on its way from then on, behind what
its link carries already, and takes multiprocessors from what is computed meanwhile. A task that receives begins when
all that it waits for has arrived. Of ready tasks the one with the longest way to the end goes first, so that gradients
of matrices, which nobody waits for, come last and fill the gaps; or the one after which something is sent soonest: both
are tried, and the faster order is taken. With more memory held than there is budget for, the task goes first that gives
most of it back.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field


class ScheduleError(ValueError):
    """Tasks or an order that no program can have."""


@dataclass(frozen=True)
class Sending:
    """What is on its way after a task.

    Attributes:
        duration: seconds on its link, alone.
        link: one carries one thing after the other.
        share: of the device's multiprocessors that it takes, less than 1.

    Raises:
        ScheduleError: it takes all of them, or less than no time.
    """

    duration: float
    link: str
    share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1 or self.duration < 0:
            words = f"{self.duration:g} s with {self.share:g} of the multiprocessors"
            raise ScheduleError(f"expected no less than 0 s, and a share from 0 to less than 1, got {words}")


@dataclass(frozen=True)
class Task:
    """One step of a program.

    Attributes:
        name: for people.
        duration: seconds that the device computes.
        after: the tasks that come before it.
        sends: what is on its way after it.
        receives: tasks, of those before it, whose sending has to have arrived.
        makes: bytes of its results, held until the last task that comes after it has run.
    """

    name: str
    duration: float
    after: tuple[int, ...] = ()
    sends: Sending | None = None
    receives: tuple[int, ...] = ()
    makes: float = 0.0

    @functools.cached_property
    def behind(self) -> frozenset[int]:
        """The tasks that come before it, each once."""
        return frozenset(self.after)


@dataclass(frozen=True)
class Span:
    """When something runs, in seconds."""

    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What an order of tasks comes to.

    Attributes:
        order: numbers of tasks.
        computed: when each task, by number, computes.
        sent: when what it sends is on its link; None if it sends nothing.
        exposed: seconds for which the device waits for what has not arrived.
        peak: bytes of results that are held at once, at most.
    """

    order: tuple[int, ...]
    computed: tuple[Span, ...]
    sent: tuple[Span | None, ...]
    exposed: float
    peak: float

    @functools.cached_property
    def makespan(self) -> float:
        """Seconds from the first task's beginning until the last has ended, and all has arrived."""
        return max((span.end for span in (*self.computed, *filter(None, self.sent))), default=0.0)

    @property
    def waits(self) -> dict[int, Span]:
        """By number of the task that is waited for: when the device waits for what it receives."""
        found, now = dict[int, Span](), 0.0
        for number in self.order:
            span = self.computed[number]
            if span.begin > now:
                found[number] = Span(now, span.begin)
            now = span.end
        return found

    @property
    def busy(self) -> float:
        """Seconds for which the device computes."""
        return sum(span.end - span.begin for span in self.computed)


def links_of(tasks: Sequence[Task]) -> list[str]:
    """The links that something is sent on, in the order of the first."""
    return [*dict.fromkeys(task.sends.link for task in tasks if task.sends is not None)]


def simulate(tasks: Sequence[Task], order: Iterable[int]) -> Timeline:
    """What happens when the tasks run in that order.

    Raises:
        ScheduleError: it leaves a task out, has one twice, or one before another that it comes after.
    """
    machine = _Machine(tasks)
    for number in order:
        machine.run(number)
    return machine.timeline()


def schedule(tasks: Sequence[Task], budget: float | None = None) -> Timeline:
    """The order that the module's documentation has, and what it comes to.

    Args:
        tasks: numbered by their places.
        budget: bytes of results that are held at once, if that can be; None for as many as it takes.

    Raises:
        ScheduleError: tasks wait for each other in a circle.
    """
    ways, sendings = ways_of(tasks), _sendings(tasks)
    longest = [(-way, number) for number, way in enumerate(ways)]
    soonest = [(sending, *rest) for sending, rest in zip(sendings, longest, strict=True)]
    found = [in_turn(tasks, first, budget) for first in (longest, soonest)]
    return min(found, key=lambda each: each.makespan)


def in_turn(tasks: Sequence[Task], first: Sequence[tuple[float, ...]], budget: float | None) -> Timeline:
    """The order in which of ready tasks the one goes first whose entry in `first` is the least."""
    machine, ready = _Machine(tasks), _Ready(tasks)
    while len(machine.order) < len(tasks):
        number = _next(tasks, machine, first, ready, budget)
        machine.run(number)
        ready.done(number)
    return machine.timeline()


def _next(
    tasks: Sequence[Task], machine: _Machine, first: Sequence[tuple[float, ...]], ready: _Ready, budget: float | None
) -> int:  # fmt: skip
    """The task to run now."""
    if not ready.numbers:
        raise ScheduleError(f"tasks wait for each other: {', '.join(tasks[each].name for each in machine.left()[:8])}")
    now = machine.now
    arrived = [each for each in ready.numbers if not tasks[each].receives or machine.arrival(each) <= now]
    if not arrived:
        return min(ready.numbers, key=lambda each: (machine.arrival(each), first[each]))
    at_once = [each for each in arrived if tasks[each].sends is not None or not tasks[each].duration]
    if at_once:
        return min(at_once, key=first.__getitem__)
    if budget is not None:
        fitting = [each for each in arrived if machine.held + tasks[each].makes <= budget]
        if not fitting:
            return min(arrived, key=lambda each: (tasks[each].makes - machine.freed(each), first[each]))
        arrived = fitting
    return min(arrived, key=first.__getitem__)


def users_of(tasks: Sequence[Task]) -> list[list[int]]:
    """Of each task those that come after it."""
    users: list[list[int]] = [[] for _ in tasks]
    for number, task in enumerate(tasks):
        for before in task.behind:
            users[before].append(number)
    return users


def _sendings(tasks: Sequence[Task]) -> list[float]:
    """Of each task the seconds that are computed until something can be sent; infinite if nothing is."""
    found = [float("inf")] * len(tasks)
    for number, users in _from_the_end(tasks):
        behind = min((found[user] for user in users), default=float("inf"))
        found[number] = 0.0 if tasks[number].sends else tasks[number].duration + behind
    return found


def ways_of(tasks: Sequence[Task]) -> list[float]:
    """Of each task the seconds from its beginning to the program's end, if nothing but what depends on it took time."""
    ways = [0.0] * len(tasks)
    for number, users in _from_the_end(tasks):
        task = tasks[number]
        behind = 0.0
        for user in users:
            travels = task.sends.duration if task.sends and number in tasks[user].receives else 0.0
            behind = max(behind, travels + ways[user])
        ways[number] = task.duration + max(behind, task.sends.duration if task.sends else 0.0)
    return ways


def _from_the_end(tasks: Sequence[Task]) -> Iterator[tuple[int, list[int]]]:
    """All tasks with those that come after them, which are there first."""
    users = users_of(tasks)
    return ((number, users[number]) for number in reversed(_sorted(tasks)))


def _sorted(tasks: Sequence[Task]) -> list[int]:
    """All tasks, each behind those that it comes after."""
    ready, found = _Ready(tasks), list[int]()
    while ready.numbers:
        number = next(iter(ready.numbers))
        ready.done(number)
        found.append(number)
    if len(found) < len(tasks):
        left = [task.name for number, task in enumerate(tasks) if number not in {*found}]
        raise ScheduleError(f"tasks wait for each other: {', '.join(left[:8])}")
    return found


class _Ready:
    """Tasks all of whose predecessors have run, in the order in which they became so."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._missing, self._users = [len(task.behind) for task in tasks], users_of(tasks)
        self.numbers = dict.fromkeys(number for number, missing in enumerate(self._missing) if not missing)

    def done(self, number: int) -> None:
        """It has run."""
        del self.numbers[number]
        for user in self._users[number]:
            self._missing[user] -= 1
            if not self._missing[user]:
                self.numbers[user] = None


@dataclass
class _Machine:
    """The device, its links and its memory, while tasks run."""

    tasks: Sequence[Task]
    now: float = 0.0
    held: float = 0.0
    peak: float = 0.0
    exposed: float = 0.0
    order: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._computed: dict[int, Span] = {}
        self._sent: dict[int, Span] = {}
        self._free: dict[str, float] = {}
        self._flying: list[tuple[float, float]] = []  # ends and shares of what is on its way
        self._users = [*map(len, users_of(self.tasks))]

    def arrival(self, number: int) -> float:
        """When all that it receives has arrived."""
        receives = self.tasks[number].receives
        return max(self._sent[each].end for each in receives) if receives else 0.0

    def freed(self, number: int) -> float:
        """Bytes that nobody reads any more once it has run."""
        return sum(self.tasks[each].makes for each in self.tasks[number].behind if self._users[each] == 1)

    def left(self) -> list[int]:
        """Tasks that have not run."""
        return [number for number in range(len(self.tasks)) if number not in self._computed]

    def run(self, number: int) -> None:
        """Runs the task next."""
        task = self.tasks[number]
        if number in self._computed or not self._computed.keys() >= task.behind:
            early = [self.tasks[each].name for each in task.after if each not in self._computed]
            raise ScheduleError(f"{task.name} {'runs twice' if not early else 'runs before ' + ', '.join(early)}")
        arrival = self.arrival(number)
        self.exposed += max(0.0, arrival - self.now)
        self.now = max(self.now, arrival)
        begin = self.now
        self._compute(task.duration)
        self._computed[number] = Span(begin, self.now)
        if task.sends is not None:
            sent = max(self.now, self._free.get(task.sends.link, 0.0))
            self._sent[number] = Span(sent, sent + task.sends.duration)
            self._free[task.sends.link] = sent + task.sends.duration
            heapq.heappush(self._flying, (sent + task.sends.duration, task.sends.share))
        self._hold(number)
        self.order.append(number)

    def _compute(self, work: float) -> None:
        """Work of so many seconds, if the device had all its multiprocessors."""
        while work > 0:
            while self._flying and self._flying[0][0] <= self.now:
                heapq.heappop(self._flying)
            if not self._flying:
                self.now += work
                return
            rate = 1 - max(share for _, share in self._flying)
            until = self._flying[0][0]
            if work <= rate * (until - self.now):
                self.now += work / rate
                return
            work -= rate * (until - self.now)
            self.now = until

    def _hold(self, number: int) -> None:
        task = self.tasks[number]
        self.held += task.makes
        self.peak = max(self.peak, self.held)
        for before in task.behind:
            self._users[before] -= 1
            if not self._users[before]:
                self.held -= self.tasks[before].makes

    def timeline(self) -> Timeline:
        """Once all tasks have run."""
        if left := self.left():
            raise ScheduleError(f"{self.tasks[left[0]].name} is left out, and {len(left) - 1} others")
        numbers = range(len(self.tasks))
        computed, sent = ([each.get(number) for number in numbers] for each in (self._computed, self._sent))
        return Timeline(tuple(self.order), tuple(filter(None, computed)), tuple(sent), self.exposed, self.peak)
