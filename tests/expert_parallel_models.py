"""Models of experts, and what their ranks compare, for checks of several ranks (tests/ranks_in_processes.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import moecompile
from moecompile import agreement
from moecompile.passes import hide
from moecompile.runtime.exchanged import HIDES_FROM

ops = torch.ops.moecompile
EXPERTS, HIDDEN, INNER, TOP_K = 8, 64, 32, 2
MANY = HIDES_FROM * EXPERTS // TOP_K
"""Tokens of a rank from which an exchange is hidden."""


class Experts(nn.Module):
    """Experts stacked in two parameters, sorted rows and grouped products."""

    def __init__(self, hidden: int = HIDDEN, inner: int = INNER) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(EXPERTS, hidden, 2 * inner).bfloat16() / hidden**0.5)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, inner, hidden).bfloat16() / inner**0.5)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=EXPERTS).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(x[order // TOP_K], self.w_in, offs=ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, self.w_out, offs=ends)
        y = y.float() * weights.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x, dtype=torch.float32).index_add_(0, order // TOP_K, y).to(x.dtype)


class Block(nn.Module):
    """A router and its experts."""

    def __init__(self, hidden: int = HIDDEN, inner: int = INNER) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, EXPERTS, bias=False, dtype=torch.bfloat16)
        self.experts = Experts(hidden, inner)

    def forward(self, x: Tensor, routed_by: Tensor | None = None) -> Tensor:
        weights, ids = self.router(x if routed_by is None else routed_by).float().softmax(-1).topk(TOP_K, -1)
        result: Tensor = self.experts(x, ids, weights)
        return result


class Checkpointed(nn.Module):
    """A block that is computed again where it was, and of which nothing is held."""

    def __init__(self, hidden: int = HIDDEN, inner: int = INNER) -> None:
        super().__init__()
        self.block = Block(hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return found


class Looped(nn.Module):
    """Experts that are read one by one, those that some token chose: on every rank others."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) / 8)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / 6)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, place = torch.where(ids == expert)
            gate, up = F.linear(x[token], self.w_in[expert]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, self.w_out[expert]) * weights[token, place].unsqueeze(-1)
            result.index_add_(0, token, y)
        return result


class Model(nn.Module):
    """Two blocks of experts between projections, residuals around them.

    With `fixed`, both routers read what the first block reads, so that no rounding in it decides which experts a token
    has in the second.
    """

    def __init__(self, hidden: int = HIDDEN, inner: int = INNER, fixed: bool = False) -> None:
        super().__init__()
        self.fixed = fixed
        self.first = nn.Linear(hidden, hidden, dtype=torch.bfloat16)
        self.blocks = nn.ModuleList([Block(hidden, inner), Block(hidden, inner)])
        self.last = nn.Linear(hidden, 8, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        routed_by = x if self.fixed else None
        for block in self.blocks:
            x = x + block(x, routed_by)
        return self.last(x)


def hide_as_on_gpus() -> None:
    """From here on the pass `hide` rewrites what collectives carry, too."""
    vars(hide)["by_kernels"] = lambda *_: True


def mesh_of(ranks: int) -> DeviceMesh:
    """All ranks in one dimension."""
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))


def among_ranks(ranks: int, capacity: int) -> dict[str, Any]:
    """Attributes of an exchange."""
    group = mesh_of(ranks).get_group().group_name
    return {"ranks": ranks, "group": group, "capacity": capacity, "slot": 0, "sms": 4, "patience": 10.0}


def tokens_of(rank: int, count: int, dtype: torch.dtype = torch.bfloat16, hidden: int = HIDDEN) -> Tensor:
    """This rank's own."""
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(100 + rank)).to(dtype)


def local_of(parameter: Any) -> Tensor:
    """This rank's part."""
    found: Tensor = parameter.to_local()
    return found


def whole_of(parameter: Any) -> Tensor:
    """All ranks' parts."""
    found: Tensor = parameter.full_tensor()
    return found


def compiled(model: Callable[..., Any], **options: Any) -> Callable[..., Tensor]:
    """By moecompile, with what the ranks agreed on before forgotten."""
    agreement.forget()
    moecompile.reset()
    options = {"lowering": "eager"} | options
    return torch.compile(model, backend="moecompile", fullgraph=True, options=options)


def results(run: Callable[..., Tensor], model: nn.Module, *given: Tensor) -> list[Tensor]:
    """Output, and gradients of the inputs and of all parameters, those of sharded ones whole."""
    leaves = [each.clone().requires_grad_() if each.is_floating_point() else each for each in given]
    model.zero_grad()
    out = run(*leaves)
    (out.float() ** 2).sum().backward()
    found = [out.detach(), *(each.grad for each in leaves if each.grad is not None)]
    for parameter in model.parameters():
        grad = parameter.grad
        assert grad is not None
        found.append(grad.full_tensor() if isinstance(grad, DTensor) else grad)
    return found


def meaned(found: list[Tensor], model: nn.Module, sharded: bool = False) -> list[Tensor]:
    """The same with gradients of parameters as DDP makes them: the mean over all ranks.

    Sharded ones have it already where the model is sharded.
    """
    parameters = [*model.parameters()]
    for parameter, grad in zip(parameters, found[len(found) - len(parameters) :], strict=True):
        if sharded and isinstance(parameter, DTensor):
            continue
        wide = grad.float()
        distributed.all_reduce(wide)
        grad.copy_(wide / distributed.get_world_size())
    return found


def with_mean_of_others(found: list[Tensor], model: nn.Module) -> list[Tensor]:
    """Of a sharded model: gradients of what every rank has whole become the mean."""
    return meaned(found, model, sharded=True)


def close(found: list[Tensor], right: list[Tensor], bound: float) -> None:
    """Relative, in the norm."""
    for number, (one, other) in enumerate(zip(found, right, strict=True)):
        mine, his = one.detach().double(), other.detach().double()
        error = float((mine - his).norm() / his.norm().clamp(min=1e-30))
        assert one.shape == other.shape and error <= bound, f"result {number} is off by {error}"
