"""The mask prover: from the nodes that build an attention mask to what the mask means.

    le = kv_indices <= q_indices                     causal
    mask = le & attention_mask[batch, kv]     ==>    padding = attention_mask
    mask = mask.expand(B, 1, S, S)                   (and nothing else)

The cone of the mask is read into one expression over ``b, h, i, j`` and the shape symbols (``mask_reader``), brought
to conjunctive normal form (``mask_clauses``), and each clause has to be one of the terms of ``MaskFact``. What is not
recognised makes the fact unknown and names the term: a mask is never guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from mmi_compile.passes.mask_clauses import Clause, TooComplex, conjunctive, negate, simplify
from mmi_compile.passes.mask_fact import CAUSAL, MaskFact, MaskGroup, Term
from mmi_compile.passes.mask_groups import (
    Literal,
    Same,
    group_of,
    is_of_rows,
    is_pair,
    join_guards,
    names_of,
    places,
    straighten,
)
from mmi_compile.passes.mask_reader import Reader, Unsound
from mmi_compile.passes.mask_symbols import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    AtLeastZero,
    Cases,
    Datum,
    Element,
    Live,
    SymbolicTensor,
    Truth,
    axis,
    example,
    has_data,
    provably_nonnegative,
    reindex,
    same,
    symbolic,
)
from mmi_compile.passes.nodes import hidden_levels

__all__ = ["Prover", "prove", "symbolic"]

Size: TypeAlias = int | torch.SymInt | sympy.Expr | fx.Node


class _Refusal(Exception):
    """The mask is not understood; the message is the fact's detail."""


def prove(mask: fx.Node, *, q_len: Size, kv_len: Size, batch: Size | None = None) -> MaskFact:
    """What one mask means; see ``Prover.prove``. For several masks of a graph, share a ``Prover``."""
    return Prover().prove(mask, q_len=q_len, kv_len=kv_len, batch=batch)


class Prover:
    """Proves masks; every node of a graph is read once, so layers that share terms cost nothing more.

    Graphs must not change while the prover is in use.
    """

    def __init__(self) -> None:
        self._readers: dict[fx.Graph, Reader] = {}

    def prove(self, mask: fx.Node, *, q_len: Size, kv_len: Size, batch: Size | None = None) -> MaskFact:
        """What ``mask`` means to an attention of ``q_len`` query rows and ``kv_len`` keys.

        Args:
            mask: a node of the graph with a traced value of 1 to 4 dimensions, broadcast to ``[B, H, q_len, kv_len]``.
                bool is read as SDPA reads it (True is visible), floating point as additive; other dtypes are unknown.
            q_len, kv_len: tokens, as integers, SymInts, or nodes that hold one.
            batch: ``B`` of the attention. Without it, ``B`` is taken to be the mask's own first dimension, and the
                caller has to compare the padding's first dimension with the real one.

        Returns:
            The fact; unknown, with a detail, for whatever is not proved. Symbols are assumed to be what torch made
            them (sizes are positive); dimensions are assumed not to be empty. Never raises for a mask that is merely
            not understood.
        """
        reader = self._readers.get(mask.graph) or self._readers.setdefault(mask.graph, Reader(mask.graph))
        try:
            return _Reading.of(reader, mask, symbolic(q_len), symbolic(kv_len), batch).fact()
        except (_Refusal, Unsound) as reason:
            return MaskFact(known=False, detail=str(reason))
        except TooComplex:
            return MaskFact(known=False, detail=f"the condition of `{mask.name}` is too complex")


