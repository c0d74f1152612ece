"""transformers' models with experts spread over ranks, on gloo (tests/transformers_expert_parallel_checks.py).

Some checks always run; all of them with `pytest -m slow tests/test_transformers_expert_parallel.py`.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers.distributed.expert_parallel")

import transformers_expert_parallel_checks
from ranks_in_processes import checks_of, run_on_ranks
from together import together

CHECKS = checks_of(transformers_expert_parallel_checks)
ALWAYS = (
    "check_bfloat16_sharded",
    "check_all_reduce_computes_what_it_did",
    "check_explain_names_the_cure_for_all_to_all",
    "check_ours_as_users_load_it",
)

results, test_together = together(transformers_expert_parallel_checks.__name__, ALWAYS)


@pytest.mark.slow
def test_the_rest(tmp_path_factory: pytest.TempPathFactory) -> None:
    names = [name for name in CHECKS if name not in ALWAYS]
    found = run_on_ranks(2, transformers_expert_parallel_checks.__name__, names, tmp_path_factory.mktemp("ranks"))
    assert not any(found.values()), "\n".join(found.values())
