"""The guard: membership of rows against the plan's mask, readings against dense softmax, and what it catches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels import exact_rows
from mmi_compile.kernels.adaptive import adaptive_plan
from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.cpu import attention_cpu
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.guard import enforce, guard_rows, measure, measure_recall
from mmi_compile.kernels.patterns import AShape, ByModality, Grid, HeadPattern, VerticalSlash
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.plan_rows import row_mask
from mmi_compile.kernels.planner import build_plan, dense_plan, make_dense
from mmi_compile.kernels.probe import LAST_Q
from mmi_compile.kernels.reference import attention_reference, probabilities_reference
from mmi_compile.kernels.segments import segment
from tests.host_waits import NoHostWaits
from tests.random_plans import check_contract, random_plan, random_qkv
from tests.strategies import geometries

CPU = torch.device("cpu")
SCALE = 0.4
TILES = TileShape(32, 16)


def random_rows(g: Geometry, seed: int, count: int = 9) -> torch.Tensor:
    return torch.randint(0, g.q_len, (g.batch, count), generator=torch.Generator().manual_seed(seed))


def of_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``x [B, H, q_len, X]`` at ``rows [B, R]``."""
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))


def features(plan: Plan) -> set[str]:
    r, g = plan.record, plan.geometry
    found = {
        "sinks": bool((r.sink_stop > r.sink_start).any()), "lists": bool(r.num_blocks.any()),
        "columns": bool(r.num_columns.any()), "row order": plan.row_order is not None,
        "bits": plan.list_bits is not None, "regions": plan.regions > 1, "grouped": bool(r.grouped.any()),
        "window": g.window > 0, "bounds": g.kv_start is not None, "holes": g.key_padding is not None,
        "offset": g.q_offset > 0,
    }  # fmt: skip
    return {name for name, there in found.items() if there}


@given(seed=st.integers(0, 2**31), regions=st.booleans())
def test_row_mask_is_the_mask_of_the_rows(seed: int, regions: bool) -> None:
    plan = random_plan(seed, regions=regions)
    rows = random_rows(plan.geometry, seed)
    assert torch.equal(row_mask(plan, rows), of_rows(plan.to_mask(), rows))


def test_row_mask_meets_every_feature_of_plans() -> None:
    seen: set[str] = set()
    for seed in range(60):
        plan = random_plan(seed)
        rows = torch.arange(plan.geometry.q_len).expand(plan.geometry.batch, -1)
        assert torch.equal(row_mask(plan, rows), plan.to_mask())
        seen |= features(plan)
    assert len(seen) == 11, seen


def test_row_mask_of_planned_boundaries() -> None:
    g = Geometry(1, 4, 2, 400, 400)
    ids = (torch.arange(400) % 46 < 40).to(torch.int8)[None]
    q, k, _ = random_qkv(0, g, 16, torch.float32)
    slash = VerticalSlash(20, 10)
    heads: list[HeadPattern] = [ByModality("q", slash), ByModality("2d", slash), slash, Grid(23, 4, 16, True)]
    plan = build_bounded_plan(heads, q, k, g, SCALE, TILES, segment(ids, (0, 1), g, TILES))
    rows = random_rows(g, 0, 50)
    assert torch.equal(row_mask(plan, rows), of_rows(plan.to_mask(), rows))


