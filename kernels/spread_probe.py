"""The spread probe: exact attention of rows from all over the prompt, beside the last ones that the papers probe.

Half of its groups of rows take part in choosing a head's pattern. The other half checks the choice: columns that were
taken for some rows cover those rows better than any others, so only rows that had no say can tell what share of the
attention a pattern keeps.

No matrix of rows by keys is stored: what remains are sums by key block for each group, sums by key over all groups
(the *credit* of columns), and the logarithm of each row's sum, by which ``mass_at`` finds the mass on a few keys again.
On a GPU three kernels do this; everywhere else plain PyTorch, which the kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_compile.kernels.fused_probe import PROGRAMS, why_not_fused
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.launch import compile_kernel_ahead, device_arch
from mmi_compile.kernels.modality_probe import ModalityTiles, PackedRows, Statistics, argument_type, modality_tiles
from mmi_compile.kernels.probe import first_live_key, last_live_position, visible_keys, visible_scores
from mmi_compile.kernels.spec import padded_head_dim
from mmi_compile.profiling import span

SPREAD_GROUPS = 16
"""Groups of rows that choose; as many check."""

GROUP_ROWS = 4
"""Consecutive rows of a group; 64 rows of each kind fill a tile of the kernels."""


@dataclass(frozen=True)
class SpreadRows:
    """Which rows are looked at: ``G`` groups of each of ``kinds`` kinds. Those that choose come first.

    Attributes:
        rows: int32 ``[B, kinds, G * R]``, query rows, contiguous, -1 for none; groups: ``G``.
        positions: likewise, where they stand among the keys.
        credit_start: int32 ``[B]``, first key that may become a column; credit_stop: int32 ``[B, C, G * R]``, one past
            the last one, for each row of the first ``C`` kinds.
    """

    rows: Tensor
    positions: Tensor
    groups: int
    credit_start: Tensor
    credit_stop: Tensor

    @property
    def kinds(self) -> int:
        return self.rows.shape[1]

    @property
    def choosing(self) -> int:
        """``C``, kinds of rows that may credit columns."""
        return self.credit_stop.shape[1]

    @property
    def starts(self) -> Tensor:
        """First row of each group, int64 ``[B, kinds * G]``."""
        starts: Tensor = self.rows.flatten(1).unflatten(1, (self.kinds * self.groups, -1))[..., 0]
        return starts.long()

    def credited_by_group(self, keys: Tensor) -> Tensor:
        """Which keys each group that chooses may credit, bool ``[B, H, C * G, K]``; keys ``[B, H, K]``."""
        # The same for all rows of a group.
        stop = self.credit_stop.flatten(1).unflatten(1, (self.choosing * self.groups, -1))[:, None, :, :1]
        keys = keys[:, :, None]
        credited: Tensor = (keys >= self.credit_start[:, None, None, None]) & (keys < stop)
        return credited


def spread_rows(
    geometry: Geometry, device: torch.device, groups: int, block_m: int, *, sink_stop: Tensor, zone: int
) -> SpreadRows:
    """Rows of ``2 * groups`` groups, each within one query tile.

    The live rows are cut into as many stretches of equal length; a group stands in the middle of each. Every other one
    chooses. Rows may be dead, or come twice, where few rows are live.

    Args:
        sink_stop: int ``[B]`` or ``[1]``, one past the sinks; zone: nearest keys that are left to a window.
    """
    g, each = geometry, min(GROUP_ROWS, block_m, geometry.q_len)
    first = (first_live_key(g, device) - g.q_offset).clamp(0, g.q_len - 1)[:, None]
    stop = (last_live_position(g, device) - g.q_offset).clamp(max=g.q_len)[:, None]
    middle = first + (stop - first).clamp(min=0) * torch.arange(1, 4 * groups, 2, device=device) // (4 * groups)
    middle = middle.clamp(max=g.q_len - each)
    start = middle - (middle % block_m - (block_m - each)).clamp(min=0)
    start = torch.cat([start[:, ::2], start[:, 1::2]], 1)
    rows = (start[..., None] + torch.arange(each, device=device)).flatten(1).int().unflatten(1, (2, -1))
    # The first and the last key never count, so that an index out of range may read them for nothing.
    credit_stop = (start[:, :groups] + (g.q_offset - zone)).clamp(max=g.kv_len - 1)
    return SpreadRows(
        rows=rows.contiguous(),
        positions=(rows + g.q_offset).contiguous(),
        groups=groups,
        credit_start=sink_stop.int().expand(g.batch).contiguous(),
        credit_stop=credit_stop.repeat_interleave(each, 1).int()[:, None],
    )


@dataclass(frozen=True)
class SpreadProbe:
    """Attention mass of groups of rows; each row that sees a key weighs 1. Not to be written to.

    Attributes:
        blocks: float ``[B, HQ, kinds * G, key blocks]``, mass on each key block from the rows of each group.
        credit: float ``[B, C, HQ, kv_len]``, mass on each key from rows of each kind that may credit it.
        log_sums: float ``[B, kinds, HQ, rows]``, logarithm of each row's sum of exponentials: natural in the reference,
            to base 2 where kernels made it; rows that see nothing have infinity.
    """

    call: SpreadCall
    blocks: Tensor
    credit: Tensor
    log_sums: Tensor

    def mass_at(self, keys: Tensor, kinds: int | None = None) -> Tensor:
        """Mass of each group of the first ``kinds`` kinds (None: of all) on some keys, float ``[B, HQ, kinds * G, K]``.

        Args:
            keys: int64 ``[B, HQ, K]``; ``kv_len`` and beyond stands for no key.
        """
        find = _fused_mass_at if self.call.tiles is not None else _reference_mass_at
        return find(self, keys, self.call.spread.kinds if kinds is None else kinds)

    def credit_at(self, keys: Tensor) -> Tensor:
        """What each group that chooses credits to some keys, float ``[B, HQ, C * G, K]``; keys int64 ``[B, HQ, K]``."""
        spread = self.call.spread
        return self.mass_at(keys, spread.choosing) * spread.credited_by_group(keys)


@dataclass(frozen=True)
class SpreadCall:
    """What is probed: ``q [B, HQ, q_len, D]``, ``k [B, HKV, kv_len, D]``, the factor on the scores, keys in a block of
    the plan, and the constants of the kernels, None for the reference."""

    q: Tensor
    k: Tensor
    geometry: Geometry
    scale: float
    spread: SpreadRows
    block_n: int
    tiles: ModalityTiles | None = None

    def packed(self, kinds: int) -> PackedRows:
        """Rows of the first ``kinds`` kinds, of all heads."""
        entries = tuple((kind, head) for kind in range(kinds) for head in range(self.geometry.q_heads))
        return PackedRows(self.q, self.k, self.geometry, self.scale, self.spread.positions, entries)


@span("mmi::probe")
def run_spread_probe(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, spread: SpreadRows, block_n: int
) -> SpreadProbe:
    """Attend from the rows of ``spread`` to all keys they may see, and sum the probabilities.

    Args:
        q: floating ``[B, HQ, q_len, D]``; k: ``[B, HKV, kv_len, D]``; scale: factor on the scores.
        block_n: keys in a key block of the plan.

    Sums are float32 (float64 for float64 inputs). Half precision on a GPU runs fused.
    """
    whole = spread.groups * GROUP_ROWS == 64 == spread.rows.shape[2]
    if whole and block_n % 16 == 0 and why_not_fused(q, k) is None:
        return fused_spread_probe(q, k, geometry, scale, spread, block_n)
    return reference_spread_probe(q, k, geometry, scale, spread, block_n)


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def reference_spread_probe(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, spread: SpreadRows, block_n: int
) -> SpreadProbe:
    """``run_spread_probe`` in plain PyTorch, for any dtype and device. Holds scores of a few heads at a time."""
    g, work = geometry, torch.float64 if q.dtype == torch.float64 else torch.float32
    count, choosing = spread.kinds * spread.groups, spread.choosing
    blocks = torch.empty(g.batch, g.q_heads, count, -(-g.kv_len // block_n), dtype=work, device=q.device)
    credit = torch.empty(g.batch, choosing, g.q_heads, g.kv_len, dtype=work, device=q.device)
    keys = torch.arange(g.kv_len, device=q.device).expand(g.batch, 1, -1)
    credited = spread.credited_by_group(keys)
    log_sums = torch.empty(g.batch, g.q_heads, spread.rows[0].numel(), dtype=work, device=q.device)
    for some, mass, sums in group_masses(q, k, g, scale, spread):
        log_sums[:, some] = sums
        blocks[:, some] = F.pad(mass, (0, -g.kv_len % block_n)).unflatten(-1, (-1, block_n)).sum(-1)
        chosen = torch.where(credited, mass[:, :, : choosing * spread.groups], 0.0)
        credit[:, :, some] = chosen.unflatten(2, (choosing, -1)).sum(3).transpose(1, 2)
    by_kind = log_sums.unflatten(2, (spread.kinds, -1)).transpose(1, 2)
    return SpreadProbe(SpreadCall(q, k, g, scale, spread, block_n), blocks, credit, by_kind)


def group_masses(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, spread: SpreadRows
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few heads at a time: mass of each group on each key, float ``[B, heads, kinds * G, kv_len]``, and the logarithm
    of each row's sum of exponentials, ``[B, heads, rows]``."""
    rows = spread.rows.flatten(1).long()
    for heads, scores, hidden in visible_scores(q, k, geometry, scale, list(range(geometry.q_heads)), rows):
        dead = hidden.all(-1) | (rows < 0)[:, None]
        sums = torch.logsumexp(scores, -1).masked_fill_(dead, torch.inf)
        weights = scores.sub_(sums[..., None]).exp_()
        mass = weights.unflatten(2, (spread.kinds * spread.groups, -1)).sum(3)
        yield slice(heads[0], heads[-1] + 1), mass, sums


