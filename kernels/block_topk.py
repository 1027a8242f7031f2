"""Scores of whole key blocks, and the best of them for every query tile: what a ``block_topk`` head keeps.

Query tiles and key blocks are cut into *groups* of tokens, and a pair of groups gets one score:

* ``mean`` (MInference, section 3.2): a tile and a block are one group each; ``scale`` times the product of the mean
  query and the mean key;
* ``antidiagonal`` (XAttention, section 2.1): groups of ``stride`` tokens (fewer at the end of a block that the stride
  does not divide); ``scale`` times the mean product along the antidiagonal of the pair, query ``stride - 1 - s`` of
  its group with key ``s``. Every column crosses it. So does every diagonal at an odd distance; with an even stride the
  pairs at even distances are never looked at, and such a diagonal is found by its neighbours only.

A softmax over the key groups of each query group follows; the *mass* of a block is what its groups hold, averaged over
the query groups of the tile. Padding keys, and the queries at their positions, enter no mean; a group without any
other token has no mass. A pair of groups takes part when causality and the sliding window allow some distance in it,
and when live tokens meet on its antidiagonal.

The blocks of the tile's window and sinks are kept anyway. Of those between them a head lists its ``k`` best, or the
fewest that bring the mass of everything kept to the target. Blocks whose mass is zero are never listed. Equal masses
fall as ``torch.topk`` decides, from run to run the same. Nothing waits for the device, nothing is added up in an order
that may change, and no more than ``SCORE_LIMIT`` scores exist at a time.

Memory: lists are int32 ``[B, heads, QT, width]``. At a million tokens, 128 rows a tile and 28 heads, ``k = 64`` takes
56 MiB, 0.6 % of q, k and v (4 key heads, 128 dimensions, half precision). Scores, their softmax and what is made of it
stay below ``4 * SCORE_LIMIT`` values; antidiagonal scoring also lays out the keys of one key head in groups, where
they do not lie in memory like that already.

Time: mean scoring reads q and k once and multiplies ``(N / 128)^2`` pairs a head. Antidiagonal scoring costs
``1 / stride`` of the scores of dense attention; at a million tokens that is more than a sparse kernel takes, unless the
stride grows with the prompt.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_compile.kernels.frames import TileShape, constant, keep, ramp
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import MOST_BLOCKS, BlockTopK

SCORE_LIMIT = 8 << 20
"""Scores held at a time, 32 MiB of them, unless a single query tile of one head has more."""

CAP_SHARE, LEAST_CAP = 4, 8
"""Under a recall target a tile lists at most one in ``CAP_SHARE`` of all key blocks, but ``LEAST_CAP`` at least."""

FIXED_POINT = 1 << 30
"""Masses are counted in whole numbers of this part: sums of integers do not depend on their order."""


@dataclass(frozen=True)
class BlockRules:
    """Key blocks that each query tile of some heads keeps.

    Attributes:
        heads: the query heads, ascending.
        entries: int32 ``[B, heads, QT, WIDTH]``, ascending blocks, all different, then ``key_blocks``.
        whole: bool ``[B, heads, QT]``, the tiles that keep every key instead; None for no tile.
        tiles: what tiles and blocks are.
    """

    heads: tuple[int, ...]
    entries: Tensor
    whole: Tensor | None
    tiles: TileShape

    def to_mask(self, geometry: Geometry) -> Tensor:
        """The pairs that these blocks mean, bool ``[B, heads, q_len, kv_len]``. Quadratic: for tests."""
        g, device = geometry, self.entries.device
        listed = torch.zeros(*self.entries.shape[:3], -(-g.kv_len // self.tiles.block_n) + 1, device=device) > 0
        listed.scatter_(-1, self.entries.long(), True)
        if self.whole is not None:
            listed |= self.whole[..., None]
        rows = torch.arange(g.q_len, device=device) // self.tiles.block_m
        keys = torch.arange(g.kv_len, device=device) // self.tiles.block_n
        return listed[:, :, rows][..., keys]


def list_width(patterns: Sequence[BlockTopK], key_blocks: int) -> int:
    """Key blocks that a tile may list: what the configuration alone allocates."""
    return max(_most(pattern, key_blocks) for pattern in patterns)


def _most(pattern: BlockTopK, key_blocks: int) -> int:
    if pattern.k is not None:
        return min(pattern.k, key_blocks)
    return min(max(key_blocks // CAP_SHARE, LEAST_CAP), MOST_BLOCKS, key_blocks)


def select_blocks(
    patterns: Sequence[BlockTopK],
    heads: tuple[int, ...],
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    scale: float,
    tiles: TileShape,
    begin: Tensor,
    stop: Tensor,
) -> BlockRules:
    """The best key blocks in ``begin ... stop - 1`` for each tile of ``heads``.

    Args:
        patterns: one for each of ``heads``, which ascend.
        q: ``[B, HQ, q_len, D]``; k: ``[B, HKV, kv_len, D]``; scale: of the scores.
        begin, stop: int32, broadcastable to ``[B, heads, QT]``: one past the sinks, and where the window starts.
    """
    g, device = geometry, q.device
    query_tiles, key_blocks = -(-g.q_len // tiles.block_m), -(-g.kv_len // tiles.block_n)
    shape = (g.batch, len(heads), query_tiles)
    width = list_width(patterns, key_blocks)
    entries = torch.full((*shape, width), key_blocks, dtype=torch.int32, device=device)
    targets = any(pattern.mass is not None for pattern in patterns)
    whole = torch.zeros(shape, dtype=torch.bool, device=device) if targets else None
    begin, stop = begin.expand(shape), stop.expand(shape)
    for slots, part, masses in block_masses(patterns, heads, q, k, g, scale, tiles):
        where = (slice(None), slots, slice(part.start, part.stop))
        chosen, lacking = _choose(masses, begin[where], stop[where], patterns[slots], width, key_blocks)
        entries[where][..., : chosen.shape[-1]] = chosen
        if whole is not None and lacking is not None:
            whole[where] = lacking
    return BlockRules(heads, entries, whole, tiles)


def block_masses(
    patterns: Sequence[BlockTopK], heads: tuple[int, ...], q: Tensor, k: Tensor, geometry: Geometry, scale: float,
    tiles: TileShape,
) -> Iterator[tuple[slice, range, Tensor]]:  # fmt: skip
    """Masses ``[B, H, tiles, blocks]`` of the key blocks that a few query tiles of a few heads may see, part by part.

    Yields:
        The slice of ``heads``, the query tiles, and their masses: floating, 0 for blocks that no row of the tile sees.
    """
    g, bm = geometry, tiles.block_m
    query_tiles = -(-g.q_len // bm)
    key_live, query_live = _live(g, q.device)
    for first, last, sides in _runs(patterns, heads, g, scale, tiles):
        folded: tuple[range, Tensor] | None = None
        for piece in sides.pieces(range(heads[first], heads[last - 1] + 1), query_tiles):
            kv = range(piece.start // g.group, (piece.stop - 1) // g.group + 1)
            if folded is None or folded[0] != kv:
                folded = None  # before the next one is made
                folded = (kv, sides.keys.fold(k[:, kv.start : kv.stop], key_live))
            slots = slice(first + piece.start - heads[first], first + piece.stop - heads[first])
            for part in sides.chunks(len(piece), query_tiles):
                rows = slice(part.start * bm, min(part.stop * bm, g.q_len))
                live = None if query_live is None else query_live[:, rows]
                asked = q[:, piece.start : piece.stop, rows]
                yield slots, part, sides.masses(asked, folded[1], key_live, live, part)


def _live(geometry: Geometry, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Which keys and which queries enter the means, bool ``[B, length]`` each; None for all of them.

    A query is left out where the key at its own position is padding. Positions without a key are taken.
    """
    g = geometry
    keys = g.live_keys(device) if g.has_padding else None
    if keys is None:
        return None, None
    positions = F.pad(keys, (0, max(0, g.q_len + g.q_offset - g.kv_len)), value=True)
    return keys, positions[:, g.q_offset : g.q_offset + g.q_len]


