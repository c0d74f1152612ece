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
from moecompile.codegen.expression import Apply, Expression, leaves, parse
from moecompile.options import Options
from moecompile.passes.casts import MatrixCast
from moecompile.report import GraphReport
from moecompile.runtime.block_scaled import BlockScaled, Lie

Use = tuple[Lie, bool]
"""How a matrix lies for a cast, and whether it is known to have the gate first."""
ALONE: Use = (Lie(), True)
Uses = dict[int, set[Use | None]]
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
    they are parameters that nothing else reads, and no tensor subclasses (DTensors, FSDP's). That is looked up in one
    graph of the whole model, if it can be captured so: compile it with `fullgraph=True`, or experts behind a graph
    break may be read dequantised. The model runs once or twice, uncompiled. Originals are freed, unless somebody else
    refers to them. Results are those of the same model with its matrices cast in every forward. What a checkpoint had
    in FP8 (`load_fp8`) stays so, and lies afterwards as products read it, which checkpoints do not tell of experts
    (E, K, N).

    Args:
        model: in eval mode; compiled or not. Converted parameters have no gradient, and `state_dict` holds them in FP8.
        *args: what it is called with.
        moecompile_options: as in `torch.compile(options=...)`; `fp8_exclude` and its like are heeded.
        **kwargs: what else it is called with.

    Returns:
        the names of the converted parameters; of one that has several, the first.

    Raises:
        TypeError: `model` is no module.
        ValueError: it is in training mode, or on the meta device; unknown options, or options that convert nothing.
    """
    check_module(model, "convert_to_fp8")
    model = getattr(model, "_orig_mod", model)
    if model.training:
        words = "expected a model for inference, this one is in training mode"
        raise ValueError(f"moecompile.convert_to_fp8: {words}; call model.eval() first")
    options = _options(moecompile_options)
    _check_call(model, kwargs)
    with torch.inference_mode(False), torch.no_grad():  # parameters made in inference mode could not be trained around
        uses, whole = _captured_uses(model, args, kwargs, options)
        unseen = set() if whole else _read_elsewhere(model)
        places, converted = places_of(model), list[str]()
        for name in [name for name, _ in model.named_parameters()]:
            parameter = model.get_parameter(name)  # one by one: nothing holds those that are done
            (use, *others) = uses.get(id(parameter)) or {None}
            if use is None or others:
                continue
            lie, gate_first = use
            held: Any = parameter
            if isinstance(held, BlockScaled):
                if held.lie != lie and (laid := held.laid(lie)) is not None:
                    put(places, parameter, laid)
            elif type(parameter) is nn.Parameter and id(parameter) not in unseen:
                how = {**lie._asdict(), "scale_format": options.fp8_scale_format, "gate_first": gate_first}
                put(places, parameter, BlockScaled.of(parameter, **how))
                converted.append(name)
    return tuple(converted)


def check_module(model: object, function: str) -> None:
    """Raises TypeError, in that function's name, unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"moecompile.{function}: expected a module, got {type(model).__name__}")


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


def _check_call(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for a call that cannot be what was meant."""
    if isinstance(kwargs.get("options"), Mapping) and "precision" in kwargs["options"]:
        words = "`options` is given to the model"
        raise ValueError(f"moecompile.convert_to_fp8: {words}; options of moecompile's are `moecompile_options`")
    if any(each.is_meta for each in model.parameters()):
        words = "expected parameters that hold numbers, these are on the meta device"
        raise ValueError(f"moecompile.convert_to_fp8: {words}; load the model first (moecompile.load_fp8 does, too)")


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


def _uses_of(node: fx.Node) -> set[Use | None]:
    """How a matrix is given to casts, itself or as one of a stack; and None if somebody else reads it."""
    found = set[Use | None]()
    for user in node.users:
        if user.target is torch.ops.moecompile.quantize_weights.default:
            how = MatrixCast.of(user)
            lie = Lie("single" if how.gate_up == "separate" else how.gate_up, how.transposed)
            found.add((lie, how.gate_up != "halves" or _is_gate_first(user)))
        elif user.target is torch.stack and len(user.args) == 1 and not user.kwargs:
            found.add(ALONE if _uses_of(user) == {ALONE} else None)
        elif user.target not in _MULTIPLY_COPIES or node is user.args[0]:
            found.add(None)
    return found


def _is_gate_first(cast: fx.Node) -> bool:
    """Whether all that multiplies these matrices applies its nonlinearities to the first half, and to nothing else."""
    readers = {reader for copy in cast.users for reader in copy.users}
    activations = {str(reader.kwargs["activation"]) for reader in readers}
    return bool(activations) and all(_bent(parse(each)) == {"gate"} for each in activations)


def _bent(expression: Expression) -> set[str]:
    """What of an activation goes through something that is no sum, product or bound."""
    if not isinstance(expression, Apply):
        return set()
    if expression.op not in _STRAIGHT:
        return set(leaves(expression))
    return set().union(*map(_bent, expression.args))


_STRAIGHT = frozenset(("add", "sub", "mul", "div", "neg", "clamp", "cast", "minimum", "maximum"))
_MULTIPLY_COPIES = (torch.ops.moecompile.linear_fp8.default, torch.ops.moecompile.experts_fp8.default)
"""Of a matrix itself, which they get behind their rows, these ask for nothing but its shape."""
