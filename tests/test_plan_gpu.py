"""The plan's kernels: the same plan as the reference's, for every number of blocks, rounds and experts."""

from __future__ import annotations

import pytest
import torch

from moecompile.runtime import hopper_routing, reference

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

NAMES = ("counts", "offsets", "slots", "order")


def routed(tokens: int, top_k: int, experts: int, dtype: torch.dtype, kind: str) -> torch.Tensor:
    torch.manual_seed(tokens + experts)
    ids = torch.randint(0, experts, (tokens, top_k))
    if kind == "dropped":
        ids = torch.where(torch.rand(ids.shape) < 0.3, -1, ids)
    if kind == "nobody":
        ids = torch.full_like(ids, -1)
    if kind == "one expert":
        ids = torch.full_like(ids, experts - 1)
    if kind == "in blocks":
        ids = ids.reshape(-1).sort().values.reshape(tokens, top_k)
    return ids.to(dtype)


@pytest.mark.parametrize("kind", ["random", "dropped", "nobody", "one expert", "in blocks"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [
        (0, 2, 4),
        (1, 1, 1),
        (1, 8, 128),
        (128, 8, 64),  # exactly one block
        (129, 8, 65),
        (8192, 8, 256),
        (1000, 3, 512),
        (1000, 3, 513),
        (700, 6, 1536),
        (40_000, 8, 128),  # more than one round a block
    ],
)
def test_as_the_reference(tokens: int, top_k: int, experts: int, kind: str) -> None:
    ids = routed(tokens, top_k, experts, torch.int64, kind)
    expected, found = reference.plan(ids, experts), hopper_routing.plan(ids.cuda(), experts)
    for name, one, other in zip(NAMES, found, expected, strict=True):
        assert one.dtype == torch.int32 and one.shape == other.shape, name
        assert torch.equal(one.cpu(), other), name


@pytest.mark.parametrize("room", [1, 1000, 1024, 5000, 8192 * 8, 100_000])
@pytest.mark.parametrize("kind", ["random", "one expert"])
def test_room_for_fewer_rows(room: int, kind: str) -> None:
    ids = routed(8192, 8, 256, torch.int64, kind)
    expected, found = reference.plan(ids, 256, room), hopper_routing.plan(ids.cuda(), 256, room)
    for name, one, other in zip(NAMES, found, expected, strict=True):
        assert torch.equal(one.cpu(), other), name


@pytest.mark.parametrize("tokens", [5, 5000])
def test_experts_of_one_rank(tokens: int) -> None:
    ids = routed(tokens, 8, 64, torch.int32, "dropped")
    here = torch.where((ids >= 16) & (ids < 32), ids - 16, -1)
    found = hopper_routing.plan(ids.cuda(), 16, first=16, among=64)
    for name, one, other in zip(NAMES, found, reference.plan(here, 16), strict=True):
        assert torch.equal(one.cpu(), other), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_other_dtypes(dtype: torch.dtype) -> None:
    ids = routed(300, 4, 100, dtype, "dropped")
    for one, other in zip(hopper_routing.plan(ids.cuda(), 100), reference.plan(ids, 100), strict=True):
        assert torch.equal(one.cpu(), other)


def test_ids_that_do_not_lie_in_order() -> None:
    ids = routed(4, 300, 100, torch.int64, "random").t()
    for one, other in zip(hopper_routing.plan(ids.cuda(), 100), reference.plan(ids.contiguous(), 100), strict=True):
        assert torch.equal(one.cpu(), other)


def test_more_experts_than_there_is_room_for() -> None:
    ids = routed(50, 2, 4000, torch.int64, "random")
    assert not hopper_routing.takes_plan(4000)
    for one, other in zip(torch.ops.moecompile.plan(ids.cuda(), 4000), reference.plan(ids, 4000), strict=True):
        assert torch.equal(one.cpu(), other)
