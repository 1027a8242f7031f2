"""What candidates of head search do to one attention call: error, recall, tiles and predicted time of a plan.

Errors are those of the kernels that will run, against exact attention; see ``head_search.py`` for what is tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mmi_compile.bench_peers import kernel_families
from mmi_compile.cost_file import CostModel
from mmi_compile.decision import MMIError
from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.cost import Work, plan_work
from mmi_compile.kernels.dense import dense_attention
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import ByModality, HeadPattern, Pattern
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.plan_rows import row_mask
from mmi_compile.kernels.planner import build_plan, dense_plan, keep_tail
from mmi_compile.kernels.probe import visible_keys
from mmi_compile.kernels.segments import Segments, segment

Rows: TypeAlias = Literal["all", "last", "both"]

LEAST_TOKENS = 256
"""Shorter prompts say nothing: the probe would see a quarter of their rows."""

LAST_ROWS = 256
"""Rows at the end of the prompt, the question, that ``rows="last"`` looks at."""

RECALL_ROWS = 48
"""Rows whose recall is measured: half of them spread over the prompt, half over its last rows."""

CHUNK_BYTES = 256 << 20
"""Float32 copies of outputs that are held at a time."""


class HeadSearchError(MMIError):
    """A layer cannot be searched, or a budget cannot be met; the message names the mend."""


@dataclass(frozen=True)
class LayerInput:
    """One attention call: ``q [B, HQ, q_len, D]``, ``k, v [B, HKV, kv_len, D]``.

    Attributes:
        ids: integers ``[B, kv_len]``, the modality of each key, or None.
        labels: the modality ids that are told apart, ascending; one or none for no boundaries.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    geometry: Geometry
    scale: float
    ids: Tensor | None = None
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Measuring:
    """How candidates are measured; the same for all layers of a model.

    Attributes:
        costs: the kernels' cost model.
        rows: which rows errors are measured on: ``all``, the ``last`` ones of the prompt, or ``both`` in equal parts,
            so that a question at the end counts as much as all that comes before it.
        rows_at_most: query rows that candidates are run on, about; of longer prompts, every so many tiles.
        dense_tail: the tiles of the last 64 rows keep every key, as the option of that name has it at run time.
    """

    costs: CostModel
    rows: Rows = "both"
    rows_at_most: int = 1 << 30
    dense_tail: bool = True


