"""The FP8 operators under opcheck, torch.compile, checkpointing and autocast, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dense_experts import FORMS, INPUTS, RELU_SQUARED, SWIGLU, UNWEIGHTED, Case, make_case, routing
from moecompile.runtime import fp8_reference, reference
from moecompile.runtime.contract import Arguments
from moecompile.runtime.fp8_contract import Quantized
from moecompile.runtime.grouped import DeviceRows

ops = torch.ops.moecompile
BF16 = torch.bfloat16
BIASES = ("b_in", "b_up", "b_out")
SAMPLES: dict[str, Callable[[], Case]] = {
    "halves": lambda: make_case(routing("random", 6, 2, 3), 3, dtype=BF16),
    "interleaved": lambda: make_case(
        routing("dropped", 6, 2, 3), 3, SWIGLU, "interleaved", (True, True), BIASES, torch.float16
    ),
    "separate": lambda: make_case(
        routing("skewed", 6, 2, 3), 3, SWIGLU, "separate", (False, True), BIASES, BF16, torch.float32, (130, 136, 7)
    ),
    "single": lambda: make_case(routing("random", 6, 1, 3), 3, RELU_SQUARED, "single", dtype=BF16),
    "unweighted": lambda: make_case(routing("all_dropped", 6, 2, 3), 3, UNWEIGHTED, dtype=BF16),
}


def weights(case: Case) -> list[tuple[tuple[Tensor | None, ...], dict[str, Any]]]:
    """The calls of quantize_weights: arguments and attributes."""
    given = case.tensors
    first = {"gate_up": case.gate_up, "transposed": case.transposed[0]}
    return [((given["w_in"], given["w_up"]), first), ((given["w_out"], None), {"transposed": case.transposed[1]})]


def quantized(case: Case) -> list[Tensor]:
    return [copy for args, attributes in weights(case) for copy in ops.quantize_weights(*args, **attributes)]


def run(case: Case) -> Tensor:
    return ops.experts_fp8(*case.arguments(), **case.attributes, quantized=quantized(case))


def block(case: Case) -> Tensor:
    """Something on either side of the operators, as in a model; powers of two round nowhere, compiled or not."""
    inner = Case(case.form, case.ids, case.tensors | {"x": case.given["x"] * 2}, case.gate_up, case.transposed)
    return run(inner) * 0.5


def gradients(run: Callable[[Case], Tensor], case: Case) -> list[Tensor]:
    """The result and the gradients of all that is given."""
    out = run(case)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, list(case.given.values()), cotangent)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# torch's check of schemas multiplies e4m3 tensors, and that of gradients sums them, which is not implemented; what the
# former would find is tested below.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample: str):
    torch.manual_seed(0)
    case = SAMPLES[sample]()
    for args, given in weights(case):
        torch.library.opcheck(ops.quantize_weights, args, given)
    attributes = {**case.attributes, "quantized": quantized(case)}
    arguments = case.arguments()
    torch.library.opcheck(ops.experts_fp8, arguments, attributes, test_utils=CHECKS)
    torch.library.opcheck(ops.experts_fp8_forward, arguments, attributes, test_utils=CHECKS[:2])
    out, saved = ops.experts_fp8_forward(*arguments, **attributes)
    needs = [case.tensors[name] is not None for name in INPUTS]
    backward = (torch.randn_like(out), [tensor.detach() for tensor in saved], *arguments[1:])
    attributes |= {"needs": needs}
    torch.library.opcheck(ops.experts_fp8_backward, backward, attributes, test_utils=CHECKS[:2])
    plain = tuple(each.detach() if isinstance(each, Tensor) else each for each in backward)  # no derivative to compare
    torch.library.opcheck(ops.experts_fp8_backward, plain, attributes, test_utils=CHECKS)
    del attributes["needs"]
    for tensor in case.given.values():
        tensor.requires_grad_(False)
    for operator in (ops.experts_fp8, ops.experts_fp8_forward):
        torch.library.opcheck(operator, arguments, attributes, test_utils=CHECKS)


@pytest.mark.parametrize("sample", SAMPLES)
def test_arguments_are_left_as_they_are_and_share_nothing_with_results(sample: str):
    torch.manual_seed(0)
    case = SAMPLES[sample]()
    attributes, arguments = {**case.attributes, "quantized": quantized(case)}, case.arguments()
    with torch.no_grad():
        out, saved = ops.experts_fp8_forward(*arguments, **attributes)
        needs = [case.tensors[name] is not None for name in INPUTS]
        given = [tensor for tensor in (*arguments, *attributes["quantized"], *saved) if tensor is not None]
        before = [bits(tensor).clone() for tensor in given]
        again = ops.experts_fp8_forward(*arguments, **attributes)
        grads = ops.experts_fp8_backward(out, saved, *arguments[1:], **attributes, needs=needs)
    assert all(torch.equal(bits(tensor), old) for tensor, old in zip(given, before, strict=True))
    made = [again[0], *again[1], *grads]
    places = [tensor.untyped_storage().data_ptr() for tensor in (*given, *made) if tensor.numel()]
    assert len(set(places)) == len(places)


def test_on_devices_nothing_asks_the_host(monkeypatch: pytest.MonkeyPatch):
    """Fake tensors have no values: whatever depended on one would raise."""
    monkeypatch.setattr(reference, "rows_of", lambda offsets, order, top_k, *_: DeviceRows(offsets, order, top_k))
    case = SAMPLES["separate"]()
    given, copies = [None if tensor is None else tensor.detach() for tensor in case.arguments()], quantized(case)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = [None if tensor is None else mode.from_tensor(tensor) for tensor in given]
        args = Arguments(*fake, **case.attributes)  # type: ignore[arg-type]
        packed = Quantized(*map(mode.from_tensor, copies))
        out, saved = fp8_reference.forward(args, packed, save=True)
        assert saved is not None
        grads = fp8_reference.backward(args, packed, out, saved, INPUTS)
    assert {name: grad.shape for name, grad in grads.items()} == {n: t.shape for n, t in case.given.items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("sample", ["halves", "separate"])
def test_compiled_for_any_number_of_tokens(backend: str, sample: str):
    torch.manual_seed(0)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, backend=counter, dynamic=True, fullgraph=True)
    case = SAMPLES[sample]()
    for seed, tokens in enumerate((5, 9, 16)):
        case.ids = routing("dropped", tokens, 2, 3, seed)
        features, kind = case.given["x"].shape[1], case.given["weights"].dtype
        case.tensors["x"] = torch.randn(tokens, features).to(BF16).requires_grad_()
        case.tensors["weights"] = torch.rand(tokens, 2).to(kind).requires_grad_()
        assert_same(gradients(compiled, case), gradients(block, case))
    assert counter.frame_count == 1
    with torch.no_grad():
        assert_same([compiled(case)], [block(case)])


@pytest.mark.parametrize("training", [True, False])
def test_graphs_hold_one_operator_forward_and_one_backward(training: bool):
    recorded: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        recorded.append(module)
        return make_boxed_func(module)

    case = SAMPLES["halves"]()
    for tensor in case.given.values():
        tensor.requires_grad_(training)
    out = torch.compile(block, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(case)
    if training:
        out.sum().backward()
    names = [
        [str(node.target).split(".")[1] for node in module.graph.nodes if "moecompile" in str(node.target)]
        for module in recorded
    ]
    before = ["plan", "quantize_weights", "quantize_weights"]
    expected = [[*before, "experts_fp8"]]
    if training:
        expected = [[*before, "experts_fp8_forward"], ["experts_fp8_backward"]]
    assert [sorted(found) for found in names] == [sorted(one) for one in expected]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool):
    torch.manual_seed(0)
    case = SAMPLES["halves"]()

    def inner(x: Tensor) -> Tensor:
        return block(Case(case.form, case.ids, case.tensors | {"x": x}, case.gate_up, case.transposed))

    out = checkpoint(inner, case.given["x"], use_reentrant=reentrant)
    out.sum().backward()
    found = [tensor.grad for tensor in case.given.values()]
    expected = torch.autograd.grad(block(case).sum(), list(case.given.values()))
    assert_same([grad for grad in found if grad is not None], list(expected))


def test_autocast_changes_nothing_inside():
    torch.manual_seed(0)
    case = SAMPLES["separate"]()
    expected = gradients(run, case)
    with torch.autocast("cpu", BF16):
        assert_same(gradients(run, case), expected)


def test_quantised_weights_are_constants():
    case = SAMPLES["separate"]()
    assert not any(copy.requires_grad for copy in quantized(case))
    _, saved = ops.experts_fp8_forward(*case.arguments(), **case.attributes, quantized=quantized(case))
    assert not any(tensor.requires_grad for tensor in saved)


def test_second_derivatives_and_transforms_are_refused():
    case = SAMPLES["halves"]()
    (grad,) = torch.autograd.grad(run(case).sum(), case.given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative; run the model without"):
        grad.sum().backward()
    copies, (x, *rest) = quantized(case), case.arguments()
    assert x is not None
    frozen = [None if tensor is None else tensor.detach() for tensor in rest]
    alone = x.detach().requires_grad_()  # is no argument of the backward
    result = ops.experts_fp8(alone, *frozen, **case.attributes, quantized=copies)
    (grad,) = torch.autograd.grad(result.sum(), alone, create_graph=True)
    with pytest.raises(RuntimeError, match="experts_fp8 has no second derivative; run the model without"):
        grad.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="experts_fp8 has no second derivative; run the model without"):
        torch.autograd.grad(result.sum() + grad.square().sum(), alone)
    with pytest.raises(NotImplementedError, match=r"quantize_weights does not work under torch\.func"):
        torch.func.grad(lambda w: ops.quantize_weights(w)[1].sum())(torch.randn(2, 128, 128))

    def of_x(x: Tensor) -> Tensor:
        return ops.experts_fp8(x, *rest, **case.attributes, quantized=copies).sum()

    with pytest.raises(NotImplementedError, match=r"do(es)? not work under torch\.func"):
        torch.func.grad(of_x)(x.detach())
    with pytest.raises(NotImplementedError, match=r"do not work under torch\.vmap"):
        torch.func.vmap(of_x)(x.detach().expand(2, 6, 6))


def narrower(copies: list[Tensor]) -> list[Tensor]:
    return [copies[0][:, :128], *copies[1:]]


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input": ({"input": "mul(x, weight)"}, ValueError, r"input must be 'x'.* got 'mul\(x, weight\)'; weight the"),
    "output": (
        {"output": "mul(tanh(out), weight)"},
        ValueError,
        r"output must be 'out' or .* got 'mul\(tanh\(out\), weight\)'; call moecompile::experts",
    ),
    "bias": (
        {"b_in": torch.ones(3, 20), "activation": "cast(silu(gate), bfloat16)"},
        TypeError,
        "b_in must have the weights' dtype, torch.bfloat16, got torch.float32; cast it",
    ),
    "result": ({"out_dtype": torch.float64}, TypeError, "result must be .* got torch.float64; pass out_dtype"),
    "x": ({"x": torch.ones(6, 6)}, TypeError, "input 'x' of torch.float32 by w_in of torch.bfloat16; write the cast"),
    "shape": ({"weights": torch.ones(6, 3)}, ValueError, r"weights must have shape .* = \(6, 2\), got \(6, 3\)"),
    "count": ({"quantized": []}, ValueError, r"quantized must hold 8 tensors \(w_in, .*got 0; pass \[\*quantize_weig"),
    "layout": (
        {"quantized": narrower},
        ValueError,
        r"w_in of quantized must have shape .* = \(3, 256, 128\), got \(3, 128, 128\); pass .* the layouts of this",
    ),
    "not quantised": (
        {"quantized": lambda copies: [copies[0].bfloat16(), *copies[1:]]},
        TypeError,
        "w_in of quantized must be torch.float8_e4m3fn, got torch.bfloat16; pass",
    ),
}
POSITIONS = ("x", "weights", "offsets", "slots", "order", "w_in", "w_out", "w_up", "b_in", "b_up", "b_out")


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("fake", [False, True])
def test_experts_name_what_is_wrong(name: str, fake: bool):
    changes, kind, complaint = WRONG[name]
    case = SAMPLES["halves"]()
    arguments = dict(zip(POSITIONS, case.arguments(), strict=True)) | case.attributes | {"quantized": quantized(case)}
    change = changes.get("quantized")
    arguments |= changes | ({"quantized": change(arguments["quantized"])} if callable(change) else {})
    positional = [arguments.pop(position) for position in POSITIONS]
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
        for operator in (ops.experts_fp8, ops.experts_fp8_forward):
            with pytest.raises(kind, match=complaint):
                operator(*positional, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_models_of_32_bits_are_refused(dtype: torch.dtype):
    case = make_case(routing("random", 6, 2, 3), 3, dtype=dtype)
    copies = [tensor for args, given in weights(case) for tensor in ops.quantize_weights(*_halved(args), **given)]
    with pytest.raises(TypeError, match=f"must be bfloat16 or float16, got {dtype}"):
        ops.experts_fp8(*case.arguments(), **case.attributes, quantized=copies)


def _halved(args: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.bfloat16() for tensor in args]


def test_backward_names_what_is_wrong():
    case = SAMPLES["unweighted"]()
    attributes = {**case.attributes, "quantized": quantized(case)}
    with torch.no_grad():
        out, saved = ops.experts_fp8_forward(*case.arguments(), **attributes)

    def backward(grad: Tensor, saved: list[Tensor], needs: list[bool], w_in: Tensor | None = None) -> Any:
        _, weights, offsets, slots, order, given, *rest = case.arguments()
        tensors = (weights, offsets, slots, order, given if w_in is None else w_in, *rest)
        with torch.no_grad():
            return ops.experts_fp8_backward(grad, saved, *tensors, **attributes, needs=needs)

    x = [True] + [False] * 7
    assert backward(out, saved, [False] * 8) == []
    with pytest.raises(ValueError, match=r"experts_fp8_backward: needs must hold one bool for each of \(x, .*got 3"):
        backward(out, saved, [True] * 3)
    with pytest.raises(ValueError, match=r"experts_fp8_backward: .* gradient of weights, which is None"):
        backward(out, saved, [True] * 8)
    with pytest.raises(ValueError, match=r"grad must have shape .*\(6, 7\), got \(4, 7\)"):
        backward(out[:4], saved, x)
    with pytest.raises(TypeError, match=r"grad must be .* got torch.float64; cast it first"):
        backward(out.double(), saved, x)
    with pytest.raises(ValueError, match=r"saved must hold 4 tensors .*got 2; pass what experts_fp8_forward returned"):
        backward(out, saved[:2], x)
    with pytest.raises(ValueError, match=r"hidden_values of saved must have shape .*\(12, 256\), got \(6, 256\)"):
        backward(out, [*saved[:2], saved[2][:6], saved[3]], x)
    with pytest.raises(ValueError, match=r"w_in must have shape .* got \(20, 6\)"):
        backward(out, saved, x, torch.ones(20, 6, dtype=BF16))


def test_weights_before_the_first_product_are_for_the_other_operator():
    case = make_case(routing("random", 6, 2, 3), 3, FORMS["weight_before"], dtype=BF16)
    with pytest.raises(ValueError, match="quantised once for all its experts"):
        run(case)
