"""The option `expert_load` on one device: whose tokens are counted, and that nothing else changes."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import expert_load_checks
import expert_parallel_checks
import moecompile
from capacity_modules import InPlaceTopTwo
from moecompile import loads
from moecompile.transformers_experts import SPLIT
from small_models import EXPERTS, HIDDEN, TOP_K, Experts, Layer, Model, compiled, inputs

ops = torch.ops.moecompile
both = pytest.mark.parametrize("lowering", ["eager", "inductor"])
kept = functools.partial(checkpoint, use_reentrant=False)


def selective() -> Callable[..., Tensor]:
    """Checkpointing that keeps what experts compute."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = operator is ops.experts_forward.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)


def assigned(model: nn.Module, *given: Tensor) -> dict[str, Tensor]:
    """What the routers of a model's blocks choose in one call of it, uncompiled."""
    found: dict[str, Tensor] = {}

    def note(path: str, module: Any, args: Any) -> None:
        ids = module.router(args[0]).softmax(-1).topk(TOP_K, -1).indices
        found[path] = found.get(path, 0) + torch.bincount(ids.reshape(-1), minlength=EXPERTS)

    blocks = [(path, module) for path, module in model.named_modules() if isinstance(module, Experts)]
    hooks = [module.register_forward_pre_hook(functools.partial(note, path)) for path, module in blocks]
    with torch.no_grad():
        model(*given)
    for hook in hooks:
        hook.remove()
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor], calls: int = 1) -> None:
    assert list(found) == list(expected)
    for path, each in found.items():
        assert each.dtype == torch.int64 and torch.equal(each, calls * expected[path]), (path, each, expected[path])


