"""All rules of the interpretation: canonical operation -> what its result means."""

from __future__ import annotations

from moecompile.passes import (
    rules_arithmetic,
    rules_capacity,
    rules_exchange,
    rules_index,
    rules_loop,
    rules_padded,
    rules_places,
    rules_products,
    rules_routing,
    rules_segments,
    rules_sums,
    rules_views,
)
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Interpretation, Passed, Refused, Rule
from moecompile.passes.spelling import not_understood
from moecompile.passes.terms import Value

RULES: dict[str, Rule] = {
    **rules_views.RULES,
    **rules_arithmetic.RULES,
    **rules_index.RULES,
    **rules_routing.RULES,
    **rules_products.RULES,
    **rules_loop.RULES,
    **rules_sums.RULES,
}


def _before(own: Rule, general: Rule | None) -> Rule:
    """A form's own rule first; the general one where that one raises Passed."""

    def rule(call: Call, state: Interpretation) -> Value | tuple[Value | None, ...] | None:
        try:
            return own(call, state)
        except Passed:
            if general is None:
                raise Refused(not_understood(call.node)) from None
            return general(call, state)
        except Refused as reason:
            state.refusals[call.node] = str(reason)
            raise

    return rule


# forms with meanings of their own: each table's rules look at an operation before the rules above do
for _own in (rules_padded.RULES, rules_capacity.RULES, rules_places.RULES, rules_segments.RULES, rules_exchange.RULES):
    RULES.update({name: _before(rule, RULES.get(name)) for name, rule in _own.items()})
