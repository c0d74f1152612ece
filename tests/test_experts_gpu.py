"""The fused experts on a Hopper GPU: outputs and gradients against float64, no worse than PyTorch's grouped path."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.runtime import hopper_experts
from moecompile.runtime.contract import Arguments

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

GPT_OSS = "mul(add(clamp(up, -7.0, 7.0), 1), mul(clamp(gate, None, 7.0), sigmoid(mul(clamp(gate, None, 7.0), 1.702))))"
NAMES = ("x", "weights", "w_in", "w_out", "w_up", "b_in", "b_up", "b_out")


@dataclass(frozen=True)
class Block:
    """One block: sizes, and how it is laid out."""

    name: str
    tokens: int = 300
    top_k: int = 3
    experts: int = 8
    hidden: int = 512
    inner: int = 384
    gate_up: str = "halves"
    activation: str = "mul(silu(gate), up)"
    output: str = "mul(out, weight)"
    in_transposed: bool = False
    out_transposed: bool = False
    biases: bool = False
    dropped: bool = False
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.bfloat16
    weighted: bool = True

    def attributes(self) -> dict[str, Any]:
        return {
            "activation": self.activation,
            "gate_up": self.gate_up,
            "output": self.output,
            "w_in_transposed": self.in_transposed,
            "w_out_transposed": self.out_transposed,
        }

    def tensors(self) -> dict[str, Tensor | None]:
        """The differentiable arguments, on the GPU, in the order of NAMES."""
        torch.manual_seed(0)
        width = self.inner if self.gate_up in ("single", "separate") else 2 * self.inner

        def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = self.dtype) -> Tensor:
            return (torch.randn(shape, device="cuda") * scale).to(dtype)

        def matrices(fan_out: int, fan_in: int, transposed: bool) -> Tensor:
            shape = (fan_in, fan_out) if transposed else (fan_out, fan_in)
            return random(self.experts, *shape, scale=fan_in**-0.5)

        separate = self.gate_up == "separate"
        weights = torch.rand(self.tokens, self.top_k, device="cuda").add(0.2).to(self.weight_dtype)
        return {
            "x": random(self.tokens, self.hidden),
            "weights": weights if self.weighted else None,
            "w_in": matrices(width, self.hidden, self.in_transposed),
            "w_out": matrices(self.hidden, self.inner, self.out_transposed),
            "w_up": matrices(self.inner, self.hidden, self.in_transposed) if separate else None,
            "b_in": random(self.experts, width) if self.biases else None,
            "b_up": random(self.experts, self.inner) if self.biases and separate else None,
            "b_out": random(self.experts, self.hidden) if self.biases else None,
        }

    def ids(self) -> Tensor:
        """Experts of each token, uneven; the last one has nobody."""
        torch.manual_seed(1)
        scores = torch.rand(self.tokens, self.experts, device="cuda")
        scores[:, 0] += 0.6
        scores[:, -1] = -1
        ids = scores.topk(self.top_k).indices
        return torch.where(torch.rand(ids.shape, device="cuda") < 0.2, -1, ids) if self.dropped else ids


BLOCKS = [
    Block("plain"),
    Block("dropped", dropped=True),
    Block("transposed", in_transposed=True, out_transposed=True),
    Block("separate", gate_up="separate"),
    Block("separate transposed biased", gate_up="separate", in_transposed=True, biases=True),
    Block("single", gate_up="single", activation="square(relu(hidden))"),
    Block("biased", biases=True, dropped=True),
    Block("gpt-oss", gate_up="interleaved", activation=GPT_OSS, in_transposed=True, out_transposed=True, biases=True),
    Block("interleaved", gate_up="interleaved", hidden=136, inner=200),
    Block("odd sizes", hidden=136, inner=72, tokens=61),
    Block("odd single", hidden=72, inner=136, tokens=61, gate_up="single", activation="gelu(hidden, tanh)"),
    Block("top 1", top_k=1, tokens=130),
    Block("large", tokens=2000, top_k=4, experts=6, hidden=1024, inner=1408),
    Block("float32 weights", weight_dtype=torch.float32, output="mul(cast(out, float32), weight)"),
    Block("cast weights", weight_dtype=torch.float32, output="mul(out, cast(weight, bfloat16))"),
    Block("weight inside", activation="mul(mul(silu(gate), up), weight)", output="out"),
    Block("weight twice", activation="mul(silu(mul(gate, weight)), up)"),
    Block("no weights", output="out", weighted=False),
    Block("float16", dtype=torch.float16, weight_dtype=torch.float16),
    Block("many experts", tokens=64, experts=70, top_k=6),
    Block("odd tiles", tokens=1500, experts=6, inner=768),
    Block("odd tiles, interleaved", tokens=1500, experts=6, inner=640, hidden=768, gate_up="interleaved"),
    Block("one token", tokens=1, experts=128, top_k=8, inner=768),
]


@dataclass
class Run:
    """The result and the gradients by name."""

    result: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)


def run(
    block: Block, tensors: dict[str, Tensor | None], kernels: str | None = None, names: tuple[str, ...] = NAMES
) -> Run:
    leaves = {
        name: None if value is None else value.detach().clone().requires_grad_(name in names)
        for name, value in tensors.items()
    }
    _, offsets, slots, order = torch.ops.moecompile.plan(block.ids(), block.experts)
    given = [leaves[name] for name in ("x", "weights")], [leaves[name] for name in NAMES[2:]]
    result = torch.ops.moecompile.experts(
        *given[0], offsets, slots, order, *given[1], **block.attributes(), kernels=kernels
    )
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and name in names}
    torch.manual_seed(2)
    cotangent = torch.randn(result.shape, device="cuda").to(result.dtype)
    return Run(result, dict(zip(wanted, torch.autograd.grad(result, list(wanted.values()), cotangent), strict=True)))


def exact(block: Block, tensors: dict[str, Tensor | None]) -> Run:
    """The same in float64, casts included: they are to rounded what it computes, which float64 does not."""
    wide = {name: None if value is None else value.double() for name, value in tensors.items()}
    texts = (re.sub(r", (bfloat16|float32)\)", ", float64)", text) for text in (block.activation, block.output))
    activation, output = texts
    return run(replace(block, activation=activation, output=output), wide, "reference")


def worst_row(found: Tensor, expected: Tensor) -> float:
    """The largest error of a row, relative to the largest of the rows' norms that is typical."""
    found, expected = found.double(), expected.double()
    found, expected = (value.reshape(-1, value.shape[-1]) for value in (found, expected))
    norms = expected.norm(dim=-1)
    used = norms[norms > 0]
    floor = used.median() * 0.1 if used.numel() else torch.tensor(1.0, device=found.device)
    return float(((found - expected).norm(dim=-1) / norms.clamp_min(floor)).nan_to_num(nan=float("inf")).max())


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_outputs_and_gradients(block: Block) -> None:
    tensors = block.tensors()
    _, offsets, slots, order = torch.ops.moecompile.plan(block.ids(), block.experts)
    given: list[Any] = [tensors[name] for name in NAMES]
    arguments: Arguments = Arguments(*given[:2], offsets, slots, order, *given[2:], **block.attributes())  # type: ignore[call-arg]
    assert hopper_experts.takes(arguments.check()), "the fused kernels were to compute this"
    expected, reference, found = exact(block, tensors), run(block, tensors, "reference"), run(block, tensors)
    again = run(block, tensors)
    pairs: list[Any] = [("result", expected.result, reference.result, found.result, again.result)]
    for name, value in expected.gradients.items():
        pairs.append((name, value, *(each.gradients[name] for each in (reference, found, again))))
    for name, right, theirs, ours, repeated in pairs:
        assert torch.equal(ours, repeated), f"{name} differs from run to run"
        mine, other = worst_row(ours, right), worst_row(theirs, right)
        assert mine <= 1.5 * other + 1e-6, f"{name}: {mine:.2e}, PyTorch's {other:.2e}"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_nothing_is_written_beyond_a_tensor(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that the kernels are given to write lies before memory that nobody may write."""
    made: list[tuple[Tensor, int]] = []
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def fenced(like: Tensor, *size: Any, dtype: torch.dtype | None = None, **others: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        if others or not like.is_cuda or dtype == torch.int32:
            return new_empty(like, *size, dtype=dtype, **others)
        count = math.prod(shape)
        whole = torch.full((count + 2**20,), 7.0, dtype=dtype or like.dtype, device="cuda")
        made.append((whole, count))
        return whole[:count].view(shape)

    def fenced_like(like: Tensor, **others: Any) -> Tensor:
        return empty_like(like, **others) if others or not like.is_contiguous() else fenced(like, like.shape)

    tensors = block.tensors()
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", fenced)
        patched.setattr(torch, "empty_like", fenced_like)
        run(block, tensors)
    assert len(made) >= 6, "the kernels write into tensors made elsewhere"
    for whole, count in made:
        assert (whole[count:] == 7).all(), f"{count} elements, and some beyond them were written"


@pytest.mark.parametrize("names", [("x",), ("weights",), ("w_in",), ("w_out",), ("x", "b_out"), ("b_in",)])
def test_only_what_is_needed(names: tuple[str, ...]) -> None:
    block = Block("some", biases=True)
    tensors = block.tensors()
    whole, some = run(block, tensors), run(block, tensors, names=names)
    assert set(some.gradients) == set(names)
    for name in names:
        assert torch.equal(some.gradients[name], whole.gradients[name])


def test_inference_computes_the_same() -> None:
    block = Block("inference")
    tensors = block.tensors()
    _, offsets, slots, order = torch.ops.moecompile.plan(block.ids(), block.experts)
    given = [tensors[name] for name in NAMES]
    with torch.no_grad():
        alone = torch.ops.moecompile.experts(*given[:2], offsets, slots, order, *given[2:], **block.attributes())
    assert torch.equal(alone, run(block, tensors).result)


def test_what_no_row_owns_is_not_read() -> None:
    """Tokens and gradients that are infinite stay with their own tokens."""
    block = Block("infinite", dropped=True)
    tensors = block.tensors()
    clean = run(block, tensors)
    assert tensors["x"] is not None
    tensors["x"][5] = float("inf")
    spoilt = run(block, tensors)
    others = torch.arange(block.tokens, device="cuda") != 5
    assert torch.equal(clean.result[others], spoilt.result[others])
    assert torch.equal(clean.gradients["x"][others], spoilt.gradients["x"][others])
