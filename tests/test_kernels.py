"""Every kernel compiles to the machine code that was meant; no GPU is needed to see that."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

import sass
from moecompile.codegen import instances, network, nvrtc
from moecompile.codegen.exchanges import (
    ExchangeGate,
    ExchangeHome,
    ExchangeHomeOfExperts,
    ExchangePlan,
    ExchangeReceive,
    ExchangeSend,
    NodeCombine,
    NodeDispatch,
    NodeHome,
    NodeReceive,
)
from moecompile.codegen.gemms import Activated, ActivationBackward, Added, GroupedGemm, Plain, Turned
from moecompile.codegen.instances import (
    IDS,
    RESULTS,
    SCALES,
    Collect,
    Combine,
    Dispatch,
    Instance,
    PadOffsets,
    Plan,
    QuantizeGradient,
    QuantizeRows,
    QuantizeWeights,
    TransposeRows,
    source,
)

sass.require_compiler()

# (columns, stages, clusters) of the tiles that `moecompile.runtime.hopper` chooses from
TILES = ((256, 4, 1), (256, 4, 2), (256, 3, 1), (256, 3, 2), (128, 5, 1))
PLAIN = [
    GroupedGemm(dtype, *tile, transposed, over_rows)
    for dtype, tile, (transposed, over_rows) in product(
        ("bfloat16", "float16"), TILES, ((False, False), (True, False), (True, True))
    )
]
ALONG = [
    replace(each, overhang=overhang, epilogue=Plain(bias))
    for each, overhang, bias in product(PLAIN, (32, 64), (False, True))
    if (each.stages, overhang) in ((4, 32), (3, 64)) and each.cluster == 2 and not each.over_rows
]
WIDE, NARROW = GroupedGemm("float8_e4m3fn", 256, 4, 2), GroupedGemm("float8_e4m3fn", 128, 5)
OF_MATRICES: tuple[Plain | Turned, ...] = (Plain(), Turned())
SCALED = [
    replace(WIDE, cluster=1),
    *(
        replace(gemm, whole=whole, epilogue=Plain(bias))
        for gemm, bias, whole in product((WIDE, NARROW), (False, True), (False, True))
    ),
    *(replace(gemm, over_rows=True, epilogue=epilogue) for gemm, epilogue in product((WIDE, NARROW), OF_MATRICES)),
]

GPT_OSS = "mul(add(clamp(up, -7.0, 7.0), 1), mul(clamp(gate, None, 7.0), sigmoid(mul(clamp(gate, None, 7.0), 1.702))))"
# (activation, how gate and up projection lie, whether there are biases)
ACTIVATIONS = (
    ("mul(silu(gate), up)", "halves", False),
    ("mul(silu(gate), up)", "interleaved", False),
    ("mul(gelu(gate, tanh), up)", "separate", False),
    ("mul(silu(gate), up)", "halves", True),
    (GPT_OSS, "interleaved", True),
    ("square(relu(hidden))", "single", False),
)
FIRST = {
    False: [
        GroupedGemm("bfloat16", 256, 4, 2, overhang=32),
        GroupedGemm("bfloat16", 256, 4, 2),
        GroupedGemm("bfloat16", 256, 4, 1),
        GroupedGemm("bfloat16", 128, 5, 1),
    ],
    True: [GroupedGemm("bfloat16", 256, 3, 2, overhang=64), GroupedGemm("bfloat16", 256, 3, 2)],
}
"""Tiles of GEMM1, by whether its rows are saved. Each has half of the activations; test_kernel_sweep.py has all."""
ACTIVATED = [
    replace(gemm, transposed=transposed, epilogue=Activated(activation, gate_up, save, bias))
    for save, transposed, (number, (activation, gate_up, bias)) in product(
        (False, True), (False, True), enumerate(ACTIVATIONS)
    )
    for gemm in FIRST[save][number % 2 :: 2]
    if not (gemm.overhang and transposed and gate_up in ("halves", "separate"))
]
BACKWARD = [
    GroupedGemm("bfloat16", 256, 3, 2, True, epilogue=ActivationBackward(activation, gate_up))
    for activation, gate_up in dict.fromkeys((activation, gate_up) for activation, gate_up, _ in ACTIVATIONS)
]
# quantised matrices lie side by side, however they lay before
SIDE_BY_SIDE = [each for each in ACTIVATIONS if each[1] in ("halves", "single")] + [(GPT_OSS, "halves", True)]
QUANTIZED = {
    save: [
        *(
            replace(WIDE, epilogue=Activated(activation, gate_up, save, bias))
            for activation, gate_up, bias in SIDE_BY_SIDE
        ),
        *(replace(WIDE, epilogue=Activated(*each[:2], save, scales="float32")) for each in SIDE_BY_SIDE[:2]),
    ]
    for save in (False, True)
}
QUANTIZED_BACKWARD = [
    replace(WIDE, stages=3, epilogue=ActivationBackward(activation, gate_up, scaled))
    for (activation, gate_up), scaled in product(dict.fromkeys(each[:2] for each in SIDE_BY_SIDE), (False, True))
] + [replace(WIDE, stages=3, epilogue=ActivationBackward(*each[:2], scales="float32")) for each in SIDE_BY_SIDE[:2]]
QUANTISING = [
    *(
        made
        for dtype, scales in product(("bfloat16", "float16"), SCALES)
        for made in (
            QuantizeRows(dtype, scales),
            QuantizeGradient(dtype, scales),
            *(QuantizeWeights(dtype, pairs, scales) for pairs in (False, True)),
        )
    ),
    *(TransposeRows(gathered, per_column) for gathered, per_column in product((False, True), (False, True))),
    *(TransposeRows(gathered, False, "float32") for gathered in (False, True)),
]


def _saves(gemm: GroupedGemm) -> bool:
    return isinstance(gemm.epilogue, Activated) and gemm.epilogue.save


DISPATCHING = [
    replace(each, dispatches=True)
    for each in (
        ACTIVATED[0],
        next(each for each in ACTIVATED if isinstance(each.epilogue, Activated) and each.epilogue.save),
        ACTIVATED[-1],
        *QUANTIZED[False][:1],
        *QUANTIZED[True][:1],
        QUANTIZED_BACKWARD[0],
    )
]
MEMORY = ("LDG", "STG", "LD.", "ST.", "RED.", "ATOM", "ATOMG", "UTMA", "UBLKCP")
ADDED = [
    *(replace(each, epilogue=Added()) for each in PLAIN if each.over_rows),
    *(replace(gemm, over_rows=True, epilogue=Added(turned)) for gemm, turned in product((WIDE, NARROW), (False, True))),
]
NODES = [*map(NodeReceive, IDS), *(NodeHome(rows, weights) for rows, weights in product(RESULTS, RESULTS))]
SENDING = [
    *(ExchangeSend(ids) for ids in IDS),
    *(NodeDispatch(ids) for ids in IDS),
    *(NodeCombine(rows, weights) for rows, weights in product(RESULTS, RESULTS)),
]
TAKEN = [
    replace(each, taken=True)
    for each in (
        *(GroupedGemm("bfloat16", *tile, transposed) for tile, transposed in product(TILES, (False, True))),
        WIDE,
        NARROW,
        *(replace(each, dispatches=True, records=True) for each in (*ACTIVATED, *QUANTIZED[False]) if not _saves(each)),
    )
]
"""Products whose exchange is hidden behind them."""
BEHIND = [
    replace(each, taken=True)
    for each in (
        *(each for each in PLAIN if each.over_rows and each.input == "bfloat16"),
        *ADDED[:2],
    )
]
"""Gradients of matrices behind which those of tokens go home."""
WITHOUT_PRODUCTS = [
    *map(ExchangePlan, IDS),
    *SENDING,
    *NODES,
    *(ExchangeReceive(ids, stay) for ids in IDS for stay in (False, True)),
    *(ExchangeHome(rows, weights) for rows, weights in product(RESULTS, RESULTS)),
    ExchangeGate(),
    *(ExchangeHomeOfExperts("bfloat16", rows, "mul(out, weight)", ids) for rows, ids in product(RESULTS, IDS)),
    ExchangeHomeOfExperts("float16", "float16", "out", "int64"),
    *QUANTISING,
    *map(Collect, RESULTS),
    PadOffsets(),
    Dispatch(),
    Combine("bfloat16", "bfloat16", "mul(out, weight)"),
    Combine("float16", "float32", "out"),
    Plan("count", "int64", 512),
    Plan("place", "int64", 512),
    Plan("place", "int32", 1536),
]


@pytest.mark.parametrize(
    "instance",
    [
        *(*PLAIN, *ALONG, *SCALED, *ACTIVATED, *QUANTIZED[False], *BACKWARD, *TAKEN),
        *(each for each in BEHIND if not isinstance(each.epilogue, Added)),
    ],
    ids=lambda instance: instance.template,
)
def test_machine_code(instance: GroupedGemm) -> None:
    made = sass.machine(instance)
    product_of, other = ("QGMMA", "HGMMA") if instance.quantized else ("HGMMA", "QGMMA")
    assert made.counts.get(product_of) and not made.counts.get(other)
    assert made.counts.get("UTMALDG"), "operands do not come by bulk copies"
    assert made.counts.get("UTMASTG"), "results do not leave by bulk copies"
    assert made.counts.get("USETMAXREG") == 2, "registers do not move from the producer to the consumers"
    assert not {"LDL", "STL"} & made.counts.keys() and made.spilled == 0, "values live in local memory"
    assert made.registers <= 65536 // 384, "a block of 384 threads does not fit"
    assert not made.serialised


@pytest.mark.parametrize(
    "instance",
    [*QUANTIZED[True], *QUANTIZED_BACKWARD, *DISPATCHING],
    ids=lambda instance: instance.template,
)
def test_epilogues_that_need_more_registers_than_there_are(instance: GroupedGemm) -> None:
    """Those that read or write GEMM1's rows. What the products go through needs nothing in local memory."""
    made = sass.machine(instance)
    between = made.between_products()
    assert between.get("QGMMA" if instance.quantized else "HGMMA") and not {"LDL", "STL"} & between.keys()
    assert made.registers <= 65536 // 384 and not made.serialised


