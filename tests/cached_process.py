"""A process of its own that compiles a small model with Inductor, for tests/test_cache.py.

Arguments: a file to write JSON to; options of moecompile as JSON; "save", "load" or "" and a file, for
torch.compiler.save_cache_artifacts and load_cache_artifacts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def main(result: str, options: str, artifacts: str, file: str) -> None:
    """Compiles and runs forward and backward once, and writes down what the caches and the report say."""
    torch.set_num_threads(1)
    if artifacts == "load":
        assert torch.compiler.load_cache_artifacts(Path(file).read_bytes()) is not None
    import moecompile
    from small_models import HIDDEN, assert_same, block, compiled

    model = block()
    fast = compiled(model, **({"lowering": "inductor"} | json.loads(options)))
    x = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(1))
    assert_same(model, fast, x)
    if artifacts == "save":
        saved = torch.compiler.save_cache_artifacts()
        assert saved is not None
        Path(file).write_bytes(saved[0])
    counters = torch._dynamo.utils.counters
    (graph,) = moecompile.last_report().graphs
    facts: dict[str, Any] = {
        "autograd": {key: value for key, value in counters["aot_autograd"].items() if "cache" in key},
        "inductor": {key: value for key, value in counters["inductor"].items() if "fxgraph_cache" in key},
        "sites": len(graph.sites),
        "cached": graph.cached,
        "forward": graph.forward,
        "backward": graph.backward,
        "notes": graph.notes,
    }
    Path(result).write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
