"""What several ranks check together (tests/test_expert_parallel.py): each is a function of (rank, ranks)."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import moecompile
from expert_parallel_models import (
    EXPERTS,
    HIDDEN,
    INNER,
    TOP_K,
    Block,
    Experts,
    Looped,
    Model,
    among_ranks,
    close,
    compiled,
    local_of,
    meaned,
    mesh_of,
    ops,
    results,
    tokens_of,
    whole_of,
    with_mean_of_others,
)
from moecompile import agreement


def check_eager_is_bitwise_what_it_was(rank: int, ranks: int) -> None:
    model = Block()
    whole, x = copy.deepcopy(model), tokens_of(rank, 5 + 4 * rank)
    assert moecompile.shard_experts(model, mesh_of(ranks)) is model
    assert local_of(model.experts.w_in).shape == (EXPERTS // ranks, HIDDEN, 2 * INNER)
    assert isinstance(model.experts.w_in, DTensor), "outside of a forward nobody gathers"
    found, right = results(model, model, x), results(whole, whole, x)
    assert torch.equal(found[0], right[0]) and torch.equal(found[1], right[1])
    close(with_mean_of_others(found, model), meaned(right, whole), 4e-3)


def check_experts_that_differ_between_ranks_do_not_hang(rank: int, ranks: int) -> None:
    """Rank 0 reads one expert, the last one none: the gathers are as many on all."""
    model = Looped()
    whole = copy.deepcopy(model)
    moecompile.shard_experts(model, mesh_of(ranks), gradients="sum")
    count = 0 if rank == ranks - 1 else 3
    x, weights = tokens_of(rank, count, torch.float32), torch.rand(count, TOP_K)
    ids = torch.tensor([[rank, rank + 1]] * count, dtype=torch.int64).view(count, TOP_K)
    found, right = model(x, ids, weights), whole(x, ids, weights)
    assert torch.equal(found, right)
    found.sum().backward()
    if right.requires_grad:
        right.sum().backward()
    for (name, one), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        total = torch.zeros_like(other) if other.grad is None else other.grad
        distributed.all_reduce(total)
        assert torch.allclose(whole_of(one.grad), total, atol=1e-5), name


def check_graph_breaks_inside(rank: int, ranks: int) -> None:
    """Pieces of a forward read experts one by one, on every rank others, and gather once all the same."""
    model = Looped()
    whole = copy.deepcopy(model)
    moecompile.shard_experts(model, mesh_of(ranks), gradients="sum")
    run = torch.compile(model, backend="moecompile", options={"lowering": "eager"})
    for turn in range(2):
        x, weights = tokens_of(rank + turn, 3, torch.float32), torch.rand(3, TOP_K)
        ids = torch.tensor([[rank, (rank + 1) * turn]] * 3)
        assert torch.allclose(run(x, ids, weights), whole(x, ids, weights), atol=1e-6)


def check_compiled_exchanges_tokens(rank: int, ranks: int) -> None:
    """Ranks with different numbers of tokens; nothing is gathered; results and gradients are the model's."""
    model = Model()
    whole, x = copy.deepcopy(model), tokens_of(rank, 6 + 5 * rank)
    moecompile.shard_experts(model, mesh_of(ranks))
    right = meaned(results(whole, whole, x), whole)
    close(with_mean_of_others(results(compiled(model), model, x), model), right, 1.5e-2)
    (graph,) = moecompile.last_report().graphs
    assert "gather_experts" not in graph.after and graph.after.count("dispatch_start") == 2
    assert f"capacity={6 + 5 * (ranks - 1)}" in graph.after, "the ranks agreed on the most"


def check_a_rank_without_tokens(rank: int, ranks: int) -> None:
    model = Block()
    whole, x = copy.deepcopy(model), tokens_of(rank, 7 if rank == 0 else 0)
    moecompile.shard_experts(model, mesh_of(ranks))
    right = meaned(results(whole, whole, x), whole)
    found = results(compiled(model), model, x)
    assert found[0].shape == x.shape
    close(with_mean_of_others(found, model), right, 1e-2)
    assert "dispatch_start" in moecompile.last_report().graphs[-1].after


