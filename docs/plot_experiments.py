"""Draws docs/experiments.png from the tables of docs/experiments.md; needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("experiments.md")
PICTURE = PAGE.with_suffix(".png")

Row = dict[str, str]
Points = dict[str, list[tuple[float, float]]]
"""By method: density and what it came to, both in percent."""


def tables(text: str) -> Iterator[list[Row]]:
    """All tables of a Markdown page, a dict by column for each row."""
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        yield [dict(zip(names, row, strict=True)) for row in rows]


def number(cell: str) -> float:
    """The first number of a cell, whatever surrounds it."""
    found = re.search(r"[-+]?\d+(\.\d+)?", cell.replace("−", "-"))
    if found is None:
        raise ValueError(f"no number in {cell!r}")
    return float(found.group())


def needles(pages: list[list[Row]]) -> Points:
    """Tokens right of *time* at 168 frames, by method."""
    adaptive, apart, same, searched = pages[1:5]
    found: Points = {"adaptive": [_needle(row) for row in adaptive if row["policy"].startswith("adaptive")]}
    bounded = [row for row in apart if row["frames"] == "168" and row["boundaries"] == "none, q, 2d"]
    found["adaptive, with q and 2d"] = [_needle(row) for row in bounded]
    found["searched, no boundaries, weighed"] = [_needle(row) for row in searched if row["boundaries"] == "none"]
    bounded = [row for row in searched if row["boundaries"] != "none" and row["weigh"] == "equal"]
    found["searched, with q and 2d, not weighed"] = [_needle(row) for row in bounded]
    found["one vertical_slash for all"] = [_needle(row) for row in same if row["frames"] == "168"]
    return found


def _needle(row: Row) -> tuple[float, float]:
    return number(row["density"]), 100 * number(row["time"])


def perplexities(page: list[Row]) -> Points:
    """Perplexity above that of dense attention, by method; rows with a guard are left out."""
    found: Points = {}
    for row in page:
        name = re.split(r"[,(]", row["policy"])[0]
        if name != "dense" and "min_recall" not in row["policy"]:
            found.setdefault(name, []).append((number(row["density"]), number(row["against dense"])))
    return found


def draw(text: str) -> Any:
    """The figure for a page."""
    from matplotlib.figure import Figure

    pages = list(tables(text))
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, points in ((left, needles(pages)), (right, perplexities(pages[-1]))):
        for name, of_method in points.items():
            axes.plot(*zip(*sorted(of_method), strict=True), marker="o", label=name)
        axes.set_xlabel("density, % of causal tiles")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_title("Needles, 168 frames")
    left.set_ylabel("time tokens right, %")
    right.set_title("Text of 8 K tokens")
    right.set_ylabel("perplexity above dense, %")
    return figure


if __name__ == "__main__":
    draw(PAGE.read_text(encoding="utf-8")).savefig(PICTURE, dpi=110)
