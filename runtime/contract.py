"""What `moecompile::plan` and `moecompile::experts` accept, and the dtypes that follow from it.

One frozen record, `Arguments`, holds the arguments of `experts`; its checks serve the fake kernels and the real ones,
so that a wrong call is refused at trace time with the words it would get at run time.
"""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from moecompile.codegen.expression import Apply, Expression, Leaf, leaves, parse
from moecompile.runtime.elementwise import dtype_named, result_dtype

GATE_UP = ("halves", "interleaved", "separate", "single")
KERNELS = (None, "reference")
"""What runs inside the operators: the fastest kernels that the device has, or PyTorch's alone."""
TENSORS = ("x", "weights", "offsets", "slots", "order", "w_in", "w_out", "w_up", "b_in", "b_up", "b_out")
"""The tensors among the arguments of `experts`, in their order."""
DIFFERENTIABLE = ("x", "weights", "w_in", "w_out", "w_up", "b_in", "b_up", "b_out")
"""The order of `needs` and of the gradients that `experts_backward` returns."""
PARAMETERS = DIFFERENTIABLE[2:]
"""Those of the experts themselves."""
BIASES = PARAMETERS[3:]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_plan(expert_ids: Tensor, num_experts: int, room: int | None = None, operator: str = "plan") -> None:
    """Raises for anything but a (T, K) integer tensor, at least one expert, and room for a row at least."""
    if expert_ids.dtype not in INTEGERS:
        raise TypeError(f"moecompile::{operator}: expert_ids must hold integers, got dtype {expert_ids.dtype}")
    if expert_ids.dim() != 2:
        raise ValueError(
            f"moecompile::{operator}: expert_ids must have shape (tokens, experts per token), got "
            f"{tuple(expert_ids.shape)}"
        )
    if num_experts < 1:
        raise ValueError(f"moecompile::{operator}: num_experts must be at least 1, got {num_experts}")
    if room is not None and room < 1:
        words = f"room must be at least 1, got {room}; leave it out for all assignments"
        raise ValueError(f"moecompile::{operator}: {words}")


@dataclass(frozen=True)
class Dtypes:
    """Dtype of every value between the gather and the combine."""

    row: torch.dtype
    """What GEMM1 multiplies: the value of `input`."""
    hidden: torch.dtype
    """GEMM1's result after its bias."""
    activation: torch.dtype
    """What GEMM2 multiplies."""
    out: torch.dtype
    """GEMM2's result after its bias."""
    weighted: torch.dtype
    """The value of `output`."""
    result: torch.dtype


@dataclass(frozen=True)
class Weighting:
    """An output expression of the form cast(mul(cast(out), cast(weight))), any of the casts and the weight absent.

    Its gradient needs no value of `out`: that of `out` is a product with the weight, and that of the weight follows
    from what the backward of GEMM2 computes anyway. Casts are listed in the order they are applied.
    """

    of_out: tuple[torch.dtype, ...]
    of_weight: tuple[torch.dtype, ...] | None
    after: tuple[torch.dtype, ...]


@functools.lru_cache(maxsize=256)
def expression_leaves(text: str) -> frozenset[str]:
    """Names of the leaves of the expression that `text` spells."""
    return leaves(parse(text))


@functools.lru_cache(maxsize=256)
def weighting(output: str) -> Weighting | None:
    """The output expression as a Weighting, None if it has another form."""
    tree, after = _strip_casts(parse(output))
    if tree == Leaf("out"):
        return Weighting((), None, after)
    if not isinstance(tree, Apply) or tree.op != "mul":
        return None
    stripped = dict(_strip_casts(arg) for arg in tree.args)
    if stripped.keys() != {Leaf("out"), Leaf("weight")}:
        return None
    return Weighting(stripped[Leaf("out")], stripped[Leaf("weight")], after)


def _strip_casts(tree: Expression) -> tuple[Expression, tuple[torch.dtype, ...]]:
    casts: list[torch.dtype] = []
    while isinstance(tree, Apply) and tree.op == "cast":
        casts.insert(0, dtype_named(str(tree.params[0])))
        tree = tree.args[0]
    return tree, tuple(casts)


