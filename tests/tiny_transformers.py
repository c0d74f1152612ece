"""Tiny random models of every mixture-of-experts architecture that the installed transformers has."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from tiny_sizes import DERIVED, MODEL_CLASSES, OPTIONAL, OVERRIDES, Sizes

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WRITTEN_WITH = Version("5.23")
OWN_CODE = ("doge", "jetmoe", "llama4")
IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
OWN_BLOCKS = ("DogeCDMoE", "JetMoeMoE")
OWN_EXPERTS = (*OWN_BLOCKS, "Llama4TextExperts")
SUFFIXES = ("ForCausalLM", "ForConditionalGeneration", "TextModel", "Model")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@functools.cache
def architectures() -> tuple[str, ...]:
    """Names of the architectures whose experts transformers runs through its experts interface."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    return tuple(
        sorted(
            source.parent.name
            for source in models.glob("*/modeling_*.py")
            if source.name == f"modeling_{source.parent.name}.py"
            and "@use_experts_implementation" in source.read_text(encoding="utf-8")
        )
    )


def known_to_transformers(*names: str) -> list[Any]:
    """Architectures as test parameters: those that an older transformers does not have yet are skipped.

    From the version on that these tests were written with they have to be there, so that a wrong name is no skip.
    """
    import transformers

    version = transformers.__version__
    there = {*architectures(), *OWN_CODE} if Version(version) < WRITTEN_WITH else set(names)
    reason = f"transformers {version} does not have this architecture; {WRITTEN_WITH} does"
    return [pytest.param(name, marks=() if name in there else (pytest.mark.skip(reason=reason),)) for name in names]


def model_class(name: str) -> type[nn.Module]:
    """The model class of an architecture that has experts, the largest text model first.

    Raises:
        LookupError: no class of the architecture has a configuration with experts.
    """
    from transformers import PreTrainedModel

    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    if name in MODEL_CLASSES:
        return getattr(module, MODEL_CLASSES[name])
    candidates: list[Any] = [
        member
        for member in vars(module).values()
        if inspect.isclass(member) and issubclass(member, PreTrainedModel) and member.__module__ == module.__name__
    ]
    for suffix in SUFFIXES:
        for candidate in candidates:
            if candidate.__name__.endswith(suffix) and has_experts(candidate):
                return candidate
    raise LookupError(f"{name} has no model class with experts among {[c.__name__ for c in candidates]}")


def has_experts(candidate: type[nn.Module]) -> bool:
    """Whether the class's configuration counts experts."""
    config = getattr(candidate, "config_class", None)
    return config is not None and not vars(config()).keys().isdisjoint(EXPERT_COUNTS)


def tiny_config(config_class: type, name: str, sizes: Sizes, **overrides: Any) -> Any:
    """The architecture's configuration at the given sizes; `overrides` are attributes of the configuration itself."""
    defaults = vars(config_class())
    values: dict[str, Any] = {}
    for attribute, value in sizes.attributes().items():
        if attribute not in defaults or attribute in DERIVED.get(name, ()):
            continue
        if attribute not in OPTIONAL or defaults[attribute] not in (None, 0, 1):
            values[attribute] = value
    for attribute, value in per_layer_lists(defaults, sizes.layers).items():
        values.setdefault(attribute, value)
    for attribute, override in {**OVERRIDES.get(name, {}), **overrides}.items():
        values[attribute] = override(sizes) if callable(override) else override
    return config_class(**values)


def per_layer_lists(defaults: dict[str, Any], layers: int) -> dict[str, list[Any]]:
    """Lists with an entry for every layer, cut to `layers`: the last ones, but of attention one of every kind."""
    lists = {}
    for attribute, value in defaults.items():
        if isinstance(value, (list, tuple)) and len(value) == defaults.get("num_hidden_layers"):
            kinds = list(dict.fromkeys(value)) * layers
            lists[attribute] = kinds[:layers] if attribute == "layer_types" else list(value)[-layers:]
    return lists


