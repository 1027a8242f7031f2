"""The choice of a spec, the rendered source and its cache."""

from __future__ import annotations

import ast
import builtins
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels.render import cache_folder, digest, kernel_module, rendered_source, source_path
from mmi_compile.kernels.spec import SHARED_MEMORY, Features, KernelSpec, choose_spec, supported

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "kernels"

HOPPER = choose_spec("sm_90", "bf16", 128, features=Features(has_blocks=True, has_sinks=True, has_columns=True))
EVERY_MASK = choose_spec(
    "sm_80", "fp16", 80,
    features=Features(
        has_blocks=True, has_sinks=True, has_columns=True, has_block_bits=True, has_row_order=True, has_bounds=True,
        has_key_padding=True, has_window=True, has_regions=True, has_key_order=True,
    ),
)  # fmt: skip


def all_features() -> list[Features]:
    names = [f.name for f in fields(Features)]
    found = []
    for flags in itertools.product([False, True], repeat=len(names)):
        try:
            found.append(Features(**dict(zip(names, flags, strict=True))))
        except ValueError:
            continue
    return found


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMI_CACHE_DIR", str(tmp_path / "kernels"))


@pytest.mark.parametrize(
    ("name", "spec"), [("hopper_blocks_and_columns", HOPPER), ("ampere_every_mask", EVERY_MASK)], ids=lambda x: str(x)
)
def test_golden_source(name: str, spec: KernelSpec) -> None:
    path = GOLDEN / f"{name}.py"
    text = rendered_source(spec)
    if os.environ.get("MMI_ACCEPT") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "the kernel changed; if that is meant, run again with MMI_ACCEPT=1"


def test_every_combination_of_features_uses_only_names_that_it_defines() -> None:
    base = choose_spec("sm_90", "bf16", 96)
    flags = [f.name for f in fields(Features)]
    for features in all_features():
        tree = ast.parse(rendered_source(replace(base, **{name: getattr(features, name) for name in flags})))
        top = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} | {"triton", "tl"}
        top |= {t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets}  # type: ignore[attr-defined]
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
            known = top | {a.arg for a in function.args.args} | set(dir(builtins))
            known |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
            assert {n.id for n in names} <= known
            used = {n.id for n in names}
            assert {a.arg for a in function.args.args} - used <= {"q_len", "kv_len"}, features


def test_what_a_spec_lacks_is_absent_from_the_source() -> None:
    text = rendered_source(choose_spec("sm_80", "bf16", 128))
    for word in ("lists", "sink", "column", "list_bits", "row_order", "kv_start", "key_padding", "desc"):
        assert word not in text
    for word in ("region", "grouped", "slots", "key_positions", "HIDDEN", "biased", "uint32", " window,"):
        assert word not in text


@pytest.mark.parametrize("descriptors", [False, True])
def test_blocks_that_need_no_test_share_one_loop(descriptors: bool) -> None:
    """Each loop fills and drains a pipeline of its own, so short ones are dear."""
    features = Features(has_blocks=True, has_sinks=True, has_columns=True, has_block_bits=True, has_row_order=True)
    text = rendered_source(choose_spec("sm_90", "bf16", 128, features=features, descriptors=descriptors))
    tree = ast.parse(text)
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    assert len(loops) == 3  # pairs, whole blocks, columns
    assert sum("attend(acc" in ast.unparse(loop) for loop in loops) == 1