@dataclass(frozen=True)
class Arguments:
    """The arguments of `moecompile::experts`, by the names of its schema (see `moecompile.runtime.operators`).

    Operators that do not take x (`without_x`) have one on the meta device: its shape and its dtype, without values.
    """

    x: Tensor
    weights: Tensor | None
    offsets: Tensor
    slots: Tensor
    order: Tensor
    w_in: Tensor
    w_out: Tensor
    w_up: Tensor | None = None
    b_in: Tensor | None = None
    b_up: Tensor | None = None
    b_out: Tensor | None = None
    _: KW_ONLY
    activation: str
    gate_up: str
    input: str = "x"
    output: str = "mul(out, weight)"
    w_in_transposed: bool = False
    w_out_transposed: bool = False
    out_dtype: torch.dtype | None = None
    kernels: str | None = None
    recompute: bool = False
    room: int | None = None
    mean_over: int = 1
    scale_format: str = "power_of_two"
    """Of what is quantised: an argument of the FP8 operators alone."""

    @classmethod
    def without_x(
        cls, weights: Tensor | None, offsets: Tensor, slots: Tensor, *args: Any, **attributes: Any
    ) -> Arguments:
        """The record of a call without x, whose shape follows from the other arguments; x has the weights' dtype."""
        order, w_in, *rest = args
        features = w_in.shape[1 if attributes.get("w_in_transposed") else 2] if w_in.dim() == 3 else 0
        tokens = slots.shape[0] if slots.dim() == 2 else 0  # of another rank `check` complains
        x = w_in.new_empty((tokens, features), device="meta")
        return cls(x, weights, offsets, slots, order, w_in, *rest, **attributes)

    @property
    def num_experts(self) -> int:
        """E, the number of experts."""
        return self.w_in.shape[0]

    @property
    def rows(self) -> int:
        """T*K, the number of assignments of a token to an expert; fewer where there is room for fewer rows."""
        return self.order.shape[0]

    @property
    def saved_rows(self) -> int:
        """How many of GEMM1's rows are kept for the backward: all, or none."""
        return 0 if self.recompute else self.rows

    @property
    def intermediate(self) -> int:
        """I, what GEMM2 contracts over."""
        return self.w_out.shape[1 if self.w_out_transposed else 2]

    @property
    def width(self) -> int:
        """Features of a hidden row: 2I with a gate, I without."""
        return self.intermediate if self.gate_up == "single" else 2 * self.intermediate

    @property
    def features(self) -> int:
        """H, features of a token."""
        return self.w_in.shape[1 if self.w_in_transposed else 2]

    @property
    def out_features(self) -> int:
        """H2, features of the result."""
        return self.w_out.shape[2 if self.w_out_transposed else 1]

    @functools.cached_property
    def dtypes(self) -> Dtypes:
        """Dtypes of the values inside; raises TypeError where a GEMM would get two different ones."""
        tensors = (self.x, self.weights, self.w_in, self.w_out, self.w_up, self.b_in, self.b_up, self.b_out)
        found = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
        return operator_dtypes(found, self.activation, self.gate_up, self.input, self.output, self.out_dtype)

    def check(self) -> Arguments:
        """Itself; raises ValueError or TypeError naming the argument, what was expected and what came."""
        self._check_attributes()
        self._check_shapes()
        for name in ("offsets", "slots", "order"):
            if getattr(self, name).dtype != torch.int32:
                raise _error(TypeError, f"{name} must be int32 as `plan` gives it, got {getattr(self, name).dtype}")
        _ = self.dtypes
        self._check_devices({name: getattr(self, name) for name in TENSORS})
        return self

    def check_backward(self, grad: Tensor, hidden: Tensor) -> None:
        """Raises ValueError or TypeError unless the result's gradient and the saved rows fit these arguments."""
        _expect(grad, "grad", (self.x.shape[0], self.out_features), "(tokens, features)")
        words = "(no rows, features) with recompute" if self.recompute else "(tokens * experts per token, features)"
        _expect(hidden, "hidden", (self.saved_rows, self.width), words)
        if not grad.is_floating_point():
            raise _error(TypeError, f"grad must be floating-point, got {grad.dtype}; cast it first")
        if hidden.dtype != self.dtypes.hidden:
            words = f"hidden must be {self.dtypes.hidden}, as experts_forward gave it, got {hidden.dtype}"
            raise _error(TypeError, f"{words}; pass that")
        self._check_devices({"grad": grad, "hidden": hidden})

    def _check_devices(self, tensors: dict[str, Tensor | None]) -> None:
        device = self.w_in.device
        for name, tensor in tensors.items():
            if tensor is None or tensor.device == device or (name == "x" and tensor.is_meta):  # which has no values
                continue
            raise _error(ValueError, f"{name} must be on w_in's device, {device}, got {tensor.device}; move it")

    def _check_attributes(self) -> None:
        if self.gate_up not in GATE_UP:
            raise _error(ValueError, f"gate_up must be one of {', '.join(GATE_UP)}; got {self.gate_up!r}")
        check_kernels("experts", self.kernels)
        if self.mean_over < 1:
            raise _error(ValueError, f"mean_over must be at least 1, got {self.mean_over}; leave it out for sums")
        hidden = {"hidden"} if self.gate_up == "single" else {"gate", "up"}
        for name, allowed in (("input", {"x"}), ("activation", hidden), ("output", {"out"})):
            found = expression_leaves(getattr(self, name))
            if found - allowed - {"weight"} or not found & allowed:
                words = f"{name} must read {' or '.join(sorted(allowed))}, may read weight, and nothing else"
                raise _error(ValueError, f"{words}; {getattr(self, name)!r} reads {', '.join(sorted(found))}")
            if self.weights is None and "weight" in expression_leaves(getattr(self, name)):
                hint = "pass weights, or output='out' if the experts' results are summed unweighted"
                raise _error(ValueError, f"{name} {getattr(self, name)!r} reads weight but weights is None; {hint}")

    def _check_shapes(self) -> None:
        for name, rank, words in _RANKS:
            tensor = getattr(self, name)
            if tensor is not None and tensor.dim() != rank:
                raise _error(ValueError, f"{name} must have shape {words}, got {tuple(tensor.shape)}")
        if (self.w_up is not None) != (self.gate_up == "separate"):
            came = "None" if self.w_up is None else f"shape {tuple(self.w_up.shape)}"
            raise _error(ValueError, f"w_up goes with gate_up='separate' alone; got {came}, gate_up={self.gate_up!r}")
        (tokens, features), experts, inner = self.x.shape, self.num_experts, self.intermediate
        top_k = self.slots.shape[1]
        if experts == 0:
            raise _error(ValueError, f"w_in must hold the matrices of an expert at least, got {tuple(self.w_in.shape)}")
        first = inner if self.gate_up in ("separate", "single") else self.width
        _expect(self.slots, "slots", (tokens, top_k), "(tokens, experts per token)")
        self._check_order(tokens * top_k)
        _expect(self.offsets, "offsets", (experts,), "(experts,)")
        if self.weights is not None:
            _expect(self.weights, "weights", (tokens, top_k), "(tokens, experts per token)")
        matrix = (experts, features, first) if self.w_in_transposed else (experts, first, features)
        words = "(experts, in, out)" if self.w_in_transposed else "(experts, out, in)"
        _expect(self.w_in, "w_in", matrix, f"{words} for gate_up={self.gate_up!r}")
        _expect(self.w_out, "w_out", (experts, self.w_out.shape[1], self.w_out.shape[2]), "(experts, ., .)")
        if self.w_up is not None:
            _expect(self.w_up, "w_up", matrix, words)
        if self.b_up is not None and self.w_up is None:
            raise _error(ValueError, f"b_up goes with w_up alone, got shape {tuple(self.b_up.shape)}; use b_in")
        for name, bias, size in (("b_in", self.b_in, first), ("b_up", self.b_up, inner)):
            if bias is not None:
                _expect(bias, name, (experts, size), "(experts, features)")
        if self.b_out is not None:
            _expect(self.b_out, "b_out", (experts, self.out_features), "(experts, features)")

    def _check_order(self, assignments: int) -> None:
        """It has a row for each, or for as many as there is room for."""
        if self.room is None:
            return _expect(self.order, "order", (assignments,), "(tokens * experts per token,)")
        rows = torch.sym_min(self.room, assignments)
        return _expect(self.order, "order", (rows,), "(tokens * experts per token,), or (room,) if that is less")


