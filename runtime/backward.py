"""Readable torch reference of the backward of `experts`, for the CPU and any GPU.

Only `hidden`, GEMM1's rows, is kept from the forward; the rest is elementwise in x, weight and hidden, and is computed
again. For each group of rows (see `moecompile.runtime.grouped`), from the result's gradient back:

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
from moecompile.runtime.contract import Arguments, Weighting, expression_leaves, weighting
from moecompile.runtime.elementwise import vjp
from moecompile.runtime.grouped import Group, part, row_dot
from moecompile.runtime.reference import gate_and_up, walk_over

PARAMETERS = ("w_in", "w_out", "w_up", "b_in", "b_up", "b_out")


def experts_backward(args: Arguments, grad: Tensor, hidden: Tensor, needs: Collection[str]) -> dict[str, Tensor]:
    """Gradients of the arguments named in `needs`, for the result's gradient (T, H2) and the saved hidden rows."""
    walk = walk_over(args)
    grads = {name: walk.gradient_like(getattr(args, name)) for name in PARAMETERS if name in needs}
    of_x = walk.room(args.x, args.x.shape[1], args.x.dtype) if "x" in needs else None
    of_weight = None
    if args.weights is not None and "weights" in needs:
        of_weight = args.weights.new_empty(args.rows, 1)
    for group in walk:
        backward = _GroupBackward(args, group, needs, grads)
        of_rows = backward.run(grad, hidden, part(of_x, group))
        if "x" in needs and of_x is None:
            of_x = of_rows
        if of_weight is not None:
            of_weight[group.rows] = backward.of_weight
    if of_x is not None:
        grads["x"] = token_sum(of_x, args.slots, args.x.dtype, walk.complete)
    if of_weight is not None:
        each = args.slots.reshape(-1, 1)
        grads["weights"] = token_sum(of_weight, each, of_weight.dtype, walk.complete).view(args.slots.shape)
    return grads


