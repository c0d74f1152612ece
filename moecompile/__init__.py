"""A torch.compile backend for mixture-of-experts models: `torch.compile(model, backend="moecompile")`.

Importing the package registers the operators `torch.ops.moecompile.*` and does nothing else; the names below load their
module when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from moecompile.runtime import operators as _operators  # noqa: F401 - the import registers

if TYPE_CHECKING:
    from moecompile import pipelining
    from moecompile.cached import invalidate
    from moecompile.checkpoints import fp8_state_dict, load_fp8
    from moecompile.conversion import convert_to_fp8
    from moecompile.explanation import explain
    from moecompile.loads import expert_load
    from moecompile.options import Options
    from moecompile.report import last_report, reset
    from moecompile.sharding import shard_experts
    from moecompile.splitting import mark_batch
    from moecompile.transformers_experts import register_transformers

__version__ = "0.1.0"
__all__ = [
    "Options",
    "__version__",
    "convert_to_fp8",
    "expert_load",
    "explain",
    "fp8_state_dict",
    "invalidate",
    "last_report",
    "load_fp8",
    "mark_batch",
    "pipelining",
    "register_transformers",
    "reset",
    "shard_experts",
]

# Where each name lives, but `pipelining`, which is a module. No other module may bear one of these names: importing it
# would put the module in the name's place.
_HOME = {
    "Options": "moecompile.options",
    "convert_to_fp8": "moecompile.conversion",
    "expert_load": "moecompile.loads",
    "explain": "moecompile.explanation",
    "fp8_state_dict": "moecompile.checkpoints",
    "invalidate": "moecompile.cached",
    "last_report": "moecompile.report",
    "load_fp8": "moecompile.checkpoints",
    "mark_batch": "moecompile.splitting",
    "register_transformers": "moecompile.transformers_experts",
    "reset": "moecompile.report",
    "shard_experts": "moecompile.sharding",
}


def __getattr__(name: str) -> object:
    if name == "pipelining":
        return importlib.import_module("moecompile.pipelining")
    if name not in _HOME:
        raise AttributeError(f"module 'moecompile' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, and what every module has; not what this file imports for its own use."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
