"""The derivatives of `moecompile::experts` and `experts_fp8`.

Quantised weights are constants: the gradient of the weights they were made of comes from `experts_fp8`, which gets
those too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moecompile.runtime import fp8_experts, kernels, main_gradients
from moecompile.runtime.contract import DIFFERENTIABLE, TENSORS, Arguments
from moecompile.runtime.derivatives import are_plain, differentiates, once, refusing, trace_of
from moecompile.runtime.fp8_contract import NOTHING, check_fp8, kept_copies

Parts = list[Tensor]
Main = Mapping[str, Tensor]
FP8 = "experts_fp8"


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
        wanted, main = wanted_of(ctx.needs_input_grad[2:], ctx.main)
        needs, ops = [wanted[name] for name in DIFFERENTIABLE], torch.ops.moecompile
        operator = ops.experts_backward_adding if main else ops.experts_backward
        given = operator(grad, hidden, *tensors, **ctx.attributes, needs=needs, **main_gradients.keywords(main))
        found = needed(given, needs, main)
        return (None, None, *(next(found) if wanted[name] and name in DIFFERENTIABLE else None for name in TENSORS))


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
        wanted, main = wanted_of(ctx.needs_input_grad[5:], ctx.main)
        needs, ops = [wanted[name] for name in DIFFERENTIABLE], torch.ops.moecompile
        if ctx.quantises:
            quantized[:2] = of_gemm1(tensors[4], tensors[6], ctx.attributes)
        operator = ops.experts_fp8_backward_adding if main else ops.experts_fp8_backward
        keywords = {"quantized": quantized, "needs": needs, **main_gradients.keywords(main)}
        found = [*needed(operator(grad, saved, *tensors, **ctx.attributes, **keywords), needs, main)]
        parts = iter(refusing(found, FP8, (grad, trace, *tensors)) if torch.is_grad_enabled() else found)
        of_tensors = (next(parts) if wanted[name] and name in DIFFERENTIABLE else None for name in TENSORS)
        return None, None, None, None, None, *of_tensors


def of_gemm1(w_in: Tensor | None, w_up: Tensor | None, attributes: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """GEMM1's matrices, quantised as they lie."""
    layout = {"gate_up": attributes["gate_up"], "transposed": attributes.get("w_in_transposed", False)}
    if "scale_format" in attributes:
        layout["scale_format"] = attributes["scale_format"]
    with torch._C._AutoDispatchBelowAutograd():
        found = torch.ops.moecompile.quantize_weights(w_in, w_up, **layout, backward=False)
    values, scales, *_ = found
    return values, scales


def wanted_of(needs: Sequence[bool], main: Main) -> tuple[dict[str, bool], dict[str, Tensor]]:
    """Of which tensors gradients are returned, and the main gradients of those whose are not."""
    wanted = dict(zip(TENSORS, needs, strict=True))
    added = {name: each for name, each in main.items() if wanted[name]}
    return wanted | dict.fromkeys(added, False), added


def needed(found: Sequence[Tensor], needs: Sequence[bool], main: Main) -> Iterator[Tensor]:
    """The needed gradients of what a backward gives: these, or where it adds to main gradients, all."""
    return (each for each, needed in zip(found, needs, strict=True) if needed) if main else iter(found)


def experts_forward(*args: Any, **attributes: Any) -> tuple[Tensor, Tensor]:
    """experts_forward above autograd: recorded where something requires grad."""
    if differentiates(args):
        return _recorded(attributes, {}, args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecompile.experts_forward(*args, **attributes)


def experts(*args: Any, **attributes: Any) -> Tensor:
    """Experts above autograd: becomes experts_forward where something requires grad."""
    if differentiates(args):
        return _recorded(attributes, _main(args, attributes, "experts"), args)[0]
    with torch._C._AutoDispatchBelowAutograd():
        run = kernels.experts if are_plain(args) else torch.ops.moecompile.experts
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
    return list(once(grads, args))


def experts_backward_adding(*args: Any, **attributes: Any) -> tuple[Tensor, ...]:
    """experts_backward_adding above autograd, as experts_backward is."""
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.moecompile.experts_backward_adding(*args, **attributes)
    return tuple(once(grads, args))


def quantize_weights(*args: Any, **attributes: Any) -> Any:
    """quantize_weights above autograd: no gradient flows through it, and none is asked for by a transform."""
    differentiates(args, "quantize_weights")
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecompile.quantize_weights(*args, **attributes)


def experts_fp8_forward(*args: Any, quantized: Parts, **attributes: Any) -> tuple[Tensor, Parts]:
    """experts_fp8_forward above autograd: recorded where something requires grad."""
    if differentiates(args, FP8):
        return _recorded_fp8(attributes, {}, quantized, False, args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecompile.experts_fp8_forward(*args, **attributes, quantized=quantized)


def experts_fp8(*args: Any, quantized: Parts, held: bool = False, **attributes: Any) -> Tensor:
    """experts_fp8 above autograd: becomes experts_fp8_forward where something requires grad."""
    if differentiates(args, FP8):
        return _recorded_fp8(attributes, _main(args, attributes, FP8), quantized, held, args)[0]
    with torch._C._AutoDispatchBelowAutograd():
        run = fp8_experts.experts_fp8 if are_plain((*args, *quantized)) else torch.ops.moecompile.experts_fp8
        return run(*args, **attributes, quantized=quantized)


def _recorded_fp8(
    attributes: dict[str, Any], main: Main, quantized: Parts, held: bool, args: Sequence[Tensor | None]
) -> tuple[Tensor, Parts]:
    x, absent = args[0], kernels.ABSENT[len(args) :]
    assert x is not None
    result, *saved = _ExpertsFp8.apply(attributes, main, quantized, held, trace_of(x), *args, *absent)
    return result, saved


def experts_fp8_backward(grad: Tensor, saved: Parts, *args: Any, **attributes: Any) -> Parts:
    """experts_fp8_backward above autograd, as experts_backward is."""
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.moecompile.experts_fp8_backward(grad, saved, *args, **attributes)
    return list(once(grads, (grad, *args), FP8))


def experts_fp8_backward_adding(grad: Tensor, saved: Parts, *args: Any, **attributes: Any) -> tuple[Tensor, ...]:
    """experts_fp8_backward_adding above autograd, as experts_backward is."""
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.moecompile.experts_fp8_backward_adding(grad, saved, *args, **attributes)
    return tuple(once(grads, (grad, *args), FP8))
