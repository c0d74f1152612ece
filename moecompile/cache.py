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
from moecompile.codegen.cubins import cache_directory
from moecompile.options import Options
from moecompile.passes.aliases import fake_of
from moecompile.runtime.hopper_exchange import serves
from moecompile.runtime.peer_memory import reaches_peers
from moecompile.runtime.topology import topology_of

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


def salt(options: Options, topologies: Sequence[str] = ()) -> str:
    """What the caches must tell apart beside the graph: our source, torch's and our version, and the options.

    Inductor's own options are left out; Inductor puts its whole config into its keys.

    Args:
        options: that the graph is compiled with.
        topologies: `topologies_of` it.
    """
    ours = {name: value for name, value in options.as_dict().items() if name != "inductor"}
    return _digest(source_digest(), moecompile.__version__, torch.__version__, repr(sorted(ours.items())), *topologies)


def topologies_of(gm: fx.GraphModule) -> list[str]:
    """Where the ranks of each group are that a graph exchanges tokens among, and who carries these.

    The sizes of what they tell each other follow from that, and are nowhere in the graph.
    """
    found = set[str]()
    for body in (each for each in gm.modules() if isinstance(each, fx.GraphModule)):
        for node in body.graph.nodes:
            if {"group", "ranks"} <= node.kwargs.keys():
                found.add(f"{node.kwargs['group']} {topology_of(node.kwargs['group'], node.kwargs['ranks'])}")
            if {"group", "ranks", "capacity"} <= node.kwargs.keys() and _is_by_kernels(node):
                found.add(f"{node.kwargs['group']} by kernels")
    return sorted(found)


def _is_by_kernels(node: fx.Node) -> bool:
    """Whether moecompile's kernels carry tokens, where they take them: as example values of the operator ask, too."""
    fakes = (fake_of(each) for each in node.all_input_nodes)
    device = next((fake.device for fake in fakes if isinstance(fake, torch.Tensor)), torch.device("cpu"))
    return serves(device) and reaches_peers(str(node.kwargs["group"]), device)


def salted(patches: Mapping[str, Any], text: str, own: Callable[[fx.Graph], object] | None = None) -> dict[str, Any]:
    """Inductor config `patches` with the salt `text` and a pass of our `own` added to the user's passes on the hook.

    The user's passes, from `patches` or from `torch._inductor.config`, still run, in their order, and before ours.
    """
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Salt(CustomGraphPass):
        """The user's passes, ours, and a uuid."""

        def __call__(self, graph: fx.Graph) -> None:
            for custom_pass in user_passes:
                custom_pass(graph)
            if own is not None:
                own(graph)

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


def graph_key(salt: str, graph: str, example_inputs: Sequence[Any], patches: Mapping[str, Any]) -> str:
    """What decides how AOTAutograd's graphs of a rewritten Dynamo graph look.

    Args:
        salt: see `salt`.
        graph: the rewritten graph as text, shapes, dtypes and bodies included.
        example_inputs: its inputs; which of them require a gradient decides what goes into the backward graph.
        patches: the changes to Inductor's config.
    """
    from torch._functorch import config as autograd_config
    from torch._inductor import config as inductor_config

    autocast = {
        device: str(torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    }
    return _digest(
        salt,
        graph,
        repr([_input_facts(value) for value in example_inputs]),
        repr((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)),
        _config_facts(patches),
        repr(autograd_config.get_hash()),
        _config_facts(inductor_config.save_config_portable(ignore_private_configs=False)),  # as torch's own caches do
    )


def measured_key(salt: str, kind: str, graph: str, device: str) -> str:
    """What decides how long a graph's nodes take.

    Args:
        salt: see `salt`.
        kind: "forward" or "backward".
        graph: AOTAutograd's, as text, shapes and dtypes included.
        device: its name.
    """
    return _digest(salt, kind, graph, device)


def _config_facts(config: Mapping[str, Any]) -> str:
    return repr(sorted((name, _config_fact(value)) for name, value in config.items()))


def _input_facts(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), str(value.device), value.requires_grad
    return type(value).__name__


def _config_fact(value: Any) -> str:
    # a pass of the user's is an object whose repr is its address
    return repr(value) if isinstance(value, (bool, int, float, str, list, tuple, type(None))) else type(value).__name__


class Sidecar:
    """The forward and backward graph of one compiled graph as text, kept on disk under its key.

    Writing is atomic and adds to what is there; several processes may share the directory. A directory that cannot
    be used costs the texts in a later process's report, nothing else: one warning says so.
    """

    def __init__(self, key: str) -> None:
        self.path = cache_directory() / "graphs" / key[:2] / f"{key}.json"

    def read(self) -> dict[str, str]:
        """Kind ("forward", "backward", "kept" for a note, "seconds" of nodes) to text; empty if none is usable."""
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("moecompile cannot read %s (%s); the report will lack this graph's text", self.path, error)
            return {}
        texts = isinstance(stored, dict) and all(isinstance(text, str) for text in stored.values())
        return stored if texts else {}

    def write(self, kind: str, text: str) -> None:
        """Adds one text."""
        content = json.dumps({**self.read(), kind: text})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=self.path.parent, suffix=".tmp", delete=False
            ) as file:
                file.write(content)
            os.replace(file.name, self.path)
        except OSError as error:
            log.warning(
                "moecompile cannot write %s (%s); set MOECOMPILE_CACHE_DIR to a usable directory", self.path, error
            )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
