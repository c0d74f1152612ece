"""The kernels there are: plain records, each of which names one instantiation of a template in `kernels/`.

    GroupedGemm(input="bfloat16", columns=256, stages=4, cluster=2)
        GroupedGemm<wgmma::Bf16, 256, 4, 2, false, false, Plain<...>> of kernels/grouped_gemm.cuh

A record is all that makes a kernel: it is part of the key of the cache, and what errors call the kernel by.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import ClassVar, Protocol

from moecompile.codegen.activation import print_struct
from moecompile.codegen.expression import leaves, parse

SHARED_LIMIT = 232448
"""Bytes of shared memory that one block may have."""
INPUTS = {"bfloat16": "wgmma::Bf16", "float16": "wgmma::Fp16", "float8_e4m3fn": "wgmma::Fp8"}
"""What the tensor cores multiply, by torch's name."""
VALUE = INPUTS["bfloat16"]
"""What products of FP8 are rounded to before they are activated and quantised."""

LAYOUTS = {"single": "SINGLE", "halves": "HALVES", "separate": "HALVES", "interleaved": "INTERLEAVED"}
"""How gate and up projection lie among GEMM1's columns: of `gate_up`, the kernels' name."""


class Instance(Protocol):
    """One kernel."""

    header: ClassVar[str]

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


