"""The fused experts in FP8 on a Hopper GPU: against their emulation in PyTorch, and against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dense_experts import ROUTINGS, routing
from fences import fenced
from gpu_blocks import GPT_OSS, NAMES, Block, Run, Tensors, exact, ops, run
from moecompile.bench_proof import launched
from moecompile.runtime import hopper_fp8, hopper_fp8_gemm, hopper_quantize, hopper_routing
from moecompile.runtime.remembered import CALLS

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

LINEAR = Block("linear", gate_up="single", activation="mul(hidden, 0.5)", output="out", weighted=False)
BLOCKS = [
    Block("plain"),
    Block("dropped", dropped=True),
    Block("transposed", in_transposed=True, out_transposed=True),
    Block("separate", gate_up="separate"),
    Block("separate transposed biased", gate_up="separate", in_transposed=True, biases=True),
    Block("single", gate_up="single", activation="square(relu(hidden))"),
    Block("biased", biases=True, dropped=True),
    Block(
        "gpt-oss", gate_up="interleaved", activation=GPT_OSS, in_transposed=True, out_transposed=True, biases=True,
        hidden=208, inner=176,
    ),
    Block("interleaved", gate_up="interleaved", in_transposed=True, hidden=208, inner=176),
    Block("interleaved rows", gate_up="interleaved", hidden=256, inner=176),
    Block("parts of blocks", hidden=208, inner=176, tokens=61),
    Block("parts of blocks, single", hidden=176, inner=144, gate_up="single", activation="gelu(hidden, tanh)"),
    Block("less than a block", hidden=112, inner=64),
    Block("top 1", top_k=1, tokens=130),
    Block("large", tokens=2000, top_k=4, experts=6, hidden=1024, inner=1408),
    Block("float32 weights", weight_dtype=torch.float32, output="mul(cast(out, float32), weight)"),
    Block("cast weights", weight_dtype=torch.float32, output="mul(out, cast(weight, bfloat16))"),
    Block("weight inside", activation="mul(mul(silu(gate), up), weight)", output="out"),
    Block("weight twice", activation="mul(silu(mul(gate, weight)), up)"),
    Block("no weights", output="out", weighted=False),
    Block("many experts", tokens=64, experts=70, top_k=6),
    Block("one expert", one_expert=True),
    Block("one token", tokens=1, experts=128, top_k=8, inner=768),
    Block("float32 scales", dropped=True, scale_format="float32"),
    Block(
        "float32 scales, gpt-oss", gate_up="interleaved", activation=GPT_OSS, in_transposed=True, out_transposed=True,
        biases=True, hidden=208, inner=176, scale_format="float32",
    ),
    Block(
        "float32 scales, single", gate_up="single", activation="square(relu(hidden))", hidden=1024,
        scale_format="float32",
    ),
    # rows are further ahead than a GEMM dispatches them
    Block("many rows", tokens=5001, experts=5, hidden=128, inner=8192, top_k=3),
]  # fmt: skip

EMULATED = {"b_in": 0.035, "b_up": 0.035, "b_out": 1e-3}
"""Relative L2 errors against the emulation, 0.02 where nothing is said.

A product is off by 2e-3 at most, of which 1.7e-3 are its rounding to bfloat16, the same in both: sums differ by 1.1e-3,
and gate times up by 1.5e-3. A quantiser moves a value that is off by d to a neighbour, a step s away, with probability
d / s, which gives a squared error of d s; with d = 0.8 x 1.5e-3 on average and steps of 0.08 that is 0.01 for each of
the quantised operands. Results have one behind a product, gradients two: 0.014, which is what the emulation with random
errors of 1.1e-3 in every sum is found to give. An operand rounded otherwise is off by 0.026, a wrong scale by more.

Gradients of biases are sums of quantised gradients, in the emulation of those before: 0.026 more.
"""
EXACT = {"result": 0.075, "x": 0.085, "weights": 0.095, "w_in": 0.085, "w_up": 0.085, "w_out": 0.09}
"""Relative L2 errors against float64: those of tests/test_experts_fp8.py, where it is said how they add up.

