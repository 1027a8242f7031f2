"""The facts of one attention call that every pattern, plan and kernel shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def is_usable_scale(scale: float) -> bool:
    """Whether attention may multiply its scores by ``scale``: positive, and a normal number in float32."""
    limits = torch.finfo(torch.float32)
    return limits.tiny <= scale <= limits.max


def check_scale(scale: float) -> None:
    """Raise ValueError for a scale that turns hidden keys (minus infinity) into NaN or into the best ones."""
    if not is_usable_scale(scale):
        raise ValueError(
            f"the scale of an attention must be a positive float32, got {scale}; give its absolute value, and the sign"
            " to the queries"
        )


@dataclass(frozen=True)
class Geometry:
    """Which (query, key) pairs the *model itself* allows, before any pattern.

    Query row ``r`` stands at position ``i = r + q_offset``; it may see key ``j`` of batch element ``b`` when
    ``j <= i``, ``kv_start[b] <= j < kv_stop[b]``, ``i - j < window`` (if ``window > 0``) and
    ``key_padding[b, j]`` (if given). A row that may see no key at all is *dead*: its output is zero.

    With ``row_start`` and ``row_stop`` each row has an interval of its own instead: ``row_start[b, r] <= j <
    row_stop[b, r]`` takes the place of causality and window, and ``kv_len`` may be anything. Packed documents, chunks
    and blocks that see both ways are such masks (:mod:`mmi_compile.kernels.groups`).

    Attributes:
        batch, q_heads, kv_heads: ``B``, ``HQ``, ``HKV``; ``HQ`` is a multiple of ``HKV`` (GQA).
        q_len, kv_len: number of query rows and of keys, in tokens. Keys at or beyond ``q_len + q_offset`` are never
            visible; callers slice them off, so ``kv_len <= q_len + q_offset``.
        q_offset: position of query row 0 (``kv_len - q_len`` in chunked prefill, else 0).
        window: the model's own sliding window in tokens, 0 for none.
        kv_start, kv_stop: int32 ``[B]`` on the device, the live key range (left / right padding). ``None`` when
            every key of every batch element is live, so that kernels can drop the test.
        key_padding: bool ``[B, kv_len]``, True where the key is live; only given when the live keys of some batch
            element are not one contiguous range.
        row_start, row_stop: int32 ``[B, q_len]`` on the device, both or neither, in ``0 ... kv_len``.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    q_offset: int = 0
    window: int = 0
    kv_start: Tensor | None = None
    kv_stop: Tensor | None = None
    key_padding: Tensor | None = None
    row_start: Tensor | None = None
    row_stop: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.row_start is None) != (self.row_stop is None):
            raise ValueError("row_start and row_stop go together: give both or neither")
        if self.row_start is not None and self.window:
            raise ValueError("a window beside row_start and row_stop: intersect it with them")

    @property
    def has_rows(self) -> bool:
        """Whether each row has an interval of its own."""
        return self.row_start is not None

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.q_heads // self.kv_heads

    @property
    def has_padding(self) -> bool:
        """Whether some keys may be dead; which ones is only known on the device."""
        return any(x is not None for x in (self.kv_start, self.kv_stop, self.key_padding))

    def live_keys(self, device: torch.device | str) -> Tensor | None:
        """The keys that padding leaves alive, bool ``[B, kv_len]``; None when all of them are."""
        live = None if self.key_padding is None else self.key_padding.to(device)
        j = torch.arange(self.kv_len, device=device)
        if self.kv_start is not None:
            inside = j >= self.kv_start.to(device)[:, None]
            live = inside if live is None else live & inside
        if self.kv_stop is not None:
            inside = j < self.kv_stop.to(device)[:, None]
            live = inside if live is None else live & inside
        return live

    def to_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """The model's mask, bool ``[B, q_len, kv_len]``: quadratic, for the reference and for tests."""
        i = torch.arange(self.q_len, device=device)[:, None] + self.q_offset
        j = torch.arange(self.kv_len, device=device)[None, :]
        if self.row_start is not None and self.row_stop is not None:
            start, stop = (x.to(device)[:, :, None] for x in (self.row_start, self.row_stop))
            mask = (j >= start) & (j < stop)
        else:
            allowed = j <= i
            if self.window:
                allowed = allowed & (i - j < self.window)
            mask = allowed.expand(self.batch, -1, -1)
        live = self.live_keys(device)
        return mask if live is None else mask & live[:, None, :]
