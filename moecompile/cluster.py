"""Layers of a mixture-of-experts model on a cluster, in time: a forward, a backward, and both as one program.

The layers of a stage are tasks of `list_schedule`. The five parts of a layer compute; in the forward route and experts
send what they made, in the backward join and experts do; nobody waits for weight parts of the backward. A forward and
a backward of different micro-batches share nothing, and run as one program: DualPipe's pair. It takes the fastest of
three orders: one after the other, the one that is found for both (moecompile/passes/order_search.py), and the one that
DeepSeek publishes.

    forward    attention, route -> dispatch -> experts -> combine -> join; the shared expert beside them
    backward   join -> combine's backward -> experts -> dispatch's backward -> route, attention
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moecompile.cluster_costs import Batch, Part, parts
from moecompile.cluster_exchange import Cluster, Exchange, exchange
from moecompile.cluster_shapes import Model
from moecompile.passes.list_schedule import Sending, Task, Timeline, simulate
from moecompile.passes.order_search import best

EXCHANGES = "exchanges"
"""The link of list_schedule: one exchange after the other, each on the network and NVLink at once."""


@dataclass(frozen=True)
class Outcome:
    """What a program comes to, in seconds.

    Attributes:
        total: from its beginning to its end.
        computing: of kernels, slowed down while something travels.
        communicating: of exchanges.
        exposed: for which nothing is computed, as what is to come has not arrived.
        order: the name of the order.
    """

    total: float
    computing: float
    communicating: float
    exposed: float
    order: str = "moecompile's order"


@dataclass(frozen=True)
class Run:
    """Layers on a cluster.

    Attributes:
        model: whose layers.
        cluster: on which.
        batch: a micro-batch of each rank.
        layers: of a stage of the pipeline.
        compute_factor: kernels take so many times what is predicted of them.
        exchange_factor: exchanges likewise.

    Raises:
        ClusterError: the experts cannot be spread so.
    """

    model: Model
    cluster: Cluster
    batch: Batch
    layers: int
    compute_factor: float = 1.0
    exchange_factor: float = 1.0

    def __post_init__(self) -> None:
        self.parts()

    def with_sms(self, sms: int) -> Run:
        """With so many multiprocessors for communication."""
        return replace(self, cluster=replace(self.cluster, sms=sms))

    def parts(self) -> dict[str, Part]:
        """Of a layer."""
        found, factor = parts(self.model, self.cluster, self.batch), self.compute_factor
        return {
            name: Part(factor * part.forward, factor * part.inputs, factor * part.weights)
            for name, part in found.items()
        }

    def dispatch(self) -> Exchange:
        """Tokens to their experts, in the precision of products; in the backward gradients of what came from there."""
        return self._exchange(self.batch.precision)

    def combine(self) -> Exchange:
        """Results back, in bfloat16; in the backward gradients of tokens."""
        return self._exchange("bfloat16")

    def forward(self) -> Outcome:
        """A forward by itself."""
        return _outcome(self._forward())

    def backward(self) -> Outcome:
        """A backward by itself; weight parts are computed while something travels."""
        return _outcome(self._backward())

    def inputs(self) -> Outcome:
        """Its input part by itself."""
        return _outcome(self._backward(weights=False))

    def weights(self) -> float:
        """Seconds of its weight part by itself."""
        return self.layers * sum(part.weights for part in self.parts().values())

    def pair(self) -> Outcome:
        """A forward and a backward together, no slower than one after the other."""
        forward, backward = self._forward(), self._backward()
        tasks = [*forward, *(_moved(task, len(forward)) for task in backward)]
        first, second = best(forward).order, best(backward).order
        apart = simulate(tasks, [*first, *(number + len(forward) for number in second)])
        found = {
            "DeepSeek-V3's figure 4": simulate(tasks, _published(tasks, self.layers)),
            "moecompile's order": best(tasks),
            "one after the other": apart,
        }
        # in nanoseconds: what is as fast but for rounding is the first of them
        name, timeline = min(found.items(), key=lambda each: round(each[1].makespan * 1e9))
        return _of(tasks, timeline, name)

    def _forward(self) -> list[Task]:
        part, tasks = self.parts(), _Tasks()
        dispatch, combine = self._sending(self.dispatch()), self._sending(self.combine())
        came: int | None = None
        for layer in range(self.layers):
            tasks.prefix = f"forward {layer} "
            attention = tasks.add("attention", part["attention"].forward, came)
            route = tasks.add("route", part["route"].forward, attention, sends=dispatch)
            experts = tasks.add("experts", part["experts"].forward, receives=route, sends=combine)
            shared = tasks.add("shared", part["shared"].forward, route) if "shared" in part else None
            came = tasks.add("join", part["join"].forward, shared, receives=experts)
        return tasks.made

    def _backward(self, weights: bool = True) -> list[Task]:
        part, tasks = self.parts(), _Tasks()
        dispatch, combine = self._sending(self.dispatch()), self._sending(self.combine())
        came: int | None = None

        def inputs(name: str, *after: int | None, receives: int | None = None, sends: Sending | None = None) -> int:
            done = tasks.add(f"{name} inputs", part[name].inputs, *after, receives=receives, sends=sends)
            if weights and part[name].weights:
                tasks.add(f"{name} weights", part[name].weights, done)
            return done

        for layer in range(self.layers):
            tasks.prefix = f"backward {layer} "
            join = inputs("join", came, sends=dispatch)
            experts = inputs("experts", receives=join, sends=combine)
            shared = inputs("shared", join) if "shared" in part else None
            came = inputs("attention", inputs("route", shared, receives=experts))
        return tasks.made

    def _exchange(self, precision: str) -> Exchange:
        found = exchange(self.model, self.cluster, self.batch.tokens, precision)
        return replace(found, seconds=self.exchange_factor * found.seconds)

    def _sending(self, way: Exchange) -> Sending | None:
        return Sending(way.seconds, EXCHANGES, self.cluster.share) if way.seconds else None


class _Tasks:
    """A program in the making."""

    def __init__(self) -> None:
        self.made: list[Task] = []
        self.prefix = ""

    def add(
        self,
        name: str,
        seconds: float,
        *after: int | None,
        receives: int | None = None,
        sends: Sending | None = None,
    ) -> int:
        """One more task, behind those before it that there are; what sends nothing has nothing to be received of."""
        before = tuple(number for number in (*after, receives) if number is not None)
        arriving = () if receives is None or self.made[receives].sends is None else (receives,)
        self.made.append(Task(self.prefix + name, seconds, before, sends, arriving))
        return len(self.made) - 1


def _moved(task: Task, by: int) -> Task:
    """With other numbers, behind so many tasks."""
    after, receives = (tuple(number + by for number in numbers) for numbers in (task.after, task.receives))
    return replace(task, after=after, receives=receives)


def _published(tasks: list[Task], layers: int) -> list[int]:
    """The order of DeepSeek-V3's figure 4 (arXiv:2412.19437), layers of the backward numbered from the last one.

    Experts of the backward run while tokens of the forward go to theirs, those of the forward while gradients of the
    backward go on, attention of the backward while the forward's results come back, and that of the forward while
    gradients of the backward do. Weight parts are behind their input parts; where the figure leaves it open, what is
    sent comes before a weight part.
    """
    numbers = {task.name: number for number, task in enumerate(tasks)}
    return [numbers[name] for name in _published_names(layers) if name in numbers]


def _published_names(layers: int) -> Iterator[str]:
    """Of all tasks that there may be; a layer that is not there has none."""
    yield from ("backward 0 join inputs", "forward 0 attention", "forward 0 route")
    for layer in range(layers):
        backward, forward = f"backward {layer}", f"forward {layer}"
        yield from (f"{backward} experts inputs", f"{backward} shared inputs")
        yield from (f"{backward} experts weights", f"{backward} shared weights")
        yield from (f"{forward} shared", f"{forward} experts")
        yield from (f"{backward} route inputs", f"{backward} attention inputs", f"backward {layer + 1} join inputs")
        yield from (f"{backward} attention weights", f"{backward} route weights")
        yield from (f"{forward} join", f"forward {layer + 1} attention", f"forward {layer + 1} route")


def _outcome(tasks: list[Task]) -> Outcome:
    return _of(tasks, best(tasks))


def _of(tasks: list[Task], timeline: Timeline, order: str = "moecompile's order") -> Outcome:
    sent = sum(task.sends.duration for task in tasks if task.sends)
    return Outcome(timeline.makespan, timeline.busy, sent, timeline.exposed, order)
