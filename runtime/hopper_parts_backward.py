"""The products of a backward of experts between ranks, of the two parts that their rows are in, in 16 bits or in FP8.

`moecompile.runtime.hopper_exchanged_backward` says when each of them runs. Blocks take tiles as they are free. Of the
gradients of matrices the rows of both parts are summed, an expert's own ones first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moecompile.codegen.gemms import Added
from moecompile.codegen.instances import Combine, Dispatch, Instance
from moecompile.runtime import (
    hopper,
    hopper_experts,
    hopper_fp8,
    hopper_fp8_gemm,
    hopper_kernels,
    hopper_quantize,
    hopper_routing,
    hopper_tiles,
    lines,
    main_gradients,
)
from moecompile.runtime.contract import Arguments, expression_leaves, weighting
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.exchanged_contract import Experts, Returning, Wanted
from moecompile.runtime.hopper import Beyond, Taking
from moecompile.runtime.hopper_exchange import OwnParts
from moecompile.runtime.hopper_exchanged import own_multiple
from moecompile.runtime.hopper_quantize import QuantizedRows, padded_blocks
from moecompile.runtime.hopper_routing import Dispatching
from moecompile.runtime.quantize import BLOCK


@dataclass(frozen=True)
class Part:
    """Rows of one of the two parts.

    Attributes:
        number: 0 for this rank's own, 1 for the others.
        rows: among those of both.
        args: the record of the experts on them.
        taken: of both products' tiles, zeros.
        multiple: of each expert's rows only so many times that many are multiplied; 0 for all.
        spare: multiprocessors that the first product leaves to others.
    """

    number: int
    rows: slice
    args: Arguments
    taken: tuple[Tensor, Tensor]
    multiple: int
    spare: int

    def taking(self, product: int) -> Taking:
        """Of the product back through GEMM2 (0), or through GEMM1 (1)."""
        return Taking(self.taken[product], self.multiple, 0 if product else self.spare)


class Both:
    """Both parts, and what there is for each of them or for all rows.

    Args:
        of: what the backward is given.
        experts: this rank's.
        args: their record on the others.
        wanted: which gradients.
        spare: multiprocessors that the first product of the own leaves to others.

    Attributes:
        own: this rank's own part.
        others: the others.
        count: rows of the first.
        total: rows of both.
        places: where this rank's own assignments are.
        x: (T, H), this rank's tokens.
        needs: names of matrices whose gradients are returned or added to a main gradient.
        main: main gradients that the kernels add to.
        rounded: those that they do not, to which gradients in the model's precision are added.
        scales: of each part, what the output multiplies by, of an assignment; None if it does not.
        read: of each part, what the activation reads as weight; None if it does not.
        of_rows: (rows, H) of rows' gradients, with `make_room`; None if nobody wants them.
        of_weight: (parts, rows) of the routing weights', likewise; None if these have none.
    """

    of_rows: Tensor | None = None
    of_weight: Tensor | None = None

    def __init__(self, of: Returning, experts: Experts, args: Arguments, wanted: Wanted, spare: int) -> None:
        assert of.x is not None
        self.of, self.x, self.args, own = of, of.x, args, of.saved.own
        self.main, self.rounded = main_gradients.divided(wanted.main)
        self.needs, self.goes_back = {*wanted.names, *wanted.main}, wanted.goes_back
        weights = own.weights if own.weights.dim() == 2 else None
        mine = replace(experts, room=None).arguments(of.x, weights, own.plan)
        self.count, self.total = mine.rows, mine.rows + args.rows
        words = [hopper_routing.words_of_progress(rows) for rows in (mine.rows, args.rows)]
        zeros = of.grad.new_zeros(sum(words) + 5, dtype=torch.int32).split([*words, 1, 1, 1, 1, 1])
        self.progress, self.started = zeros[:2], zeros[6]
        multiple = own_multiple(bool(experts.quantized), mine.rows, experts.num_experts)
        self.own = Part(0, slice(0, self.count), mine, (zeros[2], zeros[3]), multiple, spare)
        self.others = Part(1, slice(self.count, self.total), args, (zeros[4], zeros[5]), 0, 0)
        self.places = OwnParts(own.ids, own.plan[1], own.plan[0], args.slots, self.count, multiple)
        form, reads = weighting(args.output), "weight" in expression_leaves(args.activation)
        assert form is not None
        parts = self.own, self.others
        self.scales = [hopper_experts._scales(part.args, form) for part in parts]
        self.read = [hopper_experts._weights(part.args) if reads else None for part in parts]

    def make_room(self, like: Tensor) -> None:
        """For gradients of rows and of routing weights, on the device of `like` and of its dtype."""
        if self.goes_back:
            self.of_rows = like.new_empty(self.total, self.args.features)
        if self.scales[0] is not None or self.read[0] is not None:
            tiles = hopper.parts_of_weight(self.args.intermediate)
            self.of_weight = like.new_empty(tiles, self.total, dtype=torch.float32)

    def part_of_weight(self, part: Part) -> Tensor | None:
        """The routing weight's gradient of a part's rows, in parts."""
        return None if self.of_weight is None else self.of_weight[:, part.rows]


class Sixteen:
    """Products in the model's precision."""

    def __init__(self, both: Both, experts: Experts) -> None:
        self.both, args = both, both.args
        self.like = rows = both.of.saved.of_rows[0]
        self.projection, self.hidden = (
            hopper_experts._projection(args),
            (both.of.saved.own.hidden, both.of.saved.hidden),
        )
        self.of_y = rows.new_empty(both.total, args.out_features)
        self.of_hidden = rows.new_empty(both.total, args.width)
        self.scaled = rows.new_empty(both.total, args.intermediate)

    def instances(self) -> list[Instance]:
        """The kernels."""
        both, args, dtype = self.both, self.both.args, self.like.dtype
        experts, w_in = args.num_experts, args.w_in if args.w_up is None else args.w_up
        k = args.width if args.w_up is None else args.intermediate
        name, scaled = dtype_name(dtype), both.scales[0] is not None
        found: list[Instance] = [Dispatch(), Combine(name, name, "out")]
        for rows in dict.fromkeys((both.count, args.rows)):
            w_out = hopper_experts._out_matrices(args)
            back = hopper_tiles.backward_instance(dtype, rows, w_out, self.projection.gate_up, args.activation, scaled)
            b = w_in.mT if args.w_in_transposed else w_in
            of_rows = hopper_tiles.choose(dtype, rows, experts, args.features, k, hopper_tiles.is_transposed(b))
            found += [replace(back, taken=True), replace(of_rows, taken=True)]
        sizes = (args.features, args.intermediate, k, args.out_features)
        outer = [
            hopper_tiles.choose(dtype, m, experts, n, both.total, True, over_rows=True) for m in sizes for n in sizes
        ]
        return found + [replace(each, epilogue=Added()) if both.main else each for each in outer]

    def lines(self) -> Tensor:
        """What is sent of each token's gradient."""
        return self.both.of.grad

    def prepare_own(self, grad: Tensor) -> None:
        """Its rows, where they are multiplied."""
        own = self.both.own
        if self.both.count:
            hopper_routing.dispatch(grad, own.args.slots, self.of_y[own.rows])

    def prepare_others(self, came: Tensor) -> None:
        """Likewise."""
        others = self.both.others
        hopper_routing.dispatch(came, others.args.slots, self.of_y[others.rows])

    def back_through(self, part: Part) -> None:
        """From the gradient of GEMM2's rows to that of GEMM1's."""
        both, args, (hidden,) = self.both, part.args, self.hidden[part.number]
        hopper.activation_backward(
            self.of_y[part.rows], hopper_experts._out_matrices(args), self.projection, args.activation, args.offsets,
            hidden, args.order, weights=both.read[part.number], scales=both.scales[part.number],
            into=(self.of_hidden[part.rows], self.scaled[part.rows], both.part_of_weight(part)), taking=part.taking(0),
        )  # fmt: skip

    def of_rows_of(self, part: Part) -> None:
        """The gradient of a part's rows."""
        args, both = part.args, self.both
        assert both.of_rows is not None
        into, sums = both.of_rows[part.rows], None
        for of_product, matrices in zip(self._of_products(), (args.w_in, args.w_up), strict=False):
            assert matrices is not None
            b = matrices.mT if args.w_in_transposed else matrices
            product = into if sums is None else torch.empty_like(into)
            taking = part.taking(1) if sums is None else Taking(torch.zeros_like(part.taken[1]), part.multiple)
            hopper.grouped_gemm(of_product[part.rows], b, args.offsets, product, taking=taking)
            sums = product if sums is None else sums.add_(product)

    def _of_products(self) -> tuple[Tensor, ...]:
        return self.projection.parts(self.of_hidden) if self.both.args.w_up is not None else (self.of_hidden,)

    def of_matrices(self) -> dict[str, Tensor]:
        """The gradients of matrices that are wanted, of both parts; adds to main gradients."""
        both, found = self.both, dict[str, Tensor]()
        args, main, needs = both.args, both.main, both.needs
        whole = replace(args, offsets=both.own.args.offsets)
        beyond = Beyond(both.count, args.offsets, both.own.multiple)
        if "w_out" in main:
            hopper_experts._add(main["w_out"], self.of_y, self.scaled, args.w_out_transposed, whole, beyond)
        elif "w_out" in needs:
            how = args.w_out, self.of_y, self.scaled, args.w_out_transposed, whole, beyond
            found["w_out"] = hopper_experts._of_matrix(*how)
        names = ("w_in", "w_up") if args.w_up is not None else ("w_in",)
        of = {name: each for name, each in zip(names, self._of_products(), strict=True) if name in needs}
        if of:
            made = hopper_experts._of_gemm1(whole, of, main, self._rows_of_tokens, both.total, beyond)
            found |= {name: each for name, each in made.items() if name not in main}
        return found

    def _rows_of_tokens(self, columns: slice | None) -> Tensor:
        """Tokens' rows of both parts, or some of their columns."""
        both, (came,) = self.both, self.both.of.saved.of_rows
        given = [hopper_experts._lines(each) for each in (both.x, came)]
        given = given if columns is None else [each[:, columns] for each in given]
        rows = came.new_empty(both.total, given[0].shape[1])
        for part, tokens in zip((both.own, both.others), given, strict=True):
            if tokens.shape[0]:
                hopper_routing.dispatch(tokens, part.args.slots, rows[part.rows])
        return rows


