"""Exact attention under the model's own mask, with memory linear in the length.

PyTorch's fused attention where the geometry is plainly causal, or becomes so when padding is sliced off; otherwise
the dense plan, whose tiles touch only keys that the mask allows (a sliding window then costs what it should).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmi_compile.kernels.cpu import attention_cpu
from mmi_compile.kernels.geometry import Geometry, check_scale
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.planner import TileShape, dense_plan

RunPlan: TypeAlias = Callable[[Tensor, Tensor, Tensor, Plan, float], Tensor]
"""``run_plan(q, k, v, plan, scale) -> out``: softmax attention over ``plan.to_mask()``."""


_FUSED_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""On a GPU, fastest first. Not the math path: it builds the N×N scores."""


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    scale: float,
    tiles: TileShape,
    run_plan: RunPlan | None = None,
) -> Tensor:
    """Softmax attention over exactly ``geometry.to_mask()``; rows that see nothing are zeros.

    Args:
        q: floating ``[B, HQ, q_len, D]``; k, v: ``[B, HKV, kv_len, D]``.
        tiles: tile shape of the dense plan, where one is needed.
        run_plan: what runs that plan; ``attention_cpu`` for CPU tensors when None.

    Returns:
        ``[B, HQ, q_len, D]`` in the dtype of ``q``.

    Raises:
        ValueError: a plan is needed on a device other than the CPU and ``run_plan`` is None; or ``scale`` is not a
            positive float32.
    """
    check_scale(scale)
    g = geometry
    if not (g.q_len and g.kv_len):
        return q.new_zeros(q.shape[:-1] + v.shape[-1:])
    if not g.has_padding and not g.window and not g.has_rows:
        if is_plain_causal(g):
            return _fused(q, k, v, scale, causal=True)
        if g.q_offset >= g.kv_len - 1:  # every row sees every key, such as the one row of a decoding step
            return _fused(q, k, v, scale, causal=False)
    square = not g.window and not g.has_rows and not g.q_offset and g.q_len == g.kv_len
    if q.device.type == "cpu" and g.key_padding is None and square:
        return _sliced(q, k, v, g, scale)
    if run_plan is None:
        if q.device.type != "cpu":
            raise ValueError(f"this mask needs a plan on {q.device}; pass run_plan, the kernel that runs plans there")
        run_plan = attention_cpu
    return run_plan(q, k, v, dense_plan(g, tiles, q.device), scale)


def is_plain_causal(geometry: Geometry) -> bool:
    """Whether the mask is the square lower triangle and nothing else: ``is_causal=True`` of fused attention."""
    g = geometry
    plain = not g.has_padding and not g.window and not g.has_rows
    return plain and not g.q_offset and g.q_len == g.kv_len


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> Tensor:
    # Grouped heads stay on the linear-memory path on the CPU too (8 MiB at 16 K tokens, where the scores take 2 GiB).
    grouped = q.shape[1] != k.shape[1]
    chosen = sdpa_kernel(_FUSED_BACKENDS, set_priority=True) if q.device.type == "cuda" else nullcontext()
    with chosen:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)


def _sliced(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, scale: float) -> Tensor:
    """Contiguous padding of a square causal mask on the CPU: slice the live keys of each batch element.

    Live rows are a smaller square; rows right of the live keys see all of them; rows left of them see none.
    """
    g = geometry
    out = torch.zeros(q.shape[:-1] + v.shape[-1:], dtype=q.dtype)
    for b in range(g.batch):
        start = 0 if g.kv_start is None else int(g.kv_start[b])
        stop = g.kv_len if g.kv_stop is None else min(int(g.kv_stop[b]), g.kv_len)
        if start >= stop:
            continue
        keys, values = k[b : b + 1, :, start:stop], v[b : b + 1, :, start:stop]
        for rows, causal in ((slice(start, stop), True), (slice(stop, g.q_len), False)):
            if rows.start < rows.stop:
                out[b : b + 1, :, rows] = _fused(q[b : b + 1, :, rows], keys, values, scale, causal=causal)
    return out
