"""``mmi doctor``: a sound installation is healthy, and whatever is broken is named with its mend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmi_compile import cli, doctor, environment
from mmi_compile.doctor import Check, diagnose

pytestmark = pytest.mark.fresh_dynamo


@pytest.fixture(autouse=True)
def _only_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_sound_installation_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == doctor.SCHEMA
    assert told["healthy"]
    assert told["versions"]["torch"] == torch.__version__
    assert [device["type"] for device in told["devices"]] == ["cpu"]
    names = [check["name"] for check in told["checks"]]
    assert {"torch", "triton", "backend", "cache folder", "self-test, CPU", "compile"} <= set(names)


def test_people_read_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "everything works" in text
    assert "1 of 1 attentions rewritten" in text


def test_a_cache_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MMI_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "MMI_CACHE_DIR" in text
    assert "something is broken" in text


def test_versions_that_are_too_old_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "versions", lambda: {"torch": "2.10.1+cu130", "triton": "3.6.0"})
    found = {check.name: check for check in doctor._version_checks()}
    assert found["torch"].ok is False
    assert "torch>=2.11" in found["torch"].mend
    assert found["triton"].ok is True
    assert found["transformers"].ok is None  # optional


def test_a_wrong_result_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: torch.Tensor, *rest: object) -> torch.Tensor:
        return torch.zeros_like(q)

    monkeypatch.setattr(doctor, "attention_cpu", wrong)
    found = {check.name: check for check in diagnose().checks}
    assert found["self-test, CPU"].ok is False


def test_a_check_that_raises_is_a_finding() -> None:
    def bad() -> Check:
        raise RuntimeError("first line\nsecond")

    check = doctor._caught("it", bad)
    assert check.ok is False
    assert check.detail == "RuntimeError: first line"


def test_versions_name_what_is_installed() -> None:
    found = environment.versions()
    assert {"python", "torch", "mmi-compile"} <= set(found)
