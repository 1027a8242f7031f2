"""Hypothesis strategies: geometries, patterns, tile shapes and inputs, all small enough to check densely."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import AShape, Dense, Grid, Pattern, TriShape, VerticalSlash
from mmi_compile.kernels.planner import TileShape

PADDINGS = ("none", "left", "right", "both", "holes")


@st.composite
def geometries(
    draw: st.DrawFn,
    max_len: int = 90,
    max_batch: int = 2,
    paddings: tuple[str, ...] = PADDINGS,
    min_q: int = 1,
    windows: bool = True,
) -> Geometry:
    """Offsets, grouped heads, sliding windows, ragged lengths, padding on either side and with holes."""
    kv_heads = draw(st.integers(1, 2))
    batch = draw(st.integers(1, max_batch))
    q_len = draw(st.integers(min_q, max_len))
    offset = draw(st.one_of(st.just(0), st.integers(0, max_len)))
    short = draw(st.one_of(st.just(0), st.integers(0, 3)))
    kv_len = max(1, q_len + offset - short)
    window = draw(st.one_of(st.just(0), st.integers(1, kv_len))) if windows else 0
    start = stop = holes = None
    padding = draw(st.sampled_from(paddings))
    if padding != "none":
        starts, stops = [], []
        for _ in range(batch):
            low = draw(st.integers(0, kv_len)) if padding in ("left", "both") else 0
            starts.append(low)
            stops.append(draw(st.integers(low, kv_len)) if padding in ("right", "both") else kv_len)
        if padding == "holes":
            bits = draw(st.lists(st.booleans(), min_size=batch * kv_len, max_size=batch * kv_len))
            holes = torch.tensor(bits).view(batch, kv_len)
        if padding != "holes" or draw(st.booleans()):
            start = torch.tensor(starts, dtype=torch.int32)
            stop = torch.tensor(stops, dtype=torch.int32)
    return Geometry(
        batch=batch,
        q_heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        q_offset=offset,
        window=window,
        kv_start=start,
        kv_stop=stop,
        key_padding=holes,
    )


def tile_shapes() -> st.SearchStrategy[TileShape]:
    """Tiles around the lengths of ``geometries``, powers of two or not."""
    return st.builds(TileShape, st.sampled_from([1, 4, 5, 16, 32, 128]), st.sampled_from([1, 4, 7, 16, 32]))


def patterns(largest: int = 100) -> st.SearchStrategy[Pattern]:
    """Any pattern with sizes up to ``largest`` tokens."""
    sizes, least_one = st.integers(0, largest), st.integers(1, largest)
    strides = st.one_of(st.none(), st.integers(1, 40))
    return st.one_of(
        st.builds(Dense),
        st.builds(AShape, sizes, least_one),
        st.builds(TriShape, sizes, least_one, sizes),
        st.builds(VerticalSlash, sizes, least_one),
        st.builds(VerticalSlash, st.integers(0, 6), st.integers(1, 4)),
        st.builds(Grid, strides, st.integers(0, 20), st.integers(1, 20), st.booleans(), st.booleans()),
    )


@dataclass(frozen=True)
class Inputs:
    """Queries, keys and values ``[B, H, length, D]`` of one geometry."""

    q: Tensor
    k: Tensor
    v: Tensor


def random_inputs(
    geometry: Geometry, head_dim: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64, sharpness: float = 1.0
) -> Inputs:
    """Normal inputs; ``sharpness`` scales the queries, so larger values give more peaked attention."""
    g, generator = geometry, torch.Generator().manual_seed(seed)

    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(g.batch, heads, length, head_dim, generator=generator, dtype=torch.float64).to(dtype)

    return Inputs(normal(g.q_heads, g.q_len) * sharpness, normal(g.kv_heads, g.kv_len), normal(g.kv_heads, g.kv_len))
