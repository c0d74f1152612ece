"""Random edits of an FX graph. Each takes the graph and a generator and says what it did, or None if it found no place.

An edit may leave the graph invalid: `fuzz_graphs.edit` propagates fake values and takes back what does not run.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

Edit = Callable[[fx.Graph, random.Random], str | None]

CALLS = ("call_function", "call_method")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
OTHER_TARGETS: dict[Any, tuple[Any, ...]] = {
    operator.mul: (operator.add, operator.sub, torch.maximum),
    operator.add: (operator.mul, operator.sub),
    operator.sub: (operator.add,),
    operator.floordiv: (operator.mod, operator.mul),
    operator.truediv: (operator.mul,),
    operator.eq: (operator.ne, operator.le, operator.ge),
    operator.lt: (operator.le, operator.gt),
    F.silu: (F.relu, F.gelu, torch.sigmoid, torch.exp),
    F.gelu: (F.silu, F.relu),
    torch.tanh: (torch.sigmoid, torch.exp),
    torch.sigmoid: (torch.tanh, F.softplus),
    torch.bmm: (torch.matmul,),
    "sum": ("mean", "amax", "prod", "cumsum"),
    "argsort": ("argmax",),
    "cumsum": ("cumprod",),
    "index_add": ("index_copy",),
    "index_add_": ("index_copy_",),
    "scatter_add": ("scatter",),
    "scatter_add_": ("scatter_",),
    "view": ("reshape",),
    "transpose": ("select", "unsqueeze"),
    "add_": ("mul_", "sub_", "copy_"),
    "repeat_interleave": ("repeat",),
}


def tensor_of(node: fx.Node) -> Tensor | None:
    """The fake tensor of a node, None for anything else."""
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None


def calls(graph: fx.Graph) -> list[fx.Node]:
    """Everything that computes."""
    return [node for node in graph.nodes if node.op in CALLS]


def with_tensors(graph: fx.Graph, floating: bool | None = None) -> list[fx.Node]:
    """Calls whose value is a tensor, of the wanted kind of number."""
    found = [(node, tensor_of(node)) for node in calls(graph)]
    return [n for n, t in found if t is not None and floating in (None, t.is_floating_point())]


def leaves(argument: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every leaf of nested arguments with the way to it."""
    if isinstance(argument, (tuple, list)):
        for number, item in enumerate(argument):
            yield from leaves(item, (*path, number))
    elif isinstance(argument, dict):
        for key, item in argument.items():
            yield from leaves(item, (*path, key))
    elif isinstance(argument, slice):
        for part in ("start", "stop", "step"):
            yield from leaves(getattr(argument, part), (*path, part))
    else:
        yield path, argument


