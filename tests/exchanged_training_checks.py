"""Blocks and their exchange as one operator there and one back, what ranks check together (test_exchanged_training.py).

On GPUs kernels exchange tokens; here collectives do, and the operators run what those of `disable=("hide",)` do.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

import torch
from torch import Tensor, nn

import moecompile
from expert_parallel_models import (
    Block,
    Checkpointed,
    Experts,
    Model,
    close,
    compiled,
    hide_as_on_gpus,
    mesh_of,
    ops,
    results,
    tokens_of,
)
from moecompile.report import GraphReport

hide_as_on_gpus()
CAPACITY = 24
ALONE = ("dispatch_start", "combine_wait", "to_lines")


def step(model: nn.Module, *given: Tensor, **options: Any) -> tuple[list[Tensor], GraphReport]:
    """Result and gradients, and what was compiled."""
    model.zero_grad(set_to_none=True)
    found = [each.clone() for each in results(compiled(model, **{"ep_capacity": CAPACITY, **options}), model, *given)]
    return found, moecompile.last_report().graphs[-1]


def is_one_operator(graph: GraphReport) -> bool:
    """There, and back; of nothing else there is any trace."""
    texts = graph.after, str(graph.forward), str(graph.backward)
    names = "exchanged_experts(", "exchanged_experts_forward", "exchanged_experts_backward"
    whole = all(name in text for name, text in zip(names, texts, strict=True))
    return whole and not any(name in text for name in ALONE for text in texts)


def compare(rank: int, ranks: int, model: nn.Module, hidden: int = 64, bound: float = 0.0, **options: Any) -> None:
    """The bits of one step after the other."""
    x = tokens_of(rank, 6 + 5 * rank, hidden=hidden)
    moecompile.shard_experts(model, mesh_of(ranks))
    found, graph = step(model, x, **options)
    right, before = step(model, x, disable=("hide",), **options)
    assert is_one_operator(graph), graph.after
    assert "dispatch_start" in before.after and "exchanged_experts" not in before.after
    assert "hidden" not in str(graph.notes)
    close(found, right, bound)


def check_same_numbers(rank: int, ranks: int) -> None:
    compare(rank, ranks, Model())


def check_same_numbers_in_fp8(rank: int, ranks: int) -> None:
    compare(rank, ranks, Block(256, 128), 256, precision="fp8")


def check_rows_that_do_not_travel_in_lines(rank: int, ranks: int) -> None:
    """Of features that lines do not have."""
    compare(rank, ranks, Block(136, 64), 136, precision="fp8")


def check_recomputed(rank: int, ranks: int) -> None:
    compare(rank, ranks, Model(), recompute=True)
    compare(rank, ranks, Block(256, 128), 256, precision="fp8", recompute=True, fp8_scale_format="float32")


def check_copies_that_are_held_or_not(rank: int, ranks: int) -> None:
    for recompute in (False, True):
        for name in ("fp8_cache_weights", "fp8_recast_weights"):
            compare(rank, ranks, Block(256, 128), 256, precision="fp8", recompute=recompute, **{name: True})


def check_dispatched_again(rank: int, ranks: int) -> None:
    for precision in ("model", "fp8"):
        compare(rank, ranks, Block(256, 128), 256, precision=precision, ep_dispatch_again=True)
        graph = moecompile.last_report().graphs[-1]
        assert "the backward has tokens dispatched again, 1 times" in str(graph.notes)


def check_what_is_held(rank: int, ranks: int) -> None:
    """Rows of all ranks, or of this one where they are dispatched again."""
    model, x = Block(), tokens_of(rank, 6 + 5 * rank)
    moecompile.shard_experts(model, mesh_of(ranks))
    held = rf"input saved\s*: \w+\[{ranks * CAPACITY}, 64\]"
    for again in (False, True):
        _, graph = step(model, x, ep_dispatch_again=again)
        assert is_one_operator(graph) and bool(re.search(held, str(graph.backward))) != again, graph.backward


def check_checkpointed(rank: int, ranks: int) -> None:
    model = Checkpointed()
    compare(rank, ranks, model)
    _, graph = step(model, tokens_of(rank, 6 + 5 * rank), ep_dispatch_again=True)
    assert "dispatched again" not in str(graph.notes)
    assert str(graph.backward).count("exchanged_experts_forward") == 1, "nothing of it is held"


def check_inductor(rank: int, ranks: int) -> None:
    compare(rank, ranks, Model(fixed=True), bound=1.5e-2, lowering="inductor")


def check_a_rank_without_tokens(rank: int, ranks: int) -> None:
    model, x = Model(), tokens_of(rank, 6 if rank else 0)
    moecompile.shard_experts(model, mesh_of(ranks))
    (found, graph), (right, _) = (step(model, x, disable=disabled) for disabled in ((), ("hide",)))
    assert is_one_operator(graph)
    close(found, right, 0.0)


def check_main_gradients(rank: int, ranks: int) -> None:
    """What kernels, or PyTorch, add to."""
    for precision in ("model", "fp8"):
        model, x = Block(256, 128), tokens_of(rank, 6 + 5 * rank, hidden=256)
        moecompile.shard_experts(model, mesh_of(ranks))
        sharded: list[Any] = [each for name, each in model.named_parameters() if "w_" in name]
        found = []
        for disabled in ((), ("hide",)):
            for each in sharded:
                each.main_grad = torch.ones(each.to_local().shape)
            run = compiled(model, ep_capacity=CAPACITY, main_grad=True, precision=precision, disable=disabled)
            run(x).float().pow(2).sum().backward()
            graph = moecompile.last_report().graphs[-1]
            adding = "exchanged_experts(" in graph.after and "main_w_in=" in graph.after
            assert adding != bool(disabled), graph.after
            found.append([each.main_grad for each in sharded])
        assert all(bool((one != 1).any()) and torch.equal(one, other) for one, other in zip(*found, strict=True))


def check_gradients_that_nobody_needs(rank: int, ranks: int) -> None:
    """Of tokens, of weights, of both: nothing goes back then; of one matrix."""
    for frozen in (("x",), ("weights",), ("x", "weights"), ("w_in",), ("w_in", "w_out")):
        torch._dynamo.reset()
        model, count = Experts(), 6 + 5 * rank
        moecompile.shard_experts(model, mesh_of(ranks))
        for name, each in model.named_parameters():
            each.requires_grad_(name not in frozen)
        ids = torch.arange(2 * count).view(count, 2) % 8
        found = []
        for disabled in ((), ("hide",)):
            x, weights = tokens_of(rank, count), torch.rand(count, 2, generator=torch.Generator().manual_seed(rank))
            leaves = {"x": x, "weights": weights, **dict(model.named_parameters())}
            for name in ("x", "weights"):
                leaves[name].requires_grad_(name not in frozen)
            model.zero_grad()
            compiled(model, ep_capacity=CAPACITY, disable=disabled)(x, ids, weights).float().pow(2).sum().backward()
            text = moecompile.last_report().graphs[-1].after
            assert ("exchanged_experts" in text) != bool(disabled)
            grads = {name: each.grad for name, each in leaves.items()}
            assert {name for name, each in grads.items() if each is None} == set(frozen)
            found.append([getattr(each, "_local_tensor", each) for each in grads.values() if each is not None])
        mine, right = found
        close(mine, right, 0.0)


def arguments(
    rank: int, ranks: int, x: Tensor, fp8: bool = False, backward: bool = True
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Of the operator by itself, for few tokens."""
    ids, weights = torch.arange(x.shape[0]).unsqueeze(1) % ranks, torch.ones(x.shape[0], 1)
    sent, home = ops.exchange_plan(ids, num_experts=ranks, ranks=ranks, capacity=4)
    generator = torch.Generator().manual_seed(rank)
    w_in, w_out = (torch.randn(1, *each, generator=generator).bfloat16() for each in ((256, x.shape[1]), (128, 128)))
    copies = [
        *ops.quantize_weights(w_in, gate_up="halves", backward=backward),
        *ops.quantize_weights(w_out, backward=backward),
    ]
    among = {"ranks": ranks, "group": mesh_of(ranks).get_group().group_name, "capacity": 4, "slot": 0, "sms": 4}
    attributes = {"activation": "mul(silu(gate), up)", "gate_up": "halves", "num_experts": ranks, "patience": 10.0}
    attributes |= {"output": "mul(out, cast(weight, bfloat16))", "quantized": copies if fp8 else [], **among}
    return (x, ids, weights, sent, home, w_in, w_out), attributes


