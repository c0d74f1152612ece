"""Token exchange between the ranks of expert parallelism: contracts, fakes, and who does it.

E experts lie on R ranks, E / R on each, in their order. A token crosses to a rank once, however many experts it meets
there. Sizes are fixed, so that no host waits for a device: each rank has room for C tokens (`capacity`) of each rank.

    sent, home = exchange_plan(expert_ids)              which token lies at which place of which rank
    rows, ids, weights, came = dispatch                 the tokens of all ranks that meet experts of this one
    y = the experts of this rank, on these rows         summed over a token's experts, once rounded
    result = combine(y)                                 summed over ranks in their order, in float32, once rounded

Each of the two is a start and a wait; what lies between them is independent of it. The derivative of a dispatch is a
combine, that of a combine a dispatch: of a wait the reverse's start, of a start the reverse's wait.

    sent (R * C,) int32     the token at each place of each rank, in the order of tokens; -1 where there is none
    home (T, R) int32       the place of a token among its rank's on each rank; -1 where it meets no expert
    rows (R * C, H)         the tokens that came from each rank; anything where none did
    ids (R * C, K) int32    experts of these, counted from this rank's first; -1: none, or one of another rank
    weights (R * C, K)      of these; zeros where no token came
    came (R,) int32         how many rows a combine has to send back to each rank, at least those that came from it;
                            less than none where this rank's experts have no room for them all

On Hopper GPUs with access to each other's memory moecompile's kernels do it (`moecompile.runtime.hopper_exchange`).
Elsewhere it goes over torch's functional collectives (`moecompile.runtime.collective_exchange`). A start gives handles:
with collectives what is in flight, and with the kernels nothing that has memory. A wait is given what its start was,
too: a rank's own rows do not travel, and what travels has to be there until it has arrived. Collectives send copies: in
a derivative their wait knows the handles alone, and Inductor writes into memory that no later operator reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from moecompile.runtime import collective_exchange, hopper_exchange
from moecompile.runtime.contract import INTEGERS
from moecompile.runtime.hopper_exchange import Exchange, Rows
from moecompile.runtime.launch import wait_for
from moecompile.runtime.peer_memory import PeerMemory, give_up, memory_of, reaches_peers, room_for, too_many
from moecompile.runtime.reference import check_range

Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def experts_here(num_experts: int, ranks: int, operator: str) -> int:
    """Of each rank. ValueError if they cannot be shared out evenly."""
    if ranks < 1 or num_experts < ranks or num_experts % ranks:
        raise ValueError(
            f"moecompile::{operator}: expected experts that {ranks} ranks can share evenly, got {num_experts}"
        )
    return num_experts // ranks


def exchange_plan(expert_ids: Tensor, *, num_experts: int, ranks: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Where each of this rank's tokens goes: `sent` and `home`.

    Args:
        expert_ids: (T, K) integers; -1 means no expert.
        num_experts: of all ranks.
        ranks: that share them.
        capacity: tokens of a rank at most.

    Raises:
        ValueError: more tokens than that, or experts that cannot be shared out evenly.
        TypeError: no integers.
        IndexError: on the CPU, an id that no expert has.
    """
    here = _check_ids(expert_ids, num_experts, ranks)
    tokens = expert_ids.shape[0]
    if tokens > capacity:
        raise ValueError(
            f"moecompile::exchange_plan: expected {capacity} tokens a rank or less, got {tokens}; raise the option "
            "`ep_capacity` on all ranks"
        )
    if hopper_exchange.serves(expert_ids.device) and ranks <= hopper_exchange.RANKS:
        return hopper_exchange.plan(expert_ids, num_experts, ranks, capacity)
    check_range(expert_ids, num_experts, "exchange_plan")
    owner = torch.where(expert_ids < 0, -1, expert_ids.div(here, rounding_mode="floor"))
    meets = (owner.unsqueeze(2) == torch.arange(ranks, device=owner.device)).any(1)
    place = meets.cumsum(0) - 1
    home = torch.where(meets, place, -1).to(torch.int32)
    sent = torch.full((ranks, capacity + 1), -1, dtype=torch.int32, device=owner.device)
    token = torch.arange(tokens, dtype=torch.int32, device=owner.device).expand(ranks, tokens)
    sent.scatter_(1, torch.where(meets, place, capacity).t(), token)  # what goes nowhere falls into the last column
    return sent[:, :capacity].reshape(-1), home