@dataclass(frozen=True)
class Measured:
    """One plan: squared error (normalised), recall, tiles and cost, float64 ``[HQ, M]`` on the CPU. Rows and tiles of
    query modality ``m`` are in column ``m``; where tiles mix modalities, tiles and cost are ``[HQ, 1]``."""

    error: Tensor
    recall: Tensor
    density: Tensor
    cost: Tensor


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to try plans on.

    Attributes:
        run: the kernel. exact: output of exact attention.
    """

    x: LayerInput
    tiles: TileShape
    run: Callable[[Plan], Tensor]
    exact: Tensor
    how: Measuring

    @classmethod
    def of(cls, x: LayerInput, how: Measuring) -> Prompt:
        g = x.geometry
        if g.kv_len < LEAST_TOKENS or g.q_len < LEAST_TOKENS:
            raise HeadSearchError(
                f"the calibration prompt is too short: {g.q_len} queries and {g.kv_len} keys; give one of"
                f" {LEAST_TOKENS} tokens or more, best as long as the prompts to come"
            )
        family = kernel_families(x.q.device, x.q.dtype, x.q.shape[-1])[0]

        def run(plan: Plan) -> Tensor:
            return family.run(x.q, x.k, x.v, plan, x.scale, torch.empty_like(x.q))

        exact = dense_attention(
            x.q, x.k, x.v, g, x.scale, family.tiles, run_plan=lambda q, k, v, plan, scale: run(plan)
        )
        if not bool(torch.isfinite(exact).all()):
            raise HeadSearchError(
                "attention gives NaN or infinity; check the model's weights, its dtype and the calibration inputs"
            )
        return cls(x, family.tiles, run, exact, how)

    @property
    def heads(self) -> int:
        return self.x.geometry.q_heads

    @property
    def groups(self) -> int:
        return max(1, len(self.x.labels))

    @cached_property
    def segments(self) -> Segments | None:
        return _segments(self.x, self.tiles)

    @cached_property
    def member(self) -> Tensor:
        """Which rows count for what, float32 ``[B, q_len, 2 M]``: all of each modality, then the last rows of it."""
        g, device = self.x.geometry, self.x.q.device
        if self.segments is None:
            kind = torch.zeros(g.batch, g.q_len, dtype=torch.int64, device=device)
        else:
            kind = self.segments.group[:, g.q_offset : g.q_offset + g.q_len].long()
        alive = g.to_mask(device).any(-1) if g.window and g.has_padding else _live_rows(g, device)
        of = (kind[..., None] == torch.arange(self.groups, device=device)) & alive[..., None]
        after = alive.flip(-1).cumsum(-1).flip(-1)  # live rows from here on
        last = of & (after <= LAST_ROWS)[..., None]
        return torch.cat([of, last], -1).float()

    def energy(self, difference_of: Tensor | None, weight: Tensor | None) -> Tensor:
        """Sums of squares of the exact output, or of what differs from it, float64 ``[HQ, 2 M]``.

        Args:
            weight: ``[B, HQ, q_len]`` of each row; what is in rows of weight 0 does not matter.
        """
        found = []
        step = max(1, CHUNK_BYTES // max(1, 4 * self.exact[:, 0].numel()))
        for start in range(0, self.heads, step):
            part = self.exact[:, start : start + step].float()
            if difference_of is not None:
                part = difference_of[:, start : start + step].float() - part
            square = part.square().sum(-1).double()  # [B, heads, q_len]
            if weight is not None:
                mine = weight[:, start : start + step]
                square = square.masked_fill(mine == 0, 0.0) * mine
            found.append((square[..., None] * self.member[:, None].double()).sum((0, 2)))
        return torch.cat(found).cpu()

    @cached_property
    def full(self) -> Tensor:
        """Energy of the exact output over all rows, float64 ``[HQ, 2 M]``."""
        return self.energy(None, None)

    @cached_property
    def dense_work(self) -> Work:
        """Work of a dense head: numbers, over the batch."""
        work = plan_work(dense_plan(self.x.geometry, self.tiles, self.x.q.device))
        return Work(*(float(torch.as_tensor(part)[:, 0].sum()) for part in work))

    @cached_property
    def dense_seconds(self) -> float:
        return float(self.how.costs.coefficients.seconds(self.dense_work, calls=0))

    def plan(self, heads: Sequence[HeadPattern]) -> Plan:
        return _plan(self.x, heads, self.tiles, lambda: self.segments, dense_tail=self.how.dense_tail)

    def measure(self, heads: Sequence[HeadPattern], region: int | None = None) -> Measured:
        """Plan and run.

        Args:
            heads: one pattern for each query head, with boundaries or without, but not mixed.
            region: count cost and tiles of this region alone.
        """
        plan = self.plan(heads)
        bounded = self.segments is not None and isinstance(heads[0], ByModality)
        groups = self.segments.tile_group if bounded and self.segments is not None else None
        count = self.groups if bounded else 1
        work = plan_work(plan, groups, count, region)
        if groups is None:
            work = Work(*(torch.as_tensor(part)[..., None] for part in work))
        cost = torch.as_tensor(self.how.costs.coefficients.seconds(work, calls=0)).sum(0) / self.dense_seconds
        density = torch.as_tensor(work.visited).sum(0) / max(1.0, float(self.dense_work.visited))
        shown, weight = self._sampled(plan, groups)
        difference = self.energy(self.run(shown), weight)
        return Measured(self._normalised(difference), self._recall(plan), density.double().cpu(), cost.double().cpu())

    def _sampled(self, plan: Plan, groups: Tensor | None) -> tuple[Plan, Tensor | None]:
        """The plan with only some query tiles, and for how many rows each row stands, float64 ``[B, HQ, q_len]``; None
        where every row stands for itself alone."""
        step = round(plan.geometry.q_len / self.how.rows_at_most)
        if step < 2:
            return plan, None
        weight = tile_weights(plan, groups, self.groups, step, LAST_ROWS // plan.block_m + 1)
        rows, q_len = plan.rows(), plan.geometry.q_len
        of_rows = torch.zeros(*rows.shape[:2], q_len + 1, dtype=torch.float64, device=rows.device)
        of_slots = weight[:, None, :, None].expand_as(rows)
        of_rows.scatter_(-1, torch.where(rows < 0, q_len, rows).flatten(2), of_slots.flatten(2))
        tiles = plan.tiles * (weight > 0)[:, None, :, None, None].to(plan.tiles.dtype)
        return dataclasses.replace(plan, tiles=tiles), of_rows[..., :-1]

    def _normalised(self, sums: Tensor) -> Tensor:
        """Squared relative error by query modality, float64 ``[HQ, M]``; the sum over modalities is the head's."""
        everything, last = (part.clamp(min=0) for part in sums.split(self.groups, -1))
        whole, end = (part.sum(-1, keepdim=True).clamp(min=1e-30) for part in self.full.split(self.groups, -1))
        share = share_of_all(self.how.rows)
        found: Tensor = share * everything / whole + (1 - share) * last / end
        return found

    @cached_property
    def recall_rows(self) -> Tensor:
        """Query rows whose recall is measured, int64 ``[R]``."""
        g = self.x.geometry
        stop = g.q_len if g.kv_stop is None else max(1, min(g.q_len, int(g.kv_stop.max()) - g.q_offset))
        half = RECALL_ROWS // 2
        spaced = torch.linspace(0, stop - 1, half).long()
        last = torch.linspace(max(0, stop - LAST_ROWS), stop - 1, half).long()
        rows: Tensor = torch.cat([spaced, last]).unique()
        return rows.to(self.x.q.device)

    @property
    def _rows_of_batch(self) -> Tensor:
        """The same for each batch element, ``[B, R]``."""
        return self.recall_rows.expand(self.x.geometry.batch, -1)

    @cached_property
    def _row_mask(self) -> Tensor:
        """The pairs of those rows that the model allows, bool ``[B, R, kv_len]``."""
        return visible_keys(self.x.geometry, self._rows_of_batch)

    @cached_property
    def _probabilities(self) -> Tensor:
        """Attention of those rows, float16 on a GPU to save memory, ``[B, HQ, R, kv_len]``; rows without keys are 0."""
        x, g = self.x, self.x.geometry
        hidden = ~self._row_mask
        found = []
        for h in range(g.q_heads):
            scores = x.q[:, h, self.recall_rows].float() @ x.k[:, h // g.group].float().transpose(1, 2) * x.scale
            weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1).masked_fill(hidden, 0.0)
            found.append(weights.half() if x.q.device.type == "cuda" else weights)
        return torch.stack(found, 1)

    def _recall(self, plan: Plan) -> Tensor:
        """Mean recall of each query modality's share of the sampled rows, float64 ``[HQ, M]``: sums over modalities
        give the recall of the head."""
        kept = row_mask(plan, self._rows_of_batch)
        mass = torch.stack([(self._probabilities[:, h] * kept[:, h]).float().sum(-1) for h in range(self.heads)], 1)
        total = torch.stack([self._probabilities[:, h].float().sum(-1) for h in range(self.heads)], 1)
        member = self.member[:, self.recall_rows, : self.groups].double()  # [B, R, M]
        share = (mass.double() / total.double().clamp(min=1e-12)).clamp(max=1.0)
        return ((share[..., None] * member[:, None]).sum((0, 2)) / member.sum().clamp(min=1.0)).cpu()


