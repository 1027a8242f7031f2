"""The report as one HTML page that needs no network."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib import resources
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mmi_compile.report import GraphReport, Report
from mmi_compile.report_steps import difference, steps
from mmi_compile.report_svg import STYLE, graph_svg

KINDS = ("dense", "a_shape", "tri_shape", "vertical_slash", "grid", "block_topk")
"""Patterns that have a colour of their own."""

_COLOURS = {"text": 0, "image": 1, "video": 2, "audio": 3}
_MOST_RUNS = 400
"""Runs of one modality that a strip shows; narrower ones are joined, since a screen has no room for them."""


def render_html(report: Report) -> str:
    """All of ``report.to_json()``, the graphs' code and what the passes changed in it, as a page."""
    data = report.to_json()
    graphs = [
        _graph(told, graph)
        for told, graph in zip(data["graphs"], report.graphs, strict=True)
        if told["attentions"] or told["failure"]
    ]
    graphs.sort(key=lambda graph: not graph["rewritten"])  # stable: those that were changed come first
    for before, graph in zip([{"rewritten": True}, *graphs], graphs, strict=False):
        graph["first_left"] = before["rewritten"] and not graph["rewritten"]
    return _template().render(
        data=data,
        graphs=graphs,
        sites=report.sites,
        passes_not_run=report.passes_not_run,
        kernels=_kernels(),
        svg_style=Markup(STYLE),
    )


def _kernels() -> dict[str, str]:
    """Source of the generated kernels that this process has loaded, by name of the file."""
    files = [
        Path(str(module.__file__)) for name, module in sys.modules.items() if name.startswith("mmi_compile_kernel_")
    ]
    return {file.name: file.read_text(encoding="utf-8") for file in sorted(files) if file.is_file()}


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    text = resources.files("mmi_compile").joinpath("templates/report.html.jinja").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)


def _graph(told: dict[str, Any], graph: GraphReport) -> dict[str, Any]:
    prompt = told["modality"]["prompt"]
    names = list(prompt["tokens"]) if prompt else []
    colours = {name: _COLOURS.get(name, 4) for name in names}
    rows = [row for row in map(_row, told["attentions"]) if row["cells"]]
    kinds = {cell["kind"] for row in rows for cell in row["cells"]}
    return {
        **told,
        "rewritten": any(site["rewritten"] for site in told["attentions"]),
        "sites": _alike(told["attentions"]),
        "colours": colours,
        "strips": [list(_strip(runs, colours)) for runs in prompt["runs"]] if prompt else [],
        "map": rows,
        "heads": max((len(row["cells"]) for row in rows), default=0),
        "kinds": [kind for kind in (*KINDS, "other") if kind in kinds],
        "steps": _steps(told["seconds"]),
        **_passes_or_problem(graph),
        # Every text in it is escaped where it is made.
        "svg": Markup(graph_svg(graph)),
        "code": graph.code(),
        "code_before": graph.code(before=True),
    }


def _alike(sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for neighbours that differ in shapes alone, as the windows of a vision tower do; ``times`` counts."""
    told: list[dict[str, Any]] = []
    for site in sites:
        facts = {name: value for name, value in site.items() if name not in ("shapes", "key", "run")}
        if told and site["run"] is None and all(told[-1][name] == value for name, value in facts.items()):
            told[-1]["times"] += 1
        else:
            told.append({**site, "times": 1, **_guard(site["run"])})
    return told


def _guard(run: dict[str, Any] | None) -> dict[str, str]:
    """The worst heads that the guard saw, in words."""
    guard = run["guard"] if run else None
    if guard is None:
        return {}
    recall = [x for x in guard["recall_per_head"] or [] if x is not None]
    error = [x for x in guard["error_per_head"] or [] if x is not None]
    return {
        "guard_recall": f"≥ {min(recall):.3g}" if recall else "NaN",
        "guard_error": f"≤ {max(error):.2g}" if error else "NaN",
    }


def _strip(runs: list[list[Any]], colours: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Coloured stretches of a prompt; where there are too many, neighbours share one in the colour of the longest."""
    step = -(-len(runs) // _MOST_RUNS)
    for start in range(0, len(runs), step):
        joined = runs[start : start + step]
        longest = max(joined, key=lambda run: run[1])[0]
        title = " + ".join(f"{name} × {length}" for name, length in joined[:4]) + (" + …" if len(joined) > 4 else "")
        yield {"length": sum(length for _, length in joined), "colour": colours[longest], "title": title}


def _row(site: dict[str, Any]) -> dict[str, Any]:
    """The heads of one attention as they ran last."""
    run = site["run"] or {"patterns": [], "density_per_head": []}
    heads = run["patterns"][0] if run["patterns"] else []
    texts = heads or [f"dense, density {density:.3f}" for density in run["density_per_head"]]
    label = site["where"] if site["layer"] is None else f"layer {site['layer']}"
    guard = (run.get("guard") or {}).get("recall_per_head") or []
    known = [recall for recall in guard if recall is not None]
    return {
        "label": label,
        "cells": [{"kind": _kind(text), "title": text} for text in texts],
        "density": f"{run['density']:.1%}" if texts else "",
        "recall": f"recall ≥ {min(known):.3g}" if known else "",
    }


def _kind(text: str) -> str:
    """The pattern that a head's description begins with."""
    return next((kind for kind in KINDS if text.startswith(kind)), "other")


def _steps(seconds: dict[str, float]) -> list[dict[str, Any]]:
    longest = max(seconds.values(), default=0.0) or 1.0
    return [
        {"name": name, "seconds": value, "share": round(100 * max(0.0, value) / longest, 2)}
        for name, value in seconds.items()
    ]


def _passes_or_problem(graph: GraphReport) -> dict[str, Any]:
    """Passes run again on what Dynamo captured, whose traced values may have been dropped since: the page says so."""
    try:
        return {"passes": list(_passes(graph)), "passes_problem": ""}
    except Exception as error:
        return {"passes": [], "passes_problem": f"{type(error).__name__}: {error}".splitlines()[0]}


def _passes(graph: GraphReport) -> Iterator[dict[str, Any]]:
    """What each pass changed, and the whole of it at the end."""
    taken = steps(graph) if graph.sites else []
    pairs = [*pairwise(taken), *([(taken[0], taken[-1])] if len(taken) > 1 else [])]
    for number, (before, after) in enumerate(pairs, 1):
        yield {
            "name": after.name if number < len(taken) else "",
            "nodes": f"{before.nodes} → {after.nodes}" if before.nodes != after.nodes else str(after.nodes),
            "diff": list(_coloured(difference(before, after))),
        }


def _coloured(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    for kind, group in groupby(lines, key=lambda line: {"+": "add", "-": "cut"}.get(line[:1], "")):
        yield {"kind": kind, "text": "\n".join(group)}
