"""Gradients of the experts' parameters that are the mean over ranks, in PyTorch's operators on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

ops = torch.ops.moecompile
TOKENS, TOP_K, EXPERTS, FEATURES, INNER = 24, 2, 4, 32, 16
OUTPUT = "mul(out, cast(weight, bfloat16))"
NAMES = ("x", "weights", "w_in", "w_out", "w_up", "b_in", "b_up", "b_out")


def leaves(separate: bool) -> dict[str, Tensor | None]:
    """Tokens, weights, matrices and biases."""
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape) * 0.2).bfloat16().requires_grad_()

    width = INNER if separate else 2 * INNER
    found: dict[str, Tensor | None] = {
        "x": random(TOKENS, FEATURES),
        "weights": torch.rand(TOKENS, TOP_K).requires_grad_(),
        "w_in": random(EXPERTS, width, FEATURES),
        "w_out": random(EXPERTS, FEATURES, INNER),
        "w_up": random(EXPERTS, INNER, FEATURES) if separate else None,
        "b_in": random(EXPERTS, width),
        "b_up": random(EXPERTS, INNER) if separate else None,
        "b_out": random(EXPERTS, FEATURES),
    }
    return found


def gradients(given: dict[str, Tensor | None], fp8: bool, **more: Any) -> dict[str, Tensor | None]:
    """Of all leaves."""
    torch.manual_seed(1)
    _, *plan = ops.plan(torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices, EXPERTS)
    attributes = {
        "activation": "mul(silu(gate), up)",
        "output": OUTPUT,
        "gate_up": "halves" if given["w_up"] is None else "separate",
        **more,
    }
    if fp8:
        attributes["quantized"] = [
            *ops.quantize_weights(given["w_in"], given["w_up"], gate_up=attributes["gate_up"]),
            *ops.quantize_weights(given["w_out"]),
        ]
    args = [given["x"], given["weights"], *plan, *(given[name] for name in NAMES[2:])]
    result = (ops.experts_fp8 if fp8 else ops.experts)(*args, **attributes)
    there = {name: each for name, each in given.items() if each is not None}
    found = torch.autograd.grad(result, [*there.values()], torch.randn(result.shape).bfloat16(), allow_unused=True)
    return dict(zip(there, found, strict=True))


@pytest.mark.parametrize("separate", [False, True], ids=["halves", "separate"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_sums_are_divided(fp8: bool, separate: bool) -> None:
    """Those of tokens and weights are what they were."""
    given = leaves(separate)
    sums = gradients(given, fp8)
    for ranks in (2, 3):
        for name, each in gradients(given, fp8, mean_over=ranks).items():
            right = sums[name]
            assert each is not None and right is not None and bool(right.any())
            assert torch.equal(each, right if name in ("x", "weights") else right / ranks), name


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_what_is_added(fp8: bool) -> None:
    given = leaves(False)
    right, matrix = gradients(given, fp8)["w_in"], given["w_in"]
    assert matrix is not None and right is not None
    main = torch.ones(matrix.shape)
    assert gradients(given, fp8, mean_over=4, main_w_in=main)["w_in"] is None
    torch.testing.assert_close(main, 1 + right.float() / 4, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ranks", [0, -1])
def test_there_is_no_mean_over_nobody(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"mean_over must be at least 1, got {ranks}"):
        gradients(leaves(False), False, mean_over=ranks)
