"""Records, store, terminal text, JSON and trace artifacts of the report."""

from __future__ import annotations

import json
import logging
import threading
import traceback
from typing import Any

import pytest
import torch

from moecompile import report
from moecompile.graph_diff import diff_rows, unified
from moecompile.report import GraphBreak, GraphReport, PassRecord, Report
from moecompile.report_text import merged_paths, site_details, summary
from report_samples import AFTER, BEFORE, MISS, UNUSUAL, full_report, site
from small_models import Model, compiled, inputs


def test_text(golden):
    text = full_report().text(width=100)
    assert max(map(len, text.splitlines())) <= 100
    golden("report/text", text.replace(torch.__version__, "VERSION"))


def test_text_with_changes(golden):
    text = full_report().text(graphs=True, width=100)
    golden("report/changes", text[text.index("Graph 0") :])


def test_text_with_whole_graphs():
    text = full_report().text(graphs="full")
    for line in [*BEFORE.splitlines(), *AFTER.splitlines()]:
        assert f"    {line}" in text


def test_narrow_text_stays_narrow():
    text = full_report().text(width=80)
    assert max(map(len, text.splitlines())) <= 80


def test_print_is_the_text(capsys):
    print(full_report())
    assert "MoE blocks rewritten" in capsys.readouterr().out


def test_nothing_compiled_says_so():
    assert "nothing was compiled" in str(report.last_report())
    assert "moecompile.explain(model, ...) tells why" in str(report.last_report())


def test_found_but_not_rewritten():
    found = Report((GraphReport(sites=(site(),), passes=[PassRecord("detect", 1.0)]),))
    assert summary(found) == "moecompile: 1 MoE block found, no near misses, no graph breaks"
    assert "pass fuse disabled" in found.text()


@pytest.mark.parametrize(
    ("paths", "merged"),
    [
        (["layers.0.mlp"], "layers.0.mlp"),
        ([f"layers.{layer}.mlp" for layer in (10, 2, 1, 0)], "layers.[0-2,10].mlp"),
        (["layers.0.mlp", "layers.0.mlp"], "layers.0.mlp"),
        (["layers.0.mlp", "layers.1.moe"], "layers.0.mlp, layers.1.moe"),
        (["encoder.0.mlp", "decoder.0.mlp"], "decoder.0.mlp, encoder.0.mlp"),
        (["", "layers.0", ""], "(no module), layers.0"),
    ],
)
def test_merged_paths(paths, merged):
    assert merged_paths(paths) == merged


def test_details_name_what_is_unusual():
    assert site_details(site()) == ""
    assert site_details(UNUSUAL) == (
        "gate and up interleaved; biases b_in, b_out; output out; weights (experts, in, out)"
    )
    assert site_details(site(gate_up="single", input="mul(x, weight)")) == "no gate; input mul(x, weight)"


def test_json_is_stable():
    data = json.loads(full_report().json())
    assert data["version"] == 1
    assert set(data) == {"version", "torch", "graphs", "graph_breaks"}
    graph = data["graphs"][0]
    assert set(graph) == {
        "index", "name", "module", "compile_id", "sites", "near_misses", "casts", "passes", "before", "after",
        "forward", "backward", "cached", "verify", "compared", "notes", "ended_by",
    }  # fmt: skip
    assert graph["sites"][0] == {
        "form": "grouped_mm", "tokens": "s0", "top_k": "2", "num_experts": 8, "hidden": 64, "intermediate": 32,
        "activation": "mul(silu(gate), up)", "input": "x", "output": "mul(out, weight)", "gate_up": "halves",
        "dtype": "bfloat16", "biases": [], "module": "model.layers.0.mlp.experts", "source": "moe.py:440",
        "w_in_transposed": False, "w_out_transposed": False, "out_dtype": None,
    }  # fmt: skip
    assert graph["passes"][1]["changes"]["moecompile.experts"] == [0, 4]
    assert data["graph_breaks"][0]["cure"] == "use grouped_mm"


def test_last_report_is_a_snapshot_and_a_later_one_sees_more():
    graph = GraphReport(name="forward")
    report.record(graph)
    first = report.last_report()
    graph.backward = "return"
    graph.notes.append("later")
    second = report.last_report()
    assert first.graphs[0].backward is None
    assert first.graphs[0].notes == []
    assert second.graphs[0].backward == "return"
    assert second.graphs[0].notes == ["later"]
    report.reset()
    assert report.last_report() == Report()


def test_sites_and_near_misses_of_all_graphs():
    for layer in range(2):
        report.record(GraphReport(sites=(site(f"layers.{layer}"),), near_misses=(MISS,)))
    last = report.last_report()
    assert [each.module for each in last.sites] == ["layers.0", "layers.1"]
    assert last.near_misses == (MISS, MISS)
    assert "  2  layers.[0-1]" in str(last)
    assert "model.layers.3.mlp (2)  resembles dense" in str(last)


def graph_of(compile_id: str, *modules: str, **facts: Any) -> GraphReport:
    return GraphReport(compile_id=compile_id, sites=tuple(map(site, modules)), **facts)


