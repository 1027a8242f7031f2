"""The fused probe, run by Triton's interpreter in a process of its own, against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mmi_compile.kernels import fused_probe as module
from mmi_compile.kernels.fused_probe import chunk_size, compile_ahead, fused_probe, probe_tiles, why_not_fused
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.probe import best_phase, phase_mass, reference_probe, run_probe
from mmi_compile.kernels.spec import SHARED_MEMORY
from tests.host_waits import NoHostWaits
from tests.kernels.ahead import assert_runs_on
from tests.kernels.interpreter import Worker, asking
from tests.pairs import pairwise

pytest.importorskip("triton", reason="triton is published for Linux only")

# Relative to masses of 1 and more: rounding of scores of size s shifts a probability by s / 2^24 of itself.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with asking("probe_worker.py") as ask:
        yield ask


def assert_is_the_reference(answer: dict[str, Any]) -> None:
    assert answer["shapes"]
    assert answer["rows"]
    assert answer["peaks_agree"]
    assert isinstance(answer["error"], float), answer["error"]
    assert answer["error"] <= TOLERANCE
    assert answer["repeats"]


@given(
    seed=st.integers(0, 2**31),
    head_dim=st.sampled_from([8, 16, 24, 40]),
    dtype=st.sampled_from(["fp32", "fp16"]),
    block_m=st.sampled_from([16, 64, 128]),
    block_n=st.sampled_from([64, 128]),
    pack=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([0.3, -0.5, 0.0]),
    programs=st.integers(1, 40),
    peaks=st.sampled_from([0, 3, 20]),
    last_q=st.sampled_from([64, 64, 40, 16, 1]),
    poison=st.booleans(),
    diagonals=st.booleans(),
)
def test_fused_probe_is_the_reference(worker: Worker, **case: Any) -> None:
    assert_is_the_reference(worker("check", **case))


def test_every_mask_and_some_peaks_are_met(worker: Worker) -> None:
    seen: set[str] = set()
    peaks = 0
    for seed in range(20):
        answer = worker("check", seed=seed, peaks=4, block_m=16, max_len=150)
        assert_is_the_reference(answer)
        seen |= set(answer["seen"])
        peaks += answer["peaks"]
    assert seen == {"window", "kv_start", "key_padding", "q_offset"}
    assert peaks > 5


def test_nan_in_live_tokens_reaches_the_sums(worker: Worker) -> None:
    assert worker("nan") == {"nan": [True, True]}


@given(
    seed=st.integers(0, 99),
    length=st.integers(1, 700),
    strides=st.lists(st.one_of(st.integers(1, 80), st.integers(1, 900)), min_size=1, max_size=4),
)
def test_folded_mass_is_the_reference(worker: Worker, **case: Any) -> None:
    answer = worker("fold", **case)
    assert answer["error"] <= 1e-6
    assert answer["same_phase"]


def long_context(kv_len: int, q_heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, Geometry]:
    """Tensors of the right shape that hold a single row."""
    row = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16)
    shape = (kv_len, 128)
    return (
        row.expand(1, q_heads, *shape),
        row.expand(1, kv_heads, *shape),
        Geometry(1, q_heads, kv_heads, kv_len, kv_len),
    )


class Allocated(TorchDispatchMode):
    """Adds up the bytes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.zeros, torch.ops.aten.empty_like):
            self.bytes += result.numel() * result.element_size()
        return result


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, int]]]:
    """Pretend to be an H100 and note launches instead of making them."""
    made: list[tuple[str, tuple[int, int]]] = []

    def note(
        name: str, arguments: Any, on: Any, grid: tuple[int, int], constants: Any, warps: int, stages: int
    ) -> None:
        made.append((name, grid))

    monkeypatch.setattr(module, "_launch", note)
    monkeypatch.setattr(module, "device_arch", lambda device: "sm_90")
    return made


