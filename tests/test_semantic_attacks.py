"""Models that look like a known form and mean something else: whatever is done to them, they compute what eager does.

Each was a wrong rewrite or a crash once, or is next to one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moecompile

E, H, K, T = 6, 16, 2, 10
Ids = Callable[[Tensor], tuple[Tensor, Tensor]]


class Experts(nn.Module):
    """Gathered weights and batched products; `route` turns logits into weights and ids (T, choices)."""

    def __init__(self, route: Ids | None = None, logits: int = E) -> None:
        super().__init__()
        self.route = route
        self.router = nn.Linear(H, logits, bias=False)
        self.w_in = nn.Parameter(torch.randn(E, H, 24) / 4)
        self.w_out = nn.Parameter(torch.randn(E, 24, H) / 4)

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        if self.route is not None:
            return self.route(logits)
        weights, ids = logits.softmax(-1).topk(K)
        return weights, ids

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(x)
        flat, rows = ids.reshape(-1), x.repeat_interleave(ids.shape[1], 0)
        hidden = torch.relu(torch.bmm(rows.unsqueeze(1), self.w_in[flat]))
        out = torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
        return out.view(x.shape[0], ids.shape[1], H).sum(1)


class Dense(Experts):
    """Every expert on every token, weighted by gates that were scattered."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(x)
        gates = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        hidden = torch.relu(torch.einsum("th,ehi->eti", x, self.w_in))
        return torch.einsum("te,eth->th", gates, torch.einsum("eti,eih->eth", hidden, self.w_out))


class Loop(Experts):
    """A loop over all experts on the tokens that chose them, whichever choice it was."""

    def forward(self, x: Tensor) -> Tensor:
        _, ids = self.routed(x)
        out = torch.zeros_like(x)
        for expert in range(E):
            (tokens,) = (ids == expert).any(-1).nonzero(as_tuple=True)
            out.index_add_(0, tokens, torch.relu(x[tokens] @ self.w_in[expert]) @ self.w_out[expert])
        return out


def check(model: nn.Module, sites: int | None = None, tolerance: float = 1e-4) -> None:
    """The compiled model computes what the model does, for several routings; and has that many Sites."""
    compiled = copy.deepcopy(model)
    compiled.compile(backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(T, H)
        expected, got = model(x.clone()), compiled(x.clone())
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance / 10)
        cotangent = torch.randn_like(expected)
        expected.backward(cotangent)
        got.backward(cotangent)
        for wanted, parameter in zip(model.parameters(), compiled.parameters(), strict=True):
            assert (wanted.grad is None) == (parameter.grad is None)
            if wanted.grad is not None:
                torch.testing.assert_close(parameter.grad, wanted.grad, rtol=10 * tolerance, atol=tolerance)
    if sites is not None:
        assert len(moecompile.last_report().sites) == sites, moecompile.last_report().near_misses


