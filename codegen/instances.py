"""The kernels there are: plain records, each of which names one instantiation of a template in `kernels/`.

    Combine(input="bfloat16", result="float32", output="mul(out, weight)")
        Combine<wgmma::Bf16, Float, Output> of kernels/combine.cuh, where Output computes out * weight

A record is all that makes a kernel: it is part of the key of the cache, and what errors call the kernel by. Those of
grouped GEMMs are in `moecompile.codegen.gemms`, those of token exchanges in `moecompile.codegen.exchanges`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import ClassVar, Protocol

from moecompile.codegen.activation import print_struct

INPUTS = {"bfloat16": "wgmma::Bf16", "float16": "wgmma::Fp16", "float8_e4m3fn": "wgmma::Fp8"}
"""What the tensor cores multiply, by torch's name."""


SCALES = {"power_of_two": "fp8::PowerOfTwo", "float32": "fp8::Float32"}
"""The formats of a block's scale, by the name that `moecompile.runtime.quantize` gives them."""


class Instance(Protocol):
    """One kernel."""

    @property
    def header(self) -> str:
        """The file of `kernels/` that holds the template."""
        ...

    @property
    def name(self) -> str:
        """What profilers call it."""
        ...

    @property
    def definitions(self) -> str:
        """C++ that the template needs and no header holds."""
        ...

    @property
    def template(self) -> str:
        """The C++ type that `MOECOMPILE_KERNEL` makes a kernel of."""
        ...


RESULTS = {"float32": "Float", "bfloat16": "Half<wgmma::Bf16>", "float16": "Half<wgmma::Fp16>"}
"""What a sum over a token's rows may be written as, by torch's name."""


@dataclass(frozen=True)
class Combine:
    """Rows in expert order, summed into tokens.

    Attributes:
        input: dtype of the rows.
        result: dtype of the sums, one of RESULTS.
        output: what is summed, an expression of `out`, the row, and of `weight`.
    """

    input: str
    result: str
    output: str

    header: ClassVar[str] = "combine.cuh"
    name: ClassVar[str] = "moecompile_combine"

    @property
    def definitions(self) -> str:
        """The output expression as C++."""
        return print_struct("Output", self.output, ("out", "weight"))

    @property
    def template(self) -> str:
        """The C++ type."""
        return instantiation("Combine", INPUTS[self.input], RESULTS[self.result], "Output")


@dataclass(frozen=True)
class Dispatch:
    """Tokens to their rows in expert order."""

    header: ClassVar[str] = "dispatch.cuh"
    name: ClassVar[str] = "moecompile_dispatch"
    definitions: ClassVar[str] = ""
    template: ClassVar[str] = "Dispatch"


@dataclass(frozen=True)
class Collect:
    """A value of each row, in parts, back to assignments.

    Attributes:
        result: dtype of the values' sums, one of RESULTS.
    """

    result: str

    header: ClassVar[str] = "collect.cuh"
    name: ClassVar[str] = "moecompile_collect"
    definitions: ClassVar[str] = ""

    @property
    def template(self) -> str:
        """The C++ type."""
        return instantiation("Collect", RESULTS[self.result])


@dataclass(frozen=True)
class QuantizeRows:
    """Tokens to their rows in expert order, in e4m3 with a scale for each 128 columns.

    Attributes:
        input: dtype of the tokens.
        scales: their format, one of SCALES.
    """

    input: str
    scales: str = "power_of_two"

    header: ClassVar[str] = "quantize_rows.cuh"
    name: ClassVar[str] = "moecompile_quantize_rows"
    definitions: ClassVar[str] = ""

    @property
    def template(self) -> str:
        """The C++ type."""
        return instantiation("QuantizeRows", INPUTS[self.input], SCALES[self.scales])


