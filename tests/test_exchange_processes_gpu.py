"""Experts spread over ranks that share one GPU, end to end with moecompile's own exchange kernels.

The longest check: `pytest -m "gpu and slow" tests/test_exchange_processes_gpu.py`.
"""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

import exchange_process_checks
from ranks_in_processes import checks_of, judge, run_on_ranks
from ranks_on_one_gpu import shared_gpu

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

PATIENCE = timedelta(seconds=120)
LONG = ("check_ten_thousand_exchanges",)
CHECKS = checks_of(exchange_process_checks, but=LONG)


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each check came to: one group of processes runs them all."""
    directory = tmp_path_factory.mktemp("ranks")
    with shared_gpu(request.param, directory):
        return run_on_ranks(request.param, exchange_process_checks.__name__, CHECKS, directory, PATIENCE)


@pytest.mark.parametrize("name", CHECKS)
def test_together(results: dict[str, str], name: str) -> None:
    judge(results[name])


@pytest.mark.slow
def test_ten_thousand_exchanges(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("ranks")
    with shared_gpu(2, directory):
        found = run_on_ranks(2, exchange_process_checks.__name__, LONG, directory, PATIENCE)
    assert not any(found.values()), "\n".join(found.values())
