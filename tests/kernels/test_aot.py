"""Kernels compile ahead of time for real architectures, on machines without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmi_compile.kernels.spec import SHARED_MEMORY, Features, choose_spec
from mmi_compile.kernels.triton_attention import compile_ahead
from tests.pairs import pairwise

pytestmark = pytest.mark.usefixtures("own_cache")

pytest.importorskip("triton", reason="triton is published for Linux only")

SPARSE = Features(has_blocks=True, has_sinks=True, has_columns=True)
GROUPED = Features(has_blocks=True, has_columns=True, has_block_bits=True, has_row_order=True)
EVERYTHING = Features(
    has_blocks=True, has_sinks=True, has_columns=True, has_block_bits=True, has_row_order=True, has_bounds=True,
    has_key_padding=True, has_window=True, has_regions=True, has_key_order=True,
)  # fmt: skip
INTERVALS = Features(has_row_bounds=True)
REGIONS = Features(
    has_blocks=True, has_sinks=True, has_columns=True, has_block_bits=True, has_row_order=True, has_regions=True,
    has_key_order=True,
)  # fmt: skip
FEATURES = {"dense": Features(), "grouped": GROUPED, "regions": REGIONS, "everything": EVERYTHING}


def assert_compiles(
    arch: str, dtype: str, head_dim: int, features: Features, descriptors: bool | None = None
) -> dict[str, str]:
    spec = choose_spec(arch, dtype, head_dim, features=features, descriptors=descriptors)
    compiled = compile_ahead(spec, arch)
    gathers = features.has_columns or features.has_key_order
    assert set(compiled) == {"attention"} | ({"compact_columns"} if gathers else set())
    for kernel in compiled.values():
        assert kernel.metadata.shared <= SHARED_MEMORY[arch]
        assert ("hsaco" if arch.startswith("gfx") else "cubin") in kernel.asm
    assert compiled["attention"].metadata.shared <= spec.shared_bytes + (6 if features.has_regions else 2) * 1024
    return {name: text for name, text in compiled["attention"].asm.items() if isinstance(text, str)}


def test_ampere() -> None:
    assembly = assert_compiles("sm_80", "bf16", 128, SPARSE)["ptx"]
    assert "cp.async.cg" in assembly


@pytest.mark.parametrize("head_dim", [80, 128])
def test_pointer_loads_are_wide_and_pipelined(head_dim: int) -> None:
    # Without proof of alignment Triton would load 2 bytes at a time, in no pipeline, and spill registers.
    assembly = assert_compiles("sm_80", "bf16", head_dim, Features())["ptx"]
    assert "cp.async.cg.shared.global" in assembly
    assert "ld.global.b16" not in assembly


def test_hopper_uses_descriptors_and_warp_group_products() -> None:
    assembly = assert_compiles("sm_90", "bf16", 128, SPARSE)["ptx"]
    assert "cp.async.bulk.tensor" in assembly
    assert "wgmma.mma_async" in assembly


def test_hopper_with_every_mask() -> None:
    assembly = assert_compiles("sm_90", "fp16", 96, EVERYTHING)["ptx"]
    assert "cp.async.bulk.tensor" not in assembly
    assert "wgmma.mma_async" in assembly


@pytest.mark.parametrize("features", [GROUPED, REGIONS], ids=["grouped", "regions"])
def test_blackwell(features: Features) -> None:
    assert_compiles("sm_100", "bf16", 64, features)


def test_keys_of_two_spaces_are_read_as_fast_as_those_of_one() -> None:
    """Where a tile comes from is chosen once per region, which must not cost its wide, pipelined loads."""
    assembly = assert_compiles("sm_80", "bf16", 128, REGIONS)["ptx"]
    assert "cp.async.cg.shared.global" in assembly
    assert "ld.global.b16" not in assembly
    assert "cp.async.bulk.tensor" in assert_compiles("sm_90", "bf16", 128, REGIONS)["ptx"]


@pytest.mark.parametrize(
    ("arch", "features"),
    [
        ("sm_80", INTERVALS),
        ("sm_90", INTERVALS),
        ("sm_90", replace(INTERVALS, has_bounds=True, has_key_padding=True)),
        ("sm_80", replace(EVERYTHING, has_window=False, has_row_bounds=True)),
    ],
)
def test_rows_with_intervals_of_their_own(arch: str, features: Features) -> None:
    assert_compiles(arch, "bf16", 128, features)


def test_instinct() -> None:
    assert_compiles("gfx942", "bf16", 128, SPARSE)


def test_unknown_architectures_are_named() -> None:
    with pytest.raises(ValueError, match="sm_70 has no kernel; supported are sm_80"):
        compile_ahead(choose_spec("sm_80", "bf16", 128), "sm_70")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("features", "arch", "dtype", "head_dim"),
    pairwise(list(FEATURES), ["sm_80", "sm_90"], ["bf16", "fp16"], [64, 80, 96, 128, 256]),
)
def test_all_head_dims(features: str, arch: str, dtype: str, head_dim: int) -> None:
    assert_compiles(arch, dtype, head_dim, FEATURES[features])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim"), pairwise(sorted(SHARED_MEMORY), ["bf16", "fp32"], [64, 128, 256])
)
def test_all_architectures(arch: str, dtype: str, head_dim: int) -> None:
    assert_compiles(arch, dtype, head_dim, SPARSE)
