"""Random prompts of text, images and videos, padded to batches, for models of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Padding = Literal["none", "left", "right"]
Grid = tuple[int, int, int]
"""Frames, and rows and columns of language-model tokens in a frame."""

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
TEXT_IDS = (5, 150)  # half-open range that prompts draw from
IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID, VIDEO_START_ID, VIDEO_END_ID = range(200, 206)
VOCAB = 256


@dataclass(frozen=True)
class Shape:
    """Size of a text decoder. ``weight_std`` is large enough for attention that is far from uniform."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    mlp: int = 96
    max_positions: int = 4096
    weight_std: float = 0.15

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    def config(self) -> dict[str, Any]:
        """The arguments that every text config of ``transformers`` shares."""
        return {
            "vocab_size": VOCAB,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_positions,
            "initializer_range": self.weight_std,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "pad_token_id": PAD_ID,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
        }


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers that depend on ``seed`` alone, without a trace outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass
class Prompt:
    """One batch element, written left to right.

    Attributes:
        ids: token ids.
        types: modality of each token: 0 text, 1 image, 2 video.
        media: for each image and video ``(modality, grid, start, frame stride)``, the stride None for one frame.
    """

    ids: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    media: list[tuple[int, Grid, int, int | None]] = field(default_factory=list)

    def text(self, count: int) -> Prompt:
        return self.put(*torch.randint(*TEXT_IDS, (count,)).tolist())

    def put(self, *tokens: int) -> Prompt:
        """Text tokens of given ids."""
        self.ids += tokens
        self.types += [0] * len(tokens)
        return self

    def features(self, token: int, modality: int, count: int) -> Prompt:
        self.ids += [token] * count
        self.types += [modality] * count
        return self

    def image(self, grid: Grid, token: int = IMAGE_ID, *, wrapped: bool = True) -> Prompt:
        """One image, between start and end tokens where ``wrapped``."""
        return self.video(grid, token, modality=1, wrapped=wrapped)

    def video(
        self, grid: Grid, token: int = VIDEO_ID, *, stamp: int = 0, wrapped: bool = False, modality: int = 2
    ) -> Prompt:
        """Frames after ``stamp`` tokens of text each, each between start and end tokens where ``wrapped``."""
        frames, rows, columns = grid
        start, stride = len(self.ids) + stamp + wrapped, rows * columns + stamp + 2 * wrapped
        self.media.append((modality, grid, start, stride if frames > 1 else None))
        for _ in range(frames):
            self.text(stamp).put(*[VISION_START_ID] * wrapped)
            self.features(token, modality, rows * columns).put(*[VISION_END_ID] * wrapped)
        return self


def pad_counts(batch: int, padding: Padding) -> list[int]:
    """Pad tokens of each batch element; with more than one element, the first has none."""
    if padding == "none":
        return [0] * batch
    return [3] if batch == 1 else [3 * b for b in range(batch)]


@dataclass
class Batch:
    """Prompts of one length.

    Attributes:
        inputs: ``input_ids`` (and ``attention_mask`` where asked), int64 ``[batch, length]``.
        types: the true modality of each token, likewise.
        media: those of the first batch element, as :class:`Prompt` notes them.
    """

    inputs: dict[str, Tensor]
    types: Tensor
    media: list[tuple[int, Grid, int, int | None]]


def collate(
    write: Callable[[Prompt], object],
    *,
    before: int,
    after: int,
    batch: int = 1,
    padding: Padding = "none",
    with_attention_mask: bool = True,
) -> Batch:
    """``batch`` prompts: ``before`` tokens of text, what ``write`` adds, and text of ``after`` tokens or more."""
    if padding not in ("none", "left", "right"):
        raise ValueError(f'padding must be "none", "left" or "right", got {padding!r}')
    if padding != "none" and not with_attention_mask:
        raise ValueError("padding without an attention mask would be ordinary tokens")
    counts = pad_counts(batch, padding)
    ids, types, masks, media = [], [], [], []
    for count in counts:
        prompt = Prompt().text(before)
        write(prompt)
        prompt.text(after + max(counts) - count)
        pad, live = [0] * count, [1] * len(prompt.ids)
        media.append(prompt.media)
        for rows, row, fill in ((ids, prompt.ids, [PAD_ID] * count), (types, prompt.types, pad), (masks, live, pad)):
            rows.append(fill + row if padding == "left" else row + fill)
    inputs = {"input_ids": torch.tensor(ids)}
    if with_attention_mask:
        inputs["attention_mask"] = torch.tensor(masks)
    return Batch(inputs, torch.tensor(types), media[0])
