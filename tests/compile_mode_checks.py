"""How models with experts over ranks may be compiled, what ranks check together (tests/test_compile_modes.py).

Each check is a function of (rank, ranks), and the proof of a row of tests/compile_modes.py.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import moecompile
from expert_parallel_models import (
    EXPERTS,
    TOP_K,
    Block,
    Experts,
    Model,
    close,
    meaned,
    mesh_of,
    results,
    tokens_of,
    with_mean_of_others,
)
from moecompile import agreement
from moecompile import ranks as moecompile_ranks
from moecompile.agreement import DisagreementError

EAGER = {"lowering": "eager"}
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
Run = Callable[..., Any]


class WholeExperts(Experts):
    """Experts whose counts break no graph, so that fullgraph=True may be left out."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        ends = torch.histc(flat.float(), bins=EXPERTS, min=0, max=EXPERTS - 1).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(x[order // TOP_K], self.w_in, offs=ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, self.w_out, offs=ends)
        y = y.float() * weights.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x, dtype=torch.float32).index_add_(0, order // TOP_K, y).to(x.dtype)


class Regions(Block):
    """A block that is one region of the graph, compiled once for all that are like it."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, routed_by: Tensor | None = None) -> Tensor:
        return super().forward(x, routed_by)


class Around(Model):
    """Something around each block: a checkpoint, say."""

    def __init__(self, around: Callable[..., Any]) -> None:
        super().__init__(fixed=True)
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + self.around(block, x)
        return self.last(x)


def forget() -> None:
    """What is compiled, what the ranks have agreed on, and the report."""
    agreement.forget()
    moecompile.reset()
    torch._dynamo.reset()


def sharded(count: int, model: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """A model over all ranks, and as it is; what was compiled before is forgotten."""
    forget()
    model = Model(fixed=True) if model is None else model
    for block in model.modules():
        if type(block) is Experts:
            block.__class__ = WholeExperts
    whole = copy.deepcopy(model)
    return moecompile.shard_experts(model, mesh_of(count)), whole


def compiled(model: Run, **given: Any) -> Run:
    return torch.compile(model, backend="moecompile", **{"options": EAGER, **given})


def text() -> str:
    """Of all graphs, rewritten."""
    return "\n".join(graph.after for graph in moecompile.last_report().graphs)


def exchanged(blocks: int = 2) -> None:
    """So many blocks exchange their tokens, and nobody gathers experts."""
    assert text().count("dispatch_start") == blocks and "gather_experts" not in text(), text()


def trains(run: Run, model: nn.Module, whole: nn.Module, x: Tensor, bound: float = 1.5e-2) -> None:
    """Results and gradients are those of the whole model."""
    right = meaned(results(whole, whole, x), whole)
    close(with_mean_of_others(results(run, model, x), model), right, bound)


def says(run: Callable[[], Any], *words: str) -> None:
    """It fails, with these words."""
    said = ""
    try:
        run()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    assert said and all(word in said for word in words), said or "it did not fail"


def in_mode(rank: int, count: int, mode: str, training: bool) -> None:
    """On CPUs Inductor takes of a mode what does not ask for a GPU."""
    model, whole = sharded(count, Block())
    x = tokens_of(rank, 6 + 5 * rank)
    run = compiled(model, mode=mode, options=None, fullgraph=True)
    with torch.no_grad():
        close([run(x), run(x)], [whole(x)] * 2, 1.5e-2)
    exchanged(1)
    if training:
        trains(run, model, whole, x)
        exchanged(2)


def check_reduced_overhead(rank: int, count: int) -> None:
    in_mode(rank, count, "reduce-overhead", training=False)


def check_all_modes(rank: int, count: int) -> None:
    for mode in MODES:
        in_mode(rank, count, mode, training=True)


def check_modes_beside_options(rank: int, count: int) -> None:
    """Torch takes one of the two; a mode's options go under `inductor`."""
    model, whole = sharded(count, Block())
    says(lambda: compiled(model, mode="reduce-overhead"), "can't be specified at the same time")
    options = {"inductor": {"triton.cudagraphs": True}, "ep_capacity": 16}
    x = tokens_of(rank, 6)
    with torch.no_grad():
        close([compiled(model, options=options)(x)], [whole(x)], 1.5e-2)
    exchanged(1)
    assert "capacity=16" in text()


def check_numbers_of_tokens(rank: int, count: int) -> None:
    """No more than in the first call: each number by a graph of its own, or all by the second; each rank its own."""
    for dynamic, graphs in ((False, 4), (None, 2)):
        model, whole = sharded(count, Block())
        run = compiled(model, dynamic=dynamic)
        for tokens in (9, 7, 5, 8, 9):
            x = tokens_of(rank, tokens if rank else 9)
            with torch.no_grad():
                close([run(x)], [whole(x)], 1e-2)
        assert len(moecompile.last_report().graphs) == (graphs if rank else 1)
        exchanged(graphs if rank else 1)


def check_more_tokens_than_there_is_room_for(rank: int, count: int) -> None:
    """Where the second graph takes any number, it is the call that fails, on all ranks alike here."""
    for dynamic in (False, None):
        model, _ = sharded(count, Block())
        run = compiled(model, dynamic=dynamic)
        run(tokens_of(rank, 5))
        says(functools.partial(run, tokens_of(rank, 7)), "`ep_capacity`", "5")


def check_any_number_of_tokens(rank: int, count: int) -> None:
    """With the option one graph takes all; without it there is no telling how much room is needed."""
    model, whole = sharded(count, Block())
    run = compiled(model, dynamic=True, options={**EAGER, "ep_capacity": 16})
    for tokens in (5, 16, 3):
        trains(run, model, whole, tokens_of(rank, tokens - rank))
    assert len(moecompile.last_report().graphs) == 1
    exchanged(1)
    model, _ = sharded(count, Block())
    says(lambda: compiled(model, dynamic=True)(tokens_of(rank, 5)), "`ep_capacity`", "dynamic=False")


def check_whole_graphs(rank: int, count: int) -> None:
    """With and without fullgraph=True; a break between blocks makes two graphs, one inside experts gathers them."""

    class Broken(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = x + block(x)
                torch._dynamo.graph_break()
            return self.last(x)

    class BrokenExperts(WholeExperts):
        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x, ids, weights)

    x = tokens_of(rank, 6 + 5 * rank)
    for made, fullgraph, blocks in ((Block(), True, 1), (Block(), False, 1), (Broken(), False, 2)):
        model, whole = sharded(count, made)
        trains(compiled(model, fullgraph=fullgraph), model, whole, x)
        exchanged(blocks)
    inside = Block()
    inside.experts = BrokenExperts()
    model, whole = sharded(count, inside)
    trains(compiled(model), model, whole, x)
    assert "dispatch_start" not in text()
    agreement.forget()
    says(lambda: compiled(model, fullgraph=True)(x), "graph_break")


def check_checkpoints_inside(rank: int, count: int) -> None:
    """Computed again, exchange included; selective ones may keep what was exchanged."""

    def policy(_: Any, operator: Any, *given: Any, **more: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if "moecompile" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    keep = functools.partial(create_selective_checkpoint_contexts, policy)
    x = tokens_of(rank, 6 + 5 * rank)
    for more, again in (
        ({"use_reentrant": False}, 2),
        ({"use_reentrant": True}, 2),
        ({"use_reentrant": False, "context_fn": keep}, 0),
    ):
        model, whole = sharded(count, Around(functools.partial(checkpoint, **more)))
        trains(compiled(model), model, whole, x)
        exchanged()
        backward = str(moecompile.last_report().graphs[-1].backward)
        assert backward.count("moecompile.experts_forward(") == again, backward


def check_checkpoints_around(rank: int, count: int) -> None:
    """The compiled model runs again in the backward; the first call compiles it inside the checkpoint."""
    for reentrant in (False, True):
        model, whole = sharded(count, Block())
        run = compiled(model)
        x = tokens_of(rank, 6 + 5 * rank)
        trains(functools.partial(checkpoint, run, use_reentrant=reentrant), model, whole, x)
        exchanged(2 if reentrant else 1)  # without gradients first, then with them


def check_inference(rank: int, count: int) -> None:
    """Before training and after it; inside the model, too."""
    x = tokens_of(rank, 6 + 5 * rank)
    for without_gradients in (torch.no_grad, torch.inference_mode):
        model, whole = sharded(count, Block())
        run = compiled(model)
        with without_gradients():
            close([run(x)], [whole(x)], 1e-2)
        trains(run, model, whole, x)
        with without_gradients():
            close([run(x)], [whole(x)], 1e-2)
        exchanged(2)

    def frozen(block: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = block(x)
        return found

    model, whole = sharded(count, Around(frozen))
    leaf = x.clone().requires_grad_()
    found = compiled(model)(leaf)
    close([found], [whole(x)], 1e-2)
    found.sum().backward()
    assert leaf.grad is not None and all(each.grad is None for each in model.get_submodule("blocks").parameters())
    exchanged()


def check_modules_and_their_parts(rank: int, count: int) -> None:
    """The model in place, its blocks alone, and experts alone, which may be given any ids: these are gathered."""
    x = tokens_of(rank, 6 + 5 * rank)
    model, whole = sharded(count)
    model.compile(backend="moecompile", options=EAGER)
    trains(model, model, whole, x)
    exchanged()
    model, whole = sharded(count)
    for block in model.get_submodule("blocks").children():
        block.compile(backend="moecompile", options=EAGER)
    trains(model, model, whole, x)
    exchanged(text().count("dispatch_start"))
    assert "dispatch_start" in text()
    model, whole = sharded(count)
    for block in model.get_submodule("blocks").children():
        block.get_submodule("experts").compile(backend="moecompile", options=EAGER)
    trains(model, model, whole, x)
    assert "dispatch_start" not in text()
    assert any("gathered from all ranks" in note for graph in moecompile.last_report().graphs for note in graph.notes)


def check_data_parallel(rank: int, count: int) -> None:
    """Compiled inside DDP, or around it, where Dynamo cuts graphs at buckets of gradients unless it is told not to."""
    x = tokens_of(rank, 6 + 5 * rank)
    bucket = distributed._DEFAULT_FIRST_BUCKET_BYTES
    try:
        distributed._DEFAULT_FIRST_BUCKET_BYTES = 64  # several buckets for a small model
        for cuts in (True, False):
            model, whole = sharded(count)
            right = meaned(results(whole, whole, x), whole)
            wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.001)
            with torch._dynamo.config.patch(optimize_ddp=cuts):
                close(results(compiled(wrapped), model, x), right, 1.5e-2)
            assert (len(moecompile.last_report().graphs) > 1) == cuts
            assert ("gather_experts" in text()) == cuts, "a bucket begins between the experts' matrices"
    finally:
        distributed._DEFAULT_FIRST_BUCKET_BYTES = bucket
    model, whole = sharded(count)
    right = meaned(results(whole, whole, x), whole)
    wrapped = nn.parallel.DistributedDataParallel(model)
    model.compile(backend="moecompile", options=EAGER)
    close(results(wrapped, model, x), right, 1.5e-2)
    exchanged()


def check_fully_sharded(rank: int, count: int) -> None:
    """FSDP2 of everything else: hooks break the graph, around blocks and not inside them."""
    from torch.distributed.fsdp import fully_shard

    model, whole = sharded(count)
    x = tokens_of(rank, 6 + 5 * rank)
    experts = {each for name, each in model.named_parameters() if ".experts." in name}
    for part in (*model.get_submodule("blocks").children(), model):
        fully_shard(part, mesh=mesh_of(count), ignored_params=experts)
    run, right = compiled(model), meaned(results(whole, whole, x), whole)
    for _ in range(2):
        close(results(run, model, x), right, 1.5e-2)
    assert text().count("dispatch_start") >= 1 and "gather_experts" not in text(), text()


def check_several_groups(rank: int, count: int) -> None:
    """Each block's experts are spread over a group of its own."""
    forget()
    model = Model(fixed=True)
    whole = copy.deepcopy(model)
    members = [*range(count)]
    other = DeviceMesh.from_group(distributed.new_group(members), "cpu", torch.arange(count), mesh_dim_names=("other",))
    for number, mesh in enumerate((mesh_of(count), other)):
        moecompile.shard_experts(model.get_submodule(f"blocks.{number}"), mesh)
    trains(compiled(model, fullgraph=True), model, whole, tokens_of(rank, 6 + 5 * rank))
    exchanged()
    assert len({line.split("group=")[1].split(",")[0] for line in text().splitlines() if "dispatch_start" in line}) == 2


def check_stances(rank: int, count: int) -> None:
    """Of all ranks alike; marks of CUDA graphs are no matter."""
    model, whole = sharded(count)
    run, x, less = compiled(model), tokens_of(rank, 9), tokens_of(rank, 5)
    with torch.no_grad():
        for stance, given in (("force_eager", x), ("default", x), ("fail_on_recompile", x), ("force_eager", x)):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.compiler.set_stance(stance):
                close([run(given)], [whole(given)], 1e-2)
        with torch.compiler.set_stance("eager_on_recompile"):
            close([run(less)], [whole(less)], 1e-2)
        with torch.compiler.set_stance("fail_on_recompile"):
            says(lambda: run(less), "recompile")
    assert len(moecompile.last_report().graphs) == 1
    exchanged()


def alone(rank: int, count: int, run: Callable[[], Any], *words: str) -> None:
    """What one rank runs eagerly, and the others would exchange, is an error there that says so in time."""
    patience, moecompile_ranks.PATIENCE = moecompile_ranks.PATIENCE, moecompile_ranks.PATIENCE / 60
    try:
        if rank == count - 1:
            says(run, DisagreementError.__name__, *words)
    finally:
        moecompile_ranks.PATIENCE = patience
    distributed.barrier()


def check_a_rank_that_is_eager_alone(rank: int, count: int) -> None:
    """Dynamo runs what it gave up eagerly: the rank would gather experts, and the others exchange tokens."""
    words = ("recompile_limit", "set_stance", "fullgraph=True", "ep_capacity")
    model, whole = sharded(count)
    with torch.no_grad():
        run, x, less = compiled(model), tokens_of(rank, 9), tokens_of(rank, 5)
        run(x)
        with torch.compiler.set_stance("eager_on_recompile"):
            alone(rank, count, lambda: run(less), *words)
        close([run(x)], [whole(x)], 1e-2)
        with torch._dynamo.config.patch(recompile_limit=1):
            alone(rank, count, lambda: run(less), *words)
        model, _ = sharded(count)
        run = compiled(model, fullgraph=True, dynamic=False)
        run(x)
        with torch._dynamo.config.patch(recompile_limit=1):
            says(lambda: run(less), "FailOnRecompileLimitHit")


def check_nested_regions(rank: int, count: int) -> None:
    """One that is called once is part of the graph around it; of several, torch hands none a DTensor."""
    x = tokens_of(rank, 6 + 5 * rank)
    for blocks in (1, 2):
        made = Model(fixed=True)
        made.blocks = made.blocks[:blocks]
        for block in made.blocks:
            block.__class__ = Regions
        model, whole = sharded(count, made)
        run = compiled(model, fullgraph=True)
        if blocks == 1:
            trains(run, model, whole, x)
            exchanged(1)
        else:
            says(functools.partial(run, x), "NotImplementedError", "nested_compile_region", "layer.compile")


def check_autocast_and_compiled_autograd(rank: int, count: int) -> None:
    x = tokens_of(rank, 6 + 5 * rank)
    for context in (torch.autocast("cpu", torch.bfloat16), torch._dynamo.config.patch(compiled_autograd=True)):
        model, whole = sharded(count, Block())
        with context:
            trains(compiled(model), model, whole, x)
        exchanged(1)
