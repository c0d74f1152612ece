"""A small language model of bytes learns Python code: what `python -m moecompile bench accuracy` compares.

Nothing of a step asks the host: batches, rates and losses lie on the device, in tables that a counter there reads. So
on a GPU a step is one CUDA graph, captured once for all seeds, and takes what its kernels take. Weights are kept in
float32 for the optimizer; the model's are these rounded.
"""

from __future__ import annotations

import functools
import math
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WARM = 3
"""Steps before the capture: the first compiles, the second records the kernels' calls, the third repeats them."""
HEAD = 64
LEAST = {
    "hidden": HEAD, "layers": 1, "dense": 0, "experts": 1, "top_k": 1, "inner": 1, "context": 1, "batch": 1, "steps": 1,
    "warmup": 0, "text": 2**12,
}  # fmt: skip
"""Of a set-up's numbers, at least."""
PACKAGES = {"site-packages", "dist-packages"}
NUDGE = 2.0**-20
"""How far, relative, weights are from a seed's where chance is looked at; bfloat16 rounds most of them alike."""


@dataclass(frozen=True)
class Setup:
    """What is trained, and how.

    Attributes:
        hidden: features of a token.
        layers: decoder layers.
        dense: how many of these, the first ones, have one dense block in place of experts, four times as wide as a
            token, as DeepSeek-V3's first layers: wrong recipes reach linear layers and no rows inside of experts.
        experts: of each of the others.
        top_k: experts of a token.
        inner: features inside an expert.
        context: bytes of a sequence. Longer ones can be copied from, which some seeds learn much earlier than others.
        batch: sequences of a step.
        steps: of each run; seeds differ by 3 % where the loss still falls fast, by 0.2 % after four times as many.
        rate: of learning, at its highest.
        warmup: steps until then.
        text: bytes of text at most. If they are fewer than those of all steps, some are read twice and learnt by heart,
            which rounding harms most.
    """

    hidden: int = 512
    layers: int = 4
    dense: int = 2
    experts: int = 16
    top_k: int = 2
    inner: int = 512
    context: int = 128
    batch: int = 64
    steps: int = 4000
    rate: float = 1e-3
    warmup: int = 200
    text: int = 48 * 2**20

    def check(self) -> Setup:
        """Itself.

        Raises:
            ValueError: nothing of these sizes can be trained.
        """
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        for name, most in (("dense", "layers"), ("top_k", "experts"), ("context", "text")):
            if getattr(self, name) > getattr(self, most):
                raise ValueError(f"{name}: expected {most} {getattr(self, most)} or less, got {getattr(self, name)}")
        if self.hidden % HEAD:
            raise ValueError(f"hidden: expected a multiple of {HEAD}, the size of a head, got {self.hidden}")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate: expected a positive number, got {self.rate}")
        return self


TINY = Setup(128, 2, 1, 16, 2, 128, 32, 2, 10, 1e-3, 2, 2**16)
"""For a look at the command on a CPU."""


def runs(
    setup: Setup, options: Mapping[str, Any] | None, seeds: Iterable[int], data: Tensor, nudged: bool = False
) -> Iterator[tuple[int, list[float]]]:
    """Each seed with its losses, of each step; compiled and captured once.

    Args:
        setup: what is trained.
        options: of the backend.
        seeds: of the weights; batches are the same for all.
        data: (bytes,) uint8, where it is to be trained.
        nudged: whether weights begin NUDGE away from the seed's.
    """
    torch._dynamo.reset()
    model = build(setup, data.device)
    compiled = torch.compile(model, backend="moecompile", fullgraph=True, options=dict(options or {}))
    training = Training(setup, model, compiled, data)
    for seed in seeds:
        yield seed, training.run(seed, nudged)