def call(rank: int, ranks: int, x: Tensor, fp8: bool = False, backward: bool = True, **more: Any) -> Tensor:
    """The operator by itself."""
    tensors, attributes = arguments(rank, ranks, x, fp8, backward)
    found: Tensor = ops.exchanged_experts(*tensors, **attributes, **more)
    return found


def check_fakes(rank: int, ranks: int) -> None:
    """Shapes, dtypes and strides of what the operators give, and that they write into nothing they should not."""
    for fp8 in (False, True):
        tests = ("test_faketensor",) if fp8 else ("test_schema", "test_faketensor")  # which cannot compare e4m3
        for more in ({}, {"again": True}, {"recompute": True}, {"room": 3}):
            x = tokens_of(rank, 4, hidden=128)
            tensors, attributes = arguments(rank, ranks, x, fp8)
            given = attributes | more
            torch.library.opcheck(ops.exchanged_experts_forward, tensors, given, test_utils=tests)
            result, saved = ops.exchanged_experts_forward(*tensors, **given)
            returning = (result, saved, x if "again" in more else None, *tensors[3:])
            needs = [True] * 4 + [False] * 4
            torch.library.opcheck(ops.exchanged_experts_backward, returning, given | {"needs": needs}, test_utils=tests)
            given |= {"needs": [True, True, False, True, *[False] * 4], "main_w_in": torch.zeros(1, 256, 128)}
            torch.library.opcheck(ops.exchanged_experts_backward_adding, returning, given, test_utils=tests)


