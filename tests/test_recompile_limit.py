"""A model that Dynamo stops compiling is told of, and compiled more often than PyTorch would."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmi_compile
from mmi_compile import recompile_limit, report
from mmi_compile.recompile_limit import LimitReached, limits_reached, own_limit
from mmi_compile.report_file import saved_text
from tests.harness import relative_error

pytestmark = pytest.mark.fresh_dynamo

OPTIONS: dict[str, Any] = {"policy": "exact", "inner": "eager"}


@pytest.fixture(autouse=True)
def _own_report() -> None:
    report.forget()


class Attend(nn.Module):
    """Every other ``turn`` is another version to Dynamo."""

    def forward(self, q: Tensor, turn: str) -> Tensor:
        q = q + len(turn)
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


def call(compiled: Any, times: int) -> None:
    q = torch.randn(1, 2, 9, 8)
    with torch.no_grad():
        for n in range(times):
            assert relative_error(compiled(q, "x" * n), Attend()(q, "x" * n)) < 1e-5


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Any:
    """Warnings of this package."""
    caplog.set_level(logging.WARNING, logger="mmi_compile")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "mmi_compile" and r.levelno == logging.WARNING]


def test_a_limit_under_the_bare_backend_is_told_once(told):
    compiled = torch.compile(Attend(), backend="mminference", options=OPTIONS)
    with torch._dynamo.config.patch(recompile_limit=2):
        call(compiled, 2)
        assert limits_reached() == ()
        call(compiled, 6)
    (found,) = limits_reached()
    assert found.limit == "recompile_limit"
    assert found.value == 2
    assert found.place.startswith("test_recompile_limit.py:")
    assert found.place.endswith(" in forward")
    assert "turn" in found.reason
    (warning,) = told()
    assert found.place in warning
    assert "raise torch._dynamo.config.recompile_limit" in warning
    assert "dynamic=True" in warning


def test_a_limit_is_in_every_form_of_the_report():
    compiled = torch.compile(Attend(), backend="mminference", options=OPTIONS)
    with torch._dynamo.config.patch(recompile_limit=1):
        call(compiled, 3)
    made = mmi_compile.last_report()
    assert made is not None
    (found,) = made.limits
    assert "limits reached" in made.summary()
    assert "1 function not compiled any further" in str(made)
    assert found.place in str(made)
    assert made.to_json()["limits"] == [found.to_json()]
    assert found.mend in saved_text(made.to_json())
    assert "Functions not compiled any further" in made.html()
    report.forget()
    assert limits_reached() == ()


def test_without_a_limit_nothing_is_told(told):
    compiled = torch.compile(Attend(), backend="mminference", options=OPTIONS)
    call(compiled, 2)
    made = mmi_compile.last_report()
    assert made is not None
    assert made.limits == ()
    assert "limit" not in made.summary()
    assert "any further" not in str(made) + made.html()
    assert told() == []


def test_functions_of_other_backends_are_their_business(told):
    mine = torch.compile(lambda q: q * 2, backend="mminference", options=OPTIONS)
    mine(torch.ones(3))
    with torch._dynamo.config.patch(recompile_limit=1):
        call(torch.compile(Attend(), backend="eager"), 4)
    assert limits_reached() == ()
    assert told() == []


def test_fullgraph_raises_and_the_message_says_so(told):
    compiled = torch.compile(Attend(), backend="mminference", options=OPTIONS, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        call(compiled, 1)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            call(compiled, 2)
    assert len(limits_reached()) == 1
    (warning,) = told()
    assert "or raises under fullgraph=True" in warning


@pytest.mark.skipif(not own_limit(), reason="torch.compile of this PyTorch takes no limit")
def test_a_model_of_ours_is_compiled_more_often_than_others(told):
    model = mmi_compile.compile(Attend(), **OPTIONS)
    call(model, torch._dynamo.config.recompile_limit + 4)
    made = mmi_compile.last_report()
    assert made is not None
    assert len(made.graphs) == torch._dynamo.config.recompile_limit + 4
    assert made.limits == ()
    assert told() == []


@pytest.mark.skipif(not own_limit(), reason="torch.compile of this PyTorch takes no limit")
def test_a_model_of_ours_at_its_own_limit(monkeypatch):
    monkeypatch.setattr(recompile_limit, "VERSIONS", 1)
    with torch._dynamo.config.patch(recompile_limit=2):
        model = mmi_compile.compile(Attend(), **OPTIONS)
    call(model, 4)
    (found,) = limits_reached()
    assert found.value == 2


def test_the_configured_limit_holds_where_it_is_more():
    with torch._dynamo.config.patch(recompile_limit=100):
        assert own_limit().get("recompile_limit", 100) == 100
    assert own_limit().get("recompile_limit", 64) == 64


def test_a_pytorch_that_takes_no_limit_gets_none(monkeypatch):
    def compile(model: Any = None, *, backend: Any = None) -> Any:
        raise AssertionError("not called")

    monkeypatch.setattr(torch, "compile", compile)
    assert own_limit() == {}


@pytest.mark.parametrize("limit", ["recompile_limit", "accumulated_recompile_limit", "cache_size_limit"])
def test_words_of_dynamo(limit, monkeypatch):
    monkeypatch.setattr(recompile_limit, "_frame", lambda: 3)
    recompile_limit.watch()
    logger = logging.getLogger("torch._dynamo.convert_frame")
    words = "torch._dynamo hit config.%s (%s)\n   function: '%s' (%s:%d)\n   last reason: %s\nTo log all …"
    logger.warning(words, limit, 8, "forward", "/somewhere/model.py", 12, "0/7: L['n'] == 7")
    logger.warning(words, limit, 8, "forward", "/somewhere/model.py", 12, "0/7: L['n'] == 7")
    logger.warning("torch._dynamo hit something else")
    assert limits_reached() == (LimitReached("model.py:12 in forward", limit, 8, "0/7: L['n'] == 7"),)
