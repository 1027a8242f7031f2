"""Tile-sparse attention in plain PyTorch for CPU tensors: what a plan runs as where there is no GPU.

Each query tile makes two matrix products over only the keys it visits, of all its regions together: runs of blocks and
columns are copied once into a small buffer, a window alone is a slice of K and V. Heads of one group whose tiles agree
share the products.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry, check_scale
from mmi_compile.kernels.plan import Plan

SCORE_LIMIT = 8 << 20
"""Scores held at a time (elements), unless one tile of one head needs more."""


def attention_cpu(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, out: Tensor | None = None) -> Tensor:
    """Softmax attention over exactly ``plan.to_mask()``.

    Args:
        q: floating ``[B, HQ, q_len, D]``; k, v: ``[B, HKV, kv_len, D]``, any strides, on the CPU. Keys and values that
            the padding of the plan's geometry hides may hold anything.
        scale: factor on the scores, positive.
        out: where to write, ``[B, HQ, q_len, D]`` with any strides (such as a transposed view of
            ``[B, q_len, HQ, D]`` memory) and the dtype of ``q``; made when None.

    Returns:
        ``out``. Half precision inputs are computed in float32. Rows without a visible key are zeros.

    Raises:
        ValueError: ``scale`` is not a positive float32.
    """
    check_scale(scale)
    g = plan.geometry
    out = torch.empty(q.shape[:-1] + v.shape[-1:], dtype=q.dtype) if out is None else out
    if not (g.q_len and g.kv_len):
        return out.zero_()
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    live_keys = g.live_keys("cpu")
    for b in range(g.batch):
        live = None if live_keys is None else live_keys[b]
        records = [[_regions(tile) for tile in head] for head in plan.tiles[b].tolist()]
        spans = _spans(plan, b)
        for kv_head in range(g.kv_heads):
            space = _Space(k[b, kv_head].to(work).contiguous(), v[b, kv_head].to(work).contiguous())
            if live is not None:
                # The weight of a dead key is zero, and zero times NaN is not.
                space = _Space(space.keys, space.values.masked_fill(~live[:, None], 0.0))
            run = _GroupRun(plan, b, space, scale, _live_range(g, b), live, records, spans)
            run.attend(q[b], out[b], range(kv_head * g.group, (kv_head + 1) * g.group))
    return out


def _live_range(geometry: Geometry, b: int) -> tuple[int, int]:
    start = 0 if geometry.kv_start is None else int(geometry.kv_start[b])
    stop = geometry.kv_len if geometry.kv_stop is None else int(geometry.kv_stop[b])
    return start, min(stop, geometry.kv_len)


def _spans(plan: Plan, b: int) -> list[list[tuple[int, int]]]:
    """Smallest and largest position in every tile of every head; ``(0, -1)`` for a tile without rows."""
    g, bm = plan.geometry, plan.block_m
    if plan.row_order is None:
        starts = range(0, g.q_len, bm)
        return [[(start + g.q_offset, min(start + bm, g.q_len) - 1 + g.q_offset) for start in starts]] * g.q_heads
    rows = plan.row_order[b].view(g.q_heads, -1, bm)
    low, high = torch.where(rows < 0, g.q_len, rows).amin(-1).tolist(), rows.amax(-1).tolist()
    return [
        [(first + g.q_offset, last + g.q_offset) if last >= 0 else (0, -1) for first, last in zip(*head, strict=True)]
        for head in zip(low, high, strict=True)
    ]


class _Region(NamedTuple):
    """``TileRecord`` of one tile and region on the host."""

    window_start: int
    window_left: int
    window_full: int
    window_stop: int
    sink_start: int
    sink_stop: int
    num_blocks: int
    list_start: int
    list_base: int
    num_columns: int
    column_start: int
    bits_start: int
    grouped: int

    @property
    def empty(self) -> bool:
        window, sinks = self.window_stop - self.window_start, self.sink_stop - self.sink_start
        return not (window or sinks or self.num_blocks or self.num_columns)


def _regions(tile: Iterable[list[int]]) -> tuple[_Region, ...]:
    """The regions of a tile that hold anything."""
    return tuple(r for r in (_Region(*fields) for fields in tile) if not r.empty)


class _Part(NamedTuple):
    """Keys and values ``[N, D]`` of a tile that lie together, and their positions, a range where those are in order.

    Attributes:
        tested: stretches of the part where causality is tested, counted from its first key.
    """

    keys: Tensor
    values: Tensor
    position: Tensor | range
    tested: tuple[tuple[int, int], ...] = ()

    def positions(self, start: int = 0, stop: int | None = None) -> Tensor:
        part = self.position[start:stop]
        return torch.arange(part.start, part.stop) if isinstance(part, range) else part


class _Space(NamedTuple):
    """Keys and values ``[SLOTS, D]`` of a key space in working precision.

    Attributes:
        position: of the key in each slot, int64; None where that is the slot. An empty slot is beyond every query.
        filled: for every block, how many of its slots hold keys, the first ones; None where slots are positions.
    """

    keys: Tensor
    values: Tensor
    position: Tensor | None = None
    filled: list[int] | None = None

    def grouped(self, order: Tensor, block_n: int, beyond: int) -> _Space:
        """The keys in ``order``, int32 ``[SLOTS]``, -1 for an empty slot, whose position becomes ``beyond``."""
        empty = order < 0
        index = torch.where(empty, 0, order).long()
        values = self.values[index].masked_fill_(empty[:, None], 0.0)
        filled = F.pad(~empty, (0, -order.numel() % block_n)).view(-1, block_n).sum(-1).tolist()
        return _Space(self.keys[index], values, torch.where(empty, beyond, index), filled)

    def part(self, start: int, stop: int, tested: tuple[tuple[int, int], ...] = ()) -> _Part:
        """The keys in slots ``start ... stop - 1``; causality is tested in the slots ``tested``."""
        position = range(start, stop) if self.position is None else self.position[start:stop]
        stretches = tuple((begin - start, end - start) for begin, end in tested)
        return _Part(self.keys[start:stop], self.values[start:stop], position, stretches)


class _Columns(NamedTuple):
    """Columns ``start ... stop - 1`` of a head; ``bits`` is where the bits of listed blocks begin, -1 without any."""

    start: int
    stop: int
    list_base: int
    bits: int


class _Visit(NamedTuple):
    """The keys of one tile in one region, in slots of its key space.

    Attributes:
        runs: merged runs of sink and listed blocks; start, stop: the window.
        tested: stretches of the window in which some row may stand before a key.
    """

    grouped: bool
    runs: tuple[tuple[int, int], ...]
    start: int
    stop: int
    tested: tuple[tuple[int, int], ...]
    columns: _Columns | None


class _ColumnBuffer(NamedTuple):
    """Columns of a head: positions int64 ``[C]``, slots in their key spaces, keys and values ``[C, D]``."""

    position: Tensor
    slots: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class _GroupRun:
    """One batch element and key/value head.

    Attributes:
        space: the keys in order. live: the range of live keys; alive: bool ``[kv_len]``, None when all keys are.
        records, spans: the regions of every tile of every head; the smallest and largest position in it.
    """

    plan: Plan
    b: int
    space: _Space
    scale: float
    live: tuple[int, int]
    alive: Tensor | None
    records: list[list[tuple[_Region, ...]]]
    spans: list[list[tuple[int, int]]]

    @cached_property
    def grouped(self) -> _Space:
        """The keys of ``Plan.key_order``, copied when the first tile asks for them."""
        assert self.plan.key_order is not None, "a record says grouped, but the plan has no key_order"
        return self.space.grouped(self.plan.key_order[self.b], self.plan.block_n, self._beyond)

    @property
    def _beyond(self) -> int:
        return max(self.plan.geometry.kv_len, self.plan.geometry.q_len + self.plan.geometry.q_offset)

    @cached_property
    def intervals(self) -> tuple[Tensor, Tensor] | None:
        """First key and one past the last of every row that has an interval of its own."""
        g = self.plan.geometry
        return None if g.row_start is None or g.row_stop is None else (g.row_start[self.b], g.row_stop[self.b])

    def attend(self, q: Tensor, out: Tensor, heads: range) -> None:
        """Fill ``out[heads]`` from ``q[heads]`` (both ``[HQ, q_len, D]``), tile by tile."""
        plan, g = self.plan, self.plan.geometry
        remaining = [h for h in heads if not self._plain(q, out, h)]
        if not remaining:
            return
        buffers = {h: self._column_buffer(h) for h in remaining if self._has_columns(h)}
        for tile in range(plan.query_tiles):
            by_visit: dict[tuple[tuple[_Visit, ...], int], list[int]] = {}
            for h in remaining:
                low, high = self.spans[h][tile]
                if low > high:
                    continue
                visits = tuple(self._visit(region, low, high) for region in self.records[h][tile])
                # Rows and columns differ from head to head, so only tiles without either can be shared.
                alone = h if plan.row_order is not None or any(visit.columns for visit in visits) else -1
                by_visit.setdefault((visits, alone), []).append(h)
            for (visits, _), sharing in by_visit.items():
                for heads_at_once in _split(sharing, plan.block_m * g.kv_len):
                    self._tile(q, out, heads_at_once, tile, visits, buffers.get(heads_at_once[0]))

    def _plain(self, q: Tensor, out: Tensor, h: int) -> bool:
        """Run a head that is dense throughout as one fused call, when the mask is plainly causal."""
        g = self.plan.geometry
        if self.alive is not None or g.window or g.has_rows or g.q_offset or g.q_len != g.kv_len:
            return False
        if not all(self._dense(h, tile) for tile in range(self.plan.query_tiles)):
            return False
        rows = q[h].to(self.space.keys.dtype)[None, None]
        keys, values = self.space.keys[None, None], self.space.values[None, None]
        out[h].copy_(F.scaled_dot_product_attention(rows, keys, values, is_causal=True, scale=self.scale)[0, 0])
        return True

    def _dense(self, h: int, tile: int) -> bool:
        """Whether a window holds every key that the rows of a tile may see."""
        regions = self.records[h][tile]
        if len(regions) != 1 or regions[0].grouped or regions[0].window_start:
            return False
        return regions[0].window_stop * self.plan.block_n > self.spans[h][tile][1]

    def _has_columns(self, h: int) -> bool:
        return any(region.num_columns for tile in self.records[h] for region in tile)

    def _column_buffer(self, h: int) -> _ColumnBuffer:
        plan = self.plan
        # Entries that no tile uses may hold anything.
        index = plan.columns[self.b, h].long().clamp(0, plan.geometry.kv_len - 1)
        slots = index if plan.column_slots is None else plan.column_slots[self.b, h].long()
        return _ColumnBuffer(index, slots, self.space.keys[index], self.space.values[index])

    def _rows(self, h: int, tile: int) -> slice | Tensor:
        """The query rows of a tile: a slice when in order, else an index without the empty slots."""
        begin = tile * self.plan.block_m
        if self.plan.row_order is None:
            return slice(begin, min(begin + self.plan.block_m, self.plan.geometry.q_len))
        rows = self.plan.row_order[self.b, h, begin : begin + self.plan.block_m].long()
        return rows[rows >= 0]

    def _blocks(self, region: _Region) -> Iterator[int]:
        """Sink and listed blocks, ascending."""
        yield from range(region.sink_start, region.sink_stop)
        if region.num_blocks:
            entries = self.plan.lists[region.list_start : region.list_start + region.num_blocks]
            yield from (entries + region.list_base).tolist()

    def _visit(self, region: _Region, low: int, high: int) -> _Visit:
        """What rows at positions ``low ... high`` visit in a region, without keys that none of them can see."""
        columns = None
        if region.num_columns:
            meet = region.num_blocks and self.plan.list_bits is not None
            bits = region.bits_start if meet else -1
            stop = region.column_start + region.num_columns
            columns = _Columns(region.column_start, stop, region.list_base, bits)
        window = self._grouped_window(region) if region.grouped else self._window(region, low, high)
        return _Visit(bool(region.grouped), self._runs(region, low), *window, columns)

    def _first(self, low: int) -> int:
        """The first key in order that a row at ``low`` or later may see."""
        window = self.plan.geometry.window
        return max(self.live[0], low - window + 1) if window else self.live[0]

    def _runs(self, region: _Region, low: int) -> tuple[tuple[int, int], ...]:
        bn, filled = self.plan.block_n, self.grouped.filled if region.grouped else None
        first, last = self._first(low), self.live[1]
        runs: list[tuple[int, int]] = []
        for block in self._blocks(region):
            start = block * bn
            if filled is None:
                start, stop = max(start, first), min(start + bn, last)
            else:
                stop = start + filled[block]
            if start >= stop:
                continue
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
        return tuple(runs)

    def _window(self, region: _Region, low: int, high: int) -> tuple[int, int, tuple[tuple[int, int], ...]]:
        """Start, stop and tested stretches of a window over keys in order."""
        bn = self.plan.block_n
        if self.plan.geometry.has_rows:
            edges = (region.window_start, region.window_left, region.window_full, region.window_stop)
            start, left, full, stop = (min(max(block * bn, self.live[0]), self.live[1]) for block in edges)
            stretches = ((start, left), (full, stop)) if left < full else ((start, stop),)
            return start, stop, tuple((begin, end) for begin, end in stretches if begin < end)
        start = max(region.window_start * bn, self._first(low))
        stop = max(start, min(region.window_stop * bn, high + 1, self.live[1]))
        # Keys up to the first row's own position are visible to every row, as far as causality goes.
        edge = max(start, low + 1)
        return start, stop, ((edge, stop),) if edge < stop else ()

    def _grouped_window(self, region: _Region) -> tuple[int, int, tuple[tuple[int, int], ...]]:
        """The same for grouped keys, where only the plan knows which blocks need no test."""
        bn = self.plan.block_n
        start, left, full, stop = (block * bn for block in region[:4])
        if start < stop:
            assert self.grouped.filled is not None
            stop += self.grouped.filled[region.window_stop - 1] - bn
        stretches = ((start, min(left, stop)), (full, stop)) if left < full else ((start, stop),)
        return start, stop, tuple((begin, end) for begin, end in stretches if begin < end)

    def _tile(
        self,
        q: Tensor,
        out: Tensor,
        heads: list[int],
        tile: int,
        visits: tuple[_Visit, ...],
        columns: _ColumnBuffer | None,
    ) -> None:
        rows = self._rows(heads[0], tile)
        span = slice(heads[0], heads[-1] + 1) if len(heads) == heads[-1] - heads[0] + 1 else heads
        parts = [part for visit in visits for part in self._parts(visit, columns) if part.keys.shape[0]]
        if not parts:
            for h in heads:
                out[h, rows] = 0.0
            return
        keys = parts[0].keys if len(parts) == 1 else torch.cat([part.keys for part in parts])
        values = parts[0].values if len(parts) == 1 else torch.cat([part.values for part in parts])
        queries = q[span][:, rows].to(keys.dtype)  # [H, M, D]
        scores = (queries.flatten(0, 1) @ keys.T).view(*queries.shape[:2], -1).mul_(self.scale)  # [H, M, N]
        emptied = self._hide(scores, rows, parts)
        weights = torch.softmax(scores, -1)
        if emptied:
            weights = weights.nan_to_num_(0.0)
        result = (weights.flatten(0, 1) @ values).view(*queries.shape[:2], -1)
        for slot, h in enumerate(heads):
            out[h, rows] = result[slot].to(out.dtype)

    def _parts(self, visit: _Visit, columns: _ColumnBuffer | None) -> Iterator[_Part]:
        """Runs, columns and window of a region."""
        space = self.grouped if visit.grouped else self.space
        for start, stop in visit.runs:
            yield space.part(start, stop)
        if visit.columns and columns is not None:
            yield self._column_part(visit.columns, columns)
        yield space.part(visit.start, visit.stop, visit.tested)

    def _column_part(self, used: _Columns, columns: _ColumnBuffer) -> _Part:
        index, slots, keys, values = (part[used.start : used.stop] for part in columns)
        if used.bits < 0:
            return _Part(keys, values, index)
        # A column inside a listed block belongs to the block.
        bits = self.plan.list_bits
        assert bits is not None
        away = (slots // self.plan.block_n - used.list_base).abs()
        words = bits[used.bits + away // 32]
        own = (words.bitwise_right_shift((away % 32).int()) & 1) == 0
        return _Part(keys[own], values[own], index[own])

    def _hide(self, scores: Tensor, rows: slice | Tensor, parts: list[_Part]) -> bool:
        """Mask what the model hides, only where it can hide anything; True when a row may have nothing left."""
        g = self.plan.geometry
        if self.intervals is not None:
            return self._hide_outside(scores, rows, parts, self.intervals)
        i = (torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows)[:, None] + g.q_offset
        place, tested = 0, 0
        for part in parts:
            for start, stop in part.tested:
                near = part.positions(start, stop)
                scores[..., place + start : place + stop].masked_fill_(near > i, -torch.inf)
                tested += stop - start
            place += part.keys.shape[0]
        if not g.window and self.alive is None:
            return tested == place
        j = torch.cat([part.positions() for part in parts])
        if self.alive is not None:
            dead = ~self.alive[j.clamp(max=g.kv_len - 1)]
            if dead.any():
                scores.masked_fill_(dead, -torch.inf)
        if g.window:
            scores.masked_fill_(i - j >= g.window, -torch.inf)
        return True

    def _hide_outside(
        self, scores: Tensor, rows: slice | Tensor, parts: list[_Part], intervals: tuple[Tensor, Tensor]
    ) -> bool:
        """The same where each row has an interval of its own."""
        start, stop = (edge[rows][:, None] for edge in intervals)
        place = 0
        for part in parts:
            # Runs and columns have no stretches, and any of their pairs may be outside.
            stretches = part.tested if len(parts) == 1 and part.tested else ((0, part.keys.shape[0]),)
            for begin, end in stretches:
                near = part.positions(begin, end)
                outside = (near < start) | (near >= stop)
                scores[..., place + begin : place + end].masked_fill_(outside, -torch.inf)
            place += part.keys.shape[0]
        if self.alive is not None:
            keys = torch.cat([part.positions() for part in parts])
            scores.masked_fill_(~self.alive[keys.clamp(max=self.plan.geometry.kv_len - 1)], -torch.inf)
        return True


def _split(heads: list[int], scores_per_head: int) -> Iterator[list[int]]:
    """Parts of ``heads`` whose scores together stay below ``SCORE_LIMIT``."""
    step = max(1, SCORE_LIMIT // max(1, scores_per_head))
    for start in range(0, len(heads), step):
        yield heads[start : start + step]
