"""Which pattern each query head of a model runs: what head search writes and ``policy="config"`` reads.

The file is JSON, one line a head, so that people and ``diff`` can read it::

    {
      "version": 1,
      "fingerprint": {"layers": 2, "q_heads": 8, "kv_heads": 2, "head_dim": 64},
      "provenance": {"samples": 1, "tokens": 32768, "device": "NVIDIA H100"},
      "modalities": {"0": "text", "1": "video"},
      "layers": [
        {"heads": [
          {"count": 7, "pattern": {"pattern": "vertical_slash", "n_vertical": 1000, "n_slash": 1024}},
          {"pattern": {"boundary": "q", "default": {"pattern": "dense"}, "patterns": [...]}, "recall": 0.97}
        ]},
        ...
      ]
    }

``count`` stands for that many equal neighbouring heads. Every refusal is a :class:`HeadConfigError`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeAlias

from mmi_compile._suggest import did_you_mean, nearest
from mmi_compile.decision import MMIError
from mmi_compile.kernels.patterns import (
    AShape,
    BlockTopK,
    ByModality,
    HeadPattern,
    Pattern,
    PlacedError,
    VerticalSlash,
    head_from_json,
    shown,
)

VERSION = 1
"""The schema that this package writes and reads."""

Boundary: TypeAlias = Literal["none", "k", "q", "2d"]
BOUNDARIES = ("none", "k", "q", "2d")


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


# ---------------------------------------------------------------------------------------------------------------------
# The parts


@dataclass(frozen=True)
class Fingerprint:
    """The shape of the model, or of one tensor-parallel rank of it, that a config is for. Says nothing of weights.

    Attributes:
        layers: decoder layers with attention.
        q_heads, kv_heads: heads of each layer; on a rank, those of the rank.
        head_dim: dimensions of a head.
        hidden_size: width of the residual stream; None where it is not known.
        model_type: the model's name for its architecture, such as ``qwen2_5_vl``; None where it is not known.
        rank, world_size: which slice of the heads this is; ``world_size`` is 1 for the whole model.

    Raises:
        HeadConfigError: a value is not an int or out of range, or heads do not divide into groups.
    """

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int | None = None
    model_type: str | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("layers", "q_heads", "kv_heads", "head_dim", "world_size"):
            _checked_int(getattr(self, name), name, 1)
        _checked_int(self.rank, "rank", 0)
        if self.hidden_size is not None:
            _checked_int(self.hidden_size, "hidden_size", 1)
        _checked_text(self.model_type, "model_type")
        if self.q_heads % self.kv_heads:
            _refuse("kv_heads", f"must divide the {self.q_heads} query heads, is {self.kv_heads}")
        if self.rank >= self.world_size:
            _refuse("rank", f"must be less than world_size {self.world_size}, is {self.rank}")

    def mismatch(self, model: Fingerprint) -> str | None:
        """Every fact in which ``model`` differs from this config, with both values; None when there is none.

        ``hidden_size`` and ``model_type`` count only where both sides know them.
        """
        found = []
        for item in dataclasses.fields(self):
            mine, other = getattr(self, item.name), getattr(model, item.name)
            if mine != other and mine is not None and other is not None:
                found.append(f"{item.name} is {shown(mine)} in the config and {shown(other)} in the model")
        return "; ".join(found) or None

    def slice(self, rank: int, world_size: int) -> Fingerprint:
        """The fingerprint of one tensor-parallel rank; see :meth:`HeadConfig.slice`."""
        _checked_int(world_size, "world_size", 1)
        _checked_int(rank, "rank", 0)
        if self.world_size != 1:
            _refuse("world_size", f"this is slice {self.rank} of {self.world_size} already; slice the whole config")
        if self.q_heads % world_size:
            _refuse("world_size", f"must divide the {self.q_heads} query heads, is {world_size}")
        if self.kv_heads % world_size and world_size % self.kv_heads:
            _refuse("world_size", f"must divide the {self.kv_heads} kv heads or be a multiple, is {world_size}")
        kv_heads = max(1, self.kv_heads // world_size)
        return dataclasses.replace(
            self, q_heads=self.q_heads // world_size, kv_heads=kv_heads, rank=rank, world_size=world_size
        )

    def to_json(self) -> dict[str, Any]:
        """What is known, without ``rank`` and ``world_size`` for a whole model."""
        whole = ("rank", "world_size") if self.world_size == 1 else ()
        return {key: value for key, value in _known(self).items() if key not in whole}

    @classmethod
    def from_json(cls, data: object) -> Fingerprint:
        """What :meth:`to_json` wrote."""
        return cls(**_options(cls, data))


@dataclass(frozen=True)
class Provenance:
    """Where a config comes from, for people. Nothing here changes what runs.

    Attributes:
        source: what made it, such as ``"search"`` or the format it was imported from.
        samples: calibration prompts.
        tokens: tokens of the longest of them.
        budget: share of dense attention's measured time that the search could spend.
        device: what it was measured on.
        versions: versions of the packages that took part, by name.
        date: ISO 8601.
    """

    source: str | None = None
    samples: int | None = None
    tokens: int | None = None
    budget: float | None = None
    device: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    date: str | None = None

    def __post_init__(self) -> None:
        for name in ("source", "device", "date"):
            _checked_text(getattr(self, name), name)
        for name in ("samples", "tokens"):
            if getattr(self, name) is not None:
                _checked_int(getattr(self, name), name, 0)
        _set(self, "budget", _checked_number(self.budget, "budget", 0))
        if not isinstance(self.versions, Mapping):
            _refuse("versions", f"must be an object of versions by package name, is {shown(self.versions)}")
        for name, version in self.versions.items():
            if not isinstance(name, str) or not isinstance(version, str):
                _refuse(f"versions.{name}", f"must be a version as a string, is {shown(version)}")
        _set(self, "versions", dict(sorted(self.versions.items())))

    def to_json(self) -> dict[str, Any]:
        """What is known."""
        return {key: value for key, value in _known(self).items() if value != {}}

    @classmethod
    def from_json(cls, data: object) -> Provenance:
        """What :meth:`to_json` wrote."""
        return cls(**_options(cls, data))


@dataclass(frozen=True)
class HeadEntry:
    """What one query head runs, and how good the search found it.

    Attributes:
        pattern: a pattern, or one for each modality.
        boundary: as in MMInference, section 3. It follows from ``pattern``, but for ``"k"``: give that for a plain
            pattern of a head whose keys the search saw modality by modality. It is kept and runs like ``"none"``.
        score: what chose the pattern; its unit is that of who wrote it. Compare within one file only.
        recall: share of full attention's mass that the pattern kept, 0 to 1.
        density: pairs computed ÷ pairs of causal attention; whole tiles may take it above 1.

    Raises:
        HeadConfigError: a number is not finite or out of range, or the boundary is not that of the pattern.
    """

    pattern: HeadPattern
    boundary: Boundary = "none"
    score: float | None = None
    recall: float | None = None
    density: float | None = None

    _KEYS: ClassVar[tuple[str, ...]] = ("count", "pattern", "boundary", "score", "recall", "density")

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern | ByModality):
            _refuse("pattern", f"must be a pattern, is {shown(self.pattern)}")
        if not isinstance(self.boundary, str) or self.boundary not in BOUNDARIES:
            given = f"; did you mean {best!r}?" if (best := nearest(str(self.boundary), BOUNDARIES)) else ""
            _refuse("boundary", f"must be one of {', '.join(BOUNDARIES)}, is {shown(self.boundary)}{given}")
        if isinstance(self.pattern, ByModality) and self.boundary == "none":
            _set(self, "boundary", self.pattern.boundary)
        fits = (self.pattern.boundary,) if isinstance(self.pattern, ByModality) else ("none", "k")
        if self.boundary not in fits:
            _refuse("boundary", f'is "{self.boundary}", but that of the pattern is {" or ".join(fits)}; remove it')
        _set(self, "score", _checked_number(self.score, "score"))
        _set(self, "recall", _checked_number(self.recall, "recall", 0, 1))
        _set(self, "density", _checked_number(self.density, "density", 0))

    def to_json(self) -> dict[str, Any]:
        """The pattern and what is known of it; ``boundary`` only where the pattern does not tell."""
        data: dict[str, Any] = {"pattern": self.pattern.to_json()}
        if self.boundary == "k":
            data["boundary"] = "k"
        return {**data, **{key: getattr(self, key) for key in self._KEYS[3:] if getattr(self, key) is not None}}

    @classmethod
    def from_json(cls, data: object) -> HeadEntry:
        """What :meth:`to_json` wrote; a ``count`` beside it is for the caller."""
        options = dict(_object(data, cls._KEYS, ("pattern",)))
        options.pop("count", None)
        with _under("pattern"):
            options["pattern"] = head_from_json(options["pattern"])
        if isinstance(options["pattern"], ByModality) and options.get("boundary") == "none":
            _refuse("boundary", f'is "none", but that of the pattern is {options["pattern"].boundary}; remove it')
        return cls(**options)


# ---------------------------------------------------------------------------------------------------------------------
# The config


@dataclass(frozen=True)
class HeadConfig:
    """What every query head of a model runs.

    Heads are global: number them as the whole model does, and give each tensor-parallel rank its :meth:`slice`.

    Attributes:
        fingerprint: the model it is for.
        layers: for each layer, one entry for each query head.
        modalities: names of all modality ids that patterns with boundaries use, such as ``{0: "text", 1: "image"}``.
        provenance: where it comes from.
        version: of the schema.

    Raises:
        HeadConfigError: from all that makes, reads and writes one. It names the place in the file and the mend.
    """

    fingerprint: Fingerprint
    layers: tuple[tuple[HeadEntry, ...], ...]
    modalities: Mapping[int, str] = field(default_factory=dict, hash=False)
    provenance: Provenance = field(default_factory=Provenance)
    version: int = VERSION

    def __post_init__(self) -> None:
        _checked_version(self.version)
        _set(self, "layers", tuple(tuple(layer) for layer in self.layers))
        _set(self, "modalities", dict(sorted(self.modalities.items())))
        _checked_names(self.modalities)
        if len(self.layers) != self.fingerprint.layers:
            wanted = f"fingerprint.layers is {self.fingerprint.layers}"
            _refuse("layers", f"holds {len(self.layers)} layers, but {wanted}; correct one of them")
        for number, layer in enumerate(self.layers):
            with _under(f"layers[{number}].heads"):
                _checked_count(len(layer), self.fingerprint)
                for head, entry in enumerate(layer):
                    with _under(f"[{head}]"):
                        _checked_modalities(entry, self.modalities)

    def slice(self, rank: int, world_size: int) -> HeadConfig:
        """The heads of one tensor-parallel rank: an equal, contiguous share of the query heads of every layer.

        Ranks share out the kv heads likewise; where there are more ranks than kv heads, each kv head is on
        ``world_size / kv_heads`` ranks. The fingerprint then counts the rank's heads and names the rank.

        Raises:
            HeadConfigError: ``world_size`` does not fit the heads, or this is a slice already.
        """
        fingerprint = self.fingerprint.slice(rank, world_size)
        start = rank * fingerprint.q_heads
        layers = tuple(layer[start : start + fingerprint.q_heads] for layer in self.layers)
        return dataclasses.replace(self, fingerprint=fingerprint, layers=layers)

    def describe(self) -> str:
        """A line about the model and one for each layer: heads by boundary and pattern, the most frequent first.

        Where densities are known, their mean stands at the end of the line.
        """
        of = self.fingerprint
        part = f", slice {of.rank} of {of.world_size}" if of.world_size > 1 else ""
        title = f"{of.layers} layers of {of.q_heads} query and {of.kv_heads} kv heads, head dim {of.head_dim}{part}"
        width = len(str(of.layers - 1))
        return "\n".join([title, *(f"layer {n:>{width}}  {_summary(layer)}" for n, layer in enumerate(self.layers))])

    # JSON

    def to_json(self) -> dict[str, Any]:
        """JSON values in the order of the file; equal neighbours of a layer are one entry with a ``count``."""
        return {
            "version": self.version,
            "fingerprint": self.fingerprint.to_json(),
            "provenance": self.provenance.to_json(),
            "modalities": {str(key): name for key, name in self.modalities.items()},
            "layers": [{"heads": _heads_to_json(layer)} for layer in self.layers],
        }

    @classmethod
    def from_json(cls, data: object) -> HeadConfig:
        """The config that :meth:`to_json` wrote."""
        if isinstance(data, list):
            _refuse("", "is a list of layers, as MInference writes them; read it with HeadConfig.from_minference")
        known = ("version", "fingerprint", "provenance", "modalities", "layers")
        if isinstance(data, Mapping) and "version" in data:
            _checked_version(data["version"])  # another version may well have other keys
        values = _object(data, known, ("version", "fingerprint", "layers"))
        with _under("fingerprint"):
            fingerprint = Fingerprint.from_json(values["fingerprint"])
        with _under("provenance"):
            provenance = Provenance.from_json(values.get("provenance", {}))
        modalities = _modalities_from_json(values.get("modalities", {}))
        layers = []
        with _under("layers"):
            for number, layer in enumerate(_list(values["layers"], "layers")):
                with _under(f"[{number}]"):
                    heads = _object(layer, ("heads",), ("heads",))["heads"]
                    with _under("heads"):
                        layers.append(_heads_from_json(heads, fingerprint, modalities))
        return cls(fingerprint, tuple(layers), modalities, provenance)

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> HeadConfig:
        """Read and check a config: the path of a file, or what is in it."""
        if isinstance(source, Mapping):
            return cls.from_json(source)
        with _from_file(source):
            return cls.from_json(_read(source))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file. Whoever reads it meanwhile, or after an interruption, sees all of the old one or the new."""
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        with _from_file(path):
            text = _layout(self.to_json())
            try:
                with temporary.open("x", encoding="utf-8") as file:
                    file.write(text)
                temporary.replace(target)
            except OSError as error:
                _refuse("", f"cannot be written: {error.strerror or error}; give a folder that exists and is yours")
            finally:
                temporary.unlink(missing_ok=True)

    # Other formats

    @classmethod
    def from_minference(
        cls,
        data: str | os.PathLike[str] | Sequence[Any],
        *,
        kv_heads: int,
        head_dim: int,
        hidden_size: int | None = None,
        model_type: str | None = None,
    ) -> HeadConfig:
        """MInference's best patterns: for each layer, ``{"0": [pattern, number, number, score], ...}``.

        ``vertical_and_slash`` becomes ``vertical_slash`` (at least 30 columns and 50 diagonals, as its kernel takes
        them), ``stream_llm`` becomes ``a_shape``, and ``block_sparse`` becomes ``block_topk`` of 100 blocks, a number
        that its kernel has fixed.

        What is lost: its probe always keeps 30 first columns and the 100 nearest diagonals, while ours keeps a share of
        the counts; its blocks have 64 keys, ours as many as the kernel's tiles, so that ``block_topk`` keeps as much or
        up to twice as much, and a window beside it; ``starting_layer`` (dense layers at the bottom) is not in the file.
        Scores are kept as they are: in some files they are recalls, in others counts.

        Args:
            data: the list of layers, or the path of the JSON file.
            kv_heads, head_dim, hidden_size, model_type: of the model, which the file does not say.

        Raises:
            HeadConfigError: the data has another form, a layer lacks heads, or a pattern has no fixed sizes, such as
                ``flex_vertical_and_slash``.
        """
        with _from_file(data):
            read = _read(data) if isinstance(data, str | os.PathLike) else data
            layers = _foreign_layers(read, "", extra_columns=0)
            heads = len(layers[0])
            fingerprint = Fingerprint(len(layers), heads, kv_heads, head_dim, hidden_size, model_type)
            return cls(fingerprint, layers, provenance=Provenance(source="MInference"))

    @classmethod
    def from_qwen_sparse_attention_config(
        cls,
        data: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any],
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        hidden_size: int | None = None,
        model_type: str | None = None,
    ) -> HeadConfig:
        """The ``sparse_attention_config`` of Qwen's one-million-token models, as vLLM's dual chunk attention reads it.

        All heads are ``vertical_and_slash``, which becomes ``vertical_slash``; where the file says 30 columns, vLLM
        takes 130, and so does this.

        What is lost: dual chunk attention itself, which changes positions and estimates lines chunk by chunk;
        ``sparse_attention_threshold`` (dense up to 32768 tokens: set the option ``min_tokens``),
        ``sparse_attention_last_q`` and ``sparse_attention_enabled``.

        Args:
            data: the layers (a list, or an object by layer number), a ``dual_chunk_attention_config`` or a whole
                ``config.json`` that holds them, or the path of one of these.
            kv_heads, head_dim, hidden_size, model_type: of the model; a whole ``config.json`` says them itself.

        Raises:
            HeadConfigError: the data has another form or other patterns, or contradicts an argument.
        """
        with _from_file(data):
            read = _read(data) if isinstance(data, str | os.PathLike) else data
            facts = _qwen_facts(read)
            given = {"kv_heads": kv_heads, "head_dim": head_dim, "hidden_size": hidden_size, "model_type": model_type}
            for name, value in given.items():
                if value is not None and facts.setdefault(name, value) != value:
                    _refuse("", f"says that {name} is {shown(facts[name])}, but the argument is {shown(value)}")
            for name in ("kv_heads", "head_dim"):
                if name not in facts:
                    _refuse("", f"does not say {name}; give it as an argument")
            layers = _foreign_layers(*_qwen_layers(read), extra_columns=100)
            fingerprint = Fingerprint(**{"layers": len(layers), "q_heads": len(layers[0]), **facts})
            return cls(fingerprint, layers, provenance=Provenance(source="Qwen sparse_attention_config"))