def test_the_same_spec_gives_the_same_text_in_another_process() -> None:
    code = (
        "from mmi_compile.kernels.render import rendered_source; from mmi_compile.kernels.spec import *; import sys;"
        "sys.stdout.write(rendered_source(choose_spec('sm_90', 'bf16', 64, features=Features(has_blocks=True))))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert other.stdout == rendered_source(choose_spec("sm_90", "bf16", 64, features=Features(has_blocks=True)))


def test_rendering_imports_no_triton() -> None:
    code = "import sys, mmi_compile.kernels.triton_attention; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_digest_names_the_spec() -> None:
    assert digest(HOPPER) == digest(replace(HOPPER))
    different = [HOPPER, EVERY_MASK, replace(HOPPER, num_stages=2), replace(HOPPER, num_warps=4)]
    assert len({digest(spec) for spec in different}) == 4
    assert digest(HOPPER) in rendered_source(HOPPER)


def test_many_writers_leave_one_whole_file() -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(source_path, [HOPPER] * 32))
    assert [p.name for p in cache_folder().iterdir()] == [paths.pop().name]
    assert source_path(HOPPER).read_text(encoding="utf-8") == rendered_source(HOPPER)


@pytest.mark.parametrize("damage", [b"", b"raise SystemExit\n", b"\xff\xfe"])
def test_a_damaged_file_is_written_again(damage: bytes) -> None:
    path = source_path(HOPPER)
    path.write_bytes(damage)
    assert source_path(HOPPER).read_text(encoding="utf-8") == rendered_source(HOPPER)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MMI_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match="set MMI_CACHE_DIR"):
        source_path(HOPPER)


def test_a_module_is_imported_once() -> None:
    pytest.importorskip("triton", reason="triton is published for Linux only")
    module = kernel_module(EVERY_MASK)
    assert module is kernel_module(replace(EVERY_MASK))
    assert callable(module.attention)


@given(
    arch=st.sampled_from(sorted(SHARED_MEMORY)),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    features=st.sampled_from(all_features()),
)
def test_every_choice_fits_its_architecture(arch: str, dtype: str, head_dim: int, features: Features) -> None:
    spec = choose_spec(arch, dtype, head_dim, features=features)
    assert spec.shared_bytes <= SHARED_MEMORY[arch]
    assert spec.block_d >= head_dim
    assert replace(spec.features, use_descriptors=False) == replace(features, use_descriptors=False)
    # The planner lays its plan out in these tiles, so the masks that it then needs must not change them.
    plain = choose_spec(arch, dtype, head_dim)
    assert (spec.block_m, spec.block_n) == (plain.block_m, plain.block_n)
    again = choose_spec(arch, dtype, head_dim, features=features, block_m=spec.block_m, block_n=spec.block_n)
    assert again == spec


def test_descriptors_where_the_architecture_has_them() -> None:
    assert HOPPER.use_descriptors
    assert not EVERY_MASK.use_descriptors
    assert not choose_spec("sm_90", "bf16", 128, features=Features(has_bounds=True)).use_descriptors
    assert not choose_spec("sm_90", "bf16", 128, descriptors=False).use_descriptors
    assert not choose_spec("sm_89", "bf16", 128, descriptors=True).use_descriptors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fp64", 128), "dtype fp64 has no kernel"),
        (("bf16", 100), "head dim 100 has no kernel"),
        (("bf16", 0), "head dim 0 has no kernel"),
        (("bf16", 264), "head dim 264 has no kernel"),
        (("bf16", 192, 128), "values of head dim 128 beside keys of 192"),
        (("bf16", 128, 128, "sm_75"), "architecture sm_75 has no kernel"),
    ],
)
def test_the_reason_is_given(arguments: tuple[object, ...], words: str) -> None:
    assert words in str(supported(*arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a", "sm_103", "sm_121", "gfx942", "gfx942:sramecc+:xnack-"])
def test_supported_attention_has_no_reason_against_it(arch: str) -> None:
    assert supported("bf16", 128, 128, arch) is None


def test_tiles_that_cannot_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="use smaller tiles"):
        choose_spec("sm_86", "fp32", 256, block_m=128, block_n=128)
    with pytest.raises(ValueError, match="power of two"):
        replace(HOPPER, block_m=48)
    with pytest.raises(ValueError, match="needs both"):
        Features(has_block_bits=True)
    with pytest.raises(ValueError, match="dead keys"):
        Features(use_descriptors=True, has_bounds=True)
