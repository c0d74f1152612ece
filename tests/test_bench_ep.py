"""The bench of experts over ranks: what it measures over gloo, what it refuses to believe, and that it never hangs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed import _symmetric_memory

import moecompile.runtime.operators  # noqa: F401  registers torch.ops.moecompile
from moecompile import bench_baseline, bench_ep_exchange, bench_ep_symmetric, bench_ranks
from moecompile.bench_bars import Bar, Limit
from moecompile.bench_block import random_inputs
from moecompile.bench_cases import FORWARD, FP8, OURS, STEP
from moecompile.bench_ep_cases import (
    BASELINES,
    COMBINE,
    COMBINE_ALONE,
    DISPATCH,
    EAGER,
    EXCHANGE_ALONE,
    HIDDEN,
    LARGE,
    LAYOUT,
    LIMITS,
    LOCAL_BF16,
    LOCAL_FP8,
    SMS,
    SYMMETRIC,
    TIME,
    TINY,
    TINY_EXCHANGE,
)
from moecompile.bench_ep_peers import Baseline
from moecompile.bench_ep_ranks import Ranks, RanksFailedError, RanksTimer, joined, run_here, run_spawned
from moecompile.bench_ep_rows import bars, proven
from moecompile.bench_ep_sharded import Experts
from moecompile.bench_ep_tokens import Exchange
from moecompile.bench_proof import NotOursError
from moecompile.bench_results import Ceilings, Results, Setting, Speed
from moecompile.bench_timing import ATTEMPTS, Timing
from moecompile.commands import main
from moecompile.runtime.launch import observers

CPU = torch.device("cpu")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Ranks]:
    """A rank that is all of them."""
    with joined(0, 1, CPU, 20.0, f"file://{tmp_path}/store") as ranks:
        yield ranks


@pytest.fixture
def setting(alone: Ranks, tmp_path: Path) -> Setting:
    ceilings = Ceilings({"bf16": 700e12, "fp8": 1300e12}, 4e12)
    return Setting("cpu", RanksTimer(alone), 1, ceilings, Results({}, tmp_path / "rows.json"))


def test_two_ranks_measure_everything(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert main(["bench", "ep", "--device", "cpu", "--rounds", "1", "--json", str(path)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].endswith("ranks 2") and "over gloo" in lines[1]
    assert len([line for line in lines if line == "ceilings"]) == 1, "rank 0 alone prints"
    assert lines[-1].startswith("0 of 0 targets met; 1 rounds, ")
    found = json.loads(path.read_text())
    assert found["failures"] == []
    speeds = {(row["what"], row["contender"]): row for row in found["rows"] if row["kind"] == "speed"}
    measured = {
        what: {name for (each, name), row in speeds.items() if each == what and row["times"]} for what, _ in speeds
    }
    assert measured[LAYOUT] == measured[DISPATCH] == measured[COMBINE_ALONE] == {OURS, EAGER}
    assert measured[COMBINE] == {OURS, *BASELINES} and measured[STEP] == {OURS, FP8, *BASELINES}
    assert measured[FORWARD] == {OURS, FP8, *BASELINES, LOCAL_BF16, LOCAL_FP8, EXCHANGE_ALONE}
    assert speeds[DISPATCH, FP8]["note"] == "needs a Hopper GPU"
    assert speeds[DISPATCH, SYMMETRIC]["note"] == "needs CUDA"
    assert speeds[DISPATCH, OURS]["note"].startswith("the baseline's rows, to the bit")
    assert speeds[FORWARD, EXCHANGE_ALONE]["note"].startswith("to the bit")
    for what, name in ((FORWARD, OURS), (FORWARD, FP8), (STEP, OURS), (STEP, FP8), (FORWARD, LOCAL_FP8)):
        assert "from the eager baseline; emulated" in speeds[what, name]["note"]
    assert set(speeds[FORWARD, OURS]["ratios"]) == {"the baseline", "local experts alone"}
    floors = {name: row["floor"]["milliseconds"] for (what, name), row in speeds.items() if what == "floors"}
    assert floors["bytes, dispatch+combine"] > 0
    judged = [row for row in found["rows"] if row["kind"] == "bar"]
    assert {row["verdict"] for row in judged} == {""} and {row["inapplicable"] for row in judged} == {"no GPU"}
    assert any(HIDDEN in line for line in lines)


def checks(folder: str, ranks: Ranks) -> int:
    """What two ranks see of each other; then the second no longer comes."""
    said = []
    failing = (lambda: 1 // (1 - ranks.rank), lambda: ranks.meet() if ranks.rank else 1 // 0, ranks.meet)
    for function in failing:
        try:
            ranks.attempt(function)
            said.append("fine")
        except RanksFailedError as error:
            said.append(str(error))
    timing = RanksTimer(ranks).burst("sleep", [partial(time.sleep, 0.05 * ranks.rank)])
    said.append("slowest" if timing.device >= 50 else f"{timing}")
    Path(folder, f"rank{ranks.rank}").write_text(json.dumps(said))
    hasty = distributed.new_group(backend="gloo", timeout=timedelta(seconds=2))
    if ranks.rank:
        time.sleep(600)
    assert isinstance(hasty, distributed.ProcessGroup)
    replace(ranks, control=hasty).meet()
    return 0


def dies(ranks: Ranks) -> int:
    """Gone, without a word."""
    os._exit(3)


def test_what_fails_on_one_rank_fails_on_all_and_nobody_waits_for_ever(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    assert run_spawned(partial(checks, str(tmp_path)), 2, "cpu", 60.0) == 1
    assert time.monotonic() - begun < 120 and "moecompile bench: " in capfd.readouterr().out
    words = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)]
    division = "ZeroDivisionError: integer division or modulo by zero"
    assert words == [[f"rank 1: {division}", f"rank 0: {division}", "fine", "slowest"]] * 2


def test_a_rank_that_dies_is_the_exit_status(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_spawned(dies, 1, "cpu", 60.0) == 1
    assert "exit code 3" in capfd.readouterr().out


def test_all_ranks_try_again_if_one_host_fell_behind(alone: Ranks) -> None:
    """And who always falls behind, since it waits for its device, is asked once."""
    behind: dict[str, list[bool]] = {"once": [True, False], "always": [True] * 9, "never": [False]}
    issued: list[str] = []

    class Device:
        lead: dict[str, float] = {}  # noqa: RUF012

        def attempt(self, name: str, calls: object, before: object) -> Timing:
            issued.append(name)
            assert callable(before)
            return Timing(2.0, 5.0, not behind[name].pop(0))

        def give_lead(self, name: str, host: float) -> None:
            self.lead[name] = host

    timer = RanksTimer(alone)
    timer._cuda = Device()  # type: ignore[assignment]
    assert [timer.burst(name, [int]).ahead for name in ("never", "once", "always", "always")] == [
        True,
        True,
        False,
        False,
    ]
    assert issued == ["never", "once", "once", *["always"] * (ATTEMPTS + 1)]
    assert Device.lead == {"once": 5.0}


def test_under_torchrun_its_ranks_are_used(monkeypatch: pytest.MonkeyPatch, unused_port: int) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port)}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert run_here(lambda ranks: 7 * ranks.size, "cpu", 20.0) == 7
    monkeypatch.setattr(bench_ranks.RanksBench, "measure", lambda bench, chosen, ranks: 5)
    assert main(["bench", "ep", "--device", "cpu"]) == 5
    assert main(["bench", "ep", "--device", "cpu", "--ranks", "2"]) == 2


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def test_without_what_it_needs_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in (
        ([], "moecompile's kernels need a Hopper GPU"),
        (["--device", "cpu", "--ranks", "3"], "3 ranks cannot share the experts of tiny"),
        (["--device", "cpu", "--shapes", "large"], "there is no large; there are tiny"),
    ):
        assert main(["bench", "ep", *arguments]) == 2
        printed = capsys.readouterr()
        assert words in printed.err and printed.out == ""
    with pytest.raises(SystemExit):
        main(["bench", "ep", "--only", "blocks"])
    assert "expected some of exchange,block" in capsys.readouterr().err


def test_more_ranks_than_gpus(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ranks.bench, "missing", lambda: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["bench", "ep", "--ranks", "2"]) == 2
    assert "2 ranks need a GPU each, and torch sees 1" in capsys.readouterr().err


def test_the_baseline_computes_the_experts(alone: Ranks) -> None:
    shape = TINY[0]
    module, inputs = Experts(shape, CPU), Exchange.of(alone, shape).inputs
    given = (inputs.x, inputs.ids, inputs.weights, module.w_in, module.w_out)
    leaves = [inputs.x, inputs.weights, module.w_in, module.w_out]
    expected = bench_baseline.experts(*given)
    right = torch.autograd.grad(expected, leaves, inputs.cotangent)
    for run in (Baseline(alone, shape.experts), Baseline(alone, shape.experts, "eager")):
        result = run(*given)
        torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)
        for mine, theirs in zip(torch.autograd.grad(result, leaves, inputs.cotangent), right, strict=True):
            assert float((mine - theirs).float().norm() / theirs.float().norm()) < 0.01
    module_result = module(inputs.x, inputs.ids, inputs.weights)
    torch.testing.assert_close(module_result, expected, rtol=0.02, atol=0.02)


def test_wrong_rows_are_a_failure_and_the_others_are_measured(
    setting: Setting, alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Exchange.dispatch

    def turned(exchange: Exchange, plan: Any) -> Any:
        rows, *others = right(exchange, plan)
        return (rows.flip(0), *others)

    monkeypatch.setattr(Exchange, "dispatch", turned)
    bench_ep_exchange.measure_exchange(setting, alone, TINY_EXCHANGE, {DISPATCH: "nobody has it"})
    assert [each.partition(": RanksFailedError")[0] for each in setting.results.failures] == [
        "dispatch, ours BF16",
        "combine, from expert outputs, ours BF16",
        "combine, exchange alone, ours BF16",
    ]
    rows = [row for row in setting.results.rows if isinstance(row, Speed)]
    assert {(row.what, row.contender) for row in rows if row.times and row.what == DISPATCH} == {(DISPATCH, EAGER)}
    assert [row.note for row in rows if row.contender == SYMMETRIC] == ["nobody has it", "not measured"]


def test_rows_that_came_lie_as_the_baseline_has_them() -> None:
    """Two ranks with room for two rows each; the second token of the first rank met both experts of this one."""
    rows = torch.arange(4.0).unsqueeze(1)
    ids = torch.tensor([[1, -1], [1, 0], [0, -1], [-1, -1]], dtype=torch.int32)
    found = bench_ep_exchange.by_expert(rows, ids, 2).flatten().tolist()
    assert found == [1.0, 0.0, 1.0, 2.0]


def test_bars_judge_two_ranks_on_gpus_alone(alone: Ranks) -> None:
    values = {TIME: 200.0, SMS: 132.0}
    of_two = SimpleNamespace(size=2, device=torch.device("cuda"))
    two: Any = of_two
    fast, wide = bars("exchange", "exchange", DISPATCH, OURS, values, two)
    assert (fast.verdict, wide.verdict) == ("target at most 205 us: met", "target at most 12: MISSED")
    assert "200 us  target at most 205 us: met  (today: DeepEP V1 330 us, 24 SMs" in fast.line()
    of_two.size = 4
    (fast, _) = bars("exchange", "exchange", DISPATCH, OURS, values, two)
    assert fast.verdict == "" and fast.line().endswith(
        "200 us  target at most 205 us: not applicable, the bar is for 2 ranks, and these are 4"
        "  (today: DeepEP V1 330 us, 24 SMs on two H200, 2026-11)"
    )
    assert bars("exchange", "exchange", DISPATCH, OURS, values, alone)[0].inapplicable == "no GPU"
    results = Results({}, stream=open(os.devnull, "w"))
    results.add(replace(fast, inapplicable=""), wide, replace(wide, value=None))
    assert results.verdicts() == (1, 2)


def test_every_bar_is_of_something_that_is_measured() -> None:
    whats = {LAYOUT, DISPATCH, COMBINE, COMBINE_ALONE, FORWARD, STEP, HIDDEN}
    assert {what for _, what, _ in LIMITS} == whats and (LARGE, STEP, FP8) in LIMITS
    at_least = Bar("block", LARGE, FORWARD, OURS, 1.9, Limit("speed", "at least", 1.9, "x"))
    assert at_least.verdict == "target at least 1.9 x: met" and at_least.as_dict()["kind"] == "bar"


def test_a_row_of_ours_needs_our_kernels_and_counts_their_multiprocessors() -> None:
    def launch(*names: str) -> None:
        for name in names:
            kernel: Any = SimpleNamespace(instance=SimpleNamespace(name=name), multiprocessors=132)
            for note in observers.noting:
                note(SimpleNamespace(kernel=kernel, blocks=8 if "send" in name else 500))  # type: ignore[arg-type]

    both = partial(launch, "moecompile_exchange_send", "moecompile_exchange_receive")
    assert proven(both, "cuda") == {"moecompile_exchange_send": 8, "moecompile_exchange_receive": 132}
    with pytest.raises(NotOursError, match="torch's collectives carried the tokens"):
        proven(partial(launch, "moecompile_combine"), "cuda")
    assert proven(launch, "cpu") == {} and observers.noting == []


def test_symmetric_memory_that_is_not_there_is_a_reason(alone: Ranks) -> None:
    found = bench_ep_symmetric.measure_symmetric(alone, TINY_EXCHANGE, 1)
    assert found == {DISPATCH: "needs CUDA", COMBINE_ALONE: "needs CUDA"}
    if not _symmetric_memory.is_nvshmem_available():
        assert bench_ep_symmetric.obstacle("cuda").startswith("torch finds no NVSHMEM")


def test_symmetric_memory_is_checked_before_it_counts(alone: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one rank, torch's exchange gives the rows as they are."""
    bins: list[int] = []

    def there(rows: Tensor, out: Tensor, splits: Tensor, placed: Tensor, group: str) -> None:
        assert int(splits.sum()) == len(rows) and placed.shape == (2, len(splits))
        bins.append(len(splits))
        out[: len(rows)] = rows
        placed[0], placed[1] = splits, splits.cumsum(0) - splits

    def back(out: Tensor, returned: Tensor, placed: Tensor, back: Tensor, group: str) -> None:
        returned.copy_(out[: int(placed[0].sum())])

    monkeypatch.setattr(_symmetric_memory, "set_backend", lambda name: None)
    monkeypatch.setattr(_symmetric_memory, "empty", torch.empty)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.ops.symm_mem, "all_to_all_vdev_2d", there, raising=False)
    monkeypatch.setattr(torch.ops.symm_mem, "all_to_all_vdev_2d_offset", back, raising=False)
    measure, shape = bench_ep_symmetric._measure, replace(TINY_EXCHANGE, experts=24)
    monkeypatch.setattr(bench_ep_symmetric, "random_inputs", lambda shape, device: random_inputs(shape, "cpu"))
    found = measure(alone, shape, 1)
    assert set(found) == {what + who for what in (DISPATCH, COMBINE_ALONE) for who in ("", f", {EAGER}")}
    assert set(bins) == {12}, "of two experts each: torch takes 16 of a rank"

    def wrong(out: Tensor, returned: Tensor, *others: object) -> None:
        returned.copy_(out[: len(returned)].flip(0))

    monkeypatch.setattr(torch.ops.symm_mem, "all_to_all_vdev_2d_offset", wrong)
    with pytest.raises(RanksFailedError, match="other rows came back than were sent"):
        measure(alone, shape, 1)


def test_a_process_that_says_nothing_is_a_reason() -> None:
    import multiprocessing

    said: Any = multiprocessing.get_context("spawn").Queue()
    gone = SimpleNamespace(is_alive=lambda: False, exitcode=-11)
    assert bench_ep_symmetric._said(said, gone, 5) == "its process has died with exit status -11"
    busy = SimpleNamespace(is_alive=lambda: True)
    assert bench_ep_symmetric._said(said, busy, 1) == "it has said nothing for 1 s"
    said.put("a reason")
    assert bench_ep_symmetric._said(said, busy, 5) == "a reason"
