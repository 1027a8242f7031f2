"""Exact attention of some rows, and how much of it lies on the pairs of a plan.

On a GPU the kernels of the spread probe sum the probability of each row by key block and at the columns of the plan, in
two passes over the keys; outputs take a third one. Everywhere else plain PyTorch, which the kernels are tested against,
computes the probabilities of a few rows at a time; also on a GPU for float32 and float64, for plans with keys grouped
by modality (``Plan.key_order``, boundary ``2d``) and for rows with intervals of keys of their own.

No atomics, and every launch constant follows from shapes: results are identical from run to run. Nothing waits for the
device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_compile.kernels import spread_probe
from mmi_compile.kernels.fused_probe import PROGRAMS, unit_strides, why_not_fused
from mmi_compile.kernels.launch import compile_kernel_ahead
from mmi_compile.kernels.modality_probe import ModalityTiles, argument_type, modality_tiles
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.plan_rows import PlanRows
from mmi_compile.kernels.probe import row_weights
from mmi_compile.kernels.spec import padded_head_dim
from mmi_compile.kernels.spread_probe import SpreadProbe, SpreadRows, fused_spread_probe

CHUNK_BYTES = 64 << 20
"""Of one head, scores that the reference holds at a time, which bounds the rows; one row at least is processed whole,
and how many heads go together is for ``row_weights`` to say. Beside the kernels it bounds what says which blocks and
columns the rows visit; one head at least is processed whole."""

_ROWS = 64


class ExactRows(NamedTuple):
    """What rows attend to. Float32, float64 for float64 inputs.

    Attributes:
        covered: ``[B, HQ]``, probability on the plan's pairs, summed over the rows; total: on all pairs, likewise.
        outputs: ``[B, HQ, R, D]``, attention of the rows, zeros for one that sees no key; None unless asked for.
    """

    covered: Tensor
    total: Tensor
    outputs: Tensor | None

    @property
    def recall(self) -> Tensor:
        """Share of the probability on the plan's pairs, ``[B, HQ]``; 1 where no row sees a key."""
        return torch.where(self.total == 0, 1.0, self.covered / self.total)


def run_exact_rows(q: Tensor, k: Tensor, v: Tensor | None, plan: Plan, scale: float, rows: Tensor) -> ExactRows:
    """Attend from some rows to all keys they may see.

    Args:
        q: floating ``[B, HQ, q_len, D]``; k, v: ``[B, HKV, kv_len, D]``. v: None where outputs are not asked for.
        scale: factor on the scores. rows: int64 ``[B, R]``, in any order and also twice.
    """
    run = fused_exact_rows if why_not_by_kernels(q, k, v, plan, rows) is None else reference_exact_rows
    return run(q, k, v, plan, scale, rows)


