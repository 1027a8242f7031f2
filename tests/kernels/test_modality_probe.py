"""The probe of boundaries: the reference against loops over pairs, the kernels (interpreted) against the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels import modality_probe as module
from mmi_compile.kernels.boundaries import estimate_parts
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.fused_probe import why_not_fused
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.modality_probe import (
    ALL_KEYS,
    Asked,
    compile_ahead,
    fused_modality_probe,
    last_rows,
    modality_tiles,
    newest_keys,
    reference_modality_probe,
    run_modality_probe,
)
from mmi_compile.kernels.patterns import AShape, ByModality, Grid, HeadPattern, VerticalSlash
from mmi_compile.kernels.reference import probabilities_reference
from mmi_compile.kernels.segments import Segments, segment
from mmi_compile.kernels.spec import SHARED_MEMORY
from tests.host_waits import NoHostWaits
from tests.kernels.ahead import assert_runs_on
from tests.kernels.interpreter import Worker, asking
from tests.kernels.test_segments import interleavings
from tests.pairs import pairwise
from tests.strategies import geometries, random_inputs

TOLERANCE = 2e-5
SCALE = 0.3
TILES = TileShape(16, 16)


def everything(g: Geometry, modalities: int) -> list[Asked]:
    keys = (ALL_KEYS, *range(modalities))
    return [Asked(m, key, h, True) for m in range(modalities) for key in keys for h in range(g.q_heads)]


@given(geometries(), st.integers(1, 70), st.data())
def test_reference_sums_the_probabilities_of_the_last_rows(g: Geometry, last_q: int, data: st.DataObject) -> None:
    ids = data.draw(interleavings(g))
    s = segment(ids, (0, 1, 3), g, TILES)
    x = random_inputs(g)
    probe = reference_modality_probe(x.q, x.k, g, SCALE, s, everything(g, 3), last_q)
    weights = probabilities_reference(x.q, x.k, g.to_mask()[:, None], SCALE)
    for query in range(3):
        for key in (ALL_KEYS, 0, 1, 2):
            found = probe.masses(query, key, range(g.q_heads), True)
            for b in range(g.batch):
                columns, distances = masses_by_loop(weights[b], s, g, b, query, key, last_q)
                torch.testing.assert_close(found.columns[b], columns)
                torch.testing.assert_close(found.distances[b], distances)


def masses_by_loop(
    weights: torch.Tensor, s: Segments, g: Geometry, b: int, query: int, key: int, last_q: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masses ``[HQ, X]`` of one batch element, one pair after the other."""
    group = s.group[b].tolist()
    last = [j for j in range(g.kv_len) if group[j] == query][-min(last_q, g.q_len) :]
    keys = [j for j in range(g.kv_len) if key == ALL_KEYS or group[j] == key]
    columns = torch.zeros(g.q_heads, g.kv_len, dtype=torch.float64)
    distances = torch.zeros(g.q_heads, g.q_len + g.q_offset if key == ALL_KEYS else g.kv_len, dtype=torch.float64)
    for i in last:
        if i >= g.q_offset:
            newest = i if key == ALL_KEYS else sum(j <= i for j in keys) - 1
            for rank, j in enumerate(keys):
                if j <= i:
                    columns[:, rank] += weights[:, i - g.q_offset, j]
                    distances[:, newest - rank] += weights[:, i - g.q_offset, j]
    return columns, distances


def test_rows_and_what_they_see() -> None:
    ids = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0]], dtype=torch.int8)
    s = segment(ids, (0, 1), Geometry(1, 1, 1, 8, 8), TILES)
    rows = last_rows(s, Geometry(1, 1, 1, 8, 8), 3)
    assert rows.tolist() == [[[4, 5, 7], [2, 3, 6]]]
    assert newest_keys(s, rows).tolist() == [[[[1, 2, 3], [0, 0, 2]], [[2, 2, 3], [1, 2, 3]]]]
    late = Geometry(1, 1, 1, 3, 8, 5)
    assert last_rows(s, late, 3).tolist() == [[[-1, 5, 7], [-1, -1, 6]]]


