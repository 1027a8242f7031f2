"""Which keys some rows of a plan visit: ``Plan.to_mask`` for a few rows, linear in the length, without host waits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmi_compile.kernels.frames import ramp
from mmi_compile.kernels.plan import RECORD, Plan, TileRecord
from mmi_compile.kernels.probe import visible_keys


def row_mask(plan: Plan, rows: Tensor) -> Tensor:
    """``plan.to_mask()`` of these rows, bool ``[B, HQ, R, kv_len]``.

    Args:
        rows: int64 ``[B, R]``, query rows of each batch element, in any order and also twice.
    """
    return PlanRows.of(plan, rows).mask(slice(None), slice(None))


@dataclass(frozen=True)
class PlanRows:
    """Some rows of a plan, ready to be asked for their keys a few heads and rows at a time.

    Attributes:
        rows: int64 ``[B, R]``. records: int32 ``[B, HQ, R, regions, RECORD]``, what the tile of each row visits.
        block_of_key: int64 ``[B, kv_len]``, block of each key among the grouped ones, ``plan.key_blocks`` for none;
            None where no region is grouped.
    """

    plan: Plan
    rows: Tensor
    records: Tensor
    block_of_key: Tensor | None

    @classmethod
    def of(cls, plan: Plan, rows: Tensor) -> PlanRows:
        """Look up the tiles of ``rows``, int64 ``[B, R]``."""
        tile = _tiles_of_rows(plan, rows)
        index = tile[..., None, None].expand(*tile.shape, plan.regions, RECORD)
        return cls(plan, rows, plan.tiles.gather(2, index), _blocks_of_keys(plan))

    def mask(self, heads: slice, rows: slice) -> Tensor:
        """Keys of some heads and some of the rows, bool ``[B, H, R, kv_len]``."""
        plan, g = self.plan, self.plan.geometry
        record = self._record(heads, rows)
        visited = _visited_blocks(plan, record, heads)
        in_order = (visited & (record.grouped == 0)[..., None]).any(3)
        keep = in_order[..., ramp(g.kv_len, in_order.device, dtype=torch.int64) // plan.block_n]
        if self.block_of_key is not None:
            grouped = (visited & (record.grouped != 0)[..., None]).any(3)
            keep |= grouped.gather(-1, self.block_of_key[:, None, None].expand_as(keep))
        keep = _with_columns(keep, plan.columns[:, heads], record)
        return keep & visible_keys(g, self.rows[:, rows])[:, None]

    def blocks(self, heads: slice) -> Tensor:
        """Key blocks of windows, sinks and lists of some heads, bool ``[B, H, R, key_blocks]``, where no region is
        grouped: keys that the model hides from a row are among them."""
        return _visited_blocks(self.plan, self._record(heads, slice(None)), heads).any(3)[..., :-1]

    def columns(self, heads: slice) -> Tensor:
        """Which entries of ``plan.columns`` the rows of some heads use, bool ``[B, H, R, MAX_COLUMNS]``."""
        return _used_columns(self.plan.columns.shape[-1], self._record(heads, slice(None))).any(3)

    def _record(self, heads: slice, rows: slice) -> TileRecord:
        return TileRecord(*self.records[:, heads, rows].unbind(-1))


def _tiles_of_rows(plan: Plan, rows: Tensor) -> Tensor:
    """The query tile of each row, int64 ``[B, HQ, R]``."""
    g = plan.geometry
    wanted = rows[:, None].expand(-1, g.q_heads, -1)
    if plan.row_order is None:
        return wanted // plan.block_m
    # Empty slots write to a spare row.
    row = torch.where(plan.row_order < 0, g.q_len, plan.row_order).long()
    tile_of_row = torch.zeros(*row.shape[:2], g.q_len + 1, dtype=torch.int32, device=row.device)
    tile_of_row.scatter_(-1, row, (ramp(row.shape[-1], row.device) // plan.block_m).expand_as(row))
    return tile_of_row.gather(-1, wanted).long()


def _blocks_of_keys(plan: Plan) -> Tensor | None:
    order, g = plan.key_order, plan.geometry
    if order is None:
        return None
    block = torch.full((g.batch, g.kv_len + 1), plan.key_blocks, dtype=torch.int64, device=order.device)
    key = torch.where(order < 0, g.kv_len, order).long()
    block.scatter_(-1, key, (ramp(order.shape[-1], order.device, dtype=torch.int64) // plan.block_n).expand_as(key))
    return block[:, :-1]


def _visited_blocks(plan: Plan, record: TileRecord, heads: slice) -> Tensor:
    """Blocks of windows, sinks and lists, bool ``[B, H, R, regions, key_blocks + 1]``; the last one never is."""
    n = ramp(plan.key_blocks + 1, plan.tiles.device)
    visited = (n >= record.window_start[..., None]) & (n < record.window_stop[..., None])
    visited |= (n >= record.sink_start[..., None]) & (n < record.sink_stop[..., None])
    if plan.lists.numel():
        # No list is longer than there are blocks; what lies beyond a list's end marks the spare block.
        listed = n < record.num_blocks[..., None]
        entry = torch.where(listed, record.list_start[..., None] + n, 0).long()
        block = torch.where(listed, record.list_base[..., None] + plan.lists[entry], plan.key_blocks)
        visited.scatter_(-1, block.long(), True)
    return visited & (n < plan.key_blocks)


def _used_columns(count: int, record: TileRecord) -> Tensor:
    """Columns in use, bool ``[B, H, R, regions, count]``."""
    slot, start = ramp(count, record.column_start.device), record.column_start[..., None]
    return (slot >= start) & (slot < start + record.num_columns[..., None])


def _with_columns(keep: Tensor, columns: Tensor, record: TileRecord) -> Tensor:
    """``keep [B, H, R, kv_len]`` and the columns in use."""
    if not columns.shape[-1]:
        return keep
    kv_len = keep.shape[-1]
    keep = torch.nn.functional.pad(keep, (0, 1))
    for used in _used_columns(columns.shape[-1], record).unbind(3):
        keep.scatter_(-1, torch.where(used, columns[:, :, None], kv_len).long(), True)
    return keep[..., :-1]
