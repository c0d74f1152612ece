"""`fp8_state_dict`: what is in FP8 as plain tensors, for files of safetensors and for `load_fp8`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import moecompile
from moecompile.checkpoints import SCALES
from moecompile.runtime.block_scaled import BlockScaled
from moecompile.runtime.quantize import E4M3
from test_conversion import MODELS, Called, in_fp8, infer, made
from test_fp8_models import compiled, model_of


def emptied(model: Called) -> Called:
    """The same in its own precision, of zeros."""
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for each in fresh.parameters():
            each.zero_()
    return fresh


@pytest.mark.parametrize("single_experts", [True, False])
@pytest.mark.parametrize("scale_format", ["power_of_two", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, scale_format: str, single_experts: bool) -> None:
    tiny, ids = model_of(name, layers=1)
    model = Called(tiny).eval()
    fresh = emptied(model)
    names = moecompile.convert_to_fp8(model, ids, moecompile_options={"fp8_scale_format": scale_format})
    stored = moecompile.fp8_state_dict(model.model, single_experts=single_experts)
    assert not any(isinstance(each, BlockScaled) for each in stored.values())
    assert all(stored[each.removesuffix(SCALES)].dtype == E4M3 for each in stored if each.endswith(SCALES))
    assert any(".experts.1.gate_proj.weight" in each for each in stored) == single_experts
    assert {*moecompile.load_fp8(fresh.model, stored)} == {each.removeprefix("model.") for each in names}
    before = model.state_dict()
    for each, tensor in fresh.state_dict().items():
        assert isinstance(tensor, BlockScaled) == (each in names), each
        pairs = [(tensor, before[each])]
        if isinstance(tensor, BlockScaled):
            pairs = [(tensor.e4m3.float(), before[each].e4m3.float()), (tensor.scales, before[each].scales)]
        assert all(torch.equal(*pair) for pair in pairs), each
    assert torch.equal(infer(compiled(fresh), ids), infer(compiled(model), ids))


def test_in_files_of_safetensors(tmp_path: Path) -> None:
    """Of all files of a folder, as Hugging Face's hub has large models."""
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    model, ids = made(layers=2)
    fresh = emptied(model)
    moecompile.convert_to_fp8(model, ids)
    stored = moecompile.fp8_state_dict(model.model)
    assert all(each.is_contiguous() for each in stored.values())
    save_torch_state_dict(stored, tmp_path, max_shard_size="1MB")
    files = [*tmp_path.glob("*.safetensors")]
    assert len(files) > 1
    read = {name: each for file in files for name, each in load_file(file).items()}
    moecompile.load_fp8(fresh.model, read)
    assert {*in_fp8(fresh)} == {*in_fp8(model)}
    assert torch.equal(infer(compiled(fresh), ids), infer(compiled(model), ids))


class Experts(nn.Module):
    """Parameters of all experts, under the names that transformers' models have."""

    def __init__(self, inner: int, gate_up: str = "halves") -> None:
        super().__init__()
        torch.manual_seed(0)
        gates, downs = torch.randn(2, 2 * inner, 128).bfloat16(), torch.randn(2, 128, inner).bfloat16()
        self.gate_up_proj = nn.Parameter(BlockScaled.of(gates, gate_up=gate_up), requires_grad=False)
        self.down_proj = nn.Parameter(BlockScaled.of(downs), requires_grad=False)