def test_recompilations_count_no_block_twice():
    for number in range(3):
        report.record(graph_of(f"0/{number}", "layers.0", "layers.1", near_misses=(MISS, MISS)))
    last = report.last_report()
    assert len(last.sites) == 6 and len(last.near_misses) == 6
    assert summary(last) == (
        "moecompile: 2 MoE blocks rewritten (3 graphs: 2 recompilations), 2 near misses, no graph breaks"
    ).replace("rewritten", "found")
    assert "  2  layers.[0-1]" in str(last)
    report.record(graph_of("1/0", "layers.0"))
    report.record(graph_of("1/1", "layers.7"))
    assert [each.module for each in report.last_report().blocks] == ["layers.0", "layers.1", "layers.0", "layers.7"]


def test_what_dynamo_forgot_is_not_in_the_headline():
    broken = GraphBreak("in the loop", "model.py:80", moe=True)
    for compile_id in ("0/0", "1/0", "1/1", "3/0"):
        report.record(graph_of(compile_id, "layers.0", ended_by=broken))
    assert len(report.last_report().current) == 4
    report.record(graph_of("2/0", "layers.9"))
    last = report.last_report()
    assert last.graph_breaks == () and [each.module for each in last.blocks] == ["layers.9"]
    assert "5 captured graphs, 4 of them before torch._dynamo.reset()" in str(last)


def test_a_compiled_model_that_is_compiled_again_after_a_reset():
    model = Model()
    compiled(model)(inputs())
    torch._dynamo.reset()
    fast = compiled(model)
    for tokens in (12, 16, 20):
        fast(inputs(tokens))
    last = report.last_report()
    assert [graph.stage for graph in last.graphs] == [0, 1, 1]
    assert str(last).startswith("moecompile: 2 MoE blocks rewritten (2 graphs: 1 recompilation), no near misses")


def test_threads_record_without_loss():
    def work():
        for _ in range(50):
            report.record(GraphReport())
            report.last_report()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [graph.index for graph in report.last_report().graphs] == list(range(400))


def test_graph_breaks_come_once_and_moe_first():
    plain = GraphBreak("elsewhere", "train.py:3")
    inside = GraphBreak("in the loop", "model.py:80", moe=True)
    report.record(GraphReport(around=(plain,), ended_by=inside))
    report.record(GraphReport(ended_by=inside))
    assert report.last_report().graph_breaks == (inside, plain)


def test_graph_break_in_a_loop_over_experts_names_the_cure():
    path = "/site-packages/transformers/models/mixtral/modeling_mixtral.py"
    frame = traceback.FrameSummary(path, 80, "forward", line="for expert_idx in expert_hit:")
    found = GraphBreak.of("\nData dependent\n  Explanation: ...", [frame])
    assert (found.reason, found.source, found.moe) == ("Data dependent", "modeling_mixtral.py:80", True)
    assert found.cure is not None
    assert "set_experts_implementation" in found.cure
    attention = traceback.FrameSummary(path, 20, "forward", line="x = mask.item()")
    assert not GraphBreak.of("reason", [attention]).moe


class Broken(torch.nn.Module):
    def forward(self, x):
        x = x.sin()
        torch._dynamo.graph_break()
        return x.cos()


def test_record_of_a_captured_graph_knows_its_frame_and_break():
    def backend(gm, inputs):
        report.record(GraphReport.of(gm))
        return gm.forward

    torch.compile(Broken(), backend=backend, dynamic=False)(torch.randn(3))
    first, second = report.last_report().graphs
    assert first.name == "forward in test_report.py"
    assert first.compile_id == "0/0"
    assert first.ended_by is not None
    assert first.ended_by.source.startswith("test_report.py:")
    assert second.name.startswith("forward in test_report.py, resumed at line ")
    assert second.ended_by is None
    assert len(report.last_report().graph_breaks) == 1


def test_artifacts_reach_the_structured_trace_once():
    seen: list[tuple[str, str, str]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            artifact = getattr(record, "metadata", {}).get("artifact")
            if artifact:
                seen.append((artifact["name"], artifact["encoding"], getattr(record, "payload", "")))

    trace, handler = logging.getLogger("torch.__trace"), Keep()
    trace.addHandler(handler)
    try:
        graph = full_report().graphs[0]
        graph.log_artifacts()
        graph.backward = "return %0"
        graph.log_artifacts()
    finally:
        trace.removeHandler(handler)
    assert [(name, encoding) for name, encoding, _ in seen] == [
        ("moecompile_before", "string"),
        ("moecompile_after", "string"),
        ("moecompile_forward", "string"),
        ("moecompile_report", "string"),
        ("moecompile_report_json", "json"),
        ("moecompile_backward", "string"),
    ]
    payloads = {name: payload for name, _, payload in seen}
    assert payloads["moecompile_after"] == AFTER
    assert "5 MoE blocks rewritten" in payloads["moecompile_report"]
    assert json.loads(payloads["moecompile_report_json"])["version"] == 1


def test_diff_sees_through_renumbering_and_marks_rewired_lines():
    kinds = [row.kind for row in diff_rows(BEFORE.splitlines(), AFTER.splitlines())]
    assert kinds == ["same", "same", "same", "removed", "removed", "added", "rewired", "same", "same"]
    assert list(unified(BEFORE, BEFORE)) == ["@@ 8 unchanged @@"]


def test_diff_of_equal_operations_on_swapped_values():
    before = ["%0 = input x", "%1 = input y", "%2 = sub(%0, %1)", "return %2"]
    after = ["%0 = input x", "%1 = input y", "%2 = sub(%1, %0)", "return %2"]
    assert [row.kind for row in diff_rows(before, after)] == ["same", "same", "rewired", "same"]
