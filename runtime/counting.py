"""`moecompile::count_experts`: how many assignments each expert has, without a layout of rows and without the host."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.runtime.contract import check_plan
from moecompile.runtime.reference import check_range


def count_experts(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Assignments of each expert, (E,) int32: the counts of `plan`.

    Integers are added, so that the order of additions does not matter.

    Args:
        expert_ids: (T, K) integers; -1 means no expert.
        num_experts: that the ids count to.

    Raises:
        TypeError: no integers.
        ValueError: another shape, or no experts.
        IndexError: on the CPU, an id that no expert has; elsewhere the device asserts.
    """
    check_plan(expert_ids, num_experts, operator="count_experts")
    flat = expert_ids.reshape(-1).to(torch.int64)
    if flat.device.type == "cpu":
        check_range(flat, num_experts, "count_experts")
    chosen = flat != -1
    counts = torch.zeros(num_experts, dtype=torch.int32, device=flat.device)
    # an id that no expert has stays one here: scatter_add_ asserts on the device
    return counts.scatter_add_(0, torch.where(chosen, flat, 0), chosen.to(torch.int32))


def fake_count_experts(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Shape and dtype of the counts."""
    check_plan(expert_ids, num_experts, operator="count_experts")
    return expert_ids.new_empty((num_experts,), dtype=torch.int32)
