"""The search among boundaries: its probe against the softmax, plans against masks, choices against what is there."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmi_compile.kernels import part_search
from mmi_compile.kernels.adaptive import Boundaries, HeadChoice, adaptive_plan
from mmi_compile.kernels.cost import Coefficients
from mmi_compile.kernels.dispatch import tiles_for
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.part_probe import CHOOSE, KINDS, part_rows, parts_of, run_part_probe
from mmi_compile.kernels.part_search import assemble, search_parts, why_no_parts
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.reference import attention_reference, probabilities_reference
from mmi_compile.kernels.run import families, family_tiles, run_plan
from mmi_compile.kernels.search_frame import Prices
from mmi_compile.kernels.segments import Segments, segment
from mmi_compile.kernels.spread_probe import SPREAD_GROUPS
from mmi_compile.kernels.structured import Structure, structured_qkv
from tests.harness import relative_error
from tests.host_waits import NoHostWaits
from tests.random_plans import check_contract
from tests.strategies import random_inputs

LABELS = ("text", "vision")
EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "boundaries.py"))
"""Its ``attention``: video looks 320 *video* tokens back, text at the text before it."""
TILES = TileShape(32, 32)


def prompt(tokens: int, seed: int, *, frame: int = 64, longest: int = 80, batch: int = 1) -> Tensor:
    """Frames of video between texts of different lengths, int8 ``[batch, tokens]``."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        row: list[int] = []
        while len(row) < tokens:
            row += [1] * frame + [0] * int(torch.randint(1, longest, (), generator=generator))
        rows.append(row[:tokens])
    return torch.tensor(rows, dtype=torch.int8)


def choose(
    q: Tensor, k: Tensor, ids: Tensor, boundaries: Sequence[str], *, recall: float, tiles: TileShape = TILES,
    **rest: Any,
) -> tuple[Plan, HeadChoice, Geometry, Segments]:  # fmt: skip
    batch, heads, rows = q.shape[:3]
    g = Geometry(batch, heads, k.shape[1], rows, k.shape[2], q_offset=k.shape[2] - rows)
    segments = segment(ids, (0, 1), g, tiles)
    options: dict[str, Any] = {"dense_tail": False, "groups": SPREAD_GROUPS} | rest
    plan, choice = adaptive_plan(
        q, k, g, 1.0, tiles, recall=recall, boundaries=Boundaries(tuple(boundaries), segments, LABELS), **options
    )
    return plan, choice, g, segments


def kept_share(q: Tensor, k: Tensor, g: Geometry, plan: Plan) -> Tensor:
    """Share of each row's probability on the plan's pairs, ``[B, HQ, q_len]``."""
    return (probabilities_reference(q, k, g.to_mask()[:, None], 1.0) * plan.to_mask()).sum(-1)


@pytest.mark.parametrize("boundaries", [("2d",), ("q", "2d")])
def test_what_is_regular_among_video_tokens_is_found(boundaries: tuple[str, ...]) -> None:
    ids = prompt(4096, seed=0)
    q, k = EXAMPLE["attention"](ids, torch.Generator())
    plan, choice, g, _ = choose(q, k, ids, boundaries, recall=0.9)
    check_contract(plan)
    assert choice.boundary.item() == len(boundaries)
    assert not choice.sparse.item(), "one pattern for the whole matrix cannot have it"
    assert choice.density.item() < 0.2
    assert kept_share(q, k, g, plan).mean() >= 0.9
    assert choice.describe()[0][0].startswith("2d(text→text: ")


