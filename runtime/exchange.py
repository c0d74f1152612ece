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
    came (R,) int32         how many rows a combine has to send back to each rank, at least those that came from it

On Hopper GPUs with access to each other's memory moecompile's kernels do it (`moecompile.runtime.hopper_exchange`).
Elsewhere each rank sends C rows to each, over torch's functional collectives: slow, and right. What a start gives is a
handle: with the kernels it has no rows, and with collectives those that are in flight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from moecompile.runtime import hopper_exchange
from moecompile.runtime.contract import INTEGERS
from moecompile.runtime.peer_memory import PeerMemory, memory_of, reaches_peers, room_for
from moecompile.runtime.reference import check_range
from moecompile.runtime.sharded import process_group

Three = tuple[Tensor, Tensor, Tensor]


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
    capacity: int, slot: int,
) -> Three:  # fmt: skip
    """Begins to send each token to the ranks of its experts, with its experts and their weights where they are given.

    Args:
        x: (T, H).
        expert_ids: (T, K) or None.
        weights: (T, K) or None.
        sent: of `exchange_plan`.
        home: of `exchange_plan`, for the derivative.
        ranks: R.
        group: the name of the process group.
        capacity: C.
        slot: of the kernels' memory, which no other exchange may have before `dispatch_wait`.

    Returns:
        handles of rows, ids and weights, for `dispatch_wait` alone; of one dimension for what is None.
    """
    _check_rows(x, sent, "dispatch_start")
    memory = _memory(x, expert_ids, weights, ranks, group, capacity)
    if memory is not None:
        lines = x if x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 else x.contiguous()
        hopper_exchange.send(memory, slot, capacity, lines, sent, None, expert_ids, weights)
        return _handles(x, expert_ids, weights, 0)
    ids = None if expert_ids is None else expert_ids.to(torch.int32)
    token = sent.long()
    rows, found, given = (
        x.new_empty(0) if each is None else _all_to_all(_taken(each, token, fill), ranks, group)
        for each, fill in ((x, 0), (ids, -1), (weights, 0))
    )
    return rows, found if ids is not None else found.to(torch.int32), given


def fake_dispatch_start(
    x: Tensor, expert_ids: Tensor | None, weights: Tensor | None, sent: Tensor, home: Tensor, *, ranks: int, group: str,
    capacity: int, slot: int,
) -> Three:  # fmt: skip
    """The shapes of `dispatch_start`."""
    _check_rows(x, sent, "dispatch_start")
    return _handles(x, expert_ids, weights, 0 if _by_kernels(x, expert_ids, weights, ranks, group) else sent.shape[0])


