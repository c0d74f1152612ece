"""Whole models with `precision="fp8"`: what is cast and what is kept, what they then compute, what the report says."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.fsdp import fully_shard

import moecompile
from moecompile.passes.casts import Cast, Casting
from moecompile.passes.exclusions import NO_WISHES
from moecompile.passes.linears import Verdict
from moecompile.passes.precision import cast, purposes_of
from moecompile.pipeline import Piece, _transforms_hidden
from moecompile.report import GraphReport, Report
from plain_layers import Plain
from test_linears import VOCABULARY, H, fused
from test_precision import relative
from tiny_sizes import Sizes
from tiny_transformers import architectures, build_model, known_to_transformers

ops = torch.ops.moecompile
SIZES = Sizes(hidden=H, intermediate=128, vocabulary=VOCABULARY)
KEPT = re.compile(r"(^|\.)(gate|router(\.\w+)?|wg|lm_head|embed_out|score|shared_expert_gate)$")
"""How transformers' architectures call what has to be kept: no rule knows these names."""
SHARP = re.compile(r"self_attn\.(q_|k_|kv_a)")
"""What makes attention of random weights sharp."""
MODELS = known_to_transformers("qwen3_moe", "deepseek_v3")
# Operands are off by 0.027 of their norm. One layer, whose attention is not sharper than in trained models, adds up six
# or so, gradients twice as many; where nothing but the order of sums differs, bfloat16's noise is left.
LOGITS, GRADIENT, NOISE = 0.1, 0.2, 0.02


