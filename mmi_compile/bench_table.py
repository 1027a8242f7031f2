"""Results of ``mmi bench`` for people: a table, and a plot of time over prompt length."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmi_compile.bench_rows import FAILED, OK, Results, Row

MIN_WIDTH = 170
"""Columns of output that is no terminal: files and pipes do not wrap."""


def token_text(tokens: int) -> str:
    """131072 as ``"128k"``; numbers that are no multiple of 1024 stay as they are."""
    for size, suffix in ((1 << 20, "m"), (1 << 10, "k")):
        if tokens % size == 0:
            return f"{tokens // size}{suffix}"
    return str(tokens)


def progress_line(row: Row) -> str:
    """One row as plain text, for logs."""
    words = cells(row)
    if row.status != OK:
        return "  ".join([*words[:3], f"{row.status}: {row.reason}"])
    named = zip(HEADINGS[3:], words[3:], strict=True)
    return "  ".join([*words[:3], *(f"{name} {word}" for name, word in named if word != "–")])


def cells(row: Row) -> list[str]:
    """One line of the table."""
    times = [_number(x) for x in (row.probe_ms, row.plan_ms, row.kernel_ms, row.op_ms, row.host_ms)]
    return [
        token_text(row.tokens), row.case, row.kernel, _text(row.density, "{:.1%}"), *times, _number(row.tflops),
        _text(row.speedup, "{:.2f} x"), _text(row.error, "{:.1e}"), _text(row.scratch, "{:.1%}"),
    ]  # fmt: skip


HEADINGS = (
    "tokens", "case", "kernel", "density", "probe", "plan", "kernel ms", "op ms", "host ms", "TFLOP/s", "vs dense",
    "error", "scratch",
)  # fmt: skip


def print_table(results: Results, console: Any = None) -> None:
    """Print the table, what was measured on, and in tuning mode the fastest candidate of every case."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=MIN_WIDTH, soft_wrap=True)
    console.print(Text(title(results)))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("case", "kernel") else "right", no_wrap=True)
    before = None
    for row in (row for row in results.rows if row.op_ms is not None):
        if before not in (None, (row.tokens, row.case)):
            table.add_row()
        before = (row.tokens, row.case)
        table.add_row(*(Text(cell) for cell in cells(row)), style="red" if row.status == FAILED else "")
    console.print(table)
    for line in reason_lines(results.rows):
        console.print(Text(line))
    for line in best_lines(results) if results.options.tune else []:
        console.print(Text(line))
    console.print(Text(LEGEND))


LEGEND = (
    "times are medians on the device (ms); op = probe + plan + kernel in one go; host = queueing it; TFLOP/s of the "
    "pairs computed; error against float32; scratch = peak memory beside inputs and output / (q + k + v)"
)


def title(results: Results) -> str:
    """What was measured on what, in one line."""
    o, device = results.options, results.device
    where = f"{device['name']}, torch {results.versions['torch']}"
    note = " (CPU: small sizes, PyTorch SDPA as the peer)" if device["type"] == "cpu" else ""
    return f"{where}: batch {o.batch}, {o.heads} q / {o.kv_heads} kv heads of {o.head_dim}, {o.dtype}, causal{note}"


def reason_lines(rows: Sequence[Row]) -> list[str]:
    """What was skipped or failed, and why; once for all the cases that share a reason."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status != OK:
            grouped.setdefault((row.kernel, row.status, row.reason), []).append(
                f"{row.case} at {token_text(row.tokens)}"
            )
    lines = []
    for (kernel, status, reason), cases in grouped.items():
        where = ", ".join(cases[:3]) + (f" and {len(cases) - 3} more" if len(cases) > 3 else "")
        lines.append(f"{kernel} {status}: {reason} ({where})")
    return lines


def best_lines(results: Results) -> list[str]:
    """The fastest kernel of every length and case."""
    lines = []
    for key in dict.fromkeys((row.tokens, row.case) for row in results.rows):
        fit = [row for row in results.rows if (row.tokens, row.case) == key and row.status == OK and row.kernel_ms]
        if fit:
            best = min(fit, key=lambda row: row.kernel_ms or 0.0)
            lines.append(f"best for {token_text(key[0])} {key[1]}: {best.kernel}, {_number(best.kernel_ms)} ms")
    return lines


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(results: Results, target: Path) -> None:
    """Time of the whole operator over the prompt length, log-log, one panel a case; a PNG file.

    Raises:
        ImportError: matplotlib is missing. OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row.case for row in results.rows if row.op_ms is not None)) or ["nothing measured"]
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, case in zip(axes.flat, cases, strict=False):
        _panel(axis, case, results.rows)
    for axis in list(axes.flat)[len(cases) :]:
        axis.set_axis_off()
    figure.suptitle(title(results), fontsize=9)
    figure.savefig(target, format="png", dpi=150)


def _panel(axis: Any, case: str, rows: Sequence[Row]) -> None:
    measured = [row for row in rows if row.case == case and row.op_ms is not None]
    for kernel in dict.fromkeys(row.kernel for row in measured):
        points = sorted((row.tokens, row.op_ms) for row in measured if row.kernel == kernel)
        ours = next(row.ours for row in measured if row.kernel == kernel)
        axis.plot(*zip(*points, strict=True), marker="o", linewidth=2.2 if ours else 1.2, label=kernel)
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=case)
    ticks = sorted({row.tokens for row in measured})
    axis.set_xticks(ticks, [token_text(tokens) for tokens in ticks])
    axis.minorticks_off()
    axis.grid(True, which="both", alpha=0.3)
    if measured:
        axis.legend(fontsize=8)


def _number(x: float | None) -> str:
    if x is None:
        return "–"
    return f"{x:.0f}" if x >= 1000 else f"{x:.3g}"


def _text(x: float | None, form: str) -> str:
    return "–" if x is None else form.format(x)
