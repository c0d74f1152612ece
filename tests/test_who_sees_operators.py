"""The short way of an operator to its kernel is for plain tensors alone; modes, subclasses and meta tensors see it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moecompile.runtime import autograd, fp8_experts, kernels
from test_main_gradients import Call


@pytest.fixture(params=[False, True], ids=["bf16", "fp8"])
def call(request: pytest.FixtureRequest) -> Call:
    made = Call(fp8=request.param)
    for each in (made.x, made.weights, *made.matrices.values()):
        each.requires_grad_(False)
    return made


def short(call: Call, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators that go the short way from now on."""
    found: list[str] = []
    name, room = ("experts_fp8", fp8_experts) if call.fp8 else ("experts", kernels)
    run: Callable[..., Any] = getattr(room, name)

    def noting(*args: Any, **attributes: Any) -> Any:
        found.append(name)
        return run(*args, **attributes)

    # in autograd's eyes alone: the dispatcher finds the kernel in its room, too
    monkeypatch.setattr(autograd, room.__name__.rpartition(".")[2], SimpleNamespace(**{**vars(room), name: noting}))
    return found


def test_plain_tensors_go_the_short_way(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = short(call, monkeypatch), call({})
    assert len(found) == 1 and expected.isfinite().all()


class Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_them(call: Call) -> None:
    with Noting() as mode:
        call({})
    assert f"moecompile.experts{'_fp8' * call.fp8}.default" in mode.names


class Wrapped(Tensor):
    """A subclass that notes what it takes part in."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.names.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


def test_negated_views_go_the_long_way(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that reads memory would miss the sign."""
    found, expected = short(call, monkeypatch), call({}, -call.x)
    found.clear()
    result = call({}, torch._neg_view(call.x))
    assert not found and torch.equal(result, expected)


def test_fake_meta_and_subclassed_tensors_go_the_long_way(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    found = short(call, monkeypatch)
    shape = call({}).shape
    found.clear()
    call({}, call.x.as_subclass(Wrapped))
    assert not found
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call({}, mode.from_tensor(call.x)).shape == shape
    assert not found
    meta = Call(fp8=call.fp8)
    meta.x, meta.weights = (each.detach().to("meta") for each in (meta.x, meta.weights))
    meta.plan = [each.to("meta") for each in meta.plan]
    meta.matrices = {name: each.detach().to("meta") for name, each in meta.matrices.items()}
    result = meta({})
    assert not found and result.is_meta and result.shape == shape
