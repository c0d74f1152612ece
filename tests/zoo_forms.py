"""Every form with its spellings: what detection must match, one list."""

from __future__ import annotations

import zoo_batched_mm
import zoo_capacity
import zoo_controls
import zoo_controls_static
import zoo_dense
import zoo_expert_loop
import zoo_gather_einsum
import zoo_grouped_mm
import zoo_padded_bins
import zoo_torchtitan
from zoo_case import Case

CASES: list[Case] = [
    *zoo_grouped_mm.CASES,
    *zoo_batched_mm.CASES,
    *zoo_dense.CASES,
    *zoo_torchtitan.CASES,
    *zoo_capacity.CASES,
    *zoo_gather_einsum.CASES,
    *zoo_expert_loop.CASES,
    *zoo_padded_bins.CASES,
    *zoo_controls.CASES,
    *zoo_controls_static.CASES,
]


def case(name: str) -> Case:
    """The case of that name; a KeyError lists the names there are."""
    for candidate in CASES:
        if candidate.name == name:
            return candidate
    raise KeyError(f"no case {name!r} in the zoo; there are {', '.join(c.name for c in CASES)}")