_RANKS = (
    ("x", 2, "(tokens, features)"),
    ("slots", 2, "(tokens, experts per token)"),
    ("w_in", 3, "(experts, out, in) or, transposed, (experts, in, out)"),
    ("w_out", 3, "(experts, out, in) or, transposed, (experts, in, out)"),
)


def _error(kind: type[Exception], message: str) -> Exception:
    return kind(f"moecompile::experts: {message}")


def check_kernels(operator: str, kernels: str | None) -> None:
    """Raises ValueError for a value that the attribute does not take."""
    if kernels not in KERNELS:
        words = f"kernels must be one of {', '.join(map(repr, KERNELS))}; got {kernels!r}"
        raise ValueError(f"moecompile::{operator}: {words}")


def _expect(tensor: Tensor, name: str, shape: tuple[int, ...], words: str) -> None:
    expect_shape("experts", tensor, name, shape, words)


def expect_shape(operator: str, tensor: Tensor, name: str, shape: tuple[int, ...], words: str, hint: str = "") -> None:
    """Raises ValueError, naming the operator and the argument and with a hint, unless the tensor has that shape."""

    def message() -> str:
        came = f"got {tuple(tensor.shape)}{'; ' if hint else ''}{hint}"
        return f"moecompile::{operator}: {name} must have shape {words} = {shape}, {came}"

    if tensor.dim() != len(shape):
        raise ValueError(message())
    for actual, expected in zip(tensor.shape, shape, strict=True):
        if type(actual) is int and type(expected) is int:
            if actual != expected:
                raise ValueError(message())
        else:  # a symbolic size: let the shape environment prove it, guard on it or check it at run time
            torch._check_value(actual == expected, message)


