"""The laws of a plan, against loops over single pairs that follow its contract word by word."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.plan import RECORD, Plan, TileRecord, causal_tiles
from tests.random_plans import random_plan


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    block_m, block_n = draw(st.sampled_from([(16, 16), (8, 4), (5, 7), (4, 16)]))
    return random_plan(draw(st.integers(0, 9999)), block_m=block_m, block_n=block_n, max_len=40)


@dataclasses.dataclass(frozen=True)
class Region:
    """One query tile in one region: its place ``b, h, tile, region``, the record, the key in each slot (-1: none)."""

    plan: Plan
    place: tuple[int, ...]
    record: dict[str, int]
    keys: list[int]

    @property
    def listed(self) -> list[int]:
        first, r = self.record["list_start"], self.record
        return [r["list_base"] + int(e) for e in self.plan.lists[first : first + r["num_blocks"]]]

    @property
    def window(self) -> list[int]:
        return list(range(self.record["window_start"], self.record["window_stop"]))

    @property
    def sinks(self) -> list[int]:
        return list(range(self.record["sink_start"], self.record["sink_stop"]))

    @property
    def columns(self) -> list[int]:
        b, h, _, _ = self.place
        first = self.record["column_start"]
        return self.plan.columns[b, h, first : first + self.record["num_columns"]].tolist()

    @property
    def rows(self) -> list[int]:
        """The tile's rows, without empty slots."""
        b, h, t, _ = self.place
        size = self.plan.block_m
        if self.plan.row_order is None:
            return list(range(t * size, min((t + 1) * size, self.plan.geometry.q_len)))
        return [row for row in self.plan.row_order[b, h, t * size : (t + 1) * size].tolist() if row >= 0]

    def in_block(self, block: int) -> list[int]:
        size = self.plan.block_n
        return [key for key in self.keys[block * size : (block + 1) * size] if key >= 0]


def regions(plan: Plan) -> Iterator[Region]:
    g = plan.geometry
    for place in itertools.product(*map(range, plan.tiles.shape[:4])):
        record = dict(zip(TileRecord._fields, plan.tiles[place].tolist(), strict=True))
        keys = list(range(g.kv_len))
        if record["grouped"]:
            assert plan.key_order is not None
            keys = plan.key_order[place[0]].tolist()
        yield Region(plan, place, record, keys)


def allowed(g: Geometry) -> list[list[list[bool]]]:
    """The model's own mask, pair by pair."""

    def live(b: int, j: int) -> bool:
        after = g.kv_start is None or int(g.kv_start[b]) <= j
        before = g.kv_stop is None or j < int(g.kv_stop[b])
        return after and before and (g.key_padding is None or bool(g.key_padding[b, j]))

    def sees(i: int, j: int) -> bool:
        return j <= i and (g.window == 0 or i - j < g.window)

    alive = [[live(b, j) for j in range(g.kv_len)] for b in range(g.batch)]
    return [
        [[alive[b][j] and sees(row + g.q_offset, j) for j in range(g.kv_len)] for row in range(g.q_len)]
        for b in range(g.batch)
    ]


@given(plans())
def test_the_mask_is_what_the_tiles_visit_and_the_model_allows(plan: Plan) -> None:
    g, model = plan.geometry, allowed(plan.geometry)
    expected = torch.zeros(g.batch, g.q_heads, g.q_len, g.kv_len, dtype=torch.bool)
    for region in regions(plan):
        b, h, _, _ = region.place
        blocks = [*region.window, *region.sinks, *region.listed]
        visited = {key for n in blocks for key in region.in_block(n)} | set(region.columns)
        for row, key in itertools.product(region.rows, visited):
            expected[b, h, row, key] = model[b][row][key]
    assert torch.equal(plan.to_mask(), expected)


@given(plans())
def test_visited_blocks_are_windows_sinks_and_lists(plan: Plan) -> None:
    listed, visited = plan.listed_blocks(), plan.visited_blocks()
    assert listed.shape == visited.shape == (*plan.tiles.shape[:4], plan.key_blocks)
    for region in regions(plan):
        assert listed[region.place].nonzero().flatten().tolist() == region.listed
        blocks = {*region.window, *region.sinks, *region.listed}
        assert visited[region.place].nonzero().flatten().tolist() == sorted(blocks)


@given(plans())
def test_no_pair_is_visited_twice(plan: Plan) -> None:
    """Blocks are different ones, columns lie outside, and the bits tell which column a listed block owns."""
    seen: dict[tuple[int, ...], set[int]] = {}
    for region in regions(plan):
        before = seen.setdefault(region.place[:3], set())
        blocks = [*region.window, *region.sinks, *region.listed]
        assert len(blocks) == len(set(blocks))
        of_blocks = {key for n in blocks for key in region.in_block(n)}
        of_lists = {key for n in region.listed for key in region.in_block(n)}
        columns = region.columns
        assert len(columns) == len(set(columns))
        assert not set(columns) & (of_blocks - of_lists)
        if columns and region.listed:
            assert [key in of_lists for key in columns] == bits_of_columns(region)
        assert not before & (of_blocks | set(columns))
        before |= of_blocks | set(columns)


