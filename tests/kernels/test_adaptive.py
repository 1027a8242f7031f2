"""The adaptive policy: it finds what was planted, reports the truth, and otherwise stays dense."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels.adaptive import (
    A_SHAPE,
    DENSE,
    GRID,
    PATTERN_NAMES,
    VERTICAL_SLASH,
    adaptive_plan,
    max_diagonals,
)
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.planner import TileShape, dense_plan
from mmi_compile.kernels.probe import probe_rows, run_probe
from mmi_compile.kernels.reference import probabilities_reference
from mmi_compile.kernels.structured import Structure, structured_qkv
from tests.host_waits import NoHostWaits
from tests.kernels.test_planner import assert_invariants
from tests.launches import launches
from tests.random_plans import check_contract
from tests.strategies import geometries, random_inputs, tile_shapes

SCALE = 64**-0.5
TILES = TileShape(32, 32)
LENGTH = 2048
PLANTED = {
    "columns": (Structure(columns=(300, 700, 1501), distances=(0,)), VERTICAL_SLASH),
    "diagonals": (Structure(distances=(0, 640)), VERTICAL_SLASH),
    "both": (Structure(columns=(200,), distances=(0, 320, 640)), VERTICAL_SLASH),
    "grid": (Structure(distances=(0,), stride=72, phase=7), GRID),
    "local": (Structure(distances=(0,)), A_SHAPE),
}


@pytest.mark.parametrize(("structure", "code"), PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize("seed", range(3))
def test_planted_structure_is_found_and_holds_for_all_rows(structure: Structure, code: int, seed: int) -> None:
    x = structured_qkv([structure], LENGTH, seed=seed)
    g = Geometry(1, 1, 1, LENGTH, LENGTH)
    plan, choice = adaptive_plan(x.q, x.k, g, SCALE, TILES, recall=0.9)
    assert PATTERN_NAMES[int(choice.pattern)] == PATTERN_NAMES[code]
    assert choice.recall.item() >= 0.9
    assert choice.density.item() < 0.33
    if code == GRID:
        assert choice.stride.item() == 72
    # The probe saw the last 64 rows; the structure holds for all, so must the recall. Early rows lack some of the
    # planted keys, which shifts a little weight to the others.
    kept = (probabilities_reference(x.q, x.k, g.to_mask()[:, None], SCALE) * plan.to_mask()).sum(-1)
    assert kept.mean() >= 0.88


@pytest.mark.parametrize("tiles", [TileShape(32, 32), TileShape(128, 64), TileShape(64, 64)])
@pytest.mark.parametrize("reach", [20, 60, 150])
def test_the_first_rows_of_tiles_keep_what_the_probe_rows_keep(tiles: TileShape, reach: int) -> None:
    """Probe rows at the end of a tile see all of it; a window of nothing else would leave its first row alone."""
    g = Geometry(1, 1, 1, LENGTH, LENGTH)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    near = (distance >= 0) & (distance < reach)
    # Scores of 0 for the nearest keys and very negative ones elsewhere, as a product of two matrices.
    scores = torch.where(near, 0.0, -30.0).double()
    left, values, right = torch.linalg.svd(scores)
    q, k = (left * values.sqrt())[None, None].float(), (right.T * values.sqrt())[None, None].float()
    plan, choice = adaptive_plan(q, k, g, 1.0, tiles, recall=0.9)
    assert choice.sparse.all()
    kept = (probabilities_reference(q, k, g.to_mask()[:, None], 1.0) * plan.to_mask()).sum(-1)[0, 0]
    assert kept[tiles.block_m :: tiles.block_m].min() >= 0.88


def test_a_head_whose_rows_look_at_keys_of_their_own_runs_dense() -> None:
    """Half of the rows look at a key that no other row cares for: columns taken for some rows say nothing of others."""
    g = Geometry(1, 1, 1, LENGTH, LENGTH)
    generator = torch.Generator().manual_seed(0)
    key = (torch.rand(LENGTH, generator=generator) * torch.arange(1, LENGTH + 1)).long()
    k = torch.nn.functional.normalize(torch.randn(LENGTH, 256, generator=generator), dim=-1)
    q = torch.where((torch.rand(LENGTH, generator=generator) < 0.5)[:, None], 12 * k[key], 12 * k)
    q, k = q[None, None], k[None, None]
    plan, choice = adaptive_plan(q, k, g, 1.0, TILES, recall=0.8, groups=0)
    kept = (probabilities_reference(q, k, g.to_mask()[:, None], 1.0) * plan.to_mask()).sum(-1).mean()
    assert choice.sparse.all()
    assert choice.recall.item() >= 0.8
    assert kept < 0.7, "the last rows alone promise too much"
    _, choice = adaptive_plan(q, k, g, 1.0, TILES, recall=0.8)
    assert not choice.sparse.any()


@pytest.mark.parametrize("key", [700, LENGTH - 110])  # the second is near enough to be left to windows
def test_what_the_last_rows_ask_of_stays_under_any_target(key: int) -> None:
    """Sinks and window hold what is asked for; one key holds a tenth of the last rows' mass, and none of others'."""
    g = Geometry(1, 1, 1, LENGTH, LENGTH)
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    scores = torch.full((LENGTH, LENGTH), -12.0).masked_fill_((j == 0) | (i == j), 0.0)
    scores[-64:, key] = -1.5
    left, values, right = torch.linalg.svd(scores.double())
    q, k = (left * values.sqrt())[None, None].float(), (right.T * values.sqrt())[None, None].float()
    plan, choice = adaptive_plan(q, k, g, 1.0, TILES, recall=0.3, dense_tail=False)
    assert choice.sparse.all()
    assert plan.to_mask()[0, 0, -64:, key].all()
    assert choice.density.item() < 0.2


@pytest.mark.parametrize("block_m", [16, 32, 128])
def test_a_window_of_64_tokens_stays_under_any_target(block_m: int) -> None:
    x = structured_qkv([Structure(columns=(0,))], LENGTH)
    g = Geometry(1, 1, 1, LENGTH, LENGTH)
    plan, choice = adaptive_plan(x.q, x.k, g, SCALE, TileShape(block_m, 16), recall=0.3, dense_tail=False)
    assert choice.sparse.all()
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    assert plan.to_mask()[0, 0][(distance >= 0) & (distance < 64)].all()


def test_caller_strides_are_tried() -> None:
    x = structured_qkv([Structure(distances=(0,), stride=72, phase=7)], LENGTH)
    g = Geometry(1, 1, 1, LENGTH, LENGTH)
    _, choice = adaptive_plan(x.q, x.k, g, SCALE, TILES, strides=(24, 72, 100_000))
    assert choice.stride.item() == 72


def test_uniform_attention_stays_dense() -> None:
    x = structured_qkv([Structure(), Structure(distances=(0,))], LENGTH, kv_heads=1)
    g = Geometry(1, 2, 1, LENGTH, LENGTH)
    plan, choice = adaptive_plan(x.q, x.k, g, SCALE, TILES)
    assert choice.pattern.tolist() == [[DENSE, A_SHAPE]]
    assert choice.recall[0, 0] == 1
    assert choice.density[0, 0] == 1
    assert torch.equal(plan.to_mask()[0, 0], g.to_mask()[0])


def test_mixed_heads_choose_for_themselves() -> None:
    structures = [structure for structure, _ in PLANTED.values()] + [Structure()]
    x = structured_qkv(structures, LENGTH, kv_heads=2, batch=2)
    g = Geometry(2, 6, 2, LENGTH, LENGTH)
    plan, choice = adaptive_plan(x.q, x.k, g, SCALE, TILES, recall=0.9)
    assert choice.pattern.tolist() == [[code for _, code in PLANTED.values()] + [DENSE]] * 2
    assert_invariants(plan)
    lines = choice.describe()
    assert len(lines) == 2
    assert "grid(" in lines[1][3]
    assert "dense: recall 1.000" in lines[0][5]


@given(geometries(max_len=90), tile_shapes(), st.sampled_from([0.3, 0.6, 0.9]), st.integers(0, 50))
def test_reported_recall_is_that_of_the_plan(geometry: Geometry, tiles: TileShape, recall: float, seed: int) -> None:
    g, x = geometry, random_inputs(geometry, seed=seed, sharpness=6.0)
    plan, choice = adaptive_plan(x.q, x.k, g, 1.0, tiles, recall=recall, max_density=1.0, dense_tail=False)
    assert_invariants(plan)
    check_contract(plan)
    model = g.to_mask()[:, None]
    rows = probe_rows(g, x.q.device)[:, None, :, None].expand(-1, g.q_heads, -1, g.kv_len)
    full = probabilities_reference(x.q, x.k, model, 1.0).gather(2, rows)
    kept = (full * plan.to_mask().gather(2, rows)).sum((-1, -2))
    live = full.sum((-1, -2))
    expected = torch.where(live > 0, kept / live, 1.0)
    torch.testing.assert_close(choice.recall.double(), expected)
    assert (choice.recall >= recall - 1e-9).all()
    mask = plan.to_mask()
    assert not (mask & ~model).any()
    assert (mask.any(-1) == model.any(-1)).all()


@given(geometries(), tile_shapes())
def test_the_rows_that_carry_the_answer_are_dense(geometry: Geometry, tiles: TileShape) -> None:
    g, x = geometry, random_inputs(geometry, sharpness=6.0)
    plan, _ = adaptive_plan(x.q, x.k, g, 1.0, tiles, recall=0.3)
    assert_invariants(plan)
    rows = probe_rows(g, x.q.device)[:, None, :, None].expand(-1, g.q_heads, -1, g.kv_len)
    model = g.to_mask()[:, None].expand(-1, g.q_heads, -1, -1)
    assert torch.equal(plan.to_mask().gather(2, rows), model.gather(2, rows))


def test_full_recall_and_zero_density_are_dense() -> None:
    x = structured_qkv([Structure(columns=(500,), distances=(0,))], 512)
    g = Geometry(1, 1, 1, 512, 512)
    for options in ({"recall": 1.0}, {"max_density": 0.0}):
        plan, choice = adaptive_plan(x.q, x.k, g, SCALE, TILES, **options)
        assert choice.pattern.item() == DENSE
        assert torch.equal(plan.to_mask(), dense_plan(g, TILES, "cpu").to_mask())


def test_higher_targets_never_lose_recall() -> None:
    x = structured_qkv([structure for structure, _ in PLANTED.values()], 1024)
    g = Geometry(1, 5, 5, 1024, 1024)
    for target in (0.5, 0.8, 0.95, 0.99):
        _, choice = adaptive_plan(x.q, x.k, g, SCALE, TILES, recall=target)
        assert (choice.recall >= target).all()


@given(geometries(), tile_shapes())
def test_choosing_never_waits_for_the_device(geometry: Geometry, tiles: TileShape) -> None:
    x = random_inputs(geometry)
    with NoHostWaits():
        adaptive_plan(x.q, x.k, geometry, 1.0, tiles, recall=0.5, strides=(16,))


@pytest.mark.parametrize("length", [4096, 4000])
def test_choosing_launches_little(length: int) -> None:
    structures = [structure for structure, _ in PLANTED.values()]
    x = structured_qkv(structures, length, kv_heads=1)
    g, tiles = Geometry(1, 5, 1, length, length), TileShape(128, 128)
    peaks = max_diagonals(length, 128)
    probe = launches(lambda: run_probe(x.q, x.k, g, SCALE, block_m=128, peaks=peaks, nearest=128))
    assert launches(lambda: adaptive_plan(x.q, x.k, g, SCALE, tiles, groups=0)) - probe <= 190
    assert launches(lambda: adaptive_plan(x.q, x.k, g, SCALE, tiles)) - probe <= 305  # of the references, 70


def test_dense_share_is_the_density_of_the_plan() -> None:
    x = structured_qkv([structure for structure, _ in PLANTED.values()], 1000)
    for kv_start in (None, torch.tensor([100])):
        kv_stop = None if kv_start is None else torch.tensor([1000])
        g = Geometry(1, 5, 5, 1000, 1000, kv_start=kv_start, kv_stop=kv_stop)
        plan, choice = adaptive_plan(x.q, x.k, g, SCALE, TILES, recall=0.8)
        full = dense_plan(g, TILES, "cpu").density()
        torch.testing.assert_close(choice.density, plan.density() / full)


def test_not_a_number_runs_dense() -> None:
    g, q = Geometry(1, 2, 1, 300, 300), torch.full((1, 2, 300, 8), torch.nan)
    plan, choice = adaptive_plan(q, q[:, :1], g, 1.0, TILES)
    assert choice.pattern.tolist() == [[DENSE, DENSE]]
    assert_invariants(plan)


@pytest.mark.parametrize(("length", "tiles"), [(960, TileShape(128, 32)), (4032, TileShape(128, 32))])
def test_tall_tiles_and_padding(length: int, tiles: TileShape) -> None:
    g = Geometry(1, 1, 1, length, length, kv_start=torch.tensor([3], dtype=torch.int32))
    x = random_inputs(g)
    plan, _ = adaptive_plan(x.q, x.k, g, 0.5, tiles, recall=0.5, max_density=1.0)
    assert_invariants(plan)


def test_no_rows() -> None:
    g = Geometry(1, 2, 1, 0, 0)
    plan, choice = adaptive_plan(torch.zeros(1, 2, 0, 8), torch.zeros(1, 1, 0, 8), g, 1.0, TILES)
    assert plan.query_tiles == 0
    assert choice.pattern.tolist() == [[DENSE, DENSE]]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"recall": 0.0}, "recall is 0.0"), ({"max_density": 2.0}, "max_density is 2.0"), ({"strides": (0,)}, "strides")],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    g, q = Geometry(1, 1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match=message):
        adaptive_plan(q, q, g, 1.0, TILES, **options)  # type: ignore[arg-type]
