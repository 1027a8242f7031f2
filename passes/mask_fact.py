"""What a mask was proved to mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True)
class MaskFact:
    """A proved (or refused) reading of one attention mask.

    For a *known* fact, pair ``(b, i, j)`` (query row ``i``, key ``j``, both counted from 0 in their own tensor) is
    visible exactly when

    ``(not causal or j <= i + offset) and (window is None or i + offset - j < window) and (padding is None or
    padding[b, j])``.

    An additive mask is known only when it adds 0 where visible and at least as good as -inf elsewhere (``-inf`` or
    the dtype's most negative finite value); adding anything else would be a bias, which is unknown.

    Attributes:
        known: False when nothing could be proved; ``detail`` then says why and all else is meaningless.
        causal: the mask contains ``j <= i + offset``.
        offset: integer expression over the graph's shape symbols, the position of query row 0.
        window: sliding window in tokens, an integer expression, or None.
        padding: node of the 2-D ``[B, N]`` tensor (bool, or integers where non-zero means live) whose first
            ``kv_len`` columns say which keys are live, or None. ``B`` is proved. ``N`` is proved to be ``kv_len``, or
            not to be smaller, or the graph indexes the tensor at every key, which fails where ``N`` is too small.
            That indexing goes away with the mask, so whoever uses the padding has to slice ``[:, :kv_len]`` and to
            check ``N >= kv_len`` when the graph runs.
        expression: the boolean expression that was read from the graph, for people.
        detail: why nothing was proved, naming the node that stopped the proof.
    """

    known: bool
    causal: bool = False
    offset: sympy.Expr = sympy.Integer(0)
    window: sympy.Expr | None = None
    padding: fx.Node | None = None
    expression: str = ""
    detail: str = ""

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
        return " and ".join(terms) if terms else "all pairs visible"
