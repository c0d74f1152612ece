"""Checkpoints that hold matrices in FP8, each with a float32 scale for 128x128, as DeepSeek-V3's do.

    names = moecompile.load_fp8(model, state_dict)              # takes `weight` and `weight_scale_inv` as they are
    state_dict = moecompile.fp8_state_dict(model)               # gives them, of a model in FP8

In the model such parameters are `moecompile.runtime.block_scaled.BlockScaled`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moecompile.conversion import check_module, places_of, put
from moecompile.runtime.block_scaled import BlockScaled
from moecompile.runtime.quantize import BLOCK, E4M3, blocks_in

SCALES = "_scale_inv"
"""What checkpoints call a matrix's scales: its name with this behind (DeepSeek-V3)."""
GATES = "gate_up_proj"
PACKED = {GATES: ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Parameters (E, N, K) of all experts, and what checkpoints of single experts call their parts, in order of N."""

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
SHOWN = 5
"""How many missing or unexpected names a message tells."""


@torch.inference_mode(False)  # parameters made in inference mode could not be trained around
def load_fp8(model: nn.Module, state_dict: Mapping[str, Tensor], *, strict: bool = True) -> tuple[str, ...]:
    """Loads a checkpoint that has matrices in FP8 with a scale for each 128x128, as DeepSeek-V3's do, as they are.

    A matrix `name` is in FP8 if there is `name_scale_inv`, and the model has no such parameter itself. Experts that the
    model keeps in one parameter, `experts.gate_up_proj` (gate first) and `experts.down_proj`, are put together from
    those of single experts, `experts.0.gate_proj.weight` and so on. Everything else is loaded by `load_state_dict`.

    Args:
        model: in any dtype, which stays what parameters stand for; with parameters on the device where they are to be,
            or all on the meta device: then they are where the checkpoint's are.
        state_dict: all of the checkpoint. Of a model on the meta device, what is not in FP8 shares its memory.
        strict: whether names that one has and the other has not are an error.

    Returns:
        the names of the parameters that are in FP8 now. They have no gradient.

    Raises:
        TypeError: `model` is no module; what is no tensor; a matrix of another dtype than float8_e4m3fn, or scales of
            another one than float32.
        ValueError: shapes that do not fit, or numbers in FP8 without scales, before anything is loaded.
        RuntimeError: names that are missing or unexpected, or some of the experts of one parameter, before anything is
            loaded.
    """
    check_module(model, "load_fp8")
    _check_state(state_dict)
    model = getattr(model, "_orig_mod", model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own, left = set(model.state_dict()), _without_ignored(model, state_dict)
    found: dict[str, BlockScaled] = {}
    for name, parameter in parameters.items():
        if name + SCALES in own:
            continue  # the model knows what to do with it
        made = _matrix_of(name, parameter, left)
        if isinstance(made, BlockScaled):
            found[name] = made
        elif made is not None:
            left[name] = made
    _check_scales({name: each for name, each in left.items() if name + SCALES not in own})
    _complete_ties(parameters, found, left)
    _check_names(own - found.keys(), {*left}, strict)
    _check_devices(parameters)
    held = {**dict(model.named_buffers()), **parameters}
    _check_shapes(held, left)
    if assigned := all(each.is_meta for each in parameters.values()):
        left = {name: _in_dtype_of(held.get(name), each) for name, each in left.items()}
    places = places_of(model)
    for name, made in found.items():
        put(places, parameters[name], made)
    model.load_state_dict(left, strict=False, assign=assigned)
    return tuple(name for name in parameters if name in found)


def fp8_state_dict(model: nn.Module, *, single_experts: bool = True) -> dict[str, Any]:
    """The state of a model that has matrices in FP8, as plain tensors, under the names of DeepSeek-V3's checkpoints.

    A matrix in FP8 is `name`, its e4m3 values, and `name_scale_inv`, float32 scales of 128x128 by which they are to be
    multiplied; everything else is as `state_dict` has it. All are tensors that safetensors files hold, and `load_fp8`
    takes them back.

    Args:
        model: after `convert_to_fp8` or `load_fp8`; compiled or not.
        single_experts: whether experts that the model keeps in one parameter get their names in DeepSeek-V3's
            checkpoints, `experts.0.gate_proj.weight` and so on for `experts.gate_up_proj` and `experts.down_proj`, if
            they are known to lie gate first, (E, 2 N, K). Otherwise gate and up in one parameter have common blocks if
            each has a multiple of 128 features and they are not interleaved; else the parameter is in the model's
            dtype, dequantised, which loses nothing where scales are powers of two.

    Returns:
        name to tensor. Each has memory of its own, or shares the model's where that holds nothing else. A matrix in FP8
        that has several names is there under the first.

    Raises:
        TypeError: `model` is no module.
        ValueError: nothing of it is in FP8.
    """
    check_module(model, "fp8_state_dict")
    state = getattr(model, "_orig_mod", model).state_dict()
    if not any(isinstance(each, BlockScaled) for each in state.values()):
        words = "expected a model with matrices in FP8, this one has none"
        raise ValueError(f"moecompile.fp8_state_dict: {words}; call moecompile.convert_to_fp8 first")
    stored: dict[str, Any] = {}
    seen = set[Any]()
    for name, each in state.items():
        if isinstance(each, BlockScaled):
            memory = (each.e4m3.untyped_storage()._cdata, each.e4m3.storage_offset(), each.shape)
            if memory in seen:  # tied: files hold it once, and `load_fp8` gives it to all
                continue
            seen.add(memory)
        for part, matrix in _parts(name, each, state) if single_experts else ((name, each),):
            blocks = matrix.blocks() if isinstance(matrix, BlockScaled) else None
            if blocks is not None:
                stored[part], stored[part + SCALES] = map(_alone, blocks)
            else:
                stored[part] = matrix.dequantized() if isinstance(matrix, BlockScaled) else matrix
    return stored


def _alone(tensor: Tensor) -> Tensor:
    """A tensor with memory of its own: who writes files refuses parts of one memory."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _parts(name: str, each: Any, state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The names and matrices that a parameter is stored as: itself, or those of single experts.

    Only where gate and up projection in one parameter are known to be (E, 2 N, K), gate first, is it known what lies
    beside them: other models have other things under such names.
    """
    path, _, last = name.rpartition(".")
    gates = state.get(_inside(path, GATES))
    known = isinstance(gates, BlockScaled) and gates.gate_and_up() is not None
    names = _of_experts(path, last, len(each)) if last in PACKED and isinstance(each, BlockScaled) else []
    if not known or not names or each.dim() != 3 or each.lie.transposed or {*chain(*names)} & state.keys():
        yield name, each
        return
    matrices = each.gate_and_up() or (each,)
    for expert, row in enumerate(names):
        for part, of_part in zip(row, matrices, strict=True):
            yield part, of_part[expert]


def _of_experts(path: str, last: str, count: int) -> list[list[str]]:
    """For each expert the names that its parts of a packed parameter have in checkpoints."""
    return [[_inside(path, f"{expert}.{part}.weight") for part in PACKED[last]] for expert in range(count)]


def _inside(path: str, name: str) -> str:
    """The name of what is in a module."""
    return f"{path}.{name}" if path else name


def _matrix_of(name: str, parameter: nn.Parameter, left: dict[str, Tensor]) -> BlockScaled | Tensor | None:
    """The checkpoint's matrix for a parameter, taken out of what is left of it; None: it is loaded as usual."""
    if name + SCALES in left and name in left:
        _check_shapes({name: parameter}, left)
        return _from_blocks(name, left.pop(name), left.pop(name + SCALES), parameter)
    path, _, last = name.rpartition(".")
    if name in left or last not in PACKED or parameter.dim() != 3:
        return None
    names = _of_experts(path, last, parameter.shape[0])
    missing = [each for row in names for each in row if each not in left]
    if len(missing) == sum(map(len, names)):
        return None
    if missing:
        some = ", ".join(missing[:SHOWN]) + " and others" * (len(missing) > SHOWN)
        words = f"missing {some}: {name} is put together from all of its experts"
        raise RuntimeError(f"moecompile.load_fp8: {words}; read all files of the checkpoint into one dict")
    return _packed(name, names, parameter, left)


def _packed(
    name: str, names: list[list[str]], parameter: nn.Parameter, left: dict[str, Tensor]
) -> BlockScaled | Tensor:
    """Matrices (N / parts, K) of single experts as one (E, N, K), all of them in FP8 or none."""
    every = [each for row in names for each in row]
    scaled = {each + SCALES in left for each in every}
    *_, n, k = parameter.shape
    expected = (n // len(names[0]), k)
    if n % len(names[0]):
        raise _error(f"{name} has {n} features, which are not those of {' and '.join(PACKED[name.rpartition('.')[2]])}")
    for each in every:
        if tuple(left[each].shape) != expected:
            raise _error(f"{each} must have shape {expected}, for {name}; got {tuple(left[each].shape)}")
    if scaled == {False}:
        return torch.stack([torch.cat([left.pop(each) for each in row]) for row in names])
    if scaled != {True}:
        lacking = next(each for each in every if each + SCALES not in left)
        raise _error(f"{lacking} has no {lacking}{SCALES} beside it, and others of {name} have: all or none must")
    blocks = (blocks_in(expected[0], BLOCK), blocks_in(k, BLOCK))
    for each in every:
        if tuple(left[each + SCALES].shape) != blocks:
            came = tuple(left[each + SCALES].shape)
            raise _error(f"{each}{SCALES} must have shape {blocks}, one for each 128x128 of {expected}; got {came}")
    scales = torch.stack([torch.cat([left.pop(each + SCALES) for each in row]) for row in names])
    values = torch.stack([torch.cat([_bytes(each, left.pop(each)) for each in row]) for row in names])
    return _from_blocks(name, values.view(E4M3), scales, parameter, "halves" if len(names[0]) > 1 else "single")


def _bytes(name: str, values: Tensor) -> Tensor:
    """FP8 as what PyTorch can concatenate on every device."""
    if values.dtype != E4M3:
        raise TypeError(f"moecompile.load_fp8: {name} has scales beside it and must be {E4M3}, got {values.dtype}")
    return values.view(torch.uint8)


def _from_blocks(
    name: str,
    values: Tensor,
    scales: Tensor,
    parameter: nn.Parameter,
    gate_up: Literal["single", "halves"] = "single",
) -> BlockScaled:
    device = values.device if parameter.is_meta else parameter.device
    try:
        own = scales.to(device, copy=True)  # what is written into later is not the checkpoint's
        made = BlockScaled.from_blocks(values.to(device), own, parameter.dtype, gate_up=gate_up)
    except (TypeError, ValueError) as error:
        raise type(error)(f"moecompile.load_fp8: {name}: {error}") from None
    if not ((own >= 0) & own.isfinite()).all():
        raise _error(f"{name}{SCALES} must hold finite numbers from 0 on; it has NaN, infinity or numbers below")
    return made


def _without_ignored(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what the model does not want, as transformers' models say it (layers that predict further tokens)."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {name: each for name, each in state_dict.items() if not any(re.search(one, name) for one in patterns)}


def _check_state(state_dict: object) -> None:
    """Raises TypeError unless it is a mapping of names to tensors."""
    if not isinstance(state_dict, Mapping):
        words = f"expected a mapping of names to tensors, got {type(state_dict).__name__}"
        raise TypeError(f"moecompile.load_fp8: {words}; read the checkpoint's files into one dict first")
    for name, each in state_dict.items():
        if not isinstance(each, Tensor) and not name.endswith("_extra_state"):
            raise TypeError(f"moecompile.load_fp8: {name} must be a tensor, got {type(each).__name__}")


def _check_scales(left: Mapping[str, Tensor]) -> None:
    """Raises ValueError for numbers in FP8 that nothing scales: as they are they mean nothing."""
    for name, each in left.items():
        alone = name + SCALES not in left  # with scales, but of no parameter: an unexpected name
        if alone and isinstance(each, Tensor) and not isinstance(each, BlockScaled) and each.dtype in FP8_DTYPES:
            raise _error(f"{name} is {each.dtype}, and the checkpoint has no {name}{SCALES} beside it")


def _check_devices(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError where some parameters are on the meta device and some are not."""
    meta = [name for name, each in parameters.items() if each.is_meta]
    if meta and len(meta) < len(parameters):
        raise _error(f"all parameters must be on the meta device or none; of {len(parameters)} {meta[0]} is, for one")


def _complete_ties(
    parameters: Mapping[str, nn.Parameter], found: dict[str, BlockScaled], left: dict[str, Tensor]
) -> None:
    """Of parameters that have several names, checkpoints may hold one."""
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        for given in (found, left):
            there: Any = next((given[name] for name in tied if name in given), None)
            if there is not None:
                given.update({name: there for name in tied if name not in found and name not in left})


def _check_names(missing: set[str], unexpected: set[str], strict: bool) -> None:
    """Raises RuntimeError, as `load_state_dict` does, for names that only one of the two has."""
    words = [
        f"{kind} {', '.join(sorted(names)[:SHOWN])}{' and others' * (len(names) > SHOWN)}"
        for kind, names in (("missing", missing - unexpected), ("unexpected", unexpected - missing))
        if names
    ]
    if words and strict:
        raise RuntimeError(f"moecompile.load_fp8: {'; '.join(words)}. Pass strict=False to load what there is")


def _in_dtype_of(own: Tensor | None, given: Any) -> Any:
    """What is assigned, and not copied, in the dtype that the model has."""
    floats = isinstance(own, Tensor) and isinstance(given, Tensor) and given.is_floating_point()
    return given.to(own.dtype) if floats and own is not None and own.is_floating_point() else given


def _check_shapes(own: Mapping[str, Tensor], left: Mapping[str, Tensor]) -> None:
    for name, tensor in own.items():
        if name in left and left[name].shape != tensor.shape:
            raise _error(f"{name} must have shape {tuple(tensor.shape)}, got {tuple(left[name].shape)}")


def _error(message: str) -> ValueError:
    return ValueError(f"moecompile.load_fp8: {message}")