def dispatch_wait(
    rows: Tensor, ids: Tensor, weights: Tensor, *, num_experts: int, ranks: int, group: str, capacity: int, slot: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Waits for what `dispatch_start` began; experts are now counted from this rank's first."""
    here = experts_here(num_experts, ranks, "dispatch_wait")
    if not rows.shape[0]:
        memory = _memory(
            rows, ids if ids.dim() == 2 else None, weights if weights.dim() == 2 else None, ranks, group, capacity
        )
        assert memory is not None  # nobody else gives handles without rows
        top_k = ids.shape[1] if ids.dim() == 2 else weights.shape[1] if weights.dim() == 2 else 0
        dtype = weights.dtype if weights.dim() == 2 else None
        out, found, given, came = hopper_exchange.receive(
            memory, slot, capacity, rows, rows.shape[1], top_k, dtype, ids.dim() == 2, here
        )
        return out, ids.clone() if found is None else found, weights.clone() if given is None else given, came
    came = torch.full((ranks,), capacity, dtype=torch.int32, device=rows.device)
    rows, ids, weights = (_wait(each) if each.dim() == 2 else each.clone() for each in (rows, ids, weights))
    first = here * distributed.get_rank(process_group(group))
    return rows, torch.where((ids >= first) & (ids < first + here), ids - first, -1), weights, came


def fake_dispatch_wait(
    rows: Tensor, ids: Tensor, weights: Tensor, *, num_experts: int, ranks: int, group: str, capacity: int, slot: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shapes of `dispatch_wait`."""
    experts_here(num_experts, ranks, "dispatch_wait")
    made = (
        each.new_empty((ranks * capacity, each.shape[1])) if each.dim() == 2 else each.new_empty(0)
        for each in (rows, ids, weights)
    )
    of_rows, of_ids, of_weights = made
    return of_rows, of_ids, of_weights, rows.new_empty(ranks, dtype=torch.int32)


def combine_start(
    y: Tensor, weights: Tensor | None, came: Tensor, *, ranks: int, group: str, capacity: int, slot: int
) -> tuple[Tensor, Tensor]:
    """Begins to send back what became of each row, (R * C, H), and what belongs to its experts, (R * C, K), or None.

    Returns:
        handles, for `combine_wait` alone; the second of one dimension for None.
    """
    memory = _memory(y, None, weights, ranks, group, capacity)
    if memory is not None:
        hopper_exchange.send(memory, slot, capacity, y.contiguous(), None, came, None, weights)
        back, _, along = _handles(y, None, weights, 0)
        return back, along
    return (
        _all_to_all(y.contiguous(), ranks, group),
        y.new_empty(0) if weights is None else _all_to_all(weights.contiguous(), ranks, group),
    )


def fake_combine_start(
    y: Tensor, weights: Tensor | None, came: Tensor, *, ranks: int, group: str, capacity: int, slot: int
) -> tuple[Tensor, Tensor]:
    """The shapes of `combine_start`."""
    back, _, along = _handles(y, None, weights, 0 if _by_kernels(y, None, weights, ranks, group) else y.shape[0])
    return back, along


def combine_wait(
    y: Tensor, weights: Tensor, sent: Tensor, home: Tensor, *, ranks: int, group: str, capacity: int, slot: int
) -> tuple[Tensor, Tensor]:
    """Waits for what `combine_start` began, and sums it: over ranks in their order, in float32, rounded once.

    `sent` serves the derivative.

    Returns:
        (T, H) and (T, K), of the dtypes of what came; the latter of one dimension, without elements, if nothing came.
    """
    if not y.shape[0]:
        memory = _memory(y, None, weights if weights.dim() == 2 else None, ranks, group, capacity)
        assert memory is not None  # nobody else gives handles without rows
        top_k, dtype = (weights.shape[1], weights.dtype) if weights.dim() == 2 else (0, None)
        sums, of_weights = hopper_exchange.home(memory, slot, capacity, home, y, y.shape[1], top_k, dtype)
        return sums, weights.clone() if of_weights is None else of_weights
    return _summed(_wait(y), home, ranks), _summed(
        _wait(weights), home, ranks
    ) if weights.dim() == 2 else weights.clone()


def fake_combine_wait(
    y: Tensor, weights: Tensor, sent: Tensor, home: Tensor, *, ranks: int, group: str, capacity: int, slot: int
) -> tuple[Tensor, Tensor]:
    """The shapes of `combine_wait`."""
    tokens = home.shape[0]
    return (
        y.new_empty((tokens, y.shape[1])),
        weights.new_empty((tokens, weights.shape[1])) if weights.dim() == 2 else weights.new_empty(0),
    )


def _by_kernels(x: Tensor, ids: Tensor | None, weights: Tensor | None, ranks: int, group: str) -> bool:
    """Whether moecompile's kernels exchange such rows: the same answer on all ranks, and of example values."""
    return _pitch(x, ids, weights, ranks) is not None and reaches_peers(group, x.device)


def _pitch(x: Tensor, ids: Tensor | None, weights: Tensor | None, ranks: int) -> int | None:
    """Bytes of a row with what travels behind it; None if the kernels do not take it."""
    if not hopper_exchange.serves(x.device) or not hopper_exchange.takes(x, ids, weights, ranks):
        return None
    return hopper_exchange.pitch_of(x.shape[1], x.dtype, ids, weights)


def _memory(
    x: Tensor, ids: Tensor | None, weights: Tensor | None, ranks: int, group: str, capacity: int
) -> PeerMemory | None:
    """What the kernels write to; None if they do not exchange such rows."""
    pitch = _pitch(x, ids, weights, ranks)
    if pitch is None or not reaches_peers(group, x.device):
        return None
    return memory_of(group, room_for(ranks, capacity, pitch), hopper_exchange.CHANNELS_USED)


def _handles(x: Tensor, ids: Tensor | None, weights: Tensor | None, rows: int) -> Three:
    """Of what is sent with so many rows in flight."""
    return (
        x.new_empty((rows, x.shape[1])),
        x.new_empty(0 if ids is None else (rows, ids.shape[1]), dtype=torch.int32),
        x.new_empty(0) if weights is None else weights.new_empty((rows, weights.shape[1])),
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


def _taken(each: Tensor, token: Tensor, fill: int) -> Tensor:
    """Rows of these tokens, and of that value where there is none."""
    if not each.shape[0]:
        return each.new_full((token.shape[0], each.shape[1]), fill)
    return torch.where(token.unsqueeze(1) < 0, fill, each.index_select(0, token.clamp(min=0)))


def _summed(rows: Tensor, home: Tensor, ranks: int) -> Tensor:
    """Of each token, what came from all ranks."""
    parts, tokens = rows.view(ranks, -1, rows.shape[1]), home.shape[0]
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros((tokens, rows.shape[1]), dtype=wide, device=rows.device)
    for part, place in zip(parts, home.long().unbind(1), strict=True):
        if part.shape[0]:
            total += torch.where(place.unsqueeze(1) < 0, 0, part.index_select(0, place.clamp(min=0)))
    return total.to(rows.dtype)


def _all_to_all(rows: Tensor, ranks: int, group: str) -> Tensor:
    """The parts that all ranks have for this one, in flight."""
    parts: Sequence[int] = [rows.shape[0] // ranks] * ranks
    found: Tensor = torch.ops._c10d_functional.all_to_all_single(rows, parts, parts, group)
    return found


def _wait(rows: Tensor) -> Tensor:
    """What has come, in memory of its own: operators return nothing of their arguments."""
    return torch.ops._c10d_functional.wait_tensor(rows).clone()
