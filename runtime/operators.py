"""The operators of the namespace `moecompile`: schemas, fake kernels, torch kernels and autograd.

    plan(expert_ids, num_experts, room) -> (counts, offsets, slots, order)
    count_experts(expert_ids, num_experts) -> counts
    experts(x, weights, offsets, slots, order, w_in, w_out, w_up, b_in, b_up, b_out, ...) -> result
    experts_forward(the same) -> (result, hidden)
    experts_backward(grad, hidden, the same, needs) -> the needed gradients
    experts_backward_adding(the same, main gradients) -> all gradients, without elements where they are not needed
    quantize_weights(w, w_up, gate_up, transposed, backward) -> (values, scales, values_t, scales_t)
    quantize(x) -> (values, scales)
    quantize_gradient(grad) -> (values, scales, values_t, scales_t)
    along_tokens(values, scales, scale_block) -> (values, scales)
    scaled_mm(a, a_scales, b, b_scales, bias, out_features, dtype) -> result
    linear_fp8(x, weight, bias, values, scales, quantized) -> result
    experts_fp8(the arguments of experts, quantized) -> result
    experts_fp8_forward(the same, lines) -> (result, saved)
    experts_fp8_backward(grad, saved, the same but x, needs, lines) -> the needed gradients
    experts_fp8_backward_adding(the same, main gradients) -> likewise
    exchange_plan(expert_ids, num_experts, ranks, capacity) -> (sent, home)
    dispatch_start(x, expert_ids, weights, sent, home, ...) -> what dispatch_wait(...) -> (rows, ids, weights, came) has
    combine_start(y, weights, came, ...) -> what combine_wait(..., sent, home, ...) -> (result, weights) has
    came_within(came, counts, room) -> came
    to_lines(x) -> lines
    from_lines(lines, features) -> (values, scales)
    after(what, done) -> what
    exchanged_experts(x, expert_ids, weights, sent, home, w_in, w_out, ...) -> result
    exchanged_experts_forward(the same, again) -> (result, saved)
    exchanged_experts_backward(grad, saved, x, the same from sent on, needs, again) -> the needed gradients
    exchanged_experts_backward_adding(the same, main gradients) -> likewise
    gather_experts(local, ranks, group, mean) -> whole
    scatter_gradient(grad, ranks, group, mean) -> local
    own_experts(whole, ranks, group) -> local
    among_others(own, ranks, group) -> whole
    mean_gradient(local, ranks) -> itself

`experts` differentiates through `experts_forward` and `experts_backward`, so that AOTAutograd's graphs hold `experts`
in inference and the other two in training; `experts_fp8` likewise. Its products are of FP8 operands, its gradients
those of x, of the biases and of the master weights w_in, w_up and w_out, which it multiplies by nothing itself.
`linear_fp8` is `scaled_mm`, with a derivative made of `quantize_gradient`, `along_tokens` and `scaled_mm`; these are
what AOTAutograd's graphs hold. The exchange of tokens between ranks is described in `moecompile.runtime.exchange`,
experts that are spread over ranks in `moecompile.runtime.sharded`.

Shapes, for T tokens of H features, K experts a token, E experts of inner size I, results of H2 features:

    expert_ids (T, K) any integer dtype; -1 means no expert, any other id outside [0, E) is an error
    counts (E,) int32     assignments to each expert
    offsets (E,) int32    the end of each expert's rows
    slots (T, K) int32    the row of an assignment in expert order, -1 if it has no expert, or no row
    order (T*K,) int32    the assignment t*K+k of each row, -1 beyond offsets[-1]; stable, so token-major in an expert
    room                  for so many rows, if not for all T*K: so many order has. What comes beyond has no row, and is
        in counts alone
    x (T, H); weights (T, K) or None
    w_in (E, N, H), or (E, H, N) if w_in_transposed; w_up like w_in, only for gate_up="separate"
    w_out (E, H2, I), or (E, I, H2) if w_out_transposed
    b_in (E, N), b_up (E, I), b_out (E, H2)
    gate_up: "halves" (N = 2I, gate first), "interleaved" (N = 2I, gate at even features), "separate" (N = I, w_up
        holds the other), "single" (N = I, no gate)
    result (T, H2) in out_dtype, or in the dtype of the output expression's value
    hidden (T*K, N), or (T*K, 2I) for "separate": GEMM1's rows with bias; anything beyond offsets[-1]; no rows with
        recompute
    needs: bools for (x, weights, w_in, w_out, w_up, b_in, b_up, b_out)
    quantized: [*quantize_weights(w_in, w_up, gate_up, w_in_transposed), *quantize_weights(w_out, w_out_transposed)],
        e4m3 values and float32 scales of 128x128 blocks, padded (`moecompile.runtime.quantize`). The transposed ones,
        which only the backward reads, have no elements if backward=False. The backward needs these, and the first two
        with recompute; others may have no elements there
    of linear_fp8: x (..., K), weight (N, K), bias (N,) or None, of one dtype, bfloat16 or float16; values, scales =
        quantize(x), a scale for each 1x128; quantized = quantize_weights(weight); result (..., N)
    of along_tokens: values, scales of `quantize`, (..., F) for T tokens; scale_block "1x128" or "128x128"; results
        token-major: values (F, P), P tokens in whole blocks of 128, and scales (F, P / 128) or (ceil(F / 128), P / 128)
    of quantize_gradient: what `quantize` gives, and of that what `along_tokens` gives with "1x128"
    of scaled_mm: a, a_scales of `quantize` or of `along_tokens` with "1x128", (..., F); b (N', F') and b_scales
        (N' / 128, F' / 128) in whole blocks; bias (N,); out_features N; result (..., N) of dtype
    saved: x and hidden rows in e4m3 with scales for 1x128 (`moecompile.runtime.fp8_contract`)
    scale_format: of the scales of what forward products and the gradients of rows read, "power_of_two" or "float32";
        of along_tokens that of its argument. The gradients of matrices read powers of two
    lines: whether x, or the gradient, are lines of `to_lines` (`moecompile.runtime.lines`): rows that have travelled
    kernels: None (moecompile's own where the device has them) or "reference" (PyTorch's)
    recompute: whether the backward computes the hidden rows again instead of getting them
    mean_over: what the gradients of matrices and biases are divided by: they are sums over tokens of so many ranks,
        and are to be their mean
    held: whether somebody keeps `quantized` beyond the call. If not, a backward with recompute makes w_in's anew
    main_w_in, main_w_up, main_w_out: float32, of the shapes of w_in, w_up and w_out, or None. In backward a matrix's
        gradient is added to its main gradient, and the matrix itself gets none: by every backward that runs, whatever
        it was asked for (the backend's option `main_grad` refuses those that nobody means so)

`input`, `activation` and `output` are expressions (`moecompile.codegen.expression`) of the leaves x; gate and up, or
hidden; out; and, in each, weight. In FP8 x, the experts' weights and biases have one dtype, bfloat16 or float16, the
input is x, and the output a product of out and weight, or out. Wrong shapes and expressions raise ValueError, wrong
dtypes TypeError, wrong ids IndexError on the CPU and a device-side assertion elsewhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

ARGUMENTS = (
    "Tensor x, Tensor? weights, Tensor offsets, Tensor slots, Tensor order, Tensor w_in, Tensor w_out, "
    "Tensor? w_up=None, Tensor? b_in=None, Tensor? b_up=None, Tensor? b_out=None, *, str activation, str gate_up, "
    'str input="x", str output="mul(out, weight)", bool w_in_transposed=False, bool w_out_transposed=False, '
    "ScalarType? out_dtype=None, str? kernels=None, bool recompute=False, SymInt? room=None, int mean_over=1"
)
WITHOUT_X = ARGUMENTS.removeprefix("Tensor x, ")
MAIN = "Tensor? main_w_in=None, Tensor? main_w_out=None, Tensor? main_w_up=None"
ADDED_TO = "Tensor(a!)? main_w_in=None, Tensor(b!)? main_w_out=None, Tensor(c!)? main_w_up=None"
LINEAR = "Tensor x, Tensor weight, Tensor? bias, Tensor values, Tensor scales, Tensor[] quantized"
FORMAT = 'str scale_format="power_of_two"'
FP8 = f"{ARGUMENTS}, {FORMAT}"
FP8_WITHOUT_X = f"{WITHOUT_X}, {FORMAT}"
EXCHANGE = "int ranks, str group, int capacity, int slot, int sms, float patience"
PLANNED = "Tensor sent, Tensor home"
EXCHANGED = ARGUMENTS.replace("Tensor offsets, Tensor slots, Tensor order", PLANNED).replace(
    "Tensor? weights", "Tensor expert_ids, Tensor? weights", 1
)
OF_EXCHANGED = f"{FORMAT}, int num_experts, {EXCHANGE}, Tensor[] quantized"
RETURNING = f"Tensor grad, Tensor[] saved, Tensor? x, {PLANNED}, Tensor w_in{ARGUMENTS.partition('Tensor w_in')[2]}"
# Of operators that write into arguments, AOTAutograd takes no lists.
ALL = "(Tensor x, Tensor weights, Tensor w_in, Tensor w_out, Tensor w_up, Tensor b_in, Tensor b_up, Tensor b_out)"
SCHEMAS = (
    "plan(Tensor expert_ids, int num_experts, *, SymInt? room=None) "
    "-> (Tensor counts, Tensor offsets, Tensor slots, Tensor order)",
    "count_experts(Tensor expert_ids, int num_experts) -> Tensor",
    f"experts({ARGUMENTS}, {MAIN}) -> Tensor",
    f"experts_forward({ARGUMENTS}) -> (Tensor out, Tensor hidden)",
    f"experts_backward(Tensor grad, Tensor hidden, {ARGUMENTS}, bool[] needs) -> Tensor[]",
    f"experts_backward_adding(Tensor grad, Tensor hidden, {ARGUMENTS}, bool[] needs, {ADDED_TO}) -> {ALL}",
    'quantize_weights(Tensor w, Tensor? w_up=None, *, str gate_up="single", bool transposed=False, bool backward=True, '
    f"{FORMAT}) -> (Tensor values, Tensor scales, Tensor values_t, Tensor scales_t)",
    f"quantize(Tensor x, *, {FORMAT}) -> (Tensor values, Tensor scales)",
    f"quantize_gradient(Tensor grad, *, {FORMAT}) -> (Tensor values, Tensor scales, Tensor values_t, Tensor scales_t)",
    f"along_tokens(Tensor values, Tensor scales, *, str scale_block, {FORMAT}) -> (Tensor values, Tensor scales)",
    "scaled_mm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? bias=None, *, SymInt out_features, "
    "ScalarType dtype, str? kernels=None) -> Tensor",
    f"linear_fp8({LINEAR}, *, {FORMAT}, str? kernels=None) -> Tensor",
    f"experts_fp8({FP8}, Tensor[] quantized, {MAIN}, bool held=False) -> Tensor",
    f"experts_fp8_forward({FP8}, Tensor[] quantized, bool lines=False) -> (Tensor out, Tensor[] saved)",
    f"experts_fp8_backward(Tensor grad, Tensor[] saved, {FP8_WITHOUT_X}, Tensor[] quantized, bool[] needs, "
    "bool lines=False) -> Tensor[]",
    f"experts_fp8_backward_adding(Tensor grad, Tensor[] saved, {FP8_WITHOUT_X}, Tensor[] quantized, bool[] needs, "
    f"{ADDED_TO}, bool lines=False) -> {ALL}",
    f"to_lines(Tensor x, *, {FORMAT}) -> Tensor",
    "from_lines(Tensor lines, *, int features) -> (Tensor values, Tensor scales)",
    "exchange_plan(Tensor expert_ids, *, int num_experts, int ranks, int capacity) -> (Tensor sent, Tensor home)",
    f"dispatch_start(Tensor x, Tensor? expert_ids, Tensor? weights, {PLANNED}, *, {EXCHANGE}, bool aside=False) "
    "-> (Tensor rows, Tensor ids, Tensor weights, Tensor token)",
    "dispatch_wait(Tensor rows, Tensor ids, Tensor weights, Tensor token, Tensor x, Tensor? expert_ids, Tensor? given, "
    f"{PLANNED}, *, int num_experts, {EXCHANGE}) -> (Tensor rows, Tensor ids, Tensor weights, Tensor came)",
    f"combine_start(Tensor y, Tensor? weights, Tensor came, {PLANNED}, *, {EXCHANGE}, bool aside=False) "
    "-> (Tensor back, Tensor of_weights, Tensor token)",
    f"combine_wait(Tensor back, Tensor of_weights, Tensor token, Tensor y, Tensor? weights, {PLANNED}, *, {EXCHANGE}) "
    "-> (Tensor result, Tensor weights)",
    "came_within(Tensor came, Tensor counts, *, int room) -> Tensor",
    "after(Tensor what, Tensor done) -> Tensor",
    f"exchanged_experts({EXCHANGED}, {OF_EXCHANGED}, {MAIN}, bool held=False) -> Tensor",
    f"exchanged_experts_forward({EXCHANGED}, {OF_EXCHANGED}, bool again=False) -> (Tensor out, Tensor[] saved)",
    f"exchanged_experts_backward({RETURNING}, {OF_EXCHANGED}, bool[] needs, bool again=False) -> Tensor[]",
    f"exchanged_experts_backward_adding({RETURNING}, {OF_EXCHANGED}, bool[] needs, {ADDED_TO}, bool again=False) "
    f"-> {ALL}",
    "gather_experts(Tensor local, *, int ranks, str group, bool mean) -> Tensor",
    "scatter_gradient(Tensor grad, *, int ranks, str group, bool mean) -> Tensor",
    "own_experts(Tensor whole, *, int ranks, str group) -> Tensor",
    "among_others(Tensor own, *, int ranks, str group) -> Tensor",
)
ROOMS = {
    "kernels": ("plan", "experts", "experts_forward", "experts_backward", "experts_backward_adding"),
    "counting": ("count_experts",),
    "fp8_experts": (
        "quantize_weights",
        "experts_fp8",
        "experts_fp8_forward",
        "experts_fp8_backward",
        "experts_fp8_backward_adding",
    ),
    "linear_fp8": ("quantize", "quantize_gradient", "along_tokens", "scaled_mm", "linear_fp8"),
    "exchange": (
        "exchange_plan",
        "dispatch_start",
        "dispatch_wait",
        "came_within",
        "combine_start",
        "combine_wait",
        "after",
    ),
    "exchanged": ("exchanged_experts",),
    "exchanged_training": (
        "exchanged_experts_forward",
        "exchanged_experts_backward",
        "exchanged_experts_backward_adding",
    ),
    "lines": ("to_lines", "from_lines"),
    "sharded": ("gather_experts", "scatter_gradient", "own_experts", "among_others"),
}
"""The module that computes an operator, and its fake."""
ABOVE = {
    "kernels": "autograd",
    "fp8_experts": "autograd",
    "linear_fp8": "autograd_linear",
    "exchange": "autograd_exchange",
    "exchanged": "autograd_exchanged",
    "exchanged_training": "autograd_exchanged",
    "sharded": "autograd_exchange",
}
"""The module with their derivatives."""
WITHOUT = ("plan", "count_experts", "exchange_plan", "came_within", "after", "to_lines", "from_lines")
"""Operators that have none: they give integers, or are in AOTAutograd's graphs alone."""


def _late(module: str, function: str) -> Callable[..., Any]:
    """The function of that module, which is imported when it is first called: `import moecompile` only registers."""
    found: Any = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal found
        if found is None:
            found = importlib.import_module(f"moecompile.runtime.{module}")
        return getattr(found, function)(*args, **kwargs)

    return call


library = torch.library.Library("moecompile", "DEF")
for _schema in SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _room, _names in ROOMS.items():
    for _name in _names:
        library.impl(_name, _late(_room, _name), "CompositeExplicitAutograd")
        library.impl(_name, _late("derivatives", "batched"), "FuncTorchBatched")
        torch.library.register_fake(f"moecompile::{_name}", _late(_room, f"fake_{_name}"), lib=library)
        if _name not in WITHOUT:
            library.impl(_name, _late(ABOVE[_room], _name), "Autograd")

# A view, which autograd and functionalization have to see: they get what it is made of.
library.define("mean_gradient(Tensor(a) local, *, int ranks) -> Tensor(a)", tags=(torch.Tag.pt2_compliant_tag,))
library.impl("mean_gradient", _late("autograd_exchange", "mean_gradient"), "CompositeImplicitAutograd")
