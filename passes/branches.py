"""Experts side by side in a spelling that no form covers, which are near misses: a reader sees a mixture there.

They show as alike operations on one tensor, as many as there are experts to choose from.

    for e in range(E):  out = out + gates[:, e, None] * experts[e](x)      each expert a module, on every token
    for e in range(E):  out[mask_e] += experts[e](x[mask_e])               rows chosen by a mask, not by number
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from moecompile.passes.aliases import fake_of
from moecompile.passes.interpret import Interpretation


@dataclass(frozen=True)
class Branches:
    """What E experts did alike: the form that it is nearest to, the operations, and what to say of them."""

    form: str
    nodes: tuple[fx.Node, ...]
    reason: str
    cure: str


@dataclass(frozen=True)
class _Kind:
    form: str
    key: Callable[[fx.Node, fx.Node, Interpretation], fx.Node | None]  # what tells branches apart: a weight, a mask
    per_expert: tuple[int, ...]  # how many such operations an expert may have
    reason: str
    cure: str


# fewer alike operations are gate and up projection, or query, key and value, beside a choice of as many groups
_LEAST = 4


def branches(state: Interpretation, covered: Collection[fx.Node]) -> Iterator[Branches]:
    """Each group of branches that holds none of the nodes in `covered`, in program order."""
    counts = set(state.id_ranges.values()) - {1}
    if not counts:
        return
    for node in state.graph.nodes:
        if len(node.users) < min(counts):
            continue
        for kind in _KINDS:
            for users in _alike(node, kind, state):
                as_many = any(len(users) == count * each for count in counts for each in kind.per_expert)
                if as_many and len(users) >= _LEAST and not any(user in covered for user in users):
                    yield Branches(kind.form, users, kind.reason, kind.cure)


def _alike(node: fx.Node, kind: _Kind, state: Interpretation) -> Iterator[tuple[fx.Node, ...]]:
    """The users of a node that a kind of branches may be made of, by the shape of what tells them apart."""
    found: dict[object, dict[fx.Node, fx.Node]] = {}
    for user in node.users:
        key = kind.key(user, node, state)
        if key is not None:
            found.setdefault(fake_of(key).shape, {}).setdefault(key, user)
    return (tuple(users.values()) for users in found.values())


def _weight(user: fx.Node, node: fx.Node, state: Interpretation) -> fx.Node | None:
    """The parameter by which a node is multiplied."""
    call = state.calls.get(user)
    if call is None or call.name not in ("linear", "mm", "matmul"):
        return None
    other = call.arguments.get("weight", call.arguments.get("mat2", call.arguments.get("other")))
    known = isinstance(other, fx.Node) and other is not node and isinstance(fake_of(other), torch.Tensor)
    return other if known else None


def _mask(user: fx.Node, node: fx.Node, state: Interpretation) -> fx.Node | None:
    """The mask by which rows of a node are chosen."""
    call = state.calls.get(user)
    if call is None or call.name != "getitem" or call["input"] is not node:
        return None
    index = call["index"]
    fake = fake_of(index) if isinstance(index, fx.Node) else None
    return index if isinstance(fake, torch.Tensor) and fake.dtype == torch.bool else None


_KINDS = (
    _Kind(
        "dense",
        _weight,
        (1, 2),  # a gate and an up projection
        "each expert has weights of its own and runs on every token: experts that all run are known with their weights "
        "stacked in one tensor",
        "stack them, torch.stack([e.weight for e in experts]), and multiply by w[e] or in one bmm or einsum; or let "
        "each expert run on the tokens that chose it, token, k = torch.where(ids == e), which takes modules",
    ),
    _Kind(
        "expert_loop",
        _mask,
        (1,),
        "each expert's rows are chosen by a mask: a loop over experts is known with rows chosen by their number",
        "choose them by number: token, k = torch.where(ids == e), then x[token] and "
        "out.index_add_(0, token, y * weights[token, k, None])",
    ),
)
