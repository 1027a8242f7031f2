"""Exact attention of the guard's rows: its kernels in Triton's interpreter against the reference, and who is served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels.exact_rows import (
    compile_ahead,
    fused_exact_rows,
    reference_exact_rows,
    run_exact_rows,
    why_not_by_kernels,
)
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.guard import enforce, guard_rows, measure
from mmi_compile.kernels.patterns import AShape, VerticalSlash
from mmi_compile.kernels.planner import build_plan, dense_plan
from tests.kernels.ahead import assert_runs_on
from tests.kernels.interpreter import Worker, asking
from tests.kernels.test_modality_probe import GPU_GEOMETRIES, gpu_case
from tests.random_plans import random_plan, random_qkv

# Rounding of scores of size s shifts a probability by s / 2^24 of itself; sums are relative to 1 and more.
TOLERANCE = {"covered": 2e-5, "total": 2e-5, "outputs": 4e-5}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with asking("exact_rows_worker.py") as ask:
        yield ask


def assert_is_the_reference(answer: dict[str, Any]) -> None:
    for name, most in TOLERANCE.items():
        assert answer["error"][name] <= most, name
    assert answer["repeats"]
    assert answer["alone"]


@given(
    seed=st.integers(0, 2**31),
    head_dim=st.sampled_from([8, 16, 24, 40]),
    dtype=st.sampled_from(["fp32", "fp16"]),
    block_m=st.sampled_from([16, 64]),
    block_n=st.sampled_from([16, 64, 128]),
    tile_n=st.sampled_from([64, 128]),
    pack=st.sampled_from([1, 2]),
    count=st.sampled_from([1, 9, 64, 70, 130]),
    scale=st.sampled_from([0.3, 1.5]),
    programs=st.integers(1, 40),
    poison=st.booleans(),
)
def test_kernels_are_the_reference(worker: Worker, **case: Any) -> None:
    assert_is_the_reference(worker(**case))


def test_every_mask_and_part_of_plans_is_met(worker: Worker) -> None:
    seen: set[str] = set()
    recalls: list[float] = []
    for seed in range(20):
        answer = worker(seed=seed, max_len=100)
        assert_is_the_reference(answer)
        seen |= set(answer["seen"])
        recalls += answer["recall"]
    assert seen == {"window", "kv_start", "key_padding", "q_offset", "lists", "columns"}
    assert sum(0.05 < recall < 0.95 for recall in recalls) > 10


def test_dense_plans_recall_everything(worker: Worker) -> None:
    for seed in range(6):
        answer = worker(seed=seed, dense=True, count=30)
        assert_is_the_reference(answer)
        assert set(answer["recall"]) == {1.0}


def test_nan_stays_with_its_head(worker: Worker) -> None:
    met = 0
    for seed in range(6):
        answer = worker(seed=seed, nan=True, count=30)
        assert_is_the_reference(answer)
        of_heads = [answer["recall"][h :: answer["heads"]] for h in range(answer["heads"])]
        met += -1.0 in of_heads[0]
        assert all(-1.0 not in head for head in of_heads[1:])
    assert met


def test_the_guard_takes_the_kernels_where_they_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmi_compile.kernels import exact_rows

    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[2] is None)
        return reference_exact_rows(*arguments)

    monkeypatch.setattr(exact_rows, "fused_exact_rows", counted)
    monkeypatch.setattr(exact_rows, "why_not_fused", lambda q, k: None)
    g = Geometry(1, 2, 1, 100, 100)
    q, k, v = random_qkv(0, g, 8, torch.float32)
    plan, rows = build_plan([AShape(4, 32)] * 2, q, k, g, 0.3, TileShape(32, 16)), guard_rows(g, 8, device=q.device)
    measure(q, k, v, q, plan, g, 0.3, rows)
    enforce(plan, q, k, g, 0.3, 0.9, rows)
    assert calls == [False, True]


def test_what_kernels_cannot_serve_is_named() -> None:
    g = Geometry(1, 2, 1, 100, 100)
    q, k, v = random_qkv(0, g, 8, torch.float32)
    plan, rows = dense_plan(g, TileShape(32, 16), q.device), guard_rows(g, 8, device=q.device)
    grouped = next(p for seed in range(99) if (p := random_plan(seed)).key_order is not None)
    edge = torch.full((1, 100), 50, dtype=torch.int32)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("one GPU", {}),
        ("nothing", {"rows": rows[:, :0]}),
        ("nothing", {"q": q[:, :, :0]}),
        ("unlike k", {"v": v.half()}),
        ("unlike k", {"v": v[..., :4]}),
        ("grouped", {"plan": grouped}),
        ("intervals", {"plan": replace(plan, geometry=replace(g, row_start=edge, row_stop=edge))}),
        ("power of two", {"plan": dense_plan(g, TileShape(32, 24), q.device)}),
    ]
    for message, change in cases:
        given_: dict[str, Any] = {"q": q, "k": k, "v": v, "plan": plan, "rows": rows} | change
        assert message in str(why_not_by_kernels(**given_)), message


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_ahead_of_time(arch: str) -> None:
    assert_compiles(arch, "bf16", 128, special=arch == "gfx942")


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_120", "gfx942"])
def test_all_architectures_and_head_dims(arch: str, head_dim: int, special: bool) -> None:
    assert_compiles(arch, "fp16", head_dim, special)


def assert_compiles(arch: str, dtype: str, head_dim: int, special: bool) -> None:
    pytest.importorskip("triton", reason="triton is published for Linux only")
    assert_runs_on(compile_ahead(arch, dtype, head_dim, special=special), arch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("case", "count"), [*zip(GPU_GEOMETRIES, (64, 100, 64, 8, 64, 64), strict=True)])
def test_gpu_rows_are_the_reference(case: str, head_dim: int, dtype: torch.dtype, count: int) -> None:
    g, q, k = gpu_case(case, head_dim, dtype)
    v, scale = k.flip(2), 2 * head_dim**-0.5
    heads = [VerticalSlash(100, 64) if h % 2 else AShape(64, 256) for h in range(g.q_heads)]
    plan = build_plan(heads, q, k, g, scale, TileShape(128, 128))
    rows = guard_rows(g, count, device=q.device)
    assert why_not_by_kernels(q, k, v, plan, rows) is None
    run_exact_rows(q, k, v, plan, scale, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, again = (run_exact_rows(q, k, v, plan, scale, rows) for _ in range(2))
        run_exact_rows(q, k, None, plan, scale, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = reference_exact_rows(q.double(), k.double(), v.double(), plan, scale, rows)
    assert got.outputs is not None
    assert again.outputs is not None
    assert want.outputs is not None
    for name in ("covered", "total", "outputs"):
        found = getattr(got, name)
        assert torch.equal(found, getattr(again, name)), name
        torch.testing.assert_close(found.double(), getattr(want, name), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.gpu
def test_gpu_guard_moves_heads_of_nan_and_keeps_dense_ones() -> None:
    g, q, k = gpu_case("plain", 128, torch.bfloat16)
    scale, tiles, rows = 128**-0.5, TileShape(128, 128), guard_rows(g, device=q.device)
    seen = fused_exact_rows(q, k, None, dense_plan(g, tiles, q.device), scale, rows)
    assert torch.equal(seen.covered, seen.total)
    q = q.clone()
    q[:, 1] = torch.nan
    _, recall, moved = enforce(build_plan([AShape(64, 256)] * 6, q, k, g, scale, tiles), q, k, g, scale, 0.01, rows)
    assert recall.isnan().tolist() == moved.tolist() == [[h == 1 for h in range(6)]] * 2
