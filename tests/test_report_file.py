"""The format of saved reports: real ones follow the schema, others are refused with one sentence."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmi_compile
from mmi_compile import cli
from mmi_compile.decision import MMIError
from mmi_compile.report import SCHEMA_VERSION
from mmi_compile.report_file import is_report, load_report, report_schema, saved_text
from mmi_compile.report_time import explain_timed
from tests import families, models
from tests.test_report import OPTIONS, tiny

pytestmark = pytest.mark.fresh_dynamo

SPARSE = {"min_tokens": 0, "recall": 0.5, "max_density": 1.0}


def strict(schema: Any) -> Any:
    """The schema without room for fields that it does not know."""
    if isinstance(schema, dict):
        told = {name: strict(part) for name, part in schema.items()}
        return {**told, "additionalProperties": False} if isinstance(told.get("properties"), dict) else told
    return [strict(part) for part in schema] if isinstance(schema, list) else schema


@pytest.fixture(scope="module")
def reports() -> dict[str, mmi_compile.Report]:
    model, inputs = tiny()
    vision = families.vision("qwen2_5_vl", shape=models.Shape(layers=1))
    long, prompt = models.plain_causal(tokens=300, batch=2, shape=models.Shape(layers=1))
    return {
        "every kind of attention": mmi_compile.explain(model, options=OPTIONS, **inputs),
        "many graphs, grids": mmi_compile.explain(vision.model, **vision.inputs),
        "sparse, verified": mmi_compile.explain(
            long, options={**SPARSE, "verify": 1.0, "min_recall": 0.9}, **prompt
        ),
        "timed": explain_timed(long, SPARSE, prompt),
        "passes left out": mmi_compile.explain(model, options={**OPTIONS, "passes_until": "prove_mask"}, **inputs),
        "nothing found": mmi_compile.explain(nn.Linear(4, 4), torch.randn(2, 4)),
        "nothing captured": mmi_compile.Report([]),
    }  # fmt: skip


def test_real_reports_follow_the_schema(reports: dict[str, mmi_compile.Report]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(report_schema())
    validator = jsonschema.Draft202012Validator(strict(report_schema()))
    for name, report in reports.items():
        errors = [f"{name}: {error.json_path}: {error.message}" for error in validator.iter_errors(report.to_json())]
        assert not errors, errors[:5]


def test_reports_are_read_back(reports: dict[str, mmi_compile.Report], tmp_path: Path) -> None:
    for number, report in enumerate(reports.values()):
        path = tmp_path / f"{number}.json"
        path.write_text(report.dumps(), encoding="utf-8")
        told = load_report(path)
        assert told["summary"] == report.summary()
        assert report.summary() in saved_text(told)


def test_what_the_sparse_and_the_timed_report_hold(reports: dict[str, mmi_compile.Report]) -> None:
    (site,) = reports["sparse, verified"].to_json()["graphs"][0]["attentions"]
    assert 0 < site["predicted"]["share_of_dense"] <= 1.1
    assert site["predicted"]["milliseconds"] is None or "calibrated" in site["predicted"]["source"]
    assert len(site["run"]["guard"]["recall_per_head"]) == 4
    timed = reports["timed"]
    stages = {stage["name"]: stage for stage in timed.to_json()["stages"]}
    assert {"mmi::attention", "mmi::plan", "mmi::kernel"} <= set(stages)
    assert stages["mmi::attention"]["calls"] == stages["mmi::kernel"]["calls"] == 1
    assert "time by stage" in str(timed)
    assert "Time by stage" in timed.html()
    assert not reports["sparse, verified"].stages


def test_the_constant_and_the_code_agree() -> None:
    assert report_schema()["properties"]["schema"]["const"] == SCHEMA_VERSION


def broken(change: Any) -> str:
    model, inputs = tiny()
    data = copy.deepcopy(mmi_compile.explain(model, options=OPTIONS, **inputs).to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema=7, version="9.9"), r"format 7, written by mmi_compile 9\.9, and .* reads format 1"),
        (lambda d: d.update(graphs=3), r"is damaged: graphs is no array"),
        (lambda d: d["graphs"][0].pop("key"), r"is damaged: graphs\[0\]\.key is missing"),
        (lambda d: d["graphs"][0]["nodes"].update(before="x"), r"is damaged: graphs\[0\]\.nodes\.before is no integer"),
        (lambda d: d.pop("summary"), r"is no report"),
    ],
)
def test_other_reports_are_refused_in_one_sentence(change: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(broken(change))
    with pytest.raises(MMIError, match=words) as caught:
        load_report(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [("{", "is no JSON"), ("[1]", "is no report"), (None, "cannot be read")])
def test_what_is_no_report_is_refused(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(MMIError, match=words):
        load_report(path)


def test_show_prints_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = tiny()
    report = mmi_compile.explain(model, options=OPTIONS, **inputs)
    path = tmp_path / "report.json"
    path.write_text(report.dumps())
    assert cli.main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert report.summary() in out
    assert "layer 2 · layers.2: left alone: the meaning of its mask could not be proved" in out
    assert "[docs/reasons.md#unknown_mask]" in out
    assert cli.main(["show", str(path), "--json"]) == 0
    assert is_report(json.loads(capsys.readouterr().out))
    assert cli.main(["show", str(path), "--png", "x.png"]) == 2
    assert "mmi explain --svg" in capsys.readouterr().err
    path.write_text(broken(lambda d: d.update(schema=7)))
    assert cli.main(["show", str(path)]) == 2
    error = capsys.readouterr().err
    assert "reads format 1" in error
    assert len(error.splitlines()) == 1
