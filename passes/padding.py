"""What stands at padded slots of no row, and why it reaches nothing.

A tensor of padded slots has the meaning of its rows (passes/rules_padded.py); this room proves that the other slots
add nothing, to the result or to a gradient. Slots of none lie in the bins, below the last bin's end, where grouped
GEMMs read and write, or in the tail above it, which grouped GEMMs leave as it was: uninitialised memory, in their
gradients too.

Contract: `check_padding` walks a block's nodes in program order and raises Refused unless
- rows reach padded slots by ways that let no gradient of an unfilled slot through: written into zeros, read from
  appended zeros, or masked,
- every GEMM reads finite numbers in the bins, and every operation between has a finite value and derivative there: the
  gradients that arrive from the results' readers are zero, and zero times finite stays zero in the weights' gradients,
- rows of unfilled slots that are added to a token's sum are exactly zero, tail included.

Inference asks less: where no gradient is wanted, what a GEMM reads at unfilled slots concerns nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from moecompile.codegen import expression
from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Interpretation, Refused
from moecompile.passes.layout import Layout
from moecompile.passes.rules_arithmetic import ELEMENTWISE
from moecompile.passes.slots import Table, kind_of, number, padded_atom, reads_zeros, table_of
from moecompile.passes.terms import Special, Value
from moecompile.runtime.elementwise import vjp


@dataclass(frozen=True)
class Unfilled:
    """What stands at the slots that hold no row."""

    number: float | None = None  # this number, or some other ones
    known: bool = True  # finite numbers in the bins, not what happened to be in memory
    whole: bool = True  # in the tail as in the bins
    cut: bool = True  # gradients that arrive there go no further


_ANYTHING = Unfilled(known=False, whole=False)
_VIEWS = frozenset(
    "view view_as flatten unflatten unsqueeze squeeze transpose t permute getattr expand expand_as contiguous clone "
    "chunk split tensor_split unbind select narrow getitem dropout".split()  # a dropout of known meaning drops nothing
)
_PUTS = frozenset({"setitem", "index_put", "index_copy", "scatter"})
_READS = frozenset({"getitem", "index_select", "embedding", "gather", "take_along_dim"})
_ADDS = frozenset({"index_add", "scatter_add", "index_put"})
_GROUPED = frozenset({"grouped_mm", "grouped_mm_fallback"})


def check_padding(region: frozenset[fx.Node], state: Interpretation, layout: Layout) -> bool:
    """Whether a block has padded slots.

    Raises Refused unless what stands at unfilled ones reaches nothing (contract above).
    """
    if not any(is_padded(node, state) for node in region):
        return False
    walk = _Walk(state, layout)
    for node in sorted(region, key=lambda node: layout.position[node]):
        call = state.calls.get(node)
        if call is not None:
            walk.follow(call)
    return True


def is_padded(node: fx.Node, state: Interpretation) -> bool:
    """Whether the tensor at a node, or one of its tensors, is made of padded slots."""
    found: Sequence[Value | None] = state.results.get(node, (state.values.get(node),))
    return any(
        atom.variable.kind == "padded" for value in found if value is not None for group in value.dims for atom in group
    )


def _is_rows(node: Any, state: Interpretation) -> bool:
    """Whether a node holds rows at padded slots, and not integers or masks, which are known exactly."""
    if not isinstance(node, fx.Node) or not is_padded(node, state):
        return False
    fakes = fake_of(node)
    return all(fake.dtype.is_floating_point for fake in (fakes if isinstance(fakes, (tuple, list)) else [fakes]))


class _Walk:
    """Follows what stands at unfilled slots from operation to operation."""

    def __init__(self, state: Interpretation, layout: Layout) -> None:
        self._state, self._layout = state, layout
        self._found: dict[fx.Node, Unfilled] = {}

    def follow(self, call: Call) -> None:
        """One operation."""
        node, state = call.node, self._state
        target = call.arguments.get("input")
        written = call.inplace and _is_rows(target, state)
        if call.name in _ADDS:
            self._check_sum(call)
        if fake_of(node) is None and not written:
            return
        if not (written or _is_rows(node, state)):
            return
        after = self._after(call)
        if written and isinstance(target, fx.Node):
            self._write(target, after)
        if fake_of(node) is not None:
            self._found[node] = after

    def _write(self, target: fx.Node, after: Unfilled) -> None:
        aliases = self._layout.aliases
        for alias in aliases.of(target):
            if alias in self._found and alias is not target and not aliases.same_elements(alias, target):
                self._found[alias] = _either(self._found[alias], after)
            elif alias in self._found:
                self._found[alias] = after

    def _after(self, call: Call) -> Unfilled:
        name, node, state = call.name, call.node, self._state
        if name in ("zeros", "ones", "full", "full_like", "new_full"):
            made = {"zeros": 0, "ones": 1}.get(name)
            return Unfilled(self._one(number(state, call["fill_value"]) if made is None else made, node))
        if name == "empty":
            return _ANYTHING
        source = call.arguments.get("input", call.arguments.get("tensor"))
        if name in _PUTS:
            return self._base(source)
        if name in _READS and not _is_rows(source, state) and source not in self._found:
            return self._read(call)
        if name in ("where", "masked_fill"):
            return self._masked(call)
        if name in _GROUPED:
            return self._product(call)
        if name == "cast":
            return self._of(source)
        if name in _VIEWS and source in self._found:
            return self._of(source)
        if name in ELEMENTWISE or name in ("rsub", "clamp_min", "clamp_max"):
            return self._elementwise(call)
        raise Refused(f"what {call.node} leaves at padded slots of no row is not known")

    def _base(self, node: Any) -> Unfilled:
        """What rows are put into."""
        made = self._state.calls.get(node)
        if node in self._found:
            return self._found[node]
        if made is not None and made.name == "empty":
            return _ANYTHING
        return Unfilled(self._one(number(self._state, node), node))

    def _one(self, value: Any, node: fx.Node) -> float:
        if not isinstance(value, (int, float)):
            raise Refused(f"what {node} holds at padded slots of no row is not one number")
        return float(value)

    def _of(self, node: Any) -> Unfilled:
        if isinstance(node, fx.Node) and node in self._found:
            return self._found[node]
        raise Refused(f"what {node} holds at padded slots of no row is not known")

    def _read(self, call: Call) -> Unfilled:
        """Rows looked up by a table: zeros from appended rows, or some token's row."""
        source = call["weight"] if call.name == "embedding" else call["input"]
        index = (
            call["input"] if call.name == "embedding" else call.arguments.get("index", call.arguments.get("indices"))
        )
        if isinstance(index, tuple):
            index = index[0]
        if kind_of(self._state.value(index).content) == "position":
            return Unfilled(None, cut=False)
        table = self._table(index)
        if table is None:
            raise Refused(f"what {call.node} reads at padded slots of no row is not known")
        if reads_zeros(self._state, source, table):
            return Unfilled(0.0)
        return Unfilled(None, cut=False)

    def _masked(self, call: Call) -> Unfilled:
        """A mask puts a number at unfilled slots, and zero into their gradient."""
        fill = call["value"] if call.name == "masked_fill" else None
        if fill is None:
            fill = next(
                (side for side in (call["input"], call["other"]) if number(self._state, side) is not None), None
            )
        value = number(self._state, fill)
        if not isinstance(value, (int, float)):
            raise Refused("unfilled slots that are given something else than a number")
        return Unfilled(float(value))

    def _product(self, call: Call) -> Unfilled:
        rows = self._of(call["input"])
        if fake_of(call.node).requires_grad:
            if not rows.known:
                raise Refused(
                    f"{call['input']} holds uninitialised memory at padded slots, which the weights' gradients would "
                    "read"
                )
            if not rows.cut:
                raise Refused(
                    f"{call['input']} holds tokens' rows at padded slots of no row, whose gradients they would get"
                )
        if not rows.known:
            return _ANYTHING
        return Unfilled(0.0 if rows.number == 0 else None, whole=False)

    def _elementwise(self, call: Call) -> Unfilled:
        op, arguments, params = _spelled(call)
        found = [self._operand(argument) for argument in arguments]
        merged = Unfilled(
            None, all(one.known for one in found), all(one.whole for one in found), all(one.cut for one in found)
        )
        if not merged.cut and not (merged.known and merged.whole) and fake_of(call.node).requires_grad:
            raise Refused(f"{call.node} mixes tokens' rows at padded slots of no row with uninitialised memory")
        if not merged.known:
            return merged
        numbers = [one.number for one in found]
        if any(number is None for number in numbers):
            return replace(merged, number=self._of_some(op, numbers))
        leaves: list[expression.Expression] = []
        env: dict[str, float] = {}
        for argument, at in zip(arguments, numbers, strict=True):
            assert at is not None
            name = f"a{len(env)}"
            rows = _is_rows(argument, self._state)
            leaves.append(expression.Leaf(name) if rows else expression.Constant(at))
            if rows:
                env[name] = at
        result = _at(expression.Apply(op, tuple(leaves), params), env, fake_of(call.node).dtype)
        if result is None:
            points = ", ".join(str(at) for at in env.values())
            raise Refused(f"{op} has no finite value or derivative at {points}, which stands at padded slots of no row")
        return replace(merged, number=result)

    @staticmethod
    def _of_some(op: str, numbers: Sequence[float | None]) -> float | None:
        """An operation on finite numbers, not all of which are known."""
        if op == "mul":
            return 0.0 if 0 in numbers else None
        if op in ("add", "sub", "neg") or (op == "div" and numbers[1] not in (None, 0)):
            return None
        raise Refused(f"{op} of what stands at padded slots of no row, which may not be finite")

    def _operand(self, argument: Any) -> Unfilled:
        if _is_rows(argument, self._state):
            return self._of(argument)
        value = number(self._state, argument)
        return Unfilled(value if isinstance(value, (int, float)) else None)

    def _check_sum(self, call: Call) -> None:
        """Unfilled slots are added beyond the tokens' rows, or are zero."""
        source = next((call[name] for name in ("source", "src", "values") if name in call.arguments), None)
        if source not in self._found:
            return
        index = call.arguments.get("index") or call["indices"][0]
        if self._table(index) is None:
            raise Refused(f"where {call.node} adds padded slots of no row is not known")
        sum_ = self._state.value(call["input"] if call.inplace else call.node).content
        if isinstance(sum_, Special) and sum_.kind == "spare":
            return
        rows = self._found[source]
        if rows.number != 0 or not rows.whole or not rows.known:
            raise Refused(
                f"{source} may be other than zero at padded slots of no row, and {call.node} adds it to a token:"
                " set it to zero there before the sum"
            )

    def _table(self, index: Any) -> Table | None:
        """A table of padded slots, dimensions along which it repeats aside."""
        value = self._state.value(index)
        return table_of(Value(tuple(group for group in value.dims if padded_atom(group)), value.content))


