"""Every spelling of every form is found, and the rewritten graph computes what the model wrote."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

import moecompile  # noqa: F401  (registers the operators)
from fuzz_graphs import compare
from moecompile.passes.detect import detect
from moecompile.passes.forms import FORMS
from moecompile.passes.fuse import fuse
from moecompile.passes.printer import graph_text, input_names
from rewriting import rewrite
from zoo_capture import captured, captured_case
from zoo_case import Case, arguments, make
from zoo_controls_static import Loop
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


@pytest.mark.parametrize("form", [form.name for form in FORMS])
def test_questions_about_the_machine_are_no_borders(form: str) -> None:
    """As transformers asks between its grouped GEMMs on a GPU; Dynamo leaves the question in the graph."""
    gm = copy.deepcopy(captured_case(next(case for case in CASES if case.form == form)).gm)
    asked = (torch.cuda.get_device_capability, torch.cuda.is_bf16_supported)
    for node, question in zip(list(gm.graph.nodes), itertools.cycle(asked), strict=False):
        if node.op not in {"placeholder", "output"}:
            with gm.graph.inserting_after(node):
                gm.graph.call_function(question)
    detection = detect(gm.graph)
    assert [site.form for site in detection.sites] == [form], detection.near_misses


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


@pytest.mark.parametrize("form", [form.name for form in FORMS])
def test_backward_golden(form: str, golden) -> None:
    """AOTAutograd's forward and backward graph of each form's first case: our operators and their edges."""
    case = next(case for case in CASES if case.form == form)
    texts: dict[str, str] = {}

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        assert rewrite(gm) == 1
        names = input_names(gm.graph)

        def keep(which: str) -> Callable[..., object]:
            def compiler(traced: fx.GraphModule, _: object) -> Callable[..., object]:
                texts[which] = graph_text(traced.graph, collapse=True, inputs=names, source=False)
                return make_boxed_func(traced.forward)

            return compiler

        return aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))(gm, example_inputs)

    result = torch.compile(make(case), backend=backend, fullgraph=case.fullgraph)(*arguments(case))
    (result[0] if isinstance(result, tuple) else result).sum().backward()
    golden(f"backward_{form}", f"# forward\n{texts['forward']}\n# backward\n{texts['backward']}\n")


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


class Marked(nn.Module):
    """Expert parallelism masks ids from `bound` on, as other ranks' experts; `choose` makes ids from five scores."""

    def __init__(self, choose: Callable[[Tensor], Tensor], bound: int = 4) -> None:
        super().__init__()
        self.choose, self.bound = choose, bound
        self.router = nn.Linear(32, 5, bias=False)
        self.w_in = nn.Parameter(torch.randn(4, 32, 64) / 6)
        self.w_out = nn.Parameter(torch.randn(4, 32, 32) / 6)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        ids = self.choose(scores)
        weights = scores.gather(1, ids.clamp(max=3))
        ids_sorted, order = ids.reshape(-1).sort()
        foreign = (ids_sorted >= self.bound).unsqueeze(-1)
        offsets = torch.histc(ids_sorted.float(), 4, 0, 3).cumsum(0).to(torch.int32)
        ids_sorted.clamp_(max=self.bound - 1)
        rows = x[order // 2].masked_fill(foreign, 0.0).bfloat16()
        gate, up = torch._grouped_mm(rows, self.w_in.bfloat16(), offs=offsets).chunk(2, -1)
        y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, self.w_out.bfloat16(), offs=offsets)
        y = y.masked_fill(foreign, 0.0) * weights.view(-1)[order].unsqueeze(-1)
        return y[order.argsort()].view(-1, 2, 32).sum(1)


def best(scores: Tensor) -> Tensor:
    return scores[:, :4].topk(2)[1]


def best_of_five(scores: Tensor) -> Tensor:
    return scores.topk(2)[1]


