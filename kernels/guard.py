"""The guard: how far from exact attention a plan is, on rows that nobody chose it by.

Plans are made from a probe of the last rows. A head whose pattern changes in mid-prompt looks well there and loses its
attention elsewhere. The guard takes rows from the whole prompt, computes their exact attention, and says what share of
it lies on the plan's pairs (``recall``) and how far the output is off (``error``). ``enforce`` turns heads that fall
short into dense ones before the kernel runs.

Cost: exact attention of ``R`` rows, a share ``2 R / N`` of dense causal attention. On a GPU kernels compute it
(``exact_rows``), 64 rows at a time. Nothing waits for the device.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from mmi_compile.kernels.exact_rows import run_exact_rows
from mmi_compile.kernels.frames import constant
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.planner import make_dense
from mmi_compile.kernels.probe import LAST_Q, first_live_key, last_live_position

GUARD_ROWS = 64
"""Rows that are looked at unless told otherwise."""

_FINE = 1 << 20


@dataclass(frozen=True)
class Guard:
    """What is asked of the guard in one attention call.

    Attributes:
        verify: compare the output with exact attention.
        min_recall: heads below it are moved to dense before the kernel runs; 0 asks nothing.
        rows: query rows to look at, at most.
    """

    verify: bool = False
    min_recall: float = 0.0
    rows: int = GUARD_ROWS

    @property
    def asked(self) -> bool:
        return self.verify or self.min_recall > 0


NO_GUARD = Guard()


@dataclass(frozen=True)
class GuardReading:
    """What the guard saw, for every batch element and query head. Tensors on the device of the inputs.

    Attributes:
        error: float ``[B, HQ]``, norm of ``out - exact`` over the rows, divided by the norm of ``exact``.
        recall: float ``[B, HQ]``, share of the exact probability of the rows that lies on the plan's pairs; 1 where no
            row sees a key. Inputs that are NaN make both NaN.
        rows: int64 ``[B, R]``, the query rows.
    """

    error: Tensor
    recall: Tensor
    rows: Tensor


def guard_rows(geometry: Geometry, count: int = GUARD_ROWS, seed: int = 0, *, device: torch.device) -> Tensor:
    """Query rows to look at, int64 ``[B, R]``, ascending, ``R`` the smaller of ``count`` and ``q_len``.

    The live rows without the last ``LAST_Q``, which the probe has seen (all live rows where there are not twice as
    many), are cut into ``R`` stretches of equal length, and one row is drawn from each. The same arguments give the
    same rows. Where fewer rows are live than asked for, some come twice.

    Raises:
        ValueError: ``count`` below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; give 1 or more rows for the guard to look at")
    g, number = geometry, min(count, geometry.q_len)
    draw = random.Random(seed)
    places = constant(tuple(n * _FINE + draw.randrange(_FINE) for n in range(number)), device, torch.int64)
    first = (first_live_key(g, device) - g.q_offset).clamp(0, max(0, g.q_len - 1))[:, None]
    stop = (last_live_position(g, device) - g.q_offset)[:, None].clamp(max=g.q_len)
    length = (stop - first).clamp(min=1)
    length = torch.where(length >= 2 * LAST_Q, length - LAST_Q, length)
    return first + places * length // (max(1, number) * _FINE)


def measure(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, plan: Plan, geometry: Geometry, scale: float, rows: Tensor
) -> GuardReading:
    """Compare some rows of ``out``, which a kernel computed on ``plan``, with exact attention.

    Args:
        q: floating ``[B, HQ, q_len, D]``; k, v: ``[B, HKV, kv_len, D]``; out: ``[B, HQ, q_len, D]``.
        geometry: that of the plan. scale: factor on the scores.
        rows: int64 ``[B, R]``, for example of ``guard_rows``.

    Exact means float32 products and sums (float64 for float64 inputs) under the model's own mask; where kernels run,
    see ``exact_rows``.

    Raises:
        ValueError: shapes that do not fit together, or a plan of another geometry.
    """
    _check(q, k, plan, geometry, rows)
    if v.shape[:3] != k.shape[:3] or out.shape[:3] != q.shape[:3]:
        raise ValueError(f"v {tuple(v.shape)} and out {tuple(out.shape)} must be as long as k and q")
    seen = run_exact_rows(q, k, v, plan, scale, rows)
    exact = seen.outputs
    assert exact is not None
    given = out.gather(2, rows[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[-1])).to(exact.dtype)
    off, norm = (x.square().sum((-1, -2)) for x in (given - exact, exact))
    # Nothing to see and nothing written is no error; something written there is.
    nothing = torch.where(off > 0, torch.inf, off)
    return GuardReading(torch.where(norm == 0, nothing, (off / norm).sqrt()), seen.recall, rows)


def measure_recall(q: Tensor, k: Tensor, plan: Plan, geometry: Geometry, scale: float, rows: Tensor) -> Tensor:
    """``GuardReading.recall`` alone, before any kernel has run. Arguments as for ``measure``."""
    _check(q, k, plan, geometry, rows)
    return run_exact_rows(q, k, None, plan, scale, rows).recall


def enforce(
    plan: Plan, q: Tensor, k: Tensor, geometry: Geometry, scale: float, min_recall: float, rows: Tensor
) -> tuple[Plan, Tensor, Tensor]:
    """The plan with every head dense whose recall on ``rows`` is below ``min_recall``.

    Args:
        q, k, geometry, scale, rows: as for ``measure``. min_recall: share of the probability, in (0, 1].

    Returns:
        The plan; the recall of each head before, float ``[B, HQ]``; and which heads were moved to dense, bool
        ``[B, HQ]``. A head whose recall is NaN is moved as well.

    Raises:
        ValueError: ``min_recall`` out of range, or as for ``measure``.
    """
    if not 0 < min_recall <= 1:
        raise ValueError(f"min_recall is {min_recall}; give a share above 0 and up to 1, such as 0.9")
    recall = measure_recall(q, k, plan, geometry, scale, rows)
    moved = ~(recall >= min_recall)
    return make_dense(plan, moved[..., None]), recall, moved


def _check(q: Tensor, k: Tensor, plan: Plan, geometry: Geometry, rows: Tensor) -> None:
    g = geometry
    if plan.geometry is not g and _lengths(plan.geometry) != _lengths(g):
        raise ValueError(f"the plan is for {_lengths(plan.geometry)}, the call for {_lengths(g)}")
    if q.shape[:3] != (g.batch, g.q_heads, g.q_len) or k.shape[:3] != (g.batch, g.kv_heads, g.kv_len):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit {_lengths(g)}")
    if rows.dim() != 2 or rows.shape[0] != g.batch or rows.dtype != torch.int64:
        raise ValueError(f"rows are {rows.dtype} {tuple(rows.shape)}; must be int64 [B, R] with B = {g.batch}")


def _lengths(geometry: Geometry) -> dict[str, int]:
    return {name: x for name, x in vars(geometry).items() if isinstance(x, int)}
