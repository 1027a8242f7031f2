"""The probe: exact attention of the last live query rows, reduced to a few vectors per head (MInference, algorithm 2).

Nothing here waits for the device: which rows are live may only be known there, so rows are chosen by tensor arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry

LAST_Q = 64
"""Query rows in the probe, as in both papers."""

CHUNK_BYTES = 128 << 20
"""Scores held at a time; the softmax holds as much again. One head at least is always processed whole."""


PEAK = 4.0
"""A diagonal is one when it holds this many times what the columns it crosses would put there."""


@dataclass(frozen=True)
class Probe:
    """Attention mass of ``L`` probe rows of ``H`` probed heads; each live row weighs 1.

    Attributes:
        rows: int64 ``[B, L]``, the probe rows, consecutive and ascending.
        columns: float ``[B, H, kv_len]``, mass on each key.
        distances: float ``[B, H, q_len + q_offset]``, mass on each distance ``i - j``.
        tiles: float ``[B, H, PT, kv_len]``, mass on each key from the rows of query tile ``first_tile + t``.
        first_tile: int64 ``[B]``.
        peaks, peak_distances: ``[B, H, T]``, excess mass of the heaviest diagonals, descending (0 where there is none),
            and their distances; ``T`` is 0 unless asked for.
        beside: ``[B, H, kv_len]``, ``columns`` without the mass that lies on those diagonals.
    """

    rows: Tensor
    columns: Tensor
    distances: Tensor
    tiles: Tensor
    first_tile: Tensor
    peaks: Tensor
    peak_distances: Tensor
    beside: Tensor


def last_live_position(geometry: Geometry, device: torch.device) -> Tensor:
    """One past the position of the last live query row, int64 ``[B]``.

    Right padding ends the rows where it ends the keys; rows beyond it are computed but nobody reads them.
    """
    end = geometry.q_len + geometry.q_offset
    if geometry.key_padding is not None:
        slots = torch.arange(1, geometry.kv_len + 1, device=device)
        stop = (geometry.key_padding.to(device) * slots).amax(-1)
    elif geometry.kv_stop is not None:
        stop = geometry.kv_stop.to(device, torch.int64)
    else:
        return torch.full((geometry.batch,), end, dtype=torch.int64, device=device)
    if geometry.key_padding is not None and geometry.kv_stop is not None:
        stop = torch.minimum(stop, geometry.kv_stop.to(device, torch.int64))
    return torch.where(stop >= geometry.kv_len, end, stop)


def probe_rows(geometry: Geometry, device: torch.device, last_q: int = LAST_Q) -> Tensor:
    """The last ``last_q`` live query rows (all rows if there are fewer), int64 ``[B, L]``."""
    length = min(last_q, geometry.q_len)
    end = (last_live_position(geometry, device) - geometry.q_offset).clamp(length, geometry.q_len)
    return end[:, None] - length + torch.arange(length, device=device)


def run_probe(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    scale: float,
    *,
    block_m: int,
    heads: Sequence[int] | None = None,
    last_q: int = LAST_Q,
    peaks: int = 0,
    nearest: int = 0,
) -> Probe:
    """Attend from the last live rows to all keys they may see and sum the probabilities.

    Args:
        q: floating ``[B, HQ, q_len, D]`` with ``q_len >= 1``; k: ``[B, HKV, kv_len, D]`` with ``kv_len >= 1``.
        block_m: rows in a query tile, for ``Probe.tiles``.
        heads: ascending query heads to probe; None for all. ``H`` is their number.
        peaks: diagonals to tell apart from columns; nearest: distances below it are no candidates.

    Sums are float32 (float64 for float64 inputs).
    """
    g, device = geometry, q.device
    picked = list(range(g.q_heads)) if heads is None else list(heads)
    rows = probe_rows(g, device, last_q)
    length = rows.shape[1]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    first_tile = rows[:, 0] // block_m
    tile_count = min((length - 1) // block_m + 2, -(-g.q_len // block_m))
    member = rows // block_m - first_tile[:, None]  # [B, L]
    tile_rows = (member[:, None, :] == torch.arange(tile_count, device=device)[:, None]).to(work)  # [B, PT, L]
    hidden = _hidden_pairs(g, rows)
    queries = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    tiles = torch.empty(g.batch, len(picked), tile_count, g.kv_len, dtype=work, device=device)
    diagonals = torch.empty(g.batch, len(picked), g.kv_len + length - 1, dtype=work, device=device)
    count = min(peaks, diagonals.shape[-1])
    peak_mass = torch.zeros(g.batch, len(picked), count, dtype=work, device=device)
    peak_slots = torch.zeros(g.batch, len(picked), count, dtype=torch.int64, device=device)
    on_peaks = torch.zeros(g.batch, len(picked), g.kv_len, dtype=work, device=device)
    step = max(1, CHUNK_BYTES // (length * g.kv_len * work.itemsize))
    for b in range(g.batch):
        for start, stop, kv_head in _chunks(picked, g.group, step):
            head_rows = torch.stack([queries[b, h] for h in picked[start:stop]])  # [C, L, D]
            scores = _scores(head_rows, k[b, kv_head], work, scale)
            weights = _softmax_visible(scores, g, None if hidden is None else hidden[b])
            tiles[b, start:stop] = tile_rows[b] @ weights
            parts = _diagonal_parts(weights)
            diagonals[b, start:stop] = parts.sum(1)
            if count:
                too_near = rows[b, 0] + g.q_offset - nearest + length - 1
                found = _peaks(parts, tiles[b, start:stop].sum(1), length, too_near, count)
                peak_mass[b, start:stop], peak_slots[b, start:stop] = found
                _add_peak_mass(on_peaks[b, start:stop], weights, *found)
    columns = tiles.sum(2)
    distances = rows[:, :1, None] + g.q_offset - (peak_slots - (length - 1))
    return Probe(
        rows=rows,
        columns=columns,
        distances=_by_distance(diagonals, g, rows),
        tiles=tiles,
        first_tile=first_tile,
        peaks=peak_mass,
        peak_distances=distances.clamp(0, g.q_len + g.q_offset - 1),
        beside=columns - on_peaks,
    )


def _peaks(parts: Tensor, columns: Tensor, length: int, too_near: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Excess mass and slot of the heaviest diagonals, ``[C, T]``.

    A column of mass ``c`` puts ``c / L`` on ``L`` neighbouring diagonals; a diagonal puts all of its mass on one, and
    does so in every part of the rows, which one row that looks hard at one column does not.

    Args:
        parts: ``[C, parts, kv_len + L - 1]`` as ``_diagonal_parts`` returns them; columns: ``[C, kv_len]``.
        too_near: slots above it (a scalar tensor) are no candidates.
    """
    prefix = F.pad(columns.cumsum(-1), (length, length - 1))
    prefix[..., -(length - 1) or prefix.shape[-1] :] = prefix[..., length + columns.shape[-1] - 1, None]
    explained = (prefix[..., length:] - prefix[..., :-length]) / length
    diagonals, support = parts.sum(1), parts.amin(1) * parts.shape[1]
    slot = torch.arange(diagonals.shape[-1], device=diagonals.device)
    peaked = (diagonals > PEAK * explained) & (support > explained) & (slot <= too_near)
    heaviest = torch.where(peaked, diagonals - explained, 0).topk(count, -1)
    return heaviest.values, heaviest.indices


