"""Indices that are easily taken for others: where two sizes agree, and where a digit is renamed or looked up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moecompile
from attacks import E, Experts, H, K, Loop, T, check, check_inference

SQUARE = H // K  # tokens of which there are as many assignments as features
Rows = Callable[[Tensor], Tensor]


class Sorted(Experts):
    """Gathered weights on rows sorted by expert; `change` is what an attack does to one of the tensors."""

    def __init__(self, **change: Rows) -> None:
        super().__init__()
        self.change = change

    def changed(self, name: str, value: Tensor) -> Tensor:
        return self.change[name](value) if name in self.change else value

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.routed(x)
        order = ids.reshape(-1).argsort(stable=True)
        rows, chosen = self.changed("rows", x[order // K]), self.changed("ids", ids.reshape(-1)[order])
        hidden = torch.relu(torch.bmm(rows.unsqueeze(1), self.w_in[chosen]))
        out = torch.bmm(hidden, self.w_out[chosen]).squeeze(1)
        return self.changed("out", out * self.changed("weights", weights.reshape(-1)[order, None])), order

    def forward(self, x: Tensor) -> Tensor:
        out, order = self.outputs(x)
        return torch.zeros_like(x).index_add(0, order // K, out)


@pytest.mark.parametrize("name", ["rows", "ids", "weights", "out"])
@pytest.mark.parametrize("place", [0, 7])
def test_one_row_for_all(name: str, place: int) -> None:
    """A constant index reads one row of the sorted order, whatever assignment that is."""
    check(Sorted(**{name: lambda rows: rows[torch.full((T * K,), place)]}))


@pytest.mark.parametrize("name", ["rows", "out"])
def test_rows_read_back_twice(name: str) -> None:
    """The inverse of the order, applied to rows that are in the order of the assignments already."""

    class Twice(Sorted):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            order = ids.reshape(-1).argsort(stable=True)
            inverse = order.argsort()
            rows = x.repeat_interleave(K, 0)
            rows = rows[inverse] if name == "rows" else rows
            out = torch.bmm(
                torch.relu(torch.bmm(rows.unsqueeze(1), self.w_in[ids.reshape(-1)])), self.w_out[ids.view(-1)]
            )
            out = out.squeeze(1) * weights.reshape(-1)[inverse if name == "out" else order[inverse], None]
            return out.view(T, K, H).sum(1)

    check(Twice())


class Square(Sorted):
    """As many assignments as features, so that what is transposed fits."""

    put: Callable[[Tensor, Tensor, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        out, order = self.outputs(x[:SQUARE])
        return self.put(out.t(), order, torch.zeros(SQUARE, H))


PUTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "index_add": lambda out, order, base: base.index_add(0, order // K, out),
    "scatter_add": lambda out, order, base: base.scatter_add(0, (order // K)[:, None].expand(-1, H), out),
    "accumulate": lambda out, order, base: base.index_put((order // K,), out, accumulate=True),
    "index_copy": lambda out, order, base: torch.zeros_like(out).index_copy(0, order, out).view(-1, K, H).sum(1),
    "inverse": lambda out, order, base: out[order.argsort()].view(-1, K, H).sum(1),
    "scatter": lambda out, order, base: (
        torch.zeros_like(out).scatter(0, order[:, None].expand(-1, H), out).view(-1, K, H).sum(1)
    ),
}


@pytest.mark.parametrize("put", PUTS)
def test_transposed_rows_put_back(put: str) -> None:
    model = Square()
    model.put = PUTS[put]
    check(model, sites=0)


@pytest.mark.parametrize("result", [False, True])
def test_an_index_that_runs_along_the_features(result: bool) -> None:
    """gather(0, arange(H) along the features): the diagonal, where a repeated arange would be the rows themselves."""

    class Diagonal(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).max(-1)
            along = torch.arange(H)
            rows = x.unsqueeze(1)
            if not result:
                rows = rows.gather(0, along[None, None, :].expand(H, 1, H))[along]
            out = torch.bmm(torch.relu(torch.bmm(rows, self.w_in[ids])), self.w_out[ids]).squeeze(1) * weights[:, None]
            return out.gather(0, along[None, :].expand(H, H)) * torch.ones(H)[along][:, None] if result else out

    check_inference(Diagonal(), torch.randn(H, H))


def test_an_integer_beside_a_tensor_selects_first() -> None:
    """v[0, :, ids] is (rest, ids), where NumPy would say (ids, rest)."""

    class Selected(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            flat, rows = ids.reshape(-1), x.repeat_interleave(K, 0).unsqueeze(1)
            stacked = self.w_in.view(E, H, 2, 12).permute(2, 1, 0, 3)
            hidden = torch.relu(torch.bmm(rows, stacked[0, :, flat])) * torch.bmm(rows, stacked[1, :, flat])
            out = torch.bmm(hidden, self.w_out[flat, :12]).squeeze(1) * weights.reshape(-1, 1)
            return out.view(-1, K, H).sum(1)

    check_inference(Selected(), torch.randn(SQUARE, H))


def test_a_lookup_by_the_names_of_the_other_dimension() -> None:
    """ids.t()[ids, ids]: each index speaks of the dimension that the other one replaces."""

    class Looked(Experts):
        def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
            weights, ids = super().routed(x)
            return weights, ids.t()[ids % K, ids]

    check_inference(Looked(), torch.randn(T, H))


def test_a_product_along_the_choices_and_the_features_at_once() -> None:
    """bmm((T, K, H), (T, K, H)) with K == H sums features against choices."""

    class Crossed(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).topk(4)
            rows = self.w_in[ids][:, :, 0, :4]
            return torch.bmm(torch.bmm(rows, rows), weights.unsqueeze(-1)).squeeze(-1) @ torch.ones(4, H)

    check_inference(Crossed(), torch.randn(T, H))


BETWEEN: dict[str, Rows] = {
    "transposed": lambda out: out.t(),
    "other tokens": lambda out: out.view(H // 2, 2, H).transpose(0, 1).reshape(H, H),
    "other features": lambda out: out.view(H, 2, -1).transpose(1, 2).reshape(H, H),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_a_sum_rearranged_between_two_experts(between: str) -> None:
    class Between(Loop):
        def forward(self, x: Tensor) -> Tensor:
            _, ids = self.routed(x)
            out = torch.zeros_like(x)
            for expert in range(E):
                (tokens,) = (ids == expert).any(-1).nonzero(as_tuple=True)
                out = out.index_add(0, tokens, torch.relu(x[tokens] @ self.w_in[expert]) @ self.w_out[expert])
                out = BETWEEN[between](out) if expert == 2 else out
            return out

    check_inference(Between(), torch.randn(H, H))


def test_an_expert_that_adds_at_the_number_of_its_choice() -> None:
    """As many tokens as choices: each index fits the sum."""

    class Other(Loop):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).topk(4)
            out = torch.zeros_like(x)
            for expert in range(E):
                tokens, choices = torch.where(ids == expert)
                rows = torch.relu(x[tokens] @ self.w_in[expert]) @ self.w_out[expert] * weights[tokens, choices, None]
                out.index_add_(0, choices if expert == 0 else tokens, rows)
            return out

    check_inference(Other(), torch.randn(4, H))


CLAMPS: dict[str, Rows] = {
    "clamp(min=0)": lambda ids: ids.clamp(min=0),
    "clamp_min": lambda ids: ids.clamp_min(0),
    "clamp(-2)": lambda ids: ids.clamp(-2) % E,
    "in place": lambda ids: (ids - 1).clamp_(min=0),
}


@pytest.mark.parametrize("clamp", CLAMPS)
def test_ids_of_unknown_range_clamped(clamp: str) -> None:
    """An id of -1 becomes the first expert, not the last."""

    class Clamped(Experts):
        def forward(self, x: Tensor) -> Tensor:
            ids = CLAMPS[clamp](self.routed(x)[1] - 1)
            hidden = torch.relu(torch.einsum("th,tkhi->tki", x, self.w_in[ids]))
            return torch.einsum("tki,tkih->th", hidden, self.w_out[ids])

    check_inference(Clamped(), torch.randn(T, H))


def test_ids_below_zero_fail_where_the_model_fails() -> None:
    """index_select knows no index that counts from the end."""

    class FromOutside(Experts):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
            flat, rows = ids.reshape(-1), x.repeat_interleave(K, 0).unsqueeze(1)
            hidden = torch.relu(torch.bmm(rows, self.w_in.index_select(0, flat)))
            return torch.bmm(hidden, self.w_out.index_select(0, flat)).view(T, K, H).sum(1)

    model = FromOutside()
    compiled = torch.compile(model, backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    x, ids = torch.randn(T, H), torch.randint(E, (T, K))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, ids), model(x, ids), rtol=1e-4, atol=1e-5)
        assert len(moecompile.last_report().sites) == 1
        ids[3] = -1
        for call in (model, compiled):
            with pytest.raises((IndexError, RuntimeError)):
                call(x, ids)


def test_take_along_dim_wraps_around() -> None:
    class Wrapped(Experts):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
            index = ids.view(-1, 1, 1)
            hidden = torch.relu(torch.bmm(x.unsqueeze(1), torch.take_along_dim(self.w_in, index, 0)))
            return torch.bmm(hidden, torch.take_along_dim(self.w_out, index, 0)).squeeze(1)

    model = Wrapped()
    compiled = torch.compile(model, backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    with torch.no_grad():
        for ids in (torch.randint(E, (T,)), torch.full((T,), E - 1)):
            x = torch.randn(T, H)
            torch.testing.assert_close(compiled(x, ids), model(x, ids), rtol=1e-4, atol=1e-5)
    assert moecompile.last_report().sites == ()


def test_bins_that_begin_in_another_order() -> None:
    """cat([0, ends[:-1]]) with the ends turned around before."""
    experts, block = 5, 16

    class Padded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = torch.nn.Linear(H, experts, bias=False)
            self.w_in, self.w_out = (torch.nn.Parameter(torch.randn(experts, H, H) / 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).topk(K)
            chosen, order = ids.view(-1).sort(stable=True)
            counts = F.one_hot(chosen, experts).sum(0)
            ends = ((counts + block - 1) // block * block).cumsum(0)
            begins = torch.cat([ends.new_zeros(1), ends[:-1].view(2, 2).t().reshape(-1)])
            slot = torch.arange(T * K) + (begins - (counts.cumsum(0) - counts))[chosen]
            rows = x.new_zeros(T * K + experts * block, H, dtype=torch.bfloat16)
            rows[slot] = x.bfloat16()[order // K]
            hidden = torch.relu(torch._grouped_mm(rows, self.w_in.bfloat16(), offs=ends.int()))
            out = torch._grouped_mm(hidden, self.w_out.bfloat16(), offs=ends.int())[slot].float()
            return torch.zeros_like(x).index_add(0, order // K, out * weights.view(-1)[order, None])

    compiled = torch.compile(Padded(), backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    with torch.no_grad():
        compiled(torch.randn(T, H))  # bins overlap: no numbers
    assert moecompile.last_report().sites == ()
    assert any("another order" in miss.reason for miss in moecompile.last_report().near_misses)
