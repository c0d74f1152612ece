"""What several ranks must agree on while each compiles for itself."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

from torch import distributed

log = logging.getLogger("moecompile")

PATIENCE = timedelta(minutes=5)
_meetings: Counter[str] = Counter()


def any_rank(verdict: bool, subject: str) -> bool:
    """Whether any rank of the job says True about the same subject; just `verdict` where there is one rank.

    Args:
        verdict: this rank's.
        subject: a text that is the same on all ranks that are to agree, such as the graph they compile.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return verdict
    words = words_of_all(str(int(verdict)), subject, range(distributed.get_world_size()))
    if words is None:
        log.warning(
            "moecompile: not all ranks compiled the same graph within %s; this rank decides for itself", PATIENCE
        )
        return verdict
    return "1" in words


def words_of_all(word: str, subject: str, members: Sequence[int]) -> list[str] | None:
    """What each of these ranks says about the same subject, in their order; None if not all have said it in time.

    Args:
        word: this rank's.
        subject: a text that is the same on all of them.
        members: ranks of the job, this one among them, in the same order on all of them.
    """
    words = words_of_connected(word, f"{subject} {list(members)}", members)
    return None if words is None else [words[rank] for rank in members]


def words_of_connected(word: str, subject: str, members: Sequence[int]) -> dict[int, str] | None:
    """What all ranks say that are connected, by rank in order: each of them knows those that it shares a group with.

    Ranks meet through the job's key-value store, not through a collective: a rank that does not compile this graph (a
    pipeline's other stage) then costs `PATIENCE`, and not a hang.

    Args:
        word: this rank's.
        subject: a text that is the same on all of them.
        members: of this rank's groups, itself among them.

    Returns:
        their words; None if not all have said theirs in time.
    """
    topic = hashlib.sha256(subject.encode()).hexdigest()
    _meetings[topic] += 1
    number, own = _meetings[topic], distributed.get_rank()
    store = distributed.distributed_c10d._get_default_store()
    store.set(f"moecompile/{topic}/{number}/{own}", json.dumps([[*members], word]))
    words: dict[int, str] = {}
    missing = {*members}
    while missing:
        keys = {rank: f"moecompile/{topic}/{number}/{rank}" for rank in missing}
        try:
            store.wait([*keys.values()], PATIENCE)
        except RuntimeError:  # what a store raises when the time is up differs between stores
            store.delete_key(f"moecompile/{topic}/{number}/{own}")  # who has given up was not there
            _meetings[topic] -= 1
            return None
        known_by = {}
        for rank, key in keys.items():
            known_by[rank], words[rank] = json.loads(store.get(key))
        missing = {rank for known in known_by.values() for rank in known} - words.keys()
    if number > 1:  # who comes to this meeting has heard all of the one before, and the store would grow
        store.delete_key(f"moecompile/{topic}/{number - 1}/{own}")
    return dict(sorted(words.items()))
