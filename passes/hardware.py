"""Devices that costs are reckoned for: the rows of hardware.toml, which says where its numbers are from."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

OTHER_FORMS = frozenset(("pcie", "nvl"))
"""Words in the names of GPUs with the rows' names and other rates."""
DEFAULT = "h200"
"""What is reckoned for where no GPU is known: of a CPU, say, on which graphs are made for one."""


@dataclass(frozen=True)
class Link:
    """What carries bytes between devices.

    Attributes:
        rate: bytes a second each way that are reached.
        latency: seconds until the first byte has arrived.
    """

    rate: float
    latency: float


@dataclass(frozen=True)
class Hardware:
    """A device, as fast as it is reached to be.

    Attributes:
        name: of its row.
        title: for people.
        multiprocessors: how many there are.
        flops: operations a second, by what is multiplied: bfloat16, float16, float8, float32.
        memory: bytes a second.
        links: by name: "nvlink" within a host, "network" between hosts.
        launch: seconds between one kernel and the next.
    """

    name: str
    title: str
    multiprocessors: int
    flops: Mapping[str, float]
    memory: float
    links: Mapping[str, Link]
    launch: float

    def seconds(self, operations: float, precision: str, moved: float) -> float:
        """Of a kernel: products or memory (bytes `moved`), whichever takes longer, and a launch."""
        return max(operations / self.flops[precision], moved / self.memory) + self.launch


@functools.cache
def known() -> Mapping[str, Hardware]:
    """All rows, by name."""
    text = (resources.files(__package__) / "hardware.toml").read_text(encoding="utf-8")
    return {name: _of(name, row) for name, row in tomllib.loads(text).items()}


def named(name: str) -> Hardware:
    """The row of that name.

    Raises:
        ValueError: there is none.
    """
    rows = known()
    if name not in rows:
        raise ValueError(f"moecompile: no hardware is called {name!r}; there are {', '.join(rows)}")
    return rows[name]


def like(device: str) -> Hardware | None:
    """The row of a GPU that calls itself so ("NVIDIA H100 80GB HBM3"); None if there is none, as of those for PCIe."""
    words = device.lower().split()
    if not OTHER_FORMS.isdisjoint(words):
        return None
    return next((row for name, row in known().items() if name in words), None)


def _of(name: str, row: Mapping[str, Any]) -> Hardware:
    reached = row["reached"]
    flops = {kind: peak * reached.get(kind, reached["flops"]) for kind, peak in row["flops"].items()}
    links = {kind: Link(link["rate"] * reached[kind], link["latency"]) for kind, link in row["links"].items()}
    memory = row["memory"] * reached["memory"]
    return Hardware(name, row["title"], row["multiprocessors"], flops, memory, links, row["launch"])
