"""The operators of the namespace `moecompile`: schemas, fake kernels, torch kernels and autograd.

    plan(expert_ids, num_experts) -> (counts, offsets, slots, order)
    experts(x, weights, offsets, slots, order, w_in, w_out, w_up, b_in, b_up, b_out, ...) -> result
    experts_forward(the same) -> (result, hidden)
    experts_backward(grad, hidden, the same, needs) -> the needed gradients

`experts` differentiates through `experts_forward` and `experts_backward`, so that AOTAutograd's graphs hold `experts`
in inference and the other two in training.

Shapes, for T tokens of H features, K experts a token, E experts of inner size I, results of H2 features:

    expert_ids (T, K) any integer dtype; -1 means no expert, any other id outside [0, E) is an error
    counts (E,) int32     rows of each expert
    offsets (E,) int32    the end of each expert's rows
    slots (T, K) int32    the row of an assignment in expert order, -1 if it has no expert
    order (T*K,) int32    the assignment t*K+k of each row, -1 beyond offsets[-1]; stable, so token-major in an expert
    x (T, H); weights (T, K) or None
    w_in (E, N, H), or (E, H, N) if w_in_transposed; w_up like w_in, only for gate_up="separate"
    w_out (E, H2, I), or (E, I, H2) if w_out_transposed
    b_in (E, N), b_up (E, I), b_out (E, H2)
    gate_up: "halves" (N = 2I, gate first), "interleaved" (N = 2I, gate at even features), "separate" (N = I, w_up
        holds the other), "single" (N = I, no gate)
    result (T, H2) in out_dtype, or in the dtype of the output expression's value
    hidden (T*K, N), or (T*K, 2I) for "separate": GEMM1's rows with bias, 0 beyond offsets[-1]
    needs: bools for (x, weights, w_in, w_out, w_up, b_in, b_up, b_out)

`input`, `activation` and `output` are expressions (`moecompile.codegen.expression`) of the leaves x; gate and up, or
hidden; out; and, in each, weight. Wrong shapes raise ValueError, wrong dtypes TypeError, wrong ids IndexError on the
CPU and a device-side assertion elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moecompile.runtime import backward, reference
from moecompile.runtime.contract import DIFFERENTIABLE, Arguments, check_plan

ARGUMENTS = (
    "Tensor x, Tensor? weights, Tensor offsets, Tensor slots, Tensor order, Tensor w_in, Tensor w_out, "
    "Tensor? w_up=None, Tensor? b_in=None, Tensor? b_up=None, Tensor? b_out=None, *, str activation, str gate_up, "
    'str input="x", str output="mul(out, weight)", bool w_in_transposed=False, bool w_out_transposed=False, '
    "ScalarType? out_dtype=None"
)
TENSORS = ("x", "weights", "offsets", "slots", "order", "w_in", "w_out", "w_up", "b_in", "b_up", "b_out")
Parts = list[Tensor]
SCHEMAS = (
    "plan(Tensor expert_ids, int num_experts) -> (Tensor counts, Tensor offsets, Tensor slots, Tensor order)",
    f"experts({ARGUMENTS}) -> Tensor",
    f"experts_forward({ARGUMENTS}) -> (Tensor out, Tensor hidden)",
    f"experts_backward(Tensor grad, Tensor hidden, {ARGUMENTS}, bool[] needs) -> Tensor[]",
)


def _plan(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_plan(expert_ids, num_experts)
    return reference.plan(expert_ids, num_experts)


def _fake_plan(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_plan(expert_ids, num_experts)
    tokens, top_k = expert_ids.shape
    shapes = ((num_experts,), (num_experts,), (tokens, top_k), (tokens * top_k,))
    counts, offsets, slots, order = (expert_ids.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return counts, offsets, slots, order


def _experts(*args: Any, **attributes: Any) -> Tensor:
    with _exact(args[0]):
        return reference.experts(Arguments(*args, **attributes).check())


def _fake_experts(*args: Any, **attributes: Any) -> Tensor:
    arguments = Arguments(*args, **attributes).check()
    shape = (arguments.x.shape[0], arguments.out_features)
    return arguments.x.new_empty(shape, dtype=arguments.dtypes.result)


def _experts_forward(*args: Any, **attributes: Any) -> tuple[Tensor, Tensor]:
    with _exact(args[0]):
        return reference.experts_forward(Arguments(*args, **attributes).check())


def _fake_experts_forward(*args: Any, **attributes: Any) -> tuple[Tensor, Tensor]:
    arguments = Arguments(*args, **attributes)
    result = _fake_experts(*args, **attributes)
    return result, arguments.x.new_empty((arguments.rows, arguments.width), dtype=arguments.dtypes.hidden)


def _experts_backward(grad: Tensor, hidden: Tensor, *args: Any, needs: Sequence[bool], **attributes: Any) -> Parts:
    arguments = Arguments(*args, **attributes).check()
    names = _needed(arguments, needs)
    arguments.check_backward(grad, hidden)
    with _exact(grad):
        grads = backward.experts_backward(arguments, grad, hidden, names)
    return [grads[name] for name in names]


def _fake_experts_backward(grad: Tensor, hidden: Tensor, *args: Any, needs: Sequence[bool], **attributes: Any) -> Parts:
    arguments = Arguments(*args, **attributes).check()
    names = _needed(arguments, needs)
    arguments.check_backward(grad, hidden)
    like = [getattr(arguments, name) for name in names]
    return [
        tensor.new_empty(tensor.shape) if name in ("x", "weights") else torch.empty_like(tensor)
        for name, tensor in zip(names, like, strict=True)
    ]


def _needed(arguments: Arguments, needs: Sequence[bool]) -> list[str]:
    """Names of the arguments whose gradient is needed, in their order."""
    if len(needs) != len(DIFFERENTIABLE):
        words = f"one bool for each of ({', '.join(DIFFERENTIABLE)})"
        raise ValueError(f"moecompile::experts_backward: needs must hold {words}, got {len(needs)}")
    names = [name for name, needed in zip(DIFFERENTIABLE, needs, strict=True) if needed]
    for name in names:
        if getattr(arguments, name) is None:
            raise ValueError(f"moecompile::experts_backward: needs asks for the gradient of {name}, which is None")
    return names


def _exact(tensor: Tensor) -> AbstractContextManager[object]:
    """Runs what is inside in the dtypes that the operator was given, whatever autocast surrounds it."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


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


