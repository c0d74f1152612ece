"""Detection and rewriting cost little beside Dynamo, and grow with the model as Dynamo does.

In seconds of the processor's time: the passes and Dynamo both run in one thread.
"""

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
        arrived = time.process_time()
        with without_collections():
            assert rewrite(gm) == layers
        spent.extend((time.process_time() - arrived, arrived))
        return gm.forward

    torch._dynamo.reset()
    began = time.process_time()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(input_ids=torch.randint(3, 250, (2, 16)), use_cache=False)
    return spent[0], spent[1] - began


def least(layers: int) -> tuple[float, float]:
    """The least of five runs, seconds in the passes and in Dynamo: whatever else the machine does only adds to them."""
    passes, dynamo = zip(*(times(layers) for _ in range(5)), strict=True)
    return min(passes), min(dynamo)


@pytest.mark.slow
def test_cost_and_growth() -> None:
    times(2)  # tables and imports
    small, large = (least(layers) for layers in (24, 48))
    for layers, (passes, dynamo) in ((24, small), (48, large)):
        share = f"{layers} layers: {passes * 1e3:.0f} ms, {100 * passes / dynamo:.1f} % of Dynamo's {dynamo:.1f} s"
        print(share)
        assert passes <= 0.03 * dynamo, share
    assert large[0] <= 2.3 * small[0], f"24 layers {small[0] * 1e3:.0f} ms, 48 layers {large[0] * 1e3:.0f} ms"
