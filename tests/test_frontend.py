"""compile() and explain(): what they change in a model, and what they leave as it was."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmi_compile
from mmi_compile import report
from mmi_compile.language_model import find_language_model
from mmi_compile.options import OptionError
from mmi_compile.recompile_limit import own_count
from tests import harness, models

pytestmark = pytest.mark.fresh_dynamo

OPTIONS = {"policy": "exact", "inner": "eager"}
ONE_LAYER = models.Shape(layers=1)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_report() -> None:
    report.forget()


def output(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, Tensor) else result.logits


def phases() -> list[str]:
    made = mmi_compile.last_report()
    return [] if made is None else [site.phase for site in made.sites]


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The list grows by one entry, the number of attentions rewritten, with every graph handed to the backend."""
    compiled: list[int] = []
    remember = report.remember

    def counting(graph: report.GraphReport) -> None:
        compiled.append(len(graph.sites))
        remember(graph)

    monkeypatch.setattr("mmi_compile.backend.remember", counting)
    return compiled


# --- compile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "qwen2", "plain_causal"])
def test_compile_works_in_place_and_keeps_the_outputs(name):
    model, inputs = models.build(name, shape=ONE_LAYER)
    expected = output(model, inputs)
    compiled = mmi_compile.compile(model, **OPTIONS)
    assert compiled is model
    assert harness.relative_error(output(compiled, inputs), expected) < 1e-5
    assert phases() == ["prefill"]
    assert mmi_compile.last_report().summary() == "1 of 1 attentions rewritten in 1 graph"


def test_compile_refuses_an_unknown_option_before_it_changes_anything():
    model, _ = models.qwen2(shape=ONE_LAYER)
    with pytest.raises(OptionError, match="recall"):
        mmi_compile.compile(model, recal=0.9)
    assert not model._forward_pre_hooks
    assert model.model._compiled_call_impl is None


def test_hooks_are_installed_once():
    model, inputs = models.qwen2_5_vl(shape=ONE_LAYER)
    expected = output(model, inputs)
    for _ in range(3):
        mmi_compile.compile(model, **OPTIONS)
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (1, 1)
    assert harness.relative_error(output(model, inputs), expected) < 1e-5


def test_a_compiled_model_can_be_copied():
    model, inputs = models.qwen2(shape=ONE_LAYER)
    expected = output(model, inputs)
    mmi_compile.compile(model, **OPTIONS)
    output(model, inputs)
    twin = copy.deepcopy(model)
    assert harness.relative_error(output(twin, inputs), expected) < 1e-5
    assert len(twin._forward_pre_hooks) == 1


@pytest.mark.parametrize("name", ["plain_causal", "qwen2"])
def test_two_lengths_under_dynamic_share_one_compilation(name, monkeypatch):
    model, _ = models.build(name, shape=ONE_LAYER)
    compiled = count_compilations(monkeypatch)
    mmi_compile.compile(model, dynamic=True, **OPTIONS)
    for tokens in (33, 50, 20):
        twin, inputs = models.build(name, shape=ONE_LAYER, tokens=tokens)
        assert harness.relative_error(output(model, inputs), output(twin, inputs)) < 1e-5
    assert compiled == [1]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_two_prompts_under_dynamic_share_one_compilation(name, monkeypatch):
    model, _ = models.build(name, shape=ONE_LAYER)
    compiled = count_compilations(monkeypatch)
    mmi_compile.compile(model, dynamic=True, **OPTIONS)
    for tokens in (16, 31):
        twin, inputs = models.build(name, shape=ONE_LAYER, tokens=tokens)
        assert harness.relative_error(output(model, inputs), output(twin, inputs)) < 1e-5
    assert compiled == [1]


def test_fullgraph_holds_for_a_language_model():
    model, inputs = models.qwen2_5_vl(shape=ONE_LAYER)
    mmi_compile.compile(model, fullgraph=True, **OPTIONS)
    output(model, inputs)
    assert phases() == ["prefill"]


# --- generate -----------------------------------------------------------------------------------------------------


def generated(model: nn.Module, inputs: dict[str, Any], count: int = 6) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=count, do_sample=False).tolist()


@pytest.mark.parametrize(("name", "attn"), [("qwen2_5_vl", "sdpa"), ("qwen2_5_vl", "eager"), ("llava", "sdpa")])
def test_generate_gives_the_same_tokens(name, attn):
    model, inputs = models.build(name, attn=attn)
    expected = generated(model, inputs)
    mmi_compile.compile(model, **OPTIONS)
    assert generated(model, inputs) == expected
    assert {*phases()} == {"prefill", "decode"}
    for site in mmi_compile.last_report().sites:
        assert site.decision is not None
        assert site.decision.rewritten == (site.phase == "prefill")
        if site.phase == "decode":
            assert site.decision.reason is mmi_compile.Reason.DECODE
    assert generated(model, inputs) == expected  # again, from the compiled code


def test_generate_for_a_left_padded_batch_and_then_another_length():
    model, inputs = models.qwen2(batch=2, padding="left", shape=ONE_LAYER)
    longer = models.qwen2(batch=2, padding="left", tokens=47, shape=ONE_LAYER)[1]
    expected = [generated(model, prompt) for prompt in (inputs, longer)]
    mmi_compile.compile(model, dynamic=True, **OPTIONS)
    assert [generated(model, prompt) for prompt in (inputs, longer)] == expected
    assert "prefill" in phases()


