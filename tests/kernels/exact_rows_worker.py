"""Runs the kernels of the guard in Triton's interpreter, one JSON request per line of standard input.

A process of its own for the reason given in ``interpreter_worker.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmi_compile.kernels.exact_rows import ExactRows, fused_exact_rows, reference_exact_rows
from mmi_compile.kernels.fused_probe import PassTile
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.modality_probe import ModalityTiles
from mmi_compile.kernels.planner import make_dense
from tests.kernels.serving import serve
from tests.random_plans import random_plan, random_qkv

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # the interpreter multiplies bf16 wrongly


def check(
    seed: int, head_dim: int = 16, dtype: str = "fp32", block_m: int = 16, block_n: int = 16, tile_n: int = 64,
    pack: int = 2, count: int = 40, scale: float = 0.3, programs: int = 8, max_len: int = 120, poison: bool = False,
    nan: bool = False, dense: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Compare rows of one random plan with the reference in float64.

    ``nan``: in the queries of head 0; ``dense``: every tile sees all.
    """
    plan = random_plan(seed, block_m=block_m, block_n=block_n, max_len=max_len, regions=False)
    if dense:
        plan = make_dense(plan, torch.ones(1, 1, 1, dtype=torch.bool))
    g = plan.geometry
    q, k, v = random_qkv(seed, g, head_dim, DTYPES[dtype])
    if seed % 3 == 0:  # rows that are not multiples of 8 elements apart
        k, v = (torch.cat([x, x[..., :3]], -1)[..., :head_dim] for x in (k, v))
    clean = k, v
    if poison:
        alive = g.live_keys("cpu")
        if alive is not None:
            k, v = (x.masked_fill(~alive[:, None, :, None], float("nan")) for x in (k, v))
    if nan:
        q[:, 0] = float("nan")
    rows = torch.randint(0, g.q_len, (g.batch, count), generator=torch.Generator().manual_seed(seed))
    tile = PassTile(pack, tile_n, 4, 1)
    launch: dict[str, Any] = {"tiles": ModalityTiles(tile, tile, tile), "programs": programs}
    got, again = (fused_exact_rows(q, k, v, plan, scale, rows, **launch) for _ in range(2))
    alone = fused_exact_rows(q, k, None, plan, scale, rows, **launch)
    want = reference_exact_rows(q.double(), *(x.double() for x in clean), plan, scale, rows)
    return {
        "error": {name: difference(getattr(got, name), getattr(want, name), nan) for name in ExactRows._fields},
        "repeats": all(same(a, b) for a, b in zip(got, again, strict=True)),
        "alone": alone.outputs is None and same(alone.covered, got.covered) and same(alone.total, got.total),
        "recall": got.recall.nan_to_num(-1.0).flatten().tolist(),
        "heads": g.q_heads,
        "seen": features(plan.geometry) + [name for name in ("lists", "columns") if getattr(plan, name).numel()],
    }


def difference(got: Tensor | None, want: Tensor | None, nan: bool) -> float:
    """Relative to 1 and more; NaN where one of the two has it is infinitely far unless both should have some."""
    assert got is not None
    assert want is not None
    if got.shape != want.shape:
        return 1e9
    if nan and not torch.equal(got.isnan(), want.isnan()):
        return 1e9
    off = (got.double() - want).abs() / want.abs().clamp(min=1.0)
    off = torch.where(got.isnan() & want.isnan(), 0.0, off).nan_to_num(1e9)
    return off.max().item() if off.numel() else 0.0


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


def features(g: Geometry) -> list[str]:
    values = {name: getattr(g, name) for name in ("window", "kv_start", "key_padding", "q_offset")}
    return [name for name, x in values.items() if x is not None and not (isinstance(x, int) and x == 0)]


if __name__ == "__main__":
    serve(check)