def text_looks_at_columns(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Video looks around itself; text, which the prompt ends with, at some tokens all over the prompt."""
    ids = prompt(tokens, seed, frame=256, longest=40)
    ids[:, -64:] = 0
    text = (ids[0] == 0).float()
    x = structured_qkv([Structure(distances=(0,))], tokens, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(tokens)
    chosen[torch.randperm(tokens, generator=generator)[: tokens // 20]] = 1.0
    q = torch.cat([x.q * x.q.shape[-1] ** -0.5, (text * 9.0)[None, None, :, None]], -1)
    k = torch.cat([x.k, chosen[None, None, :, None]], -1)
    return q, k, ids


def test_only_the_rows_that_need_columns_take_them() -> None:
    q, k, ids = text_looks_at_columns(4096, seed=1)
    tiles = TileShape(32, 16)
    plan, choice, g, _ = choose(q, k, ids, ("q",), recall=0.9, tiles=tiles)
    check_contract(plan)
    _, none = adaptive_plan(q, k, g, 1.0, tiles, recall=0.9, dense_tail=False)
    assert choice.boundary.item() == 1
    assert choice.density.item() < none.density.item()
    kept = kept_share(q, k, g, plan)[0, 0]
    for kind in (0, 1):
        assert kept[ids[0] == kind].mean() >= 0.88


def cases() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({
        "seed": st.integers(0, 999),
        "tokens": st.sampled_from([40, 150, 333]),
        "past": st.sampled_from([0, 0, 37]),
        "heads": st.sampled_from([(1, 1), (3, 1), (4, 2)]),
        "batch": st.sampled_from([1, 2]),
        "frame": st.sampled_from([1, 7, 64, 500]),
        "recall": st.sampled_from([0.3, 0.6, 0.9]),
        "tiles": st.sampled_from([TileShape(16, 16), TileShape(32, 16), TileShape(16, 32), TileShape(64, 64)]),
        "boundaries": st.sampled_from([("q",), ("2d",), ("q", "2d")]),
        "dense_tail": st.booleans(),
    })  # fmt: skip


@given(cases())
def test_plans_are_lawful_and_keep_what_they_say(case: dict[str, Any]) -> None:
    heads, kv_heads = case["heads"]
    g = Geometry(case["batch"], heads, kv_heads, case["tokens"], case["tokens"] + case["past"], q_offset=case["past"])
    x = random_inputs(g, seed=case["seed"], sharpness=6.0)
    ids = prompt(g.kv_len, case["seed"], frame=case["frame"], longest=30, batch=g.batch)
    segments, model = segment(ids, (0, 1), g, case["tiles"]), g.to_mask()[:, None]
    shared: dict[str, Any] = {"recall": case["recall"], "dense_tail": case["dense_tail"]}
    plain, _ = adaptive_plan(x.q, x.k, g, 1.0, case["tiles"], groups=16, **shared)
    found = search_parts(
        x.q, x.k, g, 1.0, case["tiles"], segments, boundaries=case["boundaries"], prices=Prices(),
        columns=plain.columns.shape[-1], **shared,
    )  # fmt: skip
    rows = part_rows(segments, g, case["tiles"], 0, 0).spread.rows.unflatten(1, (KINDS, 2))
    probability = probabilities_reference(x.q, x.k, model, 1.0)
    generator = torch.Generator().manual_seed(case["seed"])
    for chosen in (torch.ones(g.batch, heads), torch.randint(0, len(found) + 1, (g.batch, heads), generator=generator)):
        chosen = torch.where(torch.stack([b.fits for b in found]).all(0), chosen.long(), 0)
        plan = assemble(plain, chosen, found, segments)
        check_contract(plan)
        assert plan.tiles.is_contiguous()  # kernels read all of these as they lie
        assert plan.columns.is_contiguous()
        assert plan.row_order is not None
        assert plan.row_order.is_contiguous()
        assert plan.column_slots is None or plan.column_slots.is_contiguous()
        mask = plan.to_mask()
        assert not (mask & ~model).any()
        assert mask.any(-1).all()
        assert not case["dense_tail"] or torch.equal(mask[:, :, -64:], model[:, :, -64:].expand(-1, heads, -1, -1))
        kept = (probability * mask).sum(-1)
        for b, h in chosen.nonzero().tolist():
            bounded = found[int(chosen[b, h]) - 1]
            for shares, kinds in ((bounded.chosen, slice(0, CHOOSE)), (bounded.measured, slice(CHOOSE, KINDS))):
                asked = [rows[b, kinds, kind].flatten().long() for kind in range(2)]
                least = min(kept[b, h, some[some >= 0]].mean() for some in asked if (some >= 0).any())
                if case["dense_tail"]:
                    assert least >= shares[b, h].double() - 1e-5
                else:
                    torch.testing.assert_close(shares[b, h].double(), least, atol=1e-5, rtol=1e-5)
            work = plan.work()[b, h].sum()
            assert abs(work - torch.as_tensor(bounded.work.visited)[b, h]) < 1e-3
            assert case["dense_tail"] or abs(work - bounded.sparse_tiles[b, h]) < 1e-3


@given(
    st.integers(0, 99), st.sampled_from([(50, 0), (200, 30)]), st.sampled_from([TileShape(16, 16), TileShape(32, 16)])
)
def test_the_probe_sums_the_softmax(seed: int, lengths: tuple[int, int], tiles: TileShape) -> None:
    (q_len, past), zone = lengths, 9
    g = Geometry(2, 4, 2, q_len, q_len + past, q_offset=past)
    x = random_inputs(g, seed=seed, sharpness=4.0)
    ids = prompt(g.kv_len, seed, frame=11, longest=9, batch=2)
    segments = segment(ids, (0, 1), g, tiles)
    rows, parts = part_rows(segments, g, tiles, zone, tiles.block_n), parts_of(2, ("q", "2d"))
    zones = torch.full((2, 2), 5)
    probe = run_part_probe(x.q.double(), x.k.double(), g, 1.0, segments, rows, parts, tiles, zones, tiles.block_n)
    probability = probabilities_reference(x.q, x.k, g.to_mask()[:, None], 1.0)
    width = segments.key_order.shape[1]
    for b in range(2):
        for v, (query, key) in enumerate(parts):
            asked = torch.cat([rows.spread.rows[b, t * 2 + query] for t in range(KINDS)]).long()
            weights = probability[b, :, asked.clamp(min=0)] * (asked >= 0)[:, None]
            by_group = weights.unflatten(1, (KINDS * SPREAD_GROUPS, -1)).sum(2)  # [HQ, 3 G, kv_len]
            torch.testing.assert_close(probe.total[b, v], by_group.sum(-1))
            space = torch.zeros(*by_group.shape[:2], width, dtype=by_group.dtype)
            if key is None:
                space[..., : g.kv_len] = by_group
            else:
                order = segments.key_order[b].long()
                begin, end = int(segments.key_start[b, key]), int(segments.key_start[b, key] + segments.counts[b, key])
                space[..., begin:end] = by_group[..., order[begin:end]]
            blocks = space.unflatten(-1, (-1, tiles.block_n)).sum(-1)
            torch.testing.assert_close(probe.blocks[b, v], blocks)
            slots = torch.arange(width).expand(2, len(parts), 4, -1)
            mine = (slots[0, 0, 0] >= probe.credit_start[b, v]) & (slots[0, 0, 0] < probe.credit_stop[b, v][:, None])
            credited = space[:, : 2 * SPREAD_GROUPS] * mine
            torch.testing.assert_close(probe.credit[b, v], credited.sum(1))
            torch.testing.assert_close(probe.credit_at(slots)[b, v], credited)


def test_time_decides() -> None:
    """Where listed tiles cost so much that dense attention is cheaper, nobody takes them."""
    ids = prompt(2048, seed=0)
    q, k = EXAMPLE["attention"](ids, torch.Generator())
    even = Coefficients(launch=0.0, rows=0.0, tiles=1.0, listed=1.0, columns=1.0, gathered=0.0, dense=1.0)
    dear = Coefficients(launch=0.0, rows=0.0, tiles=50.0, listed=50.0, columns=50.0, gathered=0.0, dense=1.0)
    for coefficients, place in ((even, 1), (dear, 0)):
        _, choice, *_ = choose(q, k, ids, ("2d",), recall=0.8, coefficients=coefficients)
        assert choice.boundary.item() == place


@pytest.mark.parametrize("boundaries", [("q",), ("q", "2d")])
def test_what_the_last_rows_take_counts(boundaries: tuple[str, ...]) -> None:
    """Grouped rows spread the last ones over more tiles: no head takes a boundary that loses by that."""
    q, k, ids = text_looks_at_columns(2048, seed=3)
    tiles, shared = TileShape(64, 32), {"recall": 0.95, "dense_tail": True}
    plan, _, g, _ = choose(q, k, ids, boundaries, tiles=tiles, **shared)
    plain, _ = adaptive_plan(q, k, g, 1.0, tiles, groups=SPREAD_GROUPS, **shared)
    assert plan.work().sum() <= plain.work().sum()


@pytest.mark.parametrize("boundaries", [("2d",), ("q", "2d")])
def test_heads_that_are_no_numbers_run_dense(boundaries: tuple[str, ...]) -> None:
    ids = prompt(2048, seed=0)
    q, k = (x.repeat(1, 3, 1, 1) for x in EXAMPLE["attention"](ids, torch.Generator()))
    clean, *_ = choose(q, k, ids, boundaries, recall=0.8)
    q[:, 0, -30:] = float("nan")
    k[:, 1, 40] = float("nan")
    plan, choice, g, _ = choose(q, k, ids, boundaries, recall=0.8)
    check_contract(plan)
    assert choice.boundary[0, :2].tolist() == [0, 0]
    assert choice.boundary[0, 2].item() > 0
    assert torch.equal(plan.to_mask()[:, :2], g.to_mask()[:, None].expand(-1, 2, -1, -1))
    assert torch.equal(plan.to_mask()[:, 2], clean.to_mask()[:, 2])


def test_choosing_never_waits_for_the_device() -> None:
    ids = prompt(600, seed=3)
    g = Geometry(1, 2, 1, 600, 600)
    x = random_inputs(g)
    with NoHostWaits():
        choose(x.q, x.k, ids, ("q", "2d"), recall=0.5)


@pytest.mark.parametrize("inference", [False, True])  # tensors made in inference mode have no version
def test_layers_share_what_the_grouping_decides(inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(*arguments: Any) -> Any:
        made.append(arguments)
        return facts(*arguments)

    facts = part_search._make_facts
    monkeypatch.setattr(part_search, "_make_facts", make)
    ids = prompt(600, seed=3)
    x = random_inputs(Geometry(1, 2, 1, 600, 600))
    with torch.inference_mode(inference):
        for seed in range(2):
            segments = segment(ids, (0, 1), Geometry(1, 2, 1, 600, 600), TILES)
            for layer in range(2):
                boundaries = Boundaries(("q", "2d"), segments, LABELS)
                q = x.q + layer
                adaptive_plan(q, x.k, Geometry(1, 2, 1, 600, 600), 1.0, TILES, recall=0.5, boundaries=boundaries)
            assert len(made) == seed + 1


def test_the_last_rows_stay_dense() -> None:
    ids = prompt(2048, seed=0)
    q, k = EXAMPLE["attention"](ids, torch.Generator())
    plan, choice, g, _ = choose(q, k, ids, ("2d",), recall=0.8, dense_tail=True)
    check_contract(plan)
    assert choice.boundary.item() == 1
    assert torch.equal(plan.to_mask()[0, 0, -64:], g.to_mask()[0, -64:])


@pytest.mark.parametrize(
    ("change", "tiles", "labels", "words"),
    [
        ({"window": 8}, TILES, (0, 1), "sliding window"),
        ({"kv_start": torch.tensor([3])}, TILES, (0, 1), "padding"),
        ({}, TileShape(30, 32), (0, 1), "tiles of 30 rows"),
        ({}, TILES, (0,), "one modality"),
        ({"q_offset": 5}, TILES, (0, 1), "behind the last key"),
    ],
)
def test_why_there_are_no_parts(change: dict[str, Any], tiles: TileShape, labels: tuple[int, ...], words: str) -> None:
    g = Geometry(1, 1, 1, 64, 64, **change)
    reason = why_no_parts(g, tiles, segment(prompt(64, 0), labels, g, tiles))
    assert reason is not None
    assert words in reason


def gpu_prompt(head_dim: int) -> tuple[Geometry, Tensor, Tensor, Tensor]:
    """Two prompts, and random q, k and v stored by token."""
    tokens = 3000
    g = Geometry(2, 6, 2, tokens, tokens)
    ids = torch.cat([prompt(tokens, 0), prompt(tokens, 1, frame=300)]).cuda()
    generator = torch.Generator("cuda").manual_seed(0)

    def made(heads: int) -> Tensor:
        x = torch.randn(2, tokens, heads, head_dim, device="cuda", generator=generator)
        return x.to(torch.bfloat16).transpose(1, 2)

    return g, ids, made(6) * 4, made(2)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_gpu_probe_is_the_reference(head_dim: int) -> None:
    g, ids, q, k = gpu_prompt(head_dim)
    tiles, scale = TileShape(128, 128), head_dim**-0.5
    segments = segment(ids, (0, 1), g, tiles)
    rows, parts = part_rows(segments, g, tiles, 100, 128), parts_of(2, ("q", "2d"))
    zones = torch.full((2, 2), 60, device="cuda")
    run_part_probe(q, k, g, scale, segments, rows, parts, tiles, zones, 128)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, again = (run_part_probe(q, k, g, scale, segments, rows, parts, tiles, zones, 128) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = run_part_probe(q.double(), k.double(), g, scale, segments, rows, parts, tiles, zones, 128)
    assert got.probe.call.tiles is not None
    assert want.probe.call.tiles is None
    keys = torch.randint(0, segments.key_order.shape[1], (2, len(parts), 6, 50), device="cuda")
    for name in ("blocks", "credit", "total"):
        assert torch.equal(getattr(got, name), getattr(again, name)), name
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=5e-5, atol=5e-5, msg=name)
    torch.testing.assert_close(got.credit_at(keys).double(), want.credit_at(keys), rtol=5e-5, atol=5e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("boundaries", ["q", "2d", "q,2d"])
def test_gpu_operator_runs_what_was_planned(boundaries: str) -> None:
    """Uniform attention stays dense for the whole matrix; whatever a head takes, the kernel computes its plan."""
    g, ids, q, k = gpu_prompt(64)
    v, scale = torch.randn_like(k), 64**-0.5
    tiles = tiles_for(q.device, q.dtype, 64)
    segments = segment(ids, (0, 1), g, tiles)
    plain, _ = adaptive_plan(q, k, g, scale, tiles, recall=0.5, dense_tail=False)
    found = search_parts(
        q, k, g, scale, tiles, segments, boundaries=boundaries.split(","), recall=0.5, prices=Prices(),
        columns=plain.columns.shape[-1],
    )  # fmt: skip
    for place in range(len(found) + 1):
        chosen = torch.full((2, 6), place, device="cuda")
        chosen[:, ::4] = 0
        plan = assemble(plain, chosen, found, segments)
        want = attention_reference(q.double(), k.double(), v.double(), plan.to_mask(), scale)
        for family in families(q.device, q.dtype, 64):
            if family_tiles(family, q.device, q.dtype, 64) == tiles:
                out = run_plan(q, k, v, plan, scale, family=family)
                assert relative_error(out, want) < 6e-3


def test_what_a_report_needs_is_small() -> None:
    """Reports keep the choice of every layer."""
    ids = prompt(2048, seed=0)
    q, k = EXAMPLE["attention"](ids, torch.Generator())
    _, choice, *_ = choose(q, k, ids, ("q", "2d"), recall=0.8)
    assert choice.apart is not None
    kept = [choice.sparse, choice.density, *choice.tried, choice.apart.chosen]
    kept += [part for tried in choice.apart.tried for part in tried if isinstance(part, Tensor)]
    assert sum(part.untyped_storage().nbytes() for part in kept) < 4096
