"""All rules of the interpretation: canonical operation -> what its result means."""

from __future__ import annotations

from moecompile.passes import (
    rules_arithmetic,
    rules_index,
    rules_loop,
    rules_products,
    rules_routing,
    rules_sums,
    rules_views,
)
from moecompile.passes.interpret import Rule

RULES: dict[str, Rule] = {
    **rules_views.RULES,
    **rules_arithmetic.RULES,
    **rules_index.RULES,
    **rules_routing.RULES,
    **rules_products.RULES,
    **rules_loop.RULES,
    **rules_sums.RULES,
}
