"""Small questions that several passes ask of FX nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx


def value_of(node: Any) -> Any:
    """The example value Dynamo recorded for a node (a FakeTensor, a SymInt, …); constants are their own value."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def tensor_of(node: Any) -> torch.Tensor | None:
    """The example value where it is a tensor; None for sizes, tuples and values Dynamo did not record."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def same(a: Any, b: Any) -> bool:
    """Are two sizes (int or SymInt) equal for *every* input, not just for this example? Adds no guard."""
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        left = a.node.expr if isinstance(a, torch.SymInt) else a
        right = b.node.expr if isinstance(b, torch.SymInt) else b
        return bool((left - right) == 0)
    return bool(a == b)


def has_room(room: int | torch.SymInt) -> bool:
    """Is ``room`` at least 0 in the traced call? The graph is then guarded to run for calls of the same kind only:
    positions below 0 and caches that overflow are no prompts. False where it depends on data."""
    if isinstance(room, torch.SymInt) and not room.node.has_hint():
        return False
    return bool(room >= 0)


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Are two shapes equal for every input? Adds no guard."""
    return a.dim() == b.dim() and all(same(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def storage_of(tensor: torch.Tensor) -> int | None:
    """Which memory a traced tensor stands for; None for sparse and nested tensors, which have none of their own.

    Inside a transform such as ``vmap`` the traced value wraps the tensor that has the memory.
    """
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None


def hidden_levels(tensor: torch.Tensor) -> list[int]:
    """The nesting levels of ``vmap`` at which a traced tensor has a dimension that its shape does not show."""
    functorch, levels = torch._C._functorch, []
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            levels.append(int(functorch.maybe_get_level(tensor)))
        tensor = functorch.get_unwrapped(tensor)
    return levels


def is_call(node: Any, functions: tuple[Any, ...] = (), methods: tuple[str, ...] = ()) -> bool:
    """Is ``node`` a call of one of these functions, or of one of these tensor methods?"""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_function":
        return any(node.target is function or node.target == function for function in functions)
    return node.op == "call_method" and node.target in methods


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def node_argument(node: fx.Node, position: int, name: str) -> fx.Node | None:
    """An argument of a call that is the value of another node; None where it is a constant or missing."""
    value = argument(node, position, name)
    return value if isinstance(value, fx.Node) else None


def operands(node: fx.Node, *names: str) -> tuple[Any, ...] | None:
    """The arguments called ``names`` of a call that has these and no others, however they were passed."""
    if len(node.args) + len(node.kwargs) != len(names) or any(name not in names for name in node.kwargs):
        return None
    return tuple(argument(node, i, name) for i, name in enumerate(names))


def insert_call(before: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call and compute its example value from those of its arguments, so that later passes and
    AOTAutograd's cache can see what it is."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    fake_args, fake_kwargs = fx.node.map_arg((args, kwargs), lambda n: n.meta.get("example_value"))
    mode = _fake_mode(graph)
    with mode if mode is not None else torch.no_grad(), torch.no_grad(), _autocast_at(before):
        node.meta["example_value"] = target(*fake_args, **fake_kwargs)
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in before.meta:
            node.meta[key] = before.meta[key]
    return node


@contextmanager
def _autocast_at(node: fx.Node) -> Iterator[None]:
    """The autocast regions of the graph that are open where ``node`` runs; those around the graph hold anyway."""
    enter, leave = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
    entries = node.graph.find_nodes(op="call_function", target=enter)
    if not entries:
        yield
        return
    open_regions: dict[fx.Node, tuple[Any, ...]] = {}
    for other in node.graph.nodes:
        if other is node:
            break
        if other.op == "call_function" and other.target is enter:
            open_regions[other] = other.args
        elif other.op == "call_function" and other.target is leave:
            open_regions.pop(other.args[0], None)
    with ExitStack() as regions:
        for arguments in open_regions.values():
            regions.callback(leave, enter(*arguments))
        yield


def is_autocast(node: fx.Node, device: torch.device) -> bool:
    """Does ``node`` run under autocast for this kind of device?"""
    with _autocast_at(node):
        return torch.is_autocast_enabled(device.type)


def _fake_mode(graph: fx.Graph) -> Any:
    from torch._subclasses.fake_tensor import FakeTensor

    for node in graph.nodes:
        value = value_of(node)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None
