"""The probe of policy ``adaptive`` for boundaries: rows of each modality, read once in order and once by key modality.

A *part* is what the rows of one modality keep of all keys (boundary ``q``) or of the keys of one modality (``2d``). Of
each modality its last rows and groups from all over it choose, and other groups check, as in ``spread_probe``, whose
kernels do the work. Keys of one modality are read in the order of ``Segments.key_order``, where a row stands right
behind the keys that it sees; the probability is that of the row over all keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_compile.kernels.frames import TileShape, constant, ramp
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.segments import Segments, first_slots
from mmi_compile.kernels.spread_probe import (
    GROUP_ROWS,
    SPREAD_GROUPS,
    SpreadCall,
    SpreadProbe,
    SpreadRows,
    fused_sums,
    group_masses,
    run_spread_probe,
)
from mmi_compile.profiling import span

CHOOSE, CHECK = 2, 1
"""Kinds of rows of each modality that choose (its last rows, and others), and that check."""

KINDS = CHOOSE + CHECK


class PartKey(NamedTuple):
    """Places in ``Segments.labels`` of the rows and of the keys of a part; ``key`` None for all keys in order."""

    query: int
    key: int | None


def parts_of(labels: int, boundaries: Sequence[str]) -> tuple[PartKey, ...]:
    """The parts of all modalities under ``q``, then under ``2d``, as far as these are among ``boundaries``."""
    parts = [PartKey(query, None) for query in range(labels) if "q" in boundaries]
    return (*parts, *(PartKey(a, c) for a in range(labels) for c in range(labels) if "2d" in boundaries))


@dataclass(frozen=True)
class PartRows:
    """Rows that are looked at: groups of ``R`` neighbours, ``G`` of each kind and modality.

    Attributes:
        spread: kinds ``t * M + a`` of modality ``a``: ``t`` is 0 for its last rows, 1 for others that choose, 2 for
            those that check. Rows that do not exist are -1.
        tile: int64 ``[B, M, 3 * G]``, tile of each group in ``Segments.row_order``.
        real: bool ``[B, M]``, whether there is any row of the modality.
    """

    spread: SpreadRows
    tile: Tensor
    real: Tensor


def part_rows(segments: Segments, geometry: Geometry, tiles: TileShape, zone: int, credit_start: int) -> PartRows:
    """The rows of a prompt without padding whose ``block_m`` is a multiple of ``GROUP_ROWS``.

    Args:
        zone: nearest keys that are left to windows. credit_start: first key that may become a column.
    """
    g, bm, device = geometry, tiles.block_m, segments.row_order.device
    count = segments.counts - segments.seen[:, :, g.q_offset]  # [B, M] query rows
    starts = first_slots(count, bm)
    rows = count[..., None].long()
    group = ramp(SPREAD_GROUPS, device, dtype=torch.int64)
    # A multiple of the group's size, so that no group crosses tiles; rows beyond the last one do not exist.
    last = (rows + (GROUP_ROWS - 1)) // GROUP_ROWS * GROUP_ROWS + (group - SPREAD_GROUPS) * GROUP_ROWS
    middle = rows * (2 * ramp(2 * SPREAD_GROUPS, device, dtype=torch.int64) + 1) // (4 * SPREAD_GROUPS)
    spread = middle - (middle % bm - (bm - GROUP_ROWS)).clamp(min=0)
    first = torch.cat([last, spread[..., ::2], spread[..., 1::2]], -1)  # [B, M, 3 * G]
    rank = first[..., None] + ramp(GROUP_ROWS, device, dtype=torch.int64)
    exists = (rank >= 0) & (rank < rows[..., None])
    slot = (starts[..., None, None] + rank).clamp(0, segments.row_order.shape[1] - 1)
    row = segments.row_order.gather(1, slot.flatten(1)).view_as(slot)
    row = torch.where(exists, row, -1).unflatten(2, (KINDS, -1)).transpose(1, 2)  # [B, KINDS, M, G, R]
    row = row.flatten(3).flatten(1, 2).contiguous()
    position = torch.where(row < 0, -1, row + g.q_offset)
    stop = (position.unflatten(2, (SPREAD_GROUPS, -1))[..., :1] - zone).clamp(min=0, max=g.kv_len - 1)
    stop = stop.expand(-1, -1, -1, GROUP_ROWS).flatten(2)[:, : CHOOSE * len(segments.labels)].contiguous()
    begin = constant((credit_start,), device).expand(g.batch).contiguous()
    tile = (starts[..., None] + first.clamp(min=0)) // bm
    return PartRows(
        SpreadRows(row, position, SPREAD_GROUPS, begin, stop),
        tile.clamp(max=segments.tile_group.shape[1] - 1),
        count > 0,
    )


@dataclass(frozen=True)
class PartProbe:
    """Attention mass of groups of rows in the key space of each part; each row weighs 1. ``V`` parts, ``K`` keys.

    Key spaces: positions, or slots of ``Segments.key_order``; both filled up to its length.

    Attributes:
        parts: the parts. rows: see ``PartRows``.
        blocks: float ``[B, V, HQ, 3 * G, key blocks]``, mass on each key block, of the last groups, of those that
            choose and of those that check.
        credit: float ``[B, V, HQ, K]``, mass on each key of the rows that choose, where they may credit it.
        total: float ``[B, V, HQ, 3 * G]``, mass of the groups on all keys, those of other parts as well.
        credit_start: int ``[B, V]``, first key that may become a column; credit_stop: ``[B, V, 2 * G]``, one past the
            last one, for each group that chooses.
        probe: of the rows of all modalities.
    """

    parts: tuple[PartKey, ...]
    rows: PartRows
    segments: Segments
    blocks: Tensor
    credit: Tensor
    total: Tensor
    credit_start: Tensor
    credit_stop: Tensor
    probe: SpreadProbe

    def mass_at(self, keys: Tensor, kinds: int = KINDS) -> Tensor:
        """Mass of each group of the first ``kinds`` kinds on some keys, float ``[B, V, HQ, kinds * G, C]``.

        Args:
            keys: int64 ``[B, V, HQ, C]`` in the key space of the part; those beyond all keys stand for none.
        """
        order, kv_len = self.segments.key_order, self.probe.call.geometry.kv_len
        grouped = constant(tuple(int(part.key is not None) for part in self.parts), keys.device, torch.bool)
        slot = keys.clamp(max=order.shape[1] - 1)
        found = order[:, None, None].expand(*slot.shape[:3], -1).gather(-1, slot)
        position = torch.where(grouped[:, None, None], torch.where(found < 0, kv_len, found), keys)
        position = torch.where(keys < order.shape[1], position, kv_len)
        beside = (_side_by_side(self.probe, b, self.parts, len(self.segments.labels)) for b in range(keys.shape[0]))
        return torch.stack([probe.mass_at(position[b], kinds) for b, probe in enumerate(beside)])

    def some(self, parts: slice) -> PartProbe:
        """The same of some parts."""
        names = ("blocks", "credit", "total", "credit_start", "credit_stop")
        return replace(self, parts=self.parts[parts], **{name: getattr(self, name)[:, parts] for name in names})

    def credit_at(self, keys: Tensor) -> Tensor:
        """What each group that chooses credits to some keys, ``[B, V, HQ, 2 * G, C]``; keys as for ``mass_at``."""
        at = keys[:, :, :, None]
        mine = (at >= self.credit_start[..., None, None, None]) & (at < self.credit_stop[:, :, None, :, None])
        return self.mass_at(keys, CHOOSE) * mine


@span("mmi::probe")
def run_part_probe(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, segments: Segments, rows: PartRows,
    parts: tuple[PartKey, ...], tiles: TileShape, zone: Tensor, sinks: int,
) -> PartProbe:  # fmt: skip
    """Attend from the rows to all keys they may see, and sum the probabilities as the parts need them.

    Args:
        q: floating ``[B, HQ, q_len, D]``; k: ``[B, HKV, kv_len, D]``; scale: factor on the scores.
        zone: int ``[B, M]``, nearest keys of each modality that are left to windows.
        sinks: first keys of each modality that may be no columns, a multiple of ``block_n``.

    Sums are float32 (float64 for float64 inputs). Half precision on a GPU runs fused.
    """
    count = len(segments.labels)
    probe = run_spread_probe(q, k, geometry, scale, rows.spread, tiles.block_n)
    width = segments.key_order.shape[1]
    blocks, credits, starts, stops = [], [], [], []
    if any(part.key is None for part in parts):
        spare = width // tiles.block_n - probe.blocks.shape[-1]
        blocks.append(F.pad(_by_modality(probe.blocks, count), (0, spare)))
        credit = probe.credit.unflatten(1, (CHOOSE, count)).sum(1)
        credits.append(F.pad(credit, (0, width - credit.shape[-1])))
        starts.append(rows.spread.credit_start[:, None].expand(-1, count))
        stops.append(_limits(rows.spread.credit_stop, count))
    if any(part.key is not None for part in parts):
        moved = _moved(rows.spread, segments, zone, sinks)
        grouped, credit = _grouped_sums(probe, segments, moved)
        # All pairs of modalities, that of the keys last.
        blocks.append(torch.stack([_by_modality(x, count) for x in grouped.unbind(1)], 2).flatten(1, 2))
        credits.append(credit.unflatten(2, (CHOOSE, count)).sum(2).transpose(1, 2).flatten(1, 2))
        starts.append(moved.credit_start[:, None].expand(-1, count, -1).flatten(1))
        limits = _limits(moved.credit_stop.flatten(0, 1), count).unflatten(0, (-1, count))  # [B, c, a, 2 * G]
        stops.append(limits.transpose(1, 2).flatten(1, 2))
    total = _by_modality(probe.blocks.sum(-1), count)
    return PartProbe(
        parts=parts,
        rows=rows,
        segments=segments,
        blocks=torch.cat(blocks, 1),
        credit=torch.cat(credits, 1),
        total=total.index_select(1, constant(tuple(part.query for part in parts), q.device, torch.int64)),
        credit_start=torch.cat(starts, 1),
        credit_stop=torch.cat(stops, 1),
        probe=probe,
    )


def _by_modality(x: Tensor, count: int) -> Tensor:
    """``[B, HQ, KINDS * M * G, ...]`` as ``[B, M, HQ, KINDS * G, ...]``."""
    apart: Tensor = x.unflatten(2, (KINDS, count, -1))
    return apart.movedim(3, 1).flatten(3, 4)


def _limits(credit_stop: Tensor, count: int) -> Tensor:
    """``[B, CHOOSE * M, rows]`` as ``[B, M, CHOOSE * G]``."""
    stop: Tensor = credit_stop.unflatten(2, (-1, GROUP_ROWS))[..., 0].unflatten(1, (CHOOSE, count))
    return stop.transpose(1, 2).flatten(2)


def _side_by_side(probe: SpreadProbe, b: int, parts: tuple[PartKey, ...], count: int) -> SpreadProbe:
    """The rows of all parts in one batch element as a batch of their own, to be asked for masses."""
    call, spread = probe.call, probe.call.spread
    g, some = call.geometry, len(parts)
    kinds = tuple(t * count + part.query for part in parts for t in range(KINDS))
    picked = constant(kinds, spread.rows.device, torch.int64).view(some, KINDS)
    rows, positions = spread.rows[b][picked], spread.positions[b][picked]
    lengths = Geometry(some, g.q_heads, g.kv_heads, g.q_len, g.kv_len, g.q_offset)
    beside = SpreadRows(rows, positions, spread.groups, spread.credit_start[b : b + 1], rows[:, :0])
    q, k = (x[b : b + 1].expand(some, -1, -1, -1) for x in (call.q, call.k))
    own = SpreadCall(q, k, lengths, call.scale, beside, call.block_n, call.tiles)
    return SpreadProbe(own, probe.blocks, probe.credit, probe.log_sums[b][picked])


def _moved(spread: SpreadRows, segments: Segments, zone: Tensor, sinks: int) -> SpreadRows:
    """The rows as they stand among the slots of ``key_order``: a dimension of key modalities follows the batch."""
    start, choosing = segments.key_start, spread.choosing
    place = spread.positions.long()[:, None].expand(-1, start.shape[1], -1, -1)  # [B, M, kinds, rows]
    seen = segments.seen.gather(2, (place + 1).flatten(2)).view(place.shape)
    position = torch.where(place < 0, -1, start[..., None, None] + seen - 1)
    group = position[:, :, :choosing].unflatten(3, (spread.groups, -1))[..., :1]
    stop = torch.minimum(group - zone[..., None, None, None], (start + segments.counts - 1)[..., None, None, None])
    stop = stop.clamp(min=0).expand(-1, -1, -1, -1, GROUP_ROWS).flatten(3)
    rows = spread.rows[:, None].expand_as(position)
    return SpreadRows(rows, position, spread.groups, (start + sinks).int(), stop.int())


def _grouped_sums(probe: SpreadProbe, segments: Segments, moved: SpreadRows) -> tuple[Tensor, Tensor]:
    """Masses on the keys of each modality ``c``, zero elsewhere: on blocks of ``key_order``, float ``[B, M, HQ, KINDS *
    M * G, key blocks]``, and credit of the rows that choose, ``[B, M, CHOOSE * M, HQ, slots]``."""
    call, start = probe.call, segments.key_start
    g, count = call.geometry, start.shape[1]
    if call.tiles is None:
        return _reference_grouped_sums(call, segments, moved)
    blocks, credits = [], []
    for b in range(g.batch):
        by_slot = call.k[b].index_select(1, segments.key_order[b].clamp(min=0))
        q, k = (x.expand(count, -1, -1, -1) for x in (call.q[b : b + 1], by_slot[None]))
        lengths = Geometry(
            count, g.q_heads, g.kv_heads, g.q_len, by_slot.shape[1], kv_start=start[b].contiguous(),
            kv_stop=start[b] + segments.counts[b],
        )  # fmt: skip
        rows = SpreadRows(
            moved.rows[b].contiguous(), moved.positions[b].contiguous(), moved.groups,
            moved.credit_start[b].contiguous(), moved.credit_stop[b].contiguous(),
        )  # fmt: skip
        one = SpreadCall(q, k, lengths, call.scale, rows, call.block_n, call.tiles)
        found = fused_sums(one, probe.log_sums[b].expand(count, -1, -1, -1))
        blocks.append(found[0])
        credits.append(found[1])
    return torch.stack(blocks), torch.stack(credits)


def _reference_grouped_sums(call: SpreadCall, segments: Segments, moved: SpreadRows) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch; ``moved`` has a dimension of key modalities after the batch."""
    g, order, count = call.geometry, segments.key_order, len(segments.labels)
    work = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    shape, device = (g.batch, count), call.q.device
    kinds = call.spread.kinds * call.spread.groups
    choosing = call.spread.choosing
    blocks = torch.empty(*shape, g.q_heads, kinds, order.shape[1] // call.block_n, dtype=work, device=device)
    credit = torch.empty(*shape, choosing, g.q_heads, order.shape[1], dtype=work, device=device)
    slot = ramp(order.shape[1], device)
    start, stop = segments.key_start[..., None], (segments.key_start + segments.counts)[..., None]
    mine = ((slot >= start) & (slot < stop))[:, :, None, None]  # [B, M, 1, 1, slots]
    limit = moved.credit_stop.unflatten(3, (call.spread.groups, -1))[..., 0].flatten(2)[:, :, None, :, None]
    credited = (slot >= moved.credit_start[:, :, None, None, None]) & (slot < limit)
    index = order.clamp(min=0).long()[:, None, None]
    for some, mass, _ in group_masses(call.q, call.k, g, call.scale, call.spread):
        by_slot = mass.gather(-1, index.expand(-1, *mass.shape[1:3], -1))[:, None] * mine
        blocks[:, :, some] = by_slot.unflatten(-1, (-1, call.block_n)).sum(-1)
        chosen = by_slot[:, :, :, : choosing * call.spread.groups] * credited
        credit[:, :, :, some] = chosen.unflatten(3, (choosing, -1)).sum(4).transpose(2, 3)
    return blocks, credit
