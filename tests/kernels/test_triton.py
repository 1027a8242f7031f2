"""Generated kernels, run by Triton's interpreter in a process of their own, against float64 attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels import launch
from mmi_compile.kernels.launch import plan_features
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.spec import Features, choose_spec
from mmi_compile.kernels.triton_attention import attention_triton
from tests.kernels.interpreter import Interpreter, running
from tests.random_plans import random_plan, random_qkv

pytest.importorskip("triton", reason="triton is published for Linux only")

TOLERANCE = {"fp32": 2e-5, "fp16": 4e-3}  # absolute, for outputs of order one


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    with running("interpreter_worker.py", MMI_CACHE_DIR=str(tmp_path_factory.mktemp("kernels"))) as worker:
        yield worker


def assert_equals_the_mask(answer: dict[str, Any], dtype: str = "fp32") -> None:
    assert "failure" not in answer, answer["failure"]
    assert answer["error"] != "nan"
    assert answer["error"] <= TOLERANCE[dtype]
    assert answer["dead_rows_zero"]


@given(
    seed=st.integers(0, 2**31),
    head_dim=st.sampled_from([8, 16, 24, 40]),
    dtype=st.sampled_from(["fp32", "fp16"]),
    block_m=st.sampled_from([16, 32]),
    block_n=st.sampled_from([16, 32]),
    scale=st.sampled_from([0.3, 1.0, -0.5, 0.0]),
    descriptors=st.booleans(),
)
def test_kernel_is_softmax_attention_over_the_plans_mask(interpreter: Interpreter, **case: Any) -> None:
    assert_equals_the_mask(interpreter(**case), case["dtype"])


def test_every_loop_and_mask_is_exercised(interpreter: Interpreter) -> None:
    every = {f.name for f in fields(Features)}
    met: set[str] = set()
    absent: set[str] = set()
    dead_rows = 0
    for seed in range(36):
        answer = interpreter(seed=seed, descriptors=seed % 2 == 0, max_len=60)
        assert_equals_the_mask(answer)
        here = {*answer["features"], *(["use_descriptors"] if answer["descriptors"] else [])}
        met |= here
        absent |= every - here
        dead_rows += answer["dead_rows"]
    assert met == absent == every
    assert dead_rows > 0


@given(seed=st.integers(0, 2**31))
def test_nan_in_padded_keys_reaches_no_output(interpreter: Interpreter, seed: int) -> None:
    assert_equals_the_mask(interpreter(seed=seed, poison=True, max_len=48))


@pytest.mark.parametrize("shared", [False, True])
def test_list_bits_beyond_the_first_word(interpreter: Interpreter, shared: bool) -> None:
    seed = next(s for s in range(1000, 3000) if _uses_late_bits(s, shared))
    assert_equals_the_mask(interpreter(seed=seed, max_len=1100))


def _uses_late_bits(seed: int, shared: bool) -> bool:
    """Whether a tile with columns lists a block more than 32 blocks away from the base of its list."""
    plan = random_plan(seed, max_len=1100)
    if plan.geometry.batch * plan.geometry.q_heads > 2 or plan.list_bits is None:
        return False
    r = plan.record
    away = (torch.arange(plan.key_blocks) - r.list_base[..., None]).abs()
    late = plan.listed_blocks() & (away >= 32) & ((r.list_base > 0) == shared)[..., None]
    return bool((late.any(-1) & (r.num_columns > 0)).any())


def test_the_interpreter_refuses_bf16_which_it_would_compute_wrongly(interpreter: Interpreter) -> None:
    assert "fp16 or fp32" in interpreter(seed=0, dtype="bf16")["failure"]


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    plan = random_plan(0)
    q, k, v = random_qkv(0, plan.geometry, 16, torch.float32)
    with pytest.raises(ValueError, match="architecture cpu has no kernel"):
        attention_triton(q, k, v, plan, 1.0)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_must_be_finite(scale: float) -> None:
    plan = random_plan(0)
    q, k, v = random_qkv(0, plan.geometry, 16, torch.float32)
    with pytest.raises(ValueError, match="finite"):
        attention_triton(q, k, v, plan, scale)


def _short(plan: Plan) -> dict[str, Any]:
    return {
        "tile": {"tiles": plan.tiles[:, :, :-1]},
        "record": {"tiles": plan.tiles[..., :-1]},
        "lists": {"lists": plan.lists[None]},
        "heads": {"columns": plan.columns[:, :-1]},
    }


@pytest.mark.parametrize("case", ["tile", "record", "lists", "heads"])
def test_plan_tensors_of_the_wrong_shape_are_refused(case: str) -> None:
    plan = next(p for p in map(random_plan, range(100)) if p.list_bits is not None and p.query_tiles > 1)
    q, k, v = random_qkv(0, plan.geometry, 16, torch.float32)
    with pytest.raises(ValueError, match=r"must be|do not hold"):
        attention_triton(q, k, v, replace(plan, **_short(plan)[case]), 1.0)


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 1, 5, 16), (3, 1, 1, 1)])
def test_tensors_that_do_not_fit_the_geometry_are_refused(shape: tuple[int, ...]) -> None:
    plan = random_plan(1)
    q, k, v = random_qkv(1, plan.geometry, 16, torch.float32)
    with pytest.raises(ValueError, match="must be"):
        attention_triton(torch.zeros(shape), k, v, plan, 1.0)
    with pytest.raises(ValueError, match="must be"):
        attention_triton(q, torch.zeros(shape), v, plan, 1.0)


def test_a_spec_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "why_not", lambda q, k, v: None)
    plan = next(p for p in map(random_plan, range(100)) if plan_features(p).has_blocks)
    q, k, v = random_qkv(0, plan.geometry, 16, torch.float32)
    fits = choose_spec("sm_80", "fp32", 16, features=plan_features(plan), block_m=16, block_n=16)
    for change, words in (
        ({"block_m": 32}, "tiles, the plan"),
        ({"head_dim": 32}, "head dim"),
        ({"dtype": "fp16"}, "head dim"),
        ({"has_blocks": False, "has_block_bits": False}, "the plan needs"),
    ):
        with pytest.raises(ValueError, match=words):
            attention_triton(q, k, v, plan, 1.0, spec=replace(fits, **change))
