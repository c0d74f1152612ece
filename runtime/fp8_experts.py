"""What the FP8 operators of `moecompile.runtime.operators` do below autograd: torch kernels and fake kernels.

On a Hopper GPU `moecompile.runtime.hopper_fp8` computes what it takes; everywhere else, and for the rest,
`moecompile.runtime.fp8_reference` emulates the same arithmetic.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moecompile.runtime import fp8_reference, main_gradients, quantize
from moecompile.runtime.autocast import exact
from moecompile.runtime.contract import Arguments
from moecompile.runtime.fp8_contract import (
    Four,
    Specs,
    check_fp8,
    check_fp8_backward,
    check_scale_format,
    check_weights,
    saved_specs,
)
from moecompile.runtime.kernels import ABSENT, needed
from moecompile.runtime.lines import check_lines, from_lines
from moecompile.runtime.quantize import POWER_OF_TWO
from moecompile.runtime.remembered import CALLS

Parts = list[Tensor]


def quantize_weights(
    w: Tensor, w_up: Tensor | None = None, *, gate_up: str = "single", transposed: bool = False, backward: bool = True,
    scale_format: str = POWER_OF_TWO,
) -> Four:  # fmt: skip
    """Values, scales, and both transposed, these without elements if no backward is to read them."""
    check_weights(w, w_up, gate_up, transposed, backward)
    check_scale_format("quantize_weights", scale_format)
    if w.dim() == 2:
        found = quantize_weights(w.unsqueeze(0), transposed=transposed, backward=backward, scale_format=scale_format)
        values, scales, values_t, scales_t = (each.squeeze(0) if each.dim() == 3 else each for each in found)
        return values, scales, values_t, scales_t
    fused = _hopper(w.device)
    run = fused.quantize_weights if fused is not None and fused.takes_weights(w, w_up) else quantize.quantize_weights
    values, scales, values_t, scales_t = run(w, w_up, gate_up, transposed, backward, scale_format)
    return values, scales, values_t, scales_t


def fake_quantize_weights(
    w: Tensor, w_up: Tensor | None = None, *, gate_up: str = "single", transposed: bool = False, backward: bool = True,
    scale_format: str = POWER_OF_TWO,
) -> Four:  # fmt: skip
    """Shapes and dtypes of the values and the scales."""
    check_scale_format("quantize_weights", scale_format)
    values, scales, values_t, scales_t = _empty(w, check_weights(w, w_up, gate_up, transposed, backward))
    return values, scales, values_t, scales_t


def experts_fp8(*args: Any, quantized: Sequence[Tensor], **attributes: Any) -> Tensor:
    """The result alone, for inference."""
    main_gradients.split(attributes)  # which nothing is added to
    attributes.pop("held", None)  # what only a backward asks for
    x: Tensor = args[0]
    fused, given = _hopper(x.device), _given(args, quantized)
    if fused is not None:  # what is remembered has been checked
        known = CALLS.again("experts_fp8", given, attributes)
        if known is not None:
            return known[0]
    arguments = Arguments(*args, **attributes)
    copies = check_fp8(arguments, quantized)
    with exact(x):
        if fused is None or not fused.takes(arguments, copies):
            return fp8_reference.forward(arguments, copies, save=False)[0]
        return CALLS.first(
            "experts_fp8", given, attributes, lambda: [fused.forward(arguments, copies, save=False)[0]]
        )[0]  # fmt: skip


def fake_experts_fp8(*args: Any, quantized: Sequence[Tensor], **attributes: Any) -> Tensor:
    """Shape and dtype of the result."""
    main = main_gradients.split(attributes)
    attributes.pop("held", None)
    arguments = Arguments(*args, **attributes)
    main_gradients.check(arguments, main, "experts_fp8")
    check_fp8(arguments, quantized)
    return arguments.x.new_empty((arguments.x.shape[0], arguments.out_features), dtype=arguments.dtypes.result)


def experts_fp8_forward(
    *args: Any, quantized: Sequence[Tensor], lines: bool = False, **attributes: Any
) -> tuple[Tensor, Parts]:
    """The result, and x and the hidden rows in FP8, which backward needs."""
    x: Tensor = args[0]
    fused, given, decides = _hopper(x.device), _given(args, quantized), attributes | {"lines": lines}
    known = None if fused is None else CALLS.again("experts_fp8_forward", given, decides)
    if known is not None:
        return known[0], known[1:]
    arguments = _of_forward(args, attributes, lines)
    copies = check_fp8(arguments, quantized)
    with exact(x):
        chosen = fused if fused is not None and fused.takes(arguments, copies) else fp8_reference

        def run() -> Parts:
            tokens = from_lines(x, features=arguments.features) if lines else None
            result, saved = chosen.forward(arguments, copies, save=True, tokens=tokens)
            return [result, *saved]

        made = CALLS.first("experts_fp8_forward", given, decides, run) if chosen is fused else run()
    return made[0], made[1:]


def fake_experts_fp8_forward(
    *args: Any, quantized: Sequence[Tensor], lines: bool = False, **attributes: Any
) -> tuple[Tensor, Parts]:
    """Shapes and dtypes of the result and what is saved."""
    arguments, x = _of_forward(args, attributes, lines), args[0]
    check_fp8(arguments, quantized)
    result = x.new_empty((x.shape[0], arguments.out_features), dtype=arguments.dtypes.result)
    return result, _empty(result, saved_specs(arguments))


def _of_forward(args: Sequence[Any], attributes: dict[str, Any], lines: bool) -> Arguments:
    """The record of a forward, which has no x if it is given lines."""
    if not lines:
        return Arguments(*args, **attributes)
    arguments = Arguments.without_x(*args[1:], **attributes)
    check_lines("experts_fp8_forward", "x", args[0], arguments.features)
    return arguments


def experts_fp8_backward(*args: Any, **attributes: Any) -> Parts:
    """The needed gradients, in the order of DIFFERENTIABLE."""
    return _backward("experts_fp8_backward", *args, **attributes)


def experts_fp8_backward_adding(
    grad: Tensor, *args: Any, needs: Sequence[bool], **attributes: Any
) -> tuple[Tensor, ...]:
    """The same; what there are main gradients for is added to these, and not needed."""
    found = _backward("experts_fp8_backward_adding", grad, *args, needs=needs, **attributes)
    return main_gradients.all_of(needs, found, grad)


def _backward(
    operator: str,
    grad: Tensor,
    saved: Sequence[Tensor],
    *args: Any,
    quantized: Sequence[Tensor],
    needs: Sequence[bool],
    lines: bool = False,
    **attributes: Any,
) -> Parts:
    main = main_gradients.split(attributes)
    fused, decides = _hopper(grad.device), attributes | {"needs": tuple(needs), "lines": lines}
    given = (grad, *_given((None, *args), quantized), *saved, *map(main.get, main_gradients.MATRICES))
    known = None if fused is None else CALLS.again(operator, given, decides)
    if known is not None:
        return known
    arguments = Arguments.without_x(*args, **attributes)
    copies = check_fp8(arguments, quantized, backward=True, kept=True)
    names = needed(arguments, needs, operator, main)
    kept = check_fp8_backward(arguments, grad, saved, lines)
    main_gradients.check(arguments, main, operator)
    with exact(grad):
        chosen = fused if fused is not None and fused.takes(arguments, copies) else fp8_reference
        added, others = main_gradients.divided(main) if chosen is fused else ({}, main)

        def run() -> Parts:
            wanted, more = frozenset((*names, *others)), {"main": added} if added else {}
            tokens = from_lines(grad, features=arguments.out_features) if lines else None
            grads: dict[str, Tensor] = chosen.backward(arguments, copies, grad, kept, wanted, of_tokens=tokens, **more)
            main_gradients.add(others, grads)
            return [grads[name] for name in names]

        return CALLS.first(operator, given, decides, run) if chosen is fused else run()


def fake_experts_fp8_backward(*args: Any, **attributes: Any) -> Parts:
    """Shapes, dtypes and strides of the needed gradients."""
    return _fake_backward("experts_fp8_backward", *args, **attributes)


def fake_experts_fp8_backward_adding(
    grad: Tensor, *args: Any, needs: Sequence[bool], **attributes: Any
) -> tuple[Tensor, ...]:
    """The same."""
    found = _fake_backward("experts_fp8_backward_adding", grad, *args, needs=needs, **attributes)
    return main_gradients.all_of(needs, found, grad)


def _fake_backward(
    operator: str,
    grad: Tensor,
    saved: Sequence[Tensor],
    *args: Any,
    quantized: Sequence[Tensor],
    needs: Sequence[bool],
    lines: bool = False,
    **attributes: Any,
) -> Parts:
    main = main_gradients.split(attributes)
    arguments = Arguments.without_x(*args, **attributes)
    check_fp8(arguments, quantized, backward=True, kept=True)
    names = needed(arguments, needs, operator, main)
    check_fp8_backward(arguments, grad, saved, lines)
    main_gradients.check(arguments, main, operator)
    like = [getattr(arguments, name) for name in names]
    return [
        grad.new_empty(tensor.shape, dtype=tensor.dtype) if name in ("x", "weights") else torch.empty_like(tensor)
        for name, tensor in zip(names, like, strict=True)
    ]


def _given(tensors: Sequence[Tensor | None], quantized: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """A call's tensors, those that it leaves out too: where `quantized` begins does not depend on it."""
    return (*tensors, *ABSENT[len(tensors) :], *quantized)


@functools.cache
def _hopper(device: torch.device) -> ModuleType | None:
    """The module of the fused kernels, if the device runs them."""
    if device.type != "cuda":
        return None
    from moecompile.runtime import hopper

    return importlib.import_module("moecompile.runtime.hopper_fp8") if hopper.serves(device) else None


def _empty(like: Tensor, specs: Specs) -> Parts:
    return [like.new_empty(shape, dtype=dtype) for shape, dtype in specs]
