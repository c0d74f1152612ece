"""What the meanings that only one form has are, for the oracle: import this and all are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import meanings
import meanings_of_bins  # noqa: F401
import meanings_of_capacity  # noqa: F401
from meanings import AXES, Oracle, Space, Unknown, counts
from moecompile.passes import terms


def _chosen(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    """1 where a token's ids name the expert."""
    ids, atom = about
    return oracle.summed(terms.Equals(ids.content, atom), ids.dims[1], space).clamp(max=1)


def _any(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    return oracle.summed(about[0], about[1], space).clamp(max=1)


def _spread(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    return oracle.content(about[0], space) * oracle.content(about[1], space)


def _number_of_one(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    key, index, extent = about
    return counts(oracle, key, extent)[index].view([1] * AXES)


def _partial(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    """The base, and the terms of the experts that have added theirs."""
    partial, ids, choices = about
    if not partial.fresh:
        raise Unknown("a sum added to something")
    total = torch.zeros([1] * AXES, dtype=torch.float64)
    for expert, term in partial.terms:
        mask = terms.Equals(ids, terms.Fixed(expert, partial.num_experts))
        total = total + oracle.summed(terms.Apply("mul", (mask, term)), choices, space)
    return total


meanings.SPECIALS.update(
    {
        "chosen": _chosen,
        "not chosen": lambda oracle, about, space: 1 - _chosen(oracle, about, space),
        "any": _any,
        "spread": _spread,
        "count": _number_of_one,
        "partial": _partial,
    }
)
