"""Plans of heads that treat modalities apart, against masks made token by token from the rules they came from."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmi_compile.kernels.boundaries import Part, build_bounded_plan, estimate_parts
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import AShape, ByModality, Dense, Grid, HeadPattern, Pattern, TriShape, VerticalSlash
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.planner import build_plan
from mmi_compile.kernels.segments import Segments, segment
from tests.kernels.test_segments import interleavings
from tests.random_plans import check_contract
from tests.strategies import geometries, random_inputs, tile_shapes

SCALE = 0.3
small = st.integers(0, 12)


def patterns() -> st.SearchStrategy[Pattern]:
    local = st.integers(1, 12)
    return st.one_of(
        st.just(Dense()),
        st.builds(AShape, small, local),
        st.builds(TriShape, small, local, small),
        st.builds(VerticalSlash, small, local),
        st.builds(Grid, st.integers(1, 20), small, local, same_phase=st.booleans()),
    )


def head_patterns() -> st.SearchStrategy[HeadPattern]:
    by_rows = st.lists(st.tuples(st.integers(0, 4), patterns()), max_size=3).map(tuple)
    pair = st.tuples(st.integers(0, 4), st.integers(0, 4))
    by_region = st.lists(st.tuples(pair, patterns()), max_size=4).map(tuple)
    return st.one_of(
        patterns(),
        st.builds(ByModality, st.just("q"), patterns(), by_rows),
        st.builds(ByModality, st.just("2d"), patterns(), by_region),
    )


def kept(part: Part, segments: Segments, g: Geometry) -> torch.Tensor:
    """Pairs that the rules of one part keep, bool ``[B, HQ, q_len, kv_len]``, before the model's mask."""
    i, j = torch.arange(g.q_len) + g.q_offset, torch.arange(g.kv_len)
    seen = segments.seen[:, :, (i + 1).clamp(max=g.kv_len)]  # [B, M, q_len]
    if part.key is None:
        row, column = i.expand(g.batch, -1), j.expand(g.batch, -1)
        mine = torch.ones(g.batch, g.kv_len, dtype=torch.bool)
    else:
        row, column = seen[:, part.key].long() - 1, segments.rank.long()
        mine = segments.group == part.key
    rules, origin = part.rules, 0
    if part.key is None and (live := g.live_keys("cpu")) is not None:
        origin = torch.where(live, j, g.kv_len).amin(-1)[:, None, None]
    distance = row[:, :, None] - column[:, None, :]  # [B, q_len, kv_len]
    own = seen[:, part.query] - 1  # rank of the row among its own kind
    masks = []
    for h in range(g.q_heads):
        keep = (column[:, None, :] < origin + rules.sink[h]) | (distance < rules.local[0, h])
        keep = keep | (own >= segments.counts[:, part.query, None] - part.last[h])[..., None]
        for entries, where in ((rules.columns, column[:, None, :]), (rules.distances, distance)):
            if entries is not None:
                for b in range(g.batch):
                    listed = [x for x in entries[min(b, len(entries) - 1), h].tolist() if x >= 0]
                    keep[b] |= torch.isin(where[b].expand(keep.shape[1:]), torch.tensor(listed))
        masks.append(keep & mine[:, None, :])
    return torch.stack(masks, 1)


def check(heads: list[HeadPattern], ids: torch.Tensor, g: Geometry, tiles: TileShape, labels: tuple[int, ...]) -> Plan:
    x = random_inputs(g)
    segments = segment(ids, labels, g, tiles)
    plan = build_bounded_plan(heads, x.q, x.k, g, SCALE, tiles, segments)
    check_contract(plan)
    mask, model = plan.to_mask(), g.to_mask()[:, None]
    assert not (mask & ~model).any()
    live = model.any(-1).expand(mask.shape[:3])
    assert mask.any(-1)[live].all(), "a live row sees nothing"
    if len(labels) == 1:
        return plan
    kinds = torch.nn.functional.pad(
        ids[:, g.q_offset : g.q_offset + g.q_len], (0, max(0, g.q_len + g.q_offset - g.kv_len))
    )
    for part in estimate_parts(heads, x.q, x.k, g, SCALE, tiles, segments):
        label = labels[part.query]
        rows = (kinds == label) | ((part.query == 0) & ~torch.isin(kinds, torch.tensor(labels)))
        wanted = kept(part, segments, g) & model & rows[:, None, :, None]
        for h in part.heads:
            assert not (wanted[:, h] & ~mask[:, h]).any(), (part.query, part.key, h)
    return plan


