"""Routers that choose groups of experts first: what is proven of the experts that they choose, and what is not."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moecompile.passes.group_limit import GroupLimit, group_limit
from zoo_capture import captured

EXPERTS, GROUPS, LIMIT, TOP_K, TOKENS = 16, 8, 3, 4, 6
EACH = EXPERTS // GROUPS
LOWEST = float("-inf")
Router = Callable[[Tensor], Tensor]


def best_groups(scores: Tensor) -> Tensor:
    """(T, LIMIT), as DeepSeek-V3 scores them."""
    return scores.view(-1, GROUPS, EACH).topk(2, dim=-1)[0].sum(-1).topk(LIMIT, dim=-1, sorted=False)[1]


def chosen(scores: Tensor) -> Tensor:
    """(T, GROUPS) of ones and zeros."""
    return torch.zeros(scores.shape[0], GROUPS).scatter(1, best_groups(scores), 1)


def of_each(groups: Tensor) -> Tensor:
    """Of each expert what there is of its group."""
    return groups.unsqueeze(-1).expand(-1, GROUPS, EACH).reshape(-1, EXPERTS)


def best(scores: Tensor) -> Tensor:
    """Ids."""
    return scores.topk(TOP_K, dim=-1).indices


def grouped_in_place(scores: Tensor) -> Tensor:
    """As DeepSeek's own code has it."""
    scores = scores.sigmoid().view(-1, GROUPS, EACH)
    indices = scores.amax(-1).topk(LIMIT, dim=-1)[1]
    mask = scores.new_ones(scores.shape[0], GROUPS, dtype=torch.bool).scatter_(1, indices, False)
    return best(scores.masked_fill_(mask.unsqueeze(-1), LOWEST).flatten(1))


def grouped_with_a_statement(scores: Tensor) -> Tensor:
    """As torchtitan has it."""
    mask = torch.ones_like(scores[:, :GROUPS], dtype=torch.bool)
    mask.scatter_(1, best_groups(scores), False)
    return best(scores.view(-1, GROUPS, EACH).masked_fill(mask.unsqueeze(-1), LOWEST).view(-1, EXPERTS))


def kept_by_where(scores: Tensor) -> Tensor:
    """Repeated, compared, and with a tensor of -inf."""
    keep = chosen(scores).repeat_interleave(EACH, dim=-1) != 0
    return best(torch.where(keep, scores, torch.full_like(scores, LOWEST))).to(torch.int32)


PROVEN: dict[str, Router] = {
    "masked": lambda scores: best(scores.masked_fill(~of_each(chosen(scores)).bool(), LOWEST)),
    "compared": lambda scores: best(scores.masked_fill(of_each(chosen(scores)) == 0, LOWEST)),
    "in place": grouped_in_place,
    "with a statement": grouped_with_a_statement,
    "where": kept_by_where,
}


def written_afterwards(scores: Tensor) -> Tensor:
    masked = scores.masked_fill(~of_each(chosen(scores)).bool(), LOWEST)
    masked[:, 0] = 9.0
    return best(masked)


def mask_written_twice(scores: Tensor) -> Tensor:
    mask = torch.zeros(scores.shape[0], GROUPS)
    mask.scatter_(1, best_groups(scores), 1)
    mask.scatter_(1, best_groups(-scores), 1)
    return best(scores.masked_fill(~of_each(mask).bool(), LOWEST))


def mask_written_later(scores: Tensor) -> Tensor:
    """The mask is read before it is one."""
    mask = torch.zeros(scores.shape[0], GROUPS)
    masked = scores.masked_fill(~of_each(mask).bool(), LOWEST)
    mask.scatter_(1, best_groups(scores), 1)
    return best(masked + mask.sum())


def mask_of_some_tokens(scores: Tensor) -> Tensor:
    mask = torch.zeros(scores.shape[0], GROUPS).scatter(1, best_groups(scores)[:-1], 1)
    return best(scores.masked_fill(~of_each(mask).bool(), LOWEST))


def view_of_the_mask_written(scores: Tensor) -> Tensor:
    mask = chosen(scores)
    mask.view(-1).fill_(1)
    return best(scores.masked_fill(~of_each(mask).bool(), LOWEST))


def groups_apart(scores: Tensor) -> Tensor:
    """Every eighth expert is of one group: they are no neighbours."""
    groups = torch.zeros(scores.shape[0], GROUPS).scatter(1, best_groups(scores), 1)
    return best(scores.masked_fill(~groups.repeat(1, EACH).bool(), LOWEST))


def inverted_in_place(scores: Tensor) -> Tensor:
    mask = of_each(chosen(scores)).bool()
    mask.logical_not_()
    return best(scores.masked_fill(mask, LOWEST))


def mask_by_index(scores: Tensor) -> Tensor:
    mask = torch.zeros(scores.shape[0], GROUPS)
    mask[torch.arange(scores.shape[0])[:, None], best_groups(scores)] = 1
    return best(scores.masked_fill(~of_each(mask).bool(), LOWEST))


def written_by_a_list(scores: Tensor) -> Tensor:
    mask = chosen(scores)
    torch._foreach_add_([mask], 1.0)
    return best(scores.masked_fill(~of_each(mask).bool(), LOWEST))


def lowest_written_since(scores: Tensor) -> Tensor:
    low = torch.full_like(scores, LOWEST)
    low.copy_(scores)
    return best(torch.where(of_each(chosen(scores)).bool(), scores, low))


