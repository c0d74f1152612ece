"""Sums in float32 that a model rounds afterwards: the operator rounds them, to the same bits; and where it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moecompile
from moecompile.passes import fuse
from rewriting import rewrite
from zoo_capture import Captured, captured
from zoo_case import weight

H, INNER, E, K, T = 64, 32, 4, 2, 24


class Block(nn.Module):
    """transformers' grouped experts up to the sum over a token's rows, which `end` gets in float32."""

    def __init__(self, end: Callable[[Tensor, Tensor], Any], dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.end, self.gate = end, nn.Linear(H, E, bias=False, dtype=dtype)
        self.gate_up_proj = weight(E, 2 * INNER, H, fan_in=H, dtype=dtype)
        self.down_proj = weight(E, H, INNER, fan_in=INNER, dtype=dtype)

    def summed(self, x: Tensor) -> Tensor:
        """(T, H), float32."""
        weights, ids = F.softmax(self.gate(x), dim=-1, dtype=torch.float).topk(K, dim=-1)
        order = torch.argsort(ids.reshape(-1))
        rows = x[order // K]
        counts = torch.histc(ids.reshape(-1).float(), bins=E, min=0, max=E - 1)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        gate, up = F.grouped_mm(rows, self.gate_up_proj.transpose(-2, -1), offs=offsets).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(-2, -1), offs=offsets)
        rows = rows * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.size(0))
        return rows[back].view(-1, K, H).sum(dim=1)

    def forward(self, x: Tensor) -> Any:
        return self.end(self.summed(x.reshape(-1, H)), x)


class Gathered(Block):
    """Matrices gathered for each token, in any dtype."""

    def summed(self, x: Tensor) -> Tensor:
        weights, ids = F.softmax(self.gate(x), dim=-1, dtype=torch.float).topk(K, dim=-1)
        gate, up = torch.einsum("tkih,th->tki", self.gate_up_proj[ids], x).chunk(2, dim=-1)
        return (self.down(F.silu(gate) * up, ids) * weights.unsqueeze(-1)).sum(dim=1)

    def down(self, rows: Tensor, ids: Tensor) -> Tensor:
        """GEMM2, (T, K, H)."""
        return torch.einsum("tkhi,tki->tkh", self.down_proj[ids], rows)


class Biased(Gathered):
    """GEMM2 adds a bias, of which the routing weights have a gradient, too."""

    def __init__(self, end: Callable[[Tensor, Tensor], Any], dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(end, dtype)
        self.down_bias = nn.Parameter(torch.randn(E, H).to(dtype))

    def down(self, rows: Tensor, ids: Tensor) -> Tensor:
        return super().down(rows, ids) + self.down_bias[ids]


class Batched(Block):
    """A sum (2, T / 2, H), which is a tensor of its own and no view."""

    def forward(self, x: Tensor) -> Any:
        x = x.reshape(2, T // 2, H)
        weights, ids = F.softmax(self.gate(x), dim=-1, dtype=torch.float).topk(K, dim=-1)
        gate, up = torch.einsum("bskih,bsh->bski", self.gate_up_proj[ids], x).chunk(2, dim=-1)
        rows = torch.einsum("bskhi,bski->bskh", self.down_proj[ids], F.silu(gate) * up)
        return self.end((rows * weights.unsqueeze(-1)).sum(dim=-2), x)


class Twice(Block):
    """One block behind the other."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x + super().forward(x))


def no_grad(summed: Tensor, _: Tensor) -> Tensor:
    """Rounded where no gradient flows."""
    with torch.no_grad():
        rounded = summed.bfloat16()
    return rounded


BF16, HALF = torch.bfloat16, torch.float16
ROUNDED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "to": lambda summed, x: summed.to(x.dtype),
    "method": lambda summed, x: summed.bfloat16(),
    "copy": lambda summed, x: summed.to(torch.bfloat16, copy=True),
    "half": lambda summed, x: summed.half(),
    "then a shape": lambda summed, x: summed.to(x.dtype).view(2, T // 2, H),
    "then something is added in place": lambda summed, x: summed.to(x.dtype).add_(x),
    "then it is used twice": lambda summed, x: (rounded := summed.bfloat16(), rounded + x),
}
KEPT: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "somebody else reads the sum": lambda summed, x: (summed.to(x.dtype), summed.mean()),
    "returned": lambda summed, x: (summed, summed.to(x.dtype)),
    "rounded to two": lambda summed, x: (summed.bfloat16(), summed.half()),
    "wider": lambda summed, x: summed.double(),
    "no cast": lambda summed, x: summed * 2,
    "a shape between": lambda summed, x: summed.view(2, T // 2, H).bfloat16(),
    "without gradients": no_grad,
}


