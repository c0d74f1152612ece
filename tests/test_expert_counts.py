"""The operator that counts the tokens of each expert."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dense_experts import ROUTINGS, routing

ops = torch.ops.moecompile


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8], ids=str)
def test_counts_are_those_of_a_plan(kind: str, dtype: torch.dtype) -> None:
    for tokens, top_k, num_experts in ((0, 2, 3), (1, 1, 1), (7, 3, 4), (50, 8, 16)):
        ids = routing(kind, tokens, top_k, num_experts).to(dtype)
        found = ops.count_experts(ids, num_experts)
        assert found.dtype == torch.int32 and torch.equal(found, ops.plan(ids, num_experts)[0])


@pytest.mark.parametrize("wrong", [-2, 4, 99])
def test_an_id_out_of_range_is_named(wrong: int) -> None:
    ids = routing("random", 6, 2, 4)
    ids[3, 1] = wrong
    with pytest.raises(IndexError, match=rf"count_experts: expert id {wrong} is outside \[0, 4\)"):
        ops.count_experts(ids, 4)


@pytest.mark.parametrize("fake", [False, True])
def test_what_counting_refuses(fake: bool) -> None:
    for ids, num_experts, kind, complaint in (
        (torch.zeros(4, 2), 4, TypeError, "must hold integers, got dtype torch.float32"),
        (torch.zeros(4, dtype=torch.int64), 4, ValueError, r"must have shape .* got \(4,\)"),
        (torch.zeros(4, 2, dtype=torch.int64), 0, ValueError, "num_experts must be at least 1, got 0"),
    ):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
            with pytest.raises(kind, match=f"moecompile::count_experts: .*{complaint}"):
                ops.count_experts(ids, num_experts)


def test_counting_is_registered_as_torch_wants_it() -> None:
    torch.library.opcheck(ops.count_experts.default, (routing("random", 6, 2, 4), 4))
