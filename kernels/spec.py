"""Which kernel to build: the frozen compile-time constants of one attention kernel, and the tables that choose them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar, NamedTuple

KIB = 1024

SHARED_MEMORY = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
}
"""Bytes of shared memory (LDS on AMD) that one program may use, by architecture."""

ITEM_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes per element, by dtype name."""

MAX_HEAD_DIM = 256

# The tensor memory accelerator reads a tile with one instruction. sm_120 has one as well, but with 99 KiB of shared
# memory its tiles are too small for this to pay before it has been measured.
_DESCRIPTOR_ARCHS = frozenset({"sm_90", "sm_100"})

# Barriers of the load pipeline, and key lists that ride along in it. Elsewhere the query tile lives in registers, so
# the estimate is generous without this.
_RESERVED = {"sm_90": 2 * KIB, "sm_100": 2 * KIB}

# There, what the online softmax carries from region to region changes its layout through shared memory.
_RESERVED_FOR_REGIONS = {"sm_100": 4 * KIB}

# Relatives that share the tables (and the shared memory) of a listed architecture.
_ALIASES = {"sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120"}


class Tile(NamedTuple):
    """Tile sizes in tokens, and how the compiler spreads and pipelines the work on one tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# For each family the preferred tile by padded head dim. The order inside a family is irrelevant: the first entry
# whose head dim is large enough is taken.
_HALF: dict[str, dict[int, Tile]] = {
    "sm_80": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 4, 2)},
    "sm_86": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 4, 2)},
    "sm_90": {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 3), 256: Tile(128, 64, 8, 2)},
    "gfx942": {64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
}
# Exact fp32 products do not run on tensor cores: small tiles keep the accumulators in registers.
_SINGLE: dict[str, dict[int, Tile]] = {
    "sm_80": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 16, 4, 2)},
    "gfx942": {64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
}
_FAMILY = {"sm_89": "sm_86", "sm_120": "sm_86", "sm_100": "sm_90"}


@dataclass(frozen=True, kw_only=True)
class Features:
    """Which loops and masks a kernel has. What is off is absent from the source, so it costs nothing.

    Attributes:
        has_blocks: tiles visit listed key blocks.
        has_sinks: tiles visit a run of sink blocks.
        has_columns: tiles visit gathered key columns.
        has_block_bits: columns may lie inside listed blocks, which then own them.
        has_row_order: query rows come in the plan's order instead of their own.
        has_bounds: each batch element has its own live key range (left or right padding), or there are fewer keys
            than positions.
        has_key_padding: single keys may be dead.
        has_window: the model has a sliding window of its own.
        has_row_bounds: each row has an interval of keys of its own, in place of causality and a window.
        has_regions: tiles visit more than one region.
        has_key_order: some regions have keys that are grouped by modality.
        use_descriptors: K and V tiles are read through tensor descriptors (TMA) instead of pointers.
    """

    has_blocks: bool = False
    has_sinks: bool = False
    has_columns: bool = False
    has_block_bits: bool = False
    has_row_order: bool = False
    has_bounds: bool = False
    has_key_padding: bool = False
    has_window: bool = False
    has_row_bounds: bool = False
    has_regions: bool = False
    has_key_order: bool = False
    use_descriptors: bool = False

    def __post_init__(self) -> None:
        if self.has_block_bits and not (self.has_blocks and self.has_columns):
            raise ValueError("has_block_bits needs both has_blocks and has_columns: it tells which of them owns a pair")
        if self.has_row_bounds and self.has_window:
            raise ValueError("has_window beside has_row_bounds: the intervals of rows take its place")
        if self.use_descriptors and (self.has_bounds or self.has_key_padding):
            # A descriptor loads dead keys too, and a NaN in a dead value row would reach every output through 0 * NaN.
            raise ValueError("use_descriptors cannot skip dead keys: leave it off with has_bounds or has_key_padding")

    @property
    def features(self) -> Features:
        """The loops and masks alone."""
        return Features(**{f.name: getattr(self, f.name) for f in fields(Features)})


@dataclass(frozen=True, kw_only=True)
class KernelSpec(Features):
    """Everything that is constant when an attention kernel is compiled.

    Attributes:
        head_dim: elements per head, a multiple of 8, at most 256.
        dtype: "bf16", "fp16" or "fp32", of q, k, v and the output. Scores and sums are always fp32.
        block_m, block_n: query rows and keys of one tile, powers of two, at least 16.
        num_warps, num_stages: warps per program; depth of the load pipeline.
    """

    template: ClassVar[str] = "attention.py.jinja"

    head_dim: int
    dtype: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        super().__post_init__()
        reason = supported(self.dtype, self.head_dim)
        if reason is not None:
            raise ValueError(reason)
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name}={size}: tensor cores need a power of two, at least 16")
        if self.num_warps not in (1, 2, 4, 8, 16) or self.num_stages < 1:
            raise ValueError(f"num_warps={self.num_warps}, num_stages={self.num_stages}: no such launch")

    @property
    def block_d(self) -> int:
        """Head dim of a tile in registers: the next power of two, at least 16. The surplus is loaded as zeros."""
        return padded_head_dim(self.head_dim)

    @property
    def shared_bytes(self) -> int:
        """Upper estimate of the shared memory that one program uses, in bytes."""
        tile = Tile(self.block_m, self.block_n, self.num_warps, self.num_stages)
        return _shared_bytes(tile, self.block_d, ITEM_SIZE[self.dtype])


def padded_head_dim(head_dim: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def canonical_arch(arch: str) -> str | None:
    """The architecture whose tables ``arch`` uses (``"sm_103"`` → ``"sm_100"``), None if there is none."""
    name = arch.split(":")[0].removesuffix("a")
    name = _ALIASES.get(name, name)
    return name if name in SHARED_MEMORY else None


def supported(dtype: str, head_dim: int, value_dim: int | None = None, arch: str | None = None) -> str | None:
    """Why no kernel can be built for this attention, or None when one can.

    Args:
        dtype: "bf16", "fp16" or "fp32".
        head_dim: elements per head of q and k; ``value_dim`` of v where it differs.
        arch: for example ``"sm_90"`` or ``"gfx942"``; None asks about all of them.
    """
    if dtype not in ITEM_SIZE:
        return f"dtype {dtype} has no kernel; supported are {', '.join(ITEM_SIZE)}"
    if head_dim < 8 or head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"head dim {head_dim} has no kernel; supported are multiples of 8 up to {MAX_HEAD_DIM}"
    if value_dim is not None and value_dim != head_dim:
        return f"values of head dim {value_dim} beside keys of {head_dim}: the kernel needs them equal"
    if arch is not None and canonical_arch(arch) is None:
        return f"architecture {arch} has no kernel; supported are {', '.join(SHARED_MEMORY)}"
    return None


def allows_descriptors(arch: str, features: Features) -> bool:
    """Whether this architecture has tensor descriptors worth using and every loop of the kernel can use them."""
    return canonical_arch(arch) in _DESCRIPTOR_ARCHS and not (features.has_bounds or features.has_key_padding)


@lru_cache(maxsize=1024)
def choose_spec(
    arch: str,
    dtype: str,
    head_dim: int,
    *,
    features: Features = Features(),
    block_m: int | None = None,
    block_n: int | None = None,
    descriptors: bool | None = None,
) -> KernelSpec:
    """The best known kernel for an architecture. Pure: tables only, no device is asked.

    A planner asks first, without tile sizes, and lays its plan out in ``block_m`` and ``block_n`` of the answer. A
    launcher passes those of the plan.

    Args:
        arch: ``"sm_80"``, ``"sm_86"``, ``"sm_89"``, ``"sm_90"``, ``"sm_100"``, ``"sm_120"`` or ``"gfx942"``.
        dtype: "bf16", "fp16" or "fp32".
        head_dim: elements per head.
        features: which loops and masks the plan needs; its ``use_descriptors`` is ignored in favour of ``descriptors``.
        block_m, block_n: tile sizes in tokens that are already decided, or None.
        descriptors: whether to read K and V through tensor descriptors; None means where the architecture has them.

    Raises:
        ValueError: no kernel can be built; the message says why.
    """
    reason = supported(dtype, head_dim, arch=arch)
    if reason is not None:
        raise ValueError(reason)
    known = canonical_arch(arch)
    assert known is not None
    reserved = _RESERVED.get(known, 0) + (_RESERVED_FOR_REGIONS.get(known, 0) if features.has_regions else 0)
    preferred = _preferred(known, dtype, head_dim, block_m, block_n)
    tile = _fit(known, dtype, head_dim, preferred, SHARED_MEMORY[known] - reserved)
    allowed = allows_descriptors(known, features)
    chosen = {f.name: getattr(features, f.name) for f in fields(Features)}
    chosen["use_descriptors"] = allowed if descriptors is None else descriptors and allowed
    return KernelSpec(head_dim=head_dim, dtype=dtype, **tile._asdict(), **chosen)


def _preferred(arch: str, dtype: str, head_dim: int, block_m: int | None, block_n: int | None) -> Tile:
    family = _FAMILY.get(arch, arch)
    if dtype == "fp32":
        table = _SINGLE["gfx942" if family == "gfx942" else "sm_80"]
    else:
        table = _HALF[family]
    best = next(tile for limit, tile in sorted(table.items()) if head_dim <= limit)
    wanted = best._replace(block_m=block_m or best.block_m, block_n=block_n or best.block_n)
    if wanted == best:
        return best
    # 64 rows fill one warp group, and smaller tiles leave room for a deeper pipeline; _fit cuts it to what there is.
    warps = 4 if wanted.block_m <= 64 else best.num_warps
    return wanted._replace(num_warps=warps, num_stages=1 if family == "gfx942" else 3)


def _fit(arch: str, dtype: str, head_dim: int, tile: Tile, limit: int) -> Tile:
    """``tile`` with as many stages, up to its own number, as ``limit`` bytes of shared memory hold."""
    block_d = padded_head_dim(head_dim)
    for stages in range(tile.num_stages, 0, -1):
        candidate = tile._replace(num_stages=stages)
        if _shared_bytes(candidate, block_d, ITEM_SIZE[dtype]) <= limit:
            return candidate
    raise ValueError(
        f"tiles of {tile.block_m} x {tile.block_n} tokens with head dim {head_dim} in {dtype} need "
        f"{_shared_bytes(tile._replace(num_stages=1), block_d, ITEM_SIZE[dtype])} bytes of shared memory, but {arch} "
        f"has {limit}; use smaller tiles"
    )


def _shared_bytes(tile: Tile, block_d: int, item_size: int) -> int:
    """The query tile, and K and V tiles for every pipeline stage."""
    return item_size * block_d * (tile.block_m + 2 * tile.num_stages * tile.block_n)
