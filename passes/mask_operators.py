"""How operators are named, and what a transfer function is given: the node's arguments, read or bound by name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._functorch import predispatch

from mmi_compile.passes.mask_aliasing import is_in_place
from mmi_compile.passes.mask_elements import Operand, Unread
from mmi_compile.passes.mask_symbols import Element, Scalar, SymbolicTensor, example, symbolic

_ALIASES = {
    "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "equal_to": "eq", "not_equal": "ne",
    "subtract": "sub", "multiply": "mul", "negative": "neg", "bitwise_and": "and_", "bitwise_or": "or_",
    "bitwise_xor": "xor", "bitwise_not": "invert", "iadd": "add", "isub": "sub", "imul": "mul", "iand": "and_",
    "ior": "or_", "ixor": "xor", "inv": "invert", "__and__": "and_", "__rand__": "and_", "__or__": "or_",
    "__ror__": "or_", "__xor__": "xor", "__rxor__": "xor", "__radd__": "add", "__rmul__": "mul", "__rsub__": "rsub",
    "floor_divide": "floordiv", "ifloordiv": "floordiv",
}  # fmt: skip
_OTHERS: dict[Any, str] = {
    torch.ops.aten.index: "index",
    torch.ops.aten.index.Tensor: "index",
    **{
        getattr(predispatch, name): name
        for name in ("_add_batch_dim", "_remove_batch_dim")
        if hasattr(predispatch, name)
    },
}
"""What masks are made with under ``torch.vmap``."""


def operator_name(node: fx.Node) -> str:
    """The one name under which an operator is known here, however it was spelled; "" for anything unknown."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        if isinstance(node.target, Hashable) and node.target in _OTHERS:
            return _OTHERS[node.target]
        name = str(getattr(node.target, "__name__", ""))
        spaces = (operator, torch, torch.Tensor)
        if not any(getattr(space, name, None) is node.target for space in spaces):
            return ""  # another library's function of the same name may mean anything
    else:
        return ""
    if name in _ALIASES:
        return _ALIASES[name]
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        return {"iadd": "add", "isub": "sub", "imul": "mul", "iand": "and_", "ior": "or_"}.get(name, name)
    if is_in_place(node):
        name = name[:-1]
        name = f"{name}_" if name in ("and", "or") else name
    return _ALIASES.get(name, name)


class Operands:
    """What the arguments of nodes are, as far as tensors have been read."""

    def __init__(self, known: Mapping[fx.Node, SymbolicTensor]) -> None:
        self._known = known

    def read(self, arg: Any) -> Operand:
        """An argument: a tensor that was read before, a Python number, or an integer over the shape symbols."""
        if isinstance(arg, fx.Node):
            if arg in self._known:
                return self._known[arg]
            arg = example(arg)
        if isinstance(arg, (bool, int, float)):
            number: Scalar = arg
            return number
        try:
            return symbolic(arg)
        except TypeError:
            raise Unread(f"argument {arg!r} is not understood") from None

    def tensor(self, arg: Any) -> SymbolicTensor:
        """An argument that has to be a tensor."""
        found = self.read(arg)
        if not isinstance(found, SymbolicTensor):
            raise Unread("a number where a tensor was expected")
        return found

    def integer(self, arg: Any) -> sympy.Expr:
        """An argument that has to be an integer known at compile time or in terms of the shape symbols."""
        found = self.read(arg)
        if isinstance(found, (bool, float, SymbolicTensor)):
            raise Unread("an argument is not an integer of the graph's sizes")
        return sympy.sympify(found)


Transfer = Callable[[Operands, fx.Node, SymbolicTensor], Element]


class Transfers(dict[str, Transfer]):
    """Transfer functions by operator name: from a node's operands to the elements of its result.

    The last argument is the result with itself as its element; its shape and dtype are those of the traced value.
    """

    def of(self, *names: str) -> Callable[[Transfer], Transfer]:
        """Register the decorated function for ``names``."""

        def register(function: Transfer) -> Transfer:
            self.update(dict.fromkeys(names, function))
            return function

        return register


def bind(node: fx.Node, names: str, **defaults: Any) -> list[Any]:
    """The arguments of a node in the order of ``names`` (self first); anything unexpected is not read."""
    order = names.split()
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "dtype", "layout", "pin_memory")}
    if kwargs.get("requires_grad") is False:
        kwargs.pop("requires_grad")
    bound = dict(zip(order, node.args, strict=False)) | {{"self": "input"}.get(k, k): v for k, v in kwargs.items()}
    if len(node.args) > len(order) or set(bound) - set(order) or len(bound) != len(node.args) + len(kwargs):
        raise Unread("unexpected arguments")
    missing = [name for name in order if name not in bound and name not in defaults]
    if missing:
        raise Unread(f"argument {missing[0]} is missing")
    return [bound[name] if name in bound else defaults[name] for name in order]
