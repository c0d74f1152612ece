"""Which kernels the experts of a block will launch, so that they are compiled together and not one by one.

To name one that is not launched costs its compilation; one that is not named is compiled when it is launched, as are
those of `plan` and of `quantize_weights`, which come before the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from moecompile.codegen import cubins
from moecompile.codegen.gemms import Added, GroupedGemm
from moecompile.codegen.instances import (
    RESULTS,
    Collect,
    Combine,
    Dispatch,
    Instance,
    PadOffsets,
    QuantizeRows,
)
from moecompile.runtime import hopper_fp8_gemm, hopper_routing, hopper_tiles
from moecompile.runtime.contract import DIFFERENTIABLE, Arguments, weighting
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.hopper_quantize import transposing_instance
from moecompile.runtime.hopper_tiles import Projection
from moecompile.runtime.quantize import POWER_OF_TWO

THERE: set[Hashable] = set()
"""What decides which kernels a call needs, of the calls whose kernels have been compiled."""


def compile_together(args: Arguments, train: bool, kind: Hashable, named: Callable[[], Sequence[Instance]]) -> None:
    """Compiles the kernels that are named for such a call, unless a call like it has done so."""
    key = (
        *(_layout(getattr(args, name)) for name in DIFFERENTIABLE),
        *(args.rows, args.activation, args.gate_up, args.output, args.w_in_transposed, args.w_out_transposed),
        *(args.out_dtype, args.recompute, args.scale_format, train, kind),
    )
    if key not in THERE:
        cubins.build(named())
        if len(THERE) >= 4096:  # shapes of prompts; to build again what is there takes a moment
            THERE.clear()
        THERE.add(key)


def _layout(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def of_experts(args: Arguments, projection: Projection, w_out: Tensor, train: bool) -> list[Instance]:
    """Those of `moecompile.runtime.hopper_experts`; to train, of the backward too. w_out is (E, I, H2)."""
    dtype, rows, experts = args.dtypes.row, args.rows, args.num_experts
    name, result = dtype_name(dtype), dtype_name(args.dtypes.result)
    plain = hopper_tiles.choose(
        dtype, rows, experts, args.out_features, args.intermediate, hopper_tiles.is_transposed(w_out)
    )
    beside = hopper_routing.is_beside(rows, args.features, dtype.itemsize)
    first = [
        hopper_tiles.activated_instance(dtype, rows, projection, args.activation, save) for save in _saves(args, train)
    ]
    found: list[Instance] = [
        *([] if beside else [Dispatch()]),
        *(replace(each, dispatches=beside) for each in first),
        hopper_tiles.with_bias(plain, args.b_out is not None),
        Combine(name, result, args.output),
    ]
    if train:
        w_in = projection.matrices[0]
        k = args.intermediate if args.gate_up == "separate" else args.width
        found += [
            Dispatch(),
            hopper_tiles.backward_instance(
                dtype, rows, w_out, projection.gate_up, args.activation, _scales_output(args)
            ),
            hopper_tiles.choose(dtype, rows, experts, args.features, k, hopper_tiles.is_transposed(w_in.mT)),
            *_of_matrices(args),
            Combine(name, name, "out"),
            *_collecting(args),
        ]
    return found


def of_experts_in_fp8(args: Arguments, train: bool, given: str | None = None) -> list[Instance]:
    """Those of `moecompile.runtime.hopper_fp8`; to train, of the backward too.

    GEMM1 always dispatches what is `given` quantised: "tokens", or "lines".
    """
    gate_up, biased = "single" if args.gate_up == "single" else "halves", args.b_in is not None
    result, saves, scales = dtype_name(args.dtypes.result), _saves(args, train), args.scale_format
    beside, back_beside = (
        hopper_routing.is_beside(args.rows, columns, 1) for columns in (args.features, args.out_features)
    )
    beside |= given is not None
    again = train and args.recompute  # what is computed again is always dispatched beside
    found: list[Instance] = [
        QuantizeRows("bfloat16", scales),
        *(
            replace(
                hopper_fp8_gemm.activated_instance(
                    args.activation, gate_up, save, biased, beside or (again and save), scales
                ),
                records=given == "lines",
            )
            for save in saves
        ),
        hopper_fp8_gemm.product_instance(args.out_features, args.b_out is not None),
        Combine("bfloat16", result, args.output),
    ]
    if train:
        turned_in, turned_out = (
            hopper_fp8_gemm.is_turned(matrices, transposed)
            for matrices, transposed in ((args.w_in, args.w_in_transposed), (args.w_out, args.w_out_transposed))
        )
        found += [
            hopper_fp8_gemm.backward_instance(args.activation, gate_up, _scales_output(args), back_beside, scales),
            hopper_fp8_gemm.product_instance(args.features, False),
            PadOffsets(),
            transposing_instance(True, True, scales),
            transposing_instance(True, False, scales),
            transposing_instance(False, True, scales),
            transposing_instance(False, False, POWER_OF_TWO),
            hopper_fp8_gemm.outer_instance(args.intermediate, turned_out),
            hopper_fp8_gemm.outer_instance(args.features, turned_in),
            Combine("bfloat16", "bfloat16", "out"),
            *_collecting(args),
        ]
    return found


def of_quantized_gradients(args: Arguments, in_lines: bool) -> list[Instance]:
    """The one that dispatches them, and no fewer than many rows."""
    gate_up = "single" if args.gate_up == "single" else "halves"
    how = args.activation, gate_up, _scales_output(args), True, args.scale_format
    return [replace(hopper_fp8_gemm.backward_instance(*how), records=in_lines)]


def of_adding(args: Arguments) -> list[GroupedGemm]:
    """Those that add gradients of matrices to float32 ones."""
    return [replace(each, epilogue=Added()) for each in _of_matrices(args)]


def of_adding_in_fp8(args: Arguments, main: Mapping[str, Tensor]) -> list[Instance]:
    """The same of FP8."""
    layouts = {"w_in": args.w_in_transposed, "w_up": args.w_in_transposed, "w_out": args.w_out_transposed}
    return [
        hopper_fp8_gemm.add_instance(
            args.intermediate if name == "w_out" else args.features, (each.mT if layouts[name] else each).stride(2) != 1
        )
        for name, each in main.items()
    ]


def of_taken(args: Arguments, main: Mapping[str, Tensor]) -> list[Instance]:
    """Those of the gradients of GEMM1's matrices whose blocks take tiles when they are free, or that add them."""
    made = dict.fromkeys(_of_matrices(args, (args.features, args.intermediate, args.width)))
    adding = {"w_in", "w_up"} & main.keys()
    return [replace(each, taken=True, epilogue=Added() if adding else each.epilogue) for each in made]


def _of_matrices(args: Arguments, sizes: Sequence[int] = ()) -> list[GroupedGemm]:
    """Those of the gradients of matrices of any of these sizes; of all that there are if none are given."""
    dtype, rows = args.dtypes.row, args.rows
    sizes = sizes or (args.features, args.intermediate, args.width, args.out_features)
    return [
        hopper_tiles.choose(dtype, m, args.num_experts, n, rows, True, over_rows=True) for m in sizes for n in sizes
    ]


def _saves(args: Arguments, train: bool) -> list[bool]:
    """Whether GEMM1 saves its rows: in the forward, and in the backward if it computes them again."""
    return [False, True] if train and args.recompute else [train]


def _collecting(args: Arguments) -> list[Instance]:
    """What the routing weights' gradient needs."""
    if args.weights is None:
        return []
    name = dtype_name(args.weights.dtype)
    return [Collect(name if name in RESULTS else "float32")]


def _scales_output(args: Arguments) -> bool:
    form = weighting(args.output)
    return args.weights is not None and form is not None and form.of_weight is not None
