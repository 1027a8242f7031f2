"""Prompts in static caches, whole and in chunks: rewritten, and right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmi_compile
from mmi_compile import Reason, report
from mmi_compile.static_cache import counting_on_the_host
from tests import families, harness
from tests.prompts import Shape

pytestmark = pytest.mark.fresh_dynamo

OPTIONS = {"policy": "exact", "inner": "eager"}
ONE_LAYER = Shape(layers=1)


@pytest.fixture(autouse=True)
def _own_report() -> None:
    report.forget()


def decisions() -> list[mmi_compile.Decision]:
    made = mmi_compile.last_report()
    assert made is not None
    found = [site.decision for site in made.sites]
    assert all(decision is not None for decision in found)
    return [decision for decision in found if decision is not None and decision.reason is not Reason.DECODE]


def generated(model: Any, inputs: dict[str, Any], **arguments: Any) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=4, do_sample=False, **arguments).tolist()


CHUNKS = {
    "dynamic cache": {"prefill_chunk_size": 16},
    "static cache": {"prefill_chunk_size": 16, "cache_implementation": "static"},
    "whole prompt, static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("arguments", CHUNKS)
@pytest.mark.parametrize("name", ["llama", "mistral", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_generate_in_chunks(name, arguments):
    model, inputs = families.text(name, tokens=41, shape=ONE_LAYER)
    expected = generated(copy.deepcopy(model), inputs, **CHUNKS[arguments])
    mmi_compile.compile(model, **OPTIONS)
    assert generated(model, inputs, **CHUNKS[arguments]) == expected
    made = decisions()
    assert all(decision.rewritten for decision in made), [str(decision) for decision in made]
    assert len(made) == (1 if "whole" in arguments else 3)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generate_in_chunks_of_a_padded_batch(name):
    # The sliding cache of Mistral keeps the last keys alone, and their padding is read at an offset.
    model, inputs = families.text(name, tokens=41, batch=2, padding="left", shape=ONE_LAYER)
    expected = generated(copy.deepcopy(model), inputs, prefill_chunk_size=16)
    mmi_compile.compile(model, **OPTIONS)
    assert generated(model, inputs, prefill_chunk_size=16) == expected
    assert all(decision.rewritten for decision in decisions())


def logits(model: Any, cache: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_static_cache_used_twice(name):
    from transformers import StaticCache

    model, inputs = families.text(name, tokens=40, shape=ONE_LAYER)
    twin, ids = copy.deepcopy(model), inputs["input_ids"]
    mmi_compile.compile(model, **OPTIONS)
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
    for chunk in (ids[:, :25], ids[:, 25:], ids[:, :1]):
        actual, expected = logits(model, caches[0], chunk), logits(twin, caches[1], chunk)
        assert harness.relative_error(actual, expected) < 1e-5
    for cache in caches:
        cache.reset()
    actual, expected = logits(model, caches[0], ids[:, :30]), logits(twin, caches[1], ids[:, :30])
    assert harness.relative_error(actual, expected) < 1e-5
    assert all(decision.rewritten for decision in decisions())
    if name == "llama":
        assert isinstance(caches[0].get_seq_length(), Tensor)  # counts in a tensor again


def test_explain_sees_what_compile_does():
    from transformers import StaticCache

    model, inputs = families.text("llama", tokens=40, shape=ONE_LAYER)
    cache, ids = StaticCache(config=model.config, max_cache_len=64), inputs["input_ids"]
    logits(model, cache, ids[:, :25])
    made = mmi_compile.explain(model, input_ids=ids[:, 25:], past_key_values=cache, use_cache=True)
    assert made.summary() == "1 of 1 attentions rewritten in 1 graph"


def test_images_are_known_at_the_first_use_of_a_static_cache():
    from transformers import StaticCache

    case = families.vision("qwen2_5_vl")
    mmi_compile.compile(case.model, **OPTIONS)
    cache = StaticCache(config=case.model.config.get_text_config(), max_cache_len=case.types.shape[1] + 30)
    with torch.no_grad():
        case.model(**case.inputs, past_key_values=cache, use_cache=True)
    (graph,) = mmi_compile.last_report().graphs
    told = graph.to_json()["modality"]["prompt"]
    assert told["source"] == "mm_token_type_ids"
    assert sum(told["tokens"].values()) == case.types.numel()


def test_masks_made_by_a_user_are_kept():
    model, _ = families.text("llama", shape=ONE_LAYER)
    own = object()
    model.create_masks_for_generate = own
    mmi_compile.compile(model, **OPTIONS)
    assert model.create_masks_for_generate is own


def test_decode_steps_get_the_masks_that_generate_makes():
    model, inputs = families.text("mistral", shape=ONE_LAYER)
    mmi_compile.compile(model, **OPTIONS)
    padding = inputs["attention_mask"]
    for tokens, kept in ((9, True), (1, False)):
        made = model.create_masks_for_generate(
            config=model.config, inputs_embeds=torch.empty(1, tokens, 0), attention_mask=padding[:, :tokens],
            past_key_values=None, position_ids=None,
        )  # fmt: skip
        assert (made is not None and made.dim() == 2) == kept
    twin = copy.deepcopy(model)
    assert twin.create_masks_for_generate.__self__ is twin


def test_a_count_is_put_back_after_an_exception():
    class Layer:
        def __init__(self) -> None:
            self.cumulative_length = torch.tensor(3)

        def get_seq_length(self) -> Tensor:
            return self.cumulative_length

    class Cache:
        layers = (Layer(), Layer())

    def fails(**arguments: Any) -> None:
        assert [layer.get_seq_length() for layer in arguments["past_key_values"].layers] == [3, 3]
        assert not any(isinstance(layer.get_seq_length(), Tensor) for layer in Cache.layers)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        counting_on_the_host(fails)(input_ids=torch.zeros(1, 5), past_key_values=Cache())
    assert all(isinstance(layer.get_seq_length(), Tensor) for layer in Cache.layers)


def test_other_calls_are_passed_on():
    module = nn.Identity()
    x = torch.zeros(1, 1)
    assert counting_on_the_host(module.forward)(x) is x
    assert counting_on_the_host(module.forward)(input=x) is x
