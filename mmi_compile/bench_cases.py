"""What ``mmi bench`` can measure: cases by name, prompt lengths as people write them, and inputs that fit a case."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmi_compile._suggest import did_you_mean
from mmi_compile.kernels import patterns as known_patterns
from mmi_compile.kernels.patterns import AShape, ByModality, Dense, Grid, HeadPattern, Pattern, VerticalSlash
from mmi_compile.kernels.structured import StructuredInput, long_context_structure, structured_qkv

MIX_OF_28 = {"grid": 16, "vertical_slash": 8, "a_shape": 4}
"""Heads of each kind in the case ``mix``, out of 28; other numbers of heads are divided likewise."""

MIX_PATTERNS: dict[str, Pattern] = {
    "grid": Grid(256, 0, 1024),
    "vertical_slash": VerticalSlash(1000, 1024),
    "a_shape": AShape(128, 4096),
}

TEXT, VIDEO = 0, 2
FRAME, STAMP, VIDEO_SHARE = 256, 6, 0.85
"""The prompt of the cases with boundaries: tokens of a video frame, of the time stamp after it, and video in all."""

BOUNDARIES: dict[str, HeadPattern] = {
    "q": ByModality("q", AShape(128, 4096), ((VIDEO, VerticalSlash(1000, 1024)),)),
    "2d": ByModality(
        "2d",
        AShape(128, 4096),
        (((VIDEO, VIDEO), VerticalSlash(1000, 1024)), ((VIDEO, TEXT), AShape(128, 256))),
    ),
}

DEFAULT_CASES = (
    "dense",
    "a_shape(128,4096)",
    "a_shape(128,1024)",
    "grid(stride=256,local=1024)",
    "vertical_slash(1000,1024)",
    "block_topk",
    "mix",
    "q",
    "2d",
    "adaptive",
)
QUICK_CASES = ("dense", "a_shape(128,4096)", "vertical_slash(1000,1024)", "adaptive")
TUNE_CASES = ("dense", "a_shape(128,4096)", "grid(stride=256,local=1024)", "vertical_slash(1000,1024)")

_SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "a_shape": {"sink": 128, "local": 4096},
    "tri_shape": {"sink": 128, "local": 4096, "last": 128},
    "grid": {"stride": 256, "sink": 0, "local": 1024},
    "vertical_slash": {"n_vertical": 1000, "n_slash": 1024},
    "block_topk": {"k": 64},
}


CHOSEN = ("adaptive", "dispatch")
"""Cases in which the policy chooses the patterns."""


class CaseError(ValueError):
    """A case or a length that cannot be read; the message says what can."""


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: as given. kind: pattern name, ``"mix"``, ``"adaptive"``, a boundary (``"q"`` or ``"2d"``), or
            ``"dispatch"``: the operator as a model calls it, which picks dense or sparse attention and the kernel.
        pattern: the pattern of all heads, None for the other kinds.
        segments: runs of one modality in the prompt of a boundary, as in ``2d(2000)``; None for the usual prompt.
    """

    name: str
    kind: str
    pattern: Pattern | None = None
    segments: int | None = None

    @property
    def bounded(self) -> bool:
        """Whether heads treat modalities apart."""
        return self.kind in BOUNDARIES

    def patterns(self, heads: int) -> tuple[HeadPattern, ...] | None:
        """The pattern of every head; None when the policy chooses."""
        if self.bounded:
            return (BOUNDARIES[self.kind],) * heads
        if self.kind in CHOSEN:
            return None
        if self.kind == "mix":
            return tuple(MIX_PATTERNS[kind] for kind in mix(heads))
        assert self.pattern is not None
        return (self.pattern,) * heads

    def input_kinds(self, heads: int) -> tuple[str, ...]:
        """What each head of the inputs resembles. Cases with the same answer are measured on the same tensors."""
        if self.kind == "mix" or self.kind in CHOSEN:
            return mix(heads)
        kind = "vertical_slash" if self.bounded else self.kind
        return (kind if kind in ("grid", "vertical_slash") else "a_shape",) * heads


def mix(heads: int) -> tuple[str, ...]:
    """The kind of every head in the case ``mix``: as in ``MIX_OF_28``, neighbours alike."""
    total, kinds = sum(MIX_OF_28.values()), list(MIX_OF_28)
    edges, before = [], 0
    for count in MIX_OF_28.values():
        before += count
        edges.append(round(before * heads / total))
    return tuple(kinds[next(i for i, edge in enumerate(edges) if head < edge)] for head in range(heads))