def step(model: nn.Module, run: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    """Result and gradients."""
    model.zero_grad()
    result = run(x)
    result.square().sum().backward()
    return [result.detach(), *(each.grad for each in model.parameters() if each.grad is not None)]


def notes() -> list[str]:
    return [note for graph in moecompile.last_report().graphs for note in graph.notes]


@pytest.mark.parametrize("around", [None, kept, selective()], ids=["plain", "checkpointed", "selective"])
@both
def test_steps_are_counted_and_compute_what_they_did(lowering: str, around: Any) -> None:
    model, x = Model(around=around), inputs()
    other, expected = copy.deepcopy(model), assigned(model, x)
    run, plain = compiled(model, lowering=lowering, expert_load=True), compiled(other, lowering=lowering)
    for call in (1, 2, 3):
        for found, right in zip(step(model, run, x), step(other, plain, x), strict=True):
            assert torch.equal(found, right)
        same(moecompile.expert_load(model), expected, call)
    assert all(int(each.sum()) == 3 * x.shape[0] * TOP_K for each in moecompile.expert_load(model).values())
    assert moecompile.expert_load(other) == {}


@both
def test_inference_and_training_count_together(lowering: str) -> None:
    """Without gradients, in inference mode, and with gradients: graphs of their own, which add to the same tensors."""
    model, x = Model(), inputs()
    expected, run = assigned(model, x), compiled(model, lowering=lowering, expert_load=True)
    with torch.inference_mode():
        run(x)
    first = moecompile.expert_load(model)
    with torch.no_grad():
        run(x)
    step(model, run, x)
    found = moecompile.expert_load(model)
    same(found, expected, 3)
    assert all(found[path] is each and not each.is_inference() for path, each in first.items())
    assert len(moecompile.last_report().graphs) >= 2


def test_other_shapes_and_forgotten_graphs_count_on() -> None:
    model = Model()
    run = compiled(model, expert_load=True, dynamic=False)
    total: dict[str, Tensor] = {}
    for tokens in (12, 5, 16):
        run(inputs(tokens))
        total = {path: each + total.get(path, 0) for path, each in assigned(model, inputs(tokens)).items()}
    assert len(moecompile.last_report().graphs) == 3
    first = moecompile.expert_load(model)
    same(first, total)
    moecompile.reset()
    run(inputs(5))
    torch._dynamo.reset()
    run(inputs(5))
    found = moecompile.expert_load(model)
    assert all(found[path] is each for path, each in first.items())
    same(found, {path: each + 2 * assigned(model, inputs(5))[path] for path, each in total.items()})


def test_sizes_that_are_symbolic() -> None:
    model = Model()
    run = compiled(model, expert_load=True, dynamic=True)
    run(inputs(12))
    run(inputs(7))
    (_,) = moecompile.last_report().graphs
    more = assigned(model, inputs(7))
    same(moecompile.expert_load(model), {path: each + more[path] for path, each in assigned(model, inputs(12)).items()})


def test_clearing() -> None:
    model, x = Model(), inputs()
    run = compiled(model, expert_load=True)
    run(x)
    places = [each.data_ptr() for each in moecompile.expert_load(model).values()]
    for each in moecompile.expert_load(model).values():
        each.zero_()
    run(x)
    same(moecompile.expert_load(model), assigned(model, x))
    assert [each.data_ptr() for each in moecompile.expert_load(model).values()] == places


def test_layers_that_share_a_graph_have_a_load_each() -> None:
    model, x = Model(layers=3), inputs()
    expected = assigned(model, x)
    for layer in model.layers:
        layer.compile(backend="moecompile", options={"lowering": "eager", "expert_load": True}, fullgraph=True)
    model(x)
    model(x)
    assert len(moecompile.last_report().graphs) == 1
    same(moecompile.expert_load(model), expected, 2)
    (of_layer,) = moecompile.expert_load(model.layers[1]).items()
    assert of_layer[0] == "moe" and of_layer[1] is moecompile.expert_load(model)["layers.1.moe"]


def test_a_block_that_is_called_twice_has_the_sum() -> None:
    layer, x = Layer(), torch.randn(12, HIDDEN)
    model = nn.Sequential(layer, layer)
    compiled(model, expert_load=True)(x)
    same(moecompile.expert_load(model), assigned(model, x))
    assert int(moecompile.expert_load(model)["0.moe"].sum()) == 2 * 12 * TOP_K


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_compiled_model_counts_once(reentrant: bool) -> None:
    """Its backward calls the model again."""
    model, x = Model(), inputs().requires_grad_()
    expected, calls = assigned(model, x), []
    run = compiled(model, expert_load=True)

    def noting(given: Tensor) -> Tensor:
        calls.append(given)
        result: Tensor = run(given)
        return result

    for call in (1, 2):
        result: Any = checkpoint(noting, x, use_reentrant=reentrant)
        result.sum().backward()
        same(moecompile.expert_load(model), expected, call)
    assert len(calls) == 4


@pytest.mark.parametrize("train", [False, True])
def test_nested_regions(train: bool) -> None:
    class Region(Layer):
        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    layers, x = nn.Sequential(Region(seed=0), Region(seed=1)), torch.randn(12, HIDDEN)
    expected, other = assigned(layers, x), copy.deepcopy(layers)
    inlining = {"inline_single_use_invoke_subgraph": False}
    has_inlining = hasattr(torch._dynamo.config, "inline_single_use_invoke_subgraph")
    with torch._dynamo.config.patch(inlining if has_inlining else {}), torch.set_grad_enabled(train):
        found, right = compiled(layers, expert_load=True)(x), compiled(other)(x)
    assert torch.equal(found, right)
    assert "invoke_subgraph" in moecompile.last_report().graphs[0].after
    if train:
        found.sum().backward()
        right.sum().backward()
        for one, another in zip(layers.parameters(), other.parameters(), strict=True):
            assert one.grad is not None and another.grad is not None and torch.equal(one.grad, another.grad)
    same(moecompile.expert_load(layers), expected)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_fp8(train: bool, cached: bool) -> None:
    model: Any = expert_parallel_checks.Model(256, 128, fixed=True)
    x = expert_parallel_checks.tokens_of(0, 24, hidden=256)
    expected, other = expert_load_checks.of_tokens(model, x), copy.deepcopy(model)
    options: dict[str, Any] = {
        "precision": "fp8",
        "fp8_exclude": ("first",),
        "fp8_cache_weights": cached,
        "main_grad": train,
    }
    run, plain = compiled(model, expert_load=True, **options), compiled(other, **options)
    with torch.set_grad_enabled(train):
        for call in (1, 2):
            found, right = run(x), plain(x)
            assert torch.equal(found, right)
            assert torch.equal(expert_load_checks.counted(model), call * expected)
            if train:
                found.float().sum().backward()
    assert torch.equal(expert_load_checks.counted(model), 2 * expected)
    assert "experts_fp8" in moecompile.last_report().graphs[0].after


def test_matrices_that_are_kept_in_fp8_alone() -> None:
    model: Any = expert_parallel_checks.Model(256, 128, fixed=True).eval()
    x = expert_parallel_checks.tokens_of(0, 24, hidden=256)
    done = moecompile.convert_to_fp8(model, x, moecompile_options={"precision": "fp8", "fp8_exclude": ("first",)})
    assert "blocks.0.experts.w_in" in done
    expected = expert_load_checks.of_tokens(model, x)
    with torch.no_grad():
        compiled(model, expert_load=True, precision="fp8", fp8_exclude=("first",))(x)
    assert torch.equal(expert_load_checks.counted(model), expected)


def test_dropped_tokens_are_not_counted() -> None:
    """Those beyond an expert's capacity."""
    torch.manual_seed(0)
    model, x = InPlaceTopTwo(factor=0.5), torch.randn(24, 16)
    chosen, _ = model.gating(x)
    compiled(model, expert_load=True)(x)
    (load,) = moecompile.expert_load(model).values()
    assert torch.equal(load, (chosen != 0).sum((0, 2))) and 0 < int(load.sum()) < 24 * 2


class Apart(nn.Module):
    """Experts that are modules of their own, in a loop; adapters on stacked ones."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, 16, bias=False), nn.ReLU(), nn.Linear(16, HIDDEN, bias=False))
            for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K, -1)
        result = torch.zeros_like(x)
        chosen = F.one_hot(ids, EXPERTS).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            place, token = torch.where(chosen[number])
            result.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        return result


def test_experts_that_are_modules_of_their_own() -> None:
    torch.manual_seed(0)
    model, x = Apart(), torch.randn(12, HIDDEN)
    ids = model.router(x).topk(TOP_K, -1).indices
    compiled(model, expert_load=True)(x)
    same(moecompile.expert_load(model), {"experts": torch.bincount(ids.reshape(-1), minlength=EXPERTS)})


class Adapted(Experts):
    """An adapter on the first matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * 48, 3) / 10)
        self.up = nn.Parameter(torch.randn(EXPERTS, 3, HIDDEN) / 10)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K, dim=-1)
        matrices = self.w_in + self.down @ self.up
        gate, up = torch.einsum("th,tkih->tki", x, matrices[ids]).chunk(2, -1)
        return torch.einsum("tki,tkhi,tk->th", F.silu(gate) * up, self.w_out[ids], weights)