def halves(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores[:, :4].argmax(-1), scores[:, 1:5].argmax(-1)


def written(ids: Tensor) -> Tensor:
    ids.detach().add_(1)
    return ids


# ids that are all local, and what looks like them and is not known to be
LOCAL: dict[str, Callable[[Tensor], Tensor]] = {
    "topk": best,
    "cat": lambda scores: torch.cat([scores[:, :4].max(1, True)[1], scores[:, 1:5].max(1, True)[1]], dim=-1),
    "stack": lambda scores: torch.stack(halves(scores), dim=1),
    "last masked": lambda scores: (ids := best_of_five(scores)).masked_fill(ids == 4, 0),
    "any masked": lambda scores: best(scores).masked_fill(scores[:, :2] > 0.5, 3),
}
FOREIGN: dict[str, Callable[[Tensor], Tensor]] = {
    "topk": best_of_five,
    "cat": lambda scores: torch.cat([scores[:, :4].max(1, True)[1], scores.max(1, True)[1]], dim=-1),
    "stack": lambda scores: torch.stack([scores.argmax(-1), scores[:, :4].argmax(-1)], dim=1),
    "another masked": lambda scores: (ids := best_of_five(scores)).masked_fill(ids == 3, 0),
    "last masked elsewhere": lambda scores: (ids := best_of_five(scores)).masked_fill(ids.flip(0) == 4, 0),
    "any masked": lambda scores: best(scores).masked_fill(scores[:, :2] > 0.5, 4),
    "written after cat": lambda scores: written(torch.cat([best(scores)[:, :1], best(scores)[:, 1:]], dim=1)),
}


@pytest.mark.parametrize("name", LOCAL)
def test_marks_of_foreign_assignments(name: str) -> None:
    """They mark nothing where all ids are local."""
    torch.manual_seed(0)
    known = captured(Marked(LOCAL[name]), (torch.randn(24, 32),), fullgraph=True)
    verdict = compare(known.gm, known.inputs, rewrite, (), "marks")
    assert (verdict.outcome, verdict.sites) == ("equal", 1), verdict.detail


@pytest.mark.parametrize(("name", "bound"), [("topk", 3), *((name, 4) for name in FOREIGN)])
def test_marks_of_assignments_that_may_be_foreign(name: str, bound: int) -> None:
    choose = LOCAL[name] if bound == 3 else FOREIGN[name]
    torch.manual_seed(0)
    known = captured(Marked(choose, bound), (torch.randn(24, 32),), fullgraph=True)
    assert detect(known.gm.graph).sites == ()


@pytest.mark.parametrize(("accumulate", "sites"), [(True, 1), (False, 0)])
def test_a_loop_over_ids_chosen_one_after_the_other(accumulate: bool, sites: int) -> None:
    """All its experts are known to run; but a token may have chosen one of them twice, and a write keeps one result."""

    class Twice(Loop):
        def forward(self, x: Tensor) -> Tensor:
            scores = self.router(x).softmax(-1)
            ids = torch.stack([scores.argmax(-1), scores.flip(0).argmax(-1)], dim=1)
            weights, out = scores.gather(1, ids), torch.zeros_like(x)
            for e in self.turns():
                token, place = self.hits(ids, e)
                y = self.weigh(self.expert(x[token], e), weights, token, place)
                out = out.index_put((token,), y if accumulate else out[token] + y, accumulate=accumulate)
            return out

    torch.manual_seed(0)
    known = captured(Twice(), (torch.randn(24, 32),), fullgraph=True)
    verdict = compare(known.gm, known.inputs, rewrite, (), "loop")
    assert (verdict.outcome, verdict.sites) == ("equal", sites), verdict.detail


class Clamped(nn.Module):
    """Expert ids that are given, whatever they are, clamped to 0 .. `last`."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last
        self.w_in, self.w_out = nn.Parameter(torch.randn(4, 16, 32)), nn.Parameter(torch.randn(4, 32, 16))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        expert, order = ids.clamp(0, self.last).view(-1).sort()
        ends = torch.histc(expert.float(), bins=4, min=0, max=3).cumsum(0).int()
        h = torch._grouped_mm(x[order // 2].bfloat16(), self.w_in.bfloat16(), offs=ends).relu()
        y = torch._grouped_mm(h, self.w_out.bfloat16(), offs=ends).float() * weights.view(-1)[order].unsqueeze(-1)
        return y[order.argsort()].view(-1, 2, 16).sum(1)


def test_clamped_ids_name_experts() -> None:
    """Two ids of a token may then be one, and are two assignments all the same."""
    ids = torch.tensor([[-3, 0], [9, 3], [1, 2], [7, 8], [2, 2]])
    given = (torch.randn(5, 16), ids, torch.rand(5, 2))
    known = captured(Clamped(3), given)
    verdict = compare(known.gm, known.inputs, rewrite, (), "clamped")
    assert (verdict.outcome, verdict.sites) == ("equal", 1), verdict.detail
    assert detect(captured(Clamped(4), given).gm.graph).sites == (), "rows of id 4 are no expert's"
