"""The option `fp8_cache_weights`: the same numbers, and copies that are made when weights have changed, only then."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moecompile
from moecompile import cached
from moecompile.runtime import weight_copies
from moecompile.runtime.weight_copies import COPIES
from test_precision import block_of, run
from tiny_transformers import known_to_transformers

CACHED: dict[str, Any] = {"precision": "fp8", "fp8_cache_weights": True, "lowering": "eager"}
EACH = {"precision": "fp8", "lowering": "eager"}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A number for each time that copies were made."""
    COPIES.forget()
    numbers: list[int] = []
    make = weight_copies._made

    def counting(*args: Any) -> Any:
        numbers.append(len(numbers))
        return make(*args)

    monkeypatch.setattr(weight_copies, "_made", counting)
    yield numbers
    COPIES.forget()


def compiled(module: nn.Module, **options: Any) -> nn.Module:
    """A copy of the module, compiled."""
    made = copy.deepcopy(module)
    made.compile(backend="moecompile", options=options, fullgraph=True)
    return made


def pair(name: str = "qwen3_moe", **overrides: Any) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    """The same block, with copies that are kept and without."""
    module, inputs = block_of(name, **overrides)
    return compiled(module, **CACHED), compiled(module, **EACH), inputs


def infer(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        result = module(*inputs)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("name", known_to_transformers("qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"))
def test_the_same_numbers(name: str, lowering: str, made: list[int]) -> None:
    module, inputs = block_of(name)
    kept, each = (compiled(module, **{**options, "lowering": lowering}) for options in (CACHED, EACH))
    for _ in range(2):
        (found, of_found), (expected, of_expected) = run(kept, inputs), run(each, inputs)
        assert torch.equal(found, expected)
        assert of_found.keys() == of_expected.keys()
        assert all(torch.equal(of_found[name], gradient) for name, gradient in of_expected.items())
    assert len(made) == 2  # of GEMM1's matrices and of GEMM2's


def test_the_graph_shows_what_they_are(made: list[int]) -> None:
    kept, _, inputs = pair()
    infer(kept, inputs)
    (graph,) = moecompile.last_report().graphs
    assert graph.after is not None and "quantize_weights" not in graph.after
    assert graph.after.count(" = input ") == 4 + 8
    for name in (
        "gate_up_proj_fp8_values ",
        "gate_up_proj_fp8_scales ",
        "down_proj_fp8_values_t ",
        "down_proj_fp8_scales_t ",
    ):
        assert name in graph.after
    assert "FP8 copies of 2 matrices are kept between calls" in graph.notes


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda module: torch.optim.SGD(module.parameters(), 0.1),
    "AdamW": lambda module: torch.optim.AdamW(module.parameters(), 0.01, foreach=False),
    "foreach": lambda module: torch.optim.AdamW(module.parameters(), 0.01, foreach=True),
    "fused": lambda module: torch.optim.AdamW(module.parameters(), 0.01, fused=True),
}


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, way: str, made: list[int]) -> None:
    """Three steps of two micro-batches each end with the same weights; copies are made once a step."""
    kept, each, inputs = pair()
    for module in (kept, each):
        optimizer = OPTIMIZERS[name](module)
        step = torch.compile(optimizer.step, backend="aot_eager") if way == "compiled" else optimizer.step
        for number in range(3):
            optimizer.zero_grad()
            for micro in range(2):
                torch.manual_seed(10 * number + micro)
                module(*(torch.randn_like(each) for each in inputs)).square().mean().backward()
            step()
    for found, expected in zip(kept.parameters(), each.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert len(made) == 2 * 3


def test_what_pytorch_counts_is_noticed(made: list[int]) -> None:
    kept, each, inputs = pair()
    state = {name: value + 0.01 for name, value in each.state_dict().items()}

    def doubled(module: nn.Module) -> None:
        with torch.no_grad():
            module.get_parameter("experts.down_proj").mul_(2)

    def replaced(module: nn.Module) -> None:
        experts = module.get_submodule("experts")
        experts.down_proj = nn.Parameter(experts.get_parameter("down_proj").detach() * 2)

    def pointed_elsewhere(module: nn.Module) -> None:
        parameter = module.get_parameter("experts.gate_up_proj")
        parameter.data = parameter.data * 2

    before = infer(kept, inputs)
    for change in (lambda module: module.load_state_dict(state), doubled, replaced, pointed_elsewhere):
        for module in (kept, each):
            change(module)
        found = infer(kept, inputs)
        assert torch.equal(found, infer(each, inputs)) and not torch.equal(found, before)
        before = found


def test_what_nobody_counts_has_to_be_said(made: list[int]) -> None:
    kept, each, inputs = pair()
    before = infer(kept, inputs)
    for module in (kept, each):
        module.get_parameter("experts.down_proj").data.mul_(2)
    assert torch.equal(infer(kept, inputs), before)
    other, _ = block_of("qwen3_moe")
    moecompile.invalidate(other)
    assert torch.equal(infer(kept, inputs), before)
    moecompile.invalidate(kept)
    assert torch.equal(infer(kept, inputs), infer(each, inputs))
    count = len(made)
    moecompile.invalidate()
    infer(kept, inputs)
    assert len(made) == count + 2


def test_inference_and_training_share_them(made: list[int]) -> None:
    """Those of training serve inference; those made for inference are half of them."""
    kept, each, inputs = pair()
    infer(kept, inputs)
    held = sum(copy.nbytes for entry in COPIES._entries.values() for copy in entry.four)
    assert len(made) == 2
    assert torch.equal(run(kept, inputs)[0], run(each, inputs)[0])
    assert held * 2 == sum(copy.nbytes for entry in COPIES._entries.values() for copy in entry.four)
    assert torch.equal(infer(kept, inputs), infer(each, inputs))
    with torch.inference_mode():
        kept(*inputs)
    assert len(made) == 4 and len(COPIES) == 2


def test_steps_that_begin_with_inference_cast_once(made: list[int]) -> None:
    """As reentrant checkpoints do, and whoever asks for a policy's log-probabilities before it is trained."""
    kept, _, inputs = pair()
    optimizer = torch.optim.SGD(kept.parameters(), 0.1)
    counts = []
    for _ in range(3):
        before = len(made)
        infer(kept, inputs)
        run(kept, inputs)
        optimizer.step()
        counts.append(len(made) - before)
    assert counts == [4, 2, 2]


def test_what_is_made_in_inference_mode_can_be_trained_with(made: list[int]) -> None:
    """A graph that may be differentiated, for some part of it records gradients, is run in inference mode first."""
    module, inputs = block_of("qwen3_moe")

    def run_with_a_part(*given: Tensor) -> Any:
        with torch.enable_grad():
            mean = given[0].float().mean()
        result = module(*given)
        result = result[0] if isinstance(result, tuple) else result
        return result * (mean > -100).to(result.dtype)

    function = torch.compile(run_with_a_part, backend="moecompile", options=CACHED)
    for _ in range(2):
        with torch.inference_mode():
            function(*inputs)
        function(*inputs).square().mean().backward()
        torch.optim.SGD(module.parameters(), 0.1).step()
    assert not any(copy.is_inference() for entry in COPIES._entries.values() for copy in entry.four)


def test_weights_of_inference_mode_are_cast_each_time(made: list[int]) -> None:
    """Nobody counts their versions."""
    with torch.inference_mode():
        module, inputs = block_of("qwen3_moe")
        kept, each = compiled(module, **CACHED), compiled(module, **EACH)
        state = {name: value * 2 for name, value in each.state_dict().items()}
        for _ in range(2):
            assert torch.equal(kept(*inputs), each(*inputs))
            kept.load_state_dict(state)
            each.load_state_dict(state)
    assert len(made) > 2 and not len(COPIES)


@pytest.mark.parametrize("shared", ["experts", "gate_up_proj"])
def test_experts_that_are_used_twice(shared: str, made: list[int]) -> None:
    """In one graph: whole, or one of their matrices."""

    class Twice(nn.Module):
        def __init__(self, first: nn.Module, second: nn.Module) -> None:
            super().__init__()
            self.first, self.second = first, second
            if shared == "experts":
                second.experts = first.experts
            else:
                second.experts.gate_up_proj = first.experts.gate_up_proj  # type: ignore[union-attr]

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.second(self.first(x))
            return result

    (first, inputs), (second, _) = block_of("qwen3_moe"), block_of("qwen3_moe", seed=5)
    whole = Twice(first, second)
    kept, each = compiled(whole, **CACHED), compiled(whole, **EACH)
    for _ in range(2):
        (found, of_found), (expected, of_expected) = run(kept, inputs), run(each, inputs)
        assert torch.equal(found, expected)
        assert all(torch.equal(of_found[name], gradient) for name, gradient in of_expected.items())
    assert len(made) == (2 if shared == "experts" else 3)


@torch._dynamo.config.patch(run_gc_after_compile=True)  # as it is: what compiling leaves has weak references to them
def test_parameters_that_are_swapped(made: list[int]) -> None:
    kept, each, inputs = pair()
    before = infer(kept, inputs)
    for module in (kept, each):
        parameter = module.get_parameter("experts.down_proj")
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 2))
    found = infer(kept, inputs)
    assert torch.equal(found, infer(each, inputs)) and not torch.equal(found, before)


