"""Rows over torch's functional collectives: what the token exchange is made of where no kernel does it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def taken(each: Tensor, token: Tensor, fill: int) -> Tensor:
    """Rows of these tokens, and of that value where there is none."""
    if not each.shape[0]:
        return each.new_full((token.shape[0], each.shape[1]), fill)
    return torch.where(token.unsqueeze(1) < 0, fill, each.index_select(0, token.clamp(min=0)))


def added(total: Tensor, rows: Tensor, place: Tensor) -> None:
    """Adds to each line of `total` the row of that place; nothing where there is none."""
    if rows.shape[0]:
        total += torch.where(place.unsqueeze(1) < 0, 0, rows.index_select(0, place.clamp(min=0).long()))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What rows of that dtype are summed in."""
    return torch.promote_types(dtype, torch.float32)


def kept(rows: Tensor) -> Tensor:
    """A copy, which is there until the collective that sends it ends."""
    return rows.clone(memory_format=torch.contiguous_format)


def all_to_all(rows: Tensor, ranks: int, group: str, among: Sequence[int] | None = None) -> Tensor:
    """The parts that ranks have for this one, in flight.

    Args:
        rows: for each of them as many, in their order.
        ranks: of the group.
        group: its name.
        among: those that exchange anything, this one among them; None for all.
    """
    members = range(ranks) if among is None else among
    parts = [rows.shape[0] // len(members) if rank in members else 0 for rank in range(ranks)]
    found: Tensor = torch.ops._c10d_functional.all_to_all_single(rows, parts, parts, group)
    return found


def arrived(rows: Tensor) -> Tensor:
    """What has come, in memory of its own: operators return nothing of their arguments."""
    return torch.ops._c10d_functional.wait_tensor(rows).clone()
