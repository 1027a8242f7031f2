"""The Hopper family: source, ahead-of-time compilation and what it refuses. ``tests/test_gpu.py`` runs it."""

from __future__ import annotations

import builtins
import itertools
import os
import symtable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmi_compile.kernels import hopper, launch
from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.hopper import attention_hopper, compile_hopper_ahead
from mmi_compile.kernels.hopper_spec import HopperSpec, choose_hopper_spec, hopper_block_n, hopper_supported
from mmi_compile.kernels.patterns import AShape, ByModality, HeadPattern, VerticalSlash
from mmi_compile.kernels.planner import TileShape, dense_plan
from mmi_compile.kernels.render import rendered_source
from mmi_compile.kernels.run import families
from mmi_compile.kernels.segments import segment
from mmi_compile.kernels.spec import SHARED_MEMORY, Features
from tests.kernels.gluon_emulator import EmulatedKernel
from tests.random_plans import check_contract, masked_attention, random_plan, random_qkv

pytestmark = pytest.mark.usefixtures("own_cache")

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "kernels"
SPARSE = Features(has_blocks=True, has_sinks=True, has_columns=True, has_block_bits=True)
GATHERED = Features(has_sinks=True, has_columns=True, has_row_order=True)
EVERYTHING = Features(
    has_blocks=True, has_sinks=True, has_columns=True, has_block_bits=True, has_row_order=True, has_bounds=True,
    has_key_padding=True, has_window=True, has_regions=True, has_key_order=True,
)  # fmt: skip
REGIONS = Features(
    has_blocks=True, has_sinks=True, has_columns=True, has_block_bits=True, has_row_order=True, has_regions=True,
    has_key_order=True,
)  # fmt: skip


def test_rows_with_intervals_are_left_to_the_portable_kernel() -> None:
    with pytest.raises(ValueError, match="use the portable one"):
        choose_hopper_spec("bf16", 128, features=Features(has_row_bounds=True))


def every_spec() -> list[HopperSpec]:
    names = [f.name for f in fields(Features) if f.name not in ("use_descriptors", "has_row_bounds")]
    found = []
    for flags in itertools.product([False, True], repeat=len(names)):
        try:
            features = Features(**dict(zip(names, flags, strict=True)))
        except ValueError:
            continue
        found.append(choose_hopper_spec("bf16", 128, features=features, scheduled=features.has_row_order))
    cut = ("has_bounds", "has_key_padding", "has_window", "has_row_order", "has_regions", "has_key_order")
    plain = [s for s in found if not any(getattr(s, name) for name in cut)]
    return found + [replace(s, pair_loop=False) for s in plain]


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("hopper_ws_dense", choose_hopper_spec("bf16", 128, pair_loop=False)),
        ("hopper_ws_blocks_and_columns", choose_hopper_spec("bf16", 128, features=SPARSE, pair_loop=False)),
        ("hopper_ws_every_mask", choose_hopper_spec("fp16", 96, features=EVERYTHING, scheduled=True)),
    ],
)
def test_golden_source(name: str, spec: HopperSpec) -> None:
    path = GOLDEN / f"{name}.py"
    text = rendered_source(spec)
    if os.environ.get("MMI_ACCEPT") == "1":
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "the kernel changed; if that is meant, run again with MMI_ACCEPT=1"


def test_every_combination_of_features_uses_only_names_that_it_defines() -> None:
    for spec in every_spec():
        module = symtable.symtable(rendered_source(spec), "kernel", "exec")
        defined = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()}
        known = defined | set(dir(builtins))
        assert {s.get_name() for s in module.get_symbols() if s.is_referenced()} <= known, spec
        functions = module.get_children()
        assert functions
        for function in functions:
            assert isinstance(function, symtable.Function)
            assert not function.get_children()
            assert set(function.get_globals()) <= known, (spec, function.get_name())


def test_what_a_spec_lacks_is_absent_from_the_source() -> None:
    text = rendered_source(choose_hopper_spec("bf16", 128, pair_loop=False))
    for word in (
        "lists",
        "sink",
        "column",
        "list_bits",
        "row_order",
        "kv_start",
        "key_padding",
        "- window",
        "schedule",
    ):
        assert word not in text


def assert_compiles(spec: HopperSpec) -> None:
    kernel = compile_hopper_ahead(spec)
    assert kernel.metadata.shared <= spec.shared_bytes <= SHARED_MEMORY["sm_90"]
    for word in ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg", "mbarrier"):
        assert word in kernel.asm["ptx"]
    # A chain of products that the assembler has to serialise runs at half the speed.
    assert "serializ" not in kernel.asm["ptx"]


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_dense_compiles_ahead_of_time(head_dim: int) -> None:
    assert_compiles(choose_hopper_spec("bf16", head_dim, pair_loop=head_dim > 128))


@pytest.mark.parametrize(
    "features", [SPARSE, GATHERED, REGIONS, EVERYTHING], ids=["sparse", "gathered", "regions", "everything"]
)
def test_sparse_compiles_ahead_of_time(features: Features) -> None:
    assert_compiles(choose_hopper_spec("fp16", 128, features=features, scheduled=features.has_row_order))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [40, 64, 80, 256])  # 128: above
