"""Readable torch reference of the backward of `experts`, for the CPU and any GPU.

Only `hidden`, GEMM1's rows, is kept from the forward; the rest is elementwise in x, weight and hidden, and is computed
again, in chunks of rows on the CPU. From the result's gradient back, over rows in expert order:

    output       of_z = gradient of the row's token;  of_y, of_weight = pullback of the output expression
    GEMM2        of_a = of_y @ w_out.T;               w_out and b_out get theirs from (a, of_y)
    activation   of_hidden, of_weight += pullback
    GEMM1        of_row = of_hidden @ w_in.T;         w_in, w_up, b_in and b_up get theirs from (row, of_hidden)
    input        of_x, of_weight += pullback;         a token's gradient is the sum over its rows

The value y, which the weight's gradient of `mul(out, weight)` asks for, is not recomputed: <of_z, y> with
y = a @ w_out.T + b_out equals <of_z @ w_out, a> + <of_z, b_out>, and the first product is GEMM2's own backward.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from moecompile.runtime.combine import token_sum
from moecompile.runtime.contract import PARAMETERS, Arguments, Weighting, expression_leaves, weighting
from moecompile.runtime.elementwise import vjp
from moecompile.runtime.grouped import row_dot
from moecompile.runtime.reference import activate, by_chunk, features, feed, gate_and_up, joined, part, rows_for


def experts_backward(args: Arguments, grad: Tensor, hidden: Tensor, needs: Collection[str]) -> dict[str, Tensor]:
    """Gradients of the arguments named in `needs`, for the result's gradient (T, H2) and the saved hidden rows."""
    return means(args, _Backward(args, grad, hidden, needs).run(), PARAMETERS)


