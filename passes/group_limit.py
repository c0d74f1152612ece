"""How many groups of experts a token's experts lie in at most, where a router has chosen groups first.

Contract: looks at a graph, and changes nothing. What is not proven is None.

    groups = topk(of each group of neighbouring experts a score, g).indices
    chosen = zeros(T, G).scatter(1, groups, 1)              or ones, and 0: what is not chosen
    scores = scores.masked_fill(~chosen of each expert, -inf)
    ids = topk(scores, K).indices                           g of G groups

(DeepSeek-V3, section 2.1.2, and as transformers and torchtitan write it.) A mask of another number than -inf proves
nothing: scores below it, or as low, would be chosen from other groups. (So would others where a router's own scores are
-inf. What is said here is what travels, and no result depends on it.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from moecompile.passes.aliases import Aliases, fake_of
from moecompile.passes.calls import Call, bind, writes

SAME = ("cast", "contiguous", "clone")
WITH_INFINITY = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int16, torch.int32, torch.int64)
RESHAPES = ("view", "view_as", "flatten", "unflatten")


@dataclass(frozen=True)
class GroupLimit:
    """Of `number` groups of neighbouring experts, equal in size, those of a token lie in `chosen` at most."""

    chosen: int
    number: int

    def parts_met(self, parts: int, num_experts: int) -> int:
        """Of equal parts that experts are divided into in their order, those that a token meets at most."""
        size, of_part = num_experts // self.number, num_experts // parts
        spans = [(group * size + size - 1) // of_part - group * size // of_part + 1 for group in range(self.number)]
        return min(parts, sum(sorted(spans)[-self.chosen :]))


@dataclass(frozen=True)
class _Mask:
    """What is known of a mask: which groups it tells apart, and how.

    Attributes:
        limit: of the groups.
        chosen: what it is, true or false, where a group was chosen.
        each: whether its last dimension is of experts, and not one of groups and one within each.
        size: of the last dimension where that is within groups; 0 where the last is of groups.
    """

    limit: GroupLimit
    chosen: bool
    each: bool = False
    size: int = 0


def group_limit(ids: fx.Node, num_experts: int) -> GroupLimit | None:
    """Of the experts of tokens, a line of `ids` for each; None if nothing is proven.

    Args:
        ids: (T, K) integers of a graph of Dynamo's.
        num_experts: that they are of.
    """
    return _Proof(Aliases(ids.graph)).of_ids(ids, num_experts)


class _Proof:
    """What numbers are at the moment when `reader` reads them: others may write into a tensor before and after."""

    def __init__(self, aliases: Aliases) -> None:
        self._aliases = aliases

    def of_ids(self, ids: fx.Node, num_experts: int) -> GroupLimit | None:
        """See `group_limit`."""
        top_k = _last(ids)
        topk = self._choice(ids, None)
        if topk is None or topk["k"] != top_k or _last(topk["input"]) != num_experts:
            return None
        limit = self._of_scores(topk["input"], topk.node, False)
        if limit is None or num_experts % limit.number or limit.chosen * (num_experts // limit.number) < top_k:
            return None
        return limit

    def _call(self, node: Any, reader: fx.Node | None) -> Call | None:
        """What has made a node's numbers as they are: itself, or what has written them since."""
        if not isinstance(node, fx.Node):
            return None
        call = bind(node)
        if call is not None and not call.inplace and _shares(node, call.arguments.get("input")):
            return call  # a view: it is what it is a view of that may be written
        written = self._aliases.written
        writers = {
            user: alias
            for alias in self._aliases.of(node)
            for user in alias.users
            if writes(user) and any(each is alias for each in written(user))
        }
        before = [writer for writer in writers if reader is None or writer < reader]
        if not before:
            return call
        same = len(before) == 1 and self._aliases.same_elements(writers[before[0]], node)
        return bind(before[0]) if same else None

    def _choice(self, node: Any, reader: fx.Node | None) -> Call | None:
        """The topk of the largest along the last dimension whose indices these are, line by line."""
        call = self._call(node, reader)
        while call is not None and (
            call.name in SAME or (call.name in RESHAPES and _last(node) == _last(call["input"]))
        ):
            if fake_of(node).dtype not in INTEGERS:
                return None
            reader = reader if _shares(node, call["input"]) else node
            node = call["input"]
            call = self._call(node, reader)
        second = call is not None and (
            (call.name == "getitem" and call["index"] == 1) or (call.name == "getattr" and call["name"] == "indices")
        )
        topk = bind(call["input"]) if second and call is not None and isinstance(call["input"], fx.Node) else None
        if topk is None or topk.name != "topk" or topk["largest"] is not True or not isinstance(topk["k"], int):
            return None
        return topk if topk["dim"] in (-1, fake_of(topk["input"]).dim() - 1) else None

    def _of_scores(self, scores: Any, reader: fx.Node, split: bool) -> GroupLimit | None:
        """Of scores that are -inf but for experts of chosen groups; split: in their last two dimensions, by groups."""
        call = self._call(scores, reader)
        if call is None:
            return None
        if call.name in RESHAPES and _joins_groups(call) and not split:
            inner = call["input"]
            found = self._of_scores(inner, reader if _shares(scores, inner) else call.node, True)
            return found if found is not None and found.number == _last(inner, 2) else None
        if call.name in SAME:
            if fake_of(call.node).dtype not in WITH_INFINITY:
                return None
            return self._of_scores(call["input"], reader if _shares(scores, call["input"]) else call.node, split)
        if call.name == "masked_fill" and self._is_lowest(call["value"], call.node):
            return self._by(call["mask"], call.node, False, split)
        if call.name == "where" and self._is_lowest(call["other"], call.node):
            return self._by(call["condition"], call.node, True, split)
        return None

    def _by(self, mask: Any, scores: fx.Node, keeps: bool, split: bool) -> GroupLimit | None:
        """Of scores that are left as they are where a mask is that."""
        found = self._mask(mask, scores)
        if found is None or found.chosen is not keeps:
            return None
        if found.each is split:
            return None
        if found.each:
            return found.limit if _last(mask) == _last(scores) else None
        within = found.size in (1, _last(scores)) and _last(scores, 2) == found.limit.number
        return found.limit if found.size and within else None

    def _mask(self, node: Any, reader: fx.Node) -> _Mask | None:
        """What is known of a mask."""
        call = self._call(node, reader)
        if call is None:
            return None
        if call.name == "scatter":
            return self._scattered(call)
        if call.inplace:
            return None
        inner = call.arguments.get("input")
        found = self._mask(inner, reader if _shares(node, inner) else call.node)
        return None if found is None or call.inplace else _seen_as(found, call)

    def _scattered(self, call: Call) -> _Mask | None:
        """A mask of groups that a topk has chosen, line by line."""
        filled, value = self._filled(call["input"], call.node), call["src"]
        if filled is None or call["reduce"] is not None or not isinstance(value, (bool, int, float)):
            return None
        topk, number = self._choice(call["index"], call.node), _last(call["input"])
        along = call["dim"] in (-1, fake_of(call["input"]).dim() - 1)
        if value not in (0, 1) or bool(value) is filled or topk is None or not along:
            return None
        lines = _sizes(call["index"])[:-1] == _sizes(call["input"])[:-1]  # each of them has its own
        of_groups = lines and _last(topk["input"]) == number and _last(call["index"]) == topk["k"]
        return _Mask(GroupLimit(topk["k"], number), bool(value)) if of_groups else None

    def _filled(self, node: Any, reader: fx.Node) -> bool | None:
        """Of a tensor that is all zeros or all ones which of the two; None of any other."""
        call = self._call(node, reader)
        if call is None:
            return None
        if call.name in ("zeros", "ones"):
            return call.name == "ones"
        value = call["fill_value"] if call.name in ("full", "full_like", "new_full") else None
        return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None

    def _is_lowest(self, value: Any, reader: fx.Node) -> bool:
        """Whether it is -inf, or a tensor that is full of it."""
        call = self._call(value, reader)
        if call is not None and call.name in ("full", "full_like", "new_full"):
            value = call["fill_value"]
        return isinstance(value, float) and value == -math.inf