0.045 for each product, of which two or three stand behind each other. Biases' gradients have the errors of `w_in`'s
without the last product's; that of `b_out` sums what no quantiser has seen.
"""
EXACT |= {"b_in": 0.085, "b_up": 0.085, "b_out": 5e-3}


def fused(block: Block, tensors: Tensors, *, names: tuple[str, ...] = NAMES, cotangent: Tensor | None = None) -> Run:
    """By the kernels, and by nothing else."""
    assert hopper_fp8.takes(block.record(tensors), block.quantized(tensors)), "the fused kernels were to compute this"
    return run(block, tensors, names=names, fp8=True, cotangent=cotangent if cotangent is not None else upstream(block))


def emulated(block: Block, tensors: Tensors, cotangent: Tensor) -> Run:
    return run(block, tensors, "reference", fp8=True, cotangent=cotangent)


def upstream(block: Block) -> Tensor:
    """The result's gradient."""
    torch.manual_seed(2)
    return torch.randn(block.tokens, block.hidden, device="cuda").bfloat16()


def relative(found: Tensor, expected: Tensor) -> float:
    """The relative L2 error; infinite if something is not a number."""
    found, expected = found.detach().double(), expected.detach().double()
    error = (found - expected).norm() / expected.norm().clamp(min=1e-30)
    return float(error.nan_to_num(nan=float("inf")))


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row."""
    found, expected = found.detach().double(), expected.detach().double()
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).nan_to_num(nan=float("inf")).max())


def assert_equal(found: Run, expected: Run) -> None:
    for name, value in expected.all().items():
        assert torch.equal(found.all()[name], value), (
            f"{name} differs in {int((found.all()[name] != value).sum())} places"
        )


def assert_emulated(found: Run, expected: Run, scatter: int = 1) -> None:
    for name, value in expected.all().items():
        error = relative(found.all()[name], value)
        assert error <= EMULATED.get(name, 0.02) * scatter, f"{name}: {error:.4f} from the emulation"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_results_and_gradients(block: Block) -> None:
    tensors, cotangent = block.tensors(), upstream(block)
    found = fused(block, tensors, cotangent=cotangent)
    # of a few values only, or of those of one row; the largest of a block, if it is moved, moves its float32 scale and
    # with it how the others round
    scatter = 2 if block.tokens == 1 or block.scale_format != "power_of_two" else 1
    assert_emulated(found, emulated(block, tensors, cotangent), scatter)
    for name, value in exact(block, tensors, cotangent).all().items():
        error = relative(found.all()[name], value)
        assert error <= EXACT[name] * scatter, f"{name}: {error:.4f} from float64"


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_steps_that_are_remembered(block: Block, recompute: bool) -> None:
    """The first is not, the second is recorded, later ones are repeated, on tensors that lie elsewhere."""
    CALLS.clear()
    tensors, kept = block.tensors(), []
    expected = run(block, tensors, fp8=True, recompute=recompute)
    for _ in range(3):
        tensors = {name: None if value is None else value.clone() for name, value in tensors.items()}
        kept.append(tensors)
        assert_equal(run(block, tensors, fp8=True, recompute=recompute), expected)
    assert len(CALLS) == 3, "plan, forward and backward"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_rows_that_gemms_dispatch_themselves_are_those_dispatched_before(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantised tokens, while others' rows are multiplied, in memory that held anything else."""
    tensors = block.tensors()
    monkeypatch.setattr(hopper_routing, "BESIDE", 1 << 60)
    expected = fused(block, tensors)
    monkeypatch.setattr(hopper_routing, "BESIDE", 0)
    with fenced(least=6), launched() as names:
        found = fused(block, tensors)
    assert len([name for name in names if name.endswith("_dispatching")]) == 2, names
    assert_equal(found, expected)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_five_runs_are_bitwise_equal(block: Block) -> None:
    tensors = block.tensors()
    first = fused(block, tensors)
    for _ in range(4):
        assert_equal(fused(block, tensors), first)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_nothing_is_written_beside_a_tensor(block: Block) -> None:
    """Nor does anybody read what nobody wrote: the results are those of memory that holds anything else."""
    tensors = block.tensors()
    with fenced(least=20):
        found = fused(block, tensors)
    assert_equal(found, fused(block, tensors))


