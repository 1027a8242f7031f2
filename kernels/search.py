"""The search of policy ``adaptive``: what each family of patterns would cost a head at the recall that is asked for.

The probe is read as key blocks *relative to the query tile*: the mass that a window, the sinks or a block diagonal
would cover is then known exactly. Windows, numbers of diagonals and strides are tried all at once, along dimensions of
their own; ``A`` counts numbers of diagonals, ``L`` windows on a ladder, ``W`` windows of every size in key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmi_compile.kernels.frames import TileShape, constant, ramp
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.plan import RECORD, TileRecord
from mmi_compile.kernels.planner import Lowered, block_offsets, list_size
from mmi_compile.kernels.probe import Probe, best_phase, phase_mass
from mmi_compile.kernels.rules import MIN_STRIDE, HeadRules, autocorrelation_stride
from mmi_compile.kernels.search_frame import (
    ProbeFrame,
    SearchFrame,
    least_columns,
    least_window,
    max_columns,
    sink_tokens,
)
from mmi_compile.kernels.spread_probe import SpreadProbe

DENSE, A_SHAPE, VERTICAL_SLASH, GRID = range(4)

DIAGONAL_LADDER = (0, 1, 4, 16, 64)
"""Numbers of diagonals that are tried."""

TRIED_AT_ONCE = 32 << 20
"""Partial sums over columns that are held at a time, over all windows and numbers of diagonals."""

_START, _SINKS, _COLUMNS = (TileRecord._fields.index(name) for name in ("window_start", "sink_stop", "num_columns"))


class Found(NamedTuple):
    """What the search found: rules without distances, the block diagonals (bool ``[B, HQ, list_size]``) that stand for
    them, pattern code and grid stride (int64 ``[B, HQ]``, 0 for none)."""

    rules: HeadRules
    diagonals: Tensor
    pattern: Tensor
    stride: Tensor


class Columns(NamedTuple):
    """Keys in descending order of their credit, ``[B, HQ, K]`` each; keys int64."""

    credit: Tensor
    keys: Tensor


def may_be_lost(recall: float) -> float:
    """Share of the mass that may be lost: a hair below the target, so that rounding cannot turn a head that just
    reaches it into a dense one."""
    return (1 - recall) * 0.999


class Best(NamedTuple):
    """The cheapest setting of a family: keys per query ``[B, HQ]``, inf when none reaches the target; the rest int64,
    broadcastable to it: window in key blocks, columns and diagonals in use, stride and phase of a grid."""

    cost: Tensor
    window: Tensor
    columns: Tensor
    diagonals: Tensor
    stride: Tensor
    phase: Tensor


@dataclass(frozen=True)
class Search:
    """Probes, ready to be searched. ``PT`` groups of rows that choose: those of a query tile, or fewer.

    Attributes:
        mass: ``[B, HQ, PT, key blocks]``, mass of each group on each key block; checked: of the groups that check.
        total: ``[B, HQ]``, all of it; budget: how much may be lost.
        relative: ``[B, HQ, W]``, mass by block offset from the tile, sinks left out.
        missing: ``[B, HQ, W]``, mass outside sinks and a window of that many blocks.
        credit: ``[B, HQ, kv_len]``, mass for which a column may be credited.
    """

    geometry: Geometry
    tiles: TileShape
    frame: SearchFrame
    mass: Tensor
    checked: Tensor
    total: Tensor
    budget: Tensor
    relative: Tensor
    missing: Tensor
    credit: Tensor

    @staticmethod
    def reduced(mass: Tensor, frame: SearchFrame) -> tuple[Tensor, Tensor]:
        """``relative`` and ``missing``."""
        count = mass.shape[2]
        at = frame.edge[:, :, :count].expand(*mass.shape[:3], -1)
        relative = (mass.gather(-1, at) * frame.known[:, :, :count]).sum(2)
        return relative, _after(running_sum(relative))

    def mass_at(self, columns: Tensor) -> Tensor:
        """Mass of each group on some keys, ``[B, HQ, PT, K]``, those that check with it; columns int64 ``[B, HQ, K]``,
        of which the last key may be read for nothing."""
        raise NotImplementedError

    def credit_by_group(self, columns: Tensor) -> Tensor:
        """The credit of columns ``[B, HQ, K]`` from each group that chooses, ``[B, HQ, PT, K]``."""
        raise NotImplementedError

    def diagonal_rank(self) -> tuple[Tensor, int]:
        """For each block offset the rank of the heaviest diagonal that needs it, int32 ``[B, HQ, list_size]``; how many
        diagonals there are, which is the rank of offsets that none needs."""
        raise NotImplementedError

    def families(self, columns: Tensor, rank: Tensor, ranks: int, strides: Sequence[int]) -> list[Best]:
        """The cheapest setting of each family but dense; a grid comes last."""
        raise NotImplementedError

    @property
    def capacity(self) -> tuple[int, int]:
        """Columns that may be chosen one by one, and columns in all, lines of grids included."""
        raise NotImplementedError

    def with_floor(self, columns: Tensor, order: Columns, count: Tensor, stride: Tensor, phase: Tensor) -> Tensor:
        """``columns`` and those that every sparse head keeps."""
        return columns

    def choose(self, strides: Sequence[int]) -> Found:
        """The cheapest candidate of each head."""
        g, device = self.geometry, self.total.device
        usable, capacity = self.capacity
        order = Columns(*self.credit.topk(capacity, -1))
        rank, ranks = self.diagonal_rank()
        found = self.families(order.keys[..., :usable], rank, ranks, strides)
        none = ramp(1, device, dtype=torch.int64)
        widest = ramp(1, device, start=self.relative.shape[-1], dtype=torch.int64)
        families = [Best(self.frame.costs.dense, widest, none, none, none, none), *found]
        pattern = torch.stack([family.cost.expand_as(self.total) for family in families]).argmin(0)
        settings = torch.stack([part.expand_as(pattern) for family in families for part in family[1:]])
        settings = settings.unflatten(0, (len(families), -1))
        window, count, diagonals, stride, phase = settings.gather(0, pattern.expand(1, 5, -1, -1))[0].unbind(0)
        count = count.clamp(min=least_columns(g.kv_len, self.tiles.block_n))
        window = window.clamp(min=min(least_window(self.tiles), self.relative.shape[-1]))
        slot = ramp(capacity, device, dtype=torch.int64)
        columns = torch.where(slot < count[..., None], order.keys, g.kv_len)
        if len(families) > GRID:
            lines = torch.addcmul(phase[..., None], stride[..., None], slot)
            columns = torch.where(stride[..., None] > 0, lines, columns).clamp(max=g.kv_len)
        columns = self.with_floor(columns, order, count, stride, phase)
        rules = HeadRules((sink_tokens(self.tiles.block_n),), self.frame.costs.local[window], columns=columns.int())
        return Found(rules, rank < diagonals[..., None], pattern, stride)

    def vertical_slash(self, columns: Tensor, rank: Tensor, ranks: int) -> Best:
        """Try numbers of diagonals and windows; for each, the fewest columns that reach the target follow.

        Args:
            columns: int64 ``[B, HQ, K]`` in descending order of their credit.
            rank, ranks: as ``diagonal_rank`` returns them.
        """
        frame, device = self.frame, columns.device
        levels = tuple(n for n in DIAGONAL_LADDER if n <= ranks)
        ladder, level = constant(frame.ladder, device, torch.int64), constant(levels, device)
        # Offsets that the first diagonals leave uncovered, [B, HQ, A, W].
        left = rank[:, :, None, : self.relative.shape[-1]] >= level[:, None]
        both = torch.stack([self.relative, frame.costs.diagonal.to(self.relative.dtype).expand_as(self.relative)], 2)
        uncovered = _after(running_sum(both[:, :, :, None] * left[:, :, None]), ladder)  # [B, HQ, 2, A, L]
        need = uncovered[:, :, 0] - self.budget[..., None, None]
        mass = self.credit_by_group(columns)
        block = (columns // self.tiles.block_n)[:, :, None].expand(*mass.shape)
        ahead = frame.ahead[:, :, : mass.shape[2]].expand(*mass.shape[:3], -1)
        distance = ahead.gather(-1, block)  # block offset of each column
        rank_at = rank[:, :, None].expand(*mass.shape[:3], -1).gather(-1, distance)
        count = _columns_needed(mass, rank_at, distance, level, ladder, need)
        # What diagonals save is known by offset.
        columns_cost = count * frame.costs.column[..., None]
        cost = (frame.costs.rung - uncovered[:, :, 1] + columns_cost).masked_fill(count > columns.shape[-1], torch.inf)
        cost, best = cost.flatten(2).min(-1)
        windows = tuple(w for _ in levels for w in frame.ladder)
        diagonals = tuple(n for n in levels for _ in frame.ladder)
        window, used = constant(windows + diagonals, device, torch.int64).view(2, -1)[:, best]
        none = ramp(1, device, dtype=torch.int64)
        return Best(cost, window, count.flatten(2).gather(-1, best[..., None])[..., 0], used, none, none)

    def best_lines(self, stride: Tensor, phase: Tensor, lost: Tensor) -> Best:
        """The cheapest of some strides ``[B, HQ, S]`` at one phase each, with the smallest window that serves.

        Args:
            lost: ``[B, HQ, S, L]``, mass that the lines leave out beside each window of the ladder.
        """
        frame = self.frame
        cost = frame.costs.grid_rung + (frame.costs.line / stride)[..., None]
        cost = torch.where(lost <= self.budget[..., None, None], cost, torch.inf)
        cost, best = cost.flatten(2).min(-1)
        window = constant(frame.ladder * stride.shape[-1], stride.device, torch.int64)[best]
        none = ramp(1, stride.device, dtype=torch.int64)
        if stride.shape[-1] == 1:
            return Best(cost, window, none, none, stride[..., 0], phase[..., 0])
        chosen = best[..., None] // len(frame.ladder)
        return Best(cost, window, none, none, stride.gather(-1, chosen)[..., 0], phase.gather(-1, chosen)[..., 0])


@dataclass(frozen=True)
class PromptSearch(Search):
    """The search of one pattern for the whole matrix (boundary ``none``).

    Attributes:
        probe: of the last rows; spread: of rows from all over the prompt, None when there are none.
        last_credit: ``[B, HQ, kv_len]``, credit of the last rows: none on a diagonal, in the sinks or near these rows.
    """

    frame: ProbeFrame
    probe: Probe
    spread: SpreadProbe | None
    last_credit: Tensor

    @classmethod
    def of(
        cls, probe: Probe, spread: SpreadProbe | None, geometry: Geometry, tiles: TileShape, frame: ProbeFrame,
        recall: float,
    ) -> PromptSearch:  # fmt: skip
        """Reduce the probes to what all candidates need."""
        mass = block_mass(probe.tiles, tiles.block_n)
        last_credit = credit = probe.beside.clamp(min=0).mul_(frame.inside)
        checked = mass[:, :, :0]
        if spread is not None:
            chosen, checked = spread.blocks.chunk(2, 2)
            mass = torch.cat([mass, chosen], 2)
            credit = last_credit + spread.credit[:, 0]
        relative, missing = cls.reduced(mass, frame)
        total = mass.sum((2, 3))
        return cls(
            geometry=geometry,
            tiles=tiles,
            frame=frame,
            mass=mass,
            checked=checked,
            total=total,
            budget=total * may_be_lost(recall),
            relative=relative,
            missing=missing,
            credit=credit,
            probe=probe,
            spread=spread,
            last_credit=last_credit,
        )

    @property
    def capacity(self) -> tuple[int, int]:
        g, bn = self.geometry, self.tiles.block_n
        least = least_columns(g.kv_len, bn)
        usable = max(least, min(max_columns(g.kv_len, bn), g.kv_len) - least)
        return usable, max(usable, -(-g.kv_len // MIN_STRIDE))

    def mass_at(self, columns: Tensor) -> Tensor:
        last = _at_keys(self.probe.tiles, columns)
        return last if self.spread is None else torch.cat([last, self.spread.mass_at(columns)], 2)

    def credit_by_group(self, columns: Tensor) -> Tensor:
        """The last rows share theirs out to their tiles by mass."""
        credit = self.last_credit.gather(-1, columns)[:, :, None]
        if self.probe.tiles.shape[2] > 1:
            mass = _at_keys(self.probe.tiles, columns)
            credit = mass * (credit / mass.sum(2, keepdim=True).clamp(min=1e-30))
        return credit if self.spread is None else torch.cat([credit, self.spread.credit_at(columns)], 2)

    def diagonal_rank(self) -> tuple[Tensor, int]:
        peaks, device = self.probe.peaks, self.probe.peaks.device
        distances = torch.where(peaks > 0, self.probe.peak_distances, -1)
        offsets = block_offsets(distances, self.geometry, self.tiles)  # [B, HQ, T, steps]
        (count, steps), head = offsets.shape[2:], peaks.shape[:2]
        rank = constant(tuple(place for place in range(count) for _ in range(steps)), device)
        ranks = torch.full((*head, list_size(self.geometry, self.tiles)), count, dtype=torch.int32, device=device)
        return ranks.scatter_reduce_(-1, offsets.flatten(2), rank.expand(*head, -1), "amin"), count

    def families(self, columns: Tensor, rank: Tensor, ranks: int, strides: Sequence[int]) -> list[Best]:
        grid = self._grid(strides)
        return [self._a_shape(), self.vertical_slash(columns, rank, ranks), *([] if grid is None else [grid])]

    def with_floor(self, columns: Tensor, order: Columns, count: Tensor, stride: Tensor, phase: Tensor) -> Tensor:
        least = least_columns(self.geometry.kv_len, self.tiles.block_n)
        if not least:
            return columns
        credit = order.credit.gather(-1, count[..., None] - 1)
        return torch.cat([columns, self._for_last_rows(least, credit, stride, phase)], -1)

    def _for_last_rows(self, count: int, credit: Tensor, stride: Tensor, phase: Tensor) -> Tensor:
        """The heaviest keys of the last rows, int64 ``[B, HQ, count]``; ``kv_len`` for those that are columns already.

        Args:
            credit: ``[B, HQ, 1]``, that of the last column of heads that are no grid; stride, phase: ``[B, HQ]``, of
                grids.
        """
        mass, keys = (self.probe.beside * self.frame.before).topk(count, -1)
        stride, phase = stride[..., None], phase[..., None]
        apart = torch.where(
            stride > 0, (keys - phase) % stride.clamp(min=1) != 0, self.credit.gather(-1, keys) < credit
        )
        return torch.where(apart & (mass > 0), keys, self.geometry.kv_len)

    def _a_shape(self) -> Best:
        window = (self.missing > self.budget[..., None]).sum(-1)  # missing only falls as the window grows
        none = ramp(1, window.device, dtype=torch.int64)
        return Best(_looked_up(self.frame.costs.window, window), window, none, none, none, none)

    def _grid(self, strides: Sequence[int]) -> Best | None:
        """The cheapest evenly spaced lines: each stride at its heaviest phase, with the smallest window that serves."""
        g, frame, device = self.geometry, self.frame, self.credit.device
        longest = g.kv_len // 4
        if longest < MIN_STRIDE:
            return None
        usable = [stride for stride in strides if MIN_STRIDE <= stride <= longest]
        estimated = autocorrelation_stride(self.credit)
        tried = [constant((stride,), device, torch.int64).expand_as(estimated) for stride in usable] + [estimated]
        stride = _side_by_side(tried)  # [B, HQ, S]
        phases = [folded.argmax(-1) for folded in phase_mass(self.credit, usable)]
        phase = _side_by_side([*phases, best_phase(self.credit, estimated, longest=longest)])
        before = phase - stride
        # Line -1 has no mass: the sum up to line n is the mass on the first n lines.
        line = ramp(-(-g.kv_len // MIN_STRIDE) + 1, device, dtype=torch.int64)
        key = torch.addcmul(before[..., None], line, stride[..., None]).clamp(0, g.kv_len - 1)
        on_line = running_sum(_at_keys(self.last_credit[:, :, None], key.flatten(2)).view(key.shape))
        lines = (frame.line_edge - before[..., None]) // stride[..., None]  # left of each window, [B, HQ, S, L]
        gained = on_line.gather(-1, lines)
        if self.spread is not None:
            # All lines that its rows may credit lie beyond the usual windows; larger ones cover some of them twice.
            spread = _at_keys(self.spread.credit[:, 0, :, None], key.flatten(2)).view(key.shape)
            gained = gained + spread.sum(-1, keepdim=True)
        ladder = constant(frame.ladder, device, torch.int64)
        lost = self.missing.index_select(-1, ladder)[:, :, None] - gained
        return self.best_lines(stride, phase, lost)


def measure_recall(lowered: Lowered, search: Search) -> tuple[Tensor, Tensor]:
    """Share of the probability of probe rows that lies on the plan's pairs, float ``[B, HQ]``: of the rows by which the
    pattern was chosen, and of those that check it. NaN where no probe row is live."""
    # NaN inputs and heads without any live row give NaN here, and such a head then runs dense.
    covered, count = covered_mass(lowered, search), search.mass.shape[2]
    chosen = covered[..., :count].sum(-1) / search.total
    if not search.checked.shape[2]:
        return chosen, chosen
    return chosen, covered[..., count:].sum(-1) / search.checked.sum((-1, -2))


def covered_mass(lowered: Lowered, search: Search) -> Tensor:
    """Probability of each group of probe rows on the plan's pairs, float ``[B, HQ, PT]``, those that check with it.

    Exact: all rows of a tile visit the same keys, and pairs that the model hides have no mass.
    """
    plan, frame = lowered.plan, search.frame
    mass = torch.cat([search.mass, search.checked], 2)
    tiles = plan.tiles[..., 0, :].gather(2, frame.tile[..., None].expand(*mass.shape[:3], RECORD))
    tiles = tiles[..., None, :]  # [B, HQ, PT, 1, RECORD]
    block = ramp(mass.shape[-1], mass.device)
    # Blocks left of the sinks and diagonals left of what a tile may see hold no mass.
    visited = (block >= tiles[..., _START]) | (block < tiles[..., _SINKS])
    if lowered.diagonals is not None:
        ahead = frame.ahead.expand(*mass.shape)
        visited = visited | lowered.diagonals[:, :, None].expand(*mass.shape[:3], -1).gather(-1, ahead)
    covered = (mass * visited).sum(-1)
    if plan.columns.shape[-1]:
        keys = plan.columns.long()
        columns = keys[:, :, None].expand(-1, -1, mass.shape[2], -1)
        in_use = ramp(columns.shape[-1], mass.device) < tiles[..., _COLUMNS]
        # True > False: in use, and not in a block that is visited already.
        own = in_use > visited.gather(-1, columns // plan.block_n)
        covered = covered + (search.mass_at(keys) * own).sum(-1)
    return covered


def _at_keys(x: Tensor, keys: Tensor) -> Tensor:
    """``x [B, HQ, T, kv_len]`` at ``keys [B, HQ, K]``: ``[B, HQ, T, K]``."""
    return x.gather(-1, keys[:, :, None].expand(-1, -1, x.shape[2], -1))


def _looked_up(table: Tensor, at: Tensor) -> Tensor:
    """``table [b, 1, X]`` at ``at [B, HQ]``."""
    return table.expand(*at.shape, -1).gather(-1, at[..., None])[..., 0]


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """``[..., S]`` from ``S`` tensors."""
    return parts[0][..., None] if len(parts) == 1 else torch.stack(parts, -1)


def _columns_needed(
    mass: Tensor, rank: Tensor, distance: Tensor, level: Tensor, ladder: Tensor, need: Tensor
) -> Tensor:
    """How many columns, in their order, make up ``need``: int64 ``[B, HQ, A, L]``, ``K + 1`` when all do not suffice.

    Args:
        mass, rank, distance: ``[B, HQ, PT, K]``: credit of each column for each probe tile, rank of the diagonal that
            covers its block, offset of its block.
        level: int32 ``[A]``, numbers of diagonals; ladder: int64 ``[L]``, windows in key blocks.
        need: ``[B, HQ, A, L]``, mass.
    """
    counts = []
    each = mass.shape[0] * level.shape[0] * ladder.shape[0] * mass.shape[3]
    step = max(1, TRIED_AT_ONCE // max(1, each))
    for start in range(0, mass.shape[1], step):
        part = slice(start, start + step)
        counts.append(_columns_of_heads(mass[:, part], rank[:, part], distance[:, part], level, ladder, need[:, part]))
    return counts[0] if len(counts) == 1 else torch.cat(counts, 1)


def _columns_of_heads(
    mass: Tensor, rank: Tensor, distance: Tensor, level: Tensor, ladder: Tensor, need: Tensor
) -> Tensor:
    uncovered = mass[:, :, None] * (rank[:, :, None] >= level[:, None, None])  # [B, H, A, PT, K]
    beyond = distance[:, :, None] > ladder[:, None, None]  # [B, H, L, PT, K]
    gained = uncovered[:, :, :, None, 0] * beyond[:, :, None, :, 0]
    for tile in range(1, mass.shape[2]):
        gained.addcmul_(uncovered[:, :, :, None, tile], beyond[:, :, None, :, tile].to(gained.dtype))
    fewer = (running_sum(gained) < need[..., None]).sum(-1)  # [B, H, A, L]
    return fewer + (need > 0)


def block_mass(mass: Tensor, block_n: int) -> Tensor:
    """Sums over key blocks, ``[..., kv_len]`` to ``[..., key blocks]``."""
    spare = -mass.shape[-1] % block_n
    padded = torch.nn.functional.pad(mass, (0, spare)) if spare else mass
    blocks: Tensor = padded.unflatten(-1, (-1, block_n))
    return blocks.sum(-1)


def running_sum(x: Tensor) -> Tensor:
    """``x.cumsum(-1)`` with the same bits in every run."""
    if x.is_cuda and x.numel() == x.shape[-1]:
        # A lone row is summed by blocks in the order of their arrival; of two rows each is summed in order.
        return x.expand(2, *x.shape).cumsum(-1)[0]
    return x.cumsum(-1)


def _after(running: Tensor, at: Tensor | None = None) -> Tensor:
    """``sum(x[at + 1:])`` from the running sums of ``x``, at every place if not told."""
    return running[..., -1:] - (running if at is None else running.index_select(-1, at))
