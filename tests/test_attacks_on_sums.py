"""Sums in place: what a name means before and after, and where in memory the sum lies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attacks import E, Experts, H, K, T, check, check_inference

Sum = Callable[[list[Tensor]], Tensor]


class Unrolled(Experts):
    """Every expert on every token, one by one, weighted by gates; `add` is how the terms are added."""

    def __init__(self, add: Sum) -> None:
        super().__init__()
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(x)
        gates = torch.zeros(T, E).scatter(1, ids, weights)
        return self.add([gates[:, e : e + 1] * (torch.relu(x @ self.w_in[e]) @ self.w_out[e]) for e in range(E)])


def by_method(terms: list[Tensor]) -> Tensor:
    out = torch.zeros_like(terms[0])
    for term in terms:
        out.add_(term)
    return out


def by_operator(terms: list[Tensor]) -> Tensor:
    out = torch.zeros_like(terms[0])
    for term in terms:
        out += term
    return out * 2 + out


def under_another_name(terms: list[Tensor]) -> Tensor:
    out = torch.zeros_like(terms[0])
    name = out.view(-1)
    for term in terms:
        out += term
    return name.view(T, H) * 2


def from_the_first(terms: list[Tensor]) -> Tensor:
    out = terms[0]
    for term in terms[1:]:
        out += term
    return out


def read_between(terms: list[Tensor]) -> Tensor:
    out = torch.zeros_like(terms[0])
    for term in terms[:3]:
        out += term
    early = out.sum()
    for term in terms[3:]:
        out += term
    return out + early


def last_in_place(terms: list[Tensor]) -> Tensor:
    out = terms[0]
    for term in terms[1:-1]:
        out = out + term
    early = out * 2
    out += terms[-1]
    return early


def onto_half(terms: list[Tensor]) -> Tensor:
    out = torch.zeros_like(terms[0])
    for term in terms:
        out[:5] += term[:5]
    return out


def doubled_between(terms: list[Tensor]) -> Tensor:
    out = torch.zeros_like(terms[0])
    for number, term in enumerate(terms):
        out += term
        if number == 2:
            out.mul_(2)
    return out


@pytest.mark.parametrize("add", [by_method, by_operator])
def test_dense_experts_added_in_place(add: Sum) -> None:
    check(Unrolled(add), sites=1)


@pytest.mark.parametrize(
    "add", [under_another_name, from_the_first, read_between, last_in_place, onto_half, doubled_between]
)
def test_dense_sums_that_change_on_the_way(add: Sum) -> None:
    check(Unrolled(add), sites=0)


def test_rows_written_over_what_was_read_before() -> None:
    """A name that is read before the experts' rows are put into its memory by another name."""

    class Later(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).max(-1)
            order = ids.argsort(stable=True)
            hidden = torch.relu(torch.bmm(x[order].unsqueeze(1), self.w_in[ids[order]]))
            rows = torch.bmm(hidden, self.w_out[ids[order]]).squeeze(1) * weights[order, None]
            memory = x.view(2, -1, H) * 2
            early = memory.view(T, H)
            read = early.sin()
            late = memory.view(T, H)
            late[order] = rows
            return read

    check_inference(Later(), torch.randn(T, H))


def turned(x: Tensor) -> Tensor:
    """The same in another order in memory."""
    return x.t().contiguous().t()


LAYOUTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "strides of the sum": lambda x, token, rows: (out := turned(rows.view(T, K, H).sum(1))).as_strided(
        out.shape, out.stride()
    ),
    "strides of the base": lambda x, token, rows: (out := turned(x * 2).index_add(0, token, rows)).as_strided(
        out.shape, out.stride()
    ),
    "view of the base": lambda x, token, rows: turned(x * 2).index_add(0, token, rows).view(-1),
    "as it lies": lambda x, token, rows: turned(rows.view(T, K, H).sum(1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_the_sum_lies_in_memory(layout: str) -> None:
    class Laid(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            flat, token = ids.reshape(-1), torch.arange(T * K) // K
            hidden = torch.relu(torch.bmm(x[token].unsqueeze(1), self.w_in[flat]))
            rows = torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
            return LAYOUTS[layout](x, token, rows)

    check(Laid())


def weighted_in_place(rows: Tensor, weights: Tensor) -> Tensor:
    rows *= weights
    return rows.view(T, 1, H).sum(1)


def weighted_by_method(rows: Tensor, weights: Tensor) -> Tensor:
    return rows.mul_(weights).view(T, 1, H).sum(1)


def weighted_then_added(rows: Tensor, weights: Tensor) -> Tensor:
    rows *= weights
    return torch.zeros_like(rows).index_add_(0, torch.arange(T), rows)


def dropped_out_in_place(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.nn.functional.dropout(rows * weights, 0.1, False, inplace=True).view(T, 1, H).sum(1)


@pytest.mark.parametrize("combine", [weighted_in_place, weighted_by_method, weighted_then_added, dropped_out_in_place])
def test_rows_of_one_choice_changed_in_place(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
    """With one expert a token, the rows before the change could be a result as well as those after it."""

    class OneChoice(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).topk(1)
            flat = ids.reshape(-1)
            hidden = torch.relu(torch.bmm(x.unsqueeze(1), self.w_in[flat]))
            return combine(torch.bmm(hidden, self.w_out[flat]).squeeze(1), weights.reshape(-1, 1))

    check(OneChoice(), sites=1)


@pytest.mark.parametrize("bias", [torch.zeros, torch.ones])
def test_a_constant_bias_under_autocast(bias: Callable[..., Tensor]) -> None:
    class Biased(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            flat, rows = ids.reshape(-1), x.repeat_interleave(K, 0).unsqueeze(1)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = torch.relu(torch.baddbmm(bias(1, 1, 24), rows, self.w_in[flat]))
                out = torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
            return out.view(T, K, H).sum(1)

    check(Biased(), sites=0, tolerance=1e-2)
