"""The nodes of one block, and the proof that they can be taken out.

Contract: `region_of` returns the nodes between the operands (tokens, ids, routing weights, expert weights, biases) and
the combine, or raises Refused if replacing them could change anything outside:
- a row value (from the first token gather to the combine) that someone outside uses; routing values may be used
  outside and then stay alive,
- a write to an operand's memory between the operand and the combine: the fused operator reads it at the combine,
- a write inside the block to memory that is not the block's own,
- a border of no_grad, autocast or another global mode inside the block,
- an operand or a value inside that is a tensor subclass (DTensor, a quantised weight of somebody else's).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import fx

from moecompile.passes.aliases import fake_of, is_foreign, lies_in_order, tensors_in
from moecompile.passes.calls import writes
from moecompile.passes.interpret import Interpretation, Refused, is_plain, walk
from moecompile.passes.layout import Layout
from moecompile.passes.terms import Apply, Contract, Element, Special, Total, Value
from moecompile.passes.token_exchange import Arriving, Leaving, Own, Sent

_MAKERS = frozenset({"zeros", "ones", "empty", "full", "full_like", "new_full", "arange"})
_LIKE = frozenset({"cast", "view_as", "expand_as"})


def region_of(
    end: fx.Node,
    roots: Mapping[fx.Node, fx.Node | None],
    state: Interpretation,
    layout: Layout,
    partials: Sequence[fx.Node] = (),
) -> frozenset[fx.Node]:
    """The nodes between the operands and `end`, `end` included. Raises Refused as the contract above says.

    Args:
        end: the combine.
        roots: the operands' nodes, each with the write after which the block reads it, None for the tensor as
        it was made.
        state: what every tensor means.
        layout: the graph's order, aliases and writers.
        partials: the additions that lead to `end`, where the sum took several.
    """
    region = _between((end, *partials), frozenset(roots), state, layout)
    ordered = sorted(region, key=layout.position.__getitem__)
    _check_rows(end, ordered, region, state, layout)
    _check_types((*roots, *ordered))
    _check_roots(end, region, roots, layout, frozenset((end, *partials)))
    _check_modes(end, ordered, layout)
    _check_partials(end, region, partials, layout)
    return frozenset(region)


def _between(ends: Sequence[fx.Node], roots: frozenset[fx.Node], state: Interpretation, layout: Layout) -> set[fx.Node]:
    """Backward from the end to the roots, with every write on the way into memory that is not a root's."""
    region: set[fx.Node] = set()
    waiting, end = list(ends), ends[0]
    position = layout.position
    while waiting:
        node = waiting.pop()
        if node in region or node in roots or node.op in ("placeholder", "get_attr"):
            continue
        region.add(node)
        waiting += [
            writer
            for writer in layout.written.get(node, ())
            if position[node] < position[writer] < position[end] and not _of_root(node, roots, layout)
        ]
        call = state.calls.get(node)
        if call is not None and call.name in _MAKERS:  # zeros_like(rows[:n]) reads a shape only
            waiting += [
                argument
                for argument in node.all_input_nodes
                if _is_of_rows(argument, state, layout) or _is_size_of_rows(argument, state)
            ]
            continue
        if call is not None and call.name in _LIKE:  # of the other tensor they read the dtype or shape only
            waiting += [
                argument for argument in node.all_input_nodes if argument is call["input"] or is_row(argument, state)
            ]
            continue
        # a size read off a tensor depends on the tensor only if that is one of the block's rows
        made_of_all = _holds_tensor(node) or _is_size_of_rows(node, state)
        waiting += [argument for argument in node.all_input_nodes if made_of_all or is_row(argument, state)]
    return region


def _of_root(node: fx.Node, roots: frozenset[fx.Node], layout: Layout) -> bool:
    return any(layout.aliases.share(node, root) for root in roots)


def _holds_tensor(node: fx.Node) -> bool:
    fake = fake_of(node)
    return isinstance(fake, (torch.Tensor, tuple, list)) or fake is None


def is_row(node: fx.Node, state: Interpretation) -> bool:
    """Whether the node holds rows of assignments: what must not be seen from outside a block."""
    fake = fake_of(node)
    if not isinstance(fake, torch.Tensor) or not fake.dtype.is_floating_point or fake.dim() < 2:
        return False
    return any(map(_is_of_assignments, (state.made.get(node), state.values.get(node))))


def _is_of_assignments(value: Value | None) -> bool:
    return (
        value is not None
        and not is_plain(value)
        and bool(value.dims and value.dims[-1])
        and isinstance(value.content, (Element, Apply, Contract, Total, Sent))
    )


