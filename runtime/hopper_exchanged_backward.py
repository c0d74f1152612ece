"""The backward of experts between ranks on Hopper GPUs, with the exchange hidden behind products.

What `moecompile.runtime.hopper_exchanged` says of the two parts of rows and of the two streams holds here, too:

    this one                                        the other one
                                                    send gradients of results       on few multiprocessors
    back through GEMM2 and the activation(own)      take them; back through both(others)
                                                    gradients of others' rows, sum them by token, send them back
    gradients of own rows, when these are being sent
    gradients of the matrices, of both parts
    sum of own tokens' gradients, and of what came back

All that has to be sent is sent first, and hidden behind what nobody else waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moecompile.codegen.gemms import Added
from moecompile.codegen.instances import RESULTS, Combine, Dispatch, Instance
from moecompile.runtime import (
    hopper,
    hopper_exchange,
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
from moecompile.runtime.hopper_exchange import Exchange, OwnParts, Rows
from moecompile.runtime.hopper_exchanged import others_of, own_multiple
from moecompile.runtime.hopper_quantize import QuantizedRows, padded_blocks
from moecompile.runtime.hopper_routing import Dispatching
from moecompile.runtime.launch import wait_for
from moecompile.runtime.quantize import BLOCK


def backward(
    of: Returning, there: Exchange, back: Exchange, experts: Experts, args: Arguments, wanted: Wanted
) -> dict[str, Tensor]:
    """The wanted gradients, by name: as of `moecompile.runtime.hopper_in_turn.backward`."""
    return _Backward(of, there, back, experts, args, wanted).run()


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


class _Backward:
    """One call. What both streams touch is made on the caller's, and freed when that has waited for the other."""

    def __init__(
        self, of: Returning, there: Exchange, back: Exchange, experts: Experts, args: Arguments, wanted: Wanted
    ) -> None:
        assert of.x is not None
        self.of, self.there, self.back, self.wanted, self.x = of, there, back, wanted, of.x
        self.args, own, grad = args, of.saved.own, of.grad
        self.main = wanted.main if main_gradients.takes(wanted.main) else {}  # to which the kernels add
        self.others_main = {name: each for name, each in wanted.main.items() if name not in self.main}
        weights = own.weights if own.weights.dim() == 2 else None
        mine = replace(experts, room=None).arguments(of.x, weights, own.plan)
        self.count, self.total = mine.rows, mine.rows + args.rows
        self.zeros = grad.new_zeros(self._words(mine, args), dtype=torch.int32)
        multiple = own_multiple(bool(experts.quantized), mine.rows, experts.num_experts)
        self.own = Part(0, slice(0, self.count), mine, self._taken(0), multiple, there.sms)
        self.others = Part(1, slice(self.count, self.total), args, self._taken(1), 0, 0)
        ids, (offsets, slots, _) = own.ids, own.plan
        self.parts = OwnParts(ids, slots, offsets, args.slots, self.count, multiple)
        form, reads = weighting(args.output), "weight" in expression_leaves(args.activation)
        assert form is not None
        self.scales, self.read = (
            [hopper_experts._scales(part.args, form) for part in (self.own, self.others)],
            [hopper_experts._weights(part.args) if reads else None for part in (self.own, self.others)],
        )
        self.products = Eight(self, experts) if experts.quantized else Sixteen(self, experts)
        about = ("exchanged back", bool(experts.quantized), self.count, self.total, *self.main)
        hopper_kernels.compile_together(args, True, about, self.products.instances)

    def run(self) -> dict[str, Tensor]:
        """As the module's documentation has it."""
        of, there, back, products, wanted = self.of, self.there, self.back, self.products, self.wanted
        main, side = torch.cuda.current_stream(of.grad.device), there.memory.side
        sends = Rows.of(products.lines(), None, None)
        self._make_room(sends)
        wait_for(side, main)
        with torch.cuda.stream(side):
            hopper_exchange.send(back, sends, of.sent, None, early=False)
        products.prepare_own(sends.values)
        if self.count:  # or this rank has no tokens
            products.back_through(self.own)
        with torch.cuda.stream(side):
            hopper_exchange.receive(back, sends, of.sent, self.came_rows, self.came, 1, few=True)
            products.prepare_others(self.came_rows.values)
            products.back_through(self.others)
            if wanted.goes_back:
                products.of_rows_of(self.others)
                self._sum_others()
        wait_for(main, side)
        if wanted.goes_back:
            with torch.cuda.stream(side):
                hopper_exchange.send(there, self._returned(), None, of.saved.came, started=self.zeros[:1])
            hopper_exchange.await_start(there, self.zeros[:1])
            if self.count:
                products.of_rows_of(self.own)
        found = products.of_matrices()
        main_gradients.add(self.others_main, found)
        if wanted.goes_back:
            wait_for(main, side)
            found |= self._home()
        return found

    @property
    def weighted(self) -> bool:
        """Whether the routing weights' gradient is wanted."""
        return self.args.weights is not None and "weights" in self.wanted.names

    @staticmethod
    def _words(mine: Arguments, args: Arguments) -> int:
        return 5 + sum(map(hopper_routing.words_of_progress, (mine.rows, args.rows)))

    def _taken(self, number: int) -> tuple[Tensor, Tensor]:
        one, two = (self.zeros[1 + 2 * number + product : 2 + 2 * number + product] for product in (0, 1))
        return one, two

    def progress(self, number: int) -> Tensor:
        """What a product that dispatches a part counts in."""
        first = 5 + (hopper_routing.words_of_progress(self.count) if number else 0)
        return (
            self.zeros[first:] if number else self.zeros[first : first + hopper_routing.words_of_progress(self.count)]
        )

    def _make_room(self, sends: Rows) -> None:
        """For gradients that come, sums of others', what goes along, and results."""
        args, like = self.args, self.products.like
        places, top_k = args.slots.shape
        self.came_rows, self.came = sends.room(places), self.of.sent.new_empty(self.there.memory.ranks)
        self.sums = like.new_empty(places, args.features)
        weights = args.weights
        dtype = weights.dtype if weights is not None and dtype_name(weights.dtype) in RESULTS else torch.float32
        self.along = like.new_empty(places, top_k, dtype=dtype) if self.weighted else None
        self.of_rows = like.new_empty(self.total, args.features) if self.wanted.goes_back else None
        tiles, weighted = hopper.parts_of_weight(args.intermediate), (self.scales[0], self.read[0]) != (None, None)
        self.of_weight = like.new_empty(tiles, self.total, dtype=torch.float32) if weighted else None

    def part_of_weight(self, part: Part) -> Tensor | None:
        """The routing weight's gradient of a part's rows, in parts."""
        return None if self.of_weight is None else self.of_weight[:, part.rows]

    def _sum_others(self) -> None:
        """What goes back of other ranks' tokens, with what belongs to their experts."""
        assert self.of_rows is not None
        slots = self.args.slots
        for places in others_of(self.there.memory.rank, self.there.capacity, slots.shape[0]):
            hopper_routing.combine(self.of_rows[self.others.rows], slots[places], None, "out", self.sums[places])
        if self.along is None:
            return
        parts = self.part_of_weight(self.others)
        if parts is None:
            self.along.zero_()
        else:
            hopper_routing.collect(parts, None, slots, self.along.dtype, self.along)

    def _returned(self) -> Rows:
        return Rows(self.sums, None, self.along)

    def _home(self) -> dict[str, Tensor]:
        """The gradients of this rank's tokens, and of their weights."""
        of, args, there = self.of, self.args, self.there
        assert self.of_rows is not None
        of_x, along = self.sums.new_empty(of.home.shape[0], args.features), None
        if self.along is not None and args.weights is not None:
            if self.of_weight is not None:
                hopper_exchange.collect_own(there, of.home, self.parts, self.of_weight, self.along)
            along = self.along, self.along.new_empty(of.home.shape[0], args.slots.shape[1])
        hopper_exchange.home_of_experts(there, of.home, self.parts, self.of_rows, None, "out", of_x, along)
        found = {"x": of_x}
        if along is not None and args.weights is not None:
            found["weights"] = along[1].to(args.weights.dtype)
        return found


