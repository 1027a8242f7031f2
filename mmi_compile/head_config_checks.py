"""What reading a head config has to refuse, with the place in the file and the mend.

Each check names a place within what it was given; ``under`` puts it into the whole.
"""

from __future__ import annotations

import collections
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from mmi_compile.decision import MMIError
from mmi_compile.kernels.patterns import PlacedError, shown


class HeadConfigError(MMIError):
    """A head config, or what should become one, is refused.

    Attributes:
        place: the place in the file, such as ``layers[3].heads[7].pattern.n_slash``; empty for all of it. ``heads[7]``
            is the eighth entry of the list, which is a later head where entries before it have a ``count``.
        problem: what must be there, what is, and the mend.
        source: the file, or empty.
    """

    def __init__(self, place: str, problem: str, source: str = "") -> None:
        super().__init__(place, problem, source)
        self.place, self.problem, self.source = place, problem, source

    def __str__(self) -> str:
        return ": ".join(part for part in (self.source, self.place, self.problem) if part)


def refuse(place: str, problem: str) -> NoReturn:
    """Raise :class:`HeadConfigError`."""
    raise HeadConfigError(place, problem)


@contextmanager
def under(place: str) -> Iterator[None]:
    """Put the places that errors name below ``place``."""
    try:
        yield
    except (HeadConfigError, PlacedError) as error:
        dot = "." if error.place and not error.place.startswith("[") else ""
        raise HeadConfigError(f"{place}{dot}{error.place}", error.problem) from None


@contextmanager
def from_file(source: object) -> Iterator[None]:
    """Name the file in the errors of what is done with it."""
    try:
        yield
    except HeadConfigError as error:
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
        raise HeadConfigError(error.place, error.problem, name) from None


def read_json(path: str | os.PathLike[str]) -> object:
    """What the file holds; whatever keeps it from being read as JSON is refused."""
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        refuse("", "there is no such file; give the path of a head config, or write one with `mmi search`")
    except (OSError, ValueError) as error:
        refuse("", f"cannot be read: {getattr(error, 'strerror', None) or error}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        refuse("", f"is not UTF-8 text (byte {error.start}); give a JSON file, or save it as UTF-8")
    if not text.strip():
        refuse("", "is empty; write it again")
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except json.JSONDecodeError as error:
        if _is_cut(text.rstrip(), error):
            refuse("", f"ends too early, in line {error.lineno}: it was cut short; copy or write it again")
        refuse("", f"is not JSON: {error.msg} in line {error.lineno}, column {error.colno}")
    except (RecursionError, ValueError) as error:  # nested too deeply; an int of thousands of digits
        refuse("", f"is not a head config: {error}")


def _is_cut(text: str, error: json.JSONDecodeError) -> bool:
    """Whether the end of an object or a list is missing: in the middle of something, or after it."""
    if not text.lstrip().startswith(("{", "[")) or error.msg == "Extra data":
        return False
    return error.pos >= len(text) or not text.endswith(("}", "]"))


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the file; a key written twice would silently hide the first one's value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twin = next(key for key, n in collections.Counter(key for key, _ in pairs).items() if n > 1)
        refuse("", f"an object has the key {shown(twin)} twice; keep one of them")
    return found


def spelled_number(text: str) -> int | None:
    """The small number that a key of an object spells, if it is one."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def checked_int(value: object, place: str, least: int) -> int:
    """An int of ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        refuse(place, f"must be an int of {least} or more, is {shown(value)}")
    return value


def checked_text(value: object, place: str) -> None:
    """A string, or None."""
    if value is not None and not isinstance(value, str):
        refuse(place, f"must be a string, is {shown(value)}")


def checked_number(value: object, place: str, low: float = -math.inf, high: float = math.inf) -> float | None:
    """A finite number from ``low`` to ``high`` as a float, or None."""
    if value is None:
        return None
    span = "" if low == -math.inf else f" of {low} or more" if high == math.inf else f" from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(place, f"must be a number{span}, is {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        refuse(place, f"must be a finite number{span}, is {shown(value)}; leave it out if it is not known")
    return number
