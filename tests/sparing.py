"""What PyTorch's compiler and Python do beside their work, and tests do without: it takes a sixth of their time."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import torch


def spare() -> None:
    """In this process, and those that it starts, before it compiles anything.

    Compiling makes hundreds of thousands of objects, and Python looks through them again and again for what can be let
    go; Dynamo has it do so after each compilation, too. What needs it to be gone calls `gc.collect()`. And Dynamo
    measures how long guards take, for its logs, for which it first empties the processor's caches.
    """
    os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")
    if "torch._dynamo.config" in sys.modules:
        torch._dynamo.config.run_gc_after_compile = False
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    modules: list[Any] = [torch._C._dynamo.guards, sys.modules.get("torch._dynamo.guards")]
    for module in filter(None, modules):
        module.profile_guard_manager = lambda *_: 0.0