@pytest.mark.parametrize(
    "instance",
    [*ADDED, *(each for each in BEHIND if isinstance(each.epilogue, Added))],
    ids=lambda instance: instance.template,
)
def test_sums_are_added_to_memory(instance: GroupedGemm) -> None:
    """By bulk copies that add, a box of 32 columns each."""
    made = sass.machine(instance)
    assert made.counts.get("UTMAREDG") == instance.columns // 32 and not made.counts.get("UTMASTG")
    assert not {"LDL", "STL"} & made.counts.keys() and made.spilled == 0 and not made.serialised
    assert made.registers <= 65536 // 384


@pytest.mark.parametrize("instance", WITHOUT_PRODUCTS, ids=lambda instance: instance.template)
def test_no_local_memory(instance: Instance) -> None:
    made = sass.machine(instance)
    assert not {"LDL", "STL"} & made.counts.keys() and made.spilled == 0


@pytest.mark.parametrize("instance", SENDING, ids=lambda instance: instance.template)
def test_rows_travel_by_bulk_copies(instance: Instance) -> None:
    made = sass.machine(instance)
    assert made.counts.get("UBLKCP", 0) >= 2, "into shared memory, and out of it"
    most = 160 if isinstance(instance, NodeCombine) else 128  # which sums in registers what it sends
    assert made.registers <= most


