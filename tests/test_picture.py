"""Pictures of plans show what ``to_mask`` says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.planner import dense_plan
from mmi_compile.picture import as_text, save_png, thumbnail
from tests.random_plans import random_plan


@given(seed=st.integers(0, 500), order=st.sampled_from(["prompt", "plan"]))
def test_a_large_thumbnail_is_the_mask(seed: int, order: str) -> None:
    plan = random_plan(seed)
    g = plan.geometry
    if not g.q_len or not g.kv_len:
        return
    batch, head = g.batch - 1, g.q_heads - 1
    cells = thumbnail(plan, head, batch=batch, size=10_000, order=order)  # type: ignore[arg-type]
    mask, model = plan.to_mask()[batch, head], g.to_mask()[batch]
    if order == "plan":
        rows = plan.rows()[batch, head].flatten()
        rows = rows[rows >= 0]
        keys = torch.arange(g.kv_len) if plan.key_order is None else plan.key_order[batch]
        keys = keys[keys >= 0].long()
        mask, model = mask[rows][:, keys], model[rows][:, keys]
    assert torch.equal(cells.isnan(), ~model)
    assert torch.equal(cells.nan_to_num(0.0) > 0, mask)


def test_cells_hold_shares() -> None:
    g = Geometry(1, 1, 1, 640, 640)
    cells = thumbnail(dense_plan(g, TileShape(32, 32), "cpu"), 0, size=64)
    assert cells.shape == (64, 64)
    assert bool((cells[~cells.isnan()] == 1).all())
    assert bool(cells[0, 1:].isnan().all())


def test_text_is_a_triangle() -> None:
    g = Geometry(1, 1, 1, 200, 200)
    lines = as_text(dense_plan(g, TileShape(32, 32), "cpu"), 0, size=20).splitlines()
    assert [len(line) for line in lines] == [2 * (row + 1) for row in range(20)]


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    g = Geometry(1, 2, 1, 200, 200)
    save_png(dense_plan(g, TileShape(32, 32), "cpu"), {"one": 0, "two": 1}, tmp_path / "plan.png", size=32)
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
