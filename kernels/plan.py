"""The plan: what patterns become for one concrete input, and the exact boolean mask that it means."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry


class TileRecord(NamedTuple):
    """What one query tile visits in one region: thirteen int32, in this order in memory.

    Key blocks count in the region's own key space: keys in order, or grouped by modality.

    Attributes:
        window_start, window_left, window_full, window_stop: the window is the run of key blocks ``window_start ...
            window_stop - 1``; the model allows every pair of the blocks ``window_left ... window_full - 1``, so that
            only the others are tested pair by pair. ``start <= left <= full <= stop``.
        sink_start, sink_stop: the run of sink blocks, ``sink_start <= sink_stop <= window_start``; empty where equal.
        num_blocks: listed key blocks.
        list_start: where the tile's list begins in ``Plan.lists``. Tiles may share a list, or parts of one.
        list_base: entry ``e`` of a list means key block ``list_base + e``. 0 for a list of its own; a list shared by
            all tiles of a head holds negative block offsets, and the base is the tile's own block.
        num_columns, column_start: columns in use, and the first of them among the head's columns.
        bits_start: where the tile's bits begin in ``Plan.list_bits``.
        grouped: 1 when the region's keys are those of ``Plan.key_order``, 0 for keys in order.
    """

    window_start: Tensor
    window_left: Tensor
    window_full: Tensor
    window_stop: Tensor
    sink_start: Tensor
    sink_stop: Tensor
    num_blocks: Tensor
    list_start: Tensor
    list_base: Tensor
    num_columns: Tensor
    column_start: Tensor
    bits_start: Tensor
    grouped: Tensor


RECORD = len(TileRecord._fields)
"""Integers in a record."""


@dataclass(frozen=True)
class Plan:
    """Which keys every query tile visits. A kernel run on a plan equals softmax attention over ``to_mask()``.

    A tile of ``block_m`` query rows visits ``R`` regions, whose keys are different ones, and in each region each of
    these pairs exactly once:

    * **window**: the key blocks ``window_start ... window_stop - 1``. Only here is causality tested. A dense tile is
      a window that starts at block 0. Planners see to it that some window holds a key of every live row; a row without
      any key gives zeros.
    * **sinks**: the key blocks ``sink_start ... sink_stop - 1``.
    * **listed blocks**: ``num_blocks`` key blocks of ``block_n`` keys, ascending, all different, in
      ``[sink_stop, window_start)``, hence causally full for every row of the tile.
    * **columns**: ``num_columns`` ascending entries of the head's ``columns`` from ``column_start`` on, all left of the
      window and right of the sinks. They are compacted into a small contiguous K/V buffer once per head. A column
      inside a listed block belongs to the block: the block's bit is set and the kernel masks the column.

    The model's own mask (``geometry``: causality, padding, sliding window) applies on top, pair by pair.

    **Key spaces.** Blocks of a region count keys in order, or, where the record says ``grouped``, the slots of
    ``key_order``: keys grouped by modality, each group filled up to whole blocks, so that a block holds one modality.
    Within a group positions ascend.

    Shapes (``QT`` query tiles; sizes depend on the configuration alone, so building a plan never waits for the device):
        tiles: int32 ``[B, HQ, QT, R, 13]``, one ``TileRecord`` per query tile and region.
        lists: int32 ``[ENTRIES]``, all block lists. Empty when no tile has listed blocks.
        columns: int32 ``[B, HQ, MAX_COLUMNS]``, positions (MAX_COLUMNS may be 0).
        has_sinks: whether some tile may have sink blocks; False promises that all of those runs are empty.
        row_order: int32 ``[B, HQ, QT * block_m]`` or None. The query row in each slot of each tile, -1 for an empty
            slot; None means rows in order. Every row of every head appears exactly once.
        list_bits: int32 ``[WORDS]`` or None. Key block ``n`` of a region with listed blocks and columns is listed when
            bit ``e % 32`` of word ``bits_start + e // 32`` is set, ``e = abs(n - list_base)``; bits of blocks outside
            ``[sink_stop, window_start)`` mean nothing. None when no head has both columns and listed blocks.
        key_order: int32 ``[B, SLOTS]`` or None. The key in each slot of the grouped key space, -1 for an empty slot.
            Dead keys have no slot. None when no region is grouped.
        column_slots: int32 like ``columns`` or None. The slot of each column in its region's key space, where some
            region is grouped and there are ``list_bits``; None where slots are positions.
    """

    geometry: Geometry
    block_m: int
    block_n: int
    tiles: Tensor
    lists: Tensor
    columns: Tensor
    has_sinks: bool = True
    row_order: Tensor | None = None
    list_bits: Tensor | None = None
    key_order: Tensor | None = None
    column_slots: Tensor | None = None

    @property
    def record(self) -> TileRecord:
        """The fields of all tiles and regions, each a view int32 ``[B, HQ, QT, R]``."""
        return TileRecord(*self.tiles.unbind(-1))

    @property
    def regions(self) -> int:
        return self.tiles.shape[3]

    @property
    def query_tiles(self) -> int:
        return self.tiles.shape[2]

    @property
    def key_blocks(self) -> int:
        """Key blocks of the larger key space."""
        slots = self.geometry.kv_len if self.key_order is None else max(self.geometry.kv_len, self.key_order.shape[-1])
        return -(-slots // self.block_n)

    def rows(self) -> Tensor:
        """Query row in each slot, int64 ``[B, HQ, QT, block_m]``, -1 where a slot is empty."""
        g, device = self.geometry, self.tiles.device
        shape = (g.batch, g.q_heads, self.query_tiles, self.block_m)
        if self.row_order is not None:
            return self.row_order.view(shape).long()
        rows = torch.arange(self.query_tiles * self.block_m, device=device)
        return torch.where(rows < g.q_len, rows, -1).view(self.query_tiles, self.block_m).expand(shape)

    def schedule(self) -> Tensor:
        """An order of all tiles, int32 ``[B * HQ * QT]`` of flat indices into ``tiles``.

        One key head after the other, so that its keys stay in the cache; tiles with most work first, so that the
        last ones to run are short.
        """
        g = self.geometry
        group = g.group * self.query_tiles
        order = self.work().view(g.batch * g.kv_heads, group).argsort(dim=-1, descending=True, stable=True)
        first = torch.arange(0, order.numel(), group, device=order.device)[:, None]
        return (order + first).flatten().to(torch.int32)

    def listed_blocks(self) -> Tensor:
        """Which key blocks each region lists, bool ``[B, HQ, QT, R, key_blocks]``. For tests and pictures."""
        r, blocks = self.record, self.key_blocks
        listed = torch.zeros(*r.num_blocks.shape, blocks + 1, dtype=torch.bool, device=self.tiles.device)
        most = int(r.num_blocks.max()) if r.num_blocks.numel() else 0
        if most:
            slots = torch.arange(most, device=self.tiles.device)
            valid = slots < r.num_blocks[..., None]
            entry = torch.where(valid, r.list_start[..., None] + slots, 0).long()
            # A slot without an entry writes to a spare last block that is cut off again.
            block = torch.where(valid, r.list_base[..., None] + self.lists[entry], blocks)
            listed.scatter_(-1, block.long(), True)
        return listed[..., :-1]

    def visited_blocks(self) -> Tensor:
        """Key blocks of windows, sinks and lists, bool ``[B, HQ, QT, R, key_blocks]``. For tests and pictures."""
        r, n = self.record, torch.arange(self.key_blocks, device=self.tiles.device)
        in_window = (n >= r.window_start[..., None]) & (n < r.window_stop[..., None])
        return in_window | ((n >= r.sink_start[..., None]) & (n < r.sink_stop[..., None])) | self.listed_blocks()

    def to_mask(self) -> Tensor:
        """The exact pairs, bool ``[B, HQ, q_len, kv_len]``. Quadratic: for tests, pictures and the reference."""
        g, device = self.geometry, self.tiles.device
        keep = self._keys_in_order() | self._keys_of_columns()  # one row of keys per tile
        if self.key_order is not None:
            keep = keep | self._keys_of_groups(self.key_order)
        rows = self.rows()
        per_slot = keep[:, :, :, None, :].expand(*rows.shape, g.kv_len).flatten(2, 3)
        mask = torch.zeros(g.batch, g.q_heads, g.q_len + 1, g.kv_len, dtype=torch.bool, device=device)
        slot_row = torch.where(rows < 0, g.q_len, rows).flatten(2)[..., None].expand_as(per_slot)
        mask = mask.scatter(2, slot_row, per_slot)[:, :, :-1]
        return mask & g.to_mask(device)[:, None]

    def _keys_in_order(self) -> Tensor:
        """Keys in the visited blocks of regions whose keys are in order, bool ``[B, HQ, QT, kv_len]``."""
        blocks = (self.visited_blocks() & (self.record.grouped == 0)[..., None]).any(3)
        return blocks[..., torch.arange(self.geometry.kv_len, device=blocks.device) // self.block_n]

    def _keys_of_groups(self, order: Tensor) -> Tensor:
        """The same for grouped regions."""
        g = self.geometry
        blocks = (self.visited_blocks() & (self.record.grouped != 0)[..., None]).any(3)
        slots = blocks[..., torch.arange(order.shape[-1], device=order.device) // self.block_n]
        keep = torch.zeros(*slots.shape[:-1], g.kv_len + 1, dtype=torch.bool, device=slots.device)
        key = torch.where(order < 0, g.kv_len, order).long()[:, None, None].expand_as(slots)
        return keep.scatter(-1, key, slots)[..., :-1]

    def _keys_of_columns(self) -> Tensor:
        r, g = self.record, self.geometry
        keep = torch.zeros(*r.num_columns.shape[:3], g.kv_len + 1, dtype=torch.bool, device=self.tiles.device)
        slots = torch.arange(self.columns.shape[-1], device=self.tiles.device)
        for region in range(self.regions if slots.numel() else 0):
            start, count = (x[..., region, None] for x in (r.column_start, r.num_columns))
            valid = (slots >= start) & (slots < start + count)
            keep = keep.scatter(-1, torch.where(valid, self.columns[:, :, None], g.kv_len).long(), True)
        return keep[..., :-1]

    def work(self) -> Tensor:
        """Key tiles that each query tile visits, int32 ``[B, HQ, QT]``: what a schedule balances."""
        r = self.record
        columns = (r.num_columns + (self.block_n - 1)) // self.block_n
        work = (r.window_stop - r.window_start) + (r.sink_stop - r.sink_start) + r.num_blocks + columns
        return work[..., 0] if self.regions == 1 else work.sum(-1, dtype=torch.int32)

    def density(self) -> Tensor:
        """Pairs computed ÷ pairs the model's mask allows, float32 ``[B, HQ]``, without building the mask.

        Counted in whole tiles, as the kernel computes them, against whole tiles of causal attention.
        """
        return self.work().sum(-1) / causal_tiles(self.geometry, self.block_m, self.block_n)


def causal_tiles(geometry: Geometry, block_m: int, block_n: int) -> int:
    """Key tiles that one head of dense causal attention visits, counted on the host."""
    g = geometry
    return _causal_tiles(g.q_len, g.q_offset, g.kv_len, block_m, block_n)


@lru_cache(maxsize=256)
def _causal_tiles(q_len: int, q_offset: int, kv_len: int, block_m: int, block_n: int) -> int:
    last = (min(end, q_len) - 1 + q_offset for end in range(block_m, q_len + block_m, block_m))
    return sum(min(key, kv_len - 1) // block_n + 1 for key in last)