def _runs(
    patterns: Sequence[BlockTopK], heads: tuple[int, ...], geometry: Geometry, scale: float, tiles: TileShape
) -> Iterator[tuple[int, int, _Sides]]:
    """Stretches ``first ... last - 1`` of neighbouring heads that are scored alike."""
    g, first = geometry, 0
    longest = min(tiles.block_m, tiles.block_n)  # in longer groups tokens could miss each other on the antidiagonal
    scorings = [min(p.stride, longest) if p.scoring == "antidiagonal" else 0 for p in patterns]
    for last in range(1, len(heads) + 1):
        goes_on = last < len(heads) and heads[last] == heads[last - 1] + 1 and scorings[last] == scorings[first]
        if not goes_on:
            stride = scorings[first]
            queries = _Side(g.q_len, tiles.block_m, stride, reverse=True, offset=g.q_offset)
            yield first, last, _Sides(g, scale, queries, _Side(g.kv_len, tiles.block_n, stride))
            first = last


@dataclass(frozen=True)
class _Side:
    """How the tokens of queries or keys make groups.

    Attributes:
        length: tokens. block: tokens of a tile or key block. stride: tokens of a group, 0 for mean-pooled blocks.
        reverse: whether tokens stand backwards in their group. offset: position of token 0.
    """

    length: int
    block: int
    stride: int
    reverse: bool = False
    offset: int = 0

    @property
    def group(self) -> int:
        """Tokens of a group, where the block does not end before."""
        return self.stride or self.block

    @property
    def groups(self) -> int:
        """Groups in a block."""
        return -(-self.block // self.group)

    def even(self, tokens: int) -> bool:
        """Whether ``tokens`` from the start of a block on fill all of their groups."""
        return tokens % self.block == 0 and self.block % self.group == 0

    def slots(self, tokens: int, live: Tensor | None, device: torch.device) -> Tensor:
        """Which places of the groups hold a live token, bool ``[B or 1, G, group]``, in the order of ``fold``."""
        there = torch.ones(1, tokens, dtype=torch.bool, device=device) if live is None else live
        slots: Tensor = self._grouped(there[..., None])[..., 0]
        return slots

    def fold(self, x: Tensor, live: Tensor | None) -> Tensor:
        """One vector for each group: ``x [B, H, tokens, D]`` to ``[B, H, G, features]``.

        Means in working precision, or the tokens of the group one after the other, zero where there is none.
        """
        if live is not None:
            x = x.masked_fill(~live[:, None, :, None], 0)
        if self.stride:
            return self._grouped(x).flatten(-2)
        work = torch.float64 if x.dtype == torch.float64 else torch.float32
        tokens = x.shape[2]
        if live is None and self.even(tokens):
            means: Tensor = x.unflatten(2, (-1, self.block)).mean(3, dtype=work)
            return means
        full = tokens // self.block * self.block
        sums: Tensor = x[:, :, :full].unflatten(2, (full // self.block, self.block)).sum(3, dtype=work)
        if full < tokens:
            sums = torch.cat([sums, x[:, :, full:].sum(2, dtype=work, keepdim=True)], 2)
        count = self.slots(tokens, live, x.device).sum(-1)
        return sums / count.clamp(min=1)[:, None, :, None]

    def _grouped(self, x: Tensor) -> Tensor:
        """``x [..., tokens, D]`` as ``[..., G, group, D]``, zero (or False) where a group has no token."""
        blocks = -(-x.shape[-2] // self.block)
        missing = blocks * self.block - x.shape[-2]
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        x = x.unflatten(-2, (blocks, self.block))
        missing = self.groups * self.group - self.block
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        x = x.unflatten(-2, (self.groups, self.group)).flatten(-4, -3)
        return x.flip(-2) if self.reverse else x

    def edges(self, blocks: range, device: torch.device) -> tuple[Tensor, Tensor]:
        """First and last position of the groups of ``blocks``, int32 ``[G]`` each."""
        low, high = keep(_edges, (self,), device)
        part = slice(blocks.start * self.groups, blocks.stop * self.groups)
        return low[part], high[part]


def _edges(side: _Side, device: torch.device) -> tuple[Tensor, Tensor]:
    """``_Side.edges`` of all blocks."""
    starts = torch.arange(0, side.length, side.block, dtype=torch.int32, device=device)[:, None] + side.offset
    inside = torch.arange(0, side.block, side.group, dtype=torch.int32, device=device)
    last = (starts + (inside + side.group).clamp(max=side.block)).clamp(max=side.length + side.offset) - 1
    return (starts + inside).flatten(), last.flatten()


@dataclass(frozen=True)
class _Sides:
    """Queries and keys of heads that are scored alike."""

    geometry: Geometry
    scale: float
    queries: _Side
    keys: _Side

    def pieces(self, heads: range, query_tiles: int) -> Iterator[range]:
        """Neighbouring heads that are scored together: some of one key head, or all heads of some key heads."""
        g = self.geometry
        room = max(1, SCORE_LIMIT // max(1, self._scores(1, 0, query_tiles)))
        start = heads.start
        while start < heads.stop:
            stop = min(heads.stop, start + room, (start // g.group + 1) * g.group)
            if start % g.group == 0 and stop - start == g.group:
                together = min(room // g.group, (heads.stop - start) // g.group)
                stop = start + max(1, together) * g.group
            yield range(start, stop)
            start = stop

    def chunks(self, heads: int, query_tiles: int) -> Iterator[range]:
        """Query tiles that are scored together, as many as the limit allows."""
        start = 0
        while start < query_tiles:
            ends = range(start + 1, query_tiles + 1)
            room = bisect_right(ends, SCORE_LIMIT, key=lambda stop: self._scores(heads, start, stop))
            stop = start + max(1, room)
            yield range(start, stop)
            start = stop

    def _blocks(self, stop: int) -> int:
        """Key blocks that the tiles before ``stop`` may see."""
        g = self.geometry
        return -(-min(stop * self.queries.block + g.q_offset, g.kv_len) // self.keys.block)

    def _scores(self, heads: int, start: int, stop: int) -> int:
        rows = self.geometry.batch * heads * (stop - start) * self.queries.groups
        return rows * self._blocks(stop) * self.keys.groups

    def masses(
        self, q: Tensor, keys: Tensor, key_live: Tensor | None, query_live: Tensor | None, part: range
    ) -> Tensor:
        """Mass of each key block that some tile of ``part`` may see, ``[B, H, tiles, blocks]``.

        Args:
            q: ``[B, H, rows of the tiles, D]``; keys: folded, ``[B, KV, G, features]``.
            key_live: ``[B, kv_len]``; query_live: ``[B, rows of the tiles]``; None for all.
        """
        g, device, blocks = self.geometry, q.device, self._blocks(part.stop)
        groups = blocks * self.keys.groups
        folded = self.queries.fold(q, query_live)
        scores = _products(folded, keys[:, :, :groups])  # [B, H, query groups, key groups]
        hidden = self._hidden(part, blocks, device)
        tokens = min(blocks * self.keys.block, g.kv_len)
        even = self.queries.even(q.shape[2]) and self.keys.even(tokens)
        all_see = key_live is None and not (g.window and g.kv_len < g.q_len + g.q_offset)
        if even and all_see:
            scores.mul_(self.scale / (self.keys.group if self.keys.stride else 1))
            shares = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min).softmax(-1)
            counted = None
        else:
            query_slots = self.queries.slots(q.shape[2], query_live, device)
            key_slots = self.keys.slots(tokens, None if key_live is None else key_live[:, :tokens], device)
            pairs = self._live_pairs(query_slots, key_slots, scores.dtype)
            hidden = hidden | (pairs == 0)
            scores.mul_((self.scale / pairs.clamp(min=1))[:, None] if self.keys.stride else self.scale)
            shares = scores.masked_fill_(hidden[:, None], torch.finfo(scores.dtype).min).softmax(-1)
            counted = query_slots.any(-1) & ~hidden.all(-1)  # [B or 1, query groups]
        del scores
        return self._reduce(shares, counted, blocks)

    def _hidden(self, part: range, blocks: int, device: torch.device) -> Tensor:
        """Pairs of groups without a distance that causality and window allow, bool ``[query groups, key groups]``."""
        low, high = (edge[:, None] for edge in self.queries.edges(part, device))
        key_low, key_high = self.keys.edges(range(blocks), device)
        hidden = key_low > high
        return hidden | (low - key_high >= self.geometry.window) if self.geometry.window else hidden

    def _live_pairs(self, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """Live pairs on the antidiagonal of each pair of groups; for means, whether both have a live token."""
        if not self.keys.stride:
            queries, keys = queries.any(-1, keepdim=True), keys.any(-1, keepdim=True)
        return queries.to(dtype) @ keys.to(dtype).mT

    def _reduce(self, shares: Tensor, counted: Tensor | None, blocks: int) -> Tensor:
        """Sums over the key groups of each block, and means over the counted query groups of each tile."""
        per_tile, per_block = self.queries.groups, self.keys.groups
        if per_block > 1:
            shares = shares.unflatten(-1, (blocks, per_block)).sum(-1)
        if counted is None:
            means: Tensor = shares.unflatten(2, (-1, per_tile)).mean(3) if per_tile > 1 else shares
            return means
        weight = counted.to(shares.dtype).unflatten(-1, (-1, per_tile))  # [B or 1, tiles, per_tile]
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
        weighted: Tensor = shares.unflatten(2, (-1, per_tile)) * weight[:, None, ..., None]
        return weighted.sum(3)


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """``[B, H, R, F]`` with ``[B, KV, G, F]`` to ``[B, H, R, G]``: heads of one group share their keys, uncopied."""
    batch, heads, rows, _ = queries.shape
    left = queries.reshape(batch * keys.shape[1], -1, queries.shape[-1])
    right = keys.flatten(0, 1).mT
    if left.dtype in (torch.float16, torch.bfloat16):
        # Half precision scores would be off by more than the scores of neighbouring blocks differ.
        if left.is_cuda:
            return torch.bmm(left, right, out_dtype=torch.float32).view(batch, heads, rows, -1)
        left, right = left.float(), right.float()
    return torch.bmm(left, right).view(batch, heads, rows, -1)


def _choose(
    masses: Tensor, begin: Tensor, stop: Tensor, patterns: Sequence[BlockTopK], width: int, key_blocks: int
) -> tuple[Tensor, Tensor | None]:
    """The blocks to list, int32 ``[B, H, tiles, C]`` ascending, then ``key_blocks``; and the tiles that need more.

    Args:
        masses: ``[B, H, tiles, blocks]``; begin, stop: ``[B, H, tiles]``.
    """
    device = masses.device
    block = ramp(masses.shape[-1], device)
    between = (block >= begin[..., None]) & (block < stop[..., None])
    free = torch.where(between, masses, 0)
    best, index = free.topk(min(width, masses.shape[-1]), -1)
    counts = tuple(_most(p, key_blocks) for p in patterns)
    most = constant(counts, device)[:, None, None]
    wanted = best > 0
    if min(counts) < best.shape[-1]:
        wanted = wanted & (ramp(best.shape[-1], device) < most)
    lacking = None
    if any(p.mass is not None for p in patterns):
        missing = keep(_missing, (tuple(p.mass for p in patterns),), device).to(masses.dtype)
        # What stays away may hold the missing share at most. A head with a fixed number never has enough.
        needed = ((free.sum(-1) - missing * masses.sum(-1)) * FIXED_POINT)[..., None]
        units = (torch.where(wanted, best, 0) * FIXED_POINT).int()
        before = units.cumsum(-1, dtype=torch.int32) - units
        wanted = wanted & (before < needed)
        # A tile that lists all of its blocks has enough, whatever rounding says.
        has_more = ((free > 0).sum(-1, dtype=torch.int32) > most[..., 0]) & (missing > 0)
        lacking = has_more & (units.sum(-1, dtype=torch.int32) < needed[..., 0])
    chosen = torch.where(wanted, index.int(), key_blocks)
    return chosen.sort(-1).values, lacking


def _missing(targets: tuple[float | None, ...], device: torch.device) -> Tensor:
    """The share of the mass that each head may miss, float64 ``[H, 1]``; -1 without a target."""
    values = torch.tensor([[-1.0 if target is None else 1.0 - target] for target in targets], dtype=torch.float64)
    return values.to(device, non_blocking=True)
