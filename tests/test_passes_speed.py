"""Detection and rewriting cost little beside Dynamo, and grow with the model as Dynamo does."""

from __future__ import annotations

import time

import pytest
import torch
from torch import fx

import moecompile  # noqa: F401  (registers the operators)

pytest.importorskip("transformers")

from moecompile.pipeline import without_collections
from rewriting import rewrite
from tiny_transformers import build_model


def times(layers: int) -> tuple[float, float]:
    """Seconds in the passes, and in Dynamo before them, for a model of that many layers."""
    model = build_model("qwen3_moe", num_hidden_layers=layers)
    spent: list[float] = []

    def backend(gm: fx.GraphModule, example_inputs: object) -> object:
        arrived = time.perf_counter()
        with without_collections():
            assert rewrite(gm) == layers
        spent.extend((time.perf_counter() - arrived, arrived))
        return gm.forward

    torch._dynamo.reset()
    began = time.perf_counter()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(input_ids=torch.randint(3, 250, (2, 16)), use_cache=False)
    return spent[0], spent[1] - began


@pytest.mark.slow
def test_cost_and_growth() -> None:
    times(2)  # tables and imports
    small = min((times(24) for _ in range(2)), key=lambda pair: pair[0])
    large = min((times(48) for _ in range(2)), key=lambda pair: pair[0])
    for passes, dynamo in (small, large):
        assert passes <= 0.03 * dynamo, f"{passes * 1e3:.0f} ms beside Dynamo's {dynamo:.1f} s"
    assert large[0] <= 2.3 * small[0], f"24 layers {small[0] * 1e3:.0f} ms, 48 layers {large[0] * 1e3:.0f} ms"