def test_each_head_is_probed_once_for_all_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Geometry(1, 4, 2, 120, 120)
    ids = (torch.arange(120) % 13 < 9).to(torch.int8)[None]
    calls: list[list[Asked]] = []

    def note(*args: Any) -> Any:
        calls.append(list(args[5]))
        return reference_modality_probe(*args)

    monkeypatch.setattr("mmi_compile.kernels.boundaries.run_modality_probe", note)
    slash, grid = VerticalSlash(4, 2), Grid(8, 0, 4)
    heads: list[HeadPattern] = [
        ByModality("2d", slash), ByModality("2d", AShape(1, 2), (((1, 0), grid),)), ByModality("q", grid), slash,
    ]  # fmt: skip
    x = random_inputs(g)
    estimate_parts(heads, x.q, x.k, g, SCALE, TILES, segment(ids, (0, 1), g, TILES))
    assert len(calls) == 1
    wanted = {Asked(m, n, 0, True) for m in (0, 1) for n in (0, 1)}
    wanted |= {Asked(1, 0, 1, False), Asked(0, ALL_KEYS, 2, False), Asked(1, ALL_KEYS, 2, False)}
    assert set(calls[0]) == wanted
    probe = reference_modality_probe(x.q, x.k, g, SCALE, segment(ids, (0, 1), g, TILES), calls[0])
    assert probe.entries == ((0, 0), (0, 2), (1, 0), (1, 1), (1, 2))
    with pytest.raises(ValueError, match="was not asked for"):
        probe.masses(0, ALL_KEYS, [1], False)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with asking("modality_probe_worker.py") as ask:
        yield ask


def assert_is_the_reference(answer: dict[str, Any]) -> None:
    assert answer["shapes"]
    assert answer["same"]
    assert isinstance(answer["error"], float), answer["error"]
    assert answer["error"] <= TOLERANCE
    assert answer["repeats"]


@given(
    seed=st.integers(0, 2**31),
    head_dim=st.sampled_from([8, 16, 24, 40]),
    dtype=st.sampled_from(["fp32", "fp16"]),
    block_n=st.sampled_from([64, 128]),
    pack=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([0.3, -0.5, 0.0]),
    programs=st.integers(1, 40),
    last_q=st.sampled_from([64, 64, 40, 17, 1]),
    longest=st.sampled_from([1, 2, 7, 20, 90]),
    poison=st.booleans(),
)
def test_fused_probe_is_the_reference(worker: Worker, **case: Any) -> None:
    assert_is_the_reference(worker("check", **case))


def test_every_mask_and_every_sum_is_met(worker: Worker) -> None:
    seen: set[str] = set()
    mass = [0.0, 0.0, 0.0]
    for seed in range(14):
        answer = worker("check", seed=seed, max_len=100, longest=[1, 5, 40][seed % 3])
        assert_is_the_reference(answer)
        seen |= set(answer["seen"])
        mass = [a + b for a, b in zip(mass, answer["mass"], strict=True)]
    assert seen == {"window", "kv_start", "key_padding", "q_offset"}
    assert min(mass) > 20


