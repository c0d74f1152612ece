"""Blocks of experts on a GPU: their tensors, and results and gradients by the operators or in float64."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import moecompile.runtime.operators  # noqa: F401  registers torch.ops.moecompile
from moecompile.runtime.contract import Arguments

GPT_OSS = "mul(add(clamp(up, -7.0, 7.0), 1), mul(clamp(gate, None, 7.0), sigmoid(mul(clamp(gate, None, 7.0), 1.702))))"
NAMES = ("x", "weights", "w_in", "w_out", "w_up", "b_in", "b_up", "b_out")
Tensors = dict[str, Tensor | None]
"""The differentiable arguments in the order of NAMES; None for what a block does not have."""

ops = torch.ops.moecompile


@dataclass(frozen=True)
class Block:
    """One block: sizes, and how it is laid out.

    Attributes:
        counts: if there are any, how many tokens each expert has, which have no other.
        scale_format: in FP8.
    """

    name: str
    tokens: int = 300
    top_k: int = 3
    experts: int = 8
    hidden: int = 512
    inner: int = 384
    gate_up: str = "halves"
    activation: str = "mul(silu(gate), up)"
    output: str = "mul(out, weight)"
    in_transposed: bool = False
    out_transposed: bool = False
    biases: bool = False
    dropped: bool = False
    one_expert: bool = False
    counts: tuple[int, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.bfloat16
    weighted: bool = True
    scale_format: str = "power_of_two"
    out_dtype: torch.dtype | None = None

    @classmethod
    def of_counts(cls, name: str, *counts: int, **given: Any) -> Block:
        """A block with so many tokens for each expert."""
        return cls(name, sum(counts), 1, len(counts), counts=counts, **given)

    def attributes(self) -> dict[str, Any]:
        return {
            "activation": self.activation,
            "gate_up": self.gate_up,
            "output": self.output,
            "w_in_transposed": self.in_transposed,
            "w_out_transposed": self.out_transposed,
            "out_dtype": self.out_dtype,
        }

    def tensors(self) -> Tensors:
        """Random ones."""
        torch.manual_seed(0)
        width = self.inner if self.gate_up in ("single", "separate") else 2 * self.inner

        def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = self.dtype) -> Tensor:
            return (torch.randn(shape, device="cuda") * scale).to(dtype)

        def matrices(fan_out: int, fan_in: int, transposed: bool) -> Tensor:
            shape = (fan_in, fan_out) if transposed else (fan_out, fan_in)
            return random(self.experts, *shape, scale=fan_in**-0.5)

        separate = self.gate_up == "separate"
        weights = torch.rand(self.tokens, self.top_k, device="cuda").add(0.2).to(self.weight_dtype)
        return {
            "x": random(self.tokens, self.hidden),
            "weights": weights if self.weighted else None,
            "w_in": matrices(width, self.hidden, self.in_transposed),
            "w_out": matrices(self.hidden, self.inner, self.out_transposed),
            "w_up": matrices(self.inner, self.hidden, self.in_transposed) if separate else None,
            "b_in": random(self.experts, width) if self.biases else None,
            "b_up": random(self.experts, self.inner) if self.biases and separate else None,
            "b_out": random(self.experts, self.hidden) if self.biases else None,
        }

    def ids(self) -> Tensor:
        """Experts of each token, uneven; the last one has nobody."""
        torch.manual_seed(1)
        if self.counts:
            experts = torch.arange(self.experts).repeat_interleave(torch.tensor(self.counts))
            return experts[torch.randperm(self.tokens)].unsqueeze(1).cuda()
        scores = torch.rand(self.tokens, self.experts, device="cuda")
        scores[:, 0] += 0.6
        scores[:, -1] = -1
        ids = scores.topk(self.top_k).indices
        if self.one_expert:
            return torch.full_like(ids, self.experts // 2)
        return torch.where(torch.rand(ids.shape, device="cuda") < 0.2, -1, ids) if self.dropped else ids

    def arguments(self, tensors: Tensors, ids: Tensor | None = None) -> list[Tensor | None]:
        """What the operators take by place, with a plan of the block's ids or of those."""
        _, *layout = ops.plan(self.ids() if ids is None else ids, self.experts)
        given = [tensors[name] for name in NAMES]
        return [*given[:2], *layout, *given[2:]]

    def record(self, tensors: Tensors) -> Arguments:
        """The same, checked."""
        given: list[Any] = self.arguments(tensors)
        return Arguments(*given, **self.attributes()).check()

    def quantized(self, tensors: Tensors) -> list[Tensor]:
        """The matrices in FP8, as `experts_fp8` takes them."""
        first, how = {"gate_up": self.gate_up, "transposed": self.in_transposed}, {"scale_format": self.scale_format}
        w_in = ops.quantize_weights(tensors["w_in"], tensors["w_up"], **first, **how)
        return [*w_in, *ops.quantize_weights(tensors["w_out"], transposed=self.out_transposed, **how)]


