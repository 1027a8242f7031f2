"""Dense tiles of geometries in which each row has an interval of keys of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.plan import RECORD


def interval_records(geometry: Geometry, tiles: TileShape) -> Tensor:
    """Records (``TileRecord``) of windows that hold every key of their rows, int32 ``[B, 1, QT, 1, RECORD]``.

    A tile visits what lies between the first key of any of its rows and the last one of any, and tests pairs where not
    every row sees every key.
    """
    g, bn = geometry, tiles.block_n
    start, stop = live_intervals(g)
    sees = start < stop
    first = _tiled(torch.where(sees, start, g.kv_len), tiles.block_m, g.kv_len).amin(-1)
    last = _tiled(torch.where(sees, stop, 0), tiles.block_m, 0).amax(-1)
    # A row that sees nothing leaves no block that every row sees.
    whole_from = _tiled(torch.where(sees, start, g.kv_len), tiles.block_m, 0).amax(-1)
    whole_until = _tiled(torch.where(sees, stop, 0), tiles.block_m, g.kv_len).amin(-1)
    begin = torch.minimum(first, last) // bn
    end = torch.maximum((last + (bn - 1)) // bn, begin)
    full = torch.minimum(torch.maximum(whole_until // bn, begin), end)
    if g.key_padding is not None:
        full = begin  # any key may be dead
    left = torch.minimum(torch.maximum((whole_from + (bn - 1)) // bn, begin), full)
    edges = torch.stack([begin, left, full, end], -1).to(torch.int32)  # [B, QT, 4]
    return torch.nn.functional.pad(edges, (0, RECORD - 4))[:, None, :, None]


def live_intervals(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """``row_start`` and ``row_stop`` without the padding at both ends, int32 ``[B, q_len]`` each."""
    g = geometry
    assert g.row_start is not None, "the caller asks for rows with intervals"
    assert g.row_stop is not None, "both or neither"
    start, stop = g.row_start, g.row_stop
    if g.kv_start is not None:
        start = torch.maximum(start, g.kv_start.to(start.device, torch.int32)[:, None])
    if g.kv_stop is not None:
        stop = torch.minimum(stop, g.kv_stop.to(stop.device, torch.int32)[:, None])
    return start, stop


def _tiled(x: Tensor, block_m: int, beyond: int) -> Tensor:
    """``[B, q_len]`` as ``[B, QT, block_m]``; rows beyond the last have ``beyond``."""
    whole = torch.nn.functional.pad(x, (0, -x.shape[1] % block_m), value=beyond)
    return whole.view(x.shape[0], -1, block_m)
