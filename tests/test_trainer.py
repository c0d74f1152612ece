"""Trainer of transformers on a model prepared with `model.compile(backend="moecompile")`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moecompile
from tiny_transformers import build_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS = 4


def arguments(folder: Path, **more: Any) -> Any:
    """Few steps on the CPU, every loss logged, nothing saved and nobody told."""
    given = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return transformers.TrainingArguments(**{**given, **more})


def texts(number: int = 2 * STEPS, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Random texts, all with the same few tokens, so that there is something to learn from each for the next."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, 11, (number, length), generator=generator)
    return [{"input_ids": tokens, "labels": tokens} for tokens in drawn]


def train(model: nn.Module, folder: Path, **more: Any) -> list[float]:
    """Trains the model; returns the loss of every step."""
    trainer = transformers.Trainer(model=model, args=arguments(folder, **more), train_dataset=texts())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["plain", "gradient_accumulation", "gradient_checkpointing"],
)
def test_trainer_trains_a_compiled_model(tmp_path: Path, more: dict[str, Any]) -> None:
    model = build_model("qwen3_moe").train()
    compiled = copy.deepcopy(model)
    compiled.compile(backend="moecompile", options={"lowering": "eager"})

    losses = train(compiled, tmp_path, **more)
    report = moecompile.last_report()
    expected = train(model, tmp_path, **more)

    assert len(losses) == len(expected) == more.get("max_steps", STEPS)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[-1] < losses[0]
    (graph,) = report.graphs
    assert len(graph.sites) == 2 and not report.graph_breaks
    assert graph.backward is not None and graph.backward.count("= moecompile.experts_backward(") == 2
    # checkpointed layers run their forward again in backward
    assert graph.backward.count("= moecompile.experts_forward(") == (2 if "gradient_checkpointing" in more else 0)
    # what Trainer would save has the model's own names
    assert list(compiled.state_dict()) == list(model.state_dict())
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], parameter, rtol=0, atol=1e-2, msg=name)


def test_trainers_own_arguments_know_only_the_backends_of_pytorch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?i)moecompile.*not a valid"):
        given = arguments(tmp_path, torch_compile=True, torch_compile_backend="moecompile")
        transformers.Trainer(model=build_model("qwen3_moe"), args=given, train_dataset=texts()).train()
