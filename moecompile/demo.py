"""`python -m moecompile demo`: real architectures, compiled, shown, checked against eager and trained a little.

For each architecture, built by transformers from its configuration at a tiny size, with random weights:

    copy the model; compile the copy, run one training step of both      (Dynamo, our passes, AOTAutograd, Inductor)
    print the report, and one MoE block of the graph before and after
    compare logits, loss and every gradient with those of the model itself
    train both for a few steps of AdamW, print the losses side by side

No GPU and no network are needed. The exit status is 0 if everything was found and every number is within its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moecompile import doctor, report
from moecompile.command_line import parser_of

STEPS, BATCH, LENGTH = 5, 2, 32
GLUE = "\N{NO-BREAK SPACE}"
# Largest difference relative to the largest value of the tensor, for float32.
OUTPUT_BOUND, GRADIENT_BOUND, TRAINING_BOUND = 1e-5, 1e-4, 1e-3
COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.125,  # 1 / sqrt(hidden): with the usual 0.02 experts this small would hardly matter
}


@dataclass(frozen=True)
class Architecture:
    """A causal language model of transformers, made tiny.

    Attributes:
        title: its name in print.
        classes: prefix of its classes in transformers: ``PrefixConfig``, ``PrefixForCausalLM``.
        sizes: arguments of its configuration besides `COMMON`.
        blocks: MoE blocks it then has.
    """

    title: str
    classes: str
    sizes: Mapping[str, Any]
    blocks: int = 2

    def build(self) -> nn.Module:
        """The model with random weights, float32, in training mode."""
        import transformers

        # Some configurations talk about the lengths they were made for.
        transformers.logging.set_verbosity_error()
        config = getattr(transformers, f"{self.classes}Config")(**{**COMMON, **self.sizes})
        model: nn.Module = getattr(transformers, f"{self.classes}ForCausalLM")(config)
        return model.train()


ARCHITECTURES: dict[str, Architecture] = {
    "qwen3_moe": Architecture(
        "Qwen3-MoE", "Qwen3Moe", {"head_dim": 16, "num_experts": 8, "moe_intermediate_size": 32, "norm_topk_prob": True}
    ),
    "deepseek_v3": Architecture(
        "DeepSeek-V3",
        "DeepseekV3",
        {
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
        blocks=1,  # the first layer is dense, as in the published model
    ),
    "gpt_oss": Architecture(
        "gpt-oss", "GptOss", {"head_dim": 16, "intermediate_size": 32, "num_local_experts": 8, "sliding_window": 16}
    ),
    "mixtral": Architecture("Mixtral", "Mixtral", {"intermediate_size": 32, "num_local_experts": 8}),
}
DEFAULT = ("qwen3_moe", "deepseek_v3")


@dataclass
class Run:
    """One architecture on its way through the demo: the model as it is, its compiled copy, and what went wrong."""

    architecture: Architecture
    lowering: str
    eager: nn.Module
    compiled: nn.Module
    tokens: Tensor
    failures: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, architecture: Architecture, lowering: str) -> Run:
        """Builds the model, the copy to compile and a batch of random tokens."""
        torch.manual_seed(0)
        eager = architecture.build()
        compiled = copy.deepcopy(eager)
        compiled.compile(backend="moecompile", options={"lowering": lowering})
        return cls(architecture, lowering, eager, compiled, torch.randint(COMMON["vocab_size"], (BATCH, LENGTH)))

    def step(self, model: nn.Module) -> dict[str, Tensor]:
        """Runs forward and backward; returns logits, loss and the gradient of every parameter by its path."""
        model.zero_grad()
        output = model(input_ids=self.tokens, labels=self.tokens, use_cache=False)
        output.loss.backward()
        gradients = {path: value.grad for path, value in model.named_parameters() if value.grad is not None}
        return {"logits": output.logits.detach(), "loss": output.loss.detach()} | gradients

    def check(self, holds: bool, otherwise: str) -> str:
        """``ok`` or ``FAILED``; a failure is remembered."""
        if not holds:
            self.failures.append(f"{self.architecture.title}: {otherwise}")
        return "ok" if holds else "FAILED"


def main(argv: Sequence[str]) -> int:
    """Runs the demo.

    Args:
        argv: the command line after `python -m moecompile demo`.

    Returns:
        the exit status: 0 if every check passed, 1 if one failed, 2 if something that the demo needs is missing.
    """
    chosen = _parser().parse_args(argv)
    if missing := _missing(chosen.lowering):
        print("\n".join(missing), file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    started = time.perf_counter()
    print(
        f"moecompile demo: torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads of the CPU, lowering {chosen.lowering!r}"
    )
    names = list(ARCHITECTURES) if "all" in chosen.models else list(dict.fromkeys(chosen.models))
    failures = [failure for name in names for failure in _show(ARCHITECTURES[name], chosen)]
    print("\n".join(["", *(f"FAILED: {failure}" for failure in failures)]))
    print(f"{'Not every check passed' if failures else 'Every check passed'} ({time.perf_counter() - started:.0f} s).")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("demo", __doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=DEFAULT,
        choices=[*ARCHITECTURES, "all"],
        metavar="NAME",
        help=f"which architectures: {', '.join(ARCHITECTURES)}, all (default: {' '.join(DEFAULT)})",
    )
    parser.add_argument(
        "--lowering",
        default="inductor",
        choices=["inductor", "eager"],
        help="what runs the rewritten graphs; eager skips Inductor, for a quick look (default: inductor)",
    )
    parser.add_argument("--graphs", action="store_true", help="print the whole graphs, not one block of them")
    return parser


def _missing(lowering: str) -> list[str]:
    """What the demo needs and this machine lacks, each with its cure."""
    needed = ["backend", "transformers", *(["C++ compiler", "Python headers"] if lowering == "inductor" else [])]
    findings = [doctor.CHECKS[item](item) for item in needed]
    lines = [
        f"The demo needs {found.item}: {found.found}. Cure: {found.cure}." for found in findings if found.state != "ok"
    ]
    if lines and not any(found.item in ("backend", "transformers") and found.state != "ok" for found in findings):
        lines.append("Or run it without Inductor: python -m moecompile demo --lowering eager")
    return lines


def _show(architecture: Architecture, chosen: argparse.Namespace) -> list[str]:
    """Takes one architecture through the demo; returns what failed."""
    torch._dynamo.reset()
    report.reset()
    run = Run.of(architecture, chosen.lowering)
    config: Any = run.eager.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "n_routed_experts", None)
    parameters = sum(parameter.numel() for parameter in run.eager.parameters())
    print(
        f"\n\n{architecture.title}: {type(run.eager).__name__}, {config.num_hidden_layers} layers, "
        f"{experts or config.num_experts} experts, {config.num_experts_per_tok} of them for each token, "
        f"{parameters:,} random parameters\n{'=' * _width()}\n"
    )
    expected = run.step(run.eager)
    patience = " (Inductor takes a minute, unless it has done so before)" if run.lowering == "inductor" else ""
    with _timed(f"Compiling forward and backward, running one step{patience}"):
        actual = run.step(run.compiled)
    _show_report(run, whole=chosen.graphs)
    _compare(run, actual, expected)
    _train(run)
    return run.failures


def _show_report(run: Run, whole: bool) -> None:
    """The report; then one block of the graph before and after, or all of it, and the backward graph."""
    found = report.last_report()
    print(f"\n{found.text(width=_width())}")
    run.check(
        len(found.sites) == run.architecture.blocks,
        f"expected {run.architecture.blocks} MoE blocks to be rewritten, found {len(found.sites)}",
    )
    for graph in found.graphs:
        first, last = (graph.sites[0].module, graph.sites[-1].module) if graph.sites and not whole else ("", "")
        for title, text, module in (
            ("before", graph.before, first),
            ("after", graph.after, first),
            ("in the backward graph, reduced to our operators", graph.backward or "", last),
        ):
            lines = block_of(text, module)
            _heading(f"{module or 'The graph'} {title}: {len(lines)} of {len(text.splitlines())} lines")
            print("\n".join(wrapped(line) for line in lines))


def block_of(text: str, module: str) -> list[str]:
    """The lines of a graph's text that belong to a module, and before them those that make what these read.

    Args:
        text: see `moecompile.passes.printer`.
        module: dotted path, which is left out of its own lines; empty for the whole text.
    """
    lines = text.splitlines()
    if not module:
        return lines
    own = [line for line in lines if re.search(rf"  # {re.escape(module)}(\.\S+)?(  |$)", line)]
    made = {line.split(" = ")[0] for line in own}
    read = {name for line in own for name in re.findall(r"%\d+", line)} - made
    shown = [line for line in lines if line.split(" = ")[0] in read] + own
    return [line.replace(f"  # {module}  ", "  # ") for line in shown]


def wrapped(line: str) -> str:
    """A line of a graph's text, continued below itself where the terminal ends; short parts stay whole."""
    kept = re.sub(r'"[^"]{,60}"|\[[^\]]*\]|# .*', lambda match: match[0].replace(" ", GLUE), line)
    indent = " " * (line.find("=") + 4)
    lines = textwrap.wrap(kept, _width(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace(GLUE, " ")


def _compare(run: Run, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """One training step, compiled and not: errors, bounds, verdicts."""
    _heading("Against eager, one step: largest difference, relative to the largest value of the tensor")
    print(f"{'':<62}  {'error':>7}  {'bound':>5}")
    unlike = sorted(actual.keys() ^ expected.keys())
    run.check(not unlike, f"gradients in only one of the two: {', '.join(unlike)}")
    errors = {name: _distance(actual[name], expected[name]) for name in expected if name in actual}
    worst, *others = sorted(errors.keys() - {"logits", "loss"}, key=lambda name: -errors[name])
    for name, error, bound in (
        ("logits", errors["logits"], OUTPUT_BOUND),
        ("loss", errors["loss"], OUTPUT_BOUND),
        (f"{1 + len(others)} gradients; worst: {worst}", errors[worst], GRADIENT_BOUND),
    ):
        verdict = run.check(error <= bound, f"{name}: error {error:.1e} is above {bound:.0e}")
        print(f"{name:<62}  {error:7.1e}  {bound:5.0e}  {verdict}")


def _distance(actual: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float(torch.nan_to_num((actual - expected).abs().max() / scale, nan=float("inf")))


def _train(run: Run) -> None:
    """A few steps of AdamW on one batch: losses of the compiled and of the original model side by side."""
    _heading(f"Training on one batch of {BATCH} x {LENGTH} tokens with AdamW: losses")
    losses: dict[str, list[float]] = {}
    with _timed(f"{STEPS} steps of each"):
        for name, model in (("compiled", run.compiled), ("eager", run.eager)):
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            losses[name] = []
            for _ in range(STEPS):
                losses[name].append(float(run.step(model)["loss"]))
                optimizer.step()
    print(f"{'step':>4}  {'compiled':>8}  {'eager':>8}  {'error':>7}  {'bound':>5}")
    for step, (actual, expected) in enumerate(zip(losses["compiled"], losses["eager"], strict=True)):
        error = abs(actual - expected) / expected
        verdict = run.check(error <= TRAINING_BOUND, f"loss of step {step}: error {error:.1e}")
        print(f"{step:>4}  {actual:8.4f}  {expected:8.4f}  {error:7.1e}  {TRAINING_BOUND:5.0e}  {verdict}")
    first, *_, last = losses["compiled"]
    run.check(last < first, f"training does not lower the loss: {first:.4f}, then {last:.4f}")
    compilations = len(report.last_report().graphs)
    run.check(compilations == 1, f"expected one graph, compiled once; {compilations} were compiled")


@contextlib.contextmanager
def _timed(what: str) -> Iterator[None]:
    print(f"{what} ... ", end="", flush=True)
    started = time.perf_counter()
    yield
    print(f"{time.perf_counter() - started:.1f} s")


def _heading(text: str) -> None:
    print(f"\n{text}\n{'-' * min(len(text), _width())}")


def _width() -> int:
    return min(max(shutil.get_terminal_size((100, 24)).columns, 80), 120)
