"""What a head search has measured so far, on disk after every layer: an interrupted search goes on from there."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmi_compile.cost_file import CostModel
from mmi_compile.environment import describe_device
from mmi_compile.head_measure import HeadSearchError, Measuring
from mmi_compile.head_search import Candidates, Searcher, Survey, unpack
from mmi_compile.runtime import AttentionCall

SCHEMA = {"name": "mmi-search", "version": 1}
"""Goes into every file of measurements. The version rises when a measurement changes its meaning."""


def _check(name: str, part: Any) -> None:
    if name.startswith("survey"):
        Survey.from_json(part)
    elif name.startswith("output"):
        float(part)
    else:
        unpack(part)


@dataclass
class SearchStore:
    """Measurements of one search, on disk after every layer where there is a path.

    Attributes:
        digest: of model, prompts and settings. parts: ``"kind:prompt:place"`` → JSON. Kinds are survey, combinations
            and, for a place of 0, ``output`` with a name of what ran.
        facts: place → layer number, shape, tokens. count: attentions in a forward, once known.
        setup: what the first attention decided: candidates, costs, modalities.
        left_out: whether the model has attention that was not rewritten.
    """

    path: Path | None
    digest: str
    parts: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    setup: dict[str, Any] = field(default_factory=dict)
    count: int | None = None
    finished: bool = False
    left_out: bool = False
    device: str = ""

    _KEPT = ("parts", "facts", "setup", "count", "finished", "left_out", "device")

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, digest: str) -> SearchStore:
        """What the file holds; an empty store where there is none.

        Raises:
            HeadSearchError: the file is damaged, cannot be written, or belongs to another search.
        """
        if path is None:
            return cls(None, digest)
        target = Path(path)
        if not target.absolute().parent.is_dir():
            raise HeadSearchError(f"{target}: there is no folder {target.parent}; make it first")
        try:
            data = json.loads(target.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.get("schema") != SCHEMA:
                raise ValueError(f"is no file of measurements of version {SCHEMA['version']}")
            found = cls(target, data["digest"], **{name: data[name] for name in cls._KEPT})
            for name, part in found.parts.items():
                _check(name, part)
        except FileNotFoundError:
            return cls(target, digest)
        except (OSError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise HeadSearchError(f"{target}: {error}; delete the file, or resume from another one") from None
        if found.digest != digest:
            raise HeadSearchError(
                f"{target} belongs to another search: the model, the calibration prompts, the settings or the version"
                " differ; delete it, or give another path"
            )
        return found

    def write(self) -> None:
        """All of it, or what was there before."""
        if self.path is None:
            return
        data = {"schema": SCHEMA, "digest": self.digest, **{name: getattr(self, name) for name in self._KEPT}}
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.write_text(json.dumps(data, allow_nan=False), encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            raise HeadSearchError(f"{self.path}: cannot be written: {error.strerror or error}") from None
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def has(self, kind: str, prompt: int, place: int) -> bool:
        return f"{kind}:{prompt}:{place}" in self.parts

    def get(self, kind: str, prompt: int, place: int) -> Any:
        return self.parts[f"{kind}:{prompt}:{place}"]

    def put(self, kind: str, prompt: int, place: int, data: Any) -> None:
        self.parts[f"{kind}:{prompt}:{place}"] = data

    def complete(self, kind: str, prompt: int) -> bool:
        """Whether all attentions of a prompt have been measured."""
        return self.count is not None and all(self.has(kind, prompt, place) for place in range(self.count))

    def note(self, place: int, call: AttentionCall) -> None:
        g = call.geometry
        before = self.facts.get(str(place), {"tokens": 0})
        self.facts[str(place)] = {
            "layer": call.layer, "shape": [g.q_heads, g.kv_heads, call.q.shape[-1]],
            "tokens": max(before["tokens"], g.kv_len),
        }  # fmt: skip

    def agree(
        self, searcher: Searcher, labels: tuple[int, ...], names: Mapping[int, str], device: torch.device
    ) -> None:
        """Note what the measurements rest on; refuse if those in the file rest on something else."""
        facts = describe_device(device)
        self.device = str(facts["name"])
        how = searcher.how
        setup = {
            "candidates": searcher.candidates.to_json(), "merge": searcher.merge, "rows": how.rows,
            "rows_at_most": how.rows_at_most, "dense_tail": how.dense_tail, "costs": dataclasses.asdict(how.costs),
            "labels": list(labels), "names": {str(key): name for key, name in sorted(names.items())},
        }  # fmt: skip
        setup = json.loads(json.dumps(setup))
        if self.setup and self.setup != setup:
            differ = ", ".join(key for key in setup if self.setup.get(key) != setup[key])
            raise HeadSearchError(f"{self.path}: was measured with other {differ}; delete it, or give another path")
        self.setup = setup

    def searcher(self) -> Searcher:
        """The searcher that made the measurements."""
        setup = self.setup
        costs = CostModel.from_json(setup["costs"])
        how = Measuring(costs, setup["rows"], setup["rows_at_most"], setup["dense_tail"])
        return Searcher(Candidates.from_json(setup["candidates"]), how, setup["merge"])

    def modalities(self) -> tuple[tuple[int, ...], dict[int, str]]:
        return tuple(self.setup["labels"]), {int(key): name for key, name in self.setup["names"].items()}