class Eight:
    """Products in FP8; gradients travel quantised, each with its scales behind it."""

    def __init__(self, both: Both, experts: Experts) -> None:
        self.both, args, saved = both, both.args, both.of.saved
        self.like, self.scale_format = both.of.grad, args.scale_format
        _, self.w_in, _, self.w_out = hopper_fp8._matrices(experts.quantized)
        self.hidden = QuantizedRows(*saved.own.hidden), QuantizedRows(*saved.hidden)
        counts = both.count, args.rows
        self.of_y = [QuantizedRows.empty(self.like, count, args.out_features) for count in counts]
        widths = self.hidden[0].values.shape[1], self.w_out.values.shape[1]
        self.made = [tuple(QuantizedRows.empty(self.like, count, width) for width in widths) for count in counts]
        self.sources: dict[int, Tensor] = {}

    def instances(self) -> list[Instance]:
        """The kernels."""
        both, args = self.both, self.both.args
        gate_up = "single" if args.gate_up == "single" else "halves"
        how = args.activation, gate_up, both.scales[0] is not None, True, self.scale_format
        back = replace(hopper_fp8_gemm.backward_instance(*how), records=True, taken=True)
        of_rows = replace(hopper_fp8_gemm.product_instance(args.features, False), taken=True)
        return [back, of_rows, *hopper_kernels.of_matrices_in_fp8(args, both.main)]

    def lines(self) -> Tensor:
        """What is sent of each token's gradient."""
        return lines.to_lines(self.both.of.grad, scale_format=self.scale_format)

    def prepare_own(self, grad: Tensor) -> None:
        """Nothing: products dispatch rows."""
        self.sources[0] = grad

    def prepare_others(self, came: Tensor) -> None:
        """Likewise."""
        self.sources[1] = came

    def back_through(self, part: Part) -> None:
        """From the gradient of GEMM2's rows to that of GEMM1's."""
        both, args, grad = self.both, part.args, self.sources[part.number]
        pieces = grad.shape[1] * grad.element_size() // 16
        source = (grad, None, None, 0, 0, pieces, 0, args.out_features // 16, 0)
        dispatching = Dispatching(source, args.order, args.slots.shape[1], both.progress[part.number], records=True)
        of_hidden, scaled = self.made[part.number]
        hopper_fp8_gemm.activation_backward(
            self.of_y[part.number], self.w_out, args.activation, args.offsets, args.intermediate,
            self.hidden[part.number], args.order, weights=both.read[part.number], scales=both.scales[part.number],
            dispatching=dispatching, scale_format=self.scale_format,
            into=(of_hidden, scaled, both.part_of_weight(part)), taking=part.taking(0),
        )  # fmt: skip

    def of_rows_of(self, part: Part) -> None:
        """The gradient of a part's rows."""
        both, (of_hidden, _) = self.both, self.made[part.number]
        assert both.of_rows is not None
        into = both.of_rows[part.rows]
        hopper_fp8_gemm.product(of_hidden, self.w_in, part.args.offsets, into, taking=part.taking(1))

    def of_matrices(self) -> dict[str, Tensor]:
        """The gradients of matrices that are wanted, of both parts; adds to main gradients."""
        both, args, needs = self.both, self.both.args, self.both.needs
        found, inner = dict[str, Tensor](), args.intermediate
        if not needs & {"w_in", "w_up", "w_out"}:
            return found
        self.ends = [hopper_quantize.pad_offsets(part.args.offsets, part.multiple) for part in (both.own, both.others)]
        if "w_out" in needs:
            of_y = self._turned(args.out_features, self._gradients(), True, per_column=True)
            a = self._turned(inner, [each[1] for each in self.made], False, per_column=False, features=inner)
            self._outer(found, "w_out", of_y, a, args.w_out, args.w_out_transposed)
            del of_y, a
        if needs & {"w_in", "w_up"}:
            how = {"features": inner, "interleaved": args.gate_up == "interleaved"}
            of_hidden = self._turned(args.width, [each[0] for each in self.made], False, per_column=True, **how)
            x = self._turned(args.features, self._tokens(), True, per_column=False, scale_format=self.scale_format)
            for name, matrices, start in (("w_in", args.w_in, 0), ("w_up", args.w_up, inner)):
                if name in needs and matrices is not None:
                    end = start + inner if args.gate_up == "separate" else None
                    part = QuantizedRows(of_hidden.values[start:end], of_hidden.scales[:, start:end])
                    self._outer(found, name, part, x, matrices, args.w_in_transposed)
        return found

    def _gradients(self) -> list[QuantizedRows]:
        """Of results, of this rank's tokens and of all that came."""
        width = self.both.args.out_features
        return [QuantizedRows(*lines.parts(self.sources[number], width)) for number in (0, 1)]

    def _tokens(self) -> list[QuantizedRows]:
        """This rank's tokens, and all that came."""
        x = hopper_experts._lines(self.both.x)
        tokens = hopper_fp8._room_for(x)
        if self.both.count:
            hopper_quantize.quantize_rows(x, None, None, tokens, self.scale_format)
        came, _ = self.both.of.saved.of_rows
        return [QuantizedRows(*tokens), QuantizedRows(*lines.parts(came, x.shape[1]))]

    def _turned(
        self, columns: int, given: list[QuantizedRows], gathered: bool, *, per_column: bool,
        features: int | None = None, **how: object,
    ) -> QuantizedRows:  # fmt: skip
        """Rows of both parts as columns, this rank's own first."""
        both, like, first = self.both, given[1], self.both.count // BLOCK
        blocks = first + padded_blocks(both.others.args.rows, both.args.num_experts)
        size = (blocks, columns) if per_column else (-(-columns // BLOCK), blocks)
        made = QuantizedRows(like.values.new_empty(columns, blocks * BLOCK), like.scales.new_empty(size))
        for part, each in zip((both.own, both.others), given, strict=True):
            if not part.args.rows:
                continue
            block = first if part.number else 0
            scales = made.scales[block:] if per_column else made.scales[:, block:]
            into, args = QuantizedRows(made.values[:, block * BLOCK :], scales), part.args
            hopper_quantize.transpose_rows(
                each.values, each.scales, args.order, args.offsets, self.ends[part.number],
                top_k=args.slots.shape[1] if gathered else None, per_column=per_column, features=features, into=into,
                **how,  # type: ignore[arg-type]
            )  # fmt: skip
        return made

    def _outer(
        self,
        found: dict[str, Tensor],
        name: str,
        a: QuantizedRows,
        b: QuantizedRows,
        matrices: Tensor,
        transposed: bool,
    ) -> None:
        """The gradient of the matrices of that name, or what is added to their main gradient."""
        both, mean_over = self.both, self.both.args.mean_over
        beyond = Beyond(both.count // BLOCK * BLOCK, self.ends[1], BLOCK)
        if name in both.main:
            hopper_fp8_gemm.add_outer(a, b, self.ends[0], both.main[name], transposed, mean_over, beyond)
        else:
            found[name] = hopper_fp8_gemm.outer(a, b, self.ends[0], matrices, transposed, mean_over, beyond)
