"""`python -m moecompile bench ep`: experts over the GPUs of a host, against what users write themselves today.

    exchange    the layout, dispatch and combine of 4096 tokens a rank, each by itself
    block       whole blocks, compiled after `moecompile.shard_experts`, forward and, of one, forward+backward

The baseline is PyTorch's: tokens sorted by expert, all_to_all_single of NCCL, grouped GEMMs. Ours and theirs take turns
in the same processes, one a GPU; all begin each timed region together, and the slowest rank counts. Under torchrun its
ranks are used; otherwise one process for each GPU is started. Bars are for two ranks. Needs Hopper GPUs; one will do
for a look. The exit status is 0 if everything was measured, 1 if something failed or a rank died, 2 if nothing can be
measured.
"""

from __future__ import annotations

import argparse
from functools import partial

from moecompile.bench_ep_blocks import measure_block
from moecompile.bench_ep_cases import BLOCKS, EXCHANGE, SECTIONS, TINY, TINY_EXCHANGE
from moecompile.bench_ep_exchange import measure_exchange
from moecompile.bench_ep_ranks import Ranks
from moecompile.bench_ep_symmetric import measure_symmetric
from moecompile.bench_ranks import RanksBench, Steps
from moecompile.bench_results import Setting


def _steps(chosen: argparse.Namespace, setting: Setting, ranks: Ranks) -> Steps:
    """What was chosen, by name, in the order in which it is measured."""
    on_cpu = chosen.device == "cpu"
    shape, blocks = (TINY_EXCHANGE, TINY) if on_cpu else (EXCHANGE, BLOCKS)
    options = {"lowering": "eager"} if on_cpu else {}  # there Inductor's minutes show nothing

    def exchange() -> None:
        measure_exchange(setting, ranks, shape, measure_symmetric(ranks, shape, setting.rounds))

    found: dict[str, Steps] = {
        "exchange": [("exchange", exchange)],
        "block": [
            (f"block {each.name}", partial(measure_block, setting, ranks, each, options))
            for each in blocks
            if each.name in chosen.shapes
        ],
    }
    return [each for section in chosen.only for each in found[section]]


BENCH = RanksBench("bench ep", __doc__, SECTIONS, BLOCKS, TINY, (EXCHANGE,), _steps)
main = BENCH.main
