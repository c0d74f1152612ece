"""A better order of tasks than a list schedule's, where something is still waited for.

    order = list schedule (moecompile/passes/list_schedule.py)
    if it takes longer than what is computed, and than the longest way through the tasks, several times:
        again and again the list schedule with priorities that are a little changed; they are kept if it is no slower
        again and again one task goes to another place between those that it comes after and those that come after it;
            it stays there if that is no slower
    the fastest

Where communication takes nearly as long as computation, a list schedule sends too late what is needed last. It never
waits where there is something to compute; an order that a task has been moved in may. What is tried is the same in
every process: all ranks find the same order of the same tasks.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from moecompile.passes.list_schedule import Task, Timeline, in_turn, schedule, simulate, users_of, ways_of

WORK = 40_000
"""Tasks that are run in all tries: some tenths of a second."""
TRIES = 300
"""At most, from each beginning."""
BEGINNINGS = 2
"""How often it is begun again: a search may end where no single step is an improvement."""
SHARE = 0.2
"""Of these tries, those with changed priorities."""
CHANGES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""By how much priorities are changed: the deviation, as a share of the longest way to the end."""
IN_VAIN = 150
"""Tries without a gain after which a search ends."""
LEAST = 1e-3
"""Of the time that an order takes: with less to gain nothing is tried."""


def best(tasks: Sequence[Task], budget: float | None = None) -> Timeline:
    """The best order that is found, and what it comes to.

    Args:
        tasks: numbered by their places.
        budget: bytes of results that are held at once, if that can be; None for as many as it takes.

    Raises:
        ScheduleError: tasks wait for each other in a circle.
    """
    found = schedule(tasks, budget)
    search = _Search(tasks, budget, found)
    if search.ends:
        return found
    tries = min(TRIES, WORK // len(tasks) // BEGINNINGS)
    for seed in range(BEGINNINGS):
        chance = random.Random(seed)
        search.begin(found)
        search.run(_other_priorities(tasks, budget, search, chance), int(SHARE * tries))
        search.run(_other_places(tasks, search, chance), tries - int(SHARE * tries))
    return search.best


def better(tasks: Sequence[Task], before: Timeline, gain: float, budget: float | None = None) -> Timeline:
    """The best order, or the one before where that is not slower by `gain` of the time it takes, or holds less.

    An order that holds more than both the budget and the one before does is not taken.
    """
    after = best(tasks, budget)
    fits = budget is None or after.peak <= max(budget, before.peak)
    return after if fits and after.makespan <= (1 - gain) * before.makespan else before


class _Search:
    """The best order so far, and the one from which it goes on.

    Attributes:
        now: from which it goes on.
        best: of all beginnings.
    """

    def __init__(self, tasks: Sequence[Task], budget: float | None, found: Timeline) -> None:
        self.now = self.best = found
        self._budget = budget
        self._least = max(sum(task.duration for task in tasks), max(ways_of(tasks), default=0.0))

    @property
    def ends(self) -> bool:
        """Whether it takes no longer than what is computed, or than the longest way through the tasks."""
        return self.best.makespan <= (1 + LEAST) * self._least

    def begin(self, found: Timeline) -> None:
        """Goes on from this one."""
        self.now = found

    def run(self, others: Iterator[Timeline], tries: int) -> None:
        """Goes on to each that is no worse; until there is nothing to gain, or for long nothing is gained."""
        since = 0
        for other in itertools.islice(others, tries):
            since += 1
            if self._is_no_worse(other):
                since = 0 if other.makespan < self.now.makespan else since
                self.now = other
            if self.now.makespan < self.best.makespan:
                self.best = self.now
            if self.ends or since == IN_VAIN:
                return

    def _is_no_worse(self, other: Timeline) -> bool:
        fits = self._budget is None or other.peak <= max(self._budget, self.now.peak)
        return fits and other.makespan <= self.now.makespan


def _other_priorities(
    tasks: Sequence[Task], budget: float | None, search: _Search, chance: random.Random
) -> Iterator[Timeline]:
    ways = ways_of(tasks)
    kept, longest = [-way for way in ways], max(ways)
    while True:
        deviation = chance.choice(CHANGES) * longest
        changed = [each + chance.gauss(0, deviation) for each in kept]
        other = in_turn(tasks, [(each, number) for number, each in enumerate(changed)], budget)
        yield other
        if search.now is other:
            kept = changed


def _other_places(tasks: Sequence[Task], search: _Search, chance: random.Random) -> Iterator[Timeline]:
    users = users_of(tasks)
    while True:
        order = [*search.now.order]
        place = chance.randrange(len(order))
        number = order[place]
        places = {each: where for where, each in enumerate(order)}
        first = max((places[each] for each in tasks[number].after), default=-1) + 1
        last = min((places[each] for each in users[number]), default=len(order)) - 1
        order.insert(chance.randint(first, last), order.pop(place))
        yield search.now if [*search.now.order] == order else simulate(tasks, order)
