"""The fused experts on a Hopper GPU: outputs and gradients against float64, no worse than PyTorch's grouped path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fences import fenced
from gpu_blocks import GPT_OSS, Block, exact, run, worst_row
from moecompile.bench_proof import launched
from moecompile.runtime import hopper_experts, hopper_routing
from moecompile.runtime.remembered import CALLS

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

ALONG = (257, 544, 320, 321, 256, 300, 0, 530)
"""Tokens of each expert: so many that most go along with a pair of tiles, and some not."""
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
    Block.of_counts("rows that go along", *ALONG),
    Block.of_counts("rows that go along, long sums", *ALONG, hidden=4112, inner=208, output="out"),
    Block.of_counts("rows that go along, separate", *ALONG, gate_up="separate", biases=True, hidden=136, inner=200),
    Block.of_counts(
        "rows that go along, single",
        *ALONG,
        gate_up="single",
        activation="square(relu(hidden))",
        biases=True,
        inner=200,
    ),
    Block.of_counts(
        "rows that go along, gpt-oss",
        *ALONG,
        gate_up="interleaved",
        activation=GPT_OSS,
        in_transposed=True,
        out_transposed=True,
        biases=True,
        inner=208,
    ),
    Block.of_counts(
        "rows that go along, weight inside", *ALONG, activation="mul(mul(silu(gate), up), weight)", output="out"
    ),
    Block.of_counts("rows that go along, float16", *ALONG, dtype=torch.float16, weight_dtype=torch.float16),
    Block("odd tiles", tokens=1500, experts=6, inner=768),
    Block("odd tiles, interleaved", tokens=1500, experts=6, inner=640, hidden=768, gate_up="interleaved"),
    Block("one token", tokens=1, experts=128, top_k=8, inner=768),
    # rows are further ahead than a GEMM dispatches them
    Block("many rows", tokens=5001, experts=5, hidden=128, inner=8192, top_k=3),
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_outputs_and_gradients(block: Block) -> None:
    tensors = block.tensors()
    assert hopper_experts.takes(block.record(tensors)), "the fused kernels were to compute this"
    expected, reference, found = exact(block, tensors), run(block, tensors, "reference"), run(block, tensors)
    again = run(block, tensors)
    pairs: list[Any] = [("result", expected.result, reference.result, found.result, again.result)]
    for name, value in expected.gradients.items():
        pairs.append((name, value, *(each.gradients[name] for each in (reference, found, again))))
    for name, right, theirs, ours, repeated in pairs:
        assert torch.equal(ours, repeated), f"{name} differs from run to run"
        mine, other = worst_row(ours, right), worst_row(theirs, right)
        assert mine <= 1.5 * other + 1e-6, f"{name}: {mine:.2e}, PyTorch's {other:.2e}"


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_steps_that_are_remembered(block: Block, recompute: bool) -> None:
    """The first is not, the second is recorded, later ones are repeated, on tensors that lie elsewhere."""
    CALLS.clear()
    tensors, kept = block.tensors(), []
    expected = run(block, tensors, recompute=recompute)
    for _ in range(3):
        tensors = {name: None if value is None else value.clone() for name, value in tensors.items()}
        kept.append(tensors)
        found = run(block, tensors, recompute=recompute)
        for name, value in expected.all().items():
            assert torch.equal(found.all()[name], value), name
    assert len(CALLS) == 3, "plan, forward and backward"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_nothing_is_written_beyond_a_tensor(block: Block) -> None:
    """Nor does anybody read what nobody wrote: the results are those of memory that holds anything else."""
    tensors = block.tensors()
    with fenced(least=6):
        found = run(block, tensors)
    expected = run(block, tensors)
    assert torch.equal(found.result, expected.result)
    for name, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[name], gradient), name


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_rows_that_gemms_dispatch_themselves_are_those_dispatched_before(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they multiply others, in memory that held anything else."""
    tensors = block.tensors()
    monkeypatch.setattr(hopper_routing, "BESIDE", 1 << 60)
    expected = run(block, tensors)
    monkeypatch.setattr(hopper_routing, "BESIDE", 0)
    with fenced(least=6), launched() as names:
        found = run(block, tensors)
    dispatching = [name for name in names if name.endswith("_dispatching")]
    assert dispatching == ["moecompile_grouped_gemm_activated_dispatching"], names
    for name, value in expected.all().items():
        assert torch.equal(found.all()[name], value), name


