"""The sizes that `python -m moecompile bench ep` measures, its bars, and what others were measured to reach: tables."""

from __future__ import annotations

from collections.abc import Mapping

from moecompile.bench_bars import Limit
from moecompile.bench_cases import FORWARD, FP8, OURS, STEP, Shape

RANKS = 2
"""For which the bars are set."""
NVLINK = 385e9
"""Bytes a second each way that the copy engines of two H200 of one host reach, both at once (docs/bench.md)."""
SECTIONS = ("exchange", "block")

EAGER, COMPILED, SYMMETRIC = "baseline, eager", "baseline, compiled", "torch symm_mem vdev_2d"
BASELINES = (EAGER, COMPILED)
"""The forms of what users write today; the faster one counts."""
BASELINE, LOCAL = "the baseline", "local experts alone"
LOCAL_BF16, LOCAL_FP8, EXCHANGE_ALONE = f"{LOCAL}, BF16", f"{LOCAL}, FP8", "exchange alone, BF16"
LAYOUT, DISPATCH = "layout", "dispatch"
COMBINE, COMBINE_ALONE = "combine, from expert outputs", "combine, exchange alone"
HIDDEN = "communication hidden"

EXCHANGE = Shape("exchange", 7168, 0, 256, 8, 4096)
"""The exchange by itself; it has no experts."""
LARGE, NARROW, SMALL = "large", "narrow", "small"
BLOCKS = (
    Shape(LARGE, 7168, 2048, 64, 8, 4096),
    Shape(NARROW, 2048, 768, 128, 8, 8192),
    Shape(SMALL, 7168, 2048, 64, 8, 128),
)
"""Tokens are those of a rank, experts those of all."""
TRAINED = (LARGE,)
"""Blocks whose forward+backward is measured, too."""
TINY_EXCHANGE = Shape("exchange", 64, 0, 8, 2, 48)
TINY = (Shape("tiny", 64, 32, 8, 2, 48),)
"""For a look at the command on a CPU."""

DEEPEP = "DeepEP V1 {} on two H200, 2026-11"
TIME, SMS, SPEED = "time", "SMs", f"speed against {BASELINE}"
AGAINST_LOCAL, SHARE = f"time against {LOCAL}", "share of the smaller of exchange and local experts"


def _block(case: str, what: str, bf16: float, fp8: float, today: str) -> dict[tuple[str, str, str], tuple[Limit, ...]]:
    return {
        (case, what, name): (Limit(SPEED, "at least", times, "x", today),) for name, times in ((OURS, bf16), (FP8, fp8))
    }


def _time(microseconds: float, today: str) -> Limit:
    return Limit(TIME, "at most", microseconds, "us", today)


_LARGE = _block(LARGE, FORWARD, 1.9, 2.9, "8.51 ms on two H200, 2026-11")
LIMITS: Mapping[tuple[str, str, str], tuple[Limit, ...]] = {
    ("exchange", LAYOUT, OURS): (_time(25, DEEPEP.format("34 us") + "; FlashComm 58 us"),),
    ("exchange", DISPATCH, OURS): (_time(205, DEEPEP.format("330 us, 24 SMs")), Limit(SMS, "at most", 12, "")),
    ("exchange", DISPATCH, FP8): (_time(115, DEEPEP.format("243 us, 24 SMs")), Limit(SMS, "at most", 12, "")),
    ("exchange", COMBINE, OURS): (_time(250, ""),),
    ("exchange", COMBINE_ALONE, OURS): (_time(210, DEEPEP.format("416 us, 24 SMs")),),
    (LARGE, FORWARD, OURS): (*_LARGE[LARGE, FORWARD, OURS], Limit(AGAINST_LOCAL, "at most", 1.12, "x")),
    (LARGE, FORWARD, FP8): (*_LARGE[LARGE, FORWARD, FP8], Limit(AGAINST_LOCAL, "at most", 1.2, "x")),
    **_block(NARROW, FORWARD, 3, 4, "3.82 ms on two H200, 2026-11"),
    **_block(SMALL, FORWARD, 2.2, 3.5, "1.75 ms on two H200, 2026-11"),
    **_block(LARGE, STEP, 1.8, 2.4, ""),
    (LARGE, HIDDEN, OURS): (Limit(SHARE, "at least", 70, "%"),),
    (LARGE, HIDDEN, FP8): (Limit(SHARE, "at least", 70, "%"),),
}
"""By case, what is measured and contender: what it is to reach with RANKS ranks."""
