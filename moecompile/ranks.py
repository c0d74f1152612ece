"""What several ranks must agree on while each compiles for itself."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from datetime import timedelta

from torch import distributed

log = logging.getLogger("moecompile")

PATIENCE = timedelta(minutes=5)
_meetings: Counter[str] = Counter()


def any_rank(verdict: bool, subject: str) -> bool:
    """Whether any rank of the job says True about the same subject; just `verdict` where there is one rank.

    Ranks meet through the job's key-value store, not through a collective: a rank that does not compile this graph (a
    pipeline's other stage) then costs `PATIENCE` and a warning, and not a hang.

    Args:
        verdict: this rank's.
        subject: a text that is the same on all ranks that are to agree, such as the graph they compile.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return verdict
    topic = hashlib.sha256(subject.encode()).hexdigest()
    _meetings[topic] += 1
    keys = [f"moecompile/{topic}/{_meetings[topic]}/{rank}" for rank in range(distributed.get_world_size())]
    store = distributed.distributed_c10d._get_default_store()
    store.set(keys[distributed.get_rank()], str(int(verdict)))
    try:
        store.wait(keys, PATIENCE)
    except RuntimeError:  # what a store raises when the time is up differs between stores
        log.warning(
            "moecompile: not all ranks compiled the same graph within %s; this rank decides for itself", PATIENCE
        )
        return verdict
    return any(store.get(key) == b"1" for key in keys)
