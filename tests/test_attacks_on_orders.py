"""Models that look like a known form and mean something else: whatever is done to them, they compute what eager does.

Here: what is known of a tensor, and what is left of it once that is cut, reordered, spread or cast. Each was a wrong
rewrite once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attacks import Dense, E, Experts, H, K, T, check, sites_of


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def products(model: Experts, experts: Tensor, rows: Tensor) -> Tensor:
    hidden = torch.relu(torch.einsum("shi,sh->si", model.w_in[experts], rows))
    return torch.einsum("si,sih->sh", hidden, model.w_out[experts])


Routed = tuple[Tensor, Tensor, Tensor, Tensor]


def rows_in_a_third_order(model: Experts, x: Tensor, routed: Routed) -> Tensor:
    weights, flat, order, back = routed
    another = torch.arange(T * K).flip(0).roll(3)
    y = products(model, flat, x[order // K][back][another])
    return (y.view(T, K, H) * weights[..., None]).sum(1)


def one_row_for_all(model: Experts, x: Tensor, routed: Routed) -> Tensor:
    weights, flat, order, back = routed
    y = products(model, flat, x[order // K][back][3].expand(T * K, H))
    return (y.view(T, K, H) * weights[..., None]).sum(1)


def unsorted_rows_with_sorted_experts(model: Experts, x: Tensor, routed: Routed) -> Tensor:
    weights, flat, order, back = routed
    token = order // K
    y = products(model, flat[order], x[token[back]]) * weights.flatten()[order][:, None]
    return torch.zeros_like(x).index_add(0, token, y)


def sorted_rows_added_at_unsorted_tokens(model: Experts, x: Tensor, routed: Routed) -> Tensor:
    weights, flat, order, back = routed
    token = order // K
    y = products(model, flat[order], x[token]) * weights.flatten()[order][:, None]
    return torch.zeros_like(x).index_add(0, token[back], y)


@pytest.mark.parametrize(
    "forward",
    [
        rows_in_a_third_order,
        one_row_for_all,
        unsorted_rows_with_sorted_experts,
        sorted_rows_added_at_unsorted_tokens,
    ],
    ids=lambda forward: forward.__name__,
)
def test_an_index_replaced_after_it_was_divided(forward: Callable[[Experts, Tensor, Routed], Tensor]) -> None:
    """x[order // K][inverse] stands at j // K; another index in the place of j changes that digit, too."""

    class Reordered(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            flat = ids.flatten()
            order = flat.argsort(stable=True)
            return forward(self, x, (weights, flat, order, order.argsort()))

    check(Reordered(), sites=0)


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": lambda logits, masked: masked.bool().float().softmax(-1) * logits,
    "exp": lambda logits, masked: masked.to(torch.bool).to(torch.float32).exp() * logits,
    "sigmoid": lambda logits, masked: masked.bool().float().sigmoid() * logits,
}


@pytest.mark.parametrize("name", GATES)
def test_gates_that_went_through_bool(name: str) -> None:
    """-inf away from a token's experts is True, which is 1 and not 0 for whatever comes next."""

    class Truth(Dense):
        def forward(self, x: Tensor) -> Tensor:
            logits = self.router(x)
            values, ids = logits.topk(K)
            masked = torch.full_like(logits, float("-inf")).scatter(1, ids, values)
            gates = GATES[name](logits, masked)
            hidden = torch.relu(torch.einsum("th,ehi->eti", x, self.w_in))
            return torch.einsum("te,eth->th", gates, torch.einsum("eti,eih->eth", hidden, self.w_out))

    check(Truth(), sites=0)


OFFSETS: dict[str, Callable[[Tensor], Tensor]] = {
    "unbound": lambda counts: counts.cumsum(0).unbind(0)[-1].expand(E).contiguous(),
    "selected": lambda counts: counts.cumsum(0).select(0, -1).unsqueeze(0).repeat_interleave(E),
    "sliced": lambda counts: (counts.cumsum(0) - counts)[-1:].expand(E) + counts,
}


@pytest.mark.parametrize("name", OFFSETS)
def test_one_experts_offset_for_all(name: str) -> None:
    """The first expert then has all rows, or nearly all, and the others end where they begin or before."""

    class Spread(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            flat = ids.flatten()
            order = flat.argsort(stable=True)
            ends = OFFSETS[name](F.one_hot(flat, E).sum(0)).to(torch.int32)
            hidden = torch.relu(torch._grouped_mm(x.bfloat16()[order // K], self.w_in.bfloat16(), offs=ends))
            y = torch._grouped_mm(hidden, self.w_out.bfloat16(), offs=ends) * weights.flatten()[order][:, None]
            return torch.zeros_like(x).index_add(0, order // K, y.float())

    assert sites_of(Spread()) == ()
