"""`python -m moecompile simulate`: schedules are whole and in order, and their numbers are the published ones."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from unittest import mock

import pytest
import torch
from packaging.version import Version

from conftest import Golden
from moecompile import pipeline_formulas
from moecompile.commands import main
from moecompile.pipeline_schedules import SCHEDULES, Action, Kind, Overlapped, Schedule, SizeError, Step
from moecompile.pipeline_simulation import Durations, ScheduleError, Timeline, simulate

# For PP of 4, 8 and 16: bubble, activations.
PUBLISHED = {
    "1F1B": {4: (9, 4), 8: (21, 8), 16: (45, 16)},
    "ZB1P": {4: (3, 4), 8: (7, 8), 16: (15, 16)},
    "DualPipe": {4: (2, 5), 8: (6, 9), 16: (14, 17)},
    "DualPipeV": {4: (2, 5), 8: (6, 9), 16: (14, 17)},
}
DOCUMENT = Path(__file__).parent.parent / "docs" / "overlap.md"


def durations(forward: float, backward: float, weight: float, overlapped: float | None = None) -> Durations:
    pair = forward + backward if overlapped is None else overlapped
    return Durations(*(Fraction(time) for time in (forward, backward, weight, pair)))


UNIT = durations(1, 2, 1)


def sizes(name: str, stages: int) -> list[int]:
    """Numbers of micro-batches that a schedule takes."""
    return [count for count in range(stages, 3 * stages + 3) if name != "DualPipe" or count in (2 * stages, 40, 50)]


@pytest.mark.parametrize("stages", [4, 8, 16])
@pytest.mark.parametrize("name", SCHEDULES)
def test_unit_durations_give_the_published_numbers(name: str, stages: int) -> None:
    bubble, activations = PUBLISHED[name][stages]
    published = pipeline_formulas.bubble(name, stages, 2 * stages, UNIT)
    assert published.value == bubble and published.relation == "="
    for microbatches in sizes(name, stages)[:: stages // 4]:
        timeline = simulate(SCHEDULES[name](stages, microbatches), UNIT)
        assert timeline.bubbles == [bubble] * len(timeline.ranks)
        assert max(timeline.peak_activations) == activations
        assert max(timeline.peak_activations) == pipeline_formulas.peak_activations(name, stages, microbatches).value


@pytest.mark.parametrize("times", [(1, 2, 0.5), (2, 5, 2), (1, 2, 1, 2), (1, 2, 0.5, 2)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_other_durations_give_no_more_than_the_published_numbers(name: str, times: tuple[float, ...]) -> None:
    for stages in (4, 8, 16):
        timeline = simulate(SCHEDULES[name](stages, 2 * stages + 4), durations(*times))
        published = pipeline_formulas.bubble(name, stages, 2 * stages + 4, durations(*times))
        assert max(timeline.bubbles) <= published.value
        assert max(timeline.peak_activations) == PUBLISHED[name][stages][1]
        if "1P" in name or "1F1B" in name:
            assert timeline.bubbles == [published.value] * stages


def test_what_is_said_of_formulas_holds() -> None:
    """Wherever they are said to be equal, or bounds; and somewhere else they are neither."""
    chance, seen = random.Random(0), Counter[tuple[str, str]]()
    for _ in range(300):
        forward, weight = Fraction(chance.randint(1, 8), 2), Fraction(chance.randint(0, 8), 2)
        backward = weight + Fraction(chance.randint(1, 8), 2)
        if chance.random() < 0.2:
            weight, backward = forward, 2 * forward
        pair = chance.choice((max(forward, backward), forward + backward, forward + backward + 1))
        times = Durations(forward, backward, weight, pair, Fraction(chance.choice((0, 0, 0, 1))))
        stages = chance.choice((2, 4, 6, 8))
        for name, make in SCHEDULES.items():
            microbatches = 2 * chance.randint(1, 2 * stages)
            try:
                timeline = simulate(make(stages, microbatches), times)
            except SizeError:
                continue
            most = max(timeline.bubbles)
            published = pipeline_formulas.bubble(name, stages, microbatches, times)
            assert published.relation != "=" or most == published.value
            assert published.relation != "<=" or most <= published.value
            seen[name, published.relation or ("more" if most > published.value else "")] += 1
            held = pipeline_formulas.peak_activations(name, stages, microbatches)
            peak = max(timeline.peak_activations)
            assert peak == held.value if held.relation == "=" else peak < held.value
    assert all(seen[name, "="] for name in SCHEDULES)
    assert all(seen[name, "more"] for name in SCHEDULES)
    assert seen["DualPipe", "<="] and seen["DualPipeV", "<="]


@pytest.mark.parametrize(
    ("name", "stages", "microbatches"),
    [(name, *size) for name in SCHEDULES for size in ((2, 4), (6, 12), (8, 20))]
    + [("1F1B", 1, 1), ("1F1B", 5, 3), ("ZB1P", 1, 3), ("ZB1P", 7, 4), ("ZB1P", 5, 11), ("DualPipeV", 8, 9)],
)
def test_everything_runs_once_and_in_order(name: str, stages: int, microbatches: int) -> None:
    timeline = simulate(SCHEDULES[name](stages, microbatches), durations(1.5, 4, 1, 5))
    begins: dict[Action, Fraction] = {}
    ends: dict[Action, Fraction] = {}
    for events in timeline.ranks:
        assert all(one.end <= other.begin for one, other in itertools.pairwise(events))
        for event in events:
            for action in event.step.parts:
                assert action not in begins
                begins[action], ends[action] = event.begin, event.end
    for stage in range(stages):
        for number in range(microbatches):
            forward, whole, inputs, weights = (Action(kind, stage, number) for kind in Kind)
            assert (whole in begins) != (inputs in begins) and (inputs in begins) == (weights in begins)
            backward = whole if whole in begins else inputs
            assert ends[forward] <= begins[backward]
            assert inputs not in begins or ends[inputs] <= begins[weights]
            if stage:
                assert ends[Action(Kind.FORWARD, stage - 1, number)] <= begins[forward]
                before = [Action(kind, stage - 1, number) for kind in (Kind.BACKWARD, Kind.INPUT)]
                assert all(ends[backward] <= begins[action] for action in before if action in begins)
    assert len(begins) == sum(len(step.parts) for steps in timeline.schedule.ranks for step in steps)


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 12), (8, 20), (16, 40)])
def test_dualpipe_is_dualpipe_v_on_half_of_the_ranks(stages: int, microbatches: int) -> None:
    """And on the other half, where the micro-batches of either direction have changed places."""
    half = microbatches // 2

    def renumbered(step: Step, add: int) -> Step:
        if isinstance(step, Overlapped):
            return Overlapped(*(Action(a.kind, a.stage, (a.microbatch + add) % half) for a in step.parts))
        return dataclasses.replace(step, microbatch=(step.microbatch + add) % half)

    both, one = SCHEDULES["DualPipe"](stages, microbatches), SCHEDULES["DualPipeV"](stages, half)
    for rank, steps in enumerate(one.ranks):
        assert [renumbered(step, 0) for step in both.ranks[rank]] == steps
        assert [renumbered(step, half) for step in both.ranks[stages - 1 - rank]] == steps
    first, second = simulate(both, UNIT), simulate(one, UNIT)
    assert first.makespan == second.makespan and first.bubbles == second.bubbles * 2


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="compared with the schedule of torch 2.13")
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 2), (1, 5), (2, 4), (3, 7), (4, 10), (8, 20)])
def test_dualpipe_v_is_the_one_of_torch(ranks: int, microbatches: int) -> None:
    from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV

    stage = mock.create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.num_stages, stage.submod = 0, ranks, 2 * ranks, None
    order = ScheduleDualPipeV([stage, stage], microbatches).pipeline_order
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    for rank, steps in enumerate(SCHEDULES["DualPipeV"](2 * ranks, microbatches).ranks):
        theirs = [
            tuple(
                (kinds[part.computation_type.name], part.stage_index, part.microbatch_index)
                for part in action.sub_actions or (action,)
            )
            for action in order[rank]
            if action is not None
        ]
        assert theirs == [tuple((a.kind.value, a.stage, a.microbatch) for a in step.parts) for step in steps]


def test_a_transfer_takes_its_time() -> None:
    timeline = simulate(SCHEDULES["1F1B"](2, 1), dataclasses.replace(UNIT, transfer=Fraction(1, 2)))
    assert timeline.makespan == 1 + Fraction(1, 2) + 1 + 2 + Fraction(1, 2) + 2
    # where the ranks' two stages meet nothing is sent
    assert simulate(SCHEDULES["DualPipeV"](2, 2), dataclasses.replace(UNIT, transfer=Fraction(9))).bubbles == [0]


def broken(change: dict[int, list[Step]]) -> Timeline:
    """1F1B for two stages and micro-batches, but for the steps of these ranks."""
    whole = SCHEDULES["1F1B"](2, 2)
    return simulate(Schedule("Mine", 2, 2, [change.get(rank, steps) for rank, steps in enumerate(whole.ranks)]), UNIT)


def test_schedules_that_cannot_run_say_why() -> None:
    first, second = SCHEDULES["1F1B"](2, 2).ranks
    with pytest.raises(ScheduleError) as stuck:
        broken({0: [first[0], first[2], first[1], first[3]], 1: [*second[2:], *second[:2]]})
    assert str(stuck.value).splitlines() == [
        "Mine gets stuck: every rank that is not through waits for another",
        "  rank 0: the backward of micro-batch 0 on stage 0 waits for the backward's input part of micro-batch 0 on "
        "stage 1, by rank 1",
        "  rank 1: the forward of micro-batch 1 on stage 1 waits for the forward of micro-batch 1 on stage 0, by rank "
        "0",
    ]
    with pytest.raises(ScheduleError, match="has the forward of micro-batch 0 on stage 0 twice: on ranks 0 and 1"):
        broken({1: [first[0], *second]})
    with pytest.raises(ScheduleError, match="lacks the backward's input part of micro-batch 1 on stage 1"):
        broken({1: list(second[:-1])})


@pytest.mark.parametrize(
    ("name", "stages", "microbatches", "message"),
    [
        ("DualPipe", 7, 20, "an even number of stages, got 7"),
        ("DualPipe", 8, 21, "an even number of micro-batches, got 21"),
        ("DualPipe", 8, 14, "at least 16 micro-batches, two for each stage, got 14"),
        ("DualPipeV", 5, 20, "an even number of stages, got 5"),
        ("DualPipeV", 8, 7, "at least 8 micro-batches, one for each stage, got 7"),
    ],
)
def test_sizes_that_a_schedule_does_not_take(name: str, stages: int, microbatches: int, message: str, capsys) -> None:
    with pytest.raises(SizeError, match=message):
        SCHEDULES[name](stages, microbatches)
    assert main(["simulate", "--stages", str(stages), "--microbatches", str(microbatches), "--json"]) == 0
    rows = {row["schedule"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows[name]["bubble"] is rows[name]["peak_activations"] is None and message in rows[name]["reason"]
    assert rows["1F1B"]["bubble"] == 3 * (stages - 1) and "reason" not in rows["1F1B"]
    assert main(["simulate", "--stages", str(stages), "--microbatches", str(microbatches)]) == 0
    assert re.search(rf"^  {name} +-.*\n +expected {message}", capsys.readouterr().out, flags=re.MULTILINE)


def test_rows_as_json(capsys) -> None:
    assert main("simulate --stages 8 --microbatches 20 --json".split()) == 0
    rows = json.loads(capsys.readouterr().out)
    keys = ("schedule", "stages", "microbatches", "bubble", "peak_activations")
    assert rows == [dict(zip(keys, (name, 8, 20, *PUBLISHED[name][8]), strict=True)) for name in SCHEDULES]
    options = "--forward 1 --backward 2 --weight 0.5 --json"
    assert main(["simulate", *options.split()]) == main(["simulate", *options.split(), "--overlapped", "3"]) == 0
    first, second = capsys.readouterr().out.split("]\n[")
    assert first.strip("[]\n") == second.strip("[]\n") and '"bubble": 9.5' in first


def test_a_formula_that_is_no_bound_says_so(capsys) -> None:
    assert main("simulate --weight 1.5".split()) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "67 7 ? 0, (PP-1)(F+B-2W)" in printed and "66 6 ? 1.5, (PP/2-1)(F&B+B-3W)" in printed
    assert "the formula is a bound only where W <= F <= B-W, F&B <= F+B, and transfers take no time" in printed
    assert main("simulate --overlapped 2".split()) == 0
    assert "1 to 3 = 3, (PP/2-1)(F&B+B-3W)" in " ".join(capsys.readouterr().out.split())


def test_the_figure(golden: Golden, capsys) -> None:
    assert main(["simulate", "--figure"]) == 0
    printed = capsys.readouterr().out
    golden("simulate_dualpipe", printed)
    assert f"```\n{printed}```" in DOCUMENT.read_text(encoding="utf-8")


def test_figures_keep_to_the_width(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for width in (60, 137):
        monkeypatch.setenv("COLUMNS", str(width))
        for name in SCHEDULES:
            assert main(["simulate", "--stages", "4", "--figure", name, "--weight", "0.25", "--backward", "1.3"]) == 0
            assert max(map(len, capsys.readouterr().out.splitlines()[2:])) <= width


def test_the_table_is_the_one_shown(capsys) -> None:
    assert main(["simulate", "--stages", "8", "--microbatches", "20"]) == 0
    assert f"```\n{capsys.readouterr().out}```" in DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--stages 0", "--stages: expected a whole number, 1 or more, got '0'"),
        ("--microbatches many", "--microbatches: expected a whole number, 1 or more, got 'many'"),
        ("--forward 0", "--forward: expected more than 0"),
        ("--backward nan", "--backward: expected a time, a number from 0 to 1e+12, got 'nan'"),
        ("--transfer -1", "--transfer: expected a time"),
        ("--forward 1e-999999999", "--forward: expected more than 0"),
        ("--weight 2.5", "--weight: expected at most 2, the whole backward, got 2.5"),
        ("--overlapped 1.5", "--overlapped: expected at least 2, the longer of forward and backward, got 1.5"),
        ("--figure --stages 7", "--figure: DualPipe cannot be drawn: expected an even number of stages, got 7"),
        ("--figure GPipe", "'1F1B', 'ZB1P', 'DualPipe', 'DualPipeV'"),
        ("--figure --json", "not allowed with"),
        ("--figure --backward 1e9", "characters wide, expected at most 100000"),
    ],
)
def test_input_that_cannot_be(options: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["simulate", *options.split()])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
