"""Policy ``adaptive`` among boundaries: what a head would cost if its modalities were treated apart.

Each part (``part_probe``) is searched as if it were an attention of its own, all parts of all heads at once: a batch
element of the search is one part of one batch element of the prompt. Its rows are the tiles of its modality, its keys
positions (``q``) or slots of the grouped keys (``2d``). What comes out are plans of all parts side by side; a head
takes a boundary when every modality keeps what was asked, and the plan promises to take the least time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mmi_compile.kernels.boundaries import compact_frame
from mmi_compile.kernels.cost import Coefficients, Work, record_work
from mmi_compile.kernels.frames import TileFrame, TileShape, constant, ramp
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.part_probe import (
    CHOOSE,
    KINDS,
    PartKey,
    PartProbe,
    PartRows,
    part_rows,
    parts_of,
    run_part_probe,
)
from mmi_compile.kernels.plan import RECORD, Plan, TileRecord
from mmi_compile.kernels.planner import Lowered, dense_records, list_size, lower, ordered_frame
from mmi_compile.kernels.probe import best_phase
from mmi_compile.kernels.rules import autocorrelation_stride
from mmi_compile.kernels.search import Best, Columns, Search, covered_mass, may_be_lost
from mmi_compile.kernels.search_frame import (
    LOCAL_ZONE,
    Costs,
    Prices,
    SearchFrame,
    max_columns,
    max_diagonals,
    sink_tokens,
    window_ladder,
)
from mmi_compile.kernels.segments import Segments
from mmi_compile.kernels.spread_probe import GROUP_ROWS, SPREAD_GROUPS


def why_no_parts(geometry: Geometry, tiles: TileShape, segments: Segments) -> str | None:
    """Why the modalities of a prompt cannot be searched apart, in words; None where they can."""
    g = geometry
    if len(segments.labels) < 2:
        return "the prompt has one modality"
    if g.has_padding or g.window or g.has_rows:
        return "boundaries are chosen for prompts without padding and sliding window"
    if g.kv_len != g.q_len + g.q_offset:
        return "some rows stand behind the last key"
    return f"tiles of {tiles.block_m} rows" if tiles.block_m % GROUP_ROWS else None


@dataclass(frozen=True)
class Bounded:
    """What all heads would do under one boundary.

    Attributes:
        name: ``q`` or ``2d``.
        records: int32 ``[B, HQ, QT, R, RECORD]``, tiles in the order of ``Segments.row_order``.
        columns: int32 ``[B, HQ, C]``, positions; slots: likewise, their slots in the key space of their region.
        lists, bits: as in ``Plan``.
        chosen, measured: float ``[B, HQ]``, the least recall of a modality: of rows that choose, of those that check.
        fits: bool ``[B, HQ]``, whether there is room for all columns.
        work: of each head. pattern: int64 ``[B, HQ, parts]``, codes of ``search``.
        sparse_tiles: float ``[B, HQ]``, key tiles before the last rows become dense.
    """

    name: str
    records: Tensor
    columns: Tensor
    slots: Tensor
    lists: Tensor
    bits: Tensor
    chosen: Tensor
    measured: Tensor
    fits: Tensor
    work: Work
    sparse_tiles: Tensor
    pattern: Tensor

    def work_seconds(self, coefficients: Coefficients) -> Tensor:
        """Predicted time of each head, float ``[B, HQ]``, without a launch."""
        return torch.as_tensor(coefficients.seconds(self.work, calls=0))


def search_parts(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, tiles: TileShape, segments: Segments, *,
    boundaries: Sequence[str], recall: float, prices: Prices, columns: int, strides: Sequence[int] = (),
    dense_tail: bool = False,
) -> list[Bounded]:  # fmt: skip
    """All heads under each of ``boundaries`` ("q", "2d").

    Args:
        q: floating ``[B, HQ, q_len, D]``; k: ``[B, HKV, kv_len, D]``; scale: factor on the scores.
        segments: a prompt for which ``why_no_parts`` is None.
        recall: share of the probability that every modality must keep.
        columns: columns that a head may have in all its parts. strides: of grids to try beside the estimated one.
        dense_tail: keep every key for the tiles of the last rows. They count as work, and not for the recalls.

    Nothing waits for the device.
    """
    facts = _facts_of(geometry, tiles, segments, tuple(boundaries), prices)
    probe = run_part_probe(
        q, k, geometry, scale, segments, facts.rows, facts.parts, tiles, facts.zones, _sinks(tiles.block_n)
    )
    dense = facts.dense if dense_tail else None
    return [
        _searched(name, probe.some(some), frame, owned, geometry, tiles, recall, columns, strides, dense)
        for name, some, frame, owned in facts.boundaries
    ]


def _sinks(block_n: int) -> int:
    """First keys of each key space that a sparse head keeps, whole blocks."""
    return -(-sink_tokens(block_n) // block_n) * block_n


# ---------------------------------------------------------------------------------------------------------------------
# What the grouping of a prompt decides


class _Boundary(NamedTuple):
    """Of one boundary: its name, its parts, what their search must know, and which tiles hold rows of each part, bool
    ``[B * V, QT]``."""

    name: str
    parts: slice
    frame: SearchFrame
    owned: Tensor


@dataclass(frozen=True)
class _Facts:
    """What the search knows before q and k.

    Attributes:
        zones: int ``[B, M]``, nearest keys of each modality that are left to windows.
        dense: int32 ``[B, 1, QT, 1, RECORD]``, tiles that keep every key.
    """

    parts: tuple[PartKey, ...]
    rows: PartRows
    zones: Tensor
    dense: Tensor
    boundaries: tuple[_Boundary, ...]


_known = WeakTensorKeyDictionary()
"""For the row order of a grouping, which the layers of a graph share: facts by what else decides them."""


def _facts_of(
    geometry: Geometry, tiles: TileShape, segments: Segments, boundaries: tuple[str, ...], prices: Prices
) -> _Facts:
    """Made once for all layers that share a grouping."""
    order = segments.row_order
    stream = torch.cuda.current_stream(order.device).cuda_stream if order.is_cuda else 0
    lengths = (geometry.batch, geometry.q_len, geometry.kv_len, geometry.q_offset)
    version = 0 if order.is_inference() else order._version
    key = (lengths, tiles, segments.labels, boundaries, prices, version, stream)
    known: dict[Any, _Facts] = _known.setdefault(order, {})
    if key not in known:
        known[key] = _make_facts(geometry, tiles, segments, boundaries, prices)
    return known[key]


def _make_facts(
    geometry: Geometry, tiles: TileShape, segments: Segments, boundaries: tuple[str, ...], prices: Prices
) -> _Facts:
    g, width = geometry, segments.key_order.shape[1]
    parts = parts_of(len(segments.labels), boundaries)
    rows = part_rows(segments, g, tiles, min(LOCAL_ZONE, g.kv_len // 16), _sinks(tiles.block_n))
    in_order = ordered_frame(segments.row_order[:, None], g, tiles)
    places = _tile_frames(parts, segments, in_order, tiles)
    mine = _own_tiles(parts, segments, places)
    made = []
    for name in boundaries:
        own = [index for index, part in enumerate(parts) if (part.key is None) == (name == "q")]
        some = slice(own[0], own[-1] + 1)
        query = constant(tuple(part.query for part in parts[some]), mine.device, torch.int64)
        tile, owned = rows.tile.index_select(1, query).flatten(0, 1), mine[:, some].flatten(0, 1)
        frame = _part_frame(_of_parts(places, some), owned, tile, width, tiles, prices)
        made.append(_Boundary(name, some, frame, owned))
    zones = torch.clamp(segments.counts // 16, max=LOCAL_ZONE)
    return _Facts(parts, rows, zones, dense_records(in_order), tuple(made))


_PLACES = ("low", "high", "base", "first", "latest", "full", "stop", "origin", "live_end", "after")


def _tile_frames(parts: tuple[PartKey, ...], segments: Segments, frame: TileFrame, tiles: TileShape) -> TileFrame:
    """``frame`` of the grouped rows in the key space of each part, ``[B, V, QT]`` in place of ``[B, 1, QT]``."""
    batch, bn = segments.group.shape[0], tiles.block_n
    by_key: dict[int | None, TileFrame] = {None: frame}
    for key in sorted({part.key for part in parts if part.key is not None}):
        start = segments.key_start[:, key, None, None]
        compact = compact_frame(frame, segments, key, tiles)
        shift = {"low": start, "high": start, "after": start, "live_end": start}
        shift |= dict.fromkeys(("base", "latest", "full", "stop", "first"), start // bn)
        moved = {name: getattr(compact, name) + by for name, by in shift.items()}
        by_key[key] = dataclasses.replace(compact, origin=start, **moved)

    def of_all(name: str) -> Tensor:
        size = 1 if name in ("origin", "live_end") else frame.low.shape[-1]
        return torch.cat([getattr(by_key[part.key], name).expand(batch, 1, size) for part in parts], 1)

    together = {name: of_all(name) for name in _PLACES}
    return TileFrame(**together, left=None, zero=frame.zero, first_is_zero=False, latest_is_base=False)


def _own_tiles(parts: tuple[PartKey, ...], segments: Segments, places: TileFrame) -> Tensor:
    """Which tiles hold rows of each part, bool ``[B, V, QT]``."""
    query = constant(tuple(part.query for part in parts), places.low.device)
    holds = segments.row_order.view(*segments.tile_group.shape, -1).amax(-1) >= 0
    return (segments.tile_group[:, None] == query[:, None]) & holds[:, None]


def _of_parts(frame: TileFrame, parts: slice) -> TileFrame:
    """The tiles of some parts, parts and batch elements as one dimension: ``[B * V, 1, QT]``."""
    some = {name: getattr(frame, name)[:, parts].flatten(0, 1)[:, None].contiguous() for name in _PLACES}
    return dataclasses.replace(frame, **some)


def _part_frame(
    places: TileFrame, mine: Tensor, tile: Tensor, width: int, tiles: TileShape, prices: Prices
) -> SearchFrame:
    """What the search must know of tiles and costs. ``width`` slots; ``mine`` bool ``[B * V, QT]``, tile int64
    ``[B * V, 3 * G]``."""
    bn, device = tiles.block_n, mine.device
    blocks = width // bn
    reach = blocks + 2
    ladder = window_ladder(width, bn)
    sink_end = (places.origin[:, 0] + (sink_tokens(bn) - 1)) // bn + 1  # [B * V, 1]
    base = places.base[:, 0].long().gather(1, tile)[:, None]  # [B * V, 1, 3 * G]
    edge = base[..., None] - ramp(reach, device, dtype=torch.int64)
    known = (edge >= sink_end[..., None, None]) & (edge < blocks)
    costs = _part_costs(places, mine, sink_end, width, ladder, tiles, prices)
    return SearchFrame(
        tiles=places,
        tile=tile[:, None],
        edge=edge.clamp(0, blocks - 1),
        known=known,
        ahead=(base[..., None] - ramp(blocks, device, dtype=torch.int64)).clamp(min=0),
        ladder=ladder,
        costs=costs,
    )


def _part_costs(
    places: TileFrame, mine: Tensor, sink_end: Tensor, width: int, ladder: tuple[int, ...], tiles: TileShape,
    prices: Prices,
) -> Costs:  # fmt: skip
    """Keys per query of the rows of each part, from the tiles that they have. Windows off the ladder are not told."""
    bm, bn, device = tiles.block_m, tiles.block_n, mine.device
    reach = width // bn + 2
    low, first, latest, stop, base = (
        getattr(places, name)[:, 0, None] for name in ("low", "first", "latest", "stop", "base")
    )
    count = mine.sum(-1).clamp(min=1).double()[:, None]  # [B * V, 1] tiles
    local = (ramp(reach + 1, device) * bn + bm).clamp(max=width)
    rungs = constant(tuple(min(w * bn + bm, width) for w in ladder), device)[:, None]
    start = torch.minimum(torch.maximum((low + 1 - rungs).clamp(min=0) // bn, first), latest)
    visited = torch.where(mine[:, None], (stop - start).clamp(min=0), 0).sum(-1, dtype=torch.int64)  # [B * V, L]
    sink = (sink_end - places.origin[:, 0] // bn).double() * bn
    rung = (visited.double() * bn / count + sink)[:, None]
    dense = torch.where(mine[:, None], (stop - first).clamp(min=0), 0).sum(-1, dtype=torch.int64).double() * bn / count
    # How many tiles reach each diagonal: those whose base lies at least so many blocks right of the sinks.
    room = torch.where(mine, base[:, 0] - sink_end, -1).sort(-1).values.contiguous()
    offset = ramp(reach, device).expand(room.shape[0], -1).contiguous()
    beyond = room.shape[1] - torch.searchsorted(room, offset)
    diagonal = (beyond.double() * bn / count)[:, None]
    column = (prices.columns + prices.gathered / count)[..., None]
    none = torch.empty(*dense.shape, 0, device=device)
    return Costs.of((dense, none, rung), local, diagonal, column, width, ladder, prices)


# ---------------------------------------------------------------------------------------------------------------------
# The search


@dataclass(frozen=True)
class PartSearch(Search):
    """The search of some parts, batch elements and parts as one dimension: ``B * V`` in place of ``B``.

    Attributes:
        probe: of these parts. most: columns that a part may have.
    """

    probe: PartProbe
    most: int

    @property
    def capacity(self) -> tuple[int, int]:
        return self.most, self.most

    def mass_at(self, columns: Tensor) -> Tensor:
        return self.probe.mass_at(self._apart(columns)).flatten(0, 1)

    def credit_by_group(self, columns: Tensor) -> Tensor:
        return self.probe.credit_at(self._apart(columns)).flatten(0, 1)

    def _apart(self, columns: Tensor) -> Tensor:
        apart: Tensor = columns.unflatten(0, (-1, len(self.probe.parts)))
        return apart

    def diagonal_rank(self) -> tuple[Tensor, int]:
        """By block offset alone: a diagonal is where groups from all over the prompt look equally far back."""
        offsets = list_size(self.geometry, self.tiles)
        count = min(max_diagonals(self.geometry.kv_len, self.tiles.block_n), self.relative.shape[-1] - 1)
        heaviest = self.relative[..., 1:].topk(count, -1)  # a window holds the tile's own block
        rank = ramp(count, self.relative.device).expand(heaviest.indices.shape)
        rank = torch.where(heaviest.values > 0, rank, count)
        ranks = torch.full((*self.relative.shape[:2], offsets), count, dtype=torch.int32, device=rank.device)
        return ranks.scatter_(-1, heaviest.indices + 1, rank), count

    def families(self, columns: Tensor, rank: Tensor, ranks: int, strides: Sequence[int]) -> list[Best]:
        # Windows alone come as vertical_slash without columns and diagonals.
        slash = self.vertical_slash(columns, rank, ranks)
        never = slash._replace(cost=torch.full_like(slash.cost, torch.inf))
        return [never, slash, *self._grids(strides)]

    def _grids(self, strides: Sequence[int]) -> list[Best]:
        least, longest = -(-self.credit.shape[-1] // self.most), self.geometry.kv_len // 4
        if longest < least:
            return []
        estimated = autocorrelation_stride(self.credit)
        tried = [torch.full_like(estimated, stride) for stride in strides if least <= stride <= longest]
        stride = torch.stack([*tried, estimated], -1)
        phase = torch.stack([best_phase(self.credit, s.contiguous(), longest=longest) for s in stride.unbind(-1)], -1)
        line = ramp(self.most, self.credit.device, dtype=torch.int64)
        keys = torch.addcmul(phase[..., None], line, stride[..., None]).clamp(max=self.credit.shape[-1] - 1)
        gained = self.credit.gather(-1, keys.flatten(2)).view(keys.shape).sum(-1)
        ladder = constant(self.frame.ladder, stride.device, torch.int64)
        lost = self.missing.index_select(-1, ladder)[:, :, None] - gained[..., None]
        lost = torch.where((stride >= least)[..., None], lost, torch.inf)
        return [self.best_lines(stride, phase, lost)]

    def with_floor(self, columns: Tensor, order: Columns, count: Tensor, stride: Tensor, phase: Tensor) -> Tensor:
        """Without keys that no row credits, those of other modalities among them."""
        at = columns.clamp(max=self.credit.shape[-1] - 1)
        return torch.where(self.credit.gather(-1, at) > 0, columns, self.geometry.kv_len)


def _searched(
    name: str, probe: PartProbe, frame: SearchFrame, owned: Tensor, geometry: Geometry, tiles: TileShape,
    recall: float, columns: int, strides: Sequence[int], dense: Tensor | None,
) -> Bounded:  # fmt: skip
    """The best rules of the parts of one boundary, as plans."""
    g, width, count = geometry, probe.segments.key_order.shape[1], len(probe.parts)
    spaces = Geometry(g.batch * count, g.q_heads, g.kv_heads, width, width)
    mass, checked = probe.blocks.flatten(0, 1).split([CHOOSE * SPREAD_GROUPS, (KINDS - CHOOSE) * SPREAD_GROUPS], 2)
    relative, missing = PartSearch.reduced(mass, frame)
    total = mass.sum((2, 3))
    search = PartSearch(
        geometry=spaces, tiles=tiles, frame=frame, mass=mass, checked=checked, total=total,
        budget=_budgets(probe, total.unflatten(0, (g.batch, count)), recall).flatten(0, 1),
        relative=relative, missing=missing, credit=probe.credit.flatten(0, 1), probe=probe,
        most=max(1, min(columns, max_columns(g.kv_len, tiles.block_n), width)),
    )  # fmt: skip
    found = search.choose(strides)
    lowered = lower(found.rules, spaces, tiles, diagonals=found.diagonals, frame=frame.tiles)
    chosen, measured = _recalls(covered_mass(lowered, search).unflatten(0, (g.batch, count)), probe)
    return _as_regions(name, lowered, probe, owned, tiles, columns, (chosen, measured), found.pattern, g, dense)


def _budgets(probe: PartProbe, mass: Tensor, recall: float) -> Tensor:
    """Mass that each part may lose, float ``[B, V, HQ]``, given all of it.

    The rows of a modality may lose a share of all they have; its parts under ``2d`` share that out by their mass, once
    the lightest were allowed to lose all of theirs, up to half of it.
    """
    budget = may_be_lost(recall) * probe.total[..., : CHOOSE * SPREAD_GROUPS].sum(-1)
    if probe.parts[0].key is None:
        return budget
    count = len(probe.segments.labels)
    mass, whole = mass.unflatten(1, (count, count)), budget.unflatten(1, (count, count))[:, :, :1]
    light, order = mass.sort(2)
    light = torch.where(light.cumsum(2) <= whole / 2, light, 0.0)
    lost = torch.zeros_like(mass).scatter(2, order, light)
    kept = torch.where(lost > 0, 0.0, mass)
    rest = (whole - lost.sum(2, keepdim=True)) * kept / kept.sum(2, keepdim=True).clamp(min=1e-30)
    return torch.where(lost > 0, mass * (1 + 1e-5), rest).flatten(1, 2)


def _recalls(covered: Tensor, probe: PartProbe) -> tuple[Tensor, Tensor]:
    """The least share of its probability that a modality keeps, float ``[B, HQ]``: of rows that choose, of those that
    check; covered float ``[B, V, HQ, 3 * G]``. A modality without rows keeps all."""
    count = len(probe.segments.labels)
    kept, total = covered.unflatten(1, (count, -1)).sum(2), probe.total.unflatten(1, (count, -1))[:, :, 0]
    sizes = [CHOOSE * SPREAD_GROUPS, (KINDS - CHOOSE) * SPREAD_GROUPS]
    shares = []
    for some, whole in zip(kept.split(sizes, -1), total.split(sizes, -1), strict=True):
        share = some.sum(-1) / whole.sum(-1)
        shares.append(torch.where(probe.rows.real[..., None], share, 1.0).amin(1))
    return shares[0], shares[1]


def _as_regions(
    name: str, lowered: Lowered, probe: PartProbe, owned: Tensor, tiles: TileShape, columns: int,
    recalls: tuple[Tensor, Tensor], pattern: Tensor, geometry: Geometry, dense: Tensor | None,
) -> Bounded:  # fmt: skip
    """Plans of parts as regions of the tiles of their rows, their columns one after the other; the tiles of the last
    rows as in ``dense``, if given."""
    plan, segments, batch = lowered.plan, probe.segments, geometry.batch
    count, grouped = len(segments.labels), probe.parts[0].key is not None
    regions, fields = len(probe.parts) // count, TileRecord._fields
    mine = owned.unflatten(0, (batch, -1))[:, :, None, :, None]
    records = torch.where(mine, plan.tiles[..., 0, :].unflatten(0, (batch, -1)), 0)  # [B, V, HQ, QT, RECORD]
    used = records[..., fields.index("num_columns")].amax(3)  # [B, V, HQ]
    end = used.cumsum(1, dtype=torch.int32)
    moved = torch.zeros(*used.shape, RECORD, dtype=torch.int32, device=owned.device)
    moved[..., fields.index("column_start")] = end - used
    moved[..., fields.index("grouped")] = int(grouped)
    records = torch.where(mine, records + moved[:, :, :, None], 0)
    records = records.unflatten(1, (count, regions)).sum(1, dtype=torch.int32)  # a tile has rows of one modality
    records = records.permute(0, 2, 3, 1, 4)  # [B, HQ, QT, R, RECORD]
    slots = _packed(plan.columns.unflatten(0, (batch, -1)), used, end, columns)
    places = slots
    if grouped:
        order = segments.key_order[:, None].expand(-1, slots.shape[1], -1)
        places = order.gather(-1, slots.clamp(max=order.shape[-1] - 1).long()).clamp(min=0)
    assert plan.list_bits is not None
    work = _work(records, tiles, segments)
    sparse_tiles = torch.as_tensor(work.visited)
    if dense is not None:
        dense = F.pad(dense, (0, 0, 0, regions - 1))
        records = torch.where(segments.tail[:, None, :, None, None], dense, records)
        work = _work(records, tiles, segments)
    return Bounded(
        name=name, records=records, columns=places, slots=slots, lists=plan.lists, bits=plan.list_bits,
        chosen=recalls[0], measured=recalls[1], fits=end[:, -1] <= columns,
        work=work, sparse_tiles=sparse_tiles,
        pattern=pattern.unflatten(0, (batch, -1)).transpose(1, 2),
    )  # fmt: skip


def _work(records: Tensor, tiles: TileShape, segments: Segments) -> Work:
    """What the tiles ``[B, HQ, QT, R, RECORD]`` of each head compute; columns are gathered once per modality."""
    record = TileRecord(*records.unbind(-1))
    by_group = record_work(record, tiles.block_n, segments.tile_group, len(segments.labels))
    return Work(*(torch.as_tensor(part).sum(-1) for part in by_group))


def _packed(columns: Tensor, used: Tensor, end: Tensor, width: int) -> Tensor:
    """The first ``used`` of the columns of each part ``[B, V, HQ, C]``, part after part: ``[B, HQ, width]``."""
    place = ramp(width, columns.device)
    ends = end.transpose(1, 2).contiguous()  # [B, HQ, V]
    part = torch.searchsorted(ends, place.expand(*ends.shape[:2], -1).contiguous(), right=True)
    part = part.clamp(max=ends.shape[-1] - 1)
    inside = place - (ends - used.transpose(1, 2)).gather(-1, part)
    flat = columns.transpose(1, 2).flatten(2)  # [B, HQ, V * C]
    return flat.gather(-1, (part * columns.shape[-1] + inside).clamp(max=flat.shape[-1] - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Putting heads together


def assemble(plain: Plan, chosen: Tensor, found: Sequence[Bounded], segments: Segments) -> Plan:
    """One plan: head ``h`` as in ``plain`` where ``chosen [B, HQ]`` is 0, else under ``found[chosen - 1]``."""
    bm, device = plain.block_m, plain.tiles.device
    regions = max(bounded.records.shape[3] for bounded in found)
    grouped = any(bounded.name == "2d" for bounded in found)
    tile_count = segments.tile_group.shape[1]
    tiles = F.pad(plain.tiles, (0, 0, 0, regions - 1, 0, tile_count - plain.query_tiles))
    order = F.pad(plain.rows().flatten(2).int(), (0, (tile_count - plain.query_tiles) * bm), value=-1)
    order = torch.where((chosen > 0)[..., None], segments.row_order[:, None], order)
    width = max(plain.columns.shape[-1], *(bounded.columns.shape[-1] for bounded in found))
    columns = slots = F.pad(plain.columns, (0, width - plain.columns.shape[-1]))
    lists, bits = [plain.lists], [] if plain.list_bits is None else [plain.list_bits]
    for place, bounded in enumerate(found, 1):
        mine = chosen == place
        moved = {"list_start": sum(x.numel() for x in lists), "bits_start": sum(x.numel() for x in bits)}
        shift = constant(tuple(moved.get(name, 0) for name in TileRecord._fields), device)
        records = F.pad(bounded.records + shift, (0, 0, 0, regions - bounded.records.shape[3]))
        tiles = torch.where(mine[..., None, None, None], records, tiles)
        spare = (0, width - bounded.columns.shape[-1])
        columns = torch.where(mine[..., None], F.pad(bounded.columns, spare), columns)
        slots = torch.where(mine[..., None], F.pad(bounded.slots, spare), slots)
        lists.append(bounded.lists)
        bits.append(bounded.bits)
    return dataclasses.replace(
        plain, tiles=tiles.contiguous(), row_order=order.contiguous(), lists=torch.cat(lists),
        columns=columns.contiguous(), has_sinks=True, list_bits=torch.cat(bits),
        key_order=segments.key_order if grouped else None, column_slots=slots.contiguous() if grouped else None,
    )  # fmt: skip