def share_of_all(rows: Rows) -> float:
    """Weight of the error over all rows; that over the last ones has the rest."""
    return {"all": 1.0, "last": 0.0, "both": 0.5}[rows]


def run_heads(x: LayerInput, heads: Sequence[HeadPattern], *, dense_tail: bool) -> Tensor:
    """The attention ``[B, HQ, q_len, D]`` under one pattern for each query head."""
    family = kernel_families(x.q.device, x.q.dtype, x.q.shape[-1])[0]
    plan = _plan(x, heads, family.tiles, lambda: _segments(x, family.tiles), dense_tail=dense_tail)
    return family.run(x.q, x.k, x.v, plan, x.scale, torch.empty_like(x.q))


def _segments(x: LayerInput, tiles: TileShape) -> Segments | None:
    if len(x.labels) < 2 or x.ids is None:
        return None
    return segment(x.ids, x.labels, x.geometry, tiles)


def _plan(
    x: LayerInput,
    heads: Sequence[HeadPattern],
    tiles: TileShape,
    segments: Callable[[], Segments | None],
    *,
    dense_tail: bool,
) -> Plan:
    grouped = segments() if any(isinstance(p, ByModality) for p in heads) else None
    if grouped is not None:
        plan = build_bounded_plan(heads, x.q, x.k, x.geometry, x.scale, tiles, grouped)
    else:
        plan = build_plan([_plain(p) for p in heads], x.q, x.k, x.geometry, x.scale, tiles)
    return keep_tail(plan) if dense_tail else plan