def check_without_a_compiler(rank: int, ranks: int) -> None:
    """The operator differentiates as it is."""
    for fp8 in (False, True):
        x = tokens_of(rank, 4, hidden=128).requires_grad_()
        call(rank, ranks, x, fp8).float().sum().backward()
        assert x.grad is not None and bool(x.grad.any())
        with torch.no_grad():
            assert torch.equal(call(rank, ranks, x, fp8), call(rank, ranks, x, fp8, recompute=True, held=True))


def check_what_is_refused(rank: int, ranks: int) -> None:
    """Before anything is exchanged: copies that the backward lacks, no main gradients, second derivatives."""
    x = tokens_of(rank, 4, hidden=128).requires_grad_()
    refused = (
        (ValueError, "backward needs copies", {"fp8": True, "backward": False}),
        (TypeError, "main_w_in must be float32", {"main_w_in": torch.zeros(1, 256, 128).bfloat16()}),
        (ValueError, "main_w_in must have the shape", {"main_w_in": torch.zeros(1, 256, 64)}),
    )
    for kind, words, given in refused:
        said = ""
        try:
            call(rank, ranks, x, **given)
        except kind as error:
            said = str(error)
        assert words in said, said
    for by in (0, 2):  # x, weights
        tensors, attributes = arguments(rank, ranks, x)
        tensors[2].requires_grad_()
        found = ops.exchanged_experts(*tensors, **attributes)
        (grad,) = torch.autograd.grad(found.float().sum(), x, create_graph=True)
        with contextlib.suppress(RuntimeError):
            torch.autograd.grad(grad.float().sum(), tensors[by], allow_unused=True)
            raise AssertionError("there is no second derivative")


def check_weights_whose_gradient_one_rank_asks_for(rank: int, ranks: int) -> None:
    """What travels is the same."""
    for fp8 in (False, True):
        x = tokens_of(rank, 4, hidden=128).requires_grad_()
        tensors, attributes = arguments(rank, ranks, x, fp8)
        tensors[2].requires_grad_(rank == 0)
        ops.exchanged_experts(*tensors, **attributes).float().sum().backward()
        assert x.grad is not None and (tensors[2].grad is None) == (rank > 0)
