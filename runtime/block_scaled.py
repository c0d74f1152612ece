"""Matrices that are kept in FP8 and nowhere else: e4m3 values and a float32 scale for each block of 128x128.

    w = BlockScaled.of(parameter, gate_up="halves")      parameter may go
    moecompile.quantize_weights(w, gate_up="halves")     gives what w holds: nothing is computed
    x @ w.mT                                             reads the matrix dequantised, made for this

Shape and dtype are those of the matrix it stands for, so that a model reads as before. What is held lies as products
read it: (*E, N', K') in whole blocks, gate and up each from a block of its own (`moecompile.runtime.quantize`). It has
no gradient. Under torch.compile it is the two tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moecompile.runtime import operators  # noqa: F401 - registers what is dispatched on
from moecompile.runtime.fp8_contract import Four, check_weights
from moecompile.runtime.quantize import (
    BLOCK,
    DTYPES,
    E4M3,
    FLOAT32,
    POWER_OF_TWO,
    SQUARE,
    blocks_in,
    dequantize,
    pad,
    power_above,
    transposed_copy,
)

aten, ops = torch.ops.aten, torch.ops.moecompile


class Lie(NamedTuple):
    """How a matrix lies, by the attributes of `moecompile::quantize_weights`."""

    gate_up: str = "single"
    transposed: bool = False


class BlockScaled(Tensor):
    """A matrix (N, K), or experts' (E, N, K) or (E, K, N), in FP8. Made by `of` and `from_blocks`.

    Attributes:
        e4m3: values, and scales their scales, as products read them.
        lie: how the matrix lies.
        gate_first: whether of "halves" the first is the one that a nonlinearity is applied to.
    """

    e4m3: Tensor
    scales: Tensor
    lie: Lie
    gate_first: bool

    @staticmethod
    def __new__(  # noqa: D102 - the class says how it is made
        cls: type[BlockScaled], values: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype, lie: Lie,
        gate_first: bool = True,
    ) -> BlockScaled:  # fmt: skip
        made: BlockScaled = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=values.device)
        made.e4m3, made.scales, made.lie, made.gate_first = values, scales, lie, gate_first
        return made

    def __init__(self, *_: Any) -> None:
        """All is done when it is made."""

    @classmethod
    def of(
        cls, matrix: Tensor, *, gate_up: str = "single", transposed: bool = False, scale_format: str = POWER_OF_TWO,
        gate_first: bool = True,
    ) -> BlockScaled:  # fmt: skip
        """Quantises a matrix. With gate_up="separate" gate and up projection are kept each for itself.

        Raises:
            TypeError: another dtype than bfloat16, float16 and float32.
            ValueError: a shape that `moecompile::quantize_weights` does not take, or a format.
        """
        lie = Lie("single" if gate_up == "separate" else gate_up, transposed)
        attributes = {**lie._asdict(), "backward": False, "scale_format": scale_format}
        values, scales, *_ = ops.quantize_weights(matrix.detach(), **attributes)
        return cls(values, scales, matrix.shape, matrix.dtype, lie, gate_first)

    @classmethod
    def from_blocks(
        cls, values: Tensor, scales: Tensor, dtype: torch.dtype, *, gate_up: Literal["single", "halves"] = "single"
    ) -> BlockScaled:
        """Keeps a checkpoint's matrix as it is there: DeepSeek-V3's `weight` and `weight_scale_inv`.

        Args:
            values: (*E, N, K) e4m3.
            scales: (*E, ceil(N / 128), ceil(K / 128)) float32, by which the values are multiplied. With "halves"
                (E, 2 ceil(N / 256), ceil(K / 128)), the gate's and then the up projection's.
            dtype: of the matrix it stands for.
            gate_up: whether blocks begin anew in the middle of N.

        Raises:
            TypeError: other dtypes.
            ValueError: shapes that do not fit.
        """
        if values.dtype != E4M3 or scales.dtype != torch.float32 or dtype not in DTYPES:
            came = f"{values.dtype}, {scales.dtype} and {dtype}"
            raise TypeError(f"expected float8_e4m3fn values, float32 scales and a model's dtype; got {came}")
        if values.dim() not in (2, 3):
            raise ValueError(f"expected values of shape (N, K) or (experts, N, K), got {tuple(values.shape)}")
        *outer, n, k = values.shape
        parts = 2 if gate_up == "halves" else 1
        if n % parts or parts > 1 + len(outer):
            raise ValueError(f"expected values (experts, 2 N, K) for gate_up='halves', got {tuple(values.shape)}")
        expected = (*outer, parts * blocks_in(n // parts, BLOCK), blocks_in(k, BLOCK))
        if tuple(scales.shape) != expected:
            words = f"expected scales of shape {expected}, one for each 128x128 of values {tuple(values.shape)}"
            raise ValueError(f"{words}; got {tuple(scales.shape)}")
        behind = (0, pad(k) - k, 0, pad(n // parts) - n // parts)
        filled = [torch.nn.functional.pad(part, behind) for part in values.view(torch.uint8).chunk(parts, -2)]
        return cls(torch.cat(filled, -2).view(E4M3), scales.contiguous(), values.shape, dtype, Lie(gate_up))

    def blocks(self) -> tuple[Tensor, Tensor] | None:
        """Values and scales as `from_blocks` takes them; None if gate and up have blocks that do not lie in this."""
        if not is_whole(self.shape, self.lie):
            return None
        *_, n, k = self.shape if not self.lie.transposed else (*self.shape[:-2], self.shape[-1], self.shape[-2])
        values = self.e4m3.view(torch.uint8)[..., :n, :k]
        scales = self.scales[..., : blocks_in(n, BLOCK), : blocks_in(k, BLOCK)]
        values, scales = (values.mT, scales.mT) if self.lie.transposed else (values, scales)
        return values.contiguous().view(E4M3), scales.contiguous()

    def gate_and_up(self) -> tuple[BlockScaled, BlockScaled] | None:
        """Of experts (E, 2 N, K) that are known to have gate and then up: these, sharing memory with this."""
        if self.lie != Lie("halves") or not self.gate_first:
            return None
        experts, n, k = self.shape
        halves = zip(self.e4m3.chunk(2, 1), self.scales.chunk(2, 1), strict=True)
        gate, up = (BlockScaled(*half, (experts, n // 2, k), self.dtype, Lie()) for half in halves)
        return gate, up

    def laid(self, lie: Lie) -> BlockScaled | None:
        """The same matrix as products ask for it, with the same bits; None if blocks lie otherwise."""
        held = _held(self, None, lie)
        return None if held is None else BlockScaled(*held, self.shape, self.dtype, lie, self.gate_first)

    def dequantized(self) -> Tensor:
        """The matrix in its dtype, contiguous."""
        return _unpacked(dequantize(self.e4m3, self.scales, SQUARE), self.shape, self.lie).to(self.dtype)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Quantises one expert's matrix into its place; other parts, which read as copies, are refused."""
        if type(index) is not int or self.dim() != 3:
            words = f"a part [{index}] of a matrix that is kept in FP8, of shape {tuple(self.shape)}, is written"
            raise RuntimeError(
                f"{words}; blocks of 128x128 share a scale: write one expert's whole matrix, or all of it"
            )
        self[index].copy_(torch.as_tensor(value, device=self.device).expand(self.shape[1:]))

    def requires_grad_(self, requires_grad: bool = True) -> BlockScaled:
        """As of any tensor; raises RuntimeError if a gradient is wanted, which could not be added to what is held."""
        if requires_grad:
            words = f"a matrix that is kept in FP8, of shape {tuple(self.shape)}, has no gradient"
            raise RuntimeError(f"{words}; train the model in its own precision, or parameters beside this one")
        return cast(BlockScaled, super().requires_grad_(False))

    def share_memory_(self) -> BlockScaled:
        """Moves what is held to memory that other processes have, too."""
        for own in (self.e4m3, self.scales):
            own.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether it lies there."""
        return self.e4m3.is_shared() and self.scales.is_shared()

    @property
    def data(self) -> Tensor:
        """The same without a gradient."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        """Takes what another such matrix holds; raises RuntimeError for others, which nothing here could hold."""
        if not isinstance(value, BlockScaled) or (value.shape, value.dtype) != (self.shape, self.dtype):
            words = f"`.data` of a matrix that is kept in FP8, of shape {tuple(self.shape)}, is set to a tensor"
            raise RuntimeError(f"{words} {tuple(value.shape)}; `copy_` quantises what it is given")
        self.e4m3, self.scales, self.lie, self.gate_first = value.e4m3, value.scales, value.lie, value.gate_first

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle, which PyTorch has not for e4m3, and torch.save: what is held."""
        held = (
            self.e4m3.view(torch.uint8),
            self.scales,
            tuple(self.shape),
            self.dtype,
            tuple(self.lie),
            self.gate_first,
        )
        return _rebuilt, (*held, isinstance(self, torch.nn.Parameter))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's stubs mangle the name
        return f"BlockScaled(shape={tuple(self.shape)}, dtype={self.dtype}, {self.lie}, device={self.device})"

    # ---- PyTorch's protocol for tensors that wrap others

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["e4m3", "scales"], (self.dtype, self.lie, self.gate_first)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], context: tuple[Any, ...], size: Sequence[int], _: Any
    ) -> BlockScaled:
        return BlockScaled(inner["e4m3"], inner["scales"], size, *context)

    def _stable_hash_for_caching(self) -> str:
        return repr(("BlockScaled", tuple(self.shape), self.dtype, self.lie))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stubs lack the function
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What an operation gives for such matrices: FP8 by `_OWN`, or what it gives for the dequantised ones."""
        run, keywords = _OWN.get(func), dict(kwargs or {})
        if run is not None:
            return run(func, *args, **keywords)
        _refuse_writing(func, args, keywords)
        read = _stand_in if func in _SHAPE_ONLY else BlockScaled.dequantized
        given, keywords = pytree.tree_map_only(BlockScaled, read, (tuple(args), keywords))
        return func(*given, **keywords)


_SHAPE_ONLY = frozenset(
    getattr(ops, name).default
    for name in (
        f"{kind}{which}"
        for kind in ("experts_fp8", "exchanged_experts")
        for which in ("", "_forward", "_backward", "_backward_adding")
    )
)
"""What multiplies the quantised matrices that it gets besides, and asks the matrices themselves for their shape."""


def _stand_in(matrix: BlockScaled) -> Tensor:
    """A tensor of this shape and dtype that has one element's memory."""
    return matrix.e4m3.new_empty((1,) * matrix.dim(), dtype=matrix.dtype).expand(matrix.shape)


