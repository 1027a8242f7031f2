"""Head search on planted q, k, v: what it finds, that its numbers are true, and how a budget is spent."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmi_compile.cost_file import CostModel
from mmi_compile.head_choice import LayerResult, Scored, choose, lower_hull, pareto, walk
from mmi_compile.head_measure import (
    HeadSearchError,
    LayerInput,
    Measuring,
    Prompt,
    tile_weights,
)
from mmi_compile.head_search import Candidates, Searcher, Survey, search_layer
from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.cost import default_coefficients
from mmi_compile.kernels.dispatch import CPU_TILES
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import (
    AShape,
    BlockTopK,
    ByModality,
    Dense,
    Grid,
    HeadPattern,
    TriShape,
    VerticalSlash,
)
from mmi_compile.kernels.plan_rows import row_mask
from mmi_compile.kernels.planner import TileShape, build_plan, dense_plan, keep_tail
from mmi_compile.kernels.reference import attention_reference, probabilities_reference
from mmi_compile.kernels.segments import segment
from mmi_compile.kernels.structured import Structure, structured_qkv
from tests.random_plans import random_plan

TEXT, VIDEO = 0, 2
FRAME, LONGEST_TEXT, BACK = 64, 80, 320
LENGTH = 1536
COSTS = CostModel("cpu", 64, CPU_TILES, default_coefficients("portable", 64, CPU_TILES), "test")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def interleaved(length: int = LENGTH) -> Tensor:
    """Frames with stretches of text of different lengths between them, int64 ``[1, length]``."""
    generator, row = torch.Generator().manual_seed(3), list[int]()
    while len(row) < length:
        row += [VIDEO] * FRAME + [TEXT] * int(torch.randint(1, LONGEST_TEXT, (), generator=generator))
    return torch.tensor(row[:length])[None]


def planted(length: int = LENGTH) -> LayerInput:
    """A grid head, a slash head, a local head and a dense one."""
    structures = [
        Structure(stride=64, phase=3, local=48), Structure(columns=(0, 1), distances=(0, 700)),
        Structure(columns=(0,), local=60), Structure(),
    ]  # fmt: skip
    x = structured_qkv(structures, length, head_dim=64)
    return LayerInput(x.q, x.k, x.v, Geometry(1, 4, 4, length, length), x.scale)


def by_modality(length: int = LENGTH) -> LayerInput:
    """Video looks a fixed number of video tokens back; text looks at the text before it."""
    ids = interleaved(length)
    video, generator = ids[0] == VIDEO, torch.Generator().manual_seed(0)
    rank = torch.where(video, video.cumsum(0), (~video).cumsum(0)).double()
    frequencies = 3.1 * torch.rand(31, generator=generator, dtype=torch.float64)

    def turned(place: Tensor) -> Tensor:
        angle = place[:, None] * frequencies
        return torch.cat([angle.cos(), angle.sin()], -1).float()

    kind = torch.stack([video, ~video], -1).float()
    k = torch.cat([turned(rank), kind], -1)[None, None]
    q = torch.cat([turned(rank - BACK * video.double()) * 0.6, kind * 6], -1)[None, None]
    v = torch.randn(1, 1, length, 64, generator=generator)
    return LayerInput(q, k, v, Geometry(1, 1, 1, length, length), 1.0, ids, (TEXT, VIDEO))


CANDIDATES = Candidates(
    (AShape(64, 64), AShape(64, 256), VerticalSlash(16, 16), Grid(64, 64, 64), Grid(None, 64, 64), BlockTopK(k=4)),
    (AShape(0, 64), VerticalSlash(0, 8), AShape(64, 256)),
)


def searched(*inputs: LayerInput, candidates: Candidates = CANDIDATES, **settings) -> LayerResult:
    settings = {"dense_tail": False, "costs": COSTS, **settings}
    return search_layer(list(inputs), candidates=candidates, **settings)


def best_within(result: LayerResult, head: int, cost: float) -> Scored:
    return [s for s in result.heads[head] if s.cost <= cost][-1]


def cheapest(result: LayerResult, head: int, error: float) -> Scored:
    return next(s for s in result.heads[head] if s.error <= error)


# --- what is found


def test_planted_patterns_are_found() -> None:
    result = searched(planted())
    grid, slash, local, uniform = (cheapest(result, h, 0.1) for h in range(4))
    assert isinstance(grid.pattern, Grid)
    assert isinstance(slash.pattern, VerticalSlash)
    assert isinstance(local.pattern, AShape)
    assert max(grid.cost, slash.cost, local.cost) < 0.65
    assert min(grid.recall, slash.recall, local.recall) > 0.95
    assert isinstance(uniform.pattern, Dense)  # nothing sparse serves a head without structure


def test_a_modality_dependent_head_gets_a_two_d_boundary() -> None:
    x = by_modality(3072)
    result = searched(x)
    found = best_within(result, 0, 0.6)
    assert isinstance(found.pattern, ByModality)
    assert found.pattern.boundary == "2d"
    assert found.recall > 0.95
    plain = searched(x, candidates=dataclasses.replace(CANDIDATES, boundaries=("none",)))
    assert best_within(plain, 0, found.cost).error > 2 * found.error


def test_rows_of_one_modality_can_stay_dense() -> None:
    ids = interleaved()
    made = structured_qkv([{VIDEO: Structure(local=40), TEXT: Structure()}], LENGTH, head_dim=64, modality=ids[0])
    g = Geometry(1, 1, 1, LENGTH, LENGTH)
    x = LayerInput(made.q, made.k, made.v, g, made.scale, ids, (TEXT, VIDEO))
    result = searched(x, candidates=dataclasses.replace(CANDIDATES, boundaries=("q",)))
    mixed = [s for s in result.heads[0] if isinstance(s.pattern, ByModality)]
    assert any(s.pattern.pattern(TEXT) == Dense() != s.pattern.pattern(VIDEO) and s.error < 0.1 for s in mixed)


def test_modalities_that_no_prompt_has_stay_dense() -> None:
    x = dataclasses.replace(by_modality(), labels=(TEXT, 1, VIDEO))
    for scored in searched(x).heads[0]:
        if isinstance(scored.pattern, ByModality):
            places = [1] if scored.pattern.boundary == "q" else [(1, 0), (1, 1), (1, 2), (0, 1), (2, 1)]
            for place in places:
                pair = place if isinstance(place, tuple) else (place,)
                assert scored.pattern.pattern(*pair) == Dense()


def test_the_ladder_reaches_what_hand_picked_candidates_do() -> None:
    x = planted()
    ladder = Candidates.ladder(LENGTH, LENGTH, CPU_TILES, strides=(64,))
    kinds = {p.name for p in ladder.plain}
    assert kinds == {"a_shape", "tri_shape", "vertical_slash", "grid", "block_topk"}
    assert all(not isinstance(p, BlockTopK) for p in ladder.regions)
    result = searched(x, candidates=ladder)
    assert all(cheapest(result, h, 0.1).cost < 0.65 for h in range(3))


def test_candidates_that_no_region_can_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="block_topk within a boundary"):
        Candidates((), (BlockTopK(k=4),))
    with pytest.raises(ValueError, match="boundary '3d'"):
        Candidates((), (), ("none", "3d"))
    assert Candidates.from_json(CANDIDATES.to_json()) == CANDIDATES


def test_the_search_is_deterministic() -> None:
    assert searched(by_modality()) == searched(by_modality())


# --- the numbers are true


def direct(x: LayerInput, heads: list[HeadPattern], h: int, rows: slice = slice(None)) -> tuple[float, float]:
    """Relative error, and share of the dense tiles, of one head by the definition of a plan."""
    g = x.geometry
    if x.ids is not None:
        plan = build_bounded_plan(heads, x.q, x.k, g, x.scale, CPU_TILES, segment(x.ids, x.labels, g, CPU_TILES))
    else:
        plan = build_plan(heads, x.q, x.k, g, x.scale, CPU_TILES)  # type: ignore[arg-type]
    out = attention_reference(x.q, x.k, x.v, plan.to_mask(), x.scale)[0, h, rows]
    exact = attention_reference(x.q, x.k, x.v, g.to_mask()[:, None], x.scale)[0, h, rows]
    return float((out - exact).norm() / exact.norm()), float(plan.density()[0, h])


def test_errors_and_densities_are_those_of_the_plan() -> None:
    x = planted(768)
    result = searched(x, rows="all")
    for h in range(4):
        for scored in result.heads[h]:
            error, density = direct(x, [scored.pattern] * 4, h)
            assert scored.error == pytest.approx(error, rel=1e-3, abs=1e-5)
            assert scored.density == pytest.approx(density, rel=1e-6)


def test_what_is_put_together_from_modalities_has_the_error_of_the_whole() -> None:
    x = by_modality()
    result = searched(x, rows="all")
    kinds = {s.pattern.boundary for s in result.heads[0] if isinstance(s.pattern, ByModality)}
    assert "2d" in kinds
    for scored in result.heads[0]:
        error, density = direct(x, [scored.pattern], 0)
        assert scored.error == pytest.approx(error, rel=1e-3, abs=1e-5)
        assert scored.density == pytest.approx(density, rel=1e-6)


def test_the_last_rows_can_be_all_that_counts() -> None:
    x = planted()
    last, both, everything = (searched(x, rows=rows) for rows in ("last", "both", "all"))
    pattern = AShape(64, 64)
    for h in range(4):
        errors = [next((s.error for s in r.heads[h] if s.pattern == pattern), None) for r in (last, both, everything)]
        if None in errors:
            continue
        assert errors[0] == pytest.approx(direct(x, [pattern] * 4, h, slice(-256, None))[0], rel=1e-3)
        assert errors[1] ** 2 == pytest.approx((errors[0] ** 2 + errors[2] ** 2) / 2, rel=1e-3)


def test_recall_is_the_mass_on_the_plan() -> None:
    x = planted()
    prompt = Prompt.of(x, Measuring(COSTS, dense_tail=False))
    pattern = VerticalSlash(16, 16)
    found = prompt.measure([pattern] * 4).recall.sum(-1)
    plan = build_plan([pattern] * 4, x.q, x.k, x.geometry, x.scale, CPU_TILES)
    mass = probabilities_reference(x.q, x.k, x.geometry.to_mask()[:, None], x.scale) * plan.to_mask()
    assert torch.allclose(found.float(), mass.sum(-1)[0, :, prompt.recall_rows].mean(-1), atol=1e-4)


def test_dense_costs_one_and_misses_nothing() -> None:
    measured = Prompt.of(planted(), Measuring(COSTS)).measure([Dense()] * 4)
    assert torch.allclose(measured.cost, torch.ones(4, 1).double(), rtol=1e-5)
    assert torch.allclose(measured.density, torch.ones(4, 1).double())
    assert float(measured.error.max()) < 1e-10
    assert torch.allclose(measured.recall, torch.ones(4, 1).double())


def test_a_sample_of_the_rows_gives_nearly_the_same() -> None:
    for x in (planted(4096), by_modality(4096)):
        heads = [AShape(64, 64)] * x.geometry.q_heads if x.ids is None else [CANDIDATE_2D]
        whole, some = (
            Prompt.of(x, Measuring(COSTS, "all", rows_at_most=rows)).measure(heads) for rows in (1 << 30, 1024)
        )
        errors = [measured.error.sum(-1).sqrt() for measured in (whole, some)]
        assert torch.allclose(*errors, rtol=0.2)
        assert torch.equal(whole.cost, some.cost)
        assert torch.equal(whole.recall, some.recall)


CANDIDATE_2D = ByModality("2d", AShape(0, 64), (((VIDEO, VIDEO), VerticalSlash(0, 8)),))


def test_the_dense_tail_is_what_plans_have_at_run_time() -> None:
    x = by_modality()
    g = x.geometry
    plan = build_bounded_plan(
        [CANDIDATE_2D], x.q, x.k, g, x.scale, CPU_TILES, segment(x.ids, x.labels, g, CPU_TILES)
    )  # fmt: skip
    kept, before, model = keep_tail(plan).to_mask(), plan.to_mask(), g.to_mask()[:, None]
    assert torch.equal(kept[:, :, -64:], model[:, :, -64:])
    assert bool((before <= kept).all())
    assert bool((kept <= model).all())
    order = keep_tail(plan)
    out = attention_reference(x.q, x.k, x.v, kept, x.scale)
    from mmi_compile.kernels.cpu import attention_cpu

    assert torch.allclose(attention_cpu(x.q, x.k, x.v, order, x.scale), out, atol=1e-5)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4), step=st.integers(2, 6),
)  # fmt: skip
def test_weights_of_a_sample_add_up_to_all_tiles(sizes: list[int], step: int) -> None:
    sizes = [*sizes[:-1], sizes[-1] + 1]
    groups = torch.tensor([m for m, size in enumerate(sizes) for _ in range(size)])[None]
    tiles = groups.shape[1]
    plan = dense_plan(Geometry(1, 1, 1, tiles * 4, tiles * 4), TileShape(4, 4), "cpu")
    weight = tile_weights(plan, groups, len(sizes), step)
    for m, size in enumerate(sizes):
        mine = weight[groups == m]
        if size > 2 * step + 2:  # enough for one tile to be drawn
            assert float(mine.sum()) == pytest.approx(size)
            assert int((mine > 0).sum()) <= size / step + step + 3
        assert bool((mine[-2:] == 1).all())
    if len(sizes) == 1:
        assert torch.equal(tile_weights(plan, None, 1, step), weight)


@given(seed=st.integers(0, 300))
def test_pairs_of_some_rows_are_those_of_the_mask(seed: int) -> None:
    plan = random_plan(seed)
    g = plan.geometry
    rows = torch.arange(0, g.q_len, 3)
    assert torch.equal(row_mask(plan, rows.expand(g.batch, -1)), plan.to_mask()[:, :, rows])


@pytest.mark.gpu
def test_a_gpu_finds_the_same_kinds_of_patterns() -> None:
    x = planted(8192)
    q, k, v = (t.cuda().bfloat16() for t in (x.q, x.k, x.v))
    result = search_layer(LayerInput(q, k, v, x.geometry, x.scale), strides=(64,))
    # Large tiles hold a few lines of a grid at the price of one column block, so that columns may win against it.
    for h, kinds in enumerate([(Grid, VerticalSlash), (VerticalSlash,), (AShape, TriShape)]):
        found = cheapest(result, h, 0.15)
        assert isinstance(found.pattern, kinds)
        assert found.density < 0.5
    assert result == search_layer(LayerInput(q, k, v, x.geometry, x.scale), strides=(64,))
    bounded = by_modality(4096)
    on_gpu = [t.cuda().bfloat16() for t in (bounded.q, bounded.k, bounded.v)]
    ids = None if bounded.ids is None else bounded.ids.cuda()
    two_d = search_layer(LayerInput(*on_gpu, bounded.geometry, bounded.scale, ids, bounded.labels))
    assert any(isinstance(s.pattern, ByModality) and s.pattern.boundary == "2d" for s in two_d.heads[0])


# --- odd inputs


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str) -> None:
    x = planted(1024)
    start, stop = (256, 1024) if side == "left" else (0, 768)
    bounds = {"kv_start": torch.tensor([start]).int(), "kv_stop": torch.tensor([stop]).int()}
    padded = dataclasses.replace(x, geometry=dataclasses.replace(x.geometry, **bounds))
    live = slice(start, stop)
    g = Geometry(1, 4, 4, 768, 768)
    alone = LayerInput(x.q[:, :, live], x.k[:, :, live], x.v[:, :, live], g, x.scale)
    a, b = (Prompt.of(one, Measuring(COSTS)).measure([AShape(64, 128)] * 4) for one in (padded, alone))
    assert torch.allclose(a.error, b.error, rtol=1e-3, atol=1e-9)
    assert torch.allclose(a.recall, b.recall, atol=0.03)  # rows between are spread over padding too


def test_a_batch_is_searched_as_one() -> None:
    x = planted(1024)
    twice = LayerInput(
        *(torch.cat([t, t]) for t in (x.q, x.k, x.v)), dataclasses.replace(x.geometry, batch=2), x.scale
    )  # fmt: skip
    a, b = (Prompt.of(one, Measuring(COSTS)).measure([AShape(64, 128)] * 4) for one in (x, twice))
    for one, two in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-9)


def test_nan_is_refused() -> None:
    x = planted(512)
    x.k[0, 1, 17, 3] = float("nan")
    with pytest.raises(HeadSearchError, match="NaN or infinity; check the model's weights"):
        searched(x)


def test_short_prompts_are_refused() -> None:
    with pytest.raises(HeadSearchError, match="too short: 255 queries"):
        searched(planted(255))
    with pytest.raises(ValueError, match="at least one"):
        search_layer([])


def test_several_prompts_are_merged() -> None:
    a, b = planted(), planted(1024)
    one, two, mean, most = (
        searched(*inputs, merge=merge, candidates=Candidates((AShape(64, 64),)))
        for inputs, merge in (((a,), "mean"), ((b,), "mean"), ((a, b), "mean"), ((a, b), "max"))
    )
    for h in range(4):
        errors = [r.heads[h][0].error for r in (one, two, mean, most)]
        assert errors[2] ** 2 == pytest.approx((errors[0] ** 2 + errors[1] ** 2) / 2)
        assert errors[3] == pytest.approx(max(errors[:2]))


def test_a_prompt_without_some_modality_can_be_merged() -> None:
    x = by_modality()
    text = dataclasses.replace(x, ids=torch.zeros_like(x.ids))
    result = searched(x, text)
    assert all(math.isfinite(s.error) and 0 <= s.recall <= 1 for s in result.heads[0])


def test_surveys_survive_json_exactly() -> None:
    searcher = Searcher(CANDIDATES, Measuring(COSTS))
    survey = searcher.survey(by_modality())
    again = Survey.from_json(survey.to_json())
    for field in dataclasses.fields(Survey):
        assert torch.equal(getattr(survey, field.name), getattr(again, field.name))


# --- choosing

points = st.lists(st.tuples(st.integers(0, 20).map(float), st.integers(0, 20).map(float)), min_size=1, max_size=12)


@given(points=points, price=st.floats(0, 10))
def test_a_hull_holds_the_best_point_at_every_price(points: list[tuple[float, float]], price: float) -> None:
    hull = lower_hull(points)
    costs, errors = ([points[i][part] for i in hull] for part in (0, 1))
    assert costs == sorted(set(costs))
    assert errors == sorted(set(errors), reverse=True)
    best = min(error + price * cost for cost, error in points)
    assert min(points[i][1] + price * points[i][0] for i in hull) == pytest.approx(best)


@given(hulls=st.lists(points, min_size=1, max_size=3))
def test_a_walk_takes_every_step_once(hulls: list[list[tuple[float, float]]]) -> None:
    hulls = [[one[i] for i in lower_hull(one)] for one in hulls]
    steps = walk(hulls)
    assert steps[0] == (0,) * len(hulls)
    assert steps[-1] == tuple(len(hull) - 1 for hull in hulls)
    assert all(sum(b) - sum(a) == 1 for a, b in itertools.pairwise(steps))


def layer(*heads: list[tuple[float, float]], weights: tuple[float, ...] | None = None) -> LayerResult:
    """Heads as lists of (cost, error); dense is added."""
    scored = [
        pareto([*(Scored(AShape(0, i + 1), e, 1 - e, c, c) for i, (c, e) in enumerate(head)),
                Scored(Dense(), 0.0, 1.0, 1.0, 1.0)])
        for head in heads
    ]  # fmt: skip
    return LayerResult(tuple(scored), weights or (1.0,) * len(heads))


curves = st.lists(
    st.lists(st.tuples(st.floats(0.01, 0.9), st.floats(0.01, 1.0)), min_size=1, max_size=4), min_size=1, max_size=4
)


@given(heads=curves, budget=st.floats(0.05, 1.0), mode=st.sampled_from(["share", "equal"]))
def test_no_choice_exceeds_the_budget(heads: list[list[tuple[float, float]]], budget: float, mode: str) -> None:
    result = layer(*heads)
    cheapest = [head[0].cost for head in result.heads]
    least = max(cheapest) if mode == "equal" else sum(cheapest) / len(cheapest)
    if least > budget + 1e-9:
        with pytest.raises(HeadSearchError, match="cannot be met"):
            choose([result], budget, mode=mode)  # type: ignore[arg-type]
        return
    if least > budget - 1e-9:
        return
    choice = choose([result], budget, mode=mode)  # type: ignore[arg-type]
    assert choice.cost <= budget + 1e-9
    if mode == "equal":
        assert all(s.cost <= budget for s in choice.heads[0])


@given(heads=curves, budget=st.floats(0.3, 1.0))
def test_choices_are_close_to_the_best_there_is(heads: list[list[tuple[float, float]]], budget: float) -> None:
    result = layer(*heads)
    options = list(itertools.product(*result.heads))
    fitting = [o for o in options if sum(s.cost for s in o) <= budget * len(o) + 1e-12]
    if not fitting:
        return
    best = min(sum(s.error**2 for s in o) for o in fitting)
    choice = choose([result], budget)
    found = sum(s.error**2 for s in choice.heads[0])
    # A greedy walk misses the optimum by less than the one step that did not fit.
    largest = max(head[0].error ** 2 for head in result.heads)
    assert best - 1e-12 <= found <= best + largest + 1e-12


def test_sensitive_heads_get_more() -> None:
    easy, hard = [(0.1, 0.01), (0.4, 0.005)], [(0.1, 0.9), (0.4, 0.1), (0.8, 0.01)]
    choice = choose([layer(easy, hard), layer(easy)], 0.35)
    assert choice.heads[0][1].cost == 0.8
    assert choice.heads[0][0].cost == choice.heads[1][0].cost == 0.1
    equal = choose([layer(easy, hard), layer(easy)], 0.35, mode="equal")
    assert equal.error > choice.error


def test_heads_with_more_of_the_output_get_more() -> None:
    curve = [(0.1, 0.5), (0.5, 0.1)]
    choice = choose([layer(curve, curve, weights=(1.9, 0.1))], 0.3)
    assert [s.cost for s in choice.heads[0]] == [0.5, 0.1]


def test_more_budget_never_hurts() -> None:
    result = searched(planted())
    errors = [choose([result], budget).error for budget in (0.4, 0.5, 0.6, 0.8, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.01, float("nan")])
def test_budgets_are_shares(budget: float) -> None:
    with pytest.raises(ValueError, match="share of dense"):
        choose([layer([(0.1, 0.1)])], budget)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match='"share" or "equal"'):
        choose([layer([(0.1, 0.1)])], 0.5, mode="fair")  # type: ignore[arg-type]


def test_a_budget_below_the_cheapest_names_what_is_needed() -> None:
    with pytest.raises(HeadSearchError, match=r"take 0\.2 .* give 0\.20 or more, or longer"):
        choose([layer([(0.2, 0.1)])], 0.1)
