"""What every head keeps, in tokens: one form for all patterns, with what the probe says about them filled in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from mmi_compile.kernels.block_topk import BlockRules, select_blocks
from mmi_compile.kernels.frames import TileFrame, TileShape, constant, keep, ramp, tile_frame
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import BlockTopK, Dense, Grid, OwnPattern, Pattern, TriShape, VerticalSlash
from mmi_compile.kernels.probe import best_phase, first_live_key, last_live_position, run_probe

MIN_STRIDE = 16
"""Smallest stride that is estimated: below it a grid keeps more than 1/16 of all keys and is no longer sparse."""

FORCED_COLUMNS, FORCED_DISTANCES = 30, 100
"""First columns and nearest diagonals that vertical-slash always keeps (MInference), as far as its counts allow."""

FOURIER_CHUNK = 4 << 20
"""Values that are Fourier transformed at a time."""


@dataclass(frozen=True)
class HeadRules:
    """What every head keeps, in tokens, before the model's own mask is met.

    Pair ``(i, j)`` of head ``h`` is kept when ``j`` is one of the first ``sink`` keys from the first live one, or
    ``i - j < local``, or ``j`` is one of ``columns``, or ``i - j`` one of ``distances``, or row ``i`` is one of the
    ``last`` live rows or a query line, ``i % line_stride == line_phase``, or the tile of the row keeps the key's block.

    Attributes:
        sink: one number per head, or one for all of them.
        local, last: int32 ``[1 or B, 1 or HQ]``; local is 1 or more; no ``last`` rows where None.
        columns: int32 ``[B, HQ, C]`` or None: different keys in any order, ``kv_len`` where there is none.
        distances: integers ``[B, HQ, S]`` or None: distances below ``q_len + q_offset``, negative where there is none.
        line_stride, line_phase: int32 ``[B, HQ]`` or None; phase -1 for a head without query lines.
        line_gap: fewest rows from one query line to the next.
        blocks: key blocks of each tile, for heads without distances and query lines; None for no head.
    """

    sink: tuple[int, ...]
    local: Tensor
    last: Tensor | None = None
    columns: Tensor | None = None
    distances: Tensor | None = None
    line_stride: Tensor | None = None
    line_phase: Tensor | None = None
    line_gap: int = 1
    blocks: BlockRules | None = None

    def to_mask(self, geometry: Geometry) -> Tensor:
        """The kept pairs that the model allows, bool ``[B, HQ, q_len, kv_len]``. Quadratic: for tests."""
        g, device = geometry, self.local.device
        i = torch.arange(g.q_len, device=device)[:, None] + g.q_offset
        j = torch.arange(g.kv_len, device=device)
        origin = first_live_key(g, device)[:, None, None, None]
        sink = torch.tensor(self.sink, device=device)[:, None, None]
        keep = (j < origin + sink) | (i - j < self.local[..., None, None])
        if self.last is not None:
            end = last_live_position(g, device)[:, None, None, None]
            keep = keep | ((i >= end - self.last[..., None, None]) & (i < end))
        if self.columns is not None:
            keep = keep | _members(self.columns, g.kv_len)[:, :, None, :]
        if self.distances is not None:
            keep = keep | _members(self.distances, g.q_len + g.q_offset)[..., (i - j).clamp(min=0)]
        if self.line_stride is not None and self.line_phase is not None:
            keep = keep | (i % self.line_stride[..., None, None] == self.line_phase[..., None, None])
        if self.blocks is not None:
            keep = keep.expand(g.batch, g.q_heads, -1, -1).clone()
            keep[:, list(self.blocks.heads)] |= self.blocks.to_mask(g)
        return keep & g.to_mask(device)[:, None]


def sink_end(sinks: tuple[int, ...], frame: TileFrame, block_n: int) -> tuple[Tensor, Tensor]:
    """One past the last sink block of each head, and its first key; int32 ``[1 or B, 1 or HQ, 1]``, 0 without sinks."""
    device = frame.low.device
    if frame.first_is_zero:
        ends = tuple(-(-sink // block_n) for sink in sinks)
        return constant(ends, device)[:, None], constant(tuple(end * block_n for end in ends), device)[:, None]
    sink = constant(sinks, device)[:, None]
    end = torch.where(sink > 0, (frame.origin + sink + (block_n - 1)) // block_n, 0)
    return end, end * block_n


def window_start(local: Tensor, frame: TileFrame, dense: Tensor | None, block_n: int) -> Tensor:
    """First key block of each window, int32, broadcastable to ``[B, HQ, QT]``.

    Args:
        local: as in ``HeadRules``. dense: tiles that keep every key, bool, likewise broadcastable; None for none.
    """
    start = (frame.after - local[..., None]).clamp(min=0) // block_n
    if dense is not None:
        start = start.masked_fill(dense, 0)
    if not frame.first_is_zero:
        start = torch.maximum(start, frame.first)
    return start if frame.latest_is_base else torch.minimum(start, frame.latest)


def _members(entries: Tensor, size: int) -> Tensor:
    """Which of ``range(size)`` are among ``entries [B, HQ, X]``, bool ``[B, HQ, size]``."""
    found = torch.zeros(*entries.shape[:2], size + 1, dtype=torch.bool, device=entries.device)
    slot = torch.where((entries < 0) | (entries >= size), size, entries)
    return found.scatter_(-1, slot.long(), True)[..., :size]


class Masses(Protocol):
    """Probability mass of the probed heads, float ``[B, H, keys]`` and ``[B, H, distances]``; a ``Probe`` is one."""

    @property
    def columns(self) -> Tensor: ...

    @property
    def distances(self) -> Tensor: ...


Probing: TypeAlias = Callable[[tuple[int, ...], bool], Masses]
"""``probing(heads, diagonals)``: masses of some query heads, ascending; ``distances`` only when ``diagonals``."""


def estimate_rules(
    patterns: Sequence[Pattern], q: Tensor, k: Tensor, geometry: Geometry, scale: float, tiles: TileShape,
    *, probing: Probing | None = None,
) -> HeadRules:  # fmt: skip
    """Rules of every head, with columns, diagonals, strides and phases taken from one probe of the heads that need it.

    Args:
        patterns: one per query head.
        q: ``[B, HQ, q_len, D]``, ``q_len >= 1``; k: ``[B, HKV, kv_len, D]``, ``kv_len >= 1``; scale: of the scores.
        probing: where masses come from; None for a probe of the last rows.

    Raises:
        ValueError: the number of patterns is not the number of query heads.
    """
    g, device = geometry, q.device
    if probing is None:

        def probing(heads: tuple[int, ...], diagonals: bool) -> Masses:
            return run_probe(q, k, g, scale, block_m=tiles.block_m, heads=heads, diagonals=diagonals)

    if len(patterns) != g.q_heads:
        raise ValueError(f"got {len(patterns)} patterns for {g.q_heads} query heads; give one pattern per query head")
    heads = _sorted_heads(tuple(patterns))
    everything = g.q_len + g.q_offset
    local = tuple(everything if isinstance(p, Dense) else min(getattr(p, "local", 1), everything) for p in patterns)
    last = tuple(min(p.last, everything) if isinstance(p, TriShape) else 0 for p in patterns)
    columns, distances, lines = [], [], []
    if heads.slash:
        slash = _slash_rules([patterns[h] for h in heads.slash], probing(heads.slash, True), g)  # type: ignore[misc]
        columns.append((heads.slash, slash[0]))
        distances.append((heads.slash, slash[1]))
    if heads.grid:
        # Apart from the others, since sums along diagonals are half of a probe's cost and grids need none.
        stride, phase = _strides_and_phases(heads, probing(heads.grids, False))
        grids = [patterns[h] for h in heads.grid]
        columns.append((heads.grid, _key_lines(stride, phase, heads.least_stride, g.kv_len)))
        if heads.same_phase:
            distances.append((heads.grid, _same_phase(stride, grids, heads.least_stride, everything)))  # type: ignore[arg-type]
        if heads.query_lines:
            lines = [(heads.grid, x[..., None].int()) for x in (stride, _query_phase(phase, grids))]  # type: ignore[arg-type]
    if heads.own:
        own = tuple(patterns[h] for h in heads.own)
        columns += [(heads.own, x) for x in _own_columns(own, g, device)]
        distances += [(heads.own, x) for x in _own_distances(own, g, device)]
    return HeadRules(
        sink=_sizes(patterns, "sink", 0, everything),
        local=constant(local, device)[None],
        last=constant(last, device)[None] if any(last) else None,
        columns=_spread(columns, g, g.kv_len),
        distances=_spread(distances, g, -1),
        line_stride=_spread(lines[:1], g, 1, squeeze=True),
        line_phase=_spread(lines[1:], g, -1, squeeze=True),
        line_gap=heads.line_gap,
        blocks=_block_rules(patterns, heads.blocks, q, k, g, scale, tiles) if heads.blocks else None,
    )


def _block_rules(
    patterns: Sequence[Pattern], heads: tuple[int, ...], q: Tensor, k: Tensor, geometry: Geometry, scale: float,
    tiles: TileShape,
) -> BlockRules:  # fmt: skip
    """The best blocks between the sinks and the window of each tile of ``heads``."""
    chosen = [p for p in patterns if isinstance(p, BlockTopK)]
    frame, everything = tile_frame(geometry, tiles, q.device), geometry.q_len + geometry.q_offset
    start = window_start(constant(_sizes(chosen, "local", 1, everything), q.device)[None], frame, None, tiles.block_n)
    begin = sink_end(_sizes(chosen, "sink", 0, everything), frame, tiles.block_n)[0]
    if not frame.first_is_zero:
        begin = torch.maximum(begin, frame.first)
    return select_blocks(chosen, heads, q, k, geometry, scale, tiles, begin, start)


@dataclass(frozen=True)
class _Heads:
    """Which heads follow which family of patterns; grids are grouped by stride."""

    slash: tuple[int, ...]
    grid: tuple[int, ...]
    blocks: tuple[int, ...]
    own: tuple[int, ...]
    strides: tuple[tuple[int | None, tuple[int, ...]], ...]
    least_stride: int
    same_phase: bool
    query_lines: bool
    line_gap: int

    @property
    def grids(self) -> tuple[int, ...]:
        """The grid heads in ascending order, as a probe wants them."""
        return tuple(sorted(self.grid))

    def slots(self, heads: tuple[int, ...]) -> tuple[int, ...]:
        """Places of grid heads in their probe."""
        return tuple(self.grids.index(h) for h in heads)


@lru_cache(maxsize=256)
def _sorted_heads(patterns: tuple[Pattern, ...]) -> _Heads:
    slash = tuple(h for h, p in enumerate(patterns) if isinstance(p, VerticalSlash))
    grids = {h: p for h, p in enumerate(patterns) if isinstance(p, Grid)}
    strides = tuple(
        (stride, tuple(h for h, p in grids.items() if p.stride == stride))
        for stride in dict.fromkeys(p.stride for p in grids.values())
    )
    return _Heads(
        slash=slash,
        grid=tuple(h for _, heads in strides for h in heads),
        blocks=tuple(h for h, p in enumerate(patterns) if isinstance(p, BlockTopK)),
        own=tuple(h for h, p in enumerate(patterns) if isinstance(p, OwnPattern)),
        strides=strides,
        least_stride=min((p.stride or MIN_STRIDE for p in grids.values()), default=1),
        same_phase=any(p.same_phase for p in grids.values()),
        query_lines=any(p.query_lines for p in grids.values()),
        line_gap=min((p.stride or MIN_STRIDE for p in grids.values() if p.query_lines), default=1),
    )


def _sizes(patterns: Sequence[Pattern], name: str, default: int, most: int) -> tuple[int, ...]:
    return tuple(min(getattr(p, name, default), most) for p in patterns)


def _spread(
    parts: list[tuple[tuple[int, ...], Tensor]], geometry: Geometry, fill: int, *, squeeze: bool = False
) -> Tensor | None:
    """Parts ``[B, heads, X]`` side by side as int32 ``[B, HQ, largest X]``, ``fill`` elsewhere; None without parts."""
    if not parts:
        return None
    everyone = tuple(range(geometry.q_heads))
    if len(parts) == 1 and parts[0][0] == everyone:
        target = parts[0][1]
    else:
        shape = (geometry.batch, geometry.q_heads, max(part.shape[-1] for _, part in parts))
        target = torch.full(shape, fill, dtype=torch.int32, device=parts[0][1].device)
        for heads, part in parts:
            target[..., : part.shape[-1]].index_copy_(1, constant(heads, part.device, torch.int64), part)
    return target[..., 0] if squeeze else target


def _of_heads(x: Tensor, slots: tuple[int, ...]) -> Tensor:
    """``x[:, slots]``; ``x`` itself when that is all of it."""
    if slots == tuple(range(x.shape[1])):
        return x
    return x.index_select(1, constant(slots, x.device, torch.int64))


def _slash_rules(patterns: Sequence[VerticalSlash], probe: Masses, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Columns and distances of the vertical-slash heads, which the probe holds alone."""
    g = geometry
    vertical = _sizes(patterns, "n_vertical", 0, g.kv_len)
    slash = _sizes(patterns, "n_slash", 1, g.q_len + g.q_offset)
    columns, distances = probe.columns, probe.distances
    if columns.shape != distances.shape:
        return (
            _heaviest(columns.clone(), vertical, (FORCED_COLUMNS,) * len(vertical), (g.kv_len,) * len(vertical)),
            _heaviest(distances.clone(), slash, (FORCED_DISTANCES,) * len(slash), (-1,) * len(slash)),
        )
    # One selection for both costs the device half of what two do.
    both = _heaviest(
        torch.cat([columns, distances], 1), vertical + slash,
        (FORCED_COLUMNS,) * len(vertical) + (FORCED_DISTANCES,) * len(slash),
        (g.kv_len,) * len(vertical) + (-1,) * len(slash),
    )  # fmt: skip
    return both[:, : len(vertical), : max(vertical)], both[:, len(vertical) :, : max(slash)]