def why_not_by_kernels(q: Tensor, k: Tensor, v: Tensor | None, plan: Plan, rows: Tensor) -> str | None:
    """Why kernels cannot serve this call, or None when they can. Never waits for the device."""
    if not q.numel() or not k.numel() or not rows.numel():
        return "nothing to attend to"
    if v is not None and (v.dtype != k.dtype or v.device != k.device or v.shape[-1] != k.shape[-1]):
        return f"v is {v.dtype} of {v.shape[-1]} on {v.device}, unlike k: the kernels need them alike"
    if plan.key_order is not None:
        return "keys are grouped: the kernels sum by blocks of keys in order"
    if plan.geometry.has_rows:
        return "rows have intervals of keys: the kernels know causality, padding and windows"
    if plan.block_n < 16 or plan.block_n & (plan.block_n - 1):
        return f"key blocks of {plan.block_n}: the kernels need a power of two, 16 or more"
    return why_not_fused(q, k)


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def reference_exact_rows(q: Tensor, k: Tensor, v: Tensor | None, plan: Plan, scale: float, rows: Tensor) -> ExactRows:
    """``run_exact_rows`` in plain PyTorch, for any plan, dtype and device."""
    g, work = plan.geometry, torch.float64 if q.dtype == torch.float64 else torch.float32
    covered, total = torch.zeros(2, *q.shape[:2], dtype=work, device=q.device).unbind(0)
    outputs = None if v is None else torch.zeros(*q.shape[:2], rows.shape[1], v.shape[-1], dtype=work, device=q.device)
    found, live = PlanRows.of(plan, rows), g.live_keys(q.device)
    for heads, some, weights in _row_chunks(q, k, plan, scale, rows):
        total[:, heads] += weights.sum((-1, -2))
        covered[:, heads] += torch.where(found.mask(heads, some), weights, 0.0).sum((-1, -2))
        if v is not None and outputs is not None:
            values = v[:, heads.start // g.group].to(work)
            if live is not None:  # whatever stands in padding, 0 times it must be 0
                values = values.masked_fill(~live[..., None], 0.0)
            outputs[:, heads, some] = (weights.flatten(1, 2) @ values).view(*weights.shape[:3], -1)
    return ExactRows(covered, total, outputs)


def _row_chunks(q: Tensor, k: Tensor, plan: Plan, scale: float, rows: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Some heads of one key head, some rows, and exact probabilities ``[B, H, R, kv_len]``; dead rows are zeros."""
    if not q.numel() or not k.numel():
        return
    g, item = plan.geometry, torch.promote_types(q.dtype, torch.float32).itemsize
    at_once = max(1, min(CHUNK_BYTES // (g.batch * g.kv_len * item), rows.shape[1]))
    for first in range(0, rows.shape[1], at_once):
        some = slice(first, min(first + at_once, rows.shape[1]))
        for heads, weights in row_weights(q, k, g, scale, list(range(g.q_heads)), rows[:, some]):
            yield slice(heads[0], heads[-1] + 1), some, weights


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


def fused_exact_rows(
    q: Tensor, k: Tensor, v: Tensor | None, plan: Plan, scale: float, rows: Tensor,
    *, tiles: ModalityTiles | None = None, programs: int = PROGRAMS,
) -> ExactRows:  # fmt: skip
    """``run_exact_rows`` by kernels, where ``why_not_by_kernels`` has no objection; everything is float32.

    Args:
        q, k, v: fp16 or bf16 (fp32 in the interpreter) whose last dimension is contiguous; others are copied.
        tiles: launch constants; None takes those of the probe of boundaries. programs: to aim at in a pass over the
            keys.

    Sums hold ``R * HQ`` numbers for every key block (or tile of the kernel, if that is smaller) and for every column.
    """
    g = plan.geometry
    probe = fused_spread_probe(
        q, k, g, scale, _single_rows(rows, g.q_offset), plan.block_n, tiles=tiles, programs=programs
    )
    real = slice(rows.shape[1])
    at_columns = None
    if plan.columns.shape[-1]:
        # What no tile uses may be any number.
        at_columns = probe.mass_at(plan.columns.clamp(0, g.kv_len))[:, :, real]
    outputs = None if v is None else _outputs(probe, v, programs)[:, :, real]
    return ExactRows(*_masses(PlanRows.of(plan, rows), probe.blocks[:, :, real], at_columns), outputs)


def _single_rows(rows: Tensor, q_offset: int) -> SpreadRows:
    """Groups of one row each, in kinds of 64; -1 where there is no row. No key is credited."""
    batch, count = rows.shape
    spare = (0, -count % _ROWS)
    found, positions = (F.pad(x.int(), spare, value=-1).view(batch, -1, _ROWS) for x in (rows, rows + q_offset))
    return SpreadRows(found, positions, _ROWS, positions[:, :0], positions[:, :0])


def _masses(found: PlanRows, by_block: Tensor, at_columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probability on the plan's pairs and on all pairs, ``[B, HQ]`` each.

    Args:
        by_block: ``[B, HQ, R, key blocks]``; at_columns: ``[B, HQ, R, MAX_COLUMNS]``.
    """
    plan, g = found.plan, found.plan.geometry
    widest = 8 * max(plan.key_blocks * plan.regions, plan.columns.shape[-1])
    step = max(1, CHUNK_BYTES // (g.batch * by_block.shape[2] * widest))
    covered, total = [], []
    for first in range(0, g.q_heads, step):
        heads = slice(first, first + step)
        # Two tensors laid out alike: where all is visited the sums are equal to the last bit.
        mass, visited = by_block[:, heads].clone(memory_format=torch.contiguous_format), found.blocks(heads)
        total.append(mass.sum((-1, -2)))
        covered.append(torch.where(visited, mass, 0.0).sum((-1, -2)))
        if at_columns is not None:
            block = (plan.columns[:, heads].long() // plan.block_n).clamp(0, plan.key_blocks - 1)
            within = visited.gather(-1, block[:, :, None].expand(-1, -1, visited.shape[2], -1))
            own = found.columns(heads) & ~within
            covered[-1] += torch.where(own, at_columns[:, heads], 0.0).sum((-1, -2))
    return torch.cat(covered, 1), torch.cat(total, 1)


def _outputs(probe: SpreadProbe, v: Tensor, programs: int) -> Tensor:
    """Attention of the rows, float32 ``[B, HQ, kinds * 64, D]``."""
    call, kinds = probe.call, probe.log_sums.shape[1]
    assert call.tiles is not None
    v = v if v.stride(-1) == 1 else v.contiguous()
    strides, unit = unit_strides(v)
    given = dict(zip(("stride_vb", "stride_vh", "stride_vn"), strides, strict=True)) | {
        "v": v, "VALUE_UNIT": unit, "log_sums": probe.log_sums,
    }  # fmt: skip
    width = v.shape[-1]
    parts = call.packed(kinds).launch_partial("exact_outputs", call.tiles.columns, programs, given, width=width)
    outputs: Tensor = parts.sum(2).unflatten(1, (kinds, -1)).transpose(1, 2).flatten(2, 3)
    return outputs


def compile_ahead(arch: str, dtype: str, head_dim: int, *, special: bool = False) -> dict[str, Any]:
    """Compile every kernel for ``arch`` on a machine that need not have it; the compiled kernels by name.

    Args:
        arch: for example ``"sm_90"`` or ``"gfx942"``; dtype: "bf16" or "fp16".
        special: with padding bounds, holes and a window.
    """
    from mmi_compile.kernels import exact_rows_kernels

    tile = modality_tiles(arch, head_dim).columns
    constants = {f"HAS_{name}": special for name in ("BOUNDS", "PADDING", "WINDOW")} | {
        "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim), "UNIT": 8, "VALUE_UNIT": 8, "HEADS": tile.heads,
        "BLOCK_N": tile.block_n,
    }  # fmt: skip
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = spread_probe.compile_ahead(arch, dtype, head_dim, special=special, each=1, credit=False)
    compiled["exact_outputs"] = compile_kernel_ahead(
        exact_rows_kernels.exact_outputs, arch, constants, lambda argument: argument_type(argument, dtype), options
    )
    return compiled
