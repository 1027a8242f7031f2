"""Launches the fused probe: the sums of ``reference_probe`` without a single matrix of ``64 x kv_len`` scores.

Two passes over the keys recompute the scores: the first leaves maximum and sum of every row for each chunk of keys, the
second normalises with them and writes column and diagonal sums. Where diagonals are to be told apart, a third kernel
compares each with the columns that it crosses, and a fourth recomputes the few key tiles that the chosen ones cross.

No atomics, and every launch constant follows from shapes: results are identical from run to run. Nothing waits for the
device. Triton is imported when a kernel is first launched or compiled, never with this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmi_compile.kernels.frames import constant
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.launch import LOG2_E, bounds, compile_kernel_ahead, device_arch, dtype_name, on_device
from mmi_compile.kernels.probe import (
    LAST_Q,
    PEAK,
    Probe,
    first_probe_tile,
    peak_count,
    probe_rows,
    probe_tile_count,
    top_peaks,
)
from mmi_compile.kernels.spec import canonical_arch, padded_head_dim, supported

PROGRAMS = 1056
"""At most this many programs in a pass, heads times chunks: eight for each of an H100's 132 multiprocessors."""

MOST_CHUNKS = 256
"""Chunks per head: the second pass reads the statistics of all of them."""

MOST_KEYS = 65535 * 64
"""Keys that the second dimension of a launch grid counts in blocks of 64."""

_ROWS = 64
_EXCESS_BLOCK, _EXCESS_WARPS = 512, 4
_FOLD_LINES, _FOLD_RESIDUES, _FOLD_WARPS = 128, 32, 4


class PassTile(NamedTuple):
    """Launch constants of one pass: heads that share a key tile, keys in it (64 or more), and how it is compiled."""

    heads: int
    block_n: int
    num_warps: int
    num_stages: int


class ProbeTiles(NamedTuple):
    """Launch constants of the kernels that multiply; ``columns`` is ``sums`` without diagonals."""

    stats: PassTile
    sums: PassTile
    columns: PassTile
    beside: PassTile


# For each family the tiles by padded head dim; the first entry that is large enough is taken.
_TILES: dict[str, dict[int, ProbeTiles]] = {
    "sm_80": {
        128: ProbeTiles(PassTile(2, 64, 8, 3), PassTile(1, 64, 4, 3), PassTile(1, 64, 4, 3), PassTile(1, 64, 4, 1)),
        256: ProbeTiles(PassTile(1, 64, 4, 2), PassTile(1, 64, 4, 2), PassTile(1, 64, 4, 2), PassTile(1, 64, 4, 1)),
    },
    "sm_86": {
        128: ProbeTiles(PassTile(1, 64, 4, 3), PassTile(1, 64, 4, 2), PassTile(1, 64, 4, 2), PassTile(1, 64, 4, 1)),
        256: ProbeTiles(PassTile(1, 64, 4, 1), PassTile(1, 64, 4, 1), PassTile(1, 64, 4, 1), PassTile(1, 64, 4, 1)),
    },
    # Head dim 128 was measured on an H100 at 128 K tokens; the others follow from registers and shared memory.
    "sm_90": {
        128: ProbeTiles(PassTile(2, 128, 8, 2), PassTile(1, 128, 4, 2), PassTile(1, 64, 4, 2), PassTile(1, 64, 4, 1)),
        256: ProbeTiles(PassTile(2, 64, 8, 2), PassTile(1, 64, 4, 2), PassTile(1, 64, 4, 2), PassTile(1, 64, 4, 1)),
    },
    "gfx942": {
        128: ProbeTiles(PassTile(1, 64, 4, 1), PassTile(1, 64, 4, 1), PassTile(1, 64, 4, 1), PassTile(1, 64, 4, 1)),
        256: ProbeTiles(PassTile(1, 64, 4, 1), PassTile(1, 64, 4, 1), PassTile(1, 64, 4, 1), PassTile(1, 64, 4, 1)),
    },
}
_FAMILY = {"sm_89": "sm_86", "sm_120": "sm_86", "sm_100": "sm_90"}