def _add_peak_mass(target: Tensor, weights: Tensor, peaks: Tensor, slots: Tensor) -> None:
    """Add to ``target [C, kv_len]`` the probability that lies on the diagonals of ``slots [C, T]``."""
    length, width = weights.shape[1:]
    key = slots[:, None] - (length - 1) + torch.arange(length, device=slots.device)[:, None]  # [C, L, T]
    real = (key >= 0) & (key < width) & (peaks > 0)[:, None]
    key = key.clamp(0, width - 1)
    target.scatter_add_(-1, key.flatten(1), (weights.gather(-1, key) * real).flatten(1))


def _chunks(heads: list[int], group: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Slices ``(start, stop, kv_head)`` of ``heads`` that share one key/value head, at most ``step`` long."""
    start = 0
    while start < len(heads):
        kv_head = heads[start] // group
        stop = start
        while stop < len(heads) and stop - start < step and heads[stop] // group == kv_head:
            stop += 1
        yield start, stop, kv_head
        start = stop


def _scores(head_rows: Tensor, keys: Tensor, work: torch.dtype, scale: float) -> Tensor:
    """Scaled scores ``[C, L, kv_len]`` in ``work`` precision without copying the keys to it where that is possible."""
    flat = head_rows.flatten(0, 1)  # [C * L, D]
    if flat.is_cuda and flat.dtype in (torch.float16, torch.bfloat16):
        # Half inputs with float32 accumulation *and* output: the same numbers as a float32 copy of K, which at one
        # million tokens would be half a gigabyte.
        scores = torch.mm(flat, keys.T, out_dtype=torch.float32)
    else:
        scores = flat.to(work) @ keys.to(work).T
    return scores.view(*head_rows.shape[:2], keys.shape[0]).mul_(scale)


def _hidden_pairs(geometry: Geometry, rows: Tensor) -> Tensor | None:
    """Pairs the model hides from the probe rows, bool ``[B, L, kv_len]``; None when plain causality says it all."""
    g = geometry
    if not g.window and g.kv_start is None and g.kv_stop is None and g.key_padding is None:
        return None
    i = rows[..., None] + g.q_offset
    j = torch.arange(g.kv_len, device=rows.device)
    hidden = j > i
    if g.window:
        hidden = hidden | (j <= i - g.window)
    if g.kv_start is not None:
        hidden = hidden | (j < g.kv_start.to(rows.device)[:, None, None])
    if g.kv_stop is not None:
        hidden = hidden | (j >= g.kv_stop.to(rows.device)[:, None, None])
    if g.key_padding is not None:
        hidden = hidden | ~g.key_padding.to(rows.device)[:, None, :]
    return hidden


def _softmax_visible(scores: Tensor, geometry: Geometry, hidden: Tensor | None) -> Tensor:
    """Softmax over the visible keys, in place where it can be; a row that sees nothing becomes zeros."""
    if hidden is not None:
        scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, -1).masked_fill_(hidden, 0.0)
    # Only the last few keys can lie in the future of a probe row, and the rows are known: the last ones.
    length = scores.shape[1]
    first = geometry.q_len + geometry.q_offset - length
    tail = min(max(0, first), geometry.kv_len)
    j = torch.arange(tail, geometry.kv_len, device=scores.device)
    i = torch.arange(first, first + length, device=scores.device)[:, None]
    scores[..., tail:].masked_fill_(j > i, -torch.inf)
    return torch.softmax(scores, -1)


def _diagonal_parts(weights: Tensor) -> Tensor:
    """Sums along diagonals over each quarter of the rows, ``[C, 4, kv_len + L - 1]`` (one part where 4 does not divide
    ``L``), in the slots of ``_diagonal_sums``."""
    heads, length, width = weights.shape
    count = 1 if length % 4 else 4
    size = length // count
    sums = _diagonal_sums(weights.reshape(heads * count, size, width)).view(heads, count, -1)
    shifted = [F.pad(sums[:, part], (size * (count - 1 - part), size * part)) for part in range(count)]
    return torch.stack(shifted, 1)


def _diagonal_sums(weights: Tensor) -> Tensor:
    """Sums along diagonals: ``out[:, c + L - 1] = sum_r weights[:, r, c + r]``, ``[C, kv_len + L - 1]``.

    The long middle part is read through a sheared view (row stride one more than the width), so it costs one pass.
    """
    heads, length, width = weights.shape
    if width < 2 * length:
        return _padded_diagonal_sums(weights)
    left = _padded_diagonal_sums(weights[..., :length])[:, : length - 1]
    middle = weights.contiguous().as_strided(
        (heads, length, width - length + 1), (length * width, width + 1, 1), weights.storage_offset()
    )
    right = _padded_diagonal_sums(weights[..., width - length :])[:, length:]
    return torch.cat([left, middle.sum(1), right], -1)


def _padded_diagonal_sums(weights: Tensor) -> Tensor:
    heads, length, width = weights.shape
    padded = F.pad(weights, (length - 1, length - 1)).contiguous()
    total = padded.shape[-1]
    sheared = padded.as_strided((heads, length, width + length - 1), (length * total, total + 1, 1))
    return sheared.sum(1)


def _by_distance(diagonals: Tensor, geometry: Geometry, rows: Tensor) -> Tensor:
    """Turn sums over diagonals ``c = j - r`` into sums over distances ``d = i - j = first position - c``."""
    length = rows.shape[1]
    first = rows[:, :1] + geometry.q_offset  # [B, 1]
    d = torch.arange(geometry.q_len + geometry.q_offset, device=rows.device)
    slot = first - d + length - 1  # [B, positions]
    inside = (slot >= 0) & (slot < diagonals.shape[-1])
    index = slot.clamp(0, diagonals.shape[-1] - 1)[:, None, :].expand(-1, diagonals.shape[1], -1)
    return diagonals.gather(-1, index) * inside[:, None, :]
