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

import torch
from torch import Tensor

from moecompile.codegen.instances import RESULTS
from moecompile.runtime import hopper_exchange, hopper_kernels, hopper_routing, main_gradients
from moecompile.runtime.contract import Arguments
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.exchanged_contract import Experts, Returning, Wanted
from moecompile.runtime.hopper_exchange import Exchange, Rows
from moecompile.runtime.hopper_exchanged import others_of
from moecompile.runtime.hopper_parts_backward import Both, Eight, Sixteen
from moecompile.runtime.launch import wait_for


def backward(
    of: Returning, there: Exchange, back: Exchange, experts: Experts, args: Arguments, wanted: Wanted
) -> dict[str, Tensor]:
    """The wanted gradients, by name: as of `moecompile.runtime.hopper_in_turn.backward`."""
    return _Backward(of, there, back, experts, args, wanted).run()


class _Backward:
    """One call. What both streams touch is made on the caller's, and freed when that has waited for the other."""

    def __init__(
        self, of: Returning, there: Exchange, back: Exchange, experts: Experts, args: Arguments, wanted: Wanted
    ) -> None:
        self.of, self.there, self.back, self.args, self.wanted = of, there, back, args, wanted
        self.both = both = Both(of, experts, args, wanted, there.sms)
        self.products = Eight(both, experts) if experts.quantized else Sixteen(both, experts)
        about = ("exchanged back", bool(experts.quantized), both.count, both.total, *both.main)
        hopper_kernels.compile_together(args, True, about, self.products.instances)

    def run(self) -> dict[str, Tensor]:
        """As the module's documentation has it."""
        of, there, back, both, products = self.of, self.there, self.back, self.both, self.products
        main, side = torch.cuda.current_stream(of.grad.device), there.memory.side
        sends = Rows.of(products.lines(), None, None)
        self._make_room(sends)
        wait_for(side, main)
        with torch.cuda.stream(side):
            hopper_exchange.send(back, sends, of.sent, None, early=False)
        products.prepare_own(sends.values)
        if both.count:  # or this rank has no tokens
            products.back_through(both.own)
        with torch.cuda.stream(side):
            hopper_exchange.receive(back, sends, of.sent, self.came_rows, self.came, 1, few=True)
            products.prepare_others(self.came_rows.values)
            products.back_through(both.others)
            if both.goes_back:
                products.of_rows_of(both.others)
                self._sum_others()
        wait_for(main, side)
        if both.goes_back:
            with torch.cuda.stream(side):
                rows = Rows(self.sums, None, self.along)
                hopper_exchange.send(there, rows, None, of.saved.came, started=both.started)
            hopper_exchange.await_start(there, both.started)
            if both.count:
                products.of_rows_of(both.own)
        found = products.of_matrices()
        main_gradients.add(both.rounded, found)
        if both.goes_back:
            wait_for(main, side)
            found |= self._home()
        return found

    def _make_room(self, sends: Rows) -> None:
        """For gradients that come, sums of others', and what goes along."""
        args, like, weights = self.args, self.products.like, self.args.weights
        places, top_k = args.slots.shape
        self.came_rows, self.came = sends.room(places), self.of.sent.new_empty(self.there.memory.ranks)
        self.sums = like.new_empty(places, args.features)
        dtype = weights.dtype if weights is not None and dtype_name(weights.dtype) in RESULTS else torch.float32
        self.along = like.new_empty(places, top_k, dtype=dtype) if self.wanted.weighted else None
        self.both.make_room(like)

    def _sum_others(self) -> None:
        """What goes back of other ranks' tokens, with what belongs to their experts."""
        both, slots = self.both, self.args.slots
        assert both.of_rows is not None
        for places in others_of(self.there.memory.rank, self.there.capacity, slots.shape[0]):
            hopper_routing.combine(both.of_rows[both.others.rows], slots[places], None, "out", self.sums[places])
        if self.along is None:
            return
        parts = both.part_of_weight(both.others)
        if parts is None:
            self.along.zero_()
        else:
            hopper_routing.collect(parts, None, slots, self.along.dtype, self.along)

    def _home(self) -> dict[str, Tensor]:
        """The gradients of this rank's tokens, and of their weights."""
        home, args, there, both = self.of.home, self.args, self.there, self.both
        assert both.of_rows is not None
        of_x, along = self.sums.new_empty(home.shape[0], args.features), None
        if self.along is not None:
            if both.of_weight is not None:
                hopper_exchange.collect_own(there, home, both.places, both.of_weight, self.along)
            along = self.along, self.along.new_empty(home.shape[0], args.slots.shape[1])
        hopper_exchange.home_of_experts(there, home, both.places, both.of_rows, None, "out", of_x, along)
        if along is None or args.weights is None:
            return {"x": of_x}
        return {"x": of_x, "weights": along[1].to(args.weights.dtype)}
