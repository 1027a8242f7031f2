"""Heads that treat modalities apart: the boundaries ``q`` and ``2d`` (MMInference section 3).

* ``q``: query rows are grouped by modality, and each group has its own pattern, probed with the last rows of that
  group. Keys stay in order, distances are in positions.
* ``2d``: keys are grouped as well, and each pair (query modality, key modality) is a region with its own pattern. There
  a key counts by its rank among the keys of its modality, and a query row by the number of such keys it sees, less one:
  ``distance = seen(i) - 1 - rank(j)``. All regions of a query tile share one online softmax.

Neither Q nor the output is ever permuted: kernels gather the rows of a tile and scatter its results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_compile.kernels.frames import TileFrame, TileShape, constant
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.modality_probe import ALL_KEYS, Asked, RegionMasses, run_modality_probe
from mmi_compile.kernels.patterns import AShape, ByModality, Dense, Grid, HeadPattern, Pattern, TriShape, VerticalSlash
from mmi_compile.kernels.plan import RECORD, Plan, TileRecord
from mmi_compile.kernels.planner import build_plan, keep_tail, lower, ordered_frame
from mmi_compile.kernels.rules import HeadRules, Probing, estimate_rules
from mmi_compile.kernels.segments import Segments

_BLOCK_FIELDS = ("window_start", "window_left", "window_full", "window_stop", "sink_start", "sink_stop", "list_base")


@dataclass(frozen=True)
class Part:
    """What the rows of one modality keep of all keys (``q``) or of the keys of one modality (``2d``).

    Attributes:
        query, key: places in ``Segments.labels``; key is None for ``q``.
        heads: the query heads that have this part.
        rules: for all query heads, in positions (``q``) or in ranks and compact distances (``2d``); only those of
            ``heads`` mean anything.
        last: for each query head, rows of the modality, counted from its end, that keep all.
        frame: the tiles in the same coordinates. geometry: lengths in the same coordinates.
        own: int32 ``[B, 1, QT]``, rank among its own modality of the last row of each tile, -1 for an empty tile.
    """

    query: int
    key: int | None
    heads: tuple[int, ...]
    rules: HeadRules
    last: tuple[int, ...]
    frame: TileFrame
    geometry: Geometry
    own: Tensor


def build_bounded_plan(
    heads: Sequence[HeadPattern], q: Tensor, k: Tensor, geometry: Geometry, scale: float, tiles: TileShape,
    segments: Segments, *, dense_tail: bool = False,
) -> Plan:  # fmt: skip
    """The plan of one attention call whose head ``h`` follows ``heads[h]``; boundaries mix freely.

    Args:
        heads: one per query head, patterns (boundary ``none`` or ``k``) or ``ByModality``.
        q: ``[B, HQ, q_len, D]``; k: ``[B, HKV, kv_len, D]``; scale: factor on the scores.
        segments: the prompt, grouped for the same geometry and tiles.
        dense_tail: keep every key for the tiles of the last live rows, as ``adaptive_plan`` does.

    Raises:
        ValueError: the number of patterns is not the number of query heads.
    """
    if len(heads) != geometry.q_heads:
        raise ValueError(f"got {len(heads)} patterns for {geometry.q_heads} query heads; give one per query head")
    if len(segments.labels) == 1:
        # With one modality there is nothing to treat apart.
        only = segments.labels[0]
        heads = [p.pattern(only, only) if isinstance(p, ByModality) else p for p in heads]
    whole = [Dense() if isinstance(p, ByModality) else p for p in heads]
    plain = build_plan(whole, q, k, geometry, scale, tiles)
    if dense_tail:
        plain = keep_tail(plain)
    if geometry.q_len == 0 or geometry.kv_len == 0 or not any(isinstance(p, ByModality) for p in heads):
        return plain
    parts = estimate_parts(heads, q, k, geometry, scale, tiles, segments)
    plans = [lower_part(part, tiles, segments, dense_tail=dense_tail) for part in parts]
    return _assembled(plain, parts, plans, segments)


def estimate_parts(
    heads: Sequence[HeadPattern], q: Tensor, k: Tensor, geometry: Geometry, scale: float, tiles: TileShape,
    segments: Segments,
) -> list[Part]:  # fmt: skip
    """The rules of all heads with boundaries, one part for each modality or pair of modalities."""
    g, labels = geometry, segments.labels
    frame = ordered_frame(segments.row_order[:, None], g, tiles)
    bounded = {h: p for h, p in enumerate(heads) if isinstance(p, ByModality)}
    by_rows = {h: p for h, p in bounded.items() if p.boundary == "q"}
    regions = {h: p for h, p in bounded.items() if p.boundary == "2d"}
    # Ranks and counts of keys take the place of positions.
    compact = Geometry(g.batch, g.q_heads, g.kv_heads, g.kv_len, g.kv_len)
    places = [compact_frame(frame, segments, key, tiles) for key in range(len(labels))]
    chosen: dict[tuple[int, int], dict[int, Pattern]] = {}
    for query, label in enumerate(labels):
        if by_rows:
            chosen[query, ALL_KEYS] = {h: p.pattern(label) for h, p in by_rows.items()}
        for key, other in enumerate(labels if regions else ()):
            chosen[query, key] = {h: p.pattern(label, other) for h, p in regions.items()}
    probings = _probings(chosen, q, k, g, scale, segments)
    parts = []
    for (query, key), patterns in chosen.items():
        where = (frame, g) if key == ALL_KEYS else (places[key], compact)
        place = None if key == ALL_KEYS else key
        own = places[query].high
        parts.append(_part(query, place, patterns, probings[query, key], *where, own, (q, k, scale, tiles)))
    return parts


def _probings(
    chosen: dict[tuple[int, int], dict[int, Pattern]], q: Tensor, k: Tensor, geometry: Geometry, scale: float,
    segments: Segments,
) -> dict[tuple[int, int], Probing]:  # fmt: skip
    """Where each part's masses come from: one probe for all of them, of the heads whose patterns ask the probe."""
    asked = [
        Asked(query, key, head, isinstance(pattern, VerticalSlash))
        for (query, key), patterns in chosen.items()
        for head, pattern in patterns.items()
        if isinstance(pattern, VerticalSlash | Grid)
    ]
    probe = run_modality_probe(q, k, geometry, scale, segments, asked) if asked else None

    def of(query: int, key: int) -> Probing:
        def probing(heads: tuple[int, ...], diagonals: bool) -> RegionMasses:
            assert probe is not None, "a pattern that asks the probe was not announced to it"
            return probe.masses(query, key, heads, diagonals)

        return probing

    return {place: of(*place) for place in chosen}


