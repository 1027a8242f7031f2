"""Runs the spread probe in Triton's interpreter, one JSON request per line of standard input.

A process of its own for the reason given in ``interpreter_worker.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmi_compile.kernels import part_probe
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.fused_probe import PassTile
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.modality_probe import ModalityTiles
from mmi_compile.kernels.part_probe import PartProbe, part_rows, parts_of, run_part_probe
from mmi_compile.kernels.segments import segment
from mmi_compile.kernels.spread_probe import (
    SPREAD_GROUPS,
    SpreadProbe,
    fused_spread_probe,
    reference_spread_probe,
    spread_rows,
)
from tests.kernels.serving import serve
from tests.random_plans import Draw, random_geometry, random_qkv

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # the interpreter multiplies bf16 wrongly


def check(
    seed: int, head_dim: int = 16, dtype: str = "fp32", block_m: int = 64, block_n: int = 64, tile_n: int = 64,
    pack: int = 2, scale: float = 0.3, programs: int = 8, max_len: int = 170, poison: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Compare one random probe, and what it says of random keys, with the reference in float64."""
    draw = Draw(torch.Generator().manual_seed(seed))
    g = random_geometry(draw, max_len=max_len)
    if g.q_len < 4:
        return {"error": 0.0, "repeats": True, "shapes": True, "mass": 1.0, "seen": []}
    q, k, _ = random_qkv(seed, g, head_dim, DTYPES[dtype])
    if draw.chance(0.3):
        k = torch.cat([k, k[..., :3]], -1)[..., :head_dim]  # rows that are not multiples of 8 elements apart
    clean = k
    if poison:
        dead = g.live_keys("cpu")
        k = k if dead is None else k.masked_fill(~dead[:, None, :, None], float("nan"))
    sink_stop = torch.tensor([draw.integer(0, g.kv_len // 2)])
    spread = spread_rows(g, q.device, SPREAD_GROUPS, block_m, sink_stop=sink_stop, zone=draw.integer(0, g.kv_len // 4))
    tile = PassTile(pack, tile_n, 4, 1)
    launch: dict[str, Any] = {"tiles": ModalityTiles(tile, tile, tile), "programs": programs}

    def run() -> SpreadProbe:
        return fused_spread_probe(q, k, g, scale, spread, block_n, **launch)

    got = run()
    want = reference_spread_probe(q.double(), clean.double(), g, scale, spread, block_n)
    keys = torch.stack([draw.subset(min(g.kv_len, 70), g.kv_len) for _ in range(g.batch * g.q_heads)])
    keys = keys.view(g.batch, g.q_heads, -1)
    keys[..., -1] = g.kv_len  # no key
    pairs = sums(got, want, keys)
    return {
        "error": max(difference(a, b) for a, b in pairs),
        "shapes": all(a.shape == b.shape for a, b in pairs),
        "repeats": seed % 4 > 0 or repeats(pairs, sums(run(), want, keys)),
        "mass": float(want.blocks.sum()),
        "seen": [name for name in ("window", "kv_start", "key_padding", "q_offset") if is_set(g, name)],
    }


def check_parts(seed: int, head_dim: int = 16, pack: int = 2, programs: int = 8) -> dict[str, Any]:
    """Compare a probe of modalities, keys in order and grouped, with the reference in float64."""
    draw = Draw(torch.Generator().manual_seed(seed))
    past, tokens = draw.integer(0, 1) * 20, draw.integer(40, 70)
    g = Geometry(draw.integer(1, 2), 2, 1, tokens, tokens + past, q_offset=past)
    q, k, _ = random_qkv(seed, g, head_dim, torch.float32)
    ids = (torch.arange(g.kv_len) % 23 < draw.integer(0, 23)).to(torch.int8).expand(g.batch, -1).contiguous()
    shape = TileShape(16, 32)
    segments, parts = segment(ids, (0, 1), g, shape), parts_of(2, ("q", "2d"))
    rows, zones = part_rows(segments, g, shape, 10, 32), torch.full((g.batch, 2), 5)
    tile = PassTile(pack, 32, 4, 1)
    launch: dict[str, Any] = {"tiles": ModalityTiles(tile, tile, tile), "programs": programs}
    run_reference = part_probe.run_spread_probe

    def probe(q: Tensor, k: Tensor, run: Any) -> PartProbe:
        part_probe.run_spread_probe = run
        return run_part_probe(q, k, g, 0.3, segments, rows, parts, shape, zones, 32)

    got = probe(q, k, lambda *given: fused_spread_probe(*given, **launch))
    want = probe(q.double(), k.double(), run_reference)
    keys = torch.stack([draw.subset(20, segments.key_order.shape[1]) for _ in range(g.batch * len(parts) * 2)])
    keys = keys.view(g.batch, len(parts), 2, -1)

    def masses(probe: PartProbe) -> list[Tensor]:
        return [probe.blocks, probe.credit, probe.total, probe.mass_at(keys), probe.credit_at(keys)]

    pairs = list(zip(masses(got), masses(want), strict=True))
    return {
        "error": max(difference(a, b) for a, b in pairs),
        "shapes": all(a.shape == b.shape for a, b in pairs),
        "repeats": True,  # the kernels are those of `check`
        "mass": float(want.blocks.sum()),
        "seen": [],
    }


def answer(parts: bool = False, **case: Any) -> dict[str, Any]:
    return check_parts(**case) if parts else check(**case)


def sums(got: SpreadProbe, want: SpreadProbe, keys: Tensor) -> list[tuple[Tensor, Tensor]]:
    both = [(getattr(got, name), getattr(want, name)) for name in ("blocks", "credit")]
    both += [(got.mass_at(keys, kinds), want.mass_at(keys, kinds)) for kinds in (1, None)]
    few = keys[..., ::2]
    return [*both, (got.credit_at(few), want.credit_at(few))]


def repeats(pairs: list[tuple[Tensor, Tensor]], again: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(a, b) for (a, _), (b, _) in zip(pairs, again, strict=True))


def difference(got: Tensor, want: Tensor) -> float:
    found = ((got.double() - want.double()).abs() / want.double().clamp(min=1.0)).nan_to_num(torch.inf)
    return found.max().item() if found.numel() else 0.0


def is_set(g: Geometry, name: str) -> bool:
    value = getattr(g, name)
    return value is not None and not (isinstance(value, int) and value == 0)


if __name__ == "__main__":
    serve(answer)