def _live_rows(g: Geometry, device: torch.device) -> Tensor:
    """Rows that see some key, bool ``[B, q_len]``, for geometries without both window and padding."""
    position = torch.arange(g.q_len, device=device) + g.q_offset
    live = g.live_keys(device)
    if live is None:
        return torch.ones(g.batch, g.q_len, dtype=torch.bool, device=device)
    first = torch.where(live, torch.arange(g.kv_len, device=device), g.kv_len).amin(-1)
    last = torch.where(live, torch.arange(1, g.kv_len + 1, device=device), 0).amax(-1)
    # Right padding ends the rows where it ends the keys: nobody reads what comes after.
    end = torch.where(last >= g.kv_len, g.q_len + g.q_offset, last)
    return (position >= first[:, None]) & (position < end[:, None])


def tile_weights(plan: Plan, groups: Tensor | None, count: int, step: int, last: int = 2) -> Tensor:
    """For how many query tiles each one stands when about one in ``step`` is run, float64 ``[B, QT]``, 0 for none.

    The first ``step`` tiles of every group stand for themselves (early rows average few values, so their outputs are
    large), and so do the ``last`` ones (the question). Of the others every so many is run.

    Args:
        groups: integers ``[B, QT]`` below ``count``, equal ones together; None for one group.
    """
    tiles, device = plan.query_tiles, plan.tiles.device
    if groups is None:
        groups = torch.zeros(plan.geometry.batch, tiles, dtype=torch.int64, device=device)
    place = torch.arange(tiles, device=device)
    change = torch.nn.functional.pad(groups[:, 1:] != groups[:, :-1], (1, 1), value=True)  # [B, QT + 1]
    from_start = place - torch.where(change[:, :-1], place, 0).cummax(-1).values
    ends = torch.where(change[:, 1:], place, tiles).flip(-1).cummin(-1).values.flip(-1)
    from_end = ends - place
    certain = (from_start < step) | (from_end < last)
    drawn = ~certain & (from_end % step == 0)
    member = groups[..., None] == torch.arange(count, device=device)  # [B, QT, M]
    stands_for = (member & ~certain[..., None]).sum(1) / (member & drawn[..., None]).sum(1).clamp(min=1)
    return torch.where(certain, 1.0, torch.where(drawn, stands_for.double().gather(1, groups.long()), 0.0))


def _plain(pattern: HeadPattern) -> Pattern:
    if isinstance(pattern, ByModality):
        raise ValueError("a head with boundaries needs modality ids")
    return pattern
