"""The CPU kernel against the reference over the plan's own mask."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels.cpu import attention_cpu
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import AShape, Grid, VerticalSlash
from mmi_compile.kernels.planner import TileShape, build_plan, dense_plan
from mmi_compile.kernels.reference import attention_reference
from tests.strategies import geometries, patterns, random_inputs, tile_shapes

SCALE = 0.3


@given(geometries(), tile_shapes(), st.data())
def test_kernel_is_the_reference_over_the_plan(geometry: Geometry, tiles: TileShape, data: st.DataObject) -> None:
    chosen = [data.draw(patterns()) for _ in range(geometry.q_heads)]
    x = random_inputs(geometry, seed=data.draw(st.integers(0, 99)), sharpness=3.0)
    plan = build_plan(chosen, x.q, x.k, geometry, SCALE, tiles)
    out = torch.full((geometry.batch, geometry.q_len, geometry.q_heads, 8), torch.nan, dtype=torch.float64)
    got = attention_cpu(x.q, x.k, x.v, plan, SCALE, out.transpose(1, 2))
    assert got.data_ptr() == out.data_ptr()
    expected = attention_reference(x.q, x.k, x.v, plan.to_mask(), SCALE)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@given(geometries(), st.integers(0, 1000))
def test_order_of_rows_does_not_matter(geometry: Geometry, seed: int) -> None:
    g, tiles, x = geometry, TileShape(16, 8), random_inputs(geometry)
    plan = dense_plan(g, tiles, "cpu")
    slots = plan.query_tiles * tiles.block_m
    order = torch.where(torch.arange(slots) < g.q_len, torch.arange(slots), -1)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([order[torch.randperm(slots, generator=generator)] for _ in range(g.batch * g.q_heads)])
    permuted = dataclasses.replace(
        plan,
        row_order=shuffled.view(g.batch, g.q_heads, slots).int(),
        tiles=torch.zeros_like(plan.tiles),
    )
    in_order = attention_cpu(x.q, x.k, x.v, plan, SCALE)
    torch.testing.assert_close(attention_cpu(x.q, x.k, x.v, permuted, SCALE), in_order, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_precisions(dtype: torch.dtype, tolerance: float) -> None:
    g = Geometry(1, 4, 2, 150, 150)
    x = random_inputs(g, head_dim=16, dtype=dtype)
    chosen = [AShape(5, 20), VerticalSlash(40, 20), Grid(20, 4, 8, query_lines=True), AShape(0, 1000)]
    plan = build_plan(chosen, x.q, x.k, g, SCALE, TileShape(16, 16))
    got = attention_cpu(x.q, x.k, x.v, plan, SCALE)
    assert got.dtype == dtype
    expected = attention_reference(x.q, x.k, x.v, plan.to_mask(), SCALE)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_dead_rows_are_zero() -> None:
    g = Geometry(1, 1, 1, 32, 32, kv_start=torch.tensor([20]), kv_stop=torch.tensor([32]))
    x = random_inputs(g)
    out = attention_cpu(x.q, x.k, x.v, dense_plan(g, TileShape(8, 8), "cpu"), SCALE)
    assert not out[0, 0, :20].any()
    assert out[0, 0, 20:].any(-1).all()
