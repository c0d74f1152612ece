"""The derivatives of `moecompile::experts`, `experts_fp8` and `linear_fp8`, and what they refuse.

That is second derivatives, forward mode and torch.func. Quantised weights are constants: the gradient of the weights
they were made of comes from `experts_fp8`, which gets those too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moecompile.runtime import fp8_experts, kernels, main_gradients
from moecompile.runtime import linear_fp8 as linear
from moecompile.runtime.contract import DIFFERENTIABLE, TENSORS, Arguments
from moecompile.runtime.fp8_contract import NOTHING, check_fp8, kept_copies
from moecompile.runtime.quantize import POWER_OF_TWO

Parts = list[Tensor]
Main = Mapping[str, Tensor]
ADVICE = "run the model without backend='moecompile' (or with MOECOMPILE_DISABLE=1) for it"
FP8, LINEAR = "experts_fp8", "linear_fp8"
PLAIN = {Tensor, torch.nn.Parameter, type(None)}
FUNCTIONALIZE = torch._C.DispatchKey.Functionalize


class _Experts(torch.autograd.Function):
    """experts_forward with experts_backward as its derivative; `hidden` is not differentiable."""

    @staticmethod
    def forward(ctx: Any, attributes: dict[str, Any], main: Main, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            result, hidden = torch.ops.moecompile.experts_forward(*tensors, **attributes)
        # main gradients are not saved: others write to them before this backward does
        ctx.attributes, ctx.main = attributes, main
        ctx.save_for_backward(hidden, *tensors)
        ctx.mark_non_differentiable(hidden)
        ctx.set_materialize_grads(False)
        return result, hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, _ = grads
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        hidden, *tensors = ctx.saved_tensors
        wanted, main = _wanted(ctx.needs_input_grad[2:], ctx.main)
        needs, ops = [wanted[name] for name in DIFFERENTIABLE], torch.ops.moecompile
        operator = ops.experts_backward_adding if main else ops.experts_backward
        given = operator(grad, hidden, *tensors, **ctx.attributes, needs=needs, **main_gradients.keywords(main))
        found = _needed(given, needs, main)
        return (None, None, *(next(found) if wanted[name] and name in DIFFERENTIABLE else None for name in TENSORS))


class _Trace(torch.autograd.Function):
    """Nothing, made of a tensor: stands for it where it is not kept, so that who differentiates again comes by."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


def _trace(x: Tensor) -> Tensor | None:
    if not x.requires_grad:
        return None
    found: Tensor = _Trace.apply(x)
    return found


class _ExpertsFp8(torch.autograd.Function):
    """experts_fp8_forward with experts_fp8_backward as its derivative; of x only the quantised copy is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        attributes: dict[str, Any],
        main: Main,
        quantized: Parts,
        held: bool,
        trace: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        if any(each.shape == NOTHING for each in quantized[2::4]):
            given: Any = tensors
            check_fp8(Arguments(*given, **attributes), quantized, backward=True)  # raises: the backward reads them
        with torch._C._AutoDispatchBelowAutograd():
            found = torch.ops.moecompile.experts_fp8_forward(*tensors, **attributes, quantized=quantized)
        result, saved = found
        again = attributes.get("recompute", False)
        copies = kept_copies(quantized, first=again and held)
        ctx.attributes, ctx.main, ctx.split = attributes, main, (len(saved), len(saved) + len(copies))
        ctx.quantises = again and not held
        ctx.save_for_backward(*saved, *copies, trace, *tensors[1:])
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        return result, *saved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, *_ = grads
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        first, second = ctx.split
        kept = ctx.saved_tensors
        saved, quantized, (trace, *tensors) = list(kept[:first]), list(kept[first:second]), kept[second:]
        wanted, main = _wanted(ctx.needs_input_grad[5:], ctx.main)
        needs, ops = [wanted[name] for name in DIFFERENTIABLE], torch.ops.moecompile
        if ctx.quantises:
            quantized[:2] = _of_gemm1(tensors, ctx.attributes)
        operator = ops.experts_fp8_backward_adding if main else ops.experts_fp8_backward
        keywords = {"quantized": quantized, "needs": needs, **main_gradients.keywords(main)}
        found = [*_needed(operator(grad, saved, *tensors, **ctx.attributes, **keywords), needs, main)]
        parts = iter(_refusing(found, FP8, (grad, trace, *tensors)) if torch.is_grad_enabled() else found)
        of_tensors = (next(parts) if wanted[name] and name in DIFFERENTIABLE else None for name in TENSORS)
        return None, None, None, None, None, *of_tensors


def _of_gemm1(tensors: Sequence[Tensor | None], attributes: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """GEMM1's matrices, quantised as they lie, of the saved tensors."""
    given = dict(zip(TENSORS[1:], tensors, strict=True))
    layout = {"gate_up": attributes["gate_up"], "transposed": attributes.get("w_in_transposed", False)}
    if "scale_format" in attributes:
        layout["scale_format"] = attributes["scale_format"]
    with torch._C._AutoDispatchBelowAutograd():
        found = torch.ops.moecompile.quantize_weights(given["w_in"], given["w_up"], **layout, backward=False)
    values, scales, *_ = found
    return values, scales


