"""Sizes that make any MoE architecture of transformers tiny, and what single architectures need besides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Sizes of a tiny model.

    Attributes:
        hidden: features of a token; a multiple of 64.
        intermediate: features inside an expert (and inside dense feed-forward layers).
        experts: experts of a layer; a multiple of 4, for architectures that route in groups.
        top_k: experts of a token, where the architecture leaves the choice.
        layers: decoder layers.
        vocabulary: tokens of the vocabulary.
    """

    hidden: int = 64
    intermediate: int = 32
    experts: int = 8
    top_k: int = 2
    layers: int = 2
    vocabulary: int = 256

    def attributes(self) -> dict[str, Any]:
        """Values for every configuration attribute that any architecture gives these sizes."""
        heads, rank = 4, 16
        head = self.hidden // heads
        by_value: list[tuple[Any, str]] = [
            (self.hidden, "hidden_size d_model moe_hidden_size"),
            (self.layers, "num_hidden_layers n_layers num_layers num_decoder_layers encoder_layers decoder_layers"),
            (heads, "num_attention_heads n_heads num_heads encoder_attention_heads decoder_attention_heads"),
            (heads, "num_key_value_heads linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads"),
            (
                head,
                "head_dim index_head_dim d_kv kv_channels v_head_dim head_dim_per_layer swa_head_dim swa_v_head_dim",
            ),
            (
                self.intermediate,
                "intermediate_size moe_intermediate_size d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
                "expert_ffn_hidden_size intermediate_size_mlp moe_ffn_hidden_size shared_expert_intermediate_size "
                "moe_shared_expert_intermediate_size shared_intermediate_size share_expert_dim "
                "expert_intermediate_size dense_intermediate_size shared_experts_intermediate_size",
            ),
            (self.experts, "num_experts num_local_experts n_routed_experts moe_num_experts"),
            (
                self.top_k,
                "num_experts_per_tok moe_k moe_topk moe_top_k top_k_experts num_experts_per_token num_selected_experts",
            ),
            (1, "n_shared_experts num_shared_experts moe_num_shared_experts num_expert_group topk_group"),
            (2, "n_group linear_num_key_heads index_n_heads swa_num_key_value_heads"),
            (self.vocabulary, "vocab_size vocab_size_per_layer_input"),
            (512, "max_position_embeddings"),
            (0, "pad_token_id first_k_dense_replace num_dense_layers moe_layer_start_index expert_layer_offset"),
            (1, "bos_token_id expert_layer_period decoder_sparse_step interleave_moe_layer_step attn_layer_offset"),
            (1, "mamba_n_groups n_groups"),
            (2, "eos_token_id attn_layer_period"),
            (
                rank,
                "q_lora_rank kv_lora_rank linear_key_head_dim linear_value_head_dim linear_head_dim",
            ),
            (16, "mamba_d_state mamba_chunk_size chunk_size ssm_state_size index_topk hidden_size_per_layer_input"),
            (head // 2, "qk_rope_head_dim qk_nope_head_dim"),
            (2 * self.hidden // heads, "mamba_d_head mamba_head_dim"),
            (4, "mamba_dt_rank"),
            (32, "sliding_window"),
            (0.0, "dropout_rate router_jitter_noise"),
            (False, "use_mamba_kernels"),
        ]
        return {name: value for value, names in by_value for name in names.split()}


# Left alone where the architecture's own default is none, zero or one: it then has no such part.
OPTIONAL = frozenset(
    "q_lora_rank moe_latent_size n_group topk_group sliding_window hidden_size_per_layer_input".split()
)

# What one architecture needs besides. A callable is given the sizes.
Override = Any


def sparse(sizes: Sizes) -> list[str]:
    """Experts in every layer."""
    return ["sparse"] * sizes.layers


def first_layers(sizes: Sizes) -> list[int]:
    """The numbers of all layers."""
    return list(range(sizes.layers))


def sections(sizes: Sizes, height: int, width: int, time: int) -> dict[str, Any]:
    """Rotary parameters with the rotated part of a head shared out between the axes, in parts of 64 features."""
    unit = sizes.hidden // 64
    return {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 2 * (height + width + time) / 16,
        "mrope_section": [height * unit, width * unit, time * unit],
    }


def rotary_half(sizes: Sizes) -> int:
    """The part of a head that is rotated, where `head_dim` means that part."""
    return sizes.hidden // 8


OVERRIDES: dict[str, dict[str, Override]] = {
    "axk1": {"head_dim": rotary_half},
    "deepseek_v3": {"head_dim": rotary_half},
    "deepseek_ocr2": {"mlp_layer_types": sparse},
    "diffusion_gemma": {"enable_moe_block": True},
    "doge": {"is_moe": True, "num_experts": lambda sizes: 2 * sizes.experts},
    "dots3_note": {"mlp_layer_types": sparse, "layer_types": ["indexed_attention", "indexed_attention"]},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": lambda sizes: [sizes.intermediate] * 2,
        "mlp_layer_types": sparse,
        "rope_parameters": lambda sizes: sections(sizes, 2, 2, 4),
    },
    "flint": {"mlp_only_layers": [], "layer_types": ["full_attention", "sliding_attention"]},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {"rope_parameters": lambda sizes: sections(sizes, 1, 1, 2)},
    "glm5_next": {
        "mlp_layer_types": sparse,
        "layer_types": ["linear_attention", "linear_attention"],
        "qk_rope_head_dim": 0,
    },
    "hy_v4": {"indexer_types": ["full", "full"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"moe_layers": first_layers},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral_large4": {"kv_source_layers": first_layers},
    "nemotron_h": {"layer_types": ["linear_attention", "moe", "full_attention", "moe"], "num_hidden_layers": 4},
    "qwen4_exp": {"layer_types": ["linear_attention", "linear_attention"]},
    "zaya": {"num_experts_per_tok": 1},
}

# Attributes of the table that an architecture derives itself, or keeps one for each layer.
DERIVED: dict[str, frozenset[str]] = {
    "gemma4": frozenset(("head_dim", "num_key_value_heads")),
    "diffusion_gemma": frozenset(("head_dim", "num_key_value_heads")),
    "dots3_note": frozenset(("num_attention_heads", "num_key_value_heads", "head_dim")),
    "glm5_next": frozenset(("head_dim",)),
}

# Model classes that the rule of `tiny_transformers.model_class` does not find.
MODEL_CLASSES = {
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification",
    "deepseek_ocr2": "DeepseekOcr2TextModel",
    "dots3_note": "Dots3NoteTextModel",
    "glm5_next": "Glm5NextTextModel",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeTextModel",
    "gemma4": "Gemma4ForCausalLM",
}
