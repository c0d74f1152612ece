"""Kernels that are linked with NVSHMEM: they compile for Hopper without a GPU; what is missing is said."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from packaging.version import Version

import sass
from moecompile import doctor
from moecompile.codegen import cubins, network, nvrtc
from moecompile.codegen.exchanges import NodeCombine, NodeDispatch, NodeHome, NodeReceive, reaches_network
from moecompile.codegen.instances import IDS, RESULTS, Instance, headers, source
from moecompile.runtime import network as runtime_network
from moecompile.runtime.topology import Topology

sass.require_compiler()

KERNELS: list[Instance] = [
    *(NodeDispatch(ids, far="network") for ids in IDS),
    *(NodeReceive(ids, "network") for ids in IDS),
    *(NodeCombine(rows, "float32", far="network") for rows in RESULTS),
    *(NodeHome(rows, "float32", "network") for rows in RESULTS),
]


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What is found of NVSHMEM is looked for anew, within the test and after it."""
    network.installed.cache_clear()
    yield
    network.installed.cache_clear()


@pytest.fixture
def nvshmem() -> network.Installed:
    try:
        return network.installed()
    except network.NetworkMissing as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_kernels_are_linked(kernel: Instance, nvshmem: network.Installed) -> None:
    made = network.compile_source(source(kernel), headers(), repr(kernel))
    assert b"nvshmemi_device_state_d" in made.cubin, "what the host sets up before a launch"
    assert b"moecompile_network_signal" in made.cubin and kernel.name.encode() in made.cubin
    assert len(made.cubin) > len(nvrtc.compile_source(source(kernel), headers(), "", ("-rdc=true",)).cubin)


def test_kernels_of_one_node_need_nothing() -> None:
    with mock.patch.object(network, "installed", side_effect=AssertionError("asked for")):
        assert not reaches_network(NodeDispatch("int64"))
        cubins.path(NodeDispatch("int64"))


def test_kernels_hold_for_one_version(nvshmem: network.Installed) -> None:
    kernel = NodeReceive("int64", "network")
    here = cubins.path(kernel)
    other = network.Installed(Version("99.1"), nvshmem.includes, nvshmem.library)
    with mock.patch.object(network, "installed", lambda: other):
        assert cubins.path(kernel) != here


def test_what_is_not_there_is_an_error(nvshmem: network.Installed) -> None:
    calls = 'extern "C" __device__ void nobody_has_this();\nextern "C" __global__ void k() { nobody_has_this(); }\n'
    with pytest.raises(nvrtc.CompileError, match=r"(?s)could not link my kernel.*nobody_has_this"):
        network.compile_source(calls, {}, "my kernel")


def test_the_library_is_of_the_version_of_the_headers(nvshmem: network.Installed) -> None:
    """The library itself is asked; it loads without a GPU."""
    pytest.importorskip("nvshmem.core")
    runtime_network.check_version()
    other = network.Installed(Version("3.99.1"), nvshmem.includes, nvshmem.library)
    with mock.patch.object(network, "installed", lambda: other):
        with pytest.raises(network.NetworkMissing, match=r"loads NVSHMEM [\d.]+, and its headers are of 3\.99\.1"):
            runtime_network.check_version()


def test_one_group_has_the_network() -> None:
    with mock.patch.object(runtime_network, "_joined", ["experts"]):
        runtime_network.join("experts")
        with pytest.raises(
            RuntimeError, match="ranks of group experts exchange tokens over a network, and those of group others"
        ):
            runtime_network.join("others")


def test_kernels_come_after_their_ranks() -> None:
    with pytest.raises(RuntimeError, match="loaded before its ranks have joined NVSHMEM"):
        runtime_network.prepare(0)


def test_addresses() -> None:
    """Of ranks of this node their memory; of others their numbers."""
    own, peers = torch.zeros(8), {4: torch.zeros(8), 5: torch.zeros(8)}
    torch_of_nvshmem = SimpleNamespace(get_peer_tensor=lambda _, rank: peers.get(rank))
    modules = {"nvshmem": mock.Mock(), "nvshmem.core": mock.Mock(), "nvshmem.core.interop": mock.Mock()}
    with mock.patch.dict(sys.modules, {**modules, "nvshmem.core.interop.torch": torch_of_nvshmem}):
        found = runtime_network.addresses(own, Topology(3, 3), 3)
        assert found == [0, 1, 2, own.data_ptr(), peers[4].data_ptr(), peers[5].data_ptr(), 6, 7, 8]
        with pytest.raises(RuntimeError, match="rank 1 cannot write into the memory of rank 0 of its node"):
            runtime_network.addresses(own, Topology(3, 3), 1)


def _laid_out(folder: Path, version: str, library: bool) -> str:
    """Headers of an NVSHMEM that says it is that."""
    numbers = dict(zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True))
    header = folder / "include" / "non_abi" / "nvshmem_version.h"
    header.parent.mkdir(parents=True)
    header.write_text("".join(f"#define NVSHMEM_VENDOR_{part}_VERSION {number}\n" for part, number in numbers.items()))
    if library:
        (folder / "lib").mkdir()
        (folder / "lib" / "libnvshmem_device.a").write_bytes(b"")
    return str(folder / "include")


@pytest.mark.parametrize(
    ("version", "library", "words"),
    [
        (None, True, "need the headers of nvshmem: pip install 'moecompile\\[nodes\\]'"),
        ("3.4.5", False, "libnvshmem_device.a is missing"),
        ("2.11.0", True, "expected NVSHMEM 3.4.5 or newer, got 2.11.0"),
    ],
)
def test_what_is_missing_is_said(
    version: str | None, library: bool, words: str, tmp_path: Path, forgetful: None
) -> None:
    found = None if version is None else _laid_out(tmp_path, version, library)
    with mock.patch("cuda.pathfinder.find_nvidia_header_directory", lambda _: found):
        with pytest.raises(network.NetworkMissing, match=words):
            network.installed()
        (row,) = [each for each in doctor.examine() if each.item == "NVSHMEM"]
    assert row.state == "note" and "one host does without" in row.found