@dataclass
class _Reading:
    """One mask as clauses, while its terms are being recognised."""

    reader: Reader
    shape: tuple[sympy.Expr, ...]
    condition: Boolean
    q_len: sympy.Expr
    kv_len: sympy.Expr
    batch: sympy.Expr
    causal: list[sympy.Expr] = field(default_factory=list)
    behind: list[sympy.Expr] = field(default_factory=list)
    padding: list[Boolean] = field(default_factory=list)

    @classmethod
    def of(cls, reader: Reader, mask: fx.Node, q_len: sympy.Expr, kv_len: sympy.Expr, batch: Size | None) -> _Reading:
        tensor = reader.read(mask)
        rank = len(tensor.shape)
        if not 1 <= rank <= 4:
            raise _Refusal(f"`{mask.name}` has {rank} dimensions")
        for size, wanted, name in zip(reversed(tensor.shape), (kv_len, q_len), ("keys", "query rows"), strict=False):
            if size != 1 and not same(size, wanted):
                raise _Refusal(f"`{mask.name}` has {size} {name}, the attention {wanted}: not proved equal")
        own = tensor.shape[0] if rank == 4 else sympy.Integer(1)
        rows = own if batch is None else symbolic(batch)
        if own != 1 and not same(own, rows):
            raise _Refusal(f"`{mask.name}` has batch size {own}, the attention {rows}: not proved equal")
        condition = _visible(reader, mask, tensor)
        return cls(reader, tensor.shape, condition, q_len, kv_len, rows)

    @property
    def sizes(self) -> dict[sympy.Symbol, sympy.Expr]:
        sizes = {axis(n): size for n, size in enumerate(reversed(self.shape))}
        return sizes | {QUERY: self.q_len, KEY: self.kv_len}

    def fact(self) -> MaskFact:
        clauses = simplify(conjunctive(self.condition), self.sizes)
        expression = " & ".join(_factors(clauses)) or "True"
        straight = straighten(clauses, self.reader)
        if straight != clauses:
            clauses = simplify(straight, self.sizes)
        groups = self._grouping(clauses)
        for clause in sorted((c for c in clauses if c not in groups), key=_text):
            self._recognise(clause)
        offset = self._offset(groups) if groups else None
        causal, offset, window = self._band(offset)
        terms = self._terms(groups, offset) if groups else ()
        padding, hides = self._padding_node()
        return MaskFact(True, causal, offset, window, padding, expression, clauses=terms, padding_hides=hides)

    def _grouping(self, clauses: list[Clause]) -> list[Clause]:
        """The clauses that have to do with groups of tokens, if there may be any."""
        choices = [c for c in clauses if len(c) > 1 or any(map(is_pair, c))]
        if not any(_may_group(x) for c in choices for x in c):
            return []
        return choices + [c for c in clauses if len(c) == 1 and any(map(is_of_rows, c))]

    def _offset(self, groups: list[Clause]) -> sympy.Expr:
        """The position of row 0, which the causal terms tell: groups compare keys with the row's own position."""
        bounds = list(self.causal)
        for clause in groups:
            for literal in clause:
                band = self._bound(literal)
                if band is not None and band[0]:
                    bounds.append(band[1])
        if not bounds:
            raise _Refusal(f"the term {_text(groups[0])} is not a plain condition{self._reason(groups[0])}")
        return _least(bounds, "causal")

    def _terms(self, groups: list[Clause], offset: sympy.Expr) -> tuple[tuple[Term, ...], ...]:
        joined = sorted(join_guards(groups, offset), key=_text)
        clauses = [[self._term(literal, clause, offset) for literal in sorted(clause, key=str)] for clause in joined]
        return tuple(sorted((tuple(sorted(clause, key=_order)) for clause in clauses), key=str))

    def _term(self, literal: Literal, clause: Collection[Literal], offset: sympy.Expr) -> Term:
        if isinstance(literal, Same):
            group = group_of(literal, self.reader, self.batch, self.kv_len)
            if group is None:
                raise _Refusal(f"the groups of {literal} are not a tensor of the graph{self._reason(clause)}")
            return group
        band = self._bound(literal)
        if band is not None and band[0] and same(band[1], offset):
            return CAUSAL
        if band is not None and not band[0]:
            return self._window(band[1], offset)
        raise _Refusal(f"the term {_text(clause)} is not a plain condition{self._reason(clause)}")

    def _bound(self, literal: Boolean) -> tuple[bool, sympy.Expr] | None:
        """``(True, c)`` for ``j <= i + c``, ``(False, c)`` for ``i - j + c >= 0`` read the other way round."""
        if not isinstance(literal, AtLeastZero) or has_data(literal):
            return None
        free = sympy.expand(literal.expr)
        row, key = free.coeff(QUERY, 1), free.coeff(KEY, 1)
        rest = sympy.expand(free - row * QUERY - key * KEY)
        if self.q_len == 1 and row == 0:
            row = -key  # row 0 is the only one, so a bound on keys alone is a bound relative to it
        if {QUERY, KEY, HEAD, BATCH} & rest.free_symbols or (row, key) not in ((1, -1), (-1, 1)):
            return None
        return bool(key == -1), rest

    def _recognise(self, clause: Clause) -> None:
        if not clause:
            raise _Refusal("every pair is hidden")
        if len(clause) > 1:
            raise _Refusal(f"the term {_text(clause)} is not a plain condition{self._reason(clause)}")
        (literal,) = clause
        if has_data(literal):
            self.padding.append(literal)
            return
        band = self._bound(literal)
        if band is None:
            raise _Refusal(f"the term {_text(clause)} is neither causal nor a window")
        (self.causal if band[0] else self.behind).append(band[1])

    def _band(self, offset: sympy.Expr | None) -> tuple[bool, sympy.Expr, sympy.Expr | None]:
        """Causal, offset and window from ``j <= i + c`` and ``i - j <= w`` terms; ``offset`` where it is known."""
        causal = bool(self.causal)
        if offset is None:
            aligned = sympy.expand(self.kv_len - self.q_len) if self.behind else sympy.Integer(0)
            offset = _least(self.causal, "causal") if causal else aligned
        elif causal and not same(_least(self.causal, "causal"), offset):
            raise _Refusal(f"several causal terms: {', '.join(map(str, [*self.causal, offset]))}")
        if not self.behind:
            return causal, offset, None
        return causal, offset, self._window(_least(self.behind, "window"), offset)

    @staticmethod
    def _window(bound: sympy.Expr, offset: sympy.Expr) -> sympy.Expr:
        window = sympy.expand(bound + offset + 1)
        if not provably_nonnegative(window - 1):
            raise _Refusal(f"the sliding window {window} is not provably positive")
        return window

    def _padding_node(self) -> tuple[fx.Node | None, bool]:
        """The tensor that says which keys are live, and whether it says which are dead instead."""
        if not self.padding:
            return None, False
        if len(self.padding) > 1:
            raise _Refusal(
                f"several data-dependent terms: {', '.join(map(str, self.padding))}{self._reason(self.padding)}"
            )
        (wanted,) = self.padding
        symbols = places(wanted)
        for symbol, name in ((HEAD, "heads"), (QUERY, "query rows")):
            if symbol in symbols:
                raise _Refusal(f"the term {wanted} differs between {name}{self._reason([wanted])}")
        for rank in (2, 4):  # one of two dimensions serves several masks of a graph
            for condition in (wanted, negate(wanted)):
                node = self._tensor_of(condition, rank)
                if node is not None:
                    return node, condition is not wanted
        raise _Refusal(f"the term {wanted} is not a [batch, kv_len] tensor of the graph{self._reason([wanted])}")

    def _tensor_of(self, wanted: Boolean, rank: int) -> fx.Node | None:
        """A tensor that has an element for every key, which is not zero exactly where ``wanted`` holds."""
        known = [(node, tensor) for node, tensor in self.reader.known.items() if len(tensor.shape) == rank]
        candidates = [(node, tensor.shape[-1]) for node, tensor in known if self._is_padding(node, tensor, wanted)]
        for node, keys in candidates:
            if same(keys, self.kv_len):
                return node
        for node, keys in candidates:
            if provably_nonnegative(keys - self.kv_len) or self._is_read_whole(wanted):
                return node
        return None

    def _is_padding(self, node: fx.Node, tensor: SymbolicTensor, wanted: Boolean) -> bool:
        """Whether element ``[b, j]`` or ``[b, 0, 0, j]`` of ``tensor``, by itself, is non-zero exactly where ``wanted``
        holds.

        Whether it has an element for every key is another question.
        """
        if not same(tensor.shape[0], self.batch):
            return False
        if hidden_levels(example(node)) or any(size != 1 for size in tensor.shape[1:-1]):
            return False
        found = _liveness(reindex(tensor.element, {QUERY: BATCH}) if len(tensor.shape) == 2 else tensor.element)
        if found is None or tensor.dtype.is_floating_point:
            return False
        # An expanded row has the right values too, but only a tensor of its own is worth handing on.
        ends = ((BATCH, tensor.shape[0]), (KEY, tensor.shape[-1]))
        own = all(size == 1 or symbol in places(found) for symbol, size in ends)
        return bool(own and found == wanted)

    def _is_read_whole(self, wanted: Boolean) -> bool:
        """Whether some tensor with ``kv_len`` keys is nothing but ``wanted`` at every key.

        Only views, slices and indexing give such a tensor, and they stay in bounds: the data has that many keys. That
        says nothing where one key is read for all.
        """
        return KEY in places(wanted) and any(
            _liveness(tensor.element) == wanted and tensor.shape != () and same(tensor.shape[-1], self.kv_len)
            for tensor in self.reader.known.values()
        )

    def _reason(self, literals: Iterable[Literal]) -> str:
        names = sorted(set(names_of(literals)))
        known = [f"`{name}` is {why}" for name in names if (why := self.reader.reasons.get(name))]
        return f" ({'; '.join(known)})" if known else ""


