"""Which kernels a block of experts will launch, so that they are compiled together and not one by one when first met.

To name one that is not launched costs its compilation; one that is not named is compiled when it is launched.
"""

from __future__ import annotations

import functools

from torch import Tensor

from moecompile.codegen import cubins
from moecompile.codegen.instances import Combine, Dispatch, Instance, PadOffsets, QuantizeRows, TransposeRows
from moecompile.runtime import hopper, hopper_fp8_gemm
from moecompile.runtime.contract import Arguments, weighting
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.hopper import Projection


@functools.lru_cache(maxsize=1024)
def compile_together(instances: tuple[Instance, ...]) -> None:
    """Compiles those that are not there yet, several at a time; shows how far it is on a terminal."""
    cubins.build(instances)


def of_experts(args: Arguments, projection: Projection, w_out: Tensor, save: bool) -> tuple[Instance, ...]:
    """Those of `moecompile.runtime.hopper_experts`; with `save`, of the backward too. w_out is (E, I, H2)."""
    dtype, rows, experts = args.dtypes.row, args.rows, args.num_experts
    name, result = dtype_name(dtype), dtype_name(args.dtypes.result)
    plain = hopper.choose(dtype, rows, experts, args.out_features, args.intermediate, hopper.is_transposed(w_out))
    found: list[Instance] = [
        Dispatch(),
        hopper.activated_instance(dtype, rows, projection, args.activation, save),
        hopper.with_bias(plain, args.b_out is not None),
        Combine(name, result, args.output),
    ]
    if save:
        sizes, w_in = (args.features, args.intermediate, args.width, args.out_features), projection.matrices[0]
        k = args.intermediate if args.gate_up == "separate" else args.width
        found += [
            hopper.backward_instance(dtype, rows, w_out, projection.gate_up, args.activation, _scales_output(args)),
            hopper.choose(dtype, rows, experts, args.features, k, hopper.is_transposed(w_in.mT)),
            *(hopper.choose(dtype, m, experts, n, rows, True, over_rows=True) for m in sizes for n in sizes),
            Combine(name, name, "out"),
        ]
    return tuple(dict.fromkeys(found))


def of_experts_in_fp8(args: Arguments, save: bool) -> tuple[Instance, ...]:
    """Those of `moecompile.runtime.hopper_fp8`; with `save`, of the backward too."""
    gate_up = "single" if args.gate_up == "single" else "halves"
    result = dtype_name(args.dtypes.result)
    found: list[Instance] = [
        QuantizeRows("bfloat16"),
        hopper_fp8_gemm.activated_instance(args.activation, gate_up, save, args.b_in is not None),
        hopper_fp8_gemm.product_instance(args.out_features, args.b_out is not None),
        Combine("bfloat16", result, args.output),
    ]
    if save:
        found += [
            hopper_fp8_gemm.backward_instance(args.activation, gate_up, _scales_output(args)),
            hopper_fp8_gemm.product_instance(args.features, False),
            PadOffsets(),
            TransposeRows(True, True),
            TransposeRows(True, False),
            TransposeRows(False, True),
            TransposeRows(False, False),
            hopper_fp8_gemm.outer_instance(
                args.intermediate, hopper_fp8_gemm.is_turned(args.w_out, args.w_out_transposed)
            ),
            hopper_fp8_gemm.outer_instance(args.features, hopper_fp8_gemm.is_turned(args.w_in, args.w_in_transposed)),
            Combine("bfloat16", "bfloat16", "out"),
        ]
    return tuple(dict.fromkeys(found))


def _scales_output(args: Arguments) -> bool:
    form = weighting(args.output)
    return args.weights is not None and form is not None and form.of_weight is not None
