"""Kernels of changed sources, for what shows what a line of them is for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from moecompile.codegen import cubins, instances, nvrtc
from moecompile.codegen.instances import Instance, source
from moecompile.runtime import virtual_nodes
from moecompile.runtime.launch import load


@contextmanager
def changed(*changes: tuple[str, str, str]) -> Iterator[None]:
    """Within, virtual nodes run changed kernels: of each change the header, what is there once, and what is instead."""
    headers = dict(instances.headers())
    for file, before, after in changes:
        if headers[file].count(before) != 1:
            raise ValueError(f"{file} has {headers[file].count(before)} times, not once: {before}")
        headers[file] = headers[file].replace(before, after)

    def compiled(instance: Instance) -> bytes:
        return nvrtc.compile_source(source(instance), headers, repr(instance)).cubin

    fresh = functools.cache(load.__wrapped__)  # of no cache
    with mock.patch.object(cubins, "cubin", compiled), mock.patch.object(virtual_nodes, "load", fresh):
        yield
