"""Models that look like a known form and mean something else: whatever is done to them, they compute what eager does.

Here: operations that take, write or add only a part of a tensor, or spread it, and say so in nothing but a shape. Each
was a wrong rewrite or a crash once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks import E, Experts, H, K, T, check, check_inference
from moecompile.passes.detect import detect
from zoo_capture import captured

Rows = tuple[Tensor, Tensor, Tensor, Tensor]


class Parts(Experts):
    """`forward(model, x)` is all that it does; weights for one feature and biases lie ready."""

    def __init__(self, forward: Callable[[Parts, Tensor], Tensor]) -> None:
        super().__init__()
        self.whole = forward
        self.w_one = nn.Parameter(torch.randn(E, 24, 1) / 4)
        self.bias = nn.Parameter(torch.randn(E, H))

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(self, x)

    def sorted(self, x: Tensor, top_k: int = K) -> Rows:
        """Weights of the sorted rows, their order, experts, and the tokens' rows."""
        weights, ids = self.router(x).softmax(-1).topk(top_k)
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        return weights.reshape(-1)[order, None], order, flat[order], x[order // top_k]

    def products(self, rows: Tensor, experts: Tensor, w_out: Tensor | None = None) -> Tensor:
        hidden = torch.relu(torch.bmm(rows.unsqueeze(1), self.w_in[experts]))
        return torch.bmm(hidden, (self.w_out if w_out is None else w_out)[experts]).squeeze(1)


def first_bias(model: Parts, x: Tensor) -> Tensor:
    weights, order, experts, rows = model.sorted(x)
    y = model.products(rows, experts) + model.bias.gather(0, experts[:, None])
    return torch.zeros(T, H).index_add(0, order // K, y * weights)


def half_of_the_hidden_features(model: Parts, x: Tensor) -> Tensor:
    weights, ids = model.routed(x)
    flat = ids.reshape(-1)
    w_in = model.w_in.gather(0, flat[:, None, None].expand(T * K, H, 12))
    w_out = model.w_out.gather(0, flat[:, None, None].expand(T * K, 12, H))
    y = torch.bmm(torch.relu(torch.bmm(x.repeat_interleave(K, 0).unsqueeze(1), w_in)), w_out).squeeze(1)
    return (y * weights.reshape(-1, 1)).view(T, K, H).sum(1)


def first_feature_of_tokens(model: Parts, x: Tensor) -> Tensor:
    weights, order, experts, _ = model.sorted(x)
    rows = x.gather(0, (order // K)[:, None]) * torch.ones(H)
    return torch.zeros(T, H).index_add(0, order // K, model.products(rows, experts) * weights)


def first_feature_in_a_loop(model: Parts, x: Tensor) -> Tensor:
    weights, ids = model.routed(x)
    out = torch.zeros(T, H)
    for expert in range(E):
        token, choice = torch.where(ids == expert)
        rows = x.gather(0, token[:, None]) * torch.ones(H)
        y = torch.relu(rows @ model.w_in[expert]) @ model.w_out[expert]
        out = out.index_add(0, token, y * weights[token, choice, None])
    return out


def half_of_the_results(model: Parts, x: Tensor) -> Tensor:
    weights, order, experts, rows = model.sorted(x, 1)
    y = model.products(rows, experts) * weights
    return y.gather(0, order.argsort()[:, None].expand(-1, H // 2))


def tokens_of(top_k: int = K) -> Tensor:
    return torch.arange(T).repeat_interleave(top_k)


def unsorted(model: Parts, x: Tensor, w_out: Tensor | None = None) -> Tensor:
    weights, ids = model.routed(x)
    return model.products(x.repeat_interleave(K, 0), ids.reshape(-1), w_out) * weights.reshape(-1, 1)


def into_a_wider_sum(model: Parts, x: Tensor) -> Tensor:
    return torch.zeros(T, 2 * H).scatter_add(0, tokens_of()[:, None].expand(-1, H), unsorted(model, x))


def onto_a_wider_tensor(model: Parts, x: Tensor) -> Tensor:
    base = torch.ones(T, H + 4) * 2 + x.sum()
    return base.scatter_add(0, tokens_of()[:, None].expand(-1, H), unsorted(model, x))


def one_feature_onto_five(model: Parts, x: Tensor) -> Tensor:
    return torch.zeros(T, 5).index_put((tokens_of(),), unsorted(model, x, model.w_one), accumulate=True)


def into_a_wider_sum_in_a_loop(model: Parts, x: Tensor) -> Tensor:
    weights, ids = model.routed(x)
    out = torch.zeros(T, H + 4)
    for expert in range(E):
        token, choice = torch.where(ids == expert)
        y = torch.relu(x[token] @ model.w_in[expert]) @ model.w_out[expert] * weights[token, choice, None]
        out = out.scatter_add(0, token[:, None].expand(-1, H), y)
    return out


def one_feature_onto_five_in_a_loop(model: Parts, x: Tensor) -> Tensor:
    weights, ids = model.routed(x)
    out = torch.zeros(T, 5)
    for expert in range(E):
        token, choice = torch.where(ids == expert)
        y = torch.relu(x[token] @ model.w_in[expert]) @ model.w_one[expert] * weights[token, choice, None]
        out = out.index_put((token,), y, accumulate=True)
    return out


def written_into_wider_rows(model: Parts, x: Tensor) -> Tensor:
    weights, order, experts, rows = model.sorted(x, 1)
    y = model.products(rows, experts) * weights
    return torch.zeros(T, H + 4).scatter(0, order[:, None].expand(-1, H), y)


def one_feature_assigned_to_eight(model: Parts, x: Tensor) -> Tensor:
    weights, order, experts, rows = model.sorted(x, 1)
    out = torch.zeros(T, 8)
    out[order] = model.products(rows, experts, model.w_one) * weights
    return out


def one_feature_assigned_to_five_in_a_loop(model: Parts, x: Tensor) -> Tensor:
    weights, ids = model.router(x).softmax(-1).topk(1)
    out = torch.zeros(T, 5)
    for expert in range(E):
        token, choice = torch.where(ids == expert)
        y = torch.relu(x[token] @ model.w_in[expert]) @ model.w_one[expert]
        out[token] = y * weights[token, choice, None]
    return out


@pytest.mark.parametrize(
    "forward",
    [
        first_bias,
        half_of_the_hidden_features,
        first_feature_of_tokens,
        first_feature_in_a_loop,
        half_of_the_results,
        into_a_wider_sum,
        onto_a_wider_tensor,
        one_feature_onto_five,
        into_a_wider_sum_in_a_loop,
        one_feature_onto_five_in_a_loop,
        written_into_wider_rows,
        one_feature_assigned_to_eight,
        one_feature_assigned_to_five_in_a_loop,
    ],
    ids=lambda forward: forward.__name__,
)
def test_a_part_of_a_tensor_is_not_the_whole(forward: Callable[[Parts, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    check(Parts(forward), sites=0)


def test_a_part_of_the_columns_written_back() -> None:
    """Forward alone: eager has no backward for an index that is narrower than its source."""

    def forward(model: Parts, x: Tensor) -> Tensor:
        weights, order, experts, rows = model.sorted(x)
        y = model.products(rows, experts) * weights
        return torch.zeros(T * K, H).scatter(0, order[:, None].expand(-1, H // 2), y).view(T, K, H).sum(1)

    torch.manual_seed(0)
    check_inference(Parts(forward), torch.randn(T, H))


@pytest.mark.parametrize("name", ["gt", "ge", "lt", "le"])
def test_places_beside_a_capacity_that_depends_on_the_tokens(name: str) -> None:
    """A capacity that is no number yet is no reason to fail."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(H, E, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            marks = F.one_hot(self.router(x).argmax(-1), E)
            places = (marks.cumsum(0) * marks).sum(-1) - 1
            return x * getattr(torch, name)(places, x.shape[0] // 2)[:, None]

    detection = detect(captured(Beside(), (torch.randn(T, H),), dynamic=True).gm.graph)
    assert not detection.sites


def test_a_reshape_inside_a_transform_of_what_is_outside_is_left_alone() -> None:
    """Within torch.func's transforms nodes have no example values."""
    import moecompile  # noqa: F401

    def run(x: Tensor, a: Tensor) -> Tensor:
        w = x.relu()
        return torch.func.grad(lambda z: (z * w.reshape(-1, 8)).sum() + (z @ a).sum())(x)

    x, a = torch.randn(6, 8), torch.randn(8, 8)
    torch._dynamo.reset()
    fast = torch.compile(run, backend="moecompile", options={"lowering": "eager"})
    torch.testing.assert_close(fast(x, a), run(x, a))
