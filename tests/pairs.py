"""Combinations of parameters where the full product would take too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few combinations of one value of each axis, among which any two values of two axes come together."""
    indices = list(product(*(range(len(axis)) for axis in axes)))
    left = set().union(*map(_pairs, indices))
    used: Counter[tuple[int, int]] = Counter()
    chosen = []
    while left:
        # Among the best, one whose values have had fewer turns.
        best = max(indices, key=lambda index: (len(left & _pairs(index)), -sum(used[at] for at in enumerate(index))))
        left -= _pairs(best)
        used.update(enumerate(best))
        chosen.append(best)
    return [tuple(axis[i] for axis, i in zip(axes, index, strict=True)) for index in sorted(chosen)]


def _pairs(index: Iterable[int]) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(index), 2))
