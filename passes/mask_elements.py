"""What one operator does to the elements of symbolic tensors: constants by torch itself, positions exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mmi_compile.passes.mask_symbols import (
    AtLeastZero,
    Cases,
    Datum,
    Element,
    Equal,
    Live,
    Position,
    Scalar,
    SymbolicTensor,
    Truth,
    Value,
    axis,
    has_data,
    same,
)

MAX_CASES = 16
EXACT_INTEGERS = (torch.int32, torch.int64)
Operand: TypeAlias = SymbolicTensor | Scalar | sympy.Expr


class Unread(Exception):
    """A transfer function cannot say what the elements are; the message says why."""


def axes(shape: tuple[sympy.Expr, ...]) -> tuple[sympy.Expr, ...]:
    """The index of each dimension: its axis symbol, or 0 where the size is 1."""
    return tuple(sympy.Integer(0) if size == 1 else axis(len(shape) - 1 - n) for n, size in enumerate(shape))


def compute(function: Callable[..., Any], args: list[Any], dtype: torch.dtype) -> Scalar:
    """One element, computed by torch itself, so that promotion, rounding and overflow are exactly torch's."""
    try:
        with unset_fake_temporarily(), torch.no_grad():
            result = function(*args)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise Unread(f"torch refuses the constants ({str(error).splitlines()[0]})") from None
    if result.dtype is not dtype:
        raise Unread(f"constants compute in {result.dtype}, the graph in {dtype}")
    value: Scalar = result.item()
    if value != value:
        raise Unread("makes NaN")
    return value


def constant(value: Scalar, like: SymbolicTensor) -> torch.Tensor:
    """A tensor of one element that promotes as ``like`` does (0-d tensors promote differently)."""
    with unset_fake_temporarily():
        return torch.full((1,) if like.shape else (), value, dtype=like.dtype, device="cpu")


def join(pairs: Iterable[tuple[Scalar, Boolean]], dtype: torch.dtype) -> Element:
    """The element that has each value where its condition holds; the conditions are disjoint and exhaustive."""
    merged: dict[Scalar, Boolean] = {}
    for value, when in pairs:
        if when != sympy.false:
            merged[value] = sympy.Or(merged.get(value, sympy.false), when)
    if dtype is torch.bool:
        return Truth(merged.get(True, sympy.false))
    if len(merged) > MAX_CASES:
        raise Unread("too many distinct values")
    return Cases(tuple(merged.items()))


def cases_of(tensor: SymbolicTensor) -> tuple[tuple[Scalar, Boolean], ...]:
    """The constants that the elements take, and when; raises ``Unread`` for anything else."""
    element = tensor.element
    if isinstance(element, Cases):
        return element.items
    if isinstance(element, Truth):
        return ((True, element.condition), (False, sympy.Not(element.condition)))
    if isinstance(element, Position) and element.expr.is_Integer and tensor.dtype in EXACT_INTEGERS:
        return ((int(element.expr), sympy.true),)
    raise Unread("depends on more than a few constants")


def position_of(operand: Operand) -> sympy.Expr | None:
    """The operand as an exact integer expression, or None."""
    if isinstance(operand, (bool, float)):
        return None
    if not isinstance(operand, SymbolicTensor):
        return sympy.sympify(operand)
    if operand.dtype not in EXACT_INTEGERS:
        return None
    if isinstance(operand.element, Position):
        return operand.element.expr
    if isinstance(operand.element, Cases) and len(operand.element.items) == 1:
        return sympy.Integer(int(operand.element.items[0][0]))
    return None


def value_of(operand: Operand) -> sympy.Expr | None:
    """The operand as an exact integer expression in which data may stand, or None."""
    expr = position_of(operand)
    if expr is None and isinstance(operand, SymbolicTensor) and operand.dtype in EXACT_INTEGERS:
        element = operand.element
        if isinstance(element, Datum) and element.integral:
            return Value(element.name, *element.index)
    return expr


