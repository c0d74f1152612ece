"""The passes as the driver calls them, each on a piece of a captured graph with the user's options; and their table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from moecompile.agreement import agree, agree_on_blocks
from moecompile.bodies import copy_graph
from moecompile.comparison import Layer, Uncast
from moecompile.options import Options
from moecompile.passes.casts import Cast, Casting, Kept
from moecompile.passes.detect import detect
from moecompile.passes.exclusions import Wishes
from moecompile.passes.expert_parallel import Exchanged, Group, Travel, exchange_tokens
from moecompile.passes.fuse import fuse
from moecompile.passes.hide import NOTHING_REWRITTEN, Rewritten, hide_exchanges
from moecompile.passes.layout import Layout
from moecompile.passes.precision import cast
from moecompile.passes.purposes import Purposes
from moecompile.passes.shared_blocks import shared_by_all
from moecompile.passes.site import NearMiss, Site
from moecompile.runtime.peer_memory import SMS


@dataclass
class Piece:
    """One body of the captured graph, and what is known of it so far.

    Attributes:
        wishes: the user's for layers that could be cast, where the pass `precision` runs.
        purposes: what layers are for, likewise, when the passes before it are done.
        differentiable: whether somebody may call its backward.
        casts: what was cast to FP8, and what was kept.
        uncast: the body as it was before that, where it is to be compared.
        exchanged: blocks whose tokens are exchanged between ranks.
        gathered: blocks whose experts are gathered instead, and why.
        rewritten: how many blocks with their exchange are one operator, and of how many the exchange is hidden.
        changed: whether some pass rewrote it.
    """

    module: fx.GraphModule
    sites: tuple[Site, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    layout: Layout | None = None
    casts: tuple[Cast, ...] = ()
    uncast: Uncast | None = None
    wishes: Wishes | None = None
    purposes: Purposes | None = None
    differentiable: bool = True
    exchanged: tuple[Exchanged, ...] = ()
    gathered: tuple[Kept, ...] = ()
    rewritten: Rewritten = NOTHING_REWRITTEN
    changed: bool = False


def detect_sites(piece: Piece, options: Options) -> None:
    """Finds the mixture-of-experts blocks; changes nothing."""
    detection = detect(piece.module.graph)
    chosen: dict[str, Any] = {"kernels": _kernels(options), "recompute": options.recompute}
    piece.sites = tuple(dataclasses.replace(site, **chosen) for site in detection.sites)
    piece.near_misses, piece.layout = detection.near_misses, detection.layout
    _leave_what_others_do_not_find(piece, options)


def _leave_what_others_do_not_find(piece: Piece, options: Options) -> None:
    """Of blocks that exchange tokens by themselves, those are rewritten that all ranks rewrite."""
    why = "; ".join(dict.fromkeys(f"{miss.reason}, at {miss.source}" for miss in piece.near_misses))
    rewrites = not {"fuse", "exchange"} & {*options.disable}
    reason = "" if "fuse" in options.disable else "the pass exchange is disabled"  # without fuse blocks are reported

    def agree_if_on(group: Group, words: Sequence[str], tokens: Mapping[str, Any]) -> Mapping[str, str]:
        mine = tokens if rewrites else {}
        reasons = agree_on_blocks(group, words, mine, capacity=options.ep_capacity, why=why)
        return reasons if rewrites else dict.fromkeys(tokens, reason)

    piece.sites, others = shared_by_all(piece.module.graph, piece.sites, agree_if_on)
    piece.near_misses += others


def fuse_sites(piece: Piece, _: Options) -> None:
    """Replaces each block by our operators."""
    piece.changed |= fuse(piece.module.graph, piece.sites, piece.layout) > 0


ASKED = (
    "precision",
    "kernels",
    "fp8_exclude",
    "fp8_include",
    "fp8_keep_first_layers",
    "fp8_keep_last_layers",
    "fp8_scale_format",
    "fp8_compare",
    "verify",
    "ep_dispatch_again",
)
"""Options that decide what travels between ranks, how it is read, and whether graphs are run to compile them."""


def exchange(piece: Piece, options: Options) -> None:
    """Sends tokens to the ranks of their experts, where experts are spread over ranks."""
    why = "; ".join(dict.fromkeys(f"{miss.reason}, at {miss.source}" for miss in piece.near_misses))
    travel = travel_of(options)
    asked: dict[str, Any] = {"ep_capacity": options.ep_capacity, "ep_sms": travel.sms}
    asked |= {name: repr(getattr(options, name)) for name in ASKED}
    asked["disable"] = ", ".join(name for name in ("precision", "hide") if name in options.disable)
    inference = not piece.differentiable
    agreed = partial(agree, asked=asked, why=why, inference=inference)
    done, kept = exchange_tokens(piece.module.graph, agreed, travel)
    piece.exchanged, piece.gathered = tuple(done), tuple(kept)
    piece.changed |= bool(done)


def cast_to_fp8(piece: Piece, options: Options) -> None:
    """Turns linear layers and experts to FP8."""
    graph = piece.module.graph
    assert piece.wishes is not None and piece.purposes is not None
    uncast, places = copy_graph(graph) if options.fp8_compare else (None, {})
    casting = Casting(piece.differentiable, options.fp8_scale_format, _kernels(options))
    table = cast(graph, piece.wishes, piece.purposes, casting)
    piece.changed, piece.casts = True, table.rows
    if uncast is not None:
        layers = tuple(Layer(row, places[before], after) for row, before, after in table.replaced)
        plans = graph.find_nodes(op="call_function", target=torch.ops.moecompile.plan.default)
        piece.uncast = Uncast(piece.module, uncast, layers, tuple((places[plan], plan) for plan in plans))


def hide(piece: Piece, _: Options) -> None:
    """Makes one operator of a block and its exchange, which it hides behind the experts where nobody differentiates."""
    piece.rewritten = hide_exchanges(piece.module.graph, piece.differentiable)
    piece.changed |= piece.rewritten.blocks > 0


def travel_of(options: Options) -> Travel:
    """How tokens travel between ranks."""
    return Travel(SMS if options.ep_sms == "auto" else options.ep_sms, options.ep_patience, options.ep_rows)


def _kernels(options: Options) -> str | None:
    """The option `kernels` as the attribute of operators: None is the fastest that there are."""
    return None if options.kernels == "auto" else options.kernels


# In the order in which they run, under the names of `moecompile.options.PASSES`, where each is described.
PASSES: dict[str, Callable[[Piece, Options], None]] = {
    "detect": detect_sites,
    "fuse": fuse_sites,
    "exchange": exchange,
    "precision": cast_to_fp8,
    "hide": hide,
}


def exchanges_alone(pieces: Iterable[Piece], options: Options) -> dict[int, Callable[[fx.Graph], None]]:
    """By number of the site, of all pieces', what exchanges its tokens in a graph that holds nothing else."""
    found: dict[int, Callable[[fx.Graph], None]] = {}
    first = 0
    for piece in pieces:
        for each in piece.exchanged:
            found[first + each.number] = partial(_exchange_alone, each.capacity, travel_of(options), piece)
        first += len(piece.sites)
    return found


def _exchange_alone(capacity: int, travel: Travel, piece: Piece, graph: fx.Graph) -> None:
    """Exchanges the tokens of a graph's only block, as all ranks do."""
    done, kept = exchange_tokens(graph, lambda _, __, tokens: dict.fromkeys(tokens, capacity), travel)
    if len(done) != 1 or kept:
        raise RuntimeError(f"expected one block whose tokens are exchanged, got {len(done)}; {kept}")
    if piece.rewritten.blocks:
        hide_exchanges(graph, piece.differentiable)
