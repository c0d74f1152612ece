"""Orders of tasks on a device and its links: against timelines by hand, all orders of small programs, and bounds."""

from __future__ import annotations

import itertools
import random

import pytest

from moecompile.passes.list_schedule import ScheduleError, Sending, Task, Timeline, schedule, simulate
from moecompile.passes.order_search import better


def compute(name: str, seconds: float, *after: int, makes: float = 0.0) -> Task:
    return Task(name, seconds, after, makes=makes)


def start(name: str, seconds: float, *after: int, link: str = "nvlink", share: float = 0.0) -> Task:
    return Task(name, 0.0, after, Sending(seconds, link, share))


def wait(name: str, *after: int, of: int) -> Task:
    return Task(name, 0.0, (of, *after), receives=(of,))


def block(first: int, name: str, expert: float = 2.0, travel: float = 1.0) -> list[Task]:
    """Router, dispatch, experts, combine, and what comes after them, numbered from `first` on."""
    return [
        compute(f"{name}.attention", 1.0),
        start(f"{name}.dispatch", travel, first),
        wait(f"{name}.came", of=first + 1),
        compute(f"{name}.experts", expert, first + 2),
        start(f"{name}.combine", travel, first + 3),
        wait(f"{name}.home", of=first + 4),
        compute(f"{name}.after", 0.5, first + 5),
    ]


def names(tasks: list[Task], timeline: Timeline) -> list[str]:
    return [tasks[number].name for number in timeline.order]


def test_what_one_block_waits_for() -> None:
    found = simulate(block(0, "a"), range(7))
    assert found.makespan == 1 + 1 + 2 + 1 + 0.5 and found.exposed == 2 and found.busy == 3.5


def test_two_blocks_hide_each_others_exchange() -> None:
    """As in DeepSeek-V3, figure 4: one's attention and experts under the other's dispatch and combine."""
    tasks = [*block(0, "a"), *block(7, "b")]
    before, found = simulate(tasks, range(14)), schedule(tasks)
    assert before.makespan == 11 and before.exposed == 4
    assert found.busy == 7 and found.exposed == 0.5, "the last combine has half a second to hide behind"
    order = names(tasks, found)
    assert order.index("a.dispatch") < order.index("b.attention") < order.index("a.experts")
    assert order.index("b.dispatch") < order.index("a.experts") < order.index("b.experts")


def test_links_carry_one_thing_after_the_other() -> None:
    tasks = [start("a", 2.0), start("b", 3.0), start("c", 4.0, link="network")]
    found = simulate(tasks, range(3))
    assert [(span.begin, span.end) for span in found.sent if span] == [(0, 2), (2, 5), (0, 4)]
    assert found.makespan == 5 and found.exposed == 0


def test_what_travels_takes_multiprocessors() -> None:
    """A quarter for 3 s: 2.25 s of work until then, and the rest at full rate."""
    tasks = [start("a", 3.0, share=0.25), compute("b", 4.0), wait("c", 1, of=0)]
    assert simulate(tasks, range(3)).makespan == pytest.approx(3 + (4 - 2.25))
    two = [start("a", 1.0, share=0.5), start("b", 1.0, link="network", share=0.75), compute("c", 1.0)]
    assert simulate(two, range(3)).makespan == pytest.approx(1 + 0.75)


def test_gradients_of_matrices_fill_the_gaps() -> None:
    """Nobody waits for them."""
    tasks = [
        compute("experts' rows", 1.0),
        compute("of matrices", 2.0, 0),
        start("combine", 2.0, 0),
        wait("home", of=2),
        compute("attention", 1.0, 3),
    ]
    found = schedule(tasks)
    assert names(tasks, found) == ["experts' rows", "combine", "of matrices", "home", "attention"]
    assert found.makespan == 4 and found.exposed == 0


def test_no_more_memory_than_there_is_budget_for() -> None:
    """Two chains, of which the one with the longer way holds a lot until it is through."""
    tasks = [
        compute("a", 1.0, makes=8),
        compute("b", 1.0, makes=8),
        compute("of a", 2.0, 0, makes=1),
        compute("of b", 1.0, 1, makes=1),
    ]
    assert schedule(tasks).peak == 17
    found = schedule(tasks, budget=10)
    assert found.peak <= 10 and names(tasks, found)[1] == "of a"
    assert schedule(tasks, budget=1).makespan == 5, "what does not fit at all runs all the same"


def test_the_given_order_stays_where_another_gains_nothing() -> None:
    tasks = [*block(0, "a"), *block(7, "b")]
    given = range(14)
    assert better(tasks, simulate(tasks, given), gain=0.03).makespan == 7.5
    assert better(tasks, simulate(tasks, given), gain=0.5).order == tuple(given), "3.5 of 11 s are less than half"
    heavy = [Task(task.name, task.duration, task.after, task.sends, task.receives, 1.0) for task in tasks]
    least = simulate(heavy, given).peak
    assert better(heavy, simulate(heavy, given), gain=0.03, budget=least - 1).peak <= least


def test_what_no_program_can_have() -> None:
    tasks = [compute("a", 1.0), compute("b", 1.0, 0)]
    for order, words in (((1, 0), "b runs before a"), ((0, 0), "a runs twice"), ((0,), "b is left out")):
        with pytest.raises(ScheduleError, match=words):
            simulate(tasks, order)
    with pytest.raises(ScheduleError, match="wait for each other: a, b"):
        schedule([compute("a", 1.0, 1), compute("b", 1.0, 0)])
    with pytest.raises(ScheduleError, match="less than 1"):
        Sending(1.0, "nvlink", 1.0)
    assert schedule([]).makespan == 0


def program(chance: random.Random, count: int) -> list[Task]:
    """Any."""
    tasks = list[Task]()
    for number in range(count):
        after = tuple(chance.sample(range(number), chance.randrange(min(3, number) + 1)))
        senders = [each for each in after if tasks[each].sends]
        sends = Sending(chance.choice((0.5, 1.0, 3.0)), chance.choice("ab")) if chance.random() < 0.3 else None
        seconds = 0.0 if sends else chance.choice((0.0, 1.0, 2.0))
        tasks.append(Task(str(number), seconds, after, sends, tuple(senders), chance.randrange(4)))
    return tasks


def orders(tasks: list[Task]) -> list[tuple[int, ...]]:
    """All that respect what comes after what."""
    return [
        order
        for order in itertools.permutations(range(len(tasks)))
        if all(order.index(before) < order.index(number) for number in order for before in tasks[number].after)
    ]


def test_small_programs_against_all_their_orders() -> None:
    """Mostly the best; never more than half as long again, and `better` is never worse than what was given."""
    chance, best_found = random.Random(0), 0
    for _ in range(60):
        tasks = program(chance, 6)
        best = min(simulate(tasks, order).makespan for order in orders(tasks))
        found = schedule(tasks).makespan
        assert best <= found <= 1.5 * best
        best_found += found == best
        assert better(tasks, simulate(tasks, range(6)), gain=0.0).makespan <= simulate(tasks, range(6)).makespan
    assert best_found >= 50


def test_large_programs_are_within_the_sum_of_both_bounds() -> None:
    """Computation alone, and the longest way: no list schedule of one device takes longer than both together."""
    chance = random.Random(1)
    for count in (30, 200):
        tasks = program(chance, count)
        found = schedule(tasks)
        assert sorted(found.order) == list(range(count))
        sending = sum(task.sends.duration for task in tasks if task.sends)
        assert found.busy <= found.makespan <= found.busy + sending
        assert found.makespan <= simulate(tasks, range(count)).makespan * 1.2