def _seen_as(mask: _Mask, call: Call) -> _Mask | None:
    """A mask after one more operation."""
    fake = fake_of(call.node)
    if not isinstance(fake, torch.Tensor) or (call.name in RESHAPES and fake.dtype != fake_of(call["input"]).dtype):
        return None
    shape, number = fake.shape, mask.limit.number
    last, of_groups = len(shape) - 1, not mask.size and not mask.each
    if call.name in SAME:
        return mask if fake.dtype in (torch.bool, *INTEGERS, *WITH_INFINITY) else None
    if call.name == "invert" and fake_of(call["input"]).dtype == torch.bool:
        return replace(mask, chosen=not mask.chosen)
    if call.name in ("eq", "ne") and isinstance(call["other"], (bool, int, float)) and call["other"] in (0, 1):
        same = (call["other"] == 1) is (call.name == "eq")
        return mask if same else replace(mask, chosen=not mask.chosen)
    if call.name == "unsqueeze" and of_groups:
        return replace(mask, size=1) if call["dim"] in (-1, last) else None
    if call.name in ("expand", "expand_as") and mask.size == 1 and shape[-2] == number:
        return replace(mask, size=int(shape[-1]))
    if call.name == "repeat_interleave" and of_groups:
        along = isinstance(call["repeats"], int) and call["dim"] in (-1, last)
        return replace(mask, each=True) if along and shape[-1] == number * call["repeats"] else None
    if call.name in RESHAPES and mask.size and _joins_groups(call):
        return replace(mask, each=True, size=0)
    same = _last(call.node) == _last(call["input"]) >= 0 and (not mask.size or _last(call.node, 2) == number)
    if call.name in RESHAPES and same:
        return mask
    return None


def _shares(node: fx.Node, other: Any) -> bool:
    """Whether two tensors are of the same memory."""
    fakes = [fake_of(each) if isinstance(each, fx.Node) else None for each in (node, other)]
    storages = [fake.untyped_storage()._cdata for fake in fakes if isinstance(fake, torch.Tensor)]
    return len(storages) == 2 and storages[0] == storages[1]


def _joins_groups(call: Call) -> bool:
    """Whether a reshape makes one dimension of the last two; what it makes of the others is no matter."""
    groups, each = _last(call["input"], 2), _last(call["input"])
    return groups > 0 and each > 0 and _last(call.node) == groups * each


def _sizes(node: fx.Node) -> list[str]:
    """As they are written: comparing symbols would decide what they are."""
    return [str(size) for size in fake_of(node).shape]


def _last(node: Any, which: int = 1) -> int:
    """The size of the last dimension, or of one before; -1 where it is not known, or there is none."""
    shape = getattr(fake_of(node), "shape", ()) if isinstance(node, fx.Node) else ()
    size = shape[-which] if len(shape) >= which else -1
    return size if isinstance(size, int) else -1
