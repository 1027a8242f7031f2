"""``verify`` and ``min_recall`` end to end: options, operator, report."""

from __future__ import annotations

import pytest
import torch

import mmi_compile
from mmi_compile import report, runtime
from mmi_compile.kernels import adaptive, ops
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.reference import attention_reference
from mmi_compile.options import OptionError, Options
from mmi_compile.report_html import render_html
from tests import models

pytestmark = pytest.mark.fresh_dynamo
N, DIM = 2048, 32


def turning() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two heads that attend to one key each: head 0 to the first key throughout; head 1 only in the last rows, before
    that to a key far from both ends."""
    where = torch.zeros(2, N, dtype=torch.long)
    where[1, : N - 300] = 512
    axis = torch.eye(DIM)
    k = torch.zeros(1, 1, N, DIM)
    k[0, 0, 0], k[0, 0, 512] = axis[0], axis[1]
    q = torch.zeros(1, 2, N, DIM)
    for head in range(2):
        q[0, head] = torch.where((where[head] == 0)[:, None], axis[0], axis[1]) * 60
    v = torch.randn(1, 1, N, DIM, generator=torch.Generator().manual_seed(0))
    return q, k, v


@pytest.fixture(autouse=True)
def _last_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows from all over the prompt would see at once what the guard is to find here."""
    monkeypatch.setattr(adaptive, "_groups", lambda geometry: 0)


def attend(key: str, **guard: float) -> torch.Tensor:
    q, k, v = turning()
    out: torch.Tensor = torch.ops.mmi.attention(
        q, k, v, None, None, None, [], 1.0, 0, 0, "adaptive", 0.95, 0.9, 0, True, "", None, "bshd", key, ops.ABI,
        **guard,
    )  # fmt: skip
    return out


def exact() -> torch.Tensor:
    q, k, v = turning()
    return attention_reference(q.double(), k.double(), v.double(), Geometry(1, 2, 1, N, N).to_mask()[:, None], 1.0)


def off(out: torch.Tensor) -> torch.Tensor:
    """Relative error of each head."""
    want = exact()
    return ((out.double() - want).square().sum((-1, -2)) / want.square().sum((-1, -2))).sqrt()[0]


def test_a_head_that_the_probe_misjudges_is_seen() -> None:
    out = attend("guard/seen", verify=1.0)
    told = report.run_to_json("guard/seen")
    assert told is not None
    guard = told["guard"]
    assert off(out)[1] > 0.3
    assert guard["recall_per_head"][0] > 0.94
    assert guard["recall_per_head"][1] < 0.5
    assert guard["error_per_head"][1] == pytest.approx(float(off(out)[1]), abs=0.25)
    assert guard["moved_to_dense"] is None
    assert guard["rows"] == 64
    assert guard["milliseconds"] > 0


def test_a_head_that_falls_short_runs_dense() -> None:
    out = attend("guard/moved", min_recall=0.9, verify=1.0, guard_rows=32)
    assert off(out).max() < 0.05
    told = report.run_to_json("guard/moved")
    assert told is not None
    assert told["guard"]["moved_to_dense"] == [1]
    assert told["guard"]["recall_per_head"][1] < 0.5  # what it would have been
    assert told["patterns"][0][1].startswith("dense (moved by the guard")
    assert told["density_per_head"][1] == 1.0


def test_some_calls_are_verified_and_the_last_reading_stays() -> None:
    key = "guard/some"
    seen = []
    for _ in range(10):
        attend(key, verify=0.3)
        run = runtime.attention_run(key)
        assert run is not None
        assert run.guard is not None
        seen.append(run.guard.call)
    assert seen == [1, 1, 1, 4, 4, 4, 7, 7, 7, 10]


def test_nothing_is_measured_unless_asked() -> None:
    attend("guard/none")
    run = runtime.attention_run("guard/none")
    assert run is not None
    assert run.guard is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"verify": 1.5}, "verify"), ({"min_recall": 0.0}, "min_recall"), ({"guard_rows": 0}, "guard_rows")],
)
def test_options_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options(**options)  # type: ignore[arg-type]


def test_a_model_reports_what_the_guard_saw() -> None:
    model, inputs = models.build("qwen2", tokens=300, shape=models.Shape(layers=2))
    options = {"inner": "eager", "min_tokens": 0, "recall": 0.5, "verify": 1.0, "min_recall": 0.2}
    fast = torch.compile(model, backend="mminference", options=options)
    with torch.no_grad():
        fast(**inputs)
    told = mmi_compile.last_report()
    assert told is not None
    text = " ".join(str(told).split())
    assert text.count("least recall") == 2
    assert "heads below 0.2 moved to dense" in text
    assert "guard: recall" in render_html(told)
