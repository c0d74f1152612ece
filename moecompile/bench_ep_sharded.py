"""A block of experts that ranks share, compiled by moecompile as users do it, with what each rank holds of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import moecompile
from moecompile import agreement
from moecompile.bench_block import Inputs
from moecompile.bench_cases import FORWARD, FP8, OURS, STEP, Shape
from moecompile.bench_ep_peers import Baseline, activated, summed
from moecompile.bench_ep_ranks import Ranks
from moecompile.bench_ep_tokens import Exchange
from moecompile.bench_proof import WrongResultError

OPTIONS: Mapping[str, dict[str, dict[str, Any]]] = {
    OURS: {FORWARD: {}, STEP: {}},
    FP8: {FORWARD: {"precision": "fp8", "fp8_cache_weights": True}, STEP: {"precision": "fp8"}},
}
"""Of the backend, by contender and by what is measured: who only infers casts the matrices once."""


class Experts(nn.Module):
    """All experts, stacked, as a model has them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        self._experts = shape.experts

        def matrices(out: int, into: int) -> nn.Parameter:
            made = torch.randn(shape.experts, out, into, dtype=torch.bfloat16, device=device)
            return nn.Parameter(made.mul_(into**-0.5))

        self.w_in, self.w_out = matrices(2 * shape.inner, shape.hidden), matrices(shape.hidden, shape.inner)

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum (T, H) of the experts (T, K) of tokens (T, H)."""
        assigned = expert_ids.reshape(-1)
        order = assigned.argsort(stable=True)
        ends = torch.bincount(assigned, minlength=self._experts).cumsum(0).to(torch.int32)
        hidden = torch._grouped_mm(x[order // expert_ids.shape[1]], self.w_in.mT, offs=ends)
        y = torch._grouped_mm(activated(hidden), self.w_out.mT, offs=ends)
        return summed(y, order, weights)


@dataclass(frozen=True, eq=False)
class Sharded:
    """One rank's part of a block.

    Attributes:
        module: with this rank's experts alone.
        compiled: by moecompile, by contender and by what is measured.
        exchange: of the tokens, by itself.
        w_in: (E / R, 2I, H), this rank's, that of the module.
        w_out: (E / R, H, I).
    """

    module: nn.Module
    compiled: Mapping[tuple[str, str], Callable[..., Tensor]]
    exchange: Exchange
    w_in: Tensor
    w_out: Tensor

    @classmethod
    def of(cls, ranks: Ranks, shape: Shape, more: Mapping[str, Any]) -> Sharded:
        """Random experts, the same on all ranks before they are shared out, and random tokens, other ones on each.

        `more` are options of the backend for all.
        """
        torch._dynamo.reset()
        agreement.forget()
        torch.manual_seed(0)
        module = Experts(shape, ranks.device)
        mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
        moecompile.shard_experts(module, mesh, gradients="sum")
        compiled = {
            (name, what): torch.compile(module, backend="moecompile", fullgraph=True, options={**more, **options})
            for name, each in OPTIONS.items()
            for what, options in each.items()
        }
        w_in, w_out = (_own(parameter) for parameter in (module.w_in, module.w_out))
        return cls(module, compiled, Exchange.of(ranks, shape, seed=1), w_in, w_out)

    @property
    def inputs(self) -> Inputs:
        """This rank's tokens."""
        return self.exchange.inputs

    def ours(self, name: str, what: str) -> Tensor:
        """The block by moecompile."""
        return self.compiled[name, what](self.inputs.x, self.inputs.ids, self.inputs.weights)

    def theirs(self, baseline: Baseline) -> Tensor:
        """The block as users write it."""
        return baseline(self.inputs.x, self.inputs.ids, self.inputs.weights, self.w_in, self.w_out)

    def leaves(self) -> dict[str, Tensor]:
        """What the baseline's gradients are taken of."""
        return {"x": self.inputs.x, "weights": self.inputs.weights, "w_in": self.w_in, "w_out": self.w_out}

    def forget_gradients(self) -> None:
        """All gradients are None."""
        self.module.zero_grad(set_to_none=True)
        for leaf in self.leaves().values():
            leaf.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Those of tokens, weights and this rank's matrices; they are no longer the block's."""
        found = {name: leaf.grad for name, leaf in self.leaves().items()}
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.to_local()  # type: ignore[attr-defined]
        self.forget_gradients()
        missing = [name for name, gradient in found.items() if gradient is None]
        if missing:
            raise WrongResultError(f"no gradient of {', '.join(missing)}")
        return {name: gradient for name, gradient in found.items() if gradient is not None}


def _own(parameter: Any) -> Tensor:
    """This rank's part of a sharded parameter, for those who know nothing of shards."""
    found: Tensor = parameter.to_local().detach()
    return found.requires_grad_()