def _reference_mass_at(probe: SpreadProbe, keys: Tensor, kinds: int) -> Tensor:
    call, work = probe.call, probe.log_sums.dtype
    g, groups = call.geometry, call.spread.groups
    rows = call.spread.rows[:, :kinds].flatten(1).long()  # [B, L]
    real = keys < g.kv_len
    place = keys.clamp(max=g.kv_len - 1)
    index = rows.clamp(min=0)[:, None, :, None].expand(-1, g.q_heads, -1, call.q.shape[-1])
    asked = call.q.gather(2, index).to(work)
    own = call.k.repeat_interleave(g.group, 1).gather(2, place[..., None].expand(*place.shape, call.k.shape[-1]))
    scores = asked @ own.to(work).mT * call.scale
    normal = probe.log_sums[:, :kinds].transpose(1, 2).flatten(2)  # infinite for rows that do not exist
    visible = visible_keys(g, rows)[:, None].expand(-1, g.q_heads, -1, -1)
    visible = visible.gather(-1, place[:, :, None].expand(*scores.shape)) & real[:, :, None]
    weights = torch.exp(scores - normal[..., None]).masked_fill(~visible, 0.0)
    by_group: Tensor = weights.unflatten(2, (kinds * groups, -1))
    return by_group.sum(3)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


