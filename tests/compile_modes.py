"""How models with experts over ranks may be compiled: docs/expert_parallel.md's table, and the proof of each row."""

from __future__ import annotations

from dataclasses import dataclass

YES, PARTLY, NO = "✓", "partly", "\u2013"


@dataclass(frozen=True)
class Row:
    """One way to compile.

    Attributes:
        way: what the user writes.
        works: YES, PARTLY or NO.
        how: or what happens instead, and the cure.
        proofs: checks, by module.
    """

    way: str
    works: str
    how: str
    proofs: tuple[str, ...]


ROWS = (
    Row(
        '`mode="default"`, `"max-autotune-no-cudagraphs"`',
        YES,
        "`ep_capacity` and other options beside a mode: torch takes one of the two, so write the mode's own options "
        "under `inductor`",
        (
            "compile_mode_checks.check_all_modes",
            "compile_mode_checks.check_modes_beside_options",
            "compile_mode_process_checks.check_max_autotune_without_cuda_graphs",
        ),
    ),
    Row(
        '`mode="reduce-overhead"`, `"max-autotune"` (CUDA graphs)',
        YES,
        "inference and training, where moecompile's own kernels exchange tokens; over NCCL nobody has checked. On CPUs "
        "there are no CUDA graphs, and all is as without them",
        (
            "compile_mode_checks.check_reduced_overhead",
            "compile_mode_process_checks.check_reduced_overhead",
            "compile_mode_process_checks.check_reduced_overhead_of_hidden_exchanges",
            "compile_mode_process_checks.check_reduced_overhead_in_training",
            "compile_mode_process_checks.check_max_autotune",
        ),
    ),
    Row(
        "`torch.cuda.graph`, captured by yourself",
        YES,
        "of the forward, after a call that compiles it",
        ("exchange_process_checks.check_captured", "exchange_process_checks.check_hidden_and_captured"),
    ),
    Row(
        '`lowering="eager"`, `"inductor"`',
        YES,
        "",
        ("expert_parallel_checks.check_compiled_exchanges_tokens", "expert_parallel_checks.check_under_inductor"),
    ),
    Row(
        "`dynamic=False`, `dynamic=None`",
        YES,
        "up to as many tokens as a rank had in the first call, or `ep_capacity`; more are an error that names it. Each "
        "rank compiles for its own numbers, when it meets them",
        (
            "compile_mode_checks.check_numbers_of_tokens",
            "compile_mode_checks.check_more_tokens_than_there_is_room_for",
        ),
    ),
    Row(
        "`dynamic=True`",
        YES,
        "with `ep_capacity`; without it an error that names it",
        ("compile_mode_checks.check_any_number_of_tokens",),
    ),
    Row(
        "`fullgraph=True`, or not",
        YES,
        "where Dynamo breaks the graph inside experts, these are gathered; elsewhere breaks are no matter",
        ("compile_mode_checks.check_whole_graphs",),
    ),
    Row(
        "`no_grad`, `inference_mode`",
        YES,
        "around the model or inside it; ranks alike, since graphs for inference are agreed on apart",
        ("compile_mode_checks.check_inference", "hidden_exchange_checks.check_hidden"),
    ),
    Row(
        "`torch.utils.checkpoint`",
        YES,
        "inside the compiled model and around it, `use_reentrant` or not; tokens are exchanged again in the backward, "
        "unless a selective checkpoint keeps what moecompile's operators give",
        (
            "compile_mode_checks.check_checkpoints_inside",
            "compile_mode_checks.check_checkpoints_around",
        ),
    ),
    Row(
        "`model.compile()`, `layer.compile()`",
        YES,
        "experts without their router, where nothing says which ids they are given, are recognised if their counts "
        "are (`bincount`, not `histc`); else they are gathered, with a warning",
        (
            "compile_mode_checks.check_modules_and_their_parts",
            "expert_parallel_checks.check_fsdp",
        ),
    ),
    Row(
        "DistributedDataParallel",
        YES,
        "compiled inside it; around it torch cuts graphs at gradient buckets, and experts that are cut apart are "
        "gathered: `torch._dynamo.config.optimize_ddp = False` keeps them whole",
        ("compile_mode_checks.check_data_parallel", "expert_parallel_checks.check_ddp"),
    ),
    Row(
        "FSDP2 (`fully_shard`)",
        YES,
        "its hooks break graphs: of experts that it shards once more compile the forward, as above",
        ("compile_mode_checks.check_fully_sharded", "expert_parallel_checks.check_fsdp"),
    ),
    Row(
        "several process groups",
        YES,
        "each block's experts in one of them",
        ("compile_mode_checks.check_several_groups",),
    ),
    Row(
        "autocast, compiled autograd",
        YES,
        "",
        ("compile_mode_checks.check_autocast_and_compiled_autograd",),
    ),
    Row(
        "`torch.compiler.set_stance`, `cudagraph_mark_step_begin`",
        YES,
        "a stance of all ranks alike",
        ("compile_mode_checks.check_stances",),
    ),
    Row(
        "one rank that is eager alone: `set_stance`, or Dynamo's `recompile_limit`",
        NO,
        "it would gather experts while others exchange tokens: an error within 5 minutes, or at once with "
        "`fullgraph=True`; `dynamic=True` and `ep_capacity` compile once",
        ("compile_mode_checks.check_a_rank_that_is_eager_alone",),
    ),
    Row(
        "`torch.compiler.nested_compile_region`",
        NO,
        "torch hands no DTensor to a region that is called more than once: an error; `layer.compile()` compiles like "
        "layers once, too",
        ("compile_mode_checks.check_nested_regions",),
    ),
    Row(
        '`verify`, `fp8_compare` (`"first_call"`)',
        YES,
        "by all ranks when they first compile a graph; who compiles it once more does not, and says so. A block is "
        "compared with its exchange, hidden or not, before FP8; what differs on one rank is undone on all",
        (
            "verified_exchange_checks.check_right_exchanges_pass",
            "verified_exchange_checks.check_right_exchanges_in_fp8_pass",
            "verified_exchange_checks.check_right_hidden_exchanges_pass",
            "verified_exchange_checks.check_wrong_exchanges_are_undone",
            "verified_exchange_checks.check_what_one_rank_rewrites_wrongly_is_undone_on_all",
            "verified_exchange_checks.check_who_compiles_alone_verifies_nothing",
            "verified_exchange_checks.check_who_compares_with_fp8_alone",
            "compile_mode_process_checks.check_verified",
        ),
    ),
)


def table() -> str:
    """As docs/expert_parallel.md has it."""
    rows = "".join(f"| {row.way} | {row.works} | {row.how} |\n" for row in ROWS)
    return f"| with | | how, or what happens instead |\n|---|---|---|\n{rows}"
