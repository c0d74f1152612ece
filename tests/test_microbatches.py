"""Graphs on two halves of their batch: what runs twice, what stays, and what is refused; beside the graph as it was."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moecompile.passes import microbatches
from moecompile.passes.batch_meanings import NotProvenError

H = 6


class Counting(nn.Module):
    """Has a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(H))
        self.linear = nn.Linear(H, H)


def split_of(function: Callable[..., Any], *inputs: Tensor) -> tuple[Any, list[microbatches.Split]]:
    """Runs it on halves, if it can be; and how it was split."""
    found: list[microbatches.Split] = []

    def backend(gm: Any, given: Any) -> Any:
        found.append(microbatches.split(gm))
        return found[-1].graph.forward

    torch._dynamo.reset()
    for each in inputs:
        torch._dynamo.mark_dynamic(each, 0)
    return torch.compile(function, backend=backend, fullgraph=True)(*inputs), found


def calls(found: list[microbatches.Split], name: str) -> int:
    return sum(name in str(node.target) for node in found[-1].graph.graph.nodes if node.op.startswith("call"))


def both(function: Callable[..., Any], *inputs: Tensor) -> list[microbatches.Split]:
    """Of results and gradients, that are the same as if it were whole."""
    given, same = ([each.clone().requires_grad_(each.is_floating_point()) for each in inputs] for _ in range(2))
    result, found = split_of(function, *given)
    right = function(*same)
    for one, other in zip(*(each if isinstance(each, tuple) else (each,) for each in (result, right)), strict=True):
        torch.testing.assert_close(one, other)
        if one.requires_grad:
            one.sum().backward(retain_graph=True)
            other.sum().backward(retain_graph=True)
    for one, other in zip(given, same, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    return found


def rows(batch: int = 8) -> Tensor:
    return torch.randn(batch, 3, H, generator=torch.Generator().manual_seed(0))


def test_all_of_it_on_halves() -> None:
    linear = nn.Linear(H, H)
    found = both(lambda x: linear(x).relu(), rows())
    assert calls(found, "linear") == 2 and calls(found, "cat") == 1 and found[-1].whole == ()


def test_a_loss_stays_whole() -> None:
    linear = nn.Linear(H, H)
    found = both(lambda x: (linear(x).square().mean(), linear(x) + 1), rows())
    assert calls(found, "linear") == 4 and calls(found, "mean") == 1
    assert found[-1].whole == ("aten.mean.default goes along the batch",)


def test_what_is_made_of_statistics_stays_whole() -> None:
    """And what does not read them runs on halves, before and behind."""
    first, second = nn.Linear(H, H), nn.Linear(H, H)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = first(x)
        centred = x - x.mean((0, 1))
        return second(x).sin(), centred.cos()

    found = both(run, rows())
    assert calls(found, "linear") == 4 and calls(found, "sin") == 2 and calls(found, "cos") == 1


def test_what_is_shared_is_made_once() -> None:
    table = torch.randn(3, H)
    found = both(lambda x: x * table.exp() + x.sin(), rows())
    assert calls(found, "exp") == 1 and calls(found, "sin") == 2


def test_a_batch_in_the_second_dimension() -> None:
    found = both(lambda x: x.transpose(0, 1).contiguous() * 2, rows())
    (joined,) = (node for node in found[-1].graph.graph.nodes if node.target is torch.cat)
    assert joined.args[1] == 1


def test_sizes_are_of_the_half_in_halves_and_of_the_whole_behind() -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.view(x.shape[0] * 3, H).sin()
        return flat.view(x.size(0), -1), flat.sum() / x.shape[0]

    found = both(run, rows())
    assert calls(found, "sin") == 2


def test_several_inputs_and_ids() -> None:
    table = nn.Embedding(5, H)
    ids = torch.randint(0, 5, (8, 3))
    found = both(lambda x, ids: x + table(ids), rows(), ids)
    assert calls(found, "embedding") == 2


def test_no_gradients_in_a_part() -> None:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = x.sigmoid()
        return (x * gate).sin()

    both(run, rows())


def test_a_statistic_without_gradients_of_what_has_some() -> None:
    """What is joined for it has them, too."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin()
        with torch.no_grad():
            mean = y.mean()
        return y.sum() * mean, mean

    both(run, rows())


def test_gradients_left_switched_off() -> None:
    def run(x: Tensor) -> Tensor:
        y = x.sin()
        torch.set_grad_enabled(False)
        return y.cos()

    try:
        with pytest.raises(Exception, match="switches gradients on or off, and leaves them so"):
            split_of(run, rows())
    finally:
        torch.set_grad_enabled(True)


def test_autocast_in_a_part() -> None:
    linear = nn.Linear(H, H)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(x)
            whole = y.sum(0) @ linear.weight
        return y.float(), whole.float()

    found = both(run, rows())
    assert calls(found, "linear") == 2


def test_written_in_place_within_halves() -> None:
    def run(x: Tensor) -> Tensor:
        y = x.sin()
        y[:, 0] = 0.0
        y[..., 1:].mul_(2)
        return y.cos()

    found = both(run, rows())
    assert calls(found, "cos") == 2


def test_statistics_that_are_written_stay_exact() -> None:
    """Of the whole batch, once."""
    model, x = Counting(), rows()
    same = copy.deepcopy(model)

    def run(model: Counting, x: Tensor) -> Tensor:
        y = model.linear(x) + model.seen
        model.seen.add_(y.detach().mean((0, 1)))
        return y.sin()

    result, found = split_of(lambda x: run(model, x), x)
    torch.testing.assert_close(result, run(same, x))
    torch.testing.assert_close(model.seen, same.seen)
    assert calls(found, "linear") == 2 and calls(found, "add_") == 1


def test_a_statistic_that_is_read_after_it_was_written_stays_whole() -> None:
    model, x = Counting(), rows()
    same = copy.deepcopy(model)

    def run(model: Counting, x: Tensor) -> Tensor:
        model.seen.add_(x.mean((0, 1)))
        return (x.sin() + model.seen).cos()

    result, found = split_of(lambda x: run(model, x), x)
    torch.testing.assert_close(result, run(same, x))
    assert calls(found, "sin") == 2 and calls(found, "cos") == 1


def counted(seen: Tensor, x: Tensor) -> Tensor:
    seen.add_(1)
    return x.sin()


def read_before(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.sin()
    mean = y.mean()
    y.mul_(2)
    return y.cos(), mean


REFUSED: dict[str, tuple[str, Callable[..., Any], int]] = {
    "an odd batch": ("a batch of 7 has no halves", lambda x: x.sin(), 7),
    "a buffer that is counted up": (
        "it writes into what it is given",
        functools.partial(counted, torch.zeros(3)),
        8,
    ),
    "an input that is written": ("it writes into what it is given", lambda x: x.mul_(2).sin(), 8),
    "read by a statistic, then written": ("is written in place, and read by what stays whole", read_before, 8),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    reason, function, batch = REFUSED[name]
    with pytest.raises(Exception, match=reason):
        split_of(function, rows(batch))


def test_a_batch_that_is_a_number() -> None:
    def backend(gm: Any, given: Any) -> Any:
        with pytest.raises(NotProvenError, match=r"call moecompile.mark_batch\(inputs\) before the first call"):
            microbatches.split(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(torch.sin, backend=backend)(rows())


def test_a_later_batch_that_is_odd_is_compiled_once_more() -> None:
    """What was split is not called with it."""
    batches: list[int] = []

    def backend(gm: Any, given: Any) -> Any:
        batches.append(len(batches))
        try:
            return microbatches.split(gm).graph.forward
        except NotProvenError:
            return gm.forward

    torch._dynamo.reset()
    run = torch.compile(lambda x: x.sin(), backend=backend)
    for batch in (8, 6, 5, 3, 10):
        x = rows(batch)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(run(x), x.sin())
    assert len(batches) == 2


def _filled(x: Tensor) -> Tensor:
    m = torch.full((3, 3), float("-inf"))
    m.triu_(1)
    return ((x @ x.transpose(1, 2)) + m).softmax(-1)


def _added(x: Tensor) -> Tensor:
    y = torch.zeros(3, H)
    y.add_(1.0)
    row = y[0]
    row.mul_(3.0)
    return x * y


def _rewritten(x: Tensor) -> Tensor:
    y = torch.zeros(3, H)
    y[0] = 1.0
    z = y.add_(2)
    z.mul_(3)
    return x * y + z


@pytest.mark.parametrize("function", [_filled, _added, _rewritten])
def test_what_is_shared_and_written_is_made_for_each_half(function: Callable[[Tensor], Tensor]) -> None:
    assert both(function, rows(4))[-1].whole == ()


@pytest.mark.parametrize(
    ("function", "batch"),
    [
        (lambda x: x[:, : x.shape[0]].sum(1), 4),
        (lambda x: x[..., : x.shape[0] * 2].sum(-1), 4),
        (lambda x: x[:, x.shape[0] % 4 :].sum(1), 8),
        (lambda x: x + torch.ones(3, H)[:, : x.shape[0]].sum(), 8),
        (lambda x: x.view(x.shape[0], (x.shape[0] // 2) % 2 + 1, -1), 4),
        (lambda x: x.view(x.shape[0], torch.sym_max(1, 6 // x.shape[0]), -1).sum(1).amax(-1), 6),
        (lambda x: x.unflatten(1, ((x.shape[0] // 2) % 2 + 1, -1)).sum(2).amax(1), 4),
    ],
)
def test_sizes_that_follow_from_the_batch(function: Callable[[Tensor], Tensor], batch: int) -> None:
    """Refused, or right: halves of another size would be another result."""
    x = rows(batch)
    try:
        found, _ = split_of(function, x)
    except Exception as error:
        words = ("would have other sizes in a half", "depends on the batch", "several dimensions", "goes along")
        assert any(each in str(error) for each in words), error
    else:
        torch.testing.assert_close(found, function(x))


def test_halves_of_one_element() -> None:
    with pytest.raises(Exception, match="halves of one element"):
        split_of(lambda x: x[:, :1].squeeze() * 2, rows(2))


def test_numbers_of_elements_that_others_read() -> None:
    """They are those of all elements, and nothing is joined of halves'."""

    def function(x: Tensor) -> Tensor:
        m = torch.arange(x.shape[0])
        wide = nn.functional.pad(x, (0, 0, 0, 20))
        return wide[m, m] + x[m].sum(1)

    both(function, rows(4))