def means(args: Arguments, grads: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The gradients, of which those with these names are divided by what the arguments say."""
    if args.mean_over == 1:
        return grads
    return {name: each / args.mean_over if name in names else each for name, each in grads.items()}


class _Backward:
    """One backward: `grads` holds the parameters' gradients, `of_weight` (R, 1) adds up the routing weight's."""

    def __init__(self, args: Arguments, grad: Tensor, hidden: Tensor, needs: Collection[str]) -> None:
        self.args, self.needs = args, needs
        self.rows = rows_for(args)
        self.chunks = self.rows.chunks()
        self.leaves = self.rows.leaves(args.x, args.weights)
        self.of_result = self.rows.gather(grad)
        self.hidden = hidden[: self.of_result.shape[0]]
        self.grads: dict[str, Tensor] = {}
        self.of_weight = None if args.weights is None else torch.zeros_like(self.leaves["weight"])
        self.weight = {"weight"} if "weights" in needs else set()
        self.to_row = "x" in needs or not self.weight.isdisjoint(expression_leaves(args.input))
        self.to_hidden = self.to_row or not {"w_in", "w_up", "b_in", "b_up"}.isdisjoint(needs)
        self.to_activation = self.to_hidden or not self.weight.isdisjoint(expression_leaves(args.activation))

    def run(self) -> dict[str, Tensor]:
        """The needed gradients by name."""
        args = self.args
        form = weighting(args.output)
        if form is None or (self.weight and args.dtypes.activation == torch.float16):
            # float16 might overflow in of_z @ w_out, which the weight has not scaled yet
            of_hidden = self._back_through_output()
        elif form.of_weight is None or not self.weight:
            of_hidden = self._back_from(self._of_y(form))
        else:
            of_hidden = self._back_through_weighting(form)
        if self.to_hidden:
            assert of_hidden is not None
            of_x = self._back_through_gemm1(of_hidden)
            if of_x is not None:
                self.grads["x"] = token_sum(of_x, args.slots, args.x.dtype, self.rows.complete)
        if self.weight:
            assert self.of_weight is not None
            each = args.slots.reshape(-1, 1)
            of_weights = token_sum(self.of_weight, each, self.of_weight.dtype, self.rows.complete)
            self.grads["weights"] = of_weights.view(args.slots.shape)
        return self.grads

    def _back_through_output(self) -> dict[str, Tensor] | None:
        """Back through an output expression of any form, which needs y once more, to the hidden rows."""
        args = self.args
        a = activate(args, self.leaves, self.hidden, self.chunks)
        y = self.rows.linear(a, args.w_out, args.w_out_transposed, args.b_out)

        def compute(chunk: slice, into: Tensor | None) -> Tensor:
            _, pullback = vjp(args.output, part(self.leaves, chunk) | {"out": y[chunk]}, {"out", *self.weight})
            pulled = self._collect(chunk, pullback(self.of_result[chunk].to(args.dtypes.weighted)))
            return pulled["out"] if into is None else into.copy_(pulled["out"])

        return self._back_from(by_chunk(self.chunks, lambda: torch.empty_like(y), compute))

    def _back_from(self, of_y: Tensor) -> dict[str, Tensor] | None:
        """Back from y to the hidden rows."""
        of_a = self._gemm2(of_y) if self.to_activation else None
        a, of_hidden = self._activation(of_a, None)
        self._gemm2_parameters(of_y, a)
        return of_hidden

    def _back_through_weighting(self, form: Weighting) -> dict[str, Tensor] | None:
        """Back through `mul(out, weight)` with any casts to the hidden rows, and to the weight, without y."""
        args = self.args
        weight, product = self._weight_and_product(form)
        of_product = self.of_result
        if form.after or torch.promote_types(of_product.dtype, product) != product:
            of_product = _uncast(of_product.to(args.dtypes.weighted), product, form.after)
        unscaled = self._gemm2(of_product)
        if args.b_out is not None:
            self._add_to_weight(slice(None), self.rows.bias_dot(args.b_out, of_product))
        a, of_hidden = self._activation(unscaled, weight)
        if not {"w_out", "b_out"}.isdisjoint(self.needs):
            self._gemm2_parameters(self._of_y(form), a)
        return of_hidden

    def _of_y(self, form: Weighting) -> Tensor:
        """Gradient of y (R, H2) under `mul(out, weight)` with any casts, or `out` alone."""
        args, out = self.args, self.args.dtypes.out
        if form.of_weight is None:
            return _uncast(self.of_result.to(args.dtypes.weighted), out, form.after)
        weight, product = self._weight_and_product(form)

        def compute(chunk: slice, into: Tensor | None) -> Tensor:
            of_product = _uncast(self.of_result[chunk].to(args.dtypes.weighted), product, form.after)
            of_y = _uncast(of_product * weight[chunk], out, form.of_out)
            return of_y if into is None else into.copy_(of_y)

        return by_chunk(self.chunks, lambda: self.of_result.new_empty(self.of_result.shape, dtype=out), compute)

    def _weight_and_product(self, form: Weighting) -> tuple[Tensor, torch.dtype]:
        """The weight as it is multiplied (R, 1), and the product's dtype."""
        weight = functools.reduce(Tensor.to, form.of_weight or (), self.leaves["weight"])
        return weight, torch.promote_types((self.args.dtypes.out, *form.of_out)[-1], weight.dtype)

    def _gemm2(self, of_y: Tensor) -> Tensor:
        """Gradient of the activation (R, I)."""
        args = self.args
        return self.rows.linear(of_y.to(args.dtypes.activation), args.w_out, not args.w_out_transposed)

    def _gemm2_parameters(self, of_y: Tensor, a: Tensor | None) -> None:
        args = self.args
        if args.b_out is not None and "b_out" in self.needs:
            self.grads["b_out"] = self.rows.bias_gradient(args.b_out, of_y)
        if "w_out" in self.needs:
            assert a is not None
            of_product = of_y.to(a.dtype)
            self.grads["w_out"] = self.rows.weight_gradient(args.w_out, a, of_product, args.w_out_transposed)

    def _activation(self, of_a: Tensor | None, scale: Tensor | None) -> tuple[Tensor | None, dict[str, Tensor] | None]:
        """The activation, if w_out needs it, and the gradient of the hidden rows, if anything does.

        With a scale (R, 1), of_a is the gradient before the weight scales it, and its product with the activation is
        the weight's own gradient.
        """
        args, count = self.args, self.hidden.shape[0]
        keep, whole = "w_out" in self.needs, len(self.chunks) == 1
        a = (
            None
            if whole or not keep
            else self.hidden.new_empty((count, args.intermediate), dtype=args.dtypes.activation)
        )
        of_hidden = _HiddenGradient(args, self.hidden, whole) if self.to_hidden else None
        for chunk in self.chunks if keep or of_a is not None else ():
            inputs = gate_and_up(args, self.hidden[chunk])
            wanted = {*self.weight, *(inputs if self.to_hidden else ())}
            into = None if a is None else a[chunk]
            value, pullback = vjp(args.activation, part(self.leaves, chunk) | inputs, wanted, into)
            if keep and whole:
                a = value
            if of_a is None:
                continue
            upstream = of_a[chunk]
            if scale is not None:
                self._add_to_weight(chunk, row_dot(upstream, value))
                upstream = (upstream * scale[chunk]).to(value.dtype)
            if self.to_activation:
                pulled = self._collect(chunk, pullback(upstream))
                if of_hidden is not None:
                    of_hidden.put(chunk, pulled)
        return a, None if of_hidden is None else of_hidden.value

    def _collect(self, chunk: slice, pulled: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds the weight's gradient to what it has so far and returns the other leaves' gradients."""
        if "weight" in pulled:
            self._add_to_weight(chunk, pulled.pop("weight"))
        return pulled

    def _add_to_weight(self, chunk: slice, grad: Tensor) -> None:
        assert self.of_weight is not None
        self.of_weight[chunk] += grad

    def _back_through_gemm1(self, of_hidden: dict[str, Tensor]) -> Tensor | None:
        """Back through GEMM1 and the input expression: the rows' gradients of x (R, H), if needed."""
        args = self.args
        row = feed(args, self.leaves, self.chunks)
        of_row = self._linear(of_hidden["in"], row, "w_in", "b_in")
        if args.w_up is not None:
            of_up = self._linear(of_hidden["up"], row, "w_up", "b_up")
            of_row = None if of_row is None or of_up is None else of_row.add_(of_up)
        if of_row is None or args.input == "x":
            return of_row
        upstream = of_row

        def compute(chunk: slice, into: Tensor | None) -> Tensor:
            _, pullback = vjp(args.input, part(self.leaves, chunk), {"x", *self.weight})
            of_x = self._collect(chunk, pullback(upstream[chunk]))["x"]
            return of_x if into is None else into.copy_(of_x)

        of_x = by_chunk(self.chunks, lambda: torch.empty_like(self.leaves["x"]), compute)
        return of_x if "x" in self.needs else None

    def _linear(self, grad: Tensor, row: Tensor, weight: str, bias: str) -> Tensor | None:
        """Gradient of a row through one matrix of GEMM1, if anything asks for it; stores its parameters'."""
        of_product, transposed, matrices = grad.to(row.dtype), self.args.w_in_transposed, getattr(self.args, weight)
        if bias in self.needs:
            self.grads[bias] = self.rows.bias_gradient(getattr(self.args, bias), grad)
        if weight in self.needs:
            self.grads[weight] = self.rows.weight_gradient(matrices, row, of_product, transposed)
        return self.rows.linear(of_product, matrices, not transposed) if self.to_row else None


class _HiddenGradient:
    """The gradient of the hidden rows, put together from its features, a chunk of rows at a time.

    `value` holds it as GEMM1's backward wants it: "in" (R, N), and "up" apart where there are two matrices. One chunk
    is joined; several are written to their places, because joining them would copy once more.
    """

    def __init__(self, args: Arguments, hidden: Tensor, whole: bool) -> None:
        self.args, self.whole, self.like = args, whole, hidden
        self.value: dict[str, Tensor] = {}
        if whole:
            return
        if args.gate_up == "separate":
            size = (hidden.shape[0], args.intermediate)
            self.parts = {"gate": hidden.new_empty(size), "up": hidden.new_empty(size)}
            self.value = {"in": self.parts["gate"], "up": self.parts["up"]}
        else:
            self.value = {"in": torch.empty_like(hidden)}
            self.parts = features(args, self.value["in"])

    def put(self, chunk: slice, grads: dict[str, Tensor]) -> None:
        """Stores a chunk's gradients; a feature that the activation does not read has none."""
        if self.whole:
            wanted = features(self.args, self.like)
            found = [grads[name] if name in grads else torch.zeros_like(wanted[name]) for name in wanted]
            self.value = joined(self.args.gate_up, found)
            return
        for name, destination in self.parts.items():
            destination[chunk] = grads.get(name, 0)


def _uncast(grad: Tensor, dtype: torch.dtype, casts: Sequence[torch.dtype]) -> Tensor:
    """The gradient back through a chain of casts that began at `dtype`."""
    for before in reversed((dtype, *casts[:-1]) if casts else (dtype,)):
        grad = grad.to(before)
    return grad
