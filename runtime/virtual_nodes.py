"""Ranks of several nodes on one device: all of them run in each launch, which is a cooperative one.

What many devices do is tested, and its protocol timed, where there is one (codegen/kernels/virtual.cuh). Links between
virtual nodes are the device's own memory: nothing is said of how fast a network is.
"""

from __future__ import annotations

from collections.abc import Sequence

from moecompile.codegen.exchanges import ExchangeSend, NodeCombine, NodeDispatch, NodeHome, NodeReceive, Virtual
from moecompile.runtime.hopper_nodes import Call, NodeExchange
from moecompile.runtime.launch import Value, load


def launch_all(exchanges: Sequence[NodeExchange], calls: Sequence[Call], blocks: int) -> None:
    """One kernel of all ranks, on the current stream.

    Args:
        exchanges: of each rank.
        calls: of each, the same kernel.
        blocks: of each; what the kernels that send need if it is one of these.

    Raises:
        ValueError: kernels that send were given other blocks.
        DriverError: the device has no room for all at once.
    """
    instance = calls[0][0]
    if any(each != instance for each, _ in calls):
        raise ValueError(
            f"moecompile: ranks in one launch: expected one kernel, got {sorted({str(c[0]) for c in calls})}"
        )
    if isinstance(instance, NodeDispatch | NodeCombine) and any(blocks != each.blocks for each in exchanges):
        raise ValueError(f"moecompile: {instance}: expected {exchanges[0].blocks} blocks of each rank, got {blocks}")
    device = exchanges[0].memory.own.device.index
    launch_ranks(instance, [values for _, values in calls], blocks, device)


def launch_ranks(
    instance: ExchangeSend | NodeDispatch | NodeReceive | NodeCombine | NodeHome,
    values: Sequence[tuple[Value, ...]],
    blocks: int,
    device: int,
) -> None:
    """One kernel of as many ranks as there are arguments of it, so many blocks each."""
    each = load(instance, device)
    arguments = b"".join(each.pack(*of_rank) for of_rank in values)
    load(Virtual(instance, len(values)), device).launch_together(blocks * len(values), arguments)
