"""Random valid plans: every combination of loops and masks that the contract in ``kernels/plan.py`` allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.plan import RECORD, Plan


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


def random_geometry(draw: Draw, *, max_len: int = 80, intervals: bool = False) -> Geometry:
    """Ragged lengths, an offset, padding on either side, holes, a sliding window, GQA: each in some of the draws.

    With ``intervals`` some rows have one of their own.
    """
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
    row_start = row_stop = None
    if intervals and draw.chance(0.4):
        window = 0
        row_start, row_stop = random_intervals(draw, batch, q_len, kv_len)
    return Geometry(
        batch, kv_heads * group, kv_heads, q_len, kv_len, q_offset, window, kv_start, kv_stop, key_padding, row_start,
        row_stop,
    )  # fmt: skip


def random_intervals(draw: Draw, batch: int, q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
    """First key of every row and one past its last, int32 ``[B, q_len]``: steps of many rows, and noise; some empty."""
    step = draw.integer(1, q_len)
    edges = torch.randint(0, kv_len + 1, (2, batch, q_len // step + 1), generator=draw.generator)
    edges = edges.repeat_interleave(step, -1)[..., :q_len].sort(0).values
    noise = torch.randint(0, draw.integer(1, 4), (batch, q_len), generator=draw.generator)
    return (edges[0] + noise).clamp(max=kv_len).int(), edges[1].int()


def random_plan(
    seed: int, *, block_m: int = 16, block_n: int = 16, max_len: int = 80, regions: bool = True, intervals: bool = False
) -> Plan:
    """A valid plan that depends on the seed alone. Entries that no tile uses hold garbage, as they may on a device.

    Args:
        regions: whether some plans may have several regions and keys grouped by modality.
        intervals: whether rows of some plans may have intervals of keys of their own.
    """
    draw = Draw(torch.Generator().manual_seed(seed))
    g = random_geometry(draw, max_len=max_len, intervals=intervals)
    row_order, tiles = _row_order(draw, g, block_m) if draw.chance(0.5) else (None, -(-g.q_len // block_m))
    groups = _Groups.draw(draw, g, block_n) if regions and draw.chance(0.4) else None
    spaces = _Spaces(g, groups, block_n)
    most_blocks = draw.integer(1, 4) if draw.chance(0.6) else 0
    most_sinks = draw.integer(1, 3) if draw.chance(0.5) else 0
    max_columns = draw.integer(1, 3 * block_n) if draw.chance(0.6) else 0
    dense = draw.chance(0.2)
    count = 1 if groups is None else len(groups.spans[0])
    columns = torch.full((g.batch, g.q_heads, max_columns), g.kv_len, dtype=torch.int32)
    column_slots = columns.clone()
    records = torch.zeros(g.batch, g.q_heads, tiles, count, RECORD, dtype=torch.int32)
    store = _Lists(draw, spaces.blocks, most_blocks)
    for b in range(g.batch):
        for h in range(g.q_heads):
            grouped = groups is not None and draw.chance(0.7)
            used = 0
            for r in range(count if grouped else 1):
                low, high = groups.spans[b][r] if groups is not None and grouped else (0, spaces.ordered_blocks)
                sink_start = low + (draw.integer(0, 1) if most_sinks else 0)
                sink_stop = min(high, sink_start + draw.integer(0, most_sinks))
                sink_start = min(sink_start, sink_stop)
                lines = spaces.columns(draw, b, grouped, sink_stop, high, max_columns - used)
                columns[b, h, used : used + len(lines)] = spaces.position[b][int(grouped)][lines].int()
                column_slots[b, h, used : used + len(lines)] = lines.int()
                shared = store.share() if most_blocks and draw.chance(0.5) else None
                for t in range(tiles):
                    rows = _rows_of_tile(row_order, g, b, h, t, block_m)
                    window = spaces.window(draw, b, grouped, low, high, rows, dense)
                    stop = min(sink_stop, window[0])
                    # Blocks and columns exist only where there are keys, also when the window starts beyond them.
                    own = max(low, window[2])
                    listed = store.own(stop, window[0]) if shared is None else shared.part(own, stop, window[0])
                    inside = draw.integer(0, int((lines < window[0] * block_n).sum()))
                    sinks = (min(sink_start, stop), stop)
                    record = [*window, *sinks, *listed[:3], inside, used, listed[3], int(grouped)]
                    records[b, h, t, r] = torch.tensor(record)
                used += len(lines)
    meet = most_blocks > 0 and max_columns > 0
    return Plan(
        g, block_m, block_n, records, torch.tensor(store.entries, dtype=torch.int32), columns,
        has_sinks=most_sinks > 0, row_order=row_order,
        list_bits=torch.tensor(store.words, dtype=torch.int32) if meet else None,
        key_order=None if groups is None else groups.order,
        column_slots=column_slots if groups is not None else None,
    )  # fmt: skip


@dataclass(frozen=True)
class _Groups:
    """Keys grouped by a random modality: ``order [B, SLOTS]``, and the block range of every group, by batch element."""

    order: Tensor
    spans: list[list[tuple[int, int]]]

    @classmethod
    def draw(cls, draw: Draw, g: Geometry, block_n: int) -> _Groups:
        count = draw.integer(1, 3)
        live = g.live_keys("cpu")
        rows: list[list[int]] = []
        spans: list[list[tuple[int, int]]] = []
        for b in range(g.batch):
            keys = torch.arange(g.kv_len)
            step = draw.integer(1, 20)
            modality = torch.randint(0, count, (g.kv_len // step + 1,), generator=draw.generator)[keys // step]
            slots: list[int] = []
            spans.append([])
            for m in range(count):
                mine = keys[(modality == m) & (live[b] if live is not None else True)].tolist()
                begin = len(slots) // block_n
                slots += mine + [-1] * (-len(mine) % block_n)
                spans[-1].append((begin, len(slots) // block_n))
            rows.append(slots)
        size = max(block_n, *map(len, rows))
        order = torch.full((g.batch, size), -1, dtype=torch.int32)
        for b, slots in enumerate(rows):
            order[b, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
        return cls(order, spans)


class _Spaces:
    """Positions of the slots of both key spaces, and what a tile may visit of them."""

    def __init__(self, g: Geometry, groups: _Groups | None, block_n: int) -> None:
        self.block_n = block_n
        self.mask = g.to_mask()
        self.ordered_blocks = -(-g.kv_len // block_n)
        ordered = torch.full((self.ordered_blocks * block_n,), -1)
        ordered[: g.kv_len] = torch.arange(g.kv_len)
        self.position = [[ordered] + ([groups.order[b].long()] if groups is not None else []) for b in range(g.batch)]
        self.blocks = max(self.ordered_blocks, 0 if groups is None else groups.order.shape[-1] // block_n)
        self.offset = g.q_offset

    def columns(self, draw: Draw, b: int, grouped: bool, low: int, high: int, most: int) -> Tensor:
        """Random slots that hold keys, ascending, in blocks ``low ... high - 1``."""
        slots = torch.arange(low * self.block_n, max(low, high) * self.block_n)
        slots = slots[self.position[b][int(grouped)][slots] >= 0]
        return slots[draw.subset(draw.integer(0, min(most, len(slots))), len(slots))]

    def window(
        self, draw: Draw, b: int, grouped: bool, low: int, high: int, rows: Tensor, dense: bool
    ) -> tuple[int, int, int, int]:
        """``window_start, window_left, window_full, window_stop`` in blocks of a group ``low ... high - 1``."""
        if not len(rows) or low >= high:
            return (low,) * 4
        first, last = int(rows.min()) + self.offset, int(rows.max()) + self.offset
        position = self.position[b][int(grouped)].view(-1, self.block_n)[low:high]
        causal = ((position >= 0) & (position <= first)).all(1).int().cumprod(0)
        seen = ((position >= 0) & (position <= last)).any(1)
        stop = low + int(seen.nonzero().max() + 1 if seen.any() else 0)
        full = low + int(causal.sum())  # blocks left of it are causal for every row
        start = low if dense else draw.integer(low, full)
        stop = max(start, stop)
        allowed = (self.mask[b][rows][:, position.clamp(min=0)] & (position >= 0)).all(0).all(1)
        left, right = _longest_run([n for n in range(start, stop) if allowed[n - low]], start)
        return start, left, right, stop


def _longest_run(numbers: list[int], default: int) -> tuple[int, int]:
    """The longest run of consecutive ``numbers``, as a half-open range."""
    best = (default, default)
    for begin in numbers:
        end = begin
        while end in numbers:
            end += 1
        best = max(best, (begin, end), key=lambda run: run[1] - run[0])
    return best


def _rows_of_tile(row_order: Tensor | None, g: Geometry, b: int, h: int, tile: int, block_m: int) -> Tensor:
    if row_order is None:
        return torch.arange(tile * block_m, min((tile + 1) * block_m, g.q_len))
    rows = row_order[b, h, tile * block_m : (tile + 1) * block_m].long()
    return rows[rows >= 0]


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


def check_contract(plan: Plan) -> None:
    """What ``TileRecord`` promises and kernels rely on: a broken promise may make them wait for ever."""
    r = plan.record
    assert bool((r.window_start >= 0).all())
    assert bool((r.window_start <= r.window_left).all())
    assert bool((r.window_left <= r.window_full).all())
    assert bool((r.window_full <= r.window_stop).all())
    assert bool((r.sink_start <= r.sink_stop).all())
    assert bool((r.sink_stop <= r.window_start).all())
    assert bool((r.sink_start == r.sink_stop).all()) or plan.has_sinks
    for count in (r.num_blocks, r.num_columns, r.column_start):
        assert bool((count >= 0).all())
    assert bool((r.column_start + r.num_columns <= plan.columns.shape[-1]).all())
    listed = r.num_blocks > 0
    assert bool((r.list_start[listed] >= 0).all())
    assert bool(((r.list_start + r.num_blocks)[listed] <= plan.lists.numel()).all())
    assert bool(((r.grouped == 0) | (r.grouped == 1)).all())
    assert plan.key_order is not None or not bool(r.grouped.any())
