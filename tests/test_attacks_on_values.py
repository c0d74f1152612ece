"""Models that look like a known form and mean something else: whatever is done to them, they compute what eager does.

Here: dtypes, constants and other values. Each was a wrong rewrite or a crash once, or is next to one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moecompile
from attacks import Dense, E, Experts, H, K, Loop, T, check, check_inference


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", [Experts, Dense, Loop])
def test_blocks_in_a_row(kind: type[Experts]) -> None:
    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = kind(), kind(), kind()

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(x)).view(2, -1, H)
            return torch.sigmoid(self.third(x.flatten(0, 1)))

    check(Row(), sites=3)


class Scaled(Experts):
    """The activation is multiplied by a constant tensor."""

    def __init__(self, constant: Callable[[], Tensor]) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(x)
        flat, rows = ids.reshape(-1), x.repeat_interleave(K, 0)
        hidden = torch.bmm(rows.unsqueeze(1), self.w_in[flat]) * self.constant()
        out = torch.bmm(hidden.float(), self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
        return out.view(T, K, H).sum(1)


@pytest.mark.parametrize(
    "constant",
    [
        lambda: torch.full((1,), 1.01, dtype=torch.bfloat16),
        lambda: torch.full((1,), 1.01, dtype=torch.float64),
        lambda: torch.full((), 300, dtype=torch.int64).to(torch.uint8),
        lambda: torch.full((1,), 70000.0).to(torch.float16).clamp(max=3),
    ],
    ids=["bfloat16", "float64", "uint8", "float16"],
)
def test_constants_keep_their_dtype(constant: Callable[[], Tensor]) -> None:
    check(Scaled(constant))


def test_a_sum_in_complex_numbers_is_no_crash() -> None:
    class Complex(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            flat, rows = ids.reshape(-1), x.repeat_interleave(K, 0)
            hidden = torch.relu(torch.bmm(rows.unsqueeze(1), self.w_in[flat]))
            out = torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
            return out.view(T, K, H).sum(1, dtype=torch.complex64).real

    check_inference(Complex(), torch.randn(T, H))


def test_a_tensor_without_dimensions_is_no_crash() -> None:
    class Scalar(Experts):
        def forward(self, x: Tensor) -> Tensor:
            most = self.router(x).sum(0).argmax()
            return super().forward(x) * (most == 3).any(0).float()

    check(Scalar())


@pytest.mark.parametrize("spelling", ["to", "type_as", "copy", "keyword"])
def test_a_cast_to_a_rows_dtype_does_what_it_did(spelling: str) -> None:
    """Whatever takes a row only for its dtype is freed from it; whatever takes more of it keeps the block."""

    class Cast(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            flat, rows = ids.reshape(-1), x.repeat_interleave(K, 0)
            hidden = torch.relu(torch.bmm(rows.unsqueeze(1), self.w_in[flat]))
            mine = torch.zeros(T, H)
            if spelling == "to":
                other = mine.to(hidden)
            elif spelling == "type_as":
                other = mine.type_as(hidden)
            elif spelling == "copy":
                other = mine.to(hidden, copy=True)
            else:
                other = mine.to(hidden, non_blocking=True)
            other.add_(1)  # and into `mine`, unless that was copied
            out = torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
            return out.view(T, K, H).sum(1) + mine + other

    check(Cast(), sites=1 if spelling in ("to", "type_as") else 0)


def test_gates_whose_derivative_is_infinite_at_zero() -> None:
    class Root(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            gates = torch.zeros(T, E).scatter(1, ids, weights)
            hidden = torch.bmm(x.unsqueeze(0) * gates.t().unsqueeze(-1), self.w_in)
            return torch.bmm(hidden.abs().sqrt(), self.w_out).sum(0)

    check_inference(Root(), torch.randn(T, H))
    assert moecompile.last_report().sites == ()


def test_tensor_subclasses_are_left_alone() -> None:
    """A DTensor decides itself what an operator does, and does not know ours."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    def block(x: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        weights, ids = (x @ router).softmax(-1).topk(K)
        hidden = torch.relu(torch.einsum("th,tkhi->tki", x, w_in[ids]))
        return torch.einsum("tki,tkih,tk->th", hidden, w_out[ids], weights)

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = (torch.randn(T, H), torch.randn(H, E), torch.randn(E, H, 24), torch.randn(E, 24, H))
        spread = [distribute_tensor(tensor, mesh, [Replicate()]) for tensor in plain]
        compiled = torch.compile(block, backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
        result = compiled(*spread)
        assert isinstance(result, DTensor)
        torch.testing.assert_close(result.full_tensor(), block(*plain), rtol=1e-4, atol=1e-4)
        (miss,) = moecompile.last_report().near_misses
        assert "DTensor" in miss.reason
    finally:
        torch.distributed.destroy_process_group()


def test_dropout_between_the_products_that_drops_nothing() -> None:
    class Dropped(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            flat, rows = ids.reshape(-1), F.dropout(x, 0.0).repeat_interleave(K, 0)
            hidden = F.dropout(torch.relu(torch.bmm(rows.unsqueeze(1), self.w_in[flat])), 0.3, training=False)
            out = torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
            return out.view(T, K, H).sum(1)

    check(Dropped(), sites=1)


@pytest.mark.parametrize("spelling", ["method", "function", "operator"])
def test_a_number_less_the_hidden_rows(spelling: str) -> None:
    class Reflected(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            hidden = torch.einsum("th,tkhi->tki", x, self.w_in[ids])
            if spelling == "method":
                turned = hidden.__rsub__(1.5)
            else:
                turned = torch.rsub(hidden, 1.5) if spelling == "function" else 1.5 - hidden
            return torch.einsum("tki,tkih,tk->th", turned, self.w_out[ids], weights)

    check(Reflected(), sites=1)