class _LinearFp8(torch.autograd.Function):
    """scaled_mm with its derivative, two products more; of x the quantised copy is kept, of weight the transposed.

    See `moecompile.runtime.linear_fp8` for the formulas.
    """

    @staticmethod
    def forward(
        ctx: Any,
        attributes: dict[str, Any],
        trace: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        scales: Tensor,
        *quantized: Tensor,
    ) -> Tensor:
        if ctx.needs_input_grad[2]:  # of x, whose gradient is the only one that reads them
            linear.check_copies_for_backward(quantized)
        ctx.attributes = attributes
        ctx.save_for_backward(trace, weight, values, scales, *quantized[2:])
        with torch._C._AutoDispatchBelowAutograd():
            return _product(weight, bias, values, scales, quantized, attributes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        trace, weight, values, scales, *turned = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[2:5]
        (features, inner), ops, found = weight.shape, torch.ops.moecompile, list[Tensor]()
        of_casts, of_products = _split(ctx.attributes)
        sizes = {"out_features": inner, "dtype": weight.dtype, **of_products}
        with torch._C._AutoDispatchBelowAutograd():
            grad = grads[0].to(weight.dtype)
            cast = ops.quantize_gradient if of_weight else ops.quantize
            g = cast(grad, **of_casts) if of_weight or of_x else ()
            if of_x:
                found.append(ops.scaled_mm(*g[:2], *turned, **sizes))
            if of_weight:
                x_t = ops.along_tokens(values, scales, scale_block="128x128", **of_casts)
                found.append(ops.scaled_mm(*g[2:], *x_t, **sizes))
            if of_bias:
                found.append(grad.reshape(-1, features).sum(0, dtype=torch.float32).to(weight.dtype))
        parts = iter(_refusing(found, LINEAR, (grads[0], trace, weight)) if torch.is_grad_enabled() else found)
        needed = (next(parts) if needed else None for needed in (of_x, of_weight, of_bias))
        return (None, None, *needed, *(None,) * (4 + len(turned)))


def _wanted(needs: Sequence[bool], main: Main) -> tuple[dict[str, bool], dict[str, Tensor]]:
    """Of which tensors gradients are returned, and the main gradients of those whose are not."""
    wanted = dict(zip(TENSORS, needs, strict=True))
    added = {name: each for name, each in main.items() if wanted[name]}
    return wanted | dict.fromkeys(added, False), added


def _needed(found: Sequence[Tensor], needs: Sequence[bool], main: Main) -> Iterator[Tensor]:
    """The needed gradients of what a backward gives: these, or where it adds to main gradients, all."""
    return (each for each, needed in zip(found, needs, strict=True) if needed) if main else iter(found)


def _differentiates(tensors: Sequence[Tensor | None], operator: str = "experts") -> bool:
    """Whether autograd records a call with these arguments; refuses transforms that it could not serve."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(f"moecompile::{operator} does not work under torch.func transforms; {ADVICE}")
    given = [tensor for tensor in tensors if tensor is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        raise NotImplementedError(f"moecompile::{operator} has no forward-mode derivative; {ADVICE}")
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)


def _are_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the dispatcher would go on to the operator's kernel: no mode, no subclass, nothing else that it minds.

    To ask it takes the host longer than some of a small call's kernels take. (Kernels that somebody else registers for
    `moecompile::experts` are not asked for either.)
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._dispatch_tls_is_dispatch_key_included(FUNCTIONALIZE):
        return False
    x = tensors[0]
    if not PLAIN.issuperset(map(type, tensors)) or x is None or x.is_nested or torch._is_functional_tensor(x):
        return False
    return not any(each.is_meta or each.is_neg() for each in tensors if each is not None)


def experts_forward(*args: Any, **attributes: Any) -> tuple[Tensor, Tensor]:
    """experts_forward above autograd: recorded where something requires grad."""
    if _differentiates(args):
        return _recorded(attributes, {}, args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecompile.experts_forward(*args, **attributes)


def experts(*args: Any, **attributes: Any) -> Tensor:
    """Experts above autograd: becomes experts_forward where something requires grad."""
    if _differentiates(args):
        return _recorded(attributes, _main(args, attributes, "experts"), args)[0]
    with torch._C._AutoDispatchBelowAutograd():
        run = kernels.experts if _are_plain(args) else torch.ops.moecompile.experts
        return run(*args, **attributes)


def _main(args: Sequence[Any], attributes: dict[str, Any], operator: str) -> Main:
    """The main gradients among the attributes, taken out and checked."""
    main = main_gradients.split(attributes)
    if main:
        main_gradients.check(Arguments(*args, **attributes), main, operator)
    return main


def _recorded(attributes: dict[str, Any], main: Main, args: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _Experts.apply(attributes, main, *args, *kernels.ABSENT[len(args) :])
    return found


def experts_backward(*args: Any, **attributes: Any) -> Parts:
    """experts_backward above autograd: gradients whose own derivative, if anyone takes it, is an error."""
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.moecompile.experts_backward(*args, **attributes)
    return list(_once(grads, args))


def experts_backward_adding(*args: Any, **attributes: Any) -> tuple[Tensor, ...]:
    """experts_backward_adding above autograd, as experts_backward is."""
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.moecompile.experts_backward_adding(*args, **attributes)
    return tuple(_once(grads, args))


def quantize_weights(*args: Any, **attributes: Any) -> Any:
    """quantize_weights above autograd: no gradient flows through it, and none is asked for by a transform."""
    _differentiates(args, "quantize_weights")
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecompile.quantize_weights(*args, **attributes)


def quantize(x: Tensor, **attributes: Any) -> Any:
    """Quantize above autograd, as quantize_weights is: what it is the quantised copy of gets the gradient."""
    _differentiates((x,), "quantize")
    with torch._C._AutoDispatchBelowAutograd():
        return _of_linear("quantize", (x,))(x, **attributes)


def quantize_gradient(grad: Tensor, **attributes: Any) -> Any:
    """quantize_gradient above autograd: gradients of gradients are refused where they would come from."""
    _differentiates((grad,), "quantize_gradient")
    with torch._C._AutoDispatchBelowAutograd():
        return _of_linear("quantize_gradient", (grad,))(grad, **attributes)


def along_tokens(values: Tensor, scales: Tensor, **attributes: Any) -> Any:
    """along_tokens above autograd: of numbers that nothing differentiates."""
    _differentiates((values, scales), "along_tokens")
    with torch._C._AutoDispatchBelowAutograd():
        return _of_linear("along_tokens", (values, scales))(values, scales, **attributes)


def _of_linear(operator: str, tensors: Sequence[Tensor | None]) -> Any:
    """What computes an operator of linear layers: its function, where the dispatcher would go on to nothing else."""
    return getattr(linear if _are_plain(tensors) else torch.ops.moecompile, operator)


def scaled_mm(*args: Any, **attributes: Any) -> Tensor:
    """scaled_mm above autograd: of numbers that nothing differentiates; `linear_fp8` is what has a derivative."""
    if _differentiates(args, "scaled_mm"):
        raise NotImplementedError("moecompile::scaled_mm has no derivative; moecompile::linear_fp8 has one")
    with torch._C._AutoDispatchBelowAutograd():
        return _of_linear("scaled_mm", args)(*args, **attributes)


def linear_fp8(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, scales: Tensor, quantized: Parts,
    **attributes: Any,
) -> Tensor:  # fmt: skip
    """linear_fp8 above autograd: recorded where something requires grad; below it is scaled_mm, as graphs show it."""
    chosen = {"scale_format": POWER_OF_TWO, **attributes}
    linear.check_linear(x, weight, bias, values, scales, quantized, **chosen)
    if _differentiates((x, weight, bias), LINEAR):
        result: Tensor = _LinearFp8.apply(attributes, _trace(x), x, weight, bias, values, scales, *quantized)
        return result
    with torch._C._AutoDispatchBelowAutograd():
        return _product(weight, bias, values, scales, quantized, attributes)


def _product(
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    scales: Tensor,
    quantized: Sequence[Tensor],
    attributes: Mapping[str, Any],
) -> Tensor:
    given, (_, chosen) = (values, scales, *quantized[:2], bias), _split(attributes)
    run = _of_linear("scaled_mm", given)
    found: Tensor = run(*given, out_features=weight.shape[0], dtype=weight.dtype, **chosen)
    return found


def _split(attributes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes of `linear_fp8` that are of its casts, and those of its products."""
    of_casts = {name: value for name, value in attributes.items() if name != "kernels"}
    return of_casts, {name: value for name, value in attributes.items() if name == "kernels"}


def experts_fp8_forward(*args: Any, quantized: Parts, **attributes: Any) -> tuple[Tensor, Parts]:
    """experts_fp8_forward above autograd: recorded where something requires grad."""
    if _differentiates(args, FP8):
        return _recorded_fp8(attributes, {}, quantized, False, args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecompile.experts_fp8_forward(*args, **attributes, quantized=quantized)


def experts_fp8(*args: Any, quantized: Parts, held: bool = False, **attributes: Any) -> Tensor:
    """experts_fp8 above autograd: becomes experts_fp8_forward where something requires grad."""
    if _differentiates(args, FP8):
        return _recorded_fp8(attributes, _main(args, attributes, FP8), quantized, held, args)[0]
    with torch._C._AutoDispatchBelowAutograd():
        run = fp8_experts.experts_fp8 if _are_plain((*args, *quantized)) else torch.ops.moecompile.experts_fp8
        return run(*args, **attributes, quantized=quantized)


def _recorded_fp8(
    attributes: dict[str, Any], main: Main, quantized: Parts, held: bool, args: Sequence[Tensor | None]
) -> tuple[Tensor, Parts]:
    x, absent = args[0], kernels.ABSENT[len(args) :]
    assert x is not None
    result, *saved = _ExpertsFp8.apply(attributes, main, quantized, held, _trace(x), *args, *absent)
    return result, saved


def experts_fp8_backward(grad: Tensor, saved: Parts, *args: Any, **attributes: Any) -> Parts:
    """experts_fp8_backward above autograd, as experts_backward is."""
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.moecompile.experts_fp8_backward(grad, saved, *args, **attributes)
    return list(_once(grads, (grad, *args), FP8))


def experts_fp8_backward_adding(grad: Tensor, saved: Parts, *args: Any, **attributes: Any) -> tuple[Tensor, ...]:
    """experts_fp8_backward_adding above autograd, as experts_backward is."""
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.moecompile.experts_fp8_backward_adding(grad, saved, *args, **attributes)
    return tuple(_once(grads, (grad, *args), FP8))


def _once(grads: Sequence[Tensor], args: Sequence[Tensor | None], operator: str = "experts") -> Sequence[Tensor]:
    """The gradients of these arguments, which refuse to be differentiated again."""
    return _refusing(grads, operator, args) if _differentiates(args, operator) else grads


class _Refused(torch.autograd.Function):
    """The first tensors as they are, made of all that are given, by what nobody can differentiate."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(each.detach() for each in tensors[:count] if each is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(ctx.message)


def _refusing(grads: Sequence[Tensor], operator: str, args: Sequence[Tensor | None]) -> Parts:
    """The gradients, as tensors whose derivative by any of these arguments, or by whatever else, is an error."""
    if not grads:
        return []
    message = f"moecompile::{operator} has no second derivative; {ADVICE}"
    return list(_Refused.apply(message, len(grads), *(grad.detach().requires_grad_() for grad in grads), *args))


def batched(*args: Any, **attributes: Any) -> Any:
    """Refuses torch.vmap, whose fallback would run the operator once for each element of the batch."""
    raise NotImplementedError(f"the operators of moecompile do not work under torch.vmap; {ADVICE}")
