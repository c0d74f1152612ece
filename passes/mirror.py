"""What training on a graph is predicted to take before its backward is there: a backward that mirrors the forward.

forward     wait(start(x)) ...  products, each takes t
backward    ... each takes 2 t: a product for what it was given, one for its matrix; what was sent comes back, so that
a wait's mirror sends, and a start's receives
"""

from __future__ import annotations

from collections.abc import Sequence

from moecompile.passes.list_schedule import Task, simulate, users_of
from moecompile.passes.order_search import better
from moecompile.passes.overlap import GAIN, Plan


def training_seconds(plan: Plan) -> float:
    """Of the forward, in its better order, and of a backward in its own."""
    backward = mirrored(plan.tasks)
    as_they_come = simulate(backward, range(len(backward)))
    return plan.after.makespan + better(backward, as_they_come, GAIN).makespan


def mirrored(tasks: Sequence[Task]) -> list[Task]:
    """The backward's, the last task's first. Memory is not reckoned with."""
    last, users = len(tasks) - 1, users_of(tasks)
    found = list[Task]()
    for number in reversed(range(len(tasks))):
        task, after = tasks[number], tuple(sorted(last - user for user in users[number]))
        waits = [user for user in users[number] if number in tasks[user].receives]
        if task.sends is not None:
            own = sum(tasks[wait].duration for wait in waits)
            found.append(Task(task.name, own, after, receives=tuple(sorted(last - wait for wait in waits))))
        elif task.receives:
            found.append(Task(task.name, 0.0, after, sends=tasks[task.receives[0]].sends))
        else:
            found.append(Task(task.name, 2 * task.duration, after))
    return found