def _refuse_writing(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises RuntimeError where the function would write into a matrix that only reads as one."""
    for number, each in enumerate(function._schema.arguments):
        if each.alias_info is not None and each.alias_info.is_write:
            given = kwargs.get(each.name) if number >= len(args) else args[number]
            for leaf in pytree.tree_leaves(given):
                if isinstance(leaf, BlockScaled):
                    words = f"{function} writes into a matrix that is kept in FP8, of shape {tuple(leaf.shape)}"
                    raise RuntimeError(f"{words}; set the parameter anew, or load the model in its own precision")


# ---- what gives FP8 for FP8


def _quantize_weights(
    function: Any,
    w: Tensor,
    w_up: Tensor | None = None,
    *,
    gate_up: str = "single",
    transposed: bool = False,
    backward: bool = True,
    scale_format: str = POWER_OF_TWO,
) -> Four:
    check_weights(w, w_up, gate_up, transposed, backward)
    values, scales = _held(w, w_up, Lie(gate_up, transposed)) or (None, None)
    if values is None or scales is None:
        plain = [each.dequantized() if isinstance(each, BlockScaled) else each for each in (w, w_up)]
        attributes = {"gate_up": gate_up, "transposed": transposed, "backward": backward, "scale_format": scale_format}
        four: Four = function(*plain, **attributes)
        return four
    if not backward:
        return values, scales, values.new_empty(0), scales.new_empty(0)
    return values, scales, transposed_copy(values), transposed_copy(scales)


def _held(w: Tensor, w_up: Tensor | None, lie: Lie) -> tuple[Tensor, Tensor] | None:
    """Values and scales as they are asked for, if they are held so, or turned."""
    if not isinstance(w, BlockScaled):
        return None
    if lie.gate_up == "separate":
        each = Lie("single", lie.transposed)
        gate, up = _held(w, None, each), None if w_up is None else _held(w_up, None, each)
        if gate is None or up is None:
            return None
        values = torch.cat([gate[0].view(torch.uint8), up[0].view(torch.uint8)], 1).view(E4M3)
        return values, torch.cat([gate[1], up[1]], 1)
    if w.lie == lie:
        return w.e4m3, w.scales
    if not (is_whole(w.shape, w.lie) and is_whole(w.shape, lie)):
        return None
    if w.lie.transposed == lie.transposed:
        return w.e4m3, w.scales
    return transposed_copy(w.e4m3.view(torch.uint8)).view(E4M3), transposed_copy(w.scales)


def is_whole(shape: Sequence[int], lie: Lie) -> bool:
    """Whether blocks are those of the whole matrix, wherever gate and up are in it."""
    features = shape[-1 if lie.transposed else -2]
    return lie.gate_up == "single" or (lie.gate_up == "halves" and features % (2 * BLOCK) == 0)


def _each(function: Any, matrix: BlockScaled, *args: Any, **kwargs: Any) -> BlockScaled:
    """Does it to both tensors."""
    made = [function(each, *args, **kwargs) for each in (matrix.e4m3, matrix.scales)]
    return BlockScaled(made[0], made[1], matrix.shape, matrix.dtype, matrix.lie, matrix.gate_first)


def _clone(function: Any, matrix: BlockScaled, **_: Any) -> BlockScaled:
    return _each(function, matrix)


def _to_copy(function: Any, matrix: BlockScaled, **kwargs: Any) -> Tensor:
    """Another device, another dtype to stand for."""
    dtype = kwargs.pop("dtype", None) or matrix.dtype
    kwargs.pop("memory_format", None)
    if dtype not in DTYPES or kwargs.get("layout") not in (None, torch.strided):
        converted: Tensor = function(matrix.dequantized(), dtype=dtype, **kwargs)
        return converted
    moved = _each(function, matrix, **kwargs)
    return BlockScaled(moved.e4m3, moved.scales, matrix.shape, dtype, matrix.lie, matrix.gate_first)


def _stack(function: Any, matrices: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Experts' matrices, of a parameter each, as one."""
    first, alike = matrices[0], all(isinstance(each, BlockScaled) for each in matrices)
    kinds = {(each.shape, each.dtype, each.lie) for each in matrices if isinstance(each, BlockScaled)}
    if not alike or dim != 0 or kinds != {(first.shape, first.dtype, Lie())} or first.dim() != 2:
        plain = [each.dequantized() if isinstance(each, BlockScaled) else each for each in matrices]
        stacked: Tensor = function(plain, dim)
        return stacked
    values = function([each.e4m3.view(torch.uint8) for each in matrices if isinstance(each, BlockScaled)])
    scales = function([each.scales for each in matrices if isinstance(each, BlockScaled)])
    return BlockScaled(values.view(E4M3), scales, (len(matrices), *first.shape), first.dtype, Lie())


def _select(function: Any, matrix: BlockScaled, dim: int, index: int) -> Tensor:
    """One expert's matrix: a loop over experts dequantises each for itself."""
    if matrix.dim() != 3 or dim not in (0, -3):
        plain: Tensor = function(matrix.dequantized(), dim, index)
        return plain
    values, scales = (function(each, 0, index) for each in (matrix.e4m3, matrix.scales))
    return BlockScaled(values, scales, matrix.shape[1:], matrix.dtype, matrix.lie, matrix.gate_first)


def _unbind(function: Any, matrix: BlockScaled, dim: int = 0) -> Sequence[Tensor]:
    """All experts' matrices, of which each is dequantised when it is read."""
    if matrix.dim() != 3 or dim not in (0, -3):
        plain: Sequence[Tensor] = function(matrix.dequantized(), dim)
        return plain
    return [_select(aten.select.int, matrix, 0, expert) for expert in range(matrix.shape[0])]


def _copy_(function: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What `load_state_dict` does: an FP8 matrix is taken as it is, another one quantised, in the format there was."""
    if not isinstance(target, BlockScaled):
        assert isinstance(source, BlockScaled)
        written: Tensor = function(target, source.dequantized(), non_blocking)
        return written
    if source.shape != target.shape:
        words = f"expected a matrix of shape {tuple(target.shape)} to copy into one in FP8"
        raise RuntimeError(f"{words}, got {tuple(source.shape)}")
    if not isinstance(source, BlockScaled) or source.lie != target.lie:
        plain = source.dequantized() if isinstance(source, BlockScaled) else source
        powers = torch.equal(power_above(target.scales), target.scales)
        how = {**target.lie._asdict(), "scale_format": POWER_OF_TWO if powers else FLOAT32}
        source = BlockScaled.of(plain.to(target.dtype).reshape(-1, *plain.shape[-2:]), **how)
    for name in ("e4m3", "scales"):
        own: Tensor = getattr(target, name)
        own.copy_(getattr(source, name).view(own.shape), non_blocking)
    return target


_OWN: dict[Any, Callable[..., Any]] = {
    ops.quantize_weights.default: _quantize_weights,
    aten.detach.default: _each,
    aten.alias.default: _each,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.stack.default: _stack,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
}


def _unpacked(packed: Tensor, shape: Sequence[int], lie: Lie) -> Tensor:
    """The matrix (of `shape`) whose packed form (*E, N', K') this is."""
    *_, n, k = (*shape[:-2], shape[-1], shape[-2]) if lie.transposed else shape
    if lie.gate_up == "single":
        matrix = packed[..., :n, :k]
    else:
        gate, up = (half[..., : n // 2, :k] for half in packed.chunk(2, -2))
        matrix = torch.cat([gate, up], -2) if lie.gate_up == "halves" else torch.stack([gate, up], -2).flatten(-3, -2)
    return (matrix.mT if lie.transposed else matrix).contiguous()


def _rebuilt(
    values: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype, lie: tuple[str, bool], gate_first: bool,
    parameter: bool,
) -> BlockScaled:  # fmt: skip
    """What was pickled."""
    made: Any = BlockScaled(values.view(E4M3), scales, shape, dtype, Lie(*lie), gate_first)
    return cast(BlockScaled, torch.nn.Parameter(made, requires_grad=False) if parameter else made)


torch.serialization.add_safe_globals([_rebuilt])
