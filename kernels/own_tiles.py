"""Tiles of the user's choice in place of those that suit the kernels best.

Tiles of a kernel are large, for speed. Prompts of few thousand tokens, as small trained models take them, hold few such
tiles, and density cannot fall far; with small ones it can, at the price of speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmi_compile.kernels.frames import TileShape

_asked: TileShape | None = None


def own_tiles() -> TileShape | None:
    """The tiles that :func:`using_tiles` set, or None."""
    return _asked


@contextmanager
def using_tiles(tiles: TileShape | None) -> Iterator[None]:
    """Plan and run attention in these tiles, on the CPU and (with the portable kernels) on GPUs; None changes nothing.

    For experiments: it holds for the whole process, and what has been compiled keeps the tiles it was compiled with.

    Raises:
        ValueError: rows or keys of a tile are not a power of two from 16 to 256.
    """
    global _asked
    if tiles is not None:
        for size in (tiles.block_m, tiles.block_n):
            if size not in (16, 32, 64, 128, 256):
                raise ValueError(f"{tiles} has a side of {size}; give powers of two from 16 to 256, such as 32 and 32")
    before, _asked = _asked, tiles or _asked
    try:
        yield
    finally:
        _asked = before