class Sixteen:
    """Products in the model's precision."""

    def __init__(self, call: _Backward, experts: Experts) -> None:
        self.call, args = call, call.args
        self.like = rows = call.of.saved.of_rows[0]
        self.projection, self.hidden = (
            hopper_experts._projection(args),
            (call.of.saved.own.hidden, call.of.saved.hidden),
        )
        self.of_y = rows.new_empty(call.total, args.out_features)
        self.of_hidden = rows.new_empty(call.total, args.width)
        self.scaled = rows.new_empty(call.total, args.intermediate)

    def instances(self) -> list[Instance]:
        """The kernels."""
        call, args, dtype = self.call, self.call.args, self.like.dtype
        experts, w_in = args.num_experts, args.w_in if args.w_up is None else args.w_up
        k = args.width if args.w_up is None else args.intermediate
        name, scaled = dtype_name(dtype), call.scales[0] is not None
        found: list[Instance] = [Dispatch(), Combine(name, name, "out")]
        for rows in dict.fromkeys((call.count, args.rows)):
            w_out = hopper_experts._out_matrices(args)
            back = hopper_tiles.backward_instance(dtype, rows, w_out, self.projection.gate_up, args.activation, scaled)
            b = w_in.mT if args.w_in_transposed else w_in
            of_rows = hopper_tiles.choose(dtype, rows, experts, args.features, k, hopper_tiles.is_transposed(b))
            found += [replace(back, taken=True), replace(of_rows, taken=True)]
        sizes = (args.features, args.intermediate, k, args.out_features)
        outer = [
            hopper_tiles.choose(dtype, m, experts, n, call.total, True, over_rows=True) for m in sizes for n in sizes
        ]
        return found + [replace(each, epilogue=Added()) if call.main else each for each in outer]

    def lines(self) -> Tensor:
        """What is sent of each token's gradient."""
        return self.call.of.grad

    def prepare_own(self, grad: Tensor) -> None:
        """Its rows, where they are multiplied."""
        own = self.call.own
        if self.call.count:
            hopper_routing.dispatch(grad, own.args.slots, self.of_y[own.rows])

    def prepare_others(self, came: Tensor) -> None:
        """Likewise."""
        others = self.call.others
        hopper_routing.dispatch(came, others.args.slots, self.of_y[others.rows])

    def back_through(self, part: Part) -> None:
        """From the gradient of GEMM2's rows to that of GEMM1's."""
        call, args, (hidden,) = self.call, part.args, self.hidden[part.number]
        hopper.activation_backward(
            self.of_y[part.rows], hopper_experts._out_matrices(args), self.projection, args.activation, args.offsets,
            hidden, args.order, weights=call.read[part.number], scales=call.scales[part.number],
            into=(self.of_hidden[part.rows], self.scaled[part.rows], call.part_of_weight(part)), taking=part.taking(0),
        )  # fmt: skip

    def of_rows_of(self, part: Part) -> None:
        """The gradient of a part's rows."""
        args, call = part.args, self.call
        assert call.of_rows is not None
        into, sums = call.of_rows[part.rows], None
        for of_product, matrices in zip(self._of_products(), (args.w_in, args.w_up), strict=False):
            assert matrices is not None
            b = matrices.mT if args.w_in_transposed else matrices
            product = into if sums is None else torch.empty_like(into)
            taking = part.taking(1) if sums is None else Taking(torch.zeros_like(part.taken[1]), part.multiple)
            hopper.grouped_gemm(of_product[part.rows], b, args.offsets, product, taking=taking)
            sums = product if sums is None else sums.add_(product)

    def _of_products(self) -> tuple[Tensor, ...]:
        return self.projection.parts(self.of_hidden) if self.call.args.w_up is not None else (self.of_hidden,)

    def of_matrices(self) -> dict[str, Tensor]:
        """The gradients of matrices that are wanted, of both parts; adds to main gradients."""
        call, found = self.call, dict[str, Tensor]()
        args, main, needs = call.args, call.main, {*call.wanted.names, *call.main, *call.others_main}
        whole = replace(args, offsets=call.own.args.offsets)
        beyond = Beyond(call.count, args.offsets, call.own.multiple)
        if "w_out" in main:
            hopper_experts._add(main["w_out"], self.of_y, self.scaled, args.w_out_transposed, whole, beyond)
        elif "w_out" in needs:
            how = args.w_out, self.of_y, self.scaled, args.w_out_transposed, whole, beyond
            found["w_out"] = hopper_experts._of_matrix(*how)
        names = ("w_in", "w_up") if args.w_up is not None else ("w_in",)
        of = {name: each for name, each in zip(names, self._of_products(), strict=True) if name in needs}
        if of:
            made = hopper_experts._of_gemm1(whole, of, main, self._rows_of_tokens, call.total, beyond)
            found |= {name: each for name, each in made.items() if name not in main}
        return found

    def _rows_of_tokens(self, columns: slice | None) -> Tensor:
        """Tokens' rows of both parts, or some of their columns."""
        call, (came,) = self.call, self.call.of.saved.of_rows
        given = [hopper_experts._lines(each) for each in (call.x, came)]
        given = given if columns is None else [each[:, columns] for each in given]
        rows = came.new_empty(call.total, given[0].shape[1])
        for part, tokens in zip((call.own, call.others), given, strict=True):
            if tokens.shape[0]:
                hopper_routing.dispatch(tokens, part.args.slots, rows[part.rows])
        return rows