def test_a_cached_prompt_goes_on_with_a_second_chunk():
    """Chunked prefill: rows of the second chunk stand after the cached ones."""
    model, inputs = models.qwen2(tokens=40, shape=ONE_LAYER)
    expected = output(model, inputs)
    mmi_compile.compile(model, **OPTIONS)
    ids = inputs["input_ids"]
    with torch.no_grad():
        first = model(input_ids=ids[:, :25], use_cache=True)
        second = model(input_ids=ids[:, 25:], past_key_values=first.past_key_values, use_cache=True)
    assert harness.relative_error(torch.cat([first.logits, second.logits], 1), expected) < 1e-5
    sites = mmi_compile.last_report().sites
    assert [site.decision.rewritten for site in sites] == [True, True], [str(site.decision) for site in sites]


# --- explain ------------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> list[object]:
    hooks = [
        (dict(m._forward_pre_hooks), dict(m._forward_hooks), m._compiled_call_impl, m.training) for m in model.modules()
    ]
    return [*hooks, {name: id(value) for name, value in model.named_parameters()}, *model.__dict__]


@pytest.mark.parametrize("name", ["plain_causal", "qwen2", "qwen2_5_vl"])
def test_explain_says_the_same_before_and_after_compile_and_changes_nothing(name):
    model, inputs = models.build(name, shape=ONE_LAYER)
    expected = output(model, inputs)
    before = state_of(model)
    first = mmi_compile.explain(model, **inputs)
    assert state_of(model) == before
    assert mmi_compile.last_report() is None

    mmi_compile.compile(model, **OPTIONS)
    output(model, inputs)
    before = state_of(model)
    second = mmi_compile.explain(model, **inputs)
    assert state_of(model) == before
    assert harness.relative_error(output(model, inputs), expected) < 1e-5

    def told(made: mmi_compile.Report) -> list[tuple[object, ...]]:
        return [
            (site.where.rpartition("layers")[2], site.form, site.phase, site.mask, str(site.decision.reason))
            for site in made.sites
        ]

    assert told(first) == told(second)
    assert len(first.rewritten) == 1


def test_explain_runs_once_and_takes_positional_arguments():
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    model = Counting()
    made = mmi_compile.explain(model, torch.randn(1, 2, 9, 8))
    assert model.calls == 1
    assert made.summary() == "1 of 1 attentions rewritten in 1 graph"


def test_explain_restores_a_compiled_model_after_an_exception():
    model, inputs = models.plain_causal(shape=ONE_LAYER)
    mmi_compile.compile(model, **OPTIONS)
    before = state_of(model)
    with pytest.raises(TypeError):
        mmi_compile.explain(model, no_such_argument=1, **inputs)
    assert state_of(model) == before


def test_explain_takes_options_and_refuses_wrong_ones():
    model, inputs = models.plain_causal(shape=ONE_LAYER)
    made = mmi_compile.explain(model, options={"policy": "exact"}, **inputs)
    assert "policy exact" in str(made)
    with pytest.raises(OptionError):
        mmi_compile.explain(model, options={"policy": "exactly"}, **inputs)


def test_explain_never_tires_and_uses_up_nobodys_compilations():
    """Dynamo stops compiling a function after a number of recompilations."""
    model, inputs = models.plain_causal(shape=ONE_LAYER, tokens=8)
    times = torch._dynamo.config.recompile_limit + 2
    told = {mmi_compile.explain(model, **inputs).summary() for _ in range(times)}
    assert told == {"1 of 1 attentions rewritten in 1 graph"}
    if own_count():
        with torch.no_grad():
            torch.compile(model, backend="mminference", options=OPTIONS)(**inputs)
        assert phases() == ["prefill"]


def test_explain_of_a_model_without_attention():
    made = mmi_compile.explain(nn.Linear(4, 4), torch.randn(2, 4))
    assert "no attention was found" in str(made)


# --- the language model inside ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("qwen2_5_vl", "Qwen2_5_VLTextModel"),
        ("llava", "LlamaModel"),
        ("qwen2", "Qwen2Model"),
        ("llama", "LlamaModel"),
        ("mistral", "MistralModel"),
        ("plain_causal", "PlainCausal"),
    ],
)
def test_find_language_model(name, inside):
    model, _ = models.build(name, shape=ONE_LAYER)
    found = find_language_model(model)
    assert type(found).__name__ == inside
    assert find_language_model(found) is found
    if hasattr(model, "get_decoder"):  # also without transformers' own word for it
        model.get_decoder = None
        assert find_language_model(model) is found


def test_two_decoders_are_not_told_apart_by_guessing():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (models.qwen2(shape=ONE_LAYER)[0] for _ in range(2))

    pair = Pair()
    assert find_language_model(pair) is pair


# --- without importing anything -----------------------------------------------------------------------------------


def test_the_backend_works_without_importing_the_package():
    code = """
import sys, torch
class Causal(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
x, model = torch.randn(1, 2, 9, 8), Causal()
before = set(sys.modules)
assert not any(name.startswith("mmi_compile") for name in before)
compiled = torch.compile(model, backend="mminference", options={"policy": "exact", "inner": "eager"})
with torch.no_grad():
    torch.testing.assert_close(compiled(x), model(x))
added = set(sys.modules) - before
assert "mmi_compile" in added
assert "transformers" not in added
assert not [name for name in added if name.startswith("mmi_compile.kernels.triton")]
import mmi_compile
print(mmi_compile.last_report().summary())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT.anchor)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1 of 1 attentions rewritten in 1 graph"
