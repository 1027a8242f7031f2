"""From patterns to a plan, in two steps that never wait for the device.

1. ``estimate_rules``: each head's pattern, and what the probe says about it, become ``HeadRules``: one form for all
   patterns, in tokens. It is the exact meaning of a pattern on one input.
2. ``lower_rules``: rules become the tiles of a ``Plan``: local windows become ``window_start``, sinks and diagonals
   listed blocks, key lines columns, query lines a row order with dense tiles.

The law (section 2 of the design): ``rules and model mask <= plan.to_mask() <= model mask``, every live row non-empty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import Dense, Grid, Pattern, TriShape, VerticalSlash
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.probe import last_live_position, run_probe

MIN_STRIDE = 16
"""Smallest stride that is estimated: below it a grid keeps more than 1/16 of all keys and is no longer sparse."""

FORCED_COLUMNS, FORCED_DISTANCES = 30, 100
"""First columns and nearest diagonals that vertical-slash always keeps (MInference), as far as its counts allow."""

MAX_LISTED = 512
"""Key blocks a tile may list; a tile that needs more becomes dense."""

FOURIER_CHUNK = 32 << 20
"""Values that are Fourier transformed at a time."""

LIST_CHUNK = 32 << 20
"""Entries of block lists that are filled at a time (8 bytes each while they are)."""


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
class HeadRules:
    """What every head keeps, in tokens, before the model's own mask is met.

    Pair ``(i, j)`` of head ``h`` is kept when ``j`` is one of the first ``sink`` keys from the first live one, or
    ``i - j < local``, or ``columns[j]``, or ``distances[i - j]``, or row ``i`` is one of the ``last`` live rows, or
    ``query_lines[i]``.

    Attributes:
        sink, local, last: int64 ``[B, HQ]``; sink_cap: the largest sink.
        columns: bool ``[B, HQ, kv_len]`` or None; column_cap: the most columns a head can have.
        distances: bool ``[B, HQ, q_len + q_offset]`` or None; distance_cap: the most diagonals a head can have.
        query_lines: bool ``[B, HQ, q_len]`` or None; line_gap: fewest rows from one query line to the next.
    """

    sink: Tensor
    local: Tensor
    last: Tensor
    columns: Tensor | None = None
    distances: Tensor | None = None
    query_lines: Tensor | None = None
    sink_cap: int = 0
    column_cap: int = 0
    distance_cap: int = 0
    line_gap: int = 1

    def to_mask(self, geometry: Geometry) -> Tensor:
        """The kept pairs that the model allows, bool ``[B, HQ, q_len, kv_len]``. Quadratic: for tests."""
        g, device = geometry, self.sink.device
        i = torch.arange(g.q_len, device=device)[:, None] + g.q_offset
        j = torch.arange(g.kv_len, device=device)
        origin = first_live_key(g, device)[:, None, None, None]
        end = last_live_position(g, device)[:, None, None, None]
        keep = (j < origin + self.sink[..., None, None]) | (i - j < self.local[..., None, None])
        keep = keep | ((i >= end - self.last[..., None, None]) & (i < end))
        if self.columns is not None:
            keep = keep | self.columns[:, :, None, :]
        if self.distances is not None:
            keep = keep | self.distances[..., (i - j).clamp(min=0)]
        if self.query_lines is not None:
            keep = keep | self.query_lines[..., None]
        return keep & g.to_mask(device)[:, None]


def first_live_key(geometry: Geometry, device: torch.device) -> Tensor:
    """The first live key, int64 ``[B]``; ``kv_len`` where no key is live."""
    if geometry.key_padding is not None:
        j = torch.arange(geometry.kv_len, device=device)
        live = geometry.key_padding.to(device)
        if geometry.kv_start is not None:
            live = live & (j >= geometry.kv_start.to(device)[:, None])
        return torch.where(live, j, geometry.kv_len).amin(-1)
    if geometry.kv_start is not None:
        return geometry.kv_start.to(device, torch.int64)
    return torch.zeros(geometry.batch, dtype=torch.int64, device=device)


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
    """The plan of the model's own mask: every tile is a window over all keys that its rows may see."""
    ones = torch.ones(geometry.batch, geometry.q_heads, dtype=torch.int64, device=device)
    everything = max(1, geometry.q_len + geometry.q_offset)
    return lower_rules(HeadRules(ones * 0, ones * everything, ones * 0), geometry, tiles)


# ---------------------------------------------------------------------------------------------------------------------
# Patterns to rules


