"""Gradients of the experts' matrices that are added to float32 ones, in PyTorch's operators on the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import moecompile
from test_cached_weights import compiled
from test_precision import block_of, relative
from tiny_transformers import known_to_transformers

ops = torch.ops.moecompile
TOKENS, TOP_K, EXPERTS, FEATURES, INNER = 24, 2, 4, 32, 16
ATTRIBUTES: dict[str, Any] = {"activation": "mul(silu(gate), up)", "output": "mul(out, cast(weight, bfloat16))"}


class Call:
    """One call of the experts, in 16 bits or in FP8, with gate and up projection in one tensor or in two."""

    def __init__(self, fp8: bool, separate: bool = False) -> None:
        torch.manual_seed(0)
        self.fp8, self.gate_up = fp8, "separate" if separate else "halves"
        _, *self.plan = ops.plan(torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices, EXPERTS)
        self.x = torch.randn(TOKENS, FEATURES, dtype=torch.bfloat16, requires_grad=True)
        self.weights = torch.rand(TOKENS, TOP_K, requires_grad=True)
        self.cotangent = torch.randn(TOKENS, FEATURES).bfloat16()
        width = INNER if separate else 2 * INNER
        self.matrices = {"w_in": self.matrix(width, FEATURES), "w_out": self.matrix(FEATURES, INNER)}
        if separate:
            self.matrices["w_up"] = self.matrix(INNER, FEATURES)

    @staticmethod
    def matrix(*shape: int) -> Tensor:
        return (torch.randn(EXPERTS, *shape) * 0.2).bfloat16().requires_grad_()

    def __call__(self, main: dict[str, Tensor], x: Tensor | None = None) -> Tensor:
        attributes, up = ATTRIBUTES | {"gate_up": self.gate_up}, self.matrices.get("w_up")
        first, second = self.matrices["w_in"], self.matrices["w_out"]
        if self.fp8:
            cast = [*ops.quantize_weights(first, up, gate_up=self.gate_up), *ops.quantize_weights(second)]
            attributes["quantized"] = cast
        attributes |= {f"main_{name}": each for name, each in main.items()}
        given = (self.x if x is None else x, self.weights, *self.plan, first, second, up)
        result: Tensor = (ops.experts_fp8 if self.fp8 else ops.experts)(*given, **attributes)
        return result

    def step(self, main: dict[str, Tensor]) -> None:
        self(main).backward(self.cotangent)

    def main(self) -> dict[str, Tensor]:
        return {name: torch.full(each.shape, 0.5) for name, each in self.matrices.items()}


both = pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])


@pytest.mark.parametrize("separate", [False, True], ids=["halves", "separate"])
@both
def test_gradients_are_added_and_not_returned(fp8: bool, separate: bool) -> None:
    call = Call(fp8, separate)
    main = call.main()
    call.step({})
    expected = {name: each.grad for name, each in call.matrices.items()}
    others = [(leaf, leaf.grad) for leaf in (call.x, call.weights)]
    for leaf in (call.x, call.weights, *call.matrices.values()):
        leaf.grad = None
    for turn in (1, 2):
        call.step(main)
        for name, each in expected.items():
            assert each is not None and call.matrices[name].grad is None
            # in the model's dtype once, and then in float32
            torch.testing.assert_close(main[name], 0.5 + turn * each.float(), rtol=0, atol=1e-6)
    for leaf, each in others:
        assert each is not None and leaf.grad is not None and torch.equal(leaf.grad, each + each)


def test_matrices_that_are_frozen_and_those_that_nothing_is_added_for() -> None:
    call = Call(fp8=False)
    main, w_out = call.main(), call.matrices["w_out"]
    call.step({})
    expected, w_out.grad = w_out.grad, None
    call.matrices["w_in"].requires_grad_(False)
    call.step({"w_in": main["w_in"]})
    assert (main["w_in"] == 0.5).all()
    assert expected is not None and w_out.grad is not None and torch.equal(w_out.grad, expected)


def test_two_forwards_before_their_backwards() -> None:
    """As micro-batches in flight have: what is added to meanwhile is nobody's saved tensor."""
    call = Call(fp8=False)
    main, once = call.main(), call.main()
    for result in [call(main), call(main)]:
        result.backward(call.cotangent)
    call.step(once)
    torch.testing.assert_close(main["w_out"] - 0.5, 2 * (once["w_out"] - 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda main: main.bfloat16(), TypeError, "main_w_out must be float32, got torch.bfloat16"),
        (lambda main: main.mT, ValueError, r"must have the shape of w_out, \(4, 32, 16\), got \(4, 16, 32\)"),
        (lambda main: main.to("meta"), ValueError, "must be on the device of w_out, cpu, got meta"),
    ],
    ids=["dtype", "shape", "device"],
)
@both
def test_what_is_no_main_gradient_is_refused(fp8: bool, change: Any, error: type[Exception], message: str) -> None:
    """By the forward, before anything has been computed."""
    call = Call(fp8)
    with pytest.raises(error, match=message):
        call({"w_out": change(call.main()["w_out"])})


