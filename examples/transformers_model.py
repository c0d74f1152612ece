"""A model of transformers: what moecompile would do with it, then inference with prompts of several lengths.

    python examples/transformers_model.py                   # compiled by Inductor: a minute or two
    python examples/transformers_model.py --lowering eager  # quicker: the rewritten graph is run by PyTorch itself

The model is gpt-oss, tiny and with random weights; with `from_pretrained` it goes the same way.
"""

from __future__ import annotations

import argparse

import torch
from transformers import GptOssConfig, GptOssForCausalLM

import moecompile

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def main(arguments: list[str] | None = None) -> None:
    """Explains the model, compiles it, runs it and compares its logits with eager ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowering", default="inductor", choices=["inductor", "eager"])
    chosen = parser.parse_args(arguments)

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    model = GptOssForCausalLM(GptOssConfig(**SIZES)).eval()
    prompts = [torch.randint(256, (2, length)) for length in (24, 17, 40)]
    expected = [model(prompt).logits for prompt in prompts]

    # The implementation without a Python loop over the experts that were hit, which no compiler can capture. It is the
    # default where transformers can use it; where it is missing, the report says so and names this line.
    model.set_experts_implementation("grouped_mm")
    print(moecompile.explain(model, prompts[0]))

    model.compile(backend="moecompile", options={"lowering": chosen.lowering})
    for prompt, logits in zip(prompts, expected, strict=True):
        error = (model(prompt).logits - logits).abs().max() / logits.abs().max()
        print(f"{prompt.shape[1]} tokens: relative error of the logits {error:.1e}")
    # One graph for the first length, one for every other: torch finds out that the length changes.
    for graph in moecompile.last_report().graphs:
        print(
            f"graph {graph.index}, compile {graph.compile_id}: {len(graph.sites)} blocks, T = {graph.sites[0].tokens}"
        )


if __name__ == "__main__":
    main()
