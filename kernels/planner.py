"""From patterns to a plan, in two steps that never wait for the device.

1. ``estimate_rules``: each head's pattern, and what the probe says about it, become ``HeadRules``: one form for all
   patterns, in tokens. It is the exact meaning of a pattern on one input.
2. ``lower_rules``: rules become the tiles of a ``Plan``: local windows become ``window_start``, sinks a run of blocks,
   diagonals one list of block offsets per head, chosen blocks a list per tile, key lines columns, query lines a row
   order with dense tiles.

The law (section 2 of the design): ``rules and model mask <= plan.to_mask() <= model mask``, every live row non-empty.
All heads go through the same few dozen small tensor operations, since on a GPU each of them is a launch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmi_compile.kernels.block_topk import BlockRules
from mmi_compile.kernels.frames import TileFrame, TileShape, constant, ramp, remembered, tile_frame
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.intervals import interval_records
from mmi_compile.kernels.patterns import Pattern
from mmi_compile.kernels.plan import RECORD, Plan, TileRecord
from mmi_compile.kernels.probe import probe_rows
from mmi_compile.kernels.rules import HeadRules, estimate_rules, sink_end, window_start
from mmi_compile.kernels.segments import holds_tail

__all__ = [
    "HeadRules", "Lowered", "TileShape", "block_offsets", "build_plan", "dense_plan", "dense_records", "keep_tail",
    "list_size", "lower", "lower_rules", "make_dense",
]  # fmt: skip


def build_plan(
    patterns: Sequence[Pattern], q: Tensor, k: Tensor, geometry: Geometry, scale: float, tiles: TileShape
) -> Plan:
    """The plan of one attention call whose head ``h`` follows ``patterns[h]``.

    Args:
        patterns: one per query head.
        q: ``[B, HQ, q_len, D]``; k: ``[B, HKV, kv_len, D]``; scale: factor on the scores.

    Raises:
        ValueError: the number of patterns is not the number of query heads.
    """
    if geometry.q_len == 0 or geometry.kv_len == 0:
        return dense_plan(geometry, tiles, q.device)
    return lower_rules(estimate_rules(patterns, q, k, geometry, scale, tiles), geometry, tiles)


def dense_plan(geometry: Geometry, tiles: TileShape, device: torch.device | str) -> Plan:
    """The plan of the model's own mask: every tile is a window over all keys that its rows may see.

    Kept for geometries without padding, so that asking again launches nothing. Its tensors are not to be written to.
    """
    return remembered(_dense_plan, geometry, tiles, torch.device(device))


def _dense_plan(geometry: Geometry, tiles: TileShape, device: torch.device) -> Plan:
    g, head = geometry, (geometry.batch, geometry.q_heads)
    records = interval_records(g, tiles) if g.has_rows else dense_records(tile_frame(g, tiles, device))
    return Plan(
        geometry=g,
        block_m=tiles.block_m,
        block_n=tiles.block_n,
        tiles=records.expand(*head, -1, -1, -1).contiguous(),
        lists=torch.empty(0, dtype=torch.int32, device=device),
        columns=torch.empty(*head, 0, dtype=torch.int32, device=device),
        has_sinks=False,
    )


def dense_records(frame: TileFrame) -> Tensor:
    """Records of tiles that keep every key, int32 ``[1 or B, 1 or HQ, QT, 1, RECORD]``."""
    edges = torch.stack(torch.broadcast_tensors(*_window(torch.minimum(frame.first, frame.latest), frame)), -1)
    return torch.nn.functional.pad(edges, (0, RECORD - 4))[..., None, :]


def _window(start: Tensor, frame: TileFrame) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``window_start, window_left, window_full, window_stop`` of windows that begin at ``start``."""
    stop = torch.maximum(frame.stop, start)
    full = torch.maximum(frame.full, start)  # never beyond `stop`
    left = start if frame.left is None else torch.minimum(torch.maximum(frame.left, start), full)
    return start, left, full, stop


