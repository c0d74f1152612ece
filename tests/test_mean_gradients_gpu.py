"""Gradients that Hopper's kernels make the mean over ranks of: sums, divided before they are rounded."""

from __future__ import annotations

import pytest
import torch

from gpu_blocks import Block, main_of, run
from test_main_gradients_gpu import CASES

pytestmark = pytest.mark.gpu

PARAMETERS = ("w_in", "w_out", "w_up", "b_in", "b_up", "b_out")


@pytest.mark.parametrize(("block", "fp8"), CASES)
def test_sums_are_divided(block: Block, fp8: bool) -> None:
    """By a power of two to the bit, as tokens' and weights' gradients are what they were; by three but for rounding."""
    tensors = block.tensors()
    sums = run(block, tensors, fp8=fp8)
    for ranks in (4, 3):
        found = run(block, tensors, fp8=fp8, mean_over=ranks)
        assert torch.equal(found.result, sums.result)
        for name, each in found.gradients.items():
            right = sums.gradients[name]
            if name not in PARAMETERS:
                assert torch.equal(each, right), name
            elif ranks == 4:
                usual = right.abs() > ranks * torch.finfo(right.dtype).tiny  # others may be rounded once more
                assert torch.equal(each[usual], right[usual] / ranks), name
            else:
                error = (each.double() * ranks - right.double()).norm() / right.double().norm()
                assert float(error) < 4e-3 or not right.any(), f"{name}: {error:.1e}"


@pytest.mark.parametrize("turned", [False, True], ids=["alike", "turned"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_what_is_added(fp8: bool, turned: bool) -> None:
    block = Block("halves", dropped=True)
    tensors = block.tensors()
    right = run(block, tensors, fp8=fp8).gradients
    main = main_of(tensors, turned)
    run(block, tensors, fp8=fp8, main=main, mean_over=4)
    for name, each in main.items():
        error = (each.double() - 0.25 - right[name].double() / 4).norm() / right[name].double().norm() * 4
        assert float(error) < 2.5e-3, name
