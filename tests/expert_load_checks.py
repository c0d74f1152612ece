"""How many tokens each expert was assigned, over ranks: what they check together (tests/test_expert_load.py)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, distributed, nn

import moecompile
import token_exchange_checks
from expert_parallel_models import EXPERTS, MANY, TOP_K, Model, compiled, hide_as_on_gpus, mesh_of, results, tokens_of
from token_exchange_models import Exchanging

hide_as_on_gpus()
CALLS = 3
PATHS = ["blocks.0.experts", "blocks.1.experts"]


def of_tokens(model: Any, x: Tensor) -> Tensor:
    """What both blocks are assigned by a model whose routers read what the first block reads, (2, E)."""
    with torch.no_grad():
        routed = model.first(x)
        ids = [block.router(routed).float().softmax(-1).topk(TOP_K, -1).indices for block in model.blocks]
    return torch.stack([torch.bincount(each.reshape(-1), minlength=EXPERTS) for each in ids])


def counted(model: nn.Module) -> Tensor:
    """What was counted, (2, E), after a look at what it is counted in."""
    found = moecompile.expert_load(model)
    assert list(found) == PATHS and all(each.dtype == torch.int64 for each in found.values()), found
    return torch.stack([*found.values()])


def all_ranks(own: Tensor) -> Tensor:
    """Summed, as users do it."""
    total = own.clone()
    distributed.all_reduce(total)
    return total


def check(rank: int, ranks: int, counts: list[int], word: str, train: bool = False, **options: Any) -> None:
    """Calls of a sharded model add what this rank's own tokens were assigned, and compute what they do uncounted."""
    hidden = 256 if options.get("precision") == "fp8" else 64
    options |= {"fp8_exclude": ("first",)} if hidden == 256 else {}
    whole, x = Model(hidden, hidden // 2, fixed=True), tokens_of(rank, counts[rank], hidden=hidden)
    model, other = copy.deepcopy(whole), copy.deepcopy(whole)
    expected = of_tokens(whole, x)
    found = []
    for each, counts_them in ((model, True), (other, False)):
        moecompile.shard_experts(each, mesh_of(ranks))
        run = compiled(each, expert_load=counts_them, **options)
        with torch.set_grad_enabled(train):
            found.append([results(run, each, x) if train else [run(x)] for _ in range(CALLS)][-1])
        assert word in moecompile.last_report().graphs[-1].after
    assert all(torch.equal(one, another) for one, another in zip(*found, strict=True))
    assert torch.equal(counted(model), CALLS * expected) and moecompile.expert_load(other) == {}
    total = all_ranks(counted(model))
    assert torch.equal(total, CALLS * all_ranks(expected)) and int(total.sum()) == CALLS * 2 * TOP_K * sum(counts)
    for load in moecompile.expert_load(model).values():
        load.zero_()
    assert not counted(model).any()


def check_training(rank: int, ranks: int) -> None:
    check(rank, ranks, [5 + 4 * each for each in range(ranks)], "exchanged_experts", train=True)


def check_one_operator_after_the_other(rank: int, ranks: int) -> None:
    check(rank, ranks, [5 + 4 * each for each in range(ranks)], "dispatch_start", train=True, disable=("hide",))
    torch._dynamo.reset()  # or sizes become symbols
    check(rank, ranks, [9] * ranks, "experts_fp8", train=True, precision="fp8", disable=("hide",))


def check_inductor(rank: int, ranks: int) -> None:
    check(rank, ranks, [5 + 4 * each for each in range(ranks)], "exchanged_experts", train=True, lowering="inductor")


def check_fp8(rank: int, ranks: int) -> None:
    check(rank, ranks, [9] * ranks, "quantize_weights", train=True, precision="fp8")


def check_a_rank_without_tokens_counts_none(rank: int, ranks: int) -> None:
    """And has the tensors, for who sums them over ranks."""
    check(rank, ranks, [7, *[0] * (ranks - 1)], "exchanged_experts", train=True)


def check_hidden(rank: int, ranks: int) -> None:
    check(rank, ranks, [MANY, *[MANY // 2] * (ranks - 1)], "exchanged_experts")


def check_hidden_in_fp8(rank: int, ranks: int) -> None:
    check(rank, ranks, [MANY] * ranks, "exchanged_experts", precision="fp8", fp8_cache_weights=True)


def check_hidden_without_tokens(rank: int, ranks: int) -> None:
    check(rank, ranks, [MANY, *[0] * (ranks - 1)], "exchanged_experts")


def check_not_hidden(rank: int, ranks: int) -> None:
    check(rank, ranks, [MANY] * ranks, "dispatch_start", disable=("hide",))


def check_gathered(rank: int, ranks: int) -> None:
    check(rank, ranks, [6, *[0] * (ranks - 1)], "gather_experts", disable=("exchange",))


def check_models_that_exchange_tokens_themselves(rank: int, ranks: int) -> None:
    """All ranks' experts, counted where the tokens are."""
    model = token_exchange_checks.made(Exchanging)
    x = token_exchange_checks.tokens_of(rank, 6 + 5 * rank)
    asked: list[Tensor] = []
    hook = model.get_submodule("router").register_forward_hook(lambda *given: asked.append(given[2]))
    model(x)
    hook.remove()
    run = token_exchange_checks.compiled(model, expert_load=True)
    run(x)
    assert "count_experts" in moecompile.last_report().graphs[-1].after
    (load,) = moecompile.expert_load(model).values()
    (scores,) = asked
    top_k = int(load.sum()) // x.shape[0]
    assert top_k >= 1
    expected = torch.bincount(scores.topk(top_k, -1).indices.reshape(-1), minlength=scores.shape[-1])
    assert torch.equal(load, expected), (load, expected)


def check_fsdp(rank: int, ranks: int) -> None:
    """FSDP2 of everything but the experts of one block, whose own parameters are gathered for each forward."""
    from torch.distributed.fsdp import fully_shard

    model: Any = Model(fixed=True)
    whole, x = copy.deepcopy(model), tokens_of(rank, 6 + 5 * rank)
    for block in model.blocks:
        fully_shard(block.experts, mesh=mesh_of(ranks))
    fully_shard(model, mesh=mesh_of(ranks))
    for block in model.blocks:
        block.experts.forward = compiled(block.experts.forward, expert_load=True)
    for _ in range(2):
        model(x).float().sum().backward()
    assert torch.equal(counted(model), 2 * of_tokens(whole, x))
    (load,) = moecompile.expert_load(model.blocks[1].experts).values()
    assert load is moecompile.expert_load(model)[PATHS[1]]
