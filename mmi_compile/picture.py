"""What a plan keeps, as a picture: thumbnails of any length, never a matrix of all pairs.

Rows of a picture are sampled query rows, whose keys are looked up exactly and then shared out to its columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.plan_rows import PlanRows
from mmi_compile.kernels.probe import visible_keys

Order = Literal["prompt", "plan"]

_SHADES = " ░▒▓█"
_ROWS_AT_ONCE = 64


def thumbnail(plan: Plan, head: int, *, batch: int = 0, size: int = 256, order: Order = "prompt") -> Tensor:
    """Share of the keys of each cell that a head keeps, float32 ``[rows, columns]``, at most ``size`` each.

    Args:
        order: ``"prompt"``, or ``"plan"`` for query rows and keys as the kernel visits them, grouped by modality.

    NaN in cells of which the model's own mask allows nothing.
    """
    g, device = plan.geometry, plan.tiles.device
    rows = _picked(plan, head, batch, size, order)
    keys = torch.arange(g.kv_len, device=device)
    if order == "plan" and plan.key_order is not None:
        slots = plan.key_order[batch]
        keys = slots[slots >= 0].long()
    columns = min(size, keys.numel())
    cell = torch.arange(keys.numel(), device=device) * columns // max(1, keys.numel())
    kept, seen = (torch.zeros(rows.numel(), columns, device=device) for _ in range(2))
    for start in range(0, rows.numel(), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        asked = rows[some].expand(g.batch, -1).contiguous()
        mask = PlanRows.of(plan, asked).mask(slice(head, head + 1), slice(None))[batch, 0]
        kept[some].index_add_(1, cell, mask[:, keys].float())
        seen[some].index_add_(1, cell, visible_keys(g, asked)[batch][:, keys].float())
    return torch.where(seen > 0, kept / seen, torch.nan)


def _picked(plan: Plan, head: int, batch: int, size: int, order: Order) -> Tensor:
    """Evenly spaced query rows, int64."""
    rows = torch.arange(plan.geometry.q_len, device=plan.tiles.device)
    if order == "plan":
        rows = plan.rows()[batch, head].flatten()
        rows = rows[rows >= 0]
    count = min(size, rows.numel())
    return rows[torch.arange(count, device=rows.device) * rows.numel() // max(1, count)]


def as_text(plan: Plan, head: int, *, batch: int = 0, size: int = 48, order: Order = "prompt") -> str:
    """The thumbnail in shades of block characters: dark is kept, blank is dropped or invisible."""
    cells = thumbnail(plan, head, batch=batch, size=size, order=order).nan_to_num(0.0)
    # Whatever is kept at all shows, however little of its cell it is.
    shade = torch.where(cells > 0, (cells * (len(_SHADES) - 1)).ceil(), 0).clamp(max=len(_SHADES) - 1).long()
    return "\n".join("".join(2 * _SHADES[value] for value in row).rstrip() for row in shade.tolist())


def save_png(
    plan: Plan, heads: dict[str, int], path: str | Path, *, batch: int = 0, size: int = 256, order: Order = "prompt"
) -> None:
    """Thumbnails of some heads side by side.

    Args:
        heads: title → query head.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(heads), 2.9), layout="constrained")
    density = plan.density()[batch].tolist()
    for axes, (title, head) in zip(figure.subplots(1, len(heads), squeeze=False)[0], heads.items(), strict=True):
        cells = thumbnail(plan, head, batch=batch, size=size, order=order)
        # The square root lets a thin line show beside a full tile.
        axes.imshow(cells.sqrt().cpu().numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_facecolor("0.93")
        axes.set_title(f"{title}\n{density[head]:.1%} of the pairs", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("keys", fontsize=7)
        axes.set_ylabel("queries", fontsize=7)
    figure.savefig(path, dpi=160)
