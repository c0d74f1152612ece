"""Blocks of transformers as a GPU gives them to the compiler, on a machine that has none.

Their code asks where tensors lie and what the GPU can do, and goes other ways than on the CPU. With tensors that lie
nowhere, and code that takes that for a Hopper GPU, it can be traced, though not computed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

pytest.importorskip("transformers")

from transformers.integrations import moe

from moecompile.passes.detect import detect
from moecompile.passes.fuse import fuse
from test_transformers import COLUMNS, QUICK, REFUSED, marked
from tiny_transformers import Block, Recorded, architectures, build_block


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo asks functions themselves, not their names: so they need other code."""
    monkeypatch.setattr(torch.cuda.get_device_capability, "__code__", (lambda device=None: (9, 0)).__code__)
    asking = []
    for function in vars(moe).values():
        code = getattr(function, "__code__", None)
        if code is not None and "cuda" in code.co_consts:
            there = tuple("meta" if constant == "cuda" else constant for constant in code.co_consts)
            monkeypatch.setattr(function, "__code__", code.replace(co_consts=there))
            asking.append(function)
    assert moe._can_use_grouped_mm in asking


def captured(block: Block) -> list[fx.GraphModule]:
    """The graphs of a call of the block on tensors that lie nowhere."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm

    block.module.to("meta")
    if isinstance(block.module, Recorded):
        block.module.arguments, block.module.keywords = nowhere((block.module.arguments, block.module.keywords))
        block.module.keywords |= {
            name: None for name in block.module.keywords if name.startswith("past_")
        }  # tensors, too
    block.module.compile(backend=backend, fullgraph=True)
    block.module(*nowhere(block.inputs))
    return graphs


def nowhere(value: Any) -> Any:
    """The value with its tensors on no device."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), value)


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: f"{column[0]}-{str(column[1])[6:]}")
@pytest.mark.parametrize("name", marked(architectures(), QUICK))
def test_block(name: str, column: tuple[str, torch.dtype]) -> None:
    implementation, dtype = column
    block = build_block(name, dtype, implementation)
    (gm,) = captured(block)
    found = detect(gm.graph)
    assert len(found.sites) == (0 if name in REFUSED else block.experts), found.near_misses
    fuse(gm.graph, found.sites, found.layout)
    gm.graph.lint()


def test_the_graph_is_a_gpus() -> None:
    """It holds the question for the GPU's capability, and counts integers where the CPU's counts floats."""
    (gm,) = captured(build_block("qwen3_moe", torch.bfloat16))
    names = [getattr(node.target, "__name__", str(node.target)) for node in gm.graph.nodes]
    assert {"get_device_capability", "int", "_grouped_mm"} <= {*names} and "float" not in names
