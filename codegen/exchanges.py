"""The kernels that exchange tokens between ranks, of one node and of several.

Records, as in `moecompile.codegen.instances`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moecompile.codegen.activation import print_struct
from moecompile.codegen.instances import IDS, INPUTS, RESULTS, Instance, instantiation


@dataclass(frozen=True)
class ExchangePlan:
    """Where a rank's tokens go.

    Attributes:
        ids: dtype of the expert ids, one of IDS.
    """

    ids: str

    header: ClassVar[str] = "exchange_plan.cuh"
    name: ClassVar[str] = "moecompile_exchange_plan"
    definitions: ClassVar[str] = ""

    @property
    def template(self) -> str:
        """The C++ type."""
        return instantiation("ExchangePlan", IDS[self.ids])


@dataclass(frozen=True)
class ExchangeSend:
    """Rows into the memory of other ranks.

    Attributes:
        ids: dtype of the expert ids that travel with them, one of IDS.
    """

    ids: str

    header: ClassVar[str] = "exchange_send.cuh"
    name: ClassVar[str] = "moecompile_exchange_send"
    definitions: ClassVar[str] = ""

    @property
    def template(self) -> str:
        """The C++ type."""
        return instantiation("ExchangeSend", IDS[self.ids])


@dataclass(frozen=True)
class ExchangeReceive:
    """Rows that came from other ranks, and a rank's own.

    Attributes:
        ids: dtype of the expert ids of the latter, one of IDS.
        stay: whether rows stay where they came, and only what belongs to their experts is taken.
    """

    ids: str
    stay: bool = False

    header: ClassVar[str] = "exchange_receive.cuh"
    definitions: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """What profilers call it."""
        return f"moecompile_exchange_{'take' if self.stay else 'receive'}"

    @property
    def template(self) -> str:
        """The C++ type."""
        return instantiation("ExchangeReceive", IDS[self.ids], self.stay)


@dataclass(frozen=True)
class ExchangeGate:
    """Waits until all blocks of another kernel have begun."""

    header: ClassVar[str] = "exchange_gate.cuh"
    name: ClassVar[str] = "moecompile_exchange_gate"
    definitions: ClassVar[str] = ""
    template: ClassVar[str] = "ExchangeGate"


@dataclass(frozen=True)
class ExchangeHome:
    """Rows that came back from other ranks, summed into tokens.

    Attributes:
        rows: their dtype, one of RESULTS.
        weights: that of what travelled with them, one of RESULTS.
    """

    rows: str
    weights: str

    header: ClassVar[str] = "exchange_home.cuh"
    name: ClassVar[str] = "moecompile_exchange_home"
    definitions: ClassVar[str] = ""

    @property
    def template(self) -> str:
        """The C++ type."""
        return instantiation("ExchangeHome", RESULTS[self.rows], RESULTS[self.weights])


@dataclass(frozen=True)
class ExchangeHomeOfExperts:
    """The same, and this rank's own rows of experts, which are summed on the way.

    Attributes:
        input: dtype of these.
        rows: dtype of what came back and of the sums, one of RESULTS.
        output: what is summed, an expression of `out`, the row, and of `weight`.
        ids: dtype of the expert ids, one of IDS.
    """

    input: str
    rows: str
    output: str
    ids: str

    header: ClassVar[str] = "exchange_home.cuh"
    name: ClassVar[str] = "moecompile_exchange_home_of_experts"

    @property
    def definitions(self) -> str:
        """The output expression as C++."""
        return print_struct("Output", self.output, ("out", "weight"))

    @property
    def template(self) -> str:
        """The C++ type."""
        rows = RESULTS[self.rows]
        own = instantiation("OwnSums", INPUTS[self.input], rows, "Output", IDS[self.ids])
        return instantiation("ExchangeHome", rows, rows, own)


TRANSPORTS = {
    "peer": "nodes::PeerTransport",
    "faulty": "nodes::FaultyTransport",
    "metered": "nodes::MeteredTransport",
    "network": "nodes::NetworkTransport",
}
"""What ranks exchange through: memory that a device writes by itself; that, late and in any order that is allowed;
that, where it is measured what warps do; NVSHMEM (between nodes alone)."""


def _included(far: str) -> str:
    """What a kernel needs before it can be made of templates: NVSHMEM is not everywhere."""
    return '#include "network.cuh"\n' if far == "network" else ""


def reaches_network(instance: Instance) -> bool:
    """Whether a kernel is linked with NVSHMEM."""
    return getattr(instance, "far", "") == "network"


@dataclass(frozen=True)
class NodeDispatch:
    """Rows to ranks on several nodes.

    Attributes:
        ids: dtype of the expert ids that travel with them, one of IDS.
        near: how ranks of one node exchange, one of TRANSPORTS.
        far: how ranks of different nodes do.
    """

    ids: str
    near: str = "peer"
    far: str = "peer"

    header: ClassVar[str] = "node_dispatch.cuh"
    name: ClassVar[str] = "moecompile_node_dispatch"

    @property
    def definitions(self) -> str:
        """The transport, if it is not everywhere."""
        return _included(self.far)

    @property
    def template(self) -> str:
        """The C++ type."""
        return instantiation("nodes::Dispatch", IDS[self.ids], TRANSPORTS[self.near], TRANSPORTS[self.far])


@dataclass(frozen=True)
class NodeReceive:
    """Rows that came from ranks of all nodes, and a rank's own.

    Attributes:
        ids: dtype of the expert ids of the latter, one of IDS.
        far: how ranks of different nodes exchange, "peer" or "network".
    """

    ids: str
    far: str = "peer"

    header: ClassVar[str] = "node_receive.cuh"
    name: ClassVar[str] = "moecompile_node_receive"

    @property
    def definitions(self) -> str:
        """The transport, if it is not everywhere."""
        return _included(self.far)

    @property
    def template(self) -> str:
        """The C++ type."""
        return instantiation("ExchangeReceive", IDS[self.ids], False, f"nodes::Reading<{TRANSPORTS[self.far]}>")


@dataclass(frozen=True)
class NodeCombine:
    """Rows back to ranks on several nodes, summed on each of them.

    Attributes:
        rows: their dtype, one of RESULTS.
        weights: that of what travels with them, one of RESULTS.
        near: how ranks of one node exchange, one of TRANSPORTS.
        far: how ranks of different nodes do.
    """

    rows: str
    weights: str
    near: str = "peer"
    far: str = "peer"

    header: ClassVar[str] = "node_combine.cuh"
    name: ClassVar[str] = "moecompile_node_combine"

    @property
    def definitions(self) -> str:
        """The transport, if it is not everywhere."""
        return _included(self.far)

    @property
    def template(self) -> str:
        """The C++ type."""
        through = TRANSPORTS[self.near], TRANSPORTS[self.far]
        return instantiation("nodes::Combine", RESULTS[self.rows], RESULTS[self.weights], *through)


@dataclass(frozen=True)
class NodeHome:
    """Rows and sums that came back from all nodes, summed into tokens.

    Attributes:
        rows: their dtype, one of RESULTS.
        weights: that of what travelled with them, one of RESULTS.
        far: how ranks of different nodes exchange, "peer" or "network".
    """

    rows: str
    weights: str
    far: str = "peer"

    header: ClassVar[str] = "node_home.cuh"
    name: ClassVar[str] = "moecompile_node_home"

    @property
    def definitions(self) -> str:
        """The transport, if it is not everywhere."""
        return _included(self.far)

    @property
    def template(self) -> str:
        """The C++ type."""
        return instantiation("nodes::Home", RESULTS[self.rows], RESULTS[self.weights], TRANSPORTS[self.far])


@dataclass(frozen=True)
class Virtual:
    """A kernel of several ranks in one launch, on one device.

    Attributes:
        kernel: of each.
        ranks: how many.
    """

    kernel: Instance
    ranks: int

    @property
    def header(self) -> str:
        """That of the kernel."""
        return self.kernel.header

    @property
    def name(self) -> str:
        """What profilers call it."""
        return f"{self.kernel.name}_of_{self.ranks}"

    @property
    def definitions(self) -> str:
        """What the kernel needs, and several."""
        return f'{self.kernel.definitions}#include "virtual.cuh"\n'

    @property
    def template(self) -> str:
        """The C++ type."""
        return instantiation("Virtual", self.kernel.template, self.ranks)
