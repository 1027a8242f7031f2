"""Differences and running sums along a dimension, as far as they are provably constant or linear.

Models without a padding mask find packed documents by them: ``(diff(position_ids) != 1).cumsum(-1)`` numbers the
documents of a row, and is 0 everywhere when the positions are one plain range.
"""

from __future__ import annotations

from typing import Any

import sympy
from sympy.logic.boolalg import Boolean
from torch import fx

from mmi_compile.passes.mask_elements import EXACT_INTEGERS, Unread, axes, cast, exact, join, position_of
from mmi_compile.passes.mask_operators import Operands, Transfers, bind
from mmi_compile.passes.mask_symbols import AtLeastZero, Element, Position, SymbolicTensor, axis

SCANS = Transfers()


@SCANS.of("diff")
def _diff(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    """``x[k] - x[k - 1]``, where ``x`` may be lengthened by one element at either end."""
    source, order, dim, prepend, append = bind(
        node, "input n dim prepend append", n=1, dim=-1, prepend=None, append=None
    )
    if order != 1 or not isinstance(dim, int) or not out.shape or out.dtype not in EXACT_INTEGERS:
        raise Unread("not the first difference of integers")
    tensor, dim = operands.tensor(source), dim % len(out.shape)
    first, last = (_end(operands, end, tensor, dim) for end in (prepend, append))
    begin = 0 if first is None else 1
    length, place = tensor.shape[dim], axes(out.shape)[dim]
    inner = _at(tensor, dim, place + 1 - begin) - _at(tensor, dim, place - begin)
    pieces: list[tuple[sympy.Expr, Boolean]] = [(inner, sympy.true)]
    if last is not None:
        at_end = AtLeastZero(place - (length - 1 + begin))
        pieces = [(last - _at(tensor, dim, length - 1), at_end), *_unless(at_end, pieces)]
    if first is not None:
        at_start = AtLeastZero(-place)
        pieces = [(_at(tensor, dim, sympy.Integer(0)) - first, at_start), *_unless(at_start, pieces)]
    return _piecewise(pieces, out)


def _unless(taken: Boolean, pieces: list[tuple[sympy.Expr, Boolean]]) -> list[tuple[sympy.Expr, Boolean]]:
    return [(value, sympy.And(when, sympy.Not(taken))) for value, when in pieces]


def _piecewise(pieces: list[tuple[sympy.Expr, Boolean]], out: SymbolicTensor) -> Element:
    exprs = [exact(value, out.dtype).expr for value, _ in pieces]
    if all(expr == exprs[0] for expr in exprs):
        return Position(exprs[0])
    if not all(expr.is_Integer for expr in exprs):
        raise Unread(f"the differences {', '.join(map(str, exprs))} are not equal")
    return join(((int(expr), when) for expr, (_, when) in zip(exprs, pieces, strict=True)), out.dtype)


def _end(operands: Operands, end: Any, source: SymbolicTensor, dim: int) -> sympy.Expr | None:
    if end is None:
        return None
    tensor = operands.tensor(end)
    if len(tensor.shape) != len(source.shape) or tensor.shape[dim] != 1:
        raise Unread("lengthened by more than one element")
    return _at(tensor, dim, sympy.Integer(0))


def _at(tensor: SymbolicTensor, dim: int, index: sympy.Expr) -> sympy.Expr:
    """The integer at ``index`` of one dimension."""
    expr = position_of(tensor)
    if expr is None:
        raise Unread("not positions that are known")
    return expr.xreplace({axis(len(tensor.shape) - 1 - dim): index})


@SCANS.of("cumsum")
def _cumsum(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    source, dim = bind(node, "input dim")
    tensor = operands.tensor(source)
    if not isinstance(dim, int) or not out.shape or out.dtype not in EXACT_INTEGERS:
        raise Unread("not a sum of integers")
    summand = position_of(SymbolicTensor(tensor.shape, out.dtype, cast(tensor, out.dtype)))
    if summand is None or not summand.is_Integer:
        raise Unread("the summands are not one constant")
    return exact(summand * (axes(out.shape)[dim] + 1), out.dtype)
