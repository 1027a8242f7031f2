"""Runs the probe of boundaries in Triton's interpreter, one JSON request per line of standard input.

A process of its own for the reason given in ``interpreter_worker.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.fused_probe import PassTile
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.modality_probe import (
    ALL_KEYS,
    Asked,
    ModalityProbe,
    ModalityTiles,
    fused_modality_probe,
    reference_modality_probe,
)
from mmi_compile.kernels.segments import segment
from tests.kernels.serving import serve
from tests.random_plans import Draw, random_geometry, random_qkv

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # the interpreter multiplies bf16 wrongly
SUMS = ("columns", "by_position", "by_rank")


def random_ids(draw: Draw, g: Geometry, longest: int) -> torch.Tensor:
    """Interleaved modality ids ``[B, kv_len]``: runs of up to ``longest`` tokens, some ids never drawn."""
    rows = []
    for _ in range(g.batch):
        row: list[int] = []
        kinds = draw.integer(0, 3)
        while len(row) < g.kv_len:
            row += [draw.integer(0, kinds)] * draw.integer(1, longest)
        rows.append(row[: g.kv_len])
    return torch.tensor(rows, dtype=torch.int8)


def random_questions(draw: Draw, g: Geometry, modalities: int) -> list[Asked]:
    asked = []
    for query in range(modalities):
        for key in (ALL_KEYS, *range(modalities)):
            if draw.chance(0.5):
                heads = draw.subset(draw.integer(0, g.q_heads), g.q_heads).tolist()
                asked += [Asked(query, key, head, draw.chance(0.7)) for head in heads]
    return asked


def check(
    seed: int, head_dim: int = 16, dtype: str = "fp32", block_n: int = 64, pack: int = 2, scale: float = 0.3,
    programs: int = 8, last_q: int = 64, max_len: int = 130, longest: int = 20, poison: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Compare one random probe with the reference in float64."""
    draw = Draw(torch.Generator().manual_seed(seed))
    g = random_geometry(draw, max_len=max_len)
    q, k, _ = random_qkv(seed, g, head_dim, DTYPES[dtype])
    if draw.chance(0.3):
        k = torch.cat([k, k[..., :3]], -1)[..., :head_dim]  # rows that are not multiples of 8 elements apart
    segments = segment(random_ids(draw, g, longest), (0, 1, 2), g, TileShape(16, 16))
    asked = random_questions(draw, g, 3)
    if poison:
        dead = g.live_keys("cpu")
        k = k if dead is None else k.masked_fill(~dead[:, None, :, None], float("nan"))
    tile = PassTile(pack, block_n, 4, 1)
    launch: dict[str, Any] = {"tiles": ModalityTiles(tile, tile, tile), "programs": programs}
    got = fused_modality_probe(q, k, g, scale, segments, asked, last_q, **launch)
    again = got if seed % 4 else fused_modality_probe(q, k, g, scale, segments, asked, last_q, **launch)
    clean = k.nan_to_num(0.0) if poison else k
    want = reference_modality_probe(q.double(), clean.double(), g, scale, segments, asked, last_q)
    return {
        "error": largest_error(got, want),
        "repeats": all(torch.equal(getattr(got, name), getattr(again, name)) for name in SUMS),
        "shapes": all(getattr(got, name).shape == getattr(want, name).shape for name in SUMS),
        "same": (got.entries, got.ordered, got.compact) == (want.entries, want.ordered, want.compact),
        "mass": [float(getattr(want, name).sum()) for name in SUMS],
        "seen": [name for name in ("window", "kv_start", "key_padding", "q_offset") if is_set(getattr(g, name))],
    }


def is_set(value: Any) -> bool:
    return value is not None and not (isinstance(value, int) and value == 0)


def largest_error(got: ModalityProbe, want: ModalityProbe) -> float | str:
    worst = 0.0
    for name in SUMS:
        exact = getattr(want, name)
        difference = (getattr(got, name).double() - exact).abs() / exact.clamp(min=1.0)
        error = difference.max().item() if difference.numel() else 0.0
        if error != error:
            return f"nan in {name}"
        worst = max(worst, error)
    return worst


def nan_of_query() -> dict[str, Any]:
    """A NaN in a probed row or in a visible key must not vanish."""
    g = Geometry(1, 1, 1, 80, 80)
    q, k, _ = random_qkv(0, g, 16, torch.float32)
    segments = segment((torch.arange(80) % 7 < 3).to(torch.int8)[None], (0, 1), g, TileShape(16, 16))
    bad_q, bad_k = q.clone(), k.clone()
    bad_q[0, 0, 78, 3] = float("nan")
    bad_k[0, 0, 5, 3] = float("nan")
    asked = [Asked(m, key, 0, True) for m in (0, 1) for key in (ALL_KEYS, 0, 1)]
    probes = [fused_modality_probe(a, b, g, 1.0, segments, asked) for a, b in ((bad_q, k), (q, bad_k))]
    return {"nan": [bool(p.columns.sum(-1).isnan().any()) for p in probes]}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {"check": check, "nan": nan_of_query}

if __name__ == "__main__":
    serve(lambda kind, **request: KINDS[kind](**request))