def _heaviest(mass: Tensor, counts: tuple[int, ...], forced: tuple[int, ...], none: tuple[int, ...]) -> Tensor:
    """For each head its ``counts`` heaviest entries of ``mass [B, H, X]``, the first ``forced`` in, then ``none``.

    Args:
        mass: written to.

    Returns:
        int32 ``[B, H, largest count]``; where heads want the same count its order means nothing.
    """
    width = min(max(forced), mass.shape[-1])
    first, wanted = keep(_counted, (counts, forced, width), mass.device)
    mass[..., :width].masked_fill_(first, torch.inf)
    # Ranks matter only where heads want different counts.
    chosen = mass.topk(max(counts), -1, sorted=min(counts) < max(counts)).indices.int()
    return chosen if wanted is None else torch.where(wanted, chosen, constant(none, mass.device)[:, None])


def _counted(
    counts: tuple[int, ...], forced: tuple[int, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Which of the first ``width`` entries are forced in, half of the count at most, and which ranks are wanted, None
    for all."""
    most = constant(tuple(min(f, (count + 1) // 2) for f, count in zip(forced, counts, strict=True)), device)
    same = min(counts) == max(counts)
    wanted = None if same else ramp(max(counts), device) < constant(counts, device)[:, None]
    return ramp(width, device) < most[:, None], wanted


def _own_columns(patterns: tuple[Pattern, ...], geometry: Geometry, device: torch.device) -> list[Tensor]:
    """Columns of heads with patterns of the user's own, int32 ``[B, H, C]``; nothing where they have none."""
    g = geometry
    listed = keep(_own_lines, (patterns, "columns", g.kv_len, g.kv_len), device)
    if g.has_padding:
        moved = listed + first_live_key(g, device).int()[:, None, None]
        listed = torch.where(listed < g.kv_len, moved, g.kv_len).clamp(max=g.kv_len)
    return [listed.expand(g.batch, -1, -1)] if listed.shape[-1] else []


def _own_distances(patterns: tuple[Pattern, ...], geometry: Geometry, device: torch.device) -> list[Tensor]:
    """Their distances, int32 ``[B, H, S]``."""
    listed = keep(_own_lines, (patterns, "distances", geometry.q_len + geometry.q_offset, -1), device)
    return [listed.expand(geometry.batch, -1, -1)] if listed.shape[-1] else []


def _own_lines(patterns: tuple[Pattern, ...], what: str, size: int, none: int, device: torch.device) -> Tensor:
    """What each pattern lists below ``size``, sorted, then ``none``: int32 ``[1, H, longest]``."""
    lists = []
    for pattern in patterns:
        entries = set(getattr(pattern, what)(size))
        for entry in entries:
            if isinstance(entry, bool) or not isinstance(entry, int):
                raise TypeError(f"{pattern.name}.{what} must give ints (tokens), gave {entry!r}")
        lists.append(sorted(entry for entry in entries if 0 <= entry < size))
    longest = max(map(len, lists))
    filled = [entries + [none] * (longest - len(entries)) for entries in lists]
    return torch.tensor(filled, dtype=torch.int32).view(1, len(lists), longest).to(device, non_blocking=True)


def _strides_and_phases(heads: _Heads, probe: Masses) -> tuple[Tensor, Tensor]:
    """Stride and heaviest phase of the grid heads, int64 ``[B, heads]`` each."""
    strides, phases = [], []
    for stride, members in heads.strides:
        mass = _of_heads(probe.columns, heads.slots(members))
        if stride is None:
            strides.append(autocorrelation_stride(mass))
            phases.append(best_phase(mass, strides[-1], longest=longest_stride(mass.shape[-1])))
        else:
            same = constant((stride,), mass.device, torch.int64)
            strides.append(same.expand(mass.shape[:2]))
            phases.append(best_phase(mass, stride))
    return (strides[0], phases[0]) if len(strides) == 1 else (torch.cat(strides, 1), torch.cat(phases, 1))


def _key_lines(stride: Tensor, phase: Tensor, least: int, kv_len: int) -> Tensor:
    """Keys ``phase, phase + stride, ...`` and then ``kv_len``, int32 ``[B, H, CAP]``; ``least`` is the least stride."""
    line = ramp(-(-kv_len // least), stride.device, dtype=torch.int64)
    return (stride[..., None] * line + phase[..., None]).clamp(max=kv_len).int()


def _same_phase(stride: Tensor, grids: Sequence[Grid], least: int, positions: int) -> Tensor:
    """Distances ``0, stride, 2 stride, ...`` of the grids that ask for them, int32 ``[B, H, CAP]``."""
    distance = stride[..., None] * ramp(-(-positions // least), stride.device, dtype=torch.int64)
    asked = constant(tuple(positions if p.same_phase else 0 for p in grids), stride.device)[:, None]
    return torch.where(distance < asked, distance, -1).int()


def _query_phase(phase: Tensor, grids: Sequence[Grid]) -> Tensor:
    """``phase`` of the grids with query lines, -1 for the others."""
    return torch.where(constant(tuple(int(p.query_lines) for p in grids), phase.device) > 0, phase, -1)


def longest_stride(length: int) -> int:
    """The largest stride that is estimated from ``length`` keys: four lines at least."""
    return max(MIN_STRIDE, length // 4)


def autocorrelation_stride(mass: Tensor) -> Tensor:
    """The distance from ``MIN_STRIDE`` to ``longest_stride`` at which columns repeat best, int64 ``[B, H]``.

    The square root keeps one heavy column from drowning many even ones.
    """
    length = mass.shape[-1]
    if length <= MIN_STRIDE:
        return torch.full(mass.shape[:-1], MIN_STRIDE, dtype=torch.int64, device=mass.device)
    size = 1 << (2 * length - 1).bit_length()
    longest = longest_stride(length)
    best = []
    for part in mass.split(max(1, FOURIER_CHUNK // size), 1):
        signal = part.float().sqrt()
        power = torch.fft.rfft(signal - signal.mean(-1, keepdim=True), n=size)
        # Not by conj(): what that leaves for later is forgotten where compiled code calls an operator.
        energy = power * torch.conj_physical(power)
        repeats: Tensor = torch.fft.irfft(energy, n=size)[..., MIN_STRIDE : longest + 1]
        best.append(repeats.argmax(-1) + MIN_STRIDE)
    return best[0] if len(best) == 1 else torch.cat(best, 1)
