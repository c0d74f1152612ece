"""What rows of `bench ep` have in common: bars, and the proof that moecompile's own kernels carried the tokens."""

from __future__ import annotations

from collections.abc import Mapping

from moecompile.bench_bars import Bar
from moecompile.bench_ep_cases import LIMITS, RANKS
from moecompile.bench_ep_ranks import Ranks
from moecompile.bench_proof import NotOursError
from moecompile.bench_timing import Call


def bars(section: str, case: str, what: str, name: str, values: Mapping[str, float | None], ranks: Ranks) -> list[Bar]:
    """Of one row: its bars with what was measured of each, by `Limit.of`."""
    inapplicable = ""
    if ranks.device.type != "cuda":
        inapplicable = "no GPU"
    elif ranks.size != RANKS:
        inapplicable = f"the bar is for {RANKS} ranks, and these are {ranks.size}"
    return [
        Bar(section, case, what, name, values.get(limit.of), limit, inapplicable)
        for limit in LIMITS.get((case, what, name), ())
    ]


def proven(call: Call, device: str) -> dict[str, int]:
    """As `multiprocessors`; on the CPU there are no kernels, and nothing is proven.

    Raises:
        NotOursError: no kernel of the exchange ran: torch's collectives did it.
    """
    found = multiprocessors(call)
    if device == "cuda" and not any("exchange" in name for name in found):
        raise NotOursError("torch's collectives carried the tokens: no kernel of moecompile's exchange ran")
    return found


def multiprocessors(call: Call) -> dict[str, int]:
    """How many multiprocessors the kernels of moecompile's that a call launches have at most, by name."""
    from moecompile.runtime.launch import Launch, observers

    found: dict[str, int] = {}

    def note(launch: Launch) -> None:
        name = launch.kernel.instance.name
        found[name] = max(found.get(name, 0), min(launch.blocks, launch.kernel.multiprocessors))

    observers.noting.append(note)
    try:
        call()
    finally:
        observers.noting.remove(note)
    return found


def numberless(call: Call, _: int) -> object:
    """Calls what has one input set."""
    return call()
