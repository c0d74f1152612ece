"""The quantising kernels on a Hopper GPU: bit for bit what `moecompile.runtime.quantize` gives on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fences import POISON, fenced
from moecompile.runtime import hopper_quantize, quantize
from moecompile.runtime.hopper_quantize import QuantizedRows
from moecompile.runtime.quantize import (
    ALONG_FEATURES,
    BLOCK,
    E4M3,
    FLOAT32,
    POWER_OF_TWO,
    SCALE_FORMATS,
    SMALLEST_SCALE,
    blocks_in,
    pad,
)
from special_tiles import TILES, tile_of

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
LAYOUTS = ("halves", "interleaved", "separate", "single")
# experts, features of a projection, features in: whole blocks, parts of blocks, less than one
MATRICES = ((3, 256, 384), (2, 176, 208), (1, 80, 144))
PARTS = ("values", "scales", "values transposed", "scales transposed")


def assert_same(name: str, found: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, wherever they lie."""
    assert found.dtype == expected.dtype and found.shape == expected.shape, name
    bits, wanted = (
        tensor.cpu().clone(memory_format=torch.contiguous_format).view(torch.uint8) for tensor in (found, expected)
    )
    differ = int((bits != wanted).sum())
    assert not differ, f"{name}: {differ} of {bits.numel()} bytes differ"


def matrices(shape: tuple[int, int, int], dtype: torch.dtype, turned: bool) -> Tensor:
    """Rows of different loudness, zeros where a block begins, an infinity and NaNs; `turned` in memory."""
    w = torch.randn(shape) * torch.exp2(torch.randint(-12, 5, (*shape[:2], 1)))
    w[0, :130, :130] = 0
    w[-1, -1, -1], w[-1, 3, 5], w[0, -2, 7] = torch.inf, torch.nan, -torch.nan
    w = w.to("cuda", dtype)
    return w.mT.contiguous().mT if turned else w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["in order", "turned"])
