"""`moecompile.shard_experts`: each rank of a mesh keeps its share of a model's experts.

Stacked parameters of experts (E, ...) become DTensors, sharded along their first dimension. Whoever reads one while the
model runs gets it whole, gathered from all ranks: so the model computes what it did, eagerly or compiled by anyone.
`torch.compile(backend="moecompile")` exchanges tokens instead (passes/expert_parallel.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

GATHERED = "_moecompile_gathered"
"""The attribute of a module that holds its parameters whole, while its forward runs eagerly."""


IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"
"""The attribute of a module in which DistributedDataParallel looks for names."""


def shard_experts(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    parameters: Sequence[str] | None = None,
    gradients: Literal["mean", "sum"] = "mean",
    src_data_rank: int | None = 0,
) -> nn.Module:
    """Spreads the experts of a model over the ranks of a mesh, in place: each rank keeps E / ranks of E.

    What is stacked in one parameter counts as experts: the parameters of a module that has two or more of three
    dimensions, all with the same first size. They become DTensors with the placement `Shard(0)`: checkpoints of
    torch.distributed.checkpoint, FSDP2, optimizers and gradient clipping know what to do with these, and full
    checkpoints are loaded as before. Every rank has to call it, and then the model, as often as the others.

    Args:
        model: on every rank the same, before it is compiled or wrapped; the very module that DDP wraps.
        mesh: of one dimension.
        parameters: names, as in `named_parameters`, to spread instead of those that are found.
        gradients: of the experts are the "mean" over the mesh's ranks, as DDP and FSDP2 make it of the other
            parameters, or the "sum".
        src_data_rank: the rank of the mesh whose values count; None if all have the same, which saves sending them.

    Returns:
        the model.

    Raises:
        TypeError: it is no module, or no mesh.
        ValueError: the mesh has several dimensions, or ranks cannot share the experts evenly; there are no experts, or
            no such parameters. Nothing is changed then.
    """
    if not isinstance(model, nn.Module) or not isinstance(mesh, DeviceMesh):
        raise TypeError(f"moecompile.shard_experts: expected a module and a DeviceMesh, got {model!r} and {mesh!r}")
    if mesh.ndim != 1:
        raise ValueError(f"moecompile.shard_experts: expected a mesh of one dimension, got {mesh}; slice it by name")
    if gradients not in ("mean", "sum"):
        raise ValueError(f"moecompile.shard_experts: gradients: expected 'mean' or 'sum', got {gradients!r}")
    found = [*_experts_of(model)] if parameters is None else [*_named(model, parameters)]
    if not found:
        raise ValueError(
            "moecompile.shard_experts: found no experts: no module has two parameters (E, ., .) of the same E; name "
            "them in `parameters`. Put experts that are modules of their own into one parameter first"
        )
    for module, name in found:
        _check(module, name, mesh)
    made: dict[nn.Parameter, nn.Parameter] = {}  # a parameter may have several names
    for module, name in found:
        parameter = getattr(module, name)
        if parameter not in made:
            local = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=src_data_rank)
            made[parameter] = nn.Parameter(local, requires_grad=parameter.requires_grad)
        module._parameters[name] = made[parameter]
    _hide_from_ddp(model, made.values())
    for module in dict.fromkeys(module for module, _ in found):
        names = tuple(name for owner, name in found if owner is module)
        _read_whole(module, names, mean=gradients == "mean")
    return model


def _experts_of(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        stacked = {name: each for name, each in module._parameters.items() if each is not None and each.dim() == 3}
        sizes = {each.shape[0] for each in stacked.values()}
        if len(stacked) > 1 and len(sizes) == 1:
            yield from ((module, name) for name in stacked)


def _named(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[nn.Module, str]]:
    every = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name not in every:
            raise ValueError(f"moecompile.shard_experts: the model has no parameter {name!r}")
        path, _, own = name.rpartition(".")
        yield model.get_submodule(path), own


def _check(module: nn.Module, name: str, mesh: DeviceMesh) -> None:
    parameter = getattr(module, name)
    if isinstance(parameter, DTensor):
        raise ValueError(f"moecompile.shard_experts: {name} is a DTensor already: {parameter.placements}")
    if parameter.dim() < 1 or parameter.shape[0] % mesh.size():
        raise ValueError(
            f"moecompile.shard_experts: expected a number of experts that {mesh.size()} ranks can share evenly, got "
            f"{name} of shape {tuple(parameter.shape)}"
        )


def _hide_from_ddp(model: nn.Module, parameters: Collection[nn.Parameter]) -> None:
    """Lets DistributedDataParallel around the model neither send these parameters nor sum their gradients."""
    own = {id(each) for each in parameters}
    names = [name for name, each in model.named_parameters(remove_duplicate=False) if id(each) in own]
    names += [f".{name}" for name in names if "." not in name]  # as it calls those of the module itself when it sums
    setattr(model, IGNORED_BY_DDP, [*getattr(model, IGNORED_BY_DDP, ()), *names])


def _read_whole(module: nn.Module, names: tuple[str, ...], mean: bool) -> None:
    """Lets whoever reads these parameters while the module runs have them whole."""
    cls = type(module)
    attributes: dict[str, Any] = {name: _reader(name, mean) for name in names}
    attributes["forward"] = with_tokens(_with_experts(cls.forward, names, mean))
    module.__class__ = type(f"Sharded{cls.__name__}", (cls,), {**attributes, "__module__": cls.__module__})

    def cut(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in names:
            state.update(_cut(state, f"{prefix}{name}", module._parameters[name]))

    module.register_load_state_dict_pre_hook(cut)


def _with_experts(forward: Callable[..., Any], names: tuple[str, ...], mean: bool) -> Callable[..., Any]:
    """The forward, with the sharded parameters at hand.

    Eagerly they are gathered once, before it: it may read them as often as it likes, on every rank another number of
    times. In a compiled graph every reading is a node, and equal ones become one. Where Dynamo breaks the graph inside
    the forward, they are gathered eagerly, too, for which this function may not become a graph of its own: else each
    piece of the forward would gather for itself, and ranks another number of times.
    """
    from torch._dynamo.eval_frame import skip_code

    whole = torch.compiler.disable(_all_whole)

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        gathered = whole(self, names, mean)
        self.__dict__[GATHERED] = gathered
        try:
            result = forward(self, *args, **kwargs)
        finally:
            del self.__dict__[GATHERED]
        return _tied(result, [each for each in gathered.values() if each.requires_grad])

    skip_code(run.__code__)
    return functools.wraps(forward)(run)


class _Tied(torch.autograd.Function):
    """A copy of a tensor, made of others, too: so that their backward runs, with zeros if nobody else has read them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *others: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*grads, *(None,) * (len(ctx.needs_input_grad) - 1))


