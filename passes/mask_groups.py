"""Terms of masks that group tokens: packed documents, chunks of positions and bidirectional blocks.

    document[b, q] == document[b, kv]                               a unit clause, beside a causal one
    (kv - left[b]) // 8192 == (q - left[b]) // 8192                 likewise
    kv <= q  |  block[b, q] == block[b, kv] & block[b, q] >= 0      clauses of two literals

A group is an integer per key. What makes it useful is that all of its terms compare a row with a key *at the row's own
position*: where the keys of one value are one run, a row's allowed keys are one interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from mmi_compile.passes.mask_clauses import Clause, TooComplex, conjunctive, simplify
from mmi_compile.passes.mask_elements import EXACT_INTEGERS, axes, truth_of, value_of
from mmi_compile.passes.mask_fact import MaskGroup
from mmi_compile.passes.mask_operators import bind, operator_name
from mmi_compile.passes.mask_reader import Reader, Unsound
from mmi_compile.passes.mask_symbols import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    AtLeastZero,
    Cases,
    Datum,
    Equal,
    Live,
    Position,
    Quotient,
    SymbolicTensor,
    Truth,
    Value,
    axis,
    example,
    has_data,
    provably_nonnegative,
    reindex,
    same,
)
from mmi_compile.passes.nodes import argument, hidden_levels


def places(literal: sympy.Basic) -> set[sympy.Symbol]:
    """The axes of the mask that a literal depends on."""
    found: set[sympy.Symbol] = literal.free_symbols
    return {BATCH, HEAD, QUERY, KEY} & found


def is_pair(literal: Boolean) -> bool:
    """Whether a literal compares what tensors hold at a row with what they hold at a key."""
    return has_data(literal) and {QUERY, KEY} <= places(literal)


def is_of_rows(literal: Boolean) -> bool:
    """Whether a literal depends on what tensors hold at a row, and on no key."""
    return has_data(literal) and QUERY in places(literal) and KEY not in places(literal)


@dataclass(frozen=True)
class Same:
    """The literal ``vector[row] == vector[key]``, for values of ``least`` or more where that is given.

    ``vector`` is an integer expression over ``b`` and ``j``, or a condition: then of rows and keys where it holds.
    """

    vector: sympy.Basic
    least: int | None = None

    def __str__(self) -> str:
        rows = "row's" if self.least is None or isinstance(self.vector, Boolean) else f"row's, {self.least} or more,"
        return f"({self.vector} is the {rows} own)"


def vector_of(literal: Boolean, offset: sympy.Expr) -> sympy.Expr | None:
    """``f`` where the literal says ``f(b, j) == f(b, i + offset)``."""
    if not isinstance(literal, Equal):
        return None
    terms = sympy.Add.make_args(literal.expr)
    key = sympy.Add(*(term for term in terms if KEY in term.free_symbols))
    row = sympy.Add(*(term for term in terms if KEY not in term.free_symbols))
    if HEAD in places(literal) or sympy.expand(row + at_row(key, offset)) != 0:
        return None
    key, negated = sympy.expand(key), sympy.expand(-key)
    # Of the two signs the one without a minus is a tensor of the graph.
    return negated if key.could_extract_minus_sign() else key


def at_row(expr: sympy.Basic, offset: sympy.Expr) -> sympy.Basic:
    """What stands at key ``j``, at the position of row ``i`` instead."""
    moved = expr.xreplace({KEY: sympy.expand(QUERY + offset)})
    return sympy.expand(moved) if isinstance(moved, sympy.Expr) else moved


def _least(literal: Boolean, vector: sympy.Expr, offset: sympy.Expr) -> int | None:
    """The number ``c`` where the literal says ``vector(b, i + offset) >= c``."""
    if not isinstance(literal, AtLeastZero):
        return None
    rest = sympy.expand(at_row(vector, offset) - literal.expr)
    return int(rest) if rest.is_Integer else None


Literal: TypeAlias = "Boolean | Same"


def join_guards(clauses: Iterable[Clause], offset: sympy.Expr) -> list[frozenset[Literal]]:
    """The clauses with ``Same`` for literals that compare a row with a key, and what guards them folded in.

    ::

        (a | v[i] == v[j]) & (a | v[i] >= c)    ->  (a | Same(v, c))
        (a | p[i]) & (a | p[j])                 ->  (a | Same(p)),  a condition
    """
    current: list[frozenset[Literal]] = [frozenset(clause) for clause in clauses]
    while (joined := _join_two(current, offset)) is not None:
        current = joined
    return [frozenset(_alone(literal, offset) for literal in clause) for clause in current]


def _alone(literal: Literal, offset: sympy.Expr) -> Literal:
    vector = None if isinstance(literal, Same) else vector_of(literal, offset)
    return literal if vector is None else Same(vector)


def _join_two(clauses: list[frozenset[Literal]], offset: sympy.Expr) -> list[frozenset[Literal]] | None:
    """The clauses with one pair of them joined; None where there is no pair."""
    for clause in clauses:
        for literal in sorted(clause, key=str):
            beside = clause - {literal}
            for other in clauses:
                if other == clause or len(other) != len(clause) or not beside < other:
                    continue
                (guard,) = other - beside
                group = None
                if not isinstance(literal, Same) and not isinstance(guard, Same):
                    group = _guarded(literal, guard, bool(beside), offset)
                if group is not None:
                    return [c for c in clauses if c not in (clause, other)] + [beside | {group}]
    return None


def _guarded(literal: Boolean, guard: Boolean, is_choice: bool, offset: sympy.Expr) -> Same | None:
    vector = vector_of(literal, offset)
    if vector is not None:
        least = _least(guard, vector, offset)
        return None if least is None else Same(vector, least)
    of_keys = has_data(literal) and places(literal) <= {BATCH, KEY} and KEY in places(literal)
    return Same(literal) if of_keys and is_choice and guard == at_row(literal, offset) else None


# ---------------------------------------------------------------------------------------------------------------------
# Positions inside documents


def straighten(clauses: list[Clause], reader: Reader) -> list[Clause]:
    """Clauses whose comparisons of positions are those of places, where documents are told apart by jumps of positions.

    Inside a document positions step by 1, so that ``positions[j] <= positions[i]`` there is ``j <= i``::

        document = (diff(positions, prepend=...) != 1).cumsum(-1)
        (document[i] == document[j] | a) & (positions[j] <= positions[i] | a)
        ->  (document[i] == document[j] | a) & (j <= i | a)
    """
    documents = [(c, x, steps) for c in clauses for x in c if (steps := _positions_of(x, reader)) is not None]
    return [_straight(clause, documents) for clause in clauses]


def _straight(clause: Clause, documents: list[tuple[Clause, Boolean, dict[Value, sympy.Expr]]]) -> Clause:
    straight = set(clause)
    for literal in clause:
        if not isinstance(literal, AtLeastZero) or not has_data(literal):
            continue
        for other, document, places_of in documents:
            if not other <= (clause - {literal}) | {document}:
                continue
            moved = AtLeastZero(literal.expr.xreplace(places_of))
            if not moved.has(sympy.Dummy) and not has_data(moved):
                straight = (straight - {literal}) | {moved}
                break
    return frozenset(straight)


def _positions_of(literal: Boolean, reader: Reader) -> dict[Value, sympy.Expr] | None:
    """For ``document[i] == document[j]``: what the positions at the row and at the key may be replaced by."""
    if not isinstance(literal, Equal):
        return None
    values = sorted(literal.expr.atoms(Value), key=str)
    if len(values) != 2 or values[0].name != values[1].name:
        return None
    if (
        sympy.expand(literal.expr - (values[0] - values[1])) != 0
        and sympy.expand(literal.expr - (values[1] - values[0])) != 0
    ):
        return None
    positions = _stepped(values[0].name, reader)
    if positions is None:
        return None
    # The first position of the document cancels where positions are only compared with each other.
    start, found = sympy.Dummy("start", integer=True), {}
    for value in values:
        moved = {axis(n): place for n, place in enumerate(reversed(value.index))}
        position = positions.xreplace(moved)
        if not isinstance(position, Value):
            return None
        found[position] = start + value.index[-1]
    return found


def _stepped(name: str, reader: Reader) -> sympy.Expr | None:
    """The elements of ``p`` where the tensor ``name`` is ``(diff(p, prepend=one element) != 1).cumsum(-1)``."""
    node = _node(name, reader)
    changes = None if node is None else _summed(node, reader)
    element = None if changes is None else changes.element
    if not isinstance(element, Truth) or not isinstance(element.condition, sympy.Not):
        return None
    equal = element.condition.args[0]
    steps = list(equal.atoms(Value)) if isinstance(equal, Equal) else []
    if len(steps) != 1 or equal != Equal(steps[0] - 1):
        return None
    difference = _node(steps[0].name, reader)
    if difference is None or operator_name(difference) != "diff":
        return None
    shape = reader.known[difference].shape
    rank = len(shape)
    if steps[0].index != axes(shape) or changes is None or changes.shape != shape:
        return None
    try:
        source, order, dim, prepend, append = bind(
            difference, "input n dim prepend append", n=1, dim=-1, prepend=None, append=None
        )
    except Exception:
        return None
    known = reader.known
    if order != 1 or dim not in (-1, rank - 1) or append is not None or source not in known or prepend not in known:
        return None
    if known[prepend].shape[-1:] != (sympy.Integer(1),) or len(known[prepend].shape) != rank:
        return None
    return value_of(known[source])


def _summed(node: fx.Node, reader: Reader) -> SymbolicTensor | None:
    """What ``node`` is the running sum of along its last dimension, none of it negative."""
    if operator_name(node) != "cumsum" or not isinstance(example(node), torch.Tensor):
        return None
    rank = len(reader.known[node].shape)
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, fx.Node) or source not in reader.known or dim not in (-1, rank - 1):
        return None
    tensor = reader.known[source]
    if reader.known[node].dtype not in EXACT_INTEGERS:
        return None
    if isinstance(tensor.element, Truth):
        return tensor
    if isinstance(tensor.element, Cases) and all(value in (0, 1) for value, _ in tensor.element.items):
        return tensor
    return None


def _node(name: str, reader: Reader) -> fx.Node | None:
    return next((node for node in reader.known if node.name == name), None)


# ---------------------------------------------------------------------------------------------------------------------
# The tensor of a group


def group_of(found: Same, reader: Reader, batch: sympy.Expr, kv_len: sympy.Expr) -> MaskGroup | None:
    """The group as a tensor of the graph, or None where no tensor of the graph holds it by itself."""
    together = _is_ordered(found.vector, reader) or _are_blocks(found, reader)
    candidates = [node for node, tensor in reader.known.items() if _holds(node, tensor, found.vector, batch)]
    for accept in (same, _reaches):
        for node in candidates:
            if accept(reader.known[node].shape[-1], kv_len):
                return MaskGroup(node, _bound(found), together, _word(found))
    return None


def _bound(found: Same) -> int | None:
    return 1 if isinstance(found.vector, Boolean) else found.least


def _reaches(size: sympy.Expr, kv_len: sympy.Expr) -> bool:
    return provably_nonnegative(size - kv_len)


def _word(found: Same) -> str:
    if found.vector.has(Quotient):
        return "chunk"
    return "document" if found.least is None and not isinstance(found.vector, Boolean) else "block"


def _holds(node: fx.Node, tensor: SymbolicTensor, vector: sympy.Basic, batch: sympy.Expr) -> bool:
    """Whether the elements ``[b, j]`` of a tensor (of 1, 2 or 4 dimensions) are ``vector``."""
    rank = len(tensor.shape)
    if rank not in (1, 2, 4) or hidden_levels(example(node)):
        return False
    if rank > 1 and tensor.shape[0] != 1 and not same(tensor.shape[0], batch):
        return False
    if rank == 4 and (tensor.shape[1] != 1 or tensor.shape[2] != 1):
        return False
    element = reindex(tensor.element, {QUERY: BATCH} if rank == 2 else {})
    if isinstance(vector, Boolean):
        return isinstance(element, Truth) and bool(element.condition == vector)
    if tensor.dtype not in EXACT_INTEGERS or not isinstance(element, (Position, Datum)):
        return False
    return bool(value_of(SymbolicTensor(tensor.shape, tensor.dtype, element)) == vector)


def _is_ordered(vector: sympy.Basic, reader: Reader) -> bool:
    """Whether the values provably never fall from one key to the next, so that equal ones lie together."""
    if not isinstance(vector, sympy.Expr):
        return False
    for term in sympy.Add.make_args(vector):
        if KEY in term.free_symbols and not _never_falls(term, reader):
            return False
    return True


def _never_falls(term: sympy.Expr, reader: Reader) -> bool:
    if isinstance(term, Quotient):
        dividend, divisor = term.args
        slope = dividend.coeff(KEY, 1)
        rest = sympy.expand(dividend - slope * KEY)
        return KEY not in rest.free_symbols | divisor.free_symbols and provably_nonnegative(slope)
    if isinstance(term, Value):
        node = _node(term.name, reader)
        return _is_along_keys(term) and node is not None and _summed(node, reader) is not None
    return bool(term == KEY)


def _is_along_keys(value: Value) -> bool:
    """Whether the last index is the key, and no other one has to do with it."""
    return bool(value.index[-1] == KEY) and not any(KEY in place.free_symbols for place in value.index[:-1])


def _are_blocks(found: Same, reader: Reader) -> bool:
    """Whether the values are numbers of the runs in which a condition holds, by the way in which they are made.

    ::

        where(inside, (inside & ~(inside one key before)).cumsum(-1) + constant, less than `least`)

    Between two tokens of one number no run begins. Were there a token outside between them, the next one inside would
    begin a run; so there is none.
    """
    vector, least = found.vector, found.least
    if not isinstance(vector, Value) or least is None or not _is_along_keys(vector):
        return False
    node = _node(vector.name, reader)
    if node is None or operator_name(node) != "where" or len(node.args) != 3 or node.kwargs:
        return False
    inside, number, outside = node.args
    if not isinstance(inside, fx.Node) or not isinstance(number, fx.Node) or not isinstance(outside, int):
        return False
    summed = _counted(number, reader)
    rank = len(reader.known[node].shape)
    if outside >= least or summed is None or {len(reader.known[x].shape) for x in (inside, number)} != {rank}:
        return False
    holds, begins = (_unpadded(truth_of(tensor), reader) for tensor in (reader.known[inside], summed))
    if holds is None or begins is None:
        return False
    before = holds.xreplace({KEY: KEY - 1})
    missed = sympy.And(AtLeastZero(KEY - 1), holds, sympy.Not(before), sympy.Not(begins))
    try:
        return frozenset() in simplify(conjunctive(missed), {})
    except TooComplex:
        return False


def _counted(number: fx.Node, reader: Reader) -> SymbolicTensor | None:
    """What ``number`` is the running sum of, but for a constant."""
    expr = value_of(reader.known[number])
    values = [] if expr is None else list(expr.atoms(Value))
    if expr is None or len(values) != 1 or not sympy.expand(expr - values[0]).is_Integer:
        return None
    node = _node(values[0].name, reader)
    if node is None or values[0].index != axes(reader.known[node].shape):
        return None
    same_rank = len(reader.known[node].shape) == len(reader.known[number].shape)
    return _summed(node, reader) if same_rank else None


def _unpadded(condition: Boolean, reader: Reader) -> Boolean | None:
    """``condition`` with what stands one key before in place of bool tensors that were shifted by padding them."""
    changes = {}
    for atom in condition.atoms(Live):
        node = _node(atom.name, reader)
        if node is None or node.target not in _PADS:
            continue
        source = argument(node, 0, "input")
        shifted = tuple(argument(node, 1, "pad") or ()) == (1, 0) and not argument(node, 3, "value")
        if not shifted or argument(node, 2, "mode", "constant") != "constant" or not isinstance(source, fx.Node):
            return None
        try:
            tensor = reader.read(source)
        except Unsound:
            return None
        if not isinstance(tensor.element, Truth) or len(tensor.shape) != len(atom.index):
            return None
        places_of = {axis(n): place for n, place in enumerate(reversed(atom.index))}
        places_of[KEY] = sympy.expand(atom.index[-1] - 1)
        moved = tensor.element.condition.xreplace(places_of)
        changes[atom] = sympy.And(AtLeastZero(places_of[KEY]), moved)
    return condition.xreplace(changes)


_PADS = (torch.nn.functional.pad, torch._C._nn.pad)


def names_of(literals: Iterable[Literal]) -> Iterator[str]:
    """The tensors that literals depend on."""
    for literal in literals:
        expr = literal.vector if isinstance(literal, Same) else literal
        yield from (atom.name for atom in expr.atoms(Live, Value))
