"""The accuracy bench: recipes that are wrong as they say, what is printed and drawn, and that it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import moecompile.runtime.operators  # noqa: F401  registers torch.ops.moecompile
from moecompile import bench_accuracy
from moecompile.bench_curves import draw
from moecompile.bench_losses import keep, kept
from moecompile.bench_recipes import COARSE, FAST, HEAD, PER_TENSOR, ROUTER, SQUARE_GRADIENTS, UNSCALED, coarse, wrong
from moecompile.bench_training import TINY, Setup, Training, build, library_text, share
from moecompile.commands import main
from moecompile.runtime import linear_fp8
from moecompile.runtime.quantize import ALONG_FEATURES, E4M3, SQUARE, dequantize

ops = torch.ops.moecompile


@pytest.mark.parametrize("name", [PER_TENSOR, SQUARE_GRADIENTS])
def test_wrong_recipes_give_what_the_right_one_gives_in_other_scales(name: str) -> None:
    torch.manual_seed(0)
    grad = torch.randn(2, 90, 272).bfloat16() * torch.logspace(-6, 0, 272).bfloat16()
    right = ops.quantize_gradient(grad)
    with wrong(name):
        found = ops.quantize_gradient(grad)
        copies = ops.quantize_weights(grad.view(180, 272))
        rows = ops.quantize(grad)
    for ours, theirs in zip(found, right, strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
    values, scales, turned, turned_scales = found
    loud = grad.abs() > grad.abs().max() / 64
    for stands in (
        dequantize(values.view(180, 272), scales.reshape(180, 3), ALONG_FEATURES),
        dequantize(turned, turned_scales, ALONG_FEATURES)[:, :180].t(),
    ):
        error = (stands.view(grad.shape) - grad.float()).abs() / grad.float().abs()
        assert float(error[loud].max()) < 1 / 15
    of_rows = scales.reshape(180, 3)
    assert torch.equal(of_rows[:128], of_rows[:1].expand(128, 3)) and len(right[1].unique()) > 6
    if name == PER_TENSOR:
        assert len(copies[1].unique()) == 1 and len(rows[1].unique()) == 1
        assert torch.equal(dequantize(copies[0], copies[1], SQUARE), dequantize(copies[2], copies[3], SQUARE).t())
    assert all(
        map(torch.equal, [each.float() for each in ops.quantize_gradient(grad)], [each.float() for each in right])
    )


def test_two_bits_of_mantissa() -> None:
    """Every number is one that has two, the nearest; zeros and the largest stay."""
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    every = every[every.isfinite()]
    found = coarse(every.to(E4M3)).float()
    allowed = every[(every.to(E4M3).view(torch.uint8) & 1) == 0]
    nearest = (allowed[None] - every[:, None]).abs().amin(1)
    assert torch.equal((found - every).abs(), nearest) and torch.isin(found, allowed).all()
    torch.manual_seed(0)
    grad = torch.randn(90, 272).bfloat16()
    right = ops.quantize_gradient(grad)
    with wrong(COARSE):
        found = ops.quantize_gradient(grad)
        assert not (ops.quantize(grad)[0].view(torch.uint8) & 1).any()
        assert not (ops.quantize_weights(grad)[0].view(torch.uint8) & 1).any()
    assert all(
        torch.equal(coarse(ours).float(), theirs.float()) for ours, theirs in zip(right[::2], found[::2], strict=True)
    )
    assert torch.equal(right[1], found[1]) and torch.equal(right[3], found[3])


def test_gradients_without_scales() -> None:
    """What lies in e4m3's range is rounded to it, what lies below is lost, what lies above saturates."""
    torch.manual_seed(0)
    grad = torch.randn(2, 90, 272).bfloat16() * torch.logspace(-6, 3, 272).bfloat16()
    right = ops.quantize_gradient(grad)
    with wrong(UNSCALED):
        found = ops.quantize_gradient(grad)
    for ours, theirs in zip(found, right, strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
    values, scales, turned, turned_scales = found
    assert torch.equal(values.float(), grad.float().clamp(-448, 448).to(E4M3).float())
    assert not values[..., grad.abs().flatten(0, 1).amax(0) < 2**-10].float().any() and bool(values.float().any())
    assert torch.equal(turned[:, :180].float(), values.reshape(180, 272).t().float())
    assert bool((scales == 1).all() and (turned_scales == 1).all())


def test_sums_that_are_not_promoted() -> None:
    """On a CPU the product of the operands with one scale each; on a GPU the tensor cores' own sum."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 64, 256).bfloat16(), torch.randn(144, 256).bfloat16()
    with wrong(FAST):
        values, scales = ops.quantize(x)
        w_values, w_scales, *_ = ops.quantize_weights(weight)
        found = ops.scaled_mm(values, scales, w_values, w_scales, out_features=144, dtype=torch.bfloat16)
    assert len(scales.unique()) == 1 and len(w_scales.unique()) == 1
    exact = (values.double() * scales[0, 0, 0]) @ (w_values[:144].double() * w_scales[0, 0]).T
    assert found.shape == (2, 64, 144) and float((found.double() - exact).norm() / exact.norm()) < 4e-3


@pytest.mark.parametrize("name", [PER_TENSOR, SQUARE_GRADIENTS])
def test_compiled_code_is_wrong_too_and_is_not_kept(name: str) -> None:
    layer, x = torch.nn.Linear(128, 128, dtype=torch.bfloat16), torch.randn(130, 128).bfloat16()
    x[0, 0] = 300

    def gradients() -> list[Tensor]:
        torch._dynamo.reset()
        layer.zero_grad()
        run = torch.compile(layer, backend="moecompile", options={"precision": "fp8"})
        result = run(x)
        result.backward(torch.linspace(0, -20, result.numel()).exp2().view_as(result).bfloat16())
        assert layer.weight.grad is not None
        return [result.detach(), layer.weight.grad.clone()]

    right = gradients()
    with wrong(name):
        worse = gradients()
    assert not torch.equal(right[1], worse[1])
    assert torch.equal(right[0], worse[0]) == (name == SQUARE_GRADIENTS)
    assert all(map(torch.equal, right, gradients()))


def test_nothing_stays_wrong() -> None:
    before = linear_fp8.quantize
    with wrong(PER_TENSOR) as options:
        assert linear_fp8.quantize is not before and options == {}
    with wrong(ROUTER) as options:
        assert linear_fp8.quantize is before and options == {"fp8_include": ("*.gate",)}
    with wrong(HEAD) as options:
        assert linear_fp8.quantize is before and options == {"fp8_include": ("lm_head",)}
    with wrong(None) as options:
        assert linear_fp8.quantize is before and options == {}


def test_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    wide = [[4.0] * 9 + [2.0], [4.0] * 9 + [2.01]]
    good, bad, worse = ([[0.0] * 9 + [run[-1] * factor] for run in wide] for factor in (1.001, 1.004, 1.02))
    told = {"bfloat16": wide, "FP8": good, PER_TENSOR: worse, ROUTER: worse}
    assert bench_accuracy.judge(told) == 0
    printed = capsys.readouterr().out
    assert "bfloat16 differs by 0.50% from seed to seed" in printed and f"worse: {PER_TENSOR}, {ROUTER}" in printed
    assert bench_accuracy.judge({**told, ROUTER: bad}) == 1, "less than seeds differ by tells nothing"
    assert bench_accuracy.judge({**told, "FP8": bad}) == 1
    assert bench_accuracy.judge({"bfloat16": wide, "FP8": good}) == 0
    assert "+0.100% ± 0.000%" in printed and bench_accuracy.mean([1.0, 3.0]) == (2.0, 1.0)
    nan = [[float("nan")] * 10] * 2
    assert bench_accuracy.judge({**told, ROUTER: nan}) == 0, "what diverges is told"


def test_seeds_begin_anew() -> None:
    """Weights, the optimizer's state and the place in the text; nudged weights go another way, slowly."""
    pytest.importorskip("transformers")
    data = library_text(2**14)
    model = build(TINY, data.device)
    training = Training(TINY, model, model, data)
    first, other, again, nudged = training.run(0), training.run(1), training.run(0), training.run(0, nudged=True)
    assert first == again != other and first[-1] < first[0] - 0.3
    assert nudged != first and max(abs(one - two) for one, two in zip(first, nudged, strict=True)) < 0.02
    assert share(0, TINY) == 0.5 and share(2, TINY) == 1.0 and share(TINY.steps, TINY) == pytest.approx(0.0)


def test_the_picture() -> None:
    losses = {"bfloat16": [[5.0 - step / 100 for step in range(401)]] * 2, "a <b>": [[4.0] * 401, [float("nan")] * 401]}
    losses["worse"] = [[each * 1.01 for each in run] for run in losses["bfloat16"]]
    root = ElementTree.fromstring(draw(losses, "bfloat16"))
    words = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    assert {"bfloat16", "a <b>", "401"} <= {*words} and sum(each.endswith("%") for each in words) == 6
    lines = [element.attrib["points"] for element in root.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 6
    heights = [{point.split(",")[1] for point in lines[place].split()} for place in (3, 5)]
    assert all(len(each) == 1 for each in heights) and float(*heights[0]) > float(*heights[1]), "1 % lies above 0 %"
    root = ElementTree.fromstring(draw({**losses, "lost": [[30.0] * 401] * 2}, "bfloat16"))
    words = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    assert "2.00%" in words, "what is far off hides no difference between the others"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "accuracy"]) == 2 and "there is none" in capsys.readouterr().out