def _tied(result: Any, gathered: Sequence[Tensor]) -> Any:
    """The result, whose backward is also that of the gathered parameters.

    A rank whose tokens have met no expert would let the others wait for its part of their gradients.
    """
    leaves, form = pytree.tree_flatten(result)
    place = next((n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)
    if not gathered or place is None:
        return result
    leaves[place] = _Tied.apply(leaves[place], *gathered)
    return pytree.tree_unflatten(leaves, form)


def with_tokens(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward, of one token of zeros where there is none: the rank has to do its part for the others' tokens.

    Nobody sees what becomes of it: it is cut off the result again.
    """

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, form = pytree.tree_flatten((args, kwargs))
        if not any(_is_empty(leaf) for leaf in leaves):
            return forward(self, *args, **kwargs)
        given: Any = pytree.tree_unflatten([_filled(leaf) if _is_empty(leaf) else leaf for leaf in leaves], form)
        result = forward(self, *given[0], **given[1])
        shape = next(leaf.shape for leaf in leaves if _is_empty(leaf))
        if not isinstance(result, Tensor) or result.dim() < len(shape):
            raise NotImplementedError(
                f"moecompile.shard_experts: {type(self).__name__} got no tokens ({tuple(shape)}), and what it returns "
                "is no tensor of tokens: give this rank at least one"
            )
        for dim, size in enumerate(shape):
            result = result.narrow(dim, 0, 0) if size == 0 else result
        return result

    return run


def _is_empty(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and 0 in leaf.shape


def _filled(leaf: Tensor) -> Tensor:
    """One zero in each direction that has nothing."""
    return functional.pad(leaf, [end for size in reversed(leaf.shape) for end in (0, int(size == 0))])


def _reader(name: str, mean: bool) -> property:
    """What a module gives for a sharded parameter of its."""

    def read(module: nn.Module) -> Any:
        gathered = module.__dict__.get(GATHERED)
        if gathered is not None:
            return gathered[name]
        return _whole(module, name, mean) if torch.compiler.is_compiling() else module._parameters[name]

    return property(read)


def _cut(state: Mapping[str, Any], name: str, parameter: Any) -> dict[str, DTensor]:
    """This rank's part of a plain tensor of a full checkpoint, which is left as it is; nothing if it does not fit.

    Then torch's own message names what differs; so it does for what FSDP has sharded once more.
    """
    value = state.get(name)
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or not isinstance(parameter, DTensor):
        return {}
    if value.shape != parameter.shape or parameter.device_mesh.ndim != 1:
        return {}
    return {name: distribute_tensor(value.detach(), parameter.device_mesh, [Shard(0)], src_data_rank=None)}


def _all_whole(module: nn.Module, names: Sequence[str], mean: bool) -> dict[str, Tensor]:
    from moecompile.agreement import gather_together

    for group in dict.fromkeys(_group_of(module, name) for name in names):
        gather_together(group, names)
    return {name: _whole(module, name, mean) for name in names}


def _group_of(module: nn.Module, name: str) -> str:
    """The ranks that share a parameter."""
    parameter: Any = module._parameters[name]
    found: str = parameter.device_mesh.get_group().group_name
    return found


def _whole(module: nn.Module, name: str, mean: bool) -> Tensor:
    parameter: Any = module._parameters[name]
    mesh = parameter.device_mesh
    found: Tensor = torch.ops.moecompile.gather_experts.default(
        parameter.to_local(), ranks=mesh.size(), group=mesh.get_group().group_name, mean=mean
    )
    return found
