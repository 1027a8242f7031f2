"""The vocabulary of mask proofs: symbols for tensor axes, atoms of boolean conditions and symbolic tensor elements.

A mask element is an expression over one symbol per axis, named from the right as attention names them: ``j`` (key),
``i`` (query row), ``h`` (head), ``b`` (batch). Naming from the right makes broadcasting free: only axes of size 1 need
care, and an element never mentions the symbol of such an axis (its index is 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import sympy
import torch
from sympy.core.symbol import Str
from sympy.logic.boolalg import Boolean
from torch import fx
from torch.utils._sympy.functions import Max, Min

Scalar: TypeAlias = int | float | bool


@cache
def axis(from_right: int) -> sympy.Symbol:
    """The index symbol of the axis ``from_right`` places from the last one (0 is ``j``, 1 is ``i``)."""
    name = "jihb"[from_right] if from_right < 4 else f"x{from_right}"
    return sympy.Symbol(name, integer=True, nonnegative=True)


KEY, QUERY, HEAD, BATCH = (axis(n) for n in range(4))


@cache
def hidden_axis(level: int) -> sympy.Symbol:
    """The index symbol of the dimension that ``vmap`` hides at nesting ``level``."""
    return sympy.Symbol(f"v{level}", integer=True, nonnegative=True)


def example(node: fx.Node) -> Any:
    """The traced value of a node: a FakeTensor, SymInt, number, or None where nothing was recorded."""
    return node.meta.get("example_value", node.meta.get("val"))


def symbolic(value: Any) -> sympy.Expr:
    """The integer ``value`` (int, SymInt, sympy expression, or FX node that holds one) as a sympy expression.

    Raises:
        TypeError: the value is not an integer.
    """
    if isinstance(value, fx.Node):
        value = example(value)
    if isinstance(value, torch.SymInt):
        expr = getattr(value.node, "expr", None)  # nested-tensor sizes have none
        if expr is None:
            raise TypeError(f"not an integer expression: {value!r}")
        return _decide(sympy.sympify(expr), value.node.shape_env)
    if isinstance(value, int) and not isinstance(value, bool):
        return sympy.Integer(value)
    if isinstance(value, sympy.Expr) and value.is_integer:
        return value
    raise TypeError(f"not an integer: {value!r}")


def _decide(expr: sympy.Expr, shape_env: Any) -> sympy.Expr:
    """``expr`` without the maxima and minima whose outcome the graph's own guards settle. The position of a sliding
    cache's first key is ``max(0, seen - window + 1)``, and whether the cache is full was guarded."""
    for choice in sorted(expr.atoms(Max, Min), key=sympy.count_ops):
        sign = 1 if isinstance(choice, Max) else -1
        for taken in choice.args:
            if all(shape_env.bound_sympy(sign * (taken - other)).lower >= 0 for other in choice.args):
                expr = expr.xreplace({choice: taken})
                break
    return expr


