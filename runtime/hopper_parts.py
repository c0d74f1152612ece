"""The two parts that rows of experts are multiplied in while tokens are exchanged, and how, in 16 bits or in FP8.

`moecompile.runtime.hopper_exchanged` says what they are. Blocks take tiles as they are free; GEMM1 dispatches its rows,
of this rank's tokens or from where other ranks have put theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from moecompile.codegen.gemms import GroupedGemm
from moecompile.codegen.instances import Combine, Instance, QuantizeRows
from moecompile.runtime import (
    hopper,
    hopper_experts,
    hopper_fp8,
    hopper_fp8_gemm,
    hopper_quantize,
    hopper_tiles,
)
from moecompile.runtime.contract import Arguments
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.hopper import Taking
from moecompile.runtime.hopper_quantize import QuantizedRows
from moecompile.runtime.hopper_routing import Dispatching
from moecompile.runtime.launch import Value
from moecompile.runtime.quantize import pad


@dataclass(frozen=True)
class Part:
    """Rows that are multiplied together.

    Attributes:
        number: 0 for this rank's own, 1 for the others.
        first: of these among the rows of both parts.
        count: of them at most.
        counts: of their plan.
        offsets: likewise.
        slots: likewise.
        order: likewise.
        weights: of their assignments, float32; None if there are none.
        source: of the tokens, `Records` of codegen/kernels/feed.cuh.
        progress: of their dispatch, zeros.
        taken: of GEMM1's and GEMM2's tiles, zeros.
        multiple: of each expert's rows only so many times that many are multiplied.
    """

    number: int
    first: int
    count: int
    counts: Tensor
    offsets: Tensor
    slots: Tensor
    order: Tensor
    weights: Tensor | None
    source: tuple[Value, ...]
    progress: Tensor
    taken: tuple[Tensor, Tensor]
    multiple: int

    @property
    def rows(self) -> slice:
        """Among those of both parts."""
        return slice(self.first, self.first + self.count)

    @property
    def dispatching(self) -> Dispatching:
        """Of GEMM1."""
        return Dispatching(self.source, self.order, self.slots.shape[1], self.progress, records=True)

    def taking(self, product: int) -> Taking:
        """Of GEMM1 (0) or GEMM2 (1)."""
        return Taking(self.taken[product], self.multiple)


class Sixteen:
    """Products in the model's precision; tokens travel in it.

    Args:
        args: of the experts.
        counts: rows of both parts.
    """

    def __init__(self, args: Arguments, counts: Sequence[int]) -> None:
        self.args, self.counts, self.projection = args, counts, hopper_experts._projection(args, biased=True)
        self.w_out = hopper_experts._out_matrices(args)
        x, rows = args.x, sum(counts)
        self.rows, self.a = x.new_empty(rows, args.features), x.new_empty(rows, args.intermediate)
        # a part's rows are not read any more when its results are written
        self.y = self.rows if args.out_features == args.features else x.new_empty(rows, args.out_features)

    def lines(self) -> Tensor:
        """What is sent of each token."""
        return self.args.x

    def instances(self) -> list[Instance]:
        """The kernels."""
        args, dtype = self.args, self.args.dtypes.row
        inner, transposed = args.intermediate, hopper_tiles.is_transposed(self.w_out)
        found: list[Instance] = [Combine(dtype_name(dtype), dtype_name(args.dtypes.result), args.output)]
        for rows in dict.fromkeys(self.counts):
            first = hopper_tiles.activated_instance(dtype, rows, self.projection, args.activation, save=False)
            second = hopper_tiles.choose(dtype, rows, args.num_experts, args.out_features, inner, transposed)
            found += _taken(first, hopper_tiles.with_bias(second, args.b_out is not None))
        return found

    def multiply_in(self, part: Part, weights: Tensor | None) -> None:
        """GEMM1 and the activation, which reads these weights."""
        hopper.activated_gemm(
            self.rows[part.rows], self.projection, self.args.activation, part.offsets, self.a[part.rows],
            weights=weights, order=None if weights is None else part.order, dispatching=part.dispatching,
            taking=part.taking(0),
        )  # fmt: skip

    def multiply_out(self, part: Part) -> None:
        """GEMM2."""
        hopper.grouped_gemm(
            self.a[part.rows], self.w_out, part.offsets, self.y[part.rows], bias=self.args.b_out, taking=part.taking(1)
        )


class Eight:
    """Products in FP8; tokens travel quantised, each with its scales behind it.

    Args:
        args: of the experts.
        counts: rows of both parts.
        quantized: the matrices.
    """

    def __init__(self, args: Arguments, counts: Sequence[int], quantized: Sequence[Tensor]) -> None:
        self.args, self.x = args, hopper_experts._lines(args.x)
        self.w_in, _, self.w_out, _ = hopper_fp8._matrices(quantized)
        self.rows, self.a = (
            [QuantizedRows.empty(self.x, count, columns) for count in counts]
            for columns in (args.features, pad(args.intermediate))
        )
        self.y = self.x.new_empty(sum(counts), args.out_features)

    def lines(self) -> Tensor:
        """What is sent of each token."""
        return hopper_quantize.quantize_lines(self.x, self.args.scale_format)

    def instances(self) -> list[Instance]:
        """The kernels."""
        args, gate_up = self.args, "single" if self.args.gate_up == "single" else "halves"
        first = hopper_fp8_gemm.activated_instance(
            args.activation, gate_up, False, args.b_in is not None, scale_format=args.scale_format
        )
        second = hopper_fp8_gemm.product_instance(args.out_features, args.b_out is not None)
        combine = Combine("bfloat16", dtype_name(args.dtypes.result), args.output)
        return [QuantizeRows("bfloat16", args.scale_format), combine, *_taken(first, second)]

    def multiply_in(self, part: Part, weights: Tensor | None) -> None:
        """GEMM1 and the activation, which reads these weights."""
        args = self.args
        hopper_fp8_gemm.activated(
            self.rows[part.number], self.w_in, args.activation, part.offsets, args.intermediate, self.a[part.number],
            None, biases=hopper_fp8._biases(args), weights=weights, order=None if weights is None else part.order,
            dispatching=part.dispatching, scale_format=args.scale_format, taking=part.taking(0),
        )  # fmt: skip

    def multiply_out(self, part: Part) -> None:
        """GEMM2."""
        bias = None if self.args.b_out is None else hopper_experts._lines(self.args.b_out)
        hopper_fp8_gemm.product(
            self.a[part.number], self.w_out, part.offsets, self.y[part.rows], bias, taking=part.taking(1)
        )


def _taken(first: GroupedGemm, second: GroupedGemm) -> list[Instance]:
    """GEMM1 and GEMM2 as they are launched here."""
    return [replace(first, dispatches=True, records=True, taken=True), replace(second, taken=True)]
