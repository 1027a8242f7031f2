"""Gathers the key columns of every head into small contiguous K and V buffers."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["q_heads", "group", "kv_len", "max_columns"])
def compact_columns(  # type: ignore[no-untyped-def]
    k, v, columns, k_columns, v_columns,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    q_heads, group, kv_len, max_columns,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Copy the K and V rows that ``columns`` names to ``[B, HQ, max_columns, HEAD_DIM]``. Strides count 8 elements."""
    head = tl.program_id(1)  # b * HQ + h
    batch = head // q_heads
    kv_head = (head % q_heads) // group
    slots = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    dims = tl.arange(0, BLOCK_D)
    mask = (slots < max_columns)[:, None] & (dims < HEAD_DIM)[None, :]
    first_slot = head.to(tl.int64) * max_columns
    keys = tl.load(columns + first_slot + slots, mask=slots < max_columns, other=0)
    # Slots beyond a tile's num_columns may hold anything: they must be readable and are never used.
    keys = tl.minimum(tl.maximum(keys, 0), kv_len - 1).to(tl.int64)  # [BLOCK_N]
    target = (first_slot + slots)[:, None] * HEAD_DIM + dims[None, :]  # [BLOCK_N, BLOCK_D]
    k_row = k + (batch * stride_kb + kv_head * stride_kh) * 8 + keys[:, None] * (stride_kn * 8)
    v_row = v + (batch * stride_vb + kv_head * stride_vh) * 8 + keys[:, None] * (stride_vn * 8)
    tl.store(k_columns + target, tl.load(k_row + dims[None, :], mask=mask), mask=mask)
    tl.store(v_columns + target, tl.load(v_row + dims[None, :], mask=mask), mask=mask)
