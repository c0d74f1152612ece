"""The stable text of graphs. The goldens are the same on every torch version that moecompile runs on."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd

import printed_models as models
from moecompile.passes.printer import count_changes, graph_text, input_names, op_counts
from moecompile.passes.provenance import frame_of, module_of, readable_path, source_of


def captured(function, *inputs, **options) -> fx.GraphModule:
    """Dynamo's one graph of a call."""
    graphs: list[fx.GraphModule] = []

    def keep(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=keep, fullgraph=True, **options)(*inputs)
    assert len(graphs) == 1
    return graphs[0]


def aot_graphs(module, *inputs, **options) -> dict[str, tuple[fx.GraphModule, tuple[str, ...]]]:
    """AOTAutograd's forward and backward graphs with the names of Dynamo's inputs."""
    graphs: dict[str, tuple[fx.GraphModule, tuple[str, ...]]] = {}

    def backend(gm, example_inputs):
        names = input_names(gm.graph)

        def keep(kind):
            def compiler(graph_module, inputs):
                graphs[kind] = graph_module, names
                return make_boxed_func(graph_module.forward)

            return compiler

        return aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))(gm, example_inputs)

    torch.compile(module, backend=backend, fullgraph=True, **options)(*inputs).sum().backward()
    return graphs


def test_model(golden):
    graph = captured(models.Model(1), torch.randn(6, 16)).graph
    golden("printer/model", graph_text(graph))


def test_symbolic_sizes_are_named_by_appearance(golden):
    graph = captured(models.Fused(), torch.randn(6, 16), dynamic=True).graph
    golden("printer/dynamic", graph_text(graph))


def test_sizes_that_depend_on_data(golden):
    graph = captured(models.data_dependent, torch.randn(6, 4)).graph
    golden("printer/data_dependent", graph_text(graph, source=False))


def test_one_name_for_each_operation(golden):
    inputs = torch.randn(4, 4), torch.randn(4, 4), torch.arange(4)
    golden("printer/spellings", graph_text(captured(models.spellings, *inputs).graph))


def test_module_paths(golden):
    golden("printer/module_paths", graph_text(captured(models.Sliced(), torch.randn(2, 4)).graph))


def test_bodies_of_higher_order_operators(golden):
    gm = captured(models.Checkpointed(), torch.randn(6, 16, requires_grad=True))
    bodies = [(name, body) for name, body in gm.named_modules() if isinstance(body, fx.GraphModule)]
    golden("printer/bodies", "\n\n".join(f"{name or 'main'}:\n{graph_text(body.graph)}" for name, body in bodies))


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_collapsed_training_graphs(golden, kind):
    gm, names = aot_graphs(models.Model(2), torch.randn(6, 16, requires_grad=True))[kind]
    golden(f"printer/collapsed_{kind}", graph_text(gm.graph, collapse=True, inputs=names))


def test_collapsed_counts_what_it_leaves_out():
    graph = captured(models.Model(2), torch.randn(6, 16)).graph
    runs = [line for line in graph_text(graph, collapse=True, counts=True).splitlines() if line.startswith("...")]
    assert runs == [
        "... 7 operations (rms_norm, linear, to, softmax, topk, sum, ...)",
        "... 8 operations (add, rms_norm, linear, to, softmax, topk, ...)",
        "... 2 operations (add, linear)",
    ]


def test_collapsed_names_the_last_operators_behind_a_value():
    graph = fx.Graph()
    ids = graph.placeholder("ids")
    plans: list[fx.Node] = []
    for _ in range(3):
        source = graph.call_function(torch.add, (ids, plans[-1]) if plans else (ids, 1))
        plans.append(graph.call_function(torch.ops.moecompile.plan.default, (source, 4)))
    graph.output((plans[0], graph.call_function(torch.cat, (plans,))))
    assert graph_text(graph, collapse=True).splitlines() == [
        "...",
        "%0 = moecompile.plan(expert_ids=..., num_experts=4)",
        "...",
        "%1 = moecompile.plan(expert_ids=...(%0), num_experts=4)",
        "...",
        "%2 = moecompile.plan(expert_ids=...(%1), num_experts=4)",
        "...",
        "return %0, ...(%2)",
    ]


def test_text_does_not_depend_on_node_names_or_devices():
    def build(prefix: str, device: str) -> fx.Graph:
        graph = fx.Graph()
        x = graph.placeholder("x")
        zeros = graph.create_node(
            "call_function", torch.zeros, (2,), {"device": torch.device(device)}, name=f"{prefix}_zeros"
        )
        graph.output(graph.create_node("call_method", "add", (x, zeros), name=f"{prefix}_sum"))
        return graph

    text = graph_text(build("a", "cpu"))
    assert text == graph_text(build("b", "cuda:3"))
    assert text.splitlines() == ["%0 = input x", "%1 = zeros(2)", "%2 = add(%0, %1)", "return %2"]


def test_any_graph_prints():
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)
            self.scale = torch.nn.Parameter(torch.ones(2))

        def forward(self, x):
            return {"y": self.inner(x) * self.scale, "shape": getattr(x, "shape")[0]}  # noqa: B009

    assert graph_text(fx.symbolic_trace(Small()).graph).splitlines() == [
        "%0 = input x",
        "%1 = inner(%0)  # inner",
        "%2 = attribute scale",
        "%3 = mul(%1, %2)",
        '%4 = getattr(%0, "shape")',
        "%5 = %4[0]",
        "return {y: %3, shape: %5}",
    ]


def test_counts_and_changes():
    before = op_counts(captured(models.Model(1), torch.randn(6, 16)).graph)
    assert before["moecompile.experts"] == before["moecompile.plan"] == before["topk"] == 1
    assert before["div_"] == 1
    assert "getitem" not in before  # results taken apart are no operations
    after = before - Counter({"topk": 1}) + Counter({"mul": 3})
    assert list(count_changes(before, after).items()) == [("mul", (0, 3)), ("topk", (1, 0))]


def test_provenance():
    graph = captured(models.Model(2), torch.randn(6, 16)).graph
    second = [node for node in graph.nodes if "plan" in str(node.target)][1]
    assert module_of(second) == "layers.1.mlp"
    assert source_of(second) == "printed_models.py:39"
    assert frame_of(second) == ("forward", "printed_models.py")
    norm = next(node for node in graph.nodes if "rms_norm" in str(node.target))
    assert source_of(norm) == "printed_models.py:52"  # the user's line, not torch's
    assert module_of(norm) == "layers.0.norm"


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']", ""),
        ("L['self'].model.layers.0.mlp", "model.layers.0.mlp"),
        ("L['self']._modules['layers']._modules['0']._parameters['w']", "layers.0.w"),
        ("L['self'].layers[3].mlp@1", "layers.3.mlp"),
        ("getattr(getattr(L['self'].layers, '0'), 'mlp')", "layers.0.mlp"),
        ("L['self']._orig_mod.layers.0", "layers.0"),
        ("G['model'].layers.0", "model.layers.0"),
        ("L['kwargs']['input_ids']", "input_ids"),
        ("L['fn']._modules['0']", "0"),
        ("L['forward'].__closure__[2].cell_contents.layers.0", "forward.layers.0"),
    ],
)
def test_readable_path(source, path):
    assert readable_path(source) == path