def bits_of_columns(region: Region) -> list[bool]:
    plan, r = region.plan, region.record
    b, h, _, _ = region.place
    assert plan.list_bits is not None
    slots = plan.columns if plan.column_slots is None else plan.column_slots
    bits = []
    for slot in slots[b, h, r["column_start"] : r["column_start"] + r["num_columns"]].tolist():
        away = abs(slot // plan.block_n - r["list_base"])
        bits.append(bool(int(plan.list_bits[r["bits_start"] + away // 32]) >> (away % 32) & 1))
    return bits


@given(plans())
def test_untested_pairs_are_allowed(plan: Plan) -> None:
    """Only windows are tested for causality, and of them only what lies outside ``window_left ... window_full``."""
    g, model = plan.geometry, allowed(plan.geometry)
    for region in regions(plan):
        r, b = region.record, region.place[0]
        edges = [r[f"window_{name}"] for name in ("start", "left", "full", "stop")]
        assert edges == sorted(edges)
        assert r["sink_start"] <= r["sink_stop"] <= r["window_start"]
        assert region.listed == sorted(region.listed)
        assert all(r["sink_stop"] <= n < r["window_start"] for n in region.listed)
        inner = [key for n in range(r["window_left"], r["window_full"]) for key in region.in_block(n)]
        assert all(model[b][row][key] for row in region.rows for key in inner)
        outer = [key for n in (*region.sinks, *region.listed) for key in region.in_block(n)] + region.columns
        assert all(key <= row + g.q_offset for row in region.rows for key in outer)


@given(plans())
def test_work_counts_blocks_and_columns_in_whole_tiles(plan: Plan) -> None:
    expected = torch.zeros(plan.tiles.shape[:3], dtype=torch.int32)
    for region in regions(plan):
        blocks = len(region.window) + len(region.sinks) + len(region.listed)
        expected[region.place[:3]] += blocks + -(-len(region.columns) // plan.block_n)
    assert torch.equal(plan.work(), expected)
    tiles = causal_tiles(plan.geometry, plan.block_m, plan.block_n)
    torch.testing.assert_close(plan.density(), expected.sum(-1) / tiles)


@given(plans())
def test_the_schedule_runs_every_tile_once_by_key_head_and_longest_first(plan: Plan) -> None:
    g, order = plan.geometry, plan.schedule()
    assert order.dtype == torch.int32
    assert sorted(order.tolist()) == list(range(g.batch * g.q_heads * plan.query_tiles))
    per_key_head = g.group * plan.query_tiles
    work = plan.work().flatten().tolist()
    for n in range(g.batch * g.kv_heads):
        part = order[n * per_key_head : (n + 1) * per_key_head].tolist()
        assert sorted(part) == list(range(n * per_key_head, (n + 1) * per_key_head))
        assert [work[tile] for tile in part] == sorted((work[tile] for tile in part), reverse=True)


@given(plans())
def test_every_row_of_every_head_has_one_slot(plan: Plan) -> None:
    g, rows = plan.geometry, plan.rows()
    assert rows.shape == (g.batch, g.q_heads, plan.query_tiles, plan.block_m)
    for head in rows.flatten(0, 1):
        assert sorted(row for row in head.flatten().tolist() if row >= 0) == list(range(g.q_len))


@given(st.integers(1, 50), st.integers(0, 20), st.integers(0, 3), st.integers(1, 9), st.integers(1, 9))
def test_causal_tiles_are_those_that_hold_a_causal_pair(q: int, offset: int, short: int, bm: int, bn: int) -> None:
    kv_len = max(1, q + offset - short)
    mask = Geometry(1, 1, 1, q, kv_len, offset).to_mask()[0]
    tiles = {(i // bm, j // bn) for i, j in mask.nonzero().tolist()}
    assert causal_tiles(Geometry(1, 1, 1, q, kv_len, offset), bm, bn) == len(tiles)


def test_a_grouped_plan_by_hand() -> None:
    """Keys 0 1 4 5 6 are of one modality, 2 and 3 of another; two rows a tile, two keys a block."""
    g = Geometry(1, 1, 1, 7, 7)
    order = torch.tensor([[0, 1, 4, 5, 6, -1, 2, 3]], dtype=torch.int32)
    tiles = torch.zeros(1, 1, 4, 2, RECORD, dtype=torch.int32)
    record = TileRecord(*tiles.unbind(-1))
    record.grouped.fill_(1)
    # The last tile, row 6: key 6 is in the window, keys 0 and 1 are sinks; of the other modality key 3 is a column.
    last = TileRecord(*(field[0, 0, 3] for field in record))
    last.window_start[0], last.window_left[0], last.window_full[0], last.window_stop[0] = 2, 2, 2, 3
    last.sink_stop[0] = 1
    for field in (last.window_start, last.window_left, last.window_full, last.window_stop):
        field[1] = 4
    last.num_columns[1], last.column_start[1] = 1, 1
    columns = torch.tensor([[[2, 3]]], dtype=torch.int32)
    plan = Plan(g, 2, 2, tiles, torch.empty(0, dtype=torch.int32), columns, key_order=order)
    assert plan.regions == 2
    assert plan.key_blocks == 4
    assert plan.to_mask()[0, 0, 6].nonzero().flatten().tolist() == [0, 1, 3, 6]
    assert not plan.to_mask()[0, 0, :6].any()
    assert plan.work().tolist() == [[[0, 0, 0, 3]]]
    assert plan.density().item() == pytest.approx(3 / causal_tiles(g, 2, 2))