def test_sums_are_promoted() -> None:
    """Of positive operands, in every direction: tensor cores alone would lose 3 % of each sum of as many products."""
    block = Block("positive", 1024, 2, 4, 1024, 1024, "single", "relu(hidden)", "out", weighted=False)
    tensors = {name: None if value is None else value.abs() for name, value in block.tensors().items()}
    cotangent = upstream(block).abs()
    found, expected = fused(block, tensors, cotangent=cotangent), emulated(block, tensors, cotangent)
    for name, value in expected.all().items():  # two forward products, dgrad twice, wgrad behind one and two others
        bias = float(found.all()[name].double().sum() / value.double().sum()) - 1
        assert abs(bias) < 2e-3, f"{name}: {bias:.2%}"
    assert_emulated(found, expected)


@pytest.mark.parametrize(
    "block", [Block("biased", biases=True), Block("single", gate_up="single", activation="silu(hidden)")]
)
def test_gradients_of_1e_10_survive(block: Block) -> None:
    """Bit for bit as those of 1: scales are powers of two, and so is what they are smaller by."""
    tensors, cotangent = block.tensors(), upstream(block)
    small, large = (fused(block, tensors, cotangent=cotangent * scale) for scale in (2.0**-33, 1.0))
    for name, value in large.gradients.items():
        assert value.count_nonzero() > 0.4 * value.numel(), name
        assert torch.equal(small.gradients[name], value * 2.0**-33), name


def test_rows_of_zeros() -> None:
    """Tokens and gradients that are all zero give zeros, and leave the others as they were."""
    block = Block("zeros")
    tensors, cotangent = block.tensors(), upstream(block)
    clean = fused(block, tensors, cotangent=cotangent)
    assert tensors["x"] is not None
    tensors["x"][3::7], cotangent[5::7] = 0, 0
    tensors["x"][0:200:7] = 0  # with the next, tokens that are zero both ways
    cotangent[0:200:7] = 0
    found = fused(block, tensors, cotangent=cotangent)
    silent, unheard = (tensors["x"] == 0).all(1), (cotangent == 0).all(1)
    assert not found.result[silent].any() and torch.equal(found.result[~silent], clean.result[~silent])
    assert not found.gradients["x"][unheard].any() and not found.gradients["weights"][unheard].any()
    others = ~silent & ~unheard
    for name in ("x", "weights"):
        assert torch.equal(found.gradients[name][others], clean.gradients[name][others]), name
    assert_emulated(found, emulated(block, tensors, cotangent))


@pytest.mark.parametrize("matrix", ["w_in", "w_out"])
def test_an_expert_of_zeros(matrix: str) -> None:
    block = Block("silent", top_k=1)
    tensors, cotangent = block.tensors(), upstream(block)
    of_matrix = tensors[matrix]
    assert of_matrix is not None
    of_matrix[0] = 0
    found, own = fused(block, tensors, cotangent=cotangent), (block.ids() == 0).any(1)
    assert own.any() and not found.result[own].any() and not found.gradients["x"][own].any()
    assert_emulated(found, emulated(block, tensors, cotangent))


def test_loud_and_quiet_tokens() -> None:
    """The worst token's error, with tokens and gradients from 2^-12 to 2^12: what a scale for several would lose."""
    tensors, cotangent = LINEAR.tensors(), upstream(LINEAR)
    assert tensors["x"] is not None
    for rows in (tensors["x"], cotangent):
        rows.mul_(torch.exp2(torch.randint(-12, 13, (len(rows), 1), device="cuda")))
    found, expected = fused(LINEAR, tensors, cotangent=cotangent), exact(LINEAR, tensors, cotangent)
    # four operands of 0.026, quadratically 0.053, in each; the emulation's worst of 300 rows of 512 is 0.064
    assert worst(found.result, expected.result) <= 0.075
    assert worst(found.gradients["x"], expected.gradients["x"]) <= 0.075
    assert_emulated(found, emulated(LINEAR, tensors, cotangent))


def test_infinities_stay_with_their_token_and_its_experts() -> None:
    block = Block("infinite", dropped=True)
    tensors = block.tensors()
    clean = fused(block, tensors)
    assert tensors["x"] is not None
    token = int((block.ids() >= 0).all(1).nonzero()[0])
    tensors["x"][token] = float("inf")
    spoilt = fused(block, tensors)
    others = torch.arange(block.tokens, device="cuda") != token
    assert not spoilt.result[token].isfinite().any()
    assert torch.equal(clean.result[others], spoilt.result[others])
    assert torch.equal(clean.gradients["x"][others], spoilt.gradients["x"][others])
    spared = [expert for expert in range(block.experts) if expert not in block.ids()[token].tolist()]
    for name in ("w_in", "w_out"):
        assert torch.equal(clean.gradients[name][spared], spoilt.gradients[name][spared]), name


