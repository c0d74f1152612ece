"""Everything that must not be rewritten by its looks, one list."""

from __future__ import annotations

import zoo_refused_batched
import zoo_refused_between
import zoo_refused_combine
import zoo_refused_dense
import zoo_refused_grouped
import zoo_refused_loop
import zoo_refused_static
import zoo_refused_writes
from zoo_case import Refusal

REFUSALS: list[Refusal] = [
    *zoo_refused_grouped.REFUSALS,
    *zoo_refused_combine.REFUSALS,
    *zoo_refused_between.REFUSALS,
    *zoo_refused_writes.REFUSALS,
    *zoo_refused_batched.REFUSALS,
    *zoo_refused_dense.REFUSALS,
    *zoo_refused_static.REFUSALS,
    *zoo_refused_loop.REFUSALS,
]
