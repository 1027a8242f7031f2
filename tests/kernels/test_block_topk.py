"""``block_topk``: which key blocks are chosen, against scores made pair by pair, and what choosing them may cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmi_compile.kernels import block_topk
from mmi_compile.kernels.block_topk import block_masses, list_width
from mmi_compile.kernels.cpu import attention_cpu
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import MOST_BLOCKS, AShape, BlockTopK, Grid, VerticalSlash
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.planner import TileShape, build_plan
from mmi_compile.kernels.reference import attention_reference, probabilities_reference
from mmi_compile.kernels.rules import estimate_rules
from mmi_compile.kernels.structured import Structure, structured_qkv
from tests.kernels.test_planner import assert_invariants, block_topks, only_region
from tests.strategies import geometries, random_inputs, tile_shapes

SCALE = 0.3
NEAR = 1e-6


def groups(length: int, block: int, size: int) -> list[list[range]]:
    """The groups of every block."""
    blocks = [range(start, min(start + block, length)) for start in range(0, length, block)]
    return [[one[at : at + size] for at in range(0, len(one), size)] for one in blocks]


def group_score(
    dots: Tensor, rows: range, keys: range, live: tuple[list[bool], list[bool]], stride: int
) -> float | None:
    """Mean of the scores ``dots`` that stand for a pair of groups; None without a live pair."""
    if stride:
        # Query `stride - 1 - s` of its group meets key `s`.
        pairs = [(i, keys[s]) for at, i in enumerate(rows) if (s := stride - 1 - at) < len(keys)]
    else:
        pairs = [(i, j) for i in rows for j in keys]
    found = [float(dots[i, j]) for i, j in pairs if live[0][i] and live[1][j]]
    return sum(found) / len(found) if found else None


def reference_masses(q: Tensor, k: Tensor, g: Geometry, scale: float, tiles: TileShape, pattern: BlockTopK) -> Tensor:
    """Block masses of one query head ``q [q_len, D]``, ``k [kv_len, D]`` for each batch element: ``[B, QT, KB]``."""
    stride = min(pattern.stride, tiles.block_m, tiles.block_n) if pattern.scoring == "antidiagonal" else 0
    query_groups = groups(g.q_len, tiles.block_m, stride or tiles.block_m)
    key_groups = groups(g.kv_len, tiles.block_n, stride or tiles.block_n)
    masses = torch.zeros(g.batch, len(query_groups), len(key_groups), dtype=torch.float64)
    live_keys = g.live_keys("cpu")
    for b in range(g.batch):
        keys_live = [True] * g.kv_len if live_keys is None else live_keys[b].tolist()
        rows_live = [r + g.q_offset >= g.kv_len or keys_live[r + g.q_offset] for r in range(g.q_len)]
        dots = q[b].double() @ k[b].double().mT * scale
        for t, tile in enumerate(query_groups):
            parts = []
            for rows in tile:
                low, high = rows[0] + g.q_offset, rows[-1] + g.q_offset
                scores: dict[tuple[int, int], float] = {}
                for n, block in enumerate(key_groups):
                    for at, keys in enumerate(block):
                        score = group_score(dots, rows, keys, (rows_live, keys_live), stride)
                        hidden = keys[0] > high or (g.window and low - keys[-1] >= g.window)
                        if score is not None and not hidden:
                            scores[n, at] = score
                if scores:
                    shares = torch.tensor(list(scores.values()), dtype=torch.float64).softmax(0).tolist()
                    part = torch.zeros(len(key_groups), dtype=torch.float64)
                    for (n, _), share in zip(scores, shares, strict=True):
                        part[n] += share
                    parts.append(part)
            if parts:
                masses[b, t] = torch.stack(parts).mean(0)
    return masses


def assert_chosen(pattern: BlockTopK, masses: Tensor, free: range, chosen: list[int], whole: bool, near: float) -> None:
    """That the blocks of one tile are the ones that the pattern asks for, where rounding leaves no doubt."""
    key_blocks = masses.shape[0]
    candidates = sorted((float(masses[n]) for n in free if masses[n] > 0), reverse=True)
    forced = float(masses.sum()) - sum(candidates)
    assert set(chosen) <= set(free)
    if pattern.mass is not None:
        most = min(max(key_blocks // 4, 8), MOST_BLOCKS)
        needed = pattern.mass * float(masses.sum()) - forced
        lacks = needed - sum(candidates[:most])
        if whole:
            assert len(candidates) > most
            assert lacks > -near
            return
        assert len(candidates) <= most or lacks < near
        counts = [n for n in range(min(most, len(candidates)) + 1) if sum(candidates[:n]) >= needed - near]
        more = [n for n in counts if sum(candidates[:n]) >= needed + near]
        assert counts[0] <= len(chosen) <= (more[0] if more else len(candidates))
    else:
        assert not whole
        assert pattern.k is not None
        assert len(chosen) == min(pattern.k, len(candidates))
    rest = [float(masses[n]) for n in free if n not in chosen]
    if chosen and rest:
        assert min(float(masses[n]) for n in chosen) >= max(rest) - near


def check_choice(pattern: BlockTopK, q: Tensor, k: Tensor, g: Geometry, tiles: TileShape, near: float) -> None:
    chosen = [pattern] * g.q_heads
    rules = estimate_rules(chosen, q, k, g, SCALE, tiles).blocks
    record = only_region(build_plan([AShape(pattern.sink, pattern.local)] * g.q_heads, q, k, g, SCALE, tiles))
    assert rules is not None
    for h in range(g.q_heads):
        masses = reference_masses(q[:, h], k[:, h // g.group], g, SCALE, tiles, pattern)
        for b in range(g.batch):
            for t in range(masses.shape[1]):
                listed = [n for n in rules.entries[b, h, t].tolist() if n < masses.shape[2]]
                assert listed == sorted(set(listed))
                free = range(int(record.sink_stop[b, h, t]), int(record.window_start[b, h, t]))
                whole = rules.whole is not None and bool(rules.whole[b, h, t])
                assert_chosen(pattern, masses[b, t], free, listed, whole, near)


@given(geometries(max_len=45), tile_shapes(), block_topks(), st.integers(0, 99))
def test_masses_are_the_shares_of_scores_made_pair_by_pair(
    geometry: Geometry, tiles: TileShape, pattern: BlockTopK, seed: int
) -> None:
    g, x = geometry, random_inputs(geometry, seed=seed, sharpness=2.0)
    heads = tuple(range(g.q_heads))
    expected = torch.stack(
        [reference_masses(x.q[:, h], x.k[:, h // g.group], g, SCALE, tiles, pattern) for h in heads], 1
    )
    got = torch.zeros_like(expected)
    for slots, part, masses in block_masses([pattern] * g.q_heads, heads, x.q, x.k, g, SCALE, tiles):
        got[:, slots, part.start : part.stop, : masses.shape[-1]] = masses
    torch.testing.assert_close(got, expected)


@given(geometries(max_len=45), tile_shapes(), block_topks(), st.integers(0, 99))
def test_choice_is_the_best_by_scores_made_pair_by_pair(
    geometry: Geometry, tiles: TileShape, pattern: BlockTopK, seed: int
) -> None:
    x = random_inputs(geometry, seed=seed, sharpness=2.0)
    check_choice(pattern, x.q, x.k, geometry, tiles, NEAR)


@pytest.mark.parametrize("pattern", [BlockTopK(k=3, local=1, sink=0), BlockTopK(mass=0.4, local=1, sink=0)])
@pytest.mark.parametrize("scoring", ["mean", "antidiagonal"])
@pytest.mark.parametrize("length", [512, 500])
def test_choice_in_many_blocks(pattern: BlockTopK, scoring: str, length: int) -> None:
    g = Geometry(1, 2, 1, length, length)
    x = random_inputs(g, dtype=torch.bfloat16, sharpness=3.0)
    fields = {"k": pattern.k, "mass": pattern.mass, "local": 1, "sink": 0, "stride": 8}
    check_choice(BlockTopK(scoring=scoring, **fields), x.q, x.k, g, TileShape(16, 16), 1e-4)  # type: ignore[arg-type]


@given(geometries(), tile_shapes(), st.lists(block_topks(), min_size=6, max_size=6), st.integers(0, 99))
def test_kernel_is_the_reference_over_lists_of_its_own(
    geometry: Geometry, tiles: TileShape, chosen: list[BlockTopK], seed: int
) -> None:
    x = random_inputs(geometry, seed=seed, sharpness=3.0)
    others = [VerticalSlash(5, 3), Grid(7, 2, 3, query_lines=True)]
    mixed = [(*chosen, *others)[(h + seed) % 8] for h in range(geometry.q_heads)]
    plan = build_plan(mixed, x.q, x.k, geometry, SCALE, tiles)
    assert_invariants(plan)
    got = attention_cpu(x.q, x.k, x.v, plan, SCALE)
    torch.testing.assert_close(got, attention_reference(x.q, x.k, x.v, plan.to_mask(), SCALE), rtol=1e-9, atol=1e-10)


@given(geometries(paddings=("left", "right", "both", "holes")), tile_shapes(), block_topks(), st.integers(0, 99))
def test_padding_enters_no_score(geometry: Geometry, tiles: TileShape, pattern: BlockTopK, seed: int) -> None:
    g, x = geometry, random_inputs(geometry, seed=seed)
    live = g.live_keys("cpu")
    assert live is not None
    positions = torch.ones(g.batch, max(g.q_len + g.q_offset, g.kv_len), dtype=torch.bool)
    positions[:, : g.kv_len] = live
    rows = positions[:, g.q_offset : g.q_offset + g.q_len]
    chosen = [pattern] * g.q_heads
    plan = build_plan(chosen, x.q, x.k, g, SCALE, tiles)
    q = x.q.masked_fill(~rows[:, None, :, None], torch.nan)
    k = x.k.masked_fill(~live[:, None, :, None], torch.nan)
    poisoned = build_plan(chosen, q, k, g, SCALE, tiles)
    assert torch.equal(plan.tiles, poisoned.tiles)
    assert torch.equal(plan.lists, poisoned.lists)


def planted_blocks(length: int, block: int, per_tile: int, head_dim: int = 64) -> tuple[Tensor, Tensor]:
    """Queries and keys whose tiles attend to ``per_tile`` blocks of their past and hardly anywhere else."""
    generator = torch.Generator().manual_seed(3)
    blocks = length // block
    kinds = torch.nn.functional.normalize(torch.randn(blocks, head_dim, generator=generator), dim=-1)
    asks = torch.zeros(blocks, head_dim)
    for t in range(1, blocks):
        asks[t] = kinds[torch.randint(0, t, (per_tile,), generator=generator)].sum(0)
    noise = torch.randn(2, length, head_dim, generator=generator) * 0.05
    q = asks.repeat_interleave(block, 0) * 14 + noise[0]
    return q[None, None], (kinds.repeat_interleave(block, 0) + noise[1])[None, None]


def recall(plan: Plan, q: Tensor, k: Tensor, scale: float) -> float:
    """Share of full attention on the pairs of the plan, over all rows of all heads."""
    full = probabilities_reference(q, k, plan.geometry.to_mask()[:, None], scale)
    return float((full * plan.to_mask()).sum() / full.sum())


@pytest.mark.parametrize("scoring", ["mean", "antidiagonal"])
@pytest.mark.parametrize("size", [{"k": 3}, {"mass": 0.95}])
def test_planted_blocks_are_found(scoring: str, size: dict[str, Any]) -> None:
    q, k = planted_blocks(1024, 32, 2)
    g, tiles = Geometry(1, 1, 1, 1024, 1024), TileShape(32, 32)
    pattern = BlockTopK(**size, scoring=scoring, stride=8, local=1, sink=32)
    plan = build_plan([pattern], q, k, g, 1.0, tiles)
    assert recall(plan, q, k, 1.0) > 0.95
    assert float(plan.density()[0, 0]) < 0.4
    without = build_plan([AShape(pattern.sink, pattern.local)], q, k, g, 1.0, tiles)
    assert recall(without, q, k, 1.0) < 0.5


@pytest.mark.parametrize("structure", [Structure(columns=(100, 555)), Structure(distances=(301,))])
def test_antidiagonals_cross_columns_and_diagonals_at_odd_distances(structure: Structure) -> None:
    g, tiles = Geometry(1, 1, 1, 1024, 1024), TileShape(32, 32)
    x = structured_qkv([structure], 1024, head_dim=64)
    pattern = BlockTopK(k=4, scoring="antidiagonal", stride=8, local=32, sink=32)
    q, k = x.q.float(), x.k.float()
    assert recall(build_plan([pattern], q, k, g, x.scale, tiles), q, k, x.scale) > 0.9


def test_a_tile_that_needs_more_than_the_cap_is_dense() -> None:
    g, tiles = Geometry(1, 1, 1, 640, 640), TileShape(16, 16)
    x = random_inputs(g, sharpness=0.01)  # attention is nearly uniform
    plan = build_plan([BlockTopK(mass=0.9, local=1, sink=16)], x.q, x.k, g, SCALE, tiles)
    assert_invariants(plan)
    r, cap = only_region(plan), 10
    assert (r.window_start[0, 0, 15:] == 0).all()
    assert (r.num_blocks[0, 0, 15:] == 0).all()
    assert (r.num_blocks <= cap).all()
    assert (r.num_blocks > 0).any()


@given(geometries(max_len=60), tile_shapes(), st.sampled_from(["mean", "antidiagonal"]), st.integers(1, 4))
def test_larger_counts_and_targets_keep_more(geometry: Geometry, tiles: TileShape, scoring: str, k: int) -> None:
    x = random_inputs(geometry)

    def mask(**size: Any) -> Tensor:
        pattern = BlockTopK(**size, scoring=scoring, stride=4, local=2, sink=1)
        return build_plan([pattern] * geometry.q_heads, x.q, x.k, geometry, SCALE, tiles).to_mask()

    assert not (mask(k=k) & ~mask(k=k + 2)).any()
    assert (mask(mass=0.2 * k).sum((-1, -2)) <= mask(mass=0.2 * k + 0.15).sum((-1, -2))).all()


@given(geometries(), tile_shapes(), block_topks(), st.integers(1, 3000))
def test_chunks_do_not_change_the_choice(geometry: Geometry, tiles: TileShape, pattern: BlockTopK, limit: int) -> None:
    g, x = geometry, random_inputs(geometry)
    other = BlockTopK(k=2, local=3, sink=0)
    chosen = [other if h == 1 else pattern for h in range(g.q_heads)]
    plan = build_plan(chosen, x.q, x.k, g, SCALE, tiles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_topk, "SCORE_LIMIT", limit)
        chunked = build_plan(chosen, x.q, x.k, g, SCALE, tiles)
    assert torch.equal(plan.tiles, chunked.tiles)
    assert torch.equal(plan.lists, chunked.lists)


class Largest(TorchDispatchMode):
    """``most`` elements in a tensor that an operator returned."""

    most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and all(tensor.stride()):  # an expanded view holds nothing new
                self.most = max(self.most, tensor.numel())
        return result


@pytest.mark.parametrize("scoring", ["mean", "antidiagonal"])
@pytest.mark.parametrize("length", [4096, 4000])
def test_scores_stay_below_the_limit(scoring: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = Geometry(1, 2, 1, length, length)
    x = random_inputs(g, dtype=torch.float32, head_dim=4)
    limit = 1 << 15
    monkeypatch.setattr(block_topk, "SCORE_LIMIT", limit)
    with Largest() as seen:
        build_plan([BlockTopK(k=4, scoring=scoring)] * 2, x.q, x.k, g, SCALE, TileShape(32, 32))
    assert seen.most <= max(limit, x.q.numel())
    assert seen.most < (length // 16) ** 2


def test_allocation_depends_on_the_configuration_alone() -> None:
    g, tiles = Geometry(1, 2, 1, 512, 512), TileShape(16, 16)
    chosen = [BlockTopK(k=5), BlockTopK(mass=0.7, scoring="antidiagonal")]
    plans = []
    for sharpness in (0.0, 1.0, 9.0):
        x = random_inputs(g, sharpness=sharpness)
        plans.append(build_plan(chosen, x.q, x.k, g, SCALE, tiles))
    assert len({plan.lists.shape for plan in plans}) == 1
    assert plans[0].lists.numel() == 2 * 32 * 8
    assert plans[0].columns.shape[-1] == 0
    assert plans[0].list_bits is None


@pytest.mark.parametrize(
    ("pattern", "share"), [(BlockTopK(k=64), 0.007), (BlockTopK(k=512), 0.05), (BlockTopK(mass=0.9), 0.05)]
)
def test_lists_are_small_beside_the_inputs(pattern: BlockTopK, share: float) -> None:
    tokens, heads, kv_heads, head_dim = 1 << 20, 28, 4, 128
    lists = heads * (tokens // 128) * list_width([pattern], tokens // 128) * 4
    assert lists <= share * tokens * (heads + 2 * kv_heads) * head_dim * 2


def test_the_same_inputs_give_the_same_plan() -> None:
    g, tiles = Geometry(1, 4, 2, 300, 300), TileShape(16, 16)
    x = random_inputs(g, dtype=torch.bfloat16, sharpness=0.0)  # every block ties with every other
    chosen = [BlockTopK(k=3), BlockTopK(mass=0.5), BlockTopK(k=3, scoring="antidiagonal"), AShape(16, 16)]
    first, second = (build_plan(chosen, x.q, x.k, g, SCALE, tiles) for _ in range(2))
    assert_invariants(first)
    assert torch.equal(first.tiles, second.tiles)
    assert torch.equal(first.lists, second.lists)


def test_other_heads_keep_their_shared_lists() -> None:
    g, tiles = Geometry(1, 3, 1, 640, 640), TileShape(16, 16)
    x = random_inputs(g)
    slash = VerticalSlash(20, 12)
    alone = build_plan([slash] * 3, x.q, x.k, g, SCALE, tiles)
    mixed = build_plan([slash, BlockTopK(k=4, local=16, sink=16), slash], x.q, x.k, g, SCALE, tiles)
    assert_invariants(mixed)
    assert torch.equal(alone.to_mask()[:, ::2], mixed.to_mask()[:, ::2])
    assert (only_region(mixed).list_base[0, 1] == 0).all()
    assert (only_region(mixed).num_columns[0, 1] == 0).all()
    assert (only_region(mixed).num_blocks[0, 1, 10:] == 4).all()
    assert mixed.lists.numel() == alone.lists.numel() + 40 * 4
