"""Tile-sparse attention in plain PyTorch for CPU tensors: what a plan runs as where there is no GPU.

Each query tile makes two matrix products over only the keys it visits: runs of sink and listed blocks and columns are
copied once into a small buffer, the window is a slice of K and V. Heads of one group whose tiles agree share the
products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.plan import Plan

SCORE_LIMIT = 8 << 20
"""Scores held at a time (elements), unless one tile of one head needs more."""


def attention_cpu(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, out: Tensor | None = None) -> Tensor:
    """Softmax attention over exactly ``plan.to_mask()``.

    Args:
        q: floating ``[B, HQ, q_len, D]``; k, v: ``[B, HKV, kv_len, D]``, any strides, on the CPU.
        scale: factor on the scores.
        out: where to write, ``[B, HQ, q_len, D]`` with any strides (such as a transposed view of
            ``[B, q_len, HQ, D]`` memory) and the dtype of ``q``; made when None.

    Returns:
        ``out``. Half precision inputs are computed in float32. Rows without a visible key are zeros.
    """
    g = plan.geometry
    out = torch.empty(q.shape[:-1] + v.shape[-1:], dtype=q.dtype) if out is None else out
    if not (g.q_len and g.kv_len):
        return out.zero_()
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    for b in range(g.batch):
        live = _live_range(g, b)
        records = [[_Tile(*tile) for tile in head] for head in plan.tiles[b].tolist()]
        for kv_head in range(g.kv_heads):
            keys = k[b, kv_head].to(work).contiguous()
            values = v[b, kv_head].to(work).contiguous()
            run = _GroupRun(plan, b, keys, values, scale, live, records)
            run.attend(q[b], out[b], range(kv_head * g.group, (kv_head + 1) * g.group))
    return out


def _live_range(geometry: Geometry, b: int) -> tuple[int, int]:
    start = 0 if geometry.kv_start is None else int(geometry.kv_start[b])
    stop = geometry.kv_len if geometry.kv_stop is None else int(geometry.kv_stop[b])
    return start, min(stop, geometry.kv_len)


class _Tile(NamedTuple):
    """``TileRecord`` of one tile on the host."""

    window_start: int
    sink_start: int
    sink_stop: int
    num_blocks: int
    list_start: int
    list_base: int
    num_columns: int
    bits_start: int


@dataclass(frozen=True)
class _Visit:
    """The keys of one tile: merged runs of sink and listed blocks, window ``start ... stop - 1``, number of columns."""

    runs: tuple[tuple[int, int], ...]
    start: int
    stop: int
    columns: int


@dataclass(frozen=True)
class _GroupRun:
    """One batch element and key/value head: keys and values ``[kv_len, D]`` in working precision."""

    plan: Plan
    b: int
    keys: Tensor
    values: Tensor
    scale: float
    live: tuple[int, int]
    records: list[list[_Tile]]

    def attend(self, q: Tensor, out: Tensor, heads: range) -> None:
        """Fill ``out[heads]`` from ``q[heads]`` (both ``[HQ, q_len, D]``), tile by tile."""
        plan, g = self.plan, self.plan.geometry
        remaining = [h for h in heads if not self._plain(q, out, h)]
        if not remaining:
            return
        buffers = {h: self._column_buffer(h) for h in remaining if any(r.num_columns for r in self.records[h])}
        for tile in range(plan.query_tiles):
            by_visit: dict[tuple[_Visit, int], list[int]] = {}
            for h in remaining:
                visit = self._visit(self.records[h][tile], *self._positions(h, tile))
                # Rows and columns differ from head to head, so only tiles without either can be shared.
                alone = h if visit.columns or plan.row_order is not None else -1
                by_visit.setdefault((visit, alone), []).append(h)
            for (visit, _), sharing in by_visit.items():
                for part in _split(sharing, plan.block_m * g.kv_len):
                    self._tile(q, out, part, tile, visit, buffers.get(part[0]))

    def _plain(self, q: Tensor, out: Tensor, h: int) -> bool:
        """Run a head that is dense throughout as one fused call, when the mask is plainly causal."""
        g = self.plan.geometry
        padded = g.kv_start is not None or g.kv_stop is not None or g.key_padding is not None
        if padded or g.window or g.q_offset or g.q_len != g.kv_len or any(r.window_start for r in self.records[h]):
            return False
        rows = q[h].to(self.keys.dtype)[None, None]
        fused = F.scaled_dot_product_attention(
            rows, self.keys[None, None], self.values[None, None], is_causal=True, scale=self.scale
        )
        out[h].copy_(fused[0, 0])
        return True

    def _column_buffer(self, h: int) -> tuple[Tensor, Tensor, Tensor]:
        index = self.plan.columns[self.b, h].long()
        return index, self.keys[index], self.values[index]

    def _rows(self, h: int, tile: int) -> slice | Tensor:
        """The query rows of a tile: a slice when in order, else an index without the empty slots."""
        begin = tile * self.plan.block_m
        if self.plan.row_order is None:
            return slice(begin, min(begin + self.plan.block_m, self.plan.geometry.q_len))
        rows = self.plan.row_order[self.b, h, begin : begin + self.plan.block_m].long()
        return rows[rows >= 0]

    def _positions(self, h: int, tile: int) -> tuple[int, int]:
        """Smallest and largest position in a tile; ``(0, -1)`` for a tile without rows."""
        rows, offset = self._rows(h, tile), self.plan.geometry.q_offset
        if isinstance(rows, slice):
            return rows.start + offset, rows.stop - 1 + offset
        return (int(rows.min()) + offset, int(rows.max()) + offset) if rows.numel() else (0, -1)

    def _blocks(self, record: _Tile) -> Iterator[int]:
        """Sink and listed blocks, ascending."""
        yield from range(record.sink_start, record.sink_stop)
        if record.num_blocks:
            entries = self.plan.lists[record.list_start : record.list_start + record.num_blocks]
            yield from (entries + record.list_base).tolist()

    def _visit(self, record: _Tile, low: int, high: int) -> _Visit:
        """Clip everything to the live keys that some row of the tile can see."""
        g, bn = self.plan.geometry, self.plan.block_n
        first, last = self.live
        if g.window:
            first = max(first, low - g.window + 1)
        runs: list[tuple[int, int]] = []
        for block in self._blocks(record):
            start, stop = max(block * bn, first), min((block + 1) * bn, last)
            if start >= stop:
                continue
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
        stop = min(high + 1, last, g.kv_len)
        return _Visit(tuple(runs), max(record.window_start * bn, first), stop, record.num_columns)

    def _tile(
        self,
        q: Tensor,
        out: Tensor,
        heads: list[int],
        tile: int,
        visit: _Visit,
        buffer: tuple[Tensor, Tensor, Tensor] | None,
    ) -> None:
        rows = self._rows(heads[0], tile)
        span = slice(heads[0], heads[-1] + 1) if len(heads) == heads[-1] - heads[0] + 1 else heads
        queries = q[span][:, rows].to(self.keys.dtype)  # [H, M, D]
        keys, values, far = self._gather(heads[0], tile, visit, buffer)
        scores = (queries.flatten(0, 1) @ keys.T).view(*queries.shape[:2], -1).mul_(self.scale)  # [H, M, N]
        emptied = self._hide(scores, rows, visit, far)
        weights = torch.softmax(scores, -1)
        if emptied or not keys.shape[0]:
            weights = weights.nan_to_num_(0.0)
        result = (weights.flatten(0, 1) @ values).view(*queries.shape[:2], -1)
        for slot, h in enumerate(heads):
            out[h, rows] = result[slot].to(out.dtype)

    def _gather(
        self, h: int, tile: int, visit: _Visit, buffer: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the tile in the order runs, columns, window; positions of all keys before the window."""
        window = slice(visit.start, max(visit.start, visit.stop))
        key_parts = [self.keys[start:stop] for start, stop in visit.runs]
        value_parts = [self.values[start:stop] for start, stop in visit.runs]
        far = [torch.arange(start, stop) for start, stop in visit.runs]
        if visit.columns and buffer is not None:
            index, keys, values = (part[: visit.columns] for part in buffer)
            record = self.records[h][tile]
            if record.num_blocks and self.plan.list_bits is not None:
                # A column inside a listed block belongs to the block.
                own = self._outside_blocks(record, self.plan.list_bits, index)
                index, keys, values = index[own], keys[own], values[own]
            key_parts.append(keys)
            value_parts.append(values)
            far.append(index)
        if not key_parts:
            return self.keys[window], self.values[window], torch.empty(0, dtype=torch.int64)
        key_parts.append(self.keys[window])
        value_parts.append(self.values[window])
        return torch.cat(key_parts), torch.cat(value_parts), torch.cat(far)

    def _outside_blocks(self, record: _Tile, bits: Tensor, index: Tensor) -> Tensor:
        away = (index // self.plan.block_n - record.list_base).abs()
        words = bits[record.bits_start + away // 32]
        return (words.bitwise_right_shift((away % 32).int()) & 1) == 0

    def _hide(self, scores: Tensor, rows: slice | Tensor, visit: _Visit, far: Tensor) -> bool:
        """Mask what the model hides, only where it can hide anything; True when a row may have nothing left."""
        g = self.plan.geometry
        i = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        if not i.numel():
            return False
        i = i[:, None] + g.q_offset
        low = int(i.min())
        # Keys up to the first row's own position are visible to every row, as far as causality goes.
        edge = min(max(visit.start, low + 1), max(visit.start, visit.stop))
        near = torch.arange(edge, max(edge, visit.stop))
        if near.numel():
            scores[..., scores.shape[-1] - near.numel() :].masked_fill_(near > i, -torch.inf)
        if not g.window and g.key_padding is None and self.live == (0, g.kv_len):
            return False
        j = torch.cat([far, torch.arange(visit.start, max(visit.start, visit.stop))])
        hidden = torch.zeros(i.shape[0], j.numel(), dtype=torch.bool)
        if g.window:
            hidden |= i - j >= g.window
        if g.key_padding is not None:
            hidden |= ~g.key_padding[self.b][j]
        if far.numel():
            hidden |= (j < self.live[0]) | (j >= self.live[1])  # columns are not clipped
        scores.masked_fill_(hidden, -torch.inf)
        return True


def _split(heads: list[int], scores_per_head: int) -> Iterator[list[int]]:
    """Parts of ``heads`` whose scores together stay below ``SCORE_LIMIT``."""
    step = max(1, SCORE_LIMIT // max(1, scores_per_head))
    for start in range(0, len(heads), step):
        yield heads[start : start + step]
