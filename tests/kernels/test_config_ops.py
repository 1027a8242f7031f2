"""The operators under a head config: ``mmi::segments`` and ``mmi::attention`` with heads."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmi_compile import runtime
from mmi_compile.decision import MMIError
from mmi_compile.kernels import dispatch
from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.layer_heads import LayerHeads, names_to_text, parse_heads, translated
from mmi_compile.kernels.ops import ABI
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
from mmi_compile.kernels.planner import build_plan, keep_tail
from mmi_compile.kernels.probe import probe_rows
from mmi_compile.kernels.reference import attention_reference
from mmi_compile.kernels.segments import segment
from tests.harness import relative_error
from tests.host_waits import NoHostWaits
from tests.kernels.test_boundaries import head_patterns
from tests.kernels.test_ops import PADDINGS, padding_of, qkv
from tests.kernels.test_segments import interleavings
from tests.launches import launches
from tests.random_plans import check_contract
from tests.strategies import geometries, random_inputs, tile_shapes

mmi = torch.ops.mmi
TILES = TileShape(16, 16)
NAMES = ((0, "text"), (1, "image"), (2, "video"))
MIXED = (
    AShape(2, 8),
    ByModality("q", AShape(2, 8), ((1, VerticalSlash(6, 4)),)),
    ByModality("2d", AShape(1, 6), (((1, 1), Grid(8, 0, 4)), ((0, 1), Dense()))),
    TriShape(2, 8, 5),
)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "CPU_TILES", TILES)


def ids_of(batch: int, tokens: int) -> Tensor:
    return (torch.arange(tokens) // 7 % 3).to(torch.int8).expand(batch, -1).contiguous()


def group(q: Tensor, ids: Tensor, live: Tensor | None = None, offset: int = 0, names: Any = NAMES) -> list[Tensor]:
    bounds = None if live is None else mmi.key_bounds(live)
    made: list[Tensor] = mmi.segments(q, ids, live, bounds, offset, names_to_text(names), "no graph", ABI)
    return made


def attend(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, segments: list[Tensor], live: Tensor | None = None, *,
    heads: tuple[HeadPattern, ...] = MIXED, offset: int = 0, window: int = 0, dense_tail: bool = False,
) -> Tensor:  # fmt: skip
    bounds = None if live is None else mmi.key_bounds(live)
    text = LayerHeads(heads, NAMES).to_text()
    out: Tensor = mmi.attention(
        q, k, v, live, bounds, ids, segments, 0.25, offset, window, "config", 0.95, 0.5, 0, dense_tail, text, 3, "bshd",
        "test_config_ops/0", ABI,
    )  # fmt: skip
    return out


def expected(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, live: Tensor | None = None, *,
    heads: tuple[HeadPattern, ...] = MIXED, offset: int = 0, window: int = 0, dense_tail: bool = False,
) -> Tensor:  # fmt: skip
    kv_len = min(k.shape[2], q.shape[2] + offset)
    g = Geometry(
        q.shape[0], q.shape[1], k.shape[1], q.shape[2], kv_len, offset, window,
        key_padding=None if live is None else live[:, :kv_len],
    )  # fmt: skip
    k, v, groups = k[:, :, :kv_len], v[:, :, :kv_len], segment(ids[:, :kv_len], (0, 1, 2), g, TILES)
    plan = build_bounded_plan(heads, q, k, g, 0.25, TILES, groups, dense_tail=dense_tail)
    return attention_reference(q, k, v, plan.to_mask(), 0.25)


# --- what the compiler relies on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize(("offset", "batch"), [(0, 2), (5, 1)])
def test_opcheck(padding, offset, batch):
    q, k, v = qkv(37, 37 + offset, batch=batch)
    live, ids = padding_of(padding, batch, 37 + offset), ids_of(batch, 37 + offset)
    bounds = None if live is None else mmi.key_bounds(live)
    given_segments = (q, ids, live, bounds, offset, names_to_text(NAMES), "no graph", ABI)
    torch.library.opcheck(mmi.segments.default, given_segments)
    heads = LayerHeads(MIXED, NAMES).to_text()
    torch.library.opcheck(
        mmi.attention.default,
        (
            q, k, v, live, bounds, ids, mmi.segments(*given_segments), 0.25, offset, 0, "config", 0.95, 0.5, 0, True,
            heads, 3, "bshd", "test_config_ops/0", ABI,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("q_len", "keys", "offset"), [(37, 37, 0), (20, 50, 30), (16, 64, 0), (48, 40, 0), (0, 5, 5), (5, 0, 0)]
)
@pytest.mark.parametrize("names", [NAMES, NAMES[1:], ((15, "own"),)])
def test_fakes_have_the_shapes_of_the_real_results(q_len, keys, offset, names):
    q, ids = qkv(q_len, keys)[0], ids_of(2, keys)
    real = group(q, ids, offset=offset, names=names)
    with FakeTensorMode() as mode:
        fake = group(mode.from_tensor(q), mode.from_tensor(ids), offset=offset, names=names)
    assert [(x.shape, x.dtype, x.stride()) for x in fake] == [(x.shape, x.dtype, x.stride()) for x in real]


def test_a_graph_of_another_version_is_refused():
    with pytest.raises(MMIError, match="compile it again"):
        mmi.segments(qkv(5)[0], ids_of(2, 5), None, None, 0, names_to_text(NAMES), "no graph", ABI - 1)


# --- what they compute --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("past", "window"), [(0, 0), (0, 40), (30, 0)])
@pytest.mark.parametrize("dense_tail", [True, False])
def test_attention_is_that_of_the_plan(padding, past, window, dense_tail):
    q, k, v = qkv(133, 133 + past, dtype=torch.float64)
    live, ids = padding_of(padding, 2, 133 + past), ids_of(2, 133 + past)
    rest = {"offset": past, "window": window, "dense_tail": dense_tail}
    want = expected(q, k, v, ids, live, **rest)
    shared = group(q, ids, live, past)
    assert relative_error(attend(q, k, v, ids, shared, live, **rest), want) < 1e-12
    assert relative_error(attend(q, k, v, ids, [], live, **rest), want) < 1e-12


@pytest.mark.parametrize("padding", ["none", "left"])
def test_heads_without_boundaries_need_no_modality(padding):
    q, k, v = qkv(133, dtype=torch.float64)
    live = padding_of(padding, 2, 133)
    heads = (BlockTopK(k=1, local=8, sink=8), Grid(9, 2, 8, query_lines=True), AShape(4, 8), Grid(None, 2, 8))
    want = expected(q, k, v, ids_of(2, 133), live, heads=heads, dense_tail=True)
    assert relative_error(attend(q, k, v, None, [], live, heads=heads, dense_tail=True), want) < 1e-12


def test_a_grouping_for_other_tiles_is_made_anew(monkeypatch):
    q, k, v = qkv(133, dtype=torch.float64)
    ids = ids_of(2, 133)
    monkeypatch.setattr(dispatch, "CPU_TILES", TileShape(32, 64))
    other = group(q, ids)
    monkeypatch.setattr(dispatch, "CPU_TILES", TILES)
    assert relative_error(attend(q, k, v, ids, other), expected(q, k, v, ids)) < 1e-12


def test_keys_beyond_the_last_row_are_ignored():
    q, k, v = qkv(60, 90, dtype=torch.float64)
    ids = ids_of(2, 90)
    assert relative_error(attend(q, k, v, ids, group(q, ids)), expected(q, k, v, ids)) < 1e-12


def test_nothing_waits_for_the_device_and_layers_share_the_grouping():
    q, k, v = qkv(133)
    ids = ids_of(2, 133)
    shared = group(q, ids)
    attend(q, k, v, ids, shared)
    heads = parse_heads(LayerHeads(MIXED, NAMES).to_text())
    g = Geometry(2, 4, 2, 133, 133)

    def plan(segments: list[Tensor]) -> None:
        from mmi_compile.kernels.ops import _configured

        found = _configured(heads.to_text(), True, ids, segments, g, runtime.Prompt())
        dispatch.configured_plan(q, k, g, 0.25, TILES, found)

    plan(shared)
    with NoHostWaits():
        group(q, ids)
        with_sharing, alone = launches(lambda: plan(shared)), launches(lambda: plan([]))
    assert alone - with_sharing >= 40


def test_what_ran_is_recorded():
    q, k, v = qkv(133)
    ids = ids_of(2, 133)
    attend(q, k, v, ids, group(q, ids))
    ran = runtime.attention_run("test_config_ops/0")
    assert ran is not None
    assert ran.heads[1] == "q(image: vertical_slash(6, 4), else: a_shape(2, 8))"
    assert ran.heads[2] == "2d(image→image: grid(8, 0, 4), text→image: dense, else: a_shape(1, 6))"
    assert isinstance(ran.density, Tensor)
    assert ran.density.shape == (2, 4)
    attend(q, k, v, None, [])
    ran = runtime.attention_run("test_config_ops/0")
    assert ran is not None
    assert ran.notes == ("the modality of this prompt is not known: every token counts as text",)


def test_heads_must_be_those_of_the_layer():
    q, k, v = qkv(133)
    with pytest.raises(ValueError, match="got 2 patterns for 4 query heads"):
        attend(q, k, v, ids_of(2, 133), [], heads=MIXED[:2])


# --- the last rows ------------------------------------------------------------------------------------------------


@given(geometries(), tile_shapes(), st.data())
def test_the_last_rows_keep_every_key_and_the_others_what_they_kept(
    geometry: Geometry, tiles: TileShape, data: st.DataObject
) -> None:
    g, x = geometry, random_inputs(geometry)
    ids = data.draw(interleavings(g))
    heads = [data.draw(head_patterns()) for _ in range(g.q_heads)]
    groups = segment(ids, (0, 1, 2), g, tiles)
    sparse, kept = (
        build_bounded_plan(heads, x.q, x.k, g, 0.3, tiles, groups, dense_tail=tail).to_mask() for tail in (False, True)
    )
    model = g.to_mask()[:, None].expand_as(kept)
    assert not (sparse & ~kept).any()
    assert not (kept & ~model).any()
    for b, rows in enumerate(probe_rows(g, torch.device("cpu")).tolist()):
        assert torch.equal(kept[b, :, rows], model[b, :, rows])


@given(geometries(windows=False), st.sampled_from([TileShape(16, 16), TileShape(8, 4)]))
def test_the_last_rows_of_chosen_blocks_and_query_lines(geometry: Geometry, tiles: TileShape) -> None:
    g, x = geometry, random_inputs(geometry)
    kinds: list[Any] = [BlockTopK(k=1, local=4, sink=4), Grid(7, 2, 4, query_lines=True), AShape(2, 4)]
    plan = build_plan([kinds[h % 3] for h in range(g.q_heads)], x.q, x.k, g, 0.3, tiles)
    check_contract(plan)
    check_contract(keep_tail(plan))
    sparse, kept, model = plan.to_mask(), keep_tail(plan).to_mask(), g.to_mask()
    assert not (sparse & ~kept).any()
    for b, rows in enumerate(probe_rows(g, torch.device("cpu")).tolist()):
        assert (kept[b, :, rows] == model[b, rows]).all()


def test_the_tail_of_plain_plans_is_that_of_the_adaptive_policy():
    from mmi_compile.kernels.search_frame import probe_frame

    for g in (Geometry(1, 2, 1, 300, 300), Geometry(1, 2, 1, 300, 300, kv_stop=torch.tensor([200], dtype=torch.int32))):
        x = random_inputs(g)
        plain = build_plan([AShape(1, 1)] * 2, x.q, x.k, g, 0.3, TILES)
        more = (keep_tail(plain).work() != plain.work()).any(1)
        assert torch.equal(more, probe_frame(g, TILES, torch.device("cpu")).tail[:, 0])


# --- the constant -------------------------------------------------------------------------------------------------


def names_each_once(pattern: HeadPattern) -> bool:
    """A head config refuses others."""
    places = [place for place, _ in pattern.patterns] if isinstance(pattern, ByModality) else []
    return len(set(places)) == len(places)


@given(st.lists(head_patterns().filter(names_each_once), min_size=1, max_size=6).map(tuple))
def test_heads_survive_their_text(patterns):
    heads = LayerHeads(patterns, NAMES)
    assert parse_heads(heads.to_text()) == heads
    assert parse_heads(heads.to_text()) is parse_heads(LayerHeads(patterns, NAMES).to_text())


def test_equal_heads_are_written_once():
    text = LayerHeads((Dense(),) * 28, ()).to_text()
    assert json.loads(text) == {"modalities": [], "heads": [[28, {"pattern": "dense"}]]}


@pytest.mark.parametrize(
    ("config", "prompt", "table", "note"),
    [
        (NAMES, {}, {0: 0, 1: 1, 2: 2, 3: 0, 5: 0}, ""),
        (((0, "text"), (1, "video")), {}, {0: 0, 1: 0, 2: 1}, ""),
        (((0, "text"), (1, "frames")), {}, {1: 1, 2: 0}, ""),
        (((0, "text"), (1, "vision"), (5, "depth")), {4: "vision", 5: "depth"}, {4: 1, 5: 5}, ""),
        (NAMES, {4: "vision"}, {4: 0}, "vision tokens run as text: the config does not know them"),
        (((7, "own"),), {}, {0: 0, 7: 7, 8: 0}, ""),
        (((1, "text"), (0, "image")), {}, {0: 1, 1: 0}, ""),
    ],
)
def test_ids_are_matched_by_name(config, prompt, table, note):
    found, said = translated(config, prompt)
    assert {number: found[number] for number in table} == table
    assert said == note
