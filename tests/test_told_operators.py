"""What options ask of the operators: the graph shows it, and they do it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moecompile
from moecompile.report import GraphReport
from small_models import Model, compiled, inputs


def graphs() -> tuple[GraphReport, ...]:
    return moecompile.last_report().graphs


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["model", "fp8"])
def test_rows_are_computed_again_where_the_user_asks_for_it(lowering: str, precision: str):
    def step(recompute: bool) -> tuple[int, list[Tensor | None]]:
        """Bytes of activations that are kept for the backward, and the gradients."""
        torch._dynamo.reset()
        moecompile.reset()
        model, kept = Model().bfloat16(), [0]
        fast = compiled(model, recompute=recompute, precision=precision, lowering=lowering)

        def keep(tensor: Tensor) -> Tensor:
            kept[0] += 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = fast(inputs().bfloat16())
        result.square().sum().backward()
        (graph,) = graphs()
        assert ("recompute=True" in graph.after) == recompute
        return kept[0], [parameter.grad for parameter in model.parameters()]

    (kept, expected), (left, found) = step(recompute=False), step(recompute=True)
    assert 0 < left < kept
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_operators_are_told_which_kernels_to_run():
    for chosen, shown in (("auto", False), ("reference", True)):
        torch._dynamo.reset()
        moecompile.reset()
        compiled(Model(), kernels=chosen)(inputs())
        (graph,) = graphs()
        assert ('kernels="reference"' in graph.after) == shown
