"""The patterns one attention head may keep (MMInference section 3, MInference section 3.2).

A pattern is a rule in tokens. It is always met with the model's own mask, counts its sinks from the first live key of
each batch element (so left padding does not eat them) and its last rows from the last live row.

    a_shape        tri_shape      vertical_slash    grid           block_topk
    #              #              #                 #              #
    ##             ##             ##                ##             ##
    # #            # #            #.##              #.##           # ##
    #  #           #  #           # .##             #..##          # ###
    #   #          #####          # # .#            #..###         ### ##
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

from mmi_compile._suggest import did_you_mean, nearest

SCORINGS = ("mean", "antidiagonal")
"""How ``block_topk`` scores a key block."""

MOST_BLOCKS = 512
"""Key blocks that ``block_topk`` lists for a query tile at most. At a million tokens and 128 rows a tile, 512 of them
take 16 MiB a head, which is 4.9 % of q, k and v with 28 query heads, 4 key heads and 128 half precision dimensions."""

LEAST_STRIDE = 4
"""Smallest antidiagonal stride: scores cost ``1 / (2 stride)`` of dense attention."""


def _require(pattern: str, field: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{pattern}: {field} must be an int (a number of tokens or lines), got {value!r}")
    if value < least:
        raise ValueError(f"{pattern}: {field} is {value}; give {least} or more")


@dataclass(frozen=True)
class _Named:
    """Name, printing and JSON form, shared by all patterns."""

    name: ClassVar[str]

    def describe(self) -> str:
        """Name and values for people, such as ``a_shape(128, 4096)``; switches show by name when they are on."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        words = [key if value is True else str(value) for key, value in values.items() if value is not False]
        return f"{self.name}({', '.join(words)})" if words else self.name

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary of JSON values whose key ``pattern`` holds the name."""
        return {"pattern": self.name, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Dense(_Named):
    """Everything the model's mask allows."""

    name: ClassVar[str] = "dense"


@dataclass(frozen=True)
class AShape(_Named):
    """The first ``sink`` keys and the nearest ``local`` keys: ``j < sink or i - j < local`` (tokens)."""

    sink: int
    local: int
    name: ClassVar[str] = "a_shape"

    def __post_init__(self) -> None:
        _require(self.name, "sink", self.sink, 0)
        _require(self.name, "local", self.local, 1)


@dataclass(frozen=True)
class TriShape(_Named):
    """``a_shape`` and every key for the last ``last`` query rows."""

    sink: int
    local: int
    last: int
    name: ClassVar[str] = "tri_shape"

    def __post_init__(self) -> None:
        _require(self.name, "sink", self.sink, 0)
        _require(self.name, "local", self.local, 1)
        _require(self.name, "last", self.last, 0)


@dataclass(frozen=True)
class VerticalSlash(_Named):
    """The heaviest ``n_vertical`` key columns and ``n_slash`` diagonals ``i - j`` of the probe.

    Part of either count always goes to the first columns and to the nearest diagonals, so that no row is empty.
    """

    n_vertical: int
    n_slash: int
    name: ClassVar[str] = "vertical_slash"

    def __post_init__(self) -> None:
        _require(self.name, "n_vertical", self.n_vertical, 0)
        _require(self.name, "n_slash", self.n_slash, 1)


@dataclass(frozen=True)
class Grid(_Named):
    """Evenly spaced key lines ``j = p (mod stride)`` beside ``a_shape(sink, local)``.

    The phase ``p`` is the one that holds the most probe mass. Query lines use the same phase: the probe sees only the
    last rows, and it is the same tokens (a row or frame separator) that both attend and are attended to.

    Attributes:
        stride: tokens between lines, or None to estimate it from the probe.
        sink, local: as in ``a_shape``.
        query_lines: rows ``i = p (mod stride)`` keep every key.
        same_phase: keep pairs with ``i = j (mod stride)``. These are diagonals, computed in whole key blocks: a stride
            below about two blocks costs as much as dense attention.
    """

    stride: int | None
    sink: int
    local: int
    query_lines: bool = False
    same_phase: bool = False
    name: ClassVar[str] = "grid"

    def __post_init__(self) -> None:
        if self.stride is not None:
            _require(self.name, "stride", self.stride, 1)
        _require(self.name, "sink", self.sink, 0)
        _require(self.name, "local", self.local, 1)
        for field in ("query_lines", "same_phase"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"grid: {field} must be True or False, got {getattr(self, field)!r}")