@settings(deadline=None)
@given(geometries(), tile_shapes(), st.data())
def test_plans_cover_the_rules_of_every_region(geometry: Geometry, tiles: TileShape, data: st.DataObject) -> None:
    ids = data.draw(interleavings(geometry))
    labels = tuple(sorted(data.draw(st.sets(st.integers(0, 4), min_size=1, max_size=3))))
    heads = [data.draw(head_patterns()) for _ in range(geometry.q_heads)]
    check(heads, ids, geometry, tiles, labels)


def interleaved(length: int, frame: int = 40, stamp: int = 6) -> torch.Tensor:
    """Video frames with a text time stamp after each."""
    return ((torch.arange(length) % (frame + stamp)) < frame).to(torch.int8)[None]


def test_with_one_modality_boundaries_are_none() -> None:
    g, tiles = Geometry(1, 3, 1, 300, 300), TileShape(32, 16)
    x, ids = random_inputs(g), torch.full((1, 300), 2, dtype=torch.int8)
    pattern = VerticalSlash(20, 10)
    plain = build_plan([pattern] * 3, x.q, x.k, g, SCALE, tiles).to_mask()
    heads: list[HeadPattern] = [ByModality("q", pattern), ByModality("2d", pattern), pattern]
    bounded = build_bounded_plan(heads, x.q, x.k, g, SCALE, tiles, segment(ids, (2,), g, tiles))
    assert torch.equal(bounded.to_mask(), plain)


def test_names_of_modalities_do_not_matter() -> None:
    g, tiles = Geometry(1, 2, 1, 400, 400), TileShape(32, 16)
    x, ids = random_inputs(g), interleaved(400)
    masks = []
    for video, text in ((1, 0), (0, 1), (3, 7)):
        named = torch.where(ids == 1, video, text).to(torch.int8)
        heads: list[HeadPattern] = [
            ByModality("q", AShape(8, 16), ((video, VerticalSlash(20, 10)),)),
            ByModality("2d", AShape(8, 16), (((video, video), Grid(40, 0, 16)), ((text, video), VerticalSlash(9, 3)))),
        ]
        segments = segment(named, tuple(sorted((video, text))), g, tiles)
        masks.append(build_bounded_plan(heads, x.q, x.k, g, SCALE, tiles, segments).to_mask())
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_regions_reach_a_recall_that_one_pattern_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    # The example prints this as a table; what it claims is held here.
    path = Path(__file__).resolve().parents[2] / "examples" / "boundaries.py"
    with patch("sys.argv", [str(path)]):
        runpy.run_path(str(path), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    reached = {(boundary, int(n)): (float(recall), float(density)) for boundary, n, recall, density in rows}
    assert reached["2d", 4][0] >= 0.95
    assert reached["2d", 4][0] > reached["q", 4][0] > reached["none", 4][0]
    dearer = [recall for (boundary, _), (recall, density) in reached.items()
              if boundary == "none" and reached["2d", 4][1] < density < 2 * reached["2d", 4][1]]  # fmt: skip
    assert dearer
    assert max(dearer) < 0.8


def test_bad_patterns_are_named() -> None:
    with pytest.raises(ValueError, match='give "q" or "2d"'):
        ByModality("k", Dense())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a modality id"):
        ByModality("q", Dense(), (((0, 1), Dense()),))
    with pytest.raises(ValueError, match="rows are grouped already"):
        ByModality("q", Grid(16, 0, 1, query_lines=True))
    g, tiles = Geometry(1, 2, 1, 32, 32), TileShape(16, 16)
    x = random_inputs(g)
    with pytest.raises(ValueError, match="got 1 patterns for 2 query heads"):
        build_bounded_plan([Dense()], x.q, x.k, g, SCALE, tiles, segment(interleaved(32), (0, 1), g, tiles))


def test_planning_takes_no_part_of_heads_without_boundaries() -> None:
    g, tiles = Geometry(1, 2, 1, 200, 200), TileShape(16, 16)
    x = random_inputs(g)
    plan = build_bounded_plan(
        [AShape(4, 8)] * 2, x.q, x.k, g, SCALE, tiles, segment(interleaved(200), (0, 1), g, tiles)
    )
    assert plan.row_order is None
    assert plan.key_order is None
    same = build_plan([AShape(4, 8)] * 2, x.q, x.k, g, SCALE, tiles)
    for field in dataclasses.fields(plan):
        ours, theirs = getattr(plan, field.name), getattr(same, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