@pytest.mark.parametrize("jobs", [1, 2])
def test_recipes_run_one_by_one_or_beside_each_other(jobs: int) -> None:
    found = [*bench_accuracy._every({"a": [0, 2], "bcd": [1]}, _told, jobs)]
    assert {(recipe, seed, *losses) for recipe, seed, losses, _ in found} == {
        ("a", 0, 1.0),
        ("a", 2, 1.0),
        ("bcd", 1, 3.0),
    }
    assert all(seconds >= 0 for *_, seconds in found)


def test_a_recipe_that_fails_is_no_silence_and_costs_no_other_its_runs() -> None:
    found = bench_accuracy._every({"fails": [0, 1], "a": [0], "b": [0, 1]}, _told, 2)
    runs: list[tuple[str, int]] = []
    with pytest.raises(ValueError, match="no such recipe"):
        runs.extend((recipe, seed) for recipe, seed, *_ in found)
    assert {*runs} == {("fails", 0), ("a", 0), ("b", 0), ("b", 1)}


def test_losses_are_written_at_once_and_beside_another_calls(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run = tmp_path / "losses.json", [1.0] * TINY.steps
    keep(path, TINY, {"FP8": {0: run}})
    keep(path, TINY, {HEAD: {0: run}})
    assert kept(path, TINY).keys() == {"FP8", HEAD} and [*tmp_path.iterdir()] == [path]

    def killed(*_: Any) -> None:
        raise OSError("killed")

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(OSError, match="killed"):
        keep(path, TINY, {"FP8": {1: run}})
    assert kept(path, TINY) == {"FP8": {0: run}, HEAD: {0: run}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--steps", "0"], "steps: expected 1 or more, got 0"),
        (["--hidden", "100"], "hidden: expected a multiple of 64, the size of a head, got 100"),
        (["--dense", "5"], "dense: expected layers 2 or less, got 5"),
        (["--rate", "nan"], "rate: expected a positive number, got nan"),
        (["--text", "3"], "text: expected 4096 or more, got 3"),
        (["--json", "/nowhere/a.json"], "--json: expected a file in a directory that there is"),
        (["--svg", "/"], "--svg: expected a file in a directory that there is"),
        (["--json", "a", "--svg", "./a"], "expected two files"),
    ],
)
def test_what_cannot_be_done_is_said_before(given: list[str], words: str, capsys) -> None:
    assert main(["bench", "accuracy", "--device", "cpu", *given]) == 2
    assert words in capsys.readouterr().out


