"""Models that look like a known form and mean something else: whatever is done to them, they compute what eager does.

Here: expert and token ids that are not what they seem. Each was a wrong rewrite or a crash once, or is next to one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moecompile
from attacks import Dense, E, Experts, H, Ids, K, Loop, T, check, check_inference, sites_of


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def one_of_each_half(logits: Tensor) -> tuple[Tensor, Tensor]:
    """One expert for each of two groups of logits, out of the same experts: both may choose the same."""
    weights, ids = logits.view(-1, K, E).softmax(-1).topk(1)
    return weights.squeeze(-1), ids.squeeze(-1)


def along_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The best tokens of each expert, read as experts of tokens: a token may be named by several."""
    weights, ids = logits.softmax(-1)[:E].topk(K, dim=0)
    return weights.T.repeat(2, 1)[:T], ids.T.repeat(2, 1)[:T]


def one_less(logits: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = logits.softmax(-1)
    ids = probabilities.detach().topk(K).indices
    ids -= 1
    return probabilities.detach()[:, :K], ids[:, :K]


def folded(logits: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = logits.softmax(-1)
    ids = probabilities.detach().topk(K).indices
    ids.clamp_(max=E // 2)
    return probabilities.detach()[:, :K], ids.clone()


def narrowed(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(K)
    return weights, ids.bool().long()


@pytest.mark.parametrize("kind", [Experts, Dense, Loop])
@pytest.mark.parametrize("route", [one_of_each_half, along_tokens, one_less, folded, narrowed])
def test_ids_that_are_not_what_a_topk_chose(route: Ids, kind: type[Experts]) -> None:
    if route is one_less and kind is Dense:
        pytest.skip("scatter has no expert -1")
    check(kind(route, K * E if route is one_of_each_half else E))


def test_a_capacity_without_end_is_no_crash() -> None:
    class Endless(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            mask = F.one_hot(ids[:, 0], E)
            place = (mask.cumsum(0) * mask).sum(-1) - 1
            kept = place < float("inf")
            dispatch = (mask * kept[:, None]).float()[:, :, None] * F.one_hot(place, T).float()[:, None]
            rows = torch.einsum("tec,th->ech", dispatch, x)
            out = torch.relu(rows @ self.w_in) @ self.w_out
            return torch.einsum("tec,ech->th", dispatch * weights[:, :1, None], out)

    check(Endless())


def test_a_null_expert_is_left_alone() -> None:
    """One more score than experts: an id beyond them, which the model's own gates leave out."""

    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = logits.softmax(-1).topk(K)
        return weights, ids

    class Null(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            gates = ((ids.unsqueeze(-1) == torch.arange(E)) * weights.unsqueeze(-1)).sum(1)
            hidden = torch.relu(torch.einsum("th,ehi->eti", x, self.w_in))
            return torch.einsum("te,eth->th", gates, torch.einsum("eti,eih->eth", hidden, self.w_out))

    check(Null(route, E + 1), sites=0)


def test_an_id_beyond_the_experts_chooses_no_gate() -> None:
    """The model's own comparison leaves it out; as an id of the operator it would be an error."""

    class Dropped(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).topk(1)
            ids = torch.where(weights < weights.median(), E, ids)
            gates = ((ids.unsqueeze(-1) == torch.arange(E)) * weights.unsqueeze(-1)).sum(1)
            hidden = torch.relu(torch.einsum("th,ehi->eti", x, self.w_in))
            return torch.einsum("te,eth->th", gates, torch.einsum("eti,eih->eth", hidden, self.w_out))

    check(Dropped(), sites=0)


def test_ids_that_wrap_around_in_a_narrow_dtype() -> None:
    class Narrow(Experts):
        def __init__(self) -> None:
            super().__init__(logits=200)
            self.w_in = nn.Parameter(torch.randn(200, H, 24) / 4)
            self.w_out = nn.Parameter(torch.randn(200, 24, H) / 4)

        def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
            weights, ids = self.router(x).softmax(-1).topk(T)
            return weights, ids.to(torch.int8).long()  # 199 is -57, the last expert but 56: 143

    check(Narrow(), sites=1)


@pytest.mark.parametrize("counts", ["histc", "compared"])
@pytest.mark.parametrize("bad", [None, -1, E])
def test_ids_from_outside_that_name_no_expert(counts: str, bad: int | None) -> None:
    """A histogram leaves them out, and what the experts then make of the rows is nothing the operator would do."""

    class Given(Experts):
        def forward(self, x: Tensor, *routing: Tensor) -> Tensor:
            weights, ids = routing
            flat = ids.reshape(-1)
            order = flat.argsort(stable=True)
            if counts == "histc":
                ends = torch.histc(flat.float(), E, 0, E - 1).cumsum(0).to(torch.int32)
            else:
                ends = (flat[:, None] == torch.arange(E)).sum(0).cumsum(0).to(torch.int32)
            hidden = torch.relu(torch._grouped_mm(x.bfloat16()[order // K], self.w_in.bfloat16(), offs=ends))
            out = torch._grouped_mm(hidden, self.w_out.bfloat16(), offs=ends) * weights.reshape(-1)[order, None]
            return torch.zeros(T, H).index_add(0, order // K, out.float())

    model = Given()
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    if bad is not None:
        ids[3, 0] = bad
    compiled = torch.compile(model, backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    with torch.no_grad():
        compiled(torch.randn(T, H), torch.rand(T, K), ids)  # rows beyond the offsets are undefined: no numbers
    assert moecompile.last_report().sites == ()


def test_token_numbers_that_wrap_around() -> None:
    class Wrapped(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            flat = ids.reshape(-1)
            token = torch.arange(300, dtype=torch.uint8).long().repeat_interleave(K)
            hidden = torch.relu(torch.bmm(x[token].unsqueeze(1), self.w_in[flat]))
            out = torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
            return out.view(300, K, H).sum(1)

    check_inference(Wrapped(), torch.randn(300, H))


def test_no_choices_at_all_beside_a_write() -> None:
    class Nobody(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).topk(0)
            weights.detach().t().add_(1)
            nobody = ids.to(torch.int64)[:, :1].contiguous()  # casts and parts of no ids at all
            rows = x[nobody.reshape(-1)].to(x.dtype)
            return super().forward(x) + weights.sum() + nobody.sum() + rows.sum()

    check(Nobody(), sites=1)


def test_ids_compared_with_the_number_of_their_choice_are_no_counts() -> None:
    """As many choices as experts: the comparison broadcasts along the choices, not to a dimension of experts."""

    class Compared(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).topk(E)
            order = ids.reshape(-1).argsort(stable=True)
            ends = (ids == torch.arange(E)).sum(0).cumsum(0).to(torch.int32)
            hidden = torch.relu(torch._grouped_mm(x.bfloat16()[order // E], self.w_in.bfloat16(), offs=ends))
            out = torch._grouped_mm(hidden, self.w_out.bfloat16(), offs=ends) * weights.reshape(-1)[order, None]
            return torch.zeros(T, H).index_add(0, order // E, out.float())

    compiled = torch.compile(Compared(), backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    with torch.no_grad():
        compiled(torch.randn(T, H))  # rows beyond the offsets are undefined: no numbers
    assert moecompile.last_report().sites == ()


@pytest.mark.parametrize("repeat", [lambda ids: ids.repeat(2, 1), lambda ids: ids[None].expand(2, T, K)])
def test_rows_sorted_by_ids_that_repeat(repeat: Callable[[Tensor], Tensor]) -> None:
    """Twice as many rows as the offsets count: the experts of the second half get other rows."""

    class Twice(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            order = repeat(ids).reshape(-1).argsort(stable=True)
            ends = F.one_hot(ids.reshape(-1), E).sum(0).cumsum(0).to(torch.int32)
            rows = x.bfloat16()[order // K % T]
            hidden = torch.relu(torch._grouped_mm(rows, self.w_in.bfloat16(), offs=ends))
            out = torch._grouped_mm(hidden, self.w_out.bfloat16(), offs=ends)
            return (out[order.argsort()].view(2, T, K, H)[0] * weights[..., None].bfloat16()).sum(1)

    compiled = torch.compile(Twice(), backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    with torch.no_grad():
        compiled(torch.randn(T, H))
    assert moecompile.last_report().sites == ()
    assert moecompile.last_report().near_misses


@pytest.mark.parametrize("lowest", [-E, -E - 1])
def test_ids_that_count_from_the_end(lowest: int) -> None:
    """-1 is the last expert where weights are indexed; below -E there is none, for eager and for us."""

    class Given(Experts):
        def forward(self, x: Tensor, *routing: Tensor) -> Tensor:
            weights, ids = routing
            hidden = torch.relu(torch.einsum("th,tkhi->tki", x, self.w_in[ids]))
            return torch.einsum("tki,tkih,tk->th", hidden, self.w_out[ids], weights)

    model = Given()
    ids = torch.randint(E, (T, K))
    ids[3] = lowest
    arguments = (torch.randn(T, H), torch.rand(T, K), ids)
    compiled = torch.compile(model, backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    with torch.no_grad():
        if lowest < -E:
            with pytest.raises(IndexError):
                compiled(*arguments)
        else:
            torch.testing.assert_close(compiled(*arguments), model(*arguments), rtol=1e-4, atol=1e-5)
    assert len(moecompile.last_report().sites) == 1


def marks(logits: Tensor) -> Tensor:
    """Whether each expert is one of its token's."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(K, -1).indices, True)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "other tokens'": lambda logits: marks(logits)[logits.sum(-1).argsort()],
    "other experts'": lambda logits: marks(logits)[:, torch.tensor([1, 0, 2, 3, 5, 4])],
    "transposed": lambda logits: marks(logits).t(),
    "of each expert's choice": lambda logits: marks(logits.t()).t(),
}


@pytest.mark.parametrize("name", MASKS)
def test_gates_masked_by_marks_in_another_order(name: str) -> None:
    """As many tokens as experts, so that every order has the same shape."""

    class Masked(Experts):
        def forward(self, x: Tensor) -> Tensor:
            x = x[:E]
            logits = self.router(x)
            gates = logits.sigmoid().masked_fill(~MASKS[name](logits), 0.0)
            hidden = torch.relu(torch.einsum("th,ehi->eti", x, self.w_in))
            return torch.einsum("te,eth->th", gates, torch.einsum("eti,eih->eth", hidden, self.w_out))

    check(Masked(), sites=0)


def summed(weights: Tensor, hit: Tensor) -> Tensor:
    return (weights * hit).sum(-1)


SUMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "over tokens": lambda weights, hit, token, choice: (weights * hit).sum(0)[choice],
    "twice": lambda weights, hit, token, choice: summed(weights.repeat(1, 2), hit.repeat(1, 2))[token],
    "of repeated ids": lambda weights, hit, token, choice: summed(weights, hit)[token],
}


@pytest.mark.parametrize("name", SUMS)
def test_summed_weights_that_are_not_the_choices_own(name: str) -> None:
    class Summed(Experts):
        def forward(self, x: Tensor) -> Tensor:
            logits = self.router(x)
            weights, ids = logits.softmax(-1).topk(K)
            if name == "of repeated ids":
                ids = torch.stack([logits.argmax(-1), logits.abs().argmax(-1)], -1)
            out = torch.zeros_like(x)
            for expert in range(E):
                hit = ids == expert
                token, choice = torch.where(hit)
                gate = SUMS[name](weights, hit, token, choice)
                y = torch.relu(x[token] @ self.w_in[expert]) @ self.w_out[expert]
                out = out.index_add(0, token, y * gate[:, None])
            return out

    check(Summed(), sites=0)


COUNTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one_hot of the rows' ids": lambda ids, order: F.one_hot(ids[order // K], E).sum((0, 1)),
    "compared ids of the rows": lambda ids, order: (ids[order // K][..., None] == torch.arange(E)).sum((0, 1)),
    "histogram of the rows' ids": lambda ids, order: torch.histc(ids[order // K].float(), E, 0, E - 1).long(),
    "marks of the rows": lambda ids, order: zeros(T, E).scatter(1, ids, 1)[order // K].sum(0),
    "marks repeated": lambda ids, order: zeros(T, E).scatter(1, ids, 1).repeat(2, 1).sum(0),
    "scaled": lambda ids, order: zeros(E).index_add(0, ids.flatten(), zeros(T * K) + 1, alpha=2),
}


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_more_than_the_assignments(name: str) -> None:
    """Each expert is counted twice, and the offsets end beyond the rows: nothing here may run."""

    class Counted(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            order = ids.flatten().argsort(stable=True)
            ends = COUNTS[name](ids, order).cumsum(0).int()
            hidden = torch.relu(torch._grouped_mm(x.bfloat16()[order // K], self.w_in.bfloat16(), offs=ends))
            out = torch._grouped_mm(hidden, self.w_out.bfloat16(), offs=ends) * weights.flatten()[order, None]
            return torch.zeros(T, H).index_add(0, order // K, out.float())

    assert sites_of(Counted()) == ()
