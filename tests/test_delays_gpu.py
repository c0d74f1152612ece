"""Whatever the order in which warps come to their barriers, the results are the same, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moecompile.codegen import cubins, nvrtc
from moecompile.runtime import hopper_routing, launch
from moecompile.runtime.remembered import CALLS

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu


def forget() -> None:
    """Kernels are looked for again."""
    cubins._memory.clear()
    launch.load.cache_clear()
    CALLS.clear()


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    monkeypatch.undo()
    forget()


def run(fp8: bool) -> list[Tensor]:
    """The plan, the result and all gradients of a block whose tiles share clusters, take rows along, have odd ends and
    partial columns."""
    torch.manual_seed(0)
    tokens, top_k, experts, hidden, inner = 700, 3, 7, 640, 336
    scores = torch.rand(tokens, experts, device="cuda")
    scores[:, 0] += 0.13
    ids = scores.topk(top_k, -1).indices
    ids[::11, 0] = -1
    _, offsets, slots, order = plan = torch.ops.moecompile.plan(ids, experts)
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(tokens, top_k, device="cuda", requires_grad=True)
    w_in = torch.randn(experts, 2 * inner, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w_out = torch.randn(experts, hidden, inner, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    attributes = {"activation": "mul(silu(gate), up)", "gate_up": "halves"}
    if fp8:
        with torch.no_grad():
            of_in = torch.ops.moecompile.quantize_weights(w_in, gate_up="halves")
            quantized = [*of_in, *torch.ops.moecompile.quantize_weights(w_out)]
        result = torch.ops.moecompile.experts_fp8(
            x, weights, offsets, slots, order, w_in, w_out, quantized=quantized, **attributes
        )
    else:
        result = torch.ops.moecompile.experts(x, weights, offsets, slots, order, w_in, w_out, **attributes)
    gradients = torch.autograd.grad(result, [x, weights, w_in, w_out], torch.randn_like(result))
    return [*plan, result.detach(), *gradients]


@pytest.mark.parametrize("beside", [False, True], ids=["dispatched before", "dispatched beside"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_delays_change_nothing(fp8: bool, beside: bool, delayed: pytest.MonkeyPatch) -> None:
    delayed.setattr(hopper_routing, "BESIDE", 0 if beside else 1 << 60)
    expected = run(fp8)
    before = dict(cubins._memory)
    delayed.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, "-DMOECOMPILE_DELAYS"))
    forget()
    for _ in range(5):
        for found, right in zip(run(fp8), expected, strict=True):
            assert torch.equal(found, right)
    assert cubins._memory.keys() <= before.keys()
    assert any(cubins._memory[each] != before[each] for each in cubins._memory), "no kernel has delays"
