"""Triton kernels of the spread probe: what groups of rows from all over the prompt attend to.

Packs and rows are those of the probe of boundaries, where the kind of a row stands in place of its modality; rows of
the first ``credit_kinds`` kinds credit columns. The rows of a group are ``EACH`` neighbours.
"""

import triton
import triton.language as tl

from mmi_compile.kernels.modality_probe_kernels import _chunk_reach, _pack_rows, _row_positions
from mmi_compile.kernels.probe_kernels import (
    ROWS,
    _bounds,
    _key_weights,
    _log_sums,
)


@triton.jit
def _store_no_mass(  # type: ignore[no-untyped-def]
    credit, by_tile, out, chooses, group_out, group_real, begin, end, kv_len, n_tiles,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, HAS_CREDIT: tl.constexpr,
):  # fmt: skip
    for tile in tl.range(begin, end):
        if HAS_CREDIT:
            key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            nothing = tl.zeros([BLOCK_N, HEADS], tl.float32)
            tl.store(
                credit + out[None, :] * kv_len + key[:, None], nothing, mask=(key < kv_len)[:, None] & chooses[None, :]
            )
        tl.store(by_tile + group_out + tile * GROUPS, tl.zeros([HEADS * GROUPS], tl.float32), mask=group_real)


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn", "n_packs", "heads_out", "modalities",
    "group", "n_rows", "q_offset", "kv_len", "window", "chunk_tiles", "stats_chunks", "scale", "n_credits",
    "credit_kinds", "n_tiles",
])  # fmt: skip
def spread_sums(  # type: ignore[no-untyped-def]
    q, k, packs, positions, rows, kv_start, kv_stop, key_padding, row_max, row_sum, log_sums,
    credit, by_tile, credit_start, credit_stop,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qm: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    n_packs, heads_out, modalities, group, n_rows, q_offset, kv_len, window, chunk_tiles, stats_chunks, scale,
    n_credits, credit_kinds, n_tiles,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_WINDOW: tl.constexpr, EACH: tl.constexpr,
    HAS_CREDIT: tl.constexpr,
):  # fmt: skip
    """Probability over one chunk of keys: by tile of keys for each group, into ``by_tile [B, heads_out, n_tiles, ROWS /
    EACH]``; where ``HAS_CREDIT``, by key, of the rows that may credit it, into ``credit [B, n_credits, kv_len]``, one
    for each of the first entries; ``log_sums`` of all rows. A row may stand elsewhere among the keys than in ``q``:
    keys may be in groups."""
    GROUPS: tl.constexpr = ROWS // EACH
    batch, pack, chunk = tl.program_id(0) // n_packs, tl.program_id(0) % n_packs, tl.program_id(1)
    m = tl.arange(0, HEADS * ROWS)
    place = _row_positions(positions, packs, pack, batch, modalities, n_rows, HEADS)
    row = _row_positions(rows, packs, pack, batch, modalities, n_rows, HEADS)
    row_slot, queries, k = _pack_rows(
        q, k, packs, pack, batch, row, place >= 0, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh,
        group, HEADS, HEAD_DIM, BLOCK_D, UNIT,
    )  # fmt: skip
    normal = _log_sums(row_max, row_sum, row_slot, batch, heads_out, stats_chunks, n_rows, HEADS)
    # Tiles without a mask have counted the zeros of rows that do not exist.
    normal = tl.where(place >= 0, normal, float("inf"))
    tl.store(log_sums + (batch * heads_out + row_slot) * ROWS + m % ROWS, normal, mask=(row_slot >= 0) & (chunk == 0))
    if HAS_CREDIT:
        kind = tl.load(packs + (pack * HEADS + m // ROWS) * 3 + 2)
        from_key = tl.load(credit_start + batch)
        credits = (kind < credit_kinds) & (place >= 0)
        to_stop = credit_stop + (batch * credit_kinds + kind) * n_rows + m % ROWS
        to_key = tl.load(to_stop, mask=credits, other=0)[None, :]
    slot = tl.load(packs + (pack * HEADS + tl.arange(0, HEADS)) * 3)
    out = (batch * n_credits + slot).to(tl.int64)
    chooses = (slot >= 0) & (slot < n_credits)
    of_group = tl.arange(0, HEADS * GROUPS)
    group_slot = tl.load(packs + (pack * HEADS + of_group // GROUPS) * 3)
    group_out = (batch * heads_out + group_slot).to(tl.int64) * n_tiles * GROUPS + of_group % GROUPS
    group_real = group_slot >= 0
    position = place[None, :]
    PLAIN: tl.constexpr = not (HAS_BOUNDS or HAS_PADDING or HAS_WINDOW)
    start, stop, begin, end, low, middle, high = _chunk_reach(
        place, kv_start, kv_stop, batch, chunk, chunk_tiles, kv_len, window, BLOCK_N, HAS_BOUNDS, HAS_WINDOW, PLAIN
    )
    _store_no_mass(
        credit, by_tile, out, chooses, group_out, group_real, begin, low, kv_len, n_tiles, HEADS, BLOCK_N, GROUPS,
        HAS_CREDIT,
    )  # fmt: skip
    for masked in tl.static_range(0 if PLAIN else 1, 2):
        for tile in tl.range(middle if masked else low, high if masked else middle):
            key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            weights = _key_weights(
                queries, normal, k, key, position, key_padding, batch, start, stop, kv_len, stride_kn, window, scale,
                HEAD_DIM, BLOCK_D, UNIT, HAS_PADDING, HAS_WINDOW, masked,
            )  # fmt: skip
            by_row = tl.sum(weights, 0)  # [M]
            by_group = tl.sum(tl.reshape(by_row, (HEADS * GROUPS, EACH)), 1)
            tl.store(by_tile + group_out + tile * GROUPS, by_group, mask=group_real)
            if HAS_CREDIT:
                credited = (key >= from_key)[:, None] & (key[:, None] < to_key)
                total = tl.sum(tl.reshape(tl.where(credited, weights, 0.0), (BLOCK_N, HEADS, ROWS)), 2)
                place_out = credit + out[None, :] * kv_len + key[:, None]
                tl.store(place_out, total, mask=(key < kv_len)[:, None] & chooses[None, :])
    _store_no_mass(
        credit, by_tile, out, chooses, group_out, group_real, high, end, kv_len, n_tiles, HEADS, BLOCK_N, GROUPS,
        HAS_CREDIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn", "n_packs", "heads_out", "modalities",
    "group", "n_rows", "q_offset", "kv_len", "window", "scale", "q_heads", "count",
])  # fmt: skip
def spread_at_keys(  # type: ignore[no-untyped-def]
    q, k, packs, positions, kv_start, kv_stop, key_padding, log_sums, keys, mass,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qm: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    n_packs, heads_out, modalities, group, n_rows, q_offset, kv_len, window, scale, q_heads, count,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_WINDOW: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Probability of each group on ``keys [B, q_heads, count]``, into ``mass [B, q_heads, kinds * GROUPS, count]``.

    A pack is one head and kind; ``log_sums [B, kinds, q_heads, ROWS]`` are those of ``spread_sums``.
    """
    GROUPS: tl.constexpr = ROWS // EACH
    batch, pack = tl.program_id(0) // n_packs, tl.program_id(0) % n_packs
    slot = tl.load(packs + pack * 3)
    head, kind = slot % q_heads, slot // q_heads
    row = tl.arange(0, ROWS)
    place = _row_positions(positions, packs, pack, batch, modalities, n_rows, HEADS)
    _, queries, k = _pack_rows(
        q, k, packs, pack, batch, place - q_offset, place >= 0, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh,
        group, HEADS, HEAD_DIM, BLOCK_D, UNIT,
    )  # fmt: skip
    normal = tl.load(log_sums + (batch * heads_out + slot) * ROWS + row)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = (batch * q_heads + head).to(tl.int64)
    key = tl.load(keys + wanted * count + j, mask=j < count, other=2147483647)
    start, stop = _bounds(kv_start, kv_stop, batch, kv_len, HAS_BOUNDS)
    weights = _key_weights(
        queries, normal, k, key, place[None, :], key_padding, batch, start, stop, kv_len, stride_kn, window, scale,
        HEAD_DIM, BLOCK_D, UNIT, HAS_PADDING, HAS_WINDOW, True,
    )  # fmt: skip
    by_group = tl.sum(tl.reshape(weights, (BLOCK_N, GROUPS, EACH)), 2)
    of_group = tl.arange(0, GROUPS)
    target = (wanted * (heads_out // q_heads * GROUPS) + kind * GROUPS + of_group) * count
    tl.store(mass + target[None, :] + j[:, None], by_group, mask=(j < count)[:, None])
