"""The derivatives of the token exchange and of gathered experts: each the reverse, in flight while others compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moecompile.runtime.derivatives import differentiates

Attributes = dict[str, Any]
Found = tuple[Tensor | None, ...]


class _DispatchStart(torch.autograd.Function):
    """Its derivative waits for the sums of the gradients of rows and of weights."""

    @staticmethod
    def forward(ctx: Any, attributes: Attributes, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        *_, weights, sent, home = tensors
        ctx.attributes, ctx.weighted = attributes, weights is not None
        ctx.save_for_backward(sent, home)
        with torch._C._AutoDispatchBelowAutograd():
            found: tuple[Tensor, ...] = torch.ops.moecompile.dispatch_start(*tensors, **attributes)
        ctx.mark_non_differentiable(*_without_gradient(found, ctx.weighted))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Found:
        rows, _, weights = grads
        given = weights if ctx.weighted else rows.new_empty(0)
        x, of_weights = torch.ops.moecompile.combine_wait(rows, given, *ctx.saved_tensors, **ctx.attributes)
        return None, x, None, of_weights if ctx.weighted else None, None, None


class _DispatchWait(torch.autograd.Function):
    """Its derivative begins to send the gradients of rows and of weights back."""

    @staticmethod
    def forward(ctx: Any, attributes: Attributes, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.attributes = {name: value for name, value in attributes.items() if name != "num_experts"}
        ctx.weighted = tensors[2].dim() == 2
        with torch._C._AutoDispatchBelowAutograd():
            found: tuple[Tensor, ...] = torch.ops.moecompile.dispatch_wait(*tensors, **attributes)
        *_, came = found
        ctx.save_for_backward(came)
        ctx.mark_non_differentiable(*_without_gradient(found[:3], ctx.weighted), came)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Found:
        rows, _, weights, _ = grads
        given, (came,) = weights if ctx.weighted else None, ctx.saved_tensors
        back, of_weights = torch.ops.moecompile.combine_start(rows, given, came, **ctx.attributes)
        return None, back, None, of_weights if ctx.weighted else None


class _CombineStart(torch.autograd.Function):
    """Its derivative waits for the gradients of the rows that were sent back."""

    @staticmethod
    def forward(
        ctx: Any, attributes: Attributes, y: Tensor, weights: Tensor | None, came: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.attributes = attributes
        with torch._C._AutoDispatchBelowAutograd():
            rows, others = torch.ops.moecompile.combine_start(y, weights, came, **attributes)
        ctx.mark_non_differentiable(others)
        return rows, others

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Found:
        rows, _ = grads
        nothing = rows.new_empty(0)
        attributes = {**ctx.attributes, "num_experts": ctx.attributes["ranks"]}  # of none
        back, *_ = torch.ops.moecompile.dispatch_wait(rows, nothing.to(torch.int32), nothing, **attributes)
        return None, back, None, None


class _CombineWait(torch.autograd.Function):
    """Its derivative begins to send the gradients of tokens to the ranks of their experts."""

    @staticmethod
    def forward(ctx: Any, attributes: Attributes, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.attributes = attributes
        ctx.save_for_backward(*tensors[2:])
        with torch._C._AutoDispatchBelowAutograd():
            result, others = torch.ops.moecompile.combine_wait(*tensors, **attributes)
        ctx.mark_non_differentiable(others)
        return result, others

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Found:
        grad, _ = grads
        rows, _, _ = torch.ops.moecompile.dispatch_start(grad, None, None, *ctx.saved_tensors, **ctx.attributes)
        return None, rows, None, None, None


class _Linear(torch.autograd.Function):
    """An operator of one tensor, whose derivative is another, linear one: so it may be differentiated twice."""

    @staticmethod
    def forward(
        ctx: Any, operator: str, reverse: Callable[..., Tensor], attributes: Attributes, given: Tensor
    ) -> Tensor:
        ctx.reverse, ctx.attributes = reverse, attributes
        with torch._C._AutoDispatchBelowAutograd():
            found: Tensor = getattr(torch.ops.moecompile, operator)(given, **attributes)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Found:
        return None, None, None, ctx.reverse(grads[0], **ctx.attributes)


def _gathered(grad: Tensor, **attributes: Any) -> Tensor:
    """The derivative of `scatter_gradient`."""
    whole: Tensor = torch.ops.moecompile.gather_experts(grad, **attributes)
    return whole / attributes["ranks"] if attributes["mean"] else whole


class _MeanGradient(torch.autograd.Function):
    """The same tensor, whose gradient is divided."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Found:
        return grads[0] / ctx.ranks, None


def mean_gradient(local: Tensor, *, ranks: int) -> Tensor:
    """The tensor itself; of its gradient, a sum over all ranks' tokens, the mean over the ranks."""
    found: Tensor = _MeanGradient.apply(local, ranks)
    return found


def _without_gradient(found: tuple[Tensor, ...], weighted: bool) -> tuple[Tensor, ...]:
    """Of a dispatch's results: the ids, and weights that are not there."""
    return found[1:2] if weighted else found[1:]


def _above(operator: str, record: Callable[..., Any]) -> Callable[..., Any]:
    """The operator above autograd: recorded where something requires grad."""

    def call(*tensors: Tensor | None, **attributes: Any) -> Any:
        if differentiates(tensors, operator):
            return record(attributes, *tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.moecompile, operator)(*tensors, **attributes)

    return call


def _linear(operator: str, reverse: Callable[..., Tensor]) -> Callable[..., Any]:
    """The same of a linear operator."""
    return _above(operator, functools.partial(_Linear.apply, operator, reverse))


dispatch_start = _above("dispatch_start", _DispatchStart.apply)
dispatch_wait = _above("dispatch_wait", _DispatchWait.apply)
combine_start = _above("combine_start", _CombineStart.apply)
combine_wait = _above("combine_wait", _CombineWait.apply)
gather_experts = _linear("gather_experts", torch.ops.moecompile.scatter_gradient)
scatter_gradient = _linear("scatter_gradient", _gathered)
own_experts = _linear("own_experts", torch.ops.moecompile.among_others)
among_others = _linear("among_others", torch.ops.moecompile.own_experts)
