"""Keeping Inductor's and AOTAutograd's caches right, and what we remember beside them.

Our rewriting happens in front of both caches, on every start. Two things are left to do:

1. *The salt.* A rewritten graph calls our operators, and neither cache looks into an operator: after an upgrade they
   would hand out code that was compiled around the old one. So a custom graph pass that does nothing rides along;
   its uuid, which both caches put into their keys, is a digest of this package's files, of the versions and of the
   options.
2. *The sidecar.* On a hit AOTAutograd is never run, so its forward and backward graphs, which the report shows, would
   be missing. They are stored as text under `MOECOMPILE_CACHE_DIR`, one small JSON file for each graph.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

import moecompile
from moecompile.options import Options, cache_directory

log = logging.getLogger(__name__)

# The hook the salt rides on. It is part of the keys of both caches, runs once for each pair of forward and backward
# graphs, and, unlike the post-grad hooks, hands no pass anything but the graph.
HOOK = "joint_custom_post_pass"


@functools.cache
def source_digest(root: str | None = None) -> str:
    """SHA-256 over the names and contents of all files of this package (its linked rooms too), caches left out."""
    top = Path(root or os.path.dirname(os.path.abspath(moecompile.__file__)))
    digest = hashlib.sha256()
    for folder, folders, files in os.walk(top, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            path = Path(folder, name)
            content = path.read_bytes()
            digest.update(f"{path.relative_to(top).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def salt(options: Options) -> str:
    """What the caches must tell apart beside the graph: our source, torch's and our version, and the options.

    Inductor's own options are left out; Inductor puts its whole config into its keys.
    """
    ours = {name: value for name, value in options.as_dict().items() if name != "inductor"}
    return _digest(source_digest(), moecompile.__version__, torch.__version__, repr(sorted(ours.items())))


def salted(patches: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Inductor config `patches` with the salt `text` added to the user's own passes on the same hook.

    The user's passes, from `patches` or from `torch._inductor.config`, still run, in their order.
    """
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Salt(CustomGraphPass):
        """The user's passes, and nothing of our own but a uuid."""

        def __call__(self, graph: fx.Graph) -> None:
            for custom_pass in user_passes:
                custom_pass(graph)

        def uuid(self) -> Any:
            """None, which means "do not cache" to Inductor, if one of the user's passes has none."""
            uuids = [custom_pass.uuid() if hasattr(custom_pass, "uuid") else None for custom_pass in user_passes]
            return None if None in uuids else ("moecompile", text, *uuids)

    theirs = patches.get(HOOK, getattr(config, HOOK))
    # a single pass until torch 2.12, one or several since
    user_passes: tuple[Callable[[fx.Graph], None], ...] = (
        () if theirs is None else tuple(theirs) if isinstance(theirs, (list, tuple)) else (theirs,)
    )
    return {**patches, HOOK: Salt()}


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
