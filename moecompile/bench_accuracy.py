"""`python -m moecompile bench accuracy`: a model of bytes learns Python's library in bfloat16, in FP8, in wrong FP8.

    for each recipe, for each seed:   the seed's weights, the same batches for all, so many steps; the loss of each
    last tenth of the steps:          FP8's mean loss against bfloat16's of the same seed; bfloat16's from seed to seed

The difference is to be less than 0.25 %. That is worth something only if the set-up can tell: recipes that are known to
be worse have to come out worse than seeds differ. Weights are kept in float32 for the optimizer.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.bench_curves import draw
from moecompile.bench_recipes import PER_TENSOR, ROUTER, SQUARE_GRADIENTS, wrong

WIDE, RIGHT = "bfloat16", "FP8"
WRONG = (PER_TENSOR, SQUARE_GRADIENTS, ROUTER)
BOUND = 0.0025
"""How far FP8's loss may be from bfloat16's, relative."""


@dataclass(frozen=True)
class Setup:
    """What is trained, and how.

    Attributes:
        hidden: features of a token.
        layers: decoder layers.
        experts: of each.
        top_k: experts of a token.
        inner: features inside an expert.
        context: bytes of a sequence.
        batch: sequences of a step.
        steps: of each run.
        rate: of learning, at its highest.
        warmup: steps until then.
        text: bytes of text at most.
    """

    hidden: int = 512
    layers: int = 4
    experts: int = 16
    top_k: int = 2
    inner: int = 512
    context: int = 512
    batch: int = 16
    steps: int = 1500
    rate: float = 1e-3
    warmup: int = 100
    text: int = 24 * 2**20


TINY = Setup(128, 1, 4, 2, 128, 32, 2, 10, 1e-3, 2, 2**16)
"""For a look at the command on a CPU."""


def main(argv: Sequence[str]) -> int:
    """Runs it; returns the exit status: 0 if FP8 learns as well, and wrong recipes are told, else 1."""
    chosen = _parser().parse_args(argv)
    setup = TINY if chosen.device == "cpu" else Setup(steps=chosen.steps)
    recipes = [WIDE, RIGHT, *(chosen.recipes if chosen.recipes is not None else WRONG)]
    losses: dict[str, list[list[float]]] = {}
    data = library_text(setup.text).to(chosen.device)
    print(f"{len(data) / 2**20:.1f} MiB of Python; {setup}", flush=True)
    for recipe in recipes:
        begun = time.perf_counter()
        losses[recipe] = [each for each in runs(setup, recipe, chosen.seeds, data)]
        ends = ", ".join(f"{end(each):.4f}" for each in losses[recipe])
        print(f"{recipe:<20} last tenth {ends}   {time.perf_counter() - begun:.0f} s", flush=True)
        if chosen.json is not None:
            chosen.json.write_text(json.dumps({"setup": asdict(setup), "losses": losses}), encoding="utf-8")
    if chosen.svg is not None:
        chosen.svg.write_text(draw(losses), encoding="utf-8")
    return judge(losses)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moecompile bench accuracy",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe (default: 3)")
    parser.add_argument("--steps", type=int, default=Setup.steps, help=f"of each run (default: {Setup.steps})")
    parser.add_argument("--recipes", nargs="*", choices=WRONG, help="wrong ones to run besides (default: all)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the losses to PATH")
    parser.add_argument("--svg", type=Path, metavar="PATH", help="also draw them to PATH")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=argparse.SUPPRESS)
    return parser


def judge(losses: dict[str, list[list[float]]]) -> int:
    """Prints how far each recipe is from bfloat16, seed by seed, and whether that is as it should be."""
    wide = [end(each) for each in losses[WIDE]]
    band = (max(wide) - min(wide)) / (sum(wide) / len(wide))
    print(f"bfloat16 differs by {band:.2%} from seed to seed")
    apart = {}
    for recipe, found in losses.items():
        if recipe != WIDE:
            each = [end(loss) / right - 1 for loss, right in zip(found, wide, strict=True)]
            apart[recipe] = sum(each) / len(each)
            print(f"{recipe:<20} {apart[recipe]:+.3%}  ({', '.join(f'{one:+.3%}' for one in each)})")
    close = abs(apart[RIGHT]) < BOUND
    told = [recipe for recipe in apart if recipe != RIGHT and not apart[recipe] <= max(band, BOUND)]
    print(f"FP8 within {BOUND:.2%}: {'yes' if close else 'NO'}; told to be worse: {', '.join(told) or 'none'}")
    return 0 if close and (len(told) >= 2 or len(apart) < 3) else 1


def end(losses: Sequence[float]) -> float:
    """The mean of the last tenth."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def runs(setup: Setup, recipe: str, seeds: int, data: Tensor) -> Iterator[list[float]]:
    """The losses of each seed; the model is compiled once."""
    torch._dynamo.reset()
    model = build(setup, data.device)
    with wrong(recipe if recipe in WRONG else None) as more:
        options: dict[str, Any] = {} if recipe == WIDE else {"precision": "fp8", **more}
        if data.device.type == "cpu":  # a look at the command, without minutes of compiling
            options["lowering"] = "eager"
        step = torch.compile(model, backend="moecompile", fullgraph=True, options=options)
        for seed in range(seeds):
            yield train(setup, model, step, seed, data)