def replaced(argument: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested arguments with one leaf replaced."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(argument, slice):
        parts = {part: getattr(argument, part) for part in ("start", "stop", "step")}
        parts[head] = replaced(parts[head], rest, value)
        return slice(parts["start"], parts["stop"], parts["step"])
    if isinstance(argument, dict):
        return {key: replaced(item, rest, value) if key == head else item for key, item in argument.items()}
    items = [replaced(item, rest, value) if number == head else item for number, item in enumerate(argument)]
    return tuple(items) if isinstance(argument, tuple) else items


def set_leaf(node: fx.Node, path: tuple[Any, ...], value: Any) -> None:
    node.args, node.kwargs = replaced((node.args, node.kwargs), path, value)


def random_leaf(graph: fx.Graph, rng: random.Random, wanted: Callable[[Any], bool]) -> tuple[fx.Node, Any, Any] | None:
    """A call, the way to one of its argument leaves, and the leaf."""
    found = [
        (node, path, leaf) for node in calls(graph) for path, leaf in leaves((node.args, node.kwargs)) if wanted(leaf)
    ]
    return rng.choice(found) if found else None


def random_operand(graph: fx.Graph, rng: random.Random) -> tuple[fx.Node, Any, fx.Node, Tensor] | None:
    """A call, the way to one of its tensor operands, the operand, and its fake tensor."""
    choice = random_leaf(graph, rng, lambda leaf: isinstance(leaf, fx.Node) and tensor_of(leaf) is not None)
    if choice is None:
        return None
    tensor = tensor_of(choice[2])
    assert tensor is not None
    return (*choice, tensor)


def swap_operands(graph: fx.Graph, rng: random.Random) -> str | None:
    places = []
    for node in calls(graph):
        nodes = [(path, leaf) for path, leaf in leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]
        if len({leaf for _, leaf in nodes}) > 1:
            places.append((node, nodes))
    if not places:
        return None
    node, nodes = rng.choice(places)
    (path, first), (other_path, second) = rng.sample(nodes, 2)
    set_leaf(node, path, second)
    set_leaf(node, other_path, first)
    return f"swap {first} and {second} in {node}"


def change_number(graph: fx.Graph, rng: random.Random) -> str | None:
    choice = random_leaf(graph, rng, lambda leaf: isinstance(leaf, (bool, int, float)))
    if choice is None:
        return None
    node, path, old = choice
    if isinstance(old, bool):
        new: Any = not old
    elif isinstance(old, int):
        new = rng.choice((old + 1, old - 1, 2 * old, -old, 0, 1, old // 2))
    else:
        new = rng.choice((old + 0.5, old * 1.5, -old, 0.0))
    if new == old:
        return None
    set_leaf(node, path, new)
    return f"{old} -> {new} in {node}"


def change_dtype(graph: fx.Graph, rng: random.Random) -> str | None:
    choice = random_leaf(graph, rng, lambda leaf: isinstance(leaf, torch.dtype))
    if choice is None:
        return None
    node, path, old = choice
    new = rng.choice([dtype for dtype in DTYPES if dtype != old])
    set_leaf(node, path, new)
    return f"{old} -> {new} in {node}"


def change_target(graph: fx.Graph, rng: random.Random) -> str | None:
    places = [node for node in calls(graph) if node.target in OTHER_TARGETS]
    if not places:
        return None
    node = rng.choice(places)
    old = node.target
    node.target = rng.choice(OTHER_TARGETS[old])
    return f"{old} -> {node.target} in {node}"


FLOAT_INSERTS = ("neg", "scale", "shift", "half", "relu", "clone", "detach", "flip_rows", "flip_last", "roll", "mT")
INTEGER_INSERTS = ("clone", "flip_rows", "roll", "clamp", "increment")


def inserted(graph: fx.Graph, kind: str, node: fx.Node, tensor: Tensor) -> fx.Node:
    """One operation on the node's value that keeps its shape and dtype."""
    make = graph.call_method
    if kind == "scale":
        return graph.call_function(operator.mul, (node, 1.25))
    if kind == "shift":
        return graph.call_function(operator.add, (node, 0.25))
    if kind == "half":
        return make("to", (make("to", (node, torch.float16)), tensor.dtype))
    if kind == "clamp":
        return make("clamp", (node,), {"max": 1})
    if kind == "increment":
        return graph.call_function(operator.mod, (graph.call_function(operator.add, (node, 1)), 4))
    if kind == "mT":
        return make("transpose", (node, -2, -1))
    arguments: dict[str, tuple[Any, ...]] = {"flip_rows": (0,), "flip_last": (-1,), "roll": (1, 0)}
    return make({"flip_rows": "flip", "flip_last": "flip"}.get(kind, kind), (node, *arguments.get(kind, ())))


def insert_call(graph: fx.Graph, rng: random.Random) -> str | None:
    choice = random_operand(graph, rng)
    if choice is None:
        return None
    node, path, source, tensor = choice
    kind = rng.choice(FLOAT_INSERTS if tensor.is_floating_point() else INTEGER_INSERTS)
    if (kind == "mT" and (tensor.dim() < 2 or tensor.shape[-1] != tensor.shape[-2])) or not tensor.dim():
        return None
    with graph.inserting_before(node):
        set_leaf(node, path, inserted(graph, kind, source, tensor))
    return f"{kind} of {source} for {node}"


def take_part(graph: fx.Graph, rng: random.Random) -> str | None:
    """An operand is only a part of what it was, or all of it twice; what an index picks, and a sum adds, follows."""
    choice = random_operand(graph, rng)
    if choice is None:
        return None
    node, path, source, tensor = choice
    places = [dim for dim, size in enumerate(tensor.shape) if isinstance(size, int) and size > 1]
    if not places:
        return None
    dim, kind = rng.choice(places), rng.choice(("half", "first", "twice"))
    with graph.inserting_before(node):
        if kind == "twice":
            part = graph.call_function(torch.cat, ([source, source], dim))
        else:
            part = graph.call_method("narrow", (source, dim, 0, 1 if kind == "first" else tensor.shape[dim] // 2))
        set_leaf(node, path, part)
    return f"{kind} along {dim} of {source} for {node}"


def alike(node: fx.Node, other: fx.Node) -> bool:
    a, b = tensor_of(node), tensor_of(other)
    return a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype


def drop_call(graph: fx.Graph, rng: random.Random) -> str | None:
    places = [(node, source) for node in calls(graph) for source in node.all_input_nodes if alike(node, source)]
    if not places:
        return None
    node, source = rng.choice(places)
    node.replace_all_uses_with(source)
    if mutates(node):
        graph.erase_node(node)
    return f"drop {node}, use {source}"


def rewire(graph: fx.Graph, rng: random.Random) -> str | None:
    order = {node: number for number, node in enumerate(graph.nodes)}
    places = []
    for node in calls(graph):
        for path, leaf in leaves((node.args, node.kwargs)):
            if isinstance(leaf, fx.Node):
                places += [
                    (node, path, leaf, other)
                    for other in graph.nodes
                    if other is not leaf and order[other] < order[node] and alike(leaf, other)
                ]
    if not places:
        return None
    node, path, leaf, other = rng.choice(places)
    set_leaf(node, path, other)
    return f"{leaf} -> {other} in {node}"


def mutate(graph: fx.Graph, rng: random.Random) -> str | None:
    nodes = list(graph.nodes)
    places = [node for node in nodes if (tensor := tensor_of(node)) is not None and tensor.dim()]
    if not places:
        return None
    source = rng.choice(places)
    tensor = tensor_of(source)
    assert tensor is not None
    later = [node for node in nodes[nodes.index(source) + 1 :] if node.op in (*CALLS, "output")]
    if not later:
        return None
    place = rng.choice(later)
    with graph.inserting_before(place):
        alias = source
        leaf = source.op == "placeholder" and tensor.requires_grad
        kind = rng.choice(("itself", "detached", "flat", "row", "transposed"))
        if leaf or kind == "detached":
            alias = graph.call_method("detach", (alias,))
        if kind == "flat" and tensor.is_contiguous():
            alias = graph.call_method("view", (alias, -1))
        elif kind == "row":
            alias = graph.call_function(operator.getitem, (alias, 0))
        elif kind == "transposed" and tensor.dim() > 1:
            alias = graph.call_method("transpose", (alias, 0, 1))
        if tensor.is_floating_point():
            method, *arguments = rng.choice((("mul_", 1.5), ("add_", 0.5), ("zero_",), ("neg_",), ("tanh_",)))
        else:
            method, *arguments = rng.choice((("clamp_", 0, 1), ("zero_",), ("bitwise_xor_", 1)))
        graph.call_method(str(method), (alias, *arguments))
    return f"{method} on {source} ({kind}) before {place}"


def add_output(graph: fx.Graph, rng: random.Random) -> str | None:
    output = next(iter(graph.find_nodes(op="output")))
    places = with_tensors(graph)
    if not places or not isinstance(output.args[0], (tuple, list)):
        return None
    node = rng.choice(places)
    output.args = ((*output.args[0], node),)
    return f"return {node}"


def duplicate(graph: fx.Graph, rng: random.Random) -> str | None:
    places = [node for node in calls(graph) if node.users and not mutates(node)]
    if not places:
        return None
    node = rng.choice(places)
    user = rng.choice(list(node.users))
    with graph.inserting_after(node):
        copy = graph.node_copy(node, lambda other: other)
    user.replace_input_with(node, copy)
    return f"compute {node} again for {user}"


def move(graph: fx.Graph, rng: random.Random) -> str | None:
    nodes = calls(graph)
    if not nodes:
        return None
    node = rng.choice(nodes)
    order = {other: number for number, other in enumerate(graph.nodes)}
    first = max([order[source] for source in node.all_input_nodes], default=-1)
    last = min([order[user] for user in node.users], default=len(order) - 1)
    places = [
        other
        for other in graph.nodes
        if first < order[other] <= last and other is not node and other.op != "placeholder" and other is not node.next
    ]
    if not places:
        return None
    place = rng.choice(places)
    place.prepend(node)
    return f"move {node} before {place}"


def gradient_border(graph: fx.Graph, rng: random.Random) -> str | None:
    nodes = calls(graph)
    if len(nodes) < 2:
        return None
    first, last = sorted(rng.sample(range(len(nodes)), 2))
    for place, enabled in ((first, False), (last, True)):
        with graph.inserting_before(nodes[place]):
            graph.call_function(torch._C._set_grad_enabled, (enabled,))
    return f"no gradients from {nodes[first]} to {nodes[last]}"


def mutates(node: fx.Node) -> bool:
    """Whether a call may write one of its arguments, or the interpreter's state."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    written = name in ("setitem", "_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_assert_scalar", "_check")
    operators = name.startswith("i") and hasattr(operator, name) and name[1:] in dir(operator) and len(name) > 2
    return in_place or written or operators or "out" in node.kwargs or bool(node.kwargs.get("inplace"))


EDITS: tuple[tuple[int, Edit], ...] = (
    (3, swap_operands),
    (6, change_number),
    (2, change_dtype),
    (3, change_target),
    (5, insert_call),
    (4, take_part),
    (3, drop_call),
    (6, rewire),
    (4, mutate),
    (1, add_output),
    (1, duplicate),
    (2, move),
    (1, gradient_border),
)
