"""What the ranks that share experts agree on: which blocks exchange their tokens, and how many tokens a rank may bring.

A rank that gathers experts while another exchanges tokens would wait for ever. And sizes are fixed when a graph is
compiled: they have to be the same on all ranks, whatever number of tokens each of them has. So ranks compare notes
when they first compile a graph with a group's parameters. What was agreed holds from then on: a rank that compiles once
more, for another number of tokens, finds it, or says why it cannot go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import distributed

from moecompile import ranks
from moecompile.passes.expert_parallel import NOT_FOUND, Group
from moecompile.passes.near_misses import UNKNOWN_TOKENS
from moecompile.runtime.sharded import process_group
from moecompile.runtime.topology import nodes_of


class DisagreementError(RuntimeError):
    """Ranks were given different things, or what one of them does is not what all have agreed on."""


_agreed: dict[tuple[str, str], dict[str, int]] = {}
"""By group and parameters: blocks that exchange, and their capacity."""
_asked: dict[tuple[str, str], dict[str, Any]] = {}
"""By the same: the options that all ranks had been given."""
_shared: dict[tuple[str, str], dict[str, str]] = {}
"""By group and graph: blocks whose model exchanges, and why they are left alone."""
_done: dict[str, bool] = {}
"""By what ranks have done together with a graph: whether any of them has objected."""


def agree(
    group: Group, parameters: Sequence[str], tokens: Mapping[str, Any], asked: Mapping[str, int | str | None], why: str,
    inference: bool = False,
) -> dict[str, int]:  # fmt: skip
    """The capacity of each block that all ranks exchange.

    Args:
        group: of ranks that share experts.
        parameters: of the group, in the graph that is being compiled.
        tokens: of each block that this rank has found: a number, or a symbol.
        asked: options that all ranks have to be given alike, `ep_capacity` among them.
        why: this rank has not found others, if it has not.
        inference: whether nobody calls the graph's backward: what is agreed on for such graphs holds for no others.

    Raises:
        DisagreementError: a rank has more tokens than agreed, or nobody knows how many there will be; options differ,
            or change on some ranks alone; not all ranks compile, or this one does not find what they agreed on before.
    """
    key = group.name, " ".join((*parameters, *["for inference"] * inference))
    if _asked.get(key) != dict(asked):  # those of all ranks have changed, or nobody meets this one
        _agreed[key] = _meet(group, key, tokens, asked)
        _asked[key] = dict(asked)
    found = _agreed[key]
    for name, most in found.items():
        if name not in tokens:
            raise _lost(group, name, why)
        count = tokens[name]
        if isinstance(count, int) and count > most:
            raise DisagreementError(
                f"moecompile: this rank has {count} tokens, and the ranks {members(group)} have room for {most} of "
                "each: give all of them the option `ep_capacity`, the most tokens of a rank"
            )
    return found


def agree_on_blocks(
    group: Group, words: Sequence[str], tokens: Mapping[str, Any], capacity: int | None, why: str
) -> dict[str, str]:
    """Why each block that exchanges its tokens by itself is left alone; the empty string if all ranks rewrite it.

    Args:
        group: of ranks that exchange.
        words: that the ranks know the graph by that is being compiled.
        tokens: of each block that this rank has found: a number, or a symbol.
        capacity: the option `ep_capacity`.
        why: this rank has not found others, if it has not.

    Raises:
        DisagreementError: not all ranks compile, or this one does not find what the ranks agreed on before.
    """
    key = group.name, " ".join(words)
    if key not in _shared:
        mine = {name: capacity is not None or isinstance(count, int) for name, count in tokens.items()}
        _shared[key] = _blocks_of_all([json.loads(each) for each in _words_of_all(group, key, json.dumps(mine))])
    found = _shared[key]
    for name, reason in found.items():
        if not reason and name not in tokens:
            raise _lost(group, name, why)
    return {name: found.get(name, NOT_FOUND) for name in tokens}


def _blocks_of_all(notes: Sequence[Mapping[str, bool]]) -> dict[str, str]:
    """By name, why not all ranks rewrite a block. Of each rank: what it has found, and whether it knows the tokens."""
    found = dict.fromkeys(name for note in notes for name in note)
    reasons = {name: "" if all(note.get(name, True) for note in notes) else UNKNOWN_TOKENS for name in found}
    return {name: why if all(name in note for note in notes) else NOT_FOUND for name, why in reasons.items()}


def gather_together(group: str, names: Sequence[str]) -> None:
    """Makes sure that all ranks are about to gather these parameters, before one does so eagerly.

    Where compiled graphs exchange tokens, a rank that runs such a model eagerly, or parts of it, may be the only one:
    it would gather while the others exchange, and all would wait for ever. Nobody is asked before ranks have agreed to
    exchange anything.

    Args:
        group: of ranks that share the parameters, by name.
        names: of the parameters in their module.

    Raises:
        DisagreementError: not all ranks do.
    """
    if not any(key[0] == group and found for key, found in _agreed.items()):
        return
    every = distributed.get_process_group_ranks(process_group(group))
    if ranks.words_of_all("", f"gather {group} {' '.join(names)}", every) is None:
        raise DisagreementError(
            f"moecompile: this rank runs experts ({', '.join(names)}) eagerly that the ranks {every} share, and "
            f"within {ranks.PATIENCE} not all of these did: others run a compiled graph, which exchanges tokens. "
            "Dynamo runs eagerly what it has compiled `recompile_limit` times, and what torch.compiler.set_stance "
            "says. Compile with fullgraph=True, which makes the former an error, and for any number of tokens "
            "(dynamic=True and the option `ep_capacity`); set a stance on all ranks alike"
        )


def hear(word: str, subject: str, groups: Sequence[str], cure: str) -> list[str]:
    """What all ranks say that exchange something with each other, directly or through others.

    Args:
        word: this rank's.
        subject: a text that is the same on all of them: groups have other names on other ranks.
        groups: of this rank's that it is about.
        cure: what each of them has to do.

    Raises:
        DisagreementError: not all of them come.
    """
    own = sorted({rank for name in groups for rank in distributed.get_process_group_ranks(process_group(name))})
    words = ranks.words_of_connected(word, subject, own)
    if words is None:
        raise DisagreementError(
            f"moecompile: not all of the ranks {own} and those connected with them, which exchange something in this "
            f"graph, came within {ranks.PATIENCE} to say about it: {subject}. {cure}"
        )
    return list(words.values())


class Together:
    """The ranks that a graph exchanges something with while it runs: who runs it alone would wait for them for ever.

    Ranks meet when they first compile a graph with a group's parameters. A rank that compiles once more, for another
    number of tokens, may be the only one.

    Args:
        shared: by group, what its ranks know the graph by; empty if it exchanges nothing.
        inference: whether nobody calls the graph's backward.
    """

    def __init__(self, shared: Mapping[Group, Sequence[str]], inference: bool) -> None:
        self._inference = inference
        self._words = {group: sorted(words) for group, words in shared.items()}

    @property
    def alone(self) -> bool:
        """Whether the graph exchanges nothing with anybody."""
        return not self._words

    def meet(self, what: str, word: str) -> list[str] | None:
        """What each rank says when all first compile the graph; None later on, when this rank may be the only one.

        Args:
            what: they are going to do together.
            word: this rank's.

        Raises:
            DisagreementError: not all of them come.
        """
        if self.alone:
            return [word]
        if self._key(what) in _done:
            return None
        _done[self._key(what)] = False
        return self._hear(what, word)

    def object(self, what: str, objects: bool) -> bool:
        """Whether any rank objects, of all that have met to do this; they remember it.

        Raises:
            DisagreementError: not all of them say.
        """
        if not self.alone:
            objects = "True" in self._hear(f"outcome of {what}", str(objects))
            _done[self._key(what)] = objects
        return objects

    def objected(self, what: str) -> bool:
        """Whether any rank objected when they met."""
        return _done.get(self._key(what), False)

    def _key(self, what: str) -> str:
        graph = sorted((group.name, *words) for group, words in self._words.items())
        return f"{what} {graph}{' for inference' * self._inference}"

    def _hear(self, what: str, word: str) -> list[str]:
        subject = f"{what} {sorted(self._words.values())}{' for inference' * self._inference}"
        cure = "Each of them has to call the model, with the same options"
        return hear(word, subject, [group.name for group in self._words], cure)


def forget() -> None:
    """Ranks agree anew at the next graph; all of them have to forget."""
    _agreed.clear()
    _asked.clear()
    _shared.clear()
    _done.clear()


def members(group: Group) -> list[int]:
    """Ranks of the job."""
    found: list[int] = distributed.get_process_group_ranks(process_group(group.name))
    return found


def _meet(group: Group, key: tuple[str, str], tokens: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, int]:
    mine = {name: count if isinstance(count, int) else None for name, count in tokens.items()}
    word = json.dumps({"tokens": mine, "asked": dict(asked)})
    notes = [json.loads(each) for each in _words_of_all(group, key, word)]
    for option in asked:
        values = [note["asked"].get(option) for note in notes]
        if len(set(values)) > 1:
            raise DisagreementError(
                f"moecompile: option `{option}`: the ranks {members(group)} were given different ones: {values}. Give "
                "all the same."
            )
    common = [name for name in notes[0]["tokens"] if all(name in note["tokens"] for note in notes)]
    return {name: _capacity([note["tokens"][name] for note in notes], asked["ep_capacity"]) for name in common}


def _words_of_all(group: Group, key: tuple[str, str], word: str) -> list[str]:
    every = members(group)
    words = ranks.words_of_all(json.dumps([word, nodes_of(every)]), f"exchange {key}", every)
    if words is None:
        raise DisagreementError(
            f"moecompile: not all of the ranks {every}, which share experts, compiled the same graph within "
            f"{ranks.PATIENCE}; this rank's is known by {key[1]}. Each of them has to call the model, and to be given "
            "the same parameters in the same order, those that need gradients on one of them on all"
        )
    said, nodes = zip(*map(json.loads, words), strict=True)
    if any(each != nodes[0] for each in nodes):
        told = "; ".join(f"rank {rank} takes them to be {each}" for rank, each in zip(every, nodes, strict=True))
        raise DisagreementError(
            f"moecompile: the ranks {every}, which share experts, have to know alike which nodes they are on: {told}. "
            "It follows from LOCAL_WORLD_SIZE, which torchrun sets: start as many ranks on each node"
        )
    return list(said)


def _lost(group: Group, name: str, why: str) -> DisagreementError:
    return DisagreementError(
        f"moecompile: the ranks {members(group)} have agreed to exchange the tokens of {name}, and the graph "
        f"that is being compiled here has no such block{': ' if why else ''}{why}. Disable the pass "
        '"exchange" on all ranks, or run them alike.'
    )


def _capacity(counts: Sequence[int | None], asked: int | None) -> int:
    """For these tokens of all ranks; None is a number that nobody knows yet."""
    if asked is not None:
        return asked
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        raise DisagreementError(
            f"moecompile: {UNKNOWN_TOKENS}: "
            "give all ranks the option `ep_capacity`, the most tokens of a rank, or compile with dynamic=False"
        )
    return max(1, *known)