def test_calls_during_a_step_keep_nothing(made: list[int]) -> None:
    """A hook of the optimizer's own runs before ours; and a step may fail."""
    kept, each, inputs = pair()
    seen: dict[nn.Module, list[Tensor]] = {kept: [], each: []}
    for module, found in seen.items():
        optimizer = torch.optim.AdamW(module.parameters(), 0.1, fused=True)
        optimizer.register_step_post_hook(lambda *_, module=module, found=found: found.append(infer(module, inputs)))
        run(module, inputs)
        optimizer.step()
        found.append(infer(module, inputs))

        def fail(*_: Any) -> None:
            raise RuntimeError("a hook fails")

        optimizer.register_step_post_hook(fail)
        with pytest.raises(RuntimeError, match="a hook fails"):
            optimizer.step()
        found.append(infer(module, inputs))
    assert len(seen[kept]) == 4
    assert all(torch.equal(found, expected) for found, expected in zip(*seen.values(), strict=True))
    count = len(made)
    infer(kept, inputs)
    assert len(made) == count + 2, "kept, though a step has not ended"
    torch.optim.SGD(nn.Linear(1, 1).parameters(), 1.0).step()
    infer(kept, inputs)
    infer(kept, inputs)
    assert len(made) == count + 4


def test_a_matrix_that_is_turned_in_place(made: list[int]) -> None:
    module, inputs = block_of("qwen3_moe")
    kept, each = compiled(module, **CACHED), compiled(module, **EACH)
    before = infer(kept, inputs)
    for other in (kept, each):
        parameter = other.get_parameter("experts.gate_up_proj")
        parameter.data = parameter.data.mT  # both sizes are 64
    found = infer(kept, inputs)
    assert torch.equal(found, infer(each, inputs)) and not torch.equal(found, before)