class _GroupBackward:
    """The backward of one group of rows; parameters' gradients go to `grads`, the weight's adds up in `of_weight`."""

    def __init__(self, args: Arguments, group: Group, needs: Collection[str], grads: dict[str, Tensor]) -> None:
        self.args, self.group, self.needs, self.grads = args, group, needs, grads
        self.of_weight: Tensor | float = 0.0
        self.weight = {"weight"} if "weights" in needs else set()
        self.to_row = "x" in needs or not self.weight.isdisjoint(expression_leaves(args.input))
        self.to_hidden = self.to_row or not {"w_in", "w_up", "b_in", "b_up"}.isdisjoint(needs)
        self.to_activation = self.to_hidden or not self.weight.isdisjoint(expression_leaves(args.activation))

    def run(self, grad: Tensor, hidden: Tensor, of_x: Tensor | None) -> Tensor | None:
        """Goes back through the group; the rows' gradients of x (n, H), if needed, in `of_x` if given."""
        args = self.args
        leaves = self.group.leaves(args.x, None if args.weights is None else args.weights.reshape(-1))
        features = gate_and_up(args, hidden[self.group.rows])
        wanted = {*self.weight, *(features if self.to_hidden else ())}
        a, pullback = vjp(args.activation, leaves | features, wanted)
        of_result = self.group.gather(grad)
        form = weighting(args.output)
        if form is None or ("weights" in self.needs and a.dtype == torch.float16):
            # float16 might overflow in of_z @ w_out, which the weight has not scaled yet
            of_a = self._output(of_result, a, leaves)
        else:
            of_a = self._weighted_output(form, of_result, a, leaves)
        if of_a is None:
            return None
        pulled = self._collect(pullback(of_a))
        if not self.to_hidden:
            return None
        of_features = {name: pulled.get(name, torch.zeros_like(value)) for name, value in features.items()}
        return self._gemm1(of_features, leaves, of_x)

    def _collect(self, pulled: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds the weight's gradient to what it has so far and returns the other leaves' gradients."""
        if "weight" in pulled:
            self.of_weight = pulled.pop("weight") + self.of_weight
        return pulled

    def _output(self, of_result: Tensor, a: Tensor, leaves: dict[str, Tensor]) -> Tensor | None:
        """Back through an output expression of any form, which needs y once more, and GEMM2."""
        args = self.args
        y = self.group.linear(a, args.w_out, args.w_out_transposed, args.b_out)
        _, pullback = vjp(args.output, leaves | {"out": y}, {"out", *self.weight})
        of_y = self._collect(pullback(of_result.to(args.dtypes.weighted)))["out"]
        self._gemm2_parameters(of_y, a)
        return self._gemm2(of_y) if self.to_activation else None

    def _weighted_output(
        self, form: Weighting, of_result: Tensor, a: Tensor, leaves: dict[str, Tensor]
    ) -> Tensor | None:
        """Back through `mul(out, weight)` with any casts, or `out` alone, and GEMM2, without y."""
        args, weight = self.args, None
        of_product = of_z = of_result.to(args.dtypes.weighted)
        if form.of_weight is not None:
            weight = functools.reduce(Tensor.to, form.of_weight, leaves["weight"])
            product = torch.promote_types((args.dtypes.out, *form.of_out)[-1], weight.dtype)
            of_product = _uncast(of_z, product, form.after)
        if weight is None or not self.weight or not {"w_out", "b_out"}.isdisjoint(self.needs):
            casts = form.after if weight is None else form.of_out
            of_y = _uncast(of_product if weight is None else of_product * weight, args.dtypes.out, casts)
            self._gemm2_parameters(of_y, a)
            if weight is None or not self.weight:
                return self._gemm2(of_y) if self.to_activation else None
        widened = not form.after and torch.promote_types(of_result.dtype, of_product.dtype) == of_product.dtype
        unscaled = self._gemm2(of_result if widened and of_result.dtype == a.dtype else of_product)
        of_weight = row_dot(unscaled, a)
        if args.b_out is not None:
            of_weight = of_weight + self.group.bias_dot(args.b_out, of_product)
        self._collect({"weight": of_weight.to(leaves["weight"].dtype)})
        return (unscaled * weight).to(a.dtype) if self.to_activation else None

    def _gemm2(self, of_y: Tensor) -> Tensor:
        """Gradient of the activation (n, I)."""
        args = self.args
        return self.group.linear(of_y.to(args.dtypes.activation), args.w_out, not args.w_out_transposed)

    def _gemm2_parameters(self, of_y: Tensor, a: Tensor) -> None:
        if "b_out" in self.needs:
            self.group.bias_gradient(self.grads, "b_out", of_y)
        if "w_out" in self.needs:
            self.group.weight_gradient(self.grads, "w_out", a, of_y.to(a.dtype), self.args.w_out_transposed)

    def _gemm1(self, of_hidden: dict[str, Tensor], leaves: dict[str, Tensor], of_x: Tensor | None) -> Tensor | None:
        """Back through GEMM1 and the input expression: the rows' gradients of x, if needed, in `of_x` if given."""
        args = self.args
        row, pullback = vjp(args.input, leaves, {"x", *self.weight})
        direct = of_x if args.input == "x" else None
        if args.w_up is None:
            of_row = self._linear(_join(args, of_hidden), row, "w_in", "b_in", direct)
        else:
            of_row = self._linear(of_hidden["gate"], row, "w_in", "b_in", direct)
            of_up = self._linear(of_hidden["up"], row, "w_up", "b_up", None)
            if of_row is not None and of_up is not None:
                of_row.add_(of_up)
        if of_row is None or args.input == "x":
            return of_row
        found = self._collect(pullback(of_row))["x"]
        return found if of_x is None else of_x.copy_(found)

    def _linear(self, grad: Tensor, row: Tensor, weight: str, bias: str, into: Tensor | None) -> Tensor | None:
        """Gradient of a row through one matrix of GEMM1, if anything asks for it; stores its parameters'."""
        of_product, transposed = grad.to(row.dtype), self.args.w_in_transposed
        if bias in self.needs:
            self.group.bias_gradient(self.grads, bias, grad)
        if weight in self.needs:
            self.group.weight_gradient(self.grads, weight, row, of_product, transposed)
        if not self.to_row:
            return None
        return self.group.linear(of_product, getattr(self.args, weight), not transposed, into=into)


def _uncast(grad: Tensor, dtype: torch.dtype, casts: Sequence[torch.dtype]) -> Tensor:
    """The gradient back through a chain of casts that began at `dtype`."""
    for before in reversed((dtype, *casts[:-1]) if casts else (dtype,)):
        grad = grad.to(before)
    return grad


def _join(args: Arguments, features: dict[str, Tensor]) -> Tensor:
    """Gradients of `gate` and `up`, or of `hidden`, laid out as the rows of hidden (n, N)."""
    if "hidden" in features:
        return features["hidden"]
    if args.gate_up == "interleaved":
        joined = features["gate"].new_empty(features["gate"].shape[0], args.width)
        joined[:, 0::2], joined[:, 1::2] = features["gate"], features["up"]
        return joined
    return torch.cat((features["gate"], features["up"]), 1)
