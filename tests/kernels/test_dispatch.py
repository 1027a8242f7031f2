"""Which path serves a call, and what is noted about it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmi_compile import runtime
from mmi_compile.cost_file import Costs
from mmi_compile.kernels import dispatch
from mmi_compile.kernels.cost import Coefficients
from mmi_compile.kernels.dispatch import CPU_DENSE_BELOW, dense_flop
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry


def run(
    tokens: int, *, policy: str = "adaptive", min_tokens: int = 0, max_density: float = 0.5, dense_tail: bool = True
):  # fmt: skip
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, tokens, 16, generator=random)
    k, v = (torch.randn(1, 2, tokens, 16, generator=random) for _ in range(2))
    # Keys near the row and the first one weigh most: structure that a pattern can hold.
    position = torch.arange(tokens) / 16
    q[..., 0], q[..., 1] = 12 * position.cos(), 12 * position.sin()
    k[..., 0], k[..., 1] = 12 * position.cos(), 12 * position.sin()
    geometry = Geometry(batch=1, q_heads=4, kv_heads=2, q_len=tokens, kv_len=tokens)
    return dispatch.attention(
        q, k, v, geometry, 0.25, lambda: torch.full_like(q, torch.nan), policy=policy, recall=0.9,
        max_density=max_density, min_tokens=min_tokens, dense_tail=dense_tail,
    )  # fmt: skip


def test_exact_is_dense():
    out, ran = run(300, policy="exact")
    assert ran.path == "dense (policy exact)"
    assert ran.density == 1.0
    assert ran.choice is None
    assert out.isfinite().all()


def test_short_prompts_are_dense_and_say_so():
    _, ran = run(300, min_tokens=301)
    assert ran.path == "dense (300 tokens < min_tokens 301)"
    _, ran = run(300, min_tokens=-1)
    assert ran.path == f"dense (300 tokens < min_tokens {CPU_DENSE_BELOW})"
    _, ran = run(300, min_tokens=300)
    assert ran.path == "tile-sparse PyTorch"


def test_adaptive_notes_choice_and_density():
    out, ran = run(1024)
    assert out.isfinite().all()
    assert (ran.q_len, ran.kv_len) == (1024, 1024)
    assert ran.density.shape == (1, 4)
    assert ((ran.density > 0) & (ran.density <= 1)).all()
    (heads,) = ran.choice.describe()
    assert len(heads) == 4


def test_no_tokens_fill_the_output_with_zeros():
    out, ran = run(0)
    assert out.shape == (1, 4, 0, 16)
    assert ran.path == "nothing to attend to"


def test_runs_are_counted_per_attention():
    runtime.forget()
    for _ in range(3):
        runtime.record_attention("a", runtime.AttentionRun(5, 5, "dense"))
    runtime.record_attention("b", runtime.AttentionRun(5, 5, "dense"))
    counts = [run.calls if (run := runtime.attention_run(key)) else None for key in ("a", "b", "c")]
    assert counts == [3, 1, None]
    runtime.forget()
    assert runtime.attention_run("a") is None


def test_work_of_dense_attention_is_that_of_its_pairs():
    whole = Geometry(batch=2, q_heads=4, kv_heads=2, q_len=10, kv_len=10)
    assert dense_flop(whole, 16) == 4 * 16 * int(whole.to_mask().sum()) * 4
    chunk = Geometry(batch=1, q_heads=1, kv_heads=1, q_len=3, kv_len=10, q_offset=7)
    assert dense_flop(chunk, 1) == 4 * int(chunk.to_mask().sum())


def test_the_last_rows_of_adaptive_heads_may_be_sparse():
    (_, kept), (_, dropped) = (run(2000, max_density=1.0, dense_tail=tail) for tail in (True, False))
    assert (dropped.density < kept.density).all()


def test_a_config_needs_heads():
    with pytest.raises(ValueError, match="needs the heads of the layer"):
        run(300, policy="config")


@pytest.mark.parametrize(("nanoseconds", "dense"), [(5.0, True), (50.0, False)])
def test_a_calibrated_gpu_says_which_prompts_are_too_short(nanoseconds: float, dense: bool) -> None:
    """Dense attention of 10 ms is where probe and plan begin to pay."""
    heads, tokens, tiles = 28, 16384, TileShape(128, 128)
    g = Geometry(1, heads, 4, tokens, tokens)
    there: Any = SimpleNamespace(device=torch.device("cuda"), shape=(1, heads, tokens, 128))  # nothing is computed
    cost = Coefficients(0.0, 0.0, *[nanoseconds * 1e-9] * 3, 0.0, nanoseconds * 1e-9)
    reason = dispatch._why_dense(there, g, "adaptive", -1, Costs(cost, measured=True), tiles)
    assert bool(reason) == dense
    assert not dense or "1.2 ms < 10 ms" in reason
