"""The derivative of `moecompile::exchanged_experts`: of experts between ranks, dispatch and combine included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moecompile.runtime import exchanged, main_gradients
from moecompile.runtime.autograd import Main, Parts, needed, of_gemm1, wanted_of
from moecompile.runtime.contract import DIFFERENTIABLE, Arguments
from moecompile.runtime.derivatives import are_plain, differentiates, once, refusing, trace_of
from moecompile.runtime.exchanged_contract import OF_EXPERTS, Experts, without
from moecompile.runtime.fp8_contract import NOTHING, check_fp8, kept_copies

OPERATOR = "exchanged_experts"
X, WEIGHTS, MATRICES = 0, 2, slice(5, None)
"""Where x, the routing weights and the experts' matrices are among the operator's tensors; 3 and 4 are the plan."""


class _Exchanged(torch.autograd.Function):
    """exchanged_experts_forward, with exchanged_experts_backward as its derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        attributes: dict[str, Any],
        main: Main,
        quantized: Parts,
        held: bool,
        trace: Tensor | None,
        of_weights: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        _check_copies(tensors, attributes, quantized)
        with torch._C._AutoDispatchBelowAutograd():
            result, saved = torch.ops.moecompile.exchanged_experts_forward(*tensors, **attributes, quantized=quantized)
        again = attributes.get("recompute", False)
        copies = kept_copies(quantized, first=again and held) if quantized else []
        ctx.attributes, ctx.main, ctx.split = attributes, main, (len(saved), len(saved) + len(copies))
        ctx.quantises = bool(quantized) and again and not held
        x = tensors[X] if attributes.get("again", False) else None
        ctx.save_for_backward(*saved, *copies, trace, of_weights, x, *tensors[WEIGHTS + 1 :])
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
        saved, quantized = list(kept[:first]), list(kept[first:second])
        trace, of_weights, *tensors = kept[second:]
        _, _, _, *matrices = tensors
        x, _, weights, _, _, *asked = ctx.needs_input_grad[6:]
        # as of `experts`, whose plan has no gradient
        wanted, main = wanted_of((x, weights, False, False, False, *asked), ctx.main)
        needs, ops = [wanted[name] for name in DIFFERENTIABLE], torch.ops.moecompile
        if ctx.quantises:
            quantized[:2] = of_gemm1(matrices[0], matrices[2], ctx.attributes)
        operator = ops.exchanged_experts_backward_adding if main else ops.exchanged_experts_backward
        keywords = {"quantized": quantized, "needs": needs, **main_gradients.keywords(main)}
        found = [*needed(operator(grad, saved, *tensors, **ctx.attributes, **keywords), needs, main)]
        given = grad, trace, of_weights, *tensors
        parts = iter(refusing(found, OPERATOR, given) if torch.is_grad_enabled() else found)
        of = {name: next(parts) if wanted[name] else None for name in DIFFERENTIABLE}
        of_matrices = (of[name] for name in DIFFERENTIABLE[2:])
        return *(None,) * 6, of["x"], None, of["weights"], None, None, *of_matrices


def _check_copies(tensors: Sequence[Tensor | None], attributes: dict[str, Any], quantized: Parts) -> None:
    """Raises ValueError where there are no transposed copies, which the backward reads."""
    if not any(each.shape == NOTHING for each in quantized[2::4]):
        return
    check_fp8(_sized(tensors, attributes), quantized, backward=True)


def _sized(tensors: Sequence[Any], attributes: dict[str, Any]) -> Arguments:
    """The record of the experts on the tokens that are here."""
    x, expert_ids, weights, *_ = tensors
    return Experts.of(tensors[MATRICES], **without(attributes, ("again",))).sized(x, weights, expert_ids)


def exchanged_experts(*args: Any, quantized: Parts, held: bool = False, **attributes: Any) -> Tensor:
    """The operator above autograd: becomes exchanged_experts_forward where something requires grad."""
    if differentiates(args, OPERATOR):
        main = main_gradients.split(attributes)
        if main:
            main_gradients.check(_sized(args, attributes), main, OPERATOR)
        return _recorded(attributes, main, quantized, held, args)[0]
    with torch._C._AutoDispatchBelowAutograd():
        run = exchanged.exchanged_experts if are_plain((*args, *quantized)) else torch.ops.moecompile.exchanged_experts
        found: Tensor = run(*args, **attributes, quantized=quantized)
    return found


def exchanged_experts_forward(*args: Any, quantized: Parts, **attributes: Any) -> tuple[Tensor, Parts]:
    """exchanged_experts_forward above autograd: recorded where something requires grad."""
    if differentiates(args, OPERATOR):
        return _recorded(attributes, {}, quantized, False, args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecompile.exchanged_experts_forward(*args, **attributes, quantized=quantized)


def _recorded(
    attributes: dict[str, Any], main: Main, quantized: Parts, held: bool, args: Sequence[Any]
) -> tuple[Tensor, Parts]:
    absent = (None,) * (MATRICES.start + OF_EXPERTS - len(args))
    weights = args[WEIGHTS]
    traces = trace_of(args[X]), None if weights is None else trace_of(weights)
    result, *saved = _Exchanged.apply(attributes, main, quantized, held, *traces, *args, *absent)
    return result, saved


def exchanged_experts_backward(grad: Tensor, saved: Parts, *args: Any, **attributes: Any) -> Parts:
    """exchanged_experts_backward above autograd: gradients whose own derivative, if anyone takes it, is an error."""
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.moecompile.exchanged_experts_backward(grad, saved, *args, **attributes)
    return list(once(grads, (grad, *args), OPERATOR))


def exchanged_experts_backward_adding(grad: Tensor, saved: Parts, *args: Any, **attributes: Any) -> tuple[Tensor, ...]:
    """exchanged_experts_backward_adding above autograd, likewise."""
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.moecompile.exchanged_experts_backward_adding(grad, saved, *args, **attributes)
    return tuple(once(grads, (grad, *args), OPERATOR))
