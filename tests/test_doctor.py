"""The doctor: a defect of the machine is a line that says what to do, and the exit status says whether it matters."""

from __future__ import annotations

import importlib
import json
import os
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from moecompile import doctor
from moecompile.commands import main
from moecompile.options import ENVIRONMENT


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in (*ENVIRONMENT, *doctor.FOREIGN_SWITCHES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path / "cache"))


def finding(item: str) -> doctor.Finding:
    return {finding.item: finding for finding in doctor.examine()}[item]


def test_this_machine_runs_the_cpu_path(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[: len(item)] for line, item in zip(lines, doctor.CHECKS, strict=False)] == list(doctor.CHECKS)
    assert lines[-1] == "models can be compiled and run on this machine's CPU: yes"


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["works_on_cpu"] is True
    rows = {row["item"]: row for row in printed["findings"]}
    assert rows["torch"] == {"item": "torch", "state": "ok", "found": torch.__version__, "cure": ""}
    assert set(doctor.CHECKS) <= set(rows)


def test_an_error_fails_the_command_and_is_counted(monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "error    2.10.1+cpu; cure: pip install 'torch>=2.11'" in printed
    assert printed.endswith("CPU: no, 1 error above\n")


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.0.dev20261120"])
def test_torch_versions_that_do(monkeypatch, version: str):
    monkeypatch.setattr(torch, "__version__", version)
    assert finding("torch").state == "ok"


def test_python_too_old(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 9))
    assert doctor._python("python").cure == "use Python 3.11 or newer"


def test_backend_not_installed(monkeypatch):
    monkeypatch.setattr(torch._dynamo, "list_backends", lambda: ["inductor"])
    found = finding("backend")
    assert found.state == "error" and found.cure.startswith("pip install")


def test_no_compiler(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none_found():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    assert finding("C++ compiler").state == "error"
    assert "g++" in finding("C++ compiler").cure


def test_no_python_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert finding("Python headers").state == "error"
    assert "python3-dev" in finding("Python headers").cure


def test_a_grouped_gemm_that_is_wrong(monkeypatch):
    monkeypatch.setattr(torch, "_grouped_mm", lambda rows, weight, offs: torch.zeros(16, 16))
    assert finding("grouped GEMM").state == "error"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_cache_directory_that_cannot_be_written(monkeypatch, tmp_path, place: str):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path / place))
    found = finding("cache directory")
    assert found.state == "missing" and "MOECOMPILE_CACHE_DIR" in found.cure


def test_cache_directory_is_left_empty(tmp_path):
    assert finding("cache directory").found == str(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def without(monkeypatch, *names: str) -> None:
    real = importlib.import_module

    def import_module(name: str, package: str | None = None):
        if name in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_cuda_python_is_not_needed_and_nobody_is_told_to_install_it(monkeypatch):
    without(monkeypatch, "cuda.bindings", "cuda.bindings.nvrtc")
    findings = doctor.examine()
    found = {finding.item: finding for finding in findings}
    for item in ("cuda-python", "NVRTC"):
        assert found[item].state == "note" and found[item].cure == "" and doctor.NOT_NEEDED in found[item].found
    assert doctor.works_on_cpu(findings)


def test_on_a_hopper_gpu_somebody_is_told_to_install_it(monkeypatch):
    without(monkeypatch, "cuda.bindings", "cuda.bindings.nvrtc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    for check in (doctor._cuda_python, doctor._nvrtc):
        found = check("it")
        assert found.state == "missing" and "'cuda-python>=13.0.3,<14'" in found.cure
        assert doctor.works_on_cpu([found])


def test_nvrtc_library_missing(monkeypatch):
    def version():
        raise RuntimeError("Failure finding libnvrtc.so")

    module = SimpleNamespace(nvrtcVersion=version)
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    assert doctor._nvrtc("NVRTC") == doctor.Finding(
        "NVRTC",
        "note",
        f"libnvrtc does not load (RuntimeError); {doctor.NOT_NEEDED}",
    )
    module.nvrtcVersion = lambda: (0, 13, 0)
    assert doctor._nvrtc("NVRTC") == doctor.Finding("NVRTC", "ok", "13.0")


@pytest.mark.parametrize(
    ("capabilities", "state", "found"),
    [
        (
            [(9, 0), (8, 0)],
            "ok",
            "GPU0 (sm_90), GPU1 (sm_80); sm_90 runs moecompile's own kernels, as far as they take what is computed; "
            "others PyTorch's grouped GEMM",
        ),
        (
            [(9, 0)],
            "ok",
            "GPU0 (sm_90); the operators run moecompile's own kernels, as far as they take what is computed",
        ),
        ([(8, 0)], "ok", "GPU0 (sm_80); the operators run PyTorch's grouped GEMM"),
        ([], "missing", "the CPU is used"),
    ],
)
def test_gpus(monkeypatch, capabilities: list[tuple[int, int]], state: str, found: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU{index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    gpus = doctor._gpu("GPU")
    assert (gpus.state, gpus.found[-len(found) :]) == (state, found)


def test_switches_are_listed(monkeypatch):
    monkeypatch.setenv("MOECOMPILE_DISABLE", "1")
    monkeypatch.setenv("MOECOMPILE_DISABLE_PASSES", "fus")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    found = {finding.item: finding for finding in doctor._switches()}
    assert [finding.state for finding in found.values()] == ["note", "error", "note", "note"]
    assert "untouched" in found["MOECOMPILE_DISABLE"].found
    assert "Did you mean 'fuse'?" in found["MOECOMPILE_DISABLE_PASSES"].found
    assert found["TORCH_COMPILE_DISABLE"].cure == "unset TORCH_COMPILE_DISABLE for the default"


def test_a_check_that_breaks_is_a_line_too(monkeypatch):
    def broken(item: str) -> doctor.Finding:
        raise AttributeError("no such thing\n  at all\n")

    monkeypatch.setitem(doctor.CHECKS, "GPU", broken)
    assert finding("GPU").state == "error"
    lines = [line.split() for line in doctor.table(doctor.examine()).splitlines()]
    assert ["GPU", "error", "AttributeError:", "no", "such", "thing", "at", "all;", "cure:"] in [
        line[:9] for line in lines
    ]
