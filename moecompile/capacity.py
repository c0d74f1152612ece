"""How many tokens a rank may bring to an exchange: the option `ep_capacity`, or what the ranks of a group agree on.

Sizes are fixed when a graph is compiled, and have to be the same on all ranks, whatever number of tokens each of them
has. So the ranks of a group agree once, when the first of their graphs with an exchange is compiled.
"""

from __future__ import annotations

from typing import Any

from torch import distributed

from moecompile import ranks
from moecompile.passes.expert_parallel import Group

_agreed: dict[str, int] = {}


def capacity_of(group: Group, tokens: Any, asked: int | None) -> int:
    """Tokens of a rank at most, the same on all ranks of the group.

    Args:
        group: of ranks that share experts.
        tokens: of this rank, in the graph that is being compiled: a number, or a symbol.
        asked: the option `ep_capacity`.

    Raises:
        ValueError: there are more tokens than that, or nobody knows how many there will be.
        RuntimeError: not all ranks of the group compile.
    """
    known = isinstance(tokens, int)
    if asked is not None:
        if known and tokens > asked:
            raise ValueError(
                f"moecompile: option `ep_capacity`: expected {tokens} or more, for so many tokens has this rank; got "
                f"{asked}. Give all ranks the same number."
            )
        return asked
    if not known:
        raise ValueError(
            "moecompile: the number of tokens is symbolic, so nobody knows how much room other ranks need for them: "
            "give the option `ep_capacity`, the most tokens of a rank, or compile with dynamic=False"
        )
    if group.name not in _agreed:
        _agreed[group.name] = _agree(group, tokens)
    if tokens > _agreed[group.name]:
        raise ValueError(
            f"moecompile: this rank has {tokens} tokens, and the ranks have agreed on room for {_agreed[group.name]}, "
            "the most of the first graph with an exchange: give the option `ep_capacity`, the most tokens of a rank"
        )
    return _agreed[group.name]


def forget() -> None:
    """Ranks agree anew at the next graph; all of them have to forget."""
    _agreed.clear()


def _agree(group: Group, tokens: int) -> int:
    members = distributed.get_process_group_ranks(distributed.distributed_c10d._resolve_process_group(group.name))
    words = ranks.words_of_all(str(tokens), f"tokens exchanged in {group.name}", members)
    if words is None:
        raise RuntimeError(
            f"moecompile: not all of the ranks {members}, which share experts, compiled within {ranks.PATIENCE}; every "
            "rank has to call the model, or give all the option `ep_capacity`, the most tokens of a rank"
        )
    return max(1, *map(int, words))
