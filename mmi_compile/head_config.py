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
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from mmi_compile._suggest import did_you_mean, nearest
from mmi_compile.head_config_checks import (
    HeadConfigError,
    checked_int,
    checked_number,
    checked_text,
    from_file,
    read_json,
    refuse,
    spelled_number,
    under,
)
from mmi_compile.kernels.layer_heads import LayerHeads
from mmi_compile.kernels.patterns import (
    ByModality,
    HeadPattern,
    Pattern,
    head_from_json,
    shown,
)

__all__ = [
    "BOUNDARIES", "VERSION", "Boundary", "Fingerprint", "HeadConfig", "HeadConfigError", "HeadEntry", "Provenance",
]  # fmt: skip

VERSION = 1
"""The schema that this package writes and reads."""

Boundary: TypeAlias = Literal["none", "k", "q", "2d"]
BOUNDARIES = ("none", "k", "q", "2d")


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
            checked_int(getattr(self, name), name, 1)
        checked_int(self.rank, "rank", 0)
        if self.hidden_size is not None:
            checked_int(self.hidden_size, "hidden_size", 1)
        checked_text(self.model_type, "model_type")
        if self.q_heads % self.kv_heads:
            refuse("kv_heads", f"must divide the {self.q_heads} query heads, is {self.kv_heads}")
        if self.rank >= self.world_size:
            refuse("rank", f"must be less than world_size {self.world_size}, is {self.rank}")

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

    def describe(self) -> str:
        """Layers, heads and head dim in one line."""
        part = f", slice {self.rank} of {self.world_size}" if self.world_size > 1 else ""
        heads = f"{self.q_heads} query and {self.kv_heads} kv heads"
        return f"{self.layers} layers of {heads}, head dim {self.head_dim}{part}"

    def slice(self, rank: int, world_size: int) -> Fingerprint:
        """The fingerprint of one tensor-parallel rank; see :meth:`HeadConfig.slice`."""
        checked_int(world_size, "world_size", 1)
        checked_int(rank, "rank", 0)
        if self.world_size != 1:
            refuse("world_size", f"this is slice {self.rank} of {self.world_size} already; slice the whole config")
        if self.q_heads % world_size:
            refuse("world_size", f"must divide the {self.q_heads} query heads, is {world_size}")
        if self.kv_heads % world_size and world_size % self.kv_heads:
            refuse("world_size", f"must divide the {self.kv_heads} kv heads or be a multiple, is {world_size}")
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
            checked_text(getattr(self, name), name)
        for name in ("samples", "tokens"):
            if getattr(self, name) is not None:
                checked_int(getattr(self, name), name, 0)
        _set(self, "budget", checked_number(self.budget, "budget", 0))
        if not isinstance(self.versions, Mapping):
            refuse("versions", f"must be an object of versions by package name, is {shown(self.versions)}")
        for name, version in self.versions.items():
            if not isinstance(name, str) or not isinstance(version, str):
                refuse(f"versions.{name}", f"must be a version as a string, is {shown(version)}")
        _set(self, "versions", dict(sorted(self.versions.items())))

    def describe(self) -> str:
        """What is known, in one line, such as ``search · 1 sample of 32768 tokens · NVIDIA H100 · 2026-01-31``."""
        samples = ""
        if self.samples is not None:
            samples = f"{self.samples} sample{'s' if self.samples != 1 else ''}"
        tokens = f"{self.tokens} tokens" if self.tokens is not None else ""
        budget = f"budget {self.budget:g}" if self.budget is not None else ""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        sample = " of ".join(filter(None, (samples, tokens)))
        parts = (self.source, sample, budget, self.device, versions, self.date)
        return " · ".join(part for part in parts if part) or "unknown source"

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
            refuse("pattern", f"must be a pattern, is {shown(self.pattern)}")
        if not isinstance(self.boundary, str) or self.boundary not in BOUNDARIES:
            given = f"; did you mean {best!r}?" if (best := nearest(str(self.boundary), BOUNDARIES)) else ""
            refuse("boundary", f"must be one of {', '.join(BOUNDARIES)}, is {shown(self.boundary)}{given}")
        if isinstance(self.pattern, ByModality):
            places = [place for place, _ in self.pattern.patterns]
            for number, place in enumerate(places):
                if place in places[:number]:
                    refuse(f"pattern.patterns[{number}]", f"names {shown(place)} once more; keep one of them")
            if self.boundary == "none":
                _set(self, "boundary", self.pattern.boundary)
        fits = (self.pattern.boundary,) if isinstance(self.pattern, ByModality) else ("none", "k")
        if self.boundary not in fits:
            refuse("boundary", f'is "{self.boundary}", but that of the pattern is {" or ".join(fits)}; remove it')
        _set(self, "score", checked_number(self.score, "score"))
        _set(self, "recall", checked_number(self.recall, "recall", 0, 1))
        _set(self, "density", checked_number(self.density, "density", 0))

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
        with under("pattern"):
            options["pattern"] = head_from_json(options["pattern"])
        if isinstance(options["pattern"], ByModality) and options.get("boundary") == "none":
            refuse("boundary", f'is "none", but that of the pattern is {options["pattern"].boundary}; remove it')
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
            refuse("layers", f"holds {len(self.layers)} layers, but {wanted}; correct one of them")
        for number, layer in enumerate(self.layers):
            with under(f"layers[{number}].heads"):
                _checked_count(len(layer), self.fingerprint)
                for head, entry in enumerate(layer):
                    with under(f"[{head}]"):
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

    def heads_of(self, layer: int) -> LayerHeads:
        """What the heads of a layer run, with the modalities that they tell apart."""
        patterns = tuple(entry.pattern for entry in self.layers[layer])
        return LayerHeads(patterns, tuple(self.modalities.items()))

    @property
    def bounded(self) -> bool:
        """Whether some head treats modalities apart."""
        return any(isinstance(entry.pattern, ByModality) for layer in self.layers for entry in layer)

    def describe_layer(self, layer: int) -> str:
        """The heads of a layer by boundary and pattern, the most frequent first."""
        return _summary(self.layers[layer])

    def describe(self) -> str:
        """A line about the model and one for each layer: heads by boundary and pattern, the most frequent first.

        Where densities are known, their mean stands at the end of the line.
        """
        width = len(str(self.fingerprint.layers - 1))
        return "\n".join(
            [
                self.fingerprint.describe(),
                *(f"layer {n:>{width}}  {_summary(layer)}" for n, layer in enumerate(self.layers)),
            ]
        )

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
            refuse("", "is a list of layers, as MInference writes them; read it with HeadConfig.from_minference")
        known = ("version", "fingerprint", "provenance", "modalities", "layers")
        if isinstance(data, Mapping) and "version" in data:
            _checked_version(data["version"])  # another version may well have other keys
        values = _object(data, known, ("version", "fingerprint", "layers"))
        with under("fingerprint"):
            fingerprint = Fingerprint.from_json(values["fingerprint"])
        with under("provenance"):
            provenance = Provenance.from_json(values.get("provenance", {}))
        modalities = _modalities_from_json(values.get("modalities", {}))
        layers = []
        with under("layers"):
            for number, layer in enumerate(_list(values["layers"], "layers")):
                with under(f"[{number}]"):
                    heads = _object(layer, ("heads",), ("heads",))["heads"]
                    with under("heads"):
                        layers.append(_heads_from_json(heads, fingerprint, modalities))
        return cls(fingerprint, tuple(layers), modalities, provenance)

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> HeadConfig:
        """Read and check a config: the path of a file, or what is in it."""
        if isinstance(source, Mapping):
            return cls.from_json(source)
        with from_file(source):
            return cls.from_json(read_json(source))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file. Whoever reads it meanwhile, or after an interruption, sees all of the old one or the new."""
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        with from_file(path):
            text = _layout(self.to_json())
            try:
                with temporary.open("x", encoding="utf-8") as file:
                    file.write(text)
                temporary.replace(target)
            except OSError as error:
                refuse("", f"cannot be written: {error.strerror or error}; give a folder that exists and is yours")
            finally:
                temporary.unlink(missing_ok=True)

    # Other formats. Their module needs this one, so it is imported when it is asked for.

    @classmethod
    def from_minference(cls, data: str | os.PathLike[str] | Sequence[Any], **model: Any) -> HeadConfig:
        """MInference's best patterns; see :func:`mmi_compile.head_config_import.from_minference`."""
        from mmi_compile.head_config_import import from_minference

        return from_minference(data, **model)

    @classmethod
    def from_qwen_sparse_attention_config(
        cls, data: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any], **model: Any
    ) -> HeadConfig:
        """Qwen's one-million-token models; see
        :func:`mmi_compile.head_config_import.from_qwen_sparse_attention_config`."""
        from mmi_compile.head_config_import import from_qwen_sparse_attention_config

        return from_qwen_sparse_attention_config(data, **model)


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
        refuse("", f"must be an object with {', '.join(needed or known)}, is {shown(data)}")
    for key in data:
        if key not in known:
            refuse(str(key), f"unknown key{did_you_mean(str(key), known)}")
    missing = [key for key in needed if key not in data]
    if missing:
        refuse("", f"lacks {', '.join(missing)}; add it")
    return data