def fused_spread_probe(
    q: Tensor, k: Tensor, geometry: Geometry, scale: float, spread: SpreadRows, block_n: int,
    *, tiles: ModalityTiles | None = None, programs: int = PROGRAMS,
) -> SpreadProbe:  # fmt: skip
    """``run_spread_probe`` by kernels: arguments and result are those of the reference; sums are float32.

    Args:
        q, k: fp16 or bf16 (fp32 in the interpreter) whose last dimension is contiguous; others are copied.
        spread: 64 rows of each kind, some of which may not exist. block_n: a power of two, 16 or more.
        tiles: launch constants; None takes those of the probe of boundaries.

    Raises:
        ValueError: no kernel for this dtype, head dim, device or number of rows.
    """
    g, device = geometry, q.device
    chosen = tiles or modality_tiles(device_arch(device), q.shape[-1])
    # Sums by key block are made of whole tiles.
    chosen = chosen._replace(columns=chosen.columns._replace(block_n=min(chosen.columns.block_n, block_n)))
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    call = SpreadCall(q, k, g, scale, spread, block_n, chosen)
    by_tile, credit, given = _sums_of(call)
    log_sums = call.packed(spread.kinds).run("spread_sums", chosen, programs, given)
    return SpreadProbe(call, _by_block(by_tile, call), credit, log_sums.unflatten(1, (spread.kinds, -1)))


