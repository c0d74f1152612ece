"""The examples run as they say, and find what they say they find; inspect_graph.py has a test of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NUMBER = r"\d\.\de[-+]\d\d"


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCHERS = {"expert_parallel": TORCHRUN, "overlap": TORCHRUN, "dualpipe": (*TORCHRUN[:-1], "4")}
"""How an example is begun, if not as a program by itself."""


def run(name: str, *arguments: str) -> str:
    """Runs an example as a user would; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *LAUNCHERS.get(name, ()), f"examples/{name}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def errors_in(printed: str) -> list[float]:
    """The errors an example printed, in order."""
    return [float(number) for number in re.findall(rf"(?:relative error|result|gradient)\D* ({NUMBER})", printed)]


def check_own_moe(printed: str) -> None:
    assert "1 MoE block rewritten, no near misses, no graph breaks" in printed
    assert re.search(r"expert_loop +6 +2 +64 +96 +f32 +square\(relu\(hidden\)\)", printed)
    errors = errors_in(printed)
    assert len(errors) == 2 and max(errors) < 1e-5


def check_transformers_model(printed: str) -> None:
    assert "2 MoE blocks rewritten, no near misses, no graph breaks" in printed
    assert "gate and up interleaved; biases b_in, b_out; weights (experts, in, out)" in printed
    errors = errors_in(printed)
    assert len(errors) == 3 and max(errors) < 1e-5
    # the first length, then every other
    assert re.findall(r"graph (\d), .*: 2 blocks, T = (48|2\*s)", printed) == [("0", "48"), ("1", "2*s")]


def check_training_step(printed: str) -> None:
    assert "2 MoE blocks rewritten, no near misses, no graph breaks" in printed
    backward = printed.partition("The backward graph")[2]
    # activation checkpointing: backward runs the experts' forward again
    assert backward.count("= moecompile.experts_forward(") == backward.count("= moecompile.experts_backward(") == 2
    losses = [(float(ours), float(eager)) for ours, eager in re.findall(r"\n +\d +(\d\.\d+) +(\d\.\d+)", backward)]
    assert len(losses) == 6 and losses[-1][0] < losses[0][0] - 1
    for ours, eager in losses:
        assert abs(ours - eager) < 2e-3


def check_fp8_training(printed: str) -> None:
    assert "1 MoE block rewritten (2 graphs: 1 recompilation), no near misses, no graph breaks" in printed
    assert "FP8: 2 cast, 2 kept" in printed and "FP8 copies of 3 matrices are kept between calls" in printed
    assert re.search(r"experts\.router +linear +8 x 128 +kept +it chooses experts", printed)
    losses = [(float(wide), float(fp8)) for wide, fp8 in re.findall(r"\n +\d +(\d\.\d+) +(\d\.\d+)", printed)]
    assert len(losses) == 10 and all(last < first - 0.5 for first, last in zip(losses[0], losses[-1], strict=True))
    assert 0 < max(abs(wide - fp8) for wide, fp8 in losses) < 0.05


def check_expert_parallel(printed: str) -> None:
    assert "1 MoE block rewritten, no near misses, no graph breaks" in printed
    assert "2 ranks share the experts" in printed and "at most 48 of" in printed
    assert "Rank 0 holds 36864 of 73728 numbers" in printed
    losses = [(float(ours), float(whole)) for ours, whole in re.findall(r"\n +\d +(\d\.\d+) +(\d\.\d+)", printed)]
    assert len(losses) == 5 and losses[-1][0] < losses[0][0] - 0.1
    assert all(abs(ours - whole) < 1e-3 for ours, whole in losses)


def check_overlap(printed: str) -> None:
    assert "2 ranks share the experts" in printed
    assert printed.count("ordered, predicted of H200 SXM") == 2, "forward and backward"
    waits = {name: int(waits) for name, waits in re.findall(r"\n +(\w+, [a-z ]+?) +\d+ +\d+ +(\d+) +\d+%", printed)}
    assert {*waits} == {f"{kind}, {order}" for kind in ("forward", "backward") for order in ("now", "as it came")}
    assert all(waits[f"{kind}, now"] < waits[f"{kind}, as it came"] for kind in ("forward", "backward"))
    assert "nvlink 0" in printed and "====" in printed
    errors = errors_in(printed)
    assert len(errors) == 2 and max(errors) < 1e-2


def check_dualpipe(printed: str) -> None:
    counts = {kind: int(count) for kind, count in re.findall(r"(?m)^  (pair|first part|second part) +(\d+)$", printed)}
    assert counts == {"pair": 3, "first part": 3, "second part": 3}, printed
    assert "compiled 10 graphs of 2 captured" in printed
    assert printed.count("pair 1: ordered, predicted of H200 SXM") == 2
    errors = [float(number) for number in re.findall(rf"\n  \S+ +({NUMBER})", printed)]
    assert len(errors) == 5 and max(errors) < 1e-2


CHECKS = {
    "dualpipe": check_dualpipe,
    "expert_parallel": check_expert_parallel,
    "overlap": check_overlap,
    "fp8_training": check_fp8_training,
    "own_moe": check_own_moe,
    "transformers_model": check_transformers_model,
    "training_step": check_training_step,
}


@pytest.mark.parametrize("name", CHECKS)
def test_example(name: str) -> None:
    if name == "transformers_model":
        pytest.importorskip("transformers")
    CHECKS[name](run(name, "--lowering", "eager"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_example_with_inductor(name: str) -> None:
    if name == "transformers_model":
        pytest.importorskip("transformers")
    CHECKS[name](run(name))


def test_every_example_has_a_test() -> None:
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert examples == {*CHECKS, "inspect_graph"}