def fake_exchange_plan(expert_ids: Tensor, *, num_experts: int, ranks: int, capacity: int) -> tuple[Tensor, Tensor]:
    """The shapes of `exchange_plan`."""
    _check_ids(expert_ids, num_experts, ranks)
    return (
        expert_ids.new_empty(ranks * capacity, dtype=torch.int32),
        expert_ids.new_empty((expert_ids.shape[0], ranks), dtype=torch.int32),
    )


def dispatch_start(
    x: Tensor, expert_ids: Tensor | None, weights: Tensor | None, sent: Tensor, home: Tensor, *, ranks: int, group: str,
    capacity: int, slot: int, sms: int, patience: float, aside: bool = False,
) -> Four:  # fmt: skip
    """Begins to send each token to the ranks of its experts, with its experts and their weights where they are given.

    Args:
        x: (T, H).
        expert_ids: (T, K) or None.
        weights: (T, K) or None.
        sent: of `exchange_plan`.
        home: of `exchange_plan`.
        ranks: R.
        group: the name of the process group.
        capacity: C.
        slot: of the kernels' memory, which no other exchange may have before `dispatch_wait`.
        sms: multiprocessors that the kernels send with, the same number on all ranks.
        patience: seconds that the kernels wait for another rank.
        aside: whether the kernels send on a stream of their own: what comes before the wait is computed meanwhile.

    Returns:
        handles of rows, ids and weights, for `dispatch_wait` alone, of one dimension for what is None; and a token
        that stands for the exchange.
    """
    _check_rows(x, sent, "dispatch_start")
    memory = memory_for(x, expert_ids, weights, ranks, group, capacity)
    if memory is not None:
        rows = Rows.of(x, expert_ids, weights)
        into = rows.room(sent.shape[0])
        came = sent.new_empty(ranks)
        started = _send(Exchange(memory, slot, capacity, sms, patience), rows, sent, None, aside)
        memory.begun[slot] = started, rows, into, came
        return _handles(x, expert_ids, weights, sent.shape[0])
    return collective_exchange.dispatch_start(x, expert_ids, weights, sent, home, ranks, group, capacity)


def fake_dispatch_start(
    x: Tensor, expert_ids: Tensor | None, weights: Tensor | None, sent: Tensor, home: Tensor, *, ranks: int, group: str,
    capacity: int, slot: int, sms: int, patience: float, aside: bool = False,
) -> Four:  # fmt: skip
    """The shapes of `dispatch_start`."""
    _check_rows(x, sent, "dispatch_start")
    if by_kernels(x, expert_ids, weights, ranks, group):
        return _handles(x, expert_ids, weights, sent.shape[0])
    parts = _in_flight(x, expert_ids, weights, sent.shape[0])
    return (*parts, collective_exchange.token_like(x, ranks, group, capacity))


def dispatch_wait(
    rows: Tensor, ids: Tensor, weights: Tensor, token: Tensor, x: Tensor, expert_ids: Tensor | None,
    given: Tensor | None, sent: Tensor, home: Tensor, *, num_experts: int, ranks: int, group: str, capacity: int,
    slot: int, sms: int, patience: float,
) -> Four:  # fmt: skip
    """Waits for what `dispatch_start` began; experts are now counted from this rank's first.

    It takes the start's results, and its arguments: a rank's own rows are read where they are.

    Returns:
        rows, ids, weights and came; what was not sent has one dimension and no elements.
    """
    here = experts_here(num_experts, ranks, "dispatch_wait")
    if memory := memory_for(x, expert_ids, given, ranks, group, capacity):
        own, into, came = _begun(memory, slot, "dispatch_start")
        hopper_exchange.receive(Exchange(memory, slot, capacity, sms, patience), own, sent, into, came, here)
        return (*_results(x, into), came)
    return collective_exchange.dispatch_wait(rows, ids, weights, token, here, ranks, group, capacity)


def fake_dispatch_wait(
    rows: Tensor, ids: Tensor, weights: Tensor, token: Tensor, x: Tensor, expert_ids: Tensor | None,
    given: Tensor | None, sent: Tensor, home: Tensor, *, num_experts: int, ranks: int, group: str, capacity: int,
    slot: int, sms: int, patience: float,
) -> Four:  # fmt: skip
    """The shapes of `dispatch_wait`."""
    experts_here(num_experts, ranks, "dispatch_wait")
    came = came_like(x, expert_ids, given, sent, ranks=ranks, group=group, capacity=capacity)
    return (*_in_flight(x, expert_ids, given, ranks * capacity), came)


