"""Find every mixture-of-experts block of a graph.

Contract
- Reads a Dynamo graph (meta["example_value"]); changes nothing.
- A `Site` is proven: the tensor at its node equals the fused operator on its operands for all inputs, gradients
  included, and the nodes between can be taken out without anyone outside noticing. Rounding apart; and where the
  model cancels with a factor of 0 what an expert made of a token that did not choose it (`Form.unchosen`), that is
  taken to be finite: the model's own 0 * inf would be NaN.
- A block that shows experts' products but is not proven is a `NearMiss`, with the first thing that differed.

    state = interpret(graph)                         # what every tensor means
    for each sum over assignments:
        block  = read(its term)                      # experts, activation, weights; or why not
        region = region_of(block)                    # what can be taken out; or why not
        -> Site
    for each expert product in no Site -> NearMiss
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from moecompile.passes import radix, terms
from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import Call, writes
from moecompile.passes.dense import as_assignments, check_vanishing, unrolled_sums, uses_gates
from moecompile.passes.expert_products import Product, feature_atoms
from moecompile.passes.forms import ANCHORS, Traits, form_of
from moecompile.passes.interpret import Combine, Interpretation, Refused, interpret, walk
from moecompile.passes.layout import Layout
from moecompile.passes.near_misses import near_misses
from moecompile.passes.padding import check_padding, is_padded
from moecompile.passes.provenance import common_module, source_of
from moecompile.passes.recognise import Block, weight_steps
from moecompile.passes.region import check_additions, check_layout, region_of
from moecompile.passes.rules_routing import known_range
from moecompile.passes.site import GATHER, Detection, Operand, Site
from moecompile.passes.terms import Content, Contract, Element, Size, Stacked, Total, Value
from moecompile.passes.vacant import has_places, read_block, routing_operands
from moecompile.runtime.contract import DIFFERENTIABLE, operator_dtypes
from moecompile.runtime.elementwise import dtype_name

MATRICES = ("w_in", "w_up", "w_out")
BIASES = ("b_in", "b_up", "b_out")


def detect(graph: fx.Graph) -> Detection:
    """All Sites and near misses of the graph, in program order."""
    if not any(_is_call(node) for node in graph.nodes):
        return Detection((), (), Layout(graph))
    state = interpret(graph)
    layout = Layout(graph, state)
    sites: list[Site] = []
    refused: list[tuple[Combine, Refused]] = []
    for combine in sorted(
        [*state.combines, *_single_choices(state), *unrolled_sums(state)],
        key=lambda combine: layout.position[combine.node],
    ):
        try:
            sites.append(_site(combine, state, layout))
        except Refused as reason:
            refused.append((combine, reason))
    sites = [site for site in sites if not any(site.node in other.region for other in sites if other is not site)]
    return Detection(tuple(sites), tuple(near_misses(state, sites, refused)), layout)


def _is_call(node: fx.Node) -> bool:
    """Whether the node may be bound: a call that is not of a higher-order operator."""
    return node.op in ("call_function", "call_method") and not isinstance(node.target, torch._ops.HigherOrderOperator)


def _site(combine: Combine, state: Interpretation, layout: Layout) -> Site:
    content, dims = combine.value.content, combine.value.dims
    assert isinstance(content, Total)
    tokens = radix.merge(atom for group in dims[:-1] for atom in group)
    if any(atom.variable.kind != "ids" for atom in content.over):
        content, tokens = as_assignments(content, tokens, state)
    block, comparison = read_block(content, tokens)
    if uses_gates(block) and not has_places(block):
        check_vanishing(block)
    routed = routing_operands(block, comparison, state, layout, combine.node) if has_places(block) else {}
    operands = _operands(block, state, routed)
    roots: dict[fx.Node, fx.Node | None] = {node: None for operand in operands.values() for node in operand.nodes}
    roots |= _written(block)
    if combine.base is not None and not combine.fresh:
        roots.setdefault(combine.base, None)
    check_layout(combine.node, layout)
    region = region_of(combine.node, roots, state, layout, combine.partials)
    check_padding(region, state, layout)
    kept = [node for operand in operands.values() for node in operand.nodes]
    check_additions((combine.node, *combine.partials), kept, layout)
    assert block.out is not None
    if dims[-1:] != (radix.merge(feature_atoms(block.out)),) and dims[-1:] != ((),):
        raise Refused("the summed rows are not the second GEMM's output features in order")
    result = combine.node if fake_of(combine.node) is not None or combine.base is None else combine.base
    if sum(not isinstance(size, int) for size in state.shape(result)) > 1:
        raise Refused("a result of several symbolic dimensions")
    return _described(combine, block, operands, region, state, layout, _out_dtype(block, operands, state.dtype(result)))


def _out_dtype(block: Block, operands: dict[str, Operand], result: torch.dtype) -> torch.dtype | None:
    """The dtype of the model's sum, where it is not the one that the operator would give it."""
    if not result.is_floating_point:
        raise Refused(f"a sum in {result}")
    tensors = tuple(_dtype(operands[name]) if name in operands else None for name in DIFFERENTIABLE)
    try:
        given = operator_dtypes(tensors, block.activation, block.gate_up, block.input, block.output).result
    except TypeError as error:
        raise Refused(str(error)) from error
    return None if given == result else result


