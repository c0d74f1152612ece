"""The option `ep_dispatch_again`: what 2 ranks check together (tests/dispatch_again_checks.py), and on one device."""

from __future__ import annotations

import pytest
import torch

import dispatch_again_checks
import moecompile
from expert_parallel_models import Block, compiled, results, tokens_of
from ranks_in_processes import checks_of, run_on_ranks

CHECKS = checks_of(dispatch_again_checks)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each check came to."""
    return run_on_ranks(2, dispatch_again_checks.__name__, CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_together(found: dict[str, str], name: str) -> None:
    assert not found[name], found[name]


def test_nothing_is_dispatched_on_one_device() -> None:
    torch.manual_seed(0)
    model, x = Block(), tokens_of(0, 12)
    right = [each.clone() for each in results(compiled(model), model, x)]
    again = results(compiled(model, ep_dispatch_again=True), model, x)
    assert all(torch.equal(one, other) for one, other in zip(again, right, strict=True))
    assert "dispatched again" not in str(moecompile.last_report())