def make_dense(plan: Plan, which: Tensor, frame: TileFrame | None = None) -> Plan:
    """The plan with the tiles of ``which`` (bool, broadcastable to ``[B, HQ, QT]``) turned into dense windows.

    Args:
        frame: facts of the tiles, where the caller has them.
    """
    g, shape = plan.geometry, TileShape(plan.block_m, plan.block_n)
    if frame is not None and g.has_padding:
        records = dense_records(frame)
    elif plan.row_order is None:
        records = remembered(_records_in_order, g, shape, plan.tiles.device)
    else:
        records = dense_records(ordered_frame(plan.row_order, g, shape))
    if plan.regions > 1:
        # One region of keys in order holds everything, so that the others visit nothing.
        records = torch.nn.functional.pad(records, (0, 0, 0, plan.regions - 1))
    return dataclasses.replace(plan, tiles=torch.where(which[..., None, None], records, plan.tiles))


def _records_in_order(geometry: Geometry, tiles: TileShape, device: torch.device) -> Tensor:
    return dense_records(tile_frame(geometry, tiles, device))


def keep_tail(plan: Plan) -> Plan:
    """The plan with every key for the tiles that hold the last live rows, as many as a probe reads.

    They carry the answer and cost next to nothing.
    """
    g, shape = plan.geometry, TileShape(plan.block_m, plan.block_n)
    if not plan.query_tiles:
        return plan
    if plan.row_order is None:
        return make_dense(plan, remembered(_tail_in_order, g, shape, plan.tiles.device))
    return make_dense(plan, holds_tail(plan.row_order, g, plan.block_m))