@pytest.mark.parametrize("instance", QUANTISING, ids=lambda instance: instance.template)
def test_quantising_kernels_move_whole_sectors(instance: Instance) -> None:
    """Sixteen bytes at once, or eight where half a warp reads or writes a line of e4m3; scales and the like by four."""
    made = sass.machine(instance)
    loads, stores = ({bytes_of(name) for name in made.names(kind)} for kind in ("LDG", "STG"))
    if isinstance(instance, QuantizeWeights | QuantizeGradient):
        assert (loads, stores) == ({16}, {4, 8, 16})
    else:
        assert (loads, stores) == ({4, 8} if isinstance(instance, TransposeRows) else {4, 16}, {4, 16})


def bytes_of(name: str) -> int:
    """What an instruction that loads or stores moves for each thread."""
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((size for suffix, size in sizes.items() if suffix in name.split(".")), 4)


def test_products_of_a_scaled_sum_are_issued_together() -> None:
    """Each from descriptors of its own: one that had to wait for another's would let the other warpgroup in between.

    So it is for the tile that large products run; in the narrow one the compiler uses one set of registers for all.
    """
    made = sass.machine(GroupedGemm("float8_e4m3fn", 256, 4, 2))
    products = [operands for name, operands in made.operations if name.startswith("QGMMA")]
    descriptors = [operands.split("gdesc[")[1].split("]")[0] for operands in products]
    batches = [descriptors[i : i + 4] for i in range(0, len(descriptors), 4)]
    assert batches and all(len(set(batch)) == 4 for batch in batches), batches


