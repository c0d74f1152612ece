"""What this machine can run, what is missing, and the cure: `python -m moecompile doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from packaging.version import Version

from moecompile import doctor_gpus
from moecompile.codegen import network
from moecompile.codegen.cubins import cache_directory
from moecompile.finding import Finding
from moecompile.options import (
    ENVIRONMENT,
    environment_disabled_passes,
    environment_disables_backend,
    unknown_variables,
)

PYTHON_NEEDED = (3, 11)
TORCH_NEEDED = Version("2.11")
HOPPER = (9, 0)
NOT_NEEDED = "needed on Hopper GPUs alone, whose experts run PyTorch's grouped GEMM without it"
"""What compiles and launches moecompile's own kernels: asked for where there is such a GPU, and told elsewhere."""
# Switches of PyTorch's own that keep graphs from any backend, or Inductor from compiling them.
FOREIGN_SWITCHES = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE", "TORCHINDUCTOR_FORCE_DISABLE_CACHES")


def examine() -> tuple[Finding, ...]:
    """Looks at everything once. A check that fails in a way it did not foresee is a finding too, of state "error"."""
    findings: list[Finding] = []
    for item, check in CHECKS.items():
        try:
            findings.append(check(item))
        except Exception as error:  # the table must come out whatever is broken, and show it
            findings.append(
                Finding(item, "error", f"{type(error).__name__}: {error}", "report this with the whole table")
            )
    return (*findings, *doctor_gpus.between_gpus(), *_switches())


