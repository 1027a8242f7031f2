"""The heads of one layer as a constant of the graph: what ``mmi::attention`` gets under ``policy="config"``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from mmi_compile.kernels.patterns import ByModality, HeadPattern, head_from_json
from mmi_compile.record import LABELS, MAX_MODALITIES


@dataclass(frozen=True)
class LayerHeads:
    """What every query head of one layer runs.

    Attributes:
        patterns: one for each query head.
        modalities: pairs (id, name) of the modalities that the patterns tell apart, ascending.
    """

    patterns: tuple[HeadPattern, ...]
    modalities: tuple[tuple[int, str], ...] = ()

    @property
    def bounded(self) -> bool:
        """Whether some head treats modalities apart."""
        return any(isinstance(pattern, ByModality) for pattern in self.patterns)

    @property
    def labels(self) -> tuple[int, ...]:
        """The modality ids that are told apart; text (0) always is."""
        return labels_of(self.modalities)

    def describe(self) -> tuple[str, ...]:
        """A text for each head."""
        names = dict(self.modalities)
        return tuple(p.describe(names) if isinstance(p, ByModality) else p.describe() for p in self.patterns)

    def to_text(self) -> str:
        """Compact JSON; equal neighbours are written once. Equal heads give equal texts."""
        runs = [[sum(1 for _ in equal), pattern.to_json()] for pattern, equal in groupby(self.patterns)]
        return json.dumps({"modalities": self.modalities, "heads": runs}, separators=(",", ":"))


@lru_cache(maxsize=1024)
def parse_heads(text: str) -> LayerHeads:
    """What :meth:`LayerHeads.to_text` wrote; the layers of a graph parse their constants once."""
    data = json.loads(text)
    patterns = [head_from_json(pattern) for count, pattern in data["heads"] for _ in range(count)]
    return LayerHeads(tuple(patterns), tuple((number, name) for number, name in data["modalities"]))


def names_to_text(modalities: Sequence[tuple[int, str]]) -> str:
    """Modalities as a constant of the graph."""
    return json.dumps(list(modalities), separators=(",", ":"))


@lru_cache(maxsize=64)
def parse_names(text: str) -> tuple[tuple[int, str], ...]:
    """What :func:`names_to_text` wrote."""
    return tuple((number, name) for number, name in json.loads(text))


def labels_of(modalities: Sequence[tuple[int, str]]) -> tuple[int, ...]:
    """The ids that are told apart, ascending; text (0) is always one of them."""
    return tuple(sorted({0, *(number for number, _ in modalities)}))


def translated(modalities: Sequence[tuple[int, str]], prompt: Mapping[int, str]) -> tuple[tuple[int, ...], str]:
    """Which id of a head config each id of a prompt means, and what the config does not know, in words.

    Modalities are matched by name, since a config may number them in its own way; by number where the prompt has no
    name for an id, or the config has one that is not standard. What is not told apart counts as text.

    Args:
        modalities: (id, name) of the config.
        prompt: id → name where it is not the standard one, as the prompt's record says.

    Returns:
        An id of the config for each of the ids 0 … 15, and a note that may be empty.
    """
    known = dict(modalities)
    numbers = {name: number for number, name in reversed(modalities)}
    table, unknown = [], []
    for number in range(MAX_MODALITIES):
        name = prompt.get(number, LABELS[number] if number < len(LABELS) else None)
        own = number in known and number not in prompt and known[number] not in LABELS
        if name is None or known.get(number) == name or (own and name not in numbers):
            table.append(number if number in known else 0)
        else:
            table.append(numbers.get(name, 0))
            if number in prompt and name not in numbers:
                unknown.append(name)
    return tuple(table), f"{' and '.join(unknown)} tokens run as text: the config does not know them" if unknown else ""
