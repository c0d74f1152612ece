"""The token exchange on Hopper GPUs that write into each other's memory: codegen/kernels/exchange_*.cuh, launched.

`moecompile.runtime.exchange` says what each of them computes. Nothing here waits for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecompile.codegen.instances import IDS, ExchangeHome, ExchangePlan, ExchangeReceive, ExchangeSend
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.launch import Launch, load
from moecompile.runtime.peer_memory import RANKS, PeerMemory, room_for

WARPS = 4
"""Channels of a block that sends."""
RING = 54 * 1024
"""Bytes of shared memory that a channel has for rows on their way; two at least have to fit."""
CHANNELS_USED = 32
"""Of eight blocks, which move rows as fast as more do (docs/perf.md)."""
READERS = 4
"""Blocks of each multiprocessor that take rows out of the memory, at most: what they read is in this device's own."""
LANES = 32
"""Experts of a token, at most: a lane sees to each."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def serves(device: torch.device) -> bool:
    """Whether the kernels run on that device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def pitch_of(columns: int, dtype: torch.dtype, ids: Tensor | None, weights: Tensor | None) -> int:
    """Bytes of a row with its experts and their weights behind it."""
    top_k = next((each.shape[1] for each in (ids, weights) if each is not None), 0)
    return _pitch(columns * dtype.itemsize, top_k, ids is not None, None if weights is None else weights.dtype)