@dataclass(frozen=True)
class QuantizeWeights:
    """The experts' matrices in e4m3 with a scale for each 128 x 128, as they lie and transposed.

    Attributes:
        input: dtype of the matrices.
        interleaved_columns: whether neighbouring columns are gate and up projection.
        scales: their format, one of SCALES.
    """

    input: str
    interleaved_columns: bool = False
    scales: str = "power_of_two"

    header: ClassVar[str] = "quantize_weights.cuh"
    name: ClassVar[str] = "moecompile_quantize_weights"
    definitions: ClassVar[str] = ""

    @property
    def template(self) -> str:
        """The C++ type."""
        step = 2 if self.interleaved_columns else 1
        return instantiation("QuantizeWeights", INPUTS[self.input], step, SCALES[self.scales])


@dataclass(frozen=True)
class QuantizeGradient:
    """A gradient in e4m3, rows with a scale for each 128 columns, and token-major with one for a column and 128 rows.

    Attributes:
        input: dtype of the gradient.
        scales: the format of the rows' scales, one of SCALES; the others are powers of two.
    """

    input: str
    scales: str = "power_of_two"

    header: ClassVar[str] = "quantize_gradient.cuh"
    name: ClassVar[str] = "moecompile_quantize_gradient"
    definitions: ClassVar[str] = ""

    @property
    def template(self) -> str:
        """The C++ type."""
        return instantiation("QuantizeGradient", INPUTS[self.input], SCALES[self.scales])


@dataclass(frozen=True)
class PadOffsets:
    """The end of each expert's rows where they are filled up to whole scale blocks."""

    header: ClassVar[str] = "transpose.cuh"
    name: ClassVar[str] = "moecompile_pad_offsets"
    definitions: ClassVar[str] = ""
    template: ClassVar[str] = "PadOffsets"


@dataclass(frozen=True)
class TransposeRows:
    """Quantised rows transposed, with scales for 128 rows, powers of two.

    Attributes:
        gathered: whether they are tokens, found through the rows' assignments.
        per_column: whether each column has a scale of its own (gradients), or 128 columns share one (activations).
        scales: the format that the rows' scales have, one of SCALES; makes no difference if `per_column`.
    """

    gathered: bool
    per_column: bool
    scales: str = "power_of_two"

    header: ClassVar[str] = "transpose.cuh"
    name: ClassVar[str] = "moecompile_transpose_rows"
    definitions: ClassVar[str] = ""

    @property
    def template(self) -> str:
        """The C++ type."""
        return instantiation("TransposeRows", self.gathered, self.per_column, SCALES[self.scales])


IDS = {"int64": "i64", "int32": "i32"}
"""Dtypes of expert ids that the plan is made of, by torch's name."""
PLAN_EXPERTS = (512, 1536)
"""How many experts the two sizes of the plan's kernels have room for."""


@dataclass(frozen=True)
class Plan:
    """One of the plan's two steps.

    Attributes:
        step: "count", how often each expert is chosen in each block's share of the assignments, or "place", which makes
            counts, offsets, slots and order of that.
        ids: dtype of the expert ids, one of IDS.
        experts: room for so many, one of PLAN_EXPERTS.
    """

    step: str
    ids: str
    experts: int

    header: ClassVar[str] = "plan.cuh"
    definitions: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """What profilers call it."""
        return f"moecompile_plan_{self.step}"

    @property
    def template(self) -> str:
        """The C++ type."""
        return instantiation(f"Plan{self.step.capitalize()}", IDS[self.ids], self.experts)


def instantiation(name: str, *arguments: str | int | bool) -> str:
    """The C++ type that a template makes of these arguments."""
    return f"{name}<{', '.join(str(each).lower() if isinstance(each, bool) else str(each) for each in arguments)}>"


def source(instance: Instance) -> str:
    """The translation unit of one kernel."""
    return (
        f'#include "{instance.header}"\n{instance.definitions}MOECOMPILE_KERNEL({instance.name}, {instance.template})\n'
    )


@functools.cache
def headers() -> Mapping[str, str]:
    """The text of every file in `kernels/`, by name."""
    folder = resources.files(__package__) / "kernels"
    return {file.name: file.read_text(encoding="utf-8") for file in _sorted(folder.iterdir())}


def _sorted(files: Iterable[resources.abc.Traversable]) -> list[resources.abc.Traversable]:
    return sorted((file for file in files if file.name.endswith(".cuh")), key=lambda file: file.name)
