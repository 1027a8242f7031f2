"""Prompts that are read in parts: every part's attention knows the modality of all tokens so far, or says why not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mmi_compile
from mmi_compile import cached_prompt, record, report, runtime
from mmi_compile.cached_prompt import CachedPrompt
from mmi_compile.prompt_hook import PromptHook
from mmi_compile.record import Record
from tests import families, harness, models
from tests.prompts import Shape

pytestmark = pytest.mark.fresh_dynamo

OPTIONS: dict[str, Any] = {"policy": "exact", "inner": "eager"}
ONE_LAYER = Shape(layers=1)


@pytest.fixture(autouse=True)
def _own_report() -> None:
    report.forget()
    record._state.__init__()  # type: ignore[misc]


class Seen:
    """What each prefill attention was told, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, bool, int]] = []
        self.sources: list[str] = []

    def __call__(self, call: runtime.AttentionCall) -> None:
        assert call.modality is not None
        self.calls.append((call.modality.clone(), call.known, call.geometry.q_offset))
        (prompt,) = {text for key, text in self._prompts().items() if call.key.startswith(key)}
        self.sources.append(prompt)

    def _prompts(self) -> dict[str, str]:
        return {key: run.source for key, run in runtime._modality.items()}


def check(seen: Seen, types: Tensor) -> None:
    """Every part knew all tokens so far, and the last one all of them."""
    for modality, known, offset in seen.calls:
        assert known
        assert torch.equal(modality.long(), types[:, : modality.shape[1]])
        assert offset < modality.shape[1]
    assert seen.calls[-1][0].shape == types.shape


def generated(model: Any, inputs: dict[str, Any], **arguments: Any) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=3, do_sample=False, **arguments).tolist()


# --- generate in chunks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("name", "parts"),
    [("llava", 3), ("qwen2_5_vl", 5), pytest.param("qwen3_vl", 7, marks=pytest.mark.slow), ("internvl", 2)],
)
def test_generate_in_chunks(name, parts, cache):
    case = families.vision(name, shape=ONE_LAYER)
    arguments = {"prefill_chunk_size": 16} | ({"cache_implementation": "static"} if cache == "static" else {})
    expected = generated(copy.deepcopy(case.model), case.inputs, **arguments)
    mmi_compile.compile(case.model, **OPTIONS)
    seen = Seen()
    with runtime.observing_attention(seen):
        assert generated(case.model, case.inputs, **arguments) == expected
    check(seen, case.types)
    assert [offset for _, _, offset in seen.calls] == [16 * part for part in range(parts)]
    assert "were read before" not in seen.sources[0]
    assert all(f"; {16 * part} tokens were read before" in seen.sources[part] for part in range(1, parts))
    if families.VISION[name].grids:
        (told,) = [run for run in runtime._modality.values() if run.ids.shape == case.types.shape]
        assert [(s.modality, s.start, s.frame_stride) for s in told.segments] == [
            (modality, start, stride) for modality, _, start, stride in case.media
        ]


def test_a_padded_batch_in_chunks():
    case = families.vision("llava", shape=ONE_LAYER, batch=2, padding="left")
    mmi_compile.compile(case.model, **OPTIONS)
    seen = Seen()
    with runtime.observing_attention(seen):
        generated(case.model, case.inputs, prefill_chunk_size=16)
    check(seen, case.types)


def test_chunks_cost_no_more_compilations_than_without_a_record():
    case = families.vision("llava", shape=ONE_LAYER)
    mmi_compile.compile(case.model, **OPTIONS)
    generated(case.model, case.inputs, prefill_chunk_size=16)
    first = len(report.remembered())
    assert first <= 4  # the first chunk, later chunks, the last chunk's length, decoding
    generated(case.model, case.inputs, prefill_chunk_size=16)
    assert len(report.remembered()) == first


# --- caches that are used again -----------------------------------------------------------------------------------


def filled(model: Any, inputs: dict[str, Any], cache: Any) -> None:
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)


