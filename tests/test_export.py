"""Ahead of time: the original model is exported as if moecompile were not there; AOTInductor's options are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from moecompile.backend import moecompile
from small_models import HIDDEN, block, compiled


@pytest.mark.parametrize("how", ["plain", "torch.compile", "model.compile"])
def test_export_sees_the_original_model(how: str):
    model, x = block(), torch.randn(12, HIDDEN)
    if how == "model.compile":
        model.compile(backend=moecompile, options={"lowering": "eager"})
    exported = torch.export.export(compiled(model) if how == "torch.compile" else model, (x,))
    assert "moecompile" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.slow
def test_aot_inductor_takes_the_original_model(tmp_path: Path):
    model, x = block(), torch.randn(12, HIDDEN)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (x,)), package_path=str(tmp_path / "model.pt2")
    )
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x), rtol=1e-4, atol=1e-4)


def test_options_of_aot_inductor_are_refused():
    with pytest.raises(BackendCompilerFailed, match="ahead-of-time compilation, which this backend does not do"):
        compiled(block(), lowering="inductor", inductor={"aot_inductor.package": True})(torch.randn(12, HIDDEN))
