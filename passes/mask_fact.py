"""What a mask was proved to mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import sympy

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True)
class MaskGroup:
    """An integer per key: a row and a key are of one group where the integer at the row's own position is the key's.

    Attributes:
        node: tensor of 1, 2 or 4 dimensions (``[N]``, ``[B or 1, N]``, ``[B or 1, 1, 1, N]``), integers or bool, whose
            first ``kv_len`` elements belong to the keys. ``N`` is proved not to be smaller.
        least: only integers of this or more make a group; None for all.
        together: the keys of a group are proved to lie side by side.
        word: what people call it, "document", "chunk" or "block".
    """

    node: fx.Node
    least: int | None = None
    together: bool = False
    word: str = "document"


CAUSAL = "causal"
Term: TypeAlias = "str | MaskGroup | sympy.Expr"
"""``CAUSAL``, a group, or a window in tokens."""


@dataclass(frozen=True)
class MaskFact:
    """A proved (or refused) reading of one attention mask.

    For a *known* fact, pair ``(b, i, j)`` (query row ``i``, key ``j``, both counted from 0 in their own tensor) is
    visible exactly when

    ``(not causal or j <= i + offset) and (window is None or i + offset - j < window) and (padding is None or
    padding[b, j])`` (``not padding[b, j]`` where ``padding_hides``)

    and, for every clause of ``clauses``, one of its terms holds: ``j <= i + offset``, a window
    (``i + offset - j < w``), or a group that row ``i`` (at position ``i + offset``) and key ``j`` share.

    An additive mask is known only when it adds 0 where visible and at least as good as -inf elsewhere (``-inf`` or
    the dtype's most negative finite value); adding anything else would be a bias, which is unknown.

    Attributes:
        known: False when nothing could be proved; ``detail`` then says why and all else is meaningless.
        causal: the mask contains ``j <= i + offset``.
        offset: integer expression over the graph's shape symbols, the position of query row 0.
        window: sliding window in tokens, an integer expression, or None.
        padding: node of the tensor ``[B, N]`` or ``[B, 1, 1, N]`` (bool, or integers where non-zero means live) whose
            first ``kv_len`` columns say which keys are live, or None. ``B`` is proved. ``N`` is proved to be
            ``kv_len``, or not to be smaller, or the graph indexes the tensor at every key, which fails where ``N`` is
            too small. That indexing goes away with the mask, so whoever uses the padding has to slice
            ``[:, :kv_len]`` and to check ``N >= kv_len`` when the graph runs.
        padding_hides: that tensor is non-zero where a key is dead instead.
        expression: the boolean expression that was read from the graph, for people.
        detail: why nothing was proved, naming the node that stopped the proof.
        clauses: what else has to hold: packed documents and chunks are clauses of one term, image blocks that see both
            ways are ``(causal, group)``. Only facts with a causal term somewhere have any.
    """

    known: bool
    causal: bool = False
    offset: sympy.Expr = sympy.Integer(0)
    window: sympy.Expr | None = None
    padding: fx.Node | None = None
    expression: str = ""
    detail: str = ""
    clauses: tuple[tuple[Term, ...], ...] = ()
    padding_hides: bool = False

    @property
    def prefill(self) -> bool:
        """Whether the mask is that of a decoder's prompt: causal, but for blocks whose tokens see both ways."""
        return self.causal or any(term == CAUSAL for clause in self.clauses for term in clause)

    @property
    def windows(self) -> list[sympy.Expr]:
        """Every sliding window, in tokens."""
        inside = [t for clause in self.clauses for t in clause if isinstance(t, sympy.Expr)]
        return inside if self.window is None else [self.window, *inside]

    def with_sizes(self, sizes: Mapping[sympy.Expr, sympy.Expr]) -> MaskFact:
        """The fact where some symbols are known."""

        def settled(term: Term) -> Term:
            return sympy.expand(term.xreplace(sizes)) if isinstance(term, sympy.Expr) else term

        return replace(
            self,
            offset=settled(self.offset),
            window=None if self.window is None else settled(self.window),
            clauses=tuple(tuple(map(settled, clause)) for clause in self.clauses),
        )

    @property
    def groups(self) -> tuple[MaskGroup, ...]:
        """The groups of all clauses, each once."""
        return tuple(dict.fromkeys(t for clause in self.clauses for t in clause if isinstance(t, MaskGroup)))

    def __str__(self) -> str:
        if not self.known:
            return f"unknown ({self.detail})"
        terms = []
        if self.causal:
            terms.append("causal" if self.offset == 0 else f"causal with offset {self.offset}")
        if self.window is not None:
            terms.append(f"sliding window {self.window}")
        if self.padding is not None:
            terms.append("padding")
        for clause in self.clauses:
            words = [_word(term) for term in clause]
            terms.append(words[0] if len(words) == 1 else f"({' or '.join(words)})")
        return " and ".join(terms) if terms else "all pairs visible"


def _word(term: Term) -> str:
    if isinstance(term, MaskGroup):
        return f"same {term.word}"
    return term if isinstance(term, str) else f"sliding window {term}"