def run(graph: Captured) -> list[Tensor]:
    """What the graph returns, and the gradients of all that has one."""
    given = [each.detach().clone().requires_grad_(each.requires_grad) for each in graph.inputs]
    found = [each for each in graph.gm(*given) if isinstance(each, Tensor)]
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (each * torch.randn(each.shape, generator=generator).to(each.dtype)).sum()
        for each in found
        if each.requires_grad
    )
    if isinstance(loss, Tensor):
        loss.backward()
    return [*found, *(each.grad for each in given if each.grad is not None)]


def operators(graph: Captured) -> list[Any]:
    """The dtypes that the experts' operators are told to round to."""
    nodes = graph.gm.graph.find_nodes(op="call_function", target=torch.ops.moecompile.experts.default)
    return [node.kwargs.get("out_dtype") for node in nodes]


def pair(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[Captured, Captured]:
    """The graph rewritten, and rewritten with the model's own cast."""
    graph = captured(module, (torch.randn(T, H, dtype=next(module.parameters()).dtype).requires_grad_(),))
    ours, theirs = graph.fresh(), graph.fresh()
    blocks = 2 if isinstance(module, Twice) else 1
    assert rewrite(ours.gm) == blocks
    monkeypatch.setattr(fuse, "_HALVES", ())
    assert rewrite(theirs.gm) == blocks and operators(theirs) == [None] * blocks
    return ours, theirs


@pytest.mark.parametrize(
    ("kind", "end"), [*((Block, end) for end in ROUNDED), *((Twice, end) for end in ("to", "method", "copy"))]
)
def test_the_operator_rounds_to_the_same_bits(kind: type[Block], end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(kind(ROUNDED[end]), monkeypatch)
    assert operators(ours) == [HALF if end == "half" else BF16] * len(operators(theirs))
    left = [len(graph.gm.graph.nodes) for graph in (ours, theirs)]
    assert left[1] - left[0] == len(operators(ours)), "the cast is gone, and nothing else"
    for node in ours.gm.graph.nodes:
        if node.target is torch.ops.moecompile.experts.default:
            assert node.meta["example_value"].dtype == node.kwargs["out_dtype"]
    found, expected = run(ours), run(theirs)
    assert len(found) == len(expected) > 4 and all(map(torch.equal, found, expected))
    assert [each.dtype for each in found] == [each.dtype for each in expected]


@pytest.mark.parametrize("end", ["half", "method"])
@pytest.mark.parametrize("kind", [Gathered, Batched])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_of_other_rows(dtype: torch.dtype, kind: type[Block], end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(kind(ROUNDED[end], dtype), monkeypatch)
    assert operators(ours) == [HALF if end == "half" else BF16]
    assert all(map(torch.equal, run(ours), run(theirs)))


@pytest.mark.parametrize(("kind", "end"), [*((Block, KEPT[end]) for end in KEPT), (Biased, ROUNDED["to"])])
def test_the_model_rounds(kind: type[Block], end: Callable[[Tensor, Tensor], Any], monkeypatch) -> None:
    ours, theirs = pair(kind(end), monkeypatch)
    assert operators(ours) == [None]
    assert [node.target for node in ours.gm.graph.nodes] == [node.target for node in theirs.gm.graph.nodes]


def test_a_cast_inside_of_the_next_block_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block reads the sum in float32 and rounds it for itself."""

    class Next(Twice):
        def forward(self, x: Tensor) -> Any:
            return Block.forward(self, self.summed(x).to(x.dtype))

    ours, theirs = pair(Next(ROUNDED["to"]), monkeypatch)
    assert all(map(torch.equal, run(ours), run(theirs)))
    assert operators(ours)[-1] == BF16


def hooked(rounded: Tensor, _: Tensor) -> Tensor:
    """Of a view the hook would be lost."""
    rounded.register_hook(lambda grad: grad * 2)
    return rounded.mul_(2)


ENDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a hook, then written in place": hooked,
    "detached": lambda rounded, x: rounded.detach_() * x,
    "written in place": lambda rounded, x: rounded.add_(x),
}


@pytest.mark.parametrize("cast", [True, False], ids=["rounded", "float32"])
@pytest.mark.parametrize("end", ENDS)
def test_a_sum_of_three_dimensions_is_no_view(end: str, cast: bool) -> None:
    """Autograd tells views from tensors of their own."""
    module = Batched(lambda summed, x: ENDS[end](summed.to(x.dtype) if cast else summed, x))
    x = torch.randn(T, H, dtype=BF16)

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), *module.parameters()]
        result = run(leaves[0])
        assert not result._is_view()
        found = torch.autograd.grad(result.float().square().sum(), leaves, allow_unused=True)
        return [result.detach(), *(each for each in found if each is not None)]

    torch._dynamo.reset()
    compiled = torch.compile(module, backend="moecompile", options={"lowering": "eager"})
    found, expected = gradients(compiled), gradients(module)
    is_refused = not cast and "hook" in end
    assert bool(moecompile.last_report().graphs[0].sites) != is_refused and len(found) == len(expected)
    for ours, right in zip(found, expected, strict=True):
        assert float((ours - right).float().norm() / right.float().norm()) < 0.03
