"""What lengths and tile sizes alone decide, made once per geometry: planning then launches only what inputs decide."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar, cast

import torch
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.probe import first_live_key, last_live_position

KEPT = 16
"""Geometries whose facts are kept, for a few users each: the layers of a model share one geometry."""

T = TypeVar("T")


@dataclass(frozen=True)
class TileShape:
    """Query rows and keys in one tile of the kernel, both in tokens."""

    block_m: int
    block_n: int

    def __post_init__(self) -> None:
        for field in ("block_m", "block_n"):
            if getattr(self, field) < 1:
                raise ValueError(f"TileShape: {field} is {getattr(self, field)}; give 1 or more")


@dataclass(frozen=True)
class TileFrame:
    """Facts of every query tile before any pattern, int32 ``[1 or B, 1 or HQ, QT]`` unless said otherwise.

    Attributes:
        low, high: smallest and largest position in the tile, in tokens.
        base: key block that holds ``low``.
        first: first key block that holds a key which some row may see.
        latest: last key block at which a window may start and still hold a key of every live row.
        left, full, stop: the model allows every pair of the key blocks ``left ... full - 1`` (``full`` may be less
            than ``left``, and ``left`` is None where it is 0 throughout); ``stop`` is one past the last key block that
            some row may see, never less than ``full``.
        origin: first live key ``[1 or B, 1, 1]``; live_end: one past the last live position, likewise.
        after: one past ``low``; zero: a scalar.
        first_is_zero: whether ``first`` and ``origin`` are 0 throughout, known on the host.
        latest_is_base: whether ``latest`` is ``base`` throughout, likewise.
    """

    low: Tensor
    high: Tensor
    base: Tensor
    first: Tensor
    latest: Tensor
    left: Tensor | None
    full: Tensor
    stop: Tensor
    origin: Tensor
    live_end: Tensor
    after: Tensor
    zero: Tensor
    first_is_zero: bool
    latest_is_base: bool

    @classmethod
    def of(cls, low: Tensor, high: Tensor, geometry: Geometry, block_n: int) -> TileFrame:
        """The facts of tiles with these smallest and largest positions."""
        g, device = geometry, low.device
        origin = first_live_key(g, device).int()[:, None, None]
        live_end = last_live_position(g, device).int()[:, None, None]
        if not g.has_padding:
            origin, live_end = origin[:1], live_end[:1]
        stop = _seen_until(high, g, block_n)
        return cls(
            low=low,
            high=high,
            base=low // block_n,
            first=_first_visible(low, origin, g) // block_n,
            latest=_latest_window_start(low, origin, g) // block_n,
            left=_first_whole(high, origin, g, block_n),
            # All rows of an empty tile see everything, yet no row sees anything.
            full=torch.minimum(_whole_until(low, g, block_n), stop),
            stop=stop,
            origin=origin,
            live_end=live_end,
            after=low + 1,
            zero=torch.zeros((), dtype=torch.int32, device=device),
            first_is_zero=not g.window and not g.has_padding,
            latest_is_base=not g.has_padding and g.kv_len == g.q_len + g.q_offset,
        )


def tile_frame(geometry: Geometry, tiles: TileShape, device: torch.device) -> TileFrame:
    """The facts of tiles whose rows are in order."""
    return remembered(_tile_frame, geometry, tiles, device)


def _tile_frame(geometry: Geometry, tiles: TileShape, device: torch.device) -> TileFrame:
    g = geometry
    low = torch.arange(0, g.q_len, tiles.block_m, device=device, dtype=torch.int32) + g.q_offset
    high = (low + (tiles.block_m - 1)).clamp(max=g.q_len + g.q_offset - 1)
    return TileFrame.of(low[None, None], high[None, None], g, tiles.block_n)


def _first_visible(low: Tensor, origin: Tensor, geometry: Geometry) -> Tensor:
    """The first key that some row of the tile may see (tokens)."""
    if geometry.window:
        origin = torch.maximum(origin, low - (geometry.window - 1))
    return torch.minimum(origin.clamp(min=0), low)


def _latest_window_start(low: Tensor, origin: Tensor, geometry: Geometry) -> Tensor:
    """The last key at which a window may start and still hold the nearest live key of every live row (tokens).

    Padding may hide a row's own key; the nearest live key to its left then keeps the row from being empty. It only
    grows with the position, so the first live row of the tile decides.
    """
    g = geometry
    nearest = torch.maximum(low, origin).clamp(max=g.kv_len - 1)
    if g.kv_stop is not None:
        nearest = torch.minimum(nearest, g.kv_stop.to(nearest.device, torch.int32)[:, None, None] - 1)
    if g.key_padding is not None:
        j = torch.arange(g.kv_len, device=nearest.device, dtype=torch.int32)
        latest = torch.where(g.key_padding.to(nearest.device), j, 0).cummax(-1).values  # [B, kv_len]
        nearest = nearest.expand(g.batch, *nearest.shape[1:])
        nearest = latest.gather(-1, nearest.clamp(min=0).flatten(1).long()).view_as(nearest)
    return torch.minimum(nearest.clamp(min=0), low)


def _first_whole(high: Tensor, origin: Tensor, geometry: Geometry, block_n: int) -> Tensor | None:
    """The first key block that neither the live range nor a sliding window cuts, as far as its left edge goes."""
    g = geometry
    if not g.window and not g.has_padding:
        return None
    edge = torch.maximum(origin, high - (g.window - 1)) if g.window else origin
    return (edge.clamp(min=0) + (block_n - 1)) // block_n


def _whole_until(low: Tensor, geometry: Geometry, block_n: int) -> Tensor:
    """One past the last key block that every row sees whole, as far as its right edge goes."""
    g = geometry
    if g.key_padding is not None:
        return torch.zeros_like(low).expand(g.batch, *low.shape[1:])  # any key may be dead
    end = (low + 1).clamp(max=g.kv_len)
    if g.kv_stop is not None:
        end = torch.minimum(end, g.kv_stop.to(low.device, torch.int32)[:, None, None])
    return end // block_n


def _seen_until(high: Tensor, geometry: Geometry, block_n: int) -> Tensor:
    g = geometry
    end = (high + 1).clamp(max=g.kv_len)
    if g.kv_stop is not None:
        end = torch.minimum(end, g.kv_stop.to(high.device, torch.int32)[:, None, None])
    return (end + (block_n - 1)) // block_n


def remembered(
    make: Callable[[Geometry, TileShape, torch.device], T], geometry: Geometry, tiles: TileShape, device: torch.device
) -> T:
    """``make(geometry, tiles, device)``, made once for each geometry that lengths alone decide."""
    if geometry.has_padding or geometry.has_rows:
        return make(geometry, tiles, device)
    return cast("T", _kept_large(make, (geometry, tiles), *_place(device)))


def ramp(
    count: int, device: torch.device, *, start: int = 0, step: int = 1, dtype: torch.dtype = torch.int32
) -> Tensor:
    """``count`` numbers from ``start`` in steps of ``step``, kept for the next call. Not to be written to."""
    return keep(_ramp, (count, start, step, dtype), device)


def _ramp(count: int, start: int, step: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(count, device=device, dtype=dtype) * step + start


def constant(values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """``values`` on the device, kept for the next call. Not to be written to."""
    return keep(_constant, (values, dtype), device)


def _constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Small pageable copies are staged by the driver before the call returns, so this one needs no wait.
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def keep(make: Callable[..., T], arguments: tuple[Hashable, ...], device: torch.device) -> T:
    """``make(*arguments, device)``, kept for the next call with equal arguments."""
    return cast("T", _kept(make, arguments, *_place(device)))


@lru_cache(maxsize=KEPT)
def _kept_large(
    make: Callable[..., object], arguments: tuple[Hashable, ...], device: torch.device, stream: int
) -> object:
    return make(*arguments, device)


@lru_cache(maxsize=16 * KEPT)
def _kept(make: Callable[..., object], arguments: tuple[Hashable, ...], device: torch.device, stream: int) -> object:
    return make(*arguments, device)


def _place(device: torch.device) -> tuple[torch.device, int]:
    """The device by its index and its current stream: what one stream makes, another may not read without waiting."""
    if device.type != "cuda":
        return device, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index), int(torch.cuda.current_stream(index).cuda_stream)