def build(setup: Setup, device: torch.device) -> nn.Module:
    """A decoder of transformers over bytes, in bfloat16."""
    from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

    config = configuration_qwen3_moe.Qwen3MoeConfig(
        vocab_size=256, hidden_size=setup.hidden, num_hidden_layers=setup.layers, head_dim=HEAD,
        num_attention_heads=setup.hidden // HEAD, num_key_value_heads=max(1, setup.hidden // HEAD // 2),
        num_experts=setup.experts, num_experts_per_tok=setup.top_k, moe_intermediate_size=setup.inner,
        mlp_only_layers=list(range(setup.dense)), intermediate_size=4 * setup.hidden,
        decoder_sparse_step=1, norm_topk_prob=True, max_position_embeddings=setup.context,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        return modeling_qwen3_moe.Qwen3MoeForCausalLM(config).to(torch.bfloat16)


class Training:
    """Steps of one model, from the weights of one seed or another."""

    def __init__(self, setup: Setup, model: nn.Module, compiled: Callable[..., Any], data: Tensor) -> None:
        self._model, self._compiled, self._data, device = model, compiled, data, data.device
        self._masters = [each.detach().float().requires_grad_() for each in model.parameters()]
        self._rate = torch.zeros((), device=device)
        how = {"foreach": True, "capturable": True} if data.is_cuda else {"foreach": False}
        self._optimizer = torch.optim.AdamW(self._masters, self._rate, (0.9, 0.95), weight_decay=0.1, **how)
        self._rates = torch.tensor([setup.rate * share(number, setup) for number in range(setup.steps)], device=device)
        generator, size = torch.Generator().manual_seed(0), (setup.steps, setup.batch, 1)
        places = torch.randint(len(data) - setup.context - 1, size, generator=generator)
        self._places, self._within = places.to(device), torch.arange(setup.context + 1, device=device)
        self._losses = torch.zeros(setup.steps, device=device)
        self._number = torch.zeros(1, dtype=torch.int64, device=device)
        self._replay: Callable[[], None] | None = None

    def run(self, seed: int, nudged: bool = False) -> list[float]:
        """The loss of each step, from new weights."""
        if self._replay is None:
            self._replay = self._captured() if self._data.is_cuda else self._step
        self._begin(seed, nudged)
        for _ in range(len(self._losses)):
            self._replay()
        found: list[float] = self._losses.tolist()
        return found

    def _step(self) -> None:
        text = self._data[self._places.index_select(0, self._number)[0] + self._within].long()
        logits = self._compiled(input_ids=text[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        for master, parameter in zip(self._masters, self._model.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self._masters, 1.0, foreach=True)
        self._rate.copy_(self._rates.index_select(0, self._number)[0])
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(self._model.parameters()), self._masters)
        self._losses.index_copy_(0, self._number, loss.detach().view(1))
        self._number += 1

    def _captured(self) -> Callable[[], None]:
        """A step as a CUDA graph."""
        self._begin(0, nudged=False)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM):
                self._step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    @torch.no_grad()
    def _begin(self, seed: int, nudged: bool) -> None:
        """Random matrices, norms of one; the optimizer has seen nothing. All stays in its place."""
        generator, other = (torch.Generator().manual_seed(base + seed) for base in (1000, 2000))
        for master, (name, parameter) in zip(self._masters, self._model.named_parameters(), strict=True):
            made = torch.ones(parameter.shape)
            if parameter.dim() > 1:
                deep = name.endswith(("o_proj.weight", "down_proj"))
                made = torch.randn(parameter.shape, generator=generator) * (0.01 if deep else 0.02)
            if nudged:
                made *= 1 + NUDGE * torch.randn(made.shape, generator=other)
            master.copy_(made)
            parameter.copy_(master)
        for state in self._optimizer.state.values():
            for each in state.values():
                each.zero_()
        self._number.zero_()


def share(number: int, setup: Setup) -> float:
    """Of the highest rate: up, then down along a cosine to nothing, where runs come to rest."""
    if number < setup.warmup:
        return (number + 1) / setup.warmup
    done = (number - setup.warmup) / max(1, setup.steps - setup.warmup)
    return 0.5 + 0.5 * math.cos(math.pi * done)


@functools.cache
def library_text(most: int) -> Tensor:
    """Bytes of the modules of Python's own library and then of the packages beside it, torch among them.

    In the order of their names; read once, and not to be written.
    """
    paths = sysconfig.get_paths()
    own = (each for each in sorted(Path(paths["stdlib"]).rglob("*.py")) if not PACKAGES & set(each.parts))
    found, size = list[bytes](), 0
    for path in chain(own, sorted(Path(paths["purelib"]).rglob("*.py"))):
        if size >= most:
            break
        found.append(path.read_bytes())
        size += len(found[-1])
    return torch.frombuffer(bytearray(b"".join(found)[:most]), dtype=torch.uint8)