def model_of(name: str, **sizes: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = build_model(name, torch.bfloat16, sizes=Sizes(**{**vars(SIZES), **sizes})).train()
    with torch.no_grad():
        for parameter in (each for path, each in model.named_parameters() if SHARP.search(path)):
            parameter.mul_(0.5)
    return model, torch.randint(0, 64, (2, 24))


def run(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    result = model(input_ids=ids, labels=ids)
    result.loss.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return result.logits.detach(), found


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    moecompile.reset()
    torch._dynamo.reset()
    model.compile(backend="moecompile", options={"precision": "fp8", "lowering": "eager", **options}, fullgraph=True)
    return model


def kept(report: Report) -> dict[str, str]:
    return {row.module: row.reason for row in report.casts if not row.cast}


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step(name: str, lowering: str) -> None:
    model, ids = model_of(name, layers=1)
    expected, of_expected = run(copy.deepcopy(model), ids)
    found, of_found = run(compiled(model, lowering=lowering), ids)
    assert 1e-3 < relative(found, expected) < LOGITS
    assert of_found.keys() == of_expected.keys()
    errors = {each: relative(of_found[each], gradient) for each, gradient in of_expected.items()}
    assert max(errors.values()) < GRADIENT, errors
    (graph,) = moecompile.last_report().graphs
    assert graph.forward is not None and graph.backward is not None
    assert "moecompile.scaled_mm" in graph.forward and "linear_fp8" not in graph.forward
    assert "moecompile.quantize_gradient" in graph.backward and "moecompile.along_tokens" in graph.backward


class ByHand(nn.Module):
    """What a cast layer is to compute, written out: operands rounded to e4m3 block by block, products in float32."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        rows = rounded(x.reshape(-1, 1, x.shape[-1] // 128, 128)).reshape(x.shape)
        n, k = self.layer.weight.shape
        filled = nn.functional.pad(self.layer.weight.float(), (0, 0, 0, -n % 128))
        matrix = rounded(filled.view(-1, 128, k // 128, 128)).reshape(-1, k)[:n]
        return (rows @ matrix.t()).to(x.dtype)


def rounded(blocks: Tensor) -> Tensor:
    """Blocks (R, rows, F, columns), each with the smallest power of two that brings it below 448."""
    blocks = blocks.float()
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-30) / 448)))
    return (blocks / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("name", MODELS)
def test_cast_layers_compute_what_the_recipe_says(name: str) -> None:
    model, ids = model_of(name, layers=1)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        found = compiled(model, fp8_exclude=("*.experts",))(input_ids=ids).logits
        layers = [row.module for row in moecompile.last_report().casts if row.cast]
        for path in layers:
            owner, _, attribute = path.rpartition(".")
            setattr(by_hand.get_submodule(owner), attribute, ByHand(by_hand.get_submodule(path)))
        expected = by_hand(input_ids=ids).logits
    assert len(layers) >= 4
    assert relative(found, expected) < NOISE < relative(found, plain)


@pytest.mark.parametrize("name", MODELS)
def test_golden(name: str, golden) -> None:
    """A layer's graph as captured, rewritten and cast, and the table."""
    model, ids = model_of(name, layers=1)
    compiled(model)(input_ids=ids)
    report = moecompile.last_report()
    (graph,) = report.graphs
    text = re.sub(r"  # .*", "", graph.after)  # lines of another package's sources move
    golden(f"fp8_{name}", text)
    table = report.text(width=110)
    golden(f"fp8_{name}_table", table[table.index("FP8:") : table.index("Graph 0")].rstrip())


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_several_products_read_are_turned_once(name: str) -> None:
    model, ids = model_of(name, layers=1)
    run(compiled(model), ids)
    (graph,) = moecompile.last_report().graphs
    assert graph.forward is not None and graph.backward is not None
    rows = graph.forward.count("= moecompile.quantize(")
    layers = sum(row.cast and row.kind == "linear" for row in moecompile.last_report().casts)
    both = graph.forward + graph.backward
    assert both.count("= moecompile.along_tokens(") == rows < layers
    assert graph.backward.count("= moecompile.quantize_gradient(") == layers
    assert both.count("= moecompile.scaled_mm(") == 3 * layers


def test_the_backward_holds_no_copies_that_it_does_not_read() -> None:
    """Of matrices, e4m3, only those that it multiplies by; of the experts' too."""
    model, ids = model_of("qwen3_moe", layers=1)
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    compiled(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    matrices = {id(each): each for each in held if each.dtype == torch.float8_e4m3fn and ids.numel() not in each.shape}
    sizes = sorted(
        tuple(each.shape) for each in matrices.values() if 48 not in each.shape and each.shape[:2] != (2, 24)
    )
    config: Any = model.config
    experts, inner = config.num_experts, config.moe_intermediate_size
    wanted = [(experts, H, 2 * inner), (experts, inner, H)]
    assert [each for each in sizes if len(each) == 3 and each[0] == experts] == sorted(wanted)
    assert sum(len(each) == 2 and each[0] > 96 for each in sizes) == 4, sizes


def steps(model: nn.Module, **options: Any) -> list[Tensor]:
    """Results of three steps of two micro-batches."""
    compiled(model, **options)
    optimizer, results = torch.optim.AdamW(model.parameters(), lr=1e-2), list[Tensor]()
    torch.manual_seed(3)
    for _ in range(3):
        for _ in range(2):
            result, _ = model(torch.randn(40, H).bfloat16())
            result.float().square().mean().backward()
            results.append(result.detach())
        optimizer.step()
        optimizer.zero_grad()
    return results


def test_copies_that_are_kept_are_those_of_the_weights_as_they_are() -> None:
    torch.manual_seed(0)
    model = Plain()
    each = steps(copy.deepcopy(model))
    kept = steps(model, fp8_cache_weights=True)
    assert all(map(torch.equal, kept, each)) and not torch.equal(kept[0], kept[2])
    (graph,) = moecompile.last_report().graphs
    assert "FP8 copies of 6 matrices are kept between calls" in graph.notes
    assert "quantize_weights" not in graph.after and graph.after.count("_fp8_values_t  :") == 6


def test_one_row_and_none() -> None:
    """What a decoding step has; the same graph serves all numbers of rows."""
    model = Plain()
    reference = copy.deepcopy(model)
    compiled(model, fp8_cache_weights=True)
    with torch.no_grad():
        for rows in (40, 1, 3, 0, 17):
            x = torch.randn(rows, H).bfloat16()
            found, expected = model(x)[0], reference(x)[0]
            assert found.shape == expected.shape and (not rows or relative(found, expected) < LOGITS)


def test_reference_kernels_reach_every_product() -> None:
    """Also those of the backward."""
    model, x = Plain(), torch.randn(40, H).bfloat16()
    compiled(model, kernels="reference")
    model(x)[0].float().square().sum().backward()
    (graph,) = moecompile.last_report().graphs
    assert graph.forward is not None and graph.backward is not None
    for text in (graph.forward, graph.backward):
        products = [line for line in text.splitlines() if "moecompile.scaled_mm(" in line or "experts_fp8" in line]
        assert len(products) > 4 and all('kernels="reference"' in line for line in products)


@pytest.mark.parametrize("how", ["fsdp", "fsdp of each layer", "ddp"])
def test_models_of_several_ranks(how: str, tmp_path: Path) -> None:
    """On one rank: the same numbers, and every layer is cast."""
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(40, H).bfloat16()
    reference = copy.deepcopy(model)
    options: dict[str, Any] = {"precision": "fp8", "lowering": "eager"}
    expected, _ = compiled(reference)(x)
    expected.float().square().sum().backward()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        moecompile.reset()
        torch._dynamo.reset()
        fast: Any = model
        if how == "ddp":
            fast = torch.compile(nn.parallel.DistributedDataParallel(model), backend="moecompile", options=options)
        else:
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            for layer in model.layers if how != "fsdp" else ():
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            model.compile(backend="moecompile", options=options)
        found, _ = fast(x)
        found.float().square().sum().backward()
        assert torch.equal(found, expected)
        for ours, right in zip(model.parameters(), reference.parameters(), strict=True):
            gradient: Any = ours.grad
            if right.grad is not None:
                assert torch.equal(gradient if how == "ddp" else gradient.full_tensor(), right.grad)
        casts = sum(row.cast for row in moecompile.last_report().casts)
        assert casts == (2 if how == "fsdp of each layer" else 6), "like layers share a graph"
    finally:
        torch.distributed.destroy_process_group()


# ---- every architecture of transformers: what a cast feeds, and what it lies on


def graphs_of(model: nn.Module, ids: Tensor) -> list[tuple[fx.GraphModule, tuple[Cast, ...], list[Verdict]]]:
    """Each captured graph after the cast, the table, and the verdicts that were to be followed."""
    found = []

    def backend(gm: fx.GraphModule, _: list[Any]) -> Any:
        with _transforms_hidden([Piece(gm)], GraphReport()):
            wanted = fused(gm)
            table = cast(gm.graph, NO_WISHES, purposes_of(gm), Casting())
        gm.graph.lint()
        found.append((gm, table.rows, wanted))
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(ids)
    return found


CHOOSING = re.compile(
    r"\.indexer\.|\.gate\.|kimi_linear .*\.forget_gate\.f_a_proj$|conv\.weight_proj$|kv_a_proj_with_mqa$"
)
"""Other layers that may be kept: those that choose tokens in sparse attention, layers inside routers, one whose result
is compared, and narrow ones before a graph break."""


def eligible(model: nn.Module, *inputs: Tensor) -> set[str]:
    """Linear layers that a call runs, whose sizes can be cast, and whose names are no router's and no head's."""
    found = set()

    def note(name: str, layer: nn.Linear, given: tuple[Tensor, ...], result: Tensor) -> None:
        n, k = layer.weight.shape
        if not (k % 128 or n % 16) and result.dtype == torch.bfloat16 and not KEPT.search(name):
            found.add(name)

    hooks = [
        each.register_forward_hook(functools.partial(note, name))
        for name, each in model.named_modules()
        if isinstance(each, nn.Linear)
    ]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return found


def check(name: str) -> None:
    model, ids = build_model(name, torch.bfloat16, sizes=SIZES), torch.randint(0, 64, (2, 8))
    wanted_modules = eligible(model, ids)
    graphs = graphs_of(model, ids)
    cast_modules = {row.module for _, table, _ in graphs for row in table if row.cast and row.kind == "linear"}
    assert cast_modules <= wanted_modules
    assert not [each for each in wanted_modules - cast_modules if not CHOOSING.search(f"{name} {each}")]
    for gm, table, wanted in graphs:
        layers = gm.graph.find_nodes(op="call_function", target=ops.linear_fp8.default)
        experts = gm.graph.find_nodes(op="call_function", target=ops.experts_fp8.default)
        assert (
            len(layers) == sum(verdict.cast for verdict in wanted) == sum(r.cast and r.kind == "linear" for r in table)
        )
        for quantize in gm.graph.find_nodes(op="call_function", target=ops.quantize.default):
            for part in quantize.users:
                assert part.users and all(user in layers and part in user.args[3:5] for user in part.users)
        for quantize in gm.graph.find_nodes(op="call_function", target=ops.quantize_weights.default):
            for part in quantize.users:
                assert all(user in layers or user in experts for user in part.users)
        assert not [row for row in table if row.cast and KEPT.search(row.module)]
        others = {node.target for node in gm.graph.nodes if node.op == "call_function"} - {
            ops.linear_fp8.default, ops.experts_fp8.default, ops.quantize.default, ops.quantize_weights.default,
        }  # fmt: skip
        for node in gm.graph.nodes:
            if node.target in others and node.op == "call_function" and "getitem" not in str(node.target):
                given = [each.meta.get("example_value") for each in node.all_input_nodes]
                kinds = {each.dtype for each in given if isinstance(each, Tensor)}
                assert torch.float8_e4m3fn not in kinds, f"{node} reads what was cast"


@pytest.mark.parametrize("name", known_to_transformers("qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "gemma4"))
def test_casts_feed_products_alone(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures())
def test_casts_of_every_architecture(name: str) -> None:
    try:
        check(name)
    except ValueError as refused:  # by the model itself; an error of the backend is another one
        pytest.skip(f"cannot be built with these sizes: {refused}")