def estimate_rules(
    patterns: Sequence[Pattern], q: Tensor, k: Tensor, geometry: Geometry, scale: float, tiles: TileShape
) -> HeadRules:
    """Rules of every head, with columns, diagonals, strides and phases taken from one probe of the heads that need it.

    Needs ``q_len >= 1`` and ``kv_len >= 1``; see ``build_plan`` for the arguments.
    """
    g, device = geometry, q.device
    if len(patterns) != g.q_heads:
        raise ValueError(f"got {len(patterns)} patterns for {g.q_heads} query heads; give one pattern per query head")
    everything = g.q_len + g.q_offset
    sinks = _per_head([getattr(p, "sink", 0) for p in patterns], g, device)
    local = _per_head([everything if isinstance(p, Dense) else getattr(p, "local", 1) for p in patterns], g, device)
    last = _per_head([p.last if isinstance(p, TriShape) else 0 for p in patterns], g, device)
    rules = HeadRules(sinks, local, last, sink_cap=min(everything, max(getattr(p, "sink", 0) for p in patterns)))
    probed = [h for h, p in enumerate(patterns) if isinstance(p, (VerticalSlash, Grid))]
    if not probed:
        return rules
    probe = run_probe(q, k, g, scale, block_m=tiles.block_m, heads=probed)
    columns = torch.zeros(g.batch, g.q_heads, g.kv_len, dtype=torch.bool, device=device)
    kept = [p for p in patterns if isinstance(p, (VerticalSlash, Grid))]
    slashes = any(isinstance(p, VerticalSlash) or p.same_phase for p in kept)
    lines = any(isinstance(p, Grid) and p.query_lines for p in kept)
    distances = torch.zeros(g.batch, g.q_heads, everything, dtype=torch.bool, device=device) if slashes else None
    rows = torch.zeros(g.batch, g.q_heads, g.q_len, dtype=torch.bool, device=device) if lines else None
    for pattern in dict.fromkeys(kept):
        heads = [h for h in probed if patterns[h] == pattern]
        slots = [probed.index(h) for h in heads]
        mass = _take(probe.columns, slots)
        if isinstance(pattern, VerticalSlash):
            _put(columns, heads, _heaviest(mass, pattern.n_vertical, FORCED_COLUMNS))
            assert distances is not None
            _put(distances, heads, _heaviest(_take(probe.distances, slots), pattern.n_slash, FORCED_DISTANCES))
        else:
            _grid_rules(pattern, heads, mass, columns, distances, rows, g)
    return dataclasses.replace(
        rules,
        columns=columns,
        distances=distances,
        query_lines=rows,
        column_cap=min(g.kv_len, max(_column_cap(p, g) for p in kept)),
        distance_cap=min(everything, max(_distance_cap(p, g) for p in kept)),
        line_gap=min([p.stride or MIN_STRIDE for p in kept if isinstance(p, Grid)], default=1),
    )


def _grid_rules(
    pattern: Grid,
    heads: list[int],
    mass: Tensor,
    columns: Tensor,
    distances: Tensor | None,
    rows: Tensor | None,
    geometry: Geometry,
) -> None:
    """Write the lines of one grid pattern into the rules of its heads."""
    device = mass.device
    if pattern.stride is None:
        stride = autocorrelation_stride(mass)
    else:
        stride = torch.full(mass.shape[:2], pattern.stride, dtype=torch.int64, device=device)
    phase, _ = best_phase(mass, stride)
    _put(columns, heads, _lines(stride, phase, geometry.kv_len, 0))
    if pattern.query_lines and rows is not None:
        _put(rows, heads, _lines(stride, phase, geometry.q_len, geometry.q_offset))
    if pattern.same_phase and distances is not None:
        _put(distances, heads, _lines(stride, torch.zeros_like(phase), distances.shape[-1], 0))


def _lines(stride: Tensor, phase: Tensor, length: int, offset: int) -> Tensor:
    positions = torch.arange(offset, offset + length, device=stride.device)
    return positions % stride[..., None] == phase[..., None]