def check_all_to_one(rank: int, ranks: int) -> None:
    """All tokens of all ranks choose experts of the last rank."""
    x, weights = tokens_of(rank, 9, torch.float32), torch.rand(9, TOP_K)
    ids = torch.tensor([[EXPERTS - 1, EXPERTS - 2]] * 9)
    ids[4] = torch.tensor([EXPERTS - 2, EXPERTS - 1])
    sent, home = ops.exchange_plan(ids, num_experts=EXPERTS, ranks=ranks, capacity=9)
    assert sent.view(ranks, 9)[-1].tolist() == [*range(9)] and bool((sent.view(ranks, 9)[:-1] == -1).all())
    among = among_ranks(ranks, 9)
    given = x, ids, weights, sent, home
    parts = ops.dispatch_start(*given, **among)
    rows, row_ids, row_weights, came = ops.dispatch_wait(*parts, *given, num_experts=EXPERTS, **among)
    here = EXPERTS // ranks
    if rank == ranks - 1:
        assert torch.equal(rows.view(ranks, 9, HIDDEN)[rank], x)
        assert torch.equal(row_ids.view(ranks, 9, TOP_K)[rank], (ids - EXPERTS + here).int())
        assert torch.equal(row_weights.view(ranks, 9, TOP_K)[rank], weights)
    else:
        assert not rows.any() and bool((row_ids == -1).all())
    y = rows * 2
    back = ops.combine_start(y, None, came, sent, home, **among)
    result, _ = ops.combine_wait(*back, y, None, sent, home, **among)
    assert torch.equal(result, x * 2)


def check_sums_at_home_are_exact(rank: int, ranks: int) -> None:
    """Bit for bit the emulation: each rank's part rounded once, summed in float32 by rank, rounded once."""
    generator = torch.Generator().manual_seed(rank)
    x = tokens_of(rank, 11)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(11)])
    ids[3] = -1
    ids[5, 1] = -1
    here = EXPERTS // ranks
    sent, home = ops.exchange_plan(ids, num_experts=EXPERTS, ranks=ranks, capacity=11)
    among = among_ranks(ranks, 11)
    given = x, ids, None, sent, home
    rows, _, _, came = ops.dispatch_wait(*ops.dispatch_start(*given, **among), *given, num_experts=EXPERTS, **among)
    y = rows * (rank + 1) / 3
    back = ops.combine_start(y, None, came, sent, home, **among)
    result, _ = ops.combine_wait(*back, y, None, sent, home, **among)
    total = torch.zeros(11, HIDDEN)
    for other in range(ranks):
        meets = ((ids >= other * here) & (ids < (other + 1) * here)).any(1, keepdim=True)
        total += torch.where(meets, (x * (other + 1) / 3).float(), 0)
    assert torch.equal(result, total.to(torch.bfloat16)) and not result[3].any()


def check_what_is_sent_may_be_overwritten(rank: int, ranks: int) -> None:
    """As Inductor does where the wait, of a derivative, knows the handles alone."""
    tokens = 2**14
    ids = torch.arange(EXPERTS).expand(tokens, -1)
    sent, home = ops.exchange_plan(ids, num_experts=EXPERTS, ranks=ranks, capacity=tokens)
    among = among_ranks(ranks, tokens)
    y, weights = torch.ones(ranks * tokens, HIDDEN), torch.ones(ranks * tokens, 2)
    came = torch.full((ranks,), tokens, dtype=torch.int32)
    if rank:  # the others send nothing before this one listens
        time.sleep(0.5)
    back = ops.combine_start(y, weights, came, sent, home, **among)
    y.fill_(torch.nan)
    weights.fill_(torch.nan)
    result, of_weights = ops.combine_wait(*back, *back[:2], sent, home, **among)
    assert torch.equal(result, torch.full((tokens, HIDDEN), float(ranks))), result
    assert torch.equal(of_weights, torch.full((tokens, 2), float(ranks))), of_weights