def works_on_cpu(findings: Sequence[Finding]) -> bool:
    """Whether models can be compiled and run on this machine's CPU."""
    return all(finding.state != "error" for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """The findings as text: one line each with item, state, what was found and the cure, then one line of summary."""
    width = max(len(finding.item) for finding in findings)
    lines = []
    for finding in findings:
        cure = f"; cure: {finding.cure}" if finding.cure else ""
        # What an exception says may run over several lines.
        found = " ".join(finding.found.split())
        lines.append(f"{finding.item:<{width}}  {finding.state:<7}  {found}{cure}")
    errors = sum(finding.state == "error" for finding in findings)
    verdict = f"no, {errors} error{'s' if errors != 1 else ''} above" if errors else "yes"
    return "\n".join([*lines, "", f"models can be compiled and run on this machine's CPU: {verdict}"])


def _python(item: str) -> Finding:
    if sys.version_info < PYTHON_NEEDED:
        return Finding(item, "error", platform.python_version(), "use Python 3.11 or newer")
    return Finding(item, "ok", platform.python_version())


def _torch(item: str) -> Finding:
    if Version(torch.__version__) < TORCH_NEEDED:
        return Finding(item, "error", torch.__version__, f"pip install 'torch>={TORCH_NEEDED}'")
    return Finding(item, "ok", torch.__version__)


def _backend(item: str) -> Finding:
    if "moecompile" in torch._dynamo.list_backends():
        return Finding(item, "ok", "torch.compile knows the name 'moecompile'")
    return Finding(
        item,
        "error",
        "torch.compile does not know the name 'moecompile'",
        "pip install -e . in the checkout of moecompile",
    )


def _operators(item: str) -> Finding:
    missing = [name for name in ("plan", "experts") if not hasattr(torch.ops.moecompile, name)]
    if missing:
        return Finding(item, "error", f"not registered: {', '.join(missing)}", "reinstall moecompile")
    return Finding(item, "ok", "torch.ops.moecompile.plan and .experts are registered")


def _cpp_compiler(item: str) -> Finding:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    cure = "install g++ (Debian, Ubuntu: apt install g++), or set CXX to another C++ compiler"
    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler:
        return Finding(item, "error", "Inductor finds none", cure)
    return Finding(item, "ok", shutil.which(compiler) or compiler)


def _python_headers(item: str) -> Finding:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return Finding(
            item, "error", f"no {header}", "install Python's headers (Debian, Ubuntu: apt install python3-dev)"
        )
    return Finding(item, "ok", str(header))


def _grouped_gemm(item: str) -> Finding:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    weight = torch.ones(2, 16, 16, dtype=torch.bfloat16, device=device)
    offsets = torch.tensor([8, 16], dtype=torch.int32, device=device)
    product = torch._grouped_mm(rows, weight, offs=offsets)
    if not bool((product == 16).all()):
        return Finding(item, "error", f"torch._grouped_mm is wrong on {device}", "try another version of torch")
    return Finding(item, "ok", f"torch._grouped_mm runs on {device}")


def _transformers(item: str) -> Finding:
    try:
        return Finding(item, "ok", importlib.metadata.version("transformers"))
    except importlib.metadata.PackageNotFoundError:
        return Finding(item, "missing", "not installed; the demo needs it", "pip install transformers")


def _cuda_python(item: str) -> Finding:
    try:
        importlib.import_module("cuda.bindings")
        return Finding(item, "ok", f"cuda.bindings {importlib.metadata.version('cuda-bindings')}")
    except ImportError as error:
        return _for_kernels(item, str(error), "pip install 'cuda-python>=13.0.3,<14'")


def _nvrtc(item: str) -> Finding:
    cure = "pip install 'cuda-python>=13.0.3,<14' 'nvidia-cuda-nvrtc>=13,<14', or a torch built for CUDA 13"
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        return _for_kernels(item, str(error), cure)
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        return _for_kernels(item, f"libnvrtc does not load ({type(error).__name__})", cure)
    return Finding(item, "ok", f"{major}.{minor}")


def _nvshmem(item: str) -> Finding:
    try:
        version = network.installed().version
    except (ImportError, network.NetworkMissing):
        return Finding(item, "note", "not found; one host does without", network.CURE)
    return Finding(item, "ok", f"{version}; kernels between nodes can be compiled, but no operator calls them yet")


def _for_kernels(item: str, found: str, cure: str) -> Finding:
    """What moecompile's own kernels lack: nothing to be done where no GPU would run them."""
    wanted = HOPPER in _capabilities()
    return Finding(item, "missing" if wanted else "note", f"{found}; {NOT_NEEDED}", cure if wanted else "")


def _capabilities() -> list[tuple[int, int]]:
    """Of the GPUs that torch sees."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def _gpu(item: str) -> Finding:
    capabilities = _capabilities()
    if not capabilities:
        reason = "torch is built without CUDA" if torch.version.cuda is None else "torch sees none"
        return Finding(item, "missing", f"{reason}; the CPU is used")
    names = ", ".join(
        f"{torch.cuda.get_device_name(index)} (sm_{''.join(map(str, capability))})"
        for index, capability in enumerate(capabilities)
    )
    hopper = capabilities.count(HOPPER)
    runs = "moecompile's own kernels, as far as they take what is computed" if hopper else "PyTorch's grouped GEMM"
    others = "; others PyTorch's grouped GEMM" if 0 < hopper < len(capabilities) else ""
    where = "sm_90 runs" if others else "the operators run"
    return Finding(item, "ok", f"{names}; {where} {runs}{others}")


def _cache(item: str) -> Finding:
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return Finding(item, "ok", str(directory))
    except OSError as error:
        cure = "set MOECOMPILE_CACHE_DIR to a directory that can be written"
        return Finding(item, "missing", f"{directory} cannot be written: {error.strerror}; nothing is kept", cure)


def _switches() -> list[Finding]:
    """One finding for every environment variable of ours that is set, and for PyTorch's that overrule us."""
    findings = []
    for name in (*ENVIRONMENT, *FOREIGN_SWITCHES):
        value = os.environ.get(name)
        if not value:
            continue
        meaning = ENVIRONMENT[name].meaning if name in ENVIRONMENT else "a switch of PyTorch's own"
        try:
            READERS.get(name, str)()
            findings.append(Finding(name, "note", f"set to {value!r}: {meaning}", f"unset {name} for the default"))
        except ValueError as error:
            findings.append(Finding(name, "error", str(error), f"unset {name}"))
    return [*findings, *(Finding(name, "note", words) for name, words in unknown_variables().items())]


# What reads, and by reading checks, the variables that do not take any value.
READERS: dict[str, Callable[[], object]] = {
    "MOECOMPILE_DISABLE": environment_disables_backend,
    "MOECOMPILE_DISABLE_PASSES": environment_disabled_passes,
}
CHECKS: dict[str, Callable[[str], Finding]] = {
    "python": _python,
    "torch": _torch,
    "backend": _backend,
    "operators": _operators,
    "C++ compiler": _cpp_compiler,
    "Python headers": _python_headers,
    "grouped GEMM": _grouped_gemm,
    "cache directory": _cache,
    "transformers": _transformers,
    "cuda-python": _cuda_python,
    "NVRTC": _nvrtc,
    "NVSHMEM": _nvshmem,
    "GPU": _gpu,
    doctor_gpus.ITEM: doctor_gpus.expert_parallelism,
}
