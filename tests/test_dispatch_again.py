"""The option `ep_dispatch_again`: what 2 ranks check together (tests/dispatch_again_checks.py), and on one device."""

from __future__ import annotations

import torch

import dispatch_again_checks
import moecompile
from expert_parallel_models import Block, compiled, results, tokens_of
from together import together

of_ranks, test_together = together(dispatch_again_checks.__name__)


def test_nothing_is_dispatched_on_one_device() -> None:
    torch.manual_seed(0)
    model, x = Block(), tokens_of(0, 12)
    right = [each.clone() for each in results(compiled(model), model, x)]
    again = results(compiled(model, ep_dispatch_again=True), model, x)
    assert all(torch.equal(one, other) for one, other in zip(again, right, strict=True))
    assert "dispatched again" not in str(moecompile.last_report())