def _dtype(operand: Operand) -> torch.dtype:
    dtypes = [arguments[0] for step, arguments in operand.steps if step == "to"]
    found = dtypes[-1] if dtypes else fake_of(operand.node).dtype
    assert isinstance(found, torch.dtype)
    return found


def _written(block: Block) -> dict[fx.Node, fx.Node | None]:
    """Operands that were written into before the block reads them, and the last such write."""
    leaves = [leaf for leaf in (block.x, block.key, block.weight) if leaf is not None]
    return {leaf.root: leaf.written for leaf in leaves if isinstance(leaf.root, fx.Node)}


def _single_choices(state: Interpretation) -> Iterator[Combine]:
    """Rows of one expert a token need no sum.

    Where such rows, back in the tokens' order, meet the rest of the graph.
    """
    for node, value in state.made.items():
        if isinstance(value.content, Element) or len(value.dims) != 2 or not _is_expert_output(value):
            continue
        fake = fake_of(node)
        if not isinstance(fake, torch.Tensor) or not fake.dtype.is_floating_point:
            continue
        tokens = value.dims[0]
        rows = {
            user
            for user in node.users
            if user in state.made and _is_expert_output(state.made[user]) and user not in state.refusals
        }
        if tokens and all(atom.variable.kind == "ids" for atom in tokens) and not rows and not writes(node):
            yield Combine(node, Value(value.dims, Total(value.content, (), fake.dtype)))


def _is_expert_output(value: Value) -> bool:
    """Whether an expert product of an expert product is in the value."""
    return any(
        isinstance(inner, Contract) and _holds_expert_product(inner.left, inner.right) for inner in walk(value.content)
    )


def _holds_expert_product(*contents: Content) -> bool:
    return any(isinstance(inner, Contract) for content in contents for inner in walk(content)) and any(
        isinstance(weight, Element) and any(isinstance(part, terms.Looked) for part in weight.index)
        for weight, _ in map(terms.uncast, contents)
    )


def _operands(block: Block, state: Interpretation, routed: dict[str, Operand]) -> dict[str, Operand]:
    """The fused operator's tensors: the graph's own nodes, and what brings them to the operator's shapes.

    `routed` are those that are known already.
    """
    assert block.x is not None and block.key is not None and block.out is not None
    top_k = radix.group_size(block.choices)
    if not isinstance(top_k, int) or not isinstance(block.num_experts, int):
        raise Refused("a symbolic number of experts or choices")
    assert isinstance(block.x.root, fx.Node)
    operands = {"x": Operand(block.x.root, (("reshape", (-1, block.inner[0].over.size)),)), **routed}
    if not routed:
        assert isinstance(block.key.root, fx.Node)
        known = known_range(block.key, state)
        if known is not None and known > block.num_experts:
            raise Refused(f"expert ids up to {known - 1} for {block.num_experts} experts")
        if known is None and uses_gates(block):
            raise Refused("gates of expert ids that may be out of range, which choose no expert")
        from_zero = _counted_from_zero(block.key, block.num_experts, state) if known is None else ()
        operands["expert_ids"] = Operand(block.key.root, (("reshape", (-1, top_k)), *from_zero))
    if block.weight is not None and not routed:
        weighted = weight_steps(block.weight, block)
        assert weighted is not None and isinstance(block.weight.root, fx.Node)
        operands["weights"] = Operand(block.weight.root, weighted)
    gate, *up = block.inner
    if block.gate_up == "separate":
        if gate.transposed != up[0].transposed:
            raise Refused("the gate's and the up projection's weights lie in different orientations")
        operands |= _matrices("w_up", "b_up", up[0], block.num_experts, state)
    operands |= _matrices("w_in", "b_in", gate, block.num_experts, state)
    operands |= _matrices("w_out", "b_out", block.out, block.num_experts, state)
    _check_spread(operands, state)
    return operands


def _check_spread(operands: dict[str, Operand], state: Interpretation) -> None:
    """Raises Refused unless the ranks of one group share all the experts' tensors, and no others."""
    for name, operand in operands.items():
        roots = {state.spread.get(node) for node in operand.nodes}
        if name not in (*MATRICES, *BIASES) and roots != {None}:
            raise Refused(f"{operand.node} is of this rank's experts, and of its tokens", operand.node)
    spread = {state.spread.get(operand.node) for name, operand in operands.items() if name in (*MATRICES, *BIASES)}
    if len(spread) > 1:
        raise Refused("experts of which ranks share some tensors, and not others")


def _counted_from_zero(
    ids: Element, num_experts: int, state: Interpretation
) -> tuple[tuple[str, tuple[object, ...]], ...]:
    """Ids that may count from the end (-1 is the last expert, as in w[ids]) are made to count from 0.

    Where the model does anything with them that fails for a number below 0, the operator fails as well.
    """
    assert isinstance(ids.root, fx.Node)
    wide = state.dtype(ids.root) in (torch.int32, torch.int64)  # others may not hold their sum with the experts
    strict = any(call.name in _FROM_ZERO and _is_given(call, ids, state) for call in state.calls.values())
    step = "from_zero" if strict else "from_end"
    return (*(() if wide else (("to", (torch.int64,)),)), (step, (num_experts,)))


