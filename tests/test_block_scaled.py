"""Matrices that are kept in FP8: what they read as, what operators get of them, what they refuse."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moecompile.runtime.block_scaled import BlockScaled, Lie
from moecompile.runtime.quantize import BLOCK, E4M3

ops = torch.ops.moecompile
LAYOUTS = [
    ((130, 256), {}),
    ((256, 130), {"transposed": True}),
    ((3, 70, 200), {}),
    ((3, 140, 200), {"gate_up": "halves"}),
    ((3, 512, 256), {"gate_up": "halves"}),
    ((3, 200, 140), {"gate_up": "interleaved", "transposed": True}),
    ((3, 140, 200), {"gate_up": "interleaved"}),
]


def matrix(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(shape) * torch.logspace(-3, 3, shape[-1])).to(dtype)


def same(found: Any, expected: Any) -> bool:
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(found, expected, strict=True)
    )


def checkpoint(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales that are no powers of two, and the float32 matrix that they stand for."""
    torch.manual_seed(0)
    *outer, n, k = shape
    values = torch.randn(shape).mul(100).clamp(-448, 448).to(E4M3)
    scales = torch.rand(*outer, -(-n // BLOCK), -(-k // BLOCK)) + 0.1
    spread = scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :n, :k]
    return values, scales, values.float() * spread


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_it_holds_what_the_operator_gives(shape: tuple[int, ...], layout: dict[str, Any]) -> None:
    w = matrix(*shape)
    kept = BlockScaled.of(w, **layout)
    assert kept.shape == w.shape and kept.dtype == w.dtype and not kept.requires_grad
    for backward in (False, True):
        expected = ops.quantize_weights(w, **layout, backward=backward)
        assert same(ops.quantize_weights(kept, **layout, backward=backward), expected)
    assert ops.quantize_weights(kept, **layout, backward=False)[0].data_ptr() == kept.e4m3.data_ptr()


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_it_reads_as_the_matrix(shape: tuple[int, ...], layout: dict[str, Any]) -> None:
    w = matrix(*shape)
    found = BlockScaled.of(w, **layout) * 1.0
    assert type(found) is Tensor and found.shape == w.shape
    bound = w.abs().float().amax() * 2**-4  # half a step of the largest; columns differ by orders of magnitude
    assert (found.float() - w.float()).abs().amax() <= bound
    assert same([BlockScaled.of(found, **layout) * 1.0], [found])  # numbers of FP8 are what they are


def test_blocks_restart_at_gate_and_at_up() -> None:
    w = torch.ones(1, 2 * 64, 128, dtype=torch.bfloat16)
    w[:, 64:] = 2.0**-20  # in gate's block they would vanish
    assert torch.equal(BlockScaled.of(w, gate_up="halves") * 1.0, w)
    assert not (BlockScaled.of(w) * 1.0)[:, 64:].any()


@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (3, 512, 256)])
def test_checkpoints_are_kept_as_they_are(shape: tuple[int, ...]) -> None:
    values, scales, expected = checkpoint(*shape)
    kept = BlockScaled.from_blocks(values, scales, torch.float32)
    assert torch.equal(kept * 1.0, expected)
    found = ops.quantize_weights(kept, backward=False)
    *_, n, k = shape
    assert same([found[0][..., :n, :k], found[1]], [values, scales])
    assert not found[0].float()[..., n:, :].any() and not found[0].float()[..., k:].any()


def test_gate_and_up_of_a_checkpoint_are_halves() -> None:
    values, scales, _ = checkpoint(3, 512, 256)
    kept = BlockScaled.from_blocks(values, scales, torch.bfloat16)
    found = ops.quantize_weights(kept, gate_up="halves", backward=False)
    assert found[0].data_ptr() == kept.e4m3.data_ptr() and same(found[:2], [values, scales])


