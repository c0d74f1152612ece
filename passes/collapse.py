"""A graph reduced to moecompile's operators and the edges between them; all other nodes are dots.

Goldens of backward graphs are made of this: what lies between our operators depends on torch's version and
decompositions, and is not ours to test.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable

from torch import fx

from moecompile.passes.lines import Lines
from moecompile.passes.spelling import is_moecompile, operation_name, picks_result

_NAMED_IN_A_RUN = 6


def collapsed(lines: Lines, counts: bool) -> list[str]:
    """The lines of moecompile's operators, the inputs they use directly, a line for each run of others, the outputs."""
    origins = _Origins()
    printed: list[str] = []
    run: list[fx.Node] = []
    for node in lines.nodes:
        direct = node.op == "placeholder" and any(is_moecompile(user) for user in node.users)
        if direct or is_moecompile(node) or node.op == "output":
            printed += _run(run, counts)
            run = []
            printed.append(_returned(lines, node, origins) if node.op == "output" else lines.line(node))
            origins.add(node, "" if direct or node.op == "output" else lines.names[node])
            continue
        lines.names[node] = _name(lines, node, origins)
        origins.add(node)
        if node.op.startswith("call") and not picks_result(node):
            run.append(node)
    return printed


def _name(lines: Lines, node: fx.Node, origins: _Origins) -> str:
    """What a node without a line of its own is called: a result of an operator, or what it depends on."""
    if picks_result(node) and is_moecompile(owner := node.all_input_nodes[0]):
        return f"{lines.names[owner]}[{node.args[1]}]"
    return origins.dots(node.all_input_nodes)


def _returned(lines: Lines, output: fx.Node, origins: _Origins) -> str:
    """The outputs: moecompile's own values one by one, then all others as one, for their order is torch's."""
    ours = [value for value in output.all_input_nodes if not lines.names[value].startswith("...")]
    others = [value for value in output.all_input_nodes if lines.names[value].startswith("...")]
    return f"return {', '.join([lines.names[value] for value in ours] + [origins.dots(others)] * bool(others))}"


def _run(nodes: list[fx.Node], counts: bool) -> list[str]:
    if not nodes or not counts:
        return ["..."] * bool(nodes)
    names = list(dict.fromkeys(operation_name(node) for node in nodes))
    listed = ", ".join(names[:_NAMED_IN_A_RUN] + ["..."] * (len(names) > _NAMED_IN_A_RUN))
    return [f"... {len(nodes)} {'operation' if len(nodes) == 1 else 'operations'} ({listed})"]


class _Origins:
    """For each value the moecompile operators that it depends on last, without passing through another of them."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._behind: list[int] = []  # for each operator, as bits, all operators that come before it
        self._last: dict[fx.Node, int] = {}

    def add(self, node: fx.Node, operator_name: str = "") -> None:
        """Notes a node; one of moecompile's operators comes with its name."""
        mask = self._union(self._last[value] for value in node.all_input_nodes)
        if operator_name:
            self._behind.append(mask | self._union(self._behind[bit] for bit in _bits(mask)))
            mask = 1 << len(self._names)
            self._names.append(operator_name)
        self._last[node] = mask

    def dots(self, values: Iterable[fx.Node]) -> str:
        """``...(%3, %5)``: the operators behind the values, without those that another of them depends on already."""
        mask = self._union(self._last[value] for value in values)
        mask &= ~self._union(self._behind[bit] for bit in _bits(mask))
        names = [self._names[bit] for bit in _bits(mask)]
        return f"...({', '.join(names)})" if names else "..."

    @staticmethod
    def _union(masks: Iterable[int]) -> int:
        return functools.reduce(operator.or_, masks, 0)


def _bits(mask: int) -> Iterable[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