def exact(expr: sympy.Expr, dtype: torch.dtype) -> Position:
    """``expr`` as a position, if its constants are so small that token counts and ids cannot make it overflow."""
    expr = sympy.expand(expr)
    constant, terms = expr.as_coeff_Add()
    factors = [term.as_coeff_Mul() for term in sympy.Add.make_args(terms)]
    if any(has_data(term) and abs(slope) != 1 for slope, term in factors):
        raise Unread(f"{expr} scales data")
    slopes = [slope for slope, _ in factors]
    largest, steepest = (2**40, 2**20) if dtype is torch.int64 else (2**30, 1)
    if abs(constant) > largest or any(abs(slope) > steepest for slope in slopes):
        raise Unread(f"{expr} may overflow {dtype}")
    return Position(expr)


def compare(name: str, left: sympy.Expr, right: sympy.Expr) -> Boolean:
    """``left name right`` (``"lt"``, ``"le"``, …) of integers as atoms."""
    if name in ("eq", "ne"):
        equal = Equal(left - right)
        return equal if name == "eq" else sympy.Not(equal)
    if name in ("gt", "ge"):
        left, right = right, left
    return AtLeastZero(right - left - (1 if name in ("lt", "gt") else 0))


def truth_of(tensor: SymbolicTensor) -> Boolean:
    """Where the elements are not zero."""
    element = cast(tensor, torch.bool)
    assert isinstance(element, Truth)
    return element.condition


def cast(tensor: SymbolicTensor, dtype: torch.dtype) -> Element:
    """The elements of ``tensor.to(dtype)``."""
    element, source = tensor.element, tensor.dtype
    if source is dtype:
        return element
    if isinstance(element, Position) and source in EXACT_INTEGERS:
        if dtype in EXACT_INTEGERS:
            if has_data(element.expr) and torch.iinfo(dtype).bits < torch.iinfo(source).bits:
                raise Unread(f"a cast from {source} to {dtype} may cut bits of data")
            return element
        if dtype is torch.bool:
            return Truth(compare("ne", element.expr, sympy.Integer(0)))
    if isinstance(element, Datum):
        return _cast_datum(element, source, dtype)
    pairs = ((compute(constant(v, tensor).to, [dtype], dtype), when) for v, when in cases_of(tensor))
    return join(pairs, dtype)


def _cast_datum(element: Datum, source: torch.dtype, dtype: torch.dtype) -> Element:
    """Casts keep "is zero" as long as no bits are cut off and floats are not truncated."""
    if not element.integral:
        raise Unread("floating-point data")
    if dtype is torch.bool:
        return Truth(Live(element.name, *element.index))
    if dtype.is_floating_point:
        return element
    if source.is_floating_point or dtype.is_complex or torch.iinfo(dtype).bits < torch.iinfo(source).bits:
        raise Unread(f"a cast from {source} to {dtype} may turn non-zero data into zero")
    return element


def align(tensor: SymbolicTensor, shape: tuple[sympy.Expr, ...]) -> SymbolicTensor:
    """``tensor`` broadcast to ``shape``: right-aligned axes keep their symbols, so only sizes need a proof."""
    if len(tensor.shape) > len(shape):
        raise Unread("has fewer dimensions than its operand")
    for size, target in zip(reversed(tensor.shape), reversed(shape), strict=False):
        if size != 1 and not same(size, target):
            raise Unread(f"size {size} is not provably {target}")
    return SymbolicTensor(shape, tensor.dtype, tensor.element)


def select(when: Boolean, chosen: SymbolicTensor, other: SymbolicTensor, out: SymbolicTensor) -> Element:
    """``where(when, chosen, other)`` for operands that already have the result's dtype."""
    if isinstance(chosen.element, Truth) and isinstance(other.element, Truth):
        a, b = chosen.element.condition, other.element.condition
        return Truth(sympy.Or(sympy.And(when, a), sympy.And(sympy.Not(when), b)))
    pairs = [(v, sympy.And(when, c)) for v, c in cases_of(chosen)]
    pairs += [(v, sympy.And(sympy.Not(when), c)) for v, c in cases_of(other)]
    return join(pairs, out.dtype)
