"""Triton kernels of the fused probe: two passes over the keys, and what is made of their sums.

A *pack* is a few probed heads of one batch element that share their keys; ``ROWS`` probe rows of each stand side by
side in one tile. Padded rows and heads have ``q = 0`` and an infinite log-sum, so their probability is 0. Scores are in
units of ``log2``: ``scale`` carries the factor.
"""

import triton
import triton.language as tl

ROWS = tl.constexpr(64)  # probe rows in a tile, also where there are fewer
LANES = tl.constexpr(32)  # keys that the shear rotates at a time: a warp, so each value moves in one shuffle
PART = tl.constexpr(16)  # rows whose share of a diagonal is told apart
PARTS = tl.constexpr(4)
COMBINE = tl.constexpr(16)  # chunks whose statistics are combined at a time


@triton.jit
def _pack_queries(  # type: ignore[no-untyped-def]
    q, packs, pack, batch, first_row, n_rows, stride_qb, stride_qh, stride_qm,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The probe rows of a pack, ``[HEADS * ROWS, BLOCK_D]``; zeros where there is no row or head."""
    m = tl.arange(0, HEADS * ROWS)
    entry = packs + (pack * HEADS + m // ROWS) * 2
    live = (tl.load(entry) >= 0) & (m % ROWS < n_rows)
    head = tl.load(entry + 1).to(tl.int64)
    row = first_row + m % ROWS
    dims = tl.arange(0, BLOCK_D)
    offset = (batch * stride_qb + head * stride_qh + row * stride_qm) * UNIT
    return tl.load(q + offset[:, None] + dims[None, :], mask=live[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _key_tile(  # type: ignore[no-untyped-def]
    k, key, kv_len, stride_kn,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Keys ``[BLOCK_N, BLOCK_D]`` of one head; ``EDGE``: some may lie beyond the last one."""
    dims = tl.arange(0, BLOCK_D)
    place = k + (key.to(tl.int64) * (stride_kn * UNIT))[:, None] + dims[None, :]
    if EDGE:
        tile = tl.load(place, mask=(key < kv_len)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(place, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(place)
    return tile


@triton.jit
def _visible(  # type: ignore[no-untyped-def]
    key, position, live, start, stop, window, HAS_WINDOW: tl.constexpr
):  # fmt: skip
    """The model's mask; ``key``, ``live`` and ``position`` broadcast against each other."""
    visible = live & (key >= start) & (key < stop) & (key <= position)
    if HAS_WINDOW:
        visible = visible & (position - key < window)
    return visible


@triton.jit
def _live_keys(key_padding, batch, key, kv_len, HAS_PADDING: tl.constexpr):  # type: ignore[no-untyped-def]
    live = key < kv_len
    if HAS_PADDING:
        live = live & (tl.load(key_padding + batch.to(tl.int64) * kv_len + key, mask=live, other=0) != 0)
    return live


@triton.jit
def _bounds(kv_start, kv_stop, batch, kv_len, HAS_BOUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    start, stop = 0, kv_len
    if HAS_BOUNDS:
        start, stop = tl.load(kv_start + batch), tl.load(kv_stop + batch)
    return start, stop


@triton.jit
def _first_row(rows, batch, n_rows, first_row, HAS_ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    first = first_row
    if HAS_ROWS:
        first = tl.load(rows + batch * n_rows).to(tl.int32)
    return first


@triton.jit
def _first_tile_in_reach(  # type: ignore[no-untyped-def]
    begin, end, first_position, start, window, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr
):  # fmt: skip
    """The first of the tiles ``begin ... end`` that is not wholly left of the first live key or of all windows."""
    lowest = start
    if HAS_WINDOW:
        lowest = tl.maximum(lowest, first_position - window + 1)
    return tl.maximum(begin, tl.minimum(end, lowest // BLOCK_N))


@triton.jit
def _plain_tiles(  # type: ignore[no-untyped-def]
    begin, end, first_position, kv_len, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Where in ``begin ... end`` the tiles end that every probe row sees whole, if nothing but causality hides keys."""
    return tl.maximum(begin, tl.minimum(end, tl.minimum(first_position + 1, kv_len) // BLOCK_N))


@triton.jit
def _row_stats(  # type: ignore[no-untyped-def]
    queries, k, position, key_padding, batch, low, middle, high, start, stop, kv_len, stride_kn, window, scale,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    HAS_PADDING: tl.constexpr, HAS_WINDOW: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of each row, ``[HEADS * ROWS]``, over the key tiles ``low ... high - 1``.

    Every row sees the tiles before ``middle`` whole, where ``PLAIN``; all others are tested.
    """
    highest = tl.full([HEADS * ROWS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS * ROWS], tl.float32)
    for masked in tl.static_range(0 if PLAIN else 1, 2):
        for tile in tl.range(middle if masked else low, high if masked else middle):
            key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            keys = _key_tile(k, key, kv_len, stride_kn, HEAD_DIM, BLOCK_D, UNIT, masked)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale  # [M, BLOCK_N]
            if masked:
                live = _live_keys(key_padding, batch, key, kv_len, HAS_PADDING)[None, :]
                visible = _visible(key[None, :], position, live, start, stop, window, HAS_WINDOW)
                scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            # A row that has seen nothing yet: -inf - -inf would be NaN.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
            highest = higher
    return highest, total


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn", "n_packs", "heads_out", "group",
    "first_row", "n_rows", "q_offset", "kv_len", "window", "chunk_tiles", "n_chunks", "scale",
])  # fmt: skip
def probe_row_stats(  # type: ignore[no-untyped-def]
    q, k, packs, rows, kv_start, kv_stop, key_padding, row_max, row_sum,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qm: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    n_packs, heads_out, group, first_row, n_rows, q_offset, kv_len, window, chunk_tiles, n_chunks, scale,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_BOUNDS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of each probe row over one chunk of keys, into ``[B, heads_out, n_chunks, ROWS]`` each."""
    batch, pack, chunk = tl.program_id(0) // n_packs, tl.program_id(0) % n_packs, tl.program_id(1)
    first = _first_row(rows, batch, n_rows, first_row, HAS_ROWS)
    queries = _pack_queries(
        q, packs, pack, batch, first, n_rows, stride_qb, stride_qh, stride_qm, HEADS, HEAD_DIM, BLOCK_D, UNIT
    )  # [M, BLOCK_D]
    kv_head = tl.load(packs + pack * HEADS * 2 + 1) // group
    k += (batch * stride_kb + kv_head * stride_kh) * UNIT
    m = tl.arange(0, HEADS * ROWS)
    position = (first + q_offset + m % ROWS)[:, None]
    start, stop = _bounds(kv_start, kv_stop, batch, kv_len, HAS_BOUNDS)
    begin = chunk * chunk_tiles
    end = tl.minimum(begin + chunk_tiles, tl.cdiv(kv_len, BLOCK_N))
    PLAIN: tl.constexpr = not (HAS_BOUNDS or HAS_PADDING or HAS_WINDOW)
    middle = begin
    if PLAIN:
        middle = _plain_tiles(begin, end, first + q_offset, kv_len, BLOCK_N)
    else:
        middle = _first_tile_in_reach(begin, end, first + q_offset, start, window, BLOCK_N, HAS_WINDOW)
    highest, total = _row_stats(
        queries, k, position, key_padding, batch, begin, middle, end, start, stop, kv_len, stride_kn, window, scale,
        HEADS, BLOCK_N, HEAD_DIM, BLOCK_D, UNIT, HAS_PADDING, HAS_WINDOW, PLAIN,
    )  # fmt: skip
    slot = tl.load(packs + (pack * HEADS + m // ROWS) * 2)
    place = ((batch * heads_out + slot) * n_chunks + chunk) * ROWS + m % ROWS
    tl.store(row_max + place, highest, mask=slot >= 0)
    tl.store(row_sum + place, total, mask=slot >= 0)


@triton.jit
def _key_weights(  # type: ignore[no-untyped-def]
    queries, normal, k, key, position, key_padding, batch, start, stop, kv_len, stride_kn, window, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    HAS_PADDING: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Probabilities ``[BLOCK_N, M]`` of the rows on the keys ``key``, given the rows' log-sums ``normal [M]``.

    Keys are the rows of this product: a column sum then runs along the registers of a thread.
    """
    keys = _key_tile(k, key, kv_len, stride_kn, HEAD_DIM, BLOCK_D, UNIT, MASKED)
    scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale
    weights = tl.exp2(scores - normal[None, :])
    if MASKED:
        live = _live_keys(key_padding, batch, key, kv_len, HAS_PADDING)[:, None]
        visible = _visible(key[:, None], position, live, start, stop, window, HAS_WINDOW)
        weights = tl.where(visible, weights, 0.0)
    return weights


@triton.jit
def _log_sums(  # type: ignore[no-untyped-def]
    row_max, row_sum, slot, batch, heads_out, n_chunks, n_rows, HEADS: tl.constexpr
):  # fmt: skip
    """Logarithm to base 2 of each row's sum over all chunks, ``[HEADS * ROWS]``; infinite for rows that see nothing."""
    m = tl.arange(0, HEADS * ROWS)
    highest = tl.full([HEADS * ROWS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS * ROWS], tl.float32)
    for begin in range(0, n_chunks, COMBINE):
        chunk = begin + tl.arange(0, COMBINE)
        place = ((batch * heads_out + slot)[None, :] * n_chunks + chunk[:, None]) * ROWS + (m % ROWS)[None, :]
        mask = (chunk < n_chunks)[:, None] & (slot >= 0)[None, :]
        maxima = tl.load(row_max + place, mask=mask, other=float("-inf"))  # [COMBINE, M]
        sums = tl.load(row_sum + place, mask=mask, other=0.0)
        higher = tl.maximum(highest, tl.max(maxima, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(highest - base) + tl.sum(sums * tl.exp2(maxima - base[None, :]), 0)
        highest = higher
    seen = (total != 0.0) & (slot >= 0) & (m % ROWS < n_rows)
    return tl.where(seen, highest + tl.log2(tl.where(seen, total, 1.0)), float("inf"))


@triton.jit
def _add_tile(  # type: ignore[no-untyped-def]
    weights, HEADS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Sums of one tile along its diagonals, by part of the rows.

    Row ``r = 32 a + b`` and key ``j`` lie on slot ``j - r``. Rotating each run of 32 keys by ``b`` brings a slot's
    values into one lane, ``a`` runs further left, or ``a + 1`` where the rotation wrapped; those whole runs are moved
    after the sum over the rows, when only ``HEADS * PARTS`` vectors are left.

    Args:
        weights: ``[BLOCK_N, HEADS * ROWS]``.

    Returns:
        ``[HEADS * PARTS, BLOCK_N]`` twice: slots of this tile's keys, and slots of the keys of the tile before it.
    """
    M: tl.constexpr = HEADS * ROWS
    RUNS: tl.constexpr = BLOCK_N // LANES
    turn = (tl.arange(0, M * RUNS) // RUNS) % LANES
    index = (tl.arange(0, LANES)[None, :] + turn[:, None]) % LANES
    runs = tl.reshape(tl.trans(weights), (M * RUNS, LANES))
    rotated = tl.reshape(tl.gather(runs, index, 1), (M, BLOCK_N))
    x = tl.arange(0, BLOCK_N)[None, :]
    wrapped = x % LANES + (tl.arange(0, M) % LANES)[:, None] >= LANES
    near = tl.sum(tl.reshape(tl.where(wrapped, 0.0, rotated), (HEADS * PARTS, PART, BLOCK_N)), 1)
    far = tl.sum(tl.reshape(tl.where(wrapped, rotated, 0.0), (HEADS * PARTS, PART, BLOCK_N)), 1)
    # Whole runs now, as a rotation of few elements: a gather costs one shuffle for each warp width of its axis.
    step = ((tl.arange(0, HEADS * PARTS) % PARTS * PART) // LANES)[:, None, None]
    run = tl.broadcast_to(tl.arange(0, RUNS)[None, :, None] + step, (HEADS * PARTS, RUNS, LANES))
    near = tl.gather(tl.reshape(near, (HEADS * PARTS, RUNS, LANES)), run % RUNS, 1)
    far = tl.gather(tl.reshape(far, (HEADS * PARTS, RUNS, LANES)), (run + 1) % RUNS, 1)
    here = tl.where(run < RUNS, near, 0.0) + tl.where(run + 1 < RUNS, far, 0.0)
    before = tl.where(run < RUNS, 0.0, near) + tl.where(run + 1 < RUNS, 0.0, far)
    here = tl.reshape(here, (HEADS * PARTS, BLOCK_N))
    before = tl.reshape(before, (HEADS * PARTS, BLOCK_N))
    return here, before


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn", "n_packs", "heads_out", "group",
    "first_row", "n_rows", "q_offset", "kv_len", "window", "chunk_tiles", "stats_chunks", "scale",
    "block_m", "positions",
])  # fmt: skip
def probe_sums(  # type: ignore[no-untyped-def]
    q, k, packs, rows, kv_start, kv_stop, key_padding, row_max, row_sum,
    log_sums, tiles, columns, distances, support,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qm: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    n_packs, heads_out, group, first_row, n_rows, q_offset, kv_len, window, chunk_tiles, stats_chunks, scale,
    block_m, positions,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_BOUNDS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_WINDOW: tl.constexpr,
    QUERY_TILES: tl.constexpr, HAS_DIAGONALS: tl.constexpr, HAS_SUPPORT: tl.constexpr,
):  # fmt: skip
    """Column and, where asked, diagonal sums of the probabilities over one chunk of keys.

    Tiles come in ascending order, and the slots of a tile are complete when the next one has added its share. So for
    diagonals each chunk also computes the first tile of the next one, and nothing has to be added up afterwards.
    """
    batch, pack, chunk = tl.program_id(0) // n_packs, tl.program_id(0) % n_packs, tl.program_id(1)
    first = _first_row(rows, batch, n_rows, first_row, HAS_ROWS)
    queries = _pack_queries(
        q, packs, pack, batch, first, n_rows, stride_qb, stride_qh, stride_qm, HEADS, HEAD_DIM, BLOCK_D, UNIT
    )  # [M, BLOCK_D]
    kv_head = tl.load(packs + pack * HEADS * 2 + 1) // group
    k += (batch * stride_kb + kv_head * stride_kh) * UNIT
    m = tl.arange(0, HEADS * ROWS)
    row_slot = tl.load(packs + (pack * HEADS + m // ROWS) * 2)
    normal = _log_sums(row_max, row_sum, row_slot, batch, heads_out, stats_chunks, n_rows, HEADS)
    tl.store(log_sums + (batch * heads_out + row_slot) * ROWS + m % ROWS, normal, mask=(row_slot >= 0) & (chunk == 0))
    slot = tl.load(packs + (pack * HEADS + tl.arange(0, HEADS)) * 2)
    out = (batch * heads_out + slot).to(tl.int64)
    position = (first + q_offset + m % ROWS)[None, :]
    member = ((first + m % ROWS) // block_m - first // block_m)[None, :]
    start, stop = _bounds(kv_start, kv_stop, batch, kv_len, HAS_BOUNDS)
    begin = chunk * chunk_tiles
    end = tl.minimum(begin + chunk_tiles, tl.cdiv(kv_len, BLOCK_N))
    EXTRA: tl.constexpr = 1 if HAS_DIAGONALS else 0
    PLAIN: tl.constexpr = not (HAS_BOUNDS or HAS_PADDING or HAS_WINDOW)
    middle = begin
    if PLAIN:
        middle = _plain_tiles(begin, end + EXTRA, first + q_offset, kv_len, BLOCK_N)
    else:
        middle = _first_tile_in_reach(begin, end + EXTRA, first + q_offset, start, window, BLOCK_N, HAS_WINDOW)
        for tile in tl.range(begin, middle):
            key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            mine = ((key < kv_len) & (tile < end))[:, None] & (slot >= 0)[None, :]
            nothing = tl.zeros([BLOCK_N, HEADS], tl.float32)
            if QUERY_TILES > 1:
                tl.store(columns + out[None, :] * kv_len + key[:, None], nothing, mask=mine)
            for t in tl.static_range(QUERY_TILES):
                tl.store(tiles + (out[None, :] * QUERY_TILES + t) * kv_len + key[:, None], nothing, mask=mine)
            if HAS_DIAGONALS:
                distance = first + q_offset - (key - BLOCK_N)
                complete = (tile > begin) | (chunk == 0)
                inside = (complete & (distance >= 0) & (distance < positions))[:, None] & (slot >= 0)[None, :]
                place = out[None, :] * positions + distance[:, None]
                tl.store(distances + place, nothing, mask=inside)
                if HAS_SUPPORT:
                    tl.store(support + place, nothing, mask=inside)
    carry = tl.zeros([HEADS * PARTS, BLOCK_N], tl.float32)
    for masked in tl.static_range(0 if PLAIN else 1, 2):
        for tile in tl.range(middle if masked else begin, end + EXTRA if masked else middle):
            key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            weights = _key_weights(
                queries, normal, k, key, position, key_padding, batch, start, stop, kv_len, stride_kn, window, scale,
                HEAD_DIM, BLOCK_D, UNIT, HAS_PADDING, HAS_WINDOW, masked,
            )  # fmt: skip
            mine = ((key < kv_len) & (tile < end))[:, None] & (slot >= 0)[None, :]
            if QUERY_TILES > 1:
                total = tl.sum(tl.reshape(weights, (BLOCK_N, HEADS, ROWS)), 2)  # [BLOCK_N, HEADS]
                tl.store(columns + out[None, :] * kv_len + key[:, None], total, mask=mine)
            for t in tl.static_range(QUERY_TILES):
                part = weights
                if QUERY_TILES > 1:
                    part = tl.where(member == t, weights, 0.0)
                total = tl.sum(tl.reshape(part, (BLOCK_N, HEADS, ROWS)), 2)
                tl.store(tiles + (out[None, :] * QUERY_TILES + t) * kv_len + key[:, None], total, mask=mine)
            if HAS_DIAGONALS:
                here, before = _add_tile(weights, HEADS, BLOCK_N)
                done = tl.reshape(carry + before, (HEADS, PARTS, BLOCK_N))
                carry = here
                distance = first + q_offset - (key - BLOCK_N)
                complete = (tile > begin) | (chunk == 0)
                inside = complete & (distance >= 0) & (distance < positions)
                place = out[:, None] * positions + distance[None, :]
                mine_too = inside[None, :] & (slot >= 0)[:, None]
                tl.store(distances + place, tl.sum(done, 1), mask=mine_too)
                if HAS_SUPPORT:
                    parts = tl.cdiv(n_rows, PART)
                    used = tl.arange(0, PARTS)[None, :, None] < parts
                    least = tl.min(tl.where(used, done, float("inf")), 1)
                    tl.store(support + place, least * parts, mask=mine_too)


@triton.jit(do_not_specialize=["heads_out", "first_row", "n_rows", "q_offset", "kv_len", "positions", "nearest"])
def probe_excess(  # type: ignore[no-untyped-def]
    columns, distances, support, rows, heads_out, first_row, n_rows, q_offset, kv_len, positions, nearest, peak,
    BLOCK: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Turn ``support`` into the excess mass of each diagonal, 0 where it is none."""
    head = tl.program_id(0)
    first = _first_row(rows, head // heads_out, n_rows, first_row, HAS_ROWS) + q_offset
    distance = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = distance < positions
    columns += head.to(tl.int64) * kv_len
    explained = tl.zeros([BLOCK], tl.float32)
    for row in range(n_rows):
        key = first - distance + row
        explained += tl.load(columns + key, mask=inside & (key >= 0) & (key < kv_len), other=0.0)
    explained /= n_rows
    place = head.to(tl.int64) * positions + distance
    mass = tl.load(distances + place, mask=inside, other=0.0)
    least = tl.load(support + place, mask=inside, other=0.0)
    peaked = (mass > peak * explained) & (least > explained) & (distance >= nearest)
    tl.store(support + place, tl.where(peaked, mass - explained, 0.0), mask=inside)


@triton.jit(do_not_specialize=[
    "stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn", "heads_out", "group", "first_row",
    "n_rows", "q_offset", "kv_len", "window", "scale", "n_peaks",
])  # fmt: skip
def probe_beside(  # type: ignore[no-untyped-def]
    q, k, packs, rows, kv_start, kv_stop, key_padding, log_sums, columns, peaks, peak_distances, beside,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qm: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    heads_out, group, first_row, n_rows, q_offset, kv_len, window, scale, n_peaks,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_BOUNDS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BLOCK_PEAKS: tl.constexpr,
):  # fmt: skip
    """Columns without the mass on the peak diagonals: recomputed for the tiles that one of them crosses."""
    batch, slot = tl.program_id(0) // heads_out, tl.program_id(0) % heads_out
    head = tl.program_id(0).to(tl.int64)
    first_key = tl.program_id(1) * BLOCK_N
    first = _first_row(rows, batch, n_rows, first_row, HAS_ROWS)
    t = tl.arange(0, BLOCK_PEAKS)
    peaks += head * n_peaks
    peak_distances += head * n_peaks
    mass = tl.load(peaks + t, mask=t < n_peaks, other=0.0)
    crossing = first + q_offset - tl.load(peak_distances + t, mask=t < n_peaks, other=0).to(tl.int32)
    hits = (mass > 0.0) & (crossing < first_key + BLOCK_N) & (crossing > first_key - ROWS)
    key = first_key + tl.arange(0, BLOCK_N)
    inside = key < kv_len
    left = tl.load(columns + head * kv_len + key, mask=inside, other=0.0)
    if tl.sum(hits.to(tl.int32), 0) > 0:
        row = tl.arange(0, ROWS)
        diagonal = key[:, None] - row[None, :]
        on_peak = tl.zeros([BLOCK_N, ROWS], tl.int32)
        for index in range(n_peaks):
            here = first + q_offset - tl.load(peak_distances + index).to(tl.int32)
            if tl.load(peaks + index) > 0.0:
                if (here < first_key + BLOCK_N) & (here > first_key - ROWS):
                    on_peak = on_peak | (diagonal == here).to(tl.int32)
        queries = _pack_queries(
            q, packs, slot, batch, first, n_rows, stride_qb, stride_qh, stride_qm, 1, HEAD_DIM, BLOCK_D, UNIT
        )
        kv_head = tl.load(packs + slot * 2 + 1) // group
        k += (batch * stride_kb + kv_head * stride_kh) * UNIT
        keys = _key_tile(k, key, kv_len, stride_kn, HEAD_DIM, BLOCK_D, UNIT, True)
        scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale  # [BLOCK_N, ROWS]
        start, stop = _bounds(kv_start, kv_stop, batch, kv_len, HAS_BOUNDS)
        live = _live_keys(key_padding, batch, key, kv_len, HAS_PADDING)[:, None]
        position = (first + q_offset + row)[None, :]
        visible = _visible(key[:, None], position, live, start, stop, window, HAS_WINDOW)
        weights = tl.exp2(scores - tl.load(log_sums + head * ROWS + row)[None, :])
        # Sum what stays rather than subtract what goes: a column that lies on peaks alone becomes exactly 0.
        left = tl.sum(tl.where(visible & (on_peak == 0), weights, 0.0), 1)
    tl.store(beside + head * kv_len + key, left, mask=inside)


@triton.jit(do_not_specialize=["length", "size"])
def fold_mass(  # type: ignore[no-untyped-def]
    mass, blocks, folded, length, size, LINES: tl.constexpr, RESIDUES: tl.constexpr
):  # fmt: skip
    """Sums of ``mass [heads, length]`` by residue, for the strides and residues that ``blocks`` lists.

    ``blocks`` int32 ``[BLOCKS, 3]``: stride, first residue, where in a row of ``folded [heads, size]`` it goes.
    """
    head = tl.program_id(0).to(tl.int64)
    entry = blocks + tl.program_id(1) * 3
    stride, first, target = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    residue = first + tl.arange(0, RESIDUES)
    total = _fold(mass + head * length, length, stride, residue, LINES, RESIDUES)
    tl.store(folded + head * size + target + tl.arange(0, RESIDUES), total, mask=residue < stride)


@triton.jit(do_not_specialize=["length", "size"])
def fold_mass_by_head(  # type: ignore[no-untyped-def]
    mass, strides, folded, length, size, LINES: tl.constexpr, RESIDUES: tl.constexpr
):  # fmt: skip
    """``fold_mass`` with one stride per head, int64 ``[heads]`` on the device; -1 beyond the last residue."""
    head = tl.program_id(0).to(tl.int64)
    # No residue of a longer stride differs from those of this one.
    stride = tl.minimum(tl.load(strides + head), length).to(tl.int32)
    residue = tl.program_id(1) * RESIDUES + tl.arange(0, RESIDUES)
    total = tl.zeros([RESIDUES], tl.float32)
    if tl.program_id(1) * RESIDUES < stride:
        total = _fold(mass + head * length, length, stride, residue, LINES, RESIDUES)
    tl.store(folded + head * size + residue, tl.where(residue < stride, total, -1.0), mask=residue < size)


@triton.jit
def _fold(mass, length, stride, residue, LINES: tl.constexpr, RESIDUES: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.zeros([RESIDUES], tl.float32)
    for first in range(0, tl.cdiv(length, stride), LINES):
        line = (first + tl.arange(0, LINES)).to(tl.int64)
        place = line[:, None] * stride + residue[None, :]
        real = (place < length) & (residue < stride)[None, :]
        total += tl.sum(tl.load(mass + place, mask=real, other=0.0), 0)
    return total
