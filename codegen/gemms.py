"""Grouped GEMMs, and what becomes of their products, as records (`moecompile.codegen.instances`).

    GroupedGemm(input="bfloat16", columns=256, stages=4, cluster=2)
        GroupedGemm<wgmma::Bf16, 256, 4, 2, false, false, 0, Plain<...>> of kernels/grouped_gemm.cuh

An epilogue belongs to a GEMM, whose record decides its type in C++.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecompile.codegen.activation import print_struct
from moecompile.codegen.expression import leaves, parse
from moecompile.codegen.instances import INPUTS, SCALES, instantiation

SHARED_LIMIT = 232448
"""Bytes of shared memory that one block may have."""
VALUE = INPUTS["bfloat16"]
"""What products of FP8 are rounded to before they are activated and quantised."""
LAYOUTS = {"single": "SINGLE", "halves": "HALVES", "separate": "HALVES", "interleaved": "INTERLEAVED"}
"""How gate and up projection lie among GEMM1's columns: of `gate_up`, the kernels' name."""


@dataclass(frozen=True)
class Plain:
    """The products as they are, plus a bias of each expert."""

    bias: bool = False

    suffix: ClassVar[str] = ""
    definitions: ClassVar[str] = ""

    def template(self, gemm: GroupedGemm) -> str:
        """The C++ type."""
        return instantiation("Plain", INPUTS[gemm.input], gemm.columns, self.bias, gemm.boxes)


@dataclass(frozen=True)
class Turned:
    """The gradient of the matrices, transposed."""

    suffix: ClassVar[str] = "_transposed"
    definitions: ClassVar[str] = ""

    def template(self, gemm: GroupedGemm) -> str:
        """The C++ type."""
        return instantiation("Turned", INPUTS[gemm.input], gemm.columns, gemm.boxes)


@dataclass(frozen=True)
class Added:
    """The gradient of the matrices, added to what is there in float32.

    Attributes:
        turned: whether what is there is transposed.
    """

    turned: bool = False

    suffix: ClassVar[str] = "_added"
    definitions: ClassVar[str] = ""

    def template(self, gemm: GroupedGemm) -> str:
        """The C++ type."""
        return instantiation("Added", gemm.columns, self.turned, 4 if gemm.room >= 4 and gemm.columns == 256 else 2)


@dataclass(frozen=True)
class Activated:
    """GEMM1's rows, with their bias, through the activation.

    Attributes:
        activation: an expression of `gate` and `up`, or of `hidden`; it may read `weight`.
        gate_up: one of LAYOUTS.
        save: whether the rows themselves are written, too.
        bias: whether there is one.
        scales: the format of the activation's, one of SCALES, where it is quantised.
    """

    activation: str
    gate_up: str
    save: bool = False
    bias: bool = False
    scales: str = "power_of_two"

    suffix: ClassVar[str] = "_activated"

    @property
    def definitions(self) -> str:
        """The activation as C++."""
        return print_struct("Activation", self.activation, _reads(self.gate_up))

    def template(self, gemm: GroupedGemm) -> str:
        """The C++ type."""
        read = "weight" in leaves(parse(self.activation))
        given = ("Activation", f"Layout::{LAYOUTS[self.gate_up]}", self.save, self.bias, read)
        if gemm.quantized:
            return instantiation("QuantizedActivated", VALUE, gemm.columns, *given, SCALES[self.scales])
        rounds = gemm.columns // (64 if self.gate_up == "single" else 128)
        last = 1 if self.save else min(2, rounds, gemm.room)
        return instantiation("Activated", INPUTS[gemm.input], gemm.columns, *given, last)


@dataclass(frozen=True)
class ActivationBackward:
    """Back through GEMM2, the routing weight and the activation, from GEMM1's saved rows.

    Attributes:
        activation: as of `Activated`.
        gate_up: one of LAYOUTS.
        scaled: whether the output multiplies by the routing weight.
        scales: the format of the gradient's, one of SCALES, where it is quantised.
    """

    activation: str
    gate_up: str
    scaled: bool = True
    scales: str = "power_of_two"

    suffix: ClassVar[str] = "_activation_backward"

    @property
    def definitions(self) -> str:
        """The activation as C++."""
        return print_struct("Activation", self.activation, _reads(self.gate_up))

    def template(self, gemm: GroupedGemm) -> str:
        """The C++ type."""
        read = "weight" in leaves(parse(self.activation))
        given = ("Activation", f"Layout::{LAYOUTS[self.gate_up]}", read, self.scaled)
        if gemm.quantized:
            return instantiation("QuantizedActivationBackward", VALUE, gemm.columns, *given, SCALES[self.scales])
        return instantiation("ActivationBackward", INPUTS[gemm.input], gemm.columns, *given)


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
        overhang: how many rows beyond whole pairs of tiles may go along with the last pair; 0, 32 or 64, of 16 bits and
            for clusters of two.
        dispatches: whether the rows are tokens', which the kernel dispatches itself.
        records: whether these are lines with their scales behind them, or some came from other ranks, and lie where
            those have written them.
        taken: whether blocks take tiles when they are free, so that some may begin late, and, but for `over_rows`,
            leave those of an expert's rows that are another launch's.
        whole: whether all rows are of one group, and the host knows how many they are.
        epilogue: what becomes of the products.
    """

    input: str
    columns: int
    stages: int
    cluster: int = 1
    transposed: bool = False
    over_rows: bool = False
    overhang: int = 0
    dispatches: bool = False
    records: bool = False
    taken: bool = False
    whole: bool = False
    epilogue: Plain | Turned | Added | Activated | ActivationBackward = Plain()

    header: ClassVar[str] = "grouped_gemm.cuh"

    @property
    def name(self) -> str:
        """What profilers call it."""
        over_rows, dispatching = "_over_rows" * self.over_rows, "_dispatching" * self.dispatches
        kind = "gemm" if self.whole else "grouped_gemm"
        return f"moecompile_{kind}{over_rows}{self.epilogue.suffix}{dispatching}{'_taken' * self.taken}"

    @property
    def definitions(self) -> str:
        """The epilogue's."""
        return self.epilogue.definitions

    @property
    def template(self) -> str:
        """The C++ type."""
        given = (self.columns, self.stages, self.cluster, self.transposed, self.over_rows, self.overhang)
        source = ("Records",) * self.records
        feed = instantiation("Dispatched", self.quantized, *source) if self.dispatches else "Given"
        last = (feed, self.taken) if self.taken or self.dispatches else ("Whole",) * self.whole
        return instantiation("GroupedGemm", INPUTS[self.input], *given, self.epilogue.template(self), *last)

    @property
    def quantized(self) -> bool:
        """Whether the operands have scales."""
        return self.input == "float8_e4m3fn"

    @property
    def boxes(self) -> int:
        """As many of them as there is room for, of a tile's results of 16 bits, and into which these may be divided."""
        if self.room < 1:
            ring = f"{self.stages} stages of {128 + self.overhang + self.columns} lines"
            raise ValueError(f"{self.name}: {ring} leave no room for results in {SHARED_LIMIT} bytes of shared memory")
        return max(boxes for boxes in (1, 2, 4) if boxes <= min(self.columns // 64, self.room))

    @property
    def room(self) -> int:
        """Boxes of 16 x 64 results for each of eight warps that fit beside the ring, which holds lines of 128 bytes."""
        return (SHARED_LIMIT - 3072 - self.stages * (128 + self.overhang + self.columns) * 128) // (8 * 2048)


def _reads(gate_up: str) -> tuple[str, ...]:
    return ("hidden", "weight") if gate_up == "single" else ("gate", "up", "weight")
