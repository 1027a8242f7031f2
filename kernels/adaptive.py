"""Policy ``adaptive``: for every head the cheapest pattern whose measured recall reaches a target, or dense.

The probe is that of the last rows (section 3.3 of MMInference) and of rows from all over the prompt, half of which only
check what the others chose (``spread_probe``). It is read as key blocks *relative to the
query tile*, so the mass that a window, the sinks or a block diagonal would cover is known exactly, not estimated from
overlapping marginals. Three rules keep the choice from fitting the probe rows rather than the head:

* mass that sits on one distance is a diagonal, and a column is never credited with it, though 64 columns would cover
  it for the 64 probe rows;
* mass near the probe rows belongs to the window: the last columns are seen by the probe rows and few others;
* columns are taken in the order of their mass, also where a listed block happens to cover them for the probe rows.

What is reported is the recall of the pairs of the final plan on the rows that check. A head that misses the target, or
would not be sparse, runs dense. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from mmi_compile.kernels.cost import EVEN, Coefficients, plan_work
from mmi_compile.kernels.frames import TileShape, remembered
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.part_search import assemble, search_parts, why_no_parts
from mmi_compile.kernels.plan import RECORD, Plan, TileRecord
from mmi_compile.kernels.planner import dense_plan, lower, make_dense
from mmi_compile.kernels.probe import LAST_Q, run_probe
from mmi_compile.kernels.search import A_SHAPE, DENSE, GRID, VERTICAL_SLASH, PromptSearch, measure_recall
from mmi_compile.kernels.search_frame import Prices, ProbeFrame, max_columns, max_diagonals, probe_frame
from mmi_compile.kernels.segments import Segments
from mmi_compile.kernels.spread_probe import SPREAD_GROUPS, run_spread_probe

__all__ = [
    "A_SHAPE", "DENSE", "GRID", "PATTERN_NAMES", "VERTICAL_SLASH", "HeadChoice", "adaptive_plan", "max_columns",
    "max_diagonals",
]  # fmt: skip

PATTERN_NAMES = ("dense", "a_shape", "vertical_slash", "grid")
"""Names of the codes in ``HeadChoice.pattern``."""

SLACK = 1.25
"""What rows that took no part in the choice may lose, in units of what those that did may: the estimate is noisy, and
1 would turn heads dense that keep what was asked. On three texts of 8 K tokens recall 0.95 gave, with 1.25, 1.5 and 2,
densities of 45, 39 and 35 % and perplexities 0.4, 0.6 and 1.0 % above that of dense attention."""

_BLOCKS, _COLUMNS = (TileRecord._fields.index(name) for name in ("num_blocks", "num_columns"))


class Tried(NamedTuple):
    """The cheapest candidate of each head, ``[B, HQ]``, before it was measured; ``most`` is ``[B, HQ,
    RECORD]``, the largest of each field of its records."""

    pattern: Tensor
    recall: Tensor
    window: Tensor
    most: Tensor
    stride: Tensor


@dataclass(frozen=True)
class Boundaries:
    """What the policy may choose beside one pattern for the whole matrix.

    Attributes:
        names: of ``"q"`` and ``"2d"``, in this order.
        segments: the prompt, grouped for the same geometry and tiles.
        labels: what the modalities of ``segments`` are called.
    """

    names: tuple[str, ...]
    segments: Segments
    labels: tuple[str, ...]


class TriedApart(NamedTuple):
    """All heads under one boundary: its name, recall of the modality that keeps least (float ``[B, HQ]``), pattern of
    each part (int64 ``[B, HQ, parts]``), and tiles computed / tiles of the dense plan (float ``[B, HQ]``), before the
    last rows become dense."""

    name: str
    recall: Tensor
    pattern: Tensor
    density: Tensor


@dataclass(frozen=True)
class Apart:
    """Heads that treat modalities apart.

    Attributes:
        chosen: int64 ``[B, HQ]``, 0 for none, else one more than the place in ``tried``.
        tried: what all heads would do under each boundary; labels: names of the modalities.
    """

    chosen: Tensor
    tried: tuple[TriedApart, ...]
    labels: tuple[str, ...]

    def describe(self, b: int, h: int, density: float) -> str | None:
        """What a head does, for people; None where it does not treat modalities apart."""
        place = int(self.chosen[b, h])
        if not place:
            return None
        tried = self.tried[place - 1]
        names = [PATTERN_NAMES[code] for code in tried.pattern[b, h].tolist()]
        keys = [f"→{key}" for key in self.labels] if tried.name == "2d" else [""]
        where = [query + key for query in self.labels for key in keys]
        parts = ", ".join(f"{part}: {name}" for part, name in zip(where, names, strict=True))
        return f"{tried.name}({parts}): recall {float(tried.recall[b, h]):.3f}, density {density:.3f}"


@dataclass(frozen=True)
class HeadChoice:
    """What the policy chose, as device tensors ``[B, HQ]``; working them out is left to whoever wants a report.

    Attributes:
        sparse: bool, whether the head follows the candidate that was tried for the whole matrix; else it runs dense,
            unless it treats modalities apart.
        density: float32, tiles computed / tiles of the dense plan, for the final plan.
        positions: ``q_len + q_offset``.
        tried: the candidate for the whole matrix.
        apart: heads that treat modalities apart; None where that was not tried.
    """

    sparse: Tensor
    density: Tensor
    positions: int
    tried: Tried
    apart: Apart | None = None

    @property
    def pattern(self) -> Tensor:
        """int64, index into ``PATTERN_NAMES``."""
        return torch.where(self.sparse, self.tried.pattern, DENSE)

    @property
    def recall(self) -> Tensor:
        """Share of the probability of the rows that check (of the last rows where none do) on the plan's pairs, before
        the last rows become dense; of a head that treats modalities apart, of the modality that keeps least."""
        recall = torch.where(self.sparse, self.tried.recall, 1.0)
        for place, tried in enumerate(self.apart.tried if self.apart else (), 1):
            recall = torch.where(self.boundary == place, tried.recall, recall)
        return recall.clamp(max=1.0)

    @property
    def boundary(self) -> Tensor:
        """int64, 0 for none, else one more than the place in ``apart.tried``."""
        return torch.zeros_like(self.tried.pattern) if self.apart is None else self.apart.chosen

    @property
    def window(self) -> Tensor:
        """int32, local window in tokens; all positions for dense."""
        return torch.where(self.sparse, self.tried.window, self.positions)

    @property
    def columns(self) -> Tensor:
        """int32, the most columns that a query tile uses."""
        return torch.where(self.sparse, self.tried.most[..., _COLUMNS], 0)

    @property
    def slash_blocks(self) -> Tensor:
        """int32, the most block diagonals that a query tile visits."""
        return torch.where(self.sparse, self.tried.most[..., _BLOCKS], 0)

    @property
    def stride(self) -> Tensor:
        """int64, tokens between grid lines, 0 when the head is no grid."""
        return torch.where(self.sparse, self.tried.stride, 0)

    def describe(self) -> list[list[str]]:
        """One line per batch element and head, for people. Copies to the host, hence waits for the device."""
        names = ("pattern", "recall", "density", "window", "columns", "slash_blocks", "stride")
        parts = [getattr(self, name).tolist() for name in names]
        texts = [
            [_describe(*values) for values in zip(*(part[b] for part in parts), strict=True)]
            for b in range(self.sparse.shape[0])
        ]
        if self.apart is None:
            return texts
        densities = self.density.tolist()
        return [
            [self.apart.describe(b, h, densities[b][h]) or text for h, text in enumerate(row)]
            for b, row in enumerate(texts)
        ]


def _describe(pattern: int, recall: float, density: float, window: int, columns: int, slashes: int, stride: int) -> str:
    parts = [] if pattern == DENSE else [f"window {window}"]
    if columns:
        parts.append(f"{columns} columns" + (f" (stride {stride})" if stride else ""))
    if slashes:
        parts.append(f"{slashes} slash blocks")
    what = f"({', '.join(parts)})" if parts else ""
    return f"{PATTERN_NAMES[pattern]}{what}: recall {recall:.3f}, density {density:.3f}"


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
    groups: int | None = None,
    coefficients: Coefficients = EVEN,
    boundaries: Boundaries | None = None,
) -> tuple[Plan, HeadChoice]:
    """Choose a pattern for each head from a probe, and lay out its plan.

    Args:
        q: floating ``[B, HQ, q_len, D]``; k: ``[B, HKV, kv_len, D]``; scale: factor on the scores.
        recall: share of the probability that must stay, in (0, 1].
        max_density: above this share of the dense cost a head runs dense.
        strides: grid strides to try beside the estimated one, in tokens (tokens per image row or video frame).
        dense_tail: keep every key for the tiles of the last rows: they carry the answer and cost next to nothing.
        groups: groups of rows from all over the prompt that choose beside the last rows, and as many that check; 0 for
            the last rows alone, as in the paper. None for 16, or 0 where the prompt is short.
        coefficients: by which candidates are compared, as time.
        boundaries: also try to treat modalities apart. Nothing comes of it where ``why_no_parts`` gives a reason, or
            the prompt is short.

    Raises:
        ValueError: ``recall`` or ``max_density`` out of range, or a stride below 1.
    """
    _check(recall, max_density, strides)
    if geometry.q_len == 0 or geometry.kv_len == 0:
        return _without_rows(geometry, tiles, q.device)
    g, bn = geometry, tiles.block_n
    peaks = max_diagonals(g.kv_len, bn)
    groups = _groups(g) if groups is None else groups
    probe = run_probe(q, k, g, scale, block_m=tiles.block_m, peaks=peaks, nearest=bn)
    prices = Prices.of(coefficients)
    frame = remembered(_frame_of(groups, prices), g, tiles, q.device)
    spread = None if frame.spread is None else run_spread_probe(q, k, g, scale, frame.spread, bn)
    search = PromptSearch.of(probe, spread, g, tiles, frame, recall)
    found = search.choose(strides)
    lowered = lower(found.rules, g, tiles, diagonals=found.diagonals, frame=frame.tiles)
    plan = lowered.plan
    chosen, measured = measure_recall(lowered, search)
    work = plan.work()
    reached = (chosen >= recall) & (measured >= 1 - SLACK * (1 - recall))
    sparse = (found.pattern != DENSE) & reached & (work.sum(-1) / frame.full <= max_density)
    tail = frame.tail if dense_tail else torch.zeros_like(frame.tail)
    which = sparse[..., None] <= tail  # not sparse, or in the tail
    choice = HeadChoice(
        sparse=sparse,
        density=torch.where(which, frame.dense_work, work).sum(-1) / frame.full,
        positions=g.q_len + g.q_offset,
        tried=Tried(found.pattern, measured, found.rules.local, plan.tiles[..., 0, :].amax(2), found.stride),
    )
    plan = make_dense(plan, which, frame.tiles)
    if boundaries is None or not groups or why_no_parts(g, tiles, boundaries.segments) is not None:
        return plan, choice
    bounded = search_parts(
        q, k, g, scale, tiles, boundaries.segments, boundaries=boundaries.names, recall=recall, prices=prices,
        columns=plan.columns.shape[-1], strides=strides, dense_tail=dense_tail,
    )  # fmt: skip
    costs = [torch.as_tensor(coefficients.seconds(plan_work(plan), calls=0))]
    tried = tuple(TriedApart(b.name, b.measured, b.pattern, b.sparse_tiles / frame.full) for b in bounded)
    for each, share in zip(bounded, (seen.density for seen in tried), strict=True):
        fits = each.fits & (each.chosen >= recall) & (each.measured >= 1 - SLACK * (1 - recall))
        costs.append(torch.where(fits & (share <= max_density), each.work_seconds(coefficients), torch.inf))
    picked = torch.stack(costs).argmin(0)
    plan = assemble(plan, picked, bounded, boundaries.segments)
    apart = Apart(picked, tried, boundaries.labels)
    return plan, replace(choice, density=plan.work().sum(-1) / frame.full, apart=apart)


def _check(recall: float, max_density: float, strides: Sequence[int]) -> None:
    if not 0 < recall <= 1:
        raise ValueError(f"recall is {recall}; give a share above 0 and up to 1, such as 0.95")
    if not 0 <= max_density <= 1:
        raise ValueError(f"max_density is {max_density}; give a share from 0 to 1, such as 0.5")
    if any(stride < 1 for stride in strides):
        raise ValueError(f"strides {list(strides)} must be token counts of 1 or more")


SPREAD_ROWS = 8 * LAST_Q
"""Rows of a prompt from which on the spread probe looks at some of them: of fewer, the last ones are a good part."""


def _groups(geometry: Geometry) -> int:
    """Groups of the spread probe."""
    return SPREAD_GROUPS if geometry.q_len >= SPREAD_ROWS else 0


def why_not_apart(geometry: Geometry, tiles: TileShape, segments: Segments) -> str | None:
    """Why modalities are not treated apart, in words; None where they may be."""
    if not _groups(geometry):
        return f"the prompt has fewer than {SPREAD_ROWS} rows"
    return why_no_parts(geometry, tiles, segments)


@lru_cache(maxsize=8)
def _frame_of(groups: int, prices: Prices) -> Callable[[Geometry, TileShape, torch.device], ProbeFrame]:
    return partial(probe_frame, groups=groups, prices=prices)


def _without_rows(geometry: Geometry, tiles: TileShape, device: torch.device) -> tuple[Plan, HeadChoice]:
    plan = dense_plan(geometry, tiles, device)
    none = torch.zeros(geometry.batch, geometry.q_heads, dtype=torch.int64, device=device)
    ones = torch.ones(none.shape, device=device)
    most = torch.zeros(*none.shape, RECORD, dtype=torch.int32, device=device)
    return plan, HeadChoice(none.bool(), ones, geometry.q_offset, Tried(none, ones, none, most, none))