def _is_size_of_rows(node: fx.Node, state: Interpretation) -> bool:
    """Whether the node is a number of rows that other ranks have sent, which nobody has without these."""
    if tensors_in(fake_of(node)):
        return is_row(node, state) and _is_sent(state.values.get(node))
    number = state.numbers.get(node)
    if isinstance(number, (Leaving, Arriving)) or (isinstance(number, Special) and isinstance(number.about[0], Own)):
        return True
    return fake_of(node) is not None and any(_is_size_of_rows(argument, state) for argument in node.all_input_nodes)


def _is_sent(value: Value | None) -> bool:
    return value is not None and any(isinstance(inner, Sent) for inner in walk(value.content))


def _is_of_rows(node: fx.Node, state: Interpretation, layout: Layout) -> bool:
    """Whether the node holds rows of assignments, or some that were cut out of them."""
    return is_row(node, state) or (
        node not in layout.writers
        and any(is_row(argument, state) and layout.aliases.share(node, argument) for argument in node.all_input_nodes)
    )


def only_reads_dtype(user: fx.Node, node: fx.Node) -> bool:
    """Whether the user casts another tensor to the node's dtype, and does nothing else: x.type_as(node), x.to(node)."""
    if user.op != "call_method" or user.target not in ("to", "type_as") or user.kwargs or len(user.args) != 2:
        return False
    source, like = user.args
    if like is not node or not isinstance(source, fx.Node) or source is node:
        return False
    before, after = fake_of(source), fake_of(user)
    return isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.device == after.device


def _check_rows(
    end: fx.Node, ordered: Sequence[fx.Node], region: set[fx.Node], state: Interpretation, layout: Layout
) -> None:
    for node in ordered:
        if any("register_hook" in str(user.target) for user in node.users):
            raise Refused(f"a hook on the gradient of {node}, inside the block")
        if node is end or not _is_of_rows(node, state, layout):
            continue
        summed = any(layout.aliases.same_elements(node, target) for target in layout.writers.get(end, ()))
        outside = next(
            (
                user
                for user in node.users
                if user not in region
                and not only_reads_dtype(user, node)
                and not checks_size(user)
                and not (summed and layout.position[user] > layout.position[end])  # the sum itself, by another name
            ),
            None,
        )
        if outside is not None:
            place = "the graph's result" if outside.op == "output" else f"{outside}"
            raise Refused(f"{node}, a value inside the block, is also used by {place}")


def _check_types(nodes: Sequence[fx.Node]) -> None:
    """A tensor subclass has operators of its own: what they do with the fused one is known of ours alone."""
    for node in nodes:
        fake = fake_of(node)
        if is_foreign(fake):
            raise Refused(f"{node} is a {type(fake).__name__}, whose own rules decide what an operator does", node)


def _check_roots(
    end: fx.Node,
    region: set[fx.Node],
    roots: Mapping[fx.Node, fx.Node | None],
    layout: Layout,
    additions: frozenset[fx.Node],
) -> None:
    position, differentiated = layout.position, _is_differentiated(end, layout)
    for root, written in roots.items():
        born = position[root if written is None else written]
        for writer in layout.written.get(root, ()):
            if position[writer] <= born or writer in additions:
                continue
            if position[writer] < position[end]:
                raise Refused(f"{writer} writes into {root} between its use by the experts and the end of the block")
            if differentiated and fake_of(root).dtype.is_floating_point:
                raise Refused(
                    f"{writer} writes into {root} after the block, whose operator keeps it for backward where the "
                    "model keeps rows gathered from it"
                )
    for writer in (region & layout.writers.keys()) - additions:
        for target in layout.writers[writer]:
            foreign = next(
                (alias for alias in layout.aliases.of(target) if alias.op in ("placeholder", "get_attr")), None
            )
            if foreign is not None or _of_root(target, frozenset(roots), layout):
                raise Refused(
                    f"{writer}, inside the block, writes into {foreign or target}, which is not the block's own"
                )


def check_layout(end: fx.Node, layout: Layout) -> None:
    """Raises Refused where somebody reads the sum's memory by its strides, and these are not those of a new tensor."""
    fake = fake_of(end)
    if not isinstance(fake, torch.Tensor) or end in layout.writers or lies_in_order(fake):
        return
    for alias in layout.aliases.of(end):
        if "as_strided" in str(alias.target):
            raise Refused(f"{alias} reads the memory of {end}, which does not lie row by row")


