"""The cost model: formulas against real plans, what a plan's work is, and time as a function of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmi_compile.bench_cases import VIDEO, video_prompt
from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.cost import (
    Coefficients,
    Spread,
    Work,
    default_coefficients,
    expected_density,
    expected_work,
    formulas,
    plan_work,
)
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import (
    AShape,
    BlockTopK,
    ByModality,
    Dense,
    Grid,
    HeadPattern,
    Pattern,
    TriShape,
    VerticalSlash,
)
from mmi_compile.kernels.plan import Plan, causal_tiles
from mmi_compile.kernels.planner import build_plan, lower_rules
from mmi_compile.kernels.rules import FORCED_COLUMNS, FORCED_DISTANCES, HeadRules
from mmi_compile.kernels.segments import segment
from mmi_compile.kernels.structured import long_context_structure, structured_qkv

TILES = st.sampled_from([TileShape(128, 64), TileShape(64, 64), TileShape(128, 128), TileShape(64, 96)])
SIZES = st.integers(1, 1500)


def visited(work: Work) -> float:
    return float(torch.as_tensor(work.visited).mean())


def plan_of(pattern: Pattern, q_len: int, kv_len: int, tiles: TileShape) -> Plan:
    generator = torch.Generator().manual_seed(kv_len)
    q, k = (torch.randn(1, 1, n, 16, generator=generator) for n in (q_len, kv_len))
    return build_plan([pattern], q, k, Geometry(1, 1, 1, q_len, kv_len, q_offset=kv_len - q_len), 0.25, tiles)


plain_patterns = st.one_of(
    st.just(Dense()),
    st.builds(AShape, st.integers(0, 300), SIZES),
    st.builds(TriShape, st.integers(0, 300), SIZES, st.integers(0, 700)),
    st.builds(Grid, st.integers(32, 600), st.integers(0, 300), SIZES),
    st.builds(Grid, st.integers(100, 600), st.integers(0, 300), SIZES, query_lines=st.just(True)),
    st.builds(Grid, st.integers(256, 600), st.integers(0, 300), SIZES, same_phase=st.just(True)),
    st.builds(BlockTopK, st.integers(1, 20), sink=st.integers(0, 200), local=SIZES),
)


@given(pattern=plain_patterns, kv_len=st.integers(1024, 4500), past=st.sampled_from([0, 0, 200, 1000]), tiles=TILES)
def test_formulas_agree_with_plans(pattern: Pattern, kv_len: int, past: int, tiles: TileShape) -> None:
    q_len = max(512, kv_len - past)
    real = visited(plan_work(plan_of(pattern, q_len, kv_len, tiles)))
    expected = visited(expected_work(pattern, q_len, kv_len, tiles))
    # Prompts are so short that one dense tile of query lines, or a rounded tile of a few diagonals, shows.
    lines, diagonals = (isinstance(pattern, Grid) and getattr(pattern, name) for name in ("query_lines", "same_phase"))
    slack = 4 + (1.0 if diagonals else 0.2) * q_len / tiles.block_m + (kv_len / tiles.block_n if lines else 0)
    assert expected == pytest.approx(real, rel=0.15 if isinstance(pattern, Grid) else 0.04, abs=slack)


@given(kv_len=st.integers(1, 3000), past=st.sampled_from([0, 0, 130, 1000]), tiles=TILES)
def test_the_formula_of_dense_is_exact_where_tiles_divide(kv_len: int, past: int, tiles: TileShape) -> None:
    step = tiles.block_m * tiles.block_n
    kv_len, past = -(-kv_len // step) * step, past // step * step
    g = Geometry(1, 1, 1, kv_len - past, kv_len, q_offset=past) if past < kv_len else Geometry(1, 1, 1, kv_len, kv_len)
    expected = visited(expected_work(Dense(), g.q_len, g.kv_len, tiles))
    assert expected == pytest.approx(causal_tiles(g, tiles.block_m, tiles.block_n))


@given(
    length=st.integers(3000, 9000), columns=st.integers(31, 900), diagonals=st.integers(101, 400), tiles=TILES,
    seed=st.integers(0, 99),
)  # fmt: skip
def test_vertical_slash_meets_the_expectation_for_evenly_spread_parts(
    length: int, columns: int, diagonals: int, tiles: TileShape, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    forced = min(FORCED_COLUMNS, (columns + 1) // 2)
    far = diagonals // 8
    near = diagonals - far
    assert near >= min(FORCED_DISTANCES, (diagonals + 1) // 2)

    heads = 24  # the expectation of many heads

    def drawn(least: int, count: int) -> Tensor:
        first = torch.arange(least)
        rest = (torch.randperm(length - least, generator=generator)[:count] + least for _ in range(heads))
        return torch.stack([torch.cat([first, part]) for part in rest]).int()[None]

    rules = HeadRules(
        sink=(0,), local=torch.ones(1, 1, dtype=torch.int32), columns=drawn(forced, columns - forced),
        distances=drawn(near, far),
    )  # fmt: skip
    real = visited(plan_work(lower_rules(rules, Geometry(1, heads, 1, length, length), tiles)))
    work = expected_work(VerticalSlash(columns, diagonals), length, length, tiles, spread=Spread(far / diagonals, 0.0))
    assert visited(work) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("pattern", [VerticalSlash(500, 700), VerticalSlash(1000, 1024), VerticalSlash(900, 200)])
def test_vertical_slash_is_near_on_structured_inputs(pattern: VerticalSlash) -> None:
    length, tiles = 6000, TileShape(128, 64)
    x = structured_qkv([long_context_structure("vertical_slash", length)], length, head_dim=64)
    real = visited(plan_work(build_plan([pattern], x.q, x.k, Geometry(1, 1, 1, length, length), x.scale, tiles)))
    assert visited(expected_work(pattern, length, length, tiles)) == pytest.approx(real, rel=0.35)


@pytest.mark.parametrize("boundary", ["q", "2d"])
@pytest.mark.parametrize(
    "pattern", [Dense(), AShape(64, 512), TriShape(64, 512, 128), Grid(256, 64, 256)], ids=lambda p: p.name
)
@pytest.mark.parametrize("mixed", [False, True])
def test_formulas_of_boundaries_agree_with_plans(boundary: str, pattern: Pattern, mixed: bool) -> None:
    length, tiles = 6000, TileShape(128, 64)
    ids = video_prompt(length, 1, torch.device("cpu"))
    if mixed:
        ids = (torch.rand(1, length, generator=torch.Generator().manual_seed(0)) < 0.7).int() * VIDEO
    g, video = Geometry(1, 1, 1, length, length), int((ids == VIDEO).sum())
    q = torch.randn(1, 1, length, 16, generator=torch.Generator().manual_seed(1))
    head = ByModality(boundary, pattern)  # type: ignore[arg-type]
    real = plan_work(build_bounded_plan([head], q, q, g, 0.25, tiles, segment(ids, (0, VIDEO), g, tiles)))
    expected = expected_work(head, length, length, tiles, counts={0: length - video, VIDEO: video})
    assert visited(expected) == pytest.approx(visited(real), rel=0.12)
    assert float(expected.rows) == pytest.approx(float(torch.as_tensor(real.rows)), abs=3)


def test_modalities_that_do_not_occur_cost_nothing() -> None:
    head, tiles = ByModality("2d", AShape(16, 64)), TileShape(64, 64)
    some = expected_work(head, 4096, 4096, tiles, counts={0: 0, 1: 1000, 2: 3096, 3: 0})
    assert some == expected_work(head, 4096, 4096, tiles, counts={1: 1000, 2: 3096})
    assert some.rows == 16 + 49


def test_a_pattern_with_boundaries_needs_counts() -> None:
    with pytest.raises(ValueError, match="pass counts"):
        expected_work(ByModality("q", Dense()), 1000, 1000, TileShape(64, 64))


@given(pattern=plain_patterns, length=st.integers(300, 1500), tiles=TILES)
def test_the_work_of_a_plan_is_what_it_visits(pattern: Pattern, length: int, tiles: TileShape) -> None:
    plan = plan_of(pattern, length, length, tiles)
    work = plan_work(plan)
    assert torch.equal(torch.as_tensor(work.visited), plan.work().sum(-1).float())
    assert torch.equal(torch.as_tensor(work.rows), (plan.work() > 0).sum(-1).float())


def test_only_plain_windows_over_everything_count_as_dense() -> None:
    tiles = TileShape(64, 64)
    everything = plan_work(plan_of(AShape(0, 1000), 1000, 1000, tiles))
    assert float(torch.as_tensor(everything.dense)) > 0 == float(torch.as_tensor(everything.tiles))
    some = plan_work(plan_of(AShape(0, 800), 1000, 1000, tiles))
    assert float(torch.as_tensor(some.tiles)) > 0 == float(torch.as_tensor(some.dense))


def test_groups_and_regions_share_out_the_work() -> None:
    length, tiles = 2000, TileShape(64, 32)
    ids = video_prompt(length, 2, torch.device("cpu"))
    g = Geometry(2, 2, 1, length, length)
    q, k = (torch.randn(2, h, length, 16, generator=torch.Generator().manual_seed(h)) for h in (2, 1))
    segments = segment(ids, (0, VIDEO), g, tiles)
    heads: list[HeadPattern] = [ByModality("2d", VerticalSlash(50, 20)), ByModality("2d", AShape(10, 100))]
    plan = build_bounded_plan(heads, q, k, g, 0.25, tiles, segments)
    whole = plan_work(plan)
    grouped = plan_work(plan, segments.tile_group, 2)
    for name in ("rows", "tiles", "listed", "columns"):
        assert torch.equal(getattr(grouped, name).sum(-1), getattr(whole, name)), name
    regions = [plan_work(plan, segments.tile_group, 2, region) for region in (0, 1)]
    for name in ("tiles", "listed", "columns", "gathered"):
        assert torch.equal(sum(getattr(r, name) for r in regions), getattr(grouped, name)), name


def test_every_pattern_has_formulas_of_known_symbols() -> None:
    known = {"Q", "N", "S", "O", "M", "B", "G", "R", "sink", "local", "last", "n_vertical", "forced", "near", "far",
             "stride", "even", "k"}  # fmt: skip
    found = formulas()
    assert {"dense", "a_shape", "tri_shape", "vertical_slash", "grid", "block_topk"} <= set(found)
    for terms in found.values():
        assert set(terms) <= set(Work._fields)
        assert all({str(s) for s in term.free_symbols} <= known for term in terms.values())


def test_pairs_and_bytes_follow_from_tiles() -> None:
    work, tiles = Work(rows=2, tiles=3, listed=1, columns=1, gathered=1, dense=0), TileShape(128, 64)
    assert work.pairs(tiles) == 5 * 128 * 64
    assert work.traffic(tiles, 64, 2) == 2 * (2 * 128 * 64 * 2) + (5 + 2) * (2 * 64 * 64 * 2)


def test_time_is_affine_in_work() -> None:
    c = Coefficients(launch=1.0, rows=2.0, tiles=3.0, listed=5.0, columns=7.0, gathered=11.0, dense=13.0)
    assert c.seconds(Work()) == 1.0
    assert c.seconds(Work(1, 1, 1, 1, 1, 1)) == 42.0
    assert c.seconds(Work(1, 1, 1, 1, 1, 1).plus(Work(rows=1)), calls=0) == 43.0
    assert c.scaled(2.0).seconds(Work(1, 1, 1, 1, 1, 1)) == 83.0
    heads = Work(*(torch.tensor([1.0, 2.0]) for _ in range(6)))
    assert torch.equal(torch.as_tensor(c.seconds(heads, calls=0)), torch.tensor([41.0, 82.0]))


@pytest.mark.parametrize("family", ["hopper", "portable", "cpu", "unheard of"])
def test_built_in_costs_are_positive_and_grow_with_the_tile(family: str) -> None:
    small, large = (default_coefficients(family, d, TileShape(128, 128)) for d in (64, 128))
    assert all(value > 0 for value in dataclasses.asdict(small).values())
    assert large.tiles == pytest.approx(2 * small.tiles)


def test_longer_windows_are_expected_to_be_denser() -> None:
    found = [expected_density(AShape(64, local), 8192, 8192, TileShape(128, 128)) for local in (128, 1024, 4096, 8192)]
    assert found == sorted(found)
    assert found[0] < 0.1
    assert found[-1] == pytest.approx(1.0)
