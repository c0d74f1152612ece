"""Every kernel of a GEMM with an activation: tiles, activations of real models, precisions, directions.

All of them are compiled by `pytest -m slow tests/test_kernel_sweep.py`, in some minutes unless an earlier run has left
their machine code in moecompile's cache; a tenth of them always, chosen so that everything occurs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch

import sass
from moecompile.codegen import cubins
from moecompile.codegen.gemms import Activated, ActivationBackward, GroupedGemm
from moecompile.codegen.instances import PadOffsets
from moecompile.runtime import hopper_tiles
from moecompile.runtime.hopper_tiles import Projection
from surveyed_activations import SURVEY, Surveyed, collected

sass.require_compiler()

SIXTEEN_BITS = ("bfloat16", "float16")
FP8 = "float8_e4m3fn"
DIRECTIONS = ("forward", "saved", "backward")
# (columns, stages, cluster, overhang) that `moecompile.runtime.hopper` and `hopper_fp8_gemm` choose from
TILES = {
    "forward": (
        (256, 4, 1, 0),
        (256, 3, 1, 0),
        (256, 4, 2, 0),
        (256, 4, 2, 32),
        (256, 3, 2, 0),
        (256, 3, 2, 64),
        (128, 5, 1, 0),
    ),
    # a deeper ring leaves no room for the boxes of what is saved
    "saved": ((256, 3, 1, 0), (256, 3, 2, 0), (256, 3, 2, 64)),
    "backward": ((256, 3, 1, 0), (256, 3, 2, 0)),
}
FP8_TILES = {"forward": ((256, 4, 2, 0),), "saved": ((256, 4, 2, 0),), "backward": ((256, 3, 2, 0),)}


@dataclass(frozen=True)
class Swept:
    """One kernel of the sweep."""

    architecture: str
    precision: str
    direction: str
    tile: tuple[int, int, int, int]
    transposed: bool

    @property
    def name(self) -> str:
        tile, layout = "x".join(map(str, self.tile)), "k_n" if self.transposed else "n_k"
        return f"{self.architecture}-{self.precision}-{self.direction}-{tile}-{layout}"

    @property
    def instance(self) -> GroupedGemm:
        surveyed = SURVEY[self.architecture]
        activation, gate_up = surveyed.activation, surveyed.gate_up
        if self.precision == "float16":
            activation = activation.replace("bfloat16", "float16")
        if self.precision == FP8 and gate_up != "single":
            gate_up = "halves"  # as quantised matrices lie
        columns, stages, cluster, overhang = self.tile
        if self.transposed and gate_up in ("halves", "separate"):
            overhang = 0
        gemm = GroupedGemm(self.precision, columns, stages, cluster, self.transposed, overhang=overhang)
        if self.direction == "backward":
            return replace(gemm, epilogue=ActivationBackward(activation, gate_up, surveyed.scaled))
        return replace(gemm, epilogue=Activated(activation, gate_up, self.direction == "saved", surveyed.bias))


def every() -> Iterator[Swept]:
    for architecture, direction in product(SURVEY, DIRECTIONS):
        for precision, tile, transposed in product(SIXTEEN_BITS, TILES[direction], (False, True)):
            yield Swept(architecture, precision, direction, tile, transposed)
        for tile in FP8_TILES[direction]:
            yield Swept(architecture, FP8, direction, tile, False)


EVERY = tuple(every())
TENTH = EVERY[::11]  # 11 has no factor in common with the 51 of an architecture


@pytest.mark.parametrize(
    "swept",
    [pytest.param(each, id=each.name, marks=() if each in TENTH else pytest.mark.slow) for each in EVERY],
)
def test_machine_code(swept: Swept) -> None:
    """Nothing between two products waits or goes through local memory; epilogues may spill what they cannot hold."""
    made = sass.machine(swept.instance)
    wanted, other = ("QGMMA", "HGMMA") if swept.precision == FP8 else ("HGMMA", "QGMMA")
    assert made.counts.get(wanted) and not made.counts.get(other)
    assert made.counts.get("UTMALDG") and made.counts.get("UTMASTG"), "tiles do not travel by bulk copies"
    assert made.counts.get("USETMAXREG") == 2, "registers do not move from the producer to the consumers"
    between = made.between_products()
    assert between.get(wanted), "no loop of products was found"
    spilled = {name: between[name] for name in ("LDL", "STL") if name in between}
    assert not spilled, f"values go through local memory between products: {spilled}"
    assert made.registers <= 65536 // 384, "a block of 384 threads does not fit"
    assert not made.serialised
    if swept.direction == "forward":
        assert made.spilled == 0, "values live in local memory"


def test_the_tenth_has_everything() -> None:
    for attribute in ("architecture", "precision", "direction", "tile", "transposed"):
        assert {getattr(each, attribute) for each in TENTH} == {getattr(each, attribute) for each in EVERY}, attribute
    assert len({replace(each, architecture="") for each in TENTH}) == len(
        {replace(each, architecture="") for each in EVERY}
    )


def test_machine_code_is_kept_until_its_kernel_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMPILE_CACHE_DIR", str(tmp_path))
    first = sass.machine(PadOffsets())
    monkeypatch.setattr(sass, "_taken_apart", None)
    assert sass.machine(PadOffsets()) == first and first.registers > 0 and "STG" in first.counts
    monkeypatch.setattr(cubins, "_sources_digest", lambda: "other")
    with pytest.raises(TypeError, match="not callable"):
        sass.machine(PadOffsets())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_tiles_are_those_that_are_chosen(dtype: torch.dtype) -> None:
    """By `activated_instance`, for any sizes."""
    chosen: dict[bool, set[tuple[int, int, int, int]]] = {False: set(), True: set()}
    sizes = product((1, 100, 1000, 4000, 100_000), (1, 8, 128), (0, 128, 4095, 4096))
    for (rows, experts, k), transposed, save in product(sizes, (False, True), (False, True)):
        matrices = torch.empty((experts, k, 256) if transposed else (experts, 256, k), dtype=dtype, device="meta")
        matrices = matrices if transposed else matrices.mT
        for projection in (
            Projection((matrices, matrices), None, "halves"),
            Projection((matrices,), None, "interleaved"),
        ):
            gemm = hopper_tiles.activated_instance(dtype, rows, projection, "silu(x)", save)
            chosen[save].add((gemm.columns, gemm.stages, gemm.cluster, gemm.overhang))
    assert chosen == {False: set(TILES["forward"]), True: set(TILES["saved"])}


@pytest.mark.slow
def test_the_survey_is_complete() -> None:
    pytest.importorskip("transformers")
    import transformers
    from packaging.version import Version

    from tiny_transformers import OWN_CODE, WRITTEN_WITH, architectures

    found: set[Surveyed] = set()
    for name, dtype in product((*architectures(), *OWN_CODE), (torch.bfloat16, torch.float32)):
        found |= collected(name, dtype)
    assert found <= set(SURVEY.values()), f"not swept: {found - set(SURVEY.values())}"
    if Version(transformers.__version__) >= WRITTEN_WITH:
        assert found == set(SURVEY.values()), f"nobody has: {set(SURVEY.values()) - found}"
