"""What was done, told where users of PyTorch look: logs, counters, structured traces and profiles.

* ``TORCH_LOGS="+mmi_compile"``: one line a graph, and with ``+`` one for each attention.
* ``torch._dynamo.utils.counters["mmi"]``: graphs, attentions, rewritten ones, and those left alone by reason.
* ``TORCH_TRACE=folder``: the report and the rewritten graph as artifacts, which tlparse lists beside PyTorch's own.
* profilers: ranges ``mmi::plan`` (with ``mmi::probe`` inside) and ``mmi::kernel`` in every sparse attention; see
  ``profiling.span``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from torch._dynamo.utils import counters
from torch._logging._internal import trace_structured

from mmi_compile.report import GraphReport, Report

log = logging.getLogger("mmi_compile")


def announce(graph: GraphReport) -> None:
    """Tell of one compiled graph. Never raises: telling is no part of the work."""
    try:
        _count(graph)
        _log(graph)
        _trace(graph)
    except Exception:
        log.debug("the report of graph %s could not be told", graph.key, exc_info=True)


def _count(graph: GraphReport) -> None:
    counted = counters["mmi"]
    counted["graphs"] += 1
    for site in graph.sites:
        counted["attentions"] += 1
        decision = site.decision
        if decision is not None and decision.rewritten:
            counted["rewritten"] += 1
        elif decision is not None and decision.reason is not None:
            counted[f"left: {decision.reason.name.lower()}"] += 1
    if graph.failure:
        counted["failed graphs"] += 1


def _log(graph: GraphReport) -> None:
    if graph.failure:
        log.warning("graph %s runs as it was: %s", graph.key, graph.failure)
    if not graph.sites:
        log.debug("graph %s: no attention", graph.key)
        return
    log.info("graph %s: %s", graph.key, Report([graph]).summary())
    for site in graph.sites:
        log.debug("%s: %s", site.where or site.source or site.key, site.decision)


def _trace(graph: GraphReport) -> None:
    """Payloads are made only where a trace is being written."""
    if not graph.sites:
        return
    _artifact("mmi_report", "json", lambda: json.dumps(Report([graph]).to_json(), default=str))
    _artifact("mmi_rewritten_graph", "string", graph.code)


def _artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)
