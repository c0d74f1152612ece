"""Models whose matrices are in FP8 and nowhere else, for inference: converted in place, or loaded from FP8 checkpoints.

    names = moecompile.convert_to_fp8(model, inputs)            # frees the originals
    names = moecompile.load_fp8(model, state_dict)              # takes `weight` and `weight_scale_inv` as they are

Such parameters become `moecompile.runtime.block_scaled.BlockScaled`. Compiled with the option precision="fp8" the model
multiplies what these hold; whoever else reads one gets the matrix dequantised.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from moecompile import pipeline
from moecompile.capture import capture
from moecompile.options import Options
from moecompile.report import GraphReport
from moecompile.runtime.block_scaled import BlockScaled, Lie
from moecompile.runtime.quantize import BLOCK, E4M3, blocks_in

SCALES = "_scale_inv"
"""What checkpoints call a matrix's scales: its name with this behind (DeepSeek-V3)."""
PACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Parameters (E, N, K) of all experts, and what checkpoints of single experts call their parts, in order of N."""

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
SHOWN = 5
"""How many missing or unexpected names a message tells."""

Uses = dict[int, set[Lie | None]]
"""How parameters, by their identity, are given to casts; None: somebody else reads it."""


def convert_to_fp8(
    model: nn.Module,
    /,
    *args: Any,
    moecompile_options: Mapping[str, Any] | Options | None = None,
    **kwargs: Any,
) -> tuple[str, ...]:
    """Quantises, once and in place, the matrices that the model multiplies in FP8 when it is called like this.

    These are the ones that `moecompile.explain(model, ..., moecompile_options={"precision": "fp8"})` lists as cast, if
    they are parameters that nothing else reads, and no tensor subclasses (DTensors, FSDP's). The model runs once or
    twice, uncompiled. Originals are freed, unless somebody else refers to them. Results are those of the same model
    with its matrices cast in every forward.

    Args:
        model: in eval mode; compiled or not. Converted parameters have no gradient, and `state_dict` holds them in FP8.
        *args: what it is called with.
        moecompile_options: as in `torch.compile(options=...)`; `fp8_exclude` and its like are heeded.
        **kwargs: what else it is called with.

    Returns:
        the names of the converted parameters; of one that has several, the first.

    Raises:
        TypeError: `model` is no module.
        ValueError: it is in training mode; unknown options, or options that convert nothing.
    """
    _check_module(model, "convert_to_fp8")
    model = getattr(model, "_orig_mod", model)
    if model.training:
        words = "expected a model for inference, this one is in training mode"
        raise ValueError(f"moecompile.convert_to_fp8: {words}; call model.eval() first")
    options = _options(moecompile_options)
    with torch.inference_mode(False), torch.no_grad():  # parameters made in inference mode could not be trained around
        uses, whole = _captured_uses(model, args, kwargs, options)
        unseen = set() if whole else _read_elsewhere(model)
        converted: list[str] = []
        for name, parameter in list(model.named_parameters()):
            (lie, *others) = uses.get(id(parameter)) or {None}
            if lie is not None and not others and type(parameter) is nn.Parameter and id(parameter) not in unseen:
                _put(
                    model, parameter, BlockScaled.of(parameter, **lie._asdict(), scale_format=options.fp8_scale_format)
                )
                converted.append(name)
    return tuple(converted)


@torch.inference_mode(False)  # parameters made in inference mode could not be trained around
def load_fp8(model: nn.Module, state_dict: Mapping[str, Tensor], *, strict: bool = True) -> tuple[str, ...]:
    """Loads a checkpoint that has matrices in FP8 with a scale for each 128x128, as DeepSeek-V3's do, as they are.

    A matrix `name` is in FP8 if there is `name_scale_inv`, and the model has no such parameter itself. Experts that the
    model keeps in one parameter, `experts.gate_up_proj` and `experts.down_proj`, are put together from those of single
    experts, `experts.0.gate_proj.weight` and so on. Everything else is loaded by `load_state_dict`.

    Args:
        model: in any dtype, which stays what parameters stand for; with parameters on the device where they are to be,
            or all on the meta device: then they are where the checkpoint's are.
        state_dict: all of the checkpoint.
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
    _check_module(model, "load_fp8")
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
    for name, made in found.items():
        _put(model, parameters[name], made)
    model.load_state_dict(left, strict=False, assign=assigned)
    return tuple(name for name in parameters if name in found)


def _check_module(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"moecompile.{function}: expected a module, got {model!r}")


def _put(model: nn.Module, parameter: nn.Parameter, made: BlockScaled) -> None:
    """Puts it in the parameter's place, wherever the model has it."""
    new = nn.Parameter(made, requires_grad=False)
    for module in model.modules():
        for name, each in module._parameters.items():
            if each is parameter:
                module._parameters[name] = new


# ---- what is cast


def _options(given: Mapping[str, Any] | Options | None) -> Options:
    """What `convert_to_fp8` was given, for FP8; raises ValueError for what would leave nothing to convert."""
    values = given.as_dict() if isinstance(given, Options) else dict(given or {})
    if values.get("precision", "fp8") != "fp8" and not isinstance(given, Options):
        words = f"precision={values['precision']!r} converts nothing; leave it out"
        raise ValueError(f"moecompile.convert_to_fp8: {words}")
    return Options.parse(None, {**values, "precision": "fp8"})


def _read_elsewhere(model: nn.Module) -> set[int]:
    """Parameters that code between graphs, which nobody sees, may read: of embeddings, and what has several names."""
    names = Counter(id(each) for _, each in model.named_parameters(remove_duplicate=False))
    tables = (nn.Embedding, nn.EmbeddingBag)
    looked_up = {id(each.weight) for each in model.modules() if isinstance(each, tables)}
    return looked_up | {each for each, count in names.items() if count > 1}


def _captured_uses(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> tuple[Uses, bool]:
    """How the model reads its parameters, and whether that is all.

    As one graph if it can be, since loops over experts are found in no other.
    """
    for fullgraph in (True, False):
        uses: Uses = {}
        try:
            capture(model, args, kwargs, functools.partial(_note_uses, options, uses), fullgraph=fullgraph)
        except Exception:
            if not fullgraph:
                raise
        else:
            break
    return uses, fullgraph


def _note_uses(options: Options, uses: Uses, gm: fx.GraphModule) -> None:
    """Adds how one captured graph reads its parameters."""
    inputs = {
        node: parameter
        for node in gm.graph.find_nodes(op="placeholder")
        if isinstance(parameter := getattr(node.meta.get("grapharg"), "example", None), nn.Parameter)
    }
    pipeline.run_passes(gm, options, GraphReport.of(gm))
    for node, parameter in inputs.items():
        uses.setdefault(id(parameter), set()).update(_uses_of(node))


def _uses_of(node: fx.Node) -> set[Lie | None]:
    """How a matrix is given to casts, itself or as one of a stack; and None if somebody else reads it."""
    found = set[Lie | None]()
    for user in node.users:
        if user.target is torch.ops.moecompile.quantize_weights.default:
            gate_up, transposed = user.kwargs.get("gate_up", "single"), user.kwargs.get("transposed", False)
            found.add(Lie("single" if gate_up == "separate" else str(gate_up), bool(transposed)))
        elif user.target is torch.stack and len(user.args) == 1 and not user.kwargs:
            found.add(Lie() if _uses_of(user) == {Lie()} else None)
        elif user.target not in _MULTIPLY_COPIES or node is user.args[0]:
            found.add(None)
    return found


_MULTIPLY_COPIES = (torch.ops.moecompile.linear_fp8.default, torch.ops.moecompile.experts_fp8.default)
"""Of a matrix itself, which they get behind their rows, these ask for nothing but its shape."""


# ---- what is loaded


def _matrix_of(name: str, parameter: nn.Parameter, left: dict[str, Tensor]) -> BlockScaled | Tensor | None:
    """The checkpoint's matrix for a parameter, taken out of what is left of it; None: it is loaded as usual."""
    if name + SCALES in left and name in left:
        made = _from_blocks(name, left.pop(name), left.pop(name + SCALES), parameter)
        if made.shape != parameter.shape:
            raise _error(f"{name} must have shape {tuple(parameter.shape)}, got {tuple(made.shape)}")
        return made
    path, _, last = name.rpartition(".")
    if name in left or last not in PACKED or parameter.dim() != 3:
        return None
    names = [[f"{path}.{expert}.{part}.weight" for part in PACKED[last]] for expert in range(parameter.shape[0])]
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
    for each in every:
        if tuple(left[each].shape) != expected:
            raise _error(f"{each} must have shape {expected}, for {name}; got {tuple(left[each].shape)}")
    if scaled == {False}:
        return torch.stack([torch.cat([left.pop(each) for each in row]) for row in names])
    if scaled != {True}:
        raise _error(f"experts of {name} are in FP8 in part: all or none must have their scales beside them")
    if len(names[0]) > 1 and expected[0] % BLOCK:
        words = f"{len(names[0])} matrices of {expected[0]} features have no common blocks of {BLOCK}"
        raise _error(f"{name} cannot be put together as it is: {words}; load a dequantised checkpoint and convert it")
    blocks = (blocks_in(expected[0], BLOCK), blocks_in(k, BLOCK))
    for each in every:
        if tuple(left[each + SCALES].shape) != blocks:
            came = tuple(left[each + SCALES].shape)
            raise _error(f"{each}{SCALES} must have shape {blocks}, one for each 128x128 of {expected}; got {came}")
    scales = torch.stack([torch.cat([left.pop(each + SCALES) for each in row]) for row in names])
    values = torch.stack([torch.cat([_bytes(each, left.pop(each)) for each in row]) for row in names])
    return _from_blocks(name, values.view(E4M3), scales, parameter)


def _bytes(name: str, values: Tensor) -> Tensor:
    """FP8 as what PyTorch can concatenate on every device."""
    if values.dtype != E4M3:
        raise TypeError(f"moecompile.load_fp8: {name} has scales beside it and must be {E4M3}, got {values.dtype}")
    return values.view(torch.uint8)


def _from_blocks(name: str, values: Tensor, scales: Tensor, parameter: nn.Parameter) -> BlockScaled:
    device = values.device if parameter.is_meta else parameter.device
    try:
        own = scales.to(device, copy=True)  # what is written into later is not the checkpoint's
        return BlockScaled.from_blocks(values.to(device), own, parameter.dtype)
    except (TypeError, ValueError) as error:
        raise type(error)(f"moecompile.load_fp8: {name}: {error}") from None


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
        if isinstance(each, Tensor) and not isinstance(each, BlockScaled) and each.dtype in FP8_DTYPES:
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