def _summary(layer: Sequence[HeadEntry]) -> str:
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in BOUNDARIES}
    for entry in layer:
        p = entry.pattern
        names = {p.default.name, *(q.name for _, q in p.patterns)} if isinstance(p, ByModality) else {p.name}
        counts[entry.boundary][" + ".join(sorted(names))] += 1
    parts = []
    for boundary, found in counts.items():
        words = [f"{n} {name}" for name, n in sorted(found.items(), key=lambda item: (-item[1], item[0]))]
        if words:
            parts.append(f"{boundary}: {', '.join(words)}")
    known = [entry.density for entry in layer if entry.density is not None]
    parts += [f"density {sum(known) / len(known):.3f}"] if known else []
    return "; ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def _from_file(source: object) -> Iterator[None]:
    """Name the file in the errors of what is done with it."""
    try:
        yield
    except HeadConfigError as error:
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
        raise HeadConfigError(error.place, error.problem, name) from None


def _read(path: str | os.PathLike[str]) -> object:
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        _refuse("", "there is no such file; give the path of a head config, or write one with `mmi search`")
    except (OSError, ValueError) as error:
        _refuse("", f"cannot be read: {getattr(error, 'strerror', None) or error}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse("", f"is not UTF-8 text (byte {error.start}); give a JSON file, or save it as UTF-8")
    if not text.strip():
        _refuse("", "is empty; write it again")
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except json.JSONDecodeError as error:
        if _is_cut(text.rstrip(), error):
            _refuse("", f"ends too early, in line {error.lineno}: it was cut short; copy or write it again")
        _refuse("", f"is not JSON: {error.msg} in line {error.lineno}, column {error.colno}")
    except (RecursionError, ValueError) as error:  # nested too deeply; an int of thousands of digits
        _refuse("", f"is not a head config: {error}")


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
        _refuse("", f"an object has the key {shown(twin)} twice; keep one of them")
    return found


def _layout(data: Mapping[str, Any]) -> str:
    """The text of the file: a line for each head."""

    def text(value: object) -> str:
        return json.dumps(value, allow_nan=False)

    layers = []
    for layer in data["layers"]:
        heads = ",\n".join(f"      {text(head)}" for head in layer["heads"])
        layers.append(f'    {{"heads": [\n{heads}\n    ]}}')
    parts = [f"  {text(key)}: {text(value)}" for key, value in data.items() if key != "layers"]
    parts.append('  "layers": [\n' + ",\n".join(layers) + "\n  ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


# ---------------------------------------------------------------------------------------------------------------------
# Checks. Each names a place within what it was given; `_under` puts it into the whole.


def _refuse(place: str, problem: str) -> NoReturn:
    raise HeadConfigError(place, problem)


@contextmanager
def _under(place: str) -> Iterator[None]:
    """Put the places that errors name below ``place``."""
    try:
        yield
    except (HeadConfigError, PlacedError) as error:
        dot = "." if error.place and not error.place.startswith("[") else ""
        raise HeadConfigError(f"{place}{dot}{error.place}", error.problem) from None


def _set(instance: object, name: str, value: object) -> None:
    """Bring a field of a frozen instance into its one form, before anybody has seen it."""
    object.__setattr__(instance, name, value)


def _known(instance: Fingerprint | Provenance) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(instance).items() if value is not None}


def _options(kind: type[Fingerprint] | type[Provenance], data: object) -> dict[str, Any]:
    fields = dataclasses.fields(kind)
    none = dataclasses.MISSING
    needed = tuple(f.name for f in fields if f.default is none and f.default_factory is none)
    return dict(_object(data, tuple(f.name for f in fields), needed))


def _object(data: object, known: tuple[str, ...], needed: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        _refuse("", f"must be an object with {', '.join(needed or known)}, is {shown(data)}")
    for key in data:
        if key not in known:
            _refuse(str(key), f"unknown key{did_you_mean(str(key), known)}")
    missing = [key for key in needed if key not in data]
    if missing:
        _refuse("", f"lacks {', '.join(missing)}; add it")
    return data


def _number(text: str) -> int | None:
    """The small number that a key of an object spells, if it is one."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _list(data: object, of: str) -> Sequence[Any]:
    if not isinstance(data, list | tuple):
        _refuse("", f"must be a list of {of}, is {shown(data)}")
    return data


def _checked_int(value: object, place: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        _refuse(place, f"must be an int of {least} or more, is {shown(value)}")
    return value


def _checked_text(value: object, place: str) -> None:
    if value is not None and not isinstance(value, str):
        _refuse(place, f"must be a string, is {shown(value)}")


def _checked_number(value: object, place: str, low: float = -math.inf, high: float = math.inf) -> float | None:
    if value is None:
        return None
    span = "" if low == -math.inf else f" of {low} or more" if high == math.inf else f" from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(place, f"must be a number{span}, is {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        _refuse(place, f"must be a finite number{span}, is {shown(value)}; leave it out if it is not known")
    return number


def _checked_version(version: object) -> None:
    if (number := _checked_int(version, "version", 0)) != VERSION:
        newer = "upgrade mmi-compile to one that reads it, or " if number > VERSION else ""
        _refuse("version", f"is {number}, and this package reads {VERSION}; {newer}write it again with `mmi search`")


def _checked_names(modalities: Mapping[int, str]) -> None:
    for key, name in modalities.items():
        if isinstance(key, bool) or not isinstance(key, int) or key < 0 or not isinstance(name, str) or not name:
            _refuse(f"modalities.{key}", f"must be a modality's id (0 or more) with its name, is {shown(name)}")


def _modalities_from_json(data: object) -> dict[int, str]:
    if not isinstance(data, Mapping):
        _refuse("modalities", f'must be an object such as {{"0": "text", "1": "image"}}, is {shown(data)}')
    for key, name in data.items():
        if not isinstance(key, str) or _number(key) is None or str(_number(key)) != key:
            _refuse(f"modalities.{key}", "must be the id of a modality, an int of 0 or more")
        if not isinstance(name, str) or not name:
            _refuse(f"modalities.{key}", f"must be the name of a modality, is {shown(name)}")
    return {int(key): name for key, name in data.items()}


def _checked_count(heads: int, fingerprint: Fingerprint) -> None:
    if heads != fingerprint.q_heads:
        _refuse("", f"holds {heads} heads, but fingerprint.q_heads is {fingerprint.q_heads}; correct one of them")


def _checked_modalities(entry: HeadEntry, modalities: Mapping[int, str]) -> None:
    """All ids that the entry's pattern uses have names."""
    if not isinstance(entry.pattern, ByModality):
        return
    for number, (place, _) in enumerate(entry.pattern.patterns):
        ids = place if isinstance(place, tuple) else (place,)
        for name, used in zip(("query", "key"), ids, strict=False):
            if used not in modalities:
                _refuse(
                    f"pattern.patterns[{number}].{name}",
                    f"is {used}, which has no name; add it to modalities (known: {modalities or 'none'})",
                )


def _heads_to_json(layer: Sequence[HeadEntry]) -> list[dict[str, Any]]:
    found = []
    for entry, equal in groupby(layer):
        count = sum(1 for _ in equal)
        found.append({**({"count": count} if count > 1 else {}), **entry.to_json()})
    return found


def _heads_from_json(data: object, fingerprint: Fingerprint, modalities: Mapping[int, str]) -> tuple[HeadEntry, ...]:
    entries, counts = [], []
    for number, item in enumerate(_list(data, "heads")):
        with _under(f"[{number}]"):
            entry = HeadEntry.from_json(item)
            _checked_modalities(entry, modalities)
            count = item.get("count", 1)
            _checked_int(count, "count", 1)
        entries.append(entry)
        counts.append(count)
    # Before entries are repeated: a count may be anything.
    _checked_count(sum(counts), fingerprint)
    return tuple(entry for entry, count in zip(entries, counts, strict=True) for _ in range(count))


# ---------------------------------------------------------------------------------------------------------------------
# Other formats

_NO_SIZES = ("flex_vertical_and_slash",)
_FOREIGN = ("vertical_and_slash", "stream_llm", "block_sparse")


def _foreign_layers(data: object, place: str, extra_columns: int) -> tuple[tuple[HeadEntry, ...], ...]:
    layers: list[tuple[HeadEntry, ...]] = []
    for where, layer in _in_order(data, place, "layers"):
        heads = []
        for at, head in _in_order(layer, where, "heads"):
            with _under(at):
                heads.append(_foreign_entry(head, extra_columns))
        if layers and len(heads) != len(layers[0]):
            _refuse(where, f"holds {len(heads)} heads, but the layers before hold {len(layers[0])}")
        layers.append(tuple(heads))
    return tuple(layers)


def _in_order(data: object, place: str, what: str) -> list[tuple[str, Any]]:
    """Places and items of a list, or of an object whose keys are the numbers 0 … n - 1."""
    if isinstance(data, list | tuple) and data:
        return [(f"{place}[{number}]", item) for number, item in enumerate(data)]
    if not isinstance(data, Mapping) or not data:
        _refuse(place, f"must be {what} as a list or by number, is {shown(data)}")
    found: dict[int, tuple[str, Any]] = {}
    for key, item in data.items():
        number = _number(str(key))
        if number is None:
            _refuse(place, f"must be {what} by number, has the key {shown(key)}")
        found[number] = (f"{place}[{number}]", item)
    missing = next((number for number in range(len(data)) if number not in found), None)
    if missing is not None:
        _refuse(place, f"holds {len(data)} {what} without number {missing}; numbers must run from 0 without gaps")
    return [found[number] for number in range(len(data))]


def _foreign_entry(data: object, extra_columns: int) -> HeadEntry:
    """``[pattern, number, number, score]``; ``extra_columns`` are added where there are just 30, as vLLM does."""
    if not isinstance(data, list | tuple) or len(data) != 4:
        _refuse("", f"must be [pattern, number, number, score], is {shown(data)}")
    name, first, second, score = data
    if name in _NO_SIZES:
        mend = 'use policy="adaptive" with that recall'
        _refuse("[0]", f'"{name}" has no sizes: it is estimated for each prompt to reach a recall; {mend}')
    if not isinstance(name, str) or name not in _FOREIGN or (extra_columns and name != "vertical_and_slash"):
        known = _FOREIGN[:1] if extra_columns else _FOREIGN
        _refuse("[0]", f"unknown pattern {shown(name)}{did_you_mean(str(name), known)}")
    for place, value in (("[1]", first), ("[2]", second)):
        if name != "block_sparse":  # its numbers are not used
            _checked_int(value, place, 0)
    return HeadEntry(_foreign_pattern(name, first, second, extra_columns), score=_checked_number(score, "[3]"))


def _foreign_pattern(name: str, first: int, second: int, extra_columns: int) -> Pattern:
    if name == "stream_llm":
        return AShape(first, max(1, second))
    if name == "block_sparse":
        return BlockTopK(k=100)
    columns = first + extra_columns if first == 30 else max(first, 30)
    return VerticalSlash(columns, max(second, 50))


def _qwen_layers(data: object) -> tuple[object, str]:
    """The layers, and where in the data they are."""
    place: list[str] = []
    for key in ("dual_chunk_attention_config", "sparse_attention_config"):
        if isinstance(data, Mapping) and key in data:
            data, place = data[key], [*place, key]
    if isinstance(data, Mapping) and data and all(_number(str(key)) is None for key in data):
        mend = "give sparse_attention_config.json, which lies beside config.json"
        _refuse(".".join(place), f"holds no sparse_attention_config; {mend}")
    return data, ".".join(place)


def _qwen_facts(data: object) -> dict[str, Any]:
    """What a whole ``config.json`` says of the model."""
    if not isinstance(data, Mapping) or "num_attention_heads" not in data:
        return {}
    names = {
        "layers": "num_hidden_layers", "q_heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim", "hidden_size": "hidden_size", "model_type": "model_type",
    }  # fmt: skip
    facts = {name: data[key] for name, key in names.items() if data.get(key) is not None}
    for name, value in facts.items():
        (_checked_text(value, names[name]) if name == "model_type" else _checked_int(value, names[name], 1))
    facts.setdefault("kv_heads", facts["q_heads"])
    if "hidden_size" in facts:
        facts.setdefault("head_dim", facts["hidden_size"] // facts["q_heads"])
    return facts
