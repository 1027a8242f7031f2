"""Conjunctive normal form of mask conditions, simplified by exact integer reasoning."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from sympy.logic.boolalg import Boolean

from mmi_compile.passes.mask_symbols import AtLeastZero, Equal, Live, always_nonnegative

Clause = frozenset[Boolean]
Sizes = Mapping[sympy.Symbol, sympy.Expr]
MAX_CLAUSES = 64


class TooComplex(Exception):
    """The normal form has more than ``MAX_CLAUSES`` clauses."""


def negate(literal: Boolean) -> Boolean:
    """The negation of a literal; over integers ``not (e >= 0)`` is ``-e - 1 >= 0``."""
    if isinstance(literal, AtLeastZero):
        return AtLeastZero(-literal.expr - 1)
    return sympy.Not(literal)


def conjunctive(condition: Boolean) -> list[Clause]:
    """The clauses whose conjunction is ``condition``; none at all means true, an empty clause means false.

    Raises:
        TooComplex: distributing ``or`` over ``and`` explodes.
        TypeError: the condition contains something that is neither a connective nor an atom of this package.
    """
    return _clauses(condition, positive=True)


def _clauses(condition: Boolean, positive: bool) -> list[Clause]:
    if condition in (sympy.true, sympy.false):
        return [] if (condition == sympy.true) == positive else [frozenset()]
    if isinstance(condition, sympy.Not):
        return _clauses(condition.args[0], not positive)
    if isinstance(condition, (sympy.And, sympy.Or)):
        parts = [_clauses(part, positive) for part in condition.args]
        joined = isinstance(condition, sympy.And) == positive
        return _limit([c for part in parts for c in part]) if joined else _distribute(parts)
    if not isinstance(condition, (AtLeastZero, Equal, Live)):
        raise TypeError(f"not a mask condition: {condition!r}")
    literal = condition if positive else negate(condition)
    if literal in (sympy.true, sympy.false):
        return _clauses(literal, positive=True)
    return [frozenset([literal])]


def _distribute(parts: list[list[Clause]]) -> list[Clause]:
    product: list[Clause] = [frozenset()]
    for part in parts:
        product = _limit([left | right for left in product for right in part])
    return product


def _limit(clauses: list[Clause]) -> list[Clause]:
    unique = list(dict.fromkeys(clauses))
    if len(unique) > MAX_CLAUSES:
        raise TooComplex
    return unique


def simplify(clauses: list[Clause], sizes: Sizes) -> list[Clause]:
    """Equivalent clauses for all indices below ``sizes``, with everything implied by the rest dropped."""
    while True:
        reduced = _unit_propagation([c for c in (_reduce(c, sizes) for c in clauses) if c is not None], sizes)
        reduced = _absorb(_resolve(reduced), sizes)
        if reduced == clauses:
            return clauses
        clauses = reduced


def implies(left: Boolean, right: Boolean, sizes: Sizes) -> bool:
    """Whether the literal ``left`` provably implies the literal ``right``."""
    if left == right:
        return True
    if isinstance(left, AtLeastZero) and isinstance(right, AtLeastZero):
        return always_nonnegative(sympy.expand(right.expr - left.expr), sizes)
    return False


def _reduce(clause: Clause, sizes: Sizes) -> Clause | None:
    """The clause without needless literals, or None where it always holds."""
    kept = [x for x in clause if not _always(negate(x), sizes)]
    if any(_always(x, sizes) for x in kept):
        return None
    if any(implies(negate(x), y, sizes) for n, x in enumerate(kept) for y in kept[n + 1 :]):
        return None
    weakest: list[Boolean] = []
    for n, x in enumerate(kept):
        others = weakest + kept[n + 1 :]
        if not any(implies(x, y, sizes) for y in others):
            weakest.append(x)
    return frozenset(weakest)


def _always(literal: Boolean, sizes: Sizes) -> bool:
    if literal == sympy.true:
        return True
    return isinstance(literal, AtLeastZero) and always_nonnegative(literal.expr, sizes)


def _unit_propagation(clauses: list[Clause], sizes: Sizes) -> list[Clause]:
    """Drop every literal that a clause of one literal contradicts."""
    units = [next(iter(c)) for c in clauses if len(c) == 1]
    return [
        c if len(c) == 1 else frozenset(x for x in c if not any(implies(u, negate(x), sizes) for u in units))
        for c in clauses
    ]


def _resolve(clauses: list[Clause]) -> list[Clause]:
    """Drop a literal ``x`` where another clause has ``not x`` and, beside it, only what stands beside ``x``.

    ``(a | not x) & (a | x | y)`` is ``(a | not x) & (a | y)``.
    """
    resolved = list(clauses)
    for n in range(len(resolved)):
        for literal in sorted(resolved[n], key=str):
            beside, opposite = resolved[n] - {literal}, negate(literal)
            others = resolved[:n] + resolved[n + 1 :]
            if any(opposite in other and other - {opposite} <= beside for other in others):
                resolved[n] = beside
    return resolved


def _absorb(clauses: list[Clause], sizes: Sizes) -> list[Clause]:
    """Drop every clause that another one implies; of two equivalent ones the first stays."""
    kept: list[Clause] = []
    for n, clause in enumerate(clauses):
        if not any(_entails(other, clause, sizes) for other in kept + clauses[n + 1 :]):
            kept.append(clause)
    return kept


def _entails(left: Clause, right: Clause, sizes: Sizes) -> bool:
    return all(any(implies(x, y, sizes) for y in right) for x in left)
