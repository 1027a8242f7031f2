"""The probe of boundaries: exact attention of the last rows of each modality, reduced to a few vectors per head.

Every pair of query modality and head is probed once, whatever number of key modalities asks about it: the softmax runs
over all keys, and only the sums differ. ``run_modality_probe`` is what planners call. On a GPU it runs three kernels,
or four where boundaries are mixed; everywhere else ``reference_modality_probe``, which the kernels are tested against.

No atomics, and every launch constant follows from shapes: results are identical from run to run. Nothing waits for the
device: rows stand where the prompt has put them, so their positions stay in tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmi_compile.kernels.frames import constant, ramp
from mmi_compile.kernels.fused_probe import (
    MOST_CHUNKS,
    PROGRAMS,
    PassTile,
    chunk_size,
    probe_tiles,
    shared_arguments,
    why_not_fused,
)
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.launch import compile_kernel_ahead, device_arch, dtype_name, on_device
from mmi_compile.kernels.probe import LAST_Q, row_weights
from mmi_compile.kernels.segments import Segments
from mmi_compile.kernels.spec import canonical_arch, padded_head_dim, supported
from mmi_compile.profiling import span

ALL_KEYS = -1
"""In place of a key modality: keys in order."""

_ROWS, _RUN = 64, 16


class Asked(NamedTuple):
    """What one head wants to know of the rows of one modality.

    Attributes:
        query: place of the rows' modality in ``Segments.labels``; key: that of the keys, or ``ALL_KEYS``.
        head: query head. diagonals: whether sums by distance are wanted besides those by key.
    """

    query: int
    key: int
    head: int
    diagonals: bool


@dataclass(frozen=True)
class RegionMasses:
    """Probability mass by key and by distance, float ``[B, H, X]`` each, in the coordinates of a part."""

    columns: Tensor
    distances: Tensor


@dataclass(frozen=True)
class ModalityProbe:
    """Attention mass of the last rows of each modality; each row that sees a key weighs 1. Not to be written to.

    Attributes:
        segments: the prompt. entries: the probed pairs ``(query modality, head)``, ascending.
        columns: float ``[B, len(entries), kv_len]``, mass on each key.
        ordered, compact: the triples ``(query modality, key modality, head)`` whose distances are known, ascending.
        by_position: float ``[B, len(ordered), q_len + q_offset]``, mass at each distance ``i - j``.
        by_rank: float ``[B, len(compact), kv_len]``, mass at each distance ``seen(i) - 1 - rank(j)``.
    """

    segments: Segments
    entries: tuple[tuple[int, int], ...]
    columns: Tensor
    ordered: tuple[tuple[int, int, int], ...]
    by_position: Tensor
    compact: tuple[tuple[int, int, int], ...]
    by_rank: Tensor

    def masses(self, query: int, key: int, heads: Sequence[int], diagonals: bool) -> RegionMasses:
        """What some heads have asked about one modality of rows and one of keys (or ``ALL_KEYS``).

        Returns:
            columns ``[B, H, kv_len]`` by position, or by rank among the keys of the modality, then zeros; distances
            likewise, or ``[B, H, 0]``.

        Raises:
            ValueError: not among what was asked for.
        """
        columns = _rows_of(self.columns, _find(self.entries, [(query, head) for head in heads]))
        if key != ALL_KEYS:
            place, exists = keys_of_group(self.segments, key)
            columns = torch.where(exists[:, None], columns.gather(-1, place[:, None].expand_as(columns)), 0)
        if not diagonals:
            return RegionMasses(columns, columns[..., :0])
        known, mass = (self.ordered, self.by_position) if key == ALL_KEYS else (self.compact, self.by_rank)
        return RegionMasses(columns, _rows_of(mass, _find(known, [(query, key, head) for head in heads])))


def _find(known: Sequence[tuple[int, ...]], wanted: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    places = {one: slot for slot, one in enumerate(known)}
    try:
        return tuple(places[one] for one in wanted)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} was not asked for when the prompt was probed; known are {known}") from None


def _rows_of(x: Tensor, slots: tuple[int, ...]) -> Tensor:
    """``x[:, slots]``, a view where they are consecutive."""
    if slots and slots == tuple(range(slots[0], slots[-1] + 1)):
        return x[:, slots[0] : slots[-1] + 1]
    return x.index_select(1, constant(slots, x.device, torch.int64))


def keys_of_group(segments: Segments, key: int) -> tuple[Tensor, Tensor]:
    """Position of each rank of a modality, int64 ``[B, kv_len]`` (0 where there is no such rank), and which exist."""
    rank = ramp(segments.group.shape[1], segments.group.device)
    slot = segments.key_start[:, key, None] + rank
    position = segments.key_order.gather(1, slot.clamp(max=segments.key_order.shape[1] - 1).long())
    exists = rank < segments.counts[:, key, None]
    return torch.where(exists, position, 0).long(), exists


def last_rows(segments: Segments, geometry: Geometry, count: int = LAST_Q) -> Tensor:
    """Positions of the last live tokens of every modality that are query rows, int32 ``[B, M, L]``, ascending.

    ``L`` is ``count``, or ``q_len`` if that is less. -1 in front where a modality has fewer.
    """
    g, device = geometry, segments.group.device
    length = min(count, g.q_len)
    rank = segments.counts[..., None] - length + ramp(length, device)
    slot = segments.key_start[..., None] + rank
    slot = slot.clamp(0, segments.key_order.shape[1] - 1).flatten(1)
    position = segments.key_order.gather(1, slot.long()).view_as(rank)
    return torch.where((rank >= 0) & (position >= g.q_offset), position, -1)


def newest_keys(segments: Segments, positions: Tensor) -> Tensor:
    """Rank of the newest key of each modality that a row sees, -1 for none: int32 ``[B, key modality, M, L]``.

    Args:
        positions: int32 ``[B, M, L]``, -1 for no row.
    """
    kinds = segments.seen.shape[1]
    index = (positions + 1).flatten(1).long()[:, None].expand(-1, kinds, -1)
    seen = segments.seen.gather(2, index)
    return (seen - 1).view(*seen.shape[:2], *positions.shape[1:])


@span("mmi::probe")
def run_modality_probe(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, segments: Segments, asked: Iterable[Asked],
    last_q: int = LAST_Q,
) -> ModalityProbe:  # fmt: skip
    """Attend from the last rows of each modality to all keys they may see, and sum the probabilities.

    Args:
        q: floating ``[B, HQ, q_len, D]`` with ``q_len >= 1``; k: ``[B, HKV, kv_len, D]`` with ``kv_len >= 1``.
        scale: factor on the scores. asked: whose masses are wanted; nothing else is computed.
        last_q: rows of each modality.

    Sums are float32 (float64 for float64 inputs). Half precision on a GPU runs fused; see ``fused_modality_probe``.
    """
    run = fused_modality_probe if why_not_fused(q, k, last_q) is None else reference_modality_probe
    return run(q, k, geometry, scale, segments, asked, last_q)


class _Layout(NamedTuple):
    """Rows of the result, ascending."""

    entries: tuple[tuple[int, int], ...]
    ordered: tuple[tuple[int, int, int], ...]
    compact: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, asked: Iterable[Asked]) -> _Layout:
        wanted = sorted(asked)
        triples = sorted({(a.query, a.key, a.head) for a in wanted if a.diagonals})
        return cls(
            tuple(sorted({(a.query, a.head) for a in wanted})),
            tuple(t for t in triples if t[1] == ALL_KEYS),
            tuple(t for t in triples if t[1] != ALL_KEYS),
        )


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def reference_modality_probe(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, segments: Segments, asked: Iterable[Asked],
    last_q: int = LAST_Q,
) -> ModalityProbe:  # fmt: skip
    """``run_modality_probe`` in plain PyTorch, for any dtype and device. Holds scores of a few heads at a time."""
    g, device = geometry, q.device
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    layout = _Layout.of(asked)
    positions = last_rows(segments, g, last_q).long()
    columns = torch.zeros(g.batch, len(layout.entries), g.kv_len, dtype=work, device=device)
    by_position = torch.zeros(g.batch, len(layout.ordered), g.q_len + g.q_offset, dtype=work, device=device)
    by_rank = torch.zeros(g.batch, len(layout.compact), g.kv_len, dtype=work, device=device)
    for query in sorted({query for query, _ in layout.entries}):
        where = {
            key: _keys_by_distance(segments, g, positions[:, query], key)
            for key in sorted({t[1] for t in (*layout.ordered, *layout.compact) if t[0] == query})
        }
        heads = [head for other, head in layout.entries if other == query]
        for some, weights in row_weights(q, k, g, scale, heads, positions[:, query] - g.q_offset):
            for head, mass in zip(some, weights.unbind(1), strict=True):  # [B, L, kv_len]
                columns[:, layout.entries.index((query, head))] = mass.sum(1)
                for key, (keys, real) in where.items():
                    known, target = (layout.ordered, by_position) if key == ALL_KEYS else (layout.compact, by_rank)
                    if (query, key, head) in known:
                        target[:, known.index((query, key, head))] = (mass.gather(-1, keys) * real).sum(1)
    return ModalityProbe(segments, layout.entries, columns, layout.ordered, by_position, layout.compact, by_rank)


def _keys_by_distance(segments: Segments, geometry: Geometry, position: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """The key at each distance from each row, int64 ``[B, L, distances]``, and whether there is one."""
    g = geometry
    if key == ALL_KEYS:
        at = position[..., None] - ramp(g.q_len + g.q_offset, position.device)
        return at.clamp(0, g.kv_len - 1), (at >= 0) & (at < g.kv_len)
    seen = segments.seen[:, key].gather(1, position + 1)
    rank = seen[..., None].long() - 1 - ramp(g.kv_len, position.device)
    found = keys_of_group(segments, key)[0].gather(1, rank.clamp(min=0).flatten(1)).view_as(rank)
    return found, rank >= 0


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


class ModalityTiles(NamedTuple):
    """Launch constants of the three kernels; a pack of ``distances`` holds ``RUN`` rows of each of its heads."""

    stats: PassTile
    columns: PassTile
    distances: PassTile


# For each family the tile of distances by padded head dim; the other two are those of the plain probe. Heads times keys
# are no fewer than threads: each sum then has one thread of its own, which adds to what it has stored itself.
_DISTANCES: dict[str, dict[int, PassTile]] = {
    "sm_80": {128: PassTile(4, 128, 4, 2), 256: PassTile(4, 64, 4, 2)},
    "sm_86": {128: PassTile(4, 64, 4, 2), 256: PassTile(4, 64, 4, 1)},
    "sm_90": {128: PassTile(2, 128, 4, 3), 256: PassTile(4, 64, 4, 2)},
    "gfx942": {128: PassTile(4, 64, 4, 1), 256: PassTile(4, 64, 4, 1)},
}
_FAMILY = {"sm_89": "sm_86", "sm_120": "sm_86", "sm_100": "sm_90"}


def modality_tiles(arch: str, head_dim: int) -> ModalityTiles:
    """The launch constants for an architecture that ``spec.canonical_arch`` knows."""
    known = canonical_arch(arch)
    assert known is not None
    plain, table = probe_tiles(arch, head_dim), _DISTANCES[_FAMILY.get(known, known)]
    distances = next(tile for limit, tile in sorted(table.items()) if padded_head_dim(head_dim) <= limit)
    return ModalityTiles(plain.stats, plain.columns, distances)


def fused_modality_probe(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, segments: Segments, asked: Iterable[Asked],
    last_q: int = LAST_Q, *, tiles: ModalityTiles | None = None, programs: int = PROGRAMS,
) -> ModalityProbe:  # fmt: skip
    """``run_modality_probe`` by kernels: arguments and result are those of the reference; sums are float32.

    Args:
        q, k: fp16 or bf16 (fp32 in the interpreter) whose last dimension is contiguous; others are copied. ``last_q``
            is at most 64.
        tiles: launch constants; None takes the table's. programs: programs to aim at in a pass over the keys.

    Raises:
        ValueError: no kernel for this dtype, head dim, device or number of rows.
    """
    g = geometry
    reason = supported(dtype_name(q.dtype), q.shape[-1], arch=device_arch(q.device))
    if min(last_q, g.q_len) > _ROWS:
        reason = f"{last_q} probe rows: the kernels hold {_ROWS}"
    if reason is not None or q.dtype != k.dtype:
        raise ValueError(reason or f"q is {q.dtype}, k {k.dtype}: the kernels need the same dtype")
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    layout = _Layout.of(asked)
    positions = last_rows(segments, g, last_q).contiguous()
    columns = torch.empty(g.batch, len(layout.entries), g.kv_len, device=q.device)
    by_position = torch.empty(g.batch, len(layout.ordered), g.q_len + g.q_offset, device=q.device)
    by_rank = torch.empty(g.batch, len(layout.compact), g.kv_len, device=q.device)
    chosen = tiles or modality_tiles(device_arch(q.device), q.shape[-1])
    if layout.entries:
        call = _Call(PackedRows(q, k, g, scale, positions, layout.entries), segments)
        log_sums = call.rows.run("modality_columns", chosen, programs, {"columns": columns})
        _run_distances(call, layout.ordered, by_position, log_sums, chosen.distances, programs)
        _run_distances(call, layout.compact, by_rank, log_sums, chosen.distances, programs)
    return ModalityProbe(segments, layout.entries, columns, layout.ordered, by_position, layout.compact, by_rank)


class Statistics(NamedTuple):
    """Of each row over each chunk of keys: the maximum of its scores, and the sum of ``2 ** (score - maximum)``; float
    ``[B, entries, chunks, 64]``."""

    maxima: Tensor
    sums: Tensor

    @classmethod
    def known(cls, log_sums: Tensor) -> Statistics:
        """Of rows whose sums are known, as logarithms to base 2, float ``[B, entries, 64]``; infinite for no row."""
        real = log_sums.isfinite()[:, :, None]
        return cls(torch.where(real, log_sums[:, :, None], -torch.inf).contiguous(), real.to(log_sums.dtype))


@dataclass(frozen=True)
class PackedRows:
    """Probe rows of some *kinds* (here modalities), and which heads attend from them: what the launches share.

    Attributes:
        q, k, geometry, scale: of the attention. positions: int32 ``[B, kinds, L]``, contiguous, -1 for no row.
        entries: pairs ``(kind, head)``, ascending.
    """

    q: Tensor
    k: Tensor
    geometry: Geometry
    scale: float
    positions: Tensor
    entries: tuple[tuple[int, int], ...]

    def arguments(self) -> dict[str, Any]:
        """Arguments that several kernels take, by name."""
        return shared_arguments(self.q, self.k, self.geometry, self.scale, idle=self.positions) | {
            "positions": self.positions,
            "heads_out": len(self.entries),
            "modalities": self.positions.shape[1],
            "n_rows": self.positions.shape[2],
        }

    def run(self, name: str, tiles: ModalityTiles, programs: int, extra: dict[str, Any]) -> Tensor:
        """Two passes over the keys: statistics of the rows, then the kernel ``name`` with its own arguments.

        Returns:
            The logarithm to base 2 of every row's sum, float ``[B, entries, 64]``.
        """
        return self.sums(name, tiles, programs, extra, self.statistics(tiles, programs))

    def statistics(self, tiles: ModalityTiles, programs: int) -> Statistics:
        """Maximum and sum of every row, a chunk of keys at a time."""
        chunks = self._chunked(tiles.stats, programs)
        shape = (self.geometry.batch, len(self.entries), chunks["n_chunks"], _ROWS)
        found = Statistics(*torch.empty(2, *shape, device=self.q.device).unbind(0))
        self._pass("modality_row_stats", tiles.stats, chunks, {"row_max": found.maxima, "row_sum": found.sums})
        return found

    def sums(
        self, name: str, tiles: ModalityTiles, programs: int, extra: dict[str, Any], statistics: Statistics
    ) -> Tensor:
        """The second of these passes."""
        log_sums = torch.empty(self.geometry.batch, len(self.entries), _ROWS, device=self.q.device)
        known = {
            "row_max": statistics.maxima, "row_sum": statistics.sums, "stats_chunks": statistics.maxima.shape[2],
            "log_sums": log_sums,
        }  # fmt: skip
        self._pass(name, tiles.columns, self._chunked(tiles.columns, programs), extra | known)
        return log_sums

    def _pass(self, kernel: str, tile: PassTile, chunks: dict[str, Any], extra: dict[str, Any]) -> None:
        # Packs vary fastest: programs that run at the same time then share keys in the L2 cache.
        grid = (self.geometry.batch * chunks["n_packs"], chunks["n_chunks"])
        _launch(kernel, self.arguments() | extra | chunks, self.q, grid, tile)

    def launch_by_entry(self, name: str, tile: PassTile, keys: int, extra: dict[str, Any]) -> None:
        """One program for each entry and ``tile.block_n`` of ``keys``; ``tile.heads`` is 1."""
        packs, _ = _packs(self._wanted(), self.geometry.group, 1, False)
        n_packs = len(packs) // 3
        given = self.arguments() | extra | {"packs": constant(packs, self.q.device), "n_packs": n_packs}
        _launch(name, given, self.q, (self.geometry.batch * n_packs, -(-keys // tile.block_n)), tile)

    def launch_partial(self, name: str, tile: PassTile, programs: int, extra: dict[str, Any], *, width: int) -> Tensor:
        """One pass over the keys, by about ``programs`` programs.

        Returns:
            What each chunk of keys gave, ``outputs`` of the kernel: float ``[B, entries, chunks, 64, width]``.
        """
        chunks = self._chunked(tile, programs)
        shape = (self.geometry.batch, len(self.entries), chunks["n_chunks"], _ROWS, width)
        outputs = torch.empty(shape, device=self.q.device)
        given = self.arguments() | extra | chunks | {"outputs": outputs}
        _launch(name, given, self.q, (self.geometry.batch * chunks["n_packs"], chunks["n_chunks"]), tile)
        return outputs

    def _wanted(self) -> tuple[tuple[int, int, int], ...]:
        return tuple((slot, head, kind) for slot, (kind, head) in enumerate(self.entries))

    def _chunked(self, tile: PassTile, programs: int) -> dict[str, Any]:
        g = self.geometry
        packs, _ = _packs(self._wanted(), g.group, tile.heads, False)
        n_packs, n_tiles = len(packs) // (3 * tile.heads), -(-g.kv_len // tile.block_n)
        size = chunk_size(n_tiles, programs // (g.batch * n_packs))
        assert -(-n_tiles // size) <= MOST_CHUNKS
        packed = constant(packs, self.q.device)
        return {"packs": packed, "n_packs": n_packs, "chunk_tiles": size, "n_chunks": -(-n_tiles // size)}


@dataclass(frozen=True)
class _Call:
    """What the launches of one probe of boundaries share."""

    rows: PackedRows
    segments: Segments

    def arguments(self) -> dict[str, Any]:
        """As of ``PackedRows``."""
        return self.rows.arguments()


def _run_distances(
    call: _Call, wanted: tuple[tuple[int, int, int], ...], distances: Tensor, log_sums: Tensor, tile: PassTile,
    programs: int,
) -> None:  # fmt: skip
    """Fill ``distances``, a row for each of ``wanted``: all in order, or all grouped."""
    if not wanted:
        return
    probed, segments = call.rows, call.segments
    g, device, grouped = probed.geometry, probed.q.device, wanted[0][1] != ALL_KEYS
    kinds = segments.seen.shape[1] if grouped else 1
    newest = newest_keys(segments, probed.positions).contiguous() if grouped else probed.positions
    rows = tuple(
        (slot, head, probed.entries.index((query, head)), query, max(key, 0))
        for slot, (query, key, head) in enumerate(wanted)
    )
    packs, places = _packs(rows, g.group, tile.heads, True)
    n_packs, width = len(places) // 2, distances.shape[-1]
    n_tiles = -(-width // (tile.block_n - _RUN))
    size = chunk_size(n_tiles, programs // (g.batch * n_packs))
    given = call.arguments() | {
        "packs": constant(packs, device), "places": constant(places, device), "newest": newest,
        "key_order": segments.key_order, "key_start": segments.key_start.contiguous(), "log_sums": log_sums,
        "distances": distances, "n_packs": n_packs, "heads_out": len(wanted), "chunk_tiles": size, "kinds": kinds,
        "stats_heads": len(probed.entries), "slots": segments.key_order.shape[1], "width": width,
        "GROUPED": grouped,
    }  # fmt: skip
    if grouped:  # dead keys have no slot
        given |= {"HAS_BOUNDS": False, "HAS_PADDING": False}
    _launch("modality_distances", given, probed.q, (g.batch * n_packs, -(-n_tiles // size)), tile)


@lru_cache(maxsize=128)
def _packs(
    rows: tuple[tuple[int, ...], ...], group: int, size: int, alike: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows side by side that share their keys: the first three numbers of each, and what the rest are in a pack.

    Args:
        rows: output row, query head, and others; alike: whether what follows the third number is equal in a pack.
    """
    together: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for row in rows:
        together.setdefault((row[1] // group, *(row[3:] if alike else ())), []).append(row)
    flat: list[int] = []
    places: list[int] = []
    for shared, members in together.items():
        for start in range(0, len(members), size):
            pack = members[start : start + size]
            # A missing row takes the keys of the pack, so that no kernel reads beyond the last head.
            for row in [*pack, *[(-1, *pack[0][1:])] * (size - len(pack))]:
                flat += row[:3]
            places += shared[1:]
    return tuple(flat), tuple(places)


def _launch(name: str, arguments: dict[str, Any], on: Tensor, grid: tuple[int, ...], tile: PassTile) -> None:
    from mmi_compile.kernels import exact_rows_kernels, modality_probe_kernels, spread_probe_kernels

    modules = {"exact": exact_rows_kernels, "modality": modality_probe_kernels, "spread": spread_probe_kernels}
    kernel = getattr(modules[name.split("_")[0]], name)
    given = arguments | {"HEADS": tile.heads, "BLOCK_N": tile.block_n}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    with on_device(on):
        kernel[grid](**{key: given[key] for key in kernel.arg_names}, **options)


def compile_ahead(arch: str, dtype: str, head_dim: int, *, special: bool = False) -> dict[str, Any]:
    """Compile every kernel for ``arch`` on a machine that need not have it; the compiled kernels by name.

    Args:
        arch: for example ``"sm_90"`` or ``"gfx942"``; dtype: "bf16" or "fp16".
        special: with padding bounds, holes and a window.
    """
    from mmi_compile.kernels import modality_probe_kernels

    chosen = modality_tiles(arch, head_dim)
    shared: dict[str, int] = {f"HAS_{name}": special for name in ("BOUNDS", "PADDING", "WINDOW")}
    shared |= {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim), "UNIT": 8}
    variants: dict[str, tuple[PassTile, dict[str, int]]] = {
        "modality_row_stats": (chosen.stats, {}),
        "modality_columns": (chosen.columns, {}),
        "modality_distances": (chosen.distances, {"GROUPED": False}),
        "modality_distances of groups": (
            chosen.distances, {"GROUPED": True, "HAS_BOUNDS": False, "HAS_PADDING": False}
        ),
    }  # fmt: skip
    compiled = {}
    for name, (tile, extra) in variants.items():
        kernel = getattr(modality_probe_kernels, name.split()[0])
        constants = {**shared, **extra, "HEADS": tile.heads, "BLOCK_N": tile.block_n}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        compiled[name] = compile_kernel_ahead(kernel, arch, constants, lambda name: argument_type(name, dtype), options)
    return compiled


_INT_POINTERS = frozenset({
    "packs", "places", "positions", "rows", "newest", "key_order", "key_start", "kv_start", "kv_stop", "credit_start",
    "credit_stop", "keys",
})  # fmt: skip
_FLOAT_POINTERS = frozenset({
    "row_max", "row_sum", "log_sums", "columns", "distances", "credit", "by_tile", "mass", "outputs"
})  # fmt: skip


def argument_type(argument: str, dtype: str) -> str:
    """The type of a kernel's argument, for ahead-of-time compilation; ``dtype`` is that of q and k."""
    if argument in _FLOAT_POINTERS or argument in _INT_POINTERS:
        return "*fp32" if argument in _FLOAT_POINTERS else "*i32"
    known = {"q": f"*{dtype}", "k": f"*{dtype}", "v": f"*{dtype}", "key_padding": "*u8", "scale": "fp32"}
    return known.get(argument, "i64" if argument.startswith("stride_") else "i32")