def _sums_of(call: SpreadCall) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Room for what ``spread_sums`` stores: by tile, float ``[B, kinds, HQ, tiles, G]``, and credit, as in
    ``SpreadProbe``; and the kernel's own arguments."""
    g, spread, device = call.geometry, call.spread, call.q.device
    assert call.tiles is not None
    n_tiles = -(-g.kv_len // call.tiles.columns.block_n)
    by_tile = torch.empty(g.batch, spread.kinds, g.q_heads, n_tiles, spread.groups, device=device)
    credit = torch.empty(g.batch, spread.choosing, g.q_heads, g.kv_len, device=device)
    given = {
        "rows": spread.rows, "by_tile": by_tile, "credit": credit, "credit_start": spread.credit_start,
        "credit_stop": spread.credit_stop, "n_credits": spread.choosing * g.q_heads, "credit_kinds": spread.choosing,
        "n_tiles": n_tiles, "EACH": 64 // spread.groups, "HAS_CREDIT": spread.choosing > 0,
    }  # fmt: skip
    return by_tile, credit, given


def fused_sums(call: SpreadCall, log_sums: Tensor, *, programs: int = PROGRAMS) -> tuple[Tensor, Tensor]:
    """``blocks`` and ``credit`` of a ``SpreadProbe`` where each row's sum is known already, over more keys than these.

    Args:
        log_sums: float ``[B, kinds, HQ, rows]``, to base 2.
    """
    spread = call.spread
    assert call.tiles is not None
    by_tile, credit, given = _sums_of(call)
    call.packed(spread.kinds).sums("spread_sums", call.tiles, programs, given, Statistics.known(log_sums.flatten(1, 2)))
    return _by_block(by_tile, call), credit


def _by_block(by_tile: Tensor, call: SpreadCall) -> Tensor:
    """Sums by tile of the kernel as sums by key block, ``SpreadProbe.blocks``."""
    assert call.tiles is not None
    per_block = call.block_n // call.tiles.columns.block_n
    if per_block > 1:
        by_tile = F.pad(by_tile, (0, 0, 0, -by_tile.shape[3] % per_block)).unflatten(3, (-1, per_block)).sum(4)
    return by_tile.permute(0, 2, 1, 4, 3).flatten(2, 3)


def _fused_mass_at(probe: SpreadProbe, keys: Tensor, kinds: int) -> Tensor:
    call = probe.call
    g, spread, count = call.geometry, call.spread, keys.shape[-1]
    assert call.tiles is not None
    mass = torch.empty(g.batch, g.q_heads, kinds * spread.groups, count, device=keys.device)
    call.packed(kinds).launch_by_entry(
        "spread_at_keys", call.tiles.columns._replace(heads=1), count,
        {"keys": keys.int().contiguous(), "mass": mass, "log_sums": probe.log_sums[:, :kinds].contiguous(),
         "count": count, "q_heads": g.q_heads, "EACH": 64 // spread.groups},
    )  # fmt: skip
    return mass


def compile_ahead(
    arch: str, dtype: str, head_dim: int, *, special: bool = False, each: int = GROUP_ROWS, credit: bool = True
) -> dict[str, Any]:
    """Compile both kernels for ``arch`` on a machine that need not have it; the compiled kernels by name.

    Args:
        arch: for example ``"sm_90"`` or ``"gfx942"``; dtype: "bf16" or "fp16".
        special: with padding bounds, holes and a window. each: rows in a group. credit: whether keys may be credited.
    """
    from mmi_compile.kernels import spread_probe_kernels

    tile = modality_tiles(arch, head_dim).columns
    shared: dict[str, int] = {f"HAS_{name}": special for name in ("BOUNDS", "PADDING", "WINDOW")}
    shared |= {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim), "UNIT": 8, "EACH": each}
    shared["HAS_CREDIT"] = credit
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = {}
    for name, heads in (("spread_sums", tile.heads), ("spread_at_keys", 1)):
        kernel = getattr(spread_probe_kernels, name)
        constants = {**shared, "HEADS": heads, "BLOCK_N": tile.block_n}
        compiled[name] = compile_kernel_ahead(
            kernel, arch, constants, lambda argument: argument_type(argument, dtype), options
        )
    return compiled