@dataclass(frozen=True)
class BlockTopK(_Named):
    """The key blocks (``block_n`` keys of the kernel) with the best scores for each tile of query rows.

    They come on top of ``sink`` and ``local``, which are as in ``a_shape`` and always kept with the tile's own blocks.
    ``kernels/block_topk.py`` says how blocks are scored, and when a tile lists fewer than ``k`` or becomes dense.

    Attributes:
        k: key blocks for each query tile, at most ``MOST_BLOCKS``.
        mass: recall target between 0 and 1 instead of ``k``: the fewest blocks which, with the sinks and the window,
            reach that share of all block scores. What lists may hold is fixed by the number of keys; a tile that needs
            more becomes dense.
        scoring: ``"mean"`` for mean-pooled queries and keys (block-sparse heads of MInference, section 3.2), or
            ``"antidiagonal"`` for sums along strided antidiagonals (XAttention, section 2.1).
        stride: tokens in a group of the antidiagonal scoring; ``"mean"`` has no use for it.
        local, sink: tokens, as in ``a_shape``.
    """

    k: int | None = None
    mass: float | None = None
    scoring: str = "mean"
    stride: int = 16
    local: int = 128
    sink: int = 128
    name: ClassVar[str] = "block_topk"

    def __post_init__(self) -> None:
        if (self.k is None) == (self.mass is None):
            raise ValueError(f"block_topk: k is {self.k} and mass is {self.mass}; give exactly one of them")
        if self.k is not None:
            _require(self.name, "k", self.k, 1)
            if self.k > MOST_BLOCKS:
                raise ValueError(
                    f"block_topk: k is {self.k}; give {MOST_BLOCKS} or less (lists of more blocks would take more than "
                    "5 % of the memory of q, k and v)"
                )
        if self.mass is not None:
            if isinstance(self.mass, bool) or not isinstance(self.mass, float):
                raise TypeError(f"block_topk: mass must be a float (a share such as 0.95), got {self.mass!r}")
            if not 0 < self.mass < 1:
                raise ValueError(f"block_topk: mass is {self.mass}; give a share between 0 and 1, or take dense for 1")
        if self.scoring not in SCORINGS:
            raise ValueError(f"block_topk: unknown scoring {self.scoring!r}{did_you_mean(str(self.scoring), SCORINGS)}")
        _require(self.name, "stride", self.stride, LEAST_STRIDE)
        _require(self.name, "local", self.local, 1)
        _require(self.name, "sink", self.sink, 0)

    def describe(self) -> str:
        """For example ``block_topk(k=64, mean, local=128, sink=128)``."""
        size = f"k={self.k}" if self.mass is None else f"mass={self.mass}"
        scoring = self.scoring if self.scoring == "mean" else f"{self.scoring}, stride={self.stride}"
        return f"{self.name}({size}, {scoring}, local={self.local}, sink={self.sink})"