def _list(data: object, of: str) -> Sequence[Any]:
    if not isinstance(data, list | tuple):
        refuse("", f"must be a list of {of}, is {shown(data)}")
    return data


def _checked_version(version: object) -> None:
    if (number := checked_int(version, "version", 0)) != VERSION:
        newer = "upgrade mmi-compile to one that reads it, or " if number > VERSION else ""
        refuse("version", f"is {number}, and this package reads {VERSION}; {newer}write it again with `mmi search`")


def _checked_names(modalities: Mapping[int, str]) -> None:
    for key, name in modalities.items():
        if isinstance(key, bool) or not isinstance(key, int) or key < 0 or not isinstance(name, str) or not name:
            refuse(f"modalities.{key}", f"must be a modality's id (0 or more) with its name, is {shown(name)}")


def _modalities_from_json(data: object) -> dict[int, str]:
    if not isinstance(data, Mapping):
        refuse("modalities", f'must be an object such as {{"0": "text", "1": "image"}}, is {shown(data)}')
    for key, name in data.items():
        if not isinstance(key, str) or spelled_number(key) is None or str(spelled_number(key)) != key:
            refuse(f"modalities.{key}", "must be the id of a modality, an int of 0 or more")
        if not isinstance(name, str) or not name:
            refuse(f"modalities.{key}", f"must be the name of a modality, is {shown(name)}")
    return {int(key): name for key, name in data.items()}


def _checked_count(heads: int, fingerprint: Fingerprint) -> None:
    if heads != fingerprint.q_heads:
        refuse("", f"holds {heads} heads, but fingerprint.q_heads is {fingerprint.q_heads}; correct one of them")


def _checked_modalities(entry: HeadEntry, modalities: Mapping[int, str]) -> None:
    """All ids that the entry's pattern uses have names."""
    if not isinstance(entry.pattern, ByModality):
        return
    for number, (place, _) in enumerate(entry.pattern.patterns):
        ids = place if isinstance(place, tuple) else (place,)
        for name, used in zip(("query", "key"), ids, strict=False):
            if used not in modalities:
                refuse(
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
        with under(f"[{number}]"):
            entry = HeadEntry.from_json(item)
            _checked_modalities(entry, modalities)
            count = item.get("count", 1)
            checked_int(count, "count", 1)
        entries.append(entry)
        counts.append(count)
    # Before entries are repeated: a count may be anything.
    _checked_count(sum(counts), fingerprint)
    return tuple(entry for entry, count in zip(entries, counts, strict=True) for _ in range(count))
