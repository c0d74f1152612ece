"""MoE blocks of transformers at the bench's sizes: from configurations, with random weights, without downloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.bench_block import Block, Inputs
from moecompile.bench_cases import Shape

IMPLEMENTATION = "grouped_mm"
"""Of the experts: what transformers itself chooses for bfloat16 where it can."""


@dataclass(frozen=True)
class Module:
    """A block with what it is called on.

    Attributes:
        module: called as `module(x)`.
        x: (1, T, H), takes a gradient.
        cotangent: (1, T, H), the gradient of the result.
        experts: the same experts as the bench calls them: their matrices, their tokens and their routing.
    """

    module: nn.Module
    x: Tensor
    cotangent: Tensor
    experts: Block

    @classmethod
    def of(cls, shape: Shape, device: str) -> Module:
        """Random weights and tokens, in bfloat16; the router's decide the routing."""
        torch.manual_seed(0)
        with torch.device(device):
            module = BUILDERS[shape.name](shape)
        _randomise(module)
        x, cotangent = (torch.randn(1, shape.tokens, shape.hidden, dtype=torch.bfloat16, device=device) for _ in "xc")
        ids, weights = _routing(module, x)
        inputs = Inputs(x[0].clone().requires_grad_(), ids, weights.float().requires_grad_(), cotangent[0])
        held: Any = module.experts
        return cls(module, x.requires_grad_(), cotangent, Block(shape, held.gate_up_proj, held.down_proj, [inputs]))

    def forget_gradients(self) -> None:
        """All gradients are None."""
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None
        self.experts.forget_gradients()

    def gradients(self) -> dict[str, Tensor]:
        """Those of the tokens and of all parameters that have one."""
        leaves = {"x": self.x, **dict(self.module.named_parameters())}
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def missing() -> str:
    """Why there are no such blocks here; empty if there are."""
    return "" if find_spec("transformers") else "needs transformers"


def qwen3(shape: Shape) -> nn.Module:
    """Softmax, the largest of all experts, weights that sum to one."""
    from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

    config = configuration_qwen3_moe.Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.inner,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = IMPLEMENTATION
    return modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)


def deepseek(shape: Shape) -> nn.Module:
    """Sigmoid, the largest of half the groups of experts, weights in float32; and one expert that all tokens have."""
    from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3

    groups = min(8, shape.experts // 2)
    config = configuration_deepseek_v3.DeepseekV3Config(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.inner,
        n_routed_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        n_group=groups,
        topk_group=groups // 2,
    )
    config._experts_implementation = IMPLEMENTATION
    return modeling_deepseek_v3.DeepseekV3MoE(config)


BUILDERS: Mapping[str, Callable[[Shape], nn.Module]] = {"qwen3": qwen3, "deepseek": deepseek, "tiny": qwen3}
"""By the name of the sizes."""


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    """Matrices that keep the size of what they multiply; bfloat16, but buffers stay as they are."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).normal_(std=parameter.shape[-1] ** -0.5)


@torch.no_grad()
def _routing(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, (T, K), as the module hands them to its experts."""
    calls: list[tuple[Any, ...]] = []
    held: Any = module.experts
    hook = held.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((*args, *kwargs.values())), with_kwargs=True
    )
    module(x)
    hook.remove()
    _, ids, weights = calls[0]
    return ids, weights
