"""The probe: exact attention of the last live query rows, reduced to a few vectors per head (MInference, algorithm 2).

``run_probe`` is what planners call. On a GPU it runs the kernels of ``fused_probe``, everywhere else
``reference_probe``, which is also what the kernels are tested against.

Nothing here waits for the device: which rows are live may only be known there, so rows are chosen by tensor arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.profiling import span

LAST_Q = 64
"""Query rows in the probe, as in both papers."""

CHUNK_BYTES = 128 << 20
"""Scores that the reference holds at a time; the softmax holds as much again. One head at least is processed whole."""

PEAK = 4.0
"""A diagonal is one when it holds this many times what the columns it crosses would put there."""

PART = 16
"""A diagonal is one when every run of this many probe rows supports it: four runs of the usual 64 rows."""

_MASS_UNIT = float(1 << 40)


@dataclass(frozen=True)
class Probe:
    """Attention mass of ``L`` probe rows of ``H`` probed heads; each live row weighs 1. Not to be written to.

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


def first_live_key(geometry: Geometry, device: torch.device) -> Tensor:
    """The first live key, int64 ``[B]``; ``kv_len`` where no key is live."""
    if geometry.key_padding is not None:
        j = torch.arange(geometry.kv_len, device=device)
        live = geometry.key_padding.to(device)
        if geometry.kv_start is not None:
            live = live & (j >= geometry.kv_start.to(device)[:, None])
        return torch.where(live, j, geometry.kv_len).amin(-1)
    if geometry.kv_start is not None:
        return geometry.kv_start.to(device, torch.int64)
    return torch.zeros(geometry.batch, dtype=torch.int64, device=device)


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
    """The last ``last_q`` live query rows (all rows if there are fewer), int64 ``[B, L]``. Not to be written to."""
    g, length = geometry, min(last_q, geometry.q_len)
    if not g.has_padding:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return _last_rows(g.batch, g.q_len, length, device, int(stream))
    end = (last_live_position(g, device) - g.q_offset).clamp(length, g.q_len)
    return end[:, None] - length + torch.arange(length, device=device)


@lru_cache(maxsize=32)
def _last_rows(batch: int, q_len: int, length: int, device: torch.device, stream: int) -> Tensor:
    # The stream is part of the key: what one stream makes, another may not read without waiting.
    return torch.arange(q_len - length, q_len, device=device).expand(batch, -1).contiguous()