def test_launches_fill_the_device_and_hold_no_matrix(launches: list[tuple[str, tuple[int, int]]]) -> None:
    q, k, g = long_context(1 << 17, 28, 4)
    with Allocated() as allocated:
        fused_probe(q, k, g, 0.1, block_m=128)
    assert [name for name, _ in launches] == ["probe_row_stats", "probe_sums"]
    assert all(math.prod(grid) >= 4 * 132 for _, grid in launches)
    assert 0 < allocated.bytes < 0.05 * 2 * 128 * g.kv_len * (28 + 4 + 4)


def test_only_picked_heads_are_launched(launches: list[tuple[str, tuple[int, int]]]) -> None:
    q, k, g = long_context(1000, 28, 4)
    probe = fused_probe(q, k, g, 0.1, block_m=128, heads=(3, 5, 27), peaks=8)
    assert probe.columns.shape == (1, 3, 1000)
    assert [name for name, _ in launches] == ["probe_row_stats", "probe_sums", "probe_excess", "probe_beside"]
    assert [grid[0] for _, grid in launches][1:] == [3, 3, 3]
    assert fused_probe(q, k, g, 0.1, block_m=128, heads=(), peaks=8).columns.shape == (1, 0, 1000)


def test_the_host_never_waits(launches: list[tuple[str, tuple[int, int]]]) -> None:
    q, k, _ = long_context(300, 4, 2)
    live = torch.ones(1, 300, dtype=torch.bool)
    bounds = torch.tensor([3]), torch.tensor([290])
    for g in (Geometry(1, 4, 2, 300, 300), Geometry(1, 4, 2, 300, 300, 0, 50, *bounds, live)):
        with NoHostWaits():
            fused_probe(q, k, g, 0.1, block_m=64, peaks=4)


