"""The operators on a GPU: equal to the dense experts, without a synchronisation, inside a CUDA graph."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from dense_experts import FORMS, GEGLU, ROUTINGS, SWIGLU, Case, assert_near, make_case, routing
from moecompile.runtime import grouped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
BIASES = ("b_in", "b_up", "b_out")
BOUNDS = {
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (3e-2, 6e-2),
    torch.float16: (5e-3, 1e-2),
    torch.float64: (1e-12, 1e-12),
}


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", ROUTINGS)
def test_every_dtype_and_routing(dtype: torch.dtype, kind: str):
    torch.manual_seed(0)
    for form, gate_up in ((SWIGLU, "halves"), (GEGLU, "separate"), (FORMS["weight_within"], "interleaved")):
        for tokens in (1, 40):
            ids = routing(kind, tokens, 2, 5).cuda()
            make_case(ids, 5, form, gate_up, biases=BIASES, dtype=dtype, sizes=(32, 48, 16)).compare(*BOUNDS[dtype])


@pytest.mark.parametrize("sizes", [(32, 48, 16), (6, 10, 7)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_host_never_waits(dtype: torch.dtype, sizes: tuple[int, int, int], no_synchronisation: None):
    ids = torch.randint(0, 5, (40, 2), device="cuda")
    torch.cuda.set_sync_debug_mode("default")
    case = make_case(ids, 5, biases=BIASES, dtype=dtype, sizes=sizes)
    torch.cuda.set_sync_debug_mode("error")
    case.run().sum().backward()


def test_bfloat16_runs_torchs_grouped_gemm(monkeypatch: pytest.MonkeyPatch):
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch has a grouped GEMM for compute capability 9 and 10")
    monkeypatch.setattr(grouped, "blocked_mm", None)
    monkeypatch.setattr(grouped, "blocked_outer", None)
    case = make_case(routing("dropped", 40, 2, 5).cuda(), 5, dtype=torch.bfloat16, sizes=(32, 48, 16))
    case.run().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_captured_graph_serves_every_routing(dtype: torch.dtype):
    torch.manual_seed(0)
    case = make_case(routing("random", 40, 2, 5).cuda(), 5, dtype=dtype, sizes=(32, 48, 16))
    cotangent = torch.randn(40, 16, device="cuda", dtype=dtype)

    def step() -> list[torch.Tensor]:
        out = case.run()
        return [out, *torch.autograd.grad(out, list(case.given.values()), cotangent)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for kind in ROUTINGS:
        case.ids.copy_(routing(kind, 40, 2, 5))
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            assert torch.equal(found, expected)


def test_larger_than_one_workspace(monkeypatch: pytest.MonkeyPatch):
    from moecompile.runtime import blocked

    torch.manual_seed(0)
    monkeypatch.setattr(blocked, "WORKSPACE_BYTES", 20_000)
    ids = routing("skewed", 300, 3, 7).cuda()
    make_case(ids, 7, dtype=torch.float32, sizes=(32, 48, 16)).compare(1e-5, 1e-4)


def test_an_id_out_of_range_stops_the_device():
    code = (
        "import torch, moecompile.runtime.operators;"
        "torch.ops.moecompile.plan(torch.full((4, 2), 9, device='cuda'), 4); torch.cuda.synchronize()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "an expert id is outside [0, " in ran.stderr + ran.stdout


def test_cpu_and_gpu_agree_on_the_plan():
    for kind in ROUTINGS:
        ids = routing(kind, 200, 4, 16)
        for found, expected in zip(
            torch.ops.moecompile.plan(ids.cuda(), 16), torch.ops.moecompile.plan(ids, 16), strict=True
        ):
            assert torch.equal(found.cpu(), expected)


def test_compiled_on_the_gpu():
    torch.manual_seed(0)
    case = make_case(routing("random", 40, 2, 5).cuda(), 5, dtype=torch.bfloat16, sizes=(32, 48, 16))
    expected = case.run()
    found = torch.compile(Case.run, fullgraph=True)(case)
    assert_near("result", found, expected, 1e-2)
