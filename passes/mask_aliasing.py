"""Which tensors of a graph are changed in place, so that proofs about their values would be stale."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from mmi_compile.passes.mask_symbols import example
from mmi_compile.passes.nodes import storage_of

# What may return its own input, or a view of it.
VIEWS = frozenset(
    [
        "getitem", "view", "view_as", "reshape", "reshape_as", "expand", "expand_as", "broadcast_to",
        "transpose", "permute", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "unsqueeze", "squeeze",
        "flatten", "unflatten", "ravel", "contiguous", "to", "type", "type_as", "float", "half", "bfloat16",
        "double", "bool", "int", "long", "short", "byte", "char", "cpu", "cuda", "detach", "chunk", "split",
        "tensor_split", "unbind", "narrow", "select", "diagonal", "as_strided", "unfold", "getattr", "real",
        "positive", "adjoint", "tile", "repeat", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors",
    ]
)  # fmt: skip
_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in [
        "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift",
        "isub", "itruediv", "ixor",
    ]
)  # fmt: skip


def is_in_place(node: fx.Node) -> bool:
    """Whether a node changes its first argument and returns it (``x.tril_()``, ``x &= y``)."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name != "__invert__")
    if node.op != "call_function":
        return False
    if node.target in _IN_PLACE_OPERATORS:
        return True
    name = getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__") and not hasattr(operator, name)


def changed(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments whose data a node may change; where in doubt, they are included."""
    if is_in_place(node):
        yield from (a for a in node.args[:1] if isinstance(a, fx.Node))
    elif node.op == "call_module":
        yield from node.all_input_nodes
    elif node.op == "call_function":
        yield from _changed_by_function(node)
    out = node.kwargs.get("out")
    yield from _nodes_in(out)


def _changed_by_function(node: fx.Node) -> Iterator[fx.Node]:
    target: Any = node.target
    if target is torch.ops.higher_order.flex_attention:
        return  # runs functions of indices and scores, which have nothing to write to
    if isinstance(target, torch._ops.HigherOrderOperator):
        yield from node.all_input_nodes
    elif isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable:
            yield from node.all_input_nodes
    elif isinstance(target, torch._ops.OpOverloadPacket):
        if any(_may_change(getattr(target, name)._schema) for name in target.overloads()):
            yield from node.all_input_nodes
    elif target is operator.setitem or _asks_in_place(node):
        yield from (a for a in node.args[:1] if isinstance(a, fx.Node))


def _may_change(schema: torch._C.FunctionSchema) -> bool:
    """Whether an overload writes to an argument other than ``out=``, which ``changed`` looks at for every call."""
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return schema.is_mutable and not (written and all(a.kwarg_only and a.name == "out" for a in written))


def _asks_in_place(node: fx.Node) -> bool:
    functional = getattr(node.target, "__module__", None) == "torch.nn.functional"
    return bool(node.kwargs.get("inplace")) or (functional and any(a is True for a in node.args))


def _nodes_in(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _nodes_in(item)


class Changes:
    """The tensors of one graph that some node changes in place, views of them included.

    A change whose target is a fresh tensor with no other reader (``torch.zeros(n).fill_(1)``) is no change to worry
    about: reading its result as that of the plain operator is exact. ``fresh`` tells which operators make tensors.
    """

    def __init__(self, graph: fx.Graph, fresh: frozenset[str]) -> None:
        self._fresh = fresh
        seeds = [target for node in graph.nodes for target in changed(node) if not self._is_linear(node, target)]
        self._nodes = self._aliases(seeds)
        self._storages = {key for node in self._nodes if (key := _storage(node)) is not None}

    def touch(self, node: fx.Node) -> bool:
        """Whether the data of ``node`` may change between its making and the end of the graph."""
        if not self._nodes:
            return False
        return node in self._nodes or _storage(node) in self._storages

    def _is_linear(self, node: fx.Node, target: fx.Node) -> bool:
        if not is_in_place(node) or len(target.users) != 1 or node.args.count(target) != 1:
            return False
        return is_in_place(target) or _short_name(target) in self._fresh

    def _aliases(self, seeds: list[fx.Node]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        stack = list(seeds)
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            if is_in_place(node) or _short_name(node) in VIEWS:
                stack.extend(a for a in node.args[:1] if isinstance(a, fx.Node))
            stack.extend(u for u in node.users if is_in_place(u) or _short_name(u) in VIEWS)
        return found


def _short_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _storage(node: fx.Node) -> int | None:
    value = example(node)
    return storage_of(value) if isinstance(value, torch.Tensor) else None