def test_bulk_copies_of_the_producer_need_no_vote() -> None:
    """Operands that the compiler cannot prove uniform are voted on, lane by lane, before each copy."""
    made = sass.machine(SCALED[0])
    copies = [i for i, (name, _) in enumerate(made.operations) if name.startswith("UTMALDG")]
    for i in copies:
        window = [name for name, _ in made.operations[i : i + 6]]
        assert not any(name.startswith("BRA.U.ANY") for name in window), window


@pytest.mark.parametrize(
    "instance",
    [*ALONG[::3], *(each for each in ACTIVATED if each.overhang), *QUANTIZED_BACKWARD],
    ids=lambda each: each.template,
)
def test_descriptors_of_products_are_those_of_all_lanes(instance: GroupedGemm) -> None:
    """Computed in each lane they would have to be brought back for every product: up to 10 % slower (docs/perf.md)."""
    made = sass.machine(instance)
    names = [name for name, _ in made.operations]
    for place in (i for i, name in enumerate(names) if name.startswith(("HGMMA", "QGMMA"))):
        assert "R2UR" not in names[place - 12 : place], names[place - 12 : place]


def test_the_source_is_only_the_instantiation() -> None:
    gemm = "GroupedGemm<wgmma::Bf16, 256, 4, 2, true, false, 0, Plain<wgmma::Bf16, 256, false, 2>>"
    text = source(GroupedGemm("bfloat16", 256, 4, 2, True, False))
    assert text == f'#include "grouped_gemm.cuh"\nMOECOMPILE_KERNEL(moecompile_grouped_gemm, {gemm})\n'


def test_a_compile_error_shows_the_log_and_the_kernel() -> None:
    with pytest.raises(nvrtc.CompileError) as caught:
        instance = GroupedGemm("float8_e4m3fn", 256, 4, transposed=True)
        nvrtc.compile_source(source(instance), instances.headers(), repr(instance))
    for part in ("FP8 is read along K only", "transposed=True", "MOECOMPILE_KERNEL"):
        assert part in str(caught.value)


def test_no_header_from_outside() -> None:
    known = set(instances.headers())
    for name, text in instances.headers().items():
        if name == network.FUNCTIONS:  # NVSHMEM's are what it is for
            continue
        included = {line.split('"')[1] for line in text.splitlines() if line.startswith("#include")}
        assert included <= known, name


def test_no_assertions_or_prints_in_kernels() -> None:
    for (name, text), word in product(instances.headers().items(), ("printf", "assert(", "__trap")):
        assert not any(word in line.replace("static_assert(", "") for line in text.splitlines()), (name, word)