def _tail_in_order(geometry: Geometry, tiles: TileShape, device: torch.device) -> Tensor:
    """The same for rows in order, bool ``[B, 1, QT]``."""
    rows = probe_rows(geometry, device)
    query_tile = ramp(-(-geometry.q_len // tiles.block_m), device)
    first, final = rows[:, :1, None], rows[:, -1:, None]
    return (query_tile >= first // tiles.block_m) & (query_tile <= final // tiles.block_m)


# ---------------------------------------------------------------------------------------------------------------------
# Rules to plan


@dataclass(frozen=True)
class Lowered:
    """A plan, and ``diagonals``: which block offsets from a tile's own block the diagonals of a head need.

    ``diagonals`` is bool ``[B, HQ, SIZE]`` or None when no head has diagonals; offset 0 means nothing.
    """

    plan: Plan
    diagonals: Tensor | None


@dataclass(frozen=True)
class _Lists:
    """Block lists of all tiles, and the fields of ``TileRecord``, int32, broadcastable to ``[B, HQ, QT]``."""

    num_blocks: Tensor
    list_start: Tensor
    list_base: Tensor
    entries: Tensor


def lower_rules(rules: HeadRules, geometry: Geometry, tiles: TileShape) -> Plan:
    """The plan that covers ``rules``: the smallest superset made of whole key blocks, windows and columns."""
    return lower(rules, geometry, tiles).plan


def lower(
    rules: HeadRules,
    geometry: Geometry,
    tiles: TileShape,
    *,
    diagonals: Tensor | None = None,
    frame: TileFrame | None = None,
    dense: Tensor | None = None,
    spread: bool = False,
) -> Lowered:
    """``lower_rules`` with the block diagonals beside the plan.

    Args:
        diagonals: what ``rules.distances`` come to; frame: ``tile_frame``. Both for rows in order, where the caller has
            them; or the frame of rows in some other order.
        dense: tiles that keep every key besides those of ``rules``, bool, broadcastable to ``[B, HQ, QT]``.
        spread: the rows of a tile may stand up to ``2 * block_m`` positions apart.
    """
    g, bn, device = geometry, tiles.block_n, rules.local.device
    order, frame, on_line = (None, frame, None) if frame is not None else _rows(rules, g, tiles, device)
    shape = (g.batch, g.q_heads, frame.low.shape[-1])
    whole = _dense_tiles(rules, frame, on_line, g.q_heads)
    whole = dense if whole is None else whole if dense is None else whole | dense
    start = window_start(rules.local, frame, whole, bn).expand(shape)
    has_sinks = max(rules.sink) > 0
    zero = frame.zero
    # Lists begin where sinks end; left of `first` there is nothing for a tile.
    end, sink_key = sink_end(rules.sink, frame, bn) if has_sinks else (zero.expand(1, 1, 1), None)
    begin = end if frame.first_is_zero else torch.maximum(frame.first, end)
    sink_stop = torch.minimum(begin, start) if has_sinks or not frame.first_is_zero else zero
    if diagonals is None and rules.distances is not None and rules.distances.shape[-1]:
        diagonals = _block_diagonals(rules, g, tiles, spread or order is not None)
    lists = None if diagonals is None else _list_blocks(diagonals, sink_stop, start, frame.base)
    if rules.blocks is not None:
        lists = _with_blocks(lists, rules.blocks, sink_stop, start, zero)
    bits = None
    columns = torch.empty(*shape[:2], 0, dtype=torch.int32, device=device)
    num_columns = zero
    if rules.columns is not None and rules.columns.shape[-1]:
        columns, num_columns = _columns(rules.columns, sink_key, start, g, bn)
        bits = None if diagonals is None else _bits(diagonals)
    record = TileRecord(
        *_window(start, frame),
        sink_start=zero if frame.first_is_zero else torch.minimum(frame.first, sink_stop),
        sink_stop=sink_stop,
        num_blocks=zero if lists is None else lists.num_blocks,
        list_start=zero if lists is None else lists.list_start,
        list_base=zero if lists is None else lists.list_base,
        num_columns=num_columns,
        column_start=zero,
        bits_start=zero if bits is None else _head_starts(g.batch, g.q_heads, bits.shape[-1], device),
        grouped=zero,
    )
    plan = Plan(
        geometry=g,
        block_m=tiles.block_m,
        block_n=bn,
        tiles=torch.stack([field.expand(shape) for field in record], -1)[..., None, :],
        lists=torch.empty(0, dtype=torch.int32, device=device) if lists is None else lists.entries,
        columns=columns,
        has_sinks=has_sinks,
        row_order=order,
        list_bits=None if bits is None else bits.flatten(),
    )
    return Lowered(plan, diagonals)


def _head_starts(batch: int, heads: int, size: int, device: torch.device) -> Tensor:
    """Where each head begins in a flat tensor of ``size`` entries a head, int32 ``[B, HQ, 1]``."""
    return ramp(batch * heads, device, step=size).view(batch, heads, 1)


def _dense_tiles(rules: HeadRules, frame: TileFrame, on_line: Tensor | None, heads: int) -> Tensor | None:
    """Tiles whose rows keep every key, bool, broadcastable to ``[B, HQ, QT]``; None when there is none."""
    dense = on_line
    if rules.last is not None:
        last = rules.last[..., None]
        is_last = (frame.high >= frame.live_end - last) & (frame.low < frame.live_end) & (last > 0)
        dense = is_last if dense is None else dense | is_last
    if rules.blocks is not None and rules.blocks.whole is not None:
        whole = rules.blocks.whole
        everyone = torch.zeros(whole.shape[0], heads, whole.shape[2], dtype=torch.bool, device=whole.device)
        whole = _of_block_heads(everyone, rules.blocks, whole)
        dense = whole if dense is None else dense | whole
    return dense


def _of_block_heads(x: Tensor, blocks: BlockRules, values: Tensor | int) -> Tensor:
    """``x [B, HQ, QT]`` with the heads of ``blocks`` replaced by ``values``."""
    if isinstance(values, int):
        return x.index_fill(1, constant(blocks.heads, x.device, torch.int64), values)
    if len(blocks.heads) == x.shape[1]:
        return values
    return x.index_copy(1, constant(blocks.heads, x.device, torch.int64), values)


def _rows(
    rules: HeadRules, geometry: Geometry, tiles: TileShape, device: torch.device
) -> tuple[Tensor | None, TileFrame, Tensor | None]:
    """Row order, facts of the tiles, and which tiles hold a query line (bool ``[B, HQ, QT]``)."""
    if rules.line_stride is None or rules.line_phase is None:
        return None, tile_frame(geometry, tiles, device), None
    order, lines = _lines_first(rules.line_stride[..., None], rules.line_phase[..., None], geometry, tiles.block_m)
    frame = ordered_frame(order, geometry, tiles)
    return order, frame, ramp(frame.low.shape[-1], device, step=tiles.block_m) < lines


def _lines_first(stride: Tensor, phase: Tensor, geometry: Geometry, block_m: int) -> tuple[Tensor, Tensor]:
    """Row order with the query lines in front, int32 ``[B, HQ, QT * block_m]``, and how many lines there are.

    Counted, not sorted: line ``k`` is row ``first + k stride``; of the other rows ``first`` stand before the first
    line, and ``stride - 1`` between one line and the next.

    Args:
        stride, phase: int32 ``[B, HQ, 1]``, phase -1 for none.
    """
    g = geometry
    slot = ramp(-(-g.q_len // block_m) * block_m, stride.device)
    first = torch.where(phase < 0, g.q_len, (phase - g.q_offset) % stride)
    lines = (g.q_len - first + stride - 1) // stride
    other = slot - lines
    row = torch.where(other < first, other, other + 1 + (other - first) // (stride - 1).clamp(min=1))
    row = torch.where(slot < lines, first + slot * stride, row)
    return torch.where(slot < g.q_len, row, -1), lines


def ordered_frame(order: Tensor, geometry: Geometry, tiles: TileShape) -> TileFrame:
    """The facts of tiles whose rows come as in ``Plan.row_order``, ``[B, HQ or 1, QT * block_m]``."""
    rows = order.view(*order.shape[:2], -1, tiles.block_m)
    low = torch.where(rows < 0, geometry.q_len, rows).amin(-1) + geometry.q_offset
    last = rows.amax(-1)
    high = torch.where(last < 0, -1, last + geometry.q_offset)  # an empty tile sees nothing
    return TileFrame.of(low, high, geometry, tiles.block_n)


def block_offsets(
    distances: Tensor, geometry: Geometry, tiles: TileShape, *, ordered: bool = False, line_gap: int = 1
) -> Tensor:
    """Block offsets ``own block - listed block`` that each diagonal needs, int64 ``[B, HQ, S, STEPS]``, 0 for none.

    A tile whose positions start at ``c`` inside a key block and span ``span`` rows meets distance ``d`` in the blocks
    at offsets ``ceil((d - c - span + 1) / block_n) ... ceil((d - c) / block_n)`` from its own. When every tile has the
    same ``c`` the list is exact, else it covers every ``c``. All are at most ``(q_len + q_offset) // block_n + 1``.

    Args:
        distances: integers ``[B, HQ, S]``, negative for no diagonal.
        ordered: whether query lines have been taken out of the rows, one in ``line_gap`` of them at most.
    """
    bn = tiles.block_n
    aligned = not ordered and tiles.block_m % bn == 0
    least, most = (geometry.q_offset % bn,) * 2 if aligned else (0, bn - 1)
    span = tiles.block_m + (tiles.block_m // (max(2, line_gap) - 1) + 2 if ordered else 0)
    reach = span - 1 + most - least
    # Steps of one block and a last one to the end meet every offset; rounding up is rounding down after `bn - 1` more.
    steps = tuple(least - (bn - 1) + min(step, reach) for step in range(0, reach + bn, bn))
    offsets = (distances[..., None] - constant(steps, distances.device, torch.int64)) // bn
    return offsets.clamp(min=0)


def list_size(geometry: Geometry, tiles: TileShape) -> int:
    """Block offsets that a head may list: enough for every diagonal, and whole words of bits."""
    return -(-((geometry.q_len + geometry.q_offset) // tiles.block_n + 2) // 32) * 32


def _block_diagonals(rules: HeadRules, geometry: Geometry, tiles: TileShape, ordered: bool) -> Tensor:
    """Which block offsets the diagonals of each head need, bool ``[B, HQ, SIZE]``, SIZE a multiple of 32.

    Offset 0 is the tile's own block and always in the window, so it takes what has no place.
    """
    assert rules.distances is not None
    offsets = block_offsets(rules.distances, geometry, tiles, ordered=ordered, line_gap=rules.line_gap)
    needed = torch.zeros(*offsets.shape[:2], list_size(geometry, tiles), dtype=torch.bool, device=offsets.device)
    return needed.scatter_(-1, offsets.flatten(2), True)


def _list_blocks(diagonals: Tensor, begin: Tensor, window_start: Tensor, base: Tensor) -> _Lists:
    """One list per head, and the part of it that each tile visits.

    Args:
        diagonals: bool ``[B, HQ, SIZE]``.
        begin, base: first key block that may be listed, not right of the window, and own block; broadcastable to
            window_start: int32 ``[B, HQ, QT]``.
    """
    batch, heads, size = diagonals.shape
    # Negative offsets ascend; 1 lies behind all of them and is never reached.
    entries = torch.where(diagonals, ramp(size, diagonals.device, step=-1), 1).sort(-1).values
    limits = torch.stack([begin.expand_as(window_start), window_start], 2) - base[:, :, None]  # [B, HQ, 2, QT]
    found = torch.searchsorted(entries, limits.flatten(2), out_int32=True).view_as(limits)
    skipped = found[:, :, 0]
    starts = _head_starts(batch, heads, size, diagonals.device)
    return _Lists(found[:, :, 1] - skipped, skipped + starts, base, entries.flatten())


def _with_blocks(
    shared: _Lists | None, blocks: BlockRules, begin: Tensor, window_start: Tensor, zero: Tensor
) -> _Lists:
    """The lists of heads whose tiles have one each, behind those that the tiles of other heads share.

    Args:
        begin, window_start: int32, broadcastable to and ``[B, HQ, QT]``.
    """
    shape, device = window_start.shape, window_start.device
    limits = torch.stack([begin.expand(shape), window_start], -1)  # [B, HQ, QT, 2]
    if len(blocks.heads) < shape[1]:
        limits = limits.index_select(1, constant(blocks.heads, device, torch.int64))
    skipped, end = torch.searchsorted(blocks.entries, limits, out_int32=True).unbind(-1)
    count, width = end - skipped, blocks.entries.shape[-1]
    before = 0 if shared is None else shared.entries.numel()
    starts = ramp(count.numel(), device, start=before, step=width).view(count.shape)
    entries = blocks.entries.flatten()
    if shared is None:
        rest = zero.expand(shape)
        return _Lists(
            _of_block_heads(rest, blocks, count), _of_block_heads(rest, blocks, skipped + starts), zero, entries
        )
    return _Lists(
        num_blocks=_of_block_heads(shared.num_blocks, blocks, count),
        list_start=_of_block_heads(shared.list_start, blocks, skipped + starts),
        list_base=_of_block_heads(shared.list_base.expand(shape), blocks, 0),
        entries=torch.cat([shared.entries, entries]),
    )


_POWERS = (*(1 << bit for bit in range(31)), -(1 << 31))


def _bits(diagonals: Tensor) -> Tensor:
    """Offsets as bits, int32 ``[B, HQ, SIZE / 32]``; different powers never carry, so sums of bits are unions."""
    words: Tensor = diagonals.unflatten(-1, (-1, 32))
    return (words * constant(_POWERS, diagonals.device)).sum(-1, dtype=torch.int32)


def _columns(
    keys: Tensor, sink_key: Tensor | None, window_start: Tensor, geometry: Geometry, block_n: int
) -> tuple[Tensor, Tensor]:
    """The sorted columns, int32 ``[B, HQ, C]``, and how many of them each tile uses, int32 ``[B, HQ, QT]``.

    Dead keys and keys in sink blocks are left out: the former are invisible, the latter every tile visits already.
    """
    g = geometry
    keep = None if sink_key is None else keys >= sink_key
    if g.has_padding:
        live = g.live_keys(keys.device)
        assert live is not None
        at = keys.clamp(max=g.kv_len - 1).long()
        found = live[:, None].expand(-1, g.q_heads, -1).gather(-1, at)
        keep = found if keep is None else keep & found
    if keep is not None:
        keys = torch.where(keep, keys, g.kv_len)
    keys = keys.sort(-1).values
    stop = window_start * block_n
    if g.kv_len < g.q_len + g.q_offset:
        stop = stop.clamp(max=g.kv_len)
    return keys.clamp(max=g.kv_len - 1), torch.searchsorted(keys, stop, out_int32=True)
