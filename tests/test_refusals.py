"""Code that looks like a form and is not: never rewritten wrongly, and named as a near miss with a reason."""

from __future__ import annotations

import pytest

import moecompile  # noqa: F401  (registers the operators)
from fuzz_graphs import compare
from moecompile.passes.detect import detect
from rewriting import rewrite
from zoo_capture import captured_case
from zoo_case import Refusal
from zoo_refusals import REFUSALS


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_refused(refusal: Refusal) -> None:
    known = captured_case(refusal)
    detection = detect(known.gm.graph)
    if not refusal.allowed:
        assert detection.sites == (), f"rewritten although {refusal.why}"
        assert detection.near_misses, "refused without a word"
        assert all(miss.reason and miss.form for miss in detection.near_misses)
        assert not any(" at 0x" in miss.reason or "<" in miss.reason for miss in detection.near_misses)
    elif not refusal.undefined:
        verdict = compare(known.gm, known.inputs, rewrite, (), refusal.name)
        assert verdict.outcome == "equal", verdict.detail