@pytest.mark.parametrize("names", [("x",), ("weights",), ("w_in",), ("w_out",), ("x", "b_out"), ("b_in",)])
def test_only_what_is_needed(names: tuple[str, ...]) -> None:
    block = Block("some", biases=True)
    tensors = block.tensors()
    whole, some = run(block, tensors), run(block, tensors, names=names)
    assert set(some.gradients) == set(names)
    for name in names:
        assert torch.equal(some.gradients[name], whole.gradients[name])


@pytest.mark.parametrize("gate_up", ["halves", "separate"])
def test_rows_that_come_piece_by_piece(gate_up: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of GEMM1's matrices, whose rows are made some columns at a time where they are large."""
    block = Block("pieces", hidden=1024, gate_up=gate_up)
    tensors = block.tensors()
    whole = run(block, tensors)
    dispatched: list[int] = []
    dispatch = hopper_routing.dispatch

    def noting(x: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
        dispatched.append(rows.shape[1])
        return dispatch(x, slots, rows)

    monkeypatch.setattr(hopper_experts, "LARGE", 1)
    monkeypatch.setattr(hopper_routing, "dispatch", noting)
    CALLS.clear()
    pieces = run(block, tensors)
    CALLS.clear()
    assert dispatched.count(256) == 4, dispatched
    for name, gradient in whole.gradients.items():
        assert torch.equal(pieces.gradients[name], gradient), name


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_rows_that_are_computed_again_are_those_that_would_be_saved(block: Block) -> None:
    tensors = block.tensors()
    saved, computed = run(block, tensors), run(block, tensors, recompute=True)
    for name, value in saved.all().items():
        assert torch.equal(computed.all()[name], value), name


def test_inference_computes_the_same() -> None:
    block = Block("inference")
    tensors = block.tensors()
    with torch.no_grad():
        alone = torch.ops.moecompile.experts(*block.arguments(tensors), **block.attributes())
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


def test_more_than_two_to_the_31_elements() -> None:
    """Rows of that many features in all: the last tokens get what they get alone."""
    block = Block("huge", tokens=300_000, top_k=4, experts=8, hidden=2048, inner=128)
    assert block.tokens * block.top_k * block.hidden > 2**31
    last = 2000
    tensors, ids, cotangent = block.tensors(), block.ids(), torch.randn(block.tokens, 2048, device="cuda").bfloat16()
    found = run(block, tensors, names=("x", "weights"), ids=ids, cotangent=cotangent)
    few = {
        name: each[-last:] if each is not None and name in ("x", "weights") else each for name, each in tensors.items()
    }
    alone = run(block, few, names=("x", "weights"), ids=ids[-last:], cotangent=cotangent[-last:])
    for name, value in alone.all().items():
        rows = found.all()[name][-last:].double()
        assert worst_row(rows, value.double()) < 4e-3, name


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_result_that_is_rounded_has_the_bits_of_a_cast(dtype: torch.dtype, fp8: bool) -> None:
    """What passes/fuse.py makes of a float32 sum that the model rounds, gradients included."""
    block = Block("float32 weights", weight_dtype=torch.float32, dropped=True)
    tensors = block.tensors()
    cotangent = torch.randn(block.tokens, block.hidden, device="cuda").to(dtype)
    cast, rounded = (
        run(replace(block, out_dtype=each), tensors, fp8=fp8, cotangent=cotangent) for each in (None, dtype)
    )
    assert cast.result.dtype == torch.float32 and torch.equal(rounded.result, cast.result.to(dtype))
    assert cast.gradients.keys() == rounded.gradients.keys()
    assert all(torch.equal(each, rounded.gradients[name]) for name, each in cast.gradients.items())