def probe_tiles(arch: str, head_dim: int) -> ProbeTiles:
    """The launch constants for an architecture that ``spec.canonical_arch`` knows."""
    known = canonical_arch(arch)
    assert known is not None
    table = _TILES[_FAMILY.get(known, known)]
    return next(tiles for limit, tiles in sorted(table.items()) if padded_head_dim(head_dim) <= limit)


def why_not_fused(q: Tensor, k: Tensor, last_q: int = LAST_Q) -> str | None:
    """Why the fused probe cannot run on these tensors, or None when it can. Never waits for the device."""
    if q.device.type != "cuda" or q.device != k.device:
        return f"q on {q.device}, k on {k.device}: the kernels need one GPU"
    if q.dtype != k.dtype or q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype}, k {k.dtype}: the kernels need the same half precision"
    if min(last_q, q.shape[2]) > _ROWS:
        return f"{last_q} probe rows: the kernels hold {_ROWS}"
    if max(k.shape[2], q.shape[2]) > MOST_KEYS:
        return f"{k.shape[2]} keys: a launch grid holds {MOST_KEYS}"
    if find_spec("triton") is None:
        return "triton is not installed"
    return supported(dtype_name(q.dtype), q.shape[-1], arch=device_arch(q.device))


@dataclass(frozen=True)
class _Call:
    """What the launches of one probe share; ``first_row`` is the first probe row, None where only the device knows it
    (``rows``)."""

    q: Tensor
    k: Tensor
    geometry: Geometry
    heads: tuple[int, ...]
    rows: Tensor
    first_row: int | None
    scale: float

    def arguments(self) -> dict[str, Any]:
        """Arguments that several kernels take, by name."""
        g = self.geometry
        return shared_arguments(self.q, self.k, g, self.scale, idle=self.rows) | {
            "rows": self.rows,
            "heads_out": len(self.heads),
            "first_row": self.first_row or 0,
            "n_rows": self.rows.shape[1],
            "positions": g.q_len + g.q_offset,
            "HAS_ROWS": self.first_row is None,
        }

    def packs(self, size: int) -> Tensor:
        """Slot in the probe and query head of each place in a pack, int32 ``[PACKS, size, 2]``; slot -1 for none."""
        table = _packs(self.heads, self.geometry.group, size)
        return constant(table, self.q.device).view(-1, size, 2)