def _spelled(call: Call) -> tuple[str, list[Any], tuple[Any, ...]]:
    """(operation, operands, parameters) of elementwise arithmetic."""
    if call.name == "rsub":
        return "sub", [call["other"], call["input"]], ()
    if call.name in ("clamp_min", "clamp_max"):
        return "clamp", [call["input"]], (call.arguments.get("min"), call.arguments.get("max"))
    operands, parameters = ELEMENTWISE[call.name]
    return call.name, [call[name] for name in operands], tuple(call[name] for name in parameters)


def _either(first: Unfilled, second: Unfilled) -> Unfilled:
    return Unfilled(
        first.number if first.number == second.number else None,
        first.known and second.known,
        first.whole and second.whole,
        first.cut and second.cut,
    )


def _at(tree: expression.Apply, env: dict[str, float], dtype: torch.dtype) -> float | None:
    """The operation at these numbers; None if it or a derivative of it is not finite there."""
    with unset_fake_temporarily(), torch.no_grad():
        tensors = {name: torch.tensor(at, dtype=torch.float64, device="cpu") for name, at in env.items()}
        result, pullback = vjp(tree, tensors, tuple(tensors))
        gradients = pullback(torch.ones_like(result))
        found = [result, *gradients.values()]
        if not all(bool(at.to(dtype).isfinite()) for at in found):
            return None
        return float(result.to(dtype))
