"""What a model of the zoo is: a small MoE module, the form it is written in, and how to run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Build = Callable[[], nn.Module]
Inputs = Callable[[int], tuple[Tensor, ...]]

TOKENS = 24


@dataclass(frozen=True)
class Case:
    """One spelling of one form.

    Attributes:
        name: unique in the zoo.
        form: name of the form in `moecompile.passes.forms.FORMS`.
        build: makes the module; its random weights follow torch's global seed, so use `make`.
        inputs: makes the module's arguments for a number of tokens (a multiple of 2).
        spelling: what is particular about how this author writes the form.
        fullgraph: True where only `torch.compile(..., fullgraph=True)` captures the module in one graph.
        notes: what else is worth knowing.
    """

    name: str
    form: str
    build: Build
    inputs: Inputs
    spelling: str
    fullgraph: bool = False
    notes: str = ""


@dataclass(frozen=True)
class Refusal:
    """A module that looks like a form, where a rewrite that trusts the looks would be wrong.

    Attributes:
        name: unique in the zoo.
        build: makes the module, as in `Case`.
        inputs: as in `Case`.
        why: what a rewrite must notice.
        control: name of the `Case` that differs only by the defect, so that a refusal proves something.
        fullgraph: as in `Case`.
        allowed: a correct rewrite is fine too; only numbers are compared.
        same_numbers: for these inputs the defect does not show in outputs, gradients or mutations.
    """

    name: str
    build: Build
    inputs: Inputs
    why: str
    control: str
    fullgraph: bool = False
    allowed: bool = False
    same_numbers: bool = False


def make(case: Case | Refusal, seed: int = 0) -> nn.Module:
    """Builds the module of a case with weights that depend on `seed` only."""
    torch.manual_seed(seed)
    return case.build()


def weight(*shape: int, fan_in: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A random parameter of `shape` whose product with a unit-variance vector of `fan_in` entries has variance 2."""
    return nn.Parameter((torch.randn(*shape) * (2.0 / fan_in) ** 0.5).to(dtype))


def bias(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A random bias, large enough that losing it is seen in bfloat16."""
    return nn.Parameter((torch.randn(*shape) * 0.5).to(dtype))


def flat(hidden: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Inputs of shape (tokens, hidden)."""

    def inputs(tokens: int) -> tuple[Tensor, ...]:
        return (torch.randn(tokens, hidden).to(dtype),)

    return inputs


def batched(hidden: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Inputs of shape (2, tokens / 2, hidden)."""

    def inputs(tokens: int) -> tuple[Tensor, ...]:
        return (torch.randn(2, tokens // 2, hidden).to(dtype),)

    return inputs
