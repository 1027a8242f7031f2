"""Models whose masks group tokens run exactly, with no mask left in the graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import mmi_compile
from mmi_compile import report
from mmi_compile.decision import Reason
from tests import families, harness, models

pytestmark = pytest.mark.fresh_dynamo


@pytest.fixture(autouse=True)
def _no_earlier_graphs() -> Iterator[None]:
    report.forget()
    yield
    report.forget()


Case = tuple[torch.nn.Module, dict[str, Any]]
SHAPE = models.Shape(layers=2)
BLOCKS = "(causal or same block)"


def gemma3(attn: str = "sdpa", **inputs: Any) -> Case:
    case = families.vision("gemma3", attn=attn, batch=2, padding="left", shape=SHAPE)
    return case.model, {**case.inputs, **inputs}


def paligemma(attn: str = "sdpa", **inputs: Any) -> Case:
    transformers = pytest.importorskip("transformers")
    text = {
        "model_type": "gemma", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
    }  # fmt: skip
    tower = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "vision_use_head": False, "projection_dim": 32,
    }  # fmt: skip
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=tower, image_token_index=60, projection_dim=32, hidden_size=32
    )
    torch.manual_seed(0)
    model = transformers.PaliGemmaForConditionalGeneration._from_config(config, attn_implementation=attn).eval()
    ids = torch.randint(3, 50, (2, 30))
    ids[:, :16] = 60
    types = (torch.arange(30) >= 20).long().expand(2, -1)
    live = torch.ones_like(ids)
    live[1, 26:] = 0
    prompt = {
        "input_ids": ids,
        "attention_mask": live,
        "token_type_ids": types,
        "pixel_values": torch.randn(2, 3, 32, 32),
    }
    return model, {**prompt, **inputs}


def packed(name: str, attn: str = "sdpa") -> Case:
    model, inputs = models.build(name, attn=attn, tokens=30, with_attention_mask=False, shape=SHAPE)
    documents = torch.cat([torch.arange(12), torch.arange(7), torch.arange(11)])[None]
    return model, {**inputs, "position_ids": documents, "use_cache": False}


def llama4(attn: str = "sdpa", **inputs: Any) -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, attention_chunk_size=8, no_rope_layers=[1, 0],
        num_local_experts=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM._from_config(config, attn_implementation=attn).eval()
    ids = torch.randint(3, 60, (2, 30))
    live = torch.ones_like(ids)
    live[0, :3] = 0
    return model, {"input_ids": ids, "attention_mask": live, **inputs}


CASES: dict[str, tuple[Callable[..., Case], list[str]]] = {
    "gemma3": (gemma3, [f"sliding window 8 and padding and {BLOCKS}", f"padding and {BLOCKS}"]),
    "paligemma": (paligemma, [f"padding and {BLOCKS}"] * 2),
    "llama": (lambda attn="sdpa": packed("llama", attn), ["causal and same document"] * 2),
    "qwen2": (lambda attn="sdpa": packed("qwen2", attn), ["causal and same document"] * 2),
    "mistral": (lambda attn="sdpa": packed("mistral", attn), ["causal and sliding window 8 and same document"] * 2),
    "llama4": (llama4, ["causal and padding and same chunk", "causal and padding"]),
}


def compiled(model: torch.nn.Module, through: str, **options: Any) -> Callable[..., Any]:
    options = {"policy": "exact", "inner": "eager", **options}
    if through == "bare":
        return torch.compile(model, backend="mminference", options=options)
    return mmi_compile.compile(copy.deepcopy(model), **options)


def logits(call: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = call(**inputs).logits
    live = inputs.get("attention_mask")
    return found if live is None else found[live.bool()]


def prefills() -> list[Any]:
    found = mmi_compile.last_report()
    assert found is not None
    return [site for site in found.sites if site.phase == "prefill"]


@pytest.mark.parametrize("through", ["bare", "compile"])
@pytest.mark.parametrize(
    ("name", "attn"),
    [(name, "sdpa") for name in CASES] + [("gemma3", "eager"), ("llama4", "eager"), ("llama", "eager")],
)
def test_exact_is_exact(name: str, attn: str, through: str) -> None:
    build, meanings = CASES[name]
    model, inputs = build(attn)
    expected = logits(model, inputs)
    torch.testing.assert_close(logits(compiled(model, through), inputs), expected, rtol=1e-5, atol=1e-5)
    sites = prefills()
    assert [site.mask for site in sites] == meanings
    assert all(site.decision.rewritten for site in sites)


@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_other_policies_run_exactly_and_say_so(name: str) -> None:
    model, inputs = CASES[name][0]()
    expected = logits(model, inputs)
    got = logits(compiled(model, "bare", policy="adaptive", min_tokens=0), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert {site.decision.reason for site in prefills()} == {Reason.GROUPED_MASK}


@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_under_aot_autograd(name: str) -> None:
    model, inputs = CASES[name][0]()
    expected = logits(model, inputs)
    got = logits(compiled(model, "bare", inner="aot_eager"), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [gemma3, paligemma, llama4])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_says_the_same(build: Callable[..., Case], cache: str) -> None:
    model, inputs = build()
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    expected = model.generate(**inputs, **settings)
    ours = mmi_compile.compile(copy.deepcopy(model), policy="exact", inner="eager")
    assert torch.equal(ours.generate(**inputs, **settings), expected)
    assert sum(site.decision.rewritten for site in prefills()) >= 2


def test_a_prefix_in_two_parts_is_computed_exactly_all_the_same() -> None:
    """PaliGemma's prefix is whatever has type 0: the interval of a row says too much where it comes again."""
    model, inputs = paligemma()
    inputs["token_type_ids"] = (torch.arange(30) % 9 >= 5).long().expand(2, -1)
    expected = logits(model, inputs)
    torch.testing.assert_close(logits(compiled(model, "bare"), inputs), expected, rtol=1e-5, atol=1e-5)
    assert "tokens of a group lie apart" in str(mmi_compile.last_report())


def test_nothing_of_the_mask_stays_in_the_graph() -> None:
    model, inputs = packed("llama")
    tokens = 600
    inputs = {
        "input_ids": torch.randint(3, 60, (1, tokens)), "position_ids": torch.arange(tokens)[None] % 100,
        "use_cache": False,
    }  # fmt: skip
    found = mmi_compile.explain(model, options={"policy": "exact"}, **inputs)
    (graph,) = [graph for graph in found.graphs if graph.sites]
    harness.max_square(graph.rewritten, tokens)


def test_what_is_compiled_is_the_part_that_makes_the_masks() -> None:
    from mmi_compile.language_model import find_language_model, with_masks

    model, _ = gemma3()
    assert with_masks(model, find_language_model(model)) is model.model
    copied = copy.deepcopy(model)
    assert copied.model.get_image_features.__self__ is copied.model
    for name in ("llava", "qwen2"):
        other, _ = models.build(name)
        decoder = find_language_model(other)
        assert with_masks(other, decoder) is decoder