@dataclass
class Run:
    """The result and the gradients by name."""

    result: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def all(self) -> dict[str, Tensor]:
        """The result and the gradients."""
        return {"result": self.result, **self.gradients}


def run(
    block: Block,
    tensors: Tensors,
    kernels: str | None = None,
    names: tuple[str, ...] = NAMES,
    *,
    fp8: bool = False,
    recompute: bool = False,
    ids: Tensor | None = None,
    cotangent: Tensor | None = None,
    main: Mapping[str, Tensor] = MappingProxyType({}),
    mean_over: int = 1,
) -> Run:
    """One call with the gradients of the tensors of these names, for a random gradient of the result or for that."""
    leaves = {
        name: None if value is None else value.detach().clone().requires_grad_(name in names)
        for name, value in tensors.items()
    }
    arguments = block.arguments(leaves, ids)
    attributes = {**block.attributes(), "kernels": kernels, "recompute": recompute, "mean_over": mean_over}
    attributes |= {f"main_{name}": each for name, each in main.items()}
    if fp8:
        attributes |= {"quantized": block.quantized(leaves), "scale_format": block.scale_format}
        result = ops.experts_fp8(*arguments, **attributes)
    else:
        result = ops.experts(*arguments, **attributes)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and name in names}
    if cotangent is None:
        torch.manual_seed(2)
        cotangent = torch.randn(result.shape, device="cuda")
    found = torch.autograd.grad(result, list(wanted.values()), cotangent.to(result.dtype), allow_unused=bool(main))
    assert all((each is None) == (name in main) for name, each in zip(wanted, found, strict=True))
    return Run(result.detach(), {name: each for name, each in zip(wanted, found, strict=True) if each is not None})


def main_of(tensors: Tensors, turned: bool) -> dict[str, Tensor]:
    """Main gradients of all matrices, laid out as they are or the other way."""
    found = {name: tensors[name] for name in ("w_in", "w_out", "w_up")}
    laid = {name: each.mT.contiguous().mT if turned else each for name, each in found.items() if each is not None}
    return {name: torch.full_like(each, 0.25, dtype=torch.float32) for name, each in laid.items()}


def exact(block: Block, tensors: Tensors, cotangent: Tensor | None = None) -> Run:
    """The same in float64, casts included: they are to rounded what it computes, which float64 does not."""
    wide = {name: None if value is None else value.double() for name, value in tensors.items()}
    texts = (re.sub(r", (bfloat16|float32)\)", ", float64)", text) for text in (block.activation, block.output))
    activation, output = texts
    return run(replace(block, activation=activation, output=output), wide, "reference", cotangent=cotangent)


def worst_row(found: Tensor, expected: Tensor) -> float:
    """The largest error of a row, relative to the largest of the rows' norms that is typical."""
    found, expected = found.double(), expected.double()
    found, expected = (value.reshape(-1, value.shape[-1]) for value in (found, expected))
    norms = expected.norm(dim=-1)
    used = norms[norms > 0]
    floor = used.median() * 0.1 if used.numel() else torch.tensor(1.0, device=found.device)
    return float(((found - expected).norm(dim=-1) / norms.clamp_min(floor)).nan_to_num(nan=float("inf")).max())
