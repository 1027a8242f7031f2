"""The report as text for a terminal."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from itertools import groupby
from typing import Any

from mmi_compile import __version__
from mmi_compile.record import LABELS
from mmi_compile.report import GraphReport, Report, SiteReport, modality_to_json, run_to_json
from mmi_compile.report_time import predicted

WIDTH = 110
_RUNS_SHOWN = 10
_GRIDS_SHOWN = 6
_BREAKS_SHOWN = 8


def render(report: Report) -> str:
    """Summary line first, then one block per graph that holds attention."""
    policy = report.graphs[0].options.policy if report.graphs else "-"
    lines = [f"mmi_compile {__version__} · policy {policy} · {report.summary()}"]
    lines += textwrap.wrap(
        f"of {report.subject}" if report.subject else "", WIDTH, subsequent_indent="   ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    config = report.graphs[0].options.head_config if report.graphs else None
    if config is not None:
        lines.append(f"head config for {config.fingerprint.describe()}; from {config.provenance.describe()}")
    if report.passes_not_run:
        lines.append(f"not run, by skip_passes or passes_until: {', '.join(report.passes_not_run)}")
    for graph in report.graphs:
        if graph.sites or graph.failure:
            lines += ["", *_graph(graph)]
    lines += _breaks(report) + _limits(report)
    tags = [name for graph in report.graphs for name in graph.tagged]
    if tags:
        lines += ["", f"modality masks recorded by graphs without attention: {', '.join(sorted(set(tags)))}"]
    lines += _stages(report)
    if not report.sites:
        lines += ["", "no attention was found in any graph"]
    return "\n".join(lines)


def _breaks(report: Report) -> list[str]:
    """How many graph breaks there were, and where."""
    found = report.breaks
    if not found:
        return []
    count = sum(graphs for _, graphs in found)
    lines = ["", f"{count} graph break{'s' if count != 1 else ''}"]
    for broken, graphs in found[:_BREAKS_SHOWN]:
        lines += _wrap(f"×{graphs}" if graphs > 1 else "", f"{broken.place or 'unknown place'}: {broken.reason}")
    left = sum(graphs for _, graphs in found[_BREAKS_SHOWN:])
    return lines + (_wrap("", f"… {left} more") if left else [])


def _limits(report: Report) -> list[str]:
    """Functions of which no further version is compiled."""
    if not report.limits:
        return []
    lines = ["", f"{len(report.limits)} function{'s' if len(report.limits) != 1 else ''} not compiled any further"]
    for limit in report.limits:
        lines += _wrap("", str(limit)) + _wrap("reason", limit.reason) + _wrap("mend", limit.mend)
    return lines


def _graph(graph: GraphReport) -> list[str]:
    rewritten = any(_done(site) for site in graph.sites)
    change = f"→ {graph.nodes_after} nodes" if rewritten else "nodes, untouched"
    lines = [f"graph {graph.key} · {graph.nodes_before} {change}"]
    if graph.failure:
        lines += _wrap("failed", graph.failure)
    lines += [line for note in graph.notes for line in _wrap("note", note)]
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


def _stages(report: Report) -> list[str]:
    """Measured times, where someone asked for them."""
    if not report.stages:
        return []
    lines = ["", "time by stage, all calls of one run"]
    for stage in report.stages:
        device = "" if stage.device_milliseconds is None else f" · {stage.device_milliseconds:.3f} ms on the GPU"
        calls = f"{stage.calls} call{'s' if stage.calls != 1 else ''}"
        lines.append(f"    {stage.what:<24}{calls} · {stage.host_milliseconds:.3f} ms{device}")
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
        lines += _wrap("", _abbreviated([f"{name}×{length}" for name, length in modality["runs"][0]]))
        lines += _grids(modality["grids"], modality["grid_note"])
    return lines + _not_in_config(graph, list(modality["tokens"]))


def _not_in_config(graph: GraphReport, names: list[str]) -> list[str]:
    """Kinds of tokens of the prompt that a head config with boundaries does not know."""
    config = graph.options.head_config
    if config is None or not config.bounded:
        return []
    own = config.modalities

    def is_known(name: str) -> bool:
        by_number = name in LABELS and own.get(LABELS.index(name), name) not in LABELS
        return name in own.values() or by_number or name not in LABELS

    unknown = [name for name in names if name != "text" and not is_known(name)]
    text = f"the head config does not know {' and '.join(unknown)}: these tokens count as text"
    return _wrap("note", text) if unknown else []


def _grids(grids: list[dict[str, Any]], note: str) -> list[str]:
    """One line per run of images and videos of the same size, and what is not known about them."""
    alike = [list(group) for _, group in groupby(grids, key=lambda grid: {**grid, "batch": 0, "start": 0, "stop": 0})]
    texts = [_grid(group) for group in alike[:_GRIDS_SHOWN]]
    if len(alike) > _GRIDS_SHOWN:
        texts.append(f"… {sum(map(len, alike[_GRIDS_SHOWN:]))} more")
    if note:
        texts.append(f"not known: {note}")
    return [line for i, text in enumerate(texts) for line in _wrap("" if i else "grids", text)]


def _grid(alike: list[dict[str, Any]]) -> str:
    first = alike[0]
    frames = f"{first['frames']} frames × " if first["frames"] > 1 else ""
    stride = f" · frame stride {first['frame_stride']}" if first["frame_stride"] is not None else ""
    where = f" at {first['start']}" + (f" of batch element {first['batch']}" if first["batch"] else "")
    times = f" and {len(alike) - 1} more alike" if len(alike) > 1 else ""
    size = f"{frames}{first['rows']} rows × {first['tokens_per_row']} tokens"
    return f"{first['modality']} {size}{stride}{where}{times}  [source: {first['source']}]"


def _abbreviated(runs: list[str]) -> str:
    """``a b c b c b c d`` as ``a (b c)×3 d``: time stamps between frames repeat; then the first few, and how many more.

    Only pairs are folded: a frame and what separates it from the next.
    """
    shown: list[str] = []
    at = 0
    while at < len(runs) and len(shown) < _RUNS_SHOWN:
        pair, times = runs[at : at + 2], 1
        while len(pair) == 2 and runs[at + 2 * times : at + 2 * times + 2] == pair:
            times += 1
        if times > 1:
            shown.append(f"({' '.join(pair)})×{times}")
            at += 2 * times
        else:
            shown.append(runs[at])
            at += 1
    return " ".join(shown) + (f" … {len(runs) - at} more" if at < len(runs) else "")


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
    lines += _wrap("shapes", " · ".join(filter(None, [site.shapes, site.form, site.phase])))
    lines += _wrap("mask", site.mask + (f"   ⇐ {site.expression}" if site.expression else ""))
    lines += _wrap("decision", str(site.decision))
    if site.decision is not None and site.decision.reason is not None:
        lines += _wrap("mend", f"{site.decision.reason.mend}  [{site.decision.reason.anchor}]")
    if _done(site):
        run = run_to_json(site.key)
        lines += _run(run) + _predicted(predicted(site.facts, run))
    return lines


def _predicted(told: dict[str, Any] | None) -> list[str]:
    if told is None:
        return []
    times = ""
    if told["milliseconds"] is not None:
        times = f", {told['milliseconds']:.3g} of {told['dense_milliseconds']:.3g} ms for each batch element"
    return _wrap("predicted", f"kernel takes {told['share_of_dense']:.1%} of dense{times}  [{told['source']}]")


def _run(run: dict[str, Any] | None) -> list[str]:
    if run is None:
        return []
    lines = _wrap("last run", f"{run['q_len']} × {run['kv_len']} tokens · {run['path']} · density {run['density']:.1%}")
    lines += [line for note in run["notes"] for line in _wrap("note", note)]
    if run["patterns"]:
        batch = f"  (batch element 0 of {len(run['patterns'])})" if len(run["patterns"]) > 1 else ""
        lines += _heads(run["patterns"][0], batch)
    elif run["density_per_head"]:
        lines += _wrap("heads", "all dense")
    return lines + _guard(run["guard"])


def _guard(guard: dict[str, Any] | None) -> list[str]:
    """What the guard saw when it last looked, in one line."""
    if guard is None:
        return []
    parts = [f"{guard['rows']} rows of call {guard['call']}"]
    for name, worst in (("recall", min), ("error", max)):
        values = guard[f"{name}_per_head"]
        if values is not None:
            known = [value for value in values if value is not None]
            shown = f"{worst(known):.3g} (head {values.index(worst(known))})" if known else "NaN"
            parts.append(f"{'least recall' if name == 'recall' else 'largest error'} {shown}")
            parts += [f"{len(values) - len(known)} heads NaN"] if 0 < len(known) < len(values) else []
    if guard["moved_to_dense"] is not None:
        moved = guard["moved_to_dense"]
        heads = f": {', '.join(map(str, moved))}" if moved else ""
        parts.append(f"{len(moved)} heads below {guard['min_recall']:g} moved to dense{heads}")
    return _wrap("guard", f"{' · '.join(parts)} · {guard['milliseconds']:.3g} ms")


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
