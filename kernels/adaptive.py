"""Policy ``adaptive``: for every head the cheapest pattern whose measured recall reaches a target, or dense.

The probe (section 3.3 of MMInference: online estimation from the last rows) is read as key blocks *relative to the
query tile*, so the mass that a window, the sinks or a block diagonal would cover is known exactly, not estimated from
overlapping marginals. Three rules keep the choice from fitting the probe rows rather than the head:

* mass that sits on one distance is a diagonal, and a column is never credited with it, though 64 columns would cover
  it for the 64 probe rows;
* mass near the probe rows belongs to the window: the last columns are seen by the probe rows and few others;
* columns are taken in the order of their mass, also where a listed block happens to cover them for the probe rows.

What is reported is the recall of the pairs of the final plan. A head that misses the target, or would not be sparse,
runs dense. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.planner import (
    MIN_STRIDE,
    HeadRules,
    TileShape,
    autocorrelation_stride,
    best_phase,
    dense_plan,
    first_live_key,
    lower_rules,
    make_dense,
)
from mmi_compile.kernels.probe import Probe, run_probe

PATTERN_NAMES = ("dense", "a_shape", "vertical_slash", "grid")
"""Names of the codes in ``HeadChoice.pattern``."""

DENSE, A_SHAPE, VERTICAL_SLASH, GRID = range(4)

SINK_TOKENS = 64
"""First live keys that every sparse head keeps; they fill one key block of the usual tiles."""

LOCAL_ZONE = 1024
"""Nearest keys (at most 1/16 of all) that are left to window and diagonals, in tokens."""

MAX_DIAGONALS = 64
"""Diagonals that a head may list."""

DIAGONAL_LADDER = (0, 1, 4, 16, 64)
"""Numbers of diagonals that are tried."""

GRID_BONUS = 0.8
"""Factor on the cost of a grid: its lines also cover rows for which the probe saw some of them too faintly."""


@dataclass(frozen=True)
class HeadChoice:
    """What the policy chose, as device tensors ``[B, HQ]``; reading them is left to whoever wants a report.

    Attributes:
        pattern: int64, index into ``PATTERN_NAMES``.
        recall: float, share of the probe rows' probability on the plan's pairs (before the last rows become dense).
        density: float32, tiles computed / tiles of the dense plan, for the final plan.
        window: int64, local window in tokens (``q_len + q_offset`` for dense).
        columns, slash_blocks: int64, columns and block diagonals in use.
        stride: int64, tokens between grid lines, 0 when the head is no grid.
    """

    pattern: Tensor
    recall: Tensor
    density: Tensor
    window: Tensor
    columns: Tensor
    slash_blocks: Tensor
    stride: Tensor

    def describe(self) -> list[list[str]]:
        """One line per batch element and head, for people. Copies to the host, hence waits for the device."""
        lines = []
        for b in range(self.pattern.shape[0]):
            columns = [getattr(self, name)[b].tolist() for name in self.__dataclass_fields__]
            lines.append([_describe(*values) for values in zip(*columns, strict=True)])
        return lines


def _describe(pattern: int, recall: float, density: float, window: int, columns: int, slashes: int, stride: int) -> str:
    parts = [] if pattern == DENSE else [f"window {window}" if window > 1 else "own tile"]
    if columns:
        parts.append(f"{columns} columns" + (f" (stride {stride})" if stride else ""))
    if slashes:
        parts.append(f"{slashes} slash blocks")
    what = f"({', '.join(parts)})" if parts else ""
    return f"{PATTERN_NAMES[pattern]}{what}: recall {recall:.3f}, density {density:.3f}"


def max_columns(kv_len: int, block_n: int) -> int:
    """Columns a head may have: 1/16 of the keys, in whole key blocks and at least one. A function of lengths alone."""
    return max(1, kv_len // 16 // block_n) * block_n


def max_diagonals(kv_len: int, block_n: int) -> int:
    """Diagonals a head may list: two blocks each, together at most 1/4 of the key blocks."""
    return min(MAX_DIAGONALS, max(1, kv_len // block_n // 8))


def adaptive_plan(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    scale: float,
    tiles: TileShape,
    *,
    recall: float = 0.95,
    max_density: float = 0.5,
    strides: Sequence[int] = (),
    dense_tail: bool = True,
) -> tuple[Plan, HeadChoice]:
    """Choose a pattern for each head from one probe, and lay out its plan.

    Args:
        q: floating ``[B, HQ, q_len, D]``; k: ``[B, HKV, kv_len, D]``; scale: factor on the scores.
        recall: share of the probability that must stay, in (0, 1].
        max_density: above this share of the dense cost a head runs dense.
        strides: grid strides to try beside the estimated one, in tokens (tokens per image row or video frame).
        dense_tail: keep every key for the tiles of the probe rows: they carry the answer and cost next to nothing.

    Raises:
        ValueError: ``recall`` or ``max_density`` out of range, or a stride below 1.
    """
    _check(recall, max_density, strides)
    if geometry.q_len == 0 or geometry.kv_len == 0:
        return _without_rows(geometry, tiles, q.device)
    bn = tiles.block_n
    peaks = max_diagonals(geometry.kv_len, bn)
    probe = run_probe(q, k, geometry, scale, block_m=tiles.block_m, peaks=peaks, nearest=bn)
    search = _Search.of(probe, geometry, tiles, recall)
    rules, pattern, stride = search.choose(strides)
    plan = lower_rules(rules, geometry, tiles)
    measured = measure_recall(plan, probe)
    full = make_dense(plan, torch.ones_like(plan.window_start, dtype=torch.bool)).density()
    failed = (pattern == DENSE) | ~(measured >= recall) | (plan.density() > max_density * full)
    which = failed[..., None]
    tile = torch.arange(plan.query_tiles, device=q.device)
    tail = (tile >= probe.first_tile[:, None]) & (tile <= probe.rows[:, -1:] // tiles.block_m)
    final = make_dense(plan, which | tail[:, None] if dense_tail else which)
    everything = geometry.q_len + geometry.q_offset
    choice = HeadChoice(
        pattern=pattern.masked_fill(failed, DENSE),
        recall=measured.masked_fill(failed, 1.0),
        density=final.density() / full,
        window=rules.local.masked_fill(failed, everything),
        columns=plan.num_columns.amax(-1).long().masked_fill(failed, 0),
        slash_blocks=search.slash_blocks(rules).masked_fill(failed, 0),
        stride=stride.masked_fill(failed, 0),
    )
    return final, choice


def measure_recall(plan: Plan, probe: Probe) -> Tensor:
    """Share of the probability of the probe rows that lies on the plan's pairs, float ``[B, HQ]``.

    Exact: all rows of a tile visit the same keys, and pairs that the model hides have no mass. Needs a probe of all
    heads with the plan's ``block_m`` and a plan with rows in order; 1 where no probe row is live.
    """
    mass = probe.tiles  # [B, HQ, PT, kv_len]
    tile = probe.first_tile[:, None] + torch.arange(mass.shape[2], device=mass.device)
    tile = tile.clamp(max=plan.query_tiles - 1)[:, None].expand(mass.shape[:3])
    block = torch.arange(plan.key_blocks, device=mass.device)
    visited = block >= plan.window_start.gather(-1, tile)[..., None]
    if plan.block_indices.shape[-1]:
        index = plan.block_indices.gather(2, tile[..., None].expand(-1, -1, -1, plan.block_indices.shape[-1])).long()
        slots = torch.arange(index.shape[-1], device=mass.device)
        index = torch.where(slots < plan.num_blocks.gather(-1, tile)[..., None], index, plan.key_blocks)
        spare = torch.zeros(*visited.shape[:-1], plan.key_blocks + 1, dtype=torch.bool, device=mass.device)
        visited = visited | spare.scatter(-1, index, True)[..., :-1]
    covered = (_block_mass(mass, plan.block_n) * visited).sum((-1, -2))
    if plan.columns.shape[-1]:
        columns = plan.columns.long()[:, :, None].expand(-1, -1, mass.shape[2], -1)
        slots = torch.arange(columns.shape[-1], device=mass.device)
        own = (slots < plan.num_columns.gather(-1, tile)[..., None]) & ~visited.gather(-1, columns // plan.block_n)
        covered = covered + (mass.gather(-1, columns) * own).sum((-1, -2))
    total = probe.columns.sum(-1)
    # NaN inputs give NaN here, and the head then runs dense.
    return torch.where(total == 0, 1.0, covered / total).clamp(max=1.0)


def _check(recall: float, max_density: float, strides: Sequence[int]) -> None:
    if not 0 < recall <= 1:
        raise ValueError(f"recall is {recall}; give a share above 0 and up to 1, such as 0.95")
    if not 0 <= max_density <= 1:
        raise ValueError(f"max_density is {max_density}; give a share from 0 to 1, such as 0.5")
    if any(stride < 1 for stride in strides):
        raise ValueError(f"strides {list(strides)} must be token counts of 1 or more")


def _without_rows(geometry: Geometry, tiles: TileShape, device: torch.device) -> tuple[Plan, HeadChoice]:
    plan = dense_plan(geometry, tiles, device)
    none = torch.zeros(geometry.batch, geometry.q_heads, dtype=torch.int64, device=device)
    ones = torch.ones(none.shape, device=device)
    return plan, HeadChoice(none, ones, ones, none + geometry.q_offset, none, none, none)


def _block_mass(mass: Tensor, block_n: int) -> Tensor:
    """Sums over key blocks, ``[..., kv_len]`` to ``[..., key blocks]``."""
    spare = -mass.shape[-1] % block_n
    padded = torch.nn.functional.pad(mass, (0, spare)) if spare else mass
    blocks: Tensor = padded.unflatten(-1, (-1, block_n))
    return blocks.sum(-1)


def _prefix(x: Tensor) -> Tensor:
    """Exclusive prefix sums with the total at the end: one longer than ``x``."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