_ADVICE = "run the model without backend='moecompile' (or with MOECOMPILE_DISABLE=1) for it"


def _differentiates(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records a call with these arguments; refuses transforms that it could not serve."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(f"moecompile::experts does not work under torch.func transforms; {_ADVICE}")
    given = [tensor for tensor in tensors if tensor is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        raise NotImplementedError(f"moecompile::experts has no forward-mode derivative; {_ADVICE}")
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)


def _autograd_experts_forward(*args: Any, **attributes: Any) -> tuple[Tensor, Tensor]:
    if _differentiates(args):
        return _Experts.apply(attributes, *args, *([None] * (len(TENSORS) - len(args))))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecompile.experts_forward(*args, **attributes)


def _autograd_experts(*args: Any, **attributes: Any) -> Tensor:
    if _differentiates(args):
        return _autograd_experts_forward(*args, **attributes)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moecompile.experts(*args, **attributes)


def _autograd_experts_backward(*args: Any, **attributes: Any) -> Parts:
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.moecompile.experts_backward(*args, **attributes)
    if not _differentiates(args) or not grads:
        return grads
    message = f"moecompile::experts has no second derivative; {_ADVICE}"
    refuse = torch._C._functions.DelayedError(message.encode(), len(grads))
    marked = refuse(*(grad.detach().requires_grad_() for grad in grads))
    return list(marked) if isinstance(marked, tuple) else [marked]


def _batched(*args: Any, **attributes: Any) -> Any:
    raise NotImplementedError(f"the operators of moecompile do not work under torch.vmap; {_ADVICE}")


library = torch.library.Library("moecompile", "DEF")
for _schema in SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name, _kernel, _fake in (
    ("plan", _plan, _fake_plan),
    ("experts", _experts, _fake_experts),
    ("experts_forward", _experts_forward, _fake_experts_forward),
    ("experts_backward", _experts_backward, _fake_experts_backward),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    library.impl(_name, _batched, "FuncTorchBatched")
    torch.library.register_fake(f"moecompile::{_name}", _fake, lib=library)
library.impl("experts", _autograd_experts, "Autograd")
library.impl("experts_forward", _autograd_experts_forward, "Autograd")
library.impl("experts_backward", _autograd_experts_backward, "Autograd")
