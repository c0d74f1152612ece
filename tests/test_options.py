"""`moecompile.Options`: every mistake is reported where it is made, and names what was expected and what to do."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import moecompile
from moecompile import option_values, pipeline
from moecompile import options as module
from moecompile.options import ENVIRONMENT, PASSES, Options, unknown_variables

DOCUMENT = Path(__file__).parent.parent / "docs" / "options.md"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def test_defaults():
    assert Options().as_dict() == {
        "lowering": "inductor",
        "kernels": "auto",
        "precision": "model",
        "fp8_exclude": (),
        "fp8_include": (),
        "fp8_keep_first_layers": 0,
        "fp8_keep_last_layers": 0,
        "fp8_scale_format": "power_of_two",
        "fp8_compare": None,
        "fp8_cache_weights": False,
        "fp8_recast_weights": False,
        "recompute": False,
        "main_grad": False,
        "expert_load": False,
        "verify": None,
        "ep_capacity": None,
        "ep_rows": 2.0,
        "ep_dispatch_again": False,
        "ep_sms": "auto",
        "ep_patience": 300.0,
        "overlap": False,
        "microbatches": 1,
        "profile": False,
        "disable": (),
        "inductor": {},
    }
    assert moecompile.Options is Options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lowerng": "eager"}, r"unknown option 'lowerng'\. Did you mean 'lowering'\? Known: lowering, kernels, "),
        ({"ep_rows": 0.0}, r"option `ep_rows`: expected more than 0, got 0\.0"),
        ({"ep_rows": float("nan")}, r"option `ep_rows`: expected more than 0, got nan"),
        ({"ep_sms": 0}, r"option `ep_sms`: expected 1 to 64, or 'auto', got 0"),
        ({"ep_sms": 65}, r"option `ep_sms`: expected 1 to 64, or 'auto', got 65"),
        ({"ep_sms": "all"}, r"option `ep_sms`: expected .*, got 'all'"),
        ({"ep_patience": 0.0}, r"option `ep_patience`: expected 0\.001 to .* seconds, got 0\.0"),
        ({"ep_patience": float("nan")}, r"option `ep_patience`: expected 0\.001 to .* seconds, got nan"),
        ({"qqq": 1}, r"unknown option 'qqq'\. Known: lowering, "),
        (
            {"max_autotune": True},
            r"'max_autotune' is an option of Inductor.*Write .*\"inductor\": \{'max_autotune': True\}",
        ),
        ({"lowering": "egaer"}, r"`lowering`: expected 'inductor' or 'eager', got 'egaer'\. Did you mean 'eager'\?"),
        ({"lowering": None}, r"`lowering`: expected 'inductor' or 'eager', got None"),
        ({"kernels": True}, r"`kernels`: expected 'auto' or 'reference', got True"),
        ({"verify": True}, r"`verify`: expected 'first_call' or None, got True"),
        ({"disable": "fuse"}, r"`disable`: expected a tuple of names, got 'fuse'\. Write \('fuse',\)"),
        ({"disable": 3}, r"`disable`: expected a tuple of names, got 3"),
        ({"fp8_exclude": None}, r"`fp8_exclude`: expected a tuple of names, got None\.$"),
        ({"precision": "fp8", "fp8_exclude": ("",)}, r"`fp8_exclude`: an empty pattern names nothing"),
        ({"precision": "fp8", "fp8_include": ("*.[3-1].up",)}, r"`fp8_include`: \[3-1\] names nothing"),
        ({"precision": "fp8", "fp8_exclude": ("layers.[0-",)}, r"'layers\.\[0-' has a bracket too many or too few"),
        ({"fp8": True}, r"unknown option 'fp8'\. FP8 is options="),
        ({"disable": (3,)}, r"`disable`: expected a tuple of strings, got \(3,\)"),
        ({"disable": ("fusee",)}, r"names the pass 'fusee'.*Did you mean 'fuse'\? Passes: detect, fuse"),
        (
            {"precision": "fp8", "fp8_exclude": "*.q_proj"},
            r"`fp8_exclude`: expected a tuple of names, got '\*\.q_proj'",
        ),
        ({"precision": "fp8", "fp8_keep_last_layers": -1}, r"`fp8_keep_last_layers`: expected 0 or more, got -1"),
        ({"precision": "fp8", "fp8_keep_last_layers": True}, r"`fp8_keep_last_layers`: expected int, got True"),
        ({"fp8_include": ("router",)}, r"`fp8_include` is about FP8, which precision='model' does not use"),
        ({"inductor": ["max_autotune"]}, r"`inductor`: expected a mapping"),
        ({"inductor": "max_autotune"}, r"`inductor`: expected a mapping"),
        ({"lowering": "eager", "inductor": {"max_autotune": True}}, r"\(max_autotune\).*lowering='eager'.*Leave one"),
    ],
)
def test_mistakes_are_reported_where_they_are_written(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Options(**values)
    with pytest.raises(ValueError, match=message):
        Options.parse(None, values)


@pytest.mark.parametrize("given", [[("lowering", "eager")], "lowering", 3])
def test_options_that_are_no_mapping(given: Any):
    with pytest.raises(ValueError, match=r"expected options as a mapping or as moecompile\.Options, got"):
        Options.parse(None, given)


def test_frozen_hashable_and_compared_by_value():
    names: Any = ["fuse"]
    first = Options(disable=names, inductor={"epilogue_fusion": False, "cpp.threads": 1})
    second = Options(disable=("fuse",), inductor={"cpp.threads": 1, "epilogue_fusion": False})
    assert first == second and hash(first) == hash(second)
    assert first != Options(disable=("fuse",))
    hash(Options(inductor={"cpp.cxx": ["g++"]}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.lowering = "eager"  # type: ignore[misc]


def test_copies_round_trip():
    chosen = Options(kernels="reference", inductor={"epilogue-fusion": False}, verify="first_call")
    assert chosen.as_dict()["inductor"] == {"epilogue_fusion": False}
    for same in (
        Options.parse(None, chosen),
        Options.parse(None, chosen.as_dict()),
        Options(**chosen.as_dict()),
        pickle.loads(pickle.dumps(chosen)),
        copy.deepcopy(chosen),
        dataclasses.replace(chosen),
    ):
        assert same == chosen
    assert dataclasses.replace(chosen, kernels="auto").kernels == "auto"


@pytest.mark.parametrize("mode", [None, "default"])
def test_the_default_mode_stands_for_nothing(mode: str | None):
    assert Options.parse(mode, None) == Options()


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_a_mode_stands_for_what_it_stands_for_in_inductor(mode: str):
    expected = torch._inductor.list_mode_options(mode)
    assert Options.parse(mode, None).as_dict()["inductor"] == expected


def test_an_explicit_option_wins_over_the_mode():
    chosen = Options.parse("max-autotune", {"inductor": {"max_autotune": False}})
    assert dict(chosen.inductor)["max_autotune"] is False
    assert dict(chosen.inductor)["triton.cudagraphs"] is True


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("max-autotun", None, r"unknown mode 'max-autotun'\. Did you mean 'max-autotune'\? Modes: default, "),
        (
            None,
            {"inductor": {"max_autotun": True}},
            r"Inductor has no option 'max_autotun'\. Did you mean 'max_autotune'\?",
        ),
        (None, {"inductor": {"max_autotune": "yes"}}, r"'max_autotune' is of type bool, got 'yes'"),
        ("max-autotune", {"lowering": "eager"}, r"lowering='eager'"),
        (5, None, r"unknown mode 5\. Modes: default, "),
        (["default"], None, r"unknown mode \['default'\]\. Modes: default, "),
        (None, {"inductor": (1, 2)}, r"option `inductor`: expected a mapping such as .* got \(1, 2\)"),
    ],
)
def test_inductors_options_are_checked_against_this_torch(mode: Any, options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Options.parse(mode, options)


def test_the_environment_disables_passes(monkeypatch):
    monkeypatch.setenv("MOECOMPILE_DISABLE_PASSES", " fuse, ,detect")
    assert module.environment_disabled_passes() == ("fuse", "detect")
    assert Options.parse(None, {"disable": ("detect",)}).disable == ("detect", "fuse")
    assert Options().disable == ()  # the environment counts where a model is compiled, not where options are written
    monkeypatch.setenv("MOECOMPILE_DISABLE_PASSES", "fus")
    with pytest.raises(ValueError, match=r"MOECOMPILE_DISABLE_PASSES names the pass 'fus'.*Did you mean 'fuse'"):
        Options.parse(None, None)


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_environment_disables_the_backend(monkeypatch, value: str | None, expected: bool):
    if value is not None:
        monkeypatch.setenv("MOECOMPILE_DISABLE", value)
    assert module.environment_disables_backend() is expected


def test_a_wrong_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("MOECOMPILE_DISABLE", "yes")
    with pytest.raises(ValueError, match="MOECOMPILE_DISABLE: expected 0 or 1, got 'yes'"):
        module.environment_disables_backend()


def test_every_kind_of_annotation_is_checked():
    """Options that come later may be numbers, switches and pairs; each annotation must reject its neighbours."""
    for annotation, good, bad in [
        (bool, (True, False), (0, 1, None, "yes")),
        (int, (0, 3), (True, 1.0, "1")),
        (float, (1, 0.5), (True, "0.5")),
        (typing.Literal[1, 2], (1, 2), (True, 1.0, 3)),
        (int | None, (None, 3), (True, "3")),
        (tuple[int, str], ((1, "a"),), ((1,), ("a", 1), [1, "a"])),
        (tuple[str, ...], ((), ("a", "b")), (("a", 1), "ab")),
    ]:
        assert all(option_values._matches(annotation, value) for value in good), annotation
        assert not any(option_values._matches(annotation, value) for value in bad), annotation


@pytest.mark.parametrize("option", [{"profile": True}, {"fp8_cache_weights": True, "precision": "fp8"}], ids=str)
def test_what_does_not_go_with_cuda_graphs(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"option `{next(iter(option))}` does not go with Inductor's CUDA graphs"):
        Options.parse("reduce-overhead", option)
    Options.parse("reduce-overhead", {})


def option_rows() -> list[str]:
    annotations = typing.get_type_hints(Options) | {"inductor": dict[str, Any]}
    return [
        f"| `{field.name}` | {_spelled(annotations[field.name])} | `{Options().as_dict()[field.name]!r}` "
        f"| {field.metadata['meaning']} |"
        for field in dataclasses.fields(Options)
    ]


def _spelled(annotation: Any) -> str:
    return {tuple[str, ...]: "tuple of names", dict[str, Any]: "mapping"}.get(annotation) or option_values._spelled(
        annotation
    )


@pytest.mark.parametrize(
    ("section", "header", "rows"),
    [
        ("options", ["| option | values | default | effect |", "|---|---|---|---|"], option_rows()),
        (
            "passes",
            ["| pass | effect |", "|---|---|"],
            [f"| `{name}` | {meaning} |" for name, meaning in PASSES.items()],
        ),
        (
            "environment",
            ["| variable | values | default | effect |", "|---|---|---|---|"],
            [f"| `{name}` | {row.values} | {row.default} | {row.meaning} |" for name, row in ENVIRONMENT.items()],
        ),
    ],
)
def test_the_documentation_is_the_table(section: str, header: list[str], rows: list[str]):
    found = re.search(rf"<!-- {section} -->\n(.*)<!-- /{section} -->", DOCUMENT.read_text(), flags=re.DOTALL)
    assert found is not None
    assert found[1] == "\n".join([*header, *rows]) + "\n"


def test_every_pass_is_described_and_every_description_has_a_pass():
    assert list(PASSES) == list(pipeline.PASSES)


def test_variables_that_begin_like_ours_and_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMPILE_DISABLED", "1")
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", "/somewhere")
    (said,) = unknown_variables().values()
    assert said.startswith("MOECOMPILE_DISABLED is set, and is no variable of moecompile's. Did you mean 'MOECOMPILE_")


def test_a_choice_in_capitals_is_recognised() -> None:
    with pytest.raises(ValueError, match="Did you mean 'fp8'"):
        Options(precision="FP8")  # type: ignore[arg-type]
