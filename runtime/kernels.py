"""What the operators of `moecompile.runtime.operators` do below autograd: torch kernels and fake kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from moecompile.runtime import backward, main_gradients, reference
from moecompile.runtime.autocast import exact
from moecompile.runtime.contract import DIFFERENTIABLE, TENSORS, Arguments, check_plan
from moecompile.runtime.grouped import writing_out
from moecompile.runtime.remembered import CALLS

Parts = list[Tensor]
ABSENT = (None,) * len(TENSORS)
NO_MAIN: Mapping[str, Tensor] = MappingProxyType({})


def plan(expert_ids: Tensor, num_experts: int, *, room: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layout of `expert_ids`."""
    fused, given = _fused_on(expert_ids.device), (expert_ids,)
    sizes = {"num_experts": num_experts} | ({} if room is None else {"room": room})
    made = None if fused is None else CALLS.again("plan", given, sizes)
    if made is None:
        check_plan(expert_ids, num_experts, room)
        if fused is None or not fused.hopper_routing.takes_plan(num_experts):
            return reference.plan(expert_ids, num_experts, room)
        made = CALLS.first("plan", given, sizes, lambda: [*fused.hopper_routing.plan(expert_ids, num_experts, room)])
    counts, offsets, slots, order = made
    return counts, offsets, slots, order