def test_gate_and_up_that_share_a_block() -> None:
    """In one tensor there are no such blocks: it loses nothing as it is; single experts have theirs."""
    model = Experts(96)
    exact = {name: each * 1.0 for name, each in model.named_parameters()}
    packed = moecompile.fp8_state_dict(model, single_experts=False)
    assert {*packed} == {"gate_up_proj", "down_proj", "down_proj" + SCALES}
    assert packed["gate_up_proj"].dtype == torch.bfloat16 and torch.equal(packed["gate_up_proj"], exact["gate_up_proj"])

    holder, fresh = nn.ModuleDict({"experts": model}), nn.ModuleDict({"experts": nn.Module()})
    single = moecompile.fp8_state_dict(holder)
    assert len(single) == 2 * 3 * 2 and all(
        f"experts.1.{each}_proj.weight" in single for each in ("gate", "up", "down")
    )
    for name, each in exact.items():
        setattr(fresh["experts"], name, nn.Parameter(torch.zeros_like(each)))
    assert moecompile.load_fp8(fresh, single) == ("experts.gate_up_proj", "experts.down_proj")
    for name, each in fresh["experts"].named_parameters():
        assert isinstance(each, BlockScaled) and each.lie == getattr(model, name).lie
        assert torch.equal(each.e4m3.float(), getattr(model, name).e4m3.float())


def test_what_lies_otherwise_stays_one_tensor() -> None:
    """What is beside interleaved projections may be transposed, or something else altogether."""
    model = Experts(128, gate_up="interleaved")
    exact = model.gate_up_proj * 1.0
    stored = moecompile.fp8_state_dict(nn.ModuleDict({"experts": model}))
    assert {*stored} == {f"experts.{each}" for each in ("gate_up_proj", "down_proj", "down_proj" + SCALES)}
    assert torch.equal(stored["experts.gate_up_proj"], exact)


