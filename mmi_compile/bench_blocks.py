"""A plan in the words of others: lists of full and partial key blocks, as FlexAttention and flash-attn-4 take them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.plan import Plan, TileRecord

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

LARGEST = 1 << 28
"""Entries that a list may have."""

_OWN_LISTS = TileRecord._fields.index("list_start")
"""Fields of a record before this one mean the same in every head."""


class NotFeasible(Exception):
    """Why a plan is not, or not sensibly, written as lists of blocks."""


@dataclass(frozen=True)
class BlockLists:
    """Key blocks of every query tile, all int32; ``H`` is 1 where all heads agree.

    Attributes:
        partial_count, full_count: ``[B, H, QT]``. partial_blocks, full_blocks: ``[B, H, QT, WIDTH]``, ascending; what
            lies beyond the count means nothing.
        mask_mod: which pairs of the partial blocks are kept, in FlexAttention's form ``(b, h, i, j)``.
        has_columns: whether some partial blocks hold columns; else partial blocks are causal and nothing more.
    """

    partial_count: Tensor
    partial_blocks: Tensor
    full_count: Tensor
    full_blocks: Tensor
    mask_mod: MaskMod
    has_columns: bool


def block_lists(plan: Plan, *, most: float = float("inf"), full_width: bool = False) -> BlockLists:
    """The blocks of a plan. Equal to it pair by pair: full blocks, and the pairs of partial blocks that the mask keeps.

    Reads counts on the host, so it waits for the device: it belongs to benchmarks.

    Args:
        most: how many times the tiles of the plan the lists may hold. Every block with a single column counts whole.
        full_width: make the lists as wide as there are key blocks.

    Raises:
        NotFeasible: rows are permuted, keys are grouped, tiles visit several regions, the model's mask is not plain
            causality, or the lists would be too large.
    """
    g = plan.geometry
    if plan.row_order is not None:
        raise NotFeasible("its rows are permuted")
    if plan.key_order is not None:
        raise NotFeasible("its keys are grouped by modality")
    if plan.regions != 1:
        raise NotFeasible(f"its tiles visit {plan.regions} regions")
    if not _plain(g):
        raise NotFeasible("the model's mask is more than causal")
    if plan.record.num_blocks.numel() * plan.key_blocks > LARGEST and not _heads_agree(plan):
        raise NotFeasible("lists of blocks for every head would take more memory than attention itself")
    if _heads_agree(plan):
        plan = _first_head(plan)
    r, key_blocks = _only_region(plan), plan.key_blocks
    tile = torch.arange(plan.query_tiles, device=plan.tiles.device, dtype=torch.int32)
    # Blocks of the window up to the tile's first row are full; the plan's own bounds need not be this tight.
    full_stop = torch.minimum(torch.maximum(r.window_start, (tile * plan.block_m + 1) // plan.block_n), r.window_stop)
    column_count, column_blocks = _column_blocks(plan)
    sinks, listed, window = r.sink_stop - r.sink_start, r.num_blocks, full_stop - r.window_start
    full_count = sinks + listed + window
    partial_count = column_count + (r.window_stop - full_stop)
    computed, planned = int((full_count + partial_count).sum()), int(plan.work().sum())
    if computed > most * planned:
        raise NotFeasible(f"columns touch so many blocks that it would compute {computed / planned:.1f} x our tiles")
    width = key_blocks if full_width else max(1, int(full_count.max()), int(partial_count.max()))
    slot = torch.arange(width, device=tile.device, dtype=torch.int32)
    full = _piecewise(
        slot,
        (sinks, lambda s: r.sink_start[..., None] + s),
        (listed, lambda s: r.list_base[..., None] + _entries(plan, r.list_start[..., None] + s)),
        (window, lambda s: r.window_start[..., None] + s),
    )
    partial = _piecewise(
        slot,
        (column_count, lambda s: _at(column_blocks, s)),
        (r.window_stop - full_stop, lambda s: full_stop[..., None] + s),
    )
    shape = partial_count.shape
    full_blocks, partial_blocks = (x.clamp(0, key_blocks - 1).int().contiguous() for x in (full, partial))
    return BlockLists(
        partial_count.expand(shape).int().contiguous(), partial_blocks, full_count.int().contiguous(), full_blocks,
        _mask_mod(plan), plan.columns.shape[-1] > 0,
    )  # fmt: skip


def flex_block_mask(plan: Plan, *, most: float = float("inf")) -> Any:
    """The plan as a ``BlockMask`` of FlexAttention with blocks of ``(block_m, block_n)``; errors as ``block_lists``."""
    from torch.nn.attention.flex_attention import BlockMask

    lists = block_lists(plan, most=most, full_width=True)
    # The transposed lists serve the backward pass alone.
    named = inspect.signature(BlockMask.from_kv_blocks).parameters
    options: dict[str, Any] = {"compute_q_blocks": False} if "compute_q_blocks" in named else {}
    return BlockMask.from_kv_blocks(
        lists.partial_count, lists.partial_blocks, lists.full_count, lists.full_blocks,
        BLOCK_SIZE=(plan.block_m, plan.block_n), mask_mod=lists.mask_mod,
        seq_lengths=(plan.geometry.q_len, plan.geometry.kv_len), **options,
    )  # fmt: skip


def _plain(g: Geometry) -> bool:
    padded = g.kv_start is not None or g.kv_stop is not None or g.key_padding is not None
    return not (padded or g.window or g.q_offset) and g.q_len == g.kv_len


def _heads_agree(plan: Plan) -> bool:
    if plan.columns.shape[-1]:
        return False
    tiles, lists = plan.tiles, plan.lists.numel() > 0
    # Equal records name equal entries; heads with lists of their own differ in where those begin.
    compared = tiles if lists else tiles[..., :_OWN_LISTS]
    return bool((compared == compared[:, :1]).all())


def _only_region(plan: Plan) -> TileRecord:
    """The fields of a plan of one region, each int32 ``[B, H, QT]``."""
    return TileRecord(*plan.tiles[:, :, :, 0].unbind(-1))


def _first_head(plan: Plan) -> Plan:
    geometry = dataclasses.replace(plan.geometry, q_heads=1, kv_heads=1)
    return dataclasses.replace(plan, geometry=geometry, tiles=plan.tiles[:, :1], columns=plan.columns[:, :1])


def _entries(plan: Plan, index: Tensor) -> Tensor:
    if not plan.lists.numel():
        return torch.zeros_like(index)
    return plan.lists[index.clamp(0, plan.lists.numel() - 1).long()]


def _at(blocks: Tensor, slot: Tensor) -> Tensor:
    if not blocks.shape[-1]:
        return torch.zeros_like(slot)
    return blocks.gather(-1, slot.clamp(0, blocks.shape[-1] - 1).long())


def _piecewise(slot: Tensor, *parts: tuple[Tensor, Callable[[Tensor], Tensor]]) -> Tensor:
    """One list out of several runs: run ``n`` has ``count [B, H, QT]`` entries, and ``of(place in the run)``."""
    place = slot.expand(*parts[0][0].shape, -1)
    result = torch.zeros_like(place)
    for count, of in parts:
        inside = (place >= 0) & (place < count[..., None])
        result = torch.where(inside, of(place), result)
        place = place - count[..., None]
    return result


def _column_blocks(plan: Plan) -> tuple[Tensor, Tensor]:
    """Number ``[B, H, QT]`` and list ``[B, H, QT, MOST]`` of the key blocks that hold columns and are not listed."""
    r, most = _only_region(plan), plan.columns.shape[-1]
    if not most:
        return torch.zeros_like(r.num_columns), plan.tiles.new_zeros(*r.num_columns.shape, 0)
    slots = torch.arange(most, device=plan.tiles.device)
    first = r.column_start[..., None]
    used = (slots >= first) & (slots < first + r.num_columns[..., None])
    block = torch.where(used, (plan.columns // plan.block_n)[:, :, None], plan.key_blocks)
    touched = torch.zeros(*r.num_columns.shape, plan.key_blocks + 1, dtype=torch.bool, device=slots.device)
    touched = touched.scatter(-1, block.clamp(max=plan.key_blocks).long(), True)[..., :-1]
    touched &= ~plan.listed_blocks()[:, :, :, 0]
    count = touched.sum(-1, dtype=torch.int32)
    width = max(1, int(count.max()))
    order = torch.where(touched, torch.arange(plan.key_blocks, device=slots.device), plan.key_blocks).sort(-1).values
    return count, order[..., :width].int()


def _mask_mod(plan: Plan) -> MaskMod:
    if not plan.columns.shape[-1]:
        return _causal
    g, r, block_m, block_n = plan.geometry, _only_region(plan), plan.block_m, plan.block_n
    slots = torch.arange(plan.columns.shape[-1], device=plan.tiles.device)
    first, end = r.column_start.contiguous(), (r.column_start + r.num_columns).contiguous()
    least = torch.where(r.num_columns > 0, r.column_start, 1 << 30).amin(-1)[..., None]
    used = torch.where((slots >= least) & (slots < end.amax(-1)[..., None]), plan.columns, g.kv_len).long()
    # The rank of a key among the columns of its head, beyond all of them where it is none.
    rank = torch.full((*used.shape[:2], g.kv_len + 1), 1 << 30, dtype=torch.int32, device=slots.device)
    rank = rank.scatter(-1, used, slots.int().expand_as(used).contiguous())
    window = r.window_start.contiguous()

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        tile = i // block_m
        column = (rank[b, h, j] >= first[b, h, tile]) & (rank[b, h, j] < end[b, h, tile])
        return (j <= i) & ((j // block_n >= window[b, h, tile]) | column)

    return keep


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i