def build(setup: Setup, device: torch.device) -> nn.Module:
    """A decoder of transformers over bytes, in bfloat16."""
    from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

    config = configuration_qwen3_moe.Qwen3MoeConfig(
        vocab_size=256, hidden_size=setup.hidden, num_hidden_layers=setup.layers, head_dim=64,
        num_attention_heads=setup.hidden // 64, num_key_value_heads=max(1, setup.hidden // 128),
        num_experts=setup.experts, num_experts_per_tok=setup.top_k, moe_intermediate_size=setup.inner,
        decoder_sparse_step=1, norm_topk_prob=True, max_position_embeddings=setup.context,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        return modeling_qwen3_moe.Qwen3MoeForCausalLM(config).to(torch.bfloat16)


def train(setup: Setup, model: nn.Module, step: Callable[..., Any], seed: int, data: Tensor) -> list[float]:
    """The loss of each step, from new weights."""
    masters = _new_weights(model, seed)
    optimizer = torch.optim.AdamW(masters, lr=setup.rate, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)
    generator, losses = torch.Generator().manual_seed(0), list[Tensor]()
    for number in range(setup.steps):
        for group in optimizer.param_groups:
            group["lr"] = setup.rate * _schedule(number, setup)
        places = torch.randint(len(data) - setup.context - 1, (setup.batch,), generator=generator).tolist()
        text = torch.stack([data[place : place + setup.context + 1] for place in places]).long()
        logits = step(input_ids=text[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), masters)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


@torch.no_grad()
def _new_weights(model: nn.Module, seed: int) -> list[Tensor]:
    """Random matrices, norms of one; float32, and the model's the same rounded."""
    generator, masters = torch.Generator().manual_seed(1000 + seed), list[Tensor]()
    for name, parameter in model.named_parameters():
        made = torch.ones(parameter.shape)
        if parameter.dim() > 1:
            deep = name.endswith(("o_proj.weight", "down_proj"))
            made = torch.randn(parameter.shape, generator=generator) * (0.01 if deep else 0.02)
        masters.append(made.to(parameter.device).requires_grad_())
        parameter.copy_(masters[-1])
    return masters


def _schedule(number: int, setup: Setup) -> float:
    """Up, then down along a cosine to a tenth."""
    if number < setup.warmup:
        return (number + 1) / setup.warmup
    share = (number - setup.warmup) / max(1, setup.steps - setup.warmup)
    return 0.55 + 0.45 * math.cos(math.pi * share)


def library_text(most: int) -> Tensor:
    """Bytes of the modules of Python's own library, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found, size = list[bytes](), 0
    for path in sorted(root.rglob("*.py")):
        if size >= most:
            break
        if not {"site-packages", "dist-packages"} & set(path.parts):
            found.append(path.read_bytes())
            size += len(found[-1])
    return torch.frombuffer(bytearray(b"".join(found)[:most]), dtype=torch.uint8)