class Routed(nn.Module):
    """Experts whose gate is one half of a packed parameter, and which half is `gate_first`'s to say."""

    def __init__(self, activation: Any, gate_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.activation, self.gate_first = activation, gate_first
        self.router = nn.Linear(128, 16, bias=False, dtype=torch.bfloat16)
        self.gate_up_proj = nn.Parameter((torch.randn(16, 256, 128) / 16).bfloat16())
        self.down_proj = nn.Parameter((torch.randn(16, 128, 128) / 11).bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        order = ids.flatten().argsort(stable=True)
        offsets = nn.functional.one_hot(ids.flatten(), 16).sum(0).cumsum(0).to(torch.int32)
        first, second = torch._grouped_mm(x[order // 2], self.gate_up_proj.mT, offsets).chunk(2, -1)
        gate, up = (first, second) if self.gate_first else (second, first)
        rows = torch._grouped_mm(self.activation(gate) * up, self.down_proj.mT, offsets)
        return torch.zeros_like(x).index_add(0, order // 2, rows * weights.flatten()[order][:, None])


@pytest.mark.parametrize(
    ("activation", "gate_first", "known"),
    [
        (nn.functional.silu, True, True),
        (lambda gate: gate.clamp(max=7.0) * torch.sigmoid(gate * 1.7), True, True),
        (nn.functional.silu, False, False),
        (lambda gate: gate * 2, True, False),
    ],
    ids=["gate first", "written out", "up first", "neither"],
)
def test_single_experts_where_the_gate_is_known(activation: Any, gate_first: bool, known: bool) -> None:
    model, x = Routed(activation, gate_first).eval(), torch.randn(64, 128).bfloat16()
    own = model.gate_up_proj.detach().clone()
    assert {*moecompile.convert_to_fp8(model, x)} == {"gate_up_proj", "down_proj"}
    stored = moecompile.fp8_state_dict(copy.deepcopy(model))
    assert ("0.gate_proj.weight" in stored) == known
    if known:
        gate = BlockScaled.from_blocks(
            stored["0.gate_proj.weight"], stored["0.gate_proj.weight" + SCALES], torch.bfloat16
        )
        assert (gate.dequantized() - own[0, :128]).norm() < 0.04 * own[0, :128].norm()
    again = Routed(activation, gate_first).eval()
    moecompile.load_fp8(again, stored)
    assert torch.equal(infer(compiled(again), x), infer(compiled(model), x))


def test_each_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    """Also where rows are no whole blocks, as of DeepSeek-V3's `kv_a_proj_with_mqa`."""
    from huggingface_hub import save_torch_state_dict

    model = nn.Sequential(nn.Linear(256, 192), nn.Linear(192, 256)).bfloat16().eval()
    moecompile.convert_to_fp8(model, torch.randn(8, 256).bfloat16())
    stored = moecompile.fp8_state_dict(model)
    save_torch_state_dict(stored, tmp_path)
    assert all(each.untyped_storage().nbytes() == each.nbytes for name, each in stored.items() if SCALES in name)


def test_names_that_are_taken_stay() -> None:
    """And a module without a path has names without a dot in front."""
    alone = moecompile.fp8_state_dict(Experts(128))
    assert "0.gate_proj.weight" in alone and not any(each.startswith(".") for each in alone)
    model = Experts(128)
    model.add_module("0", nn.ModuleDict({"down_proj": nn.Linear(128, 128)}))
    stored = moecompile.fp8_state_dict(model)
    assert {"down_proj", "down_proj" + SCALES, "0.down_proj.weight", "0.gate_proj.weight"} <= stored.keys()
    assert torch.equal(stored["0.down_proj.weight"], model.get_parameter("0.down_proj.weight"))


def test_tied_matrices_are_stored_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    first, second = (nn.Linear(128, 128, bias=False) for _ in range(2))
    first.weight = second.weight = nn.Parameter(BlockScaled.of(torch.randn(128, 128).bfloat16()), requires_grad=False)
    model = nn.Sequential(first, second)
    save_file(moecompile.fp8_state_dict(model), tmp_path / "model.safetensors")
    fresh = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False))
    fresh[1].weight = fresh[0].weight
    assert moecompile.load_fp8(fresh, load_file(tmp_path / "model.safetensors")) == ("0.weight", "1.weight")
    assert torch.equal(fresh.get_parameter("1.weight") * 1.0, first.weight * 1.0)


def test_on_the_meta_device_nothing_is_tied() -> None:
    model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False))
    for layer in model.children():
        layer.weight = nn.Parameter(BlockScaled.of(torch.randn(128, 128).bfloat16()), requires_grad=False)
    assert len(moecompile.fp8_state_dict(model.to("meta"))) == 4


def test_layouts_come_back() -> None:
    """A checkpoint does not tell that experts are (E, K, N); converting a model that has loaded one lays them out."""
    tiny, ids = model_of("gpt_oss", layers=1)
    model = Called(tiny).eval()
    fresh = emptied(model)
    options = {"fp8_scale_format": "float32"}
    moecompile.convert_to_fp8(model, ids, moecompile_options=options)
    stored = moecompile.fp8_state_dict(model.model)
    assert not any(".experts.0." in each for each in stored)
    moecompile.load_fp8(fresh.model, stored)
    name = "model.model.layers.0.mlp.experts.down_proj"
    before: Any = fresh.get_parameter(name)
    assert before.lie != cast(Any, model.get_parameter(name)).lie
    assert {*moecompile.fp8_state_dict(fresh.model)} == {*stored}, "still nobody knows what is in them"
    (gates,) = (each for each in moecompile.convert_to_fp8(fresh, ids, moecompile_options=options) if "experts" in each)
    assert gates.endswith("gate_up_proj")
    after, held = (cast(Any, each.get_parameter(name)) for each in (fresh, model))
    assert isinstance(after, BlockScaled) and after.lie == held.lie
    assert torch.equal(after.e4m3.float(), held.e4m3.float()) and torch.equal(after.scales, held.scales)


def test_what_is_not_in_fp8_is_refused() -> None:
    with pytest.raises(ValueError, match=r"this one has none; call moecompile\.convert_to_fp8 first"):
        moecompile.fp8_state_dict(nn.Linear(128, 128))
    with pytest.raises(TypeError, match=r"moecompile\.fp8_state_dict: expected a module"):
        moecompile.fp8_state_dict({})  # type: ignore[arg-type]
