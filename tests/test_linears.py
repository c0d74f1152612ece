"""Which linear layers would multiply in FP8, and why the others are kept: read off the data of the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from moecompile.passes.detect import detect
from moecompile.passes.exclusions import Wishes
from moecompile.passes.fuse import fuse
from moecompile.passes.linears import Verdict, verdicts
from moecompile.pipeline import Piece, _transforms_hidden
from moecompile.report import GraphReport

H, VOCABULARY = 256, 640


def judged(model: nn.Module, *inputs: Tensor, **choice: Any) -> list[Verdict]:
    """Of every graph that Dynamo captures, after the experts have been fused."""
    found: list[Verdict] = []

    def backend(gm: fx.GraphModule, _: list[Any]) -> Any:
        with _transforms_hidden([Piece(gm)], GraphReport()):
            found.extend(fused(gm, **choice))
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    return found


def fused(gm: fx.GraphModule, **choice: Any) -> list[Verdict]:
    """Fuses the graph's experts; the verdicts then."""
    detection = detect(gm.graph)
    fuse(gm.graph, detection.sites, detection.layout)
    return verdicts(gm.graph, Wishes(**choice))


class Layers(nn.Module):
    """Layers by name; `forward` is the case's."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, **sizes: tuple[int, int]) -> None:
        super().__init__()
        for name, (n, k) in sizes.items():
            self.add_module(name, nn.Linear(k, n, bias=False, dtype=dtype))

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


def reasons(model: nn.Module, *inputs: Tensor, **choice: Any) -> dict[str, str | None]:
    """Why each layer is kept, by name; None of those that are cast."""
    found = judged(model, *inputs, **choice)
    return {verdict.module: None if verdict.cast else verdict.reason for verdict in found}


def rows(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(8, H, dtype=dtype)


def test_layers_are_cast() -> None:
    class Model(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(functional.silu(self.up(x)))

    assert reasons(Model(up=(512, H), down=(H, 512)), rows()) == {"up": None, "down": None}


def test_what_feeds_topk_is_kept() -> None:
    """The layer before it, through whatever; what lies further back only if nobody else has its result."""

    class Model(Layers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.before(x)
            own = functional.silu(self.first(h))
            scores = functional.softmax(self.second(own).float(), -1) + 1
            return scores.topk(2).indices, h * 2

    model = Model(before=(H, H), first=(128, H), second=(64, 128))
    assert reasons(model, rows()) == {"before": None, "first": "it feeds topk", "second": "it feeds topk"}


@pytest.mark.parametrize("choosing", ["sort", "argsort", "argmax"])
def test_what_feeds_other_choices_is_kept(choosing: str) -> None:
    class Model(Layers):
        def forward(self, x: Tensor) -> Any:
            found = getattr(self.scores(x), choosing)(-1)
            return (found[1] if choosing == "sort" else found), self.other(x)

    assert reasons(Model(scores=(64, H), other=(64, H)), rows()) == {"scores": f"it feeds {choosing}", "other": None}


def test_scores_that_somebody_else_reads_too_are_kept() -> None:
    class Model(Layers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.router(x)
            return scores.topk(2).indices, scores.logsumexp(-1)

    assert reasons(Model(router=(64, H)), rows()) == {"router": "it feeds topk"}


def test_the_head_is_kept() -> None:
    class Tied(Layers):
        def __init__(self) -> None:
            super().__init__(inner=(H, H), head=(VOCABULARY, H))
            self.embedding = nn.Embedding(VOCABULARY, H, dtype=torch.bfloat16)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.inner(self.embedding(ids)))

    class Untied(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(H, VOCABULARY, dtype=torch.bfloat16)

    ids = torch.randint(0, VOCABULARY, (2, 8))
    assert reasons(Tied(), ids) == {"inner": None, "head": "its matrix is an embedding's"}
    words = f"it has as many output features as an embedding has rows, {VOCABULARY}"
    assert reasons(Untied(), ids) == {"inner": None, "head": words}


@pytest.mark.parametrize("labels", [False, True], ids=["returned", "with labels"])
def test_a_head_without_its_embedding_is_kept(labels: bool) -> None:
    """A graph break may lie between them: a result much wider than its rows that leaves the graph is in doubt."""

    class Model(Layers):
        def forward(self, x: Tensor) -> Tensor:
            scores = torch.tanh(self.head(self.wide(x).chunk(4, -1)[0]) / 30).float() * 30
            return functional.cross_entropy(scores, torch.arange(8)) if labels else scores

    found = reasons(Model(wide=(4 * H, H), head=(2048, H)), rows())
    assert found["wide"] is None and ("meets labels" if labels else "leaves the graph") in str(found["head"])


def test_what_cannot_be_cast_says_so() -> None:
    class Model(Layers):
        def forward(self, x: Tensor) -> list[Any]:
            made = functional.linear(x, self.made.weight * 2)
            cast = functional.linear(x.float(), self.cast.weight.float())
            written = torch.einsum("tk,nk->tn", x, self.written.weight)
            return [self.narrow(self.rank(x)), self.few(x), made, cast.bfloat16(), written]

    model = Model(rank=(96, H), narrow=(H, 96), few=(4, H), made=(H, H), cast=(H, H), written=(H, H))
    found = [verdict for verdict in judged(model, rows()) if not verdict.cast]
    assert [verdict.reason for verdict in found] == [
        "its matrix is no parameter, or is computed from one",
        "its matrix is no parameter, or is computed from one",
        "it is written as einsum",
        "96 input features are no multiple of 128",
        "4 output features are no multiple of 16",
    ]


def test_float32_is_kept() -> None:
    class Model(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    found = reasons(Model(torch.float32, layer=(H, H)), rows(torch.float32))
    assert found == {"layer": "float32: only products in bfloat16 and float16 are cast"}


def test_the_user_has_the_last_word() -> None:
    class Model(Layers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.router(x).topk(2).indices, self.q_proj(x), self.k_proj(x)

    model = Model(router=(64, H), q_proj=(H, H), k_proj=(H, H))
    found = reasons(model, rows(), exclude=("*_proj",), include=("router", "k_proj"))
    assert found == {"router": None, "q_proj": "fp8_exclude names it", "k_proj": "fp8_exclude names it"}


@pytest.mark.parametrize(
    "choosing",
    [
        "max", "min", "argmin", "kthvalue", "multinomial", "msort", "threshold", "aten", "is largest", "in place",
        "median", "mode", "cummax", "round", "sign", "whole", "truth", "nonzero", "gumbel", "both", "pool",
    ],
)  # fmt: skip
def test_every_way_to_choose_keeps_its_router(choosing: str) -> None:
    class Model(Layers):
        def forward(self, x: Tensor) -> tuple[Any, Tensor]:
            scores = self.router(x)
            chosen = {
                "max": lambda: scores.max(-1).indices,
                "is largest": lambda: scores == scores.amax(-1, keepdim=True),
                "in place": lambda: scores.clone().gt_(0.5),
                "median": lambda: scores.median(-1).indices,
                "mode": lambda: scores.mode(-1)[1],
                "cummax": lambda: scores.cummax(-1).indices,
                "round": lambda: scores.sigmoid().round(),
                "sign": scores.sign,
                "whole": scores.long,
                "truth": scores.bool,
                "nonzero": lambda: scores.relu().count_nonzero(-1),
                "gumbel": lambda: functional.gumbel_softmax(scores, hard=True),
                "both": lambda: torch.logical_and(scores, scores),
                "pool": lambda: functional.max_pool1d(scores.float(), 2, return_indices=True)[1],
                "min": lambda: torch.min(scores, 1)[1],
                "argmin": lambda: scores.argmin(-1),
                "kthvalue": lambda: scores.kthvalue(3).indices,
                "multinomial": lambda: scores.softmax(-1).multinomial(2),
                "msort": lambda: torch.msort(scores),
                "threshold": lambda: scores > 0.5,
                "aten": lambda: torch.ops.aten.topk(scores, 2)[1],
            }[choosing]()
            return chosen, self.other(x)

    found = reasons(Model(router=(64, H), other=(64, H)), rows())
    assert found["other"] is None and str(found["router"]).startswith("it feeds ")


class Decoder(Layers):
    """Blocks with residuals; `head` and `embedding` are the case's."""

    def __init__(self, **more: tuple[int, int]) -> None:
        super().__init__(torch.bfloat16, **{"q": (H, H), "o": (H, H), "up": (2 * H, H), "down": (H, 2 * H)}, **more)
        self.norm = nn.RMSNorm(H, dtype=torch.bfloat16)

    def hidden(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(self.norm(x)))
        return self.norm(x + self.down(functional.silu(self.up(self.norm(x)))))


