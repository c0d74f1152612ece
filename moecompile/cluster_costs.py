"""What a layer of a mixture-of-experts model computes on one GPU: its kernels, forward and backward.

A layer has five parts: attention, route (norm, router, the choice of experts), shared expert, experts, and join (what
came back, the shared expert and the residual are added). Each is a list of steps, and each step has kernels for its
forward, for gradients of what it was given (the input part of the backward), and of its matrix (the weight part).

A kernel takes as long as its operations, or the bytes it reads and writes once, whichever is longer, and a launch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moecompile.cluster_exchange import Cluster, reach
from moecompile.cluster_shapes import Heads, Model
from moecompile.passes.hardware import Hardware

BYTES = {"float8": 1, "bfloat16": 2}
"""Of a value that is multiplied; what products give, and everything else, is bfloat16."""


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        bytes: read and written.
        operations: floating-point, of its products.
        precision: what these multiply, one of `Hardware.flops`.
    """

    bytes: float
    operations: float = 0.0
    precision: str = "bfloat16"

    def seconds(self, hardware: Hardware) -> float:
        """How long it takes with all multiprocessors."""
        return hardware.seconds(self.operations, self.precision, self.bytes)


@dataclass(frozen=True)
class Product:
    """Rows times matrices, each row times one of them.

    Attributes:
        rows: how many there are.
        inner: of a row, and of a matrix's first dimension.
        outer: of a matrix's second.
        precision: "float8" or "bfloat16". FP8 operands of the three products are made by kernels of their own.
        matrices: how many there are.
        cast: rows come in bfloat16, so that float8 has to be made of them.
    """

    rows: float
    inner: int
    outer: int
    precision: str
    matrices: int = 1
    cast: bool = True

    def forward(self) -> list[Kernel]:
        """The product, behind the cast of its rows."""
        size = BYTES[self.precision]
        moved = size * (self.rows * self.inner + self._matrix) + 2 * self.rows * self.outer
        return [*self._casts(self.inner if self.cast else 0), self._kernel(moved)]

    def inputs(self) -> list[Kernel]:
        """Gradients of the rows, behind the cast of what comes back."""
        size = BYTES[self.precision]
        moved = size * (self.rows * self.outer + self._matrix) + 2 * self.rows * self.inner
        return [*self._casts(self.outer), self._kernel(moved)]

    def weights(self) -> list[Kernel]:
        """Gradients of matrices, added to float32, behind the transposing of both operands, which FP8 products need."""
        both = self.rows * (self.inner + self.outer)
        product = self._kernel(BYTES[self.precision] * both + 2 * 4 * self._matrix)
        return [Kernel(2 * both), product] if self.precision == "float8" else [product]

    @property
    def _matrix(self) -> int:
        return self.matrices * self.inner * self.outer

    def _kernel(self, moved: float) -> Kernel:
        return Kernel(moved, 2 * self.rows * self.inner * self.outer, self.precision)

    def _casts(self, size: int) -> list[Kernel]:
        """From two bytes to one."""
        return [Kernel(3 * self.rows * size)] if self.precision == "float8" and size else []


@dataclass(frozen=True)
class Pointwise:
    """What multiplies no matrices, in one kernel; its backward reads and writes twice as much.

    Attributes:
        bytes: read and written in the forward.
    """

    bytes: float

    def forward(self) -> list[Kernel]:
        """Itself."""
        return [Kernel(self.bytes)]

    def inputs(self) -> list[Kernel]:
        """What the forward read is read again, beside gradients."""
        return [Kernel(2 * self.bytes)]

    def weights(self) -> list[Kernel]:
        """None: gradients of norms are small."""
        return []


@dataclass(frozen=True)
class Scores:
    """Queries times keys, and what follows of them times values: causal, in one kernel, in bfloat16.

    Attributes:
        tokens: of all sequences.
        sequence: tokens of one.
        heads: of queries.
        query: size of a head of queries and keys.
        value: of values.
        held: values of queries, keys, values and the result, of one token.
    """

    tokens: int
    sequence: int
    heads: int
    query: int
    value: int
    held: int

    def forward(self) -> list[Kernel]:
        """Of all pairs of tokens the half that are in order."""
        operations = self.tokens * self.sequence * self.heads * (self.query + self.value)
        return [Kernel(2 * self.tokens * self.held, operations)]

    def inputs(self) -> list[Kernel]:
        """Five products in place of two, as scores are computed again (FlashAttention, arXiv:2205.14135)."""
        return [Kernel(2 * kernel.bytes, 2.5 * kernel.operations) for kernel in self.forward()]

    def weights(self) -> list[Kernel]:
        """There is no matrix."""
        return []