def _pitch(row: int, top_k: int, with_ids: bool, weights: torch.dtype | None) -> int:
    """The same, of a row of so many bytes."""
    along = (4 if with_ids else 0) + (0 if weights is None else weights.itemsize)
    return -(-(row + top_k * along) // 16) * 16


def takes(x: Tensor, ids: Tensor | None, weights: Tensor | None, ranks: int) -> bool:
    """Whether the kernels exchange rows like x's, with these behind them."""
    along = [each for each in (ids, weights) if each is not None]
    if x.dtype not in DTYPES or x.shape[1] % 8 or ranks > RANKS or any(each.shape[1] > LANES for each in along):
        return False
    return (weights is None or weights.dtype in DTYPES) and 2 * pitch_of(x.shape[1], x.dtype, ids, weights) <= RING


def plan(expert_ids: Tensor, num_experts: int, ranks: int, capacity: int) -> tuple[Tensor, Tensor]:
    """`sent` and `home` of `moecompile::exchange_plan`.

    Args:
        expert_ids: (T, K) of any integer dtype; -1 for none. Another id without an expert is a device-side assertion.
        num_experts: of all ranks, a multiple of their number.
        ranks: at most RANKS.
        capacity: T or more.
    """
    ids = _conformed(expert_ids)
    kernel = load(ExchangePlan(dtype_name(ids.dtype)), ids.device.index)
    tokens, top_k = ids.shape
    sent = ids.new_empty(ranks * capacity, dtype=torch.int32)
    home = ids.new_empty((tokens, ranks), dtype=torch.int32)
    blocks = max(1, -(-tokens // kernel.threads))
    Launch(kernel, blocks, (ids, sent, home, tokens, top_k, num_experts // ranks, ranks, capacity)).run()
    return sent, home


def send(
    memory: PeerMemory, slot: int, capacity: int, x: Tensor, sent: Tensor | None, came: Tensor | None,
    ids: Tensor | None, weights: Tensor | None,
) -> None:  # fmt: skip
    """Writes rows into the memory of the ranks that are to have them, and says so.

    Args:
        memory: of this rank.
        slot: of the exchange.
        capacity: rows of each rank at most.
        x: (T, H), or (ranks * capacity, H) where `sent` is None; rows contiguous.
        sent: of `plan`, or None: the first `came` of each rank's rows go back to it.
        came: (ranks,) int32.
        ids: (T, K) that travel with them, or None.
        weights: (T, K), or None; by row, as ids.
    """
    ids = None if ids is None else _conformed(ids)
    weights = None if weights is None else weights.contiguous()
    along = ids if ids is not None else weights
    kernel = load(ExchangeSend("int64" if ids is None else dtype_name(ids.dtype)), x.device.index)
    row, item = x.shape[1] * x.element_size(), 0 if weights is None else weights.element_size()
    top_k = 0 if along is None else along.shape[1]
    pitch = pitch_of(x.shape[1], x.dtype, ids, weights)
    values = (
        memory.bases, memory.told, x, sent, came, ids, weights, *_where(memory, slot, capacity, pitch), row,
        x.stride(0) * x.element_size(), top_k, item,
    )  # fmt: skip
    Launch(kernel, memory.channels // WARPS, values).run()


def receive(
    memory: PeerMemory, slot: int, capacity: int, like: Tensor, columns: int, top_k: int, weights: torch.dtype | None,
    with_ids: bool, experts: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Rows (ranks * capacity, columns) that came, their experts and weights, and how many came from each rank.

    Args:
        memory: of this rank.
        slot: of the exchange.
        capacity: rows of each rank at most.
        like: a tensor of the rows' dtype, on this device.
        columns: of a row.
        top_k: experts of a token; 0 if nothing travels with the rows.
        weights: their dtype; None if none travel.
        with_ids: whether the tokens' experts do.
        experts: of each rank.
    """
    rows = memory.ranks * capacity
    out = like.new_empty((rows, columns))
    ids = like.new_empty((rows, top_k), dtype=torch.int32) if with_ids else None
    found = None if weights is None else like.new_empty((rows, top_k), dtype=weights)
    came = like.new_empty(memory.ranks, dtype=torch.int32)
    item = 0 if found is None else found.element_size()
    row = columns * out.element_size()
    pitch = _pitch(row, top_k, with_ids, weights)
    kernel = load(ExchangeReceive(), out.device.index)
    values = (
        memory.bases,
        memory.told,
        out,
        ids,
        found,
        came,
        *_where(memory, slot, capacity, pitch),
        row // 16,
        top_k,
        item,
        experts,
    )
    Launch(kernel, min(READERS * kernel.multiprocessors, capacity), values).run()
    return out, ids, found, came


def home(
    memory: PeerMemory, slot: int, capacity: int, places: Tensor, like: Tensor, columns: int, top_k: int,
    weights: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Sums (T, columns) of what came back for each token, and of what travelled with it, (T, top_k).

    Args:
        memory: of this rank.
        slot: of the exchange.
        capacity: rows of each rank at most.
        places: `home` of `plan`, (T, ranks).
        like: a tensor of the rows' dtype, on this device.
        columns: of a row.
        top_k: values that travel with a row.
        weights: their dtype; None if none do.
    """
    tokens = places.shape[0]
    out = like.new_empty((tokens, columns))
    found = None if weights is None else like.new_empty((tokens, top_k), dtype=weights)
    pitch = _pitch(columns * out.element_size(), top_k, False, weights)
    kernel = load(ExchangeHome(dtype_name(out.dtype), dtype_name(weights or torch.float32)), out.device.index)
    blocks = max(1, min(-(-tokens * columns // (8 * kernel.threads)), READERS * kernel.multiprocessors))
    values = (
        memory.bases,
        memory.told,
        places,
        out,
        found,
        *_where(memory, slot, capacity, pitch),
        tokens,
        columns,
        top_k,
    )
    Launch(kernel, blocks, values).run()
    return out, found


def _where(memory: PeerMemory, slot: int, capacity: int, pitch: int) -> tuple[Any, ...]:
    """What every kernel of an exchange is told of it."""
    if room_for(memory.ranks, capacity, pitch) > memory.room:
        raise ValueError(f"moecompile: an exchange of {capacity} rows a rank, of {pitch} bytes, in {memory.room} bytes")
    room, milliseconds = memory.room // 16, max(1, round(memory.patience * 1000))
    return (memory.rank, memory.ranks, slot, room, capacity, pitch, memory.channels, milliseconds)


def _conformed(expert_ids: Tensor) -> Tensor:
    """The ids as the kernels read them."""
    ids = expert_ids.contiguous()
    return ids if dtype_name(ids.dtype) in IDS else ids.to(torch.int64)
