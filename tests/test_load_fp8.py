"""`load_fp8`: checkpoints in FP8 are taken as they are, and refused before anything is loaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moecompile
from moecompile.checkpoints import SCALES
from moecompile.runtime.block_scaled import BlockScaled
from moecompile.runtime.quantize import BLOCK, E4M3
from test_conversion import MODELS, Called, in_fp8, infer, made
from test_fp8_models import LOGITS, compiled, model_of
from test_precision import relative


def blocks(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values and scales of a matrix (*E, N, K) as DeepSeek-V3 has them, amax / 448 each, and what they are."""
    *_, n, k = matrix.shape
    filled = nn.functional.pad(matrix.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    cut = filled.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scales = cut.abs().amax((-3, -1)) / 448
    spread = scales[..., :, None, :, None]
    values = (cut / spread.clamp(min=1e-30)).to(E4M3)
    exact = (values.float() * spread).flatten(-2, -1).flatten(-3, -2)[..., :n, :k]
    return values.flatten(-2, -1).flatten(-3, -2)[..., :n, :k].contiguous(), scales, exact


def checkpoint(model: nn.Module, *, single: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint in FP8 with the experts packed or single, and the same model's exact numbers."""
    stored, exact = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in model.state_dict().items():
        exact[name] = tensor
        if "_proj" not in name:
            stored[name] = tensor
            continue
        values, scales, exact[name] = blocks(tensor)
        if tensor.dim() == 2 or not single:
            stored |= {name: values, name + SCALES: scales}
            continue
        path, _, last = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        for expert in range(tensor.shape[0]):
            of_parts = zip(parts, values[expert].chunk(len(parts)), scales[expert].chunk(len(parts)), strict=True)
            for part, value, scale in of_parts:
                stored |= {f"{path}.{expert}.{part}.weight": value, f"{path}.{expert}.{part}.weight{SCALES}": scale}
    return stored, exact


@pytest.mark.parametrize("single", [True, False], ids=["single experts", "packed experts"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_load_as_they_are(name: str, single: bool) -> None:
    tiny, ids = model_of(name, layers=1)
    model = Called(tiny).eval()
    stored, exact = checkpoint(tiny, single=single)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for each in fresh.parameters():
            each.zero_()
    names = moecompile.load_fp8(fresh.model, stored)
    assert {*names} == {*in_fp8(fresh.model)} and any("experts" in each for each in names)
    for each, tensor in fresh.model.state_dict().items():
        if each in names:
            *_, n, k = tensor.shape
            values, scales, _ = blocks(tiny.get_parameter(each))
            assert torch.equal(tensor.e4m3[..., :n, :k].float(), values.float())
            assert torch.equal(tensor.scales, scales)
        else:
            assert torch.equal(tensor, exact[each])
    tiny.load_state_dict(exact)
    expected = infer(model, ids)
    assert torch.equal(infer(fresh, ids), expected)  # in the model's own precision
    found = infer(compiled(fresh), ids)
    (graph,) = moecompile.last_report().graphs
    assert graph.forward is not None and "quantize_weights" not in graph.forward and "experts_fp8" in graph.forward
    assert 1e-3 < relative(found, expected) < LOGITS


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_not_in_fp8_gets_the_models_dtype(device: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Parameter(torch.ones(BLOCK, dtype=torch.bfloat16))
            self.linear = nn.Linear(BLOCK, BLOCK, False, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.linear(self.norm * x)
            return result

    with torch.device(device):
        model = Scaled()
    values, scales, exact = blocks(torch.randn(BLOCK, BLOCK))
    stored = {"norm": torch.full((BLOCK,), 2.0), "linear.weight": values, "linear.weight_scale_inv": scales}
    assert moecompile.load_fp8(model, stored) == ("linear.weight",)
    assert model.norm.dtype == torch.bfloat16 and stored["norm"].dtype == torch.float32
    x = torch.randn(4, BLOCK).bfloat16()
    assert relative(infer(compiled(model), x), 2 * x.float() @ exact.T) < 0.06


def test_the_checkpoint_stays_its_owners() -> None:
    values, scales, _ = blocks(torch.randn(BLOCK, BLOCK))
    stored = {"weight": values, "weight_scale_inv": scales}
    kept = {name: each.clone() for name, each in stored.items()}
    first, second = (nn.Linear(BLOCK, BLOCK, False, dtype=torch.bfloat16) for _ in range(2))
    for layer in (first, second):
        moecompile.load_fp8(layer, stored)
    kept_in_fp8: Any = second.weight.detach()
    before = kept_in_fp8.dequantized()
    first.load_state_dict({"weight": torch.randn(BLOCK, BLOCK) * 8})
    assert torch.equal(kept_in_fp8.dequantized(), before)
    assert all(torch.equal(each.float(), kept[name].float()) for name, each in stored.items())
    first.load_state_dict({"weight": before})  # scales that are no powers of two stay so
    after: Any = first.weight.detach()
    assert (after.scales.log2() % 1).any() and relative(after.dequantized(), before) < 0.03


def test_what_the_model_ignores_is_left_out() -> None:
    """A layer that predicts a further token, as DeepSeek-V3's checkpoints have it."""
    model: Any = model_of("deepseek_v3", layers=1)[0]
    stored, _ = checkpoint(model, single=True)
    further = {"model.layers.61.embed_tokens.weight": torch.ones(4, 4).to(E4M3)}
    model._keys_to_ignore_on_load_unexpected = None
    with pytest.raises(ValueError, match=r"layers\.61"):
        moecompile.load_fp8(model, {**stored, **further})
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.61.*"]
    assert moecompile.load_fp8(model, {**stored, **further})


def test_meta_parameters_beside_others_are_refused() -> None:
    model = nn.Sequential(nn.Linear(BLOCK, BLOCK, False), nn.Linear(BLOCK, BLOCK, False, device="meta"))
    values, scales, _ = blocks(torch.randn(BLOCK, BLOCK))
    stored = {f"{n}.weight{end}": each for n in "01" for end, each in (("", values), (SCALES, scales))}
    with pytest.raises(ValueError, match="must be on the meta device or none"):
        moecompile.load_fp8(model, stored)
    assert not in_fp8(model)


def test_onto_the_meta_device() -> None:
    model, ids = made(layers=2)
    stored, _ = checkpoint(model.model, single=True)
    with torch.device("meta"):
        empty = type(model.model)(model.model.config).to(torch.bfloat16).eval()
    buffers = {name for name, each in empty.named_buffers() if each.is_meta}
    moecompile.load_fp8(empty, stored)
    assert not any(each.is_meta for each in empty.parameters())
    for name in buffers:  # what no checkpoint has
        path, _, last = name.rpartition(".")
        setattr(empty.get_submodule(path), last, model.model.get_buffer(name))
    moecompile.load_fp8(model.model, stored)
    assert torch.equal(infer(Called(empty), ids), infer(model, ids))


def wrong(stored: dict[str, Tensor], change: str) -> None:
    experts, one = "model.layers.0.mlp.experts", "model.layers.0.self_attn.q_proj.weight"
    match change:
        case "missing":
            del stored["model.norm.weight"]
        case "unexpected":
            stored["model.norm.wait"] = stored["model.norm.weight"]
        case "an expert is missing":
            del stored[f"{experts}.1.up_proj.weight"]
        case "scales are missing":
            del stored["model.layers.0.self_attn.q_proj.weight_scale_inv"]
        case "scales of experts are missing":
            for name in [each for each in stored if experts in each and each.endswith(SCALES)]:
                del stored[name]
        case "no tensor":
            stored["model.norm.weight"] = [1.0]  # type: ignore[assignment]
        case "an expert is not in FP8":
            name = f"{experts}.1.up_proj.weight"
            stored[name] = stored[name].bfloat16()
            del stored[name + SCALES]
        case "scales":
            stored[one + SCALES] = stored[one + SCALES][:1, :1].clone()
        case "scales of an expert":
            stored[f"{experts}.1.up_proj.weight{SCALES}"] = torch.ones(2, 2)
        case "dtype of an expert":
            stored[f"{experts}.1.up_proj.weight"] = stored[f"{experts}.1.up_proj.weight"].bfloat16()
        case "dtype":
            stored[one] = stored[one].bfloat16()
        case "shape":
            stored[one], stored[one + SCALES] = stored[one][:128], stored[one + SCALES][:1]
        case "shape of an expert":
            stored[f"{experts}.1.up_proj.weight"] = stored[f"{experts}.1.up_proj.weight"][:, :128]
        case "shape of a norm":
            stored["model.norm.weight"] = stored["model.norm.weight"][:1]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ("missing", RuntimeError, r"missing model\.norm\.weight\. Pass strict=False"),
        ("unexpected", RuntimeError, r"unexpected model\.norm\.wait"),
        ("an expert is missing", RuntimeError, r"missing model\.layers\.0\.mlp\.experts\.1\.up_proj"),
        (
            "scales are missing",
            ValueError,
            r"q_proj\.weight is torch.float8_e4m3fn, and the checkpoint has no .*_scale_inv",
        ),
        ("scales of experts are missing", ValueError, r"experts\..* is torch.float8_e4m3fn, and the checkpoint has no"),
        ("no tensor", TypeError, r"model\.norm\.weight must be a tensor, got list"),
        ("an expert is not in FP8", ValueError, "all or none"),
        ("scales", ValueError, r"q_proj\.weight: expected scales of shape"),
        ("dtype", TypeError, r"q_proj\.weight: expected float8_e4m3fn"),
        ("shape", ValueError, r"q_proj\.weight must have shape .*, got \(128, 256\)"),
        ("shape of an expert", ValueError, r"1\.up_proj\.weight must have shape \(128, 256\)"),
        ("scales of an expert", ValueError, r"1\.up_proj\.weight_scale_inv must have shape \(1, 2\)"),
        ("dtype of an expert", TypeError, r"1\.up_proj\.weight has scales beside it and must be torch\.float8_e4m3fn"),
        ("shape of a norm", ValueError, r"model\.norm\.weight must have shape \(256,\), got \(1,\)"),
    ],
)
def test_wrong_checkpoints_change_nothing(change: str, error: type[Exception], words: str) -> None:
    model, _ = made(layers=2)
    stored, _ = checkpoint(model.model, single=True)
    with torch.no_grad():
        for each in model.parameters():
            each.zero_()
    wrong(stored, change)
    with pytest.raises(error, match=words):
        moecompile.load_fp8(model.model, stored)
    assert not in_fp8(model) and not any(each.any() for each in model.parameters())


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -1.0])
def test_scales_that_scale_nothing_are_refused(number: float) -> None:
    model, _ = made(layers=2)
    stored, _ = checkpoint(model.model, single=True)
    stored["model.layers.0.self_attn.q_proj.weight" + SCALES][0, 0] = number
    with pytest.raises(ValueError, match=r"q_proj\.weight_scale_inv must hold finite numbers from 0 on"):
        moecompile.load_fp8(model.model, stored)
    assert not in_fp8(model)


def test_names_of_another_model_are_named() -> None:
    model, _ = made(layers=2)
    stored, _ = checkpoint(model.model, single=True)
    with pytest.raises(RuntimeError, match=r"missing lm_head.*; unexpected module\."):
        moecompile.load_fp8(model.model, {f"module.{name}": each for name, each in stored.items()})
    assert not in_fp8(model)


def test_what_is_not_strict() -> None:
    model, _ = made(layers=2)
    stored, _ = checkpoint(model.model, single=True)
    wrong(stored, "unexpected")
    wrong(stored, "missing")
    assert moecompile.load_fp8(model.model, stored, strict=False)


class Tied(nn.Module):
    """Two layers with one matrix, two norms with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)
        self.norm, self.other = nn.RMSNorm(128), nn.RMSNorm(128)
        self.second.weight, self.other.weight = self.first.weight, self.norm.weight


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("named", ["first", "second"])
def test_checkpoints_hold_tied_parameters_once(named: str, device: str) -> None:
    with torch.device(device):
        model = Tied()
    values, scales, exact = blocks(torch.randn(128, 128))
    stored = {f"{named}.weight": values, f"{named}.weight{SCALES}": scales, "other.weight": torch.full((128,), 2.0)}
    assert moecompile.load_fp8(model, stored) == ("first.weight", "second.weight")
    for layer in (model.first, model.second):
        assert isinstance(layer.weight, BlockScaled) and torch.equal(layer.weight * 1.0, exact)
    assert all(torch.equal(norm.weight, stored["other.weight"]) for norm in (model.norm, model.other))
    assert model.norm.weight.data_ptr() == model.other.weight.data_ptr()


def test_models_that_know_their_scales_get_them() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(128, 128).to(E4M3), requires_grad=False)
            self.weight_scale_inv = nn.Parameter(torch.zeros(1, 1), requires_grad=False)

    model, scales = Own(), torch.full((1, 1), 0.3)
    assert moecompile.load_fp8(model, {"weight": torch.ones(128, 128).to(E4M3), "weight_scale_inv": scales}) == ()
    assert type(model.weight) is nn.Parameter and torch.equal(model.weight_scale_inv, scales)
