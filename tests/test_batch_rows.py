"""Where values hold the batch, and what mixes its elements; what is said to hold it is computed by halves, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from moecompile.passes.batch_meanings import SHARED, Meaning, Mixed, Rows
from moecompile.passes.batch_rows import meanings_of
from moecompile.passes.costs import expression

ops = torch.ops.moecompile
B, S, H = 4, 3, 6
TABLE = torch.randn(S, H, generator=torch.Generator().manual_seed(0))
SQUARE = torch.randn(H, H, generator=torch.Generator().manual_seed(1))
OTHER = 10
"""A batch that no other size equals."""


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(batch)
    return torch.randn(batch, S, H), torch.randint(0, S, (batch, S))


def meaning_of(function: Callable[[Tensor, Tensor], Tensor]) -> Meaning:
    """Of its result."""
    x, ids = inputs(OTHER)
    for each in (x, ids):
        torch._dynamo.mark_dynamic(each, 0)
    found: list[Meaning] = []

    def backend(gm: Any, given: Any) -> Any:
        values = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
        with torch.no_grad():
            graph = make_fx(dispatch_functionalize(gm), tracing_mode="symbolic", _allow_non_fake_inputs=True)(*values)
        (batch,) = {expression(each.shape[0]) for each in values if isinstance(each, Tensor) and each.dim() > 1} & {
            expression(each) for each in values if isinstance(each, torch.SymInt)
        }
        (output,) = graph.graph.find_nodes(op="output")
        found.append(meanings_of(graph.graph, batch)[output.args[0][0]])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x, ids: function(x + 0, ids + 0 * x[..., 0].long()), backend=backend, fullgraph=True)(x, ids)
    return found[-1]


HOLDS: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "by element": (0, lambda x, ids: torch.sin(x) * 2 + x.square()),
    "with a table": (0, lambda x, ids: x + TABLE),
    "with a mask": (0, lambda x, ids: x.masked_fill(TABLE > 0, -1.0)),
    "softmax": (0, lambda x, ids: x.softmax(-1)),
    "a sum of features": (0, lambda x, ids: x.sum(-1)),
    "a sum over places": (0, lambda x, ids: x.sum(1)),
    "a moved batch": (1, lambda x, ids: x.transpose(0, 1)),
    "a moved batch of products": (1, lambda x, ids: x.permute(1, 0, 2) @ SQUARE),
    "a moved batch in the end": (2, lambda x, ids: x.permute(1, 2, 0).softmax(0)),
    "a sum before the batch": (0, lambda x, ids: x.permute(1, 0, 2).sum(0)),
    "heads": (2, lambda x, ids: (x @ SQUARE).view(x.shape[0], S, 3, 2).permute(2, 1, 0, 3)),
    "tokens": (0, lambda x, ids: x.reshape(-1, H) @ SQUARE),
    "tokens and back": (0, lambda x, ids: (x.reshape(-1, H) @ SQUARE).view(-1, S, H)),
    "a linear layer with bias": (0, lambda x, ids: F.linear(x, SQUARE, SQUARE[0])),
    "a matrix times rows": (1, lambda x, ids: SQUARE @ x.reshape(-1, H).t()),
    "products of elements": (0, lambda x, ids: x @ x.transpose(1, 2)),
    "attention": (0, lambda x, ids: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)),
    "attention with a mask": (
        0,
        lambda x, ids: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], (ids > 0)[:, None, None]),
    ),
    "layer norm": (0, lambda x, ids: F.layer_norm(x, (H,))),
    "RMS norm": (0, lambda x, ids: F.rms_norm(x, (H,))),
    "top-k": (0, lambda x, ids: x.topk(2, -1).values),
    "a sort": (0, lambda x, ids: x.sort(-1).values),
    "an embedding": (0, lambda x, ids: F.embedding(ids, TABLE)),
    "rows of a table": (0, lambda x, ids: TABLE[ids]),
    "gathered": (0, lambda x, ids: x.gather(-1, ids[..., None])),
    "scattered": (0, lambda x, ids: torch.zeros_like(x).scatter(-1, ids[..., None], 1.0)),
    "joined": (0, lambda x, ids: torch.cat([x, x.flip(-1)], -1)),
    "stacked before": (1, lambda x, ids: torch.stack([x, x + 1])),
    "stacked behind": (0, lambda x, ids: torch.stack([x, x + 1], -1)),
    "a part": (0, lambda x, ids: x[:, 1:, ::2]),
    "one place": (0, lambda x, ids: x[:, -1]),
    "written in part": (0, lambda x, ids: _written(x)),
    "a padded sequence": (0, lambda x, ids: F.pad(x, (0, 0, 1, 0))),
    "a shared row for each": (0, lambda x, ids: TABLE[None].expand(x.shape[0], -1, -1) * x),
    "a triangle": (0, lambda x, ids: (x @ x.transpose(1, 2)).tril()),
    "zeros": (0, lambda x, ids: x.new_zeros(x.shape[0], 2)),
    "a squeezed place": (0, lambda x, ids: x[:, :1].squeeze(1)),
    "of each element, by its number": (0, lambda x, ids: x[numbers(x)[:, None], torch.arange(S)[None]]),
    "of each element and what it names": (0, lambda x, ids: x[numbers(x)[:, None], ids]),
    "a mask by numbers": (
        0,
        lambda x, ids: (
            ids[numbers(x)[:, None, None], torch.arange(S)[:, None]] <= ids[numbers(x)[:, None, None], torch.arange(S)]
        ),
    ),
    "an added dimension": (1, lambda x, ids: x[None]),
    "a linear layer in FP8": (0, lambda x, ids: _in_fp8(x)),
}


def _in_fp8(x: Tensor) -> Tensor:
    wide = F.pad(x, (0, 128 - H)).bfloat16()
    weight = F.pad(TABLE, (0, 128 - H, 0, 16 - S)).bfloat16()
    casts = [each[0] for each in ops.quantize_weights(weight[None])]
    result: Tensor = ops.linear_fp8(wide, weight, None, *ops.quantize(wide), casts)
    return result


def _by_numbers_twice(x: Tensor) -> Tensor:
    m = numbers(x)
    return F.pad(x, (0, 0, 0, 20))[m, m]


def numbers(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0])


def _written(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 0] = 0.0
    x[:, 1:].mul_(2)
    return x


MIXES: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "a mean": ("goes along the batch", lambda x, ids: x.mean()),
    "a mean of each feature": ("goes along the batch", lambda x, ids: x.mean((0, 1))),
    "a sum of no dimensions named": ("goes along the batch", lambda x, ids: x.sum([])),
    "what a mean is taken from": ("goes along the batch", lambda x, ids: x - x.mean(0)),
    "softmax over the batch": ("goes along the batch", lambda x, ids: x.softmax(0)),
    "softmax over a moved batch": ("goes along the batch", lambda x, ids: x.transpose(0, 2).softmax(-1)),
    "a running sum": ("goes along the batch", lambda x, ids: x.cumsum(0)),
    "best of the batch": ("goes along the batch", lambda x, ids: x.topk(2, 0).values),
    "best of all tokens": ("goes along the batch", lambda x, ids: x.reshape(-1, H).topk(2, 0).values),
    "turned round": ("goes along the batch", lambda x, ids: x.flip(0)),
    "rolled": ("goes along the batch", lambda x, ids: x.roll(1, 0)),
    "rolled as one": ("goes along the batch", lambda x, ids: x.roll(1)),
    "one element": ("goes along the batch", lambda x, ids: x[0]),
    "all but one": ("takes a part of the batch", lambda x, ids: x[1:]),
    "every other": ("takes a part of the batch", lambda x, ids: x[::2]),
    "one behind the other": ("joins along the batch", lambda x, ids: torch.cat([x, x])),
    "of each with each": ("puts rows of the batch beside others", lambda x, ids: x[:, None] - x[None]),
    "products of each with each": ("sums over the batch, or multiplies", lambda x, ids: x[:, 0] @ x[:, 0].t()),
    "a sum of products": ("sums over the batch, or multiplies", lambda x, ids: x[:, 0].t() @ x[:, 0]),
    "how many there are": ("a number that depends on the batch", lambda x, ids: x / x.shape[0]),
    "the root of it": ("a number that depends on the batch", lambda x, ids: x * x.shape[0] ** 0.5),
    "as many as there are": (
        "a number that depends on the batch",
        lambda x, ids: x.new_full((S,), x.shape[0]) + x[:, :, 0],
    ),
    "tokens by number": ("computes with a number", lambda x, ids: x.reshape(-1, H)[torch.arange(S * x.shape[0])]),
    "other elements": ("computes with a number", lambda x, ids: x[torch.arange(1, x.shape[0] + 1) - 1]),
    "the number before": ("numbers the elements", lambda x, ids: x[numbers(x) - 1]),
    "a table by number": ("numbers the elements", lambda x, ids: torch.zeros(20, H)[numbers(x)]),
    "numbered": ("numbers the elements", lambda x, ids: torch.arange(x.shape[0])[:, None, None] * x),
    "interleaved": ("leaves no dimension", lambda x, ids: x.transpose(0, 1).reshape(-1, H)),
    "split by nothing": ("no multiple|leaves no dimension", lambda x, ids: x.reshape(2, -1, S, H)),
    "dropout": ("draws random numbers", lambda x, ids: F.dropout(x)),
    "noise": ("draws random numbers", lambda x, ids: x + torch.randn_like(x)),
    "batch norm": (
        "there is no rule for aten",
        lambda x, ids: F.batch_norm(x.transpose(1, 2), None, None, training=True),
    ),
    "counted": ("there is no rule for aten", lambda x, ids: torch.bincount(ids.reshape(-1), minlength=S)),
    "looked up among tokens": ("takes rows of the batch by numbers", lambda x, ids: x.reshape(-1, H)[ids]),
    "chosen by one element": ("goes along the batch", lambda x, ids: x * x[0, 0, 0]),
    "a running product of tokens": ("goes along the batch", lambda x, ids: x.reshape(-1, H).cumsum(0).view(x.shape)),
    "a part as long as the batch": ("none were expected", lambda x, ids: torch.zeros(20, H)[: x.shape[0]] + x[:, 0]),
    "a part of others as long": (
        "depends on the batch",
        lambda x, ids: F.pad(x, (0, 40))[..., x.shape[0] : x.shape[0] + 2],
    ),
    "several dimensions of the batch": (
        "makes several dimensions|leaves no dimension|no multiple",
        lambda x, ids: x.reshape(x.shape[0], 6 // (6 // torch.sym_min(x.shape[0], 6)), -1),
    ),
    "a table by number, twice": (
        "by the numbers of the elements",
        lambda x, ids: _by_numbers_twice(x),
    ),
    "a gradient that counts": (
        "a gradient that counts the batch",
        lambda x, ids: F.embedding(ids, TABLE, scale_grad_by_freq=True),
    ),
    "gathered along the batch": ("goes along the batch", lambda x, ids: x[..., 0].gather(0, ids)),
}


@pytest.mark.parametrize("name", HOLDS)
def test_what_holds_the_batch(name: str) -> None:
    dim, function = HOLDS[name]
    assert meaning_of(function) == Rows(dim)
    given = inputs(B)
    halves = zip(*(each.chunk(2) for each in given), strict=True)
    torch.testing.assert_close(torch.cat([function(*each) for each in halves], dim), function(*given))


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_elements(name: str) -> None:
    reason, function = MIXES[name]
    meaning = meaning_of(function)
    assert isinstance(meaning, Mixed), meaning
    assert any(each in meaning.reason for each in reason.split("|")), meaning.reason


def test_what_is_shared() -> None:
    assert meaning_of(lambda x, ids: TABLE.softmax(0) @ SQUARE) is SHARED
    assert meaning_of(lambda x, ids: x.new_zeros(S)) is SHARED