def same(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Whether two integer expressions are provably equal."""
    return bool(left == right or sympy.expand(left - right) == 0)


def provably_nonnegative(expr: sympy.Expr) -> bool:
    """Whether an integer expression is at least 0 for every value that its symbols' assumptions allow."""
    if expr.is_nonnegative:
        return True
    # sympy does not see that s + t - 2 >= 0 for positive s, t; written in s - 1 and t - 1 it is obvious.
    shift = {s: sympy.Dummy(integer=True, nonnegative=True) + 1 for s in expr.free_symbols if s.is_positive}
    if not shift:
        return False
    shifted = sympy.expand(expr.xreplace(shift))
    return all(term.is_nonnegative for term in sympy.Add.make_args(shifted))


def minimum(expr: sympy.Expr, sizes: Mapping[sympy.Symbol, sympy.Expr]) -> sympy.Expr | None:
    """A lower bound of ``expr`` (linear in axis symbols) over all indices below ``sizes``; None if there is none."""
    for symbol, size in sizes.items():
        if symbol not in expr.free_symbols:
            continue
        slope = expr.coeff(symbol, 1)
        rest = sympy.expand(expr - slope * symbol)
        if symbol in rest.free_symbols or symbol in slope.free_symbols:
            return None
        if provably_nonnegative(slope):
            expr = rest
        elif provably_nonnegative(-slope):
            expr = sympy.expand(rest + slope * (size - 1))
        else:
            return None
    return expr


def always_nonnegative(expr: sympy.Expr, sizes: Mapping[sympy.Symbol, sympy.Expr]) -> bool:
    """Whether ``expr`` is provably at least 0 at every index below ``sizes``."""
    lowest = minimum(expr, sizes)
    return lowest is not None and provably_nonnegative(lowest)


class _OfTensor(sympy.Basic):  # type: ignore[misc]  # sympy has no type information
    """Something about one element ``node[index]`` of a tensor of the graph."""

    def __new__(cls, name: Any, *index: sympy.Expr) -> Any:
        return super().__new__(cls, name if isinstance(name, Str) else Str(name), *index)

    @property
    def name(self) -> str:
        return str(self.args[0].name)

    @property
    def index(self) -> tuple[sympy.Expr, ...]:
        return tuple(self.args[1:])

    def _sympystr(self, printer: Any) -> str:
        return f"{self.name}[{', '.join(printer._print(e) for e in self.index)}]"


class Value(_OfTensor, sympy.Expr):  # type: ignore[misc]
    """The integer ``node[index]``."""

    is_integer = True
    is_commutative = True


class Quotient(sympy.Expr):  # type: ignore[misc]  # sympy has no type information
    """The integer ``floor(dividend / divisor)`` with a positive divisor."""

    is_integer = True
    is_commutative = True

    def __new__(cls, dividend: sympy.Expr, divisor: sympy.Expr) -> Any:
        dividend, divisor = sympy.expand(dividend), sympy.expand(divisor)
        if dividend.is_Integer and divisor.is_Integer:
            return sympy.Integer(int(dividend) // int(divisor))
        return super().__new__(cls, dividend, divisor)

    def _sympystr(self, printer: Any) -> str:
        return f"(({printer._print(self.args[0])}) // {printer._print(self.args[1])})"


def has_data(expr: sympy.Basic) -> bool:
    """Whether an expression or condition depends on what tensors of the graph hold, or on quotients of positions."""
    return bool(expr.has(Value, Quotient, Live))


class AtLeastZero(Boolean):  # type: ignore[misc]  # sympy has no type information
    """The atom ``expr >= 0`` over integers. Every comparison of positions takes this one form."""

    def __new__(cls, expr: sympy.Expr) -> Any:
        expr = sympy.expand(expr)
        if expr.is_Integer:
            return sympy.true if expr >= 0 else sympy.false
        return super().__new__(cls, expr)

    @property
    def expr(self) -> sympy.Expr:
        return self.args[0]

    def _sympystr(self, printer: Any) -> str:
        key = self.expr.coeff(KEY, 1)
        if key in (1, -1):
            # e = key * j + rest, so e >= 0 reads j <= rest or -rest <= j.
            rest = sympy.expand(self.expr - key * KEY)
            return f"({KEY} <= {printer._print(rest)})" if key == -1 else f"({printer._print(-rest)} <= {KEY})"
        return f"(0 <= {printer._print(self.expr)})"


class Equal(Boolean):  # type: ignore[misc]  # sympy has no type information
    """The atom ``expr == 0`` over integers, of which some are data. Positions alone make two ``AtLeastZero``."""

    def __new__(cls, expr: sympy.Expr) -> Any:
        expr = sympy.expand(expr)
        if not has_data(expr):
            return sympy.And(AtLeastZero(expr), AtLeastZero(-expr))
        return super().__new__(cls, min(expr, sympy.expand(-expr), key=sympy.default_sort_key))

    @property
    def expr(self) -> sympy.Expr:
        return self.args[0]

    def _sympystr(self, printer: Any) -> str:
        terms = sympy.Add.make_args(self.expr)
        left = [t for t in terms if not t.could_extract_minus_sign()]
        right = [-t for t in terms if t.could_extract_minus_sign()]
        return f"({printer._print(sympy.Add(*left))} == {printer._print(sympy.Add(*right))})"


class Live(_OfTensor, Boolean):  # type: ignore[misc]
    """The atom ``node[index] != 0``: what only the data decides."""


@dataclass(frozen=True)
class Truth:
    """A bool element."""

    condition: Boolean


@dataclass(frozen=True)
class Position:
    """An int32 or int64 element that is an exact expression of indices, sizes and integers of the graph's tensors.

    Positions, ids and token counts are far from what the dtype holds, so that sums of two do not overflow.
    """

    expr: sympy.Expr


@dataclass(frozen=True)
class Cases:
    """A numeric element that takes one of a few constants: ``(value, when)`` pairs, disjoint and exhaustive."""

    items: tuple[tuple[Scalar, Boolean], ...]


@dataclass(frozen=True)
class Datum:
    """A numeric element that is zero exactly where the integer tensor ``node`` is zero at ``index``.

    With ``integral`` False the node holds floats, of which nothing is known. An element of an integer dtype is the
    node's value itself.
    """

    name: str
    index: tuple[sympy.Expr, ...]
    integral: bool


Element: TypeAlias = Truth | Position | Cases | Datum


@dataclass(frozen=True)
class SymbolicTensor:
    """A tensor as a function of its indices: ``shape`` in sympy expressions, ``element`` over the axis symbols."""

    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    element: Element


def reindex(element: Element, mapping: Mapping[sympy.Symbol, sympy.Expr]) -> Element:
    """``element`` with every axis symbol replaced at once."""
    changes = {old: new for old, new in mapping.items() if old != new}
    if not changes:
        return element
    if isinstance(element, Truth):
        return Truth(element.condition.xreplace(changes))
    if isinstance(element, Position):
        return Position(sympy.expand(element.expr.xreplace(changes)))
    if isinstance(element, Cases):
        return Cases(tuple((value, when.xreplace(changes)) for value, when in element.items))
    return Datum(element.name, tuple(sympy.expand(e.xreplace(changes)) for e in element.index), element.integral)