def build_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    implementation: str = "grouped_mm",
    sizes: Sizes | None = None,
    seed: int = 0,
    **overrides: Any,
) -> nn.Module:
    """A whole tiny model with random weights in evaluation mode; routers that insist on float32 keep it."""
    sizes = sizes or Sizes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls = model_class(name)
        config = tiny_config(cls.config_class, name, sizes, **overrides)  # type: ignore[attr-defined]
        if name not in OWN_CODE:
            config._experts_implementation = implementation
        config._attn_implementation = None if getattr(cls, "_supports_sdpa", True) else "eager"
        torch.manual_seed(seed)
        model = cls(config)
    initialise(model)
    keep_float32 = [re.escape(part) for part in getattr(model, "_keep_in_fp32_modules_strict", None) or ()]
    strict = re.compile(rf"(^|\.)({'|'.join(keep_float32)})(\.|$)") if keep_float32 else None
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not (strict and strict.search(path)):
            tensor.data = tensor.data.to(dtype)
    return model.eval()


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Random weights that keep activations of order one and make routing lively."""
    for module in model.modules():
        transposed = getattr(module, "is_transposed", False)
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            if isinstance(module, nn.Embedding):
                parameter.normal_()
            elif parameter.dim() > 1 and "bias" not in name:
                fan_in = parameter.shape[-2] if transposed else parameter.shape[-1]
                parameter.normal_(std=(2.0 / fan_in) ** 0.5)
            elif name == "weight":
                parameter.normal_(1.0, 0.1)
            else:
                parameter.normal_(std=0.1)


@dataclass(frozen=True)
class Block:
    """The MoE block of a model.

    Attributes:
        module: called as `module(*inputs)`.
        inputs: hidden states of shape (2, tokens / 2, hidden), and what else the block asks for.
        path: where in the model it was found.
        experts: number of expert modules in it.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    path: str
    experts: int


def experts_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules of everything that holds the routed experts of one layer."""
    return [(path, module) for path, module in model.named_modules() if is_experts(module)]


def is_experts(module: nn.Module) -> bool:
    """Whether transformers runs the module through its experts interface, or an own-code architecture's like."""
    decorated = hasattr(module, "is_transposed") and hasattr(module, "has_gate")
    return decorated or type(module).__name__ in OWN_EXPERTS


class Recorded(nn.Module):
    """A module that is called with hidden states only; its other arguments are those of a recorded call."""

    def __init__(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.arguments, self.keywords = module, arguments, keywords

    def forward(self, hidden_states: Tensor) -> Any:
        return self.module(hidden_states, *self.arguments, **self.keywords)


def recorded(model: nn.Module, block: nn.Module, tokens: int, vocabulary: int) -> Recorded:
    """Runs the whole model to learn what else than hidden states it hands to `block`."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.randint(3, vocabulary, (2, tokens // 2)), use_cache=False)
    hook.remove()
    (arguments, keywords), *_ = calls
    keywords.pop("hidden_states", None)
    return Recorded(block, arguments[1:], keywords)


def build_block(
    name: str,
    dtype: torch.dtype = torch.float32,
    implementation: str = "grouped_mm",
    sizes: Sizes | None = None,
    tokens: int = 24,
    seed: int = 0,
    **overrides: Any,
) -> Block:
    """The first MoE block of `build_model`'s model and its inputs, `tokens` of them in two sequences."""
    sizes = sizes or Sizes()
    model = build_model(name, dtype, implementation, sizes, seed, **overrides)
    path, experts = experts_of(model)[0]
    if type(experts).__name__ not in OWN_BLOCKS:
        path = path.rpartition(".")[0]
    block = model.get_submodule(path)
    inside = len(experts_of(block))
    if hasattr(block, "self_attn"):
        block = recorded(model, block, tokens, sizes.vocabulary)
    torch.manual_seed(seed + 1)
    return Block(block, (torch.randn(2, tokens // 2, sizes.hidden).to(dtype),), path, inside)
