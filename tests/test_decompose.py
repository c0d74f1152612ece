"""Our operators written out as PyTorch's compute the same, gradients and assignments without an expert included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

import moecompile
from dense_experts import FORMS, GATED, RELU_SQUARED, SWIGLU, Case, make_case, routing
from moecompile.passes.decompose import decompose
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
            from functorch.compile import make_boxed_func

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
