"""What a model of the zoo is: a small MoE module, the form it is written in, and how to run it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        undefined: eager itself reads memory that nothing wrote; numbers are not compared.
        backward: False where eager autograd itself refuses the module, which then runs without gradients only.
    """

    name: str
    build: Build
    inputs: Inputs
    why: str
    control: str
    fullgraph: bool = False
    allowed: bool = False
    same_numbers: bool = False
    undefined: bool = False
    backward: bool = True


class Refused:
    """Collects the refusals of one control; an instance decorates their classes.

    Args:
        control: name of the control's `Case`.
        inputs: the control's inputs, for refusals that bring none of their own.
        fullgraph: as in `Case`.
    """

    def __init__(self, control: str, inputs: Inputs, fullgraph: bool = False) -> None:
        self.control, self.inputs, self.fullgraph = control, inputs, fullgraph
        self.refusals: list[Refusal] = []

    def __call__(self, why: str, **changes: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
        def register(module: type[nn.Module]) -> type[nn.Module]:
            name = self.control.removesuffix("control") + re.sub(r"(?<!^)(?=[A-Z])", "_", module.__name__).lower()
            given = {"inputs": self.inputs, "fullgraph": self.fullgraph, **changes}
            self.refusals.append(Refusal(name=name, build=module, why=why, control=self.control, **given))
            return module

        return register


def make(case: Case | Refusal, seed: int = 0) -> nn.Module:
    """Builds the module of a case with weights that depend on `seed` only."""
    torch.manual_seed(seed)
    return case.build()


def arguments(case: Case | Refusal, tokens: int = TOKENS, seed: int = 1) -> tuple[Tensor, ...]:
    """The arguments of a case, which depend on `seed` only."""
    torch.manual_seed(seed)
    return case.inputs(tokens)


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
