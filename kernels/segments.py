"""Tokens grouped by modality: what boundaries ``q`` and ``2d`` are built on (MMInference section 3).

Prompts interleave text, images and video in thousands of segments. Nothing here loops over them: a token's place among
its own kind is a prefix sum, and the grouped order is one scatter. All sizes follow from lengths and from the number of
modalities, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from mmi_compile.kernels.frames import TileShape, constant, ramp
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.probe import probe_rows


@dataclass(frozen=True)
class Segments:
    """One prompt, grouped. ``M`` modalities in the order of ``labels``; dead keys (padding) belong to none.

    Attributes:
        labels: the modality ids that are told apart, ascending; ids outside them count as the first.
        group: int32 ``[B, kv_len]``, index into ``labels`` of each key, -1 for a dead key.
        rank: int32 ``[B, kv_len]``, number of earlier keys of the same group.
        seen: int32 ``[B, M, kv_len + 1]``, keys of each group before a position.
        counts: int32 ``[B, M]``, live keys of each group.
        key_start: int32 ``[B, M]``, first slot of each group in ``key_order``, a multiple of ``block_n``.
        key_order: int32 ``[B, SLOTS]``, as ``Plan.key_order``.
        row_order: int32 ``[B, QT * block_m]``, query rows grouped by their own modality, each group filled up to whole
            tiles; -1 in an empty slot. Rows of dead positions are grouped with the first modality.
        tile_group: int32 ``[B, QT]``, index into ``labels`` of the rows of each tile; 0 for an empty tile.
        tail: bool ``[B, QT]``, tiles of ``row_order`` that hold one of the last live query rows of the prompt, those
            that a probe reads.

    All layers of a graph share one grouping: the operator ``mmi::segments`` makes the tensors and ``mmi::attention``
    puts them together again. They depend on the tile shape, which device, dtype and head dim alone decide.
    """

    labels: tuple[int, ...]
    group: Tensor
    rank: Tensor
    seen: Tensor
    counts: Tensor
    key_start: Tensor
    key_order: Tensor
    row_order: Tensor
    tile_group: Tensor
    tail: Tensor

    def tensors(self) -> list[Tensor]:
        """Everything but ``labels``, in the order of the fields."""
        return [getattr(self, name) for name in _TENSORS]

    @classmethod
    def of(cls, labels: tuple[int, ...], tensors: Sequence[Tensor]) -> Segments:
        """What :meth:`tensors` took apart."""
        return cls(labels, *tensors)

    def fits(self, geometry: Geometry, tiles: TileShape) -> bool:
        """Whether this is a grouping for these lengths and tiles, as far as sizes tell."""
        wanted = segment_shapes(geometry.batch, geometry.q_len, geometry.kv_len, len(self.labels), tiles)
        return [tuple(x.shape) for x in self.tensors()] == wanted


_TENSORS = tuple(field.name for field in fields(Segments) if field.name != "labels")


def segment_shapes(batch: int, q_len: int, kv_len: int, modalities: int, tiles: TileShape) -> list[tuple[int, ...]]:
    """Shapes of :meth:`Segments.tensors`; lengths may be symbols."""
    slots = (kv_len // tiles.block_n + modalities) * tiles.block_n
    query_tiles = q_len // tiles.block_m + modalities
    return [
        (batch, kv_len), (batch, kv_len), (batch, modalities, kv_len + 1), (batch, modalities), (batch, modalities),
        (batch, slots), (batch, query_tiles * tiles.block_m), (batch, query_tiles), (batch, query_tiles),
    ]  # fmt: skip


def segment(ids: Tensor, labels: tuple[int, ...], geometry: Geometry, tiles: TileShape) -> Segments:
    """Group the keys and query rows of a prompt.

    Args:
        ids: integers ``[B, kv_len]``, the modality of each key.
        labels: distinct modality ids, ascending, at least one, known on the host.

    Raises:
        ValueError: ``ids`` has another shape, or ``labels`` are empty or not ascending.
    """
    g, device = geometry, ids.device
    if tuple(ids.shape) != (g.batch, g.kv_len):
        raise ValueError(f"modality ids are {tuple(ids.shape)}, must be [B, keys] = [{g.batch}, {g.kv_len}]")
    if not labels or any(a >= b for a, b in pairwise(labels)):
        raise ValueError(f"labels {labels} must be ascending modality ids, at least one")
    member = ids[:, None] == constant(labels, device)[:, None]  # [B, M, kv_len]
    member[:, 0] |= ~member.any(1)
    kind = member.to(torch.int32).argmax(1).to(torch.int32)
    live = g.live_keys(device)
    if live is not None:
        member = member & live[:, None]
    seen = torch.nn.functional.pad(member.cumsum(-1, dtype=torch.int32), (1, 0))
    group = kind if live is None else torch.where(live, kind, -1)
    rank = seen[..., :-1].gather(1, kind[:, None].long())[:, 0]
    counts = seen[..., -1].clone()  # on its own: operators may not return two views of one tensor
    key_start = first_slots(counts, tiles.block_n)
    slots = (g.kv_len // tiles.block_n + len(labels)) * tiles.block_n
    slot = torch.where(group < 0, slots, key_start.gather(1, kind.long()) + rank)
    key_order = _placed(slot, slots)
    row_order, tile_group = _rows(kind, len(labels), g, tiles)
    tail = holds_tail(row_order[:, None], g, tiles.block_m)[:, 0]
    return Segments(labels, group, rank, seen, counts, key_start, key_order, row_order, tile_group, tail)


def holds_tail(order: Tensor, geometry: Geometry, block_m: int) -> Tensor:
    """Which tiles of a row order ``[B, H, QT * block_m]`` hold one of the last live rows, bool ``[B, H, QT]``."""
    last = probe_rows(geometry, order.device)
    if not last.shape[1]:
        return torch.zeros(*order.shape[:2], order.shape[2] // block_m, dtype=torch.bool, device=order.device)
    first, final = last[:, :1, None], last[:, -1:, None]
    tail: Tensor = ((order >= first) & (order <= final)).unflatten(-1, (-1, block_m))
    return tail.any(-1)


def first_slots(counts: Tensor, size: int) -> Tensor:
    """First slot of each group when every group takes whole blocks of ``size`` slots; int32 like ``counts``."""
    taken = (counts + (size - 1)) // size * size
    return taken.cumsum(-1, dtype=torch.int32) - taken


def _placed(slot: Tensor, size: int) -> Tensor:
    """``j`` at place ``slot[b, j]`` of int32 ``[B, size]``, -1 where nothing is; a slot of ``size`` is left out."""
    order = torch.full((slot.shape[0], size + 1), -1, dtype=torch.int32, device=slot.device)
    order.scatter_(1, slot.long(), ramp(slot.shape[1], slot.device).expand_as(slot))
    return order[:, :-1].contiguous()


def _rows(kind: Tensor, modalities: int, geometry: Geometry, tiles: TileShape) -> tuple[Tensor, Tensor]:
    """Row order and the group of each tile. Rows beyond the last key (never visible as keys) go with the first."""
    g, bm, device = geometry, tiles.block_m, kind.device
    mine = kind[:, g.q_offset : g.q_offset + g.q_len]
    mine = torch.nn.functional.pad(mine, (0, g.q_len - mine.shape[1]))
    member = mine[:, None] == ramp(modalities, device)[:, None]
    before = member.cumsum(-1, dtype=torch.int32)
    rank = before.gather(1, mine[:, None].long())[:, 0] - 1
    starts = first_slots(before[..., -1] if g.q_len else before.new_zeros(before.shape[:2]), bm)
    query_tiles = g.q_len // bm + modalities
    order = _placed(starts.gather(1, mine.long()) + rank, query_tiles * bm)
    first = ramp(query_tiles, device, step=bm).expand(g.batch, -1).contiguous()
    # Groups without rows begin where the next one does; the last group that begins at or before a tile owns it.
    owner = torch.searchsorted(starts, first, right=True, out_int32=True) - 1
    return order, torch.where(order.view(g.batch, query_tiles, bm).amax(-1) < 0, 0, owner)
