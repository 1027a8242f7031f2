"""The operators of attention whose mask groups tokens: packed documents, chunks, blocks that see both ways.

===========================  ======================================================================================
``mmi::row_bounds``          once per graph and mask: which keys each row sees, as an interval
``mmi::grouped_attention``   exact prefill attention under such a mask
===========================  ======================================================================================

They are as opaque, and as exact in their fakes, as those of :mod:`mmi_compile.kernels.ops`.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from mmi_compile import runtime
from mmi_compile.decision import MMIError
from mmi_compile.kernels import dispatch
from mmi_compile.kernels.geometry import Geometry, check_scale
from mmi_compile.kernels.groups import (
    intervals,
    lie_together,
    parse_clauses,
    scattered_attention,
    stack_groups,
)
from mmi_compile.kernels.ops import HOST_CODE, check_abi, empty_output, in_promised_layout, live_keys


@torch.library.custom_op("mmi::row_bounds", mutates_args=(), tags=HOST_CODE)
def row_bounds(
    groups: list[Tensor],
    clauses: str,
    known: list[bool],
    batch: int,
    q_len: int,
    kv_len: int,
    q_offset: int,
    abi: int,
) -> list[Tensor]:
    """Which keys each row of a prompt sees, for all layers that share a mask.

    Args:
        groups: a number per key each, ``[N]``, ``[B or 1, N]`` or ``[B or 1, 1, 1, N]``, bool or integers; numbers
            beyond ``kv_len`` are ignored.
        clauses: the mask, as :func:`mmi_compile.kernels.groups.clauses_to_text` writes it.
        known: groups whose tokens are proved to lie together. At the others this looks, which waits for the device.
        batch, q_len, kv_len, q_offset: of the attentions; row ``r`` stands at position ``r + q_offset < kv_len``.

    Returns:
        int32 ``[2, B, q_len]``, first keys and one past the last ones; int64 ``[K, B, kv_len]``, the groups; bool
        ``[1]`` on the host, whether the tokens of every group lie together, so that the first tensor says it all.

    Raises:
        MMIError: a group is too short, or the graph was rewritten by an incompatible version.
    """
    check_abi(abi)
    if q_len + q_offset > kv_len:
        raise MMIError(f"{q_len} rows from position {q_offset} on stand beyond the {kv_len} keys of this attention")
    try:
        ids = stack_groups(groups, batch, kv_len)
    except ValueError as error:
        raise MMIError(f"{error}; pass ids, types and positions with one entry per token, past ones included") from None
    mask = parse_clauses(clauses)
    together = torch.ones(1, dtype=torch.bool)
    if not all(known):
        together = lie_together(mask, ids, known).cpu().reshape(1).clone()
    return [intervals(mask, ids, q_len, q_offset), ids, together]


@row_bounds.register_fake
def _(
    groups: list[Tensor],
    clauses: str,
    known: list[bool],
    batch: int,
    q_len: int,
    kv_len: int,
    q_offset: int,
    abi: int,
) -> list[Tensor]:
    like = groups[0]
    return [
        like.new_empty(2, batch, q_len, dtype=torch.int32),
        like.new_empty(len(groups), batch, kv_len, dtype=torch.int64),
        torch.empty(1, dtype=torch.bool, device="cpu"),
    ]


@torch.library.custom_op("mmi::grouped_attention", mutates_args=(), tags=HOST_CODE)
def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    key_bounds: Tensor | None,
    rows: list[Tensor],
    clauses: str,
    scale: float,
    q_offset: int,
    layout: str,
    key: str,
    abi: int,
) -> Tensor:
    """Attention of a prefill over exactly the pairs that ``clauses`` and padding allow.

    Args:
        q: ``[B, HQ, q_len, D]``; k, v: ``[B, HKV, kv_len, D]``, HQ a multiple of HKV; any strides.
        key_padding, key_bounds, scale, layout, key, abi: as for ``mmi::attention``.
        rows: what ``mmi::row_bounds`` says of ``clauses``, ``q_offset`` and these lengths.

    Returns:
        ``[B, HQ, q_len, D]`` in q's dtype. Rows that may see no key are zero.

    Raises:
        MMIError, ValueError: as ``mmi::attention``.
    """
    check_abi(abi)
    check_scale(scale)
    together = rows[2]
    bounds, ids = (x.to(q.device) for x in rows[:2])  # ids may have been numbered on another device
    start, stop, holes = live_keys(q, k.shape[2], key_padding, key_bounds)
    geometry = Geometry(
        batch=q.shape[0], q_heads=q.shape[1], kv_heads=k.shape[1], q_len=q.shape[2], kv_len=k.shape[2],
        q_offset=q_offset, kv_start=start, kv_stop=stop, key_padding=holes,
    )  # fmt: skip
    new_output = partial(empty_output, q, v, layout)
    with torch._C._DisableAutocast():  # as in mmi::attention
        if bool(together):
            geometry = dataclasses.replace(geometry, row_start=bounds[0], row_stop=bounds[1])
            out, run = dispatch.attention(
                q, k, v, geometry, scale, new_output, policy="exact", recall=1.0, max_density=1.0, min_tokens=0
            )
        else:
            run = runtime.AttentionRun(geometry.q_len, geometry.kv_len, "dense (tokens of a group lie apart)")
            out = scattered_attention(q, k, v, geometry, scale, parse_clauses(clauses), ids)
    runtime.record_attention(key, run)
    return in_promised_layout(out, q, v, layout)


@grouped_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, key_bounds: Tensor | None, rows: list[Tensor],
    clauses: str, scale: float, q_offset: int, layout: str, key: str, abi: int,
) -> Tensor:  # fmt: skip
    return empty_output(q, v, layout)
