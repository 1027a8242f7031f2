"""Nearest names, for errors that name the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The name in ``known`` that ``word`` was most likely meant to be, or None when none is close."""
    folded = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: ``; did you mean "recall"?``, or the list of all known names."""
    names = sorted(known)
    best = nearest(word, names)
    return f'; did you mean "{best}"?' if best else f"; known: {', '.join(names)}"