def _visible(reader: Reader, mask: fx.Node, tensor: SymbolicTensor) -> Boolean:
    """The condition under which a pair is visible, from a bool or an additive mask."""
    element = tensor.element
    if isinstance(element, Truth):
        return element.condition
    if not tensor.dtype.is_floating_point:
        raise _Refusal(f"`{mask.name}` is {tensor.dtype}, neither bool nor floating point")
    if not isinstance(element, Cases):
        name = element.name if isinstance(element, Datum) else mask.name
        reason = reader.reasons.get(name, "made of positions")
        raise _Refusal(f"`{mask.name}` adds data of `{name}` to the scores ({reason})")
    hidden = (float("-inf"), torch.finfo(tensor.dtype).min)
    for value, _ in element.items:
        if value != 0 and value not in hidden:
            raise _Refusal(f"`{mask.name}` adds {value} to scores: a bias, or not low enough for {tensor.dtype}")
    return sympy.Or(*(when for value, when in element.items if value == 0))


def _least(bounds: list[sympy.Expr], what: str) -> sympy.Expr:
    """The smallest of several bounds, if their order is provable."""
    for bound in bounds:
        if all(provably_nonnegative(other - bound) for other in bounds):
            return bound
    raise _Refusal(f"several {what} terms whose order is not proved: {', '.join(map(str, bounds))}")


def _liveness(element: Element) -> Boolean | None:
    """Where an element is not zero, if it is a condition or plain data."""
    if isinstance(element, Truth):
        return element.condition
    return Live(element.name, *element.index) if isinstance(element, Datum) and element.integral else None


def _order(term: Term) -> tuple[int, str]:
    """Causality, then windows, then groups."""
    return 2 if isinstance(term, MaskGroup) else 0 if term == CAUSAL else 1, str(term)


def _may_group(literal: Boolean) -> bool:
    return is_pair(literal) or is_of_rows(literal)


def _factors(clauses: Collection[Clause]) -> list[str]:
    """What the clauses say, one text for each; alternatives among other factors stand in brackets."""
    return sorted(f"({_text(c)})" if len(c) > 1 and len(clauses) > 1 else _text(c) for c in clauses)


def _text(clause: Iterable[Literal]) -> str:
    return " | ".join(sorted(map(str, clause))) or "False"
