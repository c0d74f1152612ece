"""Small tensors that only kernels see, in one piece of memory: none is overwritten while somebody reads it."""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fake_gpu
from fake_gpu import FakeGpu, installed
from moecompile.bench_block import Block, ours, ours_fp8
from moecompile.bench_cases import Shape
from moecompile.codegen.instances import Dispatch
from moecompile.runtime import recording
from moecompile.runtime.launch import Launch
from moecompile.runtime.recording import Program, Recorder
from moecompile.runtime.remembered import CALLS
from moecompile.runtime.workspace import ALIGNMENT, Life, lay_out


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A driver whose kernel adds: to[i] = a[i] + 2 b[i], on float32, as far as the shortest goes."""

    def launch(self: FakeGpu, how: Any, kernel: Any, pointers: int, extra: int) -> tuple[int]:
        if kernel.instance != Dispatch() or kernel.argument_bytes != 64:
            return (0,)
        address = ctypes.c_void_p.from_address(pointers).value
        assert address is not None
        to, a, b, count = struct.unpack("QQQi", ctypes.string_at(address, 28))
        one, other, sums = ((ctypes.c_float * count).from_address(place) for place in (a, b, to))
        sums[:] = [x + 2 * y for x, y in zip(one, other, strict=True)]
        return (0,)

    monkeypatch.setattr(FakeGpu, "cuLaunchKernelEx", launch)
    with installed(monkeypatch, recording.SHARED) as made:
        yield made


def test_no_two_that_meet_share_memory() -> None:
    """And as much memory as is in use at once is enough, where all have one size."""
    chance = random.Random(0)
    for turn in range(300):
        lives = [
            Life(chance.choice((0, 1, 511, 512, 513, 4096)) if turn % 2 else 512, begin, begin + chance.randrange(6))
            for begin in range(chance.randrange(1, 12))
        ]
        offsets, size = lay_out(lives)
        assert all(
            offset % ALIGNMENT == 0 and offset + life.size <= size for offset, life in zip(offsets, lives, strict=True)
        )
        for i, one in enumerate(lives):
            for j, other in enumerate(lives[:i]):
                if one.meets(other) and one.size and other.size:
                    assert offsets[i] >= offsets[j] + other.size or offsets[j] >= offsets[i] + one.size
        if turn % 2 == 0:
            assert size == 512 * max(sum(life.begin <= step <= life.end for life in lives) for step in range(20))


def add(to: Tensor, a: Tensor, b: Tensor) -> Tensor:
    count = min(to.numel(), a.numel(), b.numel())
    Launch(fake_gpu._load(Dispatch(), None), 1, (to, a, b, count)).run()
    return to


def calculate(x: Tensor, y: Tensor, seed: int) -> list[Tensor]:
    """Sums of sums, by kernels and by PyTorch, of views too; two of them are the results."""
    chance, made = random.Random(seed), [x, y]
    for _ in range(chance.randrange(3, 14)):
        a, b = chance.choice(made), chance.choice(made[-3:])
        if chance.random() < 0.15:
            made.append(a[: len(b)] + b[: len(a)])
        else:
            a = a[chance.choice((0, 16)) :]
            made.append(add(x.new_empty(min(chance.choice((64, 256, 1000)), len(a), len(b))), a, b))
    return [made[-1], chance.choice(made[2:])]


def recorded(seed: int, x: Tensor, y: Tensor) -> Program:
    with Recorder((x, y)) as recorder:
        made = calculate(x, y, seed)
    program = recorder.program(made)
    assert program is not None, recorder.refused
    return program


def test_programs_compute_the_same(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = 0
    for seed in range(60):
        program = recorded(seed, torch.randn(1000), torch.randn(1000))
        shared += program.workspace > 0
        x, y = torch.randn(1000), torch.randn(1000)
        expected = calculate(x, y, seed)
        for found, other in zip(program.run((x, y)), expected, strict=True):
            assert torch.equal(found, other)
    assert shared > 10


def test_what_is_large_is_given_back_as_soon_as_it_may(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(1000), torch.randn(1000)

    def chain(x: Tensor, y: Tensor) -> list[Tensor]:
        a = add(x.new_empty(1000), x, y)
        b = add(x.new_empty(1000), a, y)
        return [add(x.new_empty(1000), b, b)]

    sizes = []
    for limit in (1 << 20, 4096):
        monkeypatch.setattr(recording, "SHARED", limit)
        with Recorder((x, y)) as recorder:
            made = chain(x, y)
        program = recorder.program(made)
        assert program is not None and torch.equal(program.run((x, y))[0], made[0])
        sizes.append((program.workspace, len(program.steps)))
    assert sizes == [(2 * 4096, 4), (0, 6)]  # the sums, and what is made for them


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_a_call_of_few_tokens_makes_its_result_and_one_thing_more(gpu: FakeGpu, fp8: bool) -> None:
    block = Block.of(Shape("small", 256, 128, 16, 8, 8), 1, "cpu")
    block.quantised = block.quantise()
    run = ours_fp8(block, each=False) if fp8 else ours(block)
    with torch.no_grad():
        run(block.inputs(0))
    (program,) = (each for key, each in CALLS._entries.items() if key[0] == ("experts_fp8" if fp8 else "experts"))
    kinds = [type(step).__name__ for step, _ in program.steps]
    assert program.workspace > 0 and kinds.count("_Made") == 1 and kinds.count("_Launched") == 4