def test_copies_live_no_longer_than_the_parameters(made: list[int], caplog: pytest.LogCaptureFixture) -> None:
    def use() -> None:  # in a frame of its own: Dynamo looks at locals, and so keeps them as long as the frame
        kept, _, inputs = pair()
        infer(kept, inputs)
        assert len(COPIES) == 2

    use()
    torch._dynamo.reset()
    caplog.clear()  # what torch logs holds what it is about
    gc.collect()
    assert len(COPIES) == 0


class Scaled(nn.Module):
    """A block whose experts' weights are computed in every forward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        block.experts.gate_up_proj.data.mul_(0.5)  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor) -> Tensor:
        experts: Any = self.block.experts
        whole = {"experts.gate_up_proj": experts.gate_up_proj * 2}
        result: Tensor = torch.func.functional_call(self.block, whole, (x,))
        return result


def test_weights_that_are_no_parameters_are_cast_each_time(made: list[int]) -> None:
    module, inputs = block_of("qwen3_moe")
    whole = Scaled(module)
    kept, each = compiled(whole, **CACHED), compiled(whole, **EACH)
    for _ in range(2):
        assert torch.equal(infer(kept, inputs), infer(each, inputs))
    assert len(made) == 1  # of GEMM2's
    notes = [note for graph in moecompile.last_report().graphs for note in graph.notes]
    assert any(
        "are cast in every forward" in note and "no parameters that the graph is given" in note for note in notes
    )


class Updating(nn.Module):
    """A block that changes its weights between two forwards of one graph."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.block(x)
        with torch.no_grad():
            self.block.get_parameter("experts.down_proj").mul_(2)
        second: Tensor = self.block(x)
        return first + second