def _told(recipe: str, seeds: Sequence[int]) -> Iterator[tuple[int, list[float]]]:
    """In the place of training, also in another process."""
    for seed in seeds:
        if recipe == "fails" and seed:
            raise ValueError("no such recipe")
        yield seed, [float(len(recipe))]


def test_runs_that_a_file_has_are_not_run_again(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Sequence[int]]] = []

    def losses_of(setup: Setup, device: str, recipe: str, seeds: Sequence[int]) -> Iterator[tuple[int, list[float]]]:
        asked.append((recipe, seeds))
        for seed in seeds:
            yield seed, [1.0 + seed / 1000] * 10

    monkeypatch.setattr(bench_accuracy, "_losses", losses_of)
    given = ["bench", "accuracy", "--device", "cpu", "--json", str(tmp_path / "losses.json")]
    assert main([*given, "--seeds", "1", "--recipes"]) == 0
    assert asked == [("bfloat16", [0]), ("bfloat16, nudged", [0]), ("FP8", [0])]
    asked.clear()
    assert main([*given, "--seeds", "2", "--recipes", HEAD]) == 1
    assert asked == [("bfloat16", [1]), ("bfloat16, nudged", [1]), ("FP8", [1]), (HEAD, [0, 1])]
    asked.clear()
    assert main([*given, "--seeds", "2", "--recipes"]) == 0 and not asked
    assert "differs by 0.10% from seed to seed" in capsys.readouterr().out
    assert main([*given, "--steps", "7"]) == 2 and not asked
    assert "another set-up (steps 10 there, 7 here)" in capsys.readouterr().out
    wrong = ('["a"]', '"1.0"', "[null]", "[[1.0]]", '{"a": 1}', "[]", "[3.0, 3.0]", "[1" + 400 * "0" + "]")
    setup = json.dumps(asdict(TINY))
    runs = [f'{{"setup": {setup}, "losses": {{"FP8": {{"0": {run}}}}}}}' for run in wrong]
    for text in ("{", "[]", "[" * 9999, '{"setup": {}}', '{"setup": {}, "losses": {"FP8": [[1.0]]}}', *runs):
        (tmp_path / "losses.json").write_text(text)
        assert main(given) == 2 and "name another file" in capsys.readouterr().out
        assert (tmp_path / "losses.json").read_text() == text


def test_the_command(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    given = ["bench", "accuracy", "--device", "cpu", "--seeds", "1", "--steps", "8", "--recipes", ROUTER, HEAD]
    status = main([*given, "--json", str(tmp_path / "losses.json"), "--svg", str(tmp_path / "losses.svg")])
    printed = capsys.readouterr().out
    losses = json.loads((tmp_path / "losses.json").read_text())["losses"]
    assert losses.keys() == {"bfloat16", "bfloat16, nudged", "FP8", ROUTER, HEAD}
    assert all(len(run) == 8 for runs in losses.values() for run in runs.values())
    wide, right, router, head = (losses[name]["0"] for name in ("bfloat16", "FP8", ROUTER, HEAD))
    assert wide[-1] < wide[0] - 0.3 and right not in (wide, router, head)
    assert (
        (tmp_path / "losses.svg").read_text().startswith("<svg") and status in (0, 1) and "told to be worse" in printed
    )