def asked(model: Any, ids: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def llava() -> tuple[Any, dict[str, Any], Tensor, Any]:
    from transformers import DynamicCache

    case = families.vision("llava", shape=ONE_LAYER)
    return case.model, case.inputs, case.types, DynamicCache(config=case.model.config.get_text_config())


QUESTION = torch.randint(*models.TEXT_IDS, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("inference", [False, True])
def test_a_cache_filled_once_and_copied(inference):
    model, inputs, types, cache = llava()
    twin = copy.deepcopy(model)
    mmi_compile.compile(model, **OPTIONS)
    with torch.inference_mode(inference):
        filled(model, inputs, cache)
        for _ in range(2):
            again, plain = copy.deepcopy(cache), copy.deepcopy(cache)
            seen = Seen()
            with runtime.observing_attention(seen):
                made = asked(model, QUESTION, again)
            assert harness.relative_error(made, asked(twin, QUESTION, plain)) < 1e-5
            check(seen, torch.cat([types, torch.zeros_like(QUESTION)], 1))


def test_tokens_decoded_in_between_count_as_text():
    model, inputs, types, cache = llava()
    mmi_compile.compile(model, **OPTIONS)
    filled(model, inputs, cache)
    for step in range(3):
        asked(model, QUESTION[:, step : step + 1], cache)
    seen = Seen()
    with runtime.observing_attention(seen):
        asked(model, QUESTION, cache)
    check(seen, torch.cat([types, torch.zeros(1, 3, dtype=torch.int64), torch.zeros_like(QUESTION)], 1))
    assert "3 of them one at a time, which count as text" in seen.sources[0]


def test_a_cropped_cache():
    model, inputs, types, cache = llava()
    mmi_compile.compile(model, **OPTIONS)
    filled(model, inputs, cache)
    cache.crop(-15)
    seen = Seen()
    with runtime.observing_attention(seen):
        asked(model, QUESTION, cache)
    check(seen, torch.cat([types[:, :30], torch.zeros_like(QUESTION)], 1))


def reason(model: Any, ids: Tensor, cache: Any) -> str:
    """Why the attention took every token for text."""
    seen = Seen()
    with runtime.observing_attention(seen):
        asked(model, ids, cache)
    ((modality, known, _),) = seen.calls
    assert not known
    assert not modality.any()
    return seen.sources[0]


def test_a_cache_that_was_filled_elsewhere():
    model, inputs, _, cache = llava()
    filled(copy.deepcopy(model), inputs, cache)
    mmi_compile.compile(model, **OPTIONS)
    assert "the cache holds 45 tokens of which nothing is known" in reason(model, QUESTION, cache)
    assert "of which nothing is known" in reason(model, QUESTION, cache)  # and goes on so


def test_a_cache_that_was_changed_by_hand():
    model, inputs, _, cache = llava()
    twin = copy.deepcopy(model)
    mmi_compile.compile(model, **OPTIONS)
    filled(model, inputs, cache)
    asked(twin, QUESTION, cache)
    assert "the cache holds 54 tokens, and 45 were seen to go in" in reason(model, QUESTION, cache)
    _, inputs, _, cache = llava()
    filled(model, inputs, cache)
    asked(model, QUESTION[:, :1], cache)
    cache.crop(-6)
    assert "the cache holds 40 tokens, and 46 were seen to go in" in reason(model, QUESTION, cache)


def test_a_cache_whose_keys_are_others_now():
    model, inputs, _, cache = llava()
    twin = copy.deepcopy(model)
    mmi_compile.compile(model, **OPTIONS)
    filled(model, inputs, cache)
    cache.reorder_cache(torch.arange(QUESTION.shape[0]))
    assert "the cache was changed since" in reason(model, QUESTION, cache)
    _, inputs, _, cache = llava()
    filled(model, inputs, cache)
    cache.crop(-QUESTION.shape[1])
    asked(twin, QUESTION, cache)  # as many tokens as before
    assert "the cache was changed since" in reason(model, QUESTION, cache)


def test_a_shallow_copy_counts_its_own_steps():
    model, inputs, _, cache = llava()
    mmi_compile.compile(model, **OPTIONS)
    filled(model, inputs, cache)
    other = copy.copy(cache)
    cached_prompt.remember(other, None, 1)
    assert cached_prompt._ATTRIBUTE in vars(cache)
    assert vars(cache)[cached_prompt._ATTRIBUTE].steps == 0
    assert vars(other)[cached_prompt._ATTRIBUTE].steps == 1


def test_a_cache_of_another_batch_size():
    model, inputs, _, cache = llava()
    mmi_compile.compile(model, **OPTIONS)
    filled(model, inputs, cache)
    cache.batch_repeat_interleave(2)
    seen = Seen()
    with runtime.observing_attention(seen):
        asked(model, QUESTION.expand(2, -1), cache)
    assert "filled by 1 prompts, and 2 go on" in seen.sources[0]
    assert not seen.calls[0][1]


def test_a_static_cache_that_is_reset_forgets():
    from transformers import StaticCache

    model, inputs, _, _ = llava()
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
    mmi_compile.compile(model, **OPTIONS)
    filled(model, inputs, cache)
    cache.reset()
    asked(model, QUESTION, cache)
    seen = Seen()
    with runtime.observing_attention(seen):
        asked(model, QUESTION, cache)
    check(seen, torch.zeros(1, 18, dtype=torch.int64))


def test_a_cache_made_by_the_model():
    model, inputs, types, _ = llava()
    mmi_compile.compile(model, **OPTIONS)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    seen = Seen()
    with runtime.observing_attention(seen):
        asked(model, QUESTION, cache)
    check(seen, torch.cat([types, torch.zeros_like(QUESTION)], 1))


def test_a_forward_that_fails_leaves_what_was_known():
    model, inputs, types, cache = llava()
    mmi_compile.compile(model, **OPTIONS)
    filled(model, inputs, cache)
    before = getattr(cache, cached_prompt._ATTRIBUTE)
    with pytest.raises(Exception, match="index"), torch.no_grad():
        model(input_ids=QUESTION + 10**6, past_key_values=cache, use_cache=True)
    assert not record._state.hooked
    assert getattr(cache, cached_prompt._ATTRIBUTE) is before
    assert cache.get_seq_length() == 45
    seen = Seen()
    with runtime.observing_attention(seen):
        asked(model, QUESTION, cache)
    check(seen, torch.cat([types, torch.zeros_like(QUESTION)], 1))


# --- the hook alone -----------------------------------------------------------------------------------------------


class Cache:
    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def get_seq_length(self) -> int:
        return self.tokens


def test_videos_between_tokens_of_their_own_are_not_guessed_in_later_parts():
    case = families.vision("glm4v", shape=ONE_LAYER, with_token_types=False)
    hook = PromptHook(case.model)
    cache = Cache(0)
    found = hook.read((), {"input_ids": case.inputs["input_ids"][:, :20], "past_key_values": cache})
    assert found.ids is not None
    cached_prompt.remember(cache, found, 20)
    cache.tokens = 20
    found = hook.read((), {"input_ids": case.inputs["input_ids"][:, 20:], "past_key_values": cache})
    assert found.ids is None
    assert "a video that began in an earlier part looks like images" in found.source


def test_a_decode_step_computes_nothing():
    case = families.vision("qwen2_5_vl", shape=ONE_LAYER)
    hook = PromptHook(case.model)
    found = hook.read((), {"input_ids": torch.tensor([[200]]), "past_key_values": Cache(9)})
    assert found.ids is None
    assert found.source == "a decode step"


def test_a_cache_without_room_for_attributes_is_left_alone():
    found = Record("a hook", ids=torch.zeros(1, 4, dtype=torch.int8))
    cached_prompt.remember((), found, 4)
    cached_prompt.continued(found, 4, ())
    assert found.ids is None
    assert "nothing is known" in found.source


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(1, 2), st.data())
def test_parts_and_steps_add_up(parts, batch, data):
    cache, whole = Cache(0), torch.zeros(batch, 0, dtype=torch.int8)
    for tokens in [2, *parts]:
        flat = data.draw(st.lists(st.integers(0, 2), min_size=batch * tokens, max_size=batch * tokens))
        ids = torch.tensor(flat, dtype=torch.int8).view(batch, tokens)
        found = Record("a hook", ids=ids.clone())
        if tokens > 1 and cache.tokens:
            cached_prompt.continued(found, cache.tokens, cache)
        whole = torch.cat([whole, ids if tokens > 1 else torch.zeros_like(ids)], 1)
        if tokens > 1:
            assert torch.equal(found.ids, whole)
        cached_prompt.remember(cache, found if tokens > 1 else Record("a decode step"), tokens)
        cache.tokens += tokens
    kept = getattr(cache, cached_prompt._ATTRIBUTE)
    assert isinstance(kept, CachedPrompt)
    assert kept.ids.shape[1] + kept.steps == cache.tokens
