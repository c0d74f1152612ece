"""The derivatives of `moecompile::experts` and `experts_fp8`, and what they refuse.

That is second derivatives, forward mode and torch.func. Quantised weights are constants: the gradient of the weights
they were made of comes from `experts_fp8`, which gets those too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moecompile.runtime.contract import DIFFERENTIABLE, TENSORS

Parts = list[Tensor]
ADVICE = "run the model without backend='moecompile' (or with MOECOMPILE_DISABLE=1) for it"
FP8 = "experts_fp8"


class _Experts(torch.autograd.Function):
    """experts_forward with experts_backward as its derivative; `hidden` is not differentiable."""

    @staticmethod
    def forward(ctx: Any, attributes: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            result, hidden = torch.ops.moecompile.experts_forward(*tensors, **attributes)
        ctx.attributes = attributes
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
        wanted = dict(zip(TENSORS, ctx.needs_input_grad[1:], strict=True))
        needs = [wanted[name] for name in DIFFERENTIABLE]
        found = iter(torch.ops.moecompile.experts_backward(grad, hidden, *tensors, **ctx.attributes, needs=needs))
        return (None, *(next(found) if wanted[name] and name in DIFFERENTIABLE else None for name in TENSORS))


class _ExpertsFp8(torch.autograd.Function):
    """experts_fp8_forward with experts_fp8_backward as its derivative; of x only the quantised copy is kept."""

    @staticmethod
    def forward(ctx: Any, attributes: dict[str, Any], quantized: Parts, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            found = torch.ops.moecompile.experts_fp8_forward(*tensors, **attributes, quantized=quantized)
        result, saved = found
        ctx.attributes, ctx.split = attributes, (len(saved), len(saved) + len(quantized))
        ctx.save_for_backward(*saved, *quantized, *tensors[1:])
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
        saved, quantized, tensors = list(kept[:first]), list(kept[first:second]), kept[second:]
        wanted = dict(zip(TENSORS, ctx.needs_input_grad[2:], strict=True))
        needs = [wanted[name] for name in DIFFERENTIABLE]
        found = torch.ops.moecompile.experts_fp8_backward(
            grad, saved, *tensors, **ctx.attributes, quantized=quantized, needs=needs
        )
        # x, which may be all that requires grad, is no argument of the backward
        parts = iter(_refusing(found, FP8) if torch.is_grad_enabled() else found)
        of_tensors = (next(parts) if wanted[name] and name in DIFFERENTIABLE else None for name in TENSORS)
        return None, None, *of_tensors


def _differentiates(tensors: Sequence[Tensor | None], operator: str = "experts") -> bool:
    """Whether autograd records a call with these arguments; refuses transforms that it could not serve."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(f"moecompile::{operator} does not work under torch.func transforms; {ADVICE}")
    given = [tensor for tensor in tensors if tensor is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        raise NotImplementedError(f"moecompile::{operator} has no forward-mode derivative; {ADVICE}")
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)


def experts_forward(*args: Any, **attributes: Any) -> tuple[Tensor, Tensor]:
    """experts_forward above autograd: recorded where something requires grad."""
    if _differentiates(args):
        return _Experts.apply(attributes, *args, *([None] * (len(TENSORS) - len(args))))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecompile.experts_forward(*args, **attributes)


def experts(*args: Any, **attributes: Any) -> Tensor:
    """Experts above autograd: becomes experts_forward where something requires grad."""
    if _differentiates(args):
        return experts_forward(*args, **attributes)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecompile.experts(*args, **attributes)


def experts_backward(*args: Any, **attributes: Any) -> Parts:
    """experts_backward above autograd: gradients whose own derivative, if anyone takes it, is an error."""
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.moecompile.experts_backward(*args, **attributes)
    return _once(grads, args)


def quantize_weights(*args: Any, **attributes: Any) -> Any:
    """quantize_weights above autograd: no gradient flows through it, and none is asked for by a transform."""
    _differentiates(args, "quantize_weights")
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecompile.quantize_weights(*args, **attributes)


def experts_fp8_forward(*args: Any, quantized: Parts, **attributes: Any) -> tuple[Tensor, Parts]:
    """experts_fp8_forward above autograd: recorded where something requires grad."""
    if _differentiates(args, FP8):
        tensors = (*args, *([None] * (len(TENSORS) - len(args))))
        result, *saved = _ExpertsFp8.apply(attributes, quantized, *tensors)
        return result, saved
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecompile.experts_fp8_forward(*args, **attributes, quantized=quantized)


def experts_fp8(*args: Any, **attributes: Any) -> Tensor:
    """experts_fp8 above autograd: becomes experts_fp8_forward where something requires grad."""
    if _differentiates(args, FP8):
        return experts_fp8_forward(*args, **attributes)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecompile.experts_fp8(*args, **attributes)


def experts_fp8_backward(grad: Tensor, saved: Parts, *args: Any, **attributes: Any) -> Parts:
    """experts_fp8_backward above autograd, as experts_backward is."""
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.moecompile.experts_fp8_backward(grad, saved, *args, **attributes)
    return _once(grads, (grad, *args), FP8)


def _once(grads: Parts, args: Sequence[Tensor | None], operator: str = "experts") -> Parts:
    """The gradients of these arguments, which refuse to be differentiated again."""
    return _refusing(grads, operator) if _differentiates(args, operator) else grads


def _refusing(grads: Sequence[Tensor], operator: str) -> Parts:
    """The gradients, as tensors that have a derivative, which is an error."""
    if not grads:
        return []
    message = f"moecompile::{operator} has no second derivative; {ADVICE}"
    refuse = torch._C._functions.DelayedError(message.encode(), len(grads))
    marked = refuse(*(grad.detach().requires_grad_() for grad in grads))
    return list(marked) if isinstance(marked, tuple) else [marked]


def batched(*args: Any, **attributes: Any) -> Any:
    """Refuses torch.vmap, whose fallback would run the operator once for each element of the batch."""
    raise NotImplementedError(f"the operators of moecompile do not work under torch.vmap; {ADVICE}")
