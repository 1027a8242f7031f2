"""Which Hopper kernel to build: its compile-time constants, and the table that chooses them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import ClassVar

from mmi_compile.kernels.spec import ITEM_SIZE, KIB, SHARED_MEMORY, Features, padded_head_dim

BLOCK_M = 128
"""Query rows per tile: two warp groups of 64."""

# Keys per tile, stages of K and V, stages of Q, by padded head dim.
_TILES: dict[int, tuple[int, int, int]] = {64: (128, 4, 2), 128: (128, 2, 2), 256: (64, 2, 1)}

_BARRIERS = 2 * KIB


@dataclass(frozen=True, kw_only=True)
class HopperSpec(Features):
    """Everything that is constant when a Hopper kernel is compiled.

    Attributes:
        head_dim: elements per head, a multiple of 8, 40 to 256.
        dtype: "bf16" or "fp16".
        block_n: keys per tile. num_stages: tiles of K and of V in flight. q_stages: query tiles in flight.
        has_schedule: query tiles come in a given order instead of late tiles first.
        pair_loop: more tiles than the first one of a query tile may have to test every pair.
        consumer_registers, producer_registers: per thread of the two warp groups and of the loading warp.
    """

    template: ClassVar[str] = "hopper.py.jinja"
    block_m: ClassVar[int] = BLOCK_M

    head_dim: int
    dtype: str
    block_n: int
    num_stages: int
    q_stages: int
    has_schedule: bool = False
    pair_loop: bool = True
    consumer_registers: int = 240
    producer_registers: int = 24

    @property
    def block_d(self) -> int:
        """Head dim of a tile: the next power of two. The surplus is filled with zeros."""
        return padded_head_dim(self.head_dim)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one program, in bytes."""
        tiles = self.q_stages * BLOCK_M + 2 * self.num_stages * self.block_n
        return ITEM_SIZE[self.dtype] * self.block_d * tiles + _BARRIERS


def hopper_supported(dtype: str, head_dim: int, value_dim: int | None = None) -> str | None:
    """Why the Hopper kernel cannot serve this attention on a Hopper GPU, or None when it can."""
    if dtype not in ("bf16", "fp16"):
        return f"dtype {dtype}: Hopper's warp-group products take fp16 and bf16"
    if head_dim % 8 or not 32 < head_dim <= 256:
        return f"head dim {head_dim}: tiles of 64, 128 and 256 are built, for multiples of 8 from 40 on"
    if value_dim is not None and value_dim != head_dim:
        return f"values of head dim {value_dim} beside keys of {head_dim}: the kernel needs them equal"
    return None


def hopper_block_n(head_dim: int) -> int:
    """Keys per tile that a plan for this kernel must have; query tiles have ``BLOCK_M`` rows."""
    return _TILES[padded_head_dim(head_dim)][0]


@lru_cache(maxsize=1024)
def choose_hopper_spec(
    dtype: str, head_dim: int, *, features: Features = Features(), scheduled: bool = False, pair_loop: bool = True
) -> HopperSpec:
    """The kernel for a dtype ("bf16", "fp16"), a head dim, and what the plan needs. Pure: no device is asked.

    Raises:
        ValueError: no kernel can be built; the message says why.
    """
    reason = hopper_supported(dtype, head_dim)
    if reason is not None:
        raise ValueError(reason)
    if features.has_row_bounds:
        raise ValueError("rows with intervals of keys of their own have no Hopper kernel; use the portable one")
    block_n, stages, q_stages = _TILES[padded_head_dim(head_dim)]
    chosen = asdict(features) | {"use_descriptors": False}
    spec = HopperSpec(
        head_dim=head_dim, dtype=dtype, block_n=block_n, num_stages=stages, q_stages=q_stages,
        has_schedule=scheduled, pair_loop=pair_loop, **chosen,
    )  # fmt: skip
    assert spec.shared_bytes <= SHARED_MEMORY["sm_90"]
    return spec
