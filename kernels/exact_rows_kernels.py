"""Triton kernel of the guard: exact attention outputs of rows whose log-sums are known.

Packs and rows are those of the spread probe.
"""

import triton
import triton.language as tl

from mmi_compile.kernels.modality_probe_kernels import _chunk_reach, _pack_rows, _row_positions
from mmi_compile.kernels.probe_kernels import ROWS, _key_tile, _key_weights, _live_keys

# Probabilities are multiplied by it before they are rounded: fp16 then holds those of a billionth as normal numbers.
LIFT = tl.constexpr(32768.0)


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh", "stride_vn",
    "n_packs", "heads_out", "modalities", "group", "n_rows", "q_offset", "kv_len", "window", "chunk_tiles", "n_chunks",
    "scale",
])  # fmt: skip
def exact_outputs(  # type: ignore[no-untyped-def]
    q, k, v, packs, positions, kv_start, kv_stop, key_padding, log_sums, outputs,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qm: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    n_packs, heads_out, modalities, group, n_rows, q_offset, kv_len, window, chunk_tiles, n_chunks, scale,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    VALUE_UNIT: tl.constexpr, HAS_BOUNDS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Probability times value over one chunk of keys, into ``outputs [B, heads_out, n_chunks, ROWS, HEAD_DIM]``.

    A probability is two numbers of the values' dtype, which together hold 16 bits of it (bf16) or more.
    """
    batch, pack, chunk = tl.program_id(0) // n_packs, tl.program_id(0) % n_packs, tl.program_id(1)
    m = tl.arange(0, HEADS * ROWS)
    dims = tl.arange(0, BLOCK_D)
    place = _row_positions(positions, packs, pack, batch, modalities, n_rows, HEADS)
    slot, queries, k = _pack_rows(
        q, k, packs, pack, batch, place - q_offset, place >= 0, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh,
        group, HEADS, HEAD_DIM, BLOCK_D, UNIT,
    )  # fmt: skip
    v += (batch * stride_vb + (tl.load(packs + pack * HEADS * 3 + 1) // group) * stride_vh) * VALUE_UNIT
    normal = tl.load(log_sums + (batch * heads_out + slot) * ROWS + m % ROWS, mask=slot >= 0, other=float("inf"))
    position = place[None, :]
    PLAIN: tl.constexpr = not (HAS_BOUNDS or HAS_PADDING or HAS_WINDOW)
    start, stop, _, _, low, middle, high = _chunk_reach(
        place, kv_start, kv_stop, batch, chunk, chunk_tiles, kv_len, window, BLOCK_N, HAS_BOUNDS, HAS_WINDOW, PLAIN
    )
    total = tl.zeros([HEADS * ROWS, BLOCK_D], tl.float32)
    for masked in tl.static_range(0 if PLAIN else 1, 2):
        for tile in tl.range(middle if masked else low, high if masked else middle):
            key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            weights = LIFT * _key_weights(
                queries, normal, k, key, position, key_padding, batch, start, stop, kv_len, stride_kn, window, scale,
                HEAD_DIM, BLOCK_D, UNIT, HAS_PADDING, HAS_WINDOW, masked,
            )  # fmt: skip
            values = _key_tile(v, key, kv_len, stride_vn, HEAD_DIM, BLOCK_D, VALUE_UNIT, masked)
            if HAS_PADDING or HAS_BOUNDS:
                # Whatever stands in padding, 0 times it must be 0.
                live = _live_keys(key_padding, batch, key, kv_len, HAS_PADDING) & (key >= start) & (key < stop)
                values = tl.where(live[:, None], values, 0.0)
            weights = tl.trans(weights)  # [M, BLOCK_N]
            rounded = weights.to(values.dtype)
            total = tl.dot(rounded, values, total, input_precision="ieee")
            rest = (weights - rounded.to(tl.float32)).to(values.dtype)
            total = tl.dot(rest, values, total, input_precision="ieee")
    row = ((batch * heads_out + slot) * n_chunks + chunk).to(tl.int64) * ROWS + m % ROWS
    real = (slot >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(outputs + row[:, None] * HEAD_DIM + dims[None, :], total * (1.0 / LIFT), mask=real)
