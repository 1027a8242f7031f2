"""Random valid plans: every combination of loops and masks that the contract in ``kernels/plan.py`` allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.plan import Plan, TileRecord


@dataclass(frozen=True)
class Draw:
    """Random choices on top of one seeded generator."""

    generator: torch.Generator

    def integer(self, low: int, high: int) -> int:
        """Uniform in ``[low, high]``."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def chance(self, probability: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < probability

    def subset(self, count: int, population: int) -> Tensor:
        """Sorted ``count`` of ``range(population)``."""
        return torch.randperm(population, generator=self.generator)[:count].sort().values


def random_geometry(draw: Draw, *, max_len: int = 80) -> Geometry:
    """Ragged lengths, an offset, padding on either side, holes, a sliding window, GQA: each in some of the draws."""
    # At most eight query heads in all: the interpreter runs one program after the other.
    batch, kv_heads, group = [(1, 1, 1), (1, 1, 8), (1, 2, 2), (2, 1, 3), (2, 2, 1), (2, 2, 2)][draw.integer(0, 5)]
    q_len = draw.integer(1, max_len)
    q_offset = draw.integer(1, max_len // 2) if draw.chance(0.3) else 0
    kv_len = q_len + q_offset
    if draw.chance(0.15):
        kv_len = draw.integer(1, kv_len)
    window = draw.integer(1, max_len) if draw.chance(0.3) else 0
    kv_start = kv_stop = key_padding = None
    if draw.chance(0.3):
        kv_start = torch.tensor([draw.integer(0, kv_len) for _ in range(batch)], dtype=torch.int32)
        kv_stop = torch.tensor([draw.integer(int(start), kv_len) for start in kv_start], dtype=torch.int32)
    if draw.chance(0.2):
        key_padding = torch.rand(batch, kv_len, generator=draw.generator) < 0.7
    return Geometry(batch, kv_heads * group, kv_heads, q_len, kv_len, q_offset, window, kv_start, kv_stop, key_padding)


def random_plan(seed: int, *, block_m: int = 16, block_n: int = 16, max_len: int = 80) -> Plan:
    """A valid plan that depends on the seed alone. Entries that no tile uses hold garbage, as they may on a device."""
    draw = Draw(torch.Generator().manual_seed(seed))
    g = random_geometry(draw, max_len=max_len)
    row_order, tiles = _row_order(draw, g, block_m) if draw.chance(0.5) else (None, -(-g.q_len // block_m))
    first = _first_positions(g, row_order, tiles, block_m) // block_n
    most_blocks = draw.integer(1, 4) if draw.chance(0.6) else 0
    most_sinks = draw.integer(1, 3) if draw.chance(0.5) else 0
    max_columns = draw.integer(1, 3 * block_n) if draw.chance(0.6) else 0
    dense = draw.chance(0.2)
    columns = torch.full((g.batch, g.q_heads, max_columns), g.kv_len, dtype=torch.int32)
    records = torch.zeros(g.batch, g.q_heads, tiles, len(TileRecord._fields), dtype=torch.int32)
    store = _Lists(draw, -(-g.kv_len // block_n), most_blocks)
    for b in range(g.batch):
        for h in range(g.q_heads):
            sink_start = draw.integer(0, 1) if most_sinks else 0
            sink_stop = sink_start + draw.integer(0, most_sinks)
            free = max(0, g.kv_len - sink_stop * block_n)  # columns stand right of the sinks
            lines = draw.subset(draw.integer(0, min(max_columns, free)), free) + sink_stop * block_n
            columns[b, h, : len(lines)] = lines.int()
            shared = store.share() if most_blocks and draw.chance(0.5) else None
            for t in range(tiles):
                window = 0 if dense else draw.integer(0, int(first[b, h, t]))
                stop = min(sink_stop, window, store.key_blocks)
                begin = min(sink_start, stop)
                # Blocks and columns exist only where there are keys, also when the window starts beyond them.
                listed = store.own(stop, window) if shared is None else shared.part(int(first[b, h, t]), stop, window)
                used = draw.integer(0, int((lines < window * block_n).sum()))
                records[b, h, t] = torch.tensor([window, begin, stop, *listed[:3], used, listed[3]])
    meet = most_blocks > 0 and max_columns > 0
    return Plan(
        g, block_m, block_n, records, torch.tensor(store.entries, dtype=torch.int32), columns,
        has_sinks=most_sinks > 0, row_order=row_order,
        list_bits=torch.tensor(store.words, dtype=torch.int32) if meet else None,
    )  # fmt: skip


class _Lists:
    """Grows ``Plan.lists`` and ``Plan.list_bits``; between what tiles use there is garbage."""

    def __init__(self, draw: Draw, key_blocks: int, most: int) -> None:
        self.draw, self.key_blocks, self.most = draw, key_blocks, most
        self.entries: list[int] = [10_000] if most else []
        self.words: list[int] = [-1]

    def own(self, stop: int, window: int) -> tuple[int, int, int, int]:
        """A list of one tile's own: number of blocks, list_start, list_base, bits_start."""
        room = max(0, min(window, self.key_blocks) - stop)
        blocks = (self.draw.subset(self.draw.integer(0, min(self.most, room)), room) + stop).tolist()
        noise = [n for n in range(self.key_blocks) if not stop <= n < window and self.draw.chance(0.5)]
        return (len(blocks), self._append(blocks), 0, self._append_bits([*blocks, *noise]))

    def share(self) -> _Shared:
        """A list for all tiles of a head."""
        offsets = self.draw.subset(self.draw.integer(0, min(2 * self.most, self.key_blocks)), self.key_blocks + 2)
        entries = sorted(-int(offset) for offset in offsets)
        return _Shared(entries, self._append(entries), self._append_bits([-e for e in entries]), self.key_blocks)

    def _append(self, entries: list[int]) -> int:
        start = len(self.entries)
        self.entries += [*entries, 10_000]
        return start

    def _append_bits(self, numbers: list[int]) -> int:
        start = len(self.words)
        words = [0] * (-(-(self.key_blocks + 2) // 32))
        for n in set(numbers):
            words[n // 32] |= 1 << (n % 32)
        # The value that has these bits in two's complement; then a word of garbage.
        self.words += [word - (1 << 32) if word >> 31 else word for word in words] + [-1]
        return start


@dataclass(frozen=True)
class _Shared:
    """A list of negative block offsets: where it starts, where its bits start."""

    entries: list[int]
    start: int
    bits_start: int
    key_blocks: int

    def part(self, base: int, stop: int, window: int) -> tuple[int, int, int, int]:
        """What a tile whose own block is ``base`` lists of it: number of blocks, list_start, list_base, bits_start."""
        inside = [i for i, e in enumerate(self.entries) if stop <= base + e < min(window, self.key_blocks)]
        return (len(inside), self.start + (inside[0] if inside else 0), base, self.bits_start)


def _row_order(draw: Draw, g: Geometry, block_m: int) -> tuple[Tensor, int]:
    """Rows of every head spread over more slots than rows: sorted groups, single rows, empty slots, empty tiles."""
    tiles = -(-g.q_len // block_m) + draw.integer(0, 2)
    order = torch.full((g.batch, g.q_heads, tiles * block_m), -1, dtype=torch.int32)
    stride = draw.integer(1, 5)
    for b in range(g.batch):
        for h in range(g.q_heads):
            rows = torch.randperm(g.q_len, generator=draw.generator)
            if draw.chance(0.5):
                rows = rows[rows.argsort(stable=True)]
                rows = rows[(rows % stride).argsort(stable=True)]
            slots = draw.subset(g.q_len, tiles * block_m)
            order[b, h, slots] = rows.int()
    return order, tiles


def _first_positions(g: Geometry, row_order: Tensor | None, tiles: int, block_m: int) -> Tensor:
    """Smallest position in each tile, ``[B, HQ, QT]``; 0 for an empty tile."""
    if row_order is None:
        first = torch.arange(tiles) * block_m + g.q_offset
        return first.expand(g.batch, g.q_heads, tiles)
    rows = row_order.view(g.batch, g.q_heads, tiles, block_m).long()
    first = torch.where(rows < 0, g.q_len, rows).amin(-1) + g.q_offset
    return torch.where(rows.amax(-1) < 0, 0, first)


def random_qkv(seed: int, g: Geometry, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v on the CPU; q (and sometimes k, v) is the transposed view that models pass."""
    generator = torch.Generator().manual_seed(seed + 1)

    def tokens(heads: int, length: int, transposed: bool) -> Tensor:
        if transposed:
            return torch.randn(g.batch, length, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
        return torch.randn(g.batch, heads, length, head_dim, generator=generator).to(dtype)

    return (
        tokens(g.q_heads, g.q_len, True),
        tokens(g.kv_heads, g.kv_len, seed % 2 == 0),
        tokens(g.kv_heads, g.kv_len, seed % 3 == 0),
    )


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention over ``mask`` bool ``[B, HQ, Q, KV]`` in float64; a row without any pair is zero."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    scores = (q.double() @ k.mT * scale).masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v
