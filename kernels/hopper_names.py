"""Gluon's Hopper operations under names of our own: Gluon renames them between versions of Triton (3.6 to 3.9)."""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = [
    "fence_async_shared",
    "load_into",
    "load_tile",
    "mbarrier",
    "store_tile",
    "store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

load_into = getattr(tma, "async_copy_global_to_shared", None) or tma.async_load
"""``load_into(descriptor, coordinates, barrier, buffer)``: copy one tile; the barrier counts its bytes."""

store_tile = getattr(tma, "async_copy_shared_to_global", None) or tma.async_store
"""``store_tile(descriptor, coordinates, buffer)``: copy one tile out; rows beyond the tensor are left out."""

store_wait = tma.store_wait
"""``store_wait(n)``: wait until at most ``n`` stores have yet to read shared memory."""


@gluon.jit
def load_tile(descriptor, coordinates, buffer, ready, free, phase):  # type: ignore[no-untyped-def]
    """Wait until ``buffer`` is free, then load a tile into it; ``ready`` completes when it is there."""
    mbarrier.wait(free, phase)
    mbarrier.expect(ready, descriptor.block_type.nbytes)
    load_into(descriptor, coordinates, ready, buffer)