@dataclass(frozen=True)
class _Best:
    """The cheapest setting of one family, ``[B, HQ]``: cost in keys per query (inf when none reaches the target),
    window in key blocks, columns and diagonals in use (or the stride and phase of a grid)."""

    cost: Tensor
    window: Tensor
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class _Search:
    """One probe, seen in key blocks. ``W`` counts window sizes in key blocks, 0 (the tile's own block) to all.

    Attributes:
        base: int64 ``[B, PT]``, key block of each probe tile's first position.
        relative: ``[B, HQ, W]``, mass by block offset from the tile, sinks left out.
        missing: ``[B, HQ, W]``, mass outside sinks and a window of that many blocks.
        budget: ``[B, HQ]``, mass that may be lost.
        credit: ``[B, HQ, kv_len]``, mass for which a column may be credited.
    """

    probe: Probe
    geometry: Geometry
    tiles: TileShape
    base: Tensor
    relative: Tensor
    missing: Tensor
    budget: Tensor
    credit: Tensor

    @classmethod
    def of(cls, probe: Probe, geometry: Geometry, tiles: TileShape, recall: float) -> _Search:
        """Reduce the probe to what all candidates need."""
        g, bn, device = geometry, tiles.block_n, probe.rows.device
        tile = probe.first_tile[:, None] + torch.arange(probe.tiles.shape[2], device=device)
        base = (tile * tiles.block_m + g.q_offset) // bn
        sink_end = (first_live_key(g, device) + SINK_TOKENS - 1) // bn + 1
        blocks = _block_mass(probe.tiles, bn)
        prefix = _prefix(blocks)
        offset = torch.arange((g.q_len + g.q_offset) // bn + 2, device=device)
        edge = (base[..., None] - offset)[:, None].expand(-1, g.q_heads, -1, -1)  # window starts, [B, HQ, PT, W]
        before = edge.clamp(0, blocks.shape[-1])
        after = torch.minimum(before, sink_end[:, None, None, None])
        missing = (prefix.gather(-1, before) - prefix.gather(-1, after)).sum(2)
        known = (edge >= sink_end[:, None, None, None]) & (edge < blocks.shape[-1])
        relative = (blocks.gather(-1, edge.clamp(0, blocks.shape[-1] - 1)) * known).sum(2)
        # A hair below the target, so that rounding cannot turn a head that just reaches it into a dense one.
        budget = probe.columns.sum(-1) * (1 - recall) * 0.999
        credit = _column_credit(probe, g, sink_end * bn)
        return cls(probe, g, tiles, base, relative, missing, budget, credit)

    def choose(self, strides: Sequence[int]) -> tuple[HeadRules, Tensor, Tensor]:
        """Rules, pattern code and stride of the cheapest candidate of each head."""
        g, bn = self.geometry, self.tiles.block_n
        shape = self._a_shape()
        order = self.credit.topk(min(max_columns(g.kv_len, bn), g.kv_len), -1)
        slash = self._vertical_slash(order.indices, order.values)
        grid = self._grid(strides)
        dense = self._window_cost(torch.full_like(shape.window, self.missing.shape[-1]))
        costs = torch.stack([dense, shape.cost, slash.cost, grid.cost * GRID_BONUS])
        pattern = costs.argmin(0)
        is_slash, is_grid = pattern == VERTICAL_SLASH, pattern == GRID
        window = torch.where(is_slash, slash.window, torch.where(is_grid, grid.window, shape.window))
        everything = g.q_len + g.q_offset
        local = torch.where(pattern == DENSE, everything, (window * bn + 1).clamp(max=everything))
        j = torch.arange(g.kv_len, device=window.device)
        lines = (j % grid.first[..., None] == grid.second[..., None]) & is_grid[..., None]
        columns = _mark(order.indices, torch.where(is_slash, slash.first, 0), g.kv_len) | lines
        distances = _mark(self.probe.peak_distances, torch.where(is_slash, slash.second, 0), everything)
        rules = HeadRules(
            sink=torch.full_like(local, SINK_TOKENS),
            local=local,
            last=torch.zeros_like(local),
            columns=columns,
            distances=distances,
            sink_cap=SINK_TOKENS,
            column_cap=max(order.indices.shape[-1], -(-g.kv_len // MIN_STRIDE)),
            distance_cap=self.probe.peak_distances.shape[-1],
        )
        return rules, pattern, torch.where(is_grid, grid.first, 0)

    def slash_blocks(self, rules: HeadRules) -> Tensor:
        """Block diagonals beyond the window that the diagonals of ``rules`` occupy, ``[B, HQ]``."""
        if rules.distances is None:
            return torch.zeros_like(rules.local)
        rank = self._offset_rank()
        count = rules.distances.sum(-1)
        offset = torch.arange(rank.shape[-1], device=rank.device)
        return ((rank < count[..., None]) & (offset > (rules.local[..., None] - 1) // self.tiles.block_n)).sum(-1)

    def _window_cost(self, window: Tensor) -> Tensor:
        """Keys per query, averaged over the rows, of a window that reaches ``window`` key blocks back, plus sinks."""
        first, end = self.geometry.q_offset, self.geometry.q_len + self.geometry.q_offset
        reach = (window.double() + 1) * self.tiles.block_n
        middle = reach.clamp(first, end)
        ramp = (middle * (middle + 1) - first * (first + 1)) / 2
        return (ramp + reach.clamp(max=end) * (end - middle)) / (end - first) + SINK_TOKENS

    def _a_shape(self) -> _Best:
        window = (self.missing > self.budget[..., None]).sum(-1)  # missing only falls as the window grows
        none = torch.zeros_like(window)
        return _Best(self._window_cost(window), window, none, none)

    def _ladder(self) -> Tensor:
        """Windows to try beside columns, in key blocks: 0, 1, 3, 7, ... up to half of all."""
        rungs = max(1, (self.missing.shape[-1] // 2 + 1).bit_length())
        # Arithmetic on a range, since a list would have to be copied from the host.
        return (1 << torch.arange(rungs, device=self.base.device)) - 1

    def _offset_rank(self) -> Tensor:
        """For each block offset the rank of the heaviest diagonal that needs it, int64 ``[B, HQ, W]``."""
        bn, span = self.tiles.block_n, self.tiles.block_m
        aligned = span % bn == 0
        least, most = (self.geometry.q_offset % bn,) * 2 if aligned else (0, bn - 1)
        count = self.probe.peak_distances.shape[-1]
        size = self.missing.shape[-1]
        step = torch.arange((span + most - least) // bn + 2, device=self.base.device)
        lowest = -((most + span - 1 - self.probe.peak_distances) // bn)
        highest = -((least - self.probe.peak_distances) // bn)
        needed = lowest[..., None] + step  # [B, HQ, T, steps]
        real = (needed <= highest[..., None]) & (needed > 0) & (self.probe.peaks > 0)[..., None]
        rank = torch.arange(count, device=self.base.device)[:, None].expand_as(needed)
        slot = torch.where(real, needed, size).clamp(max=size)
        ranks = torch.full((*self.missing.shape[:2], size + 1), count, dtype=torch.int64, device=self.base.device)
        return ranks.scatter_reduce_(-1, slot.flatten(2), rank.flatten(2), "amin")[..., :size]

    def _vertical_slash(self, columns: Tensor, credit: Tensor) -> _Best:
        """Try numbers of diagonals and windows; for each, the fewest columns that reach the target follow.

        Args:
            columns: int64 ``[B, HQ, K]`` in descending order of ``credit`` (mass, same shape).
        """
        bn, g = self.tiles.block_n, self.geometry
        ladder = self._ladder()
        at = ladder.expand(*columns.shape[:2], -1)
        rank = self._offset_rank()
        offset = torch.arange(rank.shape[-1], device=rank.device)
        end = g.q_len + g.q_offset
        share = (end - (offset * bn).clamp(min=g.q_offset)).clamp(min=0) / g.q_len
        mass = self.probe.tiles.gather(-1, columns[:, :, None].expand(-1, -1, self.base.shape[1], -1))
        mass = mass * (credit / mass.sum(2).clamp(min=1e-30))[:, :, None]  # credit of each probe tile, [B, HQ, PT, K]
        distance = self.base[:, None, :, None] - columns[:, :, None] // bn  # block offset of each column
        window_cost = self._window_cost(at)
        costs, counts = [], []
        ladder_of_diagonals = [n for n in DIAGONAL_LADDER if n <= self.probe.peak_distances.shape[-1]]
        for n in ladder_of_diagonals:
            listed = rank < n
            gained = _suffix_at(self.relative * listed, at)
            need = self.missing.gather(-1, at) - gained - self.budget[..., None]  # [B, HQ, ladder]
            open_mass = mass * ~listed[:, :, None].expand(-1, -1, mass.shape[2], -1).gather(
                -1, distance.clamp(0, rank.shape[-1] - 1)
            )
            count = _columns_needed(open_mass, distance, ladder, need)
            cost = window_cost + _suffix_at(listed * share * bn, at) + count
            costs.append(cost + 1.0)  # a plain a_shape wins a tie
            counts.append(count)
        cost, best = torch.cat(costs, -1).min(-1)
        picked = torch.cat(counts, -1).gather(-1, best[..., None])[..., 0]
        rung = best % ladder.shape[0]
        # 0, 1, 4, 16, 64: the ladder as arithmetic, for the same reason as above.
        level = best // ladder.shape[0]
        diagonals = torch.where(level == 0, 0, 1 << (2 * (level - 1)).clamp(min=0))
        return _Best(cost, (1 << rung) - 1, torch.where(cost.isfinite(), picked, 0).long(), diagonals)

    def _grid(self, strides: Sequence[int]) -> _Best:
        """The cheapest evenly spaced lines: each stride at its heaviest phase, with the smallest window that serves."""
        g, bn = self.geometry, self.tiles.block_n
        longest = g.kv_len // 4
        usable = [stride for stride in strides if MIN_STRIDE <= stride <= longest]
        tried = [torch.full(self.budget.shape, stride, device=self.base.device) for stride in usable]
        if longest >= MIN_STRIDE:
            tried.append(autocorrelation_stride(self.credit))
        ladder = self._ladder()
        window_cost = self._window_cost(ladder.expand(*self.budget.shape, -1))
        missing = self.missing.gather(-1, ladder.expand(*self.budget.shape, -1))
        j = torch.arange(g.kv_len, device=self.base.device)
        edge = ((self.base[:, :1] - ladder) * bn).clamp(0, g.kv_len)[:, None].expand(-1, g.q_heads, -1)
        one = torch.ones(self.budget.shape, dtype=torch.int64, device=self.base.device)
        result = _Best(torch.full(one.shape, torch.inf, dtype=torch.float64, device=one.device), one, one, one)
        for stride in tried:
            phase, _ = best_phase(self.credit, stride)
            on_line = self.credit * (j % stride[..., None] == phase[..., None])
            lost = missing - _prefix(on_line).gather(-1, edge)
            reaches = lost <= self.budget[..., None]
            cost = (window_cost + (g.kv_len / stride)[..., None]).masked_fill(~reaches, torch.inf)
            cost, rung = cost.min(-1)
            better = cost < result.cost
            result = _Best(
                torch.where(better, cost, result.cost),
                torch.where(better, (1 << rung) - 1, result.window),
                torch.where(better, stride, result.first),
                torch.where(better, phase, result.second),
            )
        return result


def _mark(order: Tensor, count: Tensor, size: int) -> Tensor:
    """The first ``count`` (``[B, HQ]``) entries of ``order`` as a bool mask ``[B, HQ, size]``."""
    chosen = torch.arange(order.shape[-1], device=order.device) < count[..., None]
    marks = torch.zeros(*order.shape[:2], size, dtype=torch.bool, device=order.device)
    return marks.scatter(-1, order, chosen)


def _suffix_at(x: Tensor, at: Tensor) -> Tensor:
    """``sum(x[at + 1:])`` along the last dimension."""
    running = x.cumsum(-1)
    return running[..., -1:] - running.gather(-1, at)


def _columns_needed(mass: Tensor, distance: Tensor, ladder: Tensor, need: Tensor) -> Tensor:
    """How many columns, in their order, make up ``need`` beyond each window: float, inf when all do not suffice.

    Args:
        mass, distance: ``[B, HQ, PT, K]``, credit and block offset of each column for each probe tile.
        ladder: int64 ``[L]``, windows in key blocks; need: ``[B, HQ, L]``.
    """
    outside = torch.zeros(*need.shape, mass.shape[-1], dtype=mass.dtype, device=mass.device)
    for tile in range(mass.shape[2]):
        outside += mass[:, :, tile, None] * (distance[:, :, tile, None] > ladder[:, None])
    running = outside.cumsum(-1)
    count = (running < need[..., None]).sum(-1) + 1
    count = torch.where(need <= 0, 0, count).double()
    return count.masked_fill((need > 0) & (running[..., -1] < need), torch.inf)


def _column_credit(probe: Probe, geometry: Geometry, sink_end: Tensor) -> Tensor:
    """Mass on each key that lies on no diagonal, ``[B, HQ, kv_len]``; 0 for sinks and for keys near the probe."""
    j = torch.arange(geometry.kv_len, device=probe.rows.device)
    zone = min(LOCAL_ZONE, geometry.kv_len // 16)
    inside = (j >= sink_end[:, None]) & (j < probe.rows[:, :1] + geometry.q_offset - zone)
    return probe.beside.clamp(min=0) * inside[:, None]
