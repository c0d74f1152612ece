"""Our operators written out as PyTorch's compute the same, gradients and assignments without an expert included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.decomposition import select_decomp_table

import moecompile
from dense_experts import FORMS, GATED, RELU_SQUARED, SWIGLU, Case, make_case, routing
from moecompile.passes.decompose import decompose
from moecompile.runtime import linear_fp8
from zoo_case import arguments, make
from zoo_forms import case

SIZES = (16, 24, 32)
BIASES = ("b_in", "b_up", "b_out")
BOUNDS = (3e-2, 6e-2)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class WrittenOut(Case):
    """A case that runs compiled, with the operators written out; `counts` has one number for each graph."""

    counts: list[int]

    def run(self) -> Tensor:
        self.counts = []

        def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            self.counts.append(decompose(gm.graph, {}))
            gm.graph.lint()
            gm.recompile()
            return make_boxed_func(gm.forward)

        backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
        torch._dynamo.reset()
        function = torch.compile(lambda *args: torch.ops.moecompile.experts(*args, **self.attributes), backend=backend)
        result: Tensor = function(*self.arguments())
        return result


def written_out(made: Case) -> WrittenOut:
    return WrittenOut(made.form, made.ids, made.tensors, made.gate_up, made.transposed, made.out_dtype)


@pytest.mark.parametrize("kind", ["random", "dropped", "all_dropped", "one_expert"])
def test_every_routing(kind: str) -> None:
    torch.manual_seed(0)
    made = written_out(make_case(routing(kind, 9, 3, 4), 4, SWIGLU, dtype=torch.bfloat16, sizes=SIZES))
    made.compare(*BOUNDS)
    assert made.counts == [1, 1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate_up", GATED)
def test_every_form(form: str, gate_up: str) -> None:
    torch.manual_seed(0)
    ids = routing("dropped", 9, 3, 4)
    made = written_out(make_case(ids, 4, FORMS[form], gate_up, biases=BIASES, dtype=torch.bfloat16, sizes=SIZES))
    made.compare(*BOUNDS)
    assert made.counts == [1, 1]


def test_one_matrix_in_either_orientation() -> None:
    torch.manual_seed(0)
    made = make_case(
        routing("some_empty", 9, 2, 4), 4, RELU_SQUARED, "single", (True, True), dtype=torch.bfloat16, sizes=SIZES
    )
    written_out(made).compare(*BOUNDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_stay(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = written_out(make_case(routing("random", 9, 2, 4), 4, SWIGLU, dtype=dtype, sizes=SIZES))
    made.compare(1e-5, 1e-5)
    assert made.counts == [0, 0]


def test_sizes_that_grouped_products_do_not_take_stay() -> None:
    torch.manual_seed(0)
    made = written_out(make_case(routing("random", 9, 2, 4), 4, SWIGLU, dtype=torch.bfloat16, sizes=(6, 10, 7)))
    made.compare(*BOUNDS)
    assert made.counts == [0, 0]


def test_inductor_gets_them_written_out() -> None:
    torch.manual_seed(0)
    model: nn.Module = make(case("sort_histogram"))
    compiled = torch.compile(model, backend="moecompile", fullgraph=True)
    inputs = arguments(case("sort_histogram"), 24)
    expected, got = model(*inputs), compiled(*inputs)
    expected, got = (value[0] if isinstance(value, tuple) else value for value in (expected, got))
    torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2)
    (graph,) = moecompile.last_report().graphs
    assert "moecompile.experts_forward" in (graph.forward or ""), "the report shows the operators"


def cast_with_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = torch.ops.moecompile.quantize(x * 2)
    return values, scales


@pytest.mark.parametrize("shape", [(300, 384), (2, 9, 256), (7, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_cast_is_fused_and_has_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape).to(dtype)
    rows = x.view(-1, shape[-1])
    rows[0, 0], rows[1, 3], rows[2, 5] = float("nan"), float("inf"), -float("inf")
    rows[3], rows[4], rows[5] = 0, 1e-38, 3e38
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        def inner(graph: fx.GraphModule, inner_inputs: Sequence[Any], **settings: Any) -> Any:
            assert decompose(graph.graph, select_decomp_table()) == 1
            graph.recompile()
            graphs.append(graph)
            return compile_fx_inner(graph, inner_inputs, **settings)

        return compile_fx(gm, inputs, inner_compile=inner, config_patches={"force_disable_caches": True})

    torch._dynamo.reset()
    found = torch.compile(cast_with_bits, backend=backend, dynamic=False)(x)
    expected = cast_with_bits(x)
    assert not graphs[0].graph.find_nodes(op="call_function", target=torch.ops.moecompile.quantize.default)
    assert [each.stride() for each in found] == [each.stride() for each in expected]
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(found[1], expected[1])


def test_where_a_kernel_casts_only_what_is_computed_for_it_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that come in, that a product made, that lie elsewhere, or that others read are better cast by the kernel."""
    ops = torch.ops.moecompile

    def casts(x: Tensor, w: Tensor) -> list[Tensor]:
        turned = (x + 1).view(2, 4, 128).transpose(0, 1).reshape(8, 128)
        read = torch.tanh(x)
        every = (torch.nn.functional.silu(x).view(-1, 128), x, x @ w, turned, read)
        return [read, *(each for rows in every for each in ops.quantize(rows))]

    kept: list[int] = []

    def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        kept.append(decompose(gm.graph, {}))
        gm.recompile()
        return make_boxed_func(gm.forward)

    x, w = torch.randn(8, 128), torch.randn(128, 128)
    for kernels, count in ((True, 1), (False, 5)):
        monkeypatch.setattr(linear_fp8, "has_kernels", lambda device, kernels=kernels: kernels)
        torch._dynamo.reset()
        found = torch.compile(casts, backend=aot_autograd(fw_compiler=compiler))(x, w)
        assert kept.pop() == count
        assert all(map(torch.equal, [each.float() for each in found], [each.float() for each in casts(x, w)]))
