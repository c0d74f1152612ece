"""The experts in FP8 on a Hopper GPU: DeepSeek-V3's recipe (section 3.3) in fused kernels.

    x8      = quantise(dispatch(x))                     hidden8, a8 = GEMM1(x8), activation(hidden), quantised
    y       = GEMM2(a8), bfloat16                       result      = combine(y, weights)

    of_y8   = quantise(dispatch(grad)), not yet scaled by the weight w of the row
    of_hidden8, (w a)8, of_w    = back through GEMM2 and the activation, in one GEMM with its epilogue
    of_w_out = of_y8^T (w a)8                           of_w_in     = of_hidden8^T x8
    of_rows  = of_hidden8 w_in8                         of_x        = combine(of_rows)

Saved for the backward are the tokens and GEMM1's rows, in FP8. The gradients of the matrices are sums over rows, which
FP8 products read along memory: their operands are transposed first. What these kernels do not take (`takes`) runs in
PyTorch's operators (`moecompile.runtime.fp8_reference`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import partial

import torch
from torch import Tensor

from moecompile.runtime import hopper_fp8_gemm, hopper_kernels, hopper_quantize, hopper_routing, hopper_rules, lines
from moecompile.runtime.backward import means
from moecompile.runtime.contract import BIASES, Arguments, expression_leaves, weighting
from moecompile.runtime.hopper_experts import NONE, Ready, _has_biases, _lines, _of_weights, _scales, _weights
from moecompile.runtime.hopper_quantize import Matrices, QuantizedRows
from moecompile.runtime.hopper_routing import Dispatching
from moecompile.runtime.hopper_rows import HopperRows
from moecompile.runtime.quantize import BLOCK, E4M3, POWER_OF_TWO, blocks_in, pad
from moecompile.runtime.reference import joined

Tokens = tuple[Tensor, Tensor]
"""Values (T, F) e4m3, and scales (T, ceil(F / 128)) float32: contiguous, or parts of lines."""
quantize_weights = hopper_quantize.quantize_weights
takes_weights = hopper_quantize.takes_weights


def takes(args: Arguments, quantized: Sequence[Tensor]) -> bool:
    """Whether the kernels compute these: bfloat16 outside of the products, sizes of whole lines of 16 bytes."""

    def are_read(_: Arguments) -> bool:
        return all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in quantized)

    rules = (*hopper_rules.FP8, ("the FP8 copies are not contiguous, or not aligned to 16 bytes", are_read))
    return hopper_rules.takes(args, rules, "experts in FP8 are emulated with PyTorch's operators, which is slow")


def forward(
    args: Arguments, quantized: Sequence[Tensor], save: bool, tokens: Tokens | None = None
) -> tuple[Tensor, list[Tensor] | None]:
    """The result (T, H2), and tokens and GEMM1's rows with their scales if they are to be saved.

    Where tokens are given, which are quantised already, x has no values.
    """
    kind = None if tokens is None else "lines" if lines.are_parts(*tokens) else "tokens"
    named = partial(hopper_kernels.of_experts_in_fp8, args, save, kind)
    hopper_kernels.compile_together(args, save, ("fp8", kind), named)
    w_in, _, w_out, _ = _matrices(quantized)
    x = _lines(args.x) if tokens is None else args.w_in
    beside = tokens is not None or hopper_routing.is_beside(args.rows, args.features, 1)
    rows = QuantizedRows.empty(x, args.rows, args.features)
    if tokens is None:
        tokens = _room_for(x) if save or beside else None
        hopper_quantize.quantize_rows(x, args.slots.contiguous(), None if beside else rows, tokens, args.scale_format)
    hidden = QuantizedRows.empty(x, args.saved_rows, w_in.values.shape[1]) if save else None
    a = _gemm1(args, w_in, rows, None if args.recompute else hidden, tokens if beside else None)
    del rows
    y = x.new_empty(args.rows, args.out_features)
    hopper_fp8_gemm.product(a, w_out, args.offsets, y, None if args.b_out is None else _lines(args.b_out), early=True)
    del a
    result = x.new_empty(args.x.shape[0], args.out_features, dtype=args.dtypes.result)
    hopper_routing.combine(y, args.slots.contiguous(), _weights(args), args.output, result)
    saved = [*tokens, hidden.values, hidden.scales] if tokens is not None and hidden is not None else None
    return result, saved


def _gemm1(
    args: Arguments, w_in: Matrices, rows: QuantizedRows, hidden: QuantizedRows | None,
    tokens: tuple[Tensor, Tensor] | None,
) -> QuantizedRows:  # fmt: skip
    """The activations (T*K, I) of GEMM1's rows, which `hidden` gets. `rows` are there, or those of `tokens` to be.

    Tokens are quantised, or counters cleared, before the GEMM: what it reads early was there before that.
    """
    a = QuantizedRows.empty(rows.values, args.rows, pad(args.intermediate))
    read = "weight" in expression_leaves(args.activation)
    hopper_fp8_gemm.activated(
        rows, w_in, args.activation, args.offsets, args.intermediate, a, hidden, biases=_biases(args),
        weights=_weights(args) if read else None, order=args.order if read else None,
        dispatching=None if tokens is None else Dispatching.of(*tokens, args.order, args.slots.shape[1]), early=True,
        scale_format=args.scale_format,
    )  # fmt: skip
    return a


def _hidden_rows(args: Arguments, w_in: Matrices, tokens: tuple[Tensor, Tensor]) -> QuantizedRows:
    """GEMM1's rows once more, as `forward` computes and saves them, of tokens (T, H) and their scales (T, H / 128)."""
    rows = QuantizedRows.empty(tokens[0], args.rows, args.features)
    hidden = QuantizedRows.empty(tokens[0], args.rows, w_in.values.shape[1])
    _gemm1(args, w_in, rows, hidden, tokens)
    return hidden


