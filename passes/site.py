"""What detection found: a mixture-of-experts block (Site), or what looked like one and was refused (NearMiss)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from moecompile.passes.layout import Layout

GATHER = "gather_experts"
"""The step that makes all ranks' experts of one rank's, as `moecompile::gather_experts` does; (ranks, group)."""


@dataclass(frozen=True)
class Spread:
    """Experts that lie on the ranks of a group, as many on each, in their order."""

    ranks: int
    group: str


@dataclass(frozen=True)
class Operand:
    """How to make one operand of the fused operator from a node of the graph.

    `steps` are (operation, arguments), applied in order. An argument may be an operand itself.
    """

    node: fx.Node
    steps: tuple[tuple[str, tuple[object, ...]], ...] = ()
    parts: tuple[fx.Node, ...] = ()  # for "stack": one node an expert

    @property
    def inner(self) -> tuple[Operand, ...]:
        """The operands among the steps' arguments."""
        return tuple(argument for _, arguments in self.steps for argument in arguments if isinstance(argument, Operand))

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes it is made of."""
        return (self.node, *self.parts, *(node for operand in self.inner for node in operand.nodes))


@dataclass(frozen=True)
class Site:
    """One MoE block: tokens (T, H), top_k experts of num_experts a token, and everything the fused operator needs.

    `input`, `activation` and `output` are expressions as text (codegen/expression.py): of `x` and `weight` before
    the first GEMM; of `gate` and `up` (or `hidden`) between the GEMMs; of `out` and `weight` after the second. Private
    fields hold graph nodes, and what the user chose to run inside the operators; `spread` says that the model exchanges
    its tokens with ranks which have the other experts.
    """

    form: str
    tokens: str
    top_k: str
    num_experts: int
    hidden: int
    intermediate: int
    activation: str
    input: str
    output: str
    gate_up: str
    dtype: str
    biases: tuple[str, ...]
    module: str
    source: str
    w_in_transposed: bool = False
    w_out_transposed: bool = False
    out_dtype: torch.dtype | None = None
    node: fx.Node = field(repr=False, compare=False, default=None)  # type: ignore[assignment]
    base: fx.Node | None = field(repr=False, compare=False, default=None)
    partials: tuple[fx.Node, ...] = field(repr=False, compare=False, default=())
    fresh: bool = field(repr=False, compare=False, default=True)
    kernels: str | None = field(repr=False, compare=False, default=None)
    recompute: bool = field(repr=False, compare=False, default=False)
    operands: dict[str, Operand] = field(repr=False, compare=False, default_factory=dict)
    region: frozenset[fx.Node] = field(repr=False, compare=False, default=frozenset())
    spread: Spread | None = field(repr=False, compare=False, default=None)


@dataclass(frozen=True)
class NearMiss:
    """A block that resembled a form and was left alone: why, at which operation, and the cure if there is one."""

    form: str
    reason: str
    node: str
    module: str
    source: str
    cure: str | None = None


@dataclass(frozen=True)
class Detection:
    """All Sites and near misses of one graph, in program order, and the layout of that graph."""

    sites: tuple[Site, ...]
    near_misses: tuple[NearMiss, ...]
    layout: Layout = field(repr=False, compare=False)
