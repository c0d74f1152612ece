"""Hand-made records for the tests of the report: every kind of thing a report can hold."""

from __future__ import annotations

from moecompile.passes.casts import Cast
from moecompile.passes.site import NearMiss, Site
from moecompile.report import Compared, GraphBreak, GraphReport, PassRecord, Report

BEFORE = """\
%0 = input layers.0.mlp.gate_up_proj  : bf16[8, 64, 64]
%1 = input hidden_states  : bf16[s0, 64]
%2 = linear(%1, %0)  : bf16[s0, 8]  # layers.0.mlp.gate  model.py:10
%3 = sort(%2)  : (bf16[s0, 8], i64[s0, 8])  # layers.0.mlp  model.py:11
%4 = grouped_mm(%1, %0)  : bf16[s0, 64]  # layers.0.mlp  model.py:12
%5 = relu(%4)  : bf16[s0, 64]  # norm  model.py:20
%6 = relu(%5)  : bf16[s0, 64]  # norm  model.py:21
return %6"""

AFTER = """\
%0 = input layers.0.mlp.gate_up_proj  : bf16[8, 64, 64]
%1 = input hidden_states  : bf16[s0, 64]
%2 = linear(%1, %0)  : bf16[s0, 8]  # layers.0.mlp.gate  model.py:10
%3 = moecompile.experts(x=%1, w_in=%0, activation="mul(silu(gate), up)")  : bf16[s0, 64]  # layers.0.mlp  model.py:12
%4 = relu(%3)  : bf16[s0, 64]  # norm  model.py:20
%5 = relu(%4)  : bf16[s0, 64]  # norm  model.py:21
return %5"""


def site(module: str = "model.layers.0.mlp.experts", **changes) -> Site:
    facts: dict = {
        "form": "grouped_mm", "tokens": "s0", "top_k": "2", "num_experts": 8, "hidden": 64, "intermediate": 32,
        "activation": "mul(silu(gate), up)", "input": "x", "output": "mul(out, weight)", "gate_up": "halves",
        "dtype": "bfloat16", "biases": (), "source": "moe.py:440",
    }  # fmt: skip
    return Site(module=module, **{**facts, **changes})


CLAMPED = "mul(add(clamp(up, -7.0, 7.0), 1), mul(clamp(gate, None, 7.0), sigmoid(mul(clamp(gate, None, 7.0), 1.702))))"
UNUSUAL = site(
    "decoder.moe", form="batched_mm", num_experts=32, top_k="4", hidden=2880, intermediate=2880, activation=CLAMPED,
    gate_up="interleaved", biases=("b_in", "b_out"), output="out", w_in_transposed=True, w_out_transposed=True,
)  # fmt: skip
MISS = NearMiss(
    "dense", "the experts' rows are <used> outside the block", "mul", "model.layers.3.mlp", "model.py:88", "sum first"
)


CASTS = (
    *(Cast(f"model.layers.{layer}.mlp.experts", "experts", (8, 64, 64), True, "experts") for layer in (0, 1, 2, 4)),
    *(Cast(f"model.layers.{layer}.self_attn.q_proj", "linear", (64, 64), True, "a linear layer") for layer in range(5)),
    *(Cast(f"model.layers.{layer}.mlp.gate", "linear", (8, 64), False, "it chooses experts") for layer in range(5)),
    Cast("lm_head", "other", ("s0", 64), False, "it is written as <einsum>"),
)


COMPARED = (
    Compared("model.layers.0.mlp.experts", "experts", alone=23.94, in_model=22.8),
    Compared("model.layers.0.self_attn.q_proj", "linear", alone=28.5, in_model=28.5),
    Compared("model.layers.0.mlp.<experts>", "choice of experts", agreement=0.98765),
)


def full_report() -> Report:
    """One of everything."""
    graph = GraphReport(
        index=0,
        name="forward in model.py",
        compile_id="0/0",
        sites=(*(site(f"model.layers.{layer}.mlp.experts") for layer in (0, 1, 2, 4)), UNUSUAL),
        near_misses=(MISS,),
        casts=CASTS,
        passes=[
            PassRecord("detect", 3.25),
            PassRecord("fuse", 1.0, {"grouped_mm": (8, 0), "moecompile.experts": (0, 4), "sort": (4, 0)}),
        ],
        before=BEFORE,
        after=AFTER,
        forward="...\n%0 = moecompile.experts_forward(x=...)\nreturn %0",
        cached="miss",
        compared=COMPARED,
        verify=["model.layers.0.mlp.experts: equal, worst relative error 3.1e-07"],
        notes=["a note with </script> in it"],
    )
    again = GraphReport(index=1, name="forward in model.py", compile_id="0/1", before=BEFORE, after=BEFORE)
    breaks = (
        GraphBreak("Could not extract a specialized integer", "model.py:80", moe=True, cure="use grouped_mm"),
        GraphBreak("Call to torch._dynamo.graph_break()", "train.py:12"),
    )
    return Report((graph, again), breaks)
