"""Models that look like a known form and mean something else: whatever is done to them, they compute what eager does.

Here: writes into what a block reads, makes or adds to. Each was a wrong rewrite or a crash once, or is next to one.
"""

from __future__ import annotations

import copy
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
    check_inference(Written(write), torch.randn(T, H))


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

    check_inference(Softened(), torch.randn(T, H))


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


def residual(model: WrittenAfter, x: Tensor) -> Tensor:
    z = x * 1.0
    z += model.block(z, model.w_in)
    return z


def weight_written(model: WrittenAfter, x: Tensor) -> Tensor:
    w_in = model.w_in * 1.0
    out = model.block(x, w_in)
    w_in.mul_(3)
    return out + w_in.sum()


def parameter_updated(model: WrittenAfter, x: Tensor) -> Tensor:
    out = model.block(x, model.w_in)
    with torch.no_grad():
        model.w_in.mul_(0.5)
    return out


class WrittenAfter(Experts):
    """Gathered weights and rows: eager keeps what it gathered, so that their sources may be written after the block."""

    def __init__(self, whole: Callable[[WrittenAfter, Tensor], Tensor]) -> None:
        super().__init__()
        self.whole = whole
        self.router.requires_grad_(False)

    def block(self, x: Tensor, w_in: Tensor) -> Tensor:
        weights, ids = self.routed(x)
        flat = ids.reshape(-1)
        tokens = torch.arange(T).repeat_interleave(K)
        hidden = torch.relu(torch.bmm(x[tokens].unsqueeze(1), w_in[flat]))
        return (torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)).view(T, K, H).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(self, x)


@pytest.mark.parametrize("whole", [residual, weight_written, parameter_updated], ids=lambda whole: whole.__name__)
def test_writes_after_the_block(whole: Callable[[WrittenAfter, Tensor], Tensor]) -> None:
    """The operator keeps the sources themselves for backward: where there is one, the block is left alone."""
    check(WrittenAfter(whole), sites=0)
    model = WrittenAfter(whole)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="moecompile", options={"lowering": "eager"}, fullgraph=True)
    moecompile.reset()
    x = torch.randn(T, H)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(moecompile.last_report().sites) == 1


def test_a_sum_added_into_the_tokens_it_was_made_of() -> None:
    """Eager keeps gathered rows for backward, the operator would keep the tokens, which the sum overwrites."""

    class Onto(Experts):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.routed(x)
            x, tokens, flat = x * 1.0, torch.arange(T).repeat_interleave(K), ids.reshape(-1)
            hidden = torch.relu(torch.bmm(x[tokens].unsqueeze(1), self.w_in[flat]))
            out = torch.bmm(hidden, self.w_out[flat]).squeeze(1) * weights.reshape(-1, 1)
            return x.index_add_(0, tokens, out)

    check(Onto())
