"""Runs the fused probe in Triton's interpreter, one JSON request per line of standard input.

A process of its own for the reason given in ``interpreter_worker.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mmi_compile.kernels.fused_probe import PassTile, ProbeTiles, fold, fold_by_head, fused_probe
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.probe import Probe, best_phase, phase_mass, reference_probe
from tests.kernels.serving import serve
from tests.random_plans import Draw, random_geometry, random_qkv

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # the interpreter multiplies bf16 wrongly


def check(
    seed: int, head_dim: int = 16, dtype: str = "fp32", block_m: int = 64, block_n: int = 64, pack: int = 2,
    scale: float = 0.3, programs: int = 8, peaks: int = 0, last_q: int = 64, max_len: int = 160, poison: bool = False,
    diagonals: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Compare one random probe with the reference in float64."""
    draw = Draw(torch.Generator().manual_seed(seed))
    g = random_geometry(draw, max_len=max_len)
    heads = draw.subset(draw.integer(1, g.q_heads), g.q_heads).tolist() if draw.chance(0.5) else None
    q, k, _ = random_qkv(seed, g, head_dim, DTYPES[dtype])
    if draw.chance(0.3):
        k = torch.cat([k, k[..., :3]], -1)[..., :head_dim]  # rows that are not multiples of 8 elements apart
    if peaks and g.q_len >= last_q:
        plant_diagonals(q, k, g, draw)
    if poison:
        dead = g.live_keys("cpu")
        k = k if dead is None else k.masked_fill(~dead[:, None, :, None], float("nan"))
    part = PassTile(pack, block_n, 4, 1)
    options: dict[str, Any] = {"block_m": block_m, "heads": heads, "last_q": last_q, "peaks": peaks, "nearest": block_m}
    options["diagonals"] = diagonals or peaks > 0
    launch: dict[str, Any] = {"tiles": ProbeTiles(part, part, part, part), "programs": programs}
    got = fused_probe(q, k, g, scale, **options, **launch)
    again = got if seed % 4 else fused_probe(q, k, g, scale, **options, **launch)
    want = reference_probe(q.double(), k.double(), g, scale, **options)
    return {
        "error": largest_error(got, want),
        "repeats": all(torch.equal(getattr(got, name), getattr(again, name)) for name in tensors()),
        "shapes": all(getattr(got, name).shape == getattr(want, name).shape for name in tensors()),
        "rows": torch.equal(got.rows, want.rows) and torch.equal(got.first_tile, want.first_tile),
        "peaks": int((want.peaks > 1e-3).sum()),
        "peaks_agree": peaks_agree(got, want),
        "seen": [name for name in ("window", "kv_start", "key_padding", "q_offset") if is_set(getattr(g, name))],
    }


def is_set(value: Any) -> bool:
    return value is not None and value is not False and not (isinstance(value, int) and value == 0)


def tensors() -> list[str]:
    return [f.name for f in fields(Probe)]


def largest_error(got: Probe, want: Probe) -> float | str:
    worst = 0.0
    for name in ("columns", "distances", "tiles", "peaks", "beside"):
        exact = getattr(want, name)
        difference = (getattr(got, name).double() - exact).abs() / exact.clamp(min=1.0)
        error = difference.max().item() if difference.numel() else 0.0
        if error != error:
            return f"nan in {name}"
        worst = max(worst, error)
    return worst


def peaks_agree(got: Probe, want: Probe) -> bool:
    """The same diagonals, where the reference leaves no doubt about their order."""
    clear = want.peaks > 1e-3
    return all(
        set(a[m].tolist()) == set(b[m].tolist())
        for a, b, m in zip(
            got.peak_distances.flatten(0, 1), want.peak_distances.flatten(0, 1), clear.flatten(0, 1), strict=True
        )
    )


def plant_diagonals(q: Tensor, k: Tensor, g: Geometry, draw: Draw) -> None:
    """Let every row of the probe look at the key at one distance."""
    distance = draw.integer(0, g.kv_len - 1)
    for row in range(max(0, g.q_len - 64), g.q_len):
        key = row + g.q_offset - distance
        if 0 <= key < g.kv_len:
            q[:, :, row] = 4.0 * k[:, :, key].repeat_interleave(g.group, 1)


def check_fold(seed: int, length: int, strides: list[int]) -> dict[str, Any]:
    """Compare folded mass with the reference, for strides of the host and of the device."""
    mass = torch.rand(2, 3, length, generator=torch.Generator().manual_seed(seed))
    pairs = zip(fold(mass, tuple(strides)), phase_mass(mass.double(), strides), strict=True)
    error = max(((a - b).abs() / b.clamp(min=1.0)).max().item() for a, b in pairs)
    own = torch.tensor([strides[n % len(strides)] for n in range(6)]).view(2, 3)
    longest = min(max(strides), length)
    by_head = fold_by_head(mass, own, longest)
    return {"error": error, "same_phase": torch.equal(by_head.argmax(-1), best_phase(mass, own))}


def nan_of_query() -> dict[str, Any]:
    """A NaN in a probe row or in a visible key must not vanish."""
    g = Geometry(1, 1, 1, 80, 80)
    q, k, _ = random_qkv(0, g, 16, torch.float32)
    bad_q, bad_k = q.clone(), k.clone()
    bad_q[0, 0, 70, 3] = float("nan")
    bad_k[0, 0, 5, 3] = float("nan")
    probes = [fused_probe(a, b, g, 1.0, block_m=64) for a, b in ((bad_q, k), (q, bad_k))]
    return {"nan": [bool(p.columns.sum(-1).isnan().all()) for p in probes]}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {"check": check, "fold": check_fold, "nan": nan_of_query}

if __name__ == "__main__":
    serve(lambda kind, **request: KINDS[kind](**request))