@lru_cache(maxsize=128)
def _packs(heads: tuple[int, ...], group: int, size: int) -> tuple[int, ...]:
    flat: list[int] = []
    by_kv_head: dict[int, list[int]] = {}
    for slot, head in enumerate(heads):
        by_kv_head.setdefault(head // group, []).append(slot)
    for slots in by_kv_head.values():
        for start in range(0, len(slots), size):
            pack = slots[start : start + size]
            # A missing head takes the keys of the pack, so that no kernel reads beyond the last head.
            for slot in [*pack, *[-1] * (size - len(pack))]:
                flat += [slot, heads[slot if slot >= 0 else pack[0]]]
    return tuple(flat)


def unit_strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Strides of the first three dimensions of each tensor, in units; and elements in a unit."""
    # A dimension of one entry may have any stride.
    strides = [s if n > 1 else 0 for t in tensors for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)]
    unit = 8 if all(s % 8 == 0 for s in strides) else 1
    return [s // unit for s in strides], unit


def shared_arguments(q: Tensor, k: Tensor, geometry: Geometry, scale: float, *, idle: Tensor) -> dict[str, Any]:
    """Arguments of every probe kernel, by name.

    Args:
        idle: any tensor, for pointers that no loop reads: a kernel without that loop still takes some pointer.
    """
    g, device = geometry, q.device
    has_bounds = g.kv_start is not None or g.kv_stop is not None
    start, stop = bounds(g, device) if has_bounds else (idle, idle)
    strides, unit = unit_strides(q, k)
    names = ("stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn")
    return dict(zip(names, strides, strict=True)) | {
        "q": q,
        "k": k,
        "kv_start": start,
        "kv_stop": stop,
        "key_padding": idle if g.key_padding is None else g.key_padding.to(device).contiguous().view(torch.uint8),
        "group": g.group,
        "q_offset": g.q_offset,
        "kv_len": g.kv_len,
        "window": g.window,
        "scale": scale * LOG2_E,
        "HEAD_DIM": q.shape[-1],
        "BLOCK_D": padded_head_dim(q.shape[-1]),
        "UNIT": unit,
        "HAS_BOUNDS": has_bounds,
        "HAS_PADDING": g.key_padding is not None,
        "HAS_WINDOW": g.window > 0,
    }


def fused_probe(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    scale: float,
    *,
    block_m: int,
    heads: Sequence[int] | None = None,
    last_q: int = LAST_Q,
    diagonals: bool = True,
    peaks: int = 0,
    nearest: int = 0,
    tiles: ProbeTiles | None = None,
    programs: int = PROGRAMS,
) -> Probe:
    """``run_probe`` by kernels. Arguments and result are those of ``reference_probe``; sums are float32.

    Args:
        q, k: fp16 or bf16 (fp32 in the interpreter) whose last dimension is contiguous; others are copied. ``last_q``
            is at most 64.
        tiles: launch constants; None takes the table's.
        programs: programs to aim at in a pass.

    Raises:
        ValueError: no kernel for this dtype, head dim, device or number of probe rows.
    """
    g = geometry
    reason = supported(dtype_name(q.dtype), q.shape[-1], arch=device_arch(q.device))
    if min(last_q, g.q_len) > _ROWS:
        reason = f"{last_q} probe rows: the kernels hold {_ROWS}"
    if reason is not None or q.dtype != k.dtype:
        raise ValueError(reason or f"q is {q.dtype}, k {k.dtype}: the kernels need the same dtype")
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    picked = tuple(range(g.q_heads)) if heads is None else tuple(heads)
    rows = probe_rows(g, q.device, last_q)
    first_row = None if g.has_padding else g.q_len - rows.shape[1]
    call = _Call(q, k, g, picked, rows, first_row, scale)
    chosen = tiles or probe_tiles(device_arch(q.device), q.shape[-1])
    kinds = (2 if peaks else 1) if diagonals or peaks else 0
    return _probe(call, block_m, kinds, peak_count(g, rows.shape[1], peaks), nearest, chosen, programs)


def _probe(call: _Call, block_m: int, kinds: int, peaks: int, nearest: int, tiles: ProbeTiles, programs: int) -> Probe:
    """``kinds``: 0 for no diagonals, 1 for their sums, 2 for their support as well."""
    g, rows, device = call.geometry, call.rows, call.q.device
    head = (g.batch, len(call.heads))
    tile_count = probe_tile_count(g, rows.shape[1], block_m)
    parts = torch.empty(*head, tile_count, g.kv_len, device=device)
    columns = parts[:, :, 0] if tile_count == 1 else torch.empty(*head, g.kv_len, device=device)
    diagonals = _diagonal_buffers(call, kinds)
    log_sums = torch.empty(*head, _ROWS, device=device)
    arguments = call.arguments() | {"block_m": block_m, "log_sums": log_sums, "tiles": parts, "columns": columns}
    spare = diagonals[0] if kinds else log_sums  # a pointer that no kernel follows
    arguments |= {"distances": spare, "support": diagonals[1] if kinds > 1 else spare}
    if head[1]:
        _run_passes(call, arguments, tiles, programs, tile_count, kinds)
    first_tile = first_probe_tile(g, rows, block_m)
    mass, distances, beside = torch.empty(*head, 0, device=device), rows.new_empty(*head, 0), columns
    if peaks and head[1]:
        _launch("probe_excess", arguments | {"nearest": nearest, "peak": PEAK}, call.q,
                (g.batch * head[1], -(-(g.q_len + g.q_offset) // _EXCESS_BLOCK)), {"BLOCK": _EXCESS_BLOCK},
                _EXCESS_WARPS, 1)  # fmt: skip
        mass, distances = top_peaks(diagonals[1], peaks)
        beside = torch.empty_like(columns)
        _run_beside(call, arguments | {"peaks": mass, "peak_distances": distances, "beside": beside}, tiles.beside)
    slashes = diagonals[0] if kinds else torch.empty(*head, 0, device=device)
    return Probe(rows, columns, slashes, parts, first_tile, mass, distances, beside)


def _diagonal_buffers(call: _Call, count: int) -> Tensor:
    """``[count, B, H, positions]``: zeros where some distance is never written, since no pair has it."""
    g = call.geometry
    shape = (count, g.batch, len(call.heads), g.q_len + g.q_offset)
    every_distance = call.first_row is not None and g.kv_len == g.q_len + g.q_offset
    return (torch.empty if every_distance else torch.zeros)(shape, device=call.q.device)


def chunk_size(n_tiles: int, programs: int) -> int:
    """Key tiles per chunk so that about ``programs`` chunks, and no more, come of ``n_tiles``."""
    return -(-n_tiles // max(1, min(programs, n_tiles, MOST_CHUNKS)))


def _run_passes(
    call: _Call, arguments: dict[str, Any], tiles: ProbeTiles, programs: int, tile_count: int, kinds: int
) -> None:
    g = call.geometry
    summing = tiles.sums if kinds else tiles.columns
    stats, sums = _chunked(call, tiles.stats, programs), _chunked(call, summing, programs)
    partial = torch.empty(2, g.batch, len(call.heads), stats.n_chunks, _ROWS, device=call.q.device)
    arguments = arguments | {"row_max": partial[0], "row_sum": partial[1], "stats_chunks": stats.n_chunks}
    flags = {"QUERY_TILES": tile_count, "HAS_DIAGONALS": kinds > 0, "HAS_SUPPORT": kinds > 1}
    for name, part, tile, extra in (
        ("probe_row_stats", stats, tiles.stats, {}),
        ("probe_sums", sums, summing, flags),
    ):
        given = arguments | {"packs": part.packs, "n_packs": part.packs.shape[0], "chunk_tiles": part.chunk_tiles}
        given["n_chunks"] = part.n_chunks
        # Packs vary fastest: programs that run at the same time then share keys in the L2 cache.
        grid = (g.batch * part.packs.shape[0], part.n_chunks)
        constants = {"HEADS": tile.heads, "BLOCK_N": tile.block_n, **extra}
        _launch(name, given, call.q, grid, constants, tile.num_warps, tile.num_stages)


class _Chunked(NamedTuple):
    packs: Tensor
    chunk_tiles: int
    n_chunks: int


def _chunked(call: _Call, tile: PassTile, programs: int) -> _Chunked:
    packs = call.packs(tile.heads)
    n_tiles = -(-call.geometry.kv_len // tile.block_n)
    size = chunk_size(n_tiles, programs // (call.geometry.batch * packs.shape[0]))
    return _Chunked(packs, size, -(-n_tiles // size))


def _run_beside(call: _Call, arguments: dict[str, Any], tile: PassTile) -> None:
    g, count = call.geometry, arguments["peaks"].shape[-1]
    constants = {"BLOCK_N": tile.block_n, "BLOCK_PEAKS": max(16, 1 << (count - 1).bit_length())}
    grid = (g.batch * len(call.heads), -(-g.kv_len // tile.block_n))
    table = constant(tuple(x for slot, head in enumerate(call.heads) for x in (slot, head)), call.q.device)
    given = arguments | {"packs": table, "n_peaks": count}
    _launch("probe_beside", given, call.q, grid, constants, tile.num_warps, tile.num_stages)


def _launch(
    name: str,
    arguments: dict[str, Any],
    on: Tensor,
    grid: tuple[int, int],
    constants: dict[str, int],
    num_warps: int,
    num_stages: int,
) -> None:
    from mmi_compile.kernels import probe_kernels

    kernel = getattr(probe_kernels, name)
    given = arguments | constants
    with on_device(on):
        kernel[grid](**{key: given[key] for key in kernel.arg_names}, num_warps=num_warps, num_stages=num_stages)


# ---------------------------------------------------------------------------------------------------------------------
# Mass folded modulo strides


def fold(mass: Tensor, strides: tuple[int, ...]) -> tuple[Tensor, ...]:
    """``probe.phase_mass`` by one kernel: ``[B, H, stride]`` for each stride, float32."""
    mass = mass.float().contiguous()
    batch, heads, length = mass.shape
    size, table = _fold_blocks(strides)
    folded = torch.empty(batch, heads, size, device=mass.device)
    blocks = constant(table, mass.device)
    if mass.numel():
        arguments = {"mass": mass, "blocks": blocks, "folded": folded, "length": length, "size": size}
        constants = {"LINES": _FOLD_LINES, "RESIDUES": _FOLD_RESIDUES}
        _launch("fold_mass", arguments, mass, (batch * heads, len(table) // 3), constants, _FOLD_WARPS, 1)
    else:
        folded.zero_()
    return tuple(torch.split(folded, list(strides), -1))


@lru_cache(maxsize=64)
def _fold_blocks(strides: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Width of all residues side by side; stride, first residue and target of each block."""
    table: list[int] = []
    size = 0
    for stride in strides:
        for first in range(0, stride, _FOLD_RESIDUES):
            table += [stride, first, size + first]
        size += stride
    return size, tuple(table)


def fold_by_head(mass: Tensor, strides: Tensor, longest: int) -> Tensor:
    """Mass by residue of each head's own stride, float32 ``[B, H, longest]``, -1 beyond its last residue.

    Args:
        mass: ``[B, H, N]``, ``N >= 1``; strides: int64 ``[B, H]``, 1 or more; longest: no smaller than
            ``min(stride, N)`` of any.
    """
    mass = mass.float().contiguous()
    batch, heads, length = mass.shape
    folded = torch.empty(batch, heads, longest, device=mass.device)
    arguments = {"mass": mass, "strides": strides.contiguous(), "folded": folded, "length": length, "size": longest}
    constants = {"LINES": _FOLD_LINES, "RESIDUES": _FOLD_RESIDUES}
    grid = (batch * heads, -(-longest // _FOLD_RESIDUES))
    _launch("fold_mass_by_head", arguments, mass, grid, constants, _FOLD_WARPS, 1)
    return folded


# ---------------------------------------------------------------------------------------------------------------------
# Ahead of time


def compile_ahead(
    arch: str, dtype: str, head_dim: int, *, special: bool = False, query_tiles: int = 1
) -> dict[str, Any]:
    """Compile every kernel for ``arch`` on a machine that need not have it; the compiled kernels by name.

    Args:
        arch: for example ``"sm_90"`` or ``"gfx942"``; dtype: "bf16" or "fp16".
        special: with padding bounds, holes and a window.
    """
    from mmi_compile.kernels import probe_kernels

    chosen = probe_tiles(arch, head_dim)
    plain = {"num_warps": _EXCESS_WARPS, "num_stages": 1}
    flags = {f"HAS_{name}": special for name in ("ROWS", "BOUNDS", "PADDING", "WINDOW")}
    shared = flags | {
        "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim), "UNIT": 8, "QUERY_TILES": query_tiles,
        "HAS_DIAGONALS": True, "HAS_SUPPORT": True, "BLOCK_PEAKS": 64, "BLOCK": _EXCESS_BLOCK, "LINES": _FOLD_LINES,
        "RESIDUES": _FOLD_RESIDUES,
    }  # fmt: skip
    passes = {
        "probe_row_stats": chosen.stats, "probe_sums": chosen.sums, "probe_sums without diagonals": chosen.columns,
        "probe_beside": chosen.beside,
    }  # fmt: skip
    compiled = {}
    for name in (*passes, "probe_excess", "fold_mass", "fold_mass_by_head"):
        kernel, constants, options = getattr(probe_kernels, name.split()[0]), dict(shared), plain
        if name.endswith("without diagonals"):
            constants |= {"HAS_DIAGONALS": False, "HAS_SUPPORT": False}
        if name in passes:
            tile = passes[name]
            constants |= {"HEADS": tile.heads, "BLOCK_N": tile.block_n}
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        compiled[name] = compile_kernel_ahead(kernel, arch, constants, lambda name: _type(name, dtype), options)
    return compiled


_FLOAT_POINTERS = frozenset(
    {"row_max", "row_sum", "log_sums", "tiles", "columns", "distances", "support", "peaks", "beside", "mass", "folded"}
)


def _type(argument: str, dtype: str) -> str:
    if argument in _FLOAT_POINTERS:
        return "*fp32"
    known = {
        "q": f"*{dtype}", "k": f"*{dtype}", "packs": "*i32", "kv_start": "*i32", "kv_stop": "*i32", "blocks": "*i32",
        "key_padding": "*u8", "rows": "*i64", "peak_distances": "*i64", "strides": "*i64", "scale": "fp32",
        "peak": "fp32",
    }  # fmt: skip
    return known.get(argument, "i64" if argument.startswith("stride_") else "i32")