@given(n_tiles=st.integers(1, 20000), programs=st.integers(0, 2000))
def test_chunks_cover_all_tiles(n_tiles: int, programs: int) -> None:
    size = chunk_size(n_tiles, programs)
    assert -(-n_tiles // size) <= max(1, min(programs, 256))


def test_tensors_without_a_kernel_are_named() -> None:
    q = torch.zeros(1, 1, 70, 16)
    assert "one GPU" in (why_not_fused(q, q) or "")
    g = Geometry(1, 1, 1, 70, 70)
    with pytest.raises(ValueError, match="architecture cpu"):
        fused_probe(q, q, g, 1.0, block_m=64)


GPU_GEOMETRIES = {
    "plain": Geometry(2, 6, 2, 3001, 3001),
    "chunked prefill": Geometry(1, 4, 4, 500, 2777, 2277),
    "window": Geometry(1, 4, 2, 3001, 3001, 0, 700),
    "left padding": Geometry(2, 4, 1, 1500, 1500, kv_start=torch.tensor([0, 333]), kv_stop=torch.tensor([1500, 1500])),
    "right padding": Geometry(2, 4, 1, 1500, 1500, kv_start=torch.tensor([0, 0]), kv_stop=torch.tensor([1500, 1111])),
    "holes": Geometry(1, 4, 1, 900, 900, key_padding=torch.arange(900)[None] % 3 > 0),
    "few rows": Geometry(1, 3, 1, 40, 1040, 1000),
}


def on_gpu(g: Geometry) -> Geometry:
    names = ("kv_start", "kv_stop", "key_padding")
    there: dict[str, Any] = {name: None if getattr(g, name) is None else getattr(g, name).cuda() for name in names}
    return replace(g, **there)


def gpu_inputs(g: Geometry, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k as models pass them; the probe rows of even heads look 300 tokens back."""
    generator = torch.Generator("cuda").manual_seed(0)

    def tokens(heads: int, length: int) -> torch.Tensor:
        return torch.randn(g.batch, length, heads, head_dim, device="cuda", generator=generator).to(dtype)

    q, k = tokens(g.q_heads, g.q_len).transpose(1, 2), tokens(g.kv_heads, g.kv_len).transpose(1, 2)
    if g.q_len > 400:
        first = g.q_offset + g.q_len - 64 - 300
        q[:, ::2, -64:] = k[:, :1, first : first + 64] * 2
    return q, k


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("case", GPU_GEOMETRIES)
def test_gpu_probe_is_the_reference(case: str, head_dim: int, dtype: torch.dtype) -> None:
    g = on_gpu(GPU_GEOMETRIES[case])
    q, k = gpu_inputs(g, head_dim, dtype)
    options: dict[str, Any] = {"block_m": 128, "peaks": 8, "nearest": 128, "heads": range(1, g.q_heads)}
    assert why_not_fused(q, k) is None
    got = run_probe(q, k, g, head_dim**-0.5, **options)
    again = run_probe(q, k, g, head_dim**-0.5, **options)
    want = reference_probe(q.double(), k.double(), g, head_dim**-0.5, **options)
    for name in ("columns", "distances", "tiles", "peaks", "beside"):
        value = getattr(got, name)
        assert torch.equal(value, getattr(again, name)), name
        torch.testing.assert_close(value.double(), getattr(want, name), rtol=5e-5, atol=5e-5, msg=name)


@pytest.mark.gpu
def test_gpu_probe_never_waits() -> None:
    g = on_gpu(GPU_GEOMETRIES["left padding"])
    q, k = gpu_inputs(g, 128, torch.bfloat16)
    run_probe(q, k, g, 0.1, block_m=128, peaks=8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        probe = run_probe(q, k, g, 0.1, block_m=128, peaks=8)
        best_phase(probe.columns, torch.full((2, 4), 17, device="cuda"))
        phase_mass(probe.columns, [16, 100])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_probe_reaches_keys_beyond_31_bits() -> None:
    length = (1 << 20) + 77
    memory = torch.empty(length, 32, 128, dtype=torch.bfloat16, device="cuda")
    k = memory[:, 31:].transpose(0, 1)[None]
    k.normal_()
    q = torch.randn(1, 2, length, 128, dtype=torch.bfloat16, device="cuda")
    g = Geometry(1, 2, 1, length, length)
    far, near = (run_probe(q, keys, g, 0.1, block_m=128, peaks=8) for keys in (k, k.contiguous()))
    assert memory.numel() > 2**31
    for name in ("columns", "distances", "tiles", "peaks", "beside"):
        assert torch.equal(getattr(far, name), getattr(near, name)), name


@pytest.mark.gpu
def test_gpu_folded_mass_is_the_reference() -> None:
    mass = torch.rand(2, 5, 100_003, device="cuda")
    strides = (16, 17, 256, 1000, 25_000)
    for got, want in zip(phase_mass(mass, strides), phase_mass(mass.double().cpu(), strides), strict=True):
        torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=0)
    own = torch.tensor(strides, device="cuda").expand(2, -1)
    assert torch.equal(best_phase(mass, own, longest=25_000).cpu(), best_phase(mass.cpu(), own.cpu()))


def assert_compiles(arch: str, dtype: str, head_dim: int, special: bool) -> dict[str, Any]:
    compiled = compile_ahead(arch, dtype, head_dim, special=special, query_tiles=1 + special)
    assert_runs_on(compiled, arch)
    return compiled


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_compiles_ahead_of_time(arch: str) -> None:
    assert_compiles(arch, "bf16", 128, special=arch in ("sm_86", "gfx942"))


@pytest.mark.usefixtures("own_cache")
def test_hopper_moves_each_probability_by_one_shuffle() -> None:
    ptx = assert_compiles("sm_90", "bf16", 128, special=True)["probe_sums"].asm["ptx"]
    tile = probe_tiles("sm_90", 128).sums
    per_thread = tile.heads * 64 * tile.block_n // (32 * tile.num_warps)
    assert "wgmma.mma_async" in ptx
    assert "cp.async.cg.shared.global" in ptx
    assert "atom" not in ptx
    assert per_thread <= ptx.count("shfl.sync.idx") <= 1.5 * per_thread


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("arch", "head_dim", "special"), pairwise(sorted(SHARED_MEMORY), [64, 80, 256], [False, True]))
def test_all_architectures_and_head_dims(arch: str, head_dim: int, special: bool) -> None:
    assert_compiles(arch, "fp16", head_dim, special)