@pytest.fixture(params=[1, 3000, 1 << 30])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One row at a time, some of them, and everything at once."""
    monkeypatch.setattr(exact_rows, "CHUNK_BYTES", request.param)
    return int(request.param)


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("seed", range(25))
def test_reading_is_that_of_dense_softmax(seed: int) -> None:
    plan = random_plan(seed, max_len=60)
    g = plan.geometry
    q, k, v = (x.double() for x in random_qkv(seed, g, 8, torch.float32))
    rows = random_rows(g, seed)
    check_contract(plan)
    model, mask = g.to_mask()[:, None], plan.to_mask()
    out = attention_reference(q, k, v, mask, SCALE)
    reading = measure(q, k, v, out, plan, g, SCALE, rows)
    exact = of_rows(attention_reference(q, k, v, model, SCALE), rows)
    off = (of_rows(out, rows) - exact).flatten(2).norm(dim=-1)
    norm = exact.flatten(2).norm(dim=-1)
    torch.testing.assert_close(reading.error, torch.where(norm > 0, off / norm, 0.0))
    weights = of_rows(probabilities_reference(q, k, model, SCALE), rows)
    kept = (weights * of_rows(mask, rows)).sum((-1, -2))
    total = weights.sum((-1, -2))
    torch.testing.assert_close(reading.recall, torch.where(total > 0, kept / total, 1.0))
    assert torch.equal(measure_recall(q, k, plan, g, SCALE, rows), reading.recall)


@given(geometries(max_len=60), st.integers(0, 99))
def test_dense_plans_recall_everything(g: Geometry, seed: int) -> None:
    q, k, v = random_qkv(seed, g, 8, torch.float32)
    plan = dense_plan(g, TILES, CPU)
    rows = guard_rows(g, 7, seed, device=CPU)
    out = attention_reference(q, k, v, g.to_mask()[:, None], SCALE)
    reading = measure(q, k, v, out, plan, g, SCALE, rows)
    assert torch.equal(reading.recall, torch.ones(g.batch, g.q_heads))
    assert float(reading.error.max()) < 1e-5
    same, recall, moved = enforce(plan, q, k, g, SCALE, 1.0, rows)
    assert not moved.any()
    assert torch.equal(same.tiles, plan.tiles)
    assert torch.equal(recall, reading.recall)


@given(geometries(), st.integers(1, 100), st.integers(0, 99))
def test_guard_rows_are_live_spread_and_the_same_again(g: Geometry, count: int, seed: int) -> None:
    rows = guard_rows(g, count, seed, device=CPU)
    assert rows.shape == (g.batch, min(count, g.q_len))
    assert rows.dtype == torch.int64
    assert int(rows.min()) >= 0
    assert int(rows.max()) < g.q_len
    assert bool((rows.diff(dim=-1) >= 0).all())
    assert torch.equal(rows, guard_rows(g, count, seed, device=CPU))
    if not g.has_padding:
        assert count < g.q_len or rows.unique().numel() > min(count, g.q_len) // 3


def test_guard_rows_cover_the_prompt_but_not_what_the_probe_saw() -> None:
    g = Geometry(2, 1, 1, 4000, 4000, kv_start=torch.tensor([1000, 0]), kv_stop=torch.tensor([4000, 2000]))
    for seed in range(20):
        rows = guard_rows(g, 40, seed, device=CPU)
        for b, (start, stop) in enumerate(((1000, 4000 - LAST_Q), (0, 2000 - LAST_Q))):
            stretch = (stop - start) / 40
            assert all(
                math.floor(start + n * stretch) <= row < start + (n + 1) * stretch
                for n, row in enumerate(rows[b].tolist())
            )
    assert len({tuple(guard_rows(g, 40, seed, device=CPU)[0].tolist()) for seed in range(20)}) == 20


def turning(length: int, back: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of two heads: the first looks ``back`` keys back until mid-prompt, then at its neighbours, as the other.

    Rotations of random frequencies, whose product depends on the distance alone.
    """
    generator = torch.Generator().manual_seed(0)
    frequencies = 3.1 * torch.rand(32, generator=generator, dtype=torch.float64)

    def turned(place: torch.Tensor) -> torch.Tensor:
        angle = place[:, None].double() * frequencies
        return torch.cat([angle.cos(), angle.sin()], -1).float()

    i = torch.arange(length)
    early = turned(torch.where(i < length // 2, i - back, i))
    q = torch.stack([early, turned(i)])[None] * 0.5
    return q, turned(i)[None, None], torch.randn(1, 1, length, 64, generator=generator)


def test_a_head_that_changes_in_mid_prompt_passes_the_probe_and_not_the_guard() -> None:
    length = 1200
    q, k, v = turning(length, 500)
    g = Geometry(1, 2, 1, length, length)
    plan, choice = adaptive_plan(q, k, g, 1.0, TILES, recall=0.95, groups=0)
    assert choice.sparse.all(), "the last rows take both heads for local ones"
    rows = guard_rows(g, 32, device=CPU)
    before = measure(q, k, v, attention_cpu(q, k, v, plan, 1.0), plan, g, 1.0, rows)
    assert float(before.recall[0, 0]) < 0.8
    assert float(before.error[0, 0]) > 0.3
    assert float(before.recall[0, 1]) > 0.9
    mended, recall, moved = enforce(plan, q, k, g, 1.0, 0.9, rows)
    assert moved.tolist() == [[True, False]]
    assert torch.equal(recall, before.recall)
    mask = mended.to_mask()
    assert torch.equal(mask[:, 0], g.to_mask())
    assert torch.equal(mask[:, 1], plan.to_mask()[:, 1])
    after = measure(q, k, v, attention_cpu(q, k, v, mended, 1.0), mended, g, 1.0, rows)
    assert float(after.recall[0, 0]) == 1.0
    assert float(after.error[0, 0]) < 1e-5


@given(seed=st.integers(0, 2**31), data=st.data())
def test_moved_heads_visit_every_pair_once(seed: int, data: st.DataObject) -> None:
    plan = random_plan(seed)
    g = plan.geometry
    flags = data.draw(st.lists(st.booleans(), min_size=g.batch * g.q_heads, max_size=g.batch * g.q_heads))
    which = torch.tensor(flags).view(g.batch, g.q_heads)
    dense = make_dense(plan, which[..., None])
    wanted = torch.where(which[..., None, None], g.to_mask()[:, None], plan.to_mask())
    assert torch.equal(dense.to_mask(), wanted)
    # No region beside the first visits a key once more.
    assert not dense.visited_blocks()[..., 1:, :].any(-1)[which].any()
    assert not dense.record.num_columns[which].any()


def test_nan_moves_a_head_and_is_told() -> None:
    g = Geometry(1, 2, 1, 200, 200)
    q, k, v = random_qkv(0, g, 8, torch.float32)
    q[0, 1] = torch.nan
    plan = build_plan([AShape(4, 64)] * 2, q, k, g, SCALE, TILES)
    rows = guard_rows(g, 16, device=CPU)
    reading = measure(q, k, v, q, plan, g, SCALE, rows)
    assert reading.recall.isnan().tolist() == reading.error.isnan().tolist() == [[False, True]]
    assert enforce(plan, q, k, g, SCALE, 0.01, rows)[2].tolist() == [[False, True]]


def test_garbage_in_padding_does_not_reach_the_reading() -> None:
    g = Geometry(1, 1, 1, 50, 50, kv_start=torch.tensor([0]), kv_stop=torch.tensor([30]))
    q, k, v = random_qkv(0, g, 8, torch.float32)
    k[:, :, 30:], v[:, :, 30:] = torch.nan, torch.nan
    plan = dense_plan(g, TILES, CPU)
    out = attention_reference(q, k.nan_to_num(0.0), v.nan_to_num(0.0), g.to_mask()[:, None], SCALE)
    reading = measure(q, k, v, out, plan, g, SCALE, guard_rows(g, 20, device=CPU))
    assert float(reading.error) < 1e-5
    assert float(reading.recall) == 1.0


def test_without_rows_there_is_nothing_to_miss() -> None:
    g = Geometry(1, 2, 1, 0, 10, 10)
    q, k, v = random_qkv(0, g, 8, torch.float32)
    plan, rows = dense_plan(g, TILES, CPU), guard_rows(g, 4, device=CPU)
    assert rows.shape == (1, 0)
    reading = measure(q, k, v, q, plan, g, SCALE, rows)
    assert reading.recall.tolist() == [[1.0, 1.0]]
    assert reading.error.tolist() == [[0.0, 0.0]]


def plans() -> Iterator[Plan]:
    for seed in range(12):
        yield random_plan(seed)


def test_the_host_never_waits() -> None:
    for plan in plans():
        g = plan.geometry
        q, k, v = random_qkv(0, g, 8, torch.float32)
        guard_rows(g, 8, device=CPU)
        with NoHostWaits():
            rows = guard_rows(g, 8, device=CPU)
            measure(q, k, v, q, plan, g, SCALE, rows)
            enforce(plan, q, k, g, SCALE, 0.9, rows)


def test_bad_input_is_named() -> None:
    g = Geometry(1, 2, 1, 40, 40)
    q, k, v = random_qkv(0, g, 8, torch.float32)
    plan, rows = dense_plan(g, TILES, CPU), guard_rows(g, 4, device=CPU)
    with pytest.raises(ValueError, match="count is 0"):
        guard_rows(g, 0, device=CPU)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="min_recall is"):
            enforce(plan, q, k, g, SCALE, share, rows)
    calls: list[tuple[str, dict[str, Any]]] = [
        ("must be int64", {"rows": rows.int()}),
        ("must be int64", {"rows": rows[0]}),
        ("the plan is for", {"geometry": Geometry(1, 2, 1, 41, 41)}),
        ("do not fit", {"q": q[:, :1]}),
        ("as long as", {"v": v[:, :, 1:]}),
    ]
    for message, wrong in calls:
        given_: dict[str, Any] = {"q": q, "k": k, "v": v, "out": q, "plan": plan, "geometry": g, "rows": rows} | wrong
        with pytest.raises(ValueError, match=message):
            measure(**given_, scale=SCALE)


@pytest.mark.gpu
def test_gpu_reading_is_that_of_the_cpu_and_never_waits() -> None:
    g = Geometry(1, 4, 2, 3000, 3000)
    q, k, v = (x.bfloat16().float() for x in random_qkv(0, g, 64, torch.float32))
    plan = build_plan([VerticalSlash(100, 64)] * 4, q, k, g, 0.3, TileShape(128, 64))
    moved = {name: x.cuda() for name, x in vars(plan).items() if isinstance(x, torch.Tensor)}
    there = dataclasses.replace(plan, **moved)
    inputs = [x.cuda().bfloat16() for x in (q, k, v)]
    out = attention_reference(q, k, v, plan.to_mask(), 0.3)
    out_there = out.cuda()
    rows = guard_rows(g, device=torch.device("cuda"))
    measure(*inputs, out_there, there, g, 0.3, rows)
    enforce(there, *inputs[:2], g, 0.3, 0.9, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = measure(*inputs, out_there, there, g, 0.3, rows)
        enforce(there, *inputs[:2], g, 0.3, 0.9, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = measure(q, k, v, out, plan, g, 0.3, rows.cpu())
    torch.testing.assert_close(got.error.cpu(), want.error, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.recall.cpu(), want.recall, rtol=1e-3, atol=1e-4)
