"""What each pass did to a graph: its code after every pass, and what changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mmi_compile.environment import versions
from mmi_compile.report_program import Snapshot

if TYPE_CHECKING:
    from mmi_compile.report import GraphReport


def steps(graph: GraphReport) -> list[Snapshot]:
    """The captured graph and the graph after every pass that ran.

    Snapshots are kept while compiling only under ``dump``. Otherwise the passes run again on a copy of the captured
    graph, so that nobody pays for what nobody looks at. Without ``dump`` there are no steps of a graph in which nothing
    was rewritten, or whose rewriting failed: it is compiled as it was captured.
    """
    captured = Snapshot.of("captured", graph.original)
    return [captured, *(graph.trace or _again(graph))]


def _again(graph: GraphReport) -> list[Snapshot]:
    from mmi_compile.backend import copy_graph
    from mmi_compile.passes import PIPELINE, PassContext, run_pipeline

    if not graph.changed or graph.failure:
        return []
    found: list[Snapshot] = []

    def observe(event: str, name: str, gm: object, context: PassContext) -> None:
        if event == "after":
            copy.recompile()
            found.append(Snapshot.of(name, copy))

    copy = copy_graph(graph.original)
    context = PassContext(options=graph.options, graph_key=graph.key, needs_grad=graph.needs_grad)
    run_pipeline(copy, context, PIPELINE, [observe])
    return found


def difference(before: Snapshot, after: Snapshot) -> Iterator[str]:
    """Lines of a unified diff; none where the pass changed nothing."""
    lines = (before.text.splitlines(), after.text.splitlines())
    return difflib.unified_diff(*lines, before.name, after.name, lineterm="", n=2)


def header(graph: GraphReport, number: int, snapshot: Snapshot) -> Sequence[str]:
    """Where a dumped file comes from: pass, versions, options and the user's source lines."""
    from mmi_compile.report import options_to_json

    what = (
        "as Dynamo captured it" if number == 0 else f"after the pass {snapshot.name}, the {_ordinal(number)} that ran"
    )
    told = options_to_json(graph.options)
    lines = [
        f"graph {graph.key}, {what}; {snapshot.nodes} nodes.",
        f"Run this file to run the graph alone: python {number:02d}_{snapshot.name}.py",
        "Inputs have the recorded shapes: floating-point numbers are drawn, integers are 0, masks of live keys are 1.",
        "A graph that checks the values of its inputs may refuse these: write others into inputs() below.",
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()),
        "options: " + ", ".join(f"{name}={value!r}" for name, value in told.items() if value not in (None, [], {})),
    ]
    for site in graph.sites:
        layer = "" if site.layer is None else f"layer {site.layer}, "
        lines.append(f"attention: {layer}{site.where or 'no module'}, {site.source or 'no source'}: {site.decision}")
    return lines


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