def first_probe_tile(geometry: Geometry, rows: Tensor, block_m: int) -> Tensor:
    """Query tile of the first probe row, int64 ``[B]``. Not to be written to."""
    g, device = geometry, rows.device
    if g.has_padding:
        return rows[:, 0] // block_m
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _filled(g.batch, (g.q_len - rows.shape[1]) // block_m, device, int(stream))


@lru_cache(maxsize=32)
def _filled(batch: int, value: int, device: torch.device, stream: int) -> Tensor:
    return torch.full((batch,), value, dtype=torch.int64, device=device)


def probe_tile_count(geometry: Geometry, length: int, block_m: int) -> int:
    """``PT``, query tiles that ``length`` probe rows may touch; exact where no padding hides which rows they are."""
    g = geometry
    if not g.has_padding:
        return (g.q_len - 1) // block_m - (g.q_len - length) // block_m + 1
    return min((length - 1) // block_m + 2, -(-g.q_len // block_m))


def peak_count(geometry: Geometry, length: int, peaks: int) -> int:
    """``T``: ``peaks``, or as many as there are diagonals through ``length`` rows."""
    return min(peaks, geometry.kv_len + length - 1, geometry.q_len + geometry.q_offset)


def top_peaks(excess: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of ``excess [..., X]``, descending, and where they are."""
    heaviest = excess.topk(count, -1)
    return heaviest.values, heaviest.indices


@span("mmi::probe")
def run_probe(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    scale: float,
    *,
    block_m: int,
    heads: Sequence[int] | None = None,
    last_q: int = LAST_Q,
    diagonals: bool = True,
    peaks: int = 0,
    nearest: int = 0,
) -> Probe:
    """Attend from the last live rows to all keys they may see and sum the probabilities.

    Args:
        q: floating ``[B, HQ, q_len, D]`` with ``q_len >= 1``; k: ``[B, HKV, kv_len, D]`` with ``kv_len >= 1``.
        scale: factor on the scores.
        block_m: rows in a query tile, for ``Probe.tiles``.
        heads: ascending query heads to probe; None for all. ``H`` is their number; no other head is computed.
        last_q: rows to probe.
        diagonals: whether sums along diagonals are wanted; ``Probe.distances`` is ``[B, H, 0]`` without them.
        peaks: diagonals to tell apart from columns; nearest: distances below it are no candidates.

    Sums are float32 (float64 for float64 inputs). Half precision on a GPU runs fused; see ``fused_probe``.
    """
    from mmi_compile.kernels.fused_probe import fused_probe, why_not_fused

    run = fused_probe if why_not_fused(q, k, last_q) is None else reference_probe
    return run(
        q, k, geometry, scale, block_m=block_m, heads=heads, last_q=last_q, diagonals=diagonals or peaks > 0,
        peaks=peaks, nearest=nearest,
    )  # fmt: skip


def reference_probe(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    scale: float,
    *,
    block_m: int,
    heads: Sequence[int] | None = None,
    last_q: int = LAST_Q,
    diagonals: bool = True,
    peaks: int = 0,
    nearest: int = 0,
) -> Probe:
    """``run_probe`` in plain PyTorch, for any dtype and device. Holds ``L x kv_len`` scores of a few heads."""
    g, device = geometry, q.device
    picked = list(range(g.q_heads)) if heads is None else list(heads)
    rows = probe_rows(g, device, last_q)
    length = rows.shape[1]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    first_tile = first_probe_tile(g, rows, block_m)
    tile_count = probe_tile_count(g, length, block_m)
    member = rows // block_m - first_tile[:, None]  # [B, L]
    tile_rows = (member[:, None, :] == torch.arange(tile_count, device=device)[:, None]).to(work)  # [B, PT, L]
    hidden = _hidden_pairs(g, rows)
    queries = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    tiles = torch.empty(g.batch, len(picked), tile_count, g.kv_len, dtype=work, device=device)
    slots = g.kv_len + length - 1 if diagonals or peaks else 0
    slashes = torch.empty(g.batch, len(picked), slots, dtype=work, device=device)
    count = peak_count(g, length, peaks)
    peak_mass = torch.zeros(g.batch, len(picked), count, dtype=work, device=device)
    peak_slots = torch.zeros(g.batch, len(picked), count, dtype=torch.int64, device=device)
    on_peaks = torch.zeros(g.batch, len(picked), g.kv_len, dtype=work, device=device)
    step = max(1, CHUNK_BYTES // (length * g.kv_len * work.itemsize))
    for b in range(g.batch):
        for start, stop, kv_head in head_chunks(picked, g.group, step):
            head_rows = torch.stack([queries[b, h] for h in picked[start:stop]])  # [C, L, D]
            scores = row_scores(head_rows, k[b, kv_head], work, scale)
            weights = _softmax_visible(scores, g, None if hidden is None else hidden[b])
            tiles[b, start:stop] = tile_rows[b] @ weights
            if not slots:
                continue
            parts = _diagonal_parts(weights)
            slashes[b, start:stop] = parts.sum(1)
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
        distances=_by_distance(slashes, g, rows) if slots else slashes,
        tiles=tiles,
        first_tile=first_tile,
        peaks=peak_mass,
        peak_distances=distances.clamp(0, g.q_len + g.q_offset - 1),
        beside=columns - on_peaks,
    )


def row_weights(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, heads: list[int], rows: Tensor
) -> Iterator[tuple[list[int], Tensor]]:
    """Attention probabilities of any rows ``[B, L]``, float ``[B, heads, L, kv_len]``, some heads at a time.

    A row that sees no key, such as one before the first position, gives zeros.
    """
    for some, scores, hidden in visible_scores(q, k, geometry, scale, heads, rows):
        yield some, torch.softmax(scores, -1).masked_fill(hidden, 0.0)


def visible_scores(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, heads: list[int], rows: Tensor
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Scaled scores of any rows ``[B, L]``, float ``[B, heads, L, kv_len]``, some heads at a time; and which pairs the
    model hides, bool ``[B, 1, L, kv_len]``, whose scores are the lowest number there is."""
    g, work = geometry, torch.float64 if q.dtype == torch.float64 else torch.float32
    hidden = ~visible_keys(g, rows)[:, None]
    index = rows.clamp(min=0)[:, None, :, None]
    step = max(1, CHUNK_BYTES // max(1, hidden.numel() * work.itemsize))
    for begin, end, kv_head in head_chunks(heads, g.group, step):
        mine = torch.stack([q[:, h] for h in heads[begin:end]], 1)
        asked = mine.gather(2, index.expand(-1, end - begin, -1, q.shape[-1]))
        scores = torch.stack([row_scores(asked[b], k[b, kv_head], work, scale) for b in range(g.batch)])
        yield heads[begin:end], scores.masked_fill_(hidden, torch.finfo(work).min), hidden


def visible_keys(geometry: Geometry, rows: Tensor) -> Tensor:
    """What the model's own mask lets these rows see, bool ``[B, R, kv_len]``; rows int64 ``[B, R]``."""
    g, j = geometry, torch.arange(geometry.kv_len, device=rows.device)
    if g.row_start is not None and g.row_stop is not None:
        start, stop = (edge.gather(1, rows)[..., None] for edge in (g.row_start, g.row_stop))
        visible = (j >= start) & (j < stop)
    else:
        i = (rows + g.q_offset)[..., None]
        visible = j <= i
        if g.window:
            visible &= i - j < g.window
    live = g.live_keys(rows.device)
    return visible if live is None else visible & live[:, None]


def phase_mass(mass: Tensor, strides: Sequence[int]) -> tuple[Tensor, ...]:
    """Mass folded modulo each stride: for every ``s`` of ``strides`` the sums ``[B, H, s]`` over ``j % s``.

    Args:
        mass: floating ``[B, H, N]``; strides: 1 or more each.

    Raises:
        ValueError: a stride below 1.
    """
    if any(stride < 1 for stride in strides):
        raise ValueError(f"strides {list(strides)} must be token counts of 1 or more")
    if strides and _fuses(mass):
        from mmi_compile.kernels.fused_probe import fold

        return fold(mass, tuple(strides))
    return tuple(F.pad(mass, (0, -mass.shape[-1] % s)).unflatten(-1, (-1, s)).sum(-2) for s in strides)


def best_phase(mass: Tensor, stride: int | Tensor, *, longest: int | None = None) -> Tensor:
    """The phase of heaviest mass when it is folded modulo a stride, int64 ``[B, H]``; identical from run to run.

    Args:
        mass: float ``[B, H, N]``, not negative, ``N >= 1``; stride: 1 or more, or int64 ``[B, H]`` of such.
        longest: no stride tensor entry exceeds it; None when nothing is known. Saves work, never changes the answer.
    """
    if isinstance(stride, int):
        return phase_mass(mass, (stride,))[0].argmax(-1)
    length = mass.shape[-1]
    if _fuses(mass):
        from mmi_compile.kernels.fused_probe import fold_by_head

        return fold_by_head(mass, stride, min(longest or length, length)).argmax(-1)
    residue = torch.arange(length, device=mass.device) % stride[..., None]
    # Integers: their sum does not depend on the order of atomic additions.
    units = (mass * _MASS_UNIT).long()
    return torch.zeros_like(units).scatter_add_(-1, residue, units).argmax(-1)


def _fuses(mass: Tensor) -> bool:
    return mass.is_cuda and mass.dtype == torch.float32 and find_spec("triton") is not None


def _peaks(parts: Tensor, columns: Tensor, length: int, too_near: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Excess mass and slot of the heaviest diagonals, ``[C, T]``.

    A column of mass ``c`` puts ``c / L`` on ``L`` neighbouring diagonals; a diagonal puts all of its mass on one, and
    does so in every part of the rows, which one row that looks hard at one column does not.

    Args:
        parts: ``[C, parts, kv_len + L - 1]`` as ``_diagonal_parts`` returns them; columns: ``[C, kv_len]``.
        too_near: slots above it (a scalar tensor) are no candidates.
    """
    explained = F.avg_pool1d(F.pad(columns, (length - 1, length - 1)), length, 1)
    diagonals, support = parts.sum(1), parts.amin(1) * parts.shape[1]
    slot = torch.arange(diagonals.shape[-1], device=diagonals.device)
    peaked = (diagonals > PEAK * explained) & (support > explained) & (slot <= too_near)
    return top_peaks(torch.where(peaked, diagonals - explained, 0), count)


def _add_peak_mass(target: Tensor, weights: Tensor, peaks: Tensor, slots: Tensor) -> None:
    """Add to ``target [C, kv_len]`` the probability that lies on the diagonals of ``slots [C, T]``."""
    length, width = weights.shape[1:]
    key = slots[:, None] - (length - 1) + torch.arange(length, device=slots.device)[:, None]  # [C, L, T]
    real = (key >= 0) & (key < width) & (peaks > 0)[:, None]
    key = key.clamp(0, width - 1)
    target.scatter_add_(-1, key.flatten(1), (weights.gather(-1, key) * real).flatten(1))


def head_chunks(heads: list[int], group: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Slices ``(start, stop, kv_head)`` of ``heads`` that share one key/value head, at most ``step`` long."""
    start = 0
    while start < len(heads):
        kv_head = heads[start] // group
        stop = start
        while stop < len(heads) and stop - start < step and heads[stop] // group == kv_head:
            stop += 1
        yield start, stop, kv_head
        start = stop


def row_scores(head_rows: Tensor, keys: Tensor, work: torch.dtype, scale: float) -> Tensor:
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
    """Diagonal sums of each ``PART`` rows, ``[C, parts, kv_len + L - 1]``, in the slots of ``_diagonal_sums``."""
    length = weights.shape[1]
    parts = []
    for start in range(0, length, PART):
        rows = weights[:, start : start + PART]
        parts.append(F.pad(_diagonal_sums(rows), (length - start - rows.shape[1], start)))
    return torch.stack(parts, 1)


def _diagonal_sums(weights: Tensor) -> Tensor:
    """Sums along diagonals: ``out[:, c + L - 1] = sum_r weights[:, r, c + r]``, ``[C, kv_len + L - 1]``.

    The long middle part is read through a sheared view (row stride one more than it is), so it costs one pass.
    """
    heads, length, width = weights.shape
    if width < 2 * length:
        return _padded_diagonal_sums(weights)
    left = _padded_diagonal_sums(weights[..., :length])[:, : length - 1]
    middle = weights.as_strided(
        (heads, length, width - length + 1),
        (weights.stride(0), weights.stride(1) + 1, weights.stride(2)),
        weights.storage_offset(),
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
