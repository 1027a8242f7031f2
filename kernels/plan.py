"""The plan: what patterns become for one concrete input, and the exact boolean mask that it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry


class TileRecord(NamedTuple):
    """What one query tile visits: eight int32, in this order in memory, so that a kernel reads them at once.

    Attributes:
        window_start: first key block of the window.
        sink_start, sink_stop: the run of sink blocks, ``sink_start <= sink_stop <= window_start``; empty where equal.
        num_blocks: listed key blocks.
        list_start: where the tile's list begins in ``Plan.lists``. Tiles may share a list, or parts of one.
        list_base: entry ``e`` of a list means key block ``list_base + e``. 0 for a list of its own; a list shared by
            all tiles of a head holds negative block offsets, and the base is the tile's own block.
        num_columns: columns in use, the first ones of the head.
        bits_start: where the tile's bits begin in ``Plan.list_bits``.
    """

    window_start: Tensor
    sink_start: Tensor
    sink_stop: Tensor
    num_blocks: Tensor
    list_start: Tensor
    list_base: Tensor
    num_columns: Tensor
    bits_start: Tensor


@dataclass(frozen=True)
class Plan:
    """Which keys every query tile visits. A kernel run on a plan equals softmax attention over ``to_mask()``.

    A tile of ``block_m`` query rows visits each of these pairs exactly once:

    * **window**: every key block from ``window_start`` to the last one that a row of the tile can see. Only here is
      causality tested. ``window_start * block_n`` never exceeds the smallest position in the tile, so every live row
      keeps at least its own key. A dense tile is a window that starts at block 0.
    * **sinks**: the key blocks ``sink_start ... sink_stop - 1``.
    * **listed blocks**: ``num_blocks`` key blocks of ``block_n`` keys, ascending, all different, in
      ``[sink_stop, window_start)``, hence causally full for every row of the tile.
    * **columns**: the first ``num_columns`` entries of the head's sorted ``columns``, all left of the window and
      outside the sink blocks. They are compacted into a small contiguous K/V buffer once per head. A column inside a
      listed block belongs to the block: the block's bit is set and the kernel masks the column.

    The model's own mask (``geometry``: causality, padding, sliding window) applies on top, pair by pair.

    Shapes (``QT`` query tiles; sizes depend on the configuration alone, so building a plan never waits for the device):
        tiles: int32 ``[B, HQ, QT, 8]``, one ``TileRecord`` per query tile.
        lists: int32 ``[ENTRIES]``, all block lists. Empty when no tile has listed blocks.
        columns: int32 ``[B, HQ, MAX_COLUMNS]`` (MAX_COLUMNS may be 0).
        has_sinks: whether some tile may have sink blocks; False promises that all of those runs are empty.
        row_order: int32 ``[B, HQ, QT * block_m]`` or None. The query row in each slot of each tile, -1 for an empty
            slot; None means rows in order. Every row of every head appears exactly once.
        list_bits: int32 ``[WORDS]`` or None. Key block ``n`` of a tile with listed blocks and columns is listed when
            bit ``e % 32`` of word ``bits_start + e // 32`` is set, ``e = abs(n - list_base)``; bits of blocks outside
            ``[sink_stop, window_start)`` mean nothing. None when no head has both columns and listed blocks.
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

    @property
    def record(self) -> TileRecord:
        """The fields of all tiles, each a view int32 ``[B, HQ, QT]``."""
        return TileRecord(*self.tiles.unbind(-1))

    @property
    def query_tiles(self) -> int:
        return self.tiles.shape[2]

    @property
    def key_blocks(self) -> int:
        return -(-self.geometry.kv_len // self.block_n)

    def rows(self) -> Tensor:
        """Query row in each slot, int64 ``[B, HQ, QT, block_m]``, -1 where a slot is empty."""
        g, device = self.geometry, self.tiles.device
        shape = (g.batch, g.q_heads, self.query_tiles, self.block_m)
        if self.row_order is not None:
            return self.row_order.view(shape).long()
        rows = torch.arange(self.query_tiles * self.block_m, device=device)
        return torch.where(rows < g.q_len, rows, -1).view(self.query_tiles, self.block_m).expand(shape)

    def spans(self) -> Tensor:
        """First and last position among the rows of each tile, int32 ``[B, HQ, QT, 2]``; an empty tile has last -1."""
        g = self.geometry
        rows = self.rows()
        first = torch.where(rows < 0, g.q_len, rows).amin(-1) + g.q_offset
        last = torch.where(rows.amax(-1) < 0, -1, rows.amax(-1) + g.q_offset)
        return torch.stack([first, last], -1).to(torch.int32)

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
        """Which key blocks each tile lists, bool ``[B, HQ, QT, key_blocks]``. For tests and pictures."""
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

    def to_mask(self) -> Tensor:
        """The exact pairs, bool ``[B, HQ, q_len, kv_len]``. Quadratic: for tests, pictures and the reference."""
        g, device, r = self.geometry, self.tiles.device, self.record
        j = torch.arange(g.kv_len, device=device)
        block = j // self.block_n
        in_window = block >= r.window_start[..., None]  # [B, HQ, QT, kv_len]
        in_sinks = (block >= r.sink_start[..., None]) & (block < r.sink_stop[..., None])
        column = torch.zeros(*in_window.shape[:-1], g.kv_len + 1, dtype=torch.bool, device=device)
        slots = torch.arange(self.columns.shape[-1], device=device)
        if slots.numel():
            valid = slots < r.num_columns[..., None]
            target = torch.where(valid, self.columns[:, :, None, :], g.kv_len).long()
            column = column.scatter(-1, target, True)
        keep = in_window | in_sinks | self.listed_blocks()[..., block] | column[..., :-1]  # one row of keys per tile
        rows = self.rows()
        per_slot = keep[:, :, :, None, :].expand(*rows.shape, g.kv_len).flatten(2, 3)
        mask = torch.zeros(g.batch, g.q_heads, g.q_len + 1, g.kv_len, dtype=torch.bool, device=device)
        slot_row = torch.where(rows < 0, g.q_len, rows).flatten(2)[..., None].expand_as(per_slot)
        mask = mask.scatter(2, slot_row, per_slot)[:, :, :-1]
        return mask & g.to_mask(device)[:, None]

    def work(self) -> Tensor:
        """Key tiles that each query tile visits, int32 ``[B, HQ, QT]``: what a schedule balances."""
        g, bn, r = self.geometry, self.block_n, self.record
        if self.row_order is None:
            tile = torch.arange(1, self.query_tiles + 1, device=self.tiles.device, dtype=torch.int32)
            last = (tile * self.block_m).clamp(max=g.q_len) - 1
        else:
            last = self.row_order.view(g.batch, g.q_heads, self.query_tiles, self.block_m).amax(-1)
        end = (last + g.q_offset).clamp(max=g.kv_len - 1) // bn + 1
        columns = (r.num_columns + (bn - 1)) // bn
        work = (end - r.window_start).clamp(min=0) + (r.sink_stop - r.sink_start) + r.num_blocks + columns
        return work if self.row_order is None else torch.where(last < 0, 0, work)

    def density(self) -> Tensor:
        """Pairs computed ÷ pairs the model's mask allows, float32 ``[B, HQ]``, without building the mask.

        Counted in whole tiles, as the kernel computes them, against whole tiles of causal attention.
        """
        return self.work().sum(-1) / causal_tiles(self.geometry, self.block_m, self.block_n)


def causal_tiles(geometry: Geometry, block_m: int, block_n: int) -> int:
    """Key tiles that one head of dense causal attention visits, counted on the host."""
    g = geometry
    tiles = -(-g.q_len // block_m)
    # A loop over tiles in Python would be slow at a million tokens; numpy is not worth an import here.
    last = (torch.arange(1, tiles + 1) * block_m).clamp(max=g.q_len) - 1 + g.q_offset
    return int((last.clamp(max=g.kv_len - 1) // block_n + 1).sum())
