"""Which kernel serves one attention call, decided when it runs: lengths are symbols until then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmi_compile.cost_file import Costs, coefficients_for
from mmi_compile.kernels.adaptive import Boundaries, adaptive_plan, why_not_apart
from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.cost import EVEN, Work
from mmi_compile.kernels.cpu import attention_cpu
from mmi_compile.kernels.dense import dense_attention
from mmi_compile.kernels.geometry import Geometry, check_scale
from mmi_compile.kernels.guard import NO_GUARD, Guard, enforce, guard_rows, measure
from mmi_compile.kernels.layer_heads import LayerHeads
from mmi_compile.kernels.own_tiles import own_tiles
from mmi_compile.kernels.patterns import ByModality
from mmi_compile.kernels.plan import Plan, causal_tiles
from mmi_compile.kernels.planner import TileShape, build_plan, dense_plan, keep_tail
from mmi_compile.kernels.segments import Segments
from mmi_compile.profiling import span
from mmi_compile.runtime import AttentionRun, GuardRun

CPU_DENSE_BELOW = 6144
"""Tokens below which dense attention on a CPU is as fast as probe, plan and sparse kernel together: on two cores they
took 1.34 times as long at 4 K tokens, 0.83 at 6 K and 0.75 at 8 K."""
GPU_DENSE_BELOW = 7e12
"""The same on a GPU, in floating-point operations of the dense attention. On one H100 with 28 heads, probe and plan
took the device 2 to 5 ms and the host 9 ms; dense attention of this size takes the device 10 ms."""
GPU_DENSE_SECONDS = 0.010
"""The same where the device was calibrated: predicted time of the dense attention."""
OWN_DENSE_ABOVE = 1e12
"""Floating-point operations above which dense attention runs on our own kernel where that beats cuDNN (Hopper: 9 to
24 % from 4 K to 128 K tokens). Smaller calls go to cuDNN, which costs the host less to launch."""

RunPlan = Callable[[Tensor, Tensor, Tensor, Plan, float, "Tensor | None"], Tensor]

CPU_TILES = TileShape(128, 64)
"""Tiles of the CPU path: large enough that a matrix product outweighs a Python step."""


@dataclass(frozen=True)
class ConfiguredHeads:
    """What ``policy="config"`` runs.

    Attributes:
        heads: of this layer. dense_tail: the last rows keep every key.
        segments: the grouped prompt for given tiles; None where its modality is not known, so that all of it is text.
        notes: for the report.
    """

    heads: LayerHeads
    dense_tail: bool
    segments: Callable[[TileShape], Segments] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ApartHeads:
    """What ``policy="adaptive"`` may choose beside one pattern for the whole matrix.

    Attributes:
        boundaries: "q", "2d" or both.
        segments: the grouped prompt for given tiles; None where that was not to be had: note says why.
    """

    boundaries: tuple[str, ...]
    segments: Callable[[TileShape], Segments] | None = None
    note: str = ""

    def given(self, geometry: Geometry, tiles: TileShape) -> tuple[Boundaries | None, str]:
        """For the planner, or None and the reason."""
        if self.segments is None:
            return None, self.note
        segments = self.segments(tiles)
        reason = why_not_apart(geometry, tiles, segments)
        if reason is not None:
            return None, f"boundaries were not tried: {reason}"
        return Boundaries(self.boundaries, segments, ("text", "vision")), ""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    scale: float,
    new_output: Callable[[], Tensor],
    *,
    policy: str,
    recall: float,
    max_density: float,
    min_tokens: int,
    dense_tail: bool = True,
    configured: ConfiguredHeads | None = None,
    apart: ApartHeads | None = None,
    guard: Guard = NO_GUARD,
) -> tuple[Tensor, AttentionRun]:
    """Prefill attention ``[B, HQ, q_len, D]``, and how it ran.

    Args:
        q: ``[B, HQ, q_len, D]``; k, v: ``[B, HKV, kv_len, D]`` with ``kv_len == geometry.kv_len``.
        new_output: makes the tensor that our own kernels write to. Fused kernels of PyTorch make their own.
        policy, recall, max_density, min_tokens, dense_tail: as for ``mmi::attention``; with a negative ``min_tokens``
            the device and the amount of work decide.
        configured: the heads of this layer, for ``policy="config"`` alone. apart: boundaries that heads may choose,
            for ``policy="adaptive"``.
        guard: what to verify where heads are sparse.

    Raises:
        ValueError: ``scale`` is not a positive float32, or ``policy="config"`` comes without heads.
    """
    check_scale(scale)
    run = AttentionRun(q_len=geometry.q_len, kv_len=geometry.kv_len, path="")
    if not q.numel() or not k.numel():
        run.path = "nothing to attend to"
        return new_output().zero_(), run
    tiles, kernel, name, family = _kernel_for(q.device, q.dtype, q.shape[3], portable=geometry.has_rows)
    # Exact attention compares nothing, so that it need not ask for the device's file.
    costs = Costs(EVEN, False) if policy == "exact" else coefficients_for(q.device, family, q.shape[3], tiles)
    why_dense = _why_dense(q, geometry, policy, min_tokens, costs, tiles)
    if why_dense:
        run.path = f"dense ({why_dense})"
        if geometry.has_rows and q.device.type == "cuda":
            run.path = f"dense ({why_dense}; rows with intervals of keys: {name})"

        def run_dense(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
            return kernel(q, k, v, plan, scale, new_output())

        if geometry.has_rows or _own_dense(q, geometry):
            return run_dense(q, k, v, dense_plan(geometry, tiles, q.device), scale), run
        return dense_attention(q, k, v, geometry, scale, tiles, run_plan=run_dense), run
    run.path = name
    if policy == "config":
        if configured is None:
            raise ValueError('policy "config" needs the heads of the layer')
        with span("mmi::plan"):
            plan = configured_plan(q, k, geometry, scale, tiles, configured)
        run.heads, run.density, run.notes = configured.heads.describe(), plan.density(), configured.notes
    else:
        with span("mmi::plan"):
            boundaries, note = (None, "") if apart is None else apart.given(geometry, tiles)
            plan, choice = adaptive_plan(
                q, k, geometry, scale, tiles, recall=recall, max_density=max_density, dense_tail=dense_tail,
                coefficients=costs.coefficients if costs.measured else EVEN, boundaries=boundaries,
            )  # fmt: skip
        run.choice, run.density = choice, choice.density
        run.notes = tuple(filter(None, (note, costs.problem)))
    if not guard.asked:
        with span("mmi::kernel"):
            return kernel(q, k, v, plan, scale, new_output()), run
    return _guarded(q, k, v, plan, geometry, scale, guard, run, lambda plan: kernel(q, k, v, plan, scale, new_output()))


def _guarded(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, geometry: Geometry, scale: float, guard: Guard, run: AttentionRun,
    kernel: Callable[[Plan], Tensor],
) -> tuple[Tensor, AttentionRun]:  # fmt: skip
    """Run ``kernel`` on the plan without the heads that fall short, and note what the guard saw."""
    rows = guard_rows(geometry, guard.rows, device=q.device)
    found = run.guard = GuardRun(rows.shape[1], guard.min_recall)
    if guard.min_recall:
        with span("mmi::guard"), found.watch.running(q.device):
            plan, found.recall, found.moved = enforce(plan, q, k, geometry, scale, guard.min_recall, rows)
            run.density = plan.density()
    with span("mmi::kernel"):
        out = kernel(plan)
    if guard.verify:
        with span("mmi::guard"), found.watch.running(q.device):
            reading = measure(q, k, v, out, plan, geometry, scale, rows)
            found.error = reading.error
            found.recall = reading.recall if found.recall is None else found.recall
    return out, run


def configured_plan(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, tiles: TileShape, configured: ConfiguredHeads
) -> Plan:
    """One plan for all heads of a layer, with and without boundaries.

    Raises:
        ValueError: the number of heads is not that of the layer.
    """
    heads = configured.heads.patterns
    if configured.heads.bounded and configured.segments is not None:
        segments = configured.segments(tiles)
        return build_bounded_plan(heads, q, k, geometry, scale, tiles, segments, dense_tail=configured.dense_tail)
    # Of text alone there is nothing to treat apart.
    patterns = [p.pattern(0, 0) if isinstance(p, ByModality) else p for p in heads]
    plan = build_plan(patterns, q, k, geometry, scale, tiles)
    return keep_tail(plan) if configured.dense_tail else plan


def _why_dense(q: Tensor, geometry: Geometry, policy: str, min_tokens: int, costs: Costs, tiles: TileShape) -> str:
    if policy == "exact":
        return "policy exact"
    if min_tokens < 0 and q.device.type == "cuda" and costs.measured:
        one_head = Work(dense=float(causal_tiles(geometry, tiles.block_m, tiles.block_n)))
        seconds = float(costs.coefficients.seconds(one_head, calls=0)) * geometry.batch * geometry.q_heads
        few = seconds < GPU_DENSE_SECONDS
        return f"{seconds * 1e3:.1f} ms < {GPU_DENSE_SECONDS * 1e3:g} ms, too little for a plan to pay" if few else ""
    if min_tokens < 0 and q.device.type == "cuda":
        work = dense_flop(geometry, q.shape[3])
        return (
            f"{work:.1e} FLOP < {GPU_DENSE_BELOW:.1e}, too little for a plan to pay" if work < GPU_DENSE_BELOW else ""
        )
    least = CPU_DENSE_BELOW if min_tokens < 0 else min_tokens
    return f"{geometry.kv_len} tokens < min_tokens {least}" if geometry.kv_len < least else ""


def _own_dense(q: Tensor, geometry: Geometry) -> bool:
    """Whether our own kernel is the fastest for this dense attention."""
    if q.device.type != "cuda" or dense_flop(geometry, q.shape[3]) < OWN_DENSE_ABOVE:
        return False
    from mmi_compile.kernels.run import families

    return "hopper" in families(q.device, q.dtype, q.shape[3])


def dense_flop(geometry: Geometry, head_dim: int) -> float:
    """Floating-point operations of dense causal attention: ``4 · D`` a pair, over all heads and batch elements."""
    g = geometry
    pairs = g.q_len * (g.q_offset + (g.q_len + 1) / 2)
    return 4.0 * head_dim * pairs * g.q_heads * g.batch


def tiles_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> TileShape:
    """Tiles of the plans that serve attention on this device; needs no tensor, so that fakes may ask as well."""
    return _kernel_for(device, dtype, head_dim)[0]


def _kernel_for(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, portable: bool = False
) -> tuple[TileShape, RunPlan, str, str]:
    """Tiles, kernel, its name, and its family in the cost model.

    ``portable`` where no other family has a kernel for the geometry.
    """
    if device.type == "cpu":
        return own_tiles() or CPU_TILES, attention_cpu, "tile-sparse PyTorch", "cpu"
    from mmi_compile.kernels.run import families, family_tiles, run_plan

    known = families(device, dtype, head_dim)
    family = known[0] if known and not portable else "portable"
    tiles = family_tiles(family, device, dtype, head_dim)

    def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, out: Tensor | None) -> Tensor:
        return run_plan(q, k, v, plan, scale, family=family, out=out)

    return tiles, run, f"Triton, {family}", family
