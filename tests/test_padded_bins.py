"""Form "padded_bins": spellings that are found and compute the same, near-spellings that are refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moecompile  # noqa: F401  (registers the operators)
from moecompile.passes.detect import Detection, detect
from padded_modules import (
    BF16,
    B,
    E,
    H,
    K,
    Padded,
    Searched,
    Table,
    kept_sum,
    poison,
    put,
    put_back,
    rank,
    slots,
)
from rewriting import rewrite
from zoo_capture import captured


def rows_of(x: Tensor, rows: Tensor) -> tuple[int, int]:
    return rows.shape[0] + E * B, H


def wide(slot: Tensor) -> Tensor:
    return slot.unsqueeze(-1).expand(-1, H)


def starts(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]])


def scattered(mask: Tensor) -> Tensor:
    """The same entries in another order."""
    return mask.view(4, -1).t().reshape(-1)


def empty(x: Tensor, slot: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(rows_of(x, rows)).index_copy(0, slot, rows)


def spare_row_seen(x: Tensor, token: Tensor, y: Tensor, count: int, table: Tensor) -> tuple[Tensor, Tensor]:
    out = x.new_zeros(count + 1, H).index_add_(0, token, y)
    return out[:count], out[-1]


FOUND: dict[str, Padded] = {
    "slots": Padded(),
    "negated floor": Padded(rounded=lambda c: -(-c // B) * B),
    "division": Padded(rounded=lambda c: torch.div(c + (B - 1), B, rounding_mode="trunc") * B),
    "remainder": Padded(rounded=lambda c: c + (-c) % B),
    "remainder of remainder": Padded(rounded=lambda c: c + (B - c % B) % B),
    "bits": Padded(rounded=lambda c: (c + B - 1) & -B),
    "shifts": Padded(rounded=lambda c: (c + B - 1) >> 3 << 3),
    "ceil": Padded(rounded=lambda c: (torch.ceil(c / B) * B).long()),
    "one block at least": Padded(rounded=lambda c: (-(-c // B) * B).clamp(min=B)),
    "one row at least": Padded(rounded=lambda c: (c.clamp_min(1) + B - 1) // B * B),
    "shifted": Padded(slot=lambda key, c, p, ids, o: (p.cumsum(0) - c.cumsum(0) + c - p)[key] + torch.arange(len(key))),
    "starts": Padded(slot=lambda key, c, p, ids, o: torch.arange(len(key)) + starts(p)[key] - starts(c)[key]),
    "starts by pad": Padded(
        slot=lambda key, c, p, ids, o: rank(key, c) + F.pad(p.cumsum(0)[:-1], (1, 0))[key],
    ),
    "by assignment": Padded(
        slot=lambda key, c, p, ids, o: (p.cumsum(0) - c.cumsum(0) + c - p)[ids.view(-1)] + o.argsort(),
        put=lambda x, slot, rows: put(x, slot, x.repeat_interleave(K, 0)),
        combine=lambda x, y, weights, order: (y.view(-1, K, H) * weights.unsqueeze(-1)).sum(1),
    ),
    "scatter and gather": Padded(
        put=lambda x, slot, rows: x.new_zeros(rows_of(x, rows)).scatter(0, wide(slot), rows),
        read=lambda y, slot: y.gather(0, wide(slot)),
    ),
    "index_copy and index_select": Padded(
        put=lambda x, slot, rows: x.new_zeros(rows_of(x, rows)).index_copy(0, slot, rows),
        read=lambda y, slot: y.index_select(0, slot),
    ),
    "a number at empty slots": Padded(
        put=lambda x, slot, rows: x.new_full(rows_of(x, rows), 0.5).index_copy(0, slot, rows),
        activation=lambda h: h * 2,
    ),
    "not zero at zero": Padded(activation=F.softplus),
    "in place": Padded(activation=lambda h: F.silu(h, inplace=True).mul_(2)),
    "table": Table(),
    "table of -1": Table(
        table=lambda size, total, slot, order: torch.full((size,), -1).index_copy(0, slot, order),
        masked=lambda y, table, total: torch.where(table[:, None] >= 0, y, 0),
        sum=lambda x, token, y, tokens, table: torch.zeros_like(x).index_add(0, token.where(table > -1, 0), y),
    ),
    "zeros by pad": Table(
        rows=lambda x, token, table, total: F.pad(x, (0, 0, 0, 1))[token],
        masked=lambda y, table, total: y.masked_fill((table == total).unsqueeze(-1).expand_as(y), 0),
    ),
    "unmasked": Table(masked=lambda y, table, total: y),
    "inverted mask": Table(masked=lambda y, table, total: y.masked_fill(~(table < total)[:, None], 0)),
    "tokens' rows masked": Table(
        rows=lambda x, token, table, total: x[token.where(table < total, 0)].masked_fill((table == total)[:, None], 0)
    ),
    "weights of some assignment": Table(weights=lambda w, table, total: w[torch.where(table < total, table, 0)]),
    "added to token 0": Table(sum=kept_sum),
    "put back": Table(sum=put_back),
    "searched": Searched(),
    "searched by rank": Searched(filled=lambda place, count, slot, ends: count > place),
    "searched, row 0": Searched(row=lambda row, total, filled: torch.where(filled, row, 0)),
}

REFUSED: dict[str, tuple[Padded, str]] = {
    "ends of another block": (Padded(ends=lambda p, c: ((c + 1) // 2 * 2).cumsum(0)), "not the ends of the bins"),
    "slots of another block": (
        Padded(slot=lambda key, c, p, ids, o: slots(key, c, (c + 3) // 4 * 4, ids, o)),
        "not the ends of the bins",
    ),
    "ends without padding": (Padded(ends=lambda p, c: c.cumsum(0)), "not the ends of the bins"),
    "ends in another order": (Padded(ends=lambda p, c: p.sort().values.cumsum(0)), "not the ends of the bins"),
    "a block more": (Padded(rounded=lambda c: c // B * B + B), "a running sum of something"),
    "towards zero": (Padded(rounded=lambda c: torch.div(-c, B, rounding_mode="trunc") * -B + B), "towards zero"),
    "rows of another order": (
        Padded(put=lambda x, slot, rows: put(x, slot, x.repeat_interleave(K, 0))),
        "neither a token's row",
    ),
    "unsorted ids": (
        Padded(slot=lambda key, c, p, ids, o: (p.cumsum(0) - p)[ids.view(-1)] + torch.arange(len(key)) // B),
        "arithmetic",
    ),
    "overlapping": (Padded(slot=lambda key, c, p, ids, o: key * B + rank(key, c)), "with something else"),
    "one further": (Padded(slot=lambda *args: slots(*args) + 1), "places that are not the slots"),
    "every row twice": (
        Padded(put=lambda x, slot, rows: put(x, slot.repeat(2), rows.repeat(2, 1))),
        "not one for each assignment",
    ),
    "too few rows": (
        Padded(put=lambda x, slot, rows: x.new_zeros(len(rows) + E * B - 9, H).index_copy(0, slot, rows)),
        "may need",
    ),
    "uninitialised": (Padded(put=empty), "uninitialised memory"),
    "infinite derivative": (Padded(activation=lambda h: h.abs().sqrt()), "no finite value or derivative"),
    "unknown numbers": (
        Padded(put=lambda x, slot, rows: put(x, slot, rows) + 1, activation=torch.log),
        "may not be finite",
    ),
    "read one further": (Padded(read=lambda y, slot: y[slot + 1]), "read at other slots"),
    "read without padding": (Padded(read=lambda y, slot: y[: len(slot)]), "some of the assignments"),
    "rows seen": (Padded(result=lambda out, rows: (out, rows)), "also used by"),
    "a row of ones": (
        Table(rows=lambda x, token, table, total: torch.cat([x, x.new_ones(1, H)])[token]),
        "neither a row of tokens nor a row of zeros",
    ),
    "a token's row": (
        Table(rows=lambda x, token, table, total: x[token.where(table < total, 0)]),
        "whose gradients they would get",
    ),
    "weights of some assignment, unmasked": (
        Table(
            weights=lambda w, table, total: w[torch.where(table < total, table, 0)],
            masked=lambda y, table, total: y,
        ),
        "with uninitialised memory",
    ),
    "rows masked": (
        Table(masked=lambda y, table, total: y.masked_fill((table < total)[:, None], 0)),
        "a mask that overwrites rows",
    ),
    "added to token 0, unmasked": (
        Table(masked=lambda y, table, total: y, sum=kept_sum),
        "set it to zero there before the sum",
    ),
    "a table over token 0": (
        Table(table=lambda size, total, slot, order: torch.zeros(size, dtype=torch.int64).scatter_(0, slot, order)),
        "neither a row of tokens nor a row of zeros",
    ),
    "spare row kept": (
        Table(sum=lambda x, token, y, tokens, table: x.new_zeros(tokens + 1, H).index_add_(0, token, y)),
        "not summed into tokens",
    ),
    "spare row seen": (Table(sum=spare_row_seen), "used in several places"),
    "masked in another order": (
        Table(masked=lambda y, table, total: y.masked_fill(scattered(table == total)[:, None], 0)),
        "does not tell which are filled",
    ),
    "a table masked in another order": (
        Table(token=lambda table, total, tokens: torch.where(scattered(table < total), table // K, tokens)),
        "one index along two dimensions",
    ),
    "searched, of masks in another order": (
        Searched(filled=lambda place, count, slot, ends: (place < count) & scattered(slot < ends[-1])),
        "in another order",
    ),
    "searched from the left": (
        Searched(expert=lambda ends, slot: torch.searchsorted(ends, slot).clamp(max=E - 1)),
        "does not give their expert",
    ),
    "searched, one too many": (Searched(filled=lambda place, count, slot, ends: place <= count), "does not tell"),
    "searched, to another row": (Searched(row=lambda row, total, filled: row.clamp(max=total - 2)), "the last row"),
}

# what these compute is lost where CUDA's grouped GEMM leaves memory that holds NaN: refusing them is no caution
LOST = ("infinite derivative", "a token's row", "weights of some assignment, unmasked", "added to token 0, unmasked")


def tokens(count: int = 24) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, H).to(BF16).requires_grad_()


def detected(module: Padded) -> Detection:
    return detect(captured(module, (tokens(),)).gm.graph)


def observed(module: Callable[[Tensor], Any], parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    """The result, and the gradients of the tokens and of the parameters."""
    out = module(x)
    out = out[0] if isinstance(out, tuple) else out
    torch.manual_seed(2)
    grad = torch.randn(out.shape).to(BF16).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x, *parameters], grad)]


def fused(module: Padded, x: Tensor) -> list[Tensor]:
    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        assert rewrite(gm) == 1
        return gm.forward

    torch._dynamo.reset()
    return observed(torch.compile(module, backend=backend), list(module.parameters()), x)


@pytest.mark.parametrize("name", FOUND)
def test_a_spelling_is_found(name: str) -> None:
    detection = detected(FOUND[name])
    assert [site.form for site in detection.sites] == ["padded_bins"], detection.near_misses


@pytest.mark.parametrize("name", FOUND)
def test_a_spelling_computes_the_same_whatever_memory_held(name: str) -> None:
    """As near to the model in float64 as the model itself: its router's gradient of few tokens loses up to 2 %."""
    module = FOUND[name]
    for count in (24, 3):
        poisoned, exact = poison(module), poison(module).double()
        own = observed(poisoned, list(poisoned.parameters()), tokens(count))
        x = tokens(count).detach().double().requires_grad_()
        assert torch.equal(poisoned.routed(tokens(count))[1], exact.routed(x)[1]), "draw another router"
        expected = observed(exact, list(exact.parameters()), x)
        for a, b, c in zip(fused(module, tokens(count)), own, expected, strict=True):
            assert b.isfinite().all(), "what the model computes depends on memory that nothing wrote"
            assert (a - c).norm() <= 2 * (b - c).norm() + 1e-6


