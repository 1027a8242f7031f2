"""Grouping by modality, against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.segments import Segments, segment
from tests.host_waits import NoHostWaits
from tests.launches import launches
from tests.strategies import geometries, tile_shapes


@st.composite
def interleavings(draw: st.DrawFn, geometry: Geometry) -> torch.Tensor:
    """Modality ids of random runs: from one segment in all to one-token segments; some ids never occur."""
    g = geometry
    ids = []
    for _ in range(g.batch):
        row: list[int] = []
        longest = draw(st.sampled_from([1, 3, 20, max(1, g.kv_len)]))
        while len(row) < g.kv_len:
            row += [draw(st.integers(0, 4))] * draw(st.integers(1, longest))
        ids.append(row[: g.kv_len])
    return torch.tensor(ids, dtype=torch.int8).view(g.batch, g.kv_len)


def check(s: Segments, ids: torch.Tensor, g: Geometry, tiles: TileShape) -> None:
    live = g.live_keys("cpu")
    labels = s.labels
    for b in range(g.batch):
        kinds = [labels.index(m) if m in labels else 0 for m in ids[b].tolist()]
        alive = [live is None or bool(live[b, j]) for j in range(g.kv_len)]
        groups: list[list[int]] = [[] for _ in labels]
        for j, kind in enumerate(kinds):
            for m in range(len(labels)):
                assert int(s.seen[b, m, j]) == len(groups[m])
            assert int(s.group[b, j]) == (kind if alive[j] else -1)
            if alive[j]:
                assert int(s.rank[b, j]) == len(groups[kind])
                groups[kind].append(j)
        assert s.counts[b].tolist() == [len(x) for x in groups] == s.seen[b, :, -1].tolist()
        for m, keys in enumerate(groups):
            start = int(s.key_start[b, m])
            assert start % tiles.block_n == 0
            assert s.key_order[b, start : start + len(keys)].tolist() == keys
        assert int((s.key_order[b] >= 0).sum()) == sum(alive)
        rows = s.row_order[b].view(-1, tiles.block_m)
        assert sorted(rows[rows >= 0].tolist()) == list(range(g.q_len))
        for t, tile in enumerate(rows):
            mine = tile[tile >= 0].tolist()
            assert mine == sorted(mine)
            of = {kinds[r + g.q_offset] if r + g.q_offset < g.kv_len else 0 for r in mine}
            assert of <= {int(s.tile_group[b, t])}
        order = [r for r in s.row_order[b].tolist() if r >= 0]
        kind_of = [kinds[r + g.q_offset] if r + g.q_offset < g.kv_len else 0 for r in order]
        assert kind_of == sorted(kind_of)


@given(geometries(), tile_shapes(), st.data())
def test_grouping_is_what_loops_over_tokens_make(geometry: Geometry, tiles: TileShape, data: st.DataObject) -> None:
    ids = data.draw(interleavings(geometry))
    labels = tuple(sorted(data.draw(st.sets(st.integers(0, 4), min_size=1))))
    check(segment(ids, labels, geometry, tiles), ids, geometry, tiles)


def test_thousands_of_segments_cost_no_more_launches() -> None:
    g, tiles = Geometry(1, 1, 1, 6000, 6000), TileShape(128, 128)
    few = torch.zeros(1, 6000, dtype=torch.int8)
    many = (torch.arange(6000) % 3 == 0).to(torch.int8)[None]
    segment(few, (0, 1), g, tiles)
    with NoHostWaits():
        counts = [launches(lambda ids=ids: segment(ids, (0, 1), g, tiles)) for ids in (few, many)]  # type: ignore[misc]
    assert counts[0] == counts[1] <= 55
    check(segment(many, (0, 1), g, tiles), many, g, tiles)


def test_bad_input_is_named() -> None:
    g = Geometry(1, 1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"are \(1, 7\), must be \[B, keys\] = \[1, 8\]"):
        segment(torch.zeros(1, 7), (0,), g, TileShape(16, 16))
    for labels in ((), (1, 0), (1, 1)):
        with pytest.raises(ValueError, match="ascending"):
            segment(torch.zeros(1, 8), labels, g, TileShape(16, 16))
