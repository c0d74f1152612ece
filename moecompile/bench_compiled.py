"""What blocks and stacks of layers under torch.compile have in common: moecompile's options, calls, and the check.

A subject has a module, rows that it is called on, and gradients that are forgotten between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import moecompile
from moecompile.bench_block import precision
from moecompile.bench_cases import FORWARD, FP8, FP8_EACH, OURS, STEP
from moecompile.bench_proof import NotOursError, compare, kernels_of, prove
from moecompile.bench_results import Setting
from moecompile.bench_timing import Contender

OPTIONS: dict[str, dict[str, Any]] = {
    OURS: {},
    FP8: {"precision": "fp8", "fp8_cache_weights": True},
    FP8_EACH: {"precision": "fp8"},
}
"""Of moecompile, by contender."""


class Subject(Protocol):
    """What is compiled; x takes a gradient, the cotangent is the gradient of its result."""

    @property
    def module(self) -> nn.Module:
        """Called as `module(x)`."""

    @property
    def x(self) -> Tensor:
        """Rows."""

    @property
    def cotangent(self) -> Tensor:
        """As the result."""

    def forget_gradients(self) -> None:
        """All gradients are None."""

    def gradients(self) -> dict[str, Tensor]:
        """Those of the rows ("x") and of all parameters that have one."""


def compiled(module: nn.Module, options: Mapping[str, Any] | None = None) -> Callable[[Tensor], Tensor]:
    """By moecompile with these options, by Inductor without."""
    ours: dict[str, Any] = {} if options is None else {"backend": "moecompile", "options": dict(options)}
    return torch.compile(module, fullgraph=True, dynamic=False, **ours)


def forward(subject: Subject, name: str, run: Callable[[Tensor], Tensor]) -> Contender:
    """Inference."""

    def call(_: int) -> Tensor:
        with torch.no_grad():
            return run(subject.x)

    return Contender(name, call, 0.0, precision(name), kernels_of(name, FORWARD))


def step(subject: Subject, name: str, run: Callable[[Tensor], Tensor]) -> Contender:
    """Forward and backward: gradients of the rows and of all weights, from None."""

    def call(_: int) -> None:
        subject.forget_gradients()
        run(subject.x).backward(subject.cotangent)

    return Contender(name, call, 0.0, precision(name), kernels_of(name, STEP))


def checked(
    setting: Setting,
    subject: Subject,
    contenders: Sequence[Contender],
    *,
    against: str,
    bounds: Mapping[str, float],
    title: str,
    where: str,
    gradients: Sequence[str] | None = None,
) -> list[Contender]:
    """Those that compute what one of them does, ours with our kernels; the others are noted as failures.

    Args:
        setting: of the bench.
        subject: what they run.
        contenders: of it.
        against: the name of the one that is right.
        bounds: how far others may be from it, relative, by precision.
        title: of a failure, before the contender's name.
        where: "the block", say, in which moecompile has to find experts.
        gradients: the names of those that are compared; all if None.
    """
    (other,) = (contender for contender in contenders if contender.name == against)
    expected, right = _outcome(subject, other, gradients), []
    for contender in contenders:
        try:
            if contender.name != against:
                compare(_outcome(subject, contender, gradients), expected, bounds[contender.precision])
            if contender.name in OPTIONS and not moecompile.last_report().graphs[-1].sites:
                raise NotOursError(f"moecompile found no experts in {where}")
            prove(contender, range(1), setting.device)
            right.append(contender)
        except Exception as error:  # the others are measured all the same
            setting.results.fail(f"{title}, {contender.name}", error)
    return right


def _outcome(subject: Subject, contender: Contender, gradients: Sequence[str] | None) -> dict[str, Tensor]:
    """The result, or the gradients, which are no longer the subject's."""
    result = contender.call(0)
    if isinstance(result, Tensor):
        return {"result": result}
    found = subject.gradients()
    subject.forget_gradients()
    return found if gradients is None else {name: found[name] for name in gradients}
