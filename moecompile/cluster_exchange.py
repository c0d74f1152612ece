"""What tokens that travel to their experts and back take: bytes on each link, and seconds.

A token crosses the network once for each host that has an expert of it, to the GPU there with the sender's place within
its host, and goes on over NVLink, once to each GPU; on the way back a host's GPUs are summed before the network. So
DeepSeek-V3 does it (arXiv:2412.19437, section 3.2.2), and both links are in use at once: an exchange takes as long as
the slower of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moecompile.cluster_shapes import Model
from moecompile.passes.hardware import Hardware

ENOUGH = 20
"""Multiprocessors with which both links are full: 20, ten channels of two (DeepSeek-V3, section 3.2.2)."""


class ClusterError(ValueError):
    """A cluster, or a run on one, that cannot be."""


@dataclass(frozen=True)
class Cluster:
    """GPUs over which the experts of each layer are spread.

    Attributes:
        nodes: hosts.
        gpus: of each.
        hardware: the device, and its links.
        sms: multiprocessors that carry what travels, while something does.

    Raises:
        ClusterError: there is no GPU, or an exchange takes none or all of its multiprocessors.
    """

    nodes: int
    gpus: int
    hardware: Hardware
    sms: int = ENOUGH

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus < 1:
            raise ClusterError(f"expected at least one node with one GPU, got {self.nodes} nodes of {self.gpus}")
        most = self.hardware.multiprocessors - 1
        if not 1 <= self.sms <= most:
            raise ClusterError(
                f"expected 1 to {most} multiprocessors for communication, got {self.sms}: "
                f"a {self.hardware.title} has {most + 1}, and something has to compute"
            )

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus

    @property
    def share(self) -> float:
        """Of the multiprocessors, those that carry what travels."""
        return self.sms / self.hardware.multiprocessors


@dataclass(frozen=True)
class Reach:
    """How far tokens go if all experts are as likely: averages of one token.

    Attributes:
        ranks: that have an expert of it, its own included.
        network: times that it crosses the network.
        nvlink: times that it crosses NVLink.
    """

    ranks: float
    network: float
    nvlink: float


def reach(model: Model, cluster: Cluster) -> Reach:
    """How far the tokens of that model go.

    Raises:
        ClusterError: its experts cannot be spread evenly.
    """
    if model.experts % cluster.ranks:
        raise ClusterError(
            f"expected a number of GPUs that divides {model.experts}, the experts of {model.name}, "
            f"got {cluster.ranks}, {cluster.nodes} nodes of {cluster.gpus}; choose other numbers of nodes and GPUs"
        )
    nodes = min(model.most_nodes or cluster.nodes, cluster.nodes)
    experts = model.experts * nodes // cluster.nodes
    if experts < model.top:
        raise ClusterError(
            f"expected {model.top} experts or more on the {nodes} nodes that a token goes to at most, got {experts}; "
            "choose fewer nodes"
        )
    ranks = met(nodes * cluster.gpus, experts, model.top)
    network = met(nodes, experts, model.top) * (cluster.nodes - 1) / cluster.nodes
    return Reach(ranks, network, ranks * (cluster.gpus - 1) / cluster.gpus)


def met(groups: int, experts: int, top: int) -> float:
    """Groups, on average, that have one of `top` experts or more: drawn evenly of `experts`, in groups of one size."""
    others = experts - experts // groups
    return groups * (1 - math.comb(others, top) / math.comb(experts, top))


@dataclass(frozen=True)
class Exchange:
    """What a rank sends, and gets, when tokens go to their experts or come back.

    Attributes:
        network: bytes between hosts.
        nvlink: bytes within them.
        seconds: until all is there.
    """

    network: float
    nvlink: float
    seconds: float


def exchange(model: Model, cluster: Cluster, tokens: int, precision: str) -> Exchange:
    """Of so many tokens of a rank, in "bfloat16", or "float8" with a float32 scale for each 128 values.

    Links carry in proportion to the multiprocessors that feed them, until they are full at `ENOUGH`.
    """
    row = row_bytes(model.hidden, precision)
    far = reach(model, cluster)
    sent = {"network": tokens * far.network * row, "nvlink": tokens * far.nvlink * row}
    used = {name: size for name, size in sent.items() if size}
    if not used:
        return Exchange(0.0, 0.0, 0.0)
    links, fed = cluster.hardware.links, min(1.0, cluster.sms / ENOUGH)
    slower = max(size / (links[name].rate * fed) for name, size in used.items())
    return Exchange(sent["network"], sent["nvlink"], slower + sum(links[name].latency for name in used))


def row_bytes(hidden: int, precision: str) -> float:
    """Of a token that travels."""
    return hidden + 4 * hidden / 128 if precision == "float8" else 2 * hidden