Step = Product | Pointwise | Scores


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank.

    Attributes:
        sequence: tokens of a sequence.
        sequences: how many there are.
        precision: of products with matrices, but the router's, and of tokens on their way to experts.
    """

    sequence: int
    sequences: int = 1
    precision: str = "float8"

    @property
    def tokens(self) -> int:
        """In all."""
        return self.sequence * self.sequences


@dataclass(frozen=True)
class Part:
    """Seconds of a part of a layer, with all multiprocessors."""

    forward: float
    inputs: float
    weights: float


def parts(model: Model, cluster: Cluster, batch: Batch) -> dict[str, Part]:
    """The parts of a layer by name, in their order; "shared" is there only if the model has a shared expert.

    Raises:
        ClusterError: the experts cannot be spread so.
    """
    steps: dict[str, list[Step]] = {
        "attention": attention(model, batch),
        "route": _route(model, batch),
        "shared": _expert(model.hidden, model.shared, batch.tokens, 1, batch.precision) if model.shared else [],
        "experts": _experts(model, cluster, batch),
        "join": [Pointwise(2 * 4 * batch.tokens * model.hidden)],
    }
    return {name: _part(each, cluster.hardware) for name, each in steps.items() if each}


def _part(steps: Iterable[Step], hardware: Hardware) -> Part:
    each = [*steps]
    kinds = (
        [kernel for step in each for kernel in step.forward()],
        [kernel for step in each for kernel in step.inputs()],
        [kernel for step in each for kernel in step.weights()],
    )
    return Part(*(sum(kernel.seconds(hardware) for kernel in kernels) for kernels in kinds))


def attention(model: Model, batch: Batch) -> list[Step]:
    """A norm, products that make queries, keys and values, positions, scores, and the product behind them."""
    tokens, hidden, form = batch.tokens, model.hidden, model.attention

    def product(inner: int, outer: int) -> Product:
        return Product(tokens, inner, outer, batch.precision)

    norm = Pointwise(2 * 2 * tokens * hidden)
    if isinstance(form, Heads):
        query, key = form.heads * form.size, form.key_heads * form.size
        made = [product(hidden, query + 2 * key)]
        scores = Scores(tokens, batch.sequence, form.heads, form.size, form.size, 2 * query + 2 * key)
        return [norm, *made, Pointwise(2 * 2 * tokens * (query + key)), scores, product(query, hidden)]
    head, short = form.plain + form.rotary, form.query_rank + form.key_rank
    query, value = form.heads * head, form.heads * form.value
    scores = Scores(tokens, batch.sequence, form.heads, head, form.value, 2 * query + 2 * value)
    return [
        norm,
        product(hidden, short + form.rotary),
        Pointwise(2 * 2 * tokens * short),
        product(form.query_rank, query),
        product(form.key_rank, form.heads * form.plain + value),
        Pointwise(2 * 2 * tokens * 2 * query),
        scores,
        product(value, hidden),
    ]


def _route(model: Model, batch: Batch) -> list[Step]:
    """The residual and a norm, the router in bfloat16, its scores, and the cast of what travels."""
    residual = Pointwise(2 * 4 * batch.tokens * model.hidden)
    router = Product(batch.tokens, model.hidden, model.experts, "bfloat16")
    cast = [Pointwise(3 * batch.tokens * model.hidden)] if batch.precision == "float8" else []
    return [residual, router, Pointwise(2 * 4 * batch.tokens * model.experts), *cast]


def _expert(hidden: int, inner: int, rows: float, matrices: int, precision: str) -> list[Step]:
    """Gate and up projection in one product, activation, down projection; rows come cast."""
    return [
        Product(rows, hidden, 2 * inner, precision, matrices, cast=False),
        Pointwise(2 * 3 * rows * inner),
        Product(rows, inner, hidden, precision, matrices),
    ]


def _experts(model: Model, cluster: Cluster, batch: Batch) -> list[Step]:
    """A rank's experts: rows put in order of experts, products, and sums of what goes back to one rank.

    All experts get as many rows, so a rank's are as many as its own tokens have assignments.
    """
    rows, hidden = batch.tokens * model.top, model.hidden
    came = batch.tokens * reach(model, cluster).ranks
    return [
        Pointwise(2 * BYTES[batch.precision] * rows * hidden),
        *_expert(hidden, model.inner, rows, model.experts // cluster.ranks, batch.precision),
        Pointwise(2 * (rows + came) * hidden),
    ]