def check_additions(additions: Sequence[fx.Node], operands: Iterable[fx.Node], layout: Layout) -> None:
    """Raises Refused where the sum is added, in place, into an operand that the operator keeps for backward."""
    if not _is_differentiated(additions[0], layout):
        return
    for operand in operands:
        for addition in additions:
            onto = any(layout.aliases.share(target, operand) for target in layout.writers.get(addition, ()))
            if onto and fake_of(operand).dtype.is_floating_point:
                raise Refused(f"{addition} writes the experts' outputs into {operand}, whose rows they are made of")


def _is_differentiated(end: fx.Node, layout: Layout) -> bool:
    """Whether the sum has a gradient; for a sum in place that returns nothing, whether what it is added into has."""
    fakes = [fake_of(node) for node in (end, *layout.writers.get(end, ()))]
    return any(isinstance(fake, torch.Tensor) and fake.requires_grad for fake in fakes)


def _check_partials(end: fx.Node, region: set[fx.Node], partials: Sequence[fx.Node], layout: Layout) -> None:
    """Nobody outside reads the sum in place while experts are still adding to it: the fused sum comes at once."""
    for addition in partials:
        for target in layout.writers.get(addition, ()):
            for alias in layout.aliases.of(target):
                for user in alias.users:
                    between = layout.position[addition] < layout.position[user] < layout.position[end]
                    if between and user not in region and isinstance(fake_of(user), torch.Tensor):
                        raise Refused(f"{user} reads the sum before all experts have added to it")


def _check_modes(end: fx.Node, ordered: Sequence[fx.Node], layout: Layout) -> None:
    for node in ordered:
        fake = fake_of(node)
        computes = (isinstance(fake, torch.Tensor) and fake.dtype.is_floating_point) or node in layout.writers
        if computes and layout.mode[node] != layout.mode[end]:
            raise Refused(f"no_grad, autocast or another mode begins or ends between {node} and {end}")


def checks_size(node: fx.Node) -> bool:
    """Whether a node serves only assertions that row counts are at least 0 and at most all rows, or add up to them.

    Capturing a selection of rows records these; they hold for every routing. Sizes that nobody reads count as well: the
    bodies of checkpoints keep such.
    """
    if isinstance(fake_of(node), torch.Tensor) or node.op == "output":
        return False
    if getattr(node.target, "__name__", str(node.target)).split(".")[0] in ("_assert_scalar", "_check"):
        return True
    read = bool(node.users) or isinstance(fake_of(node), (int, torch.SymInt, torch.Size))
    return _is_count_check(node) and read and all(checks_size(user) for user in node.users)


def _is_count_check(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    if name in ("ge", "le", "eq"):
        bound = node.args[1]
        if name == "eq" and isinstance(bound, fx.Node):
            return _adds_up(node.args[0]) and _adds_up(bound)
        return isinstance(bound, int) and (name != "ge" or bound == 0 or _adds_up(node.args[0]))
    if name == "getitem":
        return isinstance(node.args[0], fx.Node) and isinstance(fake_of(node.args[0]), torch.Size)
    return name in ("sym_size", "size", "sym_sum", "add", "item")


def _adds_up(node: object) -> bool:
    """Whether this is a sum of row counts: of one block's, all rows."""
    return isinstance(node, fx.Node) and getattr(node.target, "__name__", "") == "sym_sum"


def _size_checks(region: frozenset[fx.Node]) -> set[fx.Node]:
    """The checks on sizes of the region's selections, which go with them."""
    found: set[fx.Node] = set()
    waiting = [user for node in region for user in node.users if user not in region and checks_size(user)]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += list(node.users)
    return found


def removable(
    end: fx.Node, region: frozenset[fx.Node], layout: Layout, partials: Sequence[fx.Node] = ()
) -> list[fx.Node]:
    """The region's nodes that nobody outside needs once `end` is replaced, last first.

    Writes go only with all names of what they write; but `partials`, the additions that led to `end`, go in any case:
    what they added is in the sum that replaces `end`.
    """
    gone = (set(region) | _size_checks(region)) - {end}
    writing = {node for node in gone if writes(node)} - set(partials)
    while True:
        kept = {node for node in gone if any(user is not end and user not in gone for user in node.users)}
        for writer in writing & gone:
            # names made after the end are names of the end, or have a user that keeps what they are made of
            names = [
                alias
                for target in layout.aliases.written(writer)
                for alias in layout.aliases.of(target)
                if layout.position[alias] < layout.position[end]
            ]
            if any(name not in gone or name in kept for name in names):
                kept.add(writer)
        if not kept:
            return sorted(gone, key=lambda node: layout.position[node], reverse=True)
        while kept:
            gone -= kept
            kept = {argument for node in kept for argument in node.all_input_nodes} & gone
