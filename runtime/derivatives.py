"""What derivatives of the operators have in common: when one is recorded, and what is refused.

That is second derivatives, forward mode, torch.func and torch.vmap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

ADVICE = "run the model without backend='moecompile' (or with MOECOMPILE_DISABLE=1) for it"
PLAIN = {Tensor, torch.nn.Parameter, type(None)}
FUNCTIONALIZE = torch._C.DispatchKey.Functionalize


class _Trace(torch.autograd.Function):
    """Nothing, made of a tensor: stands for it where it is not kept, so that who differentiates again comes by."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


def trace_of(x: Tensor) -> Tensor | None:
    """What stands for it; None if nobody differentiates it."""
    if not x.requires_grad:
        return None
    found: Tensor = _Trace.apply(x)
    return found


def differentiates(tensors: Sequence[Tensor | None], operator: str = "experts") -> bool:
    """Whether autograd records a call with these arguments; refuses transforms that it could not serve."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(f"moecompile::{operator} does not work under torch.func transforms; {ADVICE}")
    given = [tensor for tensor in tensors if tensor is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        raise NotImplementedError(f"moecompile::{operator} has no forward-mode derivative; {ADVICE}")
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)


def are_plain(tensors: Sequence[Tensor | None]) -> bool:
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


def once(grads: Sequence[Tensor], args: Sequence[Tensor | None], operator: str = "experts") -> Sequence[Tensor]:
    """The gradients of these arguments, which refuse to be differentiated again."""
    return refusing(grads, operator, args) if differentiates(args, operator) else grads


class _Refused(torch.autograd.Function):
    """The first tensors as they are, made of all that are given, by what nobody can differentiate."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(each.detach() for each in tensors[:count] if each is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(ctx.message)


def refusing(grads: Sequence[Tensor], operator: str, args: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients, as tensors whose derivative by any of these arguments, or by whatever else, is an error."""
    if not grads:
        return []
    message = f"moecompile::{operator} has no second derivative; {ADVICE}"
    return list(_Refused.apply(message, len(grads), *(grad.detach().requires_grad_() for grad in grads), *args))


def batched(*args: Any, **attributes: Any) -> Any:
    """Refuses torch.vmap, whose fallback would run the operator once for each element of the batch."""
    raise NotImplementedError(f"the operators of moecompile do not work under torch.vmap; {ADVICE}")
