"""Logs, counters, structured traces and profiles tell what was done."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import mmi_compile
from mmi_compile import telemetry
from mmi_compile.report import GraphReport
from tests import models

pytestmark = pytest.mark.fresh_dynamo


def run(layers: int = 2, **options: object) -> None:
    model, inputs = models.build("qwen2", shape=models.Shape(layers=layers))
    with torch.no_grad():
        torch.compile(model, backend="mminference", options={"inner": "eager", "min_tokens": 0, **options})(**inputs)


def test_counters_count_what_was_rewritten() -> None:
    counters["mmi"].clear()
    run()
    assert counters["mmi"]["attentions"] == counters["mmi"]["rewritten"] == 2
    assert counters["mmi"]["graphs"] >= 1


def test_counters_name_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    counters["mmi"].clear()
    run(skip_passes=("rewrite",))
    assert counters["mmi"]["left: skipped"] == 2
    assert counters["mmi"]["rewritten"] == 0


def test_logs_hold_a_line_for_each_graph_and_attention(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="mmi_compile"):
        run()
    lines = [record.getMessage() for record in caplog.records if record.name == "mmi_compile"]
    assert any("2 of 2 attentions rewritten" in line for line in lines)
    assert sum("mmi::attention" in line for line in lines) == 2


def test_torch_logs_and_traces(tmp_path: Path) -> None:
    """In a process of its own, as users set the variables."""
    code = "from tests.test_telemetry import run; run()"
    environ = {**os.environ, "TORCH_LOGS": "+mmi_compile", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert "2 of 2 attentions rewritten" in done.stderr
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert '"name": "mmi_report"' in text
    assert '"name": "mmi_rewritten_graph"' in text


def test_telling_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(graph: GraphReport) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(telemetry, "_trace", bad)
    run()


def test_profiles_show_probe_plan_and_kernel() -> None:
    model, inputs = models.build("qwen2", tokens=130, shape=models.Shape(layers=1))
    compiled = torch.compile(model, backend="mminference", options={"inner": "eager", "min_tokens": 0})
    with torch.no_grad():
        compiled(**inputs)
        with torch.profiler.profile() as profile:
            compiled(**inputs)
    names = {event.key for event in profile.key_averages()}
    assert {"mmi::plan", "mmi::probe", "mmi::kernel"} <= names
    (probe,) = {event.cpu_parent.name for event in profile.events() if event.name == "mmi::probe"}
    assert probe == "mmi::plan"


def test_reading_a_report_changes_nothing_of_later_runs() -> None:
    model, inputs = models.build("qwen2", tokens=130, shape=models.Shape(layers=1))
    compiled = torch.compile(model, backend="mminference", options={"inner": "eager", "min_tokens": 0})

    def operators() -> list[str]:
        with torch.no_grad(), torch.profiler.profile() as profile:
            compiled(**inputs)
        return [event.name for event in profile.events() if "::" in event.name]

    operators()
    before = operators()
    report = mmi_compile.last_report()
    assert report is not None
    assert str(report)
    assert report.html()
    assert report.dumps()
    assert report.svg()
    assert operators() == before
    assert not [hook for part in model.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


@pytest.mark.parametrize("profiled", [False, True])
def test_ranges_cost_nothing_unless_a_profiler_or_nvtx_asks(profiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``emit_nvtx`` needs a GPU; it answers the same question, and its ranges are those of ``record_function``."""
    told: list[str] = []

    def record(name: str) -> contextlib.AbstractContextManager[None]:
        told.append(name)
        return contextlib.nullcontext()

    attention = torch.compile(
        lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True),
        backend="mminference", options={"inner": "eager", "min_tokens": 0},
    )  # fmt: skip
    q = torch.randn(1, 1, 300, 16)
    attention(q)
    with monkeypatch.context() as patched:
        patched.setattr(torch._C._autograd, "_profiler_enabled", lambda: profiled)
        patched.setattr(torch.profiler, "record_function", record)
        attention(q)
    assert {"mmi::plan", "mmi::probe", "mmi::kernel"} <= set(told) if profiled else not told