@dataclass(frozen=True)
class OwnPattern(_Named):
    """Base of patterns of your own: lines that are known before the input is.

    Subclass it as a frozen dataclass with a ``name``, and register it with :func:`register_pattern`. Its fields are its
    parameters; they must be hashable and have JSON forms (a list becomes a tuple). A head keeps pair ``(i, j)`` when
    ``j`` is one of ``columns``, or ``i - j`` one of ``distances``, or ``a_shape(sink, local)`` keeps it, where a
    subclass has fields of these names; without them ``sink`` is 0 and ``local`` 1, the row's own key.

    Under a boundary of a ``ByModality`` head, both count as positions do there: in ``2d`` a column is a rank among the
    keys of its modality. Neither waits for a device, since both are asked on the host, once for each length.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        for field_name, least in (("sink", 0), ("local", 1)):
            if hasattr(self, field_name):
                _require(self.name, field_name, getattr(self, field_name), least)
        try:
            hash(self)
        except TypeError as error:
            raise TypeError(f"{self.name}: parameters must be hashable, such as numbers and tuples ({error})") from None

    def columns(self, keys: int) -> Iterable[int]:
        """Keys that every later row keeps, in tokens from the first live key; those outside ``0 … keys - 1`` are none.

        Args:
            keys: how many there are.
        """
        return ()

    def distances(self, positions: int) -> Iterable[int]:
        """Distances ``i - j`` that every row keeps, in tokens; those outside ``0 … positions - 1`` are none.

        Kernels compute them in whole key blocks, so that distances closer to each other than a block cost as much as
        a window.
        """
        return ()

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary of JSON values whose key ``pattern`` holds the name.

        Raises:
            ValueError: no :func:`register_pattern` for this class, so that nothing could read it again.
        """
        if _KINDS.get(self.name) is not type(self):
            raise ValueError(
                f"{self.name}: {type(self).__qualname__} is not registered, or another class has taken its name since;"
                " decorate it with @mmi_compile.register_pattern"
            )
        return super().to_json()


Pattern: TypeAlias = Dense | AShape | TriShape | VerticalSlash | Grid | BlockTopK | OwnPattern


@dataclass(frozen=True)
class ByModality:
    """A head that treats modalities apart (MMInference section 3).

    Attributes:
        boundary: ``"q"``: a pattern for the query rows of each modality; ``"2d"``: one for each pair of query and key
            modality.
        default: the pattern of every modality or pair that ``patterns`` does not name.
        patterns: pairs ``(modality id, pattern)`` for ``q``, ``((query id, key id), pattern)`` for ``2d``.
    """

    boundary: Literal["q", "2d"]
    default: Pattern
    patterns: tuple[tuple[int | tuple[int, int], Pattern], ...] = ()

    def __post_init__(self) -> None:
        if self.boundary not in ("q", "2d"):
            raise ValueError(f'boundary {self.boundary!r}: give "q" or "2d"; "none" and "k" are plain patterns')
        for place, _ in self.patterns:
            if isinstance(place, tuple) != (self.boundary == "2d"):
                wanted = "(query id, key id)" if self.boundary == "2d" else "a modality id"
                raise ValueError(f"boundary {self.boundary}: {place!r} must be {wanted}")
        for pattern in (self.default, *(p for _, p in self.patterns)):
            if isinstance(pattern, BlockTopK):
                raise ValueError("block_topk within a boundary is not built; use vertical_slash or grid there")
            if isinstance(pattern, Grid) and pattern.query_lines:
                raise ValueError("query_lines within a boundary are not built: rows are grouped already")

    def pattern(self, query: int, key: int | None = None) -> Pattern:
        """The pattern of a query modality (``q``) or of a pair of modalities (``2d``)."""
        place = query if self.boundary == "q" else (query, key)
        return next((pattern for named, pattern in self.patterns if named == place), self.default)

    def describe(self, names: Mapping[int, str] | None = None) -> str:
        """For people, such as ``q(video: grid(256, 64, 1024), else: a_shape(128, 1024))``.

        Args:
            names: of modality ids; one without a name shows as its number.
        """
        named = names or {}

        def text(place: int | tuple[int, int]) -> str:
            ids = place if isinstance(place, tuple) else (place,)
            return "→".join(named.get(i, str(i)) for i in ids)

        parts = [f"{text(place)}: {pattern.describe()}" for place, pattern in self.patterns]
        return f"{self.boundary}({', '.join([*parts, f'else: {self.default.describe()}'])})"

    def to_json(self) -> dict[str, Any]:
        """JSON values: ``boundary``, ``default``, and ``patterns``, a list of flat patterns.

        Each of these holds its modality id as ``query``, and with ``2d`` that of its keys as ``key``.
        """
        named = []
        for place, pattern in self.patterns:
            ids = {"query": place[0], "key": place[1]} if isinstance(place, tuple) else {"query": place}
            named.append({**ids, **pattern.to_json()})
        return {"boundary": self.boundary, "default": self.default.to_json(), "patterns": named}


