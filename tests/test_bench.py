"""``mmi bench`` as a library: what it counts, compares with and reports, on the CPU and on small sizes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile import bench, bench_peers
from mmi_compile.bench import plan_pairs, run_bench
from mmi_compile.bench_blocks import BlockLists, NotFeasible, block_lists, flex_block_mask
from mmi_compile.bench_cases import (
    MIX_OF_28,
    VIDEO,
    CaseError,
    make_inputs,
    mix,
    parse_cases,
    parse_tokens,
    video_prompt,
)
from mmi_compile.bench_measure import relative_error, sampled_rows, time_call
from mmi_compile.bench_peers import PEERS, Call, Family, kernel_families, peers_for
from mmi_compile.bench_rows import SCHEMA, BenchOptions, Results, rows_from_json
from mmi_compile.bench_table import best_lines, can_plot, plot, print_table, progress_line, token_text
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import AShape, BlockTopK, Dense, Grid, VerticalSlash
from mmi_compile.kernels.plan import RECORD, Plan, TileRecord
from mmi_compile.kernels.reference import attention_reference
from tests.random_plans import masked_attention, random_plan, random_qkv

CPU = torch.device("cpu")


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Small plans of plain causal attention with sinks, listed blocks and columns, laid out by hand."""
    block_m, block_n = draw(st.sampled_from([(4, 4), (8, 4), (4, 8), (6, 5)]))
    length, heads = draw(st.integers(1, 45)), draw(st.integers(1, 3))
    g = Geometry(1, heads, 1, length, length)
    tiles, key_blocks = -(-length // block_m), -(-length // block_n)
    most_columns = draw(st.sampled_from([0, 0, 7]))
    records = torch.zeros(1, heads, tiles, 1, RECORD, dtype=torch.int32)
    columns = torch.full((1, heads, most_columns), length, dtype=torch.int32)
    lists: list[int] = []
    bits: list[int] = []
    for h in range(heads):
        wanted = sorted(draw(st.sets(st.integers(0, length - 1), max_size=min(most_columns, length))))
        sink_blocks = draw(st.integers(0, 2))
        wanted = [j for j in wanted if j >= sink_blocks * block_n]
        columns[0, h, : len(wanted)] = torch.tensor(wanted, dtype=torch.int32)
        for t in range(tiles):
            start = draw(st.integers(0, t * block_m // block_n))
            sinks = min(sink_blocks, start)
            listed = sorted(draw(st.sets(st.integers(sinks, start - 1), max_size=3))) if sinks < start else []
            used = sum(j < start * block_n for j in wanted) if sinks == sink_blocks else 0
            base = draw(st.sampled_from([0, t]))
            words = [0] * (-(-(max(key_blocks, tiles) + 1) // 32))
            for n in listed:
                words[abs(n - base) // 32] |= 1 << (abs(n - base) % 32)
            # Bits count distances from the base, so blocks left and right of it must not meet.
            if base > 0 and any(n > base for n in listed):
                base, words = 0, [sum(1 << n for n in listed)]
            full = draw(st.integers(start, max(start, (t * block_m + 1) // block_n)))
            window = [start, start, full, (min((t + 1) * block_m, length) - 1) // block_n + 1]
            skipped = draw(st.integers(0, used))
            records[0, h, t, 0] = torch.tensor(
                [*window, 0, sinks, len(listed), len(lists), base, used - skipped, skipped, len(bits), 0]
            )
            lists += [n - base for n in listed]
            bits += words
    tensors = [torch.tensor(x, dtype=torch.int32) for x in (lists, [b - (1 << 32) if b >> 31 else b for b in bits])]
    both = bool(lists) and most_columns > 0
    return Plan(g, block_m, block_n, records, tensors[0], columns, True, None, tensors[1] if both else None)


def expand(lists: BlockLists, plan: Plan) -> torch.Tensor:
    """The mask that lists of blocks mean: bool ``[B, HQ, N, N]``."""
    g = plan.geometry
    mask = torch.zeros(g.batch, g.q_heads, g.q_len, g.kv_len, dtype=torch.bool)
    heads = lists.full_count.shape[1]
    for b in range(g.batch):
        for head in range(g.q_heads):
            h = head if heads > 1 else 0
            for t in range(plan.query_tiles):
                i = torch.arange(t * plan.block_m, min((t + 1) * plan.block_m, g.q_len))[:, None]
                full = lists.full_blocks[b, h, t, : lists.full_count[b, h, t]].tolist()
                partial = lists.partial_blocks[b, h, t, : lists.partial_count[b, h, t]].tolist()
                assert full == sorted(set(full))
                assert partial == sorted(set(partial))
                assert not set(full) & set(partial)
                for blocks, kept in ((full, False), (partial, True)):
                    for n in blocks:
                        j = torch.arange(n * plan.block_n, min((n + 1) * plan.block_n, g.kv_len))
                        where = torch.tensor(b), torch.tensor(h)
                        mask[b, head, i, j] = lists.mask_mod(*where, i, j) if kept else True
    return mask


@given(plans())
def test_block_lists_mean_exactly_the_plan(plan: Plan) -> None:
    assert torch.equal(expand(block_lists(plan), plan), plan.to_mask())


@given(plans())
def test_flex_block_mask_means_exactly_the_plan(plan: Plan) -> None:
    mask = flex_block_mask(plan)
    lists = BlockLists(
        mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices, mask.mask_mod, True
    )
    assert torch.equal(expand(lists, plan), plan.to_mask())
    assert mask.BLOCK_SIZE == (plan.block_m, plan.block_n)
    assert mask.seq_lengths == (plan.geometry.q_len, plan.geometry.kv_len)


@given(plans())
def test_pairs_count_whole_tiles(plan: Plan) -> None:
    lists = block_lists(plan)
    share = plan.geometry.q_heads // lists.full_count.shape[1]
    blocks = share * int((lists.full_count + lists.partial_count).sum())
    columns = int(plan.record.num_columns.sum())
    if columns == 0:
        assert plan_pairs(plan) == blocks * plan.block_m * plan.block_n
    else:
        tiles = plan.record.num_columns.add(plan.block_n - 1).div(plan.block_n, rounding_mode="floor").sum()
        assert plan_pairs(plan) >= int(tiles) * plan.block_m * plan.block_n
    assert plan_pairs(plan) >= int(plan.to_mask().sum())


def small_plan(**changes: object) -> Plan:
    g = Geometry(1, 2, 1, 12, 12)
    records = torch.zeros(1, 2, 3, 1, RECORD, dtype=torch.int32)
    TileRecord(*records.unbind(-1)).window_stop.copy_(torch.arange(1, 4)[:, None])
    plan = Plan(g, 4, 4, records, torch.empty(0, dtype=torch.int32), torch.empty(1, 2, 0, dtype=torch.int32))
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


def test_heads_that_agree_share_one_list() -> None:
    assert block_lists(small_plan()).full_count.shape == (1, 1, 3)


def test_plans_that_lists_cannot_hold_are_refused_with_the_reason() -> None:
    with pytest.raises(NotFeasible, match="permuted"):
        block_lists(small_plan(row_order=torch.arange(12, dtype=torch.int32).expand(1, 2, 12)))
    with pytest.raises(NotFeasible, match="more than causal"):
        block_lists(small_plan(geometry=Geometry(1, 2, 1, 12, 12, window=3)))
    with pytest.raises(NotFeasible, match="grouped by modality"):
        block_lists(small_plan(key_order=torch.arange(12, dtype=torch.int32)[None]))
    with pytest.raises(NotFeasible, match="visit 2 regions"):
        block_lists(small_plan(tiles=small_plan().tiles.expand(-1, -1, -1, 2, -1)))
    columns = torch.arange(0, 40, 4, dtype=torch.int32).expand(1, 1, 10).contiguous()
    records = torch.zeros(1, 1, 12, 1, RECORD, dtype=torch.int32)
    record, tile = TileRecord(*records.unbind(-1)), torch.arange(12)[:, None]
    for field in (record.window_start, record.window_left, record.window_full):
        field.copy_(tile)
    record.window_stop.copy_(tile + 1)
    record.num_columns.copy_(tile.clamp(max=10))
    scattered = Plan(Geometry(1, 1, 1, 48, 48), 4, 4, records, torch.empty(0, dtype=torch.int32), columns)
    assert block_lists(scattered).has_columns
    with pytest.raises(NotFeasible, match="x our tiles"):
        block_lists(scattered, most=1.5)


# ---------------------------------------------------------------------------------------------------------------------
# Cases and lengths


def test_lengths_are_read_as_people_write_them() -> None:
    assert parse_tokens(["4096,128k", "1m", "0.5K", "4096"]) == (4096, 131072, 1 << 20, 512)
    for wrong in ("x", "0", "-4", "1.5", "4g", ""):
        with pytest.raises(CaseError, match="number of tokens"):
            parse_tokens([wrong])
    assert [token_text(n) for n in (131072, 1 << 20, 1000)] == ["128k", "1m", "1000"]


def test_cases_are_patterns_or_named() -> None:
    cases = parse_cases(
        ["dense,a_shape(128,1024)", "grid(stride=256,local=1024)", "vertical_slash(10, n_slash=20)", "mix"]
    )
    assert [case.pattern for case in cases] == [
        Dense(), AShape(128, 1024), Grid(256, 0, 1024), VerticalSlash(10, 20), None,
    ]  # fmt: skip
    assert cases[0].patterns(3) == (Dense(),) * 3
    assert parse_cases(["adaptive"])[0].patterns(3) is None
    blocks = parse_cases(["block_topk", "block_topk(8,scoring=antidiagonal)", "block_topk(mass=0.9,stride=8)"])
    assert [case.pattern for case in blocks] == [
        BlockTopK(k=64), BlockTopK(k=8, scoring="antidiagonal"), BlockTopK(mass=0.9, stride=8),
    ]  # fmt: skip
    assert all(case.pattern is not None for case in blocks)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a_shap", "a_shape"), ("grid(strid=3)", "stride"), ("a_shape(1,2,3)", "no option"), ("a_shape(x,1)", "int"),
     ("a_shape(1,0)", "1 or more"), ("mix(3)", "unknown case"), ("block_topk(k=8,mass=0.5)", "exactly one"),
     ("a_shape(1", "unknown case")],
)  # fmt: skip
def test_wrong_cases_name_the_mend(text: str, message: str) -> None:
    with pytest.raises(CaseError, match=message):
        parse_cases([text])


@given(st.integers(1, 64))
def test_the_mix_is_divided_as_for_28_heads(heads: int) -> None:
    kinds = mix(heads)
    assert len(kinds) == heads
    for kind, count in MIX_OF_28.items():
        assert abs(kinds.count(kind) - count * heads / 28) <= 1
    assert [mix(28).count(kind) for kind in MIX_OF_28] == list(MIX_OF_28.values())


def test_inputs_are_views_of_token_major_memory() -> None:
    x = make_inputs(
        parse_cases(["mix"])[0], 300, heads=4, kv_heads=2, head_dim=64, batch=1, dtype=torch.float32, device=CPU, seed=0
    )
    assert x.q.shape == (1, 4, 300, 64)
    assert x.q.transpose(1, 2).is_contiguous()
    assert len({type(s) for s in x.structures}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def test_repeats_are_counted_and_times_positive() -> None:
    calls: list[int] = []
    timing = time_call(lambda: calls.append(1), CPU, 5)
    assert timing.repeats == 5
    assert len(calls) == 7
    assert timing.device_ms >= 0
    assert timing.host_ms == timing.device_ms


@given(plans(), st.integers(0, 20))
def test_error_of_the_exact_result_is_rounding_and_of_a_wrong_one_is_not(plan: Plan, seed: int) -> None:
    g = plan.geometry
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, g.q_heads, g.q_len, 8, generator=generator)
    k, v = (torch.randn(1, 1, g.q_len, 8, generator=generator) for _ in range(2))
    out = attention_reference(q, k, v, plan.to_mask(), 0.3)
    rows = sampled_rows(g.q_len, seed)
    assert relative_error(q, k, v, out, 0.3, rows, plan) < 1e-5
    assert relative_error(q, k, v, out + 1, 0.3, rows, plan) > 1e-2
    out[0, -1, -1] = float("nan")
    assert not relative_error(q, k, v, out, 0.3, rows, plan) < 1e9


def test_error_is_measured_over_all_regions_and_grouped_keys() -> None:
    """Random plans, read as plans of plain causal attention."""
    measured = 0
    for seed in range(60):
        plan = random_plan(seed, block_m=8, block_n=8, max_len=40)
        g = plan.geometry
        plain = Geometry(g.batch, g.q_heads, g.kv_heads, g.q_len, g.kv_len)
        plan = dataclasses.replace(plan, geometry=plain)
        mask = plan.to_mask()
        if g.q_offset or g.q_len != g.kv_len or not mask.any(-1).all():
            continue
        q, k, v = random_qkv(seed, plain, 8, torch.float32)
        out = masked_attention(q, k, v, mask, 0.3)
        assert relative_error(q, k, v, out, 0.3, sampled_rows(g.q_len, seed), plan) < 1e-5
        measured += bool((plan.record.grouped != 0).any())
    assert measured >= 5


@given(st.integers(1, 50))
def test_sampled_rows_exist_and_hold_both_ends(length: int) -> None:
    rows = sampled_rows(length, 0)
    assert {0, length - 1} <= set(rows) <= set(range(length))


# ---------------------------------------------------------------------------------------------------------------------
# The whole bench


def options(**changes: object) -> BenchOptions:
    given_options = {"tokens": (160,), "heads": 4, "kv_heads": 2, "head_dim": 32, "repeats": 1} | changes
    return BenchOptions.for_device(CPU, **given_options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def results() -> Results:
    names = [
        "dense", "a_shape(16,32)", "grid(stride=16,local=32)", "vertical_slash(20,24)", "block_topk(2,local=8,sink=8)",
        "mix", "adaptive",
    ]  # fmt: skip
    return run_bench(options(cases=parse_cases(names), head_dim=64), CPU)


def test_every_case_has_ours_and_the_dense_peer_with_all_figures(results: Results) -> None:
    assert not results.failed
    for case in results.options.cases:
        ours = next(row for row in results.rows if row.case == case.name and row.ours)
        peer = next(row for row in results.rows if row.case == case.name and row.kernel == PEERS["sdpa"].name)
        assert ours.status == peer.status == "ok"
        for name in ("density", "pairs", "plan_ms", "kernel_ms", "op_ms", "host_ms", "tflops", "speedup", "error"):
            assert getattr(ours, name) is not None, name
        assert ours.probe_ms is not None or case.kind in ("dense", "a_shape", "block_topk")
        assert ours.error is not None
        assert ours.error < 1e-3
        assert peer.speedup == 1
        assert peer.pairs == 4 * 160 * 161 // 2


def test_dense_pairs_are_counted_without_the_masked_half_of_tiles(results: Results) -> None:
    ours = next(row for row in results.rows if row.case == "dense" and row.ours)
    assert ours.pairs == 4 * 160 * 161 // 2
    assert ours.density == 1


def test_what_is_skipped_has_a_reason(results: Results) -> None:
    skipped = [row for row in results.rows if row.status == "skipped"]
    assert skipped
    assert all(row.reason for row in skipped)
    assert any("GPUs only" in row.reason for row in skipped)


def test_json_holds_everything_and_reads_back(results: Results) -> None:
    data = json.loads(json.dumps(results.to_json(), allow_nan=False))
    assert data["schema"] == {"name": "mmi-bench", "version": 1} == SCHEMA
    assert set(data) == {"schema", "device", "versions", "options", "rows"}
    assert data["device"]["type"] == "cpu"
    assert data["versions"]["torch"] == torch.__version__
    assert data["options"]["cases"][0] == "dense"
    assert rows_from_json(data) == results.rows
    with pytest.raises(ValueError, match="version 99"):
        rows_from_json(data | {"schema": {"name": "mmi-bench", "version": 99}})
    with pytest.raises(ValueError, match="not a results file"):
        rows_from_json({"rows": []})


def test_table_has_a_line_for_every_measured_row(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(results)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "CPU" in lines[0]
    for row in results.rows:
        if row.kernel_ms is not None:
            assert any(row.case in line and row.kernel in line for line in lines)
        else:
            assert row.reason in text
    assert all(progress_line(row).startswith("160  ") for row in results.rows)
    assert any("dense" in line for line in best_lines(results))


def test_plot_is_a_png(results: Results, tmp_path) -> None:  # type: ignore[no-untyped-def]
    if not can_plot():
        assert importlib.util.find_spec("matplotlib") is None
        return
    plot(results, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_reported_as_they_come() -> None:
    seen: list[int] = []
    steps: list[str] = []
    cases = parse_cases(["dense"])
    run_bench(options(cases=cases), CPU, on_step=steps.append, on_row=lambda r: seen.append(len(r.rows)))
    assert seen == list(range(1, len(seen) + 1))
    assert len(steps) <= bench.count_steps(options(cases=cases), CPU)
    assert all("160 tokens" in step for step in steps)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(torch.OutOfMemoryError("big"), "out of memory"), (RuntimeError("no\nmore"), "RuntimeError: no")],
)
def test_a_failing_kernel_is_a_row_and_the_others_go_on(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = kernel_families(CPU, torch.float32, 32)[0]

    def fail(*arguments: object) -> torch.Tensor:
        raise error

    bad = Family("bad", good.tiles, fail)
    monkeypatch.setattr(bench, "kernel_families", lambda *arguments: [bad, good])
    rows = run_bench(options(cases=parse_cases(["dense"])), CPU).rows
    assert {row.kernel: (row.status, row.reason) for row in rows if row.ours} == {
        "mmi bad": ("failed", reason),
        "mmi cpu": ("ok", ""),
    }


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    good = kernel_families(CPU, torch.float32, 32)[0]

    def wrong(q, k, v, plan, scale, out):  # type: ignore[no-untyped-def]
        return good.run(q, k, v, plan, scale, out).mul_(1.5)

    monkeypatch.setattr(bench, "kernel_families", lambda *arguments: [Family("wrong", good.tiles, wrong)])
    results = run_bench(options(cases=parse_cases(["dense"])), CPU)
    assert len(results.failed) == 1
    assert "wrong result" in results.failed[0].reason


def test_a_failing_peer_does_not_fail_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(call: Call) -> object:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(PEERS, "sdpa", dataclasses.replace(PEERS["sdpa"], prepare=unable))
    results = run_bench(options(cases=parse_cases(["dense"])), CPU)
    assert not results.failed
    assert [row.status for row in results.rows] == ["failed", "ok", "skipped"]
    assert results.rows[1].speedup is None


def test_inputs_that_cannot_be_made_are_a_row() -> None:
    results = run_bench(options(cases=parse_cases(["mix"]), head_dim=8), CPU)
    assert [(row.kernel, row.status) for row in results.rows] == [("inputs", "failed")]
    assert "head_dim" in results.failed[0].reason


def test_missing_flash4_is_skipped_with_the_reason() -> None:
    if importlib.util.find_spec("flash_attn") is not None:
        assert bench_peers._flash4_reason() == "" or "not importable" in bench_peers._flash4_reason()
        return
    x = torch.zeros(1, 1, 4, 8)
    for name in ("fa4", "fa4_sparse"):
        with pytest.raises(NotFeasible, match="not importable"):
            PEERS[name].prepare(Call(x, x, x, 1.0, small_plan()))


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="divisor of 5"):
        options(heads=5, kv_heads=3)
    with pytest.raises(ValueError, match="known: bf16"):
        options(dtype="int8")
    with pytest.raises(ValueError, match="1 or more"):
        options(repeats=0)
    assert peers_for(torch.device("cuda"), "bf16")[0] == "cudnn"
    assert peers_for(torch.device("cuda"), "fp32")[0] == "sdpa"


@pytest.mark.parametrize("segments", [2, 7, 40, 500])
def test_prompts_have_the_segments_that_a_case_names(segments: int) -> None:
    (case,) = parse_cases([f"2d({segments})"])
    ids = video_prompt(4096, 2, CPU, case.segments)
    assert int((ids[0].diff() != 0).sum()) + 1 == segments // 2 * 2
    assert 0.8 < float((ids == VIDEO).float().mean()) < 0.9


@pytest.mark.parametrize("word", ["q(1)", "2d()", "2d(x)", "q(2.5)", "mix(3)"])
def test_segments_must_be_a_number(word: str) -> None:
    with pytest.raises(CaseError):
        parse_cases([word])
