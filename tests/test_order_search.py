"""Orders that are found from a list schedule on: against all orders of small programs, and DeepSeek-V3's."""

from __future__ import annotations

import random
from itertools import pairwise

from moecompile.cluster import _published
from moecompile.passes import order_search
from moecompile.passes.list_schedule import Sending, Task, schedule, simulate
from moecompile.passes.order_search import best
from test_list_schedule import orders, program


def test_small_programs_against_all_their_orders() -> None:
    """The best of all; the same again; and no more held than there is budget for, where some order holds so little."""
    chance, scheduled = random.Random(2), 0
    for _ in range(60):
        tasks = program(chance, 6)
        all_orders = [simulate(tasks, order) for order in orders(tasks)]
        right = min(each.makespan for each in all_orders)
        found = best(tasks)
        assert found.makespan == right and best(tasks) == found
        scheduled += schedule(tasks).makespan == right
        budget = min(each.peak for each in all_orders) + 1
        limited = best(tasks, budget)
        assert limited.makespan <= schedule(tasks, budget).makespan
        assert limited.peak <= max(budget, schedule(tasks, budget).peak)
    assert scheduled < 60, "the list schedule alone finds them: take harder ones"


def pair(layers: int) -> list[Task]:
    """A forward and a backward of layers, with times (ms) as in the trace that DeepSeek published (docs/overlap.md).

    Communication takes as long as all that is computed.
    """
    tasks = list[Task]()
    numbers: dict[str, int] = {}

    def add(name: str, seconds: float, *after: str, receives: str = "", sends: float = 0.0) -> None:
        before = tuple(numbers[each] for each in (*after, receives) if each in numbers)
        arriving = (numbers[receives],) if receives in numbers else ()
        numbers[name] = len(tasks)
        tasks.append(Task(name, seconds, before, Sending(sends, "link", 0.15) if sends else None, arriving))

    for layer in range(layers):
        one = f"forward {layer} "
        add(f"{one}attention", 3.71, f"forward {layer - 1} join")
        add(f"{one}route", 0.21, f"{one}attention", sends=4.84)
        add(f"{one}shared", 0.46, f"{one}route")
        add(f"{one}experts", 4.26, receives=f"{one}route", sends=9.36)
        add(f"{one}join", 0.12, f"{one}shared", receives=f"{one}experts")
    for layer in range(layers):
        one = f"backward {layer} "
        add(f"{one}join inputs", 0.24, f"backward {layer - 1} attention inputs", sends=4.84)
        add(f"{one}experts inputs", 5.62, receives=f"{one}join inputs", sends=9.36)
        add(f"{one}experts weights", 3.93, f"{one}experts inputs")
        add(f"{one}shared inputs", 0.54, f"{one}join inputs")
        add(f"{one}shared weights", 0.5, f"{one}shared inputs")
        add(f"{one}route inputs", 0.38, f"{one}shared inputs", receives=f"{one}experts inputs")
        add(f"{one}attention inputs", 6.42, f"{one}route inputs")
        add(f"{one}attention weights", 2.13, f"{one}attention inputs")
    return tasks


def test_no_worse_than_what_deepseek_publishes() -> None:
    tasks = pair(4)
    published = simulate(tasks, _published(tasks, 4)).makespan
    assert best(tasks).makespan <= published < schedule(tasks).makespan


def test_nothing_is_tried_where_nothing_is_waited_for() -> None:
    tasks = [Task(str(number), 1.0, (number - 1,) if number else ()) for number in range(5)]
    assert best(tasks).order == (0, 1, 2, 3, 4) and best([]).makespan == 0
    assert order_search._Search(tasks, None, schedule(tasks)).ends
    assert all(one < other for one, other in pairwise(best(tasks).order))