HeadPattern: TypeAlias = Pattern | ByModality
_KINDS: dict[str, type[Pattern]] = {
    kind.name: kind for kind in (Dense, AShape, TriShape, VerticalSlash, Grid, BlockTopK)
}


_BUILT_IN = frozenset(_KINDS)

OwnT = TypeVar("OwnT", bound=OwnPattern)


def register_pattern(kind: type[OwnT]) -> type[OwnT]:
    """Make head configs and compiled graphs know a pattern of your own by its name; may be used as a decorator.

    Import the module that does so before a head config that names the pattern is read, and before compiled code runs
    that was cached on disk. Registering a name again replaces it, as a notebook cell that is run again does.

    Raises:
        TypeError: not a frozen dataclass that derives from ``OwnPattern``.
        ValueError: no name, or that of a pattern which is built in.
    """
    if not (isinstance(kind, type) and issubclass(kind, OwnPattern)):
        raise TypeError(f"{kind!r} is no subclass of OwnPattern; derive it from mmi_compile.OwnPattern")
    if "__dataclass_params__" not in vars(kind) or not vars(kind)["__dataclass_params__"].frozen:
        raise TypeError(f"{kind.__name__} is no frozen dataclass; decorate it with @dataclass(frozen=True)")
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f'{kind.__name__} has no name; give it one, such as `name: ClassVar[str] = "my_pattern"`')
    if name in _BUILT_IN:
        raise ValueError(f'"{name}" is the name of a pattern that is built in; give {kind.__name__} another one')
    if any(field.name == "pattern" for field in dataclasses.fields(kind)):
        raise ValueError(f'{kind.__name__} has a field "pattern", where JSON holds the name; rename it')
    _KINDS[name] = kind
    from mmi_compile.kernels.layer_heads import parse_heads  # which needs this module

    parse_heads.cache_clear()  # what it remembers may be made of what this replaces
    return kind


def from_json(data: Mapping[str, Any]) -> Pattern:
    """The pattern that ``to_json`` wrote.

    Raises:
        ValueError: unknown pattern or option, or an option missing; the message names the nearest known word.
        TypeError: a value of the wrong type.
    """
    options = dict(data)
    name = options.pop("pattern", None)
    if not isinstance(name, str) or name not in _KINDS:
        own = "" if nearest(str(name), _KINDS) else "; if it is your own, import the module that registers it first"
        raise ValueError(f"unknown pattern {name!r}{did_you_mean(str(name), _KINDS)}{own}")
    fields = dataclasses.fields(_KINDS[name])
    known = [field.name for field in fields]
    for key in options:
        if key not in known:
            raise ValueError(f'unknown option "{key}" for pattern {name}{did_you_mean(key, known)}')
    none = dataclasses.MISSING
    missing = [f.name for f in fields if f.default is none and f.default_factory is none and f.name not in options]
    if missing:
        raise ValueError(f"pattern {name} lacks {', '.join(missing)}; add it to the entry")
    return _KINDS[name](**options)


class PlacedError(ValueError):
    """JSON that is no pattern.

    Attributes:
        place: where in the data, such as ``patterns[0].n_slash``; empty for the whole of it.
        problem: what must be there and what is.
    """

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(place, problem)
        self.place, self.problem = place, problem

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}" if self.place else self.problem


def shown(value: object) -> str:
    """A value as its file shows it, cut to a length that fits an error message."""
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError):  # keys that JSON does not have; a circle
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_PARTS = ("boundary", "default", "patterns")


def head_from_json(data: object) -> HeadPattern:
    """The pattern of a head, with or without boundaries, that ``to_json`` wrote.

    Raises:
        PlacedError: anything else; it names the place and the mend.
    """
    if isinstance(data, Mapping) and any(key in data for key in _PARTS):
        return _by_modality(data)
    return _placed_pattern(data, "")