def test_weights_that_the_graph_writes_are_cast_where_they_are_read(made: list[int]) -> None:
    module, inputs = block_of("qwen3_moe")
    whole = Updating(module)
    kept, each = compiled(whole, **CACHED), compiled(whole, **EACH)
    for _ in range(2):
        assert torch.equal(infer(kept, inputs), infer(each, inputs))
    assert len(made) == 1  # of GEMM1's
    notes = [note for graph in moecompile.last_report().graphs for note in graph.notes]
    assert any("is written in the graph itself" in note for note in notes)


class Checkpointed(nn.Module):
    """A block under activation checkpointing."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        return result


def test_inside_a_checkpoint_they_are_cast_each_time(made: list[int]) -> None:
    module, inputs = block_of("qwen3_moe")
    whole = Checkpointed(module)
    kept, each = compiled(whole, **CACHED), compiled(whole, **EACH)
    (found, of_found), (expected, of_expected) = run(kept, inputs), run(each, inputs)
    assert torch.equal(found, expected)
    assert all(torch.equal(of_found[name], gradient) for name, gradient in of_expected.items())
    assert not made
    notes = [note for graph in moecompile.last_report().graphs for note in graph.notes]
    assert any("inside a checkpointed or another nested region" in note for note in notes)


def test_fsdp_gets_no_copies(made: list[int], tmp_path: Any) -> None:
    """It writes parameters in ways that no version counts."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module, inputs = block_of("qwen3_moe")
        expected = infer(compiled(module, **EACH), inputs)
        fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        module.compile(backend="moecompile", options=CACHED)
        assert torch.equal(infer(module, inputs), expected)
    finally:
        torch.distributed.destroy_process_group()
    assert not made
    notes = [note for graph in moecompile.last_report().graphs for note in graph.notes]
    assert any("FSDP writes parameters" in note for note in notes)
    del module  # as long as it lives, no other model's copies are kept either
    torch._dynamo.reset()
    gc.collect()
    assert not cached._sharded(())


@pytest.mark.parametrize(
    ("options", "mode", "complaint"),
    [
        ({"fp8_cache_weights": True}, None, "Add precision='fp8'"),
        ({"fp8_cache_weights": True, "precision": "fp8"}, "reduce-overhead", "CUDA graphs"),
        ({"fp8_cache_weights": True, "precision": "fp8", "inductor": {"triton.cudagraphs": True}}, None, "CUDA graphs"),
        ({"fp8_cache_weights": 1, "precision": "fp8"}, None, "expected bool"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], mode: str | None, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        moecompile.Options.parse(mode, options)


def test_only_models_are_invalidated() -> None:
    with pytest.raises(TypeError, match="expected a module, or nothing for all models, got 3"):
        moecompile.invalidate(3)  # type: ignore[arg-type]