def _part(
    query: int, key: int | None, chosen: dict[int, Pattern], probing: Probing, frame: TileFrame, geometry: Geometry,
    own: Tensor, call: tuple[Tensor, Tensor, float, TileShape],
) -> Part:  # fmt: skip
    q, k, scale, tiles = call
    everyone: list[Pattern] = [AShape(0, 1)] * geometry.q_heads
    last = [0] * geometry.q_heads
    for head, pattern in chosen.items():
        everyone[head] = pattern
        if isinstance(pattern, TriShape):
            everyone[head], last[head] = AShape(pattern.sink, pattern.local), pattern.last
    rules = estimate_rules(everyone, q, k, geometry, scale, tiles, probing=probing)
    return Part(query, key, tuple(chosen), rules, tuple(last), frame, geometry, own)


def compact_frame(frame: TileFrame, segments: Segments, key: int, tiles: TileShape) -> TileFrame:
    """The tiles of ``frame`` in compact coordinates of one key modality: -1 where a row sees no such key."""
    seen, bn = segments.seen[:, key], tiles.block_n
    low, high = (
        seen.gather(1, (x[:, 0] + 1).clamp(0, seen.shape[1] - 1).long())[:, None] - 1 for x in (frame.low, frame.high)
    )
    zero = torch.zeros((), dtype=torch.int32, device=low.device)
    base, stop = low.clamp(min=0) // bn, (high + bn) // bn
    return TileFrame(
        low=low, high=high, base=base, first=zero.expand(1, 1, 1), latest=base, left=None,
        full=torch.minimum((low + 1) // bn, stop), stop=stop, origin=zero.expand(1, 1, 1),
        live_end=segments.counts[:, key, None, None], after=low + 1, zero=zero, first_is_zero=True, latest_is_base=True,
    )  # fmt: skip


def dense_tiles(part: Part, segments: Segments, tiles: TileShape) -> Tensor | None:
    """Tiles that keep every key of the part, bool ``[B, HQ or 1, QT]``; None where the rules ask for none.

    Those with rows of the ``last`` ones of their modality, and, where the part has diagonals, those whose rows stand
    too far apart for a list of block diagonals: rows of a modality that is rare in this stretch of the prompt.
    """
    frame = part.frame
    apart = None if part.rules.distances is None else frame.high - frame.low > 2 * tiles.block_m
    if not any(part.last):
        return apart
    last = constant(part.last, part.own.device)[:, None]
    is_last = (part.own >= segments.counts[:, part.query, None, None] - last) & (part.own >= 0) & (last > 0)
    return is_last if apart is None else is_last | apart


def lower_part(part: Part, tiles: TileShape, segments: Segments, *, dense_tail: bool = False) -> Plan:
    """The plan of one part for all tiles and heads, in its own coordinates."""
    dense = dense_tiles(part, segments, tiles)
    if dense_tail:
        tail = segments.tail[:, None]
        dense = tail if dense is None else dense | tail
    return lower(part.rules, part.geometry, tiles, frame=part.frame, dense=dense, spread=True).plan


# ---------------------------------------------------------------------------------------------------------------------
# Putting parts together


def _assembled(plain: Plan, parts: list[Part], plans: list[Plan], segments: Segments) -> Plan:
    """One plan of all heads: plain heads as they are, each tile of the others from the parts of its modality."""
    g, bm, device = plain.geometry, plain.block_m, plain.tiles.device
    bounded = _marked({h for part in parts for h in part.heads}, g.q_heads, device)
    grouped = any(part.key is not None for part in parts)
    shape = (g.batch, g.q_heads, segments.tile_group.shape[1], len(segments.labels) if grouped else 1, RECORD)
    tiles = torch.zeros(shape, dtype=torch.int32, device=device)
    tiles[:, :, : plain.query_tiles, :1] = plain.tiles
    tiles.masked_fill_(bounded[:, None, None, None], 0)
    order = F.pad(plain.rows().flatten(2).int(), (0, shape[2] * bm - plain.query_tiles * bm), value=-1)
    order = torch.where(bounded[:, None], segments.row_order[:, None], order)
    pool = _Pool([plain.lists], [plain.columns], [plain.columns], [plain.list_bits])
    for part, plan in zip(parts, plans, strict=True):
        record = pool.add(part, plan, segments)
        mine = (segments.tile_group == part.query)[:, None, :, None]
        mine = mine & _marked(set(part.heads), g.q_heads, device)[:, None, None]
        region = tiles[:, :, :, part.key or 0]
        region.copy_(torch.where(mine, record, region))
    has_bits = any(bits is not None for bits in pool.bits)
    return dataclasses.replace(
        plain, tiles=tiles, row_order=order, has_sinks=plain.has_sinks or any(p.has_sinks for p in plans),
        lists=torch.cat(pool.lists), columns=torch.cat(pool.columns, -1),
        list_bits=torch.cat([b for b in pool.bits if b is not None]) if has_bits else None,
        key_order=segments.key_order if grouped else None,
        column_slots=torch.cat(pool.slots, -1) if grouped else None,
    )  # fmt: skip


def _marked(heads: set[int], count: int, device: torch.device) -> Tensor:
    """Which of ``count`` query heads are among ``heads``, bool ``[HQ]``."""
    return constant(tuple(int(h in heads) for h in range(count)), device, torch.bool)


@dataclass(frozen=True)
class _Pool:
    """Lists, columns, slots of columns and bits of all parts so far, one after the other."""

    lists: list[Tensor]
    columns: list[Tensor]
    slots: list[Tensor]
    bits: list[Tensor | None]

    def add(self, part: Part, plan: Plan, segments: Segments) -> Tensor:
        """Take in what ``plan`` holds; its records int32 ``[B, HQ, QT, RECORD]`` with everything in its new place."""
        device = plan.tiles.device
        moved = {
            "list_start": sum(x.numel() for x in self.lists),
            "column_start": sum(x.shape[-1] for x in self.columns),
            "bits_start": sum(x.numel() for x in self.bits if x is not None),
            "grouped": int(part.key is not None),
        }
        shift = constant(tuple(moved.get(name, 0) for name in TileRecord._fields), device)
        record = plan.tiles[..., 0, :] + shift
        self.lists.append(plan.lists)
        self.bits.append(plan.list_bits)
        if part.key is None:
            self.columns.append(plan.columns)
            self.slots.append(plan.columns)
            return record
        start = segments.key_start[:, part.key]
        moves = constant(tuple(int(name in _BLOCK_FIELDS) for name in TileRecord._fields), device)
        slots = start[:, None, None] + plan.columns
        order = segments.key_order[:, None].expand(-1, slots.shape[1], -1)
        self.slots.append(slots)
        self.columns.append(order.gather(-1, slots.clamp(max=order.shape[-1] - 1).long()).clamp(min=0))
        return record + (start // plan.block_n)[:, None, None, None] * moves