def _by_modality(data: Mapping[str, Any]) -> ByModality:
    for key in data:
        if key not in _PARTS:
            raise PlacedError(str(key), f"unknown key{did_you_mean(str(key), _PARTS)}")
    boundary, default, named = (data.get(key) for key in _PARTS)
    if boundary not in ("q", "2d"):
        raise PlacedError("boundary", f'must be "q" or "2d", is {shown(boundary)}; "none" and "k" are plain patterns')
    if "default" not in data:
        raise PlacedError("", "lacks default; add the pattern of what patterns does not name")
    if not isinstance(named, list | tuple):
        raise PlacedError("patterns", f"must be a list of patterns with their modality ids, is {shown(named)}")
    patterns: dict[int | tuple[int, int], Pattern] = {}
    for index, entry in enumerate(named):
        place = f"patterns[{index}]"
        ids = _modality_ids(entry, place, ("query", "key") if boundary == "2d" else ("query",))
        if ids in patterns:
            raise PlacedError(place, f"names {shown(ids)} once more; keep one of them")
        rest = {key: value for key, value in entry.items() if key not in ("query", "key")}
        patterns[ids] = _allowed(_placed_pattern(rest, place), place)
    return ByModality(boundary, _allowed(_placed_pattern(default, "default"), "default"), tuple(patterns.items()))


def _modality_ids(entry: object, place: str, names: tuple[str, ...]) -> int | tuple[int, int]:
    """The modality of rows (``q``), or of rows and keys (``2d``), that an entry is for."""
    if not isinstance(entry, Mapping):
        raise PlacedError(place, f"must be an object with {' and '.join(names)}, is {shown(entry)}")
    if "key" in entry and "key" not in names:
        raise PlacedError(f"{place}.key", "is only for boundary 2d; remove it")
    for name in names:
        if name not in entry:
            raise PlacedError(place, f"lacks {name}; add the id of a modality")
        value = entry[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            wanted = "the id of a modality, an int of 0 or more"
            raise PlacedError(f"{place}.{name}", f"must be {wanted}, is {shown(value)}")
    return (entry["query"], entry["key"]) if "key" in names else entry["query"]


def _allowed(pattern: Pattern, place: str) -> Pattern:
    """The pattern, if one region of a head may have it."""
    try:
        ByModality("q", pattern)
    except ValueError as error:
        raise PlacedError(place, str(error)) from None
    return pattern


def _placed_pattern(data: object, place: str) -> Pattern:
    if not isinstance(data, Mapping):
        raise PlacedError(place, f"must be an object that names a pattern, is {shown(data)}")
    wrong = next((key for key in data if not isinstance(key, str)), None)
    if wrong is not None:
        raise PlacedError(place, f"has the key {shown(wrong)}; keys are strings")
    try:
        return from_json(data)
    except (TypeError, ValueError) as error:
        field, problem = _guilty_field(str(error), data)
        raise PlacedError(".".join(part for part in (place, field) if part), problem) from None


def _guilty_field(message: str, data: Mapping[str, Any]) -> tuple[str, str]:
    """Which option of a pattern an error of its constructor is about, and what it says of it."""
    if message.startswith("unknown pattern"):
        return "pattern", message
    if unknown := re.match(r'unknown option "(.*?)" for pattern', message):
        return unknown[1], message
    text = message.removeprefix(f"{data.get('pattern')}: ")
    first, _, rest = text.partition(" ")
    if text.startswith("unknown scoring"):
        return "scoring", text
    if first not in data or first == "pattern" or "give exactly one" in text:
        return "", message
    if rest.startswith("must be an int"):
        return first, f"must be an int{_least(first, data)}, is {shown(data[first])}"
    must = re.match(r"(must be .*), got ", rest, re.DOTALL)
    return first, f"{must[1]}, is {shown(data[first])}" if must else rest


def _least(field: str, data: Mapping[str, Any]) -> str:
    """``of 1 or more``, as the pattern's own check puts it when it is given an int that is too small."""
    try:
        from_json({**data, field: -1})
    except (TypeError, ValueError) as error:
        bound = re.search(rf"\b{field} is -1; give (\d+) or more", str(error))
        return f" of {bound[1]} or more" if bound else ""
    return ""
