"""Operators that work element by element: arithmetic, comparisons, connectives and choices."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import product
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from mmi_compile.passes.mask_elements import (
    EXACT_INTEGERS,
    MAX_CASES,
    Operand,
    Unread,
    align,
    cases_of,
    compare,
    compute,
    constant,
    exact,
    join,
    truth_of,
    value_of,
)
from mmi_compile.passes.mask_operators import Operands, Transfers, bind, operator_name
from mmi_compile.passes.mask_symbols import (
    Datum,
    Element,
    Live,
    Quotient,
    SymbolicTensor,
    Truth,
    has_data,
    provably_nonnegative,
)

POINTWISE = Transfers()
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


@POINTWISE.of("where")
def _where(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    if node.op == "call_method":
        chosen, when, other = bind(node, "input condition other")
    else:
        when, chosen, other = bind(node, "condition input other")
    return _choose(operands, when, chosen, other, out, torch.where)


@POINTWISE.of("masked_fill")
def _masked_fill(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    other, when, value = bind(node, "input mask value")

    def fill(mask: torch.Tensor, chosen: Any, base: torch.Tensor) -> torch.Tensor:
        return base.masked_fill(mask, chosen)

    return _choose(operands, when, value, other, out, fill)


def _choose(
    operands: Operands, when: Any, chosen: Any, other: Any, out: SymbolicTensor, function: Callable[..., torch.Tensor]
) -> Element:
    mask = align(operands.tensor(when), out.shape)
    if mask.dtype is not torch.bool:
        raise Unread("the condition is not bool")
    yes, no = (_branches(operands.read(arg), out.shape) for arg in (chosen, other))
    condition = constant(True, operands.tensor(when)), constant(False, operands.tensor(when))
    pairs = [
        (compute(function, [condition[0], v, no[0][0]], out.dtype), sympy.And(truth_of(mask), c)) for v, c in yes
    ] + [
        (compute(function, [condition[1], yes[0][0], v], out.dtype), sympy.And(sympy.Not(truth_of(mask)), c))
        for v, c in no
    ]
    return join(pairs, out.dtype)


def _branches(operand: Operand, shape: tuple[sympy.Expr, ...]) -> list[tuple[Any, Boolean]]:
    """The possible concrete arguments and when each applies."""
    if isinstance(operand, SymbolicTensor):
        return [(constant(v, operand), when) for v, when in cases_of(align(operand, shape))]
    if isinstance(operand, sympy.Expr):
        if not operand.is_Integer:
            raise Unread("a size among constants")
        operand = int(operand)
    return [(operand, sympy.true)]


def _rsub(left: Any, right: Any) -> Any:
    return right - left


_POINTWISE: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "neg", "floordiv", "and_", "or_", "xor", "invert", *_COMPARISONS)
} | {
    "rsub": _rsub, "logical_and": torch.logical_and, "logical_or": torch.logical_or, "logical_not": torch.logical_not,
    "logical_xor": torch.logical_xor, "minimum": torch.minimum, "maximum": torch.maximum, "log": torch.log,
}  # fmt: skip
_INTEGER: dict[str, Callable[..., sympy.Expr]] = {
    "add": operator.add, "sub": operator.sub, "rsub": _rsub, "mul": operator.mul, "neg": operator.neg,
}  # fmt: skip


@POINTWISE.of(*_POINTWISE)
def _pointwise(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    name = operator_name(node)
    unary = name in ("neg", "invert", "logical_not", "log")
    values = [operands.read(a) for a in bind(node, "input" if unary else "input other")]
    aligned = [align(x, out.shape) if isinstance(x, SymbolicTensor) else x for x in values]
    for read in (_boolean, _liveness, _integer):
        element = read(name, aligned, out)
        if element is not None:
            return element
    pairs = []
    for combination in product(*(_branches_in_place(x, out.shape) for x in values)):
        value = compute(_POINTWISE[name], [v for v, _ in combination], out.dtype)
        pairs.append((value, sympy.And(*(when for _, when in combination))))
    return join(pairs, out.dtype)


def _branches_in_place(operand: Operand, shape: tuple[sympy.Expr, ...]) -> list[tuple[Any, Boolean]]:
    found = _branches(operand, shape)
    if len(found) > MAX_CASES:
        raise Unread("too many distinct values")
    return found


_CONNECTIVES: dict[str, Callable[..., Boolean]] = {
    "and_": sympy.And, "or_": sympy.Or, "invert": sympy.Not, "logical_and": sympy.And, "logical_or": sympy.Or,
    "logical_not": sympy.Not,
}  # fmt: skip


def _boolean(name: str, operands: list[Operand], out: SymbolicTensor) -> Element | None:
    """Connectives on bool tensors, without going through truth tables; the logical ones on anything."""
    if name not in _CONNECTIVES or out.dtype is not torch.bool:
        return None
    tensors = [x for x in operands if isinstance(x, SymbolicTensor)]
    if len(tensors) != len(operands):
        return None
    return Truth(_CONNECTIVES[name](*(truth_of(x) for x in tensors)))


def _integer(name: str, operands: list[Operand], out: SymbolicTensor) -> Element | None:
    """Exact arithmetic and comparison of positions."""
    exprs = [value_of(x) for x in operands]
    values = [e for e in exprs if e is not None]
    if len(values) != len(exprs):
        return None
    if name in _COMPARISONS:
        return Truth(compare(name, values[0], values[1]))
    if out.dtype not in EXACT_INTEGERS:
        return None
    if name == "floordiv" and provably_nonnegative(values[1] - 1) and not has_data(values[1]):
        return exact(Quotient(*values), out.dtype)
    if name not in _INTEGER or (name == "mul" and any(has_data(value) for value in values)):
        return None
    return exact(_INTEGER[name](*values), out.dtype)


def _liveness(name: str, operands: list[Operand], out: SymbolicTensor) -> Element | None:
    """``data == 0`` and ``data != 0``: the only comparisons of unknown integers that mean liveness."""
    data, zero = operands[0], operands[-1]
    if name not in ("eq", "ne") or not isinstance(data, SymbolicTensor) or not isinstance(zero, (int, float)):
        return None
    element = data.element
    if not isinstance(element, Datum) or not element.integral or zero != 0:
        return None
    live = Live(element.name, *element.index)
    return Truth(live if name == "ne" else sympy.Not(live))