def backward(
    args: Arguments, quantized: Sequence[Tensor], grad: Tensor, saved: Sequence[Tensor], needs: Set[str],
    main: Mapping[str, Tensor] = NONE, of_tokens: Tokens | None = None, ready: Ready | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of the arguments named in `needs`, for the result's gradient (T, H2).

    Those of the matrices named in `main` are added to its tensors, float32. `of_tokens` is the gradient, where it is
    quantised already: then nobody reads `grad`. `ready` is called if "x" is needed.
    """
    if main:
        kind = ("fp8 adding", *((name, each.stride()) for name, each in main.items()))
        hopper_kernels.compile_together(args, True, kind, partial(hopper_kernels.of_adding_in_fp8, args, main))
    if of_tokens is not None:
        in_lines = lines.are_parts(*of_tokens)
        named = partial(hopper_kernels.of_quantized_gradients, args, in_lines)
        hopper_kernels.compile_together(args, True, ("of quantised gradients", in_lines), named)
    return _Backward(args, quantized, grad, saved, needs, main, of_tokens, ready).run()


class _Backward:
    """One backward. `found` holds the gradients."""

    def __init__(
        self, args: Arguments, quantized: Sequence[Tensor], grad: Tensor, saved: Sequence[Tensor], needs: Set[str],
        main: Mapping[str, Tensor], of_tokens: Tokens | None, ready: Ready | None,
    ) -> None:  # fmt: skip
        self.args, self.needs, self.main, self.found = args, needs | main.keys(), main, dict[str, Tensor]()
        self.of_tokens, self.ready = of_tokens, ready
        form = weighting(args.output)
        assert form is not None
        self.scales = _scales(args, form)
        self.grad, self.slots = _lines(grad.to(torch.bfloat16)), args.slots.contiguous()
        w_in, self.w_in, _, self.w_out = _matrices(quantized)
        x, x_scales, *hidden = saved  # hooks of saved tensors may have laid them elsewhere
        self.x = (x, x_scales) if lines.are_parts(x, x_scales) else (_lines(x), _lines(x_scales))
        self.hidden = QuantizedRows(*map(_lines, hidden))
        if args.recompute:
            self.hidden = _hidden_rows(args, w_in, self.x)
        self.plain = HopperRows(args.offsets, args.order, args.slots.shape[1]) if _has_biases(args) else None
        self.top_k = args.slots.shape[1]

    def run(self) -> dict[str, Tensor]:
        """From the result's gradient to the tokens'; what is not needed any more is freed on the way."""
        args, grad = self.args, self.grad
        of_y = QuantizedRows.empty(grad, args.rows, args.out_features)
        of_tokens, self.of_tokens = self.of_tokens, None
        beside = of_tokens is not None or hopper_routing.is_beside(args.rows, args.out_features, 1)
        if of_tokens is None:
            of_tokens = _room_for(grad) if beside or "w_out" in self.needs else None
            hopper_quantize.quantize_rows(grad, self.slots, None if beside else of_y, of_tokens, args.scale_format)
        dispatching = Dispatching.of(*of_tokens, args.order, self.top_k) if beside and of_tokens is not None else None
        of_hidden, scaled, parts = hopper_fp8_gemm.activation_backward(
            of_y, self.w_out, args.activation, args.offsets, args.intermediate, self.hidden, args.order,
            weights=_weights(args) if "weight" in expression_leaves(args.activation) else None,
            scales=self.scales, dispatching=dispatching, in_place=args.recompute, scale_format=args.scale_format,
        )  # fmt: skip
        del of_y, dispatching, self.hidden
        self._weights_and_biases(parts, of_hidden)
        ends = hopper_quantize.pad_offsets(args.offsets) if self.needs & {"w_in", "w_up", "w_out"} else None
        if of_tokens is not None and ends is not None and "w_out" in self.needs:
            self._of_w_out(of_tokens, scaled, ends)
        del scaled, of_tokens
        if "x" in self.needs:
            features = self.x[0].shape[1]
            of_rows = grad.new_empty(args.rows, features)
            hopper_fp8_gemm.product(of_hidden, self.w_in, args.offsets, of_rows, early=True)
            out = grad.new_empty(self.x[0].shape[0], features)
            self.found["x"] = hopper_routing.combine(of_rows, self.slots, None, "out", out)
            del of_rows
            if self.ready is not None:
                self.ready(self.found)
        if self.needs & {"w_in", "w_up"} and ends is not None:
            rows = self._transpose(
                of_hidden.values, of_hidden.scales, ends, False, True, args.intermediate, args.gate_up == "interleaved"
            )
            del of_hidden
            self._of_w_in(rows, ends)
        return means(args, self.found, BIASES)  # the kernels have seen to the matrices

    def _transpose(
        self,
        values: Tensor,
        scales: Tensor,
        ends: Tensor,
        gathered: bool,
        per_column: bool,
        features: int | None = None,
        interleaved: bool = False,
        scale_format: str = POWER_OF_TWO,
    ) -> QuantizedRows:
        return hopper_quantize.transpose_rows(
            values, scales, self.args.order, self.args.offsets, ends, top_k=self.top_k if gathered else None,
            per_column=per_column, features=features, interleaved=interleaved, scale_format=scale_format,
        )  # fmt: skip

    def _of_w_out(self, of_tokens: tuple[Tensor, Tensor], scaled: QuantizedRows, ends: Tensor) -> None:
        args = self.args
        of_y = self._transpose(*of_tokens, ends, gathered=True, per_column=True)
        a = self._transpose(scaled.values, scaled.scales, ends, False, False, args.intermediate)
        self._outer("w_out", of_y, a, ends, args.w_out, args.w_out_transposed)

    def _of_w_in(self, rows: QuantizedRows, ends: Tensor) -> None:
        """Gradients of GEMM1's matrices: of gate and up projection together where they are one tensor's halves."""
        args, inner = self.args, self.args.intermediate
        x = self._transpose(*self.x, ends, gathered=True, per_column=False, scale_format=args.scale_format)
        for name, matrices, start in (("w_in", args.w_in, 0), ("w_up", args.w_up, inner)):
            if name in self.needs and matrices is not None:
                end = start + inner if args.gate_up == "separate" else None
                part = QuantizedRows(rows.values[start:end], rows.scales[:, start:end])
                self._outer(name, part, x, ends, matrices, args.w_in_transposed)

    def _outer(
        self, name: str, a: QuantizedRows, b: QuantizedRows, ends: Tensor, matrices: Tensor, transposed: bool
    ) -> None:
        """The gradient of the matrices of that name, or what is added to their main gradient."""
        if name in self.main:
            hopper_fp8_gemm.add_outer(a, b, ends, self.main[name], transposed, self.args.mean_over)
        else:
            found = hopper_fp8_gemm.outer(a, b, ends, matrices, transposed, self.args.mean_over)
            self.found[name] = found

    def _weights_and_biases(self, parts: Tensor | None, of_hidden: QuantizedRows) -> None:
        args, needs, plain = self.args, self.needs, self.plain
        of_y = plain.gather(self.grad) if plain is not None and args.b_out is not None else None
        if "weights" in needs and args.weights is not None:
            self.found["weights"] = _of_weights(args, parts, plain, None if self.scales is None else of_y)
        if plain is None:
            return
        if "b_out" in needs and of_y is not None and args.b_out is not None:
            weighted = of_y if self.scales is None else of_y * self.scales.view(-1)[plain.assignments, None]
            self.found["b_out"] = plain.bias_gradient(args.b_out, weighted)
        if needs & {"b_in", "b_up"}:
            self._of_biases(plain, of_hidden)

    def _of_biases(self, plain: HopperRows, of_hidden: QuantizedRows) -> None:
        """Gradients of GEMM1's biases: of the quantised rows, since no others are written."""
        args, inner = self.args, self.args.intermediate
        rows, width = of_hidden.values.shape
        scales = of_hidden.scales[:, :rows].t().unsqueeze(2)
        wide = (of_hidden.values.to(torch.float32).view(rows, -1, BLOCK) * scales).view(rows, width)
        halves = [wide[:, start : start + inner] for start in range(0, width, pad(inner))]
        of_products = joined(args.gate_up, halves)
        for name, bias in (("in", args.b_in), ("up", args.b_up)):
            if f"b_{name}" in self.needs and bias is not None:
                self.found[f"b_{name}"] = plain.bias_gradient(bias, of_products[name])


def _room_for(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Values (T, F) and scales (T, ceil(F / 128)) to quantise the tokens into."""
    scales = tokens.new_empty(tokens.shape[0], blocks_in(tokens.shape[1], BLOCK), dtype=torch.float32)
    return tokens.new_empty(tokens.shape, dtype=E4M3), scales


def _matrices(quantized: Sequence[Tensor]) -> tuple[Matrices, Matrices, Matrices, Matrices]:
    """GEMM1's, its transposed, GEMM2's, its transposed."""
    a, b, c, d, e, f, g, h = quantized
    return Matrices(a, b), Matrices(c, d), Matrices(e, f), Matrices(g, h)


def _biases(args: Arguments) -> tuple[Tensor, ...]:
    """GEMM1's, (E, I) of gate and up projection or of the one matrix."""
    if args.b_in is None:
        return ()
    if args.gate_up == "halves":
        gate, up = _lines(args.b_in.unflatten(1, (2, -1)).transpose(0, 1))
        return gate, up
    if args.gate_up == "interleaved":
        gate, up = _lines(args.b_in.unflatten(1, (-1, 2)).permute(2, 0, 1))
        return gate, up
    return (_lines(args.b_in),) if args.b_up is None else (_lines(args.b_in), _lines(args.b_up))
