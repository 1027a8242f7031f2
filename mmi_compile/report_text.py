"""The report as text for a terminal."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from itertools import groupby
from typing import Any

from mmi_compile import __version__
from mmi_compile.report import GraphReport, Report, SiteReport, modality_to_json, run_to_json

WIDTH = 110
_RUNS_SHOWN = 10


def render(report: Report) -> str:
    """Summary line first, then one block per graph that holds attention."""
    policy = report.graphs[0].options.policy if report.graphs else "-"
    lines = [f"mmi_compile {__version__} · policy {policy} · {report.summary()}"]
    for graph in report.graphs:
        if graph.sites or graph.failure:
            lines += ["", *_graph(graph)]
    tags = [name for graph in report.graphs for name in graph.tagged]
    if tags:
        lines += ["", f"modality masks recorded by graphs without attention: {', '.join(sorted(set(tags)))}"]
    if not report.sites:
        lines += ["", "no attention was found in any graph"]
    return "\n".join(lines)


def _graph(graph: GraphReport) -> list[str]:
    rewritten = any(_done(site) for site in graph.sites)
    change = f"→ {graph.nodes_after} nodes" if rewritten else "nodes, untouched"
    lines = [f"graph {graph.key} · {graph.nodes_before} {change}"]
    if graph.failure:
        lines += _wrap("failed", graph.failure)
    if rewritten:
        lines += _prompt(graph)
    for _, group in groupby(graph.sites, key=lambda site: (site.key if _done(site) else "", site.where, site.layer)):
        alike = list(group)
        first = alike[0]
        if all(replace(site, key="", shapes="") == replace(first, key="", shapes="") for site in alike):
            lines += _site(first, len(alike))
        else:
            lines += [line for site in alike for line in _site(site)]
    return lines


def _done(site: SiteReport) -> bool:
    return site.decision is not None and site.decision.rewritten


def _prompt(graph: GraphReport) -> list[str]:
    modality = modality_to_json(graph.key)
    if modality is None:
        return _wrap("modality", f"known when it runs, from: {_SOURCES[graph.modality_source]}")
    parts = [
        f"{name} {count} ({segments} run{'s' if segments != 1 else ''})"
        for (name, count), segments in zip(modality["tokens"].items(), modality["segments"].values(), strict=True)
    ]
    lines = _wrap("tokens", f"{' · '.join(parts)}  [source: {modality['source']}]")
    if len(modality["tokens"]) > 1:
        runs = modality["runs"][0]
        shown = " ".join(f"{name}×{length}" for name, length in runs[:_RUNS_SHOWN])
        lines += _wrap("", shown + (f" … {len(runs) - _RUNS_SHOWN} more" if len(runs) > _RUNS_SHOWN else ""))
    return lines


_SOURCES = {
    "graph": "masks in this graph",
    "record": "what is recorded for the forward (pre-hook, modality(ids), or an earlier graph)",
    "none": "nowhere",
}


def _site(site: SiteReport, count: int = 1) -> list[str]:
    layer = f"layer {site.layer} · " if site.layer is not None else ""
    times = f"  (×{count}, alike)" if count > 1 else ""
    lines = [f"  ● {layer}{site.where or 'attention'}{times}"]
    lines += _wrap("source", site.source)
    lines += _wrap("shapes", f"{site.shapes} · {site.form} · {site.phase}")
    lines += _wrap("mask", site.mask + (f"   ⇐ {site.expression}" if site.expression else ""))
    lines += _wrap("decision", str(site.decision))
    if site.decision is not None and site.decision.reason is not None:
        lines += _wrap("mend", site.decision.reason.mend)
    lines += _run(run_to_json(site.key)) if _done(site) else []
    return lines


def _run(run: dict[str, Any] | None) -> list[str]:
    if run is None:
        return []
    lines = _wrap("last run", f"{run['q_len']} × {run['kv_len']} tokens · {run['path']} · density {run['density']:.1%}")
    if run["patterns"]:
        batch = f"  (batch element 0 of {len(run['patterns'])})" if len(run["patterns"]) > 1 else ""
        lines += _heads(run["patterns"][0], batch)
    elif run["density_per_head"]:
        lines += _wrap("heads", "all dense")
    return lines


def _heads(heads: list[str], batch: str) -> list[str]:
    """One line per run of heads with the same pattern."""
    lines: list[str] = []
    start = 0
    for head in range(1, len(heads) + 1):
        if head < len(heads) and heads[head] == heads[start]:
            continue
        name = f"head {start}" if head == start + 1 else f"heads {start}–{head - 1}"
        lines += _wrap("heads" if start == 0 else "", f"{name}: {heads[start]}{batch if start == 0 else ''}")
        start = head
    return lines


def _wrap(label: str, text: str) -> list[str]:
    if not text:
        return []
    indent = " " * 4
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{indent}{label:<10}", subsequent_indent=indent + " " * 10,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
