"""What the search of policy ``adaptive`` knows before any probe: what every head keeps, what candidates cost, and where
the probe rows stand among tiles and key blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmi_compile.kernels.cost import Coefficients
from mmi_compile.kernels.frames import TileFrame, TileShape, constant, keep, ramp, tile_frame
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.probe import probe_rows, probe_tile_count
from mmi_compile.kernels.spread_probe import SpreadRows, spread_rows

SINK_TOKENS = 64
"""First live keys that every sparse head keeps, as far as they fill one key block."""

LEAST_WINDOW = 64
"""Nearest keys that every sparse head keeps: what stands just before a token tells what it is about."""

LOCAL_ZONE = 1024
"""Nearest keys (at most 1/16 of all) that are left to window and diagonals, in tokens."""

MAX_DIAGONALS = 64
"""Diagonals that a head may list."""

GRID_BONUS = 0.8
"""Factor on the cost of a grid: its lines also cover rows for which the probe saw some of them too faintly."""


def sink_tokens(block_n: int) -> int:
    """First live keys that every sparse head keeps."""
    return min(SINK_TOKENS, block_n)


def least_columns(kv_len: int, block_n: int) -> int:
    """Columns that every sparse head keeps for the last rows; one that is no grid keeps again as many for all rows.

    Together they fill one key block, which costs next to nothing. What is asked of a prompt is often a few tokens of
    it, whose mass is small beside that of the sinks: a recall target alone would leave them out.
    """
    return min(block_n, kv_len) // 2


def least_window(tiles: TileShape) -> int:
    """The smallest window of a sparse head, in key blocks: ``LEAST_WINDOW`` tokens, a query tile included."""
    return -(-max(0, LEAST_WINDOW - tiles.block_m) // tiles.block_n)


def max_columns(kv_len: int, block_n: int) -> int:
    """Columns a head may have: 1/16 of the keys, beyond 64 K keys 4096, beyond 256 K keys 1/64 of them.

    In whole key blocks and at least one. A function of lengths alone: columns take room for all that there may be.
    """
    most = min(kv_len // 16, max(4096, kv_len // 64))
    return max(1, most // block_n) * block_n


def max_diagonals(kv_len: int, block_n: int) -> int:
    """Diagonals a head may list: two blocks each, together at most 1/4 of the key blocks."""
    return min(MAX_DIAGONALS, max(1, kv_len // block_n // 8))


class Prices(NamedTuple):
    """What a key tile takes, in units of one of a window: on a block list, of columns, of keys that are gathered once
    per head, and of a dense head."""

    listed: float = 1.0
    columns: float = 1.0
    gathered: float = 0.0
    dense: float = 1.0

    @classmethod
    def of(cls, coefficients: Coefficients) -> Prices:
        """What they are by measured or built-in coefficients."""
        c = coefficients
        if not c.tiles:
            return cls()
        return cls(c.listed / c.tiles, c.columns / c.tiles, c.gathered / c.tiles, c.dense / c.tiles)


class Costs(NamedTuple):
    """What candidates cost, in keys per query averaged over the rows; a key in a window costs 1. float32 unless said
    otherwise; a leading ``b`` is 1 where lengths alone decide.

    Attributes:
        dense: ``[b, 1]``, everything.
        window: ``[b, 1, W + 1]``, a window and the sinks.
        local: int32 ``[W + 1]``, the same windows in tokens. The probe rows may stand at the end of their tile and see
            the whole of it beside the blocks of the window; a tile's first row sees none of it. So that it reaches as
            far back as the probe rows do, a window is longer than what was measured by a query tile.
        diagonal: ``[b, 1, W]``, one block diagonal at each offset.
        rung: ``[b, 1, 1, L]``, a window of the ladder and all block diagonals beyond it; one more, so that a plain
            a_shape wins a tie.
        grid_rung: ``[b, 1, 1, L]``, a window of the ladder beside a grid.
        column: ``[b, 1, 1]``, one column; line: likewise, a grid of stride 1.
    """

    dense: Tensor
    window: Tensor
    local: Tensor
    diagonal: Tensor
    rung: Tensor
    grid_rung: Tensor
    column: Tensor
    line: Tensor

    @classmethod
    def of(
        cls, windows: tuple[Tensor, Tensor, Tensor], local: Tensor, diagonal: Tensor, column: Tensor, kv_len: int,
        ladder: tuple[int, ...], prices: Prices,
    ) -> Costs:  # fmt: skip
        """From what everything, windows of any size and windows of the ladder take, ``[b, 1]``, ``[b, 1, W + 1]`` and
        ``[b, 1, L]``, and diagonals, in keys; and what a column takes."""
        dense, window, rung = windows
        diagonal = diagonal * prices.listed
        beyond = diagonal.sum(-1, keepdim=True) - diagonal.cumsum(-1)
        beyond = beyond.index_select(-1, constant(ladder, local.device, torch.int64))
        return cls(
            dense=(dense * prices.dense).float(),
            window=window.float(),
            local=local,
            diagonal=diagonal.float(),
            rung=(rung + beyond)[:, :, None].float() + 1,
            grid_rung=(rung * GRID_BONUS)[:, :, None].float(),
            column=column.float(),
            line=(GRID_BONUS * kv_len * column).float(),
        )


def _costs(
    q_len: int, q_offset: int, kv_len: int, block_m: int, block_n: int, prices: Prices, device: torch.device
) -> Costs:
    positions = q_len + q_offset
    offset = torch.arange(positions // block_n + 3, device=device)
    window = _window_cost(offset, q_len, q_offset, block_m, block_n)
    diagonal = (positions - (offset[:-1] * block_n).clamp(min=q_offset)).clamp(min=0).double() * (block_n / q_len)
    column = torch.full((1, 1, 1), prices.columns + prices.gathered * block_m / q_len, device=device)
    local = (offset * block_n + block_m).clamp(max=positions).int()
    ladder = window_ladder(positions, block_n)
    window = window[None, None]
    windows = (window[..., -1], window, window.index_select(-1, constant(ladder, device, torch.int64)))
    return Costs.of(windows, local, diagonal[None, None], column, kv_len, ladder, prices)


def _window_cost(window: Tensor, q_len: int, q_offset: int, block_m: int, block_n: int) -> Tensor:
    """Keys per query of a window that reaches ``window`` key blocks and a query tile back, plus sinks."""
    end = q_len + q_offset
    reach = (window.double() + 1) * block_n + block_m
    middle = reach.clamp(q_offset, end)
    growing = (middle * (middle + 1) - q_offset * (q_offset + 1)) / 2
    return (growing + reach.clamp(max=end) * (end - middle)) / q_len + sink_tokens(block_n)


def window_ladder(positions: int, block_n: int) -> tuple[int, ...]:
    """Windows that are tried beside columns, in key blocks: 0, 1, 3, 7, ... up to half of all."""
    windows = positions // block_n + 2
    return tuple((1 << rung) - 1 for rung in range(max(1, (windows // 2 + 1).bit_length())))


@dataclass(frozen=True)
class SearchFrame:
    """What a search must know beside a probe. A leading ``b`` is 1 where it is the same for all batch elements.

    Attributes:
        tiles: facts of all query tiles.
        tile: int64 ``[b, 1, PT]``, query tiles of the groups of probe rows: those that choose, and those that check.
        edge: int64 ``[b, 1, PT, W]``, key block at each offset from the key block of the tile's first position.
        known: bool, likewise, whether there is one right of the sinks.
        ahead: int64 ``[b, 1, PT, key blocks]``, offset of each key block, 0 for those that are not left of the tile.
        ladder: see ``window_ladder``. costs: what candidates cost.
    """

    tiles: TileFrame
    tile: Tensor
    edge: Tensor
    known: Tensor
    ahead: Tensor
    ladder: tuple[int, ...]
    costs: Costs


@dataclass(frozen=True)
class ProbeFrame(SearchFrame):
    """What lengths and padding alone say of a probe. A leading ``b`` is 1, or ``B`` where there is padding.

    Attributes:
        tail: bool ``[b, 1, QT]``, tiles of the last rows.
        spread: rows from all over the prompt, ``G`` groups of each kind; None when there are none.
        inside: bool ``[b, 1, kv_len]``, keys for which a column may be credited by the last rows.
        before: likewise, keys that the last rows may take as columns in any case: all between sinks and window.
        line_edge: int64 ``[b, 1, 1, L]``, one below the first key of each window of the ladder, seen from the first
            probe tile.
        dense_work: int32 ``[b, 1, QT]``, key tiles that a dense query tile visits; full: ``[b, 1]``, their sum.
    """

    tail: Tensor
    spread: SpreadRows | None
    inside: Tensor
    before: Tensor
    line_edge: Tensor
    dense_work: Tensor
    full: Tensor


def probe_frame(
    geometry: Geometry, tiles: TileShape, device: torch.device, groups: int = 0, prices: Prices | None = None
) -> ProbeFrame:
    """Made once per geometry without padding, through ``remembered``; ``groups`` of the spread probe choose, as many
    check; ``prices`` None where every key tile counts alike."""
    g, bm, bn = geometry, tiles.block_m, tiles.block_n
    facts = tile_frame(g, tiles, device)
    some = slice(g.batch if g.has_padding else 1)
    rows = probe_rows(g, device)[some]
    query_tiles, key_blocks, positions = -(-g.q_len // bm), -(-g.kv_len // bn), g.q_len + g.q_offset
    zone = min(LOCAL_ZONE, g.kv_len // 16)
    sink_end = (facts.origin + (sink_tokens(bn) - 1)) // bn + 1
    first_tile = rows[:, :1, None] // bm  # [b, 1, 1]
    tile = first_tile + ramp(probe_tile_count(g, rows.shape[1], bm), device, dtype=torch.int64)
    base = (tile * bm + g.q_offset) // bn
    spread = None
    if groups:
        spread = spread_rows(g, device, groups, bm, sink_stop=sink_end[:, 0, 0] * bn, zone=zone)
        tile = torch.cat([tile, spread.starts[some, None] // bm], -1)
    # With padding there may be one more than there are query tiles; it holds no probe row.
    tile = tile.clamp(max=query_tiles - 1)
    edge_base = (tile * bm + g.q_offset) // bn
    edge = edge_base[..., None] - ramp(positions // bn + 2, device, dtype=torch.int64)
    j, query_tile = ramp(g.kv_len, device), ramp(query_tiles, device)
    ladder = window_ladder(positions, bn)
    line_edge = (base[..., :1] - constant(ladder, device, torch.int64)) * bn
    # The first and the last key never count, so that an index out of range may read them for nothing.
    credited = (rows[:, :1, None] + (g.q_offset - zone)).clamp(max=g.kv_len - 1)
    dense_work = (facts.stop - torch.minimum(facts.first, facts.latest)).clamp(min=0)
    return ProbeFrame(
        tiles=facts,
        tile=tile,
        tail=(query_tile >= first_tile) & (query_tile <= rows[:, -1:, None] // bm),
        spread=spread,
        edge=edge.clamp(0, key_blocks - 1),
        known=(edge >= sink_end[..., None]) & (edge < key_blocks),
        ahead=(edge_base[..., None] - ramp(key_blocks, device, dtype=torch.int64)).clamp(min=0),
        inside=(j >= sink_end * bn) & (j < credited),
        before=(j >= sink_end * bn) & (j < rows[:, :1, None] + (g.q_offset - bm)),
        ladder=ladder,
        line_edge=line_edge.clamp(0, g.kv_len)[:, :, None] - 1,
        costs=keep(_costs, (g.q_len, g.q_offset, g.kv_len, bm, bn, prices or Prices()), device),
        dense_work=dense_work,
        full=dense_work.sum(-1),
    )
