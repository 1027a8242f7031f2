"""``mmi show``: a head config as a map of layers and heads, in the terminal and as a picture."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from mmi_compile.decision import MMIError
from mmi_compile.head_config import HeadConfig, HeadEntry
from mmi_compile.kernels.patterns import ByModality, Dense

PATTERNS = {
    "dense": ("D", "white", "#b8b8b8"),
    "a_shape": ("A", "green", "#4daf4a"),
    "tri_shape": ("T", "cyan", "#17becf"),
    "vertical_slash": ("V", "blue", "#377eb8"),
    "grid": ("G", "yellow", "#ff9f1c"),
    "block_topk": ("B", "magenta", "#984ea3"),
}
"""Letter, colour in the terminal and colour in the picture of every pattern."""

OWN = ("O", "red", "#e41a1c")
"""The same for patterns of the user's own."""

BOUNDARY_MARKS = {"none": " ", "k": "k", "q": "q", "2d": "2"}

BINS = 10


def main_pattern(entry: HeadEntry) -> str:
    """The name of what a head mostly runs: with boundaries, the most frequent pattern that is not dense."""
    if not isinstance(entry.pattern, ByModality):
        return entry.pattern.name
    names = collections.Counter(p.name for _, p in entry.pattern.patterns if not isinstance(p, Dense))
    return min(names, key=lambda name: (-names[name], name)) if names else entry.pattern.default.name


def terminal_map(config: HeadConfig) -> RenderableType:
    """Rows are layers, columns are heads: a letter for the pattern and a mark for the boundary; then totals."""
    width = len(str(len(config.layers) - 1))
    lines = [Text(config.describe().partition("\n")[0], style="bold"), *_source(config), Text()]
    for number, layer in enumerate(config.layers):
        line = Text(f"{number:>{width}}  ", style="dim")
        for entry in layer:
            letter, colour, _ = PATTERNS.get(main_pattern(entry), OWN)
            line.append(f"{letter}{BOUNDARY_MARKS[entry.boundary]}", style=colour if letter != "D" else "dim")
        densities = [entry.density for entry in layer if entry.density is not None]
        if densities:
            line.append(f"  density {sum(densities) / len(densities):.3f}", style="dim")
        lines.append(line)
    return Group(*lines, Text(), *_legend(config), *_histograms(config))


def _source(config: HeadConfig) -> Iterator[Text]:
    p = config.provenance
    parts = [
        p.source, f"{p.samples} prompts" if p.samples and p.samples > 1 else None,
        f"{p.tokens} tokens" if p.tokens else None, f"budget {p.budget:.3g}" if p.budget is not None else None,
        p.device, p.date,
    ]  # fmt: skip
    known = ", ".join(part for part in parts if part)
    if known:
        yield Text(known, style="dim")


def _legend(config: HeadConfig) -> Iterator[Text]:
    """Every pattern and boundary that occurs, with its number of heads."""
    entries = [entry for layer in config.layers for entry in layer]
    patterns = collections.Counter(main_pattern(entry) for entry in entries)
    line = Text()
    for name, (letter, colour, _) in _styles(patterns).items():
        if patterns[name]:
            line.append(f"{letter} {name} × {patterns[name]}   ", style=colour if letter != "D" else "dim")
    yield line
    boundaries = collections.Counter(entry.boundary for entry in entries)
    words = [f"{BOUNDARY_MARKS[b].strip() or '·'} boundary {b} × {n}" for b, n in sorted(boundaries.items())]
    yield Text("   ".join(words), style="dim")


def _styles(names: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """All built-in patterns, then those of ``names`` that are none."""
    return PATTERNS | dict.fromkeys(sorted(set(names) - set(PATTERNS)), OWN)


def values(config: HeadConfig, name: str) -> list[float]:
    """``recall``, ``density`` or ``score`` of every head that has one."""
    found = (getattr(entry, name) for layer in config.layers for entry in layer)
    return [float(value) for value in found if value is not None]


def histogram(numbers: Sequence[float], bins: int = BINS) -> list[int]:
    """How many numbers fall into each of ``bins`` equal parts of 0 … 1; larger ones count in the last."""
    counts = [0] * bins
    for number in numbers:
        counts[min(bins - 1, max(0, int(number * bins)))] += 1
    return counts


def _histograms(config: HeadConfig) -> Iterator[Text]:
    for name in ("recall", "density"):
        numbers = values(config, name)
        if not numbers:
            continue
        counts = histogram(numbers)
        yield Text()
        yield Text(f"{name}: mean {sum(numbers) / len(numbers):.3f}, least {min(numbers):.3f}, most {max(numbers):.3f}")
        for i, count in enumerate(counts):
            if count:
                bar = "█" * max(1, round(40 * count / max(counts)))
                yield Text(f"  {i / BINS:.1f} – {(i + 1) / BINS:.1f}  {bar} {count}", style="dim")


def save_png(config: HeadConfig, path: str | os.PathLike[str]) -> None:
    """The map, and histograms of recall and density where they are known.

    Raises:
        MMIError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise MMIError("the picture needs matplotlib: pip install 'mmi-compile[plot]'") from None
    known = [name for name in ("recall", "density") if values(config, name)]
    layers, heads = len(config.layers), config.fingerprint.q_heads
    figure = Figure(figsize=(max(6.0, 0.28 * heads + 3), max(3.0, 0.22 * layers + 1.5) + (2.4 if known else 0)))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 if known else 1, max(1, len(known)), height_ratios=[3, 1] if known else [1])
    axes = figure.add_subplot(grid[0, :])
    styles = _styles(main_pattern(entry) for layer in config.layers for entry in layer)
    names = list(styles)
    cells = [[names.index(main_pattern(entry)) for entry in layer] for layer in config.layers]
    colours = ListedColormap([colour for _, _, colour in styles.values()])
    axes.imshow(cells, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5, aspect="auto", interpolation="nearest")
    for layer, entries in enumerate(config.layers):
        for head, entry in enumerate(entries):
            if entry.boundary != "none":
                axes.text(head, layer, entry.boundary, ha="center", va="center", fontsize=6)
    axes.set(xlabel="query head", ylabel="layer", title="pattern and boundary of each head")
    used = {cell for row in cells for cell in row}
    marks = [Patch(color=styles[name][2], label=name) for i, name in enumerate(names) if i in used]
    axes.legend(handles=marks, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)
    for place, name in enumerate(known):
        part = figure.add_subplot(grid[1, place])
        part.hist(values(config, name), bins=20, range=(0, 1), color="#555555")
        part.set(xlabel=name, ylabel="heads")
    figure.tight_layout()
    try:
        figure.savefig(Path(path), dpi=150)
    except (OSError, ValueError) as error:
        raise MMIError(f"{path}: cannot be written: {error}") from None
