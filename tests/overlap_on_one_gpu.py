"""What `bench overlap` measures, of two ranks that share one GPU: a half of its multiprocessors each, as processes.

    PYTHONPATH=tests python tests/overlap_on_one_gpu.py [--sms 1,4,12] [--tokens 4096] [--what forward,forward+backward]

No link lies between them: what a rank sends goes through the GPU's memory, as fast as `--sms` multiprocessors copy. So
with few of them communication takes as long as between hosts; what is predicted is told of that (`RATE`). PyTorch's
exchange, which NCCL would do, is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from moecompile import bench, ordering
from moecompile.bench_cases import Shape
from moecompile.bench_ep_ranks import Ranks, RanksFailedError, RanksTimer
from moecompile.bench_overlap import measure_layers
from moecompile.bench_overlap_layers import OPTIONS, Case
from moecompile.bench_results import Ceilings, Results, Setting
from moecompile.passes import hardware
from ranks_on_one_gpu import meet, shared_gpu

RANKS, RATE = 2, 38e9
"""Bytes a second that a multiprocessor sends: 305 GB/s with 8 of them (docs/bench.md)."""


def share_of(device: hardware.Hardware, sms: int) -> hardware.Hardware:
    """What one rank has of it, sending with so many multiprocessors."""
    return dataclasses.replace(
        device,
        title=f"a {RANKS}th of {device.title}, {sms} multiprocessors sending",
        flops={name: rate / RANKS for name, rate in device.flops.items()},
        memory=device.memory / RANKS,
        links={**device.links, "nvlink": hardware.Link(min(sms * RATE, device.links["nvlink"].rate), 3e-6)},
    )


def rank_main(rank: int, folder: str, chosen: argparse.Namespace) -> None:
    """One rank."""
    torch.cuda.set_device(0)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    control = distributed.new_group(backend="gloo", timeout=timedelta(seconds=300))
    assert isinstance(control, distributed.ProcessGroup)
    ranks = Ranks(rank, RANKS, torch.device("cuda", 0), 300.0, control)
    meet()
    nowhere = None if rank == 0 else open("/dev/null", "w", encoding="utf-8")
    results = Results(bench.machine("cuda"), None, nowhere)
    setting = Setting("cuda", RanksTimer(ranks), chosen.rounds, Ceilings({}, 4e12), results)
    for tokens in chosen.tokens:
        case = Case(Shape(f"T{tokens}", 7168, 2048, 64, 8, tokens), 4)
        for sms in chosen.sms:
            device = share_of(hardware.named("h200"), sms)
            vars(ordering)["_device"] = lambda device=device: device
            for what in chosen.what:
                results.head(f"{sms} multiprocessors send")
                try:
                    measure_layers(setting, ranks, case, what, {"ep_sms": sms}, (*OPTIONS,))
                except RanksFailedError as error:
                    results.fail(what, error)
                torch.cuda.empty_cache()
    distributed.destroy_process_group()


def main(argv: list[str]) -> None:
    """Starts the ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sms", type=lambda text: [*map(int, bench.split(text))], default=[1, 4, 12])
    parser.add_argument("--tokens", type=lambda text: [*map(int, bench.split(text))], default=[4096])
    parser.add_argument("--what", type=bench.split, default=("forward", "forward+backward"))
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, shared_gpu(RANKS, Path(folder)):
        multiprocessing.spawn(rank_main, (folder, chosen), nprocs=RANKS)


if __name__ == "__main__":
    main(sys.argv[1:])
