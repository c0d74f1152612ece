"""Every activation that the architectures of transformers compute between their experts' products.

Collected from the tiny models of tests/tiny_transformers.py, in bfloat16 and in float32, and kept here so that kernels
can be compiled for all of them without building a model. tests/test_kernel_sweep.py compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Surveyed:
    """An activation as a block has it.

    Attributes:
        activation: the expression.
        gate_up: where gate and up projection lie.
        bias: whether GEMM1 has one.
        scaled: whether the output multiplies by the routing weight.
    """

    activation: str
    gate_up: str
    bias: bool = False
    scaled: bool = True


_CLAMPED = "clamp(gate, None, 7.0)"
_GPT_OSS = f"mul(add(clamp(up, -7.0, 7.0), 1), mul({_CLAMPED}, sigmoid(mul({_CLAMPED}, 1.702))))"
_SOFT = "mul(mul(mul(tanh(div({gate}, 4.0)), 4.0), sigmoid({gate})), mul(tanh(div({up}, 25.0)), 25.0))"

SURVEY = {
    "qwen3_moe": Surveyed("mul(silu(gate), up)", "halves"),  # and some fifty others
    "llama4": Surveyed("mul(up, silu(gate))", "halves", scaled=False),
    "doge": Surveyed("mul(silu(hidden), weight)", "single", scaled=False),
    "nemotron_h": Surveyed("square(relu(hidden))", "single"),
    "gemma4": Surveyed("mul(gelu(gate, tanh), up)", "halves"),
    "deepseek_v4": Surveyed("mul(silu(clamp(gate, None, 10.0)), clamp(up, -10.0, 10.0))", "halves"),
    "gpt_oss": Surveyed(_GPT_OSS, "interleaved", bias=True),
    "openai_privacy_filter": Surveyed(_GPT_OSS, "halves", bias=True),
    "minimax_m3_vl": Surveyed(_GPT_OSS.replace("1)", "1.0)", 1), "halves"),
    "beam": Surveyed("cast(mul(silu(cast(gate, float32)), cast(up, float32)), bfloat16)", "halves"),
    "inkling2": Surveyed(
        f"cast({_SOFT.format(gate='cast(gate, float32)', up='cast(up, float32)')}, bfloat16)", "halves"
    ),
    "inkling2 in float32": Surveyed(_SOFT.format(gate="gate", up="up"), "halves"),
}
"""By an architecture that has it."""


def collected(name: str, dtype: torch.dtype) -> set[Surveyed]:
    """What an architecture of `tiny_transformers` computes."""
    import moecompile
    from tiny_transformers import IMPLEMENTATIONS, OWN_CODE, build_block

    found: set[Surveyed] = set()
    for implementation in IMPLEMENTATIONS[:1] if name in OWN_CODE else IMPLEMENTATIONS:
        torch._dynamo.reset()
        block = build_block(name, dtype, implementation)
        with torch.no_grad():
            torch.compile(block.module, backend="moecompile", options={"lowering": "eager"}, fullgraph=True)(
                *block.inputs
            )
        for site in moecompile.last_report().sites:
            found.add(Surveyed(site.activation, site.gate_up, "b_in" in site.biases, "weight" in site.output))
    return found
