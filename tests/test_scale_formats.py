"""The option `fp8_scale_format`: whole models, from the option to the kernels of the backward.

What a scale of that format is, tests/test_quantize.py says; what products make of it, the tests of the operators.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

import moecompile
from test_conversion import made
from test_precision import relative


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_whole_way(lowering: str) -> None:
    """All that is cast has them, and what the backward casts; kept copies and converted parameters compute the same."""
    model, ids = made(layers=2)
    options = {"precision": "fp8", "fp8_scale_format": "float32", "lowering": lowering}

    def compiled(module: Any, **more: Any) -> Any:
        torch._dynamo.reset()
        return torch.compile(module, backend="moecompile", options={**options, **more}, fullgraph=True)

    with torch.no_grad():
        usual = compiled(model, fp8_scale_format="power_of_two")(ids)
        expected = compiled(model)(ids)
        text = moecompile.last_report().graphs[-1].after
        assert text is not None
        casts = [
            line for line in text.splitlines() if re.search(r"= moecompile\.(quantize|linear_fp8|experts_fp8)", line)
        ]
        assert len(casts) > 10 and all('scale_format="float32"' in line for line in casts)
        assert not torch.equal(expected, usual) and relative(expected, usual) < 0.2
        assert torch.equal(compiled(model, fp8_cache_weights=True)(ids), expected)
        converted = copy.deepcopy(model)
        moecompile.convert_to_fp8(converted, ids, moecompile_options={"fp8_scale_format": "float32"})
        assert torch.equal(compiled(converted)(ids), expected)
    compiled(model)(ids).float().square().mean().backward()
    graph = moecompile.last_report().graphs[-1]
    assert graph.backward is not None
    for operator in ("quantize_gradient", "along_tokens", "experts_fp8_backward"):
        lines = [line for line in graph.backward.splitlines() if f"moecompile.{operator}(" in line]
        assert lines and all('scale_format="float32"' in line for line in lines), operator
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())
