"""The derivatives of the token exchange and of gathered experts: each the reverse, in flight while others compute.

The derivative of a wait is the reverse's start, that of a start the reverse's wait, which is given what was sent, too.
The gradient of a handle is what is in flight, with collectives, or else what was sent; that of a token is a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moecompile.runtime.derivatives import differentiates
from moecompile.runtime.exchange import by_kernels

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
        rows, _, weights, token = grads
        handles = rows, weights if ctx.weighted else rows.new_empty(0), token
        given = rows, weights if ctx.weighted else None
        x, of_weights = torch.ops.moecompile.combine_wait(*handles, *given, *ctx.saved_tensors, **ctx.attributes)
        return None, x, None, of_weights if ctx.weighted else None, None, None


class _DispatchWait(torch.autograd.Function):
    """Its derivative begins to send the gradients of rows and of weights back."""

    @staticmethod
    def forward(ctx: Any, attributes: Attributes, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        *_, given, sent, home = tensors
        ctx.attributes = {name: value for name, value in attributes.items() if name != "num_experts"}
        ctx.weighted = given is not None
        with torch._C._AutoDispatchBelowAutograd():
            found: tuple[Tensor, ...] = torch.ops.moecompile.dispatch_wait(*tensors, **attributes)
        *_, came = found
        ctx.save_for_backward(came, sent, home)
        ctx.mark_non_differentiable(*_without_gradient(found[:3], ctx.weighted), came)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Found:
        rows, _, weights, _ = grads
        given = weights if ctx.weighted else None
        back, of_weights, token = torch.ops.moecompile.combine_start(rows, given, *ctx.saved_tensors, **ctx.attributes)
        if _by_kernels(rows, given, ctx.attributes):
            back, of_weights = rows, weights
        return None, back, None, of_weights if ctx.weighted else None, token, *[None] * 5


class _CombineStart(torch.autograd.Function):
    """Its derivative waits for the gradients of the rows that were sent back."""

    @staticmethod
    def forward(ctx: Any, attributes: Attributes, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        *_, sent, home = tensors
        ctx.attributes = attributes
        ctx.save_for_backward(sent, home)
        with torch._C._AutoDispatchBelowAutograd():
            rows, others, token = torch.ops.moecompile.combine_start(*tensors, **attributes)
        ctx.mark_non_differentiable(others)
        return rows, others, token

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Found:
        rows, _, token = grads
        nothing = rows.new_empty(0)
        attributes = {**ctx.attributes, "num_experts": ctx.attributes["ranks"]}  # of none
        handles, given = (rows, nothing.to(torch.int32), nothing, token), (rows, None, None)
        back, *_ = torch.ops.moecompile.dispatch_wait(*handles, *given, *ctx.saved_tensors, **attributes)
        return None, back, None, None, None, None


class _CombineWait(torch.autograd.Function):
    """Its derivative begins to send the gradients of tokens to the ranks of their experts."""

    @staticmethod
    def forward(ctx: Any, attributes: Attributes, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        *_, sent, home = tensors
        ctx.attributes = attributes
        ctx.save_for_backward(sent, home)
        with torch._C._AutoDispatchBelowAutograd():
            result, others = torch.ops.moecompile.combine_wait(*tensors, **attributes)
        ctx.mark_non_differentiable(others)
        return result, others

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Found:
        grad, _ = grads
        rows, _, _, token = torch.ops.moecompile.dispatch_start(grad, None, None, *ctx.saved_tensors, **ctx.attributes)
        return None, grad if _by_kernels(grad, None, ctx.attributes) else rows, None, token, *[None] * 4


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


def _by_kernels(rows: Tensor, weights: Tensor | None, attributes: Attributes) -> bool:
    """Whether the wait is to read what is sent, and not what its start gave. That is then the handle's gradient."""
    return by_kernels(rows, None, weights, attributes["ranks"], attributes["group"])


def _without_gradient(found: tuple[Tensor, ...], weighted: bool) -> tuple[Tensor, ...]:
    """Of a dispatch's results: the ids, and weights that are not there."""
    return found[1:2] if weighted else found[1:3]


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
