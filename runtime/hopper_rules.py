"""What the kernels of a Hopper GPU take, as tables of rules. The rest runs in PyTorch, and the log says why, once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from moecompile.codegen.activation import print_struct
from moecompile.runtime import hopper
from moecompile.runtime.contract import Arguments, expression_leaves, weighting
from moecompile.runtime.grouped import aligned
from moecompile.runtime.once import warn_once

DTYPES = (torch.bfloat16, torch.float16)
RESULTS = (*DTYPES, torch.float32)
Rule = tuple[str, Callable[[Arguments], bool]]
"""What is said of arguments that break the rule, a format of `args`; and whether arguments keep it."""


def takes(args: Arguments, rules: Iterable[Rule], instead: str) -> bool:
    """Whether the kernels compute these checked arguments: where there are any rows, and all of these rules hold.

    If they are to run here, and do not because a rule is broken, the log says it, with what runs `instead`, once.
    """
    if args.kernels is not None or args.rows == 0 or not hopper.serves(args.w_in.device):
        return False
    for words, holds in (*SHARED, *rules):
        if not holds(args):
            warn_once(f"{instead}: {words.format(args=args)}")
            return False
    return True


def _matrices(args: Arguments) -> Iterator[Tensor]:
    return (matrix for matrix in (args.w_in, args.w_out, args.w_up) if matrix is not None)


def _biases(args: Arguments) -> Iterator[Tensor]:
    return (bias for bias in (args.b_in, args.b_up, args.b_out) if bias is not None)


def _sizes(args: Arguments) -> tuple[int, int, int]:
    return args.features, args.intermediate, args.out_features


def _dtypes_inside(args: Arguments) -> set[torch.dtype]:
    """Of x and all that lies between dispatch and combine."""
    dtypes = args.dtypes
    inside = {args.x.dtype, dtypes.row, dtypes.hidden, dtypes.activation, dtypes.out}
    return inside | {bias.dtype for bias in _biases(args)}


@functools.lru_cache(maxsize=256)
def _is_printable(expression: str) -> bool:
    """Whether kernels can compute the expression: its casts are to dtypes that they round to."""
    try:
        print_struct("Value", expression, tuple(sorted(expression_leaves(expression))))
    except ValueError:
        return False
    return True


SIZES = "hidden, intermediate and output size {args.features}, {args.intermediate} and {args.out_features} are not all "

SHARED: tuple[Rule, ...] = (
    ("experts get {args.input}, not x itself", lambda args: args.input == "x"),
    ("{args.output} is no product of out and the weight", lambda args: weighting(args.output) is not None),
    (
        "offsets and order are not contiguous",
        lambda args: args.offsets.is_contiguous() and args.order.is_contiguous(),
    ),
    (
        "one of gate and up projection has a bias, the other has none",
        lambda args: args.gate_up != "separate" or (args.b_in is None) == (args.b_up is None),
    ),
    ("kernels cannot print {args.activation}", lambda args: _is_printable(args.activation)),
    ("kernels cannot print {args.output}", lambda args: _is_printable(args.output)),
)
"""Of both precisions."""

SIXTEEN_BITS: tuple[Rule, ...] = (
    (
        "x, the weights, the biases and all between are not of one dtype, bfloat16 or float16",
        lambda args: len(inside := _dtypes_inside(args)) == 1 and inside <= {*DTYPES},
    ),
    ("the result is of {args.dtypes.result}", lambda args: args.dtypes.result in RESULTS),
    (SIZES + "multiples of 8", lambda args: not any(size % 8 for size in _sizes(args))),
    (
        "rows of the weights do not begin at multiples of 16 bytes",
        lambda args: all(matrix.data_ptr() % 16 == 0 and aligned(matrix) for matrix in _matrices(args)),
    ),
    (
        "biases are not contiguous, or do not begin at a multiple of 4 bytes",
        lambda args: all(bias.is_contiguous() and bias.data_ptr() % 4 == 0 for bias in _biases(args)),
    ),
)
"""Of experts in the model's precision."""

FP8: tuple[Rule, ...] = (
    (
        "the model is in {args.dtypes.row}; its experts have kernels for bfloat16",
        lambda args: {torch.bfloat16} == {tensor.dtype for tensor in (args.x, *_matrices(args), *_biases(args))},
    ),
    (SIZES + "multiples of 16", lambda args: all(size and size % 16 == 0 for size in _sizes(args))),
)
"""Of experts in FP8."""