def _column_cap(pattern: VerticalSlash | Grid, geometry: Geometry) -> int:
    if isinstance(pattern, VerticalSlash):
        return pattern.n_vertical
    return -(-geometry.kv_len // (pattern.stride or MIN_STRIDE))


def _distance_cap(pattern: VerticalSlash | Grid, geometry: Geometry) -> int:
    if isinstance(pattern, VerticalSlash):
        return pattern.n_slash
    return -(-(geometry.q_len + geometry.q_offset) // (pattern.stride or MIN_STRIDE)) if pattern.same_phase else 0


def _per_head(values: list[int], geometry: Geometry, device: torch.device) -> Tensor:
    # Small pageable copies are staged by the driver before the call returns, so this one needs no wait.
    host = torch.tensor(values, dtype=torch.int64).clamp(max=geometry.q_len + geometry.q_offset)
    return host.to(device, non_blocking=True).expand(geometry.batch, -1)


def _take(x: Tensor, heads: list[int]) -> Tensor:
    """``x[:, heads]`` by slices: an index list would be copied to the device with a wait."""
    return torch.stack([x[:, h] for h in heads], 1)


def _put(target: Tensor, heads: list[int], source: Tensor) -> None:
    for slot, head in enumerate(heads):
        target[:, head] = source[:, slot]


def _heaviest(mass: Tensor, count: int, forced: int) -> Tensor:
    """The ``count`` entries of the last dimension with the most mass, the first ones forced in; bool like ``mass``."""
    count = min(count, mass.shape[-1])
    first = torch.arange(mass.shape[-1], device=mass.device) < min(forced, -(-count // 2))
    chosen = mass.masked_fill(first, torch.inf).topk(count, -1, sorted=False).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, chosen, True)


def best_phase(mass: Tensor, stride: Tensor) -> tuple[Tensor, Tensor]:
    """Fold column mass modulo a stride: the heaviest phase and its mass, both ``[B, H]``.

    Args:
        mass: float ``[B, H, N]``; stride: int64 ``[B, H]``, at least 1.
    """
    residue = torch.arange(mass.shape[-1], device=mass.device) % stride[..., None]
    folded = torch.zeros_like(mass).scatter_add_(-1, residue, mass)
    best = folded.max(-1)
    return best.indices, best.values


def autocorrelation_stride(mass: Tensor) -> Tensor:
    """The distance from ``MIN_STRIDE`` to a quarter of the length at which columns repeat best, int64 ``[B, H]``.

    The square root keeps one heavy column from drowning many even ones.
    """
    length = mass.shape[-1]
    size = 1 << (2 * length - 1).bit_length()
    longest = max(MIN_STRIDE, length // 4)
    lag = torch.arange(length, device=mass.device)
    outside = (lag < MIN_STRIDE) | (lag > longest)
    best = []
    for part in mass.split(max(1, FOURIER_CHUNK // size), 1):
        signal = part.float().sqrt()
        power = torch.fft.rfft(signal - signal.mean(-1, keepdim=True), n=size)
        repeats: Tensor = torch.fft.irfft(power * power.conj(), n=size)[..., :length]
        best.append(repeats.masked_fill(outside, -torch.inf).argmax(-1))
    return torch.cat(best, 1).clamp(MIN_STRIDE, longest)


# ---------------------------------------------------------------------------------------------------------------------
# Rules to plan


@dataclass(frozen=True)
class _Tiles:
    """Facts of every query tile: smallest and largest position ``[1 or B, 1 or HQ, QT]`` and the rows in its slots."""

    low: Tensor
    high: Tensor
    row_order: Tensor | None
    dense: Tensor | None
    span: int


@dataclass(frozen=True)
class _Diagonals:
    """Block offsets ``first block of the tile - listed block`` of every head.

    ``offsets`` int32 ``[B, HQ, CAP]`` descending; ``count[..., x]`` int64 ``[B, HQ, X]`` of offsets up to ``x``.
    """

    offsets: Tensor
    count: Tensor


def lower_rules(rules: HeadRules, geometry: Geometry, tiles: TileShape) -> Plan:
    """The plan that covers ``rules``: the smallest superset made of whole listed blocks, windows and columns.

    Tiles that would list more than ``MAX_LISTED`` key blocks become dense.
    """
    g, bn, device = geometry, tiles.block_n, rules.sink.device
    shape = (g.batch, g.q_heads, -(-g.q_len // tiles.block_m))
    facts = _tile_facts(rules, g, tiles)
    origin = first_live_key(g, device)[:, None, None]
    first = _first_visible(facts.low, origin, g) // bn  # blocks left of it hold nothing for the tile
    latest = _latest_window_start(facts, origin, g, bn)
    near = (facts.low - rules.local[..., None] + 1).clamp(min=0) // bn
    end = last_live_position(g, device)[:, None, None]
    is_last = (facts.high >= end - rules.last[..., None]) & (facts.low < end) & (rules.last[..., None] > 0)
    near = near.masked_fill(is_last if facts.dense is None else is_last | facts.dense, 0)
    window_start = torch.minimum(torch.maximum(near, first), latest).expand(shape)
    sink_end = torch.where(rules.sink > 0, (origin[..., 0] + rules.sink - 1) // bn + 1, 0)[..., None]
    diagonals = None if rules.distances is None else _block_diagonals(rules.distances, g, tiles, facts, rules)
    sink_blocks = min(-(-g.kv_len // bn), (rules.sink_cap - 1) // bn + 2 if rules.sink_cap else 0)
    first, base = first.expand(shape), (facts.low // bn).expand(shape)
    num_blocks, block_indices, too_long = _list_blocks(
        first, sink_end.expand(shape), window_start, base, diagonals, sink_blocks
    )
    window_start = torch.where(too_long, torch.minimum(first, window_start), window_start)
    num_blocks = num_blocks.masked_fill(too_long, 0)
    num_columns, columns = _columns(rules, sink_end, window_start, g, bn)
    bits = None
    if diagonals is not None and columns.shape[-1] and block_indices.shape[-1]:
        bits = _block_bits(num_blocks, block_indices, -(-g.kv_len // bn))
    return Plan(
        geometry=g,
        block_m=tiles.block_m,
        block_n=bn,
        window_start=window_start.int().contiguous(),
        num_blocks=num_blocks.int().contiguous(),
        block_indices=block_indices,
        num_columns=num_columns.int().contiguous(),
        columns=columns,
        row_order=facts.row_order,
        block_bits=bits,
    )


def make_dense(plan: Plan, which: Tensor) -> Plan:
    """The plan with the tiles of ``which`` (bool, broadcastable to ``[B, HQ, QT]``) turned into dense windows."""
    g = plan.geometry
    facts = _rows_of(plan)
    origin = first_live_key(g, plan.window_start.device)[:, None, None]
    first = _first_visible(facts.low, origin, g) // plan.block_n
    start = torch.minimum(first, plan.window_start).int()
    bits = plan.block_bits
    return dataclasses.replace(
        plan,
        window_start=torch.where(which, start, plan.window_start),
        num_blocks=plan.num_blocks.masked_fill(which, 0),
        num_columns=plan.num_columns.masked_fill(which, 0),
        block_bits=None if bits is None else bits.masked_fill(which[..., None], 0),
    )


def _tile_facts(rules: HeadRules, geometry: Geometry, tiles: TileShape) -> _Tiles:
    if rules.query_lines is None:
        low, high = _in_order(geometry, tiles.block_m, rules.sink.device)
        return _Tiles(low, high, None, None, tiles.block_m)
    order, low, high, dense = _lines_first(rules.query_lines, geometry, tiles.block_m)
    gap = max(2, rules.line_gap)
    return _Tiles(low, high, order, dense, tiles.block_m + tiles.block_m // (gap - 1) + 2)


def _in_order(geometry: Geometry, block_m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    low = torch.arange(0, geometry.q_len, block_m, device=device) + geometry.q_offset
    high = (low + block_m - 1).clamp(max=geometry.q_len + geometry.q_offset - 1)
    return low[None, None], high[None, None]


def _rows_of(plan: Plan) -> _Tiles:
    if plan.row_order is None:
        low, high = _in_order(plan.geometry, plan.block_m, plan.window_start.device)
        return _Tiles(low, high, None, None, plan.block_m)
    low, high = _slot_range(plan.row_order, plan.geometry, plan.block_m)
    return _Tiles(low, high, plan.row_order, None, 0)


def _slot_range(order: Tensor, geometry: Geometry, block_m: int) -> tuple[Tensor, Tensor]:
    rows = order.view(*order.shape[:2], -1, block_m).long()
    low = torch.where(rows < 0, geometry.q_len, rows).amin(-1) + geometry.q_offset
    return low, rows.amax(-1) + geometry.q_offset


def _lines_first(lines: Tensor, geometry: Geometry, block_m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row order with the query lines in front, the positions of its tiles and which of them hold a query line."""
    g = geometry
    count = lines.long().cumsum(-1)
    total = count[..., -1:]
    rows = torch.arange(g.q_len, device=lines.device)
    slot = torch.where(lines, count - 1, total + rows - count)  # a row's place: rank among its own kind
    query_tiles = -(-g.q_len // block_m)
    order = torch.full((g.batch, g.q_heads, query_tiles * block_m), -1, dtype=torch.int32, device=lines.device)
    order.scatter_(-1, slot, rows.int().expand_as(slot))
    low, high = _slot_range(order, g, block_m)
    return order, low, high, torch.arange(query_tiles, device=lines.device) * block_m < total


def _first_visible(low: Tensor, origin: Tensor, geometry: Geometry) -> Tensor:
    """The first key that some row of the tile may see (tokens)."""
    if geometry.window:
        origin = torch.maximum(origin, low - geometry.window + 1)
    return torch.minimum(origin.clamp(min=0), low)


def _latest_window_start(facts: _Tiles, origin: Tensor, geometry: Geometry, block_n: int) -> Tensor:
    """The last block at which a window may start and still hold the nearest live key of every live row.

    Padding may hide a row's own key; the nearest live key to its left then keeps the row from being empty. It only
    grows with the position, so the first live row of the tile decides.
    """
    g = geometry
    position = torch.maximum(facts.low, origin).clamp(max=g.kv_len - 1)
    nearest = position
    if g.kv_stop is not None:
        nearest = torch.minimum(nearest, g.kv_stop.to(nearest.device, torch.int64)[:, None, None] - 1)
    if g.key_padding is not None:
        j = torch.arange(g.kv_len, device=nearest.device)
        latest = torch.where(g.key_padding.to(nearest.device), j, 0).cummax(-1).values  # [B, kv_len]
        nearest = nearest.expand(g.batch, *nearest.shape[1:])
        nearest = latest.gather(-1, nearest.clamp(min=0).flatten(1)).view_as(nearest)
    return torch.minimum(nearest.clamp(min=0), facts.low) // block_n


def _block_diagonals(
    distances: Tensor, geometry: Geometry, tiles: TileShape, facts: _Tiles, rules: HeadRules
) -> _Diagonals:
    """Which block offsets the diagonals of each head need.

    A tile whose positions start at ``c`` inside a key block and span ``span`` rows meets distance ``d`` in the blocks
    at offsets ``ceil((d - c - span + 1) / block_n) ... ceil((d - c) / block_n)`` from its own. When every tile has the
    same ``c`` the list is exact, else it covers every ``c``. Offsets are counted from prefix sums: no loop over ``d``.
    """
    bn = tiles.block_n
    aligned = facts.row_order is None and tiles.block_m % bn == 0
    least, most = (geometry.q_offset % bn,) * 2 if aligned else (0, bn - 1)
    positions = distances.shape[-1]
    size = positions // bn + 2
    offset = torch.arange(size, device=distances.device)
    prefix = torch.nn.functional.pad(distances.cumsum(-1, dtype=torch.int32), (1, 0))
    begin = ((offset - 1) * bn + least + 1).clamp(0, positions)
    stop = (offset * bn + most + facts.span).clamp(0, positions)
    needed = prefix[..., stop] > prefix[..., begin]
    needed[..., 0] = False  # the tile's own block lies in the window
    count = needed.long().cumsum(-1)
    total = count[..., -1:]
    cap = min(size, rules.distance_cap * ((facts.span + most - least) // bn + 2), MAX_LISTED + 1)
    # Descending offsets are ascending blocks. The last slot of the buffer swallows what has no place.
    slot = torch.where(needed, total - count, cap).clamp(max=cap)
    buffer = torch.zeros(*needed.shape[:-1], cap + 1, dtype=torch.int32, device=distances.device)
    buffer.scatter_(-1, slot, offset.int().expand_as(slot))
    return _Diagonals(buffer[..., :cap], count)


def _list_blocks(
    first: Tensor, sink_end: Tensor, window_start: Tensor, base: Tensor, diagonals: _Diagonals | None, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Number of listed blocks ``[B, HQ, QT]``, the list ``[B, HQ, QT, CAP]`` and the tiles whose list is too long.

    A list is the sinks ``first ... sink_end - 1`` and then those diagonals that lie between them and the window; both
    are ascending, so nothing is sorted.

    Args:
        first, sink_end, window_start, base: key blocks ``[B, HQ, QT]``; ``base`` holds the tile's first position.
        most: upper bound of sink blocks, known on the host.
    """
    sinks = (torch.minimum(sink_end, window_start) - first).clamp(min=0)
    if diagonals is None:
        cap = min(most, MAX_LISTED)
        slots = torch.arange(cap, device=first.device, dtype=torch.int32)
        return sinks, torch.where(slots < sinks[..., None], first.int()[..., None] + slots, 0).int(), sinks > cap
    stored = diagonals.offsets.shape[-1]
    cap = min(most + stored, MAX_LISTED)
    until = _count_up_to(diagonals, base - torch.maximum(first, sink_end))
    inside = _count_up_to(diagonals, base - window_start)
    skip = diagonals.count[..., -1:] - until
    slashes = (until - inside).clamp(min=0)
    too_long = (sinks + slashes > cap) | ((slashes > 0) & (skip + slashes > stored))
    blocks = torch.empty(*first.shape, cap, dtype=torch.int32, device=first.device)
    for b, heads in _list_chunks(blocks):
        slots = torch.arange(cap, device=first.device)
        sink_count = sinks[b, heads, :, None]
        index = (skip[b, heads, :, None] + slots - sink_count).clamp(0, max(0, stored - 1))
        offset = diagonals.offsets[b, heads].gather(-1, index.flatten(1)).view_as(index)
        block = torch.where(slots < sink_count, first[b, heads, :, None] + slots, base[b, heads, :, None] - offset)
        blocks[b, heads] = torch.where(slots < sink_count + slashes[b, heads, :, None], block, 0).int()
    return sinks + slashes, blocks, too_long


def _list_chunks(blocks: Tensor) -> Iterator[tuple[int, slice]]:
    """Batch elements and slices of heads whose lists fit into ``LIST_CHUNK`` entries."""
    step = max(1, LIST_CHUNK // max(1, blocks.shape[2] * blocks.shape[3]))
    for b in range(blocks.shape[0]):
        for head in range(0, blocks.shape[1], step):
            yield b, slice(head, head + step)


def _count_up_to(diagonals: _Diagonals, offset: Tensor) -> Tensor:
    """How many block offsets of the head are at most ``offset`` (int64 ``[B, HQ, QT]``, may be negative)."""
    found = diagonals.count.gather(-1, offset.clamp(0, diagonals.count.shape[-1] - 1))
    return torch.where(offset < 0, 0, found)


def _columns(
    rules: HeadRules, sink_end: Tensor, window_start: Tensor, geometry: Geometry, block_n: int
) -> tuple[Tensor, Tensor]:
    """Columns in use per tile ``[B, HQ, QT]`` and the sorted columns, int32 ``[B, HQ, CAP]``.

    Dead keys and keys in sink blocks are left out: the former are invisible, the latter every tile visits already.
    """
    g = geometry
    if rules.columns is None or not rules.column_cap:
        empty = torch.zeros(g.batch, g.q_heads, 0, dtype=torch.int32, device=window_start.device)
        return torch.zeros_like(window_start), empty
    j = torch.arange(g.kv_len, device=window_start.device)
    keep = rules.columns & (j >= sink_end * block_n)
    if g.kv_start is not None:
        keep = keep & (j >= g.kv_start.to(j.device)[:, None, None])
    if g.kv_stop is not None:
        keep = keep & (j < g.kv_stop.to(j.device)[:, None, None])
    if g.key_padding is not None:
        keep = keep & g.key_padding.to(j.device)[:, None]
    before = torch.nn.functional.pad(keep.cumsum(-1, dtype=torch.int32), (1, 0))  # [B, HQ, kv_len + 1]
    cap = -(-rules.column_cap // block_n) * block_n
    columns = torch.full((g.batch, g.q_heads, cap + 1), g.kv_len - 1, dtype=torch.int32, device=j.device)
    slot = torch.where(keep, before[..., :-1], cap).long()  # the spare last slot swallows keys that are no columns
    columns.scatter_(-1, slot, j.int().expand_as(slot))
    count = before.gather(-1, (window_start * block_n).clamp(max=g.kv_len))
    return count, columns[..., :cap].contiguous()


def _block_bits(num_blocks: Tensor, block_indices: Tensor, key_blocks: int) -> Tensor:
    """The listed blocks as bits, int32 ``[B, HQ, QT, words]``; blocks of a list differ, so sums of bits are unions."""
    bits = torch.zeros(*num_blocks.shape, -(-key_blocks // 32), dtype=torch.int32, device=num_blocks.device)
    slots = torch.arange(block_indices.shape[-1], device=num_blocks.device)
    for b, heads in _list_chunks(block_indices):
        index = block_indices[b, heads]
        bit = torch.ones_like(index).bitwise_left_shift(index % 32)
        bit = bit.masked_fill(slots >= num_blocks[b, heads, :, None], 0)
        bits[b, heads] = bits[b, heads].scatter_add(-1, (index // 32).long(), bit)
    return bits