@pytest.mark.parametrize("name", LOST)
def test_a_refusal_has_a_cause(name: str) -> None:
    poisoned = poison(REFUSED[name][0])
    assert not all(value.isfinite().all() for value in observed(poisoned, list(poisoned.parameters()), tokens()))


@pytest.mark.parametrize("name", REFUSED)
def test_a_near_spelling_is_refused_with_a_reason(name: str) -> None:
    module, reason = REFUSED[name]
    detection = detected(module)
    assert not detection.sites
    assert any(reason in miss.reason for miss in detection.near_misses), detection.near_misses


@pytest.mark.parametrize("module", [Padded(), Table(), Searched()])
def test_symbolic_tokens(module: Padded) -> None:
    graph = captured(module, (tokens(),), dynamic=True).gm.graph
    assert [site.form for site in detect(graph).sites] == ["padded_bins"]


def test_inference_may_leave_empty_slots_uninitialised() -> None:
    with torch.no_grad():
        graph = captured(Padded(put=empty), (tokens(),)).gm.graph
    assert [site.form for site in detect(graph).sites] == ["padded_bins"]


@pytest.mark.parametrize("module", [Padded(), Table(), Searched()])
def test_nothing_of_the_block_stays(module: Padded) -> None:
    gm = captured(module, (tokens(),)).gm
    rewrite(gm)
    left = {str(node.target) for node in gm.graph.nodes if node.op in ("call_function", "call_method")}
    assert not any(word in name for name in left for word in ("grouped", "index_add", "scatter", "sort", "cat")), left
