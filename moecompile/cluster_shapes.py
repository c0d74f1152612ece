"""Shapes of published mixture-of-experts models, as far as the time of their layers depends on them.

Sources: DeepSeek-V3, arXiv:2412.19437, section 4.2; for the others `config.json` of Qwen/Qwen3-235B-A22B,
Qwen/Qwen3-30B-A3B and mistralai/Mixtral-8x7B-v0.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    """Attention with grouped keys and values.

    Attributes:
        heads: of queries.
        key_heads: of keys and values.
        size: of a head.
    """

    heads: int
    key_heads: int
    size: int


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: queries, keys and values are made of short vectors.

    Attributes:
        heads: of queries, keys and values.
        query_rank: size of what queries are made of.
        key_rank: of what keys and values are made of.
        plain: of a head of queries and keys, the part without positions.
        rotary: the part with positions, of which keys have one for all heads.
        value: of a head of values.
    """

    heads: int
    query_rank: int
    key_rank: int
    plain: int
    rotary: int
    value: int


@dataclass(frozen=True)
class Model:
    """A model whose layers are alike.

    Attributes:
        name: of its row.
        layers: how many there are.
        hidden: size of a token.
        attention: of either kind.
        experts: of a layer.
        top: experts that a token goes to.
        inner: size of an expert within.
        shared: the same of what all tokens go to; 0 without.
        most_nodes: hosts that a token goes to, at most; None where routing knows of no hosts.
    """

    name: str
    layers: int
    hidden: int
    attention: Heads | Latent
    experts: int
    top: int
    inner: int
    shared: int = 0
    most_nodes: int | None = None


MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        Model("deepseek-v3", 61, 7168, Latent(128, 1536, 512, 128, 64, 128), 256, 8, 2048, shared=2048, most_nodes=4),
        Model("qwen3-235b-a22b", 94, 4096, Heads(64, 4, 128), 128, 8, 1536),
        Model("qwen3-30b-a3b", 48, 2048, Heads(32, 4, 128), 128, 8, 768),
        Model("mixtral-8x7b", 32, 4096, Heads(32, 8, 128), 8, 2, 14336),
    )
}