def check_full_checkpoints(rank: int, ranks: int) -> None:
    """Loaded from plain tensors, saved as plain tensors and through torch.distributed.checkpoint."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = Model()
    full = {name: torch.randn_like(each) for name, each in model.state_dict().items()}
    before = {name: each.clone() for name, each in full.items()}
    moecompile.shard_experts(model, mesh_of(ranks))
    assert not model.load_state_dict(full).missing_keys
    assert all(type(each) is Tensor and torch.equal(each, before[name]) for name, each in full.items())
    sharded = model.state_dict()
    assert sharded.keys() == full.keys() and isinstance(sharded["blocks.1.experts.w_out"], DTensor)
    whole: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert all(torch.equal(whole[name], each) for name, each in full.items() if rank == 0)
    model.load_state_dict(sharded)
    try:
        model.load_state_dict({**full, "blocks.0.experts.w_in": full["blocks.0.experts.w_in"][:-1]})
    except RuntimeError as error:
        assert "blocks.0.experts.w_in" in str(error)
    else:
        raise AssertionError("a checkpoint with fewer experts was taken")


def check_distributed_checkpoint(rank: int, ranks: int) -> None:
    import os
    import tempfile

    from torch.distributed import checkpoint

    path = [tempfile.mkdtemp() if rank == 0 else ""]
    distributed.broadcast_object_list(path)
    whole = Model()
    state = {name: torch.randn_like(each) for name, each in whole.state_dict().items()}
    checkpoint.save({"model": state}, checkpoint_id=os.path.join(path[0], "full"))
    model = Model()
    moecompile.shard_experts(model, mesh_of(ranks))
    into = {"model": model.state_dict()}
    checkpoint.load(into, checkpoint_id=os.path.join(path[0], "full"))
    model.load_state_dict(into["model"])
    assert torch.equal(
        whole_of(dict(model.named_parameters())["blocks.1.experts.w_out"]), state["blocks.1.experts.w_out"]
    )
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=os.path.join(path[0], "sharded"))
    plain = {"model": whole.state_dict()}
    checkpoint.load(plain, checkpoint_id=os.path.join(path[0], "sharded"))
    assert all(torch.equal(plain["model"][name], each) for name, each in state.items())


def check_what_is_refused(rank: int, ranks: int) -> None:
    mesh = mesh_of(ranks)
    for model, more, words in (
        (nn.Linear(8, 8), {}, "found no experts"),
        (Block(), {"parameters": ["experts.w_inn"]}, "no parameter 'experts.w_inn'"),
        (Block(), {"gradients": "max"}, "expected 'mean' or 'sum'"),
    ):
        before = [id(each) for each in model.parameters()]
        try:
            moecompile.shard_experts(model, mesh, **more)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{words}: was taken")
        assert before == [id(each) for each in model.parameters()]
    odd = Experts()
    odd.w_out = nn.Parameter(torch.randn(EXPERTS, 1, 1))
    odd.w_in = nn.Parameter(torch.randn(EXPERTS, 1, 1))
    odd.third = nn.Parameter(torch.randn(ranks + 1, 1, 1))
    try:
        moecompile.shard_experts(odd, mesh, parameters=["w_in", "third"])
    except ValueError as error:
        assert "share evenly" in str(error) and not isinstance(odd.w_in, DTensor)
    else:
        raise AssertionError("experts that cannot be shared were taken")
    again = moecompile.shard_experts(Block(), mesh)
    try:
        moecompile.shard_experts(again, mesh)
    except ValueError as error:
        assert "DTensor already" in str(error) or "found no experts" in str(error)
    else:
        raise AssertionError("sharded twice")


def check_more_tokens_than_agreed(rank: int, ranks: int) -> None:
    model = moecompile.shard_experts(Block(), mesh_of(ranks))
    run = compiled(model)
    run(tokens_of(rank, 4))
    torch._dynamo.reset()
    try:
        torch.compile(model, backend="moecompile", fullgraph=True, options={"lowering": "eager"})(tokens_of(rank, 5))
    except Exception as error:
        assert "ep_capacity" in str(error) and "bug in moecompile" not in str(error), error
    else:
        raise AssertionError("more tokens than there is room for were taken")
    run = compiled(model, ep_capacity=16)
    run(tokens_of(rank, 5))
    assert "capacity=16" in moecompile.last_report().graphs[-1].after


def check_options_that_differ_between_ranks(rank: int, ranks: int) -> None:
    """Who sends with other channels than the others wait for would hang: all ranks refuse."""
    model = moecompile.shard_experts(Block(), mesh_of(ranks))
    for name, mine in (("ep_sms", 4 + rank), ("ep_capacity", 8 + rank)):
        try:
            compiled(model, **{name: mine})(tokens_of(rank, 4))
        except Exception as error:
            assert f"option `{name}`" in str(error) and f"[{mine - rank}, {mine - rank + 1}" in str(error), error
        else:
            raise AssertionError(f"{name} differed")
        torch._dynamo.reset()


class Written(Experts):
    """What it has gathered is written, as a whole or through a view, before it is multiplied."""

    view = False

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            (self.w_in.view(-1) if self.view else self.w_in).mul_(0.5)
        return super().forward(x, ids, weights)


def check_gathered_experts_that_are_written(rank: int, ranks: int) -> None:
    """They are not this rank's part any more: the block is left as it is."""
    for view in (False, True):
        model, x = Block(), tokens_of(rank, 6)
        model.experts = Written()
        model.experts.view = view
        whole = copy.deepcopy(model)
        moecompile.shard_experts(model, mesh_of(ranks))
        torch._dynamo.reset()
        found = compiled(model)(x)
        close([found], [whole(x)], 1e-2)
        (graph,) = moecompile.last_report().graphs
        assert "dispatch_start" not in graph.after, graph.after