def make_inputs(
    case: Case, tokens: int, *, heads: int, kv_heads: int, head_dim: int, batch: int, dtype: torch.dtype,
    device: torch.device, seed: int,
) -> StructuredInput:  # fmt: skip
    """Fresh structured q, k, v for a case, as transposed views of ``[B, N, H, D]``.

    Raises:
        ValueError: the head dim has no room for the structure.
    """
    structures = [long_context_structure(kind, tokens, seed=seed + h) for h, kind in enumerate(case.input_kinds(heads))]
    return structured_qkv(
        structures, tokens, batch=batch, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device=device, seed=seed,
        token_major=True,
    )  # fmt: skip


def parse_tokens(values: Iterable[str]) -> tuple[int, ...]:
    """``["4096,128k", "1m"]`` to token counts; k and m are 1024 and 1024².

    Raises:
        CaseError: not a positive whole number of tokens.
    """
    found = []
    for word in (word.strip() for value in values for word in value.split(",")):
        read = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", word.lower())
        tokens = float(read[1]) * _SUFFIXES[read[2]] if read else 0.0
        if tokens < 1 or tokens != int(tokens):
            raise CaseError(f"{word!r} is no number of tokens; give numbers such as 4096, 128k or 1m")
        found.append(int(tokens))
    return tuple(dict.fromkeys(found))


def parse_cases(values: Iterable[str]) -> tuple[Case, ...]:
    """``["dense,a_shape(128,1024)", "mix"]`` to cases; commas inside parentheses belong to the pattern.

    Raises:
        CaseError: unknown pattern or option, or a value that the pattern does not take.
    """
    words = [word.strip() for value in values for word in re.split(r",(?![^(]*\))", value)]
    return tuple(_parse_case(word) for word in dict.fromkeys(words))


def _parse_case(word: str) -> Case:
    read = re.fullmatch(r"(\w+)(?:\((.*)\))?", word)
    name = read[1] if read else word
    kinds = _pattern_kinds()
    special = ("mix", *CHOSEN, *BOUNDARIES)
    if name in special and read and read[2] is None:
        return Case(word, name)
    if name in BOUNDARIES and read:
        segments = _value(read[2])
        if type(segments) is not int or segments < 2:
            raise CaseError(f"{word!r}: {name} takes the number of segments in the prompt, 2 or more")
        return Case(word, name, segments=segments)
    if read is None or name not in kinds:
        raise CaseError(f"unknown case {word!r}{did_you_mean(name, [*kinds, *special])}")
    return Case(word, name, _parse_pattern(kinds[name], name, read[2] or ""))


def _pattern_kinds() -> dict[str, type[Pattern]]:
    found: list[Any] = [getattr(known_patterns, name) for name in dir(known_patterns) if not name.startswith("_")]
    return {str(vars(kind)["name"]): kind for kind in found if isinstance(kind, type) and "name" in vars(kind)}


def _parse_pattern(kind: type[Pattern], name: str, text: str) -> Pattern:
    fields = [field.name for field in dataclasses.fields(kind)]
    given: dict[str, Any] = {}
    for position, word in enumerate(word.strip() for word in text.split(",") if word.strip()):
        key, _, value = word.rpartition("=")
        key = key.strip() or (fields[position] if position < len(fields) else "")
        if key not in fields:
            raise CaseError(f"{name} has no option {key or word!r}{did_you_mean(key or word, fields)}")
        given[key] = _value(value.strip())
    defaults = {} if "mass" in given else _DEFAULTS.get(name, {})  # a recall target takes the place of a number
    try:
        return kind(**{**defaults, **given})
    except (TypeError, ValueError) as error:
        raise CaseError(str(error)) from None


def _value(text: str) -> int | float | bool | str | None:
    named: dict[str, bool | None] = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def video_prompt(tokens: int, batch: int, device: torch.device, segments: int | None = None) -> torch.Tensor:
    """Modality ids int8 ``[batch, tokens]`` of a prompt that is mostly video.

    Args:
        segments: runs of text and video by turns, all of one kind equally long; None for frames with time stamps
            between a text and another.
    """
    at = torch.arange(tokens, device=device)
    if segments is not None:
        # A pair of runs begins where the product passes a multiple of the length.
        inside = at * (segments // 2) % tokens >= (1 - VIDEO_SHARE) * tokens
    else:
        frames = int(tokens * VIDEO_SHARE) // FRAME
        last = min(128, tokens - frames * (FRAME + STAMP))
        place = at - (tokens - last - frames * (FRAME + STAMP))
        inside = (place >= 0) & (place < frames * (FRAME + STAMP)) & (place % (FRAME + STAMP) < FRAME)
    ids = torch.full((tokens,), TEXT, dtype=torch.int8, device=device)
    return torch.where(inside, VIDEO, ids).to(torch.int8).expand(batch, -1).contiguous()


def is_dense(patterns: Sequence[HeadPattern] | None) -> bool:
    """Whether every head keeps everything."""
    return patterns is not None and all(isinstance(pattern, Dense) for pattern in patterns)
