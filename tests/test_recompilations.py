"""Graph breaks and recompilations: counted, told with their places, and none of them ours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import mmi_compile
from mmi_compile import Reason, report
from mmi_compile.frontend import find_language_model
from tests import families, harness, matrix
from tests.prompts import Shape

pytestmark = pytest.mark.fresh_dynamo

OPTIONS: dict[str, Any] = {"policy": "exact", "inner": "eager"}
ONE_LAYER = Shape(layers=1)


@pytest.fixture(autouse=True)
def _own_report() -> None:
    report.forget()


# --- recompilations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "mistral",
        pytest.param("qwen2_5_vl", marks=pytest.mark.slow),
        "qwen3_vl",
        pytest.param("llava", marks=pytest.mark.slow),
        pytest.param("llava_onevision", marks=pytest.mark.slow),
        "internvl",
    ],
)
def test_ten_prompts_take_two_compilations(name):
    counters.clear()
    assert matrix.compilations(name) <= 2
    assert counters["mmi"]["graphs"] <= 2
    assert counters["mmi"]["failed graphs"] == 0
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_three_prompts_take_two_compilations(name):
    counters.clear()
    assert matrix.compilations(name, count=3) <= 2
    assert not counters["graph_break"]


def stock_compilations(name: str, count: int) -> int:
    """How many graphs Dynamo makes of the language model by itself."""
    made: list[Any] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        made.append(gm)
        return gm.forward

    compiled = None
    for model, inputs in matrix.prompts(name, count):
        if compiled is None:
            compiled = copy.deepcopy(model)
            find_language_model(compiled).compile(backend=backend)
        matrix._call(compiled, inputs, "dynamic")
    return len(made)


@pytest.mark.slow
def test_qwen3_5_takes_as_many_compilations_as_without_us():
    # Its linear attention, where flash-linear-attention is not installed, is a loop over chunks of 64 tokens in
    # Python: Dynamo unrolls it and compiles anew for every number of chunks.
    stock = stock_compilations("qwen3_5", count=3)
    torch._dynamo.reset()
    assert matrix.compilations("qwen3_5", count=3) == stock == 3


def test_what_a_user_changes_between_prompts_costs_nothing():
    model, inputs = families.text("llama", shape=ONE_LAYER)
    mmi_compile.compile(model, **OPTIONS)
    for _ in range(3):
        with torch.no_grad(), mmi_compile.modality(torch.zeros(inputs["input_ids"].shape, dtype=torch.int64)):
            model(**inputs, use_cache=False)
    with torch.no_grad():
        model(**inputs, use_cache=False)
    made = mmi_compile.last_report()
    assert made is not None
    assert len(made.graphs) == 1


# --- graph breaks -------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """Breaks in a function that it calls, and one of its own."""

    def check(self, x: Tensor) -> Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    def forward(self, q: Tensor) -> Tensor:
        q = self.check(self.check(q))
        q = q - q.mean()
        if q.sum() > 1e9:
            return q
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_breaks_are_counted_with_their_places():
    q = torch.randn(1, 2, 17, 8)
    found = mmi_compile.explain(Broken(), q)
    assert found.summary().startswith("1 of 1 attentions rewritten")
    breaks = {broken.place.rpartition(" in ")[2]: (broken, count) for broken, count in found.breaks}
    assert set(breaks) == {"check", "forward"}
    broken, count = breaks["check"]
    assert count >= 1
    assert broken.place.startswith("test_recompilations.py:") or "→ test_recompilations.py:" in broken.place
    assert "graph_break" in broken.reason
    total = sum(count for _, count in found.breaks)
    text = str(found)
    assert f"{total} graph breaks" in text
    assert "in check" in text
    told = found.to_json()["breaks"]
    assert sum(entry["graphs"] for entry in told) == total
    assert "Graph breaks" in found.html()


def test_a_model_without_breaks_tells_of_none():
    model, inputs = families.text("llama", shape=ONE_LAYER)
    found = mmi_compile.explain(model, **inputs, use_cache=False)
    assert found.breaks == []
    assert "graph break" not in str(found)
    assert "Graph breaks" not in found.html()


@pytest.mark.slow
def test_breaks_of_a_vision_tower_are_those_of_the_model():
    case = families.vision("qwen2_5_vl", shape=ONE_LAYER)
    found = mmi_compile.explain(case.model, **case.inputs)
    assert found.breaks
    assert all("mmi_compile" not in broken.place for broken, _ in found.breaks)


# --- masks from another graph -------------------------------------------------------------------------------------


class MaskElsewhere(nn.Module):
    """The mask is made before a graph break, the attention after it."""

    def forward(self, q: Tensor) -> Tensor:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        torch._dynamo.graph_break()
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask[None, None])


def test_a_mask_that_comes_from_another_graph_says_so():
    q = torch.randn(1, 2, 17, 8)
    compiled = torch.compile(MaskElsewhere(), backend="mminference", options=OPTIONS)
    with torch.no_grad():
        assert harness.relative_error(compiled(q), MaskElsewhere()(q)) < 1e-6
    made = mmi_compile.last_report()
    assert made is not None
    (site,) = made.sites
    assert site.decision is not None
    assert site.decision.reason is Reason.MASK_IS_INPUT
    assert "mask" in site.decision.detail
    assert [count for _, count in made.breaks] == [1]


@pytest.mark.slow
def test_qwen3_vl_under_the_bare_backend_says_why():
    # Adding deepstack features to masked rows breaks Dynamo's graph inside a loop over layers, so that every layer is
    # a graph of its own and gets the mask from outside.
    case = families.vision("qwen3_vl", shape=Shape(layers=2), videos=())
    compiled = torch.compile(case.model, backend="mminference", options=OPTIONS)
    with torch.no_grad():
        expected = copy.deepcopy(case.model)(**case.inputs).logits
        assert harness.relative_error(compiled(**case.inputs).logits, expected) < 1e-5
    made = mmi_compile.last_report()
    assert made is not None
    left = [site.decision.reason for site in made.sites if site.decision is not None]
    assert left.count(Reason.MASK_IS_INPUT) == 2
    assert set(left) == {Reason.MASK_IS_INPUT, Reason.BIDIRECTIONAL}
    assert any("_deepstack_process" in broken.place for broken, _ in made.breaks)