def check_shards_that_are_read_by_others_are_gathered(rank: int, ranks: int) -> None:
    """What is no block of experts still computes what it did, and the report says that it gathers."""

    class Odd(Experts):
        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return super().forward(x, ids, weights) + self.w_out.sum((0, 1)) + x @ self.w_in.sum(0)[:, :HIDDEN]

    model = Block()
    model.experts = Odd()
    whole, x = copy.deepcopy(model), tokens_of(rank, 6)
    moecompile.shard_experts(model, mesh_of(ranks))
    found = compiled(model)(x)
    close([found], [whole(x)], 1e-2)
    graph = moecompile.last_report().graphs[0]
    assert "gather_experts" in graph.after and "dispatch_start" in graph.after


def check_shards(rank: int, ranks: int) -> None:
    """Each rank keeps its own experts, in order; rank 0's values count."""
    torch.manual_seed(rank)
    model = Block()
    mine = model.experts.w_in.detach().clone()
    moecompile.shard_experts(model, mesh_of(ranks))
    assert model.experts._parameters["w_in"].placements == (Shard(0),)  # type: ignore[union-attr]
    full = whole_of(model.experts.w_in)
    assert rank != 0 or torch.equal(full, mine)
    here = EXPERTS // ranks
    assert torch.equal(local_of(model.experts.w_in), full[rank * here : (rank + 1) * here])


def check_ddp(rank: int, ranks: int) -> None:
    """DDP means the gradients of the others and leaves the experts alone, eagerly and compiled."""
    model = Model()
    whole, x = copy.deepcopy(model), tokens_of(rank, 6 + 5 * rank)
    moecompile.shard_experts(model, mesh_of(ranks))
    wrapped = nn.parallel.DistributedDataParallel(model)
    right = meaned(results(whole, whole, x), whole)
    close(results(wrapped, model, x), right, 6e-3)
    agreement.forget()
    moecompile.reset()
    model.compile(backend="moecompile", fullgraph=True, options={"lowering": "eager"})
    close(results(wrapped, model, x), right, 1.5e-2)
    assert "dispatch_start" in moecompile.last_report().graphs[-1].after


