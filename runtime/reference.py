"""Readable torch reference of `plan` and `experts`, for the CPU and any GPU; `moecompile.runtime.backward` goes back.

Rows are assignments of a token to an expert, sorted by expert (`moecompile.runtime.grouped`):

    row = input(x, weight)        hidden = row @ w_in + b_in        a = activation(hidden, weight)
    y = a @ w_out + b_out         z = output(y, weight)             result[token] = sum of its rows' z

The products run over all rows at once; on the CPU the elementwise work between them runs over chunks of rows that stay
in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moecompile.runtime.combine import weighted_sum
from moecompile.runtime.contract import Arguments
from moecompile.runtime.elementwise import evaluate
from moecompile.runtime.grouped import CpuRows, DeviceRows, rows_of


def plan(expert_ids: Tensor, num_experts: int, room: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, offsets, slots and order of `moecompile::plan`: a stable sort by expert, without atomics."""
    flat = expert_ids.reshape(-1).to(torch.int64)
    check_range(flat, num_experts, "plan")
    sorted_key, assignment = torch.sort(torch.where(flat < 0, num_experts, flat), stable=True)
    experts = torch.arange(num_experts, device=flat.device)
    offsets = torch.searchsorted(sorted_key, experts, right=True, out_int32=True)
    counts = offsets.clone()
    counts[1:] -= offsets[:-1]
    if room is not None:
        offsets = offsets.clamp(max=room)
    row = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    used = row < offsets[-1]
    order = torch.where(used, assignment.to(torch.int32), -1)
    slots = torch.empty_like(row).scatter_(0, assignment, torch.where(used, row, -1))
    return counts, offsets, slots.view(expert_ids.shape), order if room is None else order[:room].clone()


def check_range(ids: Tensor, num_experts: int, operator: str) -> None:
    """Raises IndexError on the CPU, and asserts on other devices, that each id is an expert's or -1."""
    if ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if ids.device.type != "cpu":  # naming the id would make the host wait for the device
        message = f"moecompile::{operator}: an expert id is outside [0, {num_experts}) and not -1 (no expert)"
        torch._assert_async((low >= -1) & (high < num_experts), message)
        return
    for found in (int(low), int(high)):
        if not -1 <= found < num_experts:
            raise IndexError(
                f"moecompile::{operator}: expert id {found} is outside [0, {num_experts}), num_experts={num_experts}; "
                "mark a token that goes to no expert with id -1, or pass the number of experts that the ids count to"
            )


def forward(args: Arguments, save: bool) -> tuple[Tensor, Tensor | None]:
    """The result, (T, H2), and, to save, GEMM1's rows in expert order, (T*K, N): gate then up if separate."""
    rows = rows_for(args)
    leaves = rows.leaves(args.x, args.weights)
    hidden = _gemm1(args, rows, leaves)
    a = activate(args, leaves, hidden, rows.chunks())
    out = rows.linear(a, args.w_out, args.w_out_transposed, args.b_out)
    saved = rows.every(hidden, args.rows) if save else None
    return weighted_sum(args, out, rows.complete), saved


def hidden_rows(args: Arguments) -> Tensor:
    """GEMM1's rows in expert order, (T*K, N), as `forward` computes and saves them."""
    rows = rows_for(args)
    return rows.every(_gemm1(args, rows, rows.leaves(args.x, args.weights)), args.rows)


def _gemm1(args: Arguments, rows: CpuRows | DeviceRows, leaves: Mapping[str, Tensor]) -> Tensor:
    """GEMM1's rows, of those that have an expert: gate then up if separate."""
    row = feed(args, leaves, rows.chunks())
    hidden = rows.linear(row, args.w_in, args.w_in_transposed, args.b_in)
    if args.w_up is None:
        return hidden
    return torch.cat((hidden, rows.linear(row, args.w_up, args.w_in_transposed, args.b_up)), 1)


def rows_for(args: Arguments) -> CpuRows | DeviceRows:
    """The rows of a call, in expert order."""
    bytes_per_row = args.width * args.dtypes.hidden.itemsize
    rows = rows_of(args.offsets, args.order, args.slots.shape[1], bytes_per_row, args.kernels)
    rows.complete = rows.complete and args.rows == args.slots.numel()  # else some may have found no room
    return rows


def feed(args: Arguments, leaves: Mapping[str, Tensor], chunks: Sequence[slice]) -> Tensor:
    """The value of the input expression, (R, H): what GEMM1 multiplies."""
    if args.input == "x":
        return leaves["x"]
    return by_chunk(
        chunks,
        lambda: leaves["x"].new_empty(leaves["x"].shape, dtype=args.dtypes.row),
        lambda chunk, into: evaluate(args.input, part(leaves, chunk), into),
    )


def activate(args: Arguments, leaves: Mapping[str, Tensor], hidden: Tensor, chunks: Sequence[slice]) -> Tensor:
    """The value of the activation, (R, I): what GEMM2 multiplies."""
    return by_chunk(
        chunks,
        lambda: hidden.new_empty((hidden.shape[0], args.intermediate), dtype=args.dtypes.activation),
        lambda chunk, into: evaluate(args.activation, part(leaves, chunk) | gate_and_up(args, hidden[chunk]), into),
    )


def by_chunk(
    chunks: Sequence[slice], room: Callable[[], Tensor], compute: Callable[[slice, Tensor | None], Tensor]
) -> Tensor:
    """What compute(chunk, into) gives for all chunks; several are written to their parts of `room`."""
    if len(chunks) == 1:
        return compute(chunks[0], None)
    whole = room()
    for chunk in chunks:
        compute(chunk, whole[chunk])
    return whole


def part(leaves: Mapping[str, Tensor], chunk: slice) -> dict[str, Tensor]:
    """The chunk of each leaf."""
    return {name: leaf[chunk] for name, leaf in leaves.items()}


def gate_and_up(args: Arguments, hidden: Tensor) -> dict[str, Tensor]:
    """The activation's leaves in hidden rows (n, N): `gate` and `up` (n, I) each, or `hidden`."""
    found = features(args, hidden)
    if args.gate_up == "interleaved":  # packed, because elementwise kernels are slow on every other element
        return {name: feature.contiguous() for name, feature in found.items()}
    return found


def features(args: Arguments, hidden: Tensor) -> dict[str, Tensor]:
    """Views of the hidden rows (n, N) where `gate` and `up`, or `hidden`, lie."""
    if args.gate_up == "single":
        return {"hidden": hidden}
    if args.gate_up == "interleaved":
        return {"gate": hidden[:, 0::2], "up": hidden[:, 1::2]}
    return {"gate": hidden[:, : args.intermediate], "up": hidden[:, args.intermediate :]}


def joined(gate_up: str, parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gate and up (n, I) each, or all there is, as GEMM1's matrices give them: "in" (n, N), and "up" if separate."""
    match gate_up:
        case "single":
            return {"in": parts[0]}
        case "separate":
            return {"in": parts[0], "up": parts[1]}
        case "interleaved":
            return {"in": torch.stack(tuple(parts), 2).flatten(1)}
        case _:
            return {"in": torch.cat(tuple(parts), 1)}
