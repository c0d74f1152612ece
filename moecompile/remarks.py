"""What users are told of FP8 and of ranks in a report, and, where they will not have expected it, in the log."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import fx

from moecompile.options import Options
from moecompile.passes.aliases import fake_of
from moecompile.passes.casts import Kept
from moecompile.passes.exclusions import Exclusions, near
from moecompile.passes.expert_parallel import Exchanged, gathers_left
from moecompile.passes.group_limit import group_limit
from moecompile.passes.hide import Rewritten
from moecompile.passes.precision import modules_of
from moecompile.passes.provenance import input_name
from moecompile.report import GraphReport
from moecompile.report_text import counted
from moecompile.runtime.block_scaled import BlockScaled
from moecompile.runtime.linear_fp8 import has_kernels
from moecompile.runtime.topology import Topology, topology_of

log = logging.getLogger("moecompile")


def remark(record: GraphReport, options: Options, modules: Collection[fx.GraphModule]) -> None:
    """After all passes, on what is cast and what is not.

    Args:
        record: of the graph; has its table.
        options: that hold for it.
        modules: its bodies.
    """
    _say_what_is_not_cast(record)
    if options.fp8_include and record.casts:
        included = Exclusions(include=options.fp8_include)
        unknown = included.unused(modules_of(module.graph for module in modules))
        for pattern in included.unused(row.module for row in record.casts):
            if pattern not in unknown:
                note = f"the pattern {pattern!r} of fp8_include names no linear layer and no experts of this graph"
                warn(record, note)
    _say_if_emulated(modules, record)
    _say_if_dequantised(modules, record)


def remark_on_wishes(record: GraphReport, options: Options, exclusions: Exclusions, modules: Collection[str]) -> None:
    """On patterns and numbers of layers that mean nothing in a graph that these modules compute."""
    for pattern in exclusions.unused(modules):
        meant = near(pattern, modules)
        asked = f"; did you mean {meant!r}?" if meant else ""
        warn(record, f"the pattern {pattern!r} names no module of this graph{asked}", "patterns are of whole paths")
    if (options.fp8_keep_first_layers or options.fp8_keep_last_layers) and not exclusions.numbered(modules):
        words = "fp8_keep_first_layers and fp8_keep_last_layers keep nothing of this graph: its modules have no numbers"
        warn(record, f"{words}, as those of a list have; name them in fp8_exclude")


def remark_on_ranks(
    record: GraphReport, module: fx.GraphModule, exchanged: Sequence[Exchanged], gathered: Sequence[Kept],
    rewritten: Rewritten,
) -> None:  # fmt: skip
    """On experts that are spread over ranks: whose tokens are exchanged, how, and who gathers them instead."""
    for group, capacity in dict.fromkeys((each.group, each.capacity) for each in exchanged):
        blocks = [each.module for each in exchanged if (each.group, each.capacity) == (group, capacity)]
        words = f"{group.ranks} ranks share the experts of {listed(each or 'the function' for each in blocks)}"
        record.notes.append(f"{words}, and exchange tokens, at most {capacity} of each rank")
    record.notes += dict.fromkeys(_said_of_nodes(module.graph))
    if rewritten.hidden:
        record.notes.append(f"{rewritten.hidden} of {len(exchanged)} exchanges are hidden behind the experts")
    for kept in gathered:
        warn(record, f"experts of {kept.module or 'the function'} are gathered from all ranks: {kept.reason}")
    for name, readers in gathers_left(module.graph).items():
        warn(record, f"{name} is gathered from all ranks for {readers}", "no block of experts that was found reads it")


def _said_of_nodes(graph: fx.Graph) -> Iterator[str]:
    """What travels between nodes, and within them, for a token of each exchange among ranks of several nodes."""
    for plan in graph.find_nodes(op="call_function", target=torch.ops.moecompile.exchange_plan.default):
        users = [user for part in plan.users for user in part.users if "group" in user.kwargs]
        topology = topology_of(str(users[0].kwargs["group"]), plan.kwargs["ranks"]) if users else Topology(1, 1)
        if not topology.is_hierarchical:
            continue
        experts, top_k, row = plan.kwargs["num_experts"], fake_of(plan.args[0]).shape[1], fake_of(users[0].args[0])
        limit, met = group_limit(plan.args[0], experts), min(topology.nodes, top_k)
        chosen = "its router may choose any experts"
        if limit is not None:
            met = min(met, limit.parts_met(topology.nodes, experts))
            chosen = f"its router chooses {limit.chosen} of {limit.number} groups of experts"
        size = row.shape[1] * row.element_size()
        others, ranks = min(met, topology.nodes - 1), min(top_k, topology.ranks)
        words = f"{topology.nodes} nodes of {topology.locals} ranks: a token crosses to"
        words += f" {counted(others, 'other node')} at most ({chosen})"
        yield f"{words}, and is on {counted(ranks, 'rank')} at most; {size} bytes each, and as many back"


def warn(record: GraphReport, note: str, *hints: str) -> None:
    """Says it in the report and in the log; hints in the log alone."""
    record.notes.append(note)
    log.warning("%s: %s", record.name or "a graph", "; ".join((note, *hints)))


def listed(names: Iterable[str]) -> str:
    """The first of these names, and how many others there are."""
    first, *others = dict.fromkeys(names)
    return f"{first} and {len(others)} others" if len(others) > 1 else " and ".join((first, *others))


def _say_what_is_not_cast(record: GraphReport) -> None:
    """Of what could be expected: experts, anything at all."""
    refused = [row for row in record.casts if row.kind == "experts" and row.refused]
    for reason in dict.fromkeys(row.reason for row in refused):
        modules = listed(row.module or "the function" for row in refused if row.reason == reason)
        warn(record, f"experts of {modules} stay in their precision: {reason}")
    if record.casts and not any(row.cast for row in record.casts):
        reasons = "; ".join(dict.fromkeys(row.reason for row in record.casts))
        warn(record, f"nothing of it is cast to FP8: {reasons}")


def _say_if_dequantised(modules: Iterable[fx.GraphModule], record: GraphReport) -> None:
    """Matrices that are kept in FP8 (`convert_to_fp8`) and that the graph multiplies in another precision."""
    read = [
        node
        for module in modules
        for node in module.graph.find_nodes(op="placeholder")
        if isinstance(fake_of(node), BlockScaled)
        and any(user.op.startswith("call") and user.target not in _TAKE_FP8 for user in node.users)
    ]
    if read:
        several = f"{len(read)} matrices that are" if len(read) > 1 else "a matrix that is"
        words = f"{several} kept in FP8 {'are' if len(read) > 1 else 'is'} dequantised in every call"
        warn(record, f"{words} ({input_name(read[0])}, for one); what precision='fp8' casts is read as it is")


EXPERTS_IN_FP8 = (torch.ops.moecompile.experts_fp8.default, torch.ops.moecompile.exchanged_experts.default)
"""The latter where it has quantised matrices."""
_TAKE_FP8 = (
    torch.ops.moecompile.quantize_weights.default,
    torch.ops.moecompile.linear_fp8.default,
    *EXPERTS_IN_FP8,
    torch.stack,
)


def _say_if_emulated(modules: Iterable[fx.GraphModule], record: GraphReport) -> None:
    """Notes that what is cast is computed without kernels; on a GPU the log says it, too."""
    slow = dict[str, bool]()
    for device, dtype in (found for module in modules for found in _multiplied(module.graph)):
        if not has_kernels(device):
            slow[f"FP8 is emulated on {device.type}: the numbers of a Hopper GPU, slowly"] = device.type == "cuda"
        elif dtype == torch.float16:
            slow["FP8 of float16 models is emulated, slowly: cast the model to bfloat16"] = True
    record.notes += slow
    for note, warns in slow.items():
        if warns:
            log.warning("%s: %s", record.name or "a graph", note)


def _multiplied(graph: fx.Graph) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Where matrices are multiplied in FP8, and what dtype the rows have."""
    for target in (torch.ops.moecompile.linear_fp8.default, *EXPERTS_IN_FP8):
        for node in graph.find_nodes(op="call_function", target=target):
            if not node.kwargs.get("quantized", True):
                continue
            rows = fake_of(node.args[0])
            yield rows.device, rows.dtype