def check_fsdp(rank: int, ranks: int) -> None:
    """FSDP2 of the other parameters over all ranks, and of the experts over those that have the same ones."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "ep"))
    model = Model()
    whole, x = copy.deepcopy(model), tokens_of(rank, 6 + 5 * rank)
    moecompile.shard_experts(model, mesh["ep"])
    if ranks > 2:
        for block in model.blocks:
            fully_shard(block.get_submodule("experts"), mesh=mesh["dp"])
    experts = {each for name, each in model.named_parameters() if ".experts." in name}
    fully_shard(model, mesh=mesh_of(ranks), ignored_params=experts)
    right = meaned(results(whole, whole, x), whole)
    found = results(model, model, x)
    assert torch.equal(found[0], right[0])
    close(found, right, 8e-3)
    for block in model.blocks:  # FSDP's hooks stay outside
        experts_of_block: Any = block.get_submodule("experts")
        experts_of_block.forward = compiled(experts_of_block.forward)
    close(results(model, model, x), right, 1.5e-2)
    assert all("dispatch_start" in graph.after for graph in moecompile.last_report().graphs)


def check_fp8(rank: int, ranks: int) -> None:
    """The same layers are cast as without ranks, routers are kept, and the experts of each rank are cast there."""
    model = Model(256, 128, fixed=True)
    whole, x = copy.deepcopy(model), tokens_of(rank, 12 + rank, hidden=256)
    moecompile.shard_experts(model, mesh_of(ranks))
    found = results(compiled(model, precision="fp8"), model, x)
    (graph,) = moecompile.last_report().graphs
    rows = [(row.module, row.kind, row.cast, row.reason) for row in graph.casts]
    right = results(compiled(whole, precision="fp8"), whole, x)
    assert rows == [(row.module, row.kind, row.cast, row.reason) for row in moecompile.last_report().graphs[-1].casts]
    assert "experts_fp8" in graph.after and "dispatch_start" in graph.after
    close(with_mean_of_others(found, model), meaned(right, whole), 6e-2)


def check_main_gradients(rank: int, ranks: int) -> None:
    """Sums or means are added to this rank's part of `main_grad`, plain or sharded."""
    x = tokens_of(rank, 6 + 5 * rank)
    for kind in ("plain", "sharded", "mean"):
        model = Model()
        moecompile.shard_experts(model, mesh_of(ranks), gradients="mean" if kind == "mean" else "sum")
        found = results(compiled(model), model, x)
        grads = found[len(found) - len([*model.parameters()]) :]
        sharded: list[Any] = [each for each in model.parameters() if isinstance(each, DTensor)]
        for each in sharded:
            each.main_grad = torch.ones_like(
                each if kind == "sharded" else local_of(each), dtype=torch.float32
            ).detach()
            each.grad = None
        compiled(model, main_grad=True)(x).float().pow(2).sum().backward()
        # to_local gives zeros for no gradient in torch 2.11
        assert not any(each.grad is not None and bool(local_of(each.grad).any()) for each in sharded)
        right = [grad for each, grad in zip(model.parameters(), grads, strict=True) if isinstance(each, DTensor)]
        for each, grad in zip(sharded, right, strict=True):
            added = (local_of(each.main_grad) if kind == "sharded" else each.main_grad) - 1
            close([added], [grad.chunk(ranks)[rank].float()], 6e-3)


def check_recast_weights(rank: int, ranks: int) -> None:
    """`fp8_recast_weights` lets the backward cast this rank's experts for itself, whose gradients are means too."""
    for gradients in ("mean", "sum"):
        model = Model(256, 128, fixed=True)
        x = tokens_of(rank, 12, hidden=256)
        moecompile.shard_experts(model, mesh_of(ranks), gradients=gradients)
        right = results(compiled(model, precision="fp8"), model, x)
        found = results(compiled(model, precision="fp8", fp8_recast_weights=True), model, x)
        assert "fp8_recast_weights" not in str(moecompile.last_report()), moecompile.last_report()
        assert str(moecompile.last_report().graphs[-1].backward).count("quantize_weights") >= 5, (
            "of each block and first"
        )
        assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


