"""Runs generated kernels in Triton's interpreter, one JSON request per line of standard input.

The interpreter replaces Triton for a whole process, so it gets a process of its own: the caller starts this file with
``TRITON_INTERPRET=1`` and the rest of the suite, Inductor included, never meets it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.launch import dtype_name, plan_features
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.planner import TileShape, dense_plan
from mmi_compile.kernels.spec import KernelSpec
from mmi_compile.kernels.triton_attention import attention_triton
from tests.kernels.serving import serve
from tests.random_plans import masked_attention, random_plan, random_qkv

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # bf16 is refused


def check(
    seed: int, head_dim: int = 16, dtype: str = "fp32", block_m: int = 16, block_n: int = 16, scale: float = 0.3,
    descriptors: bool = False, poison: bool = False, max_len: int = 80,
) -> dict[str, Any]:  # fmt: skip
    """Compare one random plan with float64 attention over ``plan.to_mask()``."""
    plan = random_plan(seed, block_m=block_m, block_n=block_n, max_len=max_len, intervals=True)
    if plan.geometry.has_rows and seed % 2:
        plan = dense_plan(plan.geometry, TileShape(block_m, block_n), "cpu")
    if seed % 3:
        plan = _without_idle_lists(plan)
    g = plan.geometry
    q, k, v = random_qkv(seed, g, head_dim, DTYPES[dtype])
    want = masked_attention(q, k, v, plan.to_mask(), scale)
    if poison:
        k, v = _poison_dead_keys(k, g), _poison_dead_keys(v, g)
    features = plan_features(plan)
    spec = None
    if descriptors and not (features.has_bounds or features.has_key_padding):
        flags = {name: getattr(features, name) for name in features.__dataclass_fields__} | {"use_descriptors": True}
        spec = KernelSpec(
            head_dim=head_dim, dtype=dtype_name(q.dtype), block_m=block_m, block_n=block_n, num_warps=4, num_stages=1,
            **flags,
        )  # fmt: skip
    out = torch.full_like(q, float("nan"))
    got = attention_triton(q, k, v, plan, scale, spec=spec, out=out)
    assert got is out
    error = (got.double() - want).abs().max().item() if want.numel() else 0.0
    dead = ~plan.to_mask().any(-1)
    return {
        "error": error if error == error else "nan",
        "dead_rows_zero": bool((got[dead] == 0).all()),
        "features": [name for name in features.__dataclass_fields__ if getattr(features, name)],
        "descriptors": spec is not None,
        "dead_rows": int(dead.sum()),
    }


def _without_idle_lists(plan: Plan) -> Plan:
    """Where no tile lists a block, the plan without lists: its kernel has no loop for them."""
    if bool(plan.record.num_blocks.any()):
        return plan
    return replace(plan, lists=plan.lists[:0], list_bits=None)


def _poison_dead_keys(t: torch.Tensor, g: Geometry) -> torch.Tensor:
    """NaN in every padded key: what a padded position holds must not matter."""
    position = torch.arange(g.kv_len)
    dead = torch.zeros(g.batch, g.kv_len, dtype=torch.bool)
    if g.kv_start is not None and g.kv_stop is not None:
        dead |= (position < g.kv_start[:, None]) | (position >= g.kv_stop[:, None])
    if g.key_padding is not None:
        dead |= ~g.key_padding
    return t.masked_fill(dead[:, None, :, None], float("nan"))


if __name__ == "__main__":
    serve(check)