def test_nobody_is_routed() -> None:
    block = Block("nobody")
    tensors, ids = block.tensors(), torch.full((block.tokens, block.top_k), -1, device="cuda")
    found = run(block, tensors, fp8=True, ids=ids, cotangent=upstream(block))
    assert not any(value.any() for value in found.all().values())


@pytest.mark.parametrize(
    "names", [("x",), ("weights",), ("w_in",), ("w_out",), ("x", "b_out"), ("b_in",), ("w_in", "x")]
)
def test_only_what_is_needed(names: tuple[str, ...]) -> None:
    block = Block("some", biases=True)
    tensors = block.tensors()
    whole, some = fused(block, tensors), fused(block, tensors, names=names)
    assert set(some.gradients) == set(names)
    for name in names:
        assert torch.equal(some.gradients[name], whole.gradients[name]), name


def test_frozen_experts_cost_no_gradient_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block("frozen")
    tensors = block.tensors()
    expected = fused(block, tensors)
    for module, name in (
        (hopper_fp8_gemm, "outer"),
        (hopper_quantize, "transpose_rows"),
        (hopper_quantize, "pad_offsets"),
    ):
        monkeypatch.setattr(module, name, None)
    found = fused(block, tensors, names=("x", "weights"))
    for name, value in found.gradients.items():
        assert torch.equal(value, expected.gradients[name]), name


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_rows_that_are_computed_again_are_those_that_would_be_saved(block: Block) -> None:
    tensors = block.tensors()
    assert_equal(run(block, tensors, fp8=True, recompute=True), run(block, tensors, fp8=True))


@pytest.mark.parametrize("block", [BLOCKS[0], *BLOCKS[5:8]], ids=lambda block: block.name)
def test_inference_computes_the_same(block: Block) -> None:
    """In a first call, and in later ones, which are remembered, on tensors that lie elsewhere."""
    tensors = block.tensors()
    expected, kept = fused(block, tensors).result, []
    CALLS.clear()
    for _ in range(3):
        with torch.no_grad():
            arguments, quantized = block.arguments(tensors), block.quantized(tensors)
            alone = ops.experts_fp8(*arguments, **block.attributes(), quantized=quantized)
        assert torch.equal(alone, expected)
        kept.append((arguments, quantized))
        tensors = {name: None if value is None else value.clone() for name, value in tensors.items()}
    assert len(CALLS) == 2  # and the plan


def test_gradients_keep_the_parameters_layout() -> None:
    """Matrices that lie turned in memory get gradients that do, with the same numbers."""
    block = Block("turned", in_transposed=True)
    tensors = block.tensors()
    expected = fused(block, tensors)
    for name in ("w_in", "w_out"):
        matrix = tensors[name]
        assert matrix is not None
        tensors[name] = matrix.mT.contiguous().mT
    found = fused(block, tensors)
    assert found.gradients["w_in"].stride() == tensors["w_in"].stride()  # type: ignore[union-attr]
    assert_equal(found, expected)


@pytest.mark.parametrize("block", [Block("float16", dtype=torch.float16), Block("narrow", hidden=136, inner=72)])
def test_what_the_kernels_do_not_take_is_emulated(block: Block) -> None:
    tensors, cotangent = block.tensors(), upstream(block)
    assert not hopper_fp8.takes(block.record(tensors), block.quantized(tensors))
    found = run(block, tensors, fp8=True, cotangent=cotangent)
    assert_equal(found, emulated(block, tensors, cotangent))


@pytest.mark.parametrize("block", [BLOCKS[0], BLOCKS[6], BLOCKS[7]], ids=lambda block: block.name)
def test_one_captured_graph_serves_every_routing(block: Block) -> None:
    tensors, cotangent, ids = block.tensors(), upstream(block), block.ids()
    fused(block, tensors)

    def step() -> dict[str, Tensor]:
        return run(block, tensors, fp8=True, ids=ids, cotangent=cotangent).all()

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for kind in ROUTINGS:
        ids.copy_(routing(kind, block.tokens, block.top_k, block.experts))
        graph.replay()
        for name, value in step().items():
            assert torch.equal(captured[name], value), f"{kind}: {name}"
