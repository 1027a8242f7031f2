"""Triton kernels of the probe of boundaries: the last rows of each modality against all keys.

A *pack* is a few probed pairs of query head and query modality that share their keys. Rows stand at any positions, -1
for one that does not exist; such a row has ``q = 0`` and an infinite log-sum, so its probability is 0. Scores are in
units of ``log2``: ``scale`` carries the factor.
"""

import triton
import triton.language as tl

from mmi_compile.kernels.probe_kernels import (
    LANES,
    ROWS,
    _bounds,
    _first_tile_in_reach,
    _key_weights,
    _live_keys,
    _log_sums,
    _plain_tiles,
    _row_stats,
)

RUN = tl.constexpr(16)  # rows that distances are summed for at a time, and how far apart their newest keys may be
FAR = tl.constexpr(1 << 30)


@triton.jit
def _row_positions(  # type: ignore[no-untyped-def]
    positions, packs, pack, batch, modalities, n_rows, HEADS: tl.constexpr
):  # fmt: skip
    """Position of every row of a pack, int32 ``[HEADS * ROWS]``, -1 where there is no row or head."""
    m = tl.arange(0, HEADS * ROWS)
    entry = packs + (pack * HEADS + m // ROWS) * 3
    real = (tl.load(entry) >= 0) & (m % ROWS < n_rows)
    place = (batch * modalities + tl.load(entry + 2)) * n_rows + m % ROWS
    return tl.load(positions + place, mask=real, other=-1)


@triton.jit
def _queries(  # type: ignore[no-untyped-def]
    q, head, row, live, batch, stride_qb, stride_qh, stride_qm,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Query rows ``[M, BLOCK_D]`` of these heads; zeros where not ``live``."""
    dims = tl.arange(0, BLOCK_D)
    offset = (batch * stride_qb + head.to(tl.int64) * stride_qh + row.to(tl.int64) * stride_qm) * UNIT
    return tl.load(q + offset[:, None] + dims[None, :], mask=live[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _reach(  # type: ignore[no-untyped-def]
    position, begin, end, start, kv_len, window, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, PLAIN: tl.constexpr
):  # fmt: skip
    """First tile that some row may see, where tiles end that need no mask, and one past the last tile of any row."""
    first = tl.min(tl.where(position < 0, FAR, position), 0)
    last = tl.max(position, 0)
    high = tl.maximum(begin, tl.minimum(end, tl.cdiv(tl.minimum(kv_len, last + 1), BLOCK_N)))
    low, middle = begin, begin
    if PLAIN:
        middle = _plain_tiles(begin, high, first, kv_len, BLOCK_N)
    else:
        low = _first_tile_in_reach(begin, high, first, start, window, BLOCK_N, HAS_WINDOW)
        middle = low
    return low, middle, high


@triton.jit
def _pack_rows(  # type: ignore[no-untyped-def]
    q, k, packs, pack, batch, row, live, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, group,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Of a pack: the output row of each of its rows, int32 ``[M]``, -1 for none; their queries ``[M, BLOCK_D]``, zeros
    where not ``live``; and where the keys that they share begin."""
    entry = packs + (pack * HEADS + tl.arange(0, HEADS * ROWS) // ROWS) * 3
    slot, head = tl.load(entry), tl.load(entry + 1)
    queries = _queries(q, head, row, live, batch, stride_qb, stride_qh, stride_qm, HEAD_DIM, BLOCK_D, UNIT)
    kv_head = tl.load(packs + pack * HEADS * 3 + 1) // group
    return slot, queries, k + (batch * stride_kb + kv_head * stride_kh) * UNIT


@triton.jit
def _chunk_reach(  # type: ignore[no-untyped-def]
    place, kv_start, kv_stop, batch, chunk, chunk_tiles, kv_len, window,
    BLOCK_N: tl.constexpr, HAS_BOUNDS: tl.constexpr, HAS_WINDOW: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """First live key and one past the last one; first tile of a chunk and one past its last; and what ``_reach`` says
    of those tiles."""
    start, stop = _bounds(kv_start, kv_stop, batch, kv_len, HAS_BOUNDS)
    begin = chunk * chunk_tiles
    end = tl.minimum(begin + chunk_tiles, tl.cdiv(kv_len, BLOCK_N))
    low, middle, high = _reach(place, begin, end, start, kv_len, window, BLOCK_N, HAS_WINDOW, PLAIN)
    return start, stop, begin, end, low, middle, high


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn", "n_packs", "heads_out", "modalities",
    "group", "n_rows", "q_offset", "kv_len", "window", "chunk_tiles", "n_chunks", "scale",
])  # fmt: skip
def modality_row_stats(  # type: ignore[no-untyped-def]
    q, k, packs, positions, kv_start, kv_stop, key_padding, row_max, row_sum,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qm: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    n_packs, heads_out, modalities, group, n_rows, q_offset, kv_len, window, chunk_tiles, n_chunks, scale,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of each row over one chunk of keys, into ``[B, heads_out, n_chunks, ROWS]`` each."""
    batch, pack, chunk = tl.program_id(0) // n_packs, tl.program_id(0) % n_packs, tl.program_id(1)
    m = tl.arange(0, HEADS * ROWS)
    place = _row_positions(positions, packs, pack, batch, modalities, n_rows, HEADS)
    slot, queries, k = _pack_rows(
        q, k, packs, pack, batch, place - q_offset, place >= 0, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh,
        group, HEADS, HEAD_DIM, BLOCK_D, UNIT,
    )  # fmt: skip
    position = place[:, None]
    PLAIN: tl.constexpr = not (HAS_BOUNDS or HAS_PADDING or HAS_WINDOW)
    start, stop, _, _, low, middle, high = _chunk_reach(
        place, kv_start, kv_stop, batch, chunk, chunk_tiles, kv_len, window, BLOCK_N, HAS_BOUNDS, HAS_WINDOW, PLAIN
    )
    highest, total = _row_stats(
        queries, k, position, key_padding, batch, low, middle, high, start, stop, kv_len, stride_kn, window, scale,
        HEADS, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT, HAS_PADDING, HAS_WINDOW, PLAIN,
    )  # fmt: skip
    target = ((batch * heads_out + slot) * n_chunks + chunk) * ROWS + m % ROWS
    tl.store(row_max + target, highest, mask=slot >= 0)
    tl.store(row_sum + target, total, mask=slot >= 0)


@triton.jit
def _store_zeros(  # type: ignore[no-untyped-def]
    columns, out, slot, begin, end, kv_len, HEADS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    for tile in tl.range(begin, end):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        nothing = tl.zeros([BLOCK_N, HEADS], tl.float32)
        mine = (key < kv_len)[:, None] & (slot >= 0)[None, :]
        tl.store(columns + out[None, :] * kv_len + key[:, None], nothing, mask=mine)


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn", "n_packs", "heads_out", "modalities",
    "group", "n_rows", "q_offset", "kv_len", "window", "chunk_tiles", "stats_chunks", "scale",
])  # fmt: skip
def modality_columns(  # type: ignore[no-untyped-def]
    q, k, packs, positions, kv_start, kv_stop, key_padding, row_max, row_sum, log_sums, columns,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qm: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    n_packs, heads_out, modalities, group, n_rows, q_offset, kv_len, window, chunk_tiles, stats_chunks, scale,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Probability on each key of one chunk, into ``columns [B, heads_out, kv_len]``; ``log_sums`` of all rows."""
    batch, pack, chunk = tl.program_id(0) // n_packs, tl.program_id(0) % n_packs, tl.program_id(1)
    m = tl.arange(0, HEADS * ROWS)
    place = _row_positions(positions, packs, pack, batch, modalities, n_rows, HEADS)
    row_slot, queries, k = _pack_rows(
        q, k, packs, pack, batch, place - q_offset, place >= 0, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh,
        group, HEADS, HEAD_DIM, BLOCK_D, UNIT,
    )  # fmt: skip
    normal = _log_sums(row_max, row_sum, row_slot, batch, heads_out, stats_chunks, n_rows, HEADS)
    # Tiles without a mask have counted the zeros of rows that do not exist.
    normal = tl.where(place >= 0, normal, float("inf"))
    tl.store(log_sums + (batch * heads_out + row_slot) * ROWS + m % ROWS, normal, mask=(row_slot >= 0) & (chunk == 0))
    slot = tl.load(packs + (pack * HEADS + tl.arange(0, HEADS)) * 3)
    out = (batch * heads_out + slot).to(tl.int64)
    position = place[None, :]
    PLAIN: tl.constexpr = not (HAS_BOUNDS or HAS_PADDING or HAS_WINDOW)
    start, stop, begin, end, low, middle, high = _chunk_reach(
        place, kv_start, kv_stop, batch, chunk, chunk_tiles, kv_len, window, BLOCK_N, HAS_BOUNDS, HAS_WINDOW, PLAIN
    )
    _store_zeros(columns, out, slot, begin, low, kv_len, HEADS, BLOCK_N)
    for masked in tl.static_range(0 if PLAIN else 1, 2):
        for tile in tl.range(middle if masked else low, high if masked else middle):
            key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            weights = _key_weights(
                queries, normal, k, key, position, key_padding, batch, start, stop, kv_len, stride_kn, window, scale,
                HEAD_DIM, BLOCK_D, UNIT, HAS_PADDING, HAS_WINDOW, masked,
            )  # fmt: skip
            mine = (key < kv_len)[:, None] & (slot >= 0)[None, :]
            total = tl.sum(tl.reshape(weights, (BLOCK_N, HEADS, ROWS)), 2)  # [BLOCK_N, HEADS]
            tl.store(columns + out[None, :] * kv_len + key[:, None], total, mask=mine)
    _store_zeros(columns, out, slot, high, end, kv_len, HEADS, BLOCK_N)


@triton.jit
def _sheared(weights, turn, HEADS: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over rows of ``weights [BLOCK_N, HEADS * RUN]``, row ``r`` moved ``turn[r] < LANES`` keys down.

    Each run of ``LANES`` keys is rotated, so that every value moves within one warp. What wraps around belongs one run
    further down; that is done after the sum, when one vector is left for each head.

    Args:
        turn: int32 ``[HEADS * RUN]``.

    Returns:
        ``[HEADS, BLOCK_N]``; the last ``LANES`` of them lack what would come from beyond the tile.
    """
    M: tl.constexpr = HEADS * RUN
    RUNS: tl.constexpr = BLOCK_N // LANES
    from_lane = tl.arange(0, LANES)[None, None, :] + turn[:, None, None]  # [M, 1, LANES]
    index = tl.broadcast_to(from_lane % LANES, (M, RUNS, LANES))
    rotated = tl.gather(tl.reshape(tl.trans(weights), (M, RUNS, LANES)), index, 2)
    wrapped = from_lane >= LANES
    near = tl.sum(tl.reshape(tl.where(wrapped, 0.0, rotated), (HEADS, RUN, BLOCK_N)), 1)
    far = tl.sum(tl.reshape(tl.where(wrapped, rotated, 0.0), (HEADS, RUN, BLOCK_N)), 1)
    run = tl.broadcast_to(tl.arange(0, RUNS)[None, :, None], (HEADS, RUNS, LANES))
    moved = tl.gather(tl.reshape(far, (HEADS, RUNS, LANES)), (run + 1) % RUNS, 1)
    return near + tl.reshape(tl.where(run + 1 < RUNS, moved, 0.0), (HEADS, BLOCK_N))


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn", "n_packs", "heads_out",
    "stats_heads", "modalities", "kinds", "slots", "width", "group", "n_rows", "q_offset", "kv_len", "window",
    "chunk_tiles", "scale",
])  # fmt: skip
def modality_distances(  # type: ignore[no-untyped-def]
    q, k, packs, places, positions, newest, key_order, key_start, kv_start, kv_stop, key_padding, log_sums, distances,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qm: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    n_packs, heads_out, stats_heads, modalities, kinds, slots, width, group, n_rows, q_offset, kv_len, window,
    chunk_tiles, scale,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_WINDOW: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Probability at each distance of one chunk, into ``distances [B, heads_out, width]``.

    A key counts by its rank, and row ``r`` sees the ranks up to ``newest[r]``, ascending in ``r``: the distance is
    ``newest[r] - rank``. Rows are taken up to ``RUN`` at a time, as many as differ by less than ``RUN`` in ``newest``.
    For ``BLOCK_N - RUN`` distances at a time these few rows meet the one tile of keys that lies that far from them, and
    the product is sheared, so that what has the same distance is added up. The program alone owns its distances: later
    rows add to what earlier rows have stored.

    Args:
        packs: int32 ``[PACKS, HEADS, 3]``: row of ``distances``, query head, row of ``log_sums``.
        places: int32 ``[PACKS, 2]``: query modality and kind of keys of a pack.
        positions: int32 ``[B, modalities, n_rows]``; newest: int32 ``[B, kinds, modalities, n_rows]``.
        key_order, key_start: of grouped keys; otherwise ranks are positions.
    """
    batch, pack, chunk = tl.program_id(0) // n_packs, tl.program_id(0) % n_packs, tl.program_id(1)
    STEP: tl.constexpr = BLOCK_N - RUN
    begin = chunk * chunk_tiles
    end = tl.minimum(begin + chunk_tiles, tl.cdiv(width, STEP))
    query, kind = tl.load(places + pack * 2), tl.load(places + pack * 2 + 1)
    newest += ((batch * kinds + kind) * modalities + query) * n_rows
    positions += (batch * modalities + query) * n_rows
    kv_head = tl.load(packs + pack * HEADS * 3 + 1) // group
    k += (batch * stride_kb + kv_head * stride_kh) * UNIT
    start, stop = _bounds(kv_start, kv_stop, batch, kv_len, HAS_BOUNDS)
    if GROUPED:
        key_order += batch.to(tl.int64) * slots + tl.load(key_start + batch * kinds + kind)
    m = tl.arange(0, HEADS * RUN)
    entry = packs + (pack * HEADS + m // RUN) * 3
    head, stats, used = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry) >= 0
    slot = tl.load(packs + (pack * HEADS + tl.arange(0, HEADS)) * 3)
    distances += (batch * heads_out + slot).to(tl.int64)[:, None] * width  # [HEADS, 1]
    x = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    every = tl.arange(0, ROWS)
    # Rows that have nothing as far away come first.
    first_row = tl.sum((tl.load(newest + every, mask=every < n_rows, other=FAR) < begin * STEP).to(tl.int32), 0)
    for tile in tl.range(begin, tl.where(first_row < n_rows, begin, end)):
        distance = tile * STEP + x
        mine = (slot >= 0)[:, None] & ((x < STEP) & (distance < width))[None, :]
        tl.store(distances + distance[None, :], tl.zeros([HEADS, BLOCK_N], tl.float32), mask=mine)
    row = first_row
    while row < n_rows:
        base = tl.load(newest + row)
        r = row + m % RUN
        top = tl.load(newest + r, mask=r < n_rows, other=FAR)
        member = (top - base < RUN) & used
        turn = tl.where(top - base < RUN, top - base, 0)
        top = tl.where(member, top, -1)
        highest = tl.max(top, 0)
        place = tl.load(positions + r, mask=member, other=0)
        queries = _queries(
            q, head, place - q_offset, member, batch, stride_qb, stride_qh, stride_qm, HEAD_DIM, BLOCK_D, UNIT
        )  # [M, BLOCK_D]
        normal = tl.load(log_sums + (batch * stats_heads + stats) * ROWS + r, mask=member, other=float("inf"))
        # What another thread has stored must be there before it is added to.
        tl.debug_barrier()
        for tile in tl.range(begin, end):
            rank = base - tile * STEP - (STEP - 1) + x
            inside = (rank >= 0) & (rank <= highest)
            if GROUPED:
                key = tl.load(key_order + rank, mask=inside, other=0)
            else:
                key = rank
            keys = tl.load(
                k + (key.to(tl.int64) * (stride_kn * UNIT))[:, None] + dims[None, :],
                mask=inside[:, None] & (dims < HEAD_DIM)[None, :],
                other=0.0,
            )  # [BLOCK_N, BLOCK_D]
            scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale  # [BLOCK_N, M]
            visible = inside[:, None] & (rank[:, None] <= top[None, :])
            if HAS_PADDING:
                live = _live_keys(key_padding, batch, tl.where(inside, key, kv_len), kv_len, HAS_PADDING)
                visible = visible & live[:, None]
            if HAS_BOUNDS:
                visible = visible & ((key >= start) & (key < stop))[:, None]
            if HAS_WINDOW:
                visible = visible & (place[None, :] - key[:, None] < window)
            weights = tl.where(visible, tl.exp2(scores - normal[None, :]), 0.0)
            total = _sheared(weights, turn, HEADS, BLOCK_N)
            distance = tile * STEP + (STEP - 1) - x
            mine = (slot >= 0)[:, None] & ((x < STEP) & (distance < width))[None, :]
            earlier = tl.load(distances + distance[None, :], mask=mine & (row > first_row), other=0.0)
            tl.store(distances + distance[None, :], earlier + total, mask=mine)
        nearby = row + tl.arange(0, RUN)
        row += tl.sum((tl.load(newest + nearby, mask=nearby < n_rows, other=FAR) - base < RUN).to(tl.int32), 0)
