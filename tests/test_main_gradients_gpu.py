"""Gradients of the experts' matrices that Hopper's kernels add to float32 ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import test_experts_fp8_gpu
import test_experts_gpu
from gpu_blocks import Block, main_of, run

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

CASES = [
    pytest.param(block, fp8, id=f"{block.name}-{'fp8' if fp8 else 'bf16'}")
    for fp8, blocks in ((False, test_experts_gpu.BLOCKS), (True, test_experts_fp8_gpu.BLOCKS))
    for block in blocks
]


@pytest.mark.parametrize("turned", [False, True], ids=["alike", "turned"])
@pytest.mark.parametrize(("block", "fp8"), CASES)
def test_sums_of_two_steps(block: Block, fp8: bool, turned: bool) -> None:
    """Those of steps that return gradients, but for their rounding; the other gradients are the same."""
    tensors = block.tensors()
    plain, main = run(block, tensors, fp8=fp8), main_of(tensors, turned)
    for turn in (1, 2, 3):  # recorded, replayed
        found = run(block, tensors, fp8=fp8, main=main)
        assert torch.equal(found.result, plain.result)
        assert all(torch.equal(each, plain.gradients[name]) for name, each in found.gradients.items())
        for name, each in main.items():
            expected = plain.gradients[name].double()
            error = float((each.double() - 0.25 - turn * expected).norm() / (turn * expected).norm().clamp_min(1e-30))
            assert error < 2.5e-3 or not expected.any(), f"{name}: {error:.2e}"


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_main_gradients_at_any_place(fp8: bool) -> None:
    """Of a large buffer's, at an odd element too, which the kernels do not take; what is computed again is the same."""
    block = replace(Block("halves"), tokens=70)
    tensors = block.tensors()
    results = []
    for offset, recompute in ((0, False), (1, False), (0, True)):
        main = {}
        for name, each in main_of(tensors, False).items():
            room = torch.full((each.numel() + 8,), 0.25, device="cuda")
            main[name] = room[offset : offset + each.numel()].view(each.shape)
        run(block, tensors, fp8=fp8, main=main, recompute=recompute)
        results.append(main)
    for name, each in results[0].items():
        assert torch.equal(each, results[2][name])
        others = results[1][name]
        assert float((each - others).norm() / (each - 0.25).norm()) < 2.5e-3