@dataclass(frozen=True)
class Plain:
    """The products as they are, plus a bias of each expert."""

    bias: bool = False

    suffix: ClassVar[str] = ""
    definitions: ClassVar[str] = ""

    def template(self, gemm: GroupedGemm) -> str:
        """The C++ type."""
        return _template("Plain", INPUTS[gemm.input], gemm.columns, self.bias, min(gemm.columns // 64, gemm.room))


@dataclass(frozen=True)
class Turned:
    """The gradient of the matrices, transposed."""

    suffix: ClassVar[str] = "_transposed"
    definitions: ClassVar[str] = ""

    def template(self, gemm: GroupedGemm) -> str:
        """The C++ type."""
        return _template("Turned", INPUTS[gemm.input], gemm.columns, min(gemm.columns // 64, gemm.room))


@dataclass(frozen=True)
class Activated:
    """GEMM1's rows, with their bias, through the activation.

    Attributes:
        activation: an expression of `gate` and `up`, or of `hidden`; it may read `weight`.
        gate_up: one of LAYOUTS.
        save: whether the rows themselves are written, too.
        bias: whether there is one.
    """

    activation: str
    gate_up: str
    save: bool = False
    bias: bool = False

    suffix: ClassVar[str] = "_activated"

    @property
    def definitions(self) -> str:
        """The activation as C++."""
        return print_struct("Activation", self.activation, _reads(self.gate_up))

    def template(self, gemm: GroupedGemm) -> str:
        """The C++ type."""
        given = ("Activation", f"Layout::{LAYOUTS[self.gate_up]}", self.save, self.bias)
        name, value = ("QuantizedActivated", VALUE) if gemm.quantized else ("Activated", INPUTS[gemm.input])
        return _template(name, value, gemm.columns, *given, "weight" in leaves(parse(self.activation)))


@dataclass(frozen=True)
class ActivationBackward:
    """Back through GEMM2, the routing weight and the activation, from GEMM1's saved rows.

    Attributes:
        activation: as of `Activated`.
        gate_up: one of LAYOUTS.
        scaled: whether the output multiplies by the routing weight.
    """

    activation: str
    gate_up: str
    scaled: bool = True

    suffix: ClassVar[str] = "_activation_backward"

    @property
    def definitions(self) -> str:
        """The activation as C++."""
        return print_struct("Activation", self.activation, _reads(self.gate_up))

    def template(self, gemm: GroupedGemm) -> str:
        """The C++ type."""
        read = "weight" in leaves(parse(self.activation))
        given = ("Activation", f"Layout::{LAYOUTS[self.gate_up]}", read, self.scaled)
        name, value = (
            ("QuantizedActivationBackward", VALUE) if gemm.quantized else ("ActivationBackward", INPUTS[gemm.input])
        )
        return _template(name, value, gemm.columns, *given)


@dataclass(frozen=True)
class GroupedGemm:
    """Rows grouped by expert times their expert's matrix, or, summed over an expert's rows, times other rows.

    Attributes:
        input: what is multiplied, one of INPUTS.
        columns: of a tile of the result; its rows are 128.
        stages: of the ring in shared memory through which the operands pass.
        cluster: how many blocks share an expert's matrix.
        transposed: whether the matrices are (E, K, N) and not (E, N, K); 16-bit inputs only.
        over_rows: whether the product is that of rows with rows, the gradient of the matrices; 16-bit inputs are
            transposed then, too.
        epilogue: what becomes of the products.
    """

    input: str
    columns: int
    stages: int
    cluster: int = 1
    transposed: bool = False
    over_rows: bool = False
    epilogue: Plain | Turned | Activated | ActivationBackward = Plain()

    header: ClassVar[str] = "grouped_gemm.cuh"

    @property
    def name(self) -> str:
        """What profilers call it."""
        return f"moecompile_grouped_gemm{'_over_rows' if self.over_rows else ''}{self.epilogue.suffix}"

    @property
    def definitions(self) -> str:
        """The epilogue's."""
        return self.epilogue.definitions

    @property
    def template(self) -> str:
        """The C++ type."""
        given = (self.columns, self.stages, self.cluster, self.transposed, self.over_rows)
        return _template("GroupedGemm", INPUTS[self.input], *given, self.epilogue.template(self))

    @property
    def quantized(self) -> bool:
        """Whether the operands have scales."""
        return self.input == "float8_e4m3fn"

    @property
    def room(self) -> int:
        """Boxes of 16 x 64 results for each of eight warps that fit beside the ring, which holds lines of 128 bytes."""
        return (SHARED_LIMIT - 3072 - self.stages * (128 + self.columns) * 128) // (8 * 2048)


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
        return _template("Combine", INPUTS[self.input], RESULTS[self.result], "Output")


@dataclass(frozen=True)
class Dispatch:
    """Tokens to their rows in expert order."""

    header: ClassVar[str] = "dispatch.cuh"
    name: ClassVar[str] = "moecompile_dispatch"
    definitions: ClassVar[str] = ""
    template: ClassVar[str] = "Dispatch"


@dataclass(frozen=True)
class QuantizeRows:
    """Tokens to their rows in expert order, in e4m3 with a scale for each 128 columns.

    Attributes:
        input: dtype of the tokens.
    """

    input: str

    header: ClassVar[str] = "quantize_rows.cuh"
    name: ClassVar[str] = "moecompile_quantize_rows"
    definitions: ClassVar[str] = ""

    @property
    def template(self) -> str:
        """The C++ type."""
        return _template("QuantizeRows", INPUTS[self.input])


@dataclass(frozen=True)
class QuantizeWeights:
    """The experts' matrices in e4m3 with a scale for each 128 x 128, as they lie and transposed.

    Attributes:
        input: dtype of the matrices.
        interleaved_columns: whether neighbouring columns are gate and up projection.
    """

    input: str
    interleaved_columns: bool = False

    header: ClassVar[str] = "quantize_weights.cuh"
    name: ClassVar[str] = "moecompile_quantize_weights"
    definitions: ClassVar[str] = ""

    @property
    def template(self) -> str:
        """The C++ type."""
        return _template("QuantizeWeights", INPUTS[self.input], 2 if self.interleaved_columns else 1)


@dataclass(frozen=True)
class PadOffsets:
    """The end of each expert's rows where they are filled up to whole scale blocks."""

    header: ClassVar[str] = "transpose.cuh"
    name: ClassVar[str] = "moecompile_pad_offsets"
    definitions: ClassVar[str] = ""
    template: ClassVar[str] = "PadOffsets"


@dataclass(frozen=True)
class TransposeRows:
    """Quantised rows transposed, with scales for 128 rows.

    Attributes:
        gathered: whether they are tokens, found through the rows' assignments.
        per_column: whether each column has a scale of its own (gradients), or 128 columns share one (activations).
    """

    gathered: bool
    per_column: bool

    header: ClassVar[str] = "transpose.cuh"
    name: ClassVar[str] = "moecompile_transpose_rows"
    definitions: ClassVar[str] = ""

    @property
    def template(self) -> str:
        """The C++ type."""
        return _template("TransposeRows", self.gathered, self.per_column)


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
        return _template(f"Plan{self.step.capitalize()}", IDS[self.ids], self.experts)


def _template(name: str, *arguments: str | int | bool) -> str:
    return f"{name}<{', '.join(str(each).lower() if isinstance(each, bool) else str(each) for each in arguments)}>"


def _reads(gate_up: str) -> tuple[str, ...]:
    return ("hidden", "weight") if gate_up == "single" else ("gate", "up", "weight")


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