@functools.lru_cache(maxsize=256)
def operator_dtypes(
    tensors: tuple[torch.dtype | None, ...],
    activation: str,
    gate_up: str,
    input: str,
    output: str,
    out_dtype: torch.dtype | None = None,
) -> Dtypes:
    """Dtypes of the values inside, for tensors of these dtypes in the order of DIFFERENTIABLE.

    Raises TypeError where a GEMM would get two different ones.
    """
    for name, dtype in zip((*DIFFERENTIABLE, "out_dtype"), (*tensors, out_dtype), strict=True):
        if dtype is not None and not dtype.is_floating_point:
            raise _error(TypeError, f"{name} must have a floating-point dtype, got {dtype}")
    x, weight, w_in, w_out, w_up, b_in, b_up, b_out = tensors

    def value(expression: str, **leaf_dtypes: torch.dtype | None) -> torch.dtype:
        leaf_dtypes["weight"] = weight
        return result_dtype(expression, {name: dtype for name, dtype in leaf_dtypes.items() if dtype is not None})

    row = value(input, x=x)
    for name, dtype in (("w_in", w_in), ("w_up", w_up)):
        if dtype is not None and dtype != row:
            raise _error(TypeError, f"GEMM1 multiplies input {input!r} of {row} by {name} of {dtype}; write the cast")
    hidden = _promoted(row, b_in, b_up)
    activated = value(activation, gate=hidden, up=hidden, hidden=hidden)
    if w_out != activated:
        raise _error(
            TypeError, f"GEMM2 multiplies activation {activation!r} of {activated} by w_out of {w_out}; write the cast"
        )
    out = _promoted(activated, b_out)
    weighted = value(output, out=out)
    return Dtypes(row, hidden, activated, out, weighted, out_dtype or weighted)


def _promoted(dtype: torch.dtype, *others: torch.dtype | None) -> torch.dtype:
    for other in others:
        dtype = dtype if other is None else torch.promote_types(dtype, other)
    return dtype