def test_nan_in_live_tokens_reaches_the_sums(worker: Worker) -> None:
    assert worker("nan") == {"nan": [True, True]}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Pretend to be an H100 and note launches instead of making them."""
    made: list[tuple[str, tuple[int, ...]]] = []

    def note(name: str, arguments: Any, on: Any, grid: tuple[int, ...], tile: Any) -> None:
        made.append((name, grid))

    monkeypatch.setattr(module, "_launch", note)
    monkeypatch.setattr(module, "device_arch", lambda device: "sm_90")
    return made


def long_context(kv_len: int, q_heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, Geometry, Segments]:
    """Tensors of the right shape that hold a single row, and video frames with a time stamp after each."""
    row = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16)
    q, k = (row.expand(1, heads, kv_len, 128) for heads in (q_heads, kv_heads))
    g = Geometry(1, q_heads, kv_heads, kv_len, kv_len)
    ids = (torch.arange(kv_len) % 262 < 256).to(torch.int8)[None]
    return q, k, g, segment(ids, (0, 1), g, TileShape(128, 128))


def test_all_regions_take_three_launches_that_fill_the_device(launches: list[tuple[str, tuple[int, ...]]]) -> None:
    q, k, g, s = long_context(1 << 15, 28, 4)
    asked = [Asked(m, n, h, True) for m in (0, 1) for n in (0, 1) for h in range(28)]
    fused_modality_probe(q, k, g, 0.1, s, asked)
    assert [name for name, _ in launches] == ["modality_row_stats", "modality_columns", "modality_distances"]
    assert all(math.prod(grid) >= 4 * 132 for _, grid in launches)


@pytest.mark.parametrize("arch", sorted(SHARED_MEMORY))
@pytest.mark.parametrize("head_dim", [64, 256])
def test_each_sum_has_a_thread_of_its_own(arch: str, head_dim: int) -> None:
    tile = modality_tiles(arch, head_dim).distances
    assert tile.heads * tile.block_n >= tile.num_warps * (64 if arch.startswith("gfx") else 32)


@pytest.mark.usefixtures("launches")
def test_memory_is_two_vectors_per_head(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, g, s = long_context(1 << 17, 28, 4)
    empty, sizes = torch.empty, []

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(empty(*args, **kwargs).nbytes)
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", noted)
    fused_modality_probe(q, k, g, 0.1, s, [Asked(1, 1, h, True) for h in range(28)])
    assert 2 * 4 * 28 * g.kv_len <= sum(sizes) < 1.1 * 2 * 4 * 28 * g.kv_len


def test_mixed_boundaries_take_one_launch_more(launches: list[tuple[str, tuple[int, ...]]]) -> None:
    q, k, g, s = long_context(1000, 28, 4)
    asked = [Asked(0, ALL_KEYS, 3, True), Asked(1, 1, 5, True), Asked(1, 0, 27, False)]
    probe = fused_modality_probe(q, k, g, 0.1, s, asked)
    assert [name for name, _ in launches] == ["modality_row_stats", "modality_columns", *["modality_distances"] * 2]
    assert probe.columns.shape == (1, 3, 1000)
    assert probe.by_position.shape == probe.by_rank.shape == (1, 1, 1000)
    launches.clear()
    fused_modality_probe(q, k, g, 0.1, s, [])
    assert launches == []


def test_the_host_never_waits(launches: list[tuple[str, tuple[int, ...]]]) -> None:
    q, k, g, s = long_context(300, 4, 2)
    live = torch.ones(1, 300, dtype=torch.bool)
    padded = Geometry(1, 4, 2, 300, 300, 0, 50, torch.tensor([3]), torch.tensor([290]), live)
    for geometry in (g, padded):
        with NoHostWaits():
            fused_modality_probe(q, k, geometry, 0.1, s, everything(g, 2)).masses(0, 1, [0, 2], True)
            reference_modality_probe(q, k, geometry, 0.1, s, everything(g, 2))
    assert launches


def test_tensors_without_a_kernel_are_named() -> None:
    q, g = torch.zeros(1, 1, 70, 16), Geometry(1, 1, 1, 70, 70)
    s = segment(torch.zeros(1, 70, dtype=torch.int8), (0,), g, TILES)
    with pytest.raises(ValueError, match="architecture cpu"):
        fused_modality_probe(q, q, g, 1.0, s, [Asked(0, 0, 0, True)])


def assert_compiles(arch: str, dtype: str, head_dim: int, special: bool) -> dict[str, Any]:
    pytest.importorskip("triton", reason="triton is published for Linux only")
    compiled = compile_ahead(arch, dtype, head_dim, special=special)
    assert_runs_on(compiled, arch)
    return compiled


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_compiles_ahead_of_time(arch: str) -> None:
    assert_compiles(arch, "bf16", 128, special=arch == "gfx942")


@pytest.mark.usefixtures("own_cache")
def test_hopper_moves_each_probability_by_one_shuffle_and_adds_without_atomics() -> None:
    compiled = assert_compiles("sm_90", "bf16", 128, special=True)
    tile = modality_tiles("sm_90", 128).distances
    per_thread = tile.heads * 16 * tile.block_n // (32 * tile.num_warps)
    for name, kernel in compiled.items():
        ptx = kernel.asm["ptx"]
        assert "wgmma.mma_async" in ptx
        assert "atom" not in ptx
        if name.startswith("modality_distances"):
            assert per_thread <= ptx.count("shfl.sync.idx") <= 1.5 * per_thread


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("arch", "head_dim", "special"), pairwise(sorted(SHARED_MEMORY), [64, 80, 256], [False, True]))
def test_all_architectures_and_head_dims(arch: str, head_dim: int, special: bool) -> None:
    assert_compiles(arch, "fp16", head_dim, special)


GPU_GEOMETRIES = {
    "plain": Geometry(2, 6, 2, 3001, 3001),
    "chunked prefill": Geometry(1, 4, 4, 500, 2777, 2277),
    "window": Geometry(1, 4, 2, 3001, 3001, 0, 700),
    "left padding": Geometry(2, 4, 1, 1500, 1500, kv_start=torch.tensor([0, 333]), kv_stop=torch.tensor([1500, 1500])),
    "holes": Geometry(1, 4, 1, 900, 900, key_padding=torch.arange(900)[None] % 3 > 0),
    "few rows": Geometry(1, 3, 1, 40, 1040, 1000),
}


def gpu_case(case: str, head_dim: int, dtype: torch.dtype) -> tuple[Geometry, torch.Tensor, torch.Tensor]:
    """One of ``GPU_GEOMETRIES`` with random q and k on the GPU, stored by token."""
    g = GPU_GEOMETRIES[case]
    names = ("kv_start", "kv_stop", "key_padding")
    there: dict[str, Any] = {name: None if getattr(g, name) is None else getattr(g, name).cuda() for name in names}
    g = replace(g, **there)
    generator = torch.Generator("cuda").manual_seed(0)

    def tokens(heads: int, length: int) -> torch.Tensor:
        return torch.randn(g.batch, length, heads, head_dim, device="cuda", generator=generator).to(dtype)

    return g, tokens(g.q_heads, g.q_len).transpose(1, 2), tokens(g.kv_heads, g.kv_len).transpose(1, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("case", GPU_GEOMETRIES)
def test_gpu_probe_is_the_reference(case: str, head_dim: int, dtype: torch.dtype) -> None:
    g, q, k = gpu_case(case, head_dim, dtype)
    place = torch.arange(g.kv_len, device="cuda")
    ids = torch.where(place % 71 < 60, 1, torch.where(place % 23 < 4, 2, 0)).to(torch.int8).expand(g.batch, -1)
    s = segment(ids, (0, 1, 2), g, TileShape(128, 128))
    assert why_not_fused(q, k) is None
    run_modality_probe(q, k, g, head_dim**-0.5, s, everything(g, 3))
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, again = (run_modality_probe(q, k, g, head_dim**-0.5, s, everything(g, 3)) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = reference_modality_probe(q.double(), k.double(), g, head_dim**-0.5, s, everything(g, 3))
    for name in ("columns", "by_position", "by_rank"):
        assert torch.equal(getattr(got, name), getattr(again, name)), name
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=5e-5, atol=5e-5, msg=name)
