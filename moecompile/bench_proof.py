"""What a contender has to prove before it is timed: that its results are right, and that they are our kernels'.

Calls that the fused kernels do not take go to PyTorch's operators, rightly so; a bench that did not notice would report
PyTorch's time as moecompile's. So the names of the kernels that a call launches are compared with those that it cannot
do without; and nobody else may launch any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moecompile.bench_cases import AGAIN, FP8, FP8_EACH, FP8_TWICE, IN_FP8, OURS, STEP
from moecompile.bench_timing import Contender

PREFIX = "moecompile_"
"""Of the names of all of moecompile's kernels, and of no other."""
EMULATED = "emulated: no GPU"
FORMS = ("", "_transposed", "_dispatching", "_added")
"""Suffixes of kernels that do the same in another way: gradients of matrices that lie transposed or are added, rows yet
to come."""
FORWARD_KERNELS = {
    OURS: ("plan_place", "grouped_gemm_activated", "grouped_gemm", "combine"),
    FP8: ("plan_place", "quantize_rows", "grouped_gemm_activated", "grouped_gemm", "combine"),
}
BACKWARD_KERNELS = {
    OURS: ("grouped_gemm_activation_backward", "grouped_gemm_over_rows"),
    FP8: ("grouped_gemm_activation_backward", "transpose_rows", "grouped_gemm_over_rows"),
}


class WrongResultError(Exception):
    """A contender computes something else."""


class NotOursError(Exception):
    """A contender of ours was computed by something else than moecompile's kernels."""


def kernels_of(name: str, what: str) -> tuple[str, ...]:
    """Kernels that a call of that contender launches at least, without PREFIX; none for those who are not ours."""
    if name not in (OURS, AGAIN, *IN_FP8):
        return ()
    key = FP8 if name in IN_FP8 else OURS
    quantising = ("quantize_weights",) if name in (FP8_EACH, FP8_TWICE) else ()
    return (*quantising, *FORWARD_KERNELS[key], *(BACKWARD_KERNELS[key] if what == STEP else ()))


@contextmanager
def launched() -> Iterator[list[str]]:
    """Within, the names of moecompile's kernels as any thread launches them; replays of CUDA graphs launch none."""
    from moecompile.runtime import launch

    before, names = launch._driver, list[str]()
    noting = _Noting(before(), names)
    setattr(launch, "_driver", lambda: noting)  # noqa: B010  (mypy has it that functions are constants)
    try:
        yield names
    finally:
        setattr(launch, "_driver", before)  # noqa: B010


class _Noting:
    """The CUDA driver, which notes the name of each kernel that it launches."""

    def __init__(self, driver: Any, names: list[str]) -> None:
        self._driver, self._names = driver, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def cuLaunchKernelEx(self, how: Any, function: Any, *others: Any) -> Any:
        """Launches; a launch that fails has not run."""
        result = self._driver.cuLaunchKernelEx(how, function, *others)
        if not int(result[0]):
            _, name = self._driver.cuFuncGetName(function)
            self._names.append(name.decode())
        return result


def prove(contender: Contender, numbers: Sequence[int], device: str) -> None:
    """Calls the contender on the input sets of these numbers; on the CPU no kernels run, and nothing is proven.

    Raises:
        NotOursError: it is ours, and in one of the calls moecompile's kernels did not run; or it is not, and they did.
    """
    for number in numbers:
        if device == "cpu":
            contender.call(number)
            continue
        with launched() as names:
            contender.call(number)
        require(contender, names)


def require(contender: Contender, names: Sequence[str]) -> None:
    """Raises NotOursError if these are not the names of kernels that the contender's call launches."""
    ran = ", ".join(dict.fromkeys(names)) or "none"
    if names and not contender.kernels:
        raise NotOursError(f"moecompile's kernels ran in its place: {ran}")
    missing = [each for each in contender.kernels if not {f"{PREFIX}{each}{form}" for form in FORMS} & set(names)]
    if missing:
        raise NotOursError(f"moecompile's kernels did not run: no {', '.join(missing)}; of ours there ran {ran}")


def compare(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float, whose: str = "PyTorch's"
) -> float:
    """The largest norm of a difference, relative; WrongResultError where it is more than `bound`."""
    most = 0.0
    for what, right in expected.items():
        norm = float(torch.linalg.vector_norm(right, dtype=torch.float32))
        error = float(torch.linalg.vector_norm(found[what] - right, dtype=torch.float32)) / max(norm, 1e-30)
        if not error <= bound:  # a NaN is none
            raise WrongResultError(f"{what} is {error:.3g} away from {whose}, more than {bound:g}")
        most = max(most, error)
    return most