class Eight:
    """Products in FP8; gradients travel quantised, each with its scales behind it."""

    def __init__(self, call: _Backward, experts: Experts) -> None:
        self.call, args, saved = call, call.args, call.of.saved
        self.like, self.scale_format = call.of.grad, args.scale_format
        _, self.w_in, _, self.w_out = hopper_fp8._matrices(experts.quantized)
        self.hidden = QuantizedRows(*saved.own.hidden), QuantizedRows(*saved.hidden)
        counts = call.count, args.rows
        self.of_y = [QuantizedRows.empty(self.like, count, args.out_features) for count in counts]
        widths = self.hidden[0].values.shape[1], self.w_out.values.shape[1]
        self.made = [tuple(QuantizedRows.empty(self.like, count, width) for width in widths) for count in counts]
        self.sources: dict[int, Tensor] = {}

    def instances(self) -> list[Instance]:
        """The kernels."""
        call, args = self.call, self.call.args
        gate_up = "single" if args.gate_up == "single" else "halves"
        how = args.activation, gate_up, call.scales[0] is not None, True, self.scale_format
        back = replace(hopper_fp8_gemm.backward_instance(*how), records=True, taken=True)
        of_rows = replace(hopper_fp8_gemm.product_instance(args.features, False), taken=True)
        return [back, of_rows, *hopper_kernels.of_matrices_in_fp8(args, call.main)]

    def lines(self) -> Tensor:
        """What is sent of each token's gradient."""
        return lines.to_lines(self.call.of.grad, scale_format=self.scale_format)

    def prepare_own(self, grad: Tensor) -> None:
        """Nothing: products dispatch rows."""
        self.sources[0] = grad

    def prepare_others(self, came: Tensor) -> None:
        """Likewise."""
        self.sources[1] = came

    def back_through(self, part: Part) -> None:
        """From the gradient of GEMM2's rows to that of GEMM1's."""
        call, args, grad = self.call, part.args, self.sources[part.number]
        pieces = grad.shape[1] * grad.element_size() // 16
        source = (grad, None, None, 0, 0, pieces, 0, args.out_features // 16, 0)
        dispatching = Dispatching(source, args.order, args.slots.shape[1], call.progress(part.number), records=True)
        of_hidden, scaled = self.made[part.number]
        hopper_fp8_gemm.activation_backward(
            self.of_y[part.number], self.w_out, args.activation, args.offsets, args.intermediate,
            self.hidden[part.number], args.order, weights=call.read[part.number], scales=call.scales[part.number],
            dispatching=dispatching, scale_format=self.scale_format,
            into=(of_hidden, scaled, call.part_of_weight(part)), taking=part.taking(0),
        )  # fmt: skip

    def of_rows_of(self, part: Part) -> None:
        """The gradient of a part's rows."""
        call, (of_hidden, _) = self.call, self.made[part.number]
        assert call.of_rows is not None
        into = call.of_rows[part.rows]
        hopper_fp8_gemm.product(of_hidden, self.w_in, part.args.offsets, into, taking=part.taking(1))

    def of_matrices(self) -> dict[str, Tensor]:
        """The gradients of matrices that are wanted, of both parts; adds to main gradients."""
        call, args = self.call, self.call.args
        needs = {*call.wanted.names, *call.main, *call.others_main}
        found, inner = dict[str, Tensor](), args.intermediate
        if not needs & {"w_in", "w_up", "w_out"}:
            return found
        self.ends = [hopper_quantize.pad_offsets(part.args.offsets, part.multiple) for part in (call.own, call.others)]
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
        width = self.call.args.out_features
        return [QuantizedRows(*lines.parts(self.sources[number], width)) for number in (0, 1)]

    def _tokens(self) -> list[QuantizedRows]:
        """This rank's tokens, and all that came."""
        x = hopper_experts._lines(self.call.x)
        tokens = hopper_fp8._room_for(x)
        if self.call.count:
            hopper_quantize.quantize_rows(x, None, None, tokens, self.scale_format)
        came, _ = self.call.of.saved.of_rows
        return [QuantizedRows(*tokens), QuantizedRows(*lines.parts(came, x.shape[1]))]

    def _turned(
        self, columns: int, given: list[QuantizedRows], gathered: bool, *, per_column: bool,
        features: int | None = None, **how: object,
    ) -> QuantizedRows:  # fmt: skip
        """Rows of both parts as columns, this rank's own first."""
        call, like, first = self.call, given[1], self.call.count // BLOCK
        blocks = first + padded_blocks(call.others.args.rows, call.args.num_experts)
        size = (blocks, columns) if per_column else (-(-columns // BLOCK), blocks)
        made = QuantizedRows(like.values.new_empty(columns, blocks * BLOCK), like.scales.new_empty(size))
        for part, each in zip((call.own, call.others), given, strict=True):
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
        call, mean_over = self.call, self.call.args.mean_over
        beyond = Beyond(call.count // BLOCK * BLOCK, self.ends[1], BLOCK)
        main: Mapping[str, Tensor] = call.main
        if name in main:
            hopper_fp8_gemm.add_outer(a, b, self.ends[0], main[name], transposed, mean_over, beyond)
        else:
            found[name] = hopper_fp8_gemm.outer(a, b, self.ends[0], matrices, transposed, mean_over, beyond)
