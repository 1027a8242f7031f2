"""The CPU kernel against the reference over the plan's own mask."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels.cpu import attention_cpu
from mmi_compile.kernels.dense import dense_attention
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import AShape, Grid, VerticalSlash
from mmi_compile.kernels.plan import RECORD, Plan, TileRecord
from mmi_compile.kernels.plan_rows import visible_keys
from mmi_compile.kernels.planner import TileShape, build_plan, dense_plan
from mmi_compile.kernels.reference import attention_reference
from tests.random_plans import (
    Draw,
    masked_attention,
    random_geometry,
    random_intervals,
    random_plan,
    random_qkv,
)
from tests.strategies import geometries, patterns, random_inputs, tile_shapes

SCALE = 0.3


def dense_records(tiles: int, windows: list[tuple[int, int]], grouped: bool = False) -> torch.Tensor:
    """Records of one window per region, the same in every tile, int32 ``[1, 1, tiles, R, RECORD]``."""
    records = torch.zeros(1, 1, tiles, len(windows), RECORD, dtype=torch.int32)
    for region, (start, stop) in enumerate(windows):
        fields = TileRecord(*records[:, :, :, region].unbind(-1))
        for field in (fields.window_start, fields.window_left, fields.window_full, fields.sink_start, fields.sink_stop):
            field.fill_(start)
        fields.window_stop.fill_(stop)
        fields.grouped.fill_(int(grouped))
    return records


@given(st.integers(0, 9999), st.sampled_from([(16, 16), (8, 4), (5, 7), (32, 16), (4, 16)]))
def test_any_plan_is_softmax_over_its_mask(seed: int, blocks: tuple[int, int]) -> None:
    plan = random_plan(seed, block_m=blocks[0], block_n=blocks[1], intervals=True)
    g = plan.geometry
    q, k, v = random_qkv(seed, g, 8, torch.float64)
    expected = masked_attention(q, k, v, plan.to_mask(), SCALE)
    live = g.live_keys("cpu")
    if live is not None:
        k, v = (x.masked_fill(~live[:, None, :, None], torch.nan) for x in (k, v))
    out = torch.full_like(q, torch.nan)
    torch.testing.assert_close(attention_cpu(q, k, v, plan, SCALE, out), expected, rtol=1e-9, atol=1e-10)


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
        tiles=dense_records(plan.query_tiles, [(0, plan.key_blocks)]).expand_as(plan.tiles),
    )
    in_order = attention_cpu(x.q, x.k, x.v, plan, SCALE)
    torch.testing.assert_close(attention_cpu(x.q, x.k, x.v, permuted, SCALE), in_order, rtol=1e-9, atol=1e-10)


@given(geometries(paddings=("none",)), st.lists(st.integers(0, 2), min_size=1, max_size=200))
def test_grouped_keys_in_several_regions_are_dense_attention_together(geometry: Geometry, modality: list[int]) -> None:
    g, block_n = geometry, 4
    slots: list[int] = []
    windows: list[tuple[int, int]] = []
    for m in range(3):
        keys = [j for j in range(g.kv_len) if modality[j % len(modality)] == m]
        begin = len(slots) // block_n
        slots += keys + [-1] * (-len(keys) % block_n)
        windows.append((begin, len(slots) // block_n))
    dense, x = dense_plan(g, TileShape(16, block_n), "cpu"), random_inputs(g)
    records = dense_records(dense.query_tiles, windows, grouped=True).expand(g.batch, g.q_heads, -1, -1, -1)
    order = torch.tensor(slots, dtype=torch.int32).expand(g.batch, -1)
    plan = dataclasses.replace(dense, tiles=records, key_order=order)
    expected = attention_cpu(x.q, x.k, x.v, dense, SCALE)
    torch.testing.assert_close(attention_cpu(x.q, x.k, x.v, plan, SCALE), expected, rtol=1e-9, atol=1e-10)


def test_a_window_that_stops_early_is_not_dense() -> None:
    g = Geometry(1, 2, 1, 64, 64)
    x, plan = random_inputs(g), dense_plan(g, TileShape(16, 8), "cpu")
    tiles = plan.tiles.clone()
    TileRecord(*tiles.unbind(-1)).window_stop[0, 1, -1] -= 1
    TileRecord(*tiles.unbind(-1)).window_full.zero_()
    short = dataclasses.replace(plan, tiles=tiles)
    got = attention_cpu(x.q, x.k, x.v, short, SCALE)
    expected = attention_reference(x.q, x.k, x.v, short.to_mask(), SCALE)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    assert not torch.equal(short.to_mask(), plan.to_mask())


def test_heads_in_order_and_heads_with_grouped_keys_go_together() -> None:
    g = Geometry(1, 2, 1, 32, 32)
    x, dense = random_inputs(g), dense_plan(g, TileShape(16, 8), "cpu")
    order = torch.cat([torch.arange(0, 32, 2), torch.arange(1, 32, 2)]).int()[None]
    in_order = torch.nn.functional.pad(dense.tiles[:, :1], (0, 0, 0, 1))  # nothing in its second region
    tiles = torch.cat([in_order, dense_records(2, [(0, 2), (2, 4)], grouped=True)], 1)
    plan: Plan = dataclasses.replace(dense, tiles=tiles, key_order=order)
    expected = attention_cpu(x.q, x.k, x.v, dense, SCALE)
    torch.testing.assert_close(attention_cpu(x.q, x.k, x.v, plan, SCALE), expected, rtol=1e-9, atol=1e-10)


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


@given(st.integers(0, 9999), tile_shapes())
def test_dense_plans_of_rows_with_intervals_are_the_mask(seed: int, tiles: TileShape) -> None:
    draw = Draw(torch.Generator().manual_seed(seed))
    g = random_geometry(draw, intervals=True)
    start, stop = random_intervals(draw, g.batch, g.q_len, g.kv_len)
    g = dataclasses.replace(g, window=0, row_start=start, row_stop=stop)
    plan = dense_plan(g, tiles, "cpu")
    assert torch.equal(plan.to_mask(), g.to_mask()[:, None].expand(-1, g.q_heads, -1, -1))
    assert torch.equal(visible_keys(g, torch.arange(g.q_len).expand(g.batch, -1)), g.to_mask())
    _assert_middles_are_whole(plan)
    q, k, v = random_qkv(seed, g, 8, torch.float64)
    expected = masked_attention(q, k, v, plan.to_mask(), SCALE)
    torch.testing.assert_close(attention_cpu(q, k, v, plan, SCALE), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(dense_attention(q, k, v, g, SCALE, tiles), expected, rtol=1e-9, atol=1e-10)


def _assert_middles_are_whole(plan: Plan) -> None:
    """No kernel tests a pair there."""
    mask, r = plan.geometry.to_mask(), plan.record
    for b in range(plan.geometry.batch):
        for tile, (left, full) in enumerate(zip(r.window_left[b, 0, :, 0], r.window_full[b, 0, :, 0], strict=True)):
            rows = slice(tile * plan.block_m, (tile + 1) * plan.block_m)
            assert mask[b, rows, int(left) * plan.block_n : int(full) * plan.block_n].all()
            assert int(full) * plan.block_n <= plan.geometry.kv_len


def test_dead_rows_are_zero() -> None:
    g = Geometry(1, 1, 1, 32, 32, kv_start=torch.tensor([20]), kv_stop=torch.tensor([32]))
    x = random_inputs(g)
    out = attention_cpu(x.q, x.k, x.v, dense_plan(g, TileShape(8, 8), "cpu"), SCALE)
    assert not out[0, 0, :20].any()
    assert out[0, 0, 20:].any(-1).all()