def came_like(
    x: Tensor, expert_ids: Tensor | None, weights: Tensor | None, sent: Tensor, *, ranks: int, group: str, capacity: int
) -> Tensor:  # fmt: skip
    """The shape of `came`."""
    kernels = by_kernels(x, expert_ids, weights, ranks, group)
    return sent.new_empty(ranks if kernels else collective_exchange.numbers_of_came(ranks, group, capacity))


def came_within(came: Tensor, counts: Tensor, *, room: int) -> Tensor:
    """`came`, or, if more assignments met experts of this rank than `room`, how many, times -1.

    A combine that is given that gives the exchange up: results are NaN on all ranks, and no optimizer of torch's takes
    a step.

    Args:
        came: of `dispatch_wait`.
        counts: (E,) of `plan`.
        room: for so many rows.
    """
    if not came.is_cuda and (met := int(counts.sum())) > room:
        give_up(too_many(distributed.get_rank(), met, room))
    return within(came, counts, room)


def within(came: Tensor, counts: Tensor, room: int) -> Tensor:
    """The same, of which the host knows nothing."""
    met = counts.sum(dtype=torch.int32)
    return torch.where(met > room, -met, came)


def fake_came_within(came: Tensor, counts: Tensor, *, room: int) -> Tensor:
    """Its shape."""
    return torch.empty_like(came)


def after(what: Tensor, done: Tensor) -> Tensor:
    """A copy of a small tensor, which is there when `done` is: what reads it comes after that in any order of a graph.

    Args:
        what: integers.
        done: anything.
    """
    return what.clone()


def fake_after(what: Tensor, done: Tensor) -> Tensor:
    """Its shape."""
    return torch.empty_like(what)


def combine_start(
    y: Tensor, weights: Tensor | None, came: Tensor, sent: Tensor, home: Tensor, *, ranks: int, group: str,
    capacity: int, slot: int, sms: int, patience: float, aside: bool = False,
) -> Three:  # fmt: skip
    """Begins to send back what became of each row, (R * C, H), and what belongs to its experts, (R * C, K), or None.

    Returns:
        handles, for `combine_wait` alone, the second of one dimension for None; and a token for the exchange.
    """
    memory = memory_for(y, None, weights, ranks, group, capacity)
    if memory is not None:
        rows = Rows.of(y.contiguous(), None, weights)
        into = rows.room(home.shape[0])
        started = _send(Exchange(memory, slot, capacity, sms, patience), rows, None, came, aside)
        memory.begun[slot] = started, rows, into
        back, _, along, token = _handles(y, None, weights, home.shape[0])
        return back, along, token
    return collective_exchange.combine_start(y, weights, came, ranks, group)


def fake_combine_start(
    y: Tensor, weights: Tensor | None, came: Tensor, sent: Tensor, home: Tensor, *, ranks: int, group: str,
    capacity: int, slot: int, sms: int, patience: float, aside: bool = False,
) -> Three:  # fmt: skip
    """The shapes of `combine_start`."""
    if by_kernels(y, None, weights, ranks, group):
        back, _, along, token = _handles(y, None, weights, home.shape[0])
    else:
        back, _, along = _in_flight(y, None, weights, y.shape[0])
        token = collective_exchange.token_like(y, ranks, group, capacity)
    return back, along, token