def test_largest_values_choose_nothing() -> None:
    """As softmax by hand takes them off: q and k of attention with sinks."""

    class Model(Layers):
        def forward(self, x: Tensor) -> Tensor:
            scores = self.q(x) @ self.k(x).T
            scores = scores - scores.max(-1, keepdim=True).values
            shifted: Tensor = self.o(torch.where(scores.isfinite(), scores, 0).exp().to(x.dtype) @ self.v(x))
            return shifted

    assert not any(reasons(Model(q=(H, H), k=(H, H), v=(H, H), o=(H, H)), rows()).values())


@pytest.mark.parametrize(
    "way",
    [
        lambda s, labels: s.logsumexp(-1) - s.gather(-1, labels[:, None]).squeeze(-1),
        lambda s, labels: s - s.amax(-1, keepdim=True),
        lambda s, labels: s / s.norm(dim=-1, keepdim=True),
        lambda s, labels: s[4:] + 2 * (s[:4] - s[4:]),
    ],
    ids=["likelihood", "shifted", "normalised", "guided"],
)
def test_scores_that_meet_themselves_are_scores(way: Any) -> None:
    class Model(Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            result: Tensor = way(self.head(self.hidden(self.embedding(ids))), ids)
            return result

    model = Model(head=(VOCABULARY, H))
    model.embedding = nn.Embedding(VOCABULARY, H, dtype=torch.bfloat16)
    found = reasons(model, torch.arange(8))
    assert {name for name, reason in found.items() if reason} == {"head"}


def test_heads_of_chunks_and_mixtures() -> None:
    class Model(Decoder):
        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            x = self.hidden(self.embedding(ids))
            chunks = torch.cat([self.head(each) for each in x.chunk(2)])
            gate = torch.sigmoid(self.gate(x))
            return chunks, gate * self.other(x).softmax(-1) + (1 - gate) * self.head(x).softmax(-1)

    model = Model(head=(VOCABULARY, H), other=(VOCABULARY, H), gate=(16, H))
    model.embedding, model.gate = nn.Embedding(VOCABULARY, H, dtype=torch.bfloat16), nn.Linear(H, 1).bfloat16()
    found = reasons(model, torch.arange(8))
    assert {name for name, reason in found.items() if reason} == {"head", "other", "gate"}


def test_a_router_whose_choice_is_in_another_graph_is_kept() -> None:
    class Model(Layers):
        def forward(self, x: Tensor) -> Tensor:
            scores = self.router(x).float()
            torch._dynamo.graph_break()
            return scores.softmax(-1).topk(2).indices

    found = reasons(Model(router=(16, H)), rows())
    assert "leaves the graph as a router's would" in str(found["router"])


def test_what_is_chosen_of_a_head_keeps_the_head_alone() -> None:
    """An accuracy beside the loss, a sampling step: residuals end the way back."""

    class Model(Decoder):
        def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.head(self.hidden(x))
            return functional.cross_entropy(scores.float(), labels), (scores.argmax(-1) == labels).float().mean()

    found = reasons(Model(head=(VOCABULARY, H)), rows(), torch.arange(8))
    assert {name for name, reason in found.items() if reason} == {"head"}


def test_noisy_choices_keep_both_layers() -> None:
    class Model(Layers):
        def forward(self, x: Tensor) -> Tensor:
            scores = self.clean(x) + torch.randn(8, 64, dtype=x.dtype) * functional.softplus(self.noise(x))
            return scores.topk(2).indices

    assert all(reasons(Model(clean=(64, H), noise=(64, H)), rows()).values())


@pytest.mark.parametrize(
    "noisy",
    [
        lambda s: s + torch.randn_like(s) * 0.1,
        lambda s: torch.rand_like(s) * 1e-2 + s,
        lambda s: s + torch.randn_like(s) * functional.softplus(s),
        lambda s: s + functional.silu(s),
        lambda s: s + torch.zeros_like(s),
        lambda s: s + (s.softmax(-1) - s).detach(),
        lambda s: s + s.detach().mean(0),
    ],
    ids=["jitter", "jitter first", "scaled noise", "swish", "zeros", "straight through", "mean"],
)
def test_what_is_made_of_scores_alone_is_no_residual(noisy: Any) -> None:
    class Model(Layers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x + self.up(functional.silu(self.down(x)))
            return noisy(self.router(x)).topk(2).indices, x

    found = reasons(Model(router=(64, H), up=(H, H), down=(H, H)), rows())
    assert found == {"router": "it feeds topk", "up": None, "down": None}


def test_noisy_routers_of_near_misses_are_kept() -> None:
    """Rows are normalised between the experts' products, so that nothing tells the router but its choice."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(H, 16, bias=False)
            self.w_in = nn.Parameter(torch.randn(16, H, 2 * H) / 16)
            self.w_out = nn.Parameter(torch.randn(16, H, H) / 16)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.router(x)
            scores = scores + torch.randn_like(scores) * 0.1
            weights, ids = scores.softmax(-1).topk(2)
            order = ids.flatten().argsort()
            offsets = torch.bincount(ids.flatten(), minlength=16).cumsum(0).to(torch.int32)
            gate, up = torch._grouped_mm(x[order // 2], self.w_in, offs=offsets).chunk(2, -1)
            hidden = functional.rms_norm(functional.silu(gate) * up, (H,))
            result = torch._grouped_mm(hidden, self.w_out, offs=offsets) * weights.flatten()[order].unsqueeze(1)
            return torch.zeros_like(x).index_add(0, order // 2, result)

    assert reasons(Model().to(torch.bfloat16), rows()) == {"router": "it feeds topk"}


@pytest.mark.parametrize(
    "way",
    [
        lambda s, labels: functional.cross_entropy(s.float().view(-1, s.shape[-1]), labels),
        lambda s, labels: s.log_softmax(-1).gather(1, labels[:, None]),
        lambda s, labels: 3 * torch.tanh(s.float() / 3),
        lambda s, labels: s.softmax(-1),
        lambda s, labels: s.logsumexp(-1),
        lambda s, labels: s.clamp(-9, 9),
        lambda s, labels: s.masked_fill(torch.arange(s.shape[-1]) > 600, -torch.inf),
    ],
    ids=["loss", "likelihood", "soft cap", "softmax", "logsumexp", "clamp", "masked"],
)
def test_a_head_is_known_by_where_its_scores_go(way: Any) -> None:
    class Model(Decoder):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            result: Tensor = way(self.head(self.hidden(x)), labels)
            return result

    found = reasons(Model(head=(4 * H, H)), rows(), torch.arange(8))
    assert {name for name, reason in found.items() if reason} == {"head"}


@pytest.mark.parametrize("lookup", ["index", "bag"])
def test_a_tied_head_is_known_by_its_matrix(lookup: str) -> None:
    class Model(Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            table = self.table.weight
            x = table[ids] if lookup == "index" else functional.embedding_bag(ids[:, None], table)
            return functional.linear(self.hidden(x), table) * self.norm(x)[:, :1]

    found = reasons(Model(table=(VOCABULARY, H)), torch.arange(8))
    assert [reason for reason in found.values() if reason] == ["its matrix is an embedding's"]


def test_a_layer_as_wide_as_the_positions_is_no_head() -> None:
    class Model(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Embedding(2 * H, H, dtype=torch.bfloat16)

        def forward(self, x: Tensor, places: Tensor) -> Tensor:
            return self.hidden(x + self.positions(places))

    assert not any(reasons(Model(), rows(), torch.arange(8)).values())


def test_matrices_that_are_computed_are_listed() -> None:
    class Model(Layers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return functional.linear(x, self.a.weight * 2), torch.tensordot(x, self.a.weight, 1)

    found = judged(Model(a=(H, H)), rows())
    assert [verdict.reason for verdict in found] == [
        "its matrix is no parameter, or is computed from one",
        "it is written as tensordot",
    ]