def test_adapters_are_of_the_same_experts() -> None:
    torch.manual_seed(0)
    model, x = Adapted(), torch.randn(12, HIDDEN)
    compiled(model, expert_load=True)(x)
    same(moecompile.expert_load(model), {"": assigned(model, x)[""]})


class TwoInOne(nn.Module):
    """Two blocks whose matrices one module holds, each its own or both in one parameter."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        first, second = torch.randn(2, EXPERTS, 16, HIDDEN) / 6, torch.randn(2, EXPERTS, HIDDEN, 16) / 4
        parted: Callable[[Tensor], Any] = nn.Parameter if together else lambda all_: nn.ParameterList(list(all_))
        self.w_in, self.w_out = parted(first), parted(second)

    def forward(self, x: Tensor) -> Tensor:
        for number in (0, 1):
            weights, ids = self.router(x).softmax(-1).topk(TOP_K, dim=-1)
            w_in, w_out = self.w_in[number], self.w_out[number]
            rows = torch.relu(torch.einsum("th,tkih->tki", x, w_in.mul(1)[ids]))
            x = torch.einsum("tki,tkhi,tk->th", rows, w_out.mul(1)[ids], weights)
        return x


def test_two_blocks_of_one_module_are_told_apart() -> None:
    model, x = TwoInOne(together=False), torch.randn(12, HIDDEN)
    compiled(model, expert_load=True)(x)
    found = moecompile.expert_load(model)
    assert list(found) == ["w_in.0", "w_in.1"] and not torch.equal(*found.values())
    ids = model.router(x).topk(TOP_K, -1).indices
    assert torch.equal(found["w_in.0"], torch.bincount(ids.reshape(-1), minlength=EXPERTS))


def test_models_are_copied_and_saved_without_loads() -> None:
    model, x = Model(), inputs()
    compiled(model, expert_load=True)(x)
    assert moecompile.expert_load(copy.deepcopy(model)) == {}
    assert not [name for name in model.state_dict() if "load" in name]
    file = io.BytesIO()
    torch.save(dict(model.named_parameters()), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == dict(model.named_parameters()).keys()


def test_what_is_asked_about() -> None:
    model, x = Model(), inputs()
    run = compiled(model, expert_load=True)
    assert moecompile.expert_load(model) == {}
    run(x)
    assert moecompile.expert_load(run).keys() == moecompile.expert_load(model).keys() != set()
    with pytest.raises(TypeError, match=r"moecompile\.expert_load: expected the module that was compiled, got None"):
        moecompile.expert_load(None)  # type: ignore[arg-type]


def test_ranks_that_share_out_the_same_tokens_are_refused() -> None:
    model = Model()
    compiled(model, expert_load=True)(inputs())
    setattr(model.layers[1].moe, SPLIT, True)
    with pytest.raises(RuntimeError, match=r"got layers\.1\.moe, whose ranks compute parts of the same tokens"):
        moecompile.expert_load(model)


def test_experts_that_are_moved_begin_anew() -> None:
    matrices = (nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1)))
    cpu, meta = (loads.Lifted((0, 1), 4, torch.device(name)) for name in ("cpu", "meta"))
    first = loads._load(cpu, matrices)
    assert loads._load(cpu, matrices) is first and loads._load(cpu, matrices[:1]) is not first
    moved = loads._load(meta, matrices)
    assert moved.device.type == "meta" and loads._load(meta, matrices) is moved
    assert loads._load(cpu, matrices) is not first


def test_loads_are_not_made_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="Call the model once before, as for any capture"):
        loads._zeros(4, torch.device("cuda", 0))