def check_inference(model: nn.Module, x: Tensor) -> None:
    """The same without gradients, for inputs of one's own."""
    compiled = torch.compile(model, backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


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


def test_a_block_added_into_the_result_of_another() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Loop(), Experts()

        def forward(self, x: Tensor) -> Tensor:
            out = self.first(x)
            weights, ids = self.second.routed(x)
            flat, rows = ids.reshape(-1), x.repeat_interleave(K, 0)
            hidden = torch.relu(torch.bmm(rows.unsqueeze(1), self.second.w_in[flat]))
            y = torch.bmm(hidden, self.second.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
            tokens = torch.arange(T).repeat_interleave(K)
            return out.index_add_(0, tokens, y) * 2

    check(Added())


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


class Written(Experts):
    """Something is written into the tokens, or a weight, after it was read and before the sum."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.routed(x)
        flat = ids.reshape(-1)
        x = x * 1
        rows = x.repeat_interleave(K, 0)
        self.write(x)
        hidden = torch.relu(torch.bmm(rows.unsqueeze(1), self.w_in[flat]))
        out = torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
        return out.view(T, K, H).sum(1) + x


@pytest.mark.parametrize(
    "write",
    [
        lambda x: torch._foreach_mul_([x], 3.0),
        lambda x: F.hardtanh(x, -0.1, 0.1, True),
        lambda x: F.relu6(x, True),
        lambda x: torch.add(x, 1, out=x),
        lambda x: x.detach().zero_(),
        lambda x: x.view(-1)[3:9].fill_(2.0),
        lambda x: torch.ops.aten.mul_(x, 2.0),
    ],
    ids=["foreach", "hardtanh", "relu6", "out", "detached", "slice", "packet"],
)
def test_writes_between_the_gather_and_the_sum(write: Callable[[Tensor], object]) -> None:
    model = Written(write)
    compiled = torch.compile(model, backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    x = torch.randn(T, H)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_gates_written_into_by_another_name_are_not_zero_any_more() -> None:
    class Softened(Dense):
        def forward(self, x: Tensor) -> Tensor:
            logits = self.router(x)
            ids = logits.topk(K).indices
            chosen = torch.zeros(T, E, dtype=torch.bool).scatter(1, ids, True)
            scores = logits.masked_fill(~chosen, float("-inf"))
            scores.detach().clamp_(min=-2)
            hidden = torch.relu(torch.einsum("th,ehi->eti", x, self.w_in))
            outputs = torch.einsum("eti,eih->eth", hidden, self.w_out)
            return torch.einsum("te,eth->th", scores.sigmoid(), outputs)

    model = Softened()
    compiled = torch.compile(model, backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    x = torch.randn(T, H)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


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


def test_a_sum_in_complex_numbers_is_no_crash() -> None:
    class Complex(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            flat, rows = ids.reshape(-1), x.repeat_interleave(K, 0)
            hidden = torch.relu(torch.bmm(rows.unsqueeze(1), self.w_in[flat]))
            out = torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
            return out.view(T, K, H).sum(1, dtype=torch.complex64).real

    check_inference(Complex(), torch.randn(T, H))


def test_a_sum_added_into_a_view_of_zeros_is_seen_by_its_other_names() -> None:
    class Viewed(Loop):
        def forward(self, x: Tensor) -> Tensor:
            _, ids = self.routed(x)
            out = torch.zeros(2, T // 2, H)
            flat = out.view(T, H)
            for expert in range(E):
                (tokens,) = (ids == expert).any(-1).nonzero(as_tuple=True)
                flat.index_add_(0, tokens, torch.relu(x[tokens] @ self.w_in[expert]) @ self.w_out[expert])
            return out * 2

    check(Viewed(), sites=1)


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


def test_a_tensor_without_dimensions_is_no_crash() -> None:
    class Scalar(Experts):
        def forward(self, x: Tensor) -> Tensor:
            most = self.router(x).sum(0).argmax()
            return super().forward(x) * (most == 3).any(0).float()

    check(Scalar())


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


def test_two_groups_of_experts_added_in_place() -> None:
    class Twice(Experts):
        def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
            weights, ids = self.routed(x)
            flat = ids.reshape(-1)
            order = flat.argsort(stable=True)
            ends = F.one_hot(flat, E).sum(0).cumsum(0).to(torch.int32)
            hidden = torch.relu(torch._grouped_mm(x.bfloat16()[order // K], self.w_in.bfloat16(), offs=ends))
            out = torch._grouped_mm(hidden, self.w_out.bfloat16(), offs=ends)
            return order // K, out * weights.reshape(-1)[order, None].bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            out = torch.zeros(x.shape, dtype=torch.bfloat16).index_add_(0, *self.rows(x))
            return out.index_add_(0, *self.rows(x + 1))

    check(Twice(), sites=2, tolerance=3e-2)


@pytest.mark.parametrize("kind", ["embedding", "batch_norm"])
def test_functions_that_write_into_an_argument_when_told_to(kind: str) -> None:
    """What the experts read is renormalised as an embedding, or is a running mean, on the way."""

    class Told(Experts):
        def forward(self, x: Tensor) -> Tensor:
            rows = x * 1.0
            weights, ids = self.routed(x)
            flat, repeated = ids.reshape(-1), rows.repeat_interleave(K, 0)
            mean = rows[0]  # shares memory with the tokens
            hidden = torch.relu(torch.bmm(repeated.unsqueeze(1), self.w_in[flat]))
            if kind == "embedding":
                F.embedding(torch.arange(T), rows.detach(), max_norm=0.5)
            else:
                F.batch_norm(x.detach(), mean.detach(), torch.ones(H), training=True, momentum=0.5)
            out = torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
            return out.view(T, K, H).sum(1)

    check(Told(), sites=0)


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


def test_gates_whose_derivative_is_infinite_at_zero() -> None:
    class Root(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            gates = torch.zeros(T, E).scatter(1, ids, weights)
            hidden = torch.bmm(x.unsqueeze(0) * gates.t().unsqueeze(-1), self.w_in)
            return torch.bmm(hidden.abs().sqrt(), self.w_out).sum(0)

    check_inference(Root(), torch.randn(T, H))
    assert moecompile.last_report().sites == ()


def test_no_choices_at_all_beside_a_write() -> None:
    class Nobody(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).topk(0)
            weights.detach().t().add_(1)
            nobody = ids.to(torch.int64)[:, :1].contiguous()  # casts and parts of no ids at all
            rows = x[nobody.reshape(-1)].to(x.dtype)
            return super().forward(x) + weights.sum() + nobody.sum() + rows.sum()

    check(Nobody(), sites=1)


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


@pytest.mark.parametrize("inside", [False, True])
def test_a_write_into_what_dropout_gave_back(inside: bool) -> None:
    """In inference its result is its input itself, which a write through either name changes."""

    class Dropped(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            tokens = x * 1.0
            same = F.dropout(tokens, 0.5, training=False)
            flat, rows = ids.reshape(-1), (same if inside else tokens).repeat_interleave(K, 0)
            hidden = torch.relu(torch.bmm(rows.unsqueeze(1), self.w_in[flat]))
            same.detach().add_(1)
            out = torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
            return out.view(T, K, H).sum(1)

    check(Dropped(), sites=0)


def test_dropout_between_the_products_that_drops_nothing() -> None:
    class Dropped(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            flat, rows = ids.reshape(-1), F.dropout(x, 0.0).repeat_interleave(K, 0)
            hidden = F.dropout(torch.relu(torch.bmm(rows.unsqueeze(1), self.w_in[flat])), 0.3, training=False)
            out = torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
            return out.view(T, K, H).sum(1)

    check(Dropped(), sites=1)
