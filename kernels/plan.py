"""The plan: what patterns become for one concrete input, and the exact boolean mask that it means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry


@dataclass(frozen=True)
class Plan:
    """Which keys every query tile visits. A kernel run on a plan equals softmax attention over ``to_mask()``.

    A tile of ``block_m`` query rows visits, in this order and each pair exactly once:

    * **blocks**: ``num_blocks`` key blocks of ``block_n`` keys, listed in ``block_indices`` (ascending, all below
      ``window_start``, hence causally full for every row of the tile), then
    * **window**: every key block from ``window_start`` to the last one that a row of the tile can see. Only here is
      causality tested. ``window_start * block_n`` never exceeds the smallest position in the tile, so every live row
      keeps at least its own key. A dense tile is a window that starts at block 0 and costs no list.
    * **columns**: the first ``num_columns`` entries of the head's sorted ``columns``, all left of the window. They
      are compacted into a small contiguous K/V buffer once per head. A column inside a listed block belongs to the
      block: the bit of that block in ``block_bits`` is set and the kernel masks the column.

    The model's own mask (``geometry``: causality, padding, sliding window) applies on top, pair by pair.

    Shapes (``QT`` query tiles, ``MAX_*`` sized by configuration so that building a plan never waits for the device):
        row_order: int32 ``[B, HQ, QT * block_m]`` or None. The query row in each slot of each tile, -1 for an empty
            slot; None means rows in order. Every row of every head appears exactly once.
        window_start: int32 ``[B, HQ, QT]``, in key blocks.
        num_blocks: int32 ``[B, HQ, QT]``; block_indices: int32 ``[B, HQ, QT, MAX_BLOCKS]`` (MAX_BLOCKS may be 0).
        num_columns: int32 ``[B, HQ, QT]``; columns: int32 ``[B, HQ, MAX_COLUMNS]`` (MAX_COLUMNS may be 0).
        block_bits: int32 ``[B, HQ, QT, ceil(key blocks / 32)]`` or None. Bit ``n % 32`` of word ``n // 32`` says that
            block ``n`` is listed. None when no head has both columns and listed blocks that could meet.
    """

    geometry: Geometry
    block_m: int
    block_n: int
    window_start: Tensor
    num_blocks: Tensor
    block_indices: Tensor
    num_columns: Tensor
    columns: Tensor
    row_order: Tensor | None = None
    block_bits: Tensor | None = None

    @property
    def query_tiles(self) -> int:
        return self.window_start.shape[-1]

    @property
    def key_blocks(self) -> int:
        return -(-self.geometry.kv_len // self.block_n)

    def rows(self) -> Tensor:
        """Query row in each slot, int64 ``[B, HQ, QT, block_m]``, -1 where a slot is empty."""
        g, device = self.geometry, self.window_start.device
        shape = (g.batch, g.q_heads, self.query_tiles, self.block_m)
        if self.row_order is not None:
            return self.row_order.view(shape).long()
        rows = torch.arange(self.query_tiles * self.block_m, device=device)
        return torch.where(rows < g.q_len, rows, -1).view(self.query_tiles, self.block_m).expand(shape)

    def to_mask(self) -> Tensor:
        """The exact pairs, bool ``[B, HQ, q_len, kv_len]``. Quadratic: for tests, pictures and the reference."""
        g, device = self.geometry, self.window_start.device
        j = torch.arange(g.kv_len, device=device)
        block = j // self.block_n
        in_window = block >= self.window_start[..., None]  # [B, HQ, QT, kv_len]
        listed = torch.zeros(*self.window_start.shape, self.key_blocks, dtype=torch.bool, device=device)
        slots = torch.arange(self.block_indices.shape[-1], device=device)
        valid = slots < self.num_blocks[..., None]
        if slots.numel():
            # An invalid slot writes to a spare last block that is cut off again.
            spare = torch.zeros(*listed.shape[:-1], 1, dtype=torch.bool, device=device)
            target = torch.where(valid, self.block_indices, self.key_blocks).long()
            listed = torch.cat([listed, spare], -1).scatter(-1, target, True)[..., :-1]
        column = torch.zeros(*self.window_start.shape, g.kv_len + 1, dtype=torch.bool, device=device)
        slots = torch.arange(self.columns.shape[-1], device=device)
        if slots.numel():
            valid = slots < self.num_columns[..., None]
            target = torch.where(valid, self.columns[:, :, None, :], g.kv_len).long()
            column = column.scatter(-1, target, True)
        keep = in_window | listed[..., block] | column[..., :-1]  # one row of keys per tile
        rows = self.rows()
        per_slot = keep[:, :, :, None, :].expand(*rows.shape, g.kv_len).flatten(2, 3)
        mask = torch.zeros(g.batch, g.q_heads, g.q_len + 1, g.kv_len, dtype=torch.bool, device=device)
        slot_row = torch.where(rows < 0, g.q_len, rows).flatten(2)[..., None].expand_as(per_slot)
        mask = mask.scatter(2, slot_row, per_slot)[:, :, :-1]
        return mask & g.to_mask(device)[:, None]

    def density(self) -> Tensor:
        """Pairs computed ÷ pairs the model's mask allows, float32 ``[B, HQ]``, without building the mask.

        Counted in whole tiles, as the kernel computes them, against whole tiles of the dense plan.
        """
        rows = self.rows()
        last = rows.amax(-1) + self.geometry.q_offset  # [B, HQ, QT], -1 + offset for an empty tile
        alive = rows.amax(-1) >= 0
        end = torch.where(alive, last.clamp(max=self.geometry.kv_len - 1) // self.block_n + 1, 0)
        window = (end - self.window_start).clamp(min=0)
        columns = -(-self.num_columns // self.block_n)
        visited = (torch.where(alive, window + self.num_blocks + columns, 0)).sum(-1)
        identity = torch.arange(1, self.query_tiles + 1, device=rows.device) * self.block_m
        tiles = (identity.clamp(max=self.geometry.q_len) - 1 + self.geometry.q_offset).clamp(
            max=self.geometry.kv_len - 1
        ) // self.block_n + 1
        return (visited / tiles.sum()).float()