@pytest.mark.parametrize("transposed", [False, True], ids=["n_k", "k_n"])
@pytest.mark.parametrize("gate_up", LAYOUTS)
@pytest.mark.parametrize("sizes", MATRICES, ids=str)
@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_weights(
    scale_format: str, sizes: tuple[int, int, int], gate_up: str, transposed: bool, turned: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    experts, inner, features = sizes
    width = 2 * inner if gate_up in ("halves", "interleaved") else inner
    shape = (experts, features, width) if transposed else (experts, width, features)
    w = matrices(shape, dtype, turned)
    w_up = matrices(shape, dtype, turned) if gate_up == "separate" else None
    assert hopper_quantize.takes_weights(w, w_up)
    with fenced(least=4):
        found = hopper_quantize.quantize_weights(w, w_up, gate_up, transposed, True, scale_format)
        alone = hopper_quantize.quantize_weights(w, w_up, gate_up, transposed, False, scale_format)
    on_cpu = w.cpu(), None if w_up is None else w_up.cpu()
    expected = quantize.quantize_weights(*on_cpu, gate_up, transposed, True, scale_format)
    for name, one, other in zip(PARTS, found, expected, strict=True):
        assert one.is_contiguous()
        assert_same(name, one, other)
    for name, one, other in zip(PARTS, alone, expected[:2], strict=False):
        assert_same(name, one, other)
    assert [each.shape for each in alone[2:]] == [(0,), (0,)]


def test_two_matrices_that_lie_differently() -> None:
    torch.manual_seed(0)
    w, w_up = (matrices((2, 176, 208), torch.bfloat16, turned) for turned in (False, True))
    found = hopper_quantize.quantize_weights(w, w_up, "separate", False)
    for name, *pair in zip(
        PARTS, found, quantize.quantize_weights(w.cpu(), w_up.cpu(), "separate", False), strict=True
    ):
        assert_same(name, *pair)


def test_the_operator_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(2, 352, 208, device="cuda", dtype=torch.bfloat16)
    expected = quantize.quantize_weights(w.cpu(), None, "halves", False)
    monkeypatch.setattr(quantize, "quantize_weights", None)
    found = torch.ops.moecompile.quantize_weights(w, gate_up="halves")
    for name, *pair in zip(PARTS, found, expected, strict=True):
        assert_same(name, *pair)


def tokens(count: int, features: int, dtype: torch.dtype, power: int) -> Tensor:
    """Blocks from 2^-power to 2^power times as loud as others, and special tokens as far as there is room for them."""
    loudness = torch.exp2(torch.randint(-power, power, (count, blocks_in(features, BLOCK))).float())
    x = torch.randn(count, features) * loudness.repeat_interleave(BLOCK, 1)[:, :features]
    column = features // 2
    special = torch.randn(10, features)
    special[0], special[1], special[7] = 0.0, special[1] * 1e-10, special[7] * 1e-40
    special[2, column], special[3, column], special[4, column] = torch.inf, -torch.inf, torch.nan
    special[5], special[6] = torch.nan, -0.0
    special[8], special[9] = 448.0, 450.0  # the largest number, and the next one of bfloat16: the scale turns
    places = torch.randperm(count)[:10]
    x[places] = special[: len(places)]
    return x.to(dtype)


def slots_of(count: int, top_k: int, experts: int) -> Tensor:
    """Slots (T, K) of a routing; a fifth of the assignments is dropped."""
    ids = torch.randint(0, experts, (count, top_k))
    ids[torch.rand(ids.shape) < 0.2] = -1
    _, _, slots, _ = torch.ops.moecompile.plan(ids, experts)
    return slots


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """What tensors between fences hold at first, on the CPU."""
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.full(size, POISON, dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("wanted", ["rows", "tokens", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("count", "top_k", "features"),
    [(37, 2, 512), (300, 3, 208), (5, 1, 16), (64, 8, 2064), (1, 1, 1040), (9000, 2, 128)],
)
@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_rows(scale_format: str, count: int, top_k: int, features: int, dtype: torch.dtype, wanted: str) -> None:
    torch.manual_seed(0)
    x, slots = tokens(count, features, dtype, 13 if dtype == torch.float16 else 120), slots_of(count, top_k, 6)
    values, scales = quantize.quantize(x, ALONG_FEATURES, scale_format)
    on_device = x.cuda()
    with fenced(least=2):
        rows = QuantizedRows.empty(on_device, count * top_k, features) if wanted != "tokens" else None
        kept = None
        if wanted != "rows":
            room = on_device.new_empty(count, blocks_in(features, BLOCK), dtype=torch.float32)
            kept = (on_device.new_empty(count, features, dtype=E4M3), room)
        hopper_quantize.quantize_rows(on_device, slots.cuda(), rows, kept, scale_format)
    if kept is not None:
        assert_same("tokens", kept[0], values)
        assert_same("tokens' scales", kept[1], scales)
    if rows is not None:  # rows without an assignment, and what fills up the scales, are not written
        expected = poisoned(*rows.values.shape, dtype=E4M3)
        expected_scales = poisoned(*rows.scales.shape, dtype=torch.float32)
        token, chosen = (slots >= 0).nonzero(as_tuple=True)
        places = slots[token, chosen].long()
        expected.view(torch.uint8)[places] = values.view(torch.uint8)[token]
        expected_scales[:, places] = scales[token].T
        assert_same("rows", rows.values, expected)
        assert_same("rows' scales", rows.scales, expected_scales)


COUNTS = ((300, 0, 4, 128, 64, 1, 129, 256), (0, 0, 5), (3,) * 70, (0, 0), (1,))
"""Rows of each expert: more than a block, whole ones, one row, none."""


@pytest.mark.parametrize(
    "counts", [*COUNTS, (5,) * 31, (200, 0) * 16, (130,) * 33, (1, 0, 128) * 171], ids=lambda c: str(c)[:24]
)
def test_padded_offsets(counts: tuple[int, ...]) -> None:
    offsets = torch.tensor(counts).cumsum(0).int()
    with fenced():
        found = hopper_quantize.pad_offsets(offsets.cuda())
    whole = [pad(count) for count in counts]
    assert found.tolist() == list(itertools.accumulate(whole)) and found.dtype == torch.int32


# columns, features of a half that is filled up to whole blocks, whether two halves come by turns
LINES = (
    (256, None, False),
    (208, None, False),
    (1168, None, False),
    (256, 176, False),
    (512, 176, False),
    (512, 176, True),
    (768, 384, True),
)


@pytest.mark.parametrize(
    ("per_column", "scale_format"),
    [(False, POWER_OF_TWO), (True, POWER_OF_TWO), (False, FLOAT32), (True, FLOAT32)],
    ids=["shifted", "per column", "shifted from float32", "per column from float32"],
)
@pytest.mark.parametrize("gathered", [False, True], ids=["rows", "tokens"])
@pytest.mark.parametrize("lines", LINES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: str(counts)[:24])
def test_transposed_rows(
    counts: tuple[int, ...], lines: tuple[int, int | None, bool], gathered: bool, per_column: bool, scale_format: str
) -> None:
    torch.manual_seed(0)
    (columns, features, interleaved), top_k, used = lines, 3, sum(counts)
    count = -(-(used + 7) // top_k)  # of tokens; the last assignments are dropped
    order = torch.cat((torch.randperm(count * top_k)[:used], torch.full((count * top_k - used,), -1))).int()
    x = tokens(count if gathered else count * top_k, columns, torch.bfloat16, 8)
    values, scales = quantize.quantize(x, ALONG_FEATURES, scale_format)
    offsets = torch.tensor(counts).cumsum(0).int().cuda()
    given = scales if gathered else F.pad(scales.T, (0, -len(scales) % 4), value=torch.nan).contiguous()
    with fenced(least=2):
        found = hopper_quantize.transpose_rows(
            values.cuda(), given.cuda(), order.cuda(), offsets, hopper_quantize.pad_offsets(offsets),
            top_k=top_k if gathered else None, per_column=per_column, features=features, interleaved=interleaved,
            scale_format=scale_format,
        )  # fmt: skip
    sources = order[:used] // top_k if gathered else torch.arange(used)
    expected, expected_scales = in_columns(values, scales, sources.long(), counts, per_column)
    places, end, blocks = places_of(lines), expected.shape[1], expected.shape[1] // BLOCK
    assert_same("values", found.values[:, :end], expected[places])
    if per_column:
        assert_same("scales", found.scales[:blocks], expected_scales[:, places])
    else:
        assert_same("scales", found.scales[:, :blocks], expected_scales.T)
    beyond = found.values[:, end:].contiguous().view(torch.uint8)
    assert bool((beyond == POISON).all()), "columns of no expert were written"


@pytest.mark.parametrize("gathered", [False, True], ids=["rows", "tokens"])
def test_tiles_that_fp16_can_do_and_others(gathered: bool) -> None:
    torch.manual_seed(0)
    tiles = [tile_of(kind) for kind in TILES for _ in range(3)]
    values = torch.cat([values for values, _ in tiles]).to(E4M3)
    scales = torch.cat([scales for _, scales in tiles])[:, None]
    expected, expected_scales = quantize.requantize_along_tokens(values.float(), scales)
    given = scales if gathered else F.pad(scales.T, (0, -len(scales) % 4)).contiguous()
    order = torch.arange(len(values)).int().cuda() if gathered else None
    with fenced(least=2):
        found = hopper_quantize.transpose_rows(
            values.cuda(), given.cuda(), order, top_k=1 if gathered else None, per_column=True
        )
    wrong = (found.scales.cpu() != expected_scales).any(1)
    assert not wrong.any(), [TILES[tile // 3] for tile in wrong.nonzero().flatten()]
    bits = (each.contiguous().view(torch.uint8) for each in (found.values.cpu().T, expected))
    differ = torch.ne(*bits).view(len(tiles), -1).sum(1)
    assert not differ.any(), {TILES[tile // 3]: int(count) for tile, count in enumerate(differ) if count}


def test_tiles_of_a_gradient() -> None:
    """The rows' own scales are what the quantiser finds; that float32 takes over does not lose a row."""
    torch.manual_seed(0)
    tiles = [tile_of(kind) for kind in TILES for _ in range(3)]
    x = torch.cat([(values * scales[:, None]).bfloat16() for values, scales in tiles])
    with fenced(least=4):
        found = torch.ops.moecompile.quantize_gradient(x.cuda())
    for name, ours, theirs in zip(PARTS, found, torch.ops.moecompile.quantize_gradient(x), strict=True):
        assert_same(name, ours, theirs)


def in_columns(
    values: Tensor, scales: Tensor, sources: Tensor, counts: tuple[int, ...], per_column: bool
) -> tuple[Tensor, Tensor]:
    """These rows (R, F) as columns (F, P), each expert's filled up with zeros to whole blocks, and their scales."""
    change = quantize.requantize_along_tokens if per_column else quantize.to_square_blocks
    blocks = [F.pad(own, (0, -len(own) % BLOCK), value=-1).view(-1, BLOCK) for own in sources.split(counts)]
    rows = torch.cat(blocks)
    filled = torch.cat((values.float(), torch.zeros(1, values.shape[1])))[rows]
    filled_scales = torch.cat((scales, torch.full((1, scales.shape[1]), SMALLEST_SCALE)))[rows]
    found, found_scales = change(filled, filled_scales)
    bits = found.to(E4M3).view(torch.uint8).view(-1, values.shape[1])
    return bits.T.contiguous().view(E4M3), found_scales[:, 0]


def places_of(lines: tuple[int, int | None, bool]) -> Tensor:
    """The column that becomes each line of the result."""
    columns, features, interleaved = lines
    if features is None:
        return torch.arange(columns)
    halves = [torch.arange(start, start + features) for start in range(0, columns, pad(features))]
    return torch.stack(halves, 1).flatten() if interleaved else torch.cat(halves)