def check_cached_copies(rank: int, ranks: int) -> None:
    """`fp8_cache_weights` keeps the copies of this rank's experts, and makes them anew when these have changed."""
    model = Model(256, 128)
    whole, x = copy.deepcopy(model), tokens_of(rank, 12, hidden=256)
    moecompile.shard_experts(model, mesh_of(ranks))
    run = compiled(model, precision="fp8", fp8_cache_weights=True)
    reference = compiled(whole, precision="fp8")
    with torch.no_grad():
        first = run(x)
        assert "copies of 5 matrices are kept" in str(moecompile.last_report())
        close([first, run(x)], [reference(x)] * 2, 6e-2)
        for each in (model, whole):
            for block in each.blocks:
                weight: Any = block.get_submodule("experts").get_parameter("w_out")
                weight.mul_(-3)
        close([run(x)], [reference(x)], 6e-2)
        for each in (model, whole):
            for block in each.blocks:
                weight = block.get_submodule("experts").get_parameter("w_in")
                local_of(weight).data.mul_(2) if isinstance(weight, DTensor) else weight.data.mul_(2)
        moecompile.invalidate(model)
        close([run(x)], [reference(x)], 6e-2)
    assert not torch.equal(first, run(x))


def check_verify(rank: int, ranks: int) -> None:
    """The option `verify` compares a block before its exchange, on ranks with different numbers of tokens."""
    model = moecompile.shard_experts(Block(), mesh_of(ranks))
    results(compiled(model, verify="first_call"), model, tokens_of(rank, 5 + rank))
    (graph,) = moecompile.last_report().graphs
    assert graph.verify and "dispatch_start" in graph.after, graph.verify


def check_checkpointed_blocks(rank: int, ranks: int) -> None:
    """Inside checkpointed regions tokens are exchanged as well, and once more where they are computed again."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                made: Any = checkpoint(block, x, use_reentrant=False)
                x = x + made
            return self.last(x)

    model = Checkpointed()
    whole, x = copy.deepcopy(model), tokens_of(rank, 6 + 5 * rank)
    moecompile.shard_experts(model, mesh_of(ranks))
    right = meaned(results(whole, whole, x), whole)
    close(with_mean_of_others(results(compiled(model), model, x), model), right, 1.5e-2)
    after = "".join(graph.after for graph in moecompile.last_report().graphs)
    assert after.count("dispatch_start") == 2 and "gather_experts" not in after


def check_dynamic_shapes(rank: int, ranks: int) -> None:
    """Symbolic numbers of tokens need the option `ep_capacity`; ranks differ, and change, as they like."""
    model = Block()
    whole = copy.deepcopy(model)
    moecompile.shard_experts(model, mesh_of(ranks))
    agreement.forget()
    run = torch.compile(
        model, backend="moecompile", fullgraph=True, dynamic=True, options={"lowering": "eager", "ep_capacity": 32}
    )
    for count in (5, 9, 32):
        x = tokens_of(rank, count - rank)
        close([run(x)], [whole(x)], 1e-2)
    moecompile.reset()
    torch._dynamo.reset()
    agreement.forget()
    try:
        torch.compile(model, backend="moecompile", fullgraph=True, dynamic=True)(tokens_of(rank, 5))
    except Exception as error:
        assert "ep_capacity" in str(error), error
    else:
        raise AssertionError("a symbolic number of tokens was taken without a capacity")


def check_under_inductor(rank: int, ranks: int) -> None:
    model = Block()
    whole, x = copy.deepcopy(model), tokens_of(rank, 6 + 5 * rank)
    moecompile.shard_experts(model, mesh_of(ranks))
    right = meaned(results(whole, whole, x), whole)
    found = results(compiled(model, lowering="inductor"), model, x)
    close(with_mean_of_others(found, model), right, 1.5e-2)