READING = [
    each for each in WITHOUT_PRODUCTS if isinstance(each, ExchangeReceive | ExchangeHome | NodeReceive | NodeHome)
]
"""They begin while what they read is being sent."""
IN_TURN = [each for each in WITHOUT_PRODUCTS if each not in READING]


def turns_of(instance: Instance) -> tuple[list[str], int, int, list[int]]:
    """A kernel's operations; which of them waits for earlier grids, which lets the next begin, which touch memory."""
    names = [name for name, _ in sass.machine(instance).operations]
    (waits,), (lets,) = ([i for i, name in enumerate(names) if name == kind] for kind in ("ACQBULK", "PREEXIT"))
    return names, waits, lets, [i for i, name in enumerate(names) if name.startswith(MEMORY)]


@pytest.mark.parametrize("instance", IN_TURN, ids=lambda instance: instance.template)
def test_nothing_is_read_before_earlier_grids_are_done(instance: Instance) -> None:
    """Nor written; and then the next grid is let begin, not before."""
    _, waits, lets, touches = turns_of(instance)
    assert waits < lets and waits < min(touches)


@pytest.mark.parametrize("instance", READING, ids=lambda instance: instance.template)
def test_grids_that_begin_early_end_after_earlier_ones(instance: Instance) -> None:
    """And read nothing that the L1 cache may have held before: addresses of memory alone, which never change."""
    names, waits, lets, touches = turns_of(instance)
    if isinstance(instance, NodeHome):  # what its rank says of memory that the grid before it reads comes after that
        assert waits < max(touches) < lets
    else:
        assert max(touches) < waits < lets
    loads = [name for name in names if name.startswith("LDG")]
    assert all("STRONG" in name or name == "LDG.E.64.CONSTANT" for name in loads), set(loads)


WAITING = [
    *(
        PLAIN[0],
        PLAIN[12],
        ALONG[0],
        ADDED[0],
        WIDE,
        NARROW,
        ADDED[-1],
        BACKWARD[0],
        QUANTIZED_BACKWARD[0],
        BEHIND[0],
        BEHIND[-1],
        *DISPATCHING,
    ),
    *(ACTIVATED[0], ACTIVATED[-1], ACTIVATED[12], QUANTIZED[False][1], QUANTIZED[True][0], SCALED[1], SCALED[2]),
]


@pytest.mark.parametrize("instance", WAITING, ids=lambda each: each.template)
def test_grouped_gemms_wait_for_earlier_grids(instance: GroupedGemm) -> None:
    """Each role by itself: consumers before anything, the producer, those beside it, and who fills the ring early."""
    names = [name for name, _ in sass.machine(instance).operations]
    (consumers,), (producers,) = (
        [i for i, name in enumerate(names) if name.startswith(f"USETMAXREG.{kind}")]
        for kind in ("TRY_ALLOC", "DEALLOC")
    )
    assert consumers < producers

    def places(*kinds: str, begin: int = 0, end: int = len(names)) -> list[int]:
        return [i for i, name in enumerate(names) if begin <= i < end and name.startswith(kinds)]

    assert places("ACQBULK")[0] < min(place for place in places(*MEMORY) if not names[place].startswith("UTMACCTL"))
    first = places("ACQBULK", begin=consumers, end=producers)[0]
    assert not places(*MEMORY, begin=consumers, end=first), "consumers touch memory before they wait"
    waits = places("ACQBULK", begin=producers)
    early = not instance.over_rows and (
        isinstance(instance.epilogue, Plain)
        or (isinstance(instance.epilogue, Activated) and not (instance.quantized and instance.epilogue.save))
    )
    assert len(waits) == 2 + early
    assert not places("UTMALDG.2D", begin=producers, end=waits[0]), "rows are loaded before earlier grids are done"
    assert not places("LDG.E.CONSTANT", "STG", "ATOM", "RED.", begin=producers, end=waits[0])
    for let in places("PREEXIT"):
        assert any(let - 3 <= wait < let for wait in waits), "the next grid may begin, and nobody has waited"
    assert places("PREEXIT")