def test_halves_that_share_a_block_are_quantised_anew() -> None:
    """Half a block of gate and half of up have one scale in such a checkpoint; the kernels want two."""
    values, scales, expected = checkpoint(3, 2 * 192, 256)
    kept = BlockScaled.from_blocks(values, scales, torch.float32)
    assert same(
        ops.quantize_weights(kept, gate_up="halves"), ops.quantize_weights(expected.contiguous(), gate_up="halves")
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_gate_and_up_that_are_separate(transposed: bool) -> None:
    gate, up = matrix(3, 200, 140), matrix(3, 200, 140).flip(0)
    kept = [BlockScaled.of(each, gate_up="separate", transposed=transposed) for each in (gate, up)]
    layout = {"gate_up": "separate", "transposed": transposed}
    assert same(ops.quantize_weights(*kept, **layout), ops.quantize_weights(gate, up, **layout))
    mixed = ops.quantize_weights(kept[0], up, **layout)
    assert same(mixed, ops.quantize_weights(kept[0] * 1.0, up, **layout))


def test_matrices_of_experts_are_stacked_in_fp8() -> None:
    matrices = [matrix(130, 256) * (number + 1) for number in range(3)]
    kept = [BlockScaled.of(each) for each in matrices]
    stacked = torch.stack(kept)  # type: ignore[arg-type]
    assert isinstance(stacked, BlockScaled) and stacked.shape == (3, 130, 256)
    assert same(ops.quantize_weights(stacked), ops.quantize_weights(torch.stack(matrices)))
    mixed: list[tuple[list[Any], int]] = [
        ([kept[0], matrices[1]], 0),
        (kept, 1),
        ([BlockScaled.of(matrices[0].mT, transposed=True)], 0),
    ]
    for others, dim in mixed:
        plain = torch.stack([each * 1.0 for each in others], dim)
        found = torch.stack(others, dim)
        assert type(found) is Tensor and torch.equal(found, plain)


def test_a_layer_reads_it_dequantised() -> None:
    w, x = matrix(130, 256), torch.randn(5, 256).bfloat16()
    kept = BlockScaled.of(w)
    assert torch.equal(nn.functional.linear(x, kept), nn.functional.linear(x, kept.dequantized()))
    assert torch.equal(kept[3], kept.dequantized()[3])


@pytest.mark.parametrize("loops", [False, True], ids=["by number", "over all"])
@pytest.mark.parametrize("fullgraph", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("layout", [{}, {"gate_up": "halves"}, {"transposed": True}], ids=str)
def test_a_loop_over_experts_dequantises_one_at_a_time(
    layout: dict[str, Any], fullgraph: bool, loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, x = BlockScaled.of(matrix(3, 256, 256), **layout), torch.randn(4, 256).bfloat16()
    expected = torch.stack([x @ each for each in kept * 1.0])
    sizes, dequantized = list[tuple[int, ...]](), BlockScaled.dequantized

    def noted(w: BlockScaled) -> Tensor:
        sizes.append(tuple(w.shape))
        return dequantized(w)

    monkeypatch.setattr(BlockScaled, "dequantized", noted)

    def loop(w: Tensor, x: Tensor) -> Tensor:
        return torch.stack([x @ each for each in (w if loops else (w[expert] for expert in range(3)))])

    run = torch.compile(loop, backend="aot_eager", fullgraph=True) if fullgraph else loop
    assert torch.equal(run(kept, x), expected)
    assert sizes and set(sizes) == {(256, 256)}
    assert torch.equal(kept.select(1, 5), dequantized(kept)[:, 5]) and torch.equal(kept[-1] * 1.0, dequantized(kept)[2])


@pytest.mark.parametrize("layout", [{}, {"gate_up": "halves"}, {"transposed": True}], ids=str)
@pytest.mark.parametrize("shape", [(3, 256, 256), (3, 512, 140)], ids=str)
def test_blocks_are_those_of_the_matrix(shape: tuple[int, ...], layout: dict[str, Any]) -> None:
    kept = BlockScaled.of(matrix(*shape), **layout)
    blocks = kept.blocks()
    assert blocks is not None and blocks[0].shape == shape and all(each.is_contiguous() for each in blocks)
    assert torch.equal(BlockScaled.from_blocks(*blocks, torch.bfloat16) * 1.0, kept * 1.0)


@pytest.mark.parametrize("asked", [{"gate_up": "single"}, {"gate_up": "halves"}], ids=str)
@pytest.mark.parametrize("scale_format", ["power_of_two", "float32"])
def test_what_is_held_otherwise_is_turned_not_cast(asked: dict[str, Any], scale_format: str) -> None:
    """A checkpoint's matrices do not say how they lie: their numbers and scales are kept."""
    kept = BlockScaled.of(matrix(3, 140, 256), transposed=True, scale_format=scale_format)
    blocks = kept.blocks()
    assert blocks is not None
    again = BlockScaled.from_blocks(*blocks, torch.bfloat16)
    how = {**asked, "transposed": True}
    assert same(ops.quantize_weights(again, **how), ops.quantize_weights(kept, transposed=True))
    laid = again.laid(Lie(asked["gate_up"], True))
    assert laid is not None and same([laid.e4m3, laid.scales], [kept.e4m3, kept.scales])
    assert again.laid(Lie("interleaved")) is None
    pair = ops.quantize_weights(again, again, gate_up="separate", transposed=True)
    assert same(pair, ops.quantize_weights(kept, kept, gate_up="separate", transposed=True))


def test_one_expert_is_written() -> None:
    for layout in ({}, {"gate_up": "halves"}, {"gate_up": "interleaved"}, {"transposed": True}):
        w, other = matrix(3, 256, 256), matrix(256, 256).flip(0)
        kept = BlockScaled.of(w, **layout)
        kept[1] = other
        expected = BlockScaled.of(torch.stack([w[0], other, w[2]]), **layout)
        assert same([kept.e4m3, kept.scales], [expected.e4m3, expected.scales])


@pytest.mark.parametrize("index", [slice(0, 1), (0, 3), (slice(None), 0), ..., torch.tensor([1])], ids=str)
def test_parts_are_not_written(index: Any) -> None:
    kept = BlockScaled.of(matrix(3, 256, 128))
    with pytest.raises(RuntimeError, match=r"a part .* of a matrix that is kept in FP8, .* is written"):
        kept[index] = 0
    with pytest.raises(RuntimeError, match="kept in FP8"):
        BlockScaled.of(matrix(256, 128))[0] = 0
    kept[-1] = 0
    assert not kept.e4m3[2].float().any() and kept.e4m3[1].float().any()


def test_gate_and_up_apart() -> None:
    w = matrix(3, 2 * 192, 140)
    kept = BlockScaled.of(w, gate_up="halves")
    halves = kept.gate_and_up()
    assert halves is not None and kept.blocks() is None
    assert torch.equal(torch.cat([each * 1.0 for each in halves], 1), kept * 1.0)
    (values, scales), (others, of_others) = (each.blocks() for each in halves)  # type: ignore[misc]
    both = (
        torch.cat([values.view(torch.uint8), others.view(torch.uint8)], 1).view(E4M3),
        torch.cat([scales, of_others], 1),
    )
    again = BlockScaled.from_blocks(*both, torch.bfloat16, gate_up="halves")
    assert again.lie == kept.lie and same([again.e4m3, again.scales], [kept.e4m3, kept.scales])
    with pytest.raises(ValueError, match=r"expected scales of shape \(3, 4, 2\)"):
        BlockScaled.from_blocks(both[0], scales, torch.bfloat16, gate_up="halves")
    with pytest.raises(ValueError, match=r"expected values \(experts, 2 N, K\)"):
        BlockScaled.from_blocks(both[0][:, 1:], both[1], torch.bfloat16, gate_up="halves")
    for layout in ({}, {"gate_up": "interleaved"}, {"gate_up": "halves", "transposed": True}):  # nobody knows
        assert BlockScaled.of(matrix(3, 2 * 192, 2 * 192), **layout).gate_and_up() is None
    assert BlockScaled.of(w, gate_up="interleaved").blocks() is None


def test_it_is_copied_moved_and_stored() -> None:
    kept: Any = nn.Parameter(BlockScaled.of(matrix(130, 256)), requires_grad=False)
    stored = io.BytesIO()
    torch.save({"w": kept}, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)["w"]
    for each in (copy.deepcopy(kept), kept.clone(), kept.detach(), kept.to("cpu", copy=True), loaded):
        assert isinstance(each, BlockScaled)
        assert same([each.e4m3, each.scales], [kept.e4m3, kept.scales]) and each.dtype == torch.bfloat16
    assert copy.deepcopy(kept).e4m3.data_ptr() != kept.e4m3.data_ptr()
    assert isinstance(copy.deepcopy(kept), nn.Parameter)
    meta = kept.to("meta")
    assert meta.is_meta and isinstance(meta, BlockScaled)
    half = kept.to(torch.float16)
    assert isinstance(half, BlockScaled) and half.dtype == torch.float16 and half.e4m3.dtype == E4M3
    assert type(kept.to(torch.float64)) is Tensor


def test_another_process_loads_it(tmp_path: Path) -> None:
    kept = BlockScaled.of(matrix(130, 256))
    torch.save({"w": nn.Parameter(kept, requires_grad=False)}, tmp_path / "stored.pt")
    path = str(tmp_path / "stored.pt")
    code = f"import torch, moecompile.runtime.block_scaled; print(torch.load({path!r})['w'][0, 0].item())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(found.stdout) == kept[0, 0].item()


def test_modules_carry_it_along() -> None:
    layer = nn.Linear(256, 130, bias=False)
    layer.weight = nn.Parameter(BlockScaled.of(matrix(130, 256)), requires_grad=False)
    layer.to(torch.float16)
    assert isinstance(layer.weight, BlockScaled) and layer.weight.dtype == torch.float16
    other: Any = copy.deepcopy(layer)
    other.weight.e4m3.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight * 1.0, layer.weight * 1.0)
    plain = matrix(130, 256).flip(0)
    other.load_state_dict({"weight": plain})
    assert torch.equal(other.weight * 1.0, BlockScaled.of(plain.half()) * 1.0)
    target = torch.empty(130, 256, dtype=torch.float16)
    assert torch.equal(target.copy_(layer.weight), layer.weight * 1.0)


def test_nobody_writes_into_it() -> None:
    kept = BlockScaled.of(matrix(130, 256))
    before = kept * 1.0
    for write in (lambda: kept.add_(1), lambda: torch.add(before, 1, out=kept), lambda: torch._foreach_mul_([kept], 2)):
        with pytest.raises(RuntimeError, match=r"writes into a matrix that is kept in FP8, of shape \(130, 256\)"):
            write()
    assert torch.equal(kept * 1.0, before)
    with pytest.raises(RuntimeError, match=r"expected a matrix of shape \(130, 256\)"):
        kept.copy_(torch.zeros(1, 256))


def test_data_is_taken_from_its_like_alone() -> None:
    kept, other = BlockScaled.of(matrix(130, 256)), BlockScaled.of(-matrix(130, 256))
    before = kept * 1.0
    parameters = [nn.Parameter(kept, requires_grad=False)]
    for value in (torch.zeros(130, 256).bfloat16(), torch.zeros(3, 5).bfloat16()):
        with pytest.raises(RuntimeError, match="`copy_` quantises what it is given"):
            parameters[0].data = value
    with pytest.raises(RuntimeError, match="kept in FP8"):
        nn.utils.vector_to_parameters(torch.zeros(130 * 256).bfloat16(), parameters)
    assert torch.equal(parameters[0] * 1.0, before)
    parameters[0].data = other
    assert torch.equal(parameters[0] * 1.0, -before) and torch.equal(parameters[0].data * 1.0, -before)


def test_it_has_no_gradient() -> None:
    layer = nn.Linear(256, 130, bias=False).bfloat16()
    layer.weight = nn.Parameter(BlockScaled.of(layer.weight), requires_grad=False)
    assert not layer.requires_grad_(False).weight.requires_grad
    with pytest.raises(RuntimeError, match=r"of shape \(130, 256\), has no gradient; train the model in its own"):
        layer.requires_grad_(True)


def test_it_is_pickled_and_shared() -> None:
    layer = nn.Linear(256, 130, bias=False).bfloat16()
    kept = BlockScaled.of(layer.weight, gate_first=False)
    layer.weight = nn.Parameter(kept, requires_grad=False)
    read = pickle.loads(pickle.dumps(layer)).weight
    assert isinstance(read, BlockScaled) and isinstance(read, nn.Parameter) and not read.gate_first
    assert same((read.e4m3, read.scales), (kept.e4m3, kept.scales)) and read.lie == Lie()
    assert not pickle.loads(pickle.dumps(kept)).gate_first
    layer.share_memory()
    assert layer.weight.is_shared() and layer.weight.e4m3.is_shared()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "scales", "dtype", "error", "words"),
    [
        (torch.zeros(128, 128), torch.ones(1, 1), torch.bfloat16, TypeError, "float8_e4m3fn values"),
        (torch.zeros(128, 128).to(E4M3), torch.ones(1, 1).half(), torch.bfloat16, TypeError, "float32 scales"),
        (torch.zeros(128, 128).to(E4M3), torch.ones(1, 1), torch.int8, TypeError, "a model's dtype"),
        (torch.zeros(128).to(E4M3), torch.ones(1), torch.bfloat16, ValueError, r"shape \(N, K\)"),
        (torch.zeros(130, 128).to(E4M3), torch.ones(1, 1), torch.bfloat16, ValueError, r"scales of shape \(2, 1\)"),
    ],
)
def test_what_is_no_checkpoint(
    values: Tensor, scales: Tensor, dtype: torch.dtype, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        BlockScaled.from_blocks(values, scales, dtype)
