"""What is published of pipeline schedules: their bubbles and activations, and where a simulation agrees.

Source: DeepSeek-V3, arXiv:2412.19437, table 2, and the README of github.com/deepseek-ai/DualPipe, which adds DualPipeV
and compares for the same number of stages, PP. F is a forward, B a whole backward, W its weight part, F&B a forward and
a backward that run as one, each of one micro-batch on one stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from moecompile.pipeline_simulation import Durations

Relation = Literal["=", "<=", ""]
"""How a simulated number relates to the published one; empty: not known, it may be either side of it."""


@dataclass(frozen=True)
class Published:
    """A published number.

    Attributes:
        formula: as it is written.
        value: what that gives.
        relation: of the simulated number to it.
        condition: where the simulated number is known to be at most this one.
    """

    formula: str
    value: Fraction
    relation: Relation
    condition: str = ""


def bubble(schedule: str, stages: int, microbatches: int, durations: Durations) -> Published:
    """The time in which a rank runs nothing; of the schedule of that name in `SCHEDULES`.

    The relations are what simulations have shown, for 2 to 16 stages and thousands of durations.
    """
    forward, backward, weight = durations.forward, durations.backward, durations.weight
    input_part, pair = backward - weight, durations.overlapped
    relation: Relation
    if schedule == "1F1B":
        relation = "" if durations.transfer else "="
        return Published("(PP-1)(F+B)", (stages - 1) * (forward + backward), relation, "transfers take no time")
    if schedule == "ZB1P":
        holds = weight <= min(forward, input_part) and microbatches >= stages and not durations.transfer
        return Published(
            "(PP-1)(F+B-2W)",
            (stages - 1) * (forward + backward - 2 * weight),
            "=" if holds else "",
            "W <= F, W <= B-W, there are PP micro-batches or more, and transfers take no time",
        )
    ordered = weight <= forward <= input_part and pair <= forward + backward and not durations.transfer
    exact = ordered and weight == forward == input_part
    return Published(
        "(PP/2-1)(F&B+B-3W)",
        (Fraction(stages, 2) - 1) * (pair + backward - 3 * weight),
        "=" if exact else "<=" if ordered else "",
        "W <= F <= B-W, F&B <= F+B, and transfers take no time",
    )


def peak_activations(schedule: str, stages: int, microbatches: int) -> Published:
    """The activations that a rank holds at most, each of one micro-batch on one stage. They depend on no durations."""
    if schedule in ("1F1B", "ZB1P"):
        return Published("PP", Fraction(stages), "=" if microbatches >= stages else "<=")
    return Published("PP+1", Fraction(stages + 1), "=")
