"""Readable torch reference of `plan` and `experts`, for the CPU and any GPU; `moecompile.runtime.backward` goes back.

Rows are assignments of a token to an expert, sorted by expert. The walk over the experts (`moecompile.runtime.grouped`)
is a few at a time on the CPU, so that their rows stay in cache between the two GEMMs, and all experts at once in
grouped GEMMs on other devices, where the host never asks how many rows an expert got.

    row = input(x, weight)        hidden = row @ w_in + b_in        a = activation(hidden, weight)
    y = a @ w_out + b_out         z = output(y, weight)             result[token] = sum of its rows' z
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.runtime.combine import weighted_sum
from moecompile.runtime.contract import Arguments
from moecompile.runtime.elementwise import evaluate
from moecompile.runtime.grouped import Group, Walk, groups, part


def plan(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, offsets, slots and order of `moecompile::plan`: a stable sort by expert, without atomics."""
    flat = expert_ids.reshape(-1).to(torch.int64)
    _check_range(flat, num_experts)
    sorted_key, assignment = torch.sort(torch.where(flat < 0, num_experts, flat), stable=True)
    experts = torch.arange(num_experts, device=flat.device)
    offsets = torch.searchsorted(sorted_key, experts, right=True, out_int32=True)
    counts = offsets.clone()
    counts[1:] -= offsets[:-1]
    row = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    used = row < offsets[-1]
    order = torch.where(used, assignment.to(torch.int32), -1)
    slots = torch.empty_like(row).scatter_(0, assignment, torch.where(used, row, -1))
    return counts, offsets, slots.view(expert_ids.shape), order


def _check_range(ids: Tensor, num_experts: int) -> None:
    if ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if ids.device.type != "cpu":  # naming the id would make the host wait for the device
        message = f"moecompile::plan: an expert id is outside [0, {num_experts}) and not -1 (no expert)"
        torch._assert_async((low >= -1) & (high < num_experts), message)
        return
    for found in (int(low), int(high)):
        if not -1 <= found < num_experts:
            raise IndexError(
                f"moecompile::plan: expert id {found} is outside [0, {num_experts}), num_experts={num_experts}; "
                "mark a token that goes to no expert with id -1, or pass the number of experts that the ids count to"
            )


def experts(args: Arguments) -> Tensor:
    """The result of `moecompile::experts`, (T, H2)."""
    return _forward(args, save=False)[0]


def experts_forward(args: Arguments) -> tuple[Tensor, Tensor]:
    """The result, (T, H2), and the pre-activation rows in expert order, (T*K, N): gate then up if separate."""
    result, hidden = _forward(args, save=True)
    assert hidden is not None
    return result, hidden


def walk_over(args: Arguments) -> Walk:
    """The groups of rows in which this device computes the experts."""
    return groups(args.offsets, args.order, args.slots.shape[1], args.width * args.dtypes.hidden.itemsize)


def _forward(args: Arguments, save: bool) -> tuple[Tensor, Tensor | None]:
    walk = walk_over(args)
    weight_of = None if args.weights is None else args.weights.reshape(-1)
    hidden = walk.room(args.x, args.width, args.dtypes.hidden) if save else None
    out = walk.room(args.x, args.out_features, args.dtypes.out)
    for group in walk:
        leaves = group.leaves(args.x, weight_of)
        pre = _gemm1(args, group, evaluate(args.input, leaves), part(hidden, group))
        a = evaluate(args.activation, leaves | gate_and_up(args, pre))
        y = group.linear(a, args.w_out, args.w_out_transposed, args.b_out, part(out, group))
        if out is None:
            hidden, out = pre, y
    assert out is not None
    if hidden is not None:
        walk.clear_rest(hidden)
    return weighted_sum(args, out, walk.complete), hidden


def _gemm1(args: Arguments, group: Group, row: Tensor, into: Tensor | None) -> Tensor:
    if args.w_up is None:
        return group.linear(row, args.w_in, args.w_in_transposed, args.b_in, into)
    if into is None:
        into = row.new_empty((row.shape[0], args.width), dtype=args.dtypes.hidden)
    group.linear(row, args.w_in, args.w_in_transposed, args.b_in, into[:, : args.intermediate])
    group.linear(row, args.w_up, args.w_in_transposed, args.b_up, into[:, args.intermediate :])
    return into


def gate_and_up(args: Arguments, hidden: Tensor) -> dict[str, Tensor]:
    """The activation's leaves in hidden rows (n, N): `gate` and `up` (n, I) each, or `hidden`."""
    if args.gate_up == "single":
        return {"hidden": hidden}
    if args.gate_up == "interleaved":  # packed, because elementwise kernels are slow on every other element
        return {"gate": hidden[:, 0::2].contiguous(), "up": hidden[:, 1::2].contiguous()}
    return {"gate": hidden[:, : args.intermediate], "up": hidden[:, args.intermediate :]}
