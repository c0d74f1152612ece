"""Main gradients: float32 tensors that gradients of the experts' matrices are added to, in place of being returned.

Of a step's micro-batches, gradients in bfloat16 would be added up in bfloat16. Megatron-LM keeps such tensors as
`parameter.main_grad`, and calls what happens here gradient accumulation fusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moecompile.runtime.contract import TENSORS, Arguments
from moecompile.runtime.once import warn_once

MATRICES = ("w_in", "w_out", "w_up")
"""What may have one."""
KEYWORDS = {name: f"main_{name}" for name in MATRICES}
"""The operators' names for them."""


def split(attributes: dict[str, Any]) -> dict[str, Tensor]:
    """Takes the main gradients out of an operator's keywords; returns those there are, by the matrices' names."""
    found = {name: attributes.pop(keyword, None) for name, keyword in KEYWORDS.items()}
    return {name: main for name, main in found.items() if main is not None}


def keywords(main: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same as keywords of an operator."""
    return {KEYWORDS[name]: each for name, each in main.items()}


def check(args: Arguments, main: Mapping[str, Tensor], operator: str) -> None:
    """Raises ValueError or TypeError for what is no main gradient of these matrices."""
    for name, each in main.items():
        matrix, words = getattr(args, name), f"moecompile::{operator}: {KEYWORDS[name]}"
        if matrix is None:
            raise ValueError(f"{words} is the main gradient of {name}, which is None")
        if each.dtype != torch.float32:
            raise TypeError(f"{words} must be float32, got {each.dtype}")
        if each.shape != matrix.shape:
            raise ValueError(f"{words} must have the shape of {name}, {tuple(matrix.shape)}, got {tuple(each.shape)}")
        if not _is_apart(each):
            strides = each.stride()
            raise ValueError(f"{words} must have a place in memory for each element, got strides {strides}: clone it")
        if each.device != matrix.device:
            raise ValueError(f"{words} must be on the device of {name}, {matrix.device}, got {each.device}")
        for argument in TENSORS:
            other = getattr(args, argument)
            if other is not None and _begin_together(each, other):
                raise ValueError(f"{words} is the memory of {argument}, which a backward would overwrite: clone it")


def _begin_together(one: Tensor, other: Tensor) -> bool:
    same = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return same and one.storage_offset() == other.storage_offset()


def _is_apart(main: Tensor) -> bool:
    """Whether no two elements share memory."""
    reach = 1
    for stride, size in sorted(zip(main.stride(), main.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach = max(reach, stride * size)
    return True


def takes(main: Mapping[str, Tensor]) -> bool:
    """Whether the kernels add to these: whole lines of 16 bytes along one of the last two dimensions."""
    taken = all(
        each.data_ptr() % 16 == 0
        and 1 in each.stride()[1:]
        and all(stride % 4 == 0 for stride in each.stride() if stride != 1)
        for each in main.values()
    )
    if not taken:
        warn_once(
            "gradients are rounded to the model's dtype before they are added: they do not lie in whole lines of "
            "16 bytes"
        )
    return taken


def divided(main: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Those that kernels add to, and the others."""
    return (main, {}) if takes(main) else ({}, main)


def all_of(needs: Sequence[bool], gradients: Sequence[Tensor], like: Tensor) -> tuple[Tensor, ...]:
    """Those that are needed, in the order of `needs`, and tensors without elements for the others."""
    found = iter(gradients)
    return tuple(next(found) if needed else like.new_empty(0) for needed in needs)


def add(main: Mapping[str, Tensor], gradients: dict[str, Tensor]) -> None:
    """Adds those of the gradients that belong to main gradients, and takes them out."""
    for name, each in main.items():
        each.add_(gradients.pop(name))
