"""Decoder layers of transformers at the bench's sizes: from configurations, with random weights, without downloads.

Between embedding and head, which a model of sixty layers has once: what is measured is the layers, and the last norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.bench_cases import Shape
from moecompile.bench_modules import IMPLEMENTATION, _randomise


@dataclass(frozen=True)
class Attention:
    """Sizes of attention that a shape does not state, by the name of the configuration's attribute."""

    deepseek: Mapping[str, Any]
    qwen3: Mapping[str, Any]


ATTENTION = Attention(
    deepseek={
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    qwen3={"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
)  # fmt: skip
"""Of DeepSeek-V3 and of Qwen3-30B-A3B."""
TINY: Mapping[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}


@dataclass(frozen=True)
class Stack:
    """Layers with what they are called on.

    Attributes:
        shape: of the experts, and how many tokens there are.
        layers: how many.
        sequence: tokens of a sequence.
        module: called as `module(x)`.
        x: (T / sequence, sequence, H), takes a gradient.
        cotangent: the gradient of the result, as x.
    """

    shape: Shape
    layers: int
    sequence: int
    module: nn.Module
    x: Tensor
    cotangent: Tensor

    @classmethod
    def of(cls, shape: Shape, layers: int, sequence: int, device: str) -> Stack:
        """Random weights and tokens, in bfloat16."""
        torch.manual_seed(0)
        with torch.device(device):
            module = _Layers(BUILDERS[shape.name](shape, layers))
        _randomise(module)
        x, cotangent = (
            torch.randn(shape.tokens // sequence, sequence, shape.hidden, dtype=torch.bfloat16, device=device)
            for _ in "xc"
        )
        return cls(shape, layers, sequence, module, x.requires_grad_(), cotangent)

    @property
    def case(self) -> str:
        """Its short name."""
        return f"{self.shape.name} x{self.layers} S{self.sequence}"

    @property
    def title(self) -> str:
        """In print."""
        number = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        return f"{self.shape.title}, {number}, sequences of {self.sequence}"

    def forget_gradients(self) -> None:
        """All gradients are None."""
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Those of the rows and of all parameters that have one."""
        leaves = {"x": self.x, **dict(self.module.named_parameters())}
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


class _Layers(nn.Module):
    """A model of transformers without its embedding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.model(inputs_embeds=x).last_hidden_state
        return hidden


def _common(shape: Shape, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden, "moe_intermediate_size": shape.inner, "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": layers, "vocab_size": 256, "use_cache": False, "attn_implementation": "sdpa",
    }  # fmt: skip


def qwen3(shape: Shape, layers: int) -> nn.Module:
    """Experts in every layer."""
    from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

    attention = TINY if shape.name == "tiny" else ATTENTION.qwen3
    config = configuration_qwen3_moe.Qwen3MoeConfig(
        num_experts=shape.experts, norm_topk_prob=True, decoder_sparse_step=1, **attention, **_common(shape, layers)
    )
    config._experts_implementation = IMPLEMENTATION
    return modeling_qwen3_moe.Qwen3MoeModel(config)


def deepseek(shape: Shape, layers: int) -> nn.Module:
    """Latent attention, experts and a shared one in every layer."""
    from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3

    groups = min(8, shape.experts // 2)
    config = configuration_deepseek_v3.DeepseekV3Config(
        n_routed_experts=shape.experts, n_group=groups, topk_group=groups // 2, first_k_dense_replace=0,
        **ATTENTION.deepseek, **_common(shape, layers),
    )  # fmt: skip
    config._experts_implementation = IMPLEMENTATION
    return modeling_deepseek_v3.DeepseekV3Model(config)


BUILDERS: Mapping[str, Callable[[Shape, int], nn.Module]] = {"qwen3": qwen3, "deepseek": deepseek, "tiny": qwen3}
"""By the name of the sizes."""
