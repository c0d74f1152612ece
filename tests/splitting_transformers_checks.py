"""Training steps of transformers' models between ranks, on two halves of their batch (tests/test_splitting.py)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import moecompile
from expert_parallel_models import close, mesh_of
from overlap_checks import notes
from splitting_checks import compiled
from tiny_sizes import Sizes
from tiny_transformers import build_model

BATCH, LENGTH = 4, 8


def model_of(name: str) -> Any:
    """Of two layers; the same on all ranks."""
    model: Any = build_model(name, torch.float32, "grouped_mm", Sizes(layers=2))
    model.config.use_cache = False
    return model


class Step(nn.Module):
    """What is trained: the loss that the model itself computes of labels, and its logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(input_ids=ids, labels=ids)
        return out.loss, out.logits


def trained(run: Any, model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Loss, logits and the gradients of all parameters, whole."""
    model.zero_grad()
    loss, logits = run(ids)
    loss.backward()
    found = [loss.detach(), logits.detach()]
    for parameter in model.parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found.append(grad.full_tensor() if isinstance(grad, DTensor) else grad)
    return found


def trains(name: str, ranks: int, words: str) -> None:
    """The layers run on halves, the loss on all of it; all is what it is without moecompile."""
    model = model_of(name)
    whole = Step(copy.deepcopy(model))
    moecompile.shard_experts(model, mesh_of(ranks), gradients="sum")
    step = Step(model)
    ids = torch.randint(3, 256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(7))
    right = trained(whole, whole, ids)
    moecompile.mark_batch(ids)
    found = trained(compiled(step, ep_capacity=BATCH * LENGTH), step, ids)
    assert words in notes(), notes()
    for place, parameter in enumerate(model.parameters(), 2):
        if isinstance(parameter, DTensor):  # of all ranks' tokens, which are the same here
            right[place] *= ranks
    close(found, right, 1e-4)


def check_a_step_of_qwen3_moe(rank: int, ranks: int) -> None:
    trains("qwen3_moe", ranks, "microbatches: two halves of the batch, 2 exchanges of each")


def check_a_step_of_deepseek_v3(rank: int, ranks: int) -> None:
    trains("deepseek_v3", ranks, "microbatches: two halves of the batch, 2 exchanges of each")
