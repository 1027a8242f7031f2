"""Plans: the law that binds them to patterns and the model's mask, their invariants, and what they cost."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import AShape, BlockTopK, Dense, Grid, Pattern, TriShape, VerticalSlash
from mmi_compile.kernels.plan import RECORD, Plan, TileRecord
from mmi_compile.kernels.planner import TileShape, build_plan, dense_plan, lower_rules, make_dense
from mmi_compile.kernels.probe import best_phase, probe_rows, run_probe
from mmi_compile.kernels.reference import probabilities_reference
from mmi_compile.kernels.rules import HeadRules, autocorrelation_stride, estimate_rules
from tests.host_waits import NoHostWaits
from tests.launches import launches
from tests.random_plans import check_contract
from tests.strategies import geometries, patterns, random_inputs, tile_shapes

SCALE = 0.3


def block_topks() -> st.SearchStrategy[BlockTopK]:
    """Heads with chosen key blocks, either way of scoring and of counting, with small windows."""
    sizes = st.one_of(
        st.builds(lambda k: {"k": k}, st.integers(1, 12)), st.builds(lambda m: {"mass": m}, st.floats(0.05, 0.999))
    )
    return st.builds(
        lambda size, scoring, stride, local, sink: BlockTopK(
            **size, scoring=scoring, stride=stride, local=local, sink=sink
        ),
        sizes,
        st.sampled_from(["mean", "antidiagonal"]),
        st.integers(4, 16),
        st.integers(1, 30),
        st.integers(0, 20),
    )


def only_region(plan: Plan) -> TileRecord:
    assert plan.regions == 1
    return TileRecord(*plan.tiles[..., 0, :].unbind(-1))


def assert_window_edges(plan: Plan) -> None:
    """Blocks that a kernel does not test are allowed throughout, and what a row may see is not beyond the window."""
    r, rows, bn = only_region(plan), plan.rows(), plan.block_n
    assert (r.window_start <= r.window_left).all()
    assert (r.window_left <= r.window_full).all()
    assert (r.window_full <= r.window_stop).all()
    model = plan.geometry.to_mask()
    model = torch.nn.functional.pad(model, (0, -model.shape[-1] % bn)).unflatten(-1, (-1, bn))
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in rows.shape[:3])).tolist():
        live = rows[b, h, t][rows[b, h, t] >= 0]
        blocks = model[b, live]  # [rows, key blocks, bn]
        left, full, stop = (int(x[b, h, t]) for x in (r.window_left, r.window_full, r.window_stop))
        assert blocks[:, left:full].all()
        assert not blocks[:, stop:].any()


def assert_invariants(plan: Plan) -> None:
    """What the contract in ``plan.py`` promises a kernel."""
    g, bn, r = plan.geometry, plan.block_n, only_region(plan)
    for tensor in (plan.tiles, plan.lists, plan.columns, plan.row_order, plan.list_bits):
        assert tensor is None or (tensor.dtype == torch.int32 and tensor.is_contiguous())
    rows = plan.rows()
    low = torch.where(rows < 0, 1 << 30, rows).amin(-1) + g.q_offset
    assert_window_edges(plan)
    assert (r.sink_start >= 0).all()
    assert (r.sink_start <= r.sink_stop).all()
    assert (r.sink_stop <= r.window_start).all()
    assert plan.has_sinks or not (r.sink_stop > r.sink_start).any()
    assert (r.window_start * bn <= low).all()
    listed = plan.listed_blocks()[:, :, :, 0]
    for where in (r.num_blocks > 0).nonzero().tolist():
        count, start, base = (int(field[tuple(where)]) for field in (r.num_blocks, r.list_start, r.list_base))
        assert 0 <= start <= start + count <= plan.lists.numel()
        blocks = plan.lists[start : start + count] + base
        assert (blocks[1:] > blocks[:-1]).all()
        assert int(r.sink_stop[tuple(where)]) <= int(blocks[0])
        assert int(blocks[-1]) < int(r.window_start[tuple(where)])
    assert ((plan.columns >= 0) & (plan.columns < g.kv_len)).all()
    used = torch.arange(plan.columns.shape[-1]) < r.num_columns[..., None]
    assert (r.num_columns >= 0).all()
    assert (r.num_columns <= plan.columns.shape[-1]).all()
    columns = plan.columns[:, :, None].expand(used.shape)
    column_block = (columns // bn).long()
    assert (column_block < r.window_start[..., None])[used].all()
    in_sinks = (column_block >= r.sink_start[..., None]) & (column_block < r.sink_stop[..., None])
    assert not in_sinks[used].any()
    assert ((columns[..., 1:] > columns[..., :-1]) | ~used[..., 1:]).all()
    if plan.list_bits is None:
        # Without bits a kernel cannot tell: no column in use may lie in a listed block.
        assert not (listed.gather(-1, column_block) & used).any()
    else:
        block = torch.arange(plan.key_blocks)
        has_bits = ((r.num_blocks > 0) & (r.num_columns > 0))[..., None]
        counts = (block >= r.sink_stop[..., None]) & (block < r.window_start[..., None]) & has_bits
        away = (block - r.list_base[..., None]).abs()
        word = torch.where(counts, r.bits_start[..., None] + away // 32, 0)
        bit = (plan.list_bits[word.long()] >> (away % 32)) & 1
        assert torch.equal(bit.bool() & counts, listed & has_bits)
    filled, _ = rows.flatten(2).sort(-1)
    torch.testing.assert_close(filled[..., -g.q_len :], torch.arange(g.q_len).expand(g.batch, g.q_heads, -1))
    assert (filled[..., : -g.q_len] == -1).all()


def assert_between(rules: HeadRules, plan: Plan, geometry: Geometry) -> None:
    """A plan keeps its laws, and all that the rules ask for, and nothing that the model hides."""
    assert_invariants(plan)
    check_contract(plan)
    mask, model = plan.to_mask(), geometry.to_mask()[:, None]
    assert not (mask & ~model).any()
    assert not (rules.to_mask(geometry) & ~mask).any()
    assert (mask.any(-1) == model.any(-1)).all()


@given(geometries(), tile_shapes(), st.data())
def test_plan_lies_between_pattern_and_model_mask(geometry: Geometry, tiles: TileShape, data: st.DataObject) -> None:
    chosen = [data.draw(st.one_of(patterns(), block_topks())) for _ in range(geometry.q_heads)]
    x = random_inputs(geometry, seed=data.draw(st.integers(0, 99)))
    rules = estimate_rules(chosen, x.q, x.k, geometry, SCALE, tiles)
    plan = lower_rules(rules, geometry, tiles)
    assert_between(rules, plan, geometry)


@given(geometries(), tile_shapes())
def test_dense_plan_is_the_model_mask(geometry: Geometry, tiles: TileShape) -> None:
    plan = dense_plan(geometry, tiles, "cpu")
    assert_invariants(plan)
    assert torch.equal(plan.to_mask(), geometry.to_mask()[:, None].expand(-1, geometry.q_heads, -1, -1))
    assert not plan.tiles[..., 4:].any()
    assert plan.lists.numel() == plan.columns.numel() == 0


@given(geometries(), tile_shapes(), st.data())
def test_make_dense_changes_only_the_tiles_asked_for(geometry: Geometry, tiles: TileShape, data: st.DataObject) -> None:
    chosen = [data.draw(st.one_of(patterns(20), block_topks())) for _ in range(geometry.q_heads)]
    x = random_inputs(geometry)
    plan = build_plan(chosen, x.q, x.k, geometry, SCALE, tiles)
    which = torch.rand(plan.tiles.shape[:3], generator=torch.Generator().manual_seed(1)) < 0.5
    changed = make_dense(plan, which)
    assert_invariants(changed)
    row_is_dense = torch.zeros(geometry.batch, geometry.q_heads, geometry.q_len + 1, dtype=torch.bool)
    slots = torch.where(plan.rows() < 0, geometry.q_len, plan.rows()).flatten(2)
    row_is_dense.scatter_(-1, slots, which[..., None].expand_as(plan.rows()).flatten(2))
    expected = torch.where(row_is_dense[..., :-1, None], geometry.to_mask()[:, None], plan.to_mask())
    assert torch.equal(changed.to_mask(), expected)
    check_contract(changed)


@pytest.mark.parametrize("tiles", [TileShape(16, 16), TileShape(16, 8), TileShape(8, 16)])
@pytest.mark.parametrize("pattern", [AShape(5, 20), TriShape(5, 20, 9)])
def test_a_shape_rules_are_the_formula(pattern: AShape | TriShape, tiles: TileShape) -> None:
    g = Geometry(1, 1, 1, 70, 70)
    x = random_inputs(g)
    i, j = torch.arange(70)[:, None], torch.arange(70)
    formula = (j < 5) | (i - j < 20)
    if isinstance(pattern, TriShape):
        formula = formula | (i >= 70 - 9)
    mask = estimate_rules([pattern], x.q, x.k, g, SCALE, tiles).to_mask(g)[0, 0]
    assert torch.equal(mask, formula & (j <= i))


@pytest.mark.parametrize("stride", [1, 2, 7, 20])
def test_grid_rules_are_the_formula(stride: int) -> None:
    g = Geometry(1, 1, 1, 60, 75, q_offset=15)
    x = random_inputs(g)
    grid = Grid(stride, 3, 4, query_lines=True, same_phase=True)
    rules = estimate_rules([grid], x.q, x.k, g, SCALE, TileShape(16, 16))
    assert rules.columns is not None
    phase = int(rules.columns[0, 0, 0])
    i, j = torch.arange(60)[:, None] + 15, torch.arange(75)
    keep = (j % stride == phase) | (i % stride == phase) | ((i - j) % stride == 0) | (j < 3) | (i - j < 4)
    assert torch.equal(rules.to_mask(g)[0, 0], keep & (j <= i))


def test_grid_takes_the_heaviest_phase_and_finds_the_stride() -> None:
    mass = torch.full((1, 2, 400), 0.01)
    mass[0, 0, 7::24] = 1.0
    mass[0, 1, 30::50] = 1.0
    stride = autocorrelation_stride(mass)
    assert stride.tolist() == [[24, 50]]
    assert best_phase(mass, stride).tolist() == [[7, 30]]
    assert best_phase(mass, 24)[0, 0] == 7
    assert best_phase(mass, 50)[0, 1] == 30


def test_sinks_follow_left_padding() -> None:
    g = Geometry(2, 1, 1, 64, 64, kv_start=torch.tensor([0, 33]), kv_stop=torch.tensor([64, 64]))
    x = random_inputs(g)
    mask = build_plan([AShape(4, 1)], x.q, x.k, g, SCALE, TileShape(4, 4)).to_mask()
    assert mask[0, 0, 63, :4].all()
    assert mask[1, 0, 63, 33:37].all()


def test_last_rows_follow_right_padding() -> None:
    g = Geometry(1, 1, 1, 64, 64, kv_start=torch.tensor([0]), kv_stop=torch.tensor([40]))
    x = random_inputs(g)
    mask = build_plan([TriShape(1, 1, 8)], x.q, x.k, g, SCALE, TileShape(4, 4)).to_mask()[0, 0]
    assert torch.equal(mask[32:40], g.to_mask()[0, 32:40])
    assert mask[31].sum() < 10


@given(geometries(), tile_shapes(), st.integers(0, 30), st.integers(1, 30), st.integers(0, 30), st.integers(0, 30))
def test_larger_budgets_keep_more(
    geometry: Geometry, tiles: TileShape, sink: int, local: int, more_sink: int, more_local: int
) -> None:
    x = random_inputs(geometry)

    def mask(pattern: Pattern) -> torch.Tensor:
        return build_plan([pattern] * geometry.q_heads, x.q, x.k, geometry, SCALE, tiles).to_mask()

    small = mask(AShape(sink, local))
    assert not (small & ~mask(AShape(sink + more_sink, local + more_local))).any()
    small_rules, large_rules = (
        estimate_rules([pattern] * geometry.q_heads, x.q, x.k, geometry, SCALE, tiles)
        for pattern in (VerticalSlash(2 * sink, local), VerticalSlash(2 * (sink + more_sink), local + more_local))
    )
    assert small_rules.columns is not None
    assert large_rules.columns is not None
    kept_small, kept_large = (r.columns < geometry.kv_len for r in (small_rules, large_rules))
    assert (kept_small.sum(-1) <= kept_large.sum(-1)).all()


@given(geometries(), tile_shapes())
def test_full_budgets_are_dense(geometry: Geometry, tiles: TileShape) -> None:
    x = random_inputs(geometry)
    model = geometry.to_mask()[:, None].expand(-1, geometry.q_heads, -1, -1)
    for pattern in (Dense(), AShape(0, 1000), AShape(1000, 1), VerticalSlash(1000, 1), VerticalSlash(0, 1000)):
        plan = build_plan([pattern] * geometry.q_heads, x.q, x.k, geometry, SCALE, tiles)
        assert torch.equal(plan.to_mask(), model), pattern


@given(geometries(min_q=8), st.integers(1, 64))
def test_probe_is_the_full_attention_of_its_rows(geometry: Geometry, last_q: int) -> None:
    g, x = geometry, random_inputs(geometry)
    probe = run_probe(x.q, x.k, g, SCALE, block_m=16, last_q=last_q, peaks=3)
    full = probabilities_reference(x.q, x.k, g.to_mask()[:, None], SCALE)
    picked = full.gather(2, probe.rows[:, None, :, None].expand(-1, g.q_heads, -1, g.kv_len))
    torch.testing.assert_close(probe.columns, picked.sum(2))
    i = probe.rows[..., None] + g.q_offset
    distance = (i - torch.arange(g.kv_len)).clamp(min=0)[:, None].expand_as(picked)
    expected = torch.zeros_like(probe.distances).scatter_add_(-1, distance.flatten(2), picked.flatten(2))
    torch.testing.assert_close(probe.distances, expected)
    torch.testing.assert_close(probe.tiles.sum(2), probe.columns)
    on_peak = (distance[..., None] == probe.peak_distances[:, :, None, None]) & (probe.peaks > 0)[:, :, None, None]
    torch.testing.assert_close(probe.beside, (picked * ~on_peak.any(-1)).sum(2))


def test_probe_rows_end_where_the_keys_end() -> None:
    g = Geometry(2, 1, 1, 100, 100, kv_start=torch.tensor([0, 0]), kv_stop=torch.tensor([100, 70]))
    rows = probe_rows(g, torch.device("cpu"), 8)
    assert rows[:, 0].tolist() == [92, 62]


def test_a_pattern_per_head_is_required() -> None:
    g = Geometry(1, 2, 1, 8, 8)
    x = random_inputs(g)
    with pytest.raises(ValueError, match="one pattern per query head"):
        build_plan([Dense()], x.q, x.k, g, SCALE, TileShape(4, 4))


def test_no_rows_make_an_empty_plan() -> None:
    g = Geometry(1, 2, 1, 0, 0)
    plan = build_plan(
        [Dense(), AShape(1, 1)], torch.zeros(1, 2, 0, 8), torch.zeros(1, 1, 0, 8), g, 1.0, TileShape(4, 4)
    )
    assert plan.query_tiles == 0


@given(geometries(), tile_shapes(), st.data())
def test_planning_never_waits_for_the_device(geometry: Geometry, tiles: TileShape, data: st.DataObject) -> None:
    chosen = [data.draw(st.one_of(patterns(), block_topks())) for _ in range(geometry.q_heads)]
    x = random_inputs(geometry)
    with NoHostWaits():
        build_plan(chosen, x.q, x.k, geometry, SCALE, tiles)


def test_planning_launches_little() -> None:
    g, tiles = Geometry(1, 4, 2, 4096, 4096), TileShape(128, 128)
    x = random_inputs(g, dtype=torch.float32)
    mix = [Grid(256, 64, 1024), Grid(256, 64, 512), VerticalSlash(100, 100), AShape(128, 512)]
    probe = launches(lambda: run_probe(x.q, x.k, g, SCALE, block_m=128, heads=(0, 1, 2)))
    assert launches(lambda: estimate_rules(mix, x.q, x.k, g, SCALE, tiles)) - probe <= 30
    rules = estimate_rules(mix, x.q, x.k, g, SCALE, tiles)
    assert launches(lambda: lower_rules(rules, g, tiles)) <= 30
    chosen = [BlockTopK(k=4), BlockTopK(mass=0.5), AShape(128, 512), AShape(128, 512)]
    rules = estimate_rules(chosen, x.q, x.k, g, SCALE, tiles)
    assert launches(lambda: lower_rules(rules, g, tiles)) <= 30
    for scoring in ("mean", "antidiagonal"):
        alike = [BlockTopK(k=4, scoring=scoring)] * 4
        assert launches(lambda alike=alike: build_plan(alike, x.q, x.k, g, SCALE, tiles)) <= 36  # type: ignore[misc]
    simple = [AShape(128, 512), TriShape(64, 512, 64)] * 2
    assert launches(lambda: build_plan(simple, x.q, x.k, g, SCALE, tiles)) <= 15
    assert launches(lambda: dense_plan(g, tiles, "cpu")) == 0
    plan = build_plan(mix, x.q, x.k, g, SCALE, tiles)
    assert launches(lambda: make_dense(plan, only_region(plan).num_blocks > 3)) <= 2


def test_the_dense_plan_of_a_length_is_made_once() -> None:
    g, tiles = Geometry(1, 2, 1, 333, 333), TileShape(16, 16)
    assert dense_plan(g, tiles, "cpu") is dense_plan(Geometry(1, 2, 1, 333, 333), tiles, torch.device("cpu"))
    padded = Geometry(1, 2, 1, 333, 333, kv_start=torch.tensor([3]), kv_stop=torch.tensor([333]))
    assert dense_plan(padded, tiles, "cpu") is not dense_plan(padded, tiles, "cpu")


def test_tiles_share_the_list_of_their_head() -> None:
    g, tiles = Geometry(1, 2, 1, 640, 640), TileShape(16, 16)
    rules = HeadRules(
        sink=(20,),
        local=torch.full((1, 2), 1, dtype=torch.int32),
        columns=torch.tensor([[[333, 5, 640], [100, 640, 640]]], dtype=torch.int32),
        distances=torch.tensor([[[160, 320, 5], [-1, -1, 99]]]),
    )
    plan = lower_rules(rules, g, tiles)
    assert_invariants(plan)
    entries = plan.lists.view(2, -1)
    # Distance 5 reaches the block before the own one; 99 lies between two multiples of the block.
    assert entries[0][entries[0] < 0].tolist() == [-20, -10, -1]
    assert entries[1][entries[1] < 0].tolist() == [-7, -6]
    r = only_region(plan)
    assert r.sink_stop[0, 0, :4].tolist() == [0, 1, 2, 2]
    assert r.num_blocks[0, 0, [2, 11, 12, 21, 22, 39]].tolist() == [0, 1, 2, 2, 3, 3]
    assert r.num_columns[0, :, -1].tolist() == [1, 1]  # 5 lies in the sinks
    assert torch.equal(r.bits_start[0], torch.tensor([[0], [2]]).expand(-1, 40))


@pytest.mark.parametrize("length", [1 << 12, 1 << 14])
def test_plan_size_is_linear_for_fixed_patterns(length: int) -> None:
    g = Geometry(1, 1, 1, length, length)
    x = random_inputs(g, dtype=torch.float32)
    plan = build_plan([VerticalSlash(64, 16)], x.q, x.k, g, SCALE, TileShape(128, 128))
    tensors = [getattr(plan, f.name) for f in dataclasses.fields(plan)]
    size = sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))
    # One record of thirteen numbers a tile; one list and its bits for all tiles together, and the columns.
    assert size <= length // 128 * (RECORD + 2) + 64 + 64 + 2