def plan_shapes(expert_ids: Tensor, num_experts: int, room: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Shapes of counts, offsets, slots and order, all of int32; raises what `plan` raises for such arguments."""
    check_plan(expert_ids, num_experts, room)
    tokens, top_k = expert_ids.shape
    assignments = tokens * top_k
    return (
        (num_experts,),
        (num_experts,),
        (tokens, top_k),
        (assignments if room is None else torch.sym_min(room, assignments),),
    )


def fake_plan(
    expert_ids: Tensor, num_experts: int, *, room: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the layout."""
    shapes = plan_shapes(expert_ids, num_experts, room)
    counts, offsets, slots, order = (expert_ids.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return counts, offsets, slots, order


def experts(*args: Any, **attributes: Any) -> Tensor:
    """The result alone, for inference."""
    main_gradients.split(attributes)  # which nothing is added to
    x: Tensor = args[0]
    fused = _fused_on(x.device)
    if fused is not None:  # what is remembered has been checked
        known = CALLS.again("experts", args, attributes)
        if known is not None:
            return known[0]
    with exact(x):
        arguments = Arguments(*args, **attributes).check()
        if fused is None or not fused.takes(arguments):
            return reference.forward(arguments, save=False)[0]
        return CALLS.first("experts", args, attributes, lambda: [fused.forward(arguments, save=False)[0]])[0]


def experts_shape(*args: Any, **attributes: Any) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and dtype of the result; raises what `experts` raises for such arguments."""
    main = main_gradients.split(attributes)
    arguments = Arguments(*args, **attributes).check()
    main_gradients.check(arguments, main, "experts")
    return (arguments.x.shape[0], arguments.out_features), arguments.dtypes.result


def fake_experts(*args: Any, **attributes: Any) -> Tensor:
    """Shape and dtype of the result."""
    shape, dtype = experts_shape(*args, **attributes)
    x: Tensor = args[0]
    return x.new_empty(shape, dtype=dtype)


def experts_forward(*args: Any, **attributes: Any) -> tuple[Tensor, Tensor]:
    """The result and the rows that backward needs: none if it computes them again."""
    x: Tensor = args[0]
    fused = _fused_on(x.device)
    made = None if fused is None else CALLS.again("experts_forward", args, attributes)
    if made is None:
        with exact(x):
            arguments = Arguments(*args, **attributes).check()
            if fused is None or not fused.takes(arguments):
                return _saving(arguments, reference.forward(arguments, not arguments.recompute))
            made = CALLS.first(
                "experts_forward", args, attributes, lambda: [*_saving(arguments, fused.forward(arguments, save=True))]
            )
    result, hidden = made
    return result, hidden


def _saving(arguments: Arguments, made: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """The result and the rows of a forward that has them or not."""
    result, hidden = made
    return result, _no_rows(arguments) if hidden is None else hidden


def fake_experts_forward(*args: Any, **attributes: Any) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of the result and the saved rows."""
    arguments = Arguments(*args, **attributes)
    result = fake_experts(*args, **attributes)
    return result, arguments.x.new_empty((arguments.saved_rows, arguments.width), dtype=arguments.dtypes.hidden)


def experts_backward(*args: Any, **attributes: Any) -> Parts:
    """The needed gradients, in the order of DIFFERENTIABLE."""
    return _backward("experts_backward", *args, **attributes)


def experts_backward_adding(grad: Tensor, *args: Any, needs: Sequence[bool], **attributes: Any) -> tuple[Tensor, ...]:
    """The same; what there are main gradients for is added to these, and not needed."""
    found = _backward("experts_backward_adding", grad, *args, needs=needs, **attributes)
    return main_gradients.all_of(needs, found, grad)


def _backward(
    operator: str, grad: Tensor, hidden: Tensor, *args: Any, needs: Sequence[bool], **attributes: Any
) -> Parts:
    main = main_gradients.split(attributes)
    fused, decides = _fused_on(grad.device), attributes | {"needs": tuple(needs)}
    given = (grad, hidden, *args, *ABSENT[len(args) :], *map(main.get, main_gradients.MATRICES))
    known = None if fused is None else CALLS.again(operator, given, decides)
    if known is not None:
        return known
    arguments = Arguments(*args, **attributes).check()
    names = needed(arguments, needs, operator, main)
    arguments.check_backward(grad, hidden)
    main_gradients.check(arguments, main, operator)
    with exact(grad):
        again, of, serves = reference.hidden_rows, backward.experts_backward, False
        if fused is not None and fused.takes(arguments):
            again, of, serves = fused.hidden_rows, fused.backward, True
        added, others = main_gradients.divided(main) if serves else ({}, main)

        def run() -> Parts:
            rows = again(arguments) if arguments.recompute else hidden
            grads = of(arguments, grad, rows, frozenset((*names, *others)), **({"main": added} if added else {}))
            main_gradients.add(others, grads)
            return [grads[name] for name in names]

        return CALLS.first(operator, given, decides, run) if serves else run()


def fake_experts_backward(*args: Any, **attributes: Any) -> Parts:
    """Shapes, dtypes and strides of the needed gradients."""
    return _fake_backward("experts_backward", *args, **attributes)


def fake_experts_backward_adding(
    grad: Tensor, *args: Any, needs: Sequence[bool], **attributes: Any
) -> tuple[Tensor, ...]:
    """The same."""
    found = _fake_backward("experts_backward_adding", grad, *args, needs=needs, **attributes)
    return main_gradients.all_of(needs, found, grad)


def _fake_backward(
    operator: str, grad: Tensor, hidden: Tensor, *args: Any, needs: Sequence[bool], **attributes: Any
) -> Parts:
    main = main_gradients.split(attributes)
    arguments = Arguments(*args, **attributes).check()
    names = needed(arguments, needs, operator, main)
    arguments.check_backward(grad, hidden)
    main_gradients.check(arguments, main, operator)
    like = [getattr(arguments, name) for name in names]
    return [
        tensor.new_empty(tensor.shape) if name in ("x", "weights") else torch.empty_like(tensor)
        for name, tensor in zip(names, like, strict=True)
    ]


def _no_rows(arguments: Arguments) -> Tensor:
    return arguments.x.new_empty((0, arguments.width), dtype=arguments.dtypes.hidden)


def _fused_on(device: torch.device) -> ModuleType | None:
    """The module of the fused kernels, if they run on that device."""
    return None if writing_out.get() else _fused_module(device)


@functools.cache
def _fused_module(device: torch.device) -> ModuleType | None:
    if device.type != "cuda":
        return None
    from moecompile.runtime import hopper, hopper_experts

    return hopper_experts if hopper.serves(device) else None


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """Within, the operators' torch kernels can be traced: nothing they do depends on the routing."""
    token = writing_out.set(True)
    try:
        yield
    finally:
        writing_out.reset(token)


def needed(
    arguments: Arguments,
    needs: Sequence[bool],
    operator: str = "experts_backward",
    main: Mapping[str, Tensor] = NO_MAIN,
) -> list[str]:
    """Names of the arguments whose gradient is needed, in their order; raises ValueError if there is none to have."""
    if len(needs) != len(DIFFERENTIABLE):
        words = f"one bool for each of ({', '.join(DIFFERENTIABLE)})"
        raise ValueError(f"moecompile::{operator}: needs must hold {words}, got {len(needs)}")
    names = [name for name, needed in zip(DIFFERENTIABLE, needs, strict=True) if needed]
    for name in names:
        if getattr(arguments, name) is None:
            raise ValueError(f"moecompile::{operator}: needs asks for the gradient of {name}, which is None")
        if name in main:
            raise ValueError(f"moecompile::{operator}: needs asks for the gradient of {name}, which is to be added")
    return names
