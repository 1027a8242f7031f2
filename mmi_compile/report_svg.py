"""Pictures of graphs as SVG: no file, font or script from anywhere else; every text of the user's is escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from mmi_compile.report_graph import BOX_HEIGHT, BOX_WIDTH, Box, Edge, Picture, picture

if TYPE_CHECKING:
    from mmi_compile.report import GraphReport, Report

MOST_GRAPHS = 6
_MARGIN, _LINE, _LETTERS = 12.0, 18.0, 20
_LEGEND = (
    ("attention", "kept", "attention"),
    ("mask", "kept", "mask"),
    ("modality", "kept", "modality"),
    ("operand", "kept", "operand or result"),
    ("operand", "new", "new"),
    ("operand", "died", "died"),
    ("rest", "kept", "collapsed"),
)

STYLE = """
.mmi-graph { font: 11px ui-monospace, Menlo, Consolas, monospace; }
.mmi-graph text { fill: var(--mmi-ink); }
.mmi-graph .soft { fill: var(--mmi-soft); }
.mmi-graph rect { stroke-width: 1; stroke: var(--mmi-line); fill: var(--mmi-card); }
.mmi-graph path { fill: none; stroke: var(--mmi-edge); stroke-width: 1; }
.mmi-graph .attention rect { fill: var(--mmi-attention); }
.mmi-graph .mask rect { fill: var(--mmi-mask); }
.mmi-graph .modality rect { fill: var(--mmi-modality); }
.mmi-graph .rest rect { fill: none; stroke-dasharray: 1 3; }
.mmi-graph .new rect { stroke-width: 2; stroke: var(--mmi-ink); }
.mmi-graph .died rect { stroke-dasharray: 5 3; stroke: var(--mmi-gone); }
.mmi-graph .died text { fill: var(--mmi-gone); }
.mmi-graph path.died { stroke-dasharray: 5 3; stroke: var(--mmi-gone); }
.mmi-graph {
  --mmi-ink: #1d2330; --mmi-soft: #5d6678; --mmi-card: #ffffff; --mmi-line: #9aa3b3; --mmi-edge: #8791a3;
  --mmi-gone: #b42318; --mmi-attention: #cfe3fb; --mmi-mask: #fde6c8; --mmi-modality: #e4d9f7;
}
@media (prefers-color-scheme: dark) {
  .mmi-graph {
    --mmi-ink: #e4e8ef; --mmi-soft: #9aa5b8; --mmi-card: #1b1f27; --mmi-line: #5a6475; --mmi-edge: #6f7a8d;
    --mmi-gone: #ff8f85; --mmi-attention: #1e3f66; --mmi-mask: #5a3d14; --mmi-modality: #41306a;
  }
}
"""
"""Colours and strokes, for the page or the file that holds the pictures."""


def graph_svg(graph: GraphReport) -> str:
    """The picture of one graph as an ``<svg>`` element without its style; empty where it holds no attention."""
    drawn = picture(graph)
    if drawn is None:
        return ""
    width, height, body = _body(graph, drawn)
    return _svg(width, height, body, "")


def report_svg(report: Report) -> str:
    """The graphs that hold attention, one below the other, as one SVG file; those that were rewritten first."""
    parts: list[str] = []
    top = width = 0.0
    held = [graph for graph in report.graphs if graph.sites]
    held.sort(key=lambda graph: not graph.changed)  # stable
    for graph in held[:MOST_GRAPHS]:
        drawn = picture(graph)
        if drawn is not None:
            wide, high, body = _body(graph, drawn, explained=not parts)
            parts.append(f'<g transform="translate(0 {top:g})">{body}</g>')
            top, width = top + high + _LINE, max(width, wide)
    left = len(held) - MOST_GRAPHS
    note = f"{left} more graphs with attention are not drawn" if left > 0 else ""
    if not held:
        note = "No attention was found in any graph."
    if note:
        parts.append(_text(_MARGIN, top + _LINE, note, "soft"))
        top, width = top + 2 * _LINE, max(width, 420.0)
    background = '<rect width="100%" height="100%" style="stroke: none"/>'
    return _svg(width, top, background + "".join(parts), f"<style>{STYLE}</style>") + "\n"


def _svg(width: float, height: float, body: str, style: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mmi-graph" role="img" width="{width:g}" height="{height:g}"'
        f' viewBox="0 0 {width:g} {height:g}" aria-label="Attentions of the rewritten graph, with what their masks and'
        f' modalities are computed from; what died is dashed">{style}{body}</svg>'
    )


def _body(graph: GraphReport, drawn: Picture, *, explained: bool = True) -> tuple[float, float, str]:
    """Width, height and content: a title, the legend (where ``explained``), the picture, notes."""
    top = _MARGIN + _LINE + 6
    rewritten = sum(site.decision is not None and site.decision.rewritten for site in graph.sites)
    title = f"graph {graph.key}: {rewritten} of {len(graph.sites)} attentions rewritten"
    legend, legend_width, legend_height = _legend(top, max(drawn.width, 420.0)) if explained else ("", 0.0, 0.0)
    above = top + legend_height + _LINE
    width = max(drawn.width, legend_width, 7.0 * len(title)) + 2 * _MARGIN
    shift = (width - drawn.width) / 2
    picture_body = "".join([*map(_edge, drawn.edges), *map(_box, drawn.boxes)])
    below = above + drawn.height
    notes = "".join(_text(_MARGIN, below + _LINE * number, note, "soft") for number, note in enumerate(drawn.notes, 1))
    body = (
        _text(_MARGIN, _MARGIN + 6, title, "", bold=True) + legend
        + f'<g transform="translate({shift:g} {above:g})">{picture_body}</g>' + notes
    )  # fmt: skip
    return width, below + _LINE * len(drawn.notes) + _MARGIN, body


def _legend(top: float, most: float) -> tuple[str, float, float]:
    """Its elements, width and height, in as many lines as ``most`` pixels ask for."""
    x, y, width = _MARGIN, top, 0.0
    parts = []
    for kind, state, name in _LEGEND:
        room = 26 + 7.0 * len(name) + 12
        if x > _MARGIN and x + room > most:
            x, y = _MARGIN, y + _LINE
        parts.append(
            f'<g class="{kind} {state}"><rect x="{x:g}" y="{y - 9:g}" width="18" height="12" rx="3"/></g>'
            + _text(x + 24, y + 1, name, "soft")
        )
        x += room
        width = max(width, x)
    return "".join(parts), width, y - top + _LINE


def _box(box: Box) -> str:
    x, y = box.x - BOX_WIDTH / 2, box.y - BOX_HEIGHT / 2
    return (
        f'<g class="{box.kind} {box.state}"><title>{escape(box.title)}</title>'
        f'<rect x="{x:g}" y="{y:g}" width="{BOX_WIDTH:g}" height="{BOX_HEIGHT:g}" rx="5"/>'
        + _text(x + 7, box.y - 3, _cut(box.label), "", bold=box.kind == "attention")
        + _text(x + 7, box.y + 11, _cut(box.detail), "soft")
        + "</g>"
    )


def _edge(edge: Edge) -> str:
    (x, y), *rest = edge.points
    path = [f"M{x:g} {y:g}"]
    for to_x, to_y in rest:
        half = (y + to_y) / 2
        path.append(f"C{x:g} {half:g} {to_x:g} {half:g} {to_x:g} {to_y:g}")
        x, y = to_x, to_y
    kind = ' class="died"' if edge.died else ""
    return f'<path{kind} d="{"".join(path)}"/>'


def _cut(text: str) -> str:
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"


def _text(x: float, y: float, text: str, kind: str, *, bold: bool = False) -> str:
    attributes = f' class="{kind}"' if kind else ""
    attributes += ' font-weight="700"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}"{attributes}>{escape(text)}</text>'