def test_the_main_gradient_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="main_w_up is the main gradient of w_up, which is None"):
        Call(fp8=False)({"w_up": torch.zeros(EXPERTS, INNER, FEATURES)})


def test_memory_of_an_argument_is_no_main_gradient() -> None:
    call = Call(fp8=False)
    call.matrices = {name: matrix.detach().float().requires_grad_() for name, matrix in call.matrices.items()}
    with pytest.raises(ValueError, match="main_w_out is the memory of w_out, which a backward would overwrite: clone"):
        call({"w_out": call.matrices["w_out"].detach()}, call.x.detach().float())


@both
def test_compiled_graphs_add_in_place(fp8: bool) -> None:
    """What is added to comes into the graph, and is written where it lies."""
    call = Call(fp8)

    def run(x: Tensor, main_in: Tensor, main_out: Tensor) -> Tensor:
        return torch.cos(call({"w_in": main_in, "w_out": main_out}, torch.sin(x)))

    found, expected = call.main(), call.main()
    compiled = torch.compile(run, fullgraph=True)
    for _ in range(2):
        for function, main in ((run, expected), (compiled, found)):
            result = function(call.x, main["w_in"], main["w_out"])
            result.backward(call.cotangent)
    for name, each in found.items():
        torch.testing.assert_close(each, expected[name], rtol=2e-2, atol=2e-2)
        assert not torch.equal(each, call.main()[name]) and call.matrices[name].grad is None


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"precision": "fp8"},
    "fp8, cached": {"precision": "fp8", "fp8_cache_weights": True},
    "recomputing": {"recompute": True},
}