# operations that fail for an index below 0
_FROM_ZERO = frozenset("gather index_select embedding one_hot bincount scatter scatter_add index_add".split())


def _is_given(call: Call, ids: Element, state: Interpretation) -> bool:
    """Whether an operation's argument is the ids, in any order."""
    contents = [state.values[node].content for node in call.node.all_input_nodes if node in state.values]
    return any(isinstance(content, Element) and content.root is ids.root for content in contents)


def _matrices(weight: str, bias: str, product: Product, num_experts: int, state: Interpretation) -> dict[str, Operand]:
    """One matrix, and one bias vector if there is one, for each expert."""
    inner, outer = product.over.size, product.extent
    shape = (inner, outer) if product.transposed else (outer, inner)
    found = {weight: _converted(_of_experts(product.weight, num_experts, shape, state), product.cast)}
    if product.bias is not None:
        found[bias] = _converted(_of_experts(product.bias, num_experts, (outer,), state), product.bias_cast)
    return found


def _of_experts(node: fx.Node | Stacked, num_experts: int, shape: tuple[Size, ...], state: Interpretation) -> Operand:
    """One tensor of this shape for each expert; those of all ranks, if these share them."""
    spread = state.spread.get(node) if isinstance(node, fx.Node) else None
    if spread is None:
        return _shaped(node, (num_experts, *shape), state)
    local = _shaped(node, (num_experts // spread.ranks, *shape), state)
    return replace(local, steps=(*local.steps, (GATHER, (spread.ranks, spread.group))))


def _converted(operand: Operand, dtype: str | None) -> Operand:
    return operand if dtype is None else replace(operand, steps=(*operand.steps, ("to", (getattr(torch, dtype),))))


def _shaped(node: fx.Node | Stacked, shape: tuple[Size, ...], state: Interpretation) -> Operand:
    if isinstance(node, Stacked):
        first, *others = node.nodes
        if any(
            (state.shape(other), state.dtype(other)) != (state.shape(first), state.dtype(first)) for other in others
        ):
            raise Refused("experts of different shapes or dtypes")
        present: tuple[Size, ...] = (len(node.nodes), *state.shape(first))
        if present[0] != shape[0] or radix.product(present) != radix.product(shape):
            raise Refused(f"{len(node.nodes)} experts' tensors of shape {state.shape(first)} where {shape} is needed")
        return Operand(first, (("stack", ()), *((("reshape", shape),) if present != shape else ())), node.nodes)
    present = state.shape(node)
    if present == shape:
        return Operand(node)
    if radix.product(present) != radix.product(shape) or not all(isinstance(size, int) for size in shape):
        raise Refused(f"{node} of shape {present} does not hold one {shape[1:]} for each of {shape[0]} experts")
    return Operand(node, (("reshape", shape),))


def _described(
    combine: Combine,
    block: Block,
    operands: dict[str, Operand],
    region: frozenset[fx.Node],
    state: Interpretation,
    layout: Layout,
    out_dtype: torch.dtype | None,
) -> Site:
    assert block.out is not None and isinstance(block.num_experts, int)
    names = frozenset(state.calls[node].name for node in region if node in state.calls)
    names |= (
        {"rows"} if any(isinstance(product.weight, Stacked) for product in block.inner) or combine.partials else set()
    )
    if "weights" in operands and any(step == "gather" for step, _ in operands["weights"].steps):
        names |= {"dense"}
    if any(is_padded(node, state) for node in region):
        names |= {"padded"}
    if has_places(block):
        names = frozenset({"capacity"})
    traits = Traits(names, block.gate_up, state.calls[combine.node].name)
    inner = block.inner[0]
    products = [node for node in region if node in state.calls and state.calls[node].name in ANCHORS]
    anchor = min(products, key=lambda node: layout.position[node], default=combine.node)
    width, hidden = radix.group_size((block.out.over,)), radix.group_size((inner.over,))
    assert isinstance(width, int) and isinstance(hidden, int)
    return Site(
        form=form_of(traits),
        tokens=str(radix.group_size(block.tokens)),
        top_k=str(radix.group_size(block.choices)),
        num_experts=block.num_experts,
        hidden=hidden,
        intermediate=width,
        activation=block.activation,
        input=block.input,
        output=block.output,
        gate_up=block.gate_up,
        dtype=inner.cast or dtype_name(fake_of(operands["w_in"].node).dtype),
        biases=tuple(name for name in ("b_in", "b_up", "b_out") if name in operands),
        module=common_module([*products, combine.node]),
        source=source_of(anchor),
        w_in_transposed=inner.transposed,
        w_out_transposed=block.out.transposed,
        out_dtype=out_dtype,
        node=combine.node,
        base=combine.base,
        fresh=combine.fresh,
        partials=combine.partials,
        operands=operands,
        region=region,
        spread=state.spread.get(operands["w_in"].node),
    )
