"""Parameters of experts that are spread over ranks: gathered for whoever reads them as the model does, or one's own.

Forward `gather_experts` gathers all ranks' parts; backward each rank gets the sum of all ranks' gradients of its own,
or their mean. Where experts are found, moecompile exchanges tokens instead, and it goes (passes/expert_parallel.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import _resolve_process_group


def process_group(name: str) -> distributed.ProcessGroup:
    """Of that name, as operators of graphs are given it."""
    found: distributed.ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]
    return found


def gather_experts(local: Tensor, *, ranks: int, group: str, mean: bool) -> Tensor:
    """All ranks' experts (E, ...), in the order of ranks.

    Args:
        local: (E / ranks, ...) this rank's, of the same shape on all.
        ranks: of the group.
        group: its name.
        mean: whether a gradient is the mean of the ranks' gradients, as DDP and FSDP make it of others; else their sum.
    """
    whole = torch.ops._c10d_functional.all_gather_into_tensor(local.contiguous(), ranks, group)
    found: Tensor = torch.ops._c10d_functional.wait_tensor(whole)
    return found


def fake_gather_experts(local: Tensor, *, ranks: int, group: str, mean: bool) -> Tensor:
    """The shape of `gather_experts`."""
    return local.new_empty((local.shape[0] * ranks, *local.shape[1:]))


def scatter_gradient(grad: Tensor, *, ranks: int, group: str, mean: bool) -> Tensor:
    """The derivative of `gather_experts`: of the ranks' gradients (E, ...) this rank's part of their sum or mean."""
    if grad.shape[0] % ranks:
        raise ValueError(
            f"moecompile::scatter_gradient: expected whole parts for {ranks} ranks, got {tuple(grad.shape)}"
        )
    started = torch.ops._c10d_functional.reduce_scatter_tensor(grad.contiguous(), "sum", ranks, group)
    found: Tensor = torch.ops._c10d_functional.wait_tensor(started)
    return found.div_(ranks) if mean else found


def fake_scatter_gradient(grad: Tensor, *, ranks: int, group: str, mean: bool) -> Tensor:
    """The shape of `scatter_gradient`."""
    return grad.new_empty((grad.shape[0] // ranks, *grad.shape[1:]))


def own_experts(whole: Tensor, *, ranks: int, group: str) -> Tensor:
    """This rank's part of a parameter that every rank has whole: (E, ...) in, (E / ranks, ...) out, a copy."""
    here = whole.shape[0] // ranks
    first = here * distributed.get_rank(process_group(group))
    return whole[first : first + here].clone()


def fake_own_experts(whole: Tensor, *, ranks: int, group: str) -> Tensor:
    """The shape of `own_experts`."""
    if whole.shape[0] % ranks:
        raise ValueError(f"moecompile::own_experts: expected whole parts for {ranks} ranks, got {tuple(whole.shape)}")
    return whole.new_empty((whole.shape[0] // ranks, *whole.shape[1:]))


def among_others(own: Tensor, *, ranks: int, group: str) -> Tensor:
    """The derivative of `own_experts`: this rank's part, with zeros in the place of the others'."""
    first = own.shape[0] * distributed.get_rank(process_group(group))
    whole = own.new_zeros((own.shape[0] * ranks, *own.shape[1:]))
    whole[first : first + own.shape[0]] = own
    return whole


def fake_among_others(own: Tensor, *, ranks: int, group: str) -> Tensor:
    """The shape of `among_others`."""
    return own.new_empty((own.shape[0] * ranks, *own.shape[1:]))
