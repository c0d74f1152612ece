"""Expert parallelism of transformers by our exchange: `DistributedConfig(ep_implementation="moecompile")`.

transformers leaves open how tokens meet experts that are spread over ranks (`EPImplementationInterface`). Of its own
ways, "all_to_all" reads sizes on the host, which breaks the graph; with "all_reduce" every rank computes every token.
Ours runs the experts as the model has them, on gathered parameters: so a graph holds the whole block, and
`torch.compile(backend="moecompile")` exchanges tokens instead of gathering (passes/expert_parallel.py).

transformers is imported when it is asked for, never before.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moecompile.loads import SPLIT
from moecompile.sharding import with_tokens

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NAME = "moecompile"


def register_transformers() -> None:
    """Makes "moecompile" one of the expert-parallel implementations of transformers.

    From then on models are loaded with it, all ranks alike::

        config = DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="moecompile")
        model = AutoModelForCausalLM.from_pretrained(name, distributed_config=config)

    Gradients of experts are the sum over all tokens of all ranks, as transformers' "all_to_all" has them. Call it as
    often as you like.

    Raises:
        ImportError: transformers is not installed, or has no such interface.
    """
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError as error:
        raise ImportError(
            "moecompile.register_transformers: expected a transformers with EPImplementationInterface (5.23 has it); "
            "moecompile.shard_experts(model, mesh) spreads the experts of any model"
        ) from error
    EPImplementationInterface.register(NAME, _implementation())


@functools.cache
def _implementation() -> type[Any]:
    """The class that transformers makes one object of for each module of experts."""
    from transformers.distributed.expert_parallel import EPImplementation

    class MoecompileEP(EPImplementation):
        """Experts on this rank's tokens: of a batch that several ranks hold, on an equal part of it."""

        def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            self._num_experts = self.num_local_experts * ep_mesh.size()
            self._whole = _Whole(experts, ep_mesh)
            shared = tp_mesh.size() > 1
            setattr(experts, SPLIT, shared)
            self._split = _Split(tp_mesh.size(), tp_mesh.get_local_rank(), group_of(tp_mesh)) if shared else None

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            split, last = self._split, self._num_experts - 1
            # The clamps change nothing. They prove the range of ids where nothing else does: where experts are a graph
            # of their own, as under FSDP2, or a part of symbolic size.
            if split is None:
                return self._whole(hidden_states, top_k_index.clamp(0, last), top_k_weights)
            ids = split.part(top_k_index).clamp(0, last)
            x, weights = (_Own.apply(each, split) for each in (hidden_states, top_k_weights))
            found: Tensor = _Together.apply(self._whole(x, ids, weights), hidden_states.shape[0], split)
            return found

    return MoecompileEP


def group_of(mesh: DeviceMesh) -> str:
    """The name of a mesh's process group, as operators of graphs are given it."""
    found: str = mesh.get_group().group_name
    return found


class _Whole:
    """The forward of experts with all ranks' parameters in the place of this rank's.

    They are gathered once a call, before anything is read: ranks whose tokens meet other experts gather as often.
    """

    def __init__(self, experts: nn.Module, mesh: DeviceMesh) -> None:
        self._experts, self._forward = experts, experts.forward
        self._names = [name for name, each in experts.named_parameters(recurse=False) if isinstance(each, DTensor)]
        self._among = {"ranks": mesh.size(), "group": group_of(mesh), "mean": False}
        # what transformers has told the experts of a rank that holds a part of them
        numbered: Any = experts
        numbered.num_experts *= mesh.size()
        numbered._is_expert_parallel = False

    @with_tokens
    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        parameters: dict[str, Any] = self._experts._parameters
        local = {name: parameters[name] for name in self._names}
        for name, each in local.items():
            parameters[name] = torch.ops.moecompile.gather_experts.default(each, **self._among)
        try:
            result: Tensor = self._forward(hidden_states, top_k_index, top_k_weights)
        finally:
            parameters.update(local)
        return result


@dataclass(frozen=True)
class _Split:
    """How a batch that all ranks of a group hold is shared out among them: to each a part, all of one size.

    The last parts overlap where the tokens are no multiple of the ranks. Nothing is added to the batch: what detection
    knows of all expert ids, it knows of some of them.
    """

    ranks: int
    rank: int
    group: str

    def part(self, rows: Tensor) -> Tensor:
        """This rank's."""
        count, start = self._count(rows.shape[0]), self._start(rows.shape[0])
        return rows[start : start + count]

    def all_parts(self, part: Tensor, tokens: int) -> Tensor:
        """All ranks' parts, every token once."""
        started = torch.ops._c10d_functional.all_gather_into_tensor(part.contiguous(), self.ranks, self.group)
        parts = torch.ops._c10d_functional.wait_tensor(started)
        owner = self.owner(tokens, part.device)
        count = self._count(tokens)
        first = (owner * count).clamp(max=tokens - count)
        found: Tensor = parts.index_select(0, owner * count + torch.arange(tokens, device=part.device) - first)
        return found

    def owner(self, tokens: int, device: torch.device) -> Tensor:
        """The rank whose result of each token counts."""
        return torch.arange(tokens, device=device) // self._count(tokens)

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.ranks)

    def _start(self, tokens: int) -> int:
        return min(self.rank * self._count(tokens), tokens - self._count(tokens))


class _Own(torch.autograd.Function):
    """The derivative of a rank's part has all parts: what all ranks hold alike has the same gradient on all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, split: _Split) -> Tensor:
        ctx.tokens, ctx.split = rows.shape[0], split
        return split.part(rows).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.split.all_parts(grads[0], ctx.tokens), None


class _Together(torch.autograd.Function):
    """The reverse. What several ranks have computed counts on one of them alone, forward and backward."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, tokens: int, split: _Split) -> Tensor:
        ctx.split, ctx.tokens = split, tokens
        return split.all_parts(part, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        split, (grad,) = ctx.split, grads
        own = split.part(split.owner(ctx.tokens, grad.device)) == split.rank
        return split.part(grad) * own.unsqueeze(1), None, None