@pytest.mark.parametrize(
    "features", [SPARSE, GATHERED, REGIONS, EVERYTHING], ids=["sparse", "gathered", "regions", "everything"]
)
def test_all_head_dims_compile(features: Features, head_dim: int) -> None:
    assert_compiles(choose_hopper_spec("bf16", head_dim, features=features, scheduled=features.has_row_order))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim", "reason"),
    [
        ("fp32", 128, None, "fp16 and bf16"),
        ("bf16", 32, None, "head dim 32"),
        ("bf16", 100, None, "head dim 100"),
        ("bf16", 512, None, "head dim 512"),
        ("bf16", 128, 64, "values of head dim 64"),
    ],
)
def test_what_it_cannot_serve_is_named(dtype: str, head_dim: int, value_dim: int | None, reason: str) -> None:
    said = hopper_supported(dtype, head_dim, value_dim)
    assert said is not None
    assert reason in said
    if value_dim is None:
        with pytest.raises(ValueError, match=reason):
            choose_hopper_spec(dtype, head_dim)


def test_a_plan_with_other_tiles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "why_not", lambda q, k, v: None)
    g = Geometry(1, 1, 1, 200, 200)
    q = torch.zeros(1, 1, 200, 256, dtype=torch.bfloat16)
    assert hopper_block_n(256) == 64
    with pytest.raises(ValueError, match="128 x 128 tiles, the Hopper kernel needs 128 x 64"):
        attention_hopper(q, q, q, dense_plan(g, TileShape(128, 128), "cpu"), 1.0)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """``attention_hopper`` on CPU tensors, with the rendered source run by the emulator."""

    def gathered(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, group: int) -> tuple[torch.Tensor, ...]:
        index = keys.clamp(0, k.shape[2] - 1).long()[..., None].expand(-1, -1, -1, k.shape[-1])
        return tuple(t.repeat_interleave(group, 1).gather(2, index) for t in (k, v))

    monkeypatch.setattr(launch, "_gathered", gathered)
    monkeypatch.setattr(launch, "why_not", lambda q, k, v: None)
    monkeypatch.setattr(hopper, "kernel_module", lambda spec: SimpleNamespace(attention=EmulatedKernel(spec)))
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 3)


@pytest.mark.usefixtures("emulated")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), head_dim=st.sampled_from([40, 64]), max_len=st.sampled_from([40, 300, 700]))
def test_the_kernels_source_is_attention_over_the_plans_mask(seed: int, head_dim: int, max_len: int) -> None:
    plan = random_plan(seed, block_m=128, block_n=128, max_len=max_len)
    q, k, v = random_qkv(seed, plan.geometry, head_dim, torch.float16)
    want = masked_attention(q, k, v, plan.to_mask(), 0.1)
    live = plan.geometry.live_keys("cpu")
    if live is not None:
        v = v.masked_fill(~live[:, None, :, None], float("nan"))
    out = attention_hopper(q, k, v, plan, 0.1).double()
    torch.testing.assert_close(out, want, atol=2e-3, rtol=2e-3)


@pytest.mark.usefixtures("emulated")
def test_plans_of_modalities_run_as_they_are() -> None:
    g, tiles = Geometry(1, 3, 1, 700, 700), TileShape(128, 128)
    q, k, v = random_qkv(0, g, 64, torch.float16)
    ids = (torch.arange(700) % 23 < 17).to(torch.int8)[None]
    heads: list[HeadPattern] = [
        ByModality("2d", AShape(8, 64), (((1, 1), VerticalSlash(30, 20)), ((0, 1), VerticalSlash(9, 1)))),
        ByModality("q", AShape(8, 64), ((1, VerticalSlash(30, 20)),)),
        VerticalSlash(30, 20),
    ]
    plan = build_bounded_plan(heads, q.float(), k.float(), g, 0.1, tiles, segment(ids, (0, 1), g, tiles))
    assert plan.regions == 2
    want = masked_attention(q, k, v, plan.to_mask(), 0.1)
    torch.testing.assert_close(attention_hopper(q, k, v, plan, 0.1).double(), want, atol=2e-3, rtol=2e-3)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("boundary", ["q", "2d"])
def test_tiles_without_rows_end(boundary: str) -> None:
    """A grouping has tiles to spare; where groups fill theirs, those hold no row at all."""
    g, tiles = Geometry(1, 1, 1, 640, 640), TileShape(128, 128)
    q, k, v = random_qkv(0, g, 64, torch.float16)
    ids = (torch.arange(640) % 5 > 1).to(torch.int8)[None]  # 256 and 384 tokens
    place: Any = 1 if boundary == "q" else (1, 1)
    head = ByModality(boundary, AShape(8, 64), ((place, VerticalSlash(30, 20)),))  # type: ignore[arg-type]
    plan = build_bounded_plan([head], q.float(), k.float(), g, 0.1, tiles, segment(ids, (0, 1), g, tiles))
    assert bool((plan.rows() < 0).all(-1).any())
    check_contract(plan)
    want = masked_attention(q, k, v, plan.to_mask(), 0.1)
    torch.testing.assert_close(attention_hopper(q, k, v, plan, 0.1).double(), want, atol=2e-3, rtol=2e-3)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("q_offset", [0, 128, 77])
def test_dense_and_small_key_tiles(q_offset: int) -> None:
    for head_dim in (64, 256):
        g = Geometry(1, 2, 1, 300, 300 + q_offset, q_offset)
        q, k, v = random_qkv(0, g, head_dim, torch.float16)
        plan = dense_plan(g, TileShape(128, hopper_block_n(head_dim)), "cpu")
        want = masked_attention(q, k, v, plan.to_mask(), -0.05)
        torch.testing.assert_close(attention_hopper(q, k, v, plan, -0.05).double(), want, atol=2e-3, rtol=2e-3)


def test_the_cpu_has_no_family() -> None:
    assert families(torch.device("cpu"), torch.bfloat16, 128) == ()
