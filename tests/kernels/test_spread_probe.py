"""The spread probe: its kernels in Triton's interpreter against the reference, and the reference against a softmax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels.fused_probe import why_not_fused
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.reference import probabilities_reference
from mmi_compile.kernels.spread_probe import (
    SPREAD_GROUPS,
    compile_ahead,
    reference_spread_probe,
    run_spread_probe,
    spread_rows,
)
from tests.kernels.ahead import assert_runs_on
from tests.kernels.interpreter import Worker, asking
from tests.kernels.test_modality_probe import GPU_GEOMETRIES, gpu_case
from tests.pairs import pairwise
from tests.strategies import geometries, random_inputs

# Relative to masses of 1 and more: rounding of scores of size s shifts a probability by s / 2^24 of itself.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with asking("spread_probe_worker.py") as ask:
        yield ask


def assert_is_the_reference(answer: dict[str, Any]) -> None:
    assert answer["shapes"]
    assert answer["error"] <= TOLERANCE
    assert answer["repeats"]


@given(
    seed=st.integers(0, 2**31),
    head_dim=st.sampled_from([8, 16, 24, 40]),
    dtype=st.sampled_from(["fp32", "fp16"]),
    block_m=st.sampled_from([16, 64, 128]),
    block_n=st.sampled_from([64, 128]),
    tile_n=st.sampled_from([64, 128]),
    pack=st.sampled_from([1, 2]),
    scale=st.sampled_from([0.3, -0.5, 0.0]),
    programs=st.integers(1, 40),
    poison=st.booleans(),
)
def test_kernels_are_the_reference(worker: Worker, **case: Any) -> None:
    assert_is_the_reference(worker(**case))


@pytest.mark.parametrize("case", [{"seed": 0}, {"seed": 3, "pack": 1}, {"seed": 4, "programs": 40, "head_dim": 24}])
def test_kernels_read_keys_by_modality_as_the_reference_does(worker: Worker, case: dict[str, int]) -> None:
    answer = worker(parts=True, **case)
    assert_is_the_reference(answer)
    assert answer["mass"] > 10


def test_every_mask_is_met(worker: Worker) -> None:
    seen: set[str] = set()
    mass = 0.0
    for seed in range(20):
        answer = worker(seed=seed, block_m=16, max_len=150)
        assert_is_the_reference(answer)
        seen |= set(answer["seen"])
        mass += answer["mass"]
    assert seen == {"window", "kv_start", "key_padding", "q_offset"}
    assert mass > 100


@given(
    geometry=geometries(max_len=90), groups=st.sampled_from([2, 8, 16]), block_m=st.integers(1, 70),
    block_n=st.integers(1, 40), seed=st.integers(0, 99),
)  # fmt: skip
def test_reference_sums_the_softmax(geometry: Geometry, groups: int, block_m: int, block_n: int, seed: int) -> None:
    g = geometry
    x = random_inputs(g, seed=seed, sharpness=4.0)
    sink_stop = torch.tensor([g.kv_len // 5])
    spread = spread_rows(g, x.q.device, groups, block_m, sink_stop=sink_stop, zone=g.kv_len // 7)
    rows = spread.rows.flatten(1).long()
    assert (rows >= 0).all()
    assert (rows < g.q_len).all()
    by_group = rows.unflatten(1, (2 * groups, -1))
    assert (by_group // block_m == by_group[..., :1] // block_m).all()  # each group in one query tile
    probe = reference_spread_probe(x.q.double(), x.k.double(), g, 1.0, spread, block_n)
    all_rows = probabilities_reference(x.q, x.k, g.to_mask()[:, None], 1.0).nan_to_num(0.0)
    weights = all_rows.gather(2, rows[:, None, :, None].expand(-1, g.q_heads, -1, g.kv_len))
    mass = weights.unflatten(2, (2 * groups, -1)).sum(3)
    blocks = F.pad(mass, (0, -g.kv_len % block_n)).unflatten(-1, (-1, block_n)).sum(-1)
    torch.testing.assert_close(probe.blocks, blocks)
    keys = torch.arange(g.kv_len).expand(g.batch, g.q_heads, -1)
    torch.testing.assert_close(probe.mass_at(keys), mass)
    torch.testing.assert_close(probe.mass_at(keys, 1), mass[:, :, :groups])
    stop = (spread.starts[:, :groups] + g.q_offset - g.kv_len // 7).clamp(max=g.kv_len - 1)
    key = torch.arange(g.kv_len)
    inside = ((key >= sink_stop) & (key < stop[..., None]))[:, None]  # [B, 1, G, kv_len]
    torch.testing.assert_close(probe.credit_at(keys), mass[:, :, :groups] * inside)
    torch.testing.assert_close(probe.credit[:, 0], (mass[:, :, :groups] * inside).sum(2))
    none = torch.full((g.batch, g.q_heads, 2), g.kv_len)
    assert not probe.mass_at(none).any()


def test_groups_stand_all_over_the_live_prompt() -> None:
    g = Geometry(2, 1, 1, 4096, 4096, kv_start=torch.tensor([0, 2048]), kv_stop=torch.tensor([4096, 4096]))
    spread = spread_rows(g, torch.device("cpu"), 4, 128, sink_stop=torch.tensor([64]), zone=256)
    starts = spread.starts
    for element, (first, length) in enumerate([(0, 4096), (2048, 2048)]):
        eighths = sorted(((starts[element] - first) * 8 // length).tolist())
        assert eighths == list(range(8))
    # Every other group checks.
    assert (starts[:, :4] < starts[:, 4:]).all()
    assert (starts[:, 1:4] > starts[:, 4:7]).all()


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_ahead_of_time(arch: str) -> None:
    assert_compiles(arch, "bf16", 128, special=arch == "gfx942")


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("arch", "head_dim", "special"),
    pairwise(["sm_80", "sm_86", "sm_90", "sm_120", "gfx942"], [64, 80, 256], [False, True]),
)
def test_all_architectures_and_head_dims(arch: str, head_dim: int, special: bool) -> None:
    assert_compiles(arch, "fp16", head_dim, special)


def assert_compiles(arch: str, dtype: str, head_dim: int, special: bool) -> None:
    pytest.importorskip("triton", reason="triton is published for Linux only")
    assert_runs_on(compile_ahead(arch, dtype, head_dim, special=special), arch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("case", GPU_GEOMETRIES)
def test_gpu_probe_is_the_reference(case: str, head_dim: int, dtype: torch.dtype) -> None:
    g, q, k = gpu_case(case, head_dim, dtype)
    scale, sink_stop = head_dim**-0.5, torch.tensor([128], device="cuda")
    spread = spread_rows(g, q.device, SPREAD_GROUPS, 128, sink_stop=sink_stop, zone=128)
    keys = torch.arange(0, g.kv_len, 3, device="cuda").expand(g.batch, g.q_heads, -1)
    assert why_not_fused(q, k) is None
    run_spread_probe(q, k, g, scale, spread, 128).mass_at(keys)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, again = (run_spread_probe(q, k, g, scale, spread, 128) for _ in range(2))
        found = got.mass_at(keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = reference_spread_probe(q.double(), k.double(), g, scale, spread, 128)
    for name in ("blocks", "credit"):
        assert torch.equal(getattr(got, name), getattr(again, name)), name
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=5e-5, atol=5e-5, msg=name)
    torch.testing.assert_close(found.double(), want.mass_at(keys), rtol=5e-5, atol=5e-5)
