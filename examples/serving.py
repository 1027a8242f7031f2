"""Serving: long prompts in chunks, caches that are used again, and how often that compiles.

    python examples/serving.py                   # some twenty seconds on a CPU

Prefill is what is rewritten; decoding runs as before. A prompt may be prefilled in chunks (`prefill_chunk_size`), so
that its activations fit; a second question about the same document reads what is new alone; a static cache is reset and
filled again. Answers are compared with those of the same model without this package.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from search_heads import TOKENS, build_model, build_prompt
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

import mmi_compile

CHUNK, NEW = 512, 4


def generate(model: Any, ids: Tensor, **arguments: Any) -> list[int]:
    """The new tokens."""
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
        **arguments,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


def compiled() -> int:
    return counters["mmi"]["graphs"]


def report_step(name: str, answer: list[int], expected: list[int], before: int) -> None:
    print(f"{name:44} {answer}   {compiled() - before} graphs compiled")
    assert answer == expected, f"{name}: {answer}, and without mmi_compile {expected}"


def runs() -> str:
    """How the attentions of the last prompt ran."""
    report = mmi_compile.last_report()
    assert report is not None
    _, run = report.runs()[-1]
    return f"{run['q_len']} rows against {run['kv_len']} keys: {run['path']}"


def main() -> None:
    # Prompts, chunks, decode steps and kinds of cache have graphs of their own. Beyond this limit (8 by default) Dynamo
    # runs what is new uncompiled. mmi_compile allows 64 where torch.compile takes a limit (2.13 does, 2.11 does not).
    torch._dynamo.config.recompile_limit = 32
    plain = build_model()
    model = copy.deepcopy(plain)
    mmi_compile.compile(model, policy="exact", inner="eager", dynamic=True)
    document = build_prompt(0)["input_ids"]
    questions = [build_prompt(seed)["input_ids"][:, :40] for seed in (1, 2, 3)]
    first = torch.cat([document, questions[0]], 1)
    print(f"a document of {TOKENS} tokens, questions of 40, {NEW} new tokens each\n")

    before = compiled()
    expected = generate(plain, first)
    report_step("whole", generate(model, first), expected, before)
    before = compiled()
    report_step(f"in chunks of {CHUNK}", generate(model, first, prefill_chunk_size=CHUNK), expected, before)
    print(f"  the last chunk: {runs()}")

    # A conversation: the cache holds the document and what was said, and each turn reads only what is new.
    caches = DynamicCache(config=model.config), DynamicCache(config=plain.config)
    said = document
    for turn, question in enumerate(questions):
        before = compiled()
        said = torch.cat([said, question], 1)
        answer, expected = (generate(m, said, past_key_values=c) for m, c in zip((model, plain), caches, strict=True))
        report_step(f"turn {turn + 1}, dynamic cache", answer, expected, before)
        said = torch.cat([said, torch.tensor([answer])], 1)
    print(f"  the last turn: {runs()}")

    # One allocation for all requests. Its length is fixed, so that requests of many lengths share it.
    slots = [StaticCache(config=m.config, max_cache_len=TOKENS + 64) for m in (model, plain)]
    for request, question in enumerate(questions):
        before = compiled()
        ids = torch.cat([document[:, : TOKENS - 100 * request], question], 1)
        answers = []
        for m, cache in zip((model, plain), slots, strict=True):
            cache.reset()
            answers.append(generate(m, ids, past_key_values=cache))
        report_step(f"request {request + 1}, {ids.shape[1]} tokens, static cache", *answers, before)
    report = mmi_compile.last_report()
    assert report is not None
    prefills = [site for site in report.sites if site.phase == "prefill"]
    assert prefills
    assert all(site.decision is not None and site.decision.rewritten for site in prefills)
    print(f"\n{report.summary()}")
    assert compiled() == before, "the last request compiled nothing"

    # Sparse chunks: each is planned against all keys that it sees, those of the chunks before it included.
    sparse = copy.deepcopy(plain)
    mmi_compile.compile(sparse, min_tokens=0, inner="eager", dynamic=True)
    generate(sparse, document, prefill_chunk_size=CHUNK)
    report = mmi_compile.last_report()
    assert report is not None
    _, run = report.runs()[-1]
    print(f"adaptive, the last chunk: {runs()}, {run['density']:.0%} of the dense tiles")
    assert run["density"] < 0.9


if __name__ == "__main__":
    main()
