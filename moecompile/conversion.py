"""Models whose matrices are in FP8 and nowhere else, for inference, converted in place.

    names = moecompile.convert_to_fp8(model, inputs)            # frees the originals

Such parameters become `moecompile.runtime.block_scaled.BlockScaled`. Compiled with the option precision="fp8" the model
multiplies what these hold; whoever else reads one gets the matrix dequantised.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from moecompile import pipeline
from moecompile.capture import capture
from moecompile.options import Options
from moecompile.report import GraphReport
from moecompile.runtime.block_scaled import BlockScaled, Lie

Uses = dict[int, set[Lie | None]]
"""How parameters, by their identity, are given to casts; None: somebody else reads it."""
Places = dict[int, list[tuple[nn.Module, str]]]
"""Of parameters, by their identity, the modules that have them, and under which names."""


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
    with its matrices cast in every forward. What a checkpoint had in FP8 (`load_fp8`) stays so, and lies afterwards as
    products read it, which checkpoints do not tell of experts (E, K, N).

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
    check_module(model, "convert_to_fp8")
    model = getattr(model, "_orig_mod", model)
    if model.training:
        words = "expected a model for inference, this one is in training mode"
        raise ValueError(f"moecompile.convert_to_fp8: {words}; call model.eval() first")
    options = _options(moecompile_options)
    with torch.inference_mode(False), torch.no_grad():  # parameters made in inference mode could not be trained around
        uses, whole = _captured_uses(model, args, kwargs, options)
        unseen = set() if whole else _read_elsewhere(model)
        places, converted = places_of(model), list[str]()
        for name in [name for name, _ in model.named_parameters()]:
            parameter = model.get_parameter(name)  # one by one: nothing holds those that are done
            (lie, *others) = uses.get(id(parameter)) or {None}
            if lie is None or others:
                continue
            held: Any = parameter
            if isinstance(held, BlockScaled):
                if held.lie != lie and (laid := held.laid(lie)) is not None:
                    put(places, parameter, laid)
            elif type(parameter) is nn.Parameter and id(parameter) not in unseen:
                how = {**lie._asdict(), "scale_format": options.fp8_scale_format}
                put(places, parameter, BlockScaled.of(parameter, **how))
                converted.append(name)
    return tuple(converted)


def check_module(model: object, function: str) -> None:
    """Raises TypeError, in that function's name, unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"moecompile.{function}: expected a module, got {model!r}")


def places_of(model: nn.Module) -> Places:
    """Where the model has its parameters."""
    places: Places = {}
    for module in model.modules():
        for name, each in module._parameters.items():
            places.setdefault(id(each), []).append((module, name))
    return places


def put(places: Places, parameter: nn.Parameter, made: BlockScaled) -> None:
    """Puts it in the parameter's place, wherever the model has it."""
    new = nn.Parameter(made, requires_grad=False)
    for module, name in places[id(parameter)]:
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