def mask_sorted(scores: Tensor) -> Tensor:
    return best(scores.masked_fill(~of_each(chosen(scores).sort(-1)[0]).bool(), LOWEST))


def heads_instead_of_groups(scores: Tensor) -> Tensor:
    """Of each of several heads all experts or none: a token has heads, and these have experts."""
    heads = scores.view(-1, 1, EXPERTS).expand(-1, GROUPS, EXPERTS)
    mask = torch.zeros(scores.shape[0], GROUPS).scatter(1, best_groups(scores), 1)
    return heads.masked_fill((mask == 0).unsqueeze(-1), LOWEST).topk(TOP_K, -1).indices.view(-1, TOP_K)


def worst_groups(scores: Tensor) -> Tensor:
    """As many, but the mask says which to leave out."""
    return best(scores.masked_fill(of_each(chosen(scores)).bool(), LOWEST))


NOT_PROVEN: dict[str, Router] = {
    "no groups": best,
    "zeros instead of -inf": lambda scores: best(scores.masked_fill(~of_each(chosen(scores)).bool(), 0.0)),
    "the others": worst_groups,
    "scores written": written_afterwards,
    "the mask written twice": mask_written_twice,
    "the mask written later": mask_written_later,
    "a view of it written": view_of_the_mask_written,
    "a mask of some tokens": mask_of_some_tokens,
    "no neighbours": groups_apart,
    "inverted in place": inverted_in_place,
    "a mask by index": mask_by_index,
    "written by a list": written_by_a_list,
    "-inf no more": lowest_written_since,
    "a mask sorted": mask_sorted,
    "heads": heads_instead_of_groups,
    "whole numbers": lambda scores: best(scores.masked_fill(~of_each(chosen(scores)).bool(), LOWEST).to(torch.int8)),
    "bits of a mask": lambda scores: best(scores.masked_fill(of_each(chosen(scores)).view(torch.int32) != 1, LOWEST)),
    "added to": lambda scores: best(scores.masked_fill(~of_each(chosen(scores)).bool(), LOWEST).nan_to_num(0, 0, 0)),
    "the smallest": lambda scores: (
        scores.masked_fill(~of_each(chosen(scores)).bool(), LOWEST).topk(TOP_K, largest=False).indices
    ),
    "two tokens in a line": lambda scores: best(scores.masked_fill(~of_each(chosen(scores)).bool(), LOWEST)).view(
        -1, 2 * TOP_K
    ),
    "a part of the ids": lambda scores: best(scores.masked_fill(~of_each(chosen(scores)).bool(), LOWEST))[:, 1:],
    "more than groups have": lambda scores: (
        scores.masked_fill(~of_each(chosen(scores)).bool(), LOWEST).topk(LIMIT * EACH + 1).indices
    ),
}


class Routing(nn.Module):
    """A router that is a function."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, scores: Tensor) -> Tensor:
        """Ids."""
        return self.router(scores)


def proven(module: nn.Module, given: Tensor, which: int = 0) -> GroupLimit | None:
    """Of the ids that a module gives."""
    graph = captured(module, (given,), fullgraph=True).gm.graph
    outputs: Any = graph.output_node().args[0]
    return group_limit(outputs[which], EXPERTS)


@pytest.mark.parametrize("name", PROVEN)
def test_proven(name: str) -> None:
    scores = torch.randn(TOKENS, EXPERTS)
    assert proven(Routing(PROVEN[name]), scores) == GroupLimit(LIMIT, GROUPS)
    groups = PROVEN[name](scores.clone()) // EACH
    assert all(len(set(line.tolist())) <= LIMIT for line in groups)


@pytest.mark.parametrize("name", NOT_PROVEN)
def test_not_proven(name: str) -> None:
    assert proven(Routing(NOT_PROVEN[name]), torch.randn(TOKENS, EXPERTS)) is None


@pytest.mark.parametrize(
    ("model", "router", "is_proven"),
    [
        ("deepseek_v3", "DeepseekV3TopkRouter", True),
        ("deepseek_v2", "DeepseekV2TopkRouter", False),  # masks with 0: as low as scores that softmax rounds to it
    ],
)
def test_routers_of_transformers(model: str, router: str, is_proven: bool) -> None:
    transformers = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    if not hasattr(transformers, router):
        pytest.skip(f"this transformers has no {router}")
    config = getattr(transformers, router.replace("TopkRouter", "Config"))(
        hidden_size=64, n_routed_experts=EXPERTS, n_group=GROUPS, topk_group=LIMIT, num_experts_per_tok=TOP_K,
        topk_method="group_limited_greedy",
    )  # fmt: skip
    found = proven(getattr(transformers, router)(config), torch.randn(TOKENS, 64), which=-1)
    assert (found == GroupLimit(LIMIT, GROUPS)) is is_proven


def test_parts_that_are_met() -> None:
    """Nodes, say: against all ways to choose groups."""
    for number, chosen_groups, parts in itertools.product((2, 4, 8), (1, 2, 3), (1, 2, 4, 8)):
        if chosen_groups > number:
            continue
        experts, size = 16, 16 // number
        most = max(
            len({expert * parts // experts for group in some for expert in range(group * size, group * size + size)})
            for some in itertools.combinations(range(number), chosen_groups)
        )
        assert GroupLimit(chosen_groups, number).parts_met(parts, experts) == most
