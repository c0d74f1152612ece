"""What nodes cost: operations, bytes and what is sent, by hand; and the devices that they are reckoned for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from moecompile.passes import costs, hardware
from moecompile.passes.costs import Cost, bytes_of, cost_of
from test_exchanges_as_on_gpus import CAPACITY, EXPERTS, FEATURES, INNER, TOKENS, TOP_K, by_kernels, traced

aten, ops, c10d = torch.ops.aten, torch.ops.moecompile, torch.ops._c10d_functional
assert by_kernels


class Eight:
    """A group of eight ranks."""

    def size(self) -> int:
        return 8


def costs_of(function: Callable[..., Any], *inputs: Tensor, mode: str = "fake") -> list[tuple[fx.Node, Cost]]:
    graph = make_fx(function, tracing_mode=mode)(*inputs).graph  # type: ignore[arg-type]
    return [(node, cost_of(node)) for node in graph.nodes if node.op == "call_function"]


def test_products_and_what_they_read() -> None:
    a, b = torch.randn(32, 64).bfloat16(), torch.randn(64, 128).bfloat16()
    ((node, cost),) = costs_of(torch.mm, a, b)
    assert cost == Cost(
        sympy.Integer(2 * 32 * 64 * 128), "bfloat16", sympy.Integer(2 * (32 * 64 + 64 * 128 + 32 * 128))
    )
    assert bytes_of(node) == 2 * 32 * 128


def test_views_cost_nothing() -> None:
    found = costs_of(lambda x: x.t()[1:].unsqueeze(0).sin(), torch.randn(8, 8))
    assert [cost.bytes for _, cost in found[:-1]] == [0] * (len(found) - 1) and found[-1][1].bytes == 2 * 4 * 56
    assert all(bytes_of(node) == 0 for node, _ in found[:-1])


def test_attention_is_counted_as_pytorch_does() -> None:
    q = torch.randn(2, 4, 16, 8).bfloat16()
    found = costs_of(torch.ops.aten._scaled_dot_product_flash_attention.default, q, q, q)
    cost = next(cost for node, cost in found if "flash" in str(node.target))
    assert cost.operations == 2 * (2 * 4 * 16 * 16 * 8) * 2


def test_sizes_may_be_symbols() -> None:
    found = costs_of(lambda x, w: x @ w, torch.randn(6, 4), torch.randn(4, 5), mode="symbolic")
    cost = next(cost for _, cost in found if cost.operations)
    (tokens, *_) = sorted(cost.operations.free_symbols, key=str)
    numbers = {each: 10 for each in cost.operations.free_symbols | cost.bytes.free_symbols}
    assert tokens in cost.bytes.free_symbols and cost.operations.subs(numbers) == 2000
    device = hardware.Hardware("d", "D", 1, {"float32": 1e3}, 1e9, {}, 0.5)
    assert cost.computing(device, numbers) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("call", "sent"),
    [
        (lambda x: c10d.all_to_all_single(x, [4] * 8, [4] * 8, "group"), 32 * 16 * 4 * 7 // 8),
        (lambda x: c10d.all_reduce(x, "sum", "group"), 2 * 32 * 16 * 4 * 7 // 8),
        (lambda x: c10d.reduce_scatter_tensor(x, "sum", 8, "group"), 32 * 16 * 4 * 7 // 8),
        (lambda x: c10d.all_gather_into_tensor(x, 8, "group"), 7 * 32 * 16 * 4),
    ],
    ids=["all_to_all", "all_reduce", "reduce_scatter", "all_gather"],
)
def test_what_collectives_send(call: Callable[..., Any], sent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "process_group", lambda name: Eight())
    (_, begin), (wait, waiting) = costs_of(lambda x: c10d.wait_tensor(call(x)), torch.randn(32, 16))
    assert (begin.sent, begin.link, begin.group) == (sent, "nvlink", "group") and waiting == Cost()
    assert bytes_of(wait) == 0, "it is what has been sent"
    link = hardware.named("h800").links["nvlink"]
    assert begin.sending(hardware.named("h800"), {}) == pytest.approx(sent / link.rate + link.latency)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_experts_whose_tokens_travel(fp8: bool) -> None:
    """Half of the assignments of both ranks' places are to this rank's experts; twice as many operations back.

    Of each expert half a tile more is computed, but for the gradients of matrices.
    """
    graph = traced(fp8)
    of = {node.target.__name__.split(".")[0]: cost_of(node) for node in graph.nodes if node.op == "call_function"}
    names = ("experts_fp8_forward", "experts_fp8_backward") if fp8 else ("experts_forward", "experts_backward")
    forward, backward = (of[name] for name in names)
    rows = 2 * CAPACITY * TOP_K // 2
    tiled = rows + EXPERTS // 2 * costs.TILE // 2
    assert forward.operations == 2 * tiled * 3 * FEATURES * INNER
    assert backward.operations == 2 * (tiled + rows) * 3 * FEATURES * INNER
    assert forward.precision == ("float8" if fp8 else "bfloat16")
    met = 1 - sympy.Rational(1, 2) ** TOP_K
    assert of["dispatch_start"].sent == TOKENS * met * FEATURES * 2 and of["dispatch_start"].group == "nobody"
    assert of["combine_start"].sent == TOKENS * met * FEATURES * 2 and of["dispatch_wait"].link is None


def test_devices() -> None:
    assert list(hardware.known()) == ["h200", "h100", "h800"]
    h800 = hardware.named("h800")
    assert (h800.links["nvlink"].rate, h800.links["network"].rate) == (160e9, 50e9)
    assert hardware.like("NVIDIA H100 80GB HBM3") is hardware.named("h100") and hardware.like("NVIDIA A100") is None
    assert hardware.like("NVIDIA H100 PCIe") is None and hardware.like("NVIDIA H100 NVL") is None
    with pytest.raises(ValueError, match="no hardware is called 'h20'; there are h200, h100, h800"):
        hardware.named("h20")
    for device in hardware.known().values():
        assert device.flops["float8"] > device.flops["bfloat16"] > device.flops["float32"]