def combine_wait(
    back: Tensor, of_weights: Tensor, token: Tensor, y: Tensor, weights: Tensor | None, sent: Tensor, home: Tensor, *,
    ranks: int, group: str, capacity: int, slot: int, sms: int, patience: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Waits for what `combine_start` began, and sums it: over ranks in their order, in float32, rounded once.

    It takes the start's results, and its arguments: a rank's own rows are read where they are.

    Returns:
        (T, H) and (T, K), of the dtypes of what came; the latter of one dimension, without elements, if nothing came.
    """
    if memory := memory_for(y, None, weights, ranks, group, capacity):
        own, into = _begun(memory, slot, "combine_start")
        hopper_exchange.home(Exchange(memory, slot, capacity, sms, patience), home, own, into)
        sums, _, along = _results(y, into)
        return sums, along
    return collective_exchange.combine_wait(back, of_weights, token, home, ranks, group)


def fake_combine_wait(
    back: Tensor, of_weights: Tensor, token: Tensor, y: Tensor, weights: Tensor | None, sent: Tensor, home: Tensor, *,
    ranks: int, group: str, capacity: int, slot: int, sms: int, patience: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The shapes of `combine_wait`."""
    sums, _, along = _in_flight(y, None, weights, home.shape[0])
    return sums, along


def by_kernels(x: Tensor, ids: Tensor | None, weights: Tensor | None, ranks: int, group: str) -> bool:
    """Whether moecompile's kernels exchange such rows: the same answer on all ranks, and of example values."""
    if not hopper_exchange.serves(x.device) or not hopper_exchange.takes(x, ids, weights, ranks):
        return False
    return reaches_peers(group, x.device)


def memory_for(
    x: Tensor, ids: Tensor | None, weights: Tensor | None, ranks: int, group: str, capacity: int, back: int = 0
) -> PeerMemory | None:
    """What the kernels write to, rows of `back` bytes too; None if they do not exchange such rows."""
    if not by_kernels(x, ids, weights, ranks, group):
        return None
    pitch = max(hopper_exchange.pitch_of(x.shape[1], x.dtype, ids, weights), -(-back // 16) * 16)
    return memory_of(group, room_for(ranks, capacity, pitch))


def _begun(memory: PeerMemory, slot: int, operator: str) -> tuple[Any, ...]:
    """What was kept when the exchange in that slot began."""
    if slot not in memory.begun:
        raise RuntimeError(f"moecompile: slot {slot} has no exchange that moecompile::{operator} has begun")
    aside, *kept = memory.begun.pop(slot)
    if aside is not None:  # on the other stream: what it reads may be somebody else's memory next
        wait_for(torch.cuda.current_stream(aside[0].device), memory.side)
    return tuple(kept)


def _send(
    exchange: Exchange, rows: Rows, sent: Tensor | None, came: Tensor | None, aside: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Sends rows; `aside` on another stream: then it returns what has to be kept until the wait.

    That is what its blocks count as they begin, and a copy of `came`, which the wait is not given.
    """
    if not aside:
        hopper_exchange.send(exchange, rows, sent, came)
        return None
    main, side = torch.cuda.current_stream(rows.values.device), exchange.memory.side
    started, came = rows.values.new_zeros(1, dtype=torch.int32), None if came is None else came.clone()
    wait_for(side, main)
    with torch.cuda.stream(side):
        hopper_exchange.send(exchange, rows, sent, came, started=started, early=False)
    hopper_exchange.await_start(exchange, started)
    return started, came


def _handles(x: Tensor, ids: Tensor | None, weights: Tensor | None, rows: int) -> Four:
    """Of what the kernels send: no memory, in the shape of the gradients that the reverse exchange will be given."""

    def alike(each: Tensor | None, dtype: torch.dtype) -> Tensor:
        if each is None:
            return x.new_empty(0, dtype=dtype)
        return each.new_empty((1, 1), dtype=dtype).expand(rows, each.shape[1])

    return (
        alike(x, x.dtype),
        alike(ids, torch.int32),
        alike(weights, x.dtype if weights is None else weights.dtype),
        x.new_empty(0),
    )


def _in_flight(x: Tensor, ids: Tensor | None, weights: Tensor | None, rows: int) -> Three:
    """Of so many rows that other ranks send."""
    return (
        x.new_empty((rows, x.shape[1])),
        x.new_empty(0, dtype=torch.int32) if ids is None else ids.new_empty((rows, ids.shape[1]), dtype=torch.int32),
        x.new_empty(0) if weights is None else weights.new_empty((rows, weights.shape[1])),
    )


def _results(x: Tensor, into: Rows) -> Three:
    """What has come, as the operators return it."""
    return (
        into.values,
        x.new_empty(0, dtype=torch.int32) if into.ids is None else into.ids,
        x.new_empty(0) if into.weights is None else into.weights,
    )


def _check_ids(expert_ids: Tensor, num_experts: int, ranks: int) -> int:
    if expert_ids.dtype not in INTEGERS:
        raise TypeError(f"moecompile::exchange_plan: expert_ids must hold integers, got dtype {expert_ids.dtype}")
    if expert_ids.dim() != 2:
        shape = tuple(expert_ids.shape)
        raise ValueError(
            f"moecompile::exchange_plan: expert_ids must have shape (tokens, experts per token), got {shape}"
        )
    return experts_here(num_experts, ranks, "exchange_plan")


def _check_rows(x: Tensor, sent: Tensor, operator: str) -> None:
    if x.dim() != 2 or sent.dim() != 1:
        shapes = f"{tuple(x.shape)} and {tuple(sent.shape)}"
        raise ValueError(f"moecompile::{operator}: expected x (T, H) and sent (ranks * capacity,), got {shapes}")
