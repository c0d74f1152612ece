"""Every spelling of every form is found, and the rewritten graph computes what the model wrote."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moecompile  # noqa: F401  (registers the operators)
from fuzz_graphs import compare
from moecompile.passes.detect import detect
from moecompile.passes.forms import FORMS
from moecompile.passes.fuse import fuse
from moecompile.passes.printer import graph_text
from rewriting import rewrite
from zoo_capture import captured, captured_case
from zoo_case import Case, arguments, make
from zoo_forms import CASES

# cases whose data flow is another form's than the one their author had in mind
OTHER_FORM = {"embedded_units": "batched_mm", "token_index_einsum": "gather_einsum"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.form}-{case.name}")
def test_every_spelling_is_found(case: Case) -> None:
    gm = captured_case(case).gm
    detection = detect(gm.graph)
    assert [site.form for site in detection.sites] == [OTHER_FORM.get(case.name, case.form)], detection.near_misses
    assert detection.near_misses == ()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.form}-{case.name}")
def test_every_spelling_computes_the_same(case: Case) -> None:
    known = captured_case(case)
    verdict = compare(known.gm, known.inputs, rewrite, (), case.name)
    assert (verdict.outcome, verdict.sites) == ("equal", 1), verdict.detail


@pytest.mark.parametrize("case", [case for case in CASES if not case.fullgraph], ids=lambda case: case.name)
def test_other_token_counts(case: Case) -> None:
    # two tokens leave Switch's experts no capacity at all
    for tokens in (4 if case.form == "capacity" else 2, 8, 40):
        known = captured(make(case), arguments(case, tokens))
        verdict = compare(known.gm, known.inputs, rewrite, (), case.name)
        assert verdict.outcome == "equal", f"{tokens} tokens: {verdict.detail}"
        assert verdict.sites == 1, f"{tokens} tokens: not found"


def test_every_form_has_two_spellings() -> None:
    for form in FORMS:
        spellings = [case.name for case in CASES if case.form == form.name]
        assert len(spellings) >= 2, f"{form.name} has {spellings}"


@pytest.mark.parametrize("form", [form.name for form in FORMS])
def test_golden(form: str, golden) -> None:
    """The graph of each form's first case, as captured and as rewritten."""
    case = next(case for case in CASES if case.form == form)
    gm = captured_case(case).gm
    before = graph_text(gm.graph, source=False)
    fuse(gm.graph, detect(gm.graph).sites)
    golden(f"form_{form}", f"# captured\n{before}\n# rewritten\n{graph_text(gm.graph, source=False)}\n")


def test_routing_values_may_be_used_outside() -> None:
    """ids, permutation, counts and offsets stay alive for whoever reads them; the block is still replaced."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(32, 4, bias=False)
            self.w_in = nn.Parameter(torch.randn(4, 32, 64) / 6)
            self.w_out = nn.Parameter(torch.randn(4, 32, 32) / 6)

        def forward(self, x):
            weights, ids = self.router(x).softmax(-1).topk(2)
            flat = ids.view(-1)
            permutation = flat.argsort(stable=True)
            counts = torch.bincount(flat, minlength=4)
            offsets = counts.cumsum(0).to(torch.int32)
            rows = x[permutation // 2].bfloat16()
            gate, up = torch._grouped_mm(rows, self.w_in.bfloat16(), offs=offsets).chunk(2, -1)
            y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, self.w_out.bfloat16(), offs=offsets)
            y = y * weights.view(-1)[permutation].unsqueeze(-1)
            return (
                torch.zeros_like(y[: x.shape[0]]).index_add(0, permutation // 2, y),
                ids,
                permutation,
                counts,
                offsets,
            )

    torch.manual_seed(0)
    known = captured(Model(), (torch.randn(24, 32),), fullgraph=True)
    verdict = compare(known.gm, known.inputs, rewrite, (), "routing values")
    assert (verdict.outcome, verdict.sites) == ("equal", 1), verdict.detail


def test_a_graph_without_experts_is_left_alone() -> None:
    known = captured(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), (torch.randn(4, 8),))
    detection = detect(known.gm.graph)
    assert detection.sites == () and detection.near_misses == ()


@pytest.mark.parametrize("bound", [4, 3])
def test_marks_of_foreign_assignments(bound: int) -> None:
    """Expert parallelism masks ids beyond the local experts: nothing where all ids are local, else not understood."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(32, 4, bias=False)
            self.w_in = nn.Parameter(torch.randn(4, 32, 64) / 6)
            self.w_out = nn.Parameter(torch.randn(4, 32, 32) / 6)

        def forward(self, x):
            weights, ids = self.router(x).softmax(-1).topk(2)
            ids_sorted, order = ids.reshape(-1).sort()
            foreign = (ids_sorted >= bound).unsqueeze(-1)
            offsets = torch.histc(ids_sorted.float(), 4, 0, 3).cumsum(0).to(torch.int32)
            ids_sorted.clamp_(max=bound - 1)
            rows = x[order // 2].masked_fill(foreign, 0.0).bfloat16()
            gate, up = torch._grouped_mm(rows, self.w_in.bfloat16(), offs=offsets).chunk(2, -1)
            y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, self.w_out.bfloat16(), offs=offsets)
            y = y.masked_fill(foreign, 0.0) * weights.view(-1)[order].unsqueeze(-1)
            return y[order.argsort()].view(-1, 2, 32).sum(1)

    torch.manual_seed(0)
    known = captured(Model(), (torch.randn(24, 32),), fullgraph=True)
    verdict = compare(known.gm, known.inputs, rewrite, (), "marks")
    assert (verdict.outcome, verdict.sites) == ("equal", int(bound == 4)), verdict.detail