def give(module: nn.Module) -> dict[str, Tensor]:
    """Main gradients for the experts' matrices."""
    found = {name: each for name, each in module.named_parameters() if each.dim() == 3 or "experts" in name}
    for each in found.values():
        each.main_grad = torch.zeros_like(each, dtype=torch.float32)  # type: ignore[attr-defined]
    return {name: each.main_grad for name, each in found.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", known_to_transformers("qwen3_moe", "gpt_oss"))
def test_the_option(name: str, options: dict[str, Any], lowering: str) -> None:
    """Two micro-batches: the sums of their gradients, which the parameters themselves do not get."""
    module, inputs = block_of(name)
    plain, adding = (compiled(module, lowering=lowering, main_grad=main_grad, **options) for main_grad in (False, True))
    main = give(adding)
    sums = {parameter: torch.zeros(each.shape) for parameter, each in plain.named_parameters()}
    for turn in range(2):
        torch.manual_seed(turn)
        batch = tuple(torch.randn_like(each) for each in inputs)
        for one in (plain, adding):
            backward(one(*batch))
        for parameter, each in plain.named_parameters():
            sums[parameter] += 0 if each.grad is None else each.grad.float()
            each.grad = None
    matrices = {parameter for parameter in main if parameter.endswith(("gate_up_proj", "down_proj"))}
    assert len(matrices) == 2
    for parameter, each in adding.named_parameters():
        if parameter in matrices:
            assert each.grad is None and relative(main[parameter], sums[parameter]) < 1e-2
        else:  # biases, the router
            assert each.grad is not None and (parameter not in main or not main[parameter].any())


def test_the_graph_shows_where_gradients_go() -> None:
    module, inputs = block_of("qwen3_moe")
    adding = compiled(module, lowering="eager", main_grad=True)
    give(adding)
    adding(*inputs)
    (graph,) = moecompile.last_report().graphs
    assert graph.after is not None and "gate_up_proj_main_grad" in graph.after and "down_proj_main_grad" in graph.after
    assert "gradients of 2 matrices are added to a main_grad" in graph.notes


def test_nobody_has_one(caplog: pytest.LogCaptureFixture) -> None:
    module, inputs = block_of("qwen3_moe")
    adding = compiled(module, lowering="eager", main_grad=True)
    backward(adding(*inputs))
    assert "w_in (" in caplog.text and "has no main_grad. Before the first call give it one" in caplog.text
    assert all(each.grad is not None for each in adding.parameters())


def test_one_that_is_gone_or_another_is_an_error() -> None:
    module, inputs = block_of("qwen3_moe")
    adding = compiled(module, lowering="eager", main_grad=True)
    give(adding)
    adding(*inputs)
    parameters = [each for each in adding.parameters() if hasattr(each, "main_grad")]
    for each in parameters:
        each.main_grad = torch.zeros_like(each)
    with pytest.raises(RuntimeError, match=r"the main_grad of .*proj was .*float32.* and is .*bfloat16"):
        adding(*inputs)
    for each in parameters:
        del each.main_grad
    with pytest.raises(RuntimeError, match="proj had one when its graph was compiled, and has none now"):
        adding(*inputs)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_micro_batches_in_flight(lowering: str) -> None:
    """Two forwards before their backwards, and main gradients that are cleared in between."""
    module, inputs = block_of("qwen3_moe")
    adding = compiled(module, lowering=lowering, main_grad=True)
    main = give(adding)
    backward(adding(*inputs))
    once = {name: each.clone() for name, each in main.items()}
    first, second = adding(*inputs), adding(*inputs)
    for each in main.values():
        each.zero_()
    for result in (first, second):
        backward(result)
    assert any(each.any() for each in once.values())
    for name, each in main.items():
        torch.testing.assert_close(each, 2 * once[name])


def test_hooks_of_saved_tensors_are_refused() -> None:
    """They would unpack copies, and what is added to a copy is lost. Checkpoints compute again, and unpack none."""
    module, inputs = block_of("qwen3_moe")
    adding = compiled(module, lowering="eager", main_grad=True)
    main = give(adding)
    backward(adding(*inputs))
    once = {name: each.clone() for name, each in main.items()}
    with (
        torch.autograd.graph.save_on_cpu(),
        pytest.raises(RuntimeError, match="does not go with hooks of saved tensors"),
    ):
        adding(*inputs)
    backward(torch.utils.checkpoint.checkpoint(adding, *inputs, use_reentrant=False))
    for name, each in main.items():
        torch.testing.assert_close(each, 2 * once[name])


def test_checkpointed_regions_keep_their_gradients(caplog: pytest.LogCaptureFixture) -> None:
    module, inputs = block_of("qwen3_moe")
    give(module)

    def run(*given: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(module, *given, use_reentrant=False)

    backward(torch.compile(run, backend="moecompile", options={"lowering": "eager", "main_grad": True})(*inputs))
    assert "inside a checkpointed or another nested region gradients of matrices go to parameter.grad" in caplog.text
    assert all(each.grad is not None for each in module.parameters())


def test_elements_that_share_memory_are_refused() -> None:
    call = Call(fp8=False)
    with pytest.raises(ValueError, match="must have a place in memory for each element"):
        call({"w_out": torch.zeros(()).expand(call.matrices["w_out"].shape)})


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_inference_knows_nothing_of_them(lowering: str) -> None:
    module, inputs = block_of("qwen3_moe")
    adding = compiled(module, lowering=lowering, main_grad=True)
    main = give(adding)
    with torch.no_grad():
        adding(*inputs)
    with torch.inference_mode():
        adding(*inputs)
    assert not any(each.any() for each in main.values())
    backward(adding(*inputs))
    assert all(main[name].any() for name in main if name.endswith("proj"))


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_parts_of_one_buffer(lowering: str) -> None:
    """As Megatron-LM has them, for two layers that are compiled by themselves."""
    module, (x, *others) = block_of("qwen3_moe")
    layers = [compiled(module, lowering=lowering, main_grad=True) for _ in range(2)]
    matrices = [each for layer in layers for each in layer.parameters() if each.dim() == 3]
    buffer, begin = torch.zeros(sum(each.numel() for each in matrices)), 0
    for each in matrices:
        each.main_grad = buffer[begin : begin + each.numel()].view(each.shape)  # type: ignore[attr-defined]
        begin += each.numel()
    for layer in layers:
        x = result_of(layer(x, *others))
    x.square().mean().backward()
    assert all(each.grad is None and each.main_grad.any() for each in matrices)  # type: ignore[attr-defined]


def test_those_that_overlap_are_refused() -> None:
    module, inputs = block_of("qwen3_moe")
    adding = compiled(module, lowering="eager", main_grad=True)
    main = give(adding)
    buffer = torch.zeros(sum(each.numel() for each in main.values()))
    for each in adding.parameters():
        if hasattr(each, "main_grad"):
            each.main_grad = buffer[: each.numel()].view(each.shape)
    with pytest.raises(RuntimeError, match="overlap in memory: give each its own part"):
        adding(*inputs)


def test_backwards_that_would_add_to_what_nobody_asked_for_are_refused() -> None:
    module, (x, *others) = block_of("qwen3_moe")
    adding = compiled(module, lowering="eager", main_grad=True)
    main, x = give(adding), x.detach().requires_grad_()
    matrix = next(each for each in adding.parameters() if each.dim() == 3)

    def loss() -> Tensor:
        return result_of(adding(x, *others)).square().mean()

    refused = "this backward asks for gradients of other tensors alone"
    with pytest.raises(RuntimeError, match=refused):
        torch.autograd.grad(loss(), x)
    with pytest.raises(RuntimeError, match=refused):
        loss().backward(inputs=[x])
    with pytest.raises(RuntimeError, match=refused):
        torch.autograd.grad(loss(), matrix, allow_unused=True)
    value = loss()
    for each in adding.parameters():
        if hasattr(each, "main_grad"):
            each.main_grad = torch.zeros_like(each, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="taken away or given anew between a forward and its backward"):
        value.backward()
    assert not any(each.any() for each in main.values())
    loss().backward()
    assert x.grad is not None


def test_hooks_of_parameters_run_when_the_sums_are_complete() -> None:
    """And find no gradient of the experts'."""
    module, inputs = block_of("qwen3_moe")
    adding = compiled(module, lowering="eager", main_grad=True)
    main = give(adding)
    matrix = next(each for name, each in adding.named_parameters() if name.endswith("gate_up_proj"))
    seen: list[tuple[Tensor | None, Tensor]] = []
    matrix.register_post_accumulate_grad_hook(lambda each: seen.append((each.grad, each.main_grad.clone())))
    backward(adding(*inputs))
    ((gradient, sums),) = seen
    assert gradient is None and torch.equal(
        sums, next(each for name, each in main.items() if name.endswith("gate_up_proj"))
    )


def test_one_that_comes_later_is_an_error() -> None:
    """Nothing would be added to it."""
    module, inputs = block_of("qwen3_moe")
    adding = compiled(module, lowering="eager", main_grad=True)
    backward(adding(*inputs))
    give(adding)
    with pytest.raises(RuntimeError, match="proj had none when its graph was compiled, and has one now"):
        adding(*inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda main: main.bfloat16(), TypeError, "the main_grad of .*proj must be float32, got torch.bfloat16"),
        (lambda main: main[:1], ValueError, "the main_grad of .*proj must have its shape"),
        (lambda main: main.to("meta"), ValueError, "the main_grad of .*proj must have its device, cpu, got meta"),
    ],
    ids=["dtype", "shape", "device"],
)
def test_what_cannot_be_one_is_named(change: Any, error: type[Exception], message: str) -> None:
    module, inputs = block_of("qwen3_moe")
    adding = compiled(module, lowering="eager", main_grad=True)
    give(adding)
    for each in adding.parameters():
        if hasattr(each, "main_grad"):
            each.main_grad = change(each.main_grad)
    with pytest.raises(BackendCompilerFailed, match=message) as found:
        adding(*inputs)
    assert isinstance(found.value.inner_exception, error)


def test_the_documents_training_step() -> None:
    """Everything is trained, nothing is left of a gradient."""
    text = (Path(__file__).parents[1] / "docs" / "options.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "main_grad" in block)
    module, inputs = block_of("qwen3_moe")
    given = {"torch": torch, "model": module, "micro_batches": [inputs] * 3}
    before = {name: each.detach().clone() for name, each in module.named_parameters()}
    exec(code, given | {"loss": lambda model, batch: result_of(model(*batch)).square().mean()})
    matrices = [each for each in module.parameters() if hasattr(each, "main_grad")]
    assert len(matrices) == 2 and not any(each.main_grad.any() for each in matrices)
    assert all(each.grad is None and not torch.equal(each, before[name]) for name, each in module.named_parameters())


def result_of(result: Any) -> Tensor:
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def backward(result: Any) -> None:
    result_of(result).square().mean().backward()
